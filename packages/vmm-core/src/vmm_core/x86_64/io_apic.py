"""An I/O APIC in user space, for interrupts beyond the pins of the one that the hypervisor has.

Each pin is a global system interrupt that the hypervisor can send as a message. What a guest writes into a redirection entry
becomes the route of that interrupt, so an edge goes from a device's event descriptor to a local APIC as a message-signalled
interrupt does, and nothing here runs. Source: Intel 82093AA data sheet, section 3; Intel SDM vol. 3, section 10.11 (messages).

Not here: level-triggered interrupts (their end would have to be told to us, and this machine's are all edges: a level-triggered
entry sends edges), and the first I/O APIC, which is the hypervisor's.
"""

from __future__ import annotations

from threading import Lock
from typing import Final, NamedTuple, Protocol

from vmm_core.errors import HypervisorError, StateError
from vmm_core.state import expect, expect_range, versioned

_IOREGSEL, _IOWIN = 0x00, 0x10  # 3.1: the two registers in memory
_ID, _VERSION, _ARBITRATION, _TABLE = 0x00, 0x01, 0x02, 0x10  # 3.2: those behind them; two for each entry of the table
_VERSION_NUMBER: Final = 0x11  # 82093AA
_ID_MASK: Final = 0xF << 24

# 3.2.4: redirection entry
_VECTOR: Final = 0xFF
_DELIVERY_MODE: Final = 0x7 << 8
_LOGICAL: Final = 1 << 11
_DELIVERY_STATUS, _REMOTE_IRR = 1 << 12, 1 << 14  # read-only, and always 0: messages are on their way at once
_MASKED: Final = 1 << 16
_DESTINATION_SHIFT: Final = 56
_WRITABLE: Final = 0xFF << _DESTINATION_SHIFT | 0x1_FFFF & ~(_DELIVERY_STATUS | _REMOTE_IRR)

# SDM 10.11.1: message address
_MESSAGE_BASE: Final = 0xFEE0_0000
_MESSAGE_LOGICAL: Final = 1 << 2
_MESSAGE_DESTINATION_SHIFT: Final = 12

_LOW: Final = 0xFFFF_FFFF


class Router(Protocol):
    """What is needed of a hypervisor (vmm_core.hypervisor.Hypervisor)."""

    def route_message(self, gsi: int, address: int, data: int) -> None: ...

    def unroute_message(self, gsi: int) -> None: ...


@versioned(1)
class IoApicState(NamedTuple):
    """The index register, the id register and the redirection table."""

    select: int
    identity: int
    table: tuple[int, ...]


class IoApic:
    """Pins 0 to `pins - 1` are the interrupts `first_gsi` and up. A device of the memory bus, for any thread.

    On a machine with one of these nothing else routes messages: the hypervisor wants one thread at a time.
    """

    def __init__(self, router: Router, identity: int, first_gsi: int, pins: int = 24) -> None:
        """`identity` is the id that the tables give it."""
        self._router, self._first_gsi = router, first_gsi
        self._lock = Lock()
        self._power_on = IoApicState(0, identity << 24 & _ID_MASK, (_MASKED,) * pins)
        self._select, self._identity = 0, self._power_on.identity
        self._table = list(self._power_on.table)

    def read(self, offset: int, size: int) -> int:
        """Read the index register or the register that it selects; 0 for everything else."""
        with self._lock:
            value = self._select if offset == _IOREGSEL else self._read_selected() if offset == _IOWIN else 0
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the index register or the register that it selects; nothing else can be written."""
        with self._lock:
            if offset == _IOREGSEL:
                self._select = value & 0xFF
            elif offset == _IOWIN:
                self._write_selected(value & _LOW)

    def reset(self) -> None:
        """Mask every pin again."""
        self.restore(self._power_on)

    def save(self) -> IoApicState:
        """Take the state."""
        with self._lock:
            return IoApicState(self._select, self._identity, tuple(self._table))

    def restore(self, state: object) -> None:
        """Put a state back, routes included. Raises StateError."""
        new = expect(state, IoApicState, "io-apic")
        if len(new.table) != len(self._table):
            raise StateError(f"io-apic: a table of {len(new.table)} entries, this one has {len(self._table)}")
        for pin, entry in enumerate(new.table):
            if entry & ~_WRITABLE:
                raise StateError(f"io-apic: entry {pin} is {entry:#x}, which no guest can have written")
        expect_range(new.select, 0, 0xFF, "io-apic.select")
        if new.identity & ~_ID_MASK:
            raise StateError(f"io-apic: id register {new.identity:#x}, which no guest can have written")
        with self._lock:
            self._select, self._identity = new.select, new.identity
            for pin, entry in enumerate(new.table):
                self._set(pin, entry)

    def _read_selected(self) -> int:
        if self._select in (_ID, _ARBITRATION):  # arbitration is set to the id with it (3.2.3)
            return self._identity
        if self._select == _VERSION:
            return _VERSION_NUMBER | len(self._table) - 1 << 16
        pin, high = divmod(self._select - _TABLE, 2)
        return self._table[pin] >> 32 * high & _LOW if 0 <= pin < len(self._table) else 0

    def _write_selected(self, value: int) -> None:
        if self._select == _ID:
            self._identity = value & _ID_MASK
            return
        pin, high = divmod(self._select - _TABLE, 2)
        if 0 <= pin < len(self._table):
            other = self._table[pin] & _LOW << 32 * (1 - high)
            self._set(pin, (other | value << 32 * high) & _WRITABLE)

    def _set(self, pin: int, entry: int) -> None:
        before, self._table[pin] = self._table[pin], entry
        gsi = self._first_gsi + pin
        try:
            if entry & _MASKED:
                if not before & _MASKED:
                    self._router.unroute_message(gsi)
            elif entry != before:
                address = _MESSAGE_BASE | entry >> _DESTINATION_SHIFT << _MESSAGE_DESTINATION_SHIFT
                if entry & _LOGICAL:
                    address |= _MESSAGE_LOGICAL
                self._router.route_message(gsi, address, entry & (_VECTOR | _DELIVERY_MODE))
        except HypervisorError:
            # No guest can cause this: the interrupt exists, and one route for each was allowed for. The pin stays as it was,
            # which is better than ending a vCPU in the middle of an instruction.
            self._table[pin] = before
