"""Power management of a hardware-reduced ACPI machine: sleep and reset registers, and the generic event device.

Source: ACPI 6.5, sections 4.8.3.6 (reset register), 4.8.3.7 (sleep control and status) and 5.6.9 (generic event device).

An event that nobody has read is told of again, ever less often. A guest that is starting may have looked at the slots and not
yet have a driver for the event device: its interrupt is masked, an edge is lost then, and nobody would ever read the register.

Not here: the tables and AML that tell a guest of these (`vmm_core.acpi`), where they are (`layout`), and what a request to
reset or power off leads to.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmm_core.state import expect, expect_range, versioned

if TYPE_CHECKING:
    from vmm_core.bus import BusDevice
    from vmm_core.interrupt import InterruptLine
    from vmm_core.loop import Loop, Timer

# Events. StratoVirt's have bits 0 to 4 (reference machine-x86_64, section 16.5).
POWER_BUTTON = 1 << 0
FIRST_SLOT = 1 << 8  # slot n was filled: this, shifted by n
SLOTS = 24  # that have an event

SLEEP_CONTROL, SLEEP_STATUS, RESET = range(3)  # offsets of the one-byte registers
_SLP_EN, _SLP_TYP_SHIFT, _SLP_TYP_MASK = 1 << 5, 2, 0x7
_SOFT_OFF = 5  # SLP_TYP of S5: the first number of the package _S5

REMIND, REMIND_LAST = 100_000_000, 10_000_000_000  # nanoseconds of the host's time


class PowerListener(Protocol):
    """Who carries out what a guest asks for. Called on vCPU threads; must not block."""

    def reset_requested(self, report: str) -> None:
        """Begin again; `report` says for the log how the guest asked."""
        ...

    def power_off_requested(self, report: str) -> None:
        """End the guest; `report` says for the log how it asked."""
        ...


@versioned(1)
class AcpiPmState(NamedTuple):
    """Events that the guest has not read."""

    events: int


class AcpiPm:
    """The registers, as two devices of the memory bus: `registers` (3 bytes) and `events` (4 bytes)."""

    def __init__(self, listener: PowerListener, line: InterruptLine, loop: Loop, *, reset_value: int) -> None:
        """`line` is the event device's interrupt; a guest resets by writing `reset_value`. `loop` runs the reminders."""
        self._line = line
        self._loop = loop
        self._lock = Lock()
        self._pending = 0
        self._timer: Timer | None = None
        self._patience = 0  # nanoseconds to the next reminder
        self.registers: BusDevice = _Registers(listener, reset_value)
        self.events: BusDevice = _Events(self)

    def press_power_button(self) -> None:
        """Ask the guest to switch itself off. From any thread; pressing twice before it looks is pressing once."""
        self.raise_event(POWER_BUTTON)

    def raise_event(self, event: int) -> None:
        """Add events to those the guest has not read yet, and tell it. From any thread."""
        with self._lock:
            self._pending |= event
            self._remind_after(REMIND)
        self._line.trigger()

    def _remind_after(self, delay: int) -> None:
        """The lock is held."""
        self._forget_timer()
        self._patience = delay
        self._timer = self._loop.call_later(delay, self._remind, host=True)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _remind(self) -> None:
        """Send the interrupt again, ever less often if the guest does not look."""
        with self._lock:
            if not self._pending:  # read just now
                return
            self._remind_after(min(2 * self._patience, REMIND_LAST))
        self._line.trigger()

    def take_events(self) -> int:
        """Return the events not read so far, and clear them: what reading the register does."""
        with self._lock:
            pending, self._pending = self._pending, 0
            self._forget_timer()
            return pending

    def close(self) -> None:
        """Take back the timer. Twice is fine."""
        self.take_events()

    def reset(self) -> None:
        """Forget events that nobody read."""
        self.take_events()

    def save(self) -> AcpiPmState:
        """Take the state."""
        return AcpiPmState(self._pending)

    def restore(self, state: object) -> None:
        """Put a state back. Raises StateError. No interrupt for now: if one was on its way, the controller's own state has it."""
        new = expect(state, AcpiPmState, "acpi")
        with self._lock:
            self._pending = expect_range(new.events, 0, 0xFFFF_FFFF, "acpi.events")
            self._forget_timer()
            if self._pending:
                self._remind_after(REMIND)


class _Events:
    """The event register: 32 bits, cleared by reading; AML reads it as one double word."""

    def __init__(self, pm: AcpiPm) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        if offset != 0 or size != 4:
            return 0  # a part of it would lose the events in the rest
        return self._pm.take_events()

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class _Registers:
    """Sleep control, sleep status and reset. They hold nothing: writing them is asking for something."""

    def __init__(self, listener: PowerListener, reset_value: int) -> None:
        self._listener = listener
        self._reset_value = reset_value

    def read(self, offset: int, size: int) -> int:
        # SLP_EN reads as 0 (table 4.28), and this machine never sleeps, so it never woke either.
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        for at in range(offset, min(offset + size, RESET + 1)):
            self._write(at, value >> 8 * (at - offset) & 0xFF)

    def _write(self, register: int, value: int) -> None:
        if register == SLEEP_CONTROL:
            # Any other type is a state that the tables do not name, which a guest cannot mean.
            if value & _SLP_EN and value >> _SLP_TYP_SHIFT & _SLP_TYP_MASK == _SOFT_OFF:
                self._listener.power_off_requested("guest power-off through ACPI")
        elif register == RESET and value == self._reset_value:
            self._listener.reset_requested("guest reset through ACPI")
