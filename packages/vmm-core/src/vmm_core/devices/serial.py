"""16550A UART, as every PC has one at port 0x3F8. Source: National Semiconductor PC16550D data sheet, section 8.

The line is as fast as drivers bear it, and the divisor is only remembered. What the guest writes has left by the time it looks,
unless the host does not take it. What the host sends arrives in bursts of a FIFO, about the speed of the fastest real line;
any faster, and a driver that empties the receiver in its interrupt would not come out of it before the paste is over. A
burst is over at once, so the four character times of the receive timeout are none at all.

Two things keep drivers that were written for slow lines well:

- The transmitter becomes empty at the guest's next access that is not another byte, or when the host gets the bytes; not
  with each write. A driver that writes its last bytes and then disables the interrupt, as on a slow line, is not
  interrupted for nothing.
- An interrupt that stays pending is sent again after a while. Drivers give up after so many rounds in one interrupt (Linux:
  512), which a fast line can feed without end, and would then wait for an edge on a line that never fell.

Reset values are those of StratoVirt (reference machine-x86_64, section 10.1), whose guests see a line that is up.

Not here: where the bytes go (`vmm_core.devices.chardev`), and what else happens at port 0x3FF (`debugport`).
"""

from __future__ import annotations

import select
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

from vmm_core.devices.serial_output import FULL, GATHER, LIMIT, SHORTLY, SerialOutput
from vmm_core.devices.serial_state import FIFO, INPUT, SerialState, checked

if TYPE_CHECKING:
    from vmm_core.devices.chardev import CharBackend, Report
    from vmm_core.interrupt import InterruptLine
    from vmm_core.loop import Loop

# Registers (table II); the divisor latch hides the first two while LCR.DLAB is set.
DATA, IER, FCR_IIR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDA, IER_THRE, IER_RLS, IER_MSI = 1, 2, 4, 8
IIR_NONE, IIR_MSI, IIR_THRE, IIR_RDA, IIR_RLS, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 0x01, 0x02
LCR_BREAK, LCR_DLAB = 0x40, 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_BI, LSR_THRE, LSR_TEMT, LSR_FIFO_ERROR = 0x01, 0x02, 0x10, 0x20, 0x40, 0x80
MSR_DCTS, MSR_DDSR, MSR_TERI, MSR_DDCD = 0x01, 0x02, 0x04, 0x08
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
LINE_UP = MSR_DCD | MSR_DSR | MSR_CTS

TRIGGERS = (1, 4, 8, 14)  # FCR bits 7:6

PACE = 1_000_000  # nanoseconds of the host's time from one burst of input to the next: 16,000 bytes a second
REMIND, REMIND_LAST = 20_000_000, 1_000_000_000  # nanoseconds of the host's time

__all__ = ["FULL", "INPUT", "LIMIT", "Serial", "SerialState"]


class Serial:
    """The UART: a device on the port bus for the guest, a `CharFrontend` for the host.

    One lock guards everything. Back ends are called with it, from the guest's threads and from the loop, and never call back.
    """

    def __init__(self, line: InterruptLine, loop: Loop, report: Report) -> None:
        """Make a UART with nothing at its other end; connect() changes that. `report` takes lines for the log."""
        self._line = line
        self._loop = loop
        self._report = report
        self._backend: CharBackend | None = None
        self._output = SerialOutput(loop, self.flush, report)
        self._scratch_hook: Callable[[int], None] | None = None
        self.used = True  # by the guest since somebody set this to False (`serial_flush`)
        self._use_hook: Callable[[], None] | None = None
        self._lock = Lock()
        self._input = bytearray()  # from the host, not yet read by the guest
        self._arrived = 0  # how many of them are in the receiver
        self._pacing = False  # the next burst is on its way
        self._looped = bytearray()  # what loopback mode put into the receive FIFO
        self._asserted = False  # the interrupt output
        self._reminding = False  # a reminder is on its way
        self._patience = 0  # nanoseconds to the next one
        self._power_on()

    def _power_on(self) -> None:
        self._ier = 0
        self._fcr = 0
        self._lcr = 0x03
        self._mcr = MCR_OUT2
        self._lsr_errors = 0
        self._msr_lines = LINE_UP
        self._msr_changes = 0
        self._scr = 0
        self._divisor = 0x0C
        self._transmitter_empty = False  # the interrupt, not the status bit
        self._sent = False  # written to since anyone looked
        self._seen = False  # the interrupt identification was read since the last reminder
        self._looped.clear()
        self._asserted = False

    def connect(self, backend: CharBackend) -> None:
        """Give the port another side, for good. The serial port owns `backend` from here on."""
        self._backend = self._output.backend = backend
        backend.start(self._loop, self)

    def on_scratch(self, hook: Callable[[int], None]) -> None:
        """Call `hook` with every value written to the scratch register, port 0x3FF (`vmm_core.devices.debugport`)."""
        self._scratch_hook = hook

    def on_use(self, hook: Callable[[], None]) -> None:
        """Call `hook`, on any thread, when the guest uses the port and `used` was False."""
        self._use_hook = hook

    def reset(self) -> None:
        """Power-on state. Bytes on the wire, in either direction, are not the UART's and stay."""
        with self._lock:
            self._power_on()
            self._arrived = 0
            self._come_back()

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """Read a register; a wider access reads the registers from there on, as the ISA bus splits it."""
        if not self.used:
            self._use()
        if size == 1:
            if offset == LSR and not self._ier:
                return self._poll()
            return self._read(offset)
        return sum(self._read(offset + i) << 8 * i for i in range(min(size, 8 - offset)))

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; a wider access writes the registers from there on, as the ISA bus splits it."""
        if not self.used:
            self._use()
        if size == 1:
            self._write(offset, value & 0xFF)
            return
        for i in range(min(size, 8 - offset)):
            self._write(offset + i, value >> 8 * i & 0xFF)

    def _use(self) -> None:
        self.used = True
        if self._use_hook:
            self._use_hook()

    def _poll(self) -> int:
        """Read the line status for a driver without interrupts: a kernel's console does so with each byte it prints."""
        with self._lock:
            if not (self._ier or self._lsr_errors):
                full = self._output.full
                if self._sent:
                    self._sent, self._transmitter_empty = False, not full
                return (LSR_DR if self._available() else 0) | (0 if full else LSR_THRE | LSR_TEMT)
        return self._read(LSR)

    def _read(self, offset: int) -> int:
        with self._lock:
            if self._sent:
                self._transmitted()
            if offset == LSR:
                return self._read_lsr()
            if offset == DATA:
                return self._divisor & 0xFF if self._lcr & LCR_DLAB else self._read_data()
            if offset == FCR_IIR:
                source = self._interrupt()
                if source == IIR_THRE:
                    self._transmitter_empty = False
                self._seen = True
                self._update()
                return source | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)
            if offset == IER:
                return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
            if offset == LCR:
                return self._lcr
            if offset == MCR:
                return self._mcr
            if offset == MSR:
                value = self._lines() | self._msr_changes
                self._msr_changes = 0
                self._update()
                return value
            return self._scr

    def _write(self, offset: int, value: int) -> None:
        if offset == SCR and self._scratch_hook is not None:
            self._scratch_hook(value)
        with self._lock:
            if offset == DATA:
                if self._lcr & LCR_DLAB:
                    self._divisor = self._divisor & 0xFF00 | value
                elif self._ier or self._mcr & MCR_LOOP:
                    self._transmit(value)
                else:  # nothing to tell the guest: flat, for a kernel's console
                    self._sent, self._transmitter_empty = True, False
                    self._output.add(value)
                    self._output.flush_later(GATHER)
                return
            if self._sent:
                self._transmitted()
            if offset == IER:
                self._write_ier(value)
            elif offset == FCR_IIR:
                self._write_fcr(value)
            elif offset == LCR:
                self._write_lcr(value)
            elif offset == MCR:
                self._write_mcr(value)
            elif offset == SCR:
                self._scr = value
            # LSR and MSR are for factory tests only (8.4, 8.8): writes do nothing.

    def _read_lsr(self) -> int:
        value = self._lsr_errors
        if value:
            if self._fcr & FCR_ENABLE and value & ~LSR_OE:
                value |= LSR_FIFO_ERROR
            self._lsr_errors = 0
        self._update()
        if self._available():
            value |= LSR_DR
        if not self._output.full:
            value |= LSR_THRE | LSR_TEMT
        return value

    def _read_data(self) -> int:
        if self._looped:
            byte = self._looped.pop(0)
        elif self._arrived and not self._mcr & MCR_LOOP:
            byte = self._input.pop(0)
            self._arrived -= 1
            if not self._fcr & FCR_ENABLE:
                self._asserted = False  # one byte after the other: the next is another arrival
            if len(self._input) == INPUT // 2 and self._backend is not None:
                self._backend.input_wanted()  # not with the first byte of room: that would be a read for every byte
        else:
            byte = 0
        self._update()
        return byte

    def _transmit(self, byte: int) -> None:
        self._sent = True
        self._transmitter_empty = False
        if self._mcr & MCR_LOOP:
            self._loop_back(byte)
        else:
            self._output.add(byte)
        self._output.flush_later(SHORTLY)
        self._update()

    def _transmitted(self) -> None:
        """Let what was written have left; whoever calls follows with _update()."""
        self._sent = False
        if not self._output.full:
            self._transmitter_empty = True

    def _loop_back(self, byte: int, error: int = 0) -> None:
        if len(self._looped) < (FIFO if self._fcr & FCR_ENABLE else 1):
            self._looped.append(byte)
        else:
            error |= LSR_OE  # with FIFOs, the byte in the shift register is the one that is lost (8.6.2)
            if not self._fcr & FCR_ENABLE:
                self._looped[0] = byte
        self._lsr_errors |= error

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF | value << 8
            return
        value &= 0x0F
        if not value & IER_THRE:
            self._output.hand_over()  # the driver has nothing more to send
        elif not self._ier & IER_THRE and not self._output.full:
            self._transmitter_empty = True  # enabling it while the transmitter is empty raises it at once (Linux relies on it)
        self._ier = value
        self._asserted = False  # whoever enables interrupts wants to hear of what is pending already
        self._update()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
            # Only what loopback put there: bytes from the host that the guest has not seen yet arrive after this reset, so
            # that nothing typed ahead is lost when a kernel or a boot loader sets the port up.
            self._looped.clear()
            self._lsr_errors &= LSR_OE
        # Without the enable bit the others are not written (8.3).
        self._fcr = value & 0xC1 if value & FCR_ENABLE else 0
        self._update()

    def _write_lcr(self, value: int) -> None:
        if value & ~self._lcr & LCR_BREAK and self._mcr & MCR_LOOP:
            self._loop_back(0, LSR_BI)
        self._lcr = value
        self._update()

    def _write_mcr(self, value: int) -> None:
        before = self._lines()
        self._mcr = value & 0x1F
        after = self._lines()
        changed = before ^ after
        if changed & MSR_CTS:
            self._msr_changes |= MSR_DCTS
        if changed & MSR_DSR:
            self._msr_changes |= MSR_DDSR
        if before & ~after & MSR_RI:
            self._msr_changes |= MSR_TERI  # the trailing edge only
        if changed & MSR_DCD:
            self._msr_changes |= MSR_DDCD
        self._update()

    def _lines(self) -> int:
        """Modem inputs: the wire's, or in loopback mode the port's own outputs (8.5)."""
        mcr = self._mcr
        if not mcr & MCR_LOOP:
            return self._msr_lines
        return (
            (MSR_DSR if mcr & MCR_DTR else 0)
            | (MSR_CTS if mcr & MCR_RTS else 0)
            | (MSR_RI if mcr & MCR_OUT1 else 0)
            | (MSR_DCD if mcr & MCR_OUT2 else 0)
        )

    def _available(self) -> int:
        """Bytes in the receiver. In loopback mode the wire is cut off and waits."""
        return len(self._looped) + (0 if self._mcr & MCR_LOOP else self._arrived)

    def _interrupt(self) -> int:
        """The pending enabled interrupt of the highest priority (table IV)."""
        ier = self._ier
        if not ier:
            return IIR_NONE
        if ier & IER_RLS and self._lsr_errors:
            return IIR_RLS
        if ier & IER_RDA and (available := self._available()):
            if not self._fcr & FCR_ENABLE or available >= TRIGGERS[self._fcr >> 6]:
                return IIR_RDA
            return IIR_TIMEOUT
        if ier & IER_THRE and self._transmitter_empty:
            return IIR_THRE
        if ier & IER_MSI and self._msr_changes:
            return IIR_MSI
        return IIR_NONE

    def _update(self) -> None:
        """Follow the interrupt output; its rising edge is what the controller sees."""
        pending = self._interrupt() != IIR_NONE
        if pending and not self._asserted:
            self._line.trigger()
            if not self._reminding:
                self._reminding = True
                self._patience = REMIND
                self._loop.call_later(REMIND, self._remind, host=True)
        self._asserted = pending

    def _remind(self) -> None:
        """Send an interrupt again that is still pending, ever less often if the guest does not look."""
        with self._lock:
            self._reminding = self._asserted
            if self._asserted:
                self._line.trigger()
                self._patience = REMIND if self._seen else min(2 * self._patience, REMIND_LAST)
                self._seen = False
                self._loop.call_later(self._patience, self._remind, host=True)

    # The host's side (`chardev.CharFrontend`), on the loop

    def input_room(self) -> int:
        """How many bytes there is room for."""
        return INPUT - len(self._input)

    def receive(self, data: bytes) -> None:
        """Take input from the host."""
        with self._lock:
            self._input += data
            if not self._pacing:
                self._arrive()

    def _arrive(self) -> None:
        """Fill the receiver, and have it looked at again after a while."""
        self._arrived = min(FIFO, len(self._input))
        self._come_back()
        self._update()

    def _come_back(self) -> None:
        """Bring the next burst of input, if there is one by then."""
        if not self._pacing:
            self._pacing = True
            self._loop.call_later(PACE, self._paced, host=True)

    def _paced(self) -> None:
        with self._lock:
            self._pacing = False
            if self._arrived < len(self._input):
                self._arrive()

    def peer_changed(self, connected: bool) -> None:
        """Nothing: the line is up whether or not somebody listens, as with a cable to nowhere."""

    def output_ready(self) -> None:
        """The host takes bytes again."""
        with self._lock:
            self._output.unblock()
        self.flush()

    def pause(self) -> None:
        """Let the host see what the guest has written so far (`machine.core.Pausable`)."""
        self._loop.run(self.flush)

    def resume(self) -> None:
        """Nothing: only the guest and the host move bytes."""

    def flush(self) -> None:
        """Give the host what it takes now. From any thread."""
        output = self._output
        with self._lock:
            lost = output.flushed()
            was_full = output.full
            output.hand_over()
            if self._sent or (was_full and not output.full):
                self._transmitted()
                self._update()
        self._report_lost(lost)

    def _report_lost(self, lost: int) -> None:
        if lost:
            self._report(f"serial: {lost} bytes of output lost: the guest wrote on while nobody read {LIMIT} bytes")

    def close(self, patience_ms: int = 1000) -> None:
        """Write the last output, waiting up to `patience_ms` for a reader that is slow, and close the back end. Twice is fine."""
        backend, waiting = self._backend, self._output.waiting
        if backend is None:
            return
        for _ in range(patience_ms // 10):
            self._loop.run(self.output_ready)
            if not waiting:
                break
            select.select([], [], [], 0.01)
        self._report_lost(self._output.take_lost())
        if waiting:
            self._report(f"serial: {len(waiting)} bytes of output lost: nobody read them")
        self._backend = self._output.backend = None
        backend.close()

    # State

    def save(self) -> SerialState:
        """Take the state."""
        with self._lock:
            return SerialState(
                self._ier,
                self._fcr,
                self._lcr,
                self._mcr,
                self._lsr_errors,
                self._msr_lines,
                self._msr_changes,
                self._scr,
                self._divisor,
                self._transmitter_empty or (self._sent and not self._output.full),
                bytes(self._looped),
                self._arrived,
                bytes(self._input),
                bytes(self._output.waiting),
            )

    def restore(self, state: object) -> None:
        """Put a state back. Raises StateError."""
        new = checked(state)
        with self._lock:
            self._ier, self._fcr, self._lcr, self._mcr = new.ier, new.fcr, new.lcr, new.mcr
            self._lsr_errors, self._msr_lines, self._msr_changes = new.lsr_errors, new.msr_lines, new.msr_changes
            self._scr, self._divisor, self._transmitter_empty = new.scr, new.divisor, new.transmitter_empty
            self._looped, self._input = bytearray(new.looped), bytearray(new.input)
            self._output.waiting[:] = new.output
            self._arrived = new.arrived
            self._come_back()
            # An edge that was sent before the save is in the interrupt controller's own state; one that was not is sent
            # as a reminder.
            self._sent = False
            self._asserted = self._interrupt() != IIR_NONE
            if self._asserted and not self._reminding:
                self._reminding = True
                self._loop.call_later(REMIND, self._remind, host=True)
            if new.output:
                self._output.flush_later(SHORTLY)
