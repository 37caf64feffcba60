"""Control messages of a console with many ports (virtio 1.2, sections 5.3.6.1 and 5.3.6.2): who has which port, open or not.

Not here: bytes of a port (`port`).
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import TYPE_CHECKING

from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.errors import StateError

if TYPE_CHECKING:
    from virtio_devices.console.device import ConsoleDevice
    from virtio_devices.console.port import ConsolePort

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)

_MESSAGE = Struct("<IHH")  # virtio_console_control: id, event, value
NAME_MAX = 255  # bytes of a port's name

_Key = tuple[int, int, int]  # id, event, value


class Control:
    """Both directions of the control queues. Belongs to the device's loop.

    A driver that offers no buffers makes messages wait. There is at most one of a kind, so they are few, whatever a driver asks
    for and however often peers come and go.
    """

    def __init__(self, device: ConsoleDevice, receive: int, transmit: int) -> None:
        """Speak on the device's queues with these indices: `receive` is to the driver, `transmit` from it."""
        self.receive_queue, self.transmit_queue = receive, transmit
        self._device = device
        self._messages: dict[_Key, bytes] = {}  # not yet in the driver's buffers, oldest first

    # What happens to ports, on the loop

    def port_added(self, port: ConsolePort) -> None:
        """Tell a driver that is there of a new port."""
        if self._device.driver_ready:
            self._put(port.nr, PORT_ADD, 1)
            self._send()

    def port_removed(self, port: ConsolePort) -> None:
        """Tell the driver that a port is gone, if it has heard of it."""
        unheard = (port.nr, PORT_ADD, 1) in self._messages
        for key in [key for key in self._messages if key[0] == port.nr and key[1] != PORT_REMOVE]:
            del self._messages[key]
        if self._device.driver_ready and not unheard:
            self._put(port.nr, PORT_REMOVE, 1)
        self._send()

    def host_changed(self, port: ConsolePort) -> None:
        """Somebody is at the host's end of `port`, or nobody is any more."""
        self._settle(port)
        self._send()

    def _settle(self, port: ConsolePort) -> None:
        """Have the driver told what it does not know. A peer that went and came back is told as that, or the next may be
        taken for the last one."""
        if not port.ready:
            return
        gone, come = (port.nr, PORT_OPEN, 0), (port.nr, PORT_OPEN, 1)
        another = self._messages.pop(gone, None) is not None
        self._messages.pop(come, None)
        if port.told_open and (not port.host_open or another):
            self._messages[gone] = b""
        if port.host_open and (not port.told_open or another):
            self._messages[come] = b""

    # Queues, on the loop

    def new_room(self, queue: SplitQueue) -> None:
        """The driver has added buffers for messages, or there is a driver now. Raises QueueError."""
        for port in self._device.ports.values():
            self._settle(port)  # after a restore others may be at the host's end
        self._deliver(queue)

    def new_messages(self, queue: SplitQueue) -> None:
        """The driver has something to say. Raises QueueError."""
        for head, readable, _ in queue.chains():
            self._take(readable)
            queue.add_used(head, 0)
        self._device.publish(self.transmit_queue, queue)
        self._send()

    def _take(self, readable: Iterable[memoryview]) -> None:
        text = b""
        for view in readable:
            text += view[: _MESSAGE.size - len(text)]
            if len(text) == _MESSAGE.size:
                break
        else:
            raise QueueError(f"a control message of {len(text)} bytes")
        nr, event, value = _MESSAGE.unpack(text)
        if event == DEVICE_READY:
            if value:
                self._introduce()
        elif (port := self._device.ports.get(nr)) is None:
            return  # it was removed, and the driver has not heard of that yet
        elif event == PORT_READY and value:
            port.ready, port.told_open = True, False
            if port.console:
                self._put(nr, CONSOLE_PORT, 1)
            self._put(nr, PORT_NAME, 1, port.name.encode(errors="surrogateescape")[:NAME_MAX] + b"\0")  # StratoVirt ends it so
            self._settle(port)
        elif event == PORT_OPEN:
            port.set_guest_open(bool(value))

    def _introduce(self) -> None:
        """A driver is there and knows nothing yet."""
        self._messages.clear()
        self._device.driver_ready = True
        for port in self._device.ports.values():
            port.forget_messages()
            self._put(port.nr, PORT_ADD, 1)

    def _put(self, nr: int, event: int, value: int, payload: bytes = b"") -> None:
        self._messages.pop((nr, event, value), None)
        self._messages[nr, event, value] = payload

    def _send(self) -> None:
        if self._messages:
            self._device.serve(self.receive_queue)

    def _deliver(self, queue: SplitQueue) -> None:
        """Put messages into the driver's buffers, as far as there are both. Raises QueueError."""
        messages = self._messages
        while messages:
            chains = queue.chains()
            while messages and (chain := next(chains, None)) is not None:
                head, _, writable = chain
                (nr, event, value), payload = next(iter(messages.items()))
                queue.add_used(head, _fill(writable, _MESSAGE.pack(nr, event, value) + payload))
                del messages[nr, event, value]
                if event == PORT_OPEN and (port := self._device.ports.get(nr)) is not None:
                    port.told_open = bool(value)
            if messages and not queue.enable_kicks():
                break
        if not messages:
            queue.disable_kicks()
        self._device.publish(self.receive_queue, queue)

    # Life

    def reset(self) -> None:
        """Forget the driver."""
        self._messages.clear()

    def save(self) -> tuple[bytes, ...]:
        """Return the messages that wait."""
        return tuple(_MESSAGE.pack(*key) + payload for key, payload in self._messages.items())

    def restore(self, messages: Iterable[bytes]) -> None:
        """Put messages back. Raises StateError when they cannot have been waiting."""
        restored: dict[_Key, bytes] = {}
        for message in messages:
            if not _MESSAGE.size <= len(message) <= _MESSAGE.size + NAME_MAX + 1:
                raise StateError(f"a control message of {len(message)} bytes")
            nr, event, value = _MESSAGE.unpack_from(message)
            if nr >= self._device.max_ports or event > PORT_NAME or value > 1:
                raise StateError(f"a control message {nr}, {event}, {value}")
            restored[nr, event, value] = message[_MESSAGE.size :]
        self._messages = restored


def _fill(writable: list[memoryview], message: bytes) -> int:
    """Put a message into a buffer, its end cut off where only a part of a name fits; returns how many bytes were written."""
    written = 0
    for view in writable:
        part = message[written : written + len(view)]
        view[: len(part)] = part
        written += len(part)
    if written < min(len(message), _MESSAGE.size):
        raise QueueError(f"a control buffer of {written} bytes")
    return written
