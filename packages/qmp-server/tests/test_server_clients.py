"""Clients that behave badly, and the server's end; on asyncio and on trio."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from qmp_protocol.events import DeviceDeleted
from qmp_server import Call, Listener, QmpServer, listen_unix
from server_watching import STATUS, left_alone, open_files, until

pytestmark = pytest.mark.anyio


class TestClients:
    async def test_that_stop_reading_are_dropped_and_others_do_not_notice(self, serve: Any) -> None:
        server = QmpServer(rate=0, outbox_limit=100_000)
        async with serve(server) as running:
            with await running.connect() as stuck, await running.connect() as other:
                await stuck.run("qmp_capabilities")
                await other.run("qmp_capabilities")
                for _ in range(200):
                    server.emit(DeviceDeleted(device="x" * 10_000, path=""))
                    assert (await other.read())["event"] == "DEVICE_DELETED"
                await left_alone(server, but=1)
                assert len(await stuck.read_all()) < 200

    async def test_that_flood_without_reading_are_dropped(self, serve: Any) -> None:
        server = QmpServer(outbox_limit=100_000)
        async with serve(server) as running:
            with await running.connect() as peer, anyio.fail_after(60):
                with pytest.raises((BrokenPipeError, ConnectionResetError)):
                    await peer.send(b"junk\n" * 10_000_000)
                with await running.connect() as other:
                    assert "return" in await other.run("query-events")

    async def test_that_flood_give_others_their_turn(self, listener: Any, server: QmpServer, serving: Any) -> None:
        handled = 0

        async with serving(listener, server) as running:
            with await running.connect() as flooder, await running.connect() as other:

                @server.handler("stop")
                def stop(_: object, call: Call) -> None:
                    nonlocal handled
                    if not handled:
                        other.socket.send(b'{"execute":"query-status"}')
                    handled += 1

                await flooder.send(b'{"execute":"stop"}' * 5000)
                assert await other.read() == STATUS
                assert handled < 5000

    async def test_that_send_too_much_are_heard_slowly_and_others_as_ever(self, serve: Any) -> None:
        async with serve(QmpServer()) as running:
            with await running.connect() as flooder, await running.connect() as other:
                await flooder.send(b"x\n" * 20_000)
                assert "return" in await other.run("query-events")
                messages = 0
                while (await flooder.read())["error"]["class"] == "GenericError":
                    messages += 1
                assert 101 <= messages < 20_000
                await flooder.send(b"")
                assert "return" in await other.run("query-events")

    async def test_that_end_the_server_while_they_flood_do_not_keep_it(
        self, listener: Any, server: QmpServer, serving: Any
    ) -> None:
        server.drain_time = 0.05
        async with serving(listener, server) as running:
            peer = await running.connect()
            peer.socket.setblocking(True)
            flooding = threading.Thread(target=_flood, args=(peer.socket,))
            flooding.start()
            await running.end()
            await anyio.to_thread.run_sync(flooding.join)
            peer.close()

    async def test_that_close_their_sending_side_get_their_answers_and_then_the_end(
        self, listener: Any, server: QmpServer, serving: Any
    ) -> None:
        async with serving(listener, server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"query-status"}{"execute":"query-status"}\n{"exec')
                peer.socket.shutdown(socket.SHUT_WR)
                first, second, cut = await peer.read_all()
        assert first == second == STATUS
        assert cut["error"]["desc"].startswith("EOF while parsing")

    async def test_that_close_their_sending_side_may_read_as_slowly_as_others(
        self, listener: Any, server: QmpServer, serving: Any
    ) -> None:
        server.drain_time = 0  # which is for the end of the server
        async with serving(listener, server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"query-qmp-schema"}' * 50)
                peer.socket.shutdown(socket.SHUT_WR)
                await until(lambda: all(client._finishing for client in server._clients))  # all is answered, little delivered
                assert len(await peer.read_all()) == 50
            await left_alone(server)

    async def test_that_leave_at_once_have_their_commands_run(self, serve: Any, server: QmpServer) -> None:
        ran = anyio.Event()
        server.register("cont", lambda _, call: ran.set())
        server.register("stop", lambda _, call: anyio.sleep(0))
        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"stop"}\n' * 100 + b'{"execute":"cont"}')
            with anyio.fail_after(30):
                await ran.wait()
            await left_alone(server)

    async def test_that_reset_the_connection_hurt_nobody(self, listener: Any, server: QmpServer, serving: Any) -> None:
        async with serving(listener, server) as running:
            for _ in range(20):
                peer = await running.connect()
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                await peer.send(b'{"execute":"query-qmp-schema"}' * 20)
                peer.close()
            with await running.connect() as peer:
                assert await peer.run("query-status") == STATUS

    async def test_of_a_single_client_listener_wait_ungreeted_for_their_turn(self, serve: Any) -> None:
        async with serve(QmpServer(max_clients=1)) as running:
            first = await running.connect()
            with type(first).connect_quietly(running.address) as second:
                assert await second.is_quiet()
                first.close()
                assert "QMP" in await second.read()

    async def test_can_be_waited_for(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            with await running.connect(), anyio.fail_after(30):
                await server.wait_for_client()

    async def test_come_and_go_and_leave_nothing_behind(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            before, tasks = open_files(settle=True), _tasks()
            for number in range(300):
                with await running.connect() as peer:
                    if number % 3 == 1:
                        await peer.send(b'{"execute":"query-status"}')
                    elif number % 3 == 2:
                        await peer.send(b'{"exec')
            await left_alone(server)
            await anyio.sleep(0)
            assert (open_files(), _tasks()) == (before, tasks)

    async def test_are_accepted_again_when_descriptors_run_out_and_come_back(
        self, tmp_path: Path, server: QmpServer, serving: Any
    ) -> None:
        class Exhausted(socket.socket):
            failures = 2

            def accept(self) -> tuple[socket.socket, Any]:
                if self.failures:
                    self.failures -= 1
                    raise OSError(errno.EMFILE, "Too many open files")
                return super().accept()

        made = listen_unix(tmp_path / "s")
        door = Exhausted(fileno=made.socket.detach())
        async with serving(Listener(door), server) as running:
            with await running.connect() as peer:
                assert await peer.run("query-status") == STATUS
        assert door.failures == 0


class TestTheEnd:
    async def test_delivers_what_was_emitted_before(self, listener: Any, server: QmpServer, serving: Any) -> None:
        async with serving(listener, server) as running:
            with await running.connect() as talker, await running.connect() as quiet:
                await talker.run("qmp_capabilities")
                server.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
                await running.end()
                for peer in (talker, quiet):
                    (event,) = await peer.read_all()
                    assert event["event"] == "SHUTDOWN"

    async def test_delivers_a_lot_to_a_slow_reader(self, serve: Any, server: QmpServer) -> None:
        server.drain_time = 60
        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.run("qmp_capabilities")
                for _ in range(100):
                    server.emit(DeviceDeleted(device="x" * 20_000, path=""))
                server.close()
                assert len(await peer.read_all()) == 100

    async def test_does_not_wait_for_a_client_that_does_not_read(self, serve: Any, server: QmpServer) -> None:
        server.drain_time = 0.05
        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.run("qmp_capabilities")
                for _ in range(100):
                    server.emit(DeviceDeleted(device="x" * 20_000, path=""))
                await running.end()

    async def test_may_be_asked_for_from_a_thread_and_before_the_start(self, serve: Any, server: QmpServer) -> None:
        server.close()
        async with serve(server) as running:
            with anyio.fail_after(30):
                await running.ended.wait()

    async def test_removes_the_socket_file(self, tmp_path: Path, serve: Any, server: QmpServer) -> None:
        async with serve(server):
            assert (tmp_path / "qmp.sock").exists()
        assert not (tmp_path / "qmp.sock").exists()

    async def test_before_the_start_leaves_nothing(
        self, tmp_path: Path, server: QmpServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def exhausted(*_: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr("qmp_server.server.os.eventfd", exhausted)
        before = open_files(settle=True)
        with pytest.raises(OSError, match="Too many open files"):
            await server.serve([listen_unix(tmp_path / "s")])
        assert open_files() == before
        assert not (tmp_path / "s").exists()

    async def test_by_cancellation_leaves_nothing_and_still_tells_clients(self, tmp_path: Path, server: QmpServer) -> None:
        before = open_files(settle=True)
        listener = listen_unix(tmp_path / "s")
        client = socket.socket(socket.AF_UNIX)
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.serve, [listener])
            client.connect(str(tmp_path / "s"))
            await server.wait_for_client()
            server.emit("STOP")
            tasks.cancel_scope.cancel()
        assert not (tmp_path / "s").exists()
        received = b""
        while data := client.recv(65536):
            received += data
        client.close()
        assert b'"QMP"' in received
        assert b'"STOP"' in received
        assert open_files() == before


def _flood(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(b" " * 65536)


def _tasks() -> int:
    """How many tasks live in the running event loop."""
    return len(anyio.get_running_tasks())
