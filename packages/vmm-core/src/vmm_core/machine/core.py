"""What every machine has: RAM, two buses, vCPUs, I/O threads, components with state, and a life cycle.

All methods belong to one thread, the owner (the main thread of a VMM). What happens on vCPU threads and I/O threads reaches the
owner as a `MachineEvent` through the `post` function it gave, which must be safe to call from any thread and must not block.

Not here: which devices a machine has and where they are (`microvm`), and what a client is told about it (QMP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, Protocol

from vmm_core.bus import Bus
from vmm_core.errors import LifecycleError, StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.hypervisor import ExitReason, Hypervisor, Vcpu
from vmm_core.state import State, Stateful

PIO_SIZE = 0x1_0000
MMIO_SIZE = 1 << 52  # the widest physical address of x86_64 and aarch64

# A vCPU leaves the guest within microseconds of its kick; its last exit may wait for the GIL and a slow disk's descriptor.
# Longer than this is a bug of ours, reported instead of waited for.
PAUSE_LIMIT = 30.0  # seconds


class VmStatus(Enum):
    """Where a machine is in its life. The values are QMP's RunState names where QMP has one."""

    CREATED = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "internal-error"  # a vCPU cannot go on; the machine stands still until it is reset or ended
    SHUTDOWN = "shutdown"


class EventKind(Enum):
    """What a machine asks its owner to do."""

    RESET = "reset"
    POWER_OFF = "power-off"
    FAILURE = "failure"


class MachineEvent(NamedTuple):
    """A request from inside the machine. `report` says why, for the log.

    The vCPUs stand still from the request on, until the owner answers it with reset(), fail() or shutdown(). Whoever asks once
    asks again: Linux tries one way to reset after the other. So a request counts for its `generation` only, that is up to the
    next reset (`Machine.is_current`).
    """

    kind: EventKind
    report: str
    generation: int


class Component(Stateful, Protocol):
    """A part of the machine that a guest can see."""

    def reset(self) -> None:
        """Go back to the power-on state. Only while the machine is paused."""
        ...


class Pausable(Protocol):
    """A part that acts on its own, outside of vCPU exits: a queue on an I/O thread, a timer."""

    def pause(self) -> None:
        """Finish what is under way and start nothing new. Returns when guest memory and back ends are at rest.

        When it raises, the part goes on as before.
        """
        ...

    def resume(self) -> None:
        """Go on. When it raises, the part is still paused."""
        ...


class Closable(Protocol):
    """A part that holds descriptors, threads or files."""

    def close(self) -> None: ...


class Machine:
    """A machine under construction, then running, then gone.

    Subclasses add devices in their constructor; the owner then calls start(), and close() at the end on every path.
    """

    def __init__(self, hypervisor: Hypervisor, memory: GuestMemory, post: Callable[[MachineEvent], None]) -> None:
        """Put RAM in front of the guest. The machine owns `hypervisor` and `memory` from here on."""
        self.hypervisor = hypervisor
        self.memory = memory
        self.pio = Bus("port bus", PIO_SIZE)
        self.mmio = Bus("memory bus", MMIO_SIZE)
        self.vcpus: list[Vcpu] = []
        self.components: dict[str, Component] = {}
        self.status = VmStatus.CREATED
        self._post = post
        self._pausable: list[Pausable] = []
        self._resting: list[Pausable] = []  # those that are paused
        self._generation = 0  # raised by whatever replaces the guest that runs
        self._asked = -1  # the generation in which a request was made last
        self._was_paused = False  # when a vCPU failed
        self._closable: list[Closable] = []
        hypervisor.map_memory(memory)

    # Construction

    def add_component(self, name: str, component: Component) -> None:
        """Make `component` part of reset and of saved state, under `name`."""
        if name in self.components:
            raise ValueError(f"there is a component named {name!r} already")
        self.components[name] = component

    def remove_component(self, name: str) -> None:
        """Forget a component that was unplugged."""
        del self.components[name]

    def add_pausable(self, part: Pausable) -> None:
        """Let `part` take part in pause and resume: paused in order of addition, resumed in the opposite order.

        To a machine that stands still, a part comes paused.
        """
        if self.status in (VmStatus.PAUSED, VmStatus.FAILED):
            self._rest(part)
        self._pausable.append(part)

    def remove_pausable(self, part: Pausable) -> None:
        """Forget a part that was unplugged."""
        self._pausable.remove(part)
        if part in self._resting:
            self._resting.remove(part)

    def add_closable(self, part: Closable) -> None:
        """Close `part` with the machine; the last one added is closed first."""
        self._closable.append(part)

    def remove_closable(self, part: Closable) -> None:
        """Forget a part that was unplugged; whoever unplugged it closes it."""
        self._closable.remove(part)

    # Requests from vCPU threads

    def vcpu_exited(self, index: int, reason: ExitReason, report: str) -> None:
        """Take a vCPU's last words (`hypervisor.VcpuListener`)."""
        kind = {
            ExitReason.RESET: EventKind.RESET,
            # A triple fault ends the machine: guests of StratoVirt's microvm power off with `reboot=t` and clients wait for
            # SHUTDOWN (reference machine-x86_64, section 7.5).
            ExitReason.SHUTDOWN: EventKind.POWER_OFF,
            ExitReason.POWER_OFF: EventKind.POWER_OFF,
            ExitReason.CRASH: EventKind.FAILURE,
        }[reason]
        self._ask(kind, f"CPU {index}: {report}")

    def reset_requested(self, report: str = "guest reset") -> None:
        """Take a device's request for a reset (`devices.acpi_pm.PowerListener`)."""
        self._ask(EventKind.RESET, report)

    def power_off_requested(self, report: str = "guest power-off") -> None:
        """Take a device's request to switch the machine off (`devices.acpi_pm.PowerListener`)."""
        self._ask(EventKind.POWER_OFF, report)

    def _ask(self, kind: EventKind, report: str) -> None:
        """Let no vCPU go on, and tell the owner. On the thread of a vCPU, which leaves the guest before its next instruction."""
        self._asked = self._generation
        for vcpu in self.vcpus:
            vcpu.request_pause()
        self._post(MachineEvent(kind, report, self._generation))

    def is_current(self, event: MachineEvent) -> bool:
        """Tell whether the guest that asked for `event` is still there. A reset, or another state, has replaced it otherwise."""
        return event.generation == self._generation

    # Life cycle, on the owner's thread

    def start(self, *, paused: bool = False) -> None:
        """Start the vCPU threads, running unless `paused`. Raises HypervisorError when one cannot be set up."""
        self._expect(VmStatus.CREATED)
        for vcpu in self.vcpus:
            vcpu.start()
        if paused:
            for part in self._pausable:
                self._rest(part)
            self.hypervisor.pause_clock()
            self.status = VmStatus.PAUSED
            return
        self._run_vcpus()
        self.status = VmStatus.RUNNING

    def pause(self) -> bool:
        """Bring vCPUs, queues and back ends to rest. False when the machine was paused already.

        Raises LifecycleError when one of them does not; the machine runs on then, all of it.
        """
        if self.status is VmStatus.PAUSED:
            return False
        self._expect(VmStatus.RUNNING)
        self._stop_the_world()
        self.status = VmStatus.PAUSED
        return True

    def resume(self) -> bool:
        """Go on after pause(), or begin after start(paused=True). False when the machine was running already.

        Raises LifecycleError when a part does not; the machine stands still then, all of it.
        """
        if self.status is VmStatus.RUNNING:
            return False
        self._expect(VmStatus.PAUSED)
        self._all_or_nothing(self._starting(), self._stopping())
        self.status = VmStatus.RUNNING
        return True

    def fail(self) -> None:
        """Stand still after a vCPU failed, for someone to look at. Until a reset nothing runs: a paused machine has failed, too.

        Raises LifecycleError when something does not come to rest; all the rest does.
        """
        if self.status not in (VmStatus.RUNNING, VmStatus.PAUSED):
            return
        self._was_paused = self.status is VmStatus.PAUSED
        self.status = VmStatus.FAILED
        failures = _each(self._stopping())
        if failures:
            raise failures[0]

    def reset(self) -> None:
        """Bring every component to its power-on state and begin again; a paused machine stays paused.

        What was asked for before does not count any more (`is_current`).
        """
        if self.status in (VmStatus.CREATED, VmStatus.SHUTDOWN):
            raise LifecycleError(f"a machine that is in state {self.status.value} cannot be reset")
        go_on = self.status is VmStatus.RUNNING
        if self.status is VmStatus.RUNNING:
            self._stop_the_world()
        elif self.status is VmStatus.FAILED:
            go_on = not self._was_paused
            for step in self._stopping():  # it may have failed with something still running
                step()
        self.status = VmStatus.PAUSED
        self._generation += 1
        for component in self.components.values():
            component.reset()
        self.hypervisor.reset()
        self.load_firmware()
        for vcpu in self.vcpus:
            vcpu.reset()
        if go_on:
            self.resume()

    def load_firmware(self) -> None:
        """Put kernel, tables and whatever else a power-on finds in RAM there again. Raises BootError when that fails."""

    def shutdown(self) -> None:
        """End the guest: no vCPU runs after this. The machine stays to be looked at until close().

        Raises HypervisorError when a vCPU cannot be stopped; all the others are.
        """
        if self.status is not VmStatus.SHUTDOWN:
            self.status = VmStatus.SHUTDOWN
            failures = _each(vcpu.stop for vcpu in self.vcpus)
            if failures:
                raise failures[0]

    def close(self) -> None:
        """Give everything back: threads, descriptors, guest memory. Twice is fine; every part is closed even if one fails."""
        parts = [*reversed(self._closable), self.hypervisor, self.memory]
        failures = _each([self.shutdown, *(part.close for part in parts)])
        self._closable.clear()
        self._pausable.clear()
        self._resting.clear()
        self.components.clear()
        if failures:
            raise ExceptionGroup("parts of the machine could not be closed", failures)

    # State

    def save(self) -> dict[str, State]:
        """Take the state of every component, vCPU and of the hypervisor. Only while paused."""
        self._expect(VmStatus.PAUSED)
        states = {name: component.save() for name, component in self.components.items()}
        states["hypervisor"] = self.hypervisor.vm_state.save()
        states |= {f"vcpu{vcpu.index}": vcpu.save() for vcpu in self.vcpus}
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Put states from save() into a machine of the same configuration. Only while paused.

        Raises StateError when a component's state is missing, or one is left over.
        """
        self._expect(VmStatus.PAUSED)
        stateful: dict[str, Stateful] = {**self.components, "hypervisor": self.hypervisor.vm_state}
        stateful |= {f"vcpu{vcpu.index}": vcpu for vcpu in self.vcpus}
        odd = sorted(stateful.keys() ^ states.keys())
        if odd:
            raise StateError(f"saved state and machine differ in: {', '.join(odd)}")
        self._generation += 1
        for name, component in stateful.items():
            component.restore(states[name])

    def vcpu_state(self, index: int) -> State:
        """Take the state of one vCPU of a machine that has started; it stands still meanwhile.

        Raises LifecycleError before the start and after the end, IndexError for a vCPU that there is not.
        """
        if self.status in (VmStatus.CREATED, VmStatus.SHUTDOWN):
            raise LifecycleError(f"the vCPUs of a machine that is in state {self.status.value} have no state")
        with self._no_vcpu_inside():
            return self.vcpus[index].save()

    @contextmanager
    def _no_vcpu_inside(self) -> Iterator[None]:
        """Hold the vCPUs of a running machine outside of every device meanwhile: one may be taken away."""
        if self.status is not VmStatus.RUNNING:
            yield
            return
        self._all_or_nothing((self._stop_vcpus,), (self._run_vcpus,))
        try:
            yield
        finally:
            self._run_vcpus()

    # Coming to rest and going on, in steps that can be taken again: what is done already is left as it is

    def _stop_the_world(self) -> None:
        self._all_or_nothing(self._stopping(), self._starting())

    def _stopping(self) -> Iterator[Callable[[], None]]:
        yield self._stop_vcpus
        # What the guest wrote and the hypervisor has not told yet belongs to the time before the pause.
        yield self.hypervisor.flush_coalesced
        for part in self._pausable:
            if part not in self._resting:
                yield partial(self._rest, part)
        yield self.hypervisor.pause_clock

    def _starting(self) -> Iterator[Callable[[], None]]:
        yield self.hypervisor.resume_clock
        for part in reversed(self._pausable):
            if part in self._resting:
                yield partial(self._go_on, part)
        yield self._run_vcpus

    def _all_or_nothing(self, steps: Iterable[Callable[[], None]], undo: Iterable[Callable[[], None]]) -> None:
        """Take every step; when one fails, take those of `undo` instead, and raise what failed.

        A machine that can go neither on nor back has failed, and stands still as far as it can.
        """
        try:
            for step in steps:
                step()
        except Exception as error:
            failures = _each(undo)
            if failures:
                self._was_paused = self.status is VmStatus.PAUSED
                self.status = VmStatus.FAILED
                _each(self._stopping())
                raise LifecycleError(f"{error}; and undoing what was done failed: {failures[0]}") from error
            raise

    def _stop_vcpus(self) -> None:
        for vcpu in self.vcpus:
            vcpu.request_pause()
        for vcpu in self.vcpus:
            if not vcpu.wait_paused(PAUSE_LIMIT):
                raise LifecycleError(f"CPU {vcpu.index} did not leave the guest within {PAUSE_LIMIT:.0f} s")

    def _run_vcpus(self) -> None:
        if self._asked == self._generation:
            return  # whoever has asked for a reset, or for the end, waits for it
        for vcpu in self.vcpus:
            vcpu.resume()
        if self._asked == self._generation:  # by one that was in the guest before the last of them was let go
            for vcpu in self.vcpus:
                vcpu.request_pause()

    def _rest(self, part: Pausable) -> None:
        with self._named(part, "pause"):
            part.pause()
        self._resting.append(part)

    def _go_on(self, part: Pausable) -> None:
        with self._named(part, "go on"):
            part.resume()
        self._resting.remove(part)

    @contextmanager
    def _named(self, part: object, action: str) -> Iterator[None]:
        """Say which part the host's refusal is about."""
        try:
            yield
        except OSError as error:
            names = [name for name, component in self.components.items() if component is part]
            name = names[0] if names else getattr(part, "name", type(part).__name__)
            raise LifecycleError(f"{name} cannot {action}: {error.strerror or error}") from error

    def _expect(self, status: VmStatus) -> None:
        if self.status is not status:
            raise LifecycleError(f"the machine is in state {self.status.value}, not {status.value}")


def _each(actions: Iterable[Callable[[], None]]) -> list[Exception]:
    """Carry out every action, also when others fail; return the failures."""
    failures: list[Exception] = []
    for action in actions:
        try:
            action()
        except Exception as error:
            failures.append(error)
    return failures
