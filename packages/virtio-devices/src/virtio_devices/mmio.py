"""Virtio over MMIO, version 2 (virtio 1.2, section 4.2): registers, the status machine, interrupts of one device.

Stricter than the drivers we know need: a status bit is only stored when its step was possible, an unoffered feature refuses
FEATURES_OK, and writing 0 to Status is a whole reset. The optional QueueReset register reads 0, as VIRTIO_F_RING_RESET is not
offered, and there are no shared memory regions.

Not here: where the window is, who turns doorbells and acknowledgements into events (the machine registers
`doorbells`), and devices.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from virtio_devices import mmio_registers as reg
from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice
from virtio_devices.limit import LeakyBucket
from virtio_devices.mmio_registers import ALL_ONES, CONFIG, INTERRUPT_ACK, QUEUE_NOTIFY, ShownRegisters
from virtio_devices.mmio_state import MmioState, QueueState
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.clock import MonotonicClock
from vmm_core.errors import StateError, VmmError
from vmm_core.guestmem import GuestMemory
from vmm_core.interrupt import InterruptLine
from vmm_core.state import expect

# Device status bits (2.1)
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
_DRIVER_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

# A driver that breaks its device again and again is reported once a second, after a few at once: logs have an end.
_REPORTS_PER_SECOND, _REPORTS_AT_ONCE = 1, 10

# InterruptStatus bits (4.2.2). A configuration change sets its own bit alone, as the text has it.
USED_BUFFER, CONFIG_CHANGE = 1, 2


class _QueueRegisters:
    """What a driver writes about one queue before it is ready."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.clear()

    def clear(self) -> None:
        self.size = self.max_size
        self.desc = self.driver = self.device = 0
        self.queue: SplitQueue | None = None  # there exactly while the queue is ready


class MmioTransport:
    """The window of one device, or of none: a placeholder whose DeviceID is 0, which drivers pass over (4.2.2).

    A `vmm_core.bus.BusDevice` of SIZE bytes, and the device's `Notifier`. The transport owns the device.

    `notify_fds` has one event descriptor a queue, for writes of its index at QUEUE_NOTIFY; `ack_fd` (-1: none) is for writes of
    USED_BUFFER at INTERRUPT_ACK, as half of what an interrupt costs is the exit of its acknowledgement. The machine makes these
    `doorbells` into events; such a write that reaches the bus anyway has the same effect.

    A machine that lets guests read registers without an exit gives memory for them to `mirror()`.
    """

    def __init__(
        self,
        device: VirtioDevice | None,
        memory: GuestMemory,
        line: InterruptLine,
        *,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Make a window in the reset state. `report` hears, on any thread, why a device needs a reset, unless it is too often."""
        self.device = device
        self.needs_reset_reason = ""
        self._memory = memory
        self._line = line
        self._report = report
        self._reports = LeakyBucket(MonotonicClock(), _REPORTS_PER_SECOND, _REPORTS_AT_ONCE * 1_000_000_000)
        self._unreported = 0
        # Two locks. Control orders what changes the device's life; it is held while loops finish their work. State guards the
        # two registers that loops change as well, is a leaf, and is never held while anything else is called.
        self._control = threading.RLock()
        self._state = threading.Lock()
        self._status = 0
        self._interrupt_status = 0
        # Who interrupts by itself cannot set USED_BUFFER, so while there is such a one it always reads as set. A driver that
        # looks at its rings for nothing finds nothing (4.2.2: the bit says that at least one queue has used a buffer).
        self._always_pending = 0
        # Whether USED_BUFFER was set after the driver last read InterruptStatus. An event on ack_fd is of an acknowledgement that
        # nobody has seen when it came: it is of what was read, and a driver that finds the bit set once more looks for nothing.
        self._used_unread = False
        # The configuration has changed since the driver began, which it may have read before; it is told when it is ready.
        self._config_news = False
        # What the guest reads without our knowing; None: every read is an exit. An acknowledgement that comes as an event cannot
        # be told from one of an earlier look then, so USED_BUFFER stays set from the first used buffer to the reset.
        self._shown: ShownRegisters | None = None
        self._device_features_sel = self._driver_features_sel = self._driver_features = self._queue_sel = 0
        self._unknown_features = False
        self._queues = [_QueueRegisters(size) for size in device.queue_sizes] if device else []
        self.notify_fds: tuple[int, ...] = ()
        self.ack_fd = -1
        fds: list[int] = []
        try:
            for _ in range(len(self._queues) + 1 if device else 0):
                fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))  # noqa: PERF401
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        if device:
            self.ack_fd = fds.pop()
        self.notify_fds = tuple(fds)
        if device:
            device.connect(self)

    @property
    def status(self) -> int:
        """The device status (2.1)."""
        return self._status

    @property
    def doorbells(self) -> tuple[tuple[int, int, int], ...]:
        """(offset, value, event descriptor) of each guest write of 4 bytes that is to be an event."""
        bells = tuple((QUEUE_NOTIFY, index, fd) for index, fd in enumerate(self.notify_fds))
        return (*bells, (INTERRUPT_ACK, USED_BUFFER, self.ack_fd)) if self.ack_fd >= 0 else bells

    @property
    def interrupt_status(self) -> int:
        """The pending bits of the InterruptStatus register."""
        with self._state:
            self._take_ack()
            return self._interrupt_status

    # Registers in memory

    def mirror(self, memory: memoryview | None) -> None:
        """Keep what registers read as in `memory` (SIZE bytes, writable here), until told None. What was there is overwritten.

        Reads of one or two bytes see parts of a register there, which the bus answers with 0: no driver may rely on either
        (4.2.2.2).
        """
        device = self.device
        with self._control:
            shown = None if memory is None else ShownRegisters(memory, device.device_type if device else None)
            with self._state:
                self._shown = shown if device else None  # a placeholder's never change
                self._show_status()
            if device:
                self._show_selected()
                device.show_config()

    def _show_selected(self) -> None:
        if self._shown:
            queue = self._selected()
            self._shown.queue(queue.max_size if queue else 0, queue is not None and queue.queue is not None)
            self.show_features()

    def _show_status(self) -> None:
        """The lock is held."""
        if self._shown:
            self._shown.status(self._interrupt_status | self._always_pending, self._status)

    def show_config(self, generation: int, config: bytes) -> None:
        """Show another configuration space."""
        with self._state:
            if self._shown:
                self._shown.config(generation, config)

    def show_features(self) -> None:
        """Show other features."""
        with self._state:
            if self._shown and self.device:
                self._shown.features(self._features_word(self.device))

    # BusDevice: vCPU threads, several at once

    def read(self, offset: int, size: int) -> int:
        """Answer a register read; 0 for what is no register, is write-only or is not read in its width (4.2.2.2)."""
        device = self.device
        if offset >= CONFIG:
            return device.read_config(offset - CONFIG, size) if device else 0
        if size != 4:
            return 0
        if offset == reg.INTERRUPT_STATUS:
            with self._state:
                self._take_ack()
                self._used_unread = False
                return self._interrupt_status | self._always_pending
        if offset == reg.MAGIC_VALUE:
            return reg.MAGIC
        if offset == reg.VERSION:
            return 2
        if device is None:
            return 0
        if offset == reg.DEVICE_ID:
            return device.device_type
        if offset == reg.DEVICE_FEATURES:
            return self._features_word(device)
        if offset == reg.QUEUE_NUM_MAX:
            return queue.max_size if (queue := self._selected()) else 0
        if offset == reg.QUEUE_READY:
            return int(queue.queue is not None) if (queue := self._selected()) else 0
        if offset == reg.STATUS:
            return self._status
        if reg.SHM_LEN <= offset < reg.SHM_END and not offset & 3:
            return ALL_ONES  # no such shared memory region, whichever is selected
        if offset == reg.CONFIG_GENERATION:
            return device.config_generation
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a register write; ignored for what is no register, is read-only, or is not due at this status."""
        device = self.device
        if device is None:
            return
        if offset >= CONFIG:
            if self._status & (DRIVER | FAILED) == DRIVER:
                device.write_config(offset - CONFIG, size, value)
        elif size != 4:
            return
        elif offset == INTERRUPT_ACK:
            with self._state:
                self._interrupt_status &= ~(value & ~USED_BUFFER if self._shown else value)
                self._show_status()
        elif offset == QUEUE_NOTIFY:
            doorbells = self.notify_fds
            if value < len(doorbells):
                os.eventfd_write(doorbells[value], 1)
        else:
            with self._control:
                self._write_control(device, offset, value)
                self._show_selected()

    def _write_control(self, device: VirtioDevice, offset: int, value: int) -> None:
        if offset == reg.STATUS:
            self._write_status(device, value & 0xFF)
        elif offset == reg.DEVICE_FEATURES_SEL:
            self._device_features_sel = value
        elif offset == reg.DRIVER_FEATURES:
            self._write_driver_features(value)
        elif offset == reg.DRIVER_FEATURES_SEL:
            self._driver_features_sel = value
        elif offset == reg.QUEUE_SEL:
            self._queue_sel = value
        elif offset == reg.QUEUE_READY:
            self._write_ready(device, value)
        elif (queue := self._selected()) and not queue.queue and self._status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK:
            if offset == reg.QUEUE_NUM:
                queue.size = value
            elif offset in (reg.QUEUE_DESC, reg.QUEUE_DESC + 4):
                queue.desc = _half(queue.desc, value, offset & 4)
            elif offset in (reg.QUEUE_DRIVER, reg.QUEUE_DRIVER + 4):
                queue.driver = _half(queue.driver, value, offset & 4)
            elif offset in (reg.QUEUE_DEVICE, reg.QUEUE_DEVICE + 4):
                queue.device = _half(queue.device, value, offset & 4)

    def _features_word(self, device: VirtioDevice) -> int:
        sel = self._device_features_sel
        return (device.features >> (32 * sel)) & ALL_ONES if sel < 2 else 0

    def _selected(self) -> _QueueRegisters | None:
        sel = self._queue_sel
        return self._queues[sel] if sel < len(self._queues) else None

    def _write_driver_features(self, value: int) -> None:
        if self._status & (DRIVER | FEATURES_OK | FAILED) != DRIVER:
            return
        sel = self._driver_features_sel
        if sel < 2:
            kept = self._driver_features & ~(ALL_ONES << (32 * sel))
            self._driver_features = kept | value << (32 * sel)
        elif value:
            self._unknown_features = True  # nothing beyond bit 63 is offered

    def _write_ready(self, device: VirtioDevice, value: int) -> None:
        queue = self._selected()
        if queue is None:
            return
        if value == 0:
            if self._status & DRIVER_OK:
                device.stop_queue(self._queue_sel)
            queue.queue = None
        elif value == 1 and not queue.queue and self._status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK:
            try:
                queue.queue = self._enable(queue)
            except QueueError as error:
                self.needs_reset(f"{device.name}: queue {self._queue_sel}: {error}")

    def _enable(self, registers: _QueueRegisters) -> SplitQueue:
        return SplitQueue(
            self._memory,
            registers.size,
            registers.desc,
            registers.driver,
            registers.device,
            max_size=registers.max_size,
            event_idx=bool(self._driver_features & F_EVENT_IDX),
            indirect=bool(self._driver_features & F_INDIRECT_DESC),
        )

    def _write_status(self, device: VirtioDevice, value: int) -> None:
        if value == 0:
            self.reset()
            return
        if self._status & ~value & _DRIVER_BITS or self._status & FAILED:
            return  # 2.1.1: a driver must not clear a bit, and resets after FAILED
        new = value & ~self._status
        accepted = new & (ACKNOWLEDGE | DRIVER | FAILED)
        if new & FEATURES_OK and value & DRIVER and self._features_fit(device):
            accepted |= FEATURES_OK
        if new & DRIVER_OK and (self._status | accepted) & FEATURES_OK and not accepted & FAILED:
            accepted |= DRIVER_OK
        with self._state:
            self._status |= accepted
            self._show_status()
            news = self._config_news
        if accepted & DRIVER_OK:
            broken = self._status & NEEDS_RESET
            if not broken:
                self._activate(device)
            if news or broken:
                self.config_changed()  # while it was set up; only now may the driver be told (2.1.2, 2.3)

    def _features_fit(self, device: VirtioDevice) -> bool:
        chosen = self._driver_features
        if self._unknown_features or chosen & ~device.features or not chosen & F_VERSION_1:
            return False
        return device.accepts(chosen)

    def _activate(self, device: VirtioDevice) -> None:
        try:
            device.activate(self._driver_features, [registers.queue for registers in self._queues], self.notify_fds)
        except (VmmError, OSError) as error:
            self.needs_reset(f"{device.name}: {error}")

    # Notifier: any thread

    def queue_used(self, index: int) -> None:
        """Interrupt the driver for used buffers. The one line serves all queues."""
        if not (self._shown and self._interrupt_status & USED_BUFFER):
            with self._state:
                self._interrupt_status |= USED_BUFFER
                self._used_unread = True
                self._show_status()
        self._line.trigger()

    def _take_ack(self) -> None:
        """Do what an acknowledgement asks that came by ack_fd, if one did. The lock is held."""
        if self._shown or not self._interrupt_status & USED_BUFFER:
            return
        try:
            os.eventfd_read(self.ack_fd)
        except OSError:  # none came, or the device is closed
            return
        if not self._used_unread:
            self._interrupt_status &= ~USED_BUFFER

    def used_fd(self, index: int) -> int:
        """Return the descriptor of the one line, for a queue that is served outside."""
        with self._state:
            self._always_pending = USED_BUFFER
            self._show_status()
        return self._line.fileno()

    def config_changed(self) -> None:
        """Interrupt the driver for a configuration change, once it is ready (2.3: not before DRIVER_OK)."""
        with self._state:
            self._config_news = self._status & (DRIVER | DRIVER_OK) == DRIVER
            if not self._status & DRIVER_OK:
                return
            self._interrupt_status |= CONFIG_CHANGE
            self._show_status()
        self._line.trigger()

    def needs_reset(self, reason: str) -> None:
        """Set DEVICE_NEEDS_RESET and tell the driver."""
        with self._state:
            first = not self._status & NEEDS_RESET
            self._status |= NEEDS_RESET
            self._show_status()
        if first:
            self.needs_reset_reason = reason
            if self._report:
                self._report_reset(self._report, reason)
            self.config_changed()

    def _report_reset(self, report: Callable[[str], None], reason: str) -> None:
        late = self._reports.take(1)
        with self._state:
            unreported, self._unreported = self._unreported, self._unreported + 1 if late else 0
        if late:
            return
        report(f"{reason} ({unreported} before it not shown)" if unreported else reason)

    # Component, Pausable, Closable: the machine's owner

    def reset(self) -> None:
        """Go back to the power-on state. Waits for requests under way; no guest memory is touched after it returns."""
        with self._control:
            if self.device:
                self.device.reset()
            self._always_pending = 0
            for queue in self._queues:
                queue.clear()
            self._device_features_sel = self._driver_features_sel = self._driver_features = self._queue_sel = 0
            self._unknown_features = False
            self.needs_reset_reason = ""
            with self._state:
                self._status = self._interrupt_status = 0
                self._used_unread = self._config_news = False
                self._show_status()
            self._show_selected()

    def pause(self) -> None:
        """Bring the device to rest."""
        with self._control:
            if self.device:
                self.device.pause()

    def resume(self) -> None:
        """Let the device go on."""
        with self._control:
            if self.device:
                self.device.resume()

    def close(self) -> None:
        """Close the device and the doorbells, which must not be registered with a hypervisor any more. Twice is fine."""
        with self._control:
            try:
                self.reset()  # no view of guest memory is kept
                if self.device:
                    self.device.close()
            finally:
                fds, self.notify_fds = self.notify_fds, ()
                with self._state:
                    ack, self.ack_fd = self.ack_fd, -1
                for fd in (*fds, ack) if ack >= 0 else fds:
                    os.close(fd)

    def save(self) -> MmioState:
        """Return the registers and the queues' indices. While paused."""
        return MmioState(
            device_type=self.device.device_type if self.device else 0,
            status=self._status,
            interrupt_status=self.interrupt_status,
            device_features_sel=self._device_features_sel,
            driver_features_sel=self._driver_features_sel,
            driver_features=self._driver_features,
            unknown_features=self._unknown_features,
            queue_sel=self._queue_sel,
            queues=tuple(
                QueueState(q.size, q.desc, q.driver, q.device, q.queue is not None, *(q.queue.indices if q.queue else (0, 0)))
                for q in self._queues
            ),
        )

    def restore(self, state: Any) -> None:
        """Put saved registers back, guest memory being restored already. An active device stays paused until resume().

        Raises StateError when the state does not fit the device; the transport is reset then.
        """
        name = self.device.name if self.device else "virtio-mmio placeholder"
        saved = expect(state, MmioState, name)
        with self._control:
            self.reset()
            try:
                self._restore(saved)
            except (VmmError, OSError) as error:
                self.reset()
                raise StateError(f"{name}: {error}") from None

    def _restore(self, saved: MmioState) -> None:
        device = self.device
        if saved.device_type != (device.device_type if device else 0) or len(saved.queues) != len(self._queues):
            raise StateError(f"state of device type {saved.device_type} with {len(saved.queues)} queues")
        words = (saved.device_features_sel, saved.driver_features_sel, saved.queue_sel)
        if not all(0 <= word <= ALL_ONES for word in words) or saved.status & ~(_DRIVER_BITS | NEEDS_RESET):
            raise StateError("a register has a value that does not exist")
        ready = any(queue.ready for queue in saved.queues)
        if ((saved.status & DRIVER_OK or ready) and not saved.status & FEATURES_OK) or not 0 <= saved.driver_features < 1 << 64:
            raise StateError(f"status {saved.status:#x} with features {saved.driver_features:#x} cannot be")
        if device is None:
            return
        self._device_features_sel, self._driver_features_sel, self._queue_sel = words
        self._driver_features, self._unknown_features = saved.driver_features, saved.unknown_features
        if saved.status & FEATURES_OK and not self._features_fit(device):
            raise StateError(f"features {saved.driver_features:#x} were negotiated, {device.features:#x} are offered")
        for registers, queue in zip(self._queues, saved.queues, strict=True):
            registers.size, registers.desc, registers.driver, registers.device = (
                queue.size,
                queue.desc,
                queue.driver,
                queue.device,
            )
            if queue.ready:
                registers.queue = self._enable(registers)
                registers.queue.set_indices(queue.next_avail, queue.next_used)
        with self._state:
            self._status = saved.status
            self._interrupt_status = saved.interrupt_status & (USED_BUFFER | CONFIG_CHANGE)
            self._used_unread = True  # an event of before must not take away what is pending now
            # Nobody knows whether there were any; a driver that looks for nothing finds what it knows.
            self._config_news = saved.status & (DRIVER | DRIVER_OK) == DRIVER
            self._show_status()
        self._show_selected()
        if saved.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK:
            device.pause()
            device.activate(saved.driver_features, [registers.queue for registers in self._queues], self.notify_fds)


def _half(old: int, value: int, high: int) -> int:
    """Return the 64-bit `old` with its low or high half replaced."""
    return (old & ALL_ONES) | value << 32 if high else (old & ~ALL_ONES) | value
