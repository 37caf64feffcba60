"""The life cycle of a machine when something goes wrong: requests that cross a reset, failed vCPUs, parts that do not rest."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from vmm_core.errors import HypervisorError, LifecycleError
from vmm_core.guestmem import GuestMemory
from vmm_core.hypervisor import ExitReason
from vmm_core.hypervisor.testmode import IdleVcpu, RecordingHypervisor
from vmm_core.machine.core import EventKind, Machine, MachineEvent, VmStatus
from vmm_core.state import versioned

MiB = 1 << 20


class Hypervisor(RecordingHypervisor):
    """Says whether the guest's clock stands still, or refuses to stop it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock_stands = False
        self.refusal: Exception | None = None

    def pause_clock(self) -> None:
        if self.refusal:
            raise self.refusal
        self.clock_stands = True

    def resume_clock(self) -> None:
        if self.refusal:
            raise self.refusal
        self.clock_stands = False


class Vcpu(IdleVcpu):
    """Leaves the guest when it is asked to, or does not."""

    stuck = False

    def request_pause(self) -> None:
        if not self.stuck:
            super().request_pause()


@versioned(1)
class NoState(NamedTuple):
    """A part has none."""


class Part:
    """Rests when it is told to, or raises."""

    def __init__(self) -> None:
        self.resting = False
        self.refusals: list[Exception] = []

    def pause(self) -> None:
        self._change(True)

    def resume(self) -> None:
        self._change(False)

    def _change(self, resting: bool) -> None:
        assert self.resting is not resting, "asked for what is done already"
        if self.refusals:
            raise self.refusals.pop(0)
        self.resting = resting

    def reset(self) -> None:
        assert self.resting

    def save(self) -> NoState:
        return NoState()

    def restore(self, state: Any) -> None:
        assert self.resting


class Bench:
    """A machine of two vCPUs and three parts that has been started, and what it asked for."""

    def __init__(self) -> None:
        self.events: list[MachineEvent] = []
        self.hypervisor = Hypervisor()
        self.machine = Machine(self.hypervisor, GuestMemory([(0, MiB)]), self.events.append)
        self.vcpus = [Vcpu(0), Vcpu(1)]
        self.machine.vcpus += self.vcpus
        self.parts = [Part(), Part(), Part()]
        for number, part in enumerate(self.parts):
            self.machine.add_component(f"part{number}", part)
            self.machine.add_pausable(part)
        self.machine.start()

    @property
    def moving(self) -> list[bool]:
        """Whether each vCPU, each part and the clock goes on."""
        parts = [not part.resting for part in self.parts]
        return [*(vcpu.running for vcpu in self.vcpus), *parts, not self.hypervisor.clock_stands]

    def runs(self) -> bool:
        return self.machine.status is VmStatus.RUNNING and all(self.moving)

    def stands(self, status: VmStatus = VmStatus.PAUSED) -> bool:
        return self.machine.status is status and not any(self.moving)

    def crash(self, number: int = 0) -> None:
        self.machine.vcpu_exited(number, ExitReason.CRASH, "KVM_EXIT_UNKNOWN")


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    for part in bench.parts:
        part.refusals.clear()
    bench.hypervisor.refusal = None
    bench.machine.close()


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class TestRequests:
    def test_what_was_asked_for_before_a_reset_does_not_count_after_it(self, bench: Bench) -> None:
        # Linux: the ACPI register, a little later the keyboard controller, and then a triple fault.
        bench.machine.reset_requested("guest reset through ACPI")
        bench.machine.reset_requested("guest reset through the keyboard controller")
        bench.machine.vcpu_exited(0, ExitReason.SHUTDOWN, "triple fault")
        assert [event.kind for event in bench.events] == [EventKind.RESET, EventKind.RESET, EventKind.POWER_OFF]
        assert all(bench.machine.is_current(event) for event in bench.events)
        bench.machine.reset()
        assert not any(bench.machine.is_current(event) for event in bench.events)
        bench.machine.power_off_requested()
        assert bench.machine.is_current(bench.events[-1])

    def test_what_another_guest_asked_for_does_not_count_once_a_state_is_restored(self, bench: Bench) -> None:
        bench.machine.pause()
        states = bench.machine.save()
        bench.machine.power_off_requested()
        bench.machine.restore(states)
        assert not bench.machine.is_current(bench.events[0])

    @pytest.mark.parametrize(
        "ask",
        [
            lambda machine: machine.reset_requested(),
            lambda machine: machine.power_off_requested(),
            lambda machine: machine.vcpu_exited(1, ExitReason.SHUTDOWN, "triple fault"),
        ],
    )
    def test_no_vcpu_goes_on_after_a_request_until_the_reset(self, bench: Bench, ask: Callable[[Machine], None]) -> None:
        ask(bench.machine)
        assert not any(vcpu.running for vcpu in bench.vcpus)
        bench.machine.vcpu_state(0)  # stands the vCPUs still, and lets none go that asked
        assert not any(vcpu.running for vcpu in bench.vcpus)
        bench.machine.reset()
        assert bench.runs()

    def test_a_vcpu_that_is_let_go_after_another_has_asked_does_not_go_on(self, bench: Bench) -> None:
        first, go = bench.vcpus[0], bench.vcpus[0].resume

        def go_and_ask() -> None:
            go()
            bench.machine.reset_requested()

        first.resume = go_and_ask  # type: ignore[method-assign]
        bench.machine.pause()
        bench.machine.resume()
        assert not any(vcpu.running for vcpu in bench.vcpus)
        first.resume = go  # type: ignore[method-assign]
        bench.machine.reset()
        assert bench.runs()


class TestFailures:
    def test_a_failed_vcpu_stops_everything_until_a_reset(self, bench: Bench) -> None:
        bench.crash()
        bench.machine.fail()
        assert bench.stands(VmStatus.FAILED)
        bench.machine.fail()
        for change in (bench.machine.pause, bench.machine.resume):
            with pytest.raises(LifecycleError, match="internal-error"):
                change()
        bench.machine.reset()
        assert bench.runs()

    def test_a_failure_that_is_heard_of_during_a_pause_is_one(self, bench: Bench) -> None:
        bench.machine.pause()
        bench.crash()
        bench.machine.fail()
        assert bench.stands(VmStatus.FAILED)
        with pytest.raises(LifecycleError, match="internal-error"):
            bench.machine.resume()
        bench.machine.reset()
        assert bench.stands(VmStatus.PAUSED)
        bench.machine.resume()
        assert bench.runs()

    def test_what_does_not_come_to_rest_keeps_nothing_else_from_it(self, bench: Bench) -> None:
        bench.parts[1].refusals.append(no_space())
        with pytest.raises(LifecycleError, match=r"^part1 cannot pause: No space left on device$"):
            bench.machine.fail()
        assert bench.machine.status is VmStatus.FAILED
        assert bench.moving == [False, False, False, True, False, False]
        bench.machine.reset()  # which brings the rest of it to rest first
        assert bench.runs()

    def test_a_machine_that_has_not_begun_or_has_ended_does_not_fail(self, bench: Bench) -> None:
        bench.machine.shutdown()
        bench.machine.fail()
        assert bench.machine.status is VmStatus.SHUTDOWN


class TestPausesThatFail:
    def test_a_part_that_cannot_pause_leaves_the_machine_running_and_the_next_pause_works(self, bench: Bench) -> None:
        bench.parts[1].refusals.append(no_space())
        with pytest.raises(LifecycleError, match=r"^part1 cannot pause: No space left on device$"):
            bench.machine.pause()
        assert bench.runs()
        assert not bench.machine.resume()
        assert bench.machine.pause()
        assert bench.stands()
        assert bench.machine.resume()
        assert bench.runs()

    def test_so_does_a_vcpu_that_does_not_leave_the_guest(self, bench: Bench) -> None:
        bench.vcpus[1].stuck = True
        with pytest.raises(LifecycleError, match="CPU 1 did not leave the guest within 30 s"):
            bench.machine.pause()
        assert bench.runs()
        with pytest.raises(LifecycleError, match="CPU 1"):
            bench.machine.vcpu_state(0)
        assert bench.runs()

    def test_so_does_a_hypervisor_that_refuses(self, bench: Bench) -> None:
        def refuse() -> None:
            bench.hypervisor.refusal = None
            raise HypervisorError("KVM_GET_CLOCK: Invalid argument")

        bench.hypervisor.pause_clock = refuse  # type: ignore[method-assign]
        with pytest.raises(HypervisorError, match="KVM_GET_CLOCK"):
            bench.machine.pause()
        assert bench.runs()

    def test_a_reset_that_cannot_pause_first_changes_nothing(self, bench: Bench) -> None:
        bench.parts[2].refusals.append(no_space())
        bench.machine.reset_requested()
        with pytest.raises(LifecycleError, match="part2"):
            bench.machine.reset()
        assert bench.machine.is_current(bench.events[0])

    def test_a_part_that_cannot_go_on_leaves_the_machine_paused_and_the_next_attempt_works(self, bench: Bench) -> None:
        bench.machine.pause()
        bench.parts[0].refusals.append(no_space())
        with pytest.raises(LifecycleError, match=r"^part0 cannot go on: No space left on device$"):
            bench.machine.resume()
        assert bench.stands()
        bench.machine.resume()
        assert bench.runs()

    def test_a_machine_that_can_go_neither_on_nor_back_has_failed(self, bench: Bench) -> None:
        bench.parts[1].refusals += [no_space()]
        bench.hypervisor.refusal = HypervisorError("KVM_SET_CLOCK: Invalid argument")
        with pytest.raises(LifecycleError, match=r"part1 cannot pause: .*; and undoing .* failed: KVM_SET_CLOCK"):
            bench.machine.pause()
        assert bench.machine.status is VmStatus.FAILED
        assert bench.moving == [False, False, False, False, False, True]  # all but the clock
        bench.hypervisor.refusal = None
        bench.machine.reset()
        assert bench.runs()

    def test_what_is_plugged_into_a_machine_that_stands_still_stands_still_or_is_not_plugged(self, bench: Bench) -> None:
        bench.machine.pause()
        late = Part()
        late.refusals.append(no_space())
        with pytest.raises(LifecycleError, match="Part cannot pause"):
            bench.machine.add_pausable(late)
        bench.machine.add_pausable(late)
        assert late.resting
        bench.machine.remove_pausable(late)
        bench.machine.resume()
        assert late.resting, "it is its owner's again"
