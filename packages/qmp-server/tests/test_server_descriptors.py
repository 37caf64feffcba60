"""Descriptors that clients pass, on asyncio and on trio."""

from __future__ import annotations

import array
import os
import resource
import socket
from typing import Any

import anyio
import pytest

from qmp_protocol.events import DeviceDeleted
from qmp_server import Call, QmpServer
from qmp_server.descriptors import close_all
from server_watching import open_files, until

pytestmark = pytest.mark.anyio


class TestDescriptors:
    async def test_are_passed_named_and_taken(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            with await running.connect() as peer:
                ours, theirs = os.pipe()
                _pass(peer.socket, b'{"execute":"getfd","arguments":{"fdname":"tapA"}}\n', [theirs])
                assert await peer.read() == {"return": {}}
                fd = server.fds.take("tapA")
                assert fd is not None
                assert server.fds.take("tapA") is None
                assert not os.get_inheritable(fd)
                os.write(fd, b"x")
                assert os.read(ours, 1) == b"x"
                for each in (fd, ours, theirs):
                    os.close(each)

    async def test_a_getfd_without_one_is_refused(self, listener: Any, server: QmpServer, serving: Any) -> None:
        async with serving(listener, server) as running:
            with await running.connect() as peer:
                assert await peer.run("getfd", {"fdname": "a"}) == {
                    "error": {"class": "GenericError", "desc": "Invalid SCM message"}
                }

    async def test_that_are_replaced_unused_or_left_over_are_closed(self, serve: Any, server: QmpServer) -> None:
        line = b'{"execute":"getfd","arguments":{"fdname":"a"}}\n'
        async with serve(server) as running:
            with await running.connect() as peer:
                before = open_files(settle=True)
                ends = [os.pipe() for _ in range(6)]
                _pass(peer.socket, line, [ends[0][1]])
                _pass(peer.socket, line, [ends[1][1]])  # replaces
                _pass(peer.socket, line, [ends[2][1], ends[3][1]])  # the last one counts
                _pass(peer.socket, b'{"execute":"query-status"}\n', [ends[4][1]])  # unused
                _pass(peer.socket, b'{"execute":"getfd"}\n', [ends[5][1]])  # refused
                for _ in range(5):
                    await peer.read()
                for _, end in ends:
                    os.close(end)
                # One write end is in the table, all others are closed: their pipes have ended.
                assert [_has_ended(reader) for reader, _ in ends] == [True, True, True, False, True, True]
                assert open_files() == before + 6 + 1
        assert _has_ended(ends[3][0])
        for reader, _ in ends:
            os.close(reader)

    @pytest.mark.parametrize("at", [1, 20, 46])
    async def test_find_their_command_however_it_is_split(self, serve: Any, server: QmpServer, at: int) -> None:
        line = b'{"execute":"getfd","arguments":{"fdname":"a"}}\n'
        async with serve(server) as running:
            with await running.connect() as peer:
                reader, writer = os.pipe()
                _pass(peer.socket, line[:at], [writer])
                await peer.send(line[at:])
                assert await peer.read() == {"return": {}}
                assert "a" in server.fds
                os.close(reader)
                os.close(writer)

    @pytest.mark.parametrize("how", ["resets", "is dropped", "is hung up on"])
    async def test_of_a_client_that_is_suddenly_gone_are_closed(
        self, serve: Any, server: QmpServer, how: str, peers: type[Any]
    ) -> None:
        server.drain_time = 0.05
        server.outbox_limit = 100_000
        reader, writer = os.pipe()
        started, go_on = anyio.Event(), anyio.Event()

        @server.handler("stop")
        async def stop(_: object, call: Call) -> None:
            started.set()
            await go_on.wait()

        async with serve(server) as running:
            peer = peers.connect_quietly(running.address)  # the greeting stays unread: leaving is a reset
            await anyio.wait_readable(peer.socket)
            before = b"" if how == "resets" else b'{"execute":"stop"}{"execute":"getfd","arguments":{"fdname":"a"}}'
            _pass(peer.socket, before + b'{"execute":', [writer])
            os.close(writer)
            if how == "resets":
                await until(lambda: any(client._connection._fds for client in server._clients))
            elif how == "is dropped":
                await started.wait()
                for _ in range(100):
                    server.emit(DeviceDeleted(device="x" * 10_000, path=""))
                go_on.set()
            elif how == "is hung up on":
                await started.wait()
                await running.end()
            peer.close()
            with anyio.fail_after(30):
                while not _has_ended(reader):
                    await anyio.sleep(0.005)
        os.close(reader)

    async def test_beyond_a_few_are_closed_and_the_last_one_counts(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            with await running.connect() as peer:
                before = open_files(settle=True)
                ends = [os.pipe() for _ in range(30)]
                _pass(peer.socket, b'{"execute":"getfd","arguments":', [end for _, end in ends])
                for _, end in ends:
                    os.close(end)
                await until(lambda: sum(not _has_ended(reader) for reader, _ in ends) == 8)
                await peer.send(b'{"fdname":"a"}}')
                assert await peer.read() == {"return": {}}
                assert [_has_ended(reader) for reader, _ in ends] == [True] * 29 + [False]
                assert open_files() == before + 30 + 1
        for reader, _ in ends:
            os.close(reader)

    async def test_whose_closing_fails_hurt_nobody(self) -> None:
        reader, writer = os.pipe()
        os.close(writer)
        close_all((writer, reader))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(reader)

    @pytest.mark.parametrize(("may_open", "most"), [(1 << 20, 256), (1024, 256), (40, 10)])
    async def test_are_not_hoarded_without_end(
        self, serve: Any, server: QmpServer, monkeypatch: pytest.MonkeyPatch, may_open: int, most: int
    ) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (may_open, 1 << 20))

        async def put(peer: Any, name: int, fd: int) -> Any:
            _pass(peer.socket, b'{"execute":"getfd","arguments":{"fdname":"%d"}}' % name, [fd])
            return await peer.read()

        refused = {"error": {"class": "GenericError", "desc": f"at most {most} descriptors can wait for a device"}}
        async with serve(server) as running:
            with await running.connect() as peer:
                old, new, late = os.pipe(), os.pipe(), os.pipe()
                before = open_files(settle=True)
                for number in range(most):
                    assert await put(peer, number, old[1]) == {"return": {}}
                assert await put(peer, most, late[1]) == refused
                assert open_files() == before + most
                for number in range(most):  # a name that is given again needs no room
                    assert await put(peer, number, new[1]) == {"return": {}}
                assert open_files() == before + most
                for writer in (old[1], new[1], late[1]):
                    os.close(writer)
                assert [_has_ended(reader) for reader, _ in (old, new, late)] == [True, False, True]
                fd = server.fds.take("0")  # one that is used makes room
                assert fd is not None
                assert await put(peer, most, fd) == {"return": {}}
                os.close(fd)
        for reader, _ in (old, new, late):
            os.close(reader)


def _pass(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def _has_ended(reader: int) -> bool:
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False
