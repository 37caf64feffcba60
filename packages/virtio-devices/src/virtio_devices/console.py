"""The console device (virtio 1.2, section 5.3) with one port: a guest's terminal without a serial line.

No byte is lost on the way. Input is taken from the back end only as far as the driver has room for it; output that the back
end does not take stays in the driver's ring, and the guest waits.

Not here: more ports (VIRTIO_CONSOLE_F_MULTIPORT and its control queues are not offered), the window's size, and the host's end
(`vmm_core.devices.chardev`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from virtio_devices.device import VirtioDevice
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.errors import StateError
from vmm_core.loop import Loop
from vmm_core.state import expect, versioned

if TYPE_CHECKING:
    from vmm_core.devices.chardev import CharBackend

QUEUE_SIZE = 256
RECEIVE, TRANSMIT = 0, 1  # queues of port 0 (5.3.2)

_ROOM_MAX = 4096  # bytes of input taken at a time
_PIECE = 1 << 16  # bytes of output handed over at a time: a file would take gigabytes, and hold the loop meanwhile
_TURN = 1 << 18  # bytes of output after which the loop's other descriptors have their turn
_REQUEST = 1 << 10  # what a request counts on top of its bytes, as many small ones take time too

_SENT, _LATER, _BLOCKED = range(3)  # what became of a request


@versioned(1)
class PortState(NamedTuple):
    """What a port holds between a ring and its back end."""

    waiting: bytes
    sent: int


@versioned(1)
class ConsoleState(NamedTuple):
    """Saved state of a console device."""

    ports: tuple[PortState, ...]


class ConsolePort:
    """One port: two queues of the device, and a back end. Belongs to the loop; the `CharFrontend` of its back end."""

    def __init__(self, device: ConsoleDevice, loop: Loop, receive: int, transmit: int) -> None:
        """Make a port on the queues with these indices."""
        self.receive_queue, self.transmit_queue = receive, transmit
        self.connected = False  # somebody is at the host's end
        self._device = device
        self._loop = loop
        self._backend: CharBackend | None = None
        self._waiting = b""  # input that a driver had room for and then took the room away
        self._sent = 0  # bytes of the transmit ring's first request that the back end has taken
        self._blocked = False  # the back end will say when it takes more
        self._budget = 0  # what may be sent in this turn of the loop

    def connect(self, backend: CharBackend) -> None:
        """Give the port its host's end, for good; the port owns it. Raises ChardevError when it cannot be started."""
        self._backend = backend
        backend.start(self._loop, self)

    def close(self) -> None:
        """Close the back end. Twice is fine."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def save(self) -> PortState:
        """Return what is on its way. While paused."""
        return PortState(self._waiting, self._sent)

    def restore(self, state: PortState) -> None:
        """Put a checked state back."""
        self._waiting, self._sent = state

    def forget_output(self) -> None:
        """A new driver begins with a new ring."""
        self._sent = 0

    # Input: CharFrontend, on the loop

    def input_room(self) -> int:
        """How many bytes the driver's next buffer takes, up to what is taken at a time."""
        queue = self._device.live_queue(self.receive_queue)
        if queue is None or self._waiting:
            return 0
        try:
            while not (room := _first_room(queue)):
                if not queue.enable_kicks():
                    return 0
        except QueueError as error:
            self._device.broken_by(self.receive_queue, error)
            return 0
        return min(room, _ROOM_MAX)

    def receive(self, data: bytes) -> None:
        """Put input into the driver's buffers; what no longer fits waits here."""
        self._waiting += data
        queue = self._device.live_queue(self.receive_queue)
        if queue is None:
            return
        try:
            self._deliver(queue)
        except QueueError as error:
            self._device.broken_by(self.receive_queue, error)

    def peer_changed(self, connected: bool) -> None:
        """Remember whether somebody is there. A driver without multiport is not told."""
        self.connected = connected

    def new_room(self, queue: SplitQueue) -> None:
        """The driver has added receive buffers, or there is a driver now. Raises QueueError."""
        queue.disable_kicks()
        self._deliver(queue)
        if self._waiting:
            # The buffers are used up already. Ask to be told of the next, or go on if it is there.
            if queue.enable_kicks():
                self._device.serve_later(self.receive_queue)
        elif self._backend is not None:
            self._backend.input_wanted()

    def _deliver(self, queue: SplitQueue) -> None:
        if not self._waiting:
            return
        for head, _, writable in queue.chains():
            if not writable:
                raise QueueError("a receive buffer that cannot be written")
            written = 0
            for view in writable:
                part = self._waiting[: len(view)]
                view[: len(part)] = part
                self._waiting = self._waiting[len(part) :]
                written += len(part)
                if not self._waiting:
                    break
            queue.add_used(head, written)
            if not self._waiting:
                break
        self._device.publish(self.receive_queue, queue)

    # Output, on the loop

    def output_ready(self) -> None:
        """The back end takes bytes again."""
        self._blocked = False
        self._device.serve(self.transmit_queue)

    def new_output(self, queue: SplitQueue) -> None:
        """The driver has something to say. Raises QueueError."""
        if self._blocked:
            return
        queue.disable_kicks()
        self._budget = _TURN
        outcome = _SENT
        while True:
            for head, readable, _ in queue.chains():
                if not readable:
                    raise QueueError("a transmit buffer that cannot be read")
                outcome = self._send(readable)
                if outcome != _SENT:
                    queue.put_back()
                    break
                queue.add_used(head, 0)
            if outcome != _SENT or not queue.enable_kicks():
                break
        self._device.publish(self.transmit_queue, queue)
        if outcome == _LATER:
            self._device.serve_later(self.transmit_queue)

    def _send(self, readable: list[memoryview]) -> int:
        """Hand a request's bytes to the back end, from the first that it has not taken before."""
        self._budget -= _REQUEST
        skip = self._sent
        for view in readable:
            at, skip = skip, max(0, skip - len(view))
            while at < len(view):
                if self._budget <= 0:
                    return _LATER
                piece = view[at : at + _PIECE]
                taken = len(piece) if self._backend is None else self._backend.write(piece)
                at += taken
                self._sent += taken
                self._budget -= taken
                if taken < len(piece):
                    self._blocked = True
                    return _BLOCKED
        self._sent = 0
        return _SENT


class ConsoleDevice(VirtioDevice):
    """A virtio console device with the one port `port`."""

    device_type = 3

    def __init__(self, name: str, loop: Loop) -> None:
        """Make a device whose port has no other side yet: what a guest says is dropped."""
        # cols, rows, max_nr_ports, emerg_wr (5.3.4): the last three are only valid with features that are not offered.
        super().__init__(name, [loop], features=0, queue_sizes=[QUEUE_SIZE] * 2, config=bytes(4) + b"\1" + bytes(7))
        self.port = ConsolePort(self, loop, RECEIVE, TRANSMIT)

    def close(self) -> None:
        """Reset, and close the back end."""
        super().close()
        self.port.close()

    def save(self) -> ConsoleState:
        """Return what the port holds."""
        return ConsoleState((self.port.save(),))

    def restore(self, state: Any) -> None:
        """Put back a saved state. Raises StateError when it does not fit."""
        ports = expect(state, ConsoleState, self.name).ports
        if len(ports) != 1 or len(ports[0].waiting) > _ROOM_MAX or ports[0].sent < 0:
            raise StateError(f"{self.name}: the saved ports do not fit")
        self.port.restore(ports[0])

    # For the port, on the loop

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
        if index == RECEIVE:
            self.port.new_room(queue)
        else:
            self.port.new_output(queue)

    def _drain(self, loop: Loop) -> None:
        """Nothing is ever under way between two turns of the loop."""

    def _stop(self) -> None:
        self.port.forget_output()


def _first_room(queue: SplitQueue) -> int:
    """Return how many bytes the next available buffer takes, and leave it in the ring; 0 when there is none."""
    for _, _, writable in queue.chains():
        queue.put_back()
        if not writable:
            raise QueueError("a receive buffer that cannot be written")
        return sum(map(len, writable))
    return 0
