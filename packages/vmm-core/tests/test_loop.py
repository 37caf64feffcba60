"""Loops: what is watched is called on its thread, one at a time, and stops when it is told to."""

from __future__ import annotations

import gc
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmm_core.clock import MonotonicClock, VirtualClock
from vmm_core.directloop import DirectLoop
from vmm_core.epoll import FAILURES
from vmm_core.errors import LifecycleError
from vmm_core.loop import READ, WRITE, Loop
from vmm_core.threads import IoThread

GENEROUS = 60  # seconds that a state may take to come about on a busy machine


class Failures:
    """Collects what left a callback."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Exception]] = []
        self.arrived = threading.Event()

    def __call__(self, where: str, error: Exception) -> None:
        self.seen.append((where, error))
        self.arrived.set()


class Pipe:
    """A pipe that the tests watch."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fill(self, data: bytes = b"x") -> None:
        os.write(self.writer, data)

    def empty(self) -> bytes:
        return os.read(self.reader, 100)

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            os.close(fd)


def wait(event: threading.Event) -> None:
    assert event.wait(GENEROUS)


@contextmanager
def once(condition: Callable[[], bool], action: Callable[[], None]) -> Iterator[None]:
    """Do `action` on a thread of its own as soon as `condition` holds, which is meanwhile. Afterwards that thread is over."""

    def watch() -> None:
        while not condition():
            os.sched_yield()
        action()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    watcher.join(GENEROUS)
    assert not watcher.is_alive()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def failures() -> Failures:
    return Failures()


@pytest.fixture
def clock() -> MonotonicClock:
    return MonotonicClock()


@pytest.fixture
def thread(clock: MonotonicClock, failures: Failures) -> Iterator[IoThread]:
    thread = IoThread("iothread0", clock, failures)
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture
def direct() -> Iterator[DirectLoop]:
    loop = DirectLoop("direct", VirtualClock())
    yield loop
    loop.close()


def loops_are_loops(thread: IoThread, direct: DirectLoop) -> list[Loop]:
    """Checked by mypy."""
    return [thread, direct]


# Watching


def test_a_readable_descriptor_is_reported_on_the_loops_thread(thread: IoThread, pipe: Pipe) -> None:
    calls: list[tuple[int, bytes, int]] = []
    done = threading.Event()

    def ready(mask: int) -> None:
        calls.append((mask, pipe.empty(), threading.get_native_id()))
        done.set()

    thread.add_fd(pipe.reader, READ, ready)
    pipe.fill(b"kick")
    wait(done)
    assert calls == [(READ, b"kick", thread.thread_id)]


def test_a_second_watch_of_a_descriptor_is_refused(direct: DirectLoop, pipe: Pipe) -> None:
    direct.add_fd(pipe.reader, READ, lambda mask: None)
    with pytest.raises(ValueError, match="watched already"):
        direct.add_fd(pipe.reader, READ, lambda mask: None)


def test_a_regular_file_is_refused_and_leaves_no_watch(direct: DirectLoop, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        for _ in range(2):
            with pytest.raises(PermissionError):
                direct.add_fd(file.fileno(), READ, lambda mask: None)


def test_what_is_watched_can_change(direct: DirectLoop, pipe: Pipe) -> None:
    masks: list[int] = []
    direct.add_fd(pipe.writer, 0, masks.append)
    direct.poll()
    assert masks == []
    direct.modify_fd(pipe.writer, WRITE)
    direct._turn(0)
    assert masks == [WRITE]
    with pytest.raises(ValueError, match="is not watched"):
        direct.modify_fd(pipe.reader, READ)


def test_a_callback_that_removes_another_of_the_same_batch_silences_it(direct: DirectLoop) -> None:
    pipes = [Pipe(), Pipe()]
    called: list[int] = []

    def ready(which: int) -> Callable[[int], None]:
        def callback(mask: int) -> None:
            called.append(which)
            for pipe in pipes:
                direct.remove_fd(pipe.reader)

        return callback

    for which, pipe in enumerate(pipes):
        direct.add_fd(pipe.reader, READ, ready(which))
        pipe.fill()
    direct.poll()
    assert len(called) == 1
    for pipe in pipes:
        pipe.close()


def test_a_new_descriptor_with_a_reused_number_is_not_told_of_the_old_ones_event(direct: DirectLoop) -> None:
    first, second, third = Pipe(), Pipe(), Pipe()
    told: list[str] = []

    def swap(mask: int) -> None:
        first.empty()
        second.empty()
        for pipe in (first, second):
            direct.remove_fd(pipe.reader)
            os.dup2(third.reader, pipe.reader)  # the number now means a pipe with nothing in it
            direct.add_fd(pipe.reader, READ, lambda mask: told.append("stale"))

    for pipe in (first, second):
        direct.add_fd(pipe.reader, READ, swap)
        pipe.fill()
    direct.poll()
    assert told == []
    for pipe in (first, second, third):
        pipe.close()


def test_after_remove_on_another_thread_the_callback_is_over_and_stays_over(thread: IoThread, pipe: Pipe) -> None:
    inside, leave = threading.Event(), threading.Event()
    over: list[bool] = []

    def slow(mask: int) -> None:
        pipe.empty()
        inside.set()
        wait(leave)
        over.append(True)

    thread.add_fd(pipe.reader, READ, slow)
    pipe.fill()
    wait(inside)
    with once(lambda: bool(thread._calls), leave.set):
        thread.remove_fd(pipe.reader)
    assert over == [True]
    thread.run(lambda: None)
    assert over == [True]
    thread.remove_fd(pipe.reader)  # harmless


# Failures


def test_a_failing_callback_is_reported_and_the_loop_goes_on(thread: IoThread, failures: Failures, pipe: Pipe) -> None:
    def fails(mask: int) -> None:
        pipe.empty()
        raise ValueError("bug in a device")

    thread.add_fd(pipe.reader, READ, fails)
    pipe.fill()
    wait(failures.arrived)
    assert thread.run(lambda: "alive") == "alive"
    (where, error), *rest = failures.seen
    assert (where, str(error), rest) == (f"loop iothread0: callback of descriptor {pipe.reader}", "bug in a device", [])


def test_a_callback_that_always_fails_loses_its_watch_and_does_not_spin(pipe: Pipe, failures: Failures) -> None:
    loop = DirectLoop("direct", VirtualClock(), failures)

    def fails(mask: int) -> None:
        raise ValueError("bug in a device")

    loop.add_fd(pipe.reader, READ, fails)
    pipe.fill()
    loop.poll()
    assert len(failures.seen) == FAILURES
    assert "no longer watched" in failures.seen[-1][0]
    loop.close()


def test_a_failing_failure_report_does_not_end_the_loop(clock: MonotonicClock) -> None:
    def fails(*_: object) -> None:
        raise ValueError("bug")

    thread = IoThread("iothread0", clock, fails)
    thread.start()
    thread.call_soon(fails)
    thread.call_soon(lambda: None)
    assert thread.run(lambda: "alive") == "alive"
    thread.stop()


def test_failing_timers_and_soon_callbacks_are_reported(thread: IoThread, failures: Failures) -> None:
    def fails() -> None:
        raise ValueError("bug")

    thread.call_soon(fails)
    thread.call_later(0, fails)
    done = threading.Event()
    thread.call_later(0, lambda: thread.call_soon(done.set))
    wait(done)
    assert sorted(where for where, _ in failures.seen) == ["loop iothread0: soon-callback", "loop iothread0: timer"]


# Calls


def test_run_returns_what_the_function_returns_on_the_loops_thread(thread: IoThread) -> None:
    assert thread.run(threading.get_native_id) == thread.thread_id != threading.get_native_id()


def test_run_raises_what_the_function_raised(thread: IoThread, failures: Failures) -> None:
    def fails() -> None:
        raise KeyError("inner")

    with pytest.raises(KeyError, match="inner"):
        thread.run(fails)
    assert failures.seen == []


def test_run_on_the_loops_own_thread_is_direct(thread: IoThread) -> None:
    assert thread.run(lambda: thread.run(lambda: 7)) == 7


def test_run_is_direct_before_the_start_and_after_the_stop(clock: MonotonicClock, failures: Failures) -> None:
    thread = IoThread("iothread0", clock, failures)
    assert thread.run(threading.get_native_id) == threading.get_native_id()
    thread.start()
    thread.stop()
    assert thread.run(threading.get_native_id) == threading.get_native_id()


def test_soon_callbacks_run_in_order_and_may_add_more(thread: IoThread) -> None:
    seen: list[int] = []
    done = threading.Event()

    def first() -> None:
        seen.append(1)
        thread.call_soon(lambda: (seen.append(3), done.set()))  # type: ignore[func-returns-value]

    thread.run(lambda: (thread.call_soon(first), thread.call_soon(lambda: seen.append(2))))  # type: ignore[func-returns-value]
    wait(done)
    assert seen == [1, 2, 3]


def test_a_soon_callback_that_adds_itself_for_ever_does_not_starve_descriptors(thread: IoThread, pipe: Pipe) -> None:
    done = threading.Event()

    def again() -> None:
        if not done.is_set():
            thread.call_soon(again)

    thread.add_fd(pipe.reader, READ, lambda mask: (pipe.empty(), done.set()))  # type: ignore[func-returns-value]
    thread.call_soon(again)
    pipe.fill()
    wait(done)


def test_calls_from_many_threads_all_arrive(thread: IoThread) -> None:
    seen: list[int] = []
    callers = [
        threading.Thread(target=lambda: [thread.call_soon(lambda: seen.append(1)) for _ in range(500)] and None) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    done = threading.Event()
    thread.call_soon(done.set)
    wait(done)
    assert len(seen) == 2000


# Timers


def test_a_timer_runs_on_the_loops_thread_not_before_its_time(thread: IoThread, clock: MonotonicClock) -> None:
    armed = clock.now()
    ran: list[tuple[int, int]] = []
    done = threading.Event()
    thread.call_later(3_300_000, lambda: (ran.append((clock.now(), threading.get_native_id())), done.set()))  # type: ignore[func-returns-value]
    wait(done)
    ((when, where),) = ran
    assert when - armed >= 3_300_000
    assert where == thread.thread_id


def test_a_cancelled_timer_does_not_run(thread: IoThread, clock: MonotonicClock) -> None:
    ran: list[str] = []
    clock.pause()  # however long this thread is kept from cancelling
    timer = thread.call_later(1_000_000, lambda: ran.append("cancelled"))
    timer.cancel()
    done = threading.Event()
    thread.call_later(2_000_000, done.set)
    clock.resume()
    wait(done)
    assert ran == []


def test_the_machines_timers_stand_still_with_its_clock_and_the_hosts_go_on(thread: IoThread, clock: MonotonicClock) -> None:
    machine, host = threading.Event(), threading.Event()
    clock.pause()
    thread.call_later(0, machine.set)
    thread.call_later(1_000_000, host.set, host=True)
    wait(host)
    assert not machine.is_set()
    clock.resume()
    wait(machine)


def test_virtual_time_runs_the_timers_of_a_thread_before_it_returns(failures: Failures) -> None:
    clock = VirtualClock()
    thread = IoThread("iothread0", clock, failures)
    thread.start()
    ran: list[tuple[int, int]] = []
    thread.call_later(5_000_000_000, lambda: ran.append((clock.now(), threading.get_native_id())))
    expected = [(5_000_000_000, thread.thread_id)]
    assert clock.set(10_000_000_000) == 10_000_000_000
    assert ran == expected
    thread.stop()


def test_a_timer_without_delay_needs_no_step_of_virtual_time(failures: Failures) -> None:
    thread = IoThread("iothread0", VirtualClock(), failures)
    thread.start()
    done = threading.Event()
    thread.call_later(0, done.set)
    wait(done)
    thread.stop()


# Quiet


def test_nothing_runs_between_quiesce_and_resume_but_what_the_owner_runs(thread: IoThread, pipe: Pipe) -> None:
    seen: list[str] = []
    done = threading.Event()
    thread.add_fd(pipe.reader, READ, lambda mask: (pipe.empty(), seen.append("fd")))  # type: ignore[func-returns-value]
    thread.quiesce()
    pipe.fill()
    thread.call_soon(lambda: seen.append("soon"))
    thread.call_later(0, lambda: seen.append("timer"))
    assert thread.run(threading.get_native_id) == thread.thread_id
    assert seen == []
    thread.resume()
    thread.call_later(0, lambda: thread.call_soon(done.set))
    wait(done)
    assert sorted(seen) == ["fd", "soon", "timer"]


def test_quiesce_waits_for_the_callback_that_runs(thread: IoThread, pipe: Pipe) -> None:
    inside, leave = threading.Event(), threading.Event()
    over: list[bool] = []

    def slow(mask: int) -> None:
        pipe.empty()
        inside.set()
        wait(leave)
        over.append(True)

    thread.add_fd(pipe.reader, READ, slow)
    pipe.fill()
    wait(inside)
    with once(lambda: thread._parked > 0, leave.set):
        thread.quiesce()
    assert over == [True]
    thread.resume()


def test_two_owners_want_quiet_until_both_resume(thread: IoThread) -> None:
    done = threading.Event()
    thread.quiesce()
    thread.quiesce()
    thread.call_soon(done.set)
    thread.resume()
    thread.run(lambda: None)
    assert not done.is_set()
    thread.resume()
    wait(done)
    with pytest.raises(LifecycleError, match="not quiesced"):
        thread.resume()


def test_quiesce_and_resume_a_thousand_times_under_load(thread: IoThread, pipe: Pipe) -> None:
    counter = [0]
    thread.add_fd(pipe.writer, WRITE, lambda mask: counter.__setitem__(0, counter[0] + 1))
    for _ in range(1000):
        thread.quiesce()
        before = counter[0]
        assert thread.run(lambda: counter[0]) == before
        thread.resume()
    thread.remove_fd(pipe.writer)


def test_a_quiet_thread_can_be_stopped_and_loses_its_watches(thread: IoThread, pipe: Pipe) -> None:
    thread.add_fd(pipe.reader, READ, lambda mask: None)
    thread.quiesce()
    thread.remove_fd(pipe.reader)
    thread.stop()


# Life


def test_the_thread_is_visible_under_its_name(thread: IoThread) -> None:
    thread.run(lambda: None)  # it names itself before anything else
    comm = Path(f"/proc/self/task/{thread.thread_id}/comm").read_text()
    assert comm == "iothread0\n"


@pytest.mark.parametrize("name", ["\udcff", "ü" * 20])
def test_a_name_that_is_no_text_ends_no_thread(clock: MonotonicClock, failures: Failures, name: str) -> None:
    thread = IoThread(name, clock, failures)
    thread.start()
    thread.run(lambda: None)  # it names itself before anything else
    assert thread.thread_id in {int(task.name) for task in Path("/proc/self/task").iterdir()}
    thread.stop()


def test_a_long_name_is_cut_where_the_kernel_cuts_it(clock: MonotonicClock, failures: Failures) -> None:
    thread = IoThread("a-thread-with-a-long-name", clock, failures)
    thread.start()
    thread.run(lambda: None)
    assert Path(f"/proc/self/task/{thread.thread_id}/comm").read_text() == "a-thread-with-a\n"
    thread.stop()


def test_stop_leaves_no_thread_and_no_descriptor(clock: MonotonicClock, failures: Failures) -> None:
    def inventory() -> tuple[set[str], int]:
        return {entry.name for entry in Path("/proc/self/fd").iterdir()}, threading.active_count()

    gc.collect()  # what other tests left for it would go in the middle of this one
    before = inventory()
    for _ in range(3):
        thread = IoThread("iothread0", clock, failures)
        thread.start()
        thread.call_later(10**15, lambda: None)
        thread.stop()
        thread.stop()
        assert thread.thread_id == 0
    assert inventory() == before


def test_a_thread_cannot_stop_or_wait_for_itself(thread: IoThread) -> None:
    for method in (thread.stop, thread.quiesce):
        with pytest.raises(LifecycleError, match="cannot"):
            thread.run(method)


def test_calls_after_the_stop_are_dropped_and_harm_no_reused_descriptor(clock: MonotonicClock, failures: Failures) -> None:
    thread = IoThread("iothread0", clock, failures)
    thread.start()
    thread.stop()
    pipes = [Pipe() for _ in range(4)]  # take the numbers that the loop gave back
    thread.call_soon(lambda: pytest.fail("ran"))
    thread.call_later(0, lambda: pytest.fail("ran"))
    thread.clock_changed()
    for pipe in pipes:
        assert select.select([pipe.reader], [], [], 0) == ([], [], [])
        pipe.close()


def test_a_thread_starts_once(thread: IoThread) -> None:
    with pytest.raises(LifecycleError, match="started before"):
        thread.start()


def test_whoever_runs_a_function_while_the_thread_stops_gets_an_answer(clock: MonotonicClock, failures: Failures) -> None:
    for _ in range(50):
        thread = IoThread("iothread0", clock, failures)
        thread.start()
        answers: list[int] = []
        callers = [threading.Thread(target=lambda: answers.append(thread.run(lambda: 1))) for _ in range(3)]  # noqa: B023
        for caller in callers:
            caller.start()
        thread.stop()
        for caller in callers:
            caller.join(GENEROUS)
        assert answers == [1, 1, 1]


# The loop without a thread


def test_poll_runs_everything_that_follows_from_what_is_ready(direct: DirectLoop, pipe: Pipe) -> None:
    seen: list[str] = []

    def ready(mask: int) -> None:
        pipe.empty()
        direct.call_soon(lambda: (seen.append("soon"), direct.call_later(0, lambda: seen.append("timer"))))  # type: ignore[func-returns-value]

    direct.add_fd(pipe.reader, READ, ready)
    direct.poll()
    assert seen == []
    pipe.fill()
    direct.poll()
    assert seen == ["soon", "timer"]


def test_poll_does_not_move_time_but_takes_host_delays_as_passed(direct: DirectLoop) -> None:
    seen: list[str] = []
    direct.call_later(1, lambda: seen.append("machine"))
    direct.call_later(10**12, lambda: seen.append("host"), host=True)
    direct.poll()
    assert seen == ["host"]
    direct.clock.set(1)  # type: ignore[attr-defined]
    assert seen == ["host", "machine"]


def test_poll_ends_even_when_a_device_does_not(direct: DirectLoop) -> None:
    def again() -> None:
        direct.call_soon(again)

    again()
    with pytest.raises(RuntimeError, match="still busy"):
        direct.poll()
