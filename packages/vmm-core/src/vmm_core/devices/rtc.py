"""MC146818A real-time clock with 128 bytes of CMOS RAM, at ports 0x70 and 0x71. Source: Motorola MC146818A data sheet.

The time is the host's UTC plus an offset that the guest sets by setting the time; a pause does not stop it, as switching a PC
off does not. Flags of register C are worked out when somebody looks; timers, on the machine's clock, run only while an
interrupt is enabled and not yet raised.

Memory sizes in CMOS: reference machine-x86_64, section 10.2. Not here: calendars (`rtc_time`), time zones and leap seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from vmm_core.devices.rtc_time import FIRST, LAST, Moment, from_registers, next_match
from vmm_core.errors import StateError
from vmm_core.state import expect, expect_range, versioned

if TYPE_CHECKING:
    from vmm_core.clock import Clock
    from vmm_core.interrupt import InterruptLine
    from vmm_core.loop import Loop, Timer

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR, A, B, C, D = range(14)
CENTURY = 0x32
_TIME = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY))

A_UIP, A_DIVIDER, A_DIVIDER_ON, A_RATE = 0x80, 0x70, 0x20, 0x0F
B_SET, B_PIE, B_AIE, B_UIE, B_SQWE, B_BINARY, B_24_HOURS = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
D_VALID = 0x80  # RAM and time are good

SECOND = 1_000_000_000
UIP = 244_000  # nanoseconds before an update in which the time must not be read
HALF = SECOND // 2  # from the end of a divider reset to the first update
CRYSTAL = 32_768  # Hz

MIB = 1 << 20


@versioned(1)
class RtcState(NamedTuple):
    """Registers and RAM; what is later than the host's UTC by how much; the last second whose update was noticed."""

    cells: bytes
    selected: int
    offset: int
    seen: int


class Rtc:
    """The clock, as a device of two ports: index and data."""

    def __init__(
        self,
        clock: Clock,
        loop: Loop,
        line: InterruptLine | None,
        *,
        memory_size: int,
        low_memory_limit: int = 3 << 30,
        hours_24: bool = True,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        """Make a clock that shows `wall`, nanoseconds of UTC since 1970.

        Without a `line` interrupts raise flags only. Without `hours_24` it counts to twelve until a guest sets it otherwise,
        which Linux's driver takes for a reason to leave the device, and the interrupt it has on a PC, alone.
        `memory_size` is RAM in bytes, of which all above `low_memory_limit` is above 4 GiB.
        """
        self._clock = clock
        self._loop = loop
        self._line = line
        self._wall = wall
        self._lock = Lock()
        self._timer: Timer | None = None
        self._index = 0
        self._offset = 0  # nanoseconds that this clock is ahead of the wall
        self._cells = bytearray(128)  # time registers: only while the clock is halted
        self._cells[A], self._cells[B], self._cells[D] = A_DIVIDER_ON | 0x06, B_24_HOURS * hours_24, D_VALID
        self._describe_memory(memory_size, low_memory_limit)
        self._seen = self._now() // SECOND
        self._ticks_seen = self._ticks()

    def _describe_memory(self, size: int, low_limit: int) -> None:
        low = min(size, low_limit)
        extended = min(low - MIB, 63 * MIB) // 1024
        for at, width, value in (
            (0x15, 2, 640),  # KiB below 1 MiB
            (0x17, 2, extended),  # KiB above 1 MiB, of the first 64 MiB
            (0x30, 2, extended),
            (0x34, 2, max(0, low - 16 * MIB) // 65536),
            (0x5B, 3, (size - low) // 65536),
        ):
            self._cells[at : at + width] = value.to_bytes(width, "little")

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """Read a port; a wider access reads the ports from there on, as the ISA bus splits it."""
        return sum(self._read_port(offset + i) << 8 * i for i in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a port; a wider access writes the ports from there on: index, then data."""
        for i in range(size):
            self._write_port(offset + i, value >> 8 * i & 0xFF)

    def _read_port(self, port: int) -> int:
        if port != 1:
            return 0xFF  # the index cannot be read
        with self._lock:
            index = self._index
            if index in _TIME:
                return self._cells[index] if self._halted() else self._moment().register(index, self._cells[B])
            if index == A:
                return self._cells[A] | (A_UIP if self._updating() else 0)
            if index == C:
                return self._read_c()
            return self._cells[index]

    def _write_port(self, port: int, value: int) -> None:
        with self._lock:
            if port == 0:
                self._index = value & 0x7F  # bit 7 masks NMI, of which there is none
            elif port == 1:
                self._write_register(self._index, value)

    def _write_register(self, index: int, value: int) -> None:
        if index in _TIME:
            self._write_time(index, value)
        elif index in (A, B):
            self._write_control(index, value)
        elif index not in (C, D):
            self._sync()  # an alarm that was passed was passed
            self._cells[index] = value
            self._arm()

    def _write_time(self, index: int, value: int) -> None:
        if self._halted():
            self._cells[index] = value
            return
        # Without halting the clock first: every register takes effect at once.
        self._sync()
        self._freeze()
        self._cells[index] = value
        self._thaw(self._now() % SECOND)

    def _write_control(self, index: int, value: int) -> None:
        self._sync()
        halted, divided = self._halted(), self._dividing()
        fraction = self._now() % SECOND
        if not halted and (
            (index == B and value & B_SET) or (index == A and value & A_DIVIDER != A_DIVIDER_ON)
        ):  # in the old format, which the new value may change
            self._freeze()
        if index == A:
            self._cells[A] = value & ~A_UIP
            self._ticks_seen = self._ticks()
        else:
            self._cells[B] = value & ~B_UIE if value & B_SET else value
        if halted and not self._halted():
            self._thaw(fraction if divided else HALF)
        elif not divided and self._dividing():
            self._offset += HALF - fraction  # still halted by SET; the divider begins at half a second
        self._arm()

    # Time

    def _now(self) -> int:
        return self._wall() + self._offset

    def _halted(self) -> bool:
        return bool(self._cells[B] & B_SET) or not self._dividing()

    def _dividing(self) -> bool:
        return self._cells[A] & A_DIVIDER == A_DIVIDER_ON

    def _updating(self) -> bool:
        return not self._halted() and self._now() % SECOND >= SECOND - UIP

    def _moment(self) -> Moment:
        return Moment.of(self._now() // SECOND)

    def _freeze(self) -> None:
        """Put the time into the registers."""
        moment = self._moment()
        for index in _TIME:
            self._cells[index] = moment.register(index, self._cells[B])

    def _thaw(self, fraction: int) -> None:
        """Go on from the time in the registers, `fraction` nanoseconds after the last update."""
        seconds = from_registers({index: self._cells[index] for index in _TIME}, self._cells[B])
        for index in _TIME:
            self._cells[index] = 0
        self._offset = seconds * SECOND + fraction - self._wall()
        self._seen = seconds

    # Flags and interrupts

    def _ticks(self) -> int:
        """Periods of register A's rate since the machine's clock began; 0 while there is none."""
        period = self._period()
        return self._clock.now() * CRYSTAL // SECOND // period if period else 0

    def _period(self) -> int:
        """Ticks of the crystal between periodic interrupts (table 5); 0 for none."""
        rate = self._cells[A] & A_RATE
        if not rate or not self._dividing():
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _sync(self) -> None:
        """Bring register C's flags up to date, and the interrupt line with them."""
        flags = 0
        ticks = self._ticks()
        if ticks != self._ticks_seen:
            self._ticks_seen = ticks
            flags |= C_PF
        if not self._halted():
            second = self._now() // SECOND
            if second != self._seen:
                flags |= C_UF
                alarm = self._next_alarm(self._seen)
                if alarm is not None and alarm <= second:
                    flags |= C_AF
                self._seen = second
        self._cells[C] |= flags
        if self._cells[C] & self._cells[B] & (C_PF | C_AF | C_UF) and not self._cells[C] & C_IRQF:
            self._cells[C] |= C_IRQF
            self._interrupt()

    def _interrupt(self) -> None:
        if self._line is not None:
            self._line.trigger()

    def _next_alarm(self, after: int) -> int | None:
        b = self._cells[B]
        return next_match(after, self._cells[HOURS_ALARM], self._cells[MINUTES_ALARM], self._cells[SECONDS_ALARM], b)

    def _read_c(self) -> int:
        self._sync()
        value = self._cells[C]
        self._cells[C] = 0
        self._arm()
        return value

    def _arm(self) -> None:
        """Look for what is due, and set a timer for the next interrupt that is enabled."""
        self._sync()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        b = self._cells[B]
        if not b & (B_PIE | B_AIE | B_UIE) or self._cells[C] & C_IRQF:
            return  # what is raised must be read before anything can be raised again
        waits = []
        if b & B_PIE and (period := self._period()):
            due = -(-((self._ticks_seen + 1) * period * SECOND) // CRYSTAL)
            waits.append(due - self._clock.now())
        if b & (B_UIE | B_AIE) and not self._halted():
            # Second by second for the alarm too: the machine's clock stands still in a pause, the time does not.
            waits.append((self._seen + 1) * SECOND - self._now())
        if waits:
            self._timer = self._loop.call_later(max(0, min(waits)), self._expired)

    def _expired(self) -> None:
        with self._lock:
            self._timer = None
            self._arm()

    # The machine's side

    def reset(self) -> None:
        """The reset line (data sheet, RESET): interrupts off, flags clear. Time and RAM are the battery's."""
        with self._lock:
            self._index = 0
            self._cells[B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
            self._sync()
            self._cells[C] = 0
            self._arm()

    def close(self) -> None:
        """Take back the timer. Twice is fine."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def save(self) -> RtcState:
        """Take the state. The time goes on by the host's clock until it is restored."""
        with self._lock:
            return RtcState(bytes(self._cells), self._index, self._offset, self._seen)

    def restore(self, state: object) -> None:
        """Put a state back. Raises StateError."""
        new = expect(state, RtcState, "rtc")
        if len(new.cells) != 128:
            raise StateError(f"rtc.cells: {len(new.cells)} bytes instead of 128")
        expect_range(new.selected, 0, 0x7F, "rtc.selected")
        # Beyond these the date would leave the four digits that the registers have.
        expect_range(self._wall() + new.offset, FIRST * SECOND, LAST * SECOND, "rtc.offset: the time")
        expect_range(new.seen, FIRST, LAST, "rtc.seen")
        with self._lock:
            self._cells[:] = new.cells
            self._index, self._offset = new.selected, new.offset
            # A host whose clock is behind that of the last one must not wait for the difference to the next update.
            self._seen = min(new.seen, self._now() // SECOND)
            self._ticks_seen = self._ticks()
            self._set_timer()
