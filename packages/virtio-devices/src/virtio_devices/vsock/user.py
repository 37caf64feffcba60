"""The socket device without a kernel module: the guest's connections are unix sockets of the host (`host` has the convention).

Stream sockets only. No byte is lost and none is held without bound: the guest may send what fits our buffer (5.10.6.3), and
a host that does not read stops it there; what the host sends stays in its socket until the guest has room. When the host's
end hangs up, what it sent before still reaches the guest; when the guest closes, what it sent before still reaches the host.

Connections do not move to another process: after restore() the guest is told that they are gone. Not here: what happens to a
connection (`switch`); this is about queues and headers.
"""

from __future__ import annotations

from collections.abc import Callable

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC
from virtio_devices.queue import QueueError, SplitQueue
from virtio_devices.vsock.device import RX, TX, VsockDevice
from virtio_devices.vsock.packet import CREDIT_REQUEST, CREDIT_UPDATE, HEADER, HOST_CID, RST, RW, STREAM
from virtio_devices.vsock.stream import BUF_ALLOC, Connection
from virtio_devices.vsock.switch import Key, Switchboard
from vmm_core.loop import Loop

_REPLIES_MAX = 256  # packets that wait for the guest's buffers before we listen to it again
_READ_MAX = 256 << 10  # bytes of one read
_BATCH_MAX = 64  # receive buffers of one read
_IOV_HALF = 512  # views of one read, of 1,024 that the system takes; the last buffer may bring as many again
_TURN = 256  # packets, or reads, before other descriptors of the loop have their turn


class UserVsockDevice(VsockDevice):
    """A socket device on unix sockets."""

    def __init__(self, name: str, loop: Loop, guest_cid: int, path: str, *, report: Callable[[str], None] | None = None) -> None:
        """Listen at `path` from now on. `report` hears of a host that has no descriptors left.

        Raises DeviceError when the path cannot be had, ValueError for a context id that no guest can have.
        """
        super().__init__(name, [loop], guest_cid, features=F_INDIRECT_DESC | F_EVENT_IDX)
        self._loop = loop
        self._deaf = False  # the guest's packets wait until ours have left
        self._rx_packets = self._rx_bytes = self._tx_packets = self._tx_bytes = 0
        self._switch = Switchboard(name, loop, path, lambda: self._guarded(RX, self._process), report)

    @property
    def connections(self) -> int:
        """The number of connections, those included that only wait for the host to read."""
        return self._switch.size

    def counters(self) -> dict[str, int]:
        """Return packets and bytes of their data, and how many connections there are now."""
        return {
            "connections": self.connections,
            "rx_packets": self._rx_packets,
            "rx_bytes": self._rx_bytes,
            "tx_packets": self._tx_packets,
            "tx_bytes": self._tx_bytes,
        }

    # Life

    def stop_queue(self, index: int) -> None:
        """Stop using one queue, and leave the others at work."""
        with self._lock:
            super().stop_queue(index)
            if self._running:
                self._loop.run(self._switch.start)

    def close(self) -> None:
        """Hang up on everybody, and remove the path."""
        super().close()
        self._loop.run(self._switch.close)

    def _go(self) -> None:
        super()._go()
        self._loop.run(self._switch.start)

    def _drain(self, loop: Loop) -> None:
        self._switch.stop()

    def _stop(self) -> None:
        def hang_up() -> None:
            self._switch.hang_up()
            self._deaf = False

        self._loop.run(hang_up)

    # The guest's packets

    def _process(self, index: int, queue: SplitQueue) -> None:
        if index == TX:
            self._take_packets(index, queue)
        elif index == RX:
            self._send_packets(index, queue)
        else:
            self._send_events(index, queue)

    def _take_packets(self, index: int, queue: SplitQueue) -> None:
        budget = _TURN
        try:
            more = True
            while more:
                queue.disable_kicks()
                for head, readable, _ in queue.chains():
                    if len(self._switch.packets) >= _REPLIES_MAX:
                        queue.put_back()
                        self._deaf = True
                        break
                    self._take_packet(readable)
                    queue.add_used(head, 0)
                    self._tx_packets += 1
                    budget -= 1
                    if budget <= 0:
                        self._kick_later(index)
                        break
                more = budget > 0 and not self._deaf and queue.enable_kicks()
        finally:
            self._switch.write_gathered()
        self._used(index, queue)
        self._guarded(RX, self._process)

    def _take_packet(self, readable: list[memoryview]) -> None:
        first = readable[0] if readable else memoryview(b"")
        if len(first) > HEADER.size:
            header, payload = first, [first[HEADER.size :], *readable[1:]]
        elif len(first) == HEADER.size:
            header, payload = first, readable[1:]
        else:
            taken, payload = _split(readable)
            header = memoryview(b"".join(taken))
            if len(header) < HEADER.size:
                raise QueueError(f"a packet of {len(header)} bytes")
        src_cid, dst_cid, guest_port, host_port, length, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack_from(header)
        if src_cid != self.guest_cid:
            return  # 5.10.6.2: nobody sends in another's name
        key = host_port, guest_port
        if dst_cid != HOST_CID or kind != STREAM:
            if op != RST:  # there is nobody; and whoever has no such socket must not be answered for ever
                self._switch.queue_packet(key, RST, kind=kind, cid=dst_cid)
        elif op == RW:
            views, room = _cut(payload, length)
            if room < length:
                raise QueueError(f"a packet of {length} bytes in {room}")
            self._tx_bytes += length
            self._switch.take_data(key, views, length, buf_alloc, fwd_cnt)
        else:
            self._switch.take_packet(key, op, flags, buf_alloc, fwd_cnt)

    # Packets for the guest

    def _send_packets(self, index: int, queue: SplitQueue) -> None:
        packets, turns = self._switch.packets, self._switch.turns
        budget = _TURN
        while packets or turns:
            queue.disable_kicks()
            starved = not self._send_queued(queue)
            while turns and not packets and not starved and budget > 0:
                budget -= 1
                connection = turns.popleft()
                if not self._send_data(queue, connection):
                    turns.appendleft(connection)  # it keeps its turn
                    starved = True
            if starved:
                if not queue.enable_kicks():
                    break
            elif budget <= 0:
                self._kick_later(index)
                break
        self._used(index, queue)
        if self._deaf and len(packets) < _REPLIES_MAX:
            self._deaf = False
            self._kick_later(TX)

    def _send_queued(self, queue: SplitQueue) -> bool:
        """Send packets without data; False when buffers for them ran out."""
        packets = self._switch.packets
        if packets:
            for head, _, writable in queue.chains():
                cid, key, kind, op, flags, connection = packets.popleft()
                if op == CREDIT_UPDATE and connection is not None:
                    connection.update_owed = False
                self._put_header(writable, cid, key, 0, kind, op, flags, connection)
                queue.add_used(head, HEADER.size)
                self._rx_packets += 1
                if not packets:
                    break
        return not packets

    def _send_data(self, queue: SplitQueue, connection: Connection) -> bool:
        """Send what the host said; False, with nothing done, when there is no buffer for it."""
        if connection.closed or not connection.readable or not connection.guest_receives:
            connection.queued = False
            return True
        want = connection.credit
        if want <= 0:
            connection.queued = False
            if not connection.credit_requested:
                connection.credit_requested = True
                self._switch.queue_packet(connection.key, CREDIT_REQUEST, 0, connection)
            return True
        want = min(want, _READ_MAX)
        heads: list[tuple[int, list[memoryview], int]] = []
        views: list[memoryview] = []
        room = 0
        for head, _, writable in queue.chains():
            first = writable[0] if writable else memoryview(b"")
            if len(first) > HEADER.size:
                payload = [first[HEADER.size :], *writable[1:_IOV_HALF]]
            elif len(first) == HEADER.size:
                payload = writable[1:_IOV_HALF]
            else:
                payload = _split(writable)[1][:_IOV_HALF]
            size = sum(map(len, payload))
            if not size:
                raise QueueError("a receive buffer without room for data")
            heads.append((head, writable, size))
            views += payload
            room += size
            if room >= want or len(heads) >= connection.batch or len(views) >= _IOV_HALF:
                break
        if not heads:
            return False
        connection.queued = False
        if room > want:
            views, _ = _cut(views, want)
        got = connection.read(views)
        left = got or 0
        used = 0
        for head, writable, size in heads:
            if left <= 0:
                break
            length = min(size, left)
            left -= length
            self._put_header(writable, HOST_CID, connection.key, length, STREAM, RW, 0, connection)
            queue.add_used(head, HEADER.size + length)
            used += 1
        for _ in range(len(heads) - used):
            queue.put_back()
        if got:
            self._rx_packets += used
            self._rx_bytes += got
            connection.sent(got)
            connection.credit_requested = False
            if used == len(heads):
                connection.batch = min(_BATCH_MAX, 2 * connection.batch)
            elif 2 * used < len(heads):
                connection.batch = max(2, connection.batch // 2)
            self._switch.queue_turn(connection)
        elif got == 0 or connection.hung_up:
            self._switch.host_ended(connection)
        else:
            connection.readable = False
            self._switch.watch(connection)
        return True

    def _put_header(
        self,
        views: list[memoryview],
        cid: int,
        key: Key,
        length: int,
        kind: int,
        op: int,
        flags: int,
        connection: Connection | None,
    ) -> None:
        buf_alloc = fwd_cnt = 0
        if connection is not None:
            buf_alloc, fwd_cnt = BUF_ALLOC, connection.fwd_cnt
            connection.told_fwd_cnt = fwd_cnt
        fields = (cid, self.guest_cid, key[0], key[1], length, kind, op, flags, buf_alloc, fwd_cnt)
        if views and len(views[0]) >= HEADER.size:
            HEADER.pack_into(views[0], 0, *fields)
            return
        pieces, _ = _split(views)
        if sum(map(len, pieces)) < HEADER.size:
            raise QueueError("a receive buffer without room for a header")
        data = HEADER.pack(*fields)
        for piece in pieces:
            piece[:] = data[: len(piece)]
            data = data[len(piece) :]


def _split(views: list[memoryview]) -> tuple[list[memoryview], list[memoryview]]:
    """Divide a packet's views into those of its header and those of its data."""
    left = HEADER.size
    for at, view in enumerate(views):
        if len(view) > left:
            return [*views[:at], view[:left]] if left else views[:at], [view[left:], *views[at + 1 :]]
        left -= len(view)
    return views, []


def _cut(views: list[memoryview], limit: int) -> tuple[list[memoryview], int]:
    """Return the first `limit` bytes of `views`, and how many there are of them."""
    length = 0
    for at, view in enumerate(views):
        length += len(view)
        if length >= limit:
            return [*views[:at], view[: len(view) - (length - limit)]], limit
    return views, length
