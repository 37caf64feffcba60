"""I/O threads: the implementation of `vmm_core.loop.Loop` with a thread of its own.

A callback costs one dictionary lookup over the system call that found its event. Calls from other threads come through a
queue and one eventfd.

Not here: vCPU threads (the hypervisor's), and what is done on a loop.
"""

from __future__ import annotations

import os
import select
from _thread import LockType, allocate_lock
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread, get_ident, get_native_id
from typing import Any, TypeVar

from vmm_core.clock import DueTimer, TimerClock
from vmm_core.epoll import BATCH, EpollLoop
from vmm_core.errors import LifecycleError
from vmm_core.loop import READ

T = TypeVar("T")

MILLISECOND = 1_000_000
SELECT_LIMIT = 1024  # FD_SETSIZE: select() takes no descriptor from here on


def name_thread(name: str) -> None:
    """Give the calling thread a name that ps, top and /proc/self/task/*/comm show: 15 bytes of it."""
    with suppress(OSError):  # no /proc in a jail: the name is for people only
        fd = os.open(f"/proc/self/task/{get_native_id()}/comm", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, name.encode(errors="replace")[:15])  # an argument can be bytes that are no text
        finally:
            os.close(fd)


class _Call:
    """A function that another thread waits for."""

    __slots__ = ("_done", "_error", "_function", "_result")

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._done: LockType = allocate_lock()
        self._done.acquire()

    def execute(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # raised again where run() was called
            self._error = error
        self._done.release()

    def wait(self) -> Any:
        self._done.acquire()
        try:
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            self._error = None  # an exception that refers to its own frame would live until the next collection


class IoThread(EpollLoop):
    """An epoll loop on a thread of its own (`vmm_core.loop.Loop`). stop() gives everything back."""

    def __init__(self, name: str, clock: TimerClock, failed: Callable[[str, Exception], None]) -> None:
        """Make a loop that can be given work; start() begins it.

        `name` is the thread's; `failed` is told on the loop's thread of an exception that left a callback.
        """
        super().__init__(name, clock, self._tell)
        self._tell_owner = failed
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._event, READ)
        self._handlers[self._event] = self._woken_up
        self._woken = False  # the event is set and not yet read: no need to set it again
        self._calls: deque[_Call] = deque()
        self._gate = Lock()  # guards _woken, _alive, _parked and the life of _event
        self._alive = False
        self._ending = False
        self._parked = 0  # how many owners want quiet
        self._quiet = Event()
        self._ident = 0
        self._thread: Thread | None = None
        self.thread_id = 0  # the kernel's, for query-iothreads; 0 while no thread runs
        clock.attach(self)

    # Life

    def start(self) -> None:
        """Start the thread. Raises LifecycleError when it was started before, or the system has no room for a thread."""
        if self._thread is not None or self._ending:
            raise LifecycleError(f"I/O thread {self.name} was started before")
        thread = Thread(target=self._main, name=self.name, daemon=True)
        self._alive = True  # from here on run() goes through the thread
        try:
            thread.start()
        except RuntimeError as error:
            self._alive = False
            raise LifecycleError(f"I/O thread {self.name}: {error}") from None
        self._thread = thread
        # Thread.start() has waited for these. What the new thread does first, such as naming itself, is not waited for.
        self._ident, self.thread_id = thread.ident or 0, thread.native_id or 0

    def stop(self) -> None:
        """End the thread after the callback that runs, then close everything. Work not begun is dropped. Twice is fine.

        Raises LifecycleError on the loop's own thread, which cannot wait for itself.
        """
        if get_ident() == self._ident:
            raise LifecycleError(f"I/O thread {self.name} cannot stop itself")
        with self._gate:
            self._ending = self._interrupted = True
            self._wake_locked()
        if self._thread is not None:
            self._thread.join()
            self.thread_id = 0
        with self._gate:
            if self._event < 0:
                return
            self.clock.detach(self)
            self._epoll.close()
            os.close(self._event)
            self._event = -1
        self._handlers.clear()
        self._soon.clear()

    def quiesce(self) -> None:
        """Return when no callback runs, and let none start until resume(). Owners may nest. run() still works.

        Raises LifecycleError on the loop's own thread.
        """
        if get_ident() == self._ident:
            raise LifecycleError(f"I/O thread {self.name} cannot wait for itself")
        with self._gate:
            self._parked += 1
            self._interrupted = True
            alive = self._alive
            self._wake_locked()
        if alive:
            self._quiet.wait()

    def resume(self) -> None:
        """Take back one quiesce(). Raises LifecycleError when there was none."""
        with self._gate:
            if self._parked == 0:
                raise LifecycleError(f"I/O thread {self.name} is not quiesced")
            self._parked -= 1
            self._wake_locked()

    pause = quiesce  # the machine's word for it (`machine.core.Pausable`)

    def close(self) -> None:
        """End the thread and close everything, as stop() does."""
        self.stop()

    # Loop, from any thread

    def remove_fd(self, fd: int) -> None:
        """Stop watching; on return the callback does not run and will not run again."""
        self.run(lambda: self._forget_fd(fd))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread; dropped after stop()."""
        self._soon.append(callback)
        if get_ident() != self._ident:
            self._wake()

    def call_later(self, delay_ns: int, callback: Callable[[], None], *, host: bool = False) -> DueTimer:
        """Run `callback` on the loop's thread after `delay_ns` of the machine's clock, or of the host's."""
        timer = self._add_timer(delay_ns, callback, host)
        if get_ident() != self._ident:
            self._wake()
        return timer

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread and return its result, or raise what it raised."""
        if get_ident() != self._ident:
            call = _Call(function)
            with self._gate:
                alive = self._alive
                if alive:
                    self._calls.append(call)
                    self._wake_locked()
            if alive:
                result: T = call.wait()
                return result
        return function()

    # The clock's view (`clock.TimerSource`)

    def run_due(self) -> None:
        """Run due timers of the machine's clock on the loop's thread, and wait for them. Nothing runs while quiesced."""
        self.run(lambda: None if self._parked else self._run_timers(self._timers, self._timers.sequence))

    def clock_changed(self) -> None:
        """Look at the clock again."""
        self._wake()

    # The thread

    def _tell(self, where: str, error: Exception) -> None:
        with suppress(Exception):  # of a failing report there is nobody left to tell, and the loop has other work
            self._tell_owner(where, error)

    def _wake(self) -> None:
        with self._gate:
            self._wake_locked()

    def _wake_locked(self) -> None:
        if not self._woken and self._event >= 0:
            self._woken = True
            os.eventfd_write(self._event, 1)

    def _woken_up(self, mask: int) -> None:
        os.eventfd_read(self._event)
        with self._gate:
            self._woken = False  # after the read: what is queued before this is served below, what comes later wakes again
        self._serve_calls()

    def _serve_calls(self) -> None:
        calls = self._calls
        for _ in range(len(calls)):
            calls.popleft().execute()

    def _main(self) -> None:
        self._ident = get_ident()
        name_thread(self.name)
        try:
            while not self._ending:
                if self._interrupted:
                    self._park()
                    continue
                events = self._poll(self._wait_ns())
                if events:
                    self._dispatch(events)
                if self._timers:
                    self._run_timers(self._timers, self._timers.sequence)
                if self._host_timers:
                    self._run_timers(self._host_timers, self._host_timers.sequence)
                if self._soon:
                    self._run_soon()
        finally:
            with self._gate:
                self._alive = False
            self._serve_calls()  # whoever waits for one gets it
            self._ident = 0
            self._quiet.set()

    def _poll(self, wait: int | None) -> list[tuple[int, int]]:
        """Wait for events. epoll counts milliseconds: the last one is slept with select(), which counts microseconds."""
        if self._fresh:
            self._fresh.clear()
        if wait is None:
            return self._epoll.poll(None, BATCH)
        if wait >= MILLISECOND:
            # Rounded up to milliseconds by the select module: half a one less than asked keeps it from adding another.
            return self._epoll.poll((wait // MILLISECOND - 0.5) / 1000, BATCH)
        if wait > 0 and (fd := self._epoll.fileno()) < SELECT_LIMIT:
            select.select([fd], [], [], wait / 1_000_000_000)
            wait = 0
        return self._epoll.poll(wait / 1_000_000_000, BATCH)

    def _park(self) -> None:
        """Stand still until every owner has resumed, or stop(). Functions from run() are still served."""
        wake = select.poll()
        wake.register(self._event, select.POLLIN)
        while True:
            with self._gate:
                if self._ending:
                    return
                if self._parked == 0:
                    self._quiet.clear()
                    self._interrupted = False
                    return
            self._quiet.set()
            wake.poll()
            self._woken_up(READ)
