"""One port of a console (virtio 1.2, section 5.3.6): bytes between two queues and a back end.

No byte is lost on the way. Input is taken from the back end only as far as the driver has room for it, and wants it; output that
the back end does not take stays in the driver's ring, and the guest waits.

Not here: what is said about ports (`control`), and the host's end (`vmm_core.devices.chardev`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.loop import Loop
from vmm_core.state import versioned

if TYPE_CHECKING:
    from virtio_devices.console.device import ConsoleDevice
    from vmm_core.devices.chardev import CharBackend

ROOM_MAX = 4096  # bytes of input taken at a time
_PIECE = 1 << 16  # bytes of output handed over at a time: a file would take gigabytes, and hold the loop meanwhile
_TURN = 1 << 18  # bytes of output after which the loop's other descriptors have their turn
_REQUEST = 1 << 10  # what a request counts on top of its bytes, as many small ones take time too

_SENT, _LATER, _BLOCKED = range(3)  # what became of a request


@versioned(2)
class PortState(NamedTuple):
    """What a port holds between a ring and its back end, and what it and its driver know of each other."""

    nr: int
    waiting: bytes
    sent: int
    ready: bool
    guest_open: bool
    told_open: bool


class ConsolePort:
    """Two queues of the device, and a back end. Belongs to the loop; the `CharFrontend` of its back end."""

    def __init__(self, device: ConsoleDevice, loop: Loop, nr: int, name: str, console: bool) -> None:
        """Make port `nr`. The guest makes a terminal of a `console`, and a device that programs open by `name` of any other."""
        self.nr, self.name, self.console = nr, name, console
        self.receive_queue = 2 * nr + 2 if nr else 0  # 5.3.2: the control queues are the third and fourth
        self.transmit_queue = self.receive_queue + 1
        self.connected = False  # somebody is at the host's end
        self.ready = False  # the driver knows of the port, and takes messages about it
        self.guest_open = False  # a program in the guest has it open
        self.told_open = False  # what the driver was told of the host's end
        self._device = device
        self._loop = loop
        self._backend: CharBackend | None = None
        self._waiting = b""  # input that a driver had room for and then took the room away
        self._sent = 0  # bytes of the transmit ring's first request that the back end has taken
        self._blocked = False  # the back end will say when it takes more
        self._budget = 0  # what may be sent in this turn of the loop
        self.rx_bytes = self.tx_bytes = 0  # that the guest got, and that its end of the port gave

    @property
    def host_open(self) -> bool:
        """Whether the guest should think that somebody is at the host's end. A terminal is never without a screen."""
        return self.console or self.connected

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
        return PortState(self.nr, self._waiting, self._sent, self.ready, self.guest_open, self.told_open)

    def restore(self, state: PortState) -> None:
        """Put a checked state back."""
        _, self._waiting, self._sent, self.ready, self.guest_open, self.told_open = state

    def forget_driver(self) -> None:
        """A new driver begins with new rings, and knows nothing."""
        self._sent = 0
        self.forget_messages()

    def forget_messages(self) -> None:
        """A driver that introduces itself has heard of nothing yet. Its rings stand where they stood."""
        self.ready = self.guest_open = self.told_open = False

    def set_guest_open(self, opened: bool) -> None:
        """A program in the guest has opened the port, or closed it: then input waits at the host."""
        self.guest_open = opened
        if opened:
            self._device.serve(self.receive_queue)

    # Input: CharFrontend, on the loop

    def input_room(self) -> int:
        """How many bytes the driver's next buffer takes, up to what is taken at a time."""
        queue = self._device.live_queue(self.receive_queue)
        if queue is None or self._waiting or not self._wanted():
            return 0
        try:
            while not (room := _first_room(queue)):
                if not queue.enable_kicks():
                    return 0
        except QueueError as error:
            self._device.broken_by(self.receive_queue, error)
            return 0
        return min(room, ROOM_MAX)

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
        """Remember whether somebody is there, and tell the driver."""
        self.connected = connected
        self._device.control.host_changed(self)

    def new_room(self, queue: SplitQueue) -> None:
        """The driver has added receive buffers, or there is a driver now. Raises QueueError."""
        queue.disable_kicks()
        self._deliver(queue)
        if self._waiting:
            # The buffers are used up already. Ask to be told of the next, or go on if it is there.
            if self._wanted() and queue.enable_kicks():
                self._device.serve_later(self.receive_queue)
        elif self._backend is not None:
            self._backend.input_wanted()

    def _wanted(self) -> bool:
        return self.guest_open or not self._device.multiport  # without messages nobody says that a port is open

    def _deliver(self, queue: SplitQueue) -> None:
        if not self._waiting or not self._wanted():
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
            self.rx_bytes += written
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
                self.tx_bytes += taken
                self._budget -= taken
                if taken < len(piece):
                    self._blocked = True
                    return _BLOCKED
        self._sent = 0
        return _SENT


def _first_room(queue: SplitQueue) -> int:
    """Return how many bytes the next available buffer takes, and leave it in the ring; 0 when there is none."""
    for _, _, writable in queue.chains():
        queue.put_back()
        if not writable:
            raise QueueError("a receive buffer that cannot be written")
        return sum(map(len, writable))
    return 0
