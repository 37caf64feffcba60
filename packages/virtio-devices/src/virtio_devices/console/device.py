"""The console device (virtio 1.2, section 5.3): terminals without a serial line, and named pipes between guest and host.

A driver that takes VIRTIO_CONSOLE_F_MULTIPORT has all ports, any other has port 0. VIRTIO_CONSOLE_F_SIZE is offered with a size
of 0 by 0, which is "not known", as in StratoVirt. Not here: bytes (`port`), messages about ports (`control`), and emergency
writes.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from virtio_devices.console.control import Control
from virtio_devices.console.port import ROOM_MAX, ConsolePort, PortState
from virtio_devices.device import DeviceError, VirtioDevice
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.errors import StateError
from vmm_core.loop import Loop
from vmm_core.state import expect, versioned

QUEUE_SIZE = 256
MAX_PORTS = 31  # of a device (reference virtio, section 8)
CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3  # queues (5.3.2)

F_SIZE, F_MULTIPORT = 1 << 0, 1 << 1  # 5.3.3


@versioned(2)
class ConsoleState(NamedTuple):
    """Saved state of a console device. `messages` are control messages that the driver has not got yet."""

    driver_ready: bool
    ports: tuple[PortState, ...]
    messages: tuple[bytes, ...]


class ConsoleDevice(VirtioDevice):
    """A virtio console device with the ports that were added to it, numbered from 0."""

    device_type = 3

    def __init__(self, name: str, loop: Loop, max_ports: int = 1) -> None:
        """Make a device with room for `max_ports` ports, 1 to MAX_PORTS."""
        if not 1 <= max_ports <= MAX_PORTS:
            raise ValueError(f"{name}: {max_ports} ports")
        # cols, rows, max_nr_ports, emerg_wr (5.3.4)
        config = struct.pack("<HHII", 0, 0, max_ports, 0)
        sizes = [QUEUE_SIZE] * (2 * max_ports + 2)
        super().__init__(name, [loop], features=F_SIZE | F_MULTIPORT, queue_sizes=sizes, config=config)
        self.max_ports = max_ports
        self.ports: dict[int, ConsolePort] = {}  # by number, in the order in which the driver hears of them
        self.driver_ready = False  # it takes messages
        self.control = Control(self, CONTROL_RECEIVE, CONTROL_TRANSMIT)
        self._loop = loop

    @property
    def multiport(self) -> bool:
        """Whether the driver speaks of ports."""
        return bool(self.negotiated & F_MULTIPORT)

    def counters(self) -> dict[str, int]:
        """Return the bytes of each port."""
        ports = list(self.ports.values())
        return {f"port{port.nr}_{way}": getattr(port, way) for port in ports for way in ("rx_bytes", "tx_bytes")}

    def add_port(self, nr: int, name: str, *, console: bool) -> ConsolePort:
        """Add a port whose host's end is still missing: what a guest says is dropped. At any time, from the owner's thread.

        Raises DeviceError when the number is taken, too high, or 0 and it is no console.
        """
        if nr == 0 and not console:
            raise DeviceError("Port number 0 on virtio-serial devices reserved for virtconsole device.")
        if not 0 <= nr < self.max_ports:
            raise DeviceError(f"virtio serial port nr {nr} should be less than virtio serial's max_nr_ports {self.max_ports}")
        if nr in self.ports:
            raise DeviceError(f"Repetitive virtio serial port nr {nr}.")
        port = ConsolePort(self, self._loop, nr, name, console)

        def add() -> None:
            self.ports[nr] = port
            self.control.port_added(port)

        self._loop.run(add)
        return port

    def remove_port(self, nr: int) -> None:
        """Take a port away and close its back end. Raises DeviceError when there is none."""
        if nr not in self.ports:
            raise DeviceError(f"{self.name}: there is no port {nr}")

        def remove() -> ConsolePort:
            port = self.ports.pop(nr)
            self.control.port_removed(port)
            return port

        self._loop.run(remove).close()

    def close(self) -> None:
        """Reset, and close the back ends. Twice is fine."""
        super().close()
        for port in self.ports.values():
            port.close()

    def save(self) -> ConsoleState:
        """Return what ports hold and what driver and device know of each other."""
        return ConsoleState(self.driver_ready, tuple(port.save() for port in self.ports.values()), self.control.save())

    def restore(self, state: Any) -> None:
        """Put back a saved state. Raises StateError when it does not fit."""
        saved = expect(state, ConsoleState, self.name)
        if [port.nr for port in saved.ports] != list(self.ports) or any(
            len(port.waiting) > ROOM_MAX or port.sent < 0 for port in saved.ports
        ):
            raise StateError(f"{self.name}: the saved ports do not fit")
        try:
            self.control.restore(saved.messages)
        except StateError as error:
            raise StateError(f"{self.name}: {error}") from None
        self.driver_ready = saved.driver_ready
        for port in saved.ports:
            self.ports[port.nr].restore(port)

    # For ports and control, on the loop

    def live_queue(self, index: int) -> SplitQueue | None:
        """Return a queue if it may be touched now."""
        return self.queues[index] if self._running and not self.broken else None

    def publish(self, index: int, queue: SplitQueue) -> None:
        """Publish what was given back."""
        self._used(index, queue)

    def serve(self, index: int) -> None:
        """Serve a queue now."""
        self._guarded(index, self._process)

    def serve_later(self, index: int) -> None:
        """Serve a queue after the loop's other work."""
        self._kick_later(index)

    def broken_by(self, index: int, error: QueueError) -> None:
        """Give up on the driver."""
        self._break(f"queue {index}: {error}")

    def _process(self, index: int, queue: SplitQueue) -> None:
        if index >= CONTROL_RECEIVE and not self.multiport:
            return  # these queues do not exist for this driver
        if index == CONTROL_RECEIVE:
            self.control.new_room(queue)
        elif index == CONTROL_TRANSMIT:
            self.control.new_messages(queue)
        elif (port := self.ports.get(0 if index < CONTROL_RECEIVE else index // 2 - 1)) is None:
            return  # there is none: what a driver offers stays in the ring
        elif index == port.receive_queue:
            port.new_room(queue)
        else:
            port.new_output(queue)

    def _drain(self, loop: Loop) -> None:
        """Nothing is ever under way between two turns of the loop."""

    def _stop(self) -> None:
        def forget() -> None:
            self.driver_ready = False
            self.control.reset()
            for port in self.ports.values():
                port.forget_driver()

        self._loop.run(forget)  # peers come and go there, whether or not queues are at rest
