"""The connections of a user-space socket device: how they begin, pass bytes to the host, and end.

What they have for the guest waits in `packets` and `turns` until the device has buffers for it. Belongs to one loop. Not here:
queues and packet headers (`user`), and the sockets at PATH (`host`).
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from virtio_devices.vsock import host
from virtio_devices.vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HOST_CID,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    STREAM,
)
from virtio_devices.vsock.stream import Connection
from vmm_core.loop import READ, WRITE, Loop

MAX_CONNECTIONS = 1023  # with BUF_ALLOC each, what a guest and an idle host can make us hold
FIRST_HOST_PORT = 1 << 30  # of connections that the host begins; services of the host have lower ones

_EPOLLERR, _EPOLLHUP = 8, 16
_LINGERING_MAX = 4096  # ended connections of which the guest has not let go yet
_GATHER_MAX = 64  # pieces of one write

Key = tuple[int, int]  # port of the host, port of the guest
Packet = tuple[int, Key, int, int, int, Connection | None]  # source cid, key, type, op, flags, whose credit it tells


class Switchboard:
    """All connections of one device."""

    def __init__(self, name: str, loop: Loop, path: str, wake: Callable[[], None], report: Callable[[str], None] | None) -> None:
        """Listen at `path` from now on; nothing is connected before start(). `wake` is called when there is news for the guest.

        Raises DeviceError when the path cannot be had.
        """
        self.packets: deque[Packet] = deque()  # for the guest, in front of all data
        self.turns: deque[Connection] = deque()  # that may have something to read
        self.running = False
        self._loop = loop
        self._path = path
        self._wake = wake
        self._connections: dict[Key, Connection] = {}
        self._draining: set[Connection] = set()  # of which the guest knows nothing any more
        self._lingering: dict[Key, None] = {}
        self._next_port = FIRST_HOST_PORT
        # What came from the guest for one connection in a row, and is written to it at once.
        self._gathered: list[memoryview] = []
        self._gathered_size = 0
        self._gathering: Connection | None = None
        self._listener = host.Listener(name, path, self.client_asked, report)
        loop.run(lambda: self._listener.start(loop))

    @property
    def size(self) -> int:
        """The number of connections, those included that only wait for the host to read."""
        return len(self._connections) + len(self._draining)

    # Life, on the loop

    def start(self) -> None:
        """Let connections begin, and go on."""
        self.running = True
        self._listener.start(self._loop)
        for connection in (*self._connections.values(), *self._draining):
            self.watch(connection)

    def stop(self) -> None:
        """Leave every socket alone."""
        self.running = False
        self._listener.stop()
        for connection in (*self._connections.values(), *self._draining):
            self._unwatch(connection)

    def hang_up(self) -> None:
        """End all connections; the guest is not told. Whoever connects meanwhile is hung up on at once."""
        self.stop()
        for connection in (*self._connections.values(), *self._draining):
            connection.close()
        self._connections.clear()
        self._draining.clear()
        self._lingering.clear()
        self.packets.clear()
        self.turns.clear()
        self._listener.start(self._loop)

    def close(self) -> None:
        """End all connections and remove the path. Twice is fine."""
        self.hang_up()
        self._listener.close()

    # The guest's packets

    def take_packet(self, key: Key, op: int, flags: int, buf_alloc: int, fwd_cnt: int) -> None:
        """Take a packet without data, of a stream between the guest and this host."""
        self.write_gathered()
        connection = self._connections.get(key)
        if connection is None:
            self._take_from_unknown(key, op, buf_alloc, fwd_cnt)
            return
        self._take_credit(connection, buf_alloc, fwd_cnt)
        if op == RESPONSE and not connection.established:
            self._guest_accepted(connection)
        elif op == SHUTDOWN:
            self._guest_shut(connection, flags)
        elif op == CREDIT_REQUEST:
            self._owe_update(connection)
        elif op == RST:
            self._detach(connection)
        elif op != CREDIT_UPDATE:
            self._abort(connection)

    def take_data(self, key: Key, views: list[memoryview], length: int, buf_alloc: int, fwd_cnt: int) -> None:
        """Take the `length` bytes of a data packet. The views stay in use until write_gathered()."""
        connection = self._connections.get(key)
        if connection is None:
            self._take_from_unknown(key, RW, buf_alloc, fwd_cnt)
            return
        self._take_credit(connection, buf_alloc, fwd_cnt)
        if connection is not self._gathering or len(self._gathered) + len(views) > _GATHER_MAX:
            self.write_gathered()
        held = self._gathered_size if connection is self._gathering else 0
        fits = connection.has_room(held + length) or not connection.writable
        if not (connection.established and connection.guest_sends and fits):
            self._abort(connection)
        elif connection.writable and length:  # the guest knows already when the host takes no more
            self._gathering = connection
            self._gathered += views
            self._gathered_size += length

    def _take_credit(self, connection: Connection, buf_alloc: int, fwd_cnt: int) -> None:
        connection.take_credit(buf_alloc, fwd_cnt)
        self.queue_turn(connection)

    def _take_from_unknown(self, key: Key, op: int, buf_alloc: int, fwd_cnt: int) -> None:
        if op == REQUEST:
            self._guest_connects(key, buf_alloc, fwd_cnt)
        elif key in self._lingering and op in (CREDIT_UPDATE, CREDIT_REQUEST):
            pass  # it reads what is left
        elif op == RST:
            self._lingering.pop(key, None)
        else:
            self._lingering.pop(key, None)
            self.queue_packet(key, RST)

    def write_gathered(self) -> None:
        """Pass on what was taken."""
        connection, views, length = self._gathering, self._gathered, self._gathered_size
        if connection is None:
            return
        self._gathering, self._gathered, self._gathered_size = None, [], 0
        if connection.closed:
            return
        connection.write(views, length)
        self._written(connection)

    def _written(self, connection: Connection) -> None:
        """See to what follows from writing to the host."""
        if not connection.writable and connection.guest_sends:
            self._host_refused(connection)
        elif connection.guest_has_room_for_news():
            self._owe_update(connection)
        self.watch(connection)

    def _owe_update(self, connection: Connection) -> None:
        if not connection.update_owed:
            connection.update_owed = True
            self.queue_packet(connection.key, CREDIT_UPDATE, 0, connection)

    # Beginning and end of connections

    def _guest_connects(self, key: Key, buf_alloc: int, fwd_cnt: int) -> None:
        self._lingering.pop(key, None)
        peer = host.connect(self._path, key[0]) if self.size < MAX_CONNECTIONS else None
        if peer is None:
            self.queue_packet(key, RST)
            return
        connection = Connection(key, peer, established=True)
        connection.take_credit(buf_alloc, fwd_cnt)
        self._connections[key] = connection
        self.queue_packet(key, RESPONSE, 0, connection)
        self.watch(connection)

    def client_asked(self, peer: socket.socket, guest_port: int) -> None:
        """A client of the host wants to reach `guest_port`."""
        if not self.running or self.size >= MAX_CONNECTIONS:
            peer.close()
            return
        while (key := (self._next_port, guest_port)) in self._connections or key in self._lingering:
            self._next_port = self._port_after()
        self._next_port = self._port_after()
        connection = Connection(key, peer, established=False)
        self._connections[key] = connection
        self.queue_packet(key, REQUEST, 0, connection)
        self.watch(connection)
        self._wake()

    def _port_after(self) -> int:
        return self._next_port + 1 if self._next_port < 0xFFFF_FFFE else FIRST_HOST_PORT

    def _guest_accepted(self, connection: Connection) -> None:
        connection.established = True
        answer = memoryview(b"OK %d\n" % connection.key[0])
        connection.write([answer], len(answer))
        connection.fwd_cnt = 0  # this was no byte of the guest
        self._written(connection)

    def _guest_shut(self, connection: Connection, flags: int) -> None:
        if flags & SHUTDOWN_SEND:
            connection.guest_sends = False
        if flags & SHUTDOWN_RECEIVE and connection.guest_receives:
            connection.guest_receives = connection.readable = False
            connection.shut(socket.SHUT_RD)
        if connection.guest_sends:
            self.watch(connection)
        elif not connection.guest_receives:
            # It has closed, and waits to hear that we know (5.10.6.6). What it sent is ours and still goes to the host.
            self.queue_packet(connection.key, RST)
            self._detach(connection)
        elif connection.ended:
            self._say_goodbye(connection)
        else:
            self._pass_end(connection)
            self.watch(connection)

    def _pass_end(self, connection: Connection) -> None:
        """Let the host's end know that the guest says no more, once it has everything."""
        if not connection.guest_sends and not connection.backlog and connection.writable:
            connection.shut(socket.SHUT_WR)
            connection.writable = False

    def _host_refused(self, connection: Connection) -> None:
        """The host takes no more, but what it said before is the guest's."""
        if connection.ended:
            self._say_goodbye(connection)
        elif not connection.refused:
            connection.refused = connection.readable = True
            self.queue_packet(connection.key, SHUTDOWN, SHUTDOWN_RECEIVE, connection)
            self.queue_turn(connection)

    def host_ended(self, connection: Connection) -> None:
        """Everything that the host said is with the guest, and there will be no more."""
        connection.ended, connection.readable = True, False
        if connection.guest_sends and connection.writable:
            self.queue_packet(connection.key, SHUTDOWN, SHUTDOWN_SEND, connection)
            self.watch(connection)
        else:
            self._say_goodbye(connection)

    def _say_goodbye(self, connection: Connection) -> None:
        """Both directions have ended, and the guest may not have read everything yet."""
        self.queue_packet(connection.key, SHUTDOWN, SHUTDOWN_BOTH, connection)
        self._lingering[connection.key] = None
        if len(self._lingering) > _LINGERING_MAX:
            del self._lingering[next(iter(self._lingering))]
        self._detach(connection)

    def _abort(self, connection: Connection) -> None:
        """End a connection whose rules the guest broke."""
        self.queue_packet(connection.key, RST)
        self._forget(connection)

    def _detach(self, connection: Connection) -> None:
        """Forget the guest's side; the host still gets what it was sent."""
        if self._gathering is connection:
            self.write_gathered()
        if connection.backlog and connection.writable and connection.established:
            del self._connections[connection.key]
            connection.guest_sends = False
            connection.ended = True
            self._draining.add(connection)
            self.watch(connection)
        else:
            self._forget(connection)

    def _withdraw(self, connection: Connection) -> None:
        """A client did not wait for the answer. A guest that has not taken the request never hears of it: else one that takes
        nothing, while clients try again and again, would have us keep more and more."""
        for packet in self.packets:
            if packet[-1] is connection:
                self.packets.remove(packet)
                self._forget(connection)
                return
        self._abort(connection)

    def _forget(self, connection: Connection) -> None:
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
        self._draining.discard(connection)
        self._unwatch(connection)
        if self._gathering is connection:
            self._gathering, self._gathered, self._gathered_size = None, [], 0
        connection.close()

    # The host's sockets

    def watch(self, connection: Connection) -> None:
        """Watch for what can be used now."""
        if connection.closed or connection.hung_up or not self.running:
            return
        events = 0
        if connection.established and not (connection.readable or connection.ended) and connection.guest_receives:
            events |= READ
        if connection.backlog:
            events |= WRITE
        if connection.watched is None:
            try:
                self._loop.add_fd(connection.socket.fileno(), events, lambda mask: self._ready(connection, mask))
            except OSError:  # the user's limit of watches is reached, or memory is short: better none than one that nobody hears
                self._abort(connection)
                return
        elif events != connection.watched:
            self._loop.modify_fd(connection.socket.fileno(), events)
        connection.watched = events

    def _unwatch(self, connection: Connection) -> None:
        if connection.watched is not None:
            connection.watched = None
            self._loop.remove_fd(connection.socket.fileno())

    def _ready(self, connection: Connection, mask: int) -> None:
        """The loop's word on a socket."""
        if mask & (_EPOLLHUP | _EPOLLERR):
            self._hung_up(connection)
        elif connection in self._draining:
            connection.flush()
            if not connection.backlog:
                self._forget(connection)
        else:
            if mask & READ:
                connection.readable = True
                self.queue_turn(connection)
            if mask & WRITE:
                connection.flush()
                self._written(connection)
                self._pass_end(connection)
            self.watch(connection)
        self._wake()

    def _hung_up(self, connection: Connection) -> None:
        """Both directions of the host's end are closed; said once, and again and again by a loop that still watches."""
        connection.hung_up = True
        self._unwatch(connection)
        if connection in self._draining:
            self._forget(connection)
        elif not connection.established:
            self._withdraw(connection)
        else:
            connection.give_up_writing()
            if not connection.guest_receives:
                connection.ended = True
            if connection.ended:
                self._say_goodbye(connection)
            else:
                connection.readable = True
                self.queue_turn(connection)

    # Packets for the guest

    def queue_packet(
        self,
        key: Key,
        op: int,
        flags: int = 0,
        connection: Connection | None = None,
        *,
        kind: int = STREAM,
        cid: int = HOST_CID,
    ) -> None:
        """Have a packet without data sent."""
        self.packets.append((cid, key, kind, op, flags, connection))

    def queue_turn(self, connection: Connection) -> None:
        """Let the connection send what the host says, when it is its turn."""
        if connection.readable and connection.guest_receives and not (connection.queued or connection.closed):
            connection.queued = True
            self.turns.append(connection)
