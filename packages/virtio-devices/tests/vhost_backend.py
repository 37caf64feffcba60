"""A vhost-user back end for tests, on a thread of its own and with a wire of its own: it shares no mistake with what is tested.

It serves whatever queues it is given by a function from (queue, readable bytes, room to write) to what is written, or None for a
request that stays under way until release(). It can be killed at any moment, and started anew on the same path.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT = 30.0  # seconds; nothing here takes one

Serve = Callable[[int, bytes, int], bytes | None]

VERSION_1, INDIRECT, EVENT_IDX, PROTOCOL = 1 << 32, 1 << 28, 1 << 29, 1 << 30
MQ, ACK, CHANNEL, CONFIG, INFLIGHT, RESET = 1 << 0, 1 << 3, 1 << 5, 1 << 9, 1 << 12, 1 << 13


class Killed(Exception):
    """The test wants it so."""


class Ring:
    """One queue as the back end sees it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = self.base = 0
        self.desc = self.used = self.avail = 0
        self.kick = self.call = self.err = -1
        self.enabled = self.started = False
        self.held: list[int] = []  # heads that are under way, in order
        self.counter = 0

    def close(self) -> None:
        for name in ("kick", "call", "err"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


class BackEnd:
    """The process that is none. `log` has the names of all messages; `served` the requests that were carried out."""

    def __init__(
        self,
        path: str,
        serve: Serve,
        *,
        features: int = VERSION_1 | INDIRECT | EVENT_IDX | PROTOCOL,
        protocol: int = MQ | ACK,
        queues: int = 4,
        config: bytes = b"",
        listen: bool = True,
    ) -> None:
        self.path, self.serve = path, serve
        self.features, self.protocol, self.queues = features, protocol, queues
        self.config = bytearray(config)
        self.negotiated = 0
        self.log: list[tuple[int, bytes]] = []
        self.came: list[tuple[int, int]] = []  # of each message: its number, and how many descriptors came along
        self.served: list[bytes] = []
        # What to answer instead: raw bytes, alone or with so many descriptors; None: nothing. ConnectionError: hang up.
        self.answers: dict[int, Callable[[bytes], bytes | tuple[bytes, int] | None]] = {}
        self.rings: dict[int, Ring] = {}
        self.changed = threading.Condition()
        self.connections = 0
        self._calls: list[Callable[[], None]] = []
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._memory: list[tuple[int, int, mmap.mmap]] = []
        self._area: mmap.mmap | None = None
        self._channel: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._acked = 0
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        if listen:
            self.start()

    # From the test

    def start(self) -> None:
        """Listen, and serve who comes."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def kill(self) -> None:
        """Drop everything at once, and be gone."""

        def die() -> None:
            raise Killed

        if self._thread is not None:
            self.do(die, wait=False)
            self._thread.join(LIMIT)
            assert not self._thread.is_alive()
            self._thread = None
            Path(self.path).unlink()
        assert self.failure is None, self.failure

    def close(self) -> None:
        """Kill, and give back what a process would lose."""
        if self._event >= 0:
            self.kill()
            os.close(self._event)
            self._event = -1

    def do(self, function: Callable[[], None], *, wait: bool = True) -> None:
        """Run something on the back end's thread."""
        done = threading.Event()

        def call() -> None:
            try:
                function()
            finally:
                done.set()

        self._calls.append(call)
        os.eventfd_write(self._event, 1)
        if wait:
            assert done.wait(LIMIT)

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for what the back end comes to."""
        with self.changed:
            assert self.changed.wait_for(condition, LIMIT), self.log

    def holds(self, count: int, index: int = 0) -> None:
        """Wait until `count` requests of a queue are under way."""
        self.until(lambda: index in self.rings and len(self.rings[index].held) == count)

    def release(self, count: int | None = None, *, last: bool = False, call: bool = True) -> None:
        """Answer requests that are under way: the oldest, or the newest."""

        def finish() -> None:
            for ring in self.rings.values():
                for _ in range(len(ring.held) if count is None else min(count, len(ring.held))):
                    head = ring.held.pop(-1 if last else 0)
                    serve, self.serve = self.serve, echo
                    self._carry_out(ring, head, call=call)
                    self.serve = serve

        self.do(finish)

    def change_config(self, config: bytes, *, need_reply: bool = False) -> None:
        """Change the configuration space and say so."""

        def change() -> None:
            self.config[:] = config
            assert self._channel is not None
            self._channel.sendall(struct.pack("=III", 2, 1 | (8 if need_reply else 0), 0))

        self.do(change)

    def say(self, data: bytes, fds: int = 0) -> None:
        """Put bytes on the channel, with so many descriptors."""

        def speak() -> None:
            assert self._channel is not None
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [self._event] * fds))] if fds else []
            self._channel.sendmsg([data], rights)

        self.do(speak)

    def names(self) -> list[int]:
        """Return the numbers of the messages that came."""
        return [number for number, _ in self.log]

    # On its thread

    def _main(self) -> None:
        try:
            while True:
                self._wait([self._listener])
                self._connection, _ = self._listener.accept()
                self._event_changed("connections", self.connections + 1)
                with suppress(ConnectionError):
                    self._session(self._connection)
                self._forget()
        except Killed:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            self._forget()
            self._listener.close()
            self._event_changed("connections", 0)

    def _event_changed(self, name: str, value: Any) -> None:
        with self.changed:
            setattr(self, name, value)
            self.changed.notify_all()

    def _forget(self) -> None:
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for _, _, mapping in self._memory:
            mapping.close()
        self._memory.clear()
        if self._area is not None:
            self._area.close()
            self._area = None

    def _wait(self, readable: list[Any]) -> list[Any]:
        """Return what is readable, after doing what the test asked for."""
        while True:
            poll = select.poll()
            for one in [*readable, self._event]:
                poll.register(one, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self._event in ready:
                os.eventfd_read(self._event)
                while self._calls:
                    self._calls.pop(0)()
            found = [one for one in readable if (one if isinstance(one, int) else one.fileno()) in ready]
            if found:
                return found

    def _session(self, connection: socket.socket) -> None:
        while True:
            kicks = {ring.kick: ring for ring in self.rings.values() if ring.kick >= 0}
            for ready in self._wait([connection, *kicks]):
                if ready is connection:
                    if not self._message(connection):
                        return
                elif ready in kicks:
                    ring = kicks[ready]
                    if ring.kick != ready:
                        continue
                    os.read(ready, 8)
                    if not ring.started:
                        self._begin(ring)
                    self._process(ring)

    def _receive(self, connection: socket.socket, count: int) -> tuple[bytes, list[int]]:
        data, fds = b"", array("i")
        while len(data) < count:
            part, ancillary, _, _ = connection.recvmsg(count - len(data), socket.CMSG_SPACE(4 * 32))
            for _, _, content in ancillary:
                fds.frombytes(content)
            if not part:
                break
            data += part
        return data, list(fds)

    def _message(self, connection: socket.socket) -> bool:
        try:
            header, fds = self._receive(connection, 12)
            if len(header) < 12:
                return False
            number, flags, size = struct.unpack("=III", header)
            payload, more = self._receive(connection, size)
            fds += more
            assert flags & 3 == 1
            with self.changed:
                self.log.append((number, payload))
                self.came.append((number, len(fds)))
                self.changed.notify_all()
            if number in self.answers:
                for fd in fds:
                    os.close(fd)
                raw = self.answers[number](payload)
                if isinstance(raw, tuple):
                    rights = array("i", [self._event] * raw[1])
                    connection.sendmsg([raw[0]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                elif raw is not None:
                    connection.sendall(raw)
                return True
            answer = self._handle(number, payload, fds)
            out: list[int] = []
            if isinstance(answer, tuple):
                answer, out = answer
            if answer is None and flags & 8 and self._acked & ACK:
                answer = struct.pack("=Q", 0)
            if answer is not None:
                data = struct.pack("=III", number, 5, len(answer)) + answer
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", out))] if out else []
                try:
                    connection.sendmsg([data], rights)
                finally:
                    for fd in out:
                        os.close(fd)
        except ConnectionError:
            return False
        return True

    def _handle(self, number: int, payload: bytes, fds: list[int]) -> Any:
        state = struct.unpack("=II", payload) if len(payload) == 8 else (0, 0)
        u64 = struct.unpack("=Q", payload)[0] if len(payload) == 8 else 0
        if number == 1:
            return struct.pack("=Q", self.features)
        if number == 2:
            assert not u64 & ~self.features
            self._event_changed("negotiated", u64)
        elif number == 5:
            for _, _, mapping in self._memory:
                mapping.close()
            self._memory.clear()
            for at, fd in enumerate(fds):
                _, size, user, offset = struct.unpack_from("=QQQQ", payload, 8 + 32 * at)
                self._memory.append((user, size, mmap.mmap(fd, size, offset=offset)))
                os.close(fd)
        elif number in (8, 10, 18):
            ring = self._ring(state[0])
            if number == 8:
                ring.size = state[1]
            elif number == 10:
                ring.base = state[1]
            else:
                ring.enabled = bool(state[1])
                if ring.enabled and ring.started:
                    self._process(ring)
        elif number == 9:
            index, _, desc, used, avail, _ = struct.unpack("=IIQQQQ", payload)
            ring = self._ring(index)
            ring.desc, ring.used, ring.avail = desc, used, avail
        elif number == 11:
            ring = self._ring(state[0])
            ring.started = False
            ring.close()
            return struct.pack("=II", state[0], ring.base)
        elif number in (12, 13, 14):
            ring = self._ring(u64 & 0xFF)
            name = {12: "kick", 13: "call", 14: "err"}[number]
            if getattr(ring, name) >= 0:
                os.close(getattr(ring, name))
            setattr(ring, name, fds[0])
        elif number == 15:
            return struct.pack("=Q", self.protocol)
        elif number == 16:
            assert not u64 & ~self.protocol
            self._acked = u64
        elif number == 17:
            return struct.pack("=Q", self.queues)
        elif number == 21:
            self._channel = socket.socket(fileno=fds[0])
        elif number == 24:
            offset, size, _ = struct.unpack_from("=III", payload)
            return payload[:12] + bytes(self.config[offset : offset + size])
        elif number == 25:
            offset, size, _ = struct.unpack_from("=III", payload)
            self.config[offset : offset + size] = payload[12:]
        elif number == 31:
            _, _, queues, size = struct.unpack("=QQHH4x", payload)
            total = queues * self._area_size(size)
            fd = os.memfd_create("area")
            os.ftruncate(fd, total)
            return struct.pack("=QQHH4x", total, 0, queues, size), [fd]
        elif number == 32:
            size, offset, _, _ = struct.unpack("=QQHH4x", payload)
            self._area = mmap.mmap(fds[0], size + offset)
            os.close(fds[0])
        return None

    def _ring(self, index: int) -> Ring:
        return self.rings.setdefault(index, Ring(index))

    # "Inflight I/O tracking", without batches: QueueRegionSplit and DescStateSplit

    @staticmethod
    def _area_size(entries: int) -> int:
        return 16 + 16 * entries

    def _mark(self, ring: Ring, head: int, inflight: int) -> None:
        if self._area is not None:
            at = ring.index * self._area_size(ring.size) + 16 + 16 * head
            ring.counter += 1
            struct.pack_into("=B7xQ", self._area, at, inflight, ring.counter)

    def _begin(self, ring: Ring) -> None:
        ring.started = True
        if self._area is None:
            return
        under_way = []
        for head in range(ring.size):
            at = ring.index * self._area_size(ring.size) + 16 + 16 * head
            inflight, counter = struct.unpack_from("=B7xQ", self._area, at)
            if inflight:
                under_way.append((counter, head))
        view, at = self._at(ring.used)
        (used,) = struct.unpack_from("<H", view, at + 2)
        ring.base = (used + len(under_way)) & 0xFFFF
        for _, head in sorted(under_way):
            self._carry_out(ring, head)

    # Rings

    def _at(self, address: int) -> tuple[mmap.mmap, int]:
        for user, size, mapping in self._memory:
            if user <= address < user + size:
                return mapping, address - user
        self._untold(5, 9)
        raise AssertionError(f"{address:#x} is not memory")

    def _untold(self, *numbers: int) -> None:
        """End the conversation if it lacks what one of these messages says, as its answer to that was another's."""
        if not self.answers.keys().isdisjoint(numbers):
            raise ConnectionError("it was not told all, as its answer was another's")

    def _process(self, ring: Ring) -> None:
        if self.negotiated & PROTOCOL and not ring.enabled:
            return
        if not ring.size:
            self._untold(8)
        view, at = self._at(ring.avail)
        while True:
            (idx,) = struct.unpack_from("<H", view, at + 2)
            if ring.base == idx or self.serve is None:
                break
            (head,) = struct.unpack_from("<H", view, at + 4 + 2 * (ring.base % ring.size))
            ring.base = (ring.base + 1) & 0xFFFF
            self._mark(ring, head, 1)
            self._carry_out(ring, head)
        used, at = self._at(ring.used)
        struct.pack_into("<H", used, at + 4 + 8 * ring.size, ring.base)  # avail_event: kick for the next one

    def _carry_out(self, ring: Ring, head: int, *, call: bool = True) -> None:
        readable, writable = b"", []
        table, at, index = *self._at(ring.desc), head
        while True:
            address, length, flags, following = struct.unpack_from("<QIHH", table, at + 16 * index)
            if flags & 4:
                (table, at), index = self._at(address), 0
                continue
            view, where = self._at(address)
            if flags & 2:
                writable.append((view, where, length))
            else:
                readable += view[where : where + length]
            if not flags & 1:
                break
            index = following
        answer = self.serve(ring.index, readable, sum(length for _, _, length in writable))
        if answer is None:
            with self.changed:
                ring.held.append(head)
                self.changed.notify_all()
            return
        written = len(answer)
        for view, where, length in writable:
            part, answer = answer[:length], answer[length:]
            view[where : where + len(part)] = part
        view, where = self._at(ring.used)
        (idx,) = struct.unpack_from("<H", view, where + 2)
        struct.pack_into("<II", view, where + 4 + 8 * (idx % ring.size), head, written)
        self._mark(ring, head, 0)
        struct.pack_into("<H", view, where + 2, (idx + 1) & 0xFFFF)
        with self.changed:
            self.served.append(readable)
            self.changed.notify_all()
        if call and ring.call >= 0:
            os.eventfd_write(ring.call, 1)


def echo(index: int, readable: bytes, room: int) -> bytes:
    """Answer with what was asked, in upper case."""
    return readable.upper()[:room].ljust(room, b".")


def hold(index: int, readable: bytes, room: int) -> None:
    """Keep every request under way."""
