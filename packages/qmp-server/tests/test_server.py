"""What clients see of a server, on asyncio and on trio."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import orjson
import pytest

from qmp_protocol import Greeting, QmpError, SchemaError
from qmp_protocol.commands.lifecycle import QueryStatus, StatusInfo, Stop
from qmp_protocol.events import DeviceDeleted, Stopped
from qmp_protocol.schema import introspect
from qmp_server import Call, Listener, QmpServer, builtin, listen_unix
from qmp_server.descriptors import close_all

pytestmark = pytest.mark.anyio

STATUS = {"return": {"running": True, "singlestep": False, "status": "running"}}


async def test_a_client_is_greeted_negotiates_and_is_answered(listener: Any, server: QmpServer, serving: Any) -> None:
    async with serving(listener, server) as running:
        with await running.connect() as peer:
            assert await peer.run("qmp_capabilities", id="n-1") == {"return": {}, "id": "n-1"}
            assert await peer.run("query-status", id=[1, {"a": None}]) == {**STATUS, "id": [1, {"a": None}]}
            assert await peer.run("query-status") == STATUS


async def test_what_the_server_knows_by_itself(serve: Any, server: QmpServer) -> None:
    async with serve(server) as running:
        with await running.connect() as peer:
            version = (await peer.run("query-version"))["return"]
            assert version == {"package": "StratoVirt-2.4.0", "qemu": {"major": 5, "micro": 1, "minor": 0}}
            commands = (await peer.run("query-commands"))["return"]
            assert len(commands) == 62
            assert {"name": "blockdev-add"} in commands
            events = (await peer.run("query-events"))["return"]
            assert events[0] == {"name": "SHUTDOWN"}
            entries = (await peer.run("query-qmp-schema"))["return"]
            assert {entry["name"] for entry in entries} >= {command["name"] for command in commands}


async def test_the_schema_is_worked_out_once(serve: Any, server: QmpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    original = introspect.introspect
    monkeypatch.setattr(introspect, "introspect", lambda schema: made.append(schema) or original(schema))
    builtin._introspection.cache_clear()
    async with serve(server) as running:
        with await running.connect() as peer:
            first = await peer.run("query-qmp-schema")
            assert await peer.run("query-qmp-schema") == first
    assert len(made) == 1


async def test_every_mistake_is_answered_and_the_next_command_is_heard(serve: Any, server: QmpServer) -> None:
    async with serve(server) as running:
        with await running.connect() as peer:
            assert (await peer.run("query-name", id=3)) == {
                "error": {"class": "CommandNotFound", "desc": "The command query-name has not been found"},
                "id": 3,
            }
            assert (await peer.run("stop"))["error"]["desc"] == "The command stop is not supported yet"
            assert (await peer.run("device_del", {}))["error"]["desc"] == "missing field `id`"
            await peer.send(b"nonsense\n\xff\xfe\n[1]\n")
            assert [(await peer.read())["error"]["class"] for _ in range(3)] == ["GenericError"] * 3
            assert await peer.run("query-status") == STATUS


async def test_an_id_that_is_nested_as_deep_as_json_goes_is_answered_and_costs_nobody_anything(
    serve: Any, server: QmpServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(server) as running:
        with await running.connect() as peer:
            for depth in (*range(120, 136), 253, 254, 255, 1022, 1023, 1024):
                await peer.send(b'{"execute":"query-status","id":' + b"[" * depth + b"]" * depth + b"}\n")
                reply = await peer.read()
                assert ("id" in reply) == ("return" in reply) == (depth <= 129)
                if depth > 129:
                    assert reply["error"]["desc"].startswith("recursion limit exceeded")
            assert await peer.run("query-status") == STATUS
    assert caplog.text == ""


async def test_a_strict_server_wants_negotiation_first(serve: Any) -> None:
    async with serve(QmpServer(strict=True, greeting=Greeting({}, ("oob",)))) as running:
        with await running.connect() as peer:
            assert (await peer.run("query-events"))["error"]["class"] == "CommandNotFound"
            assert await peer.run("qmp_capabilities", {"enable": ["oob"]}) == {"return": {}}
            assert "return" in await peer.run("query-events")


class Unspeakable(BaseException):
    """An exception that cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class TestHandlers:
    async def test_get_typed_arguments_and_return_typed_results(self, serve: Any) -> None:
        server = QmpServer()

        @server.handler(QueryStatus)
        async def query_status(arguments: QueryStatus, call: Call) -> StatusInfo:
            assert isinstance(arguments, QueryStatus)
            return StatusInfo(running=False, status="paused")

        async with serve(server) as running:
            with await running.connect() as peer:
                assert (await peer.run("query-status"))["return"]["status"] == "paused"

    @pytest.mark.parametrize(
        "around",
        [
            lambda value: value,
            lambda value: [value, 1],
            lambda value: (value,),
            lambda value: [1, value],
            lambda value: {"a": value},
            lambda value: [{"a": {"b": (1, value)}}],
        ],
    )
    async def test_may_return_typed_values_anywhere_in_their_result(self, serve: Any, around: Callable[[Any], Any]) -> None:
        server = QmpServer()
        server.register("query-status", lambda _, call: around(StatusInfo(running=False, status="paused")))
        async with serve(server) as running:
            with await running.connect() as peer:
                reply = await peer.run("query-status", id=1)
        value = around({"running": False, "singlestep": False, "status": "paused"})
        assert reply == {"return": orjson.loads(orjson.dumps(value)), "id": 1}

    async def test_may_run_in_a_worker_thread(self, serve: Any) -> None:
        server = QmpServer()
        threads: list[int] = []

        def stop(_: Stop, call: Call) -> None:
            threads.append(threading.get_ident())
            call.emit(Stopped())

        server.register(Stop, stop, in_thread=True)
        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"stop"}')
                assert (await peer.read())["event"] == "STOP"  # before the reply, also from a thread
                assert await peer.read() == {"return": {}}
        assert threads != [threading.get_ident()]

    async def test_decide_what_comes_before_and_what_behind_their_reply(self, serve: Any) -> None:
        server = QmpServer()
        done: list[str] = []

        @server.handler("quit")
        def quit_(_: object, call: Call) -> None:
            call.emit_after("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
            call.emit("STOP")
            call.after_reply(lambda: done.append("behind"))
            call.after_reply(server.close)

        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"quit","id":"z"}')
                messages = await peer.read_all()
        assert [message.get("event", "reply") for message in messages] == ["STOP", "reply", "SHUTDOWN"]
        assert messages[2]["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert done == ["behind"]

    async def test_that_fail_leave_out_what_was_to_follow(self, serve: Any, server: QmpServer) -> None:
        @server.handler("stop")
        def stop(_: object, call: Call) -> None:
            call.emit_after("STOP")
            raise QmpError("DeviceNotActive", "no")

        async with serve(server) as running:
            with await running.connect() as peer:
                assert await peer.run("stop", id="p2") == {"error": {"class": "DeviceNotActive", "desc": "no"}, "id": "p2"}
                assert await peer.run("query-status") == STATUS

    @pytest.mark.parametrize("how", ["raises", "returns a set", "deep", "very deep", "after"])
    async def test_that_go_wrong_are_answered_and_the_server_lives(self, serve: Any, server: QmpServer, how: str) -> None:
        @server.handler("stop")
        async def stop(_: object, call: Call) -> Any:
            if how == "raises":
                raise RuntimeError("boom")
            if how == "after":
                call.after_reply(lambda: 1 // 0)
            if how == "very deep":
                value: list[Any] = []
                for _ in range(700):
                    value = [value]
                return value
            return {1, 2} if how == "returns a set" else {"a": object()} if how == "deep" else None

        async with serve(server) as running:
            with await running.connect() as peer:
                reply = await peer.run("stop", id=1)
                assert reply["id"] == 1
                if how == "raises":
                    assert reply["error"] == {"class": "GenericError", "desc": "stop failed: RuntimeError: boom"}
                else:
                    assert ("return" in reply) == (how == "after")
                assert await peer.run("query-status") == STATUS

    @pytest.mark.parametrize("kind", ["plain", "async", "in a thread", "behind the reply"])
    @pytest.mark.parametrize(
        "error",
        [SystemExit(3), BaseException("odd"), BaseExceptionGroup("both", [SystemExit(), ValueError("x")]), Unspeakable()],
        ids=["SystemExit", "BaseException", "a group", "unspeakable"],
    )
    async def test_that_want_to_end_the_program_end_nothing(
        self, serve: Any, server: QmpServer, kind: str, error: BaseException
    ) -> None:
        def plain(_: object, call: Call) -> None:
            raise error

        async def later(_: object, call: Call) -> None:
            await anyio.sleep(0)
            raise error

        def behind(_: object, call: Call) -> None:
            call.after_reply(lambda: plain(_, call))

        functions = {"plain": plain, "async": later, "in a thread": plain, "behind the reply": behind}
        server.register("stop", functions[kind], in_thread=kind == "in a thread")
        async with serve(server) as running:
            with await running.connect() as peer, await running.connect() as other:
                reply = await peer.run("stop", id=1)
                if kind == "behind the reply":
                    assert reply == {"return": {}, "id": 1}
                else:
                    assert reply["error"]["desc"].startswith(f"stop failed: {type(error).__name__}")
                assert await peer.run("query-status") == STATUS
                assert await other.run("query-status") == STATUS

    async def test_that_are_cancelled_are_answered(self, serve: Any, server: QmpServer, anyio_backend: str) -> None:
        @server.handler("stop")
        async def stop(_: object, call: Call) -> None:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anyio.sleep_forever()

        @server.handler("cont")
        async def cont(_: object, call: Call) -> None:
            raise anyio.get_cancelled_exc_class()

        @server.handler("quit")
        def quit_(_: object, call: Call) -> None:
            raise anyio.get_cancelled_exc_class()

        async with serve(server) as running:
            with await running.connect() as peer:
                assert await peer.run("stop") == {"return": {}}
                if anyio_backend == "asyncio":  # trio forbids making its Cancelled by hand
                    assert (await peer.run("cont"))["error"]["desc"] == "cont was cancelled"
                    assert (await peer.run("quit"))["error"]["desc"] == "quit was cancelled"
                assert await peer.run("query-status") == STATUS

    async def test_run_one_at_a_time_over_all_clients_unless_concurrent(self, serve: Any, server: QmpServer) -> None:
        started, go_on = anyio.Event(), anyio.Event()

        @server.handler("stop")
        async def stop(_: object, call: Call) -> None:
            started.set()
            await go_on.wait()

        @server.handler("cont")
        async def cont(_: object, call: Call) -> None:
            pass

        async with serve(server) as running:
            with await running.connect() as a, await running.connect() as b, await running.connect() as c:
                await a.send(b'{"execute":"stop"}')
                await started.wait()
                await b.send(b'{"execute":"cont"}')
                assert await b.is_quiet()
                assert await c.run("query-status") == STATUS
                go_on.set()
                assert await a.read() == {"return": {}}
                assert await b.read() == {"return": {}}

    async def test_run_to_their_end_when_their_client_leaves(self, serve: Any, server: QmpServer) -> None:
        started, go_on, ended = anyio.Event(), anyio.Event(), anyio.Event()

        @server.handler("stop")
        async def stop(_: object, call: Call) -> None:
            started.set()
            await go_on.wait()
            ended.set()

        async with serve(server) as running:
            peer = await running.connect()
            await peer.send(b'{"execute":"stop"}')
            await started.wait()
            peer.close()
            server.emit("STOP")  # finds out that the client is gone
            go_on.set()
            with anyio.fail_after(30):
                await ended.wait()

    async def test_that_never_end_do_not_keep_the_server(self, serve: Any) -> None:
        server = QmpServer(drain_time=0.05)
        started = anyio.Event()

        @server.handler("stop")
        async def stop(_: object, call: Call) -> None:
            started.set()
            await anyio.sleep_forever()

        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"stop"}')
                await started.wait()
                await running.end()

    async def test_that_hang_in_a_thread_do_not_keep_the_server(self, serve: Any) -> None:
        server = QmpServer(drain_time=0.05)
        started, release = threading.Event(), threading.Event()

        def stop(_: object, call: Call) -> None:
            started.set()
            release.wait()

        server.register("stop", stop, in_thread=True)
        try:
            async with serve(server) as running:
                with await running.connect() as peer:
                    await peer.send(b'{"execute":"stop"}')
                    await anyio.to_thread.run_sync(started.wait)
                    await running.end()
        finally:
            release.set()

    async def test_for_a_command_that_the_schema_lacks_are_refused(self) -> None:
        with pytest.raises(SchemaError):
            QmpServer().register("no-such-command", print)

        async def stop(_: object, call: Call) -> None: ...

        with pytest.raises(SchemaError):
            QmpServer().register("stop", stop, in_thread=True)


class TestEvents:
    async def test_reach_every_client_in_one_order_with_microseconds(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            peers = [await running.connect() for _ in range(5)]
            for peer in peers:
                await peer.run("qmp_capabilities")
            before = time.time()
            for number in range(50):
                server.emit(DeviceDeleted(device=f"d{number}", path="p"))
            seen = [[await peer.read() for _ in range(50)] for peer in peers]
            for peer in peers:
                peer.close()
        assert all(events == seen[0] for events in seen)
        assert [event["data"]["device"] for event in seen[0]] == [f"d{number}" for number in range(50)]
        assert list(seen[0][0]) == ["event", "data", "timestamp"]
        stamp = seen[0][0]["timestamp"]
        assert 0 <= stamp["microseconds"] < 1_000_000
        assert before - 1 <= stamp["seconds"] <= time.time() + 1

    async def test_may_come_from_any_thread_and_keep_their_order(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.run("qmp_capabilities")
                for number in range(20):
                    thread = threading.Thread(target=server.emit, args=(DeviceDeleted(device=str(number), path=""),))
                    thread.start()
                    thread.join()
                server.emit(DeviceDeleted(device="last", path=""))
                seen = [(await peer.read())["data"]["device"] for _ in range(21)]
        assert seen == [*map(str, range(20)), "last"]

    async def test_wait_for_the_reply_to_the_negotiation(self, serve: Any, server: QmpServer) -> None:
        # Clients that read the greeting and then the reply are confused by an event in between.
        async with serve(server) as running:
            with await running.connect() as peer:
                server.emit("STOP")
                assert await peer.run("qmp_capabilities") == {"return": {}}
                assert (await peer.read())["event"] == "STOP"

    async def test_reach_a_client_that_only_listens(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            with await running.connect() as peer:
                for _ in range(1000):
                    server.emit("STOP")
                for _ in range(1000):
                    assert (await peer.read())["event"] == "STOP"

    async def test_that_nobody_hears_are_lost(self, serve: Any, server: QmpServer) -> None:
        server.emit("STOP")
        async with serve(server) as running:
            server.emit("STOP")
            with await running.connect() as peer:
                assert await peer.run("query-status") == STATUS
                assert await peer.is_quiet()
        server.emit("STOP")

    async def test_that_the_schema_lacks_are_refused(self, server: QmpServer) -> None:
        with pytest.raises(SchemaError):
            server.emit("NO_SUCH_EVENT")

    async def test_and_replies_may_name_files_whose_names_are_no_text(self, serve: Any, server: QmpServer) -> None:
        @server.handler("stop")
        def stop(_: object, call: Call) -> None:
            call.emit(DeviceDeleted(device=os.fsdecode(b"d\xff"), path=""))
            raise QmpError("GenericError", os.fsdecode(b"no file /x\xff"))

        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"stop"}')
                assert (await peer.read())["data"]["device"] == "d\\udcff"
                assert (await peer.read())["error"]["desc"] == "no file /x\\udcff"

    async def test_and_the_end_may_come_from_a_signal_handler_at_any_moment(self, server: QmpServer) -> None:
        with server._bell_lock:  # it interrupts this thread just there
            server.close()


class TestFlowControl:
    async def test_the_102nd_command_at_once_is_refused_in_stratovirts_words(
        self, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qmp_server.client.time.monotonic_ns", lambda: 0)  # time stands still
        async with serve(QmpServer()) as running:
            with await running.connect() as peer, await running.connect() as other:
                await peer.send(b'{"execute":"query-events","id":7}\n' * 103)
                replies = [await peer.read() for _ in range(103)]
                assert all("return" in reply for reply in replies[:101])
                assert (
                    replies[101:]
                    == [
                        {
                            "error": {
                                "class": "OperationThrottled",
                                "desc": "More than 100 requests received during 1 second",
                            },
                            "id": 7,
                        }
                    ]
                    * 2
                )
                assert "return" in await other.run("query-events")  # each client has its own bucket

    async def test_bad_requests_count(self, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qmp_server.client.time.monotonic_ns", lambda: 0)
        async with serve(QmpServer(rate=1)) as running:
            with await running.connect() as peer:
                await peer.send(b"junk\njunk\njunk\n")
                classes = [(await peer.read())["error"]["class"] for _ in range(3)]
        assert classes == ["GenericError", "GenericError", "OperationThrottled"]

    async def test_the_rate_is_an_option(self, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qmp_server.client.time.monotonic_ns", lambda: 0)
        async with serve(QmpServer(rate=2)) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"query-events"}' * 4)
                replies = [await peer.read() for _ in range(4)]
        assert ["error" in reply for reply in replies] == [False, False, False, True]
        assert replies[3]["error"]["desc"] == "More than 2 requests received during 1 second"


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
                await _left_alone(server, but=1)
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
                await _until(lambda: all(client._finishing for client in server._clients))  # all is answered, little delivered
                assert len(await peer.read_all()) == 50
            await _left_alone(server)

    async def test_that_leave_at_once_have_their_commands_run(self, serve: Any, server: QmpServer) -> None:
        ran = anyio.Event()
        server.register("cont", lambda _, call: ran.set())
        server.register("stop", lambda _, call: anyio.sleep(0))
        async with serve(server) as running:
            with await running.connect() as peer:
                await peer.send(b'{"execute":"stop"}\n' * 100 + b'{"execute":"cont"}')
            with anyio.fail_after(30):
                await ran.wait()
            await _left_alone(server)

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
            before, tasks = _open_files(), _tasks()
            for number in range(300):
                with await running.connect() as peer:
                    if number % 3 == 1:
                        await peer.send(b'{"execute":"query-status"}')
                    elif number % 3 == 2:
                        await peer.send(b'{"exec')
            await _left_alone(server)
            await anyio.sleep(0)
            assert (_open_files(), _tasks()) == (before, tasks)

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
                before = _open_files()
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
                assert _open_files() == before + 6 + 1
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
                await _until(lambda: any(client._connection._fds for client in server._clients))
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
                before = _open_files()
                ends = [os.pipe() for _ in range(30)]
                _pass(peer.socket, b'{"execute":"getfd","arguments":', [end for _, end in ends])
                for _, end in ends:
                    os.close(end)
                await _until(lambda: sum(not _has_ended(reader) for reader, _ in ends) == 8)
                await peer.send(b'{"fdname":"a"}}')
                assert await peer.read() == {"return": {}}
                assert [_has_ended(reader) for reader, _ in ends] == [True] * 29 + [False]
                assert _open_files() == before + 30 + 1
        for reader, _ in ends:
            os.close(reader)

    async def test_whose_closing_fails_hurt_nobody(self) -> None:
        reader, writer = os.pipe()
        os.close(writer)
        close_all((writer, reader))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(reader)

    async def test_are_not_hoarded_without_end(self, serve: Any, server: QmpServer) -> None:
        async with serve(server) as running:
            with await running.connect() as peer:
                reader, writer = os.pipe()
                replies = []
                for number in range(300):
                    _pass(peer.socket, b'{"execute":"getfd","arguments":{"fdname":"%d"}}' % number, [writer])
                    replies.append(await peer.read())
                os.close(reader)
                os.close(writer)
        assert sum("error" in reply for reply in replies) == 300 - 256


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
        before = _open_files()
        with pytest.raises(OSError, match="Too many open files"):
            await server.serve([listen_unix(tmp_path / "s")])
        assert _open_files() == before
        assert not (tmp_path / "s").exists()

    async def test_by_cancellation_leaves_nothing_and_still_tells_clients(self, tmp_path: Path, server: QmpServer) -> None:
        before = _open_files()
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
        assert _open_files() == before


def _pass(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def _has_ended(reader: int) -> bool:
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


def _flood(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(b" " * 65536)


def _tasks() -> int:
    """How many tasks live in the running event loop."""
    return len(anyio.get_running_tasks())


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.005)


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def _left_alone(server: QmpServer, but: int = 0) -> None:
    """Return when at most `but` clients are left."""
    with anyio.fail_after(30):
        while len(server._clients) > but:
            await anyio.sleep(0.01)


async def test_traffic_is_each_command_and_each_message_in_the_order_of_the_wire(serve: Any) -> None:
    heard: list[tuple[str, bytes]] = []
    server = QmpServer(rate=0, traffic=lambda *message: heard.append(message))

    @server.handler(Stop)
    def stop(_: Stop, call: Call) -> None:
        call.emit(Stopped())

    async with serve(server) as running:
        with await running.connect() as peer:
            await peer.run("qmp_capabilities", id=1)
            await peer.send(b'{"execute":"stop"}\n')
            assert ["event" in await peer.read() for _ in range(2)] == [True, False]
            await peer.send(b"nonsense\n")
            await peer.read()
    (greeting, asked, agreed, command, event, reply, refusal) = heard
    assert greeting[0] == "<--"
    assert greeting[1].startswith(b'{"QMP":')
    assert asked == ("-->", b'{"execute":"qmp_capabilities","id":1}\r\n')
    assert agreed == ("<--", b'{"return":{},"id":1}\r\n')
    assert command == ("-->", b'{"execute":"stop"}\r\n')
    assert event[0] == "<--"
    assert b'"event":"STOP"' in event[1]
    assert reply == ("<--", b'{"return":{}}\r\n')
    assert refusal[0] == "<--"
    assert b'"error"' in refusal[1]


async def test_traffic_leaves_out_who_asks_too_often(serve: Any) -> None:
    heard: list[str] = []
    server = QmpServer(rate=1, traffic=lambda direction, _: heard.append(direction))
    async with serve(server) as running:
        with await running.connect() as peer:
            await peer.send(b'{"execute":"query-version"}\n' * 20)
            replies = [await peer.read() for _ in range(20)]
    answered = sum("return" in reply for reply in replies)
    assert 1 <= answered < 20
    assert heard == ["<--", *["-->", "<--"] * answered]
