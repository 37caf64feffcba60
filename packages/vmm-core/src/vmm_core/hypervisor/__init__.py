"""What a machine needs from a hypervisor, as protocols. Two things implement them: `kvm` and `testmode`.

A machine is built against these names only, so the same code runs guests (KVM) and device tests (no KVM at all).
Nothing here differs by CPU architecture; what does lives beside it in `vmm_core.x86_64`.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a machine without saved state need not load what states are made of
    from vmm_core.bus import Bus
    from vmm_core.guestmem import GuestMemory
    from vmm_core.interrupt import InterruptLine
    from vmm_core.state import State, Stateful


class ExitReason(Enum):
    """Why a vCPU left the guest for good, or asks the machine for something. Port and memory accesses never get here."""

    SHUTDOWN = "shutdown"  # triple fault (KVM_EXIT_SHUTDOWN)
    RESET = "reset"  # KVM_SYSTEM_EVENT_RESET
    POWER_OFF = "power-off"  # KVM_SYSTEM_EVENT_SHUTDOWN
    CRASH = "crash"  # KVM_SYSTEM_EVENT_CRASH, or the hypervisor cannot go on: the report says why


class VcpuListener(Protocol):
    """Who is told when a vCPU cannot go on. Called on the vCPU's own thread; must not block on other vCPUs."""

    def vcpu_exited(self, index: int, reason: ExitReason, report: str) -> None:
        """`report` is for the log: the exit reason in the hypervisor's words, and the registers."""
        ...


class Vcpu(Protocol):
    """One virtual CPU with the thread that runs it.

    A vCPU is made paused. Clients know its thread by the name ``CPU 0/Kvm``, or whatever its number is. After it told the
    listener that it cannot go on, it counts as paused, and resume() does nothing until reset() or restore().
    """

    @property
    def index(self) -> int: ...

    @property
    def thread_id(self) -> int:
        """Kernel thread id; 0 before start()."""
        ...

    def start(self) -> None:
        """Start the thread, paused: it waits until resume(). Raises HypervisorError when the set-up in it fails."""
        ...

    def request_pause(self) -> None:
        """Ask the vCPU to leave the guest. Returns at once; never holds a lock that an exit handler needs."""
        ...

    def wait_paused(self, timeout: float) -> bool:
        """Wait until the vCPU is out of the guest and every exit is completed; False when it took longer."""
        ...

    def resume(self) -> None: ...

    def reset(self) -> None:
        """Load the boot state again. Raises LifecycleError unless paused."""
        ...

    def save(self) -> State:
        """Return every register (`vmm_core.state.Stateful`). Raises LifecycleError unless paused."""
        ...

    def restore(self, state: Any) -> None:
        """Put back what save() returned. Raises StateError for a state that does not fit, LifecycleError unless paused."""
        ...

    def stop(self) -> None:
        """End the thread and give the vCPU back. Safe from any thread but the vCPU's own, and twice.

        Raises HypervisorError instead of hanging when a device keeps the vCPU from leaving an exit.
        """
        ...


class Hypervisor(Protocol):
    """One virtual machine at the hypervisor's side. Owned by the machine; close() gives everything back."""

    def map_memory(self, memory: GuestMemory) -> None:
        """Make guest RAM visible to the guest, one slot a region."""
        ...

    def show(self, address: int, size: int) -> memoryview | None:
        """Make memory that the guest reads at `address` without an exit and cannot write, and return it, all zeros.

        Writes there reach doorbells and the device's bus as if it were none. For registers that read as what was last put there.
        Behind map_memory(), in whole pages. None where that cannot be had.
        """
        ...

    def set_shown(self, address: int, shown: bool) -> None:
        """Have reads of what show() made at `address` reach the bus too, or no longer. Of a running machine as well.

        Not from two threads at once. Raises HypervisorError when the hypervisor refuses, and nothing has changed then.
        """
        ...

    def interrupt_line(self, gsi: int) -> InterruptLine:
        """The wire of a global system interrupt, connected through an irqfd. The same object for the same number."""
        ...

    def route_message(self, gsi: int, address: int, data: int) -> None:
        """Make an edge on the line of `gsi` write `data` to `address`: a message-signalled interrupt.

        Only numbers that no controller of the hypervisor has as a pin can be messages; on x86_64 those from 24 on. From any
        thread, like unroute_message().
        """
        ...

    def unroute_message(self, gsi: int) -> None:
        """Make an edge on the line of `gsi` do nothing again. Harmless when it does already."""
        ...

    def add_ioeventfd(self, address: int, size: int, fd: int, *, match: int | None = None, port: bool = False) -> None:
        """Turn guest writes of `size` bytes (0: any) at `address` into events on `fd`, only those equal to `match` if given.

        `port` places it on the port bus instead of memory. Such a write never reaches the device's bus.
        """
        ...

    def remove_ioeventfd(self, address: int, size: int, fd: int, *, match: int | None = None, port: bool = False) -> None: ...

    def coalesce(self, address: int, size: int, *, port: bool = False) -> None:
        """Let the hypervisor collect writes in this range and deliver them late: in order, before the next exit is handled.

        A hypervisor that cannot just delivers each write at once. Only before the first vCPU starts.
        """
        ...

    def flush_coalesced(self) -> None:
        """Deliver the writes collected so far. From any thread; a slow timer calls it for a guest that never exits."""
        ...

    def create_vcpu(self, index: int, pio: Bus, mmio: Bus, listener: VcpuListener, boot: object) -> Vcpu:
        """Make a vCPU. `boot` (`vmm_core.x86_64.vcpu_boot.VcpuBoot`) is the state that start() and reset() load."""
        ...

    @property
    def vm_state(self) -> Stateful:
        """State of what the hypervisor keeps for the whole VM: interrupt controllers, timers, clock."""
        ...

    def reset(self) -> None:
        """Bring interrupt controllers and timers to their power-on state. Only while every vCPU is paused."""
        ...

    def start_dirty_log(self) -> None: ...

    def dirty_pages(self) -> list[tuple[int, bytes]]:
        """Pages written since the last call: (first guest address, bitmap of 4 KiB pages, bit 0 of byte 0 first) a region."""
        ...

    def stop_dirty_log(self) -> None: ...

    def pause_clock(self) -> None:
        """Stop the guest's paravirtual clock, so that a pause is no jump in the guest's time. All vCPUs are paused."""
        ...

    def resume_clock(self) -> None: ...

    def close(self) -> None:
        """Give everything back. Twice is fine."""
        ...
