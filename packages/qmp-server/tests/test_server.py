"""What clients see of a server and of what its handlers do, on asyncio and on trio."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import orjson
import pytest

from qmp_protocol import Greeting, QmpError, SchemaError
from qmp_protocol.commands.lifecycle import QueryStatus, StatusInfo, Stop
from qmp_protocol.events import Stopped
from qmp_protocol.schema import introspect
from qmp_server import Call, QmpServer, builtin
from server_watching import STATUS

pytestmark = pytest.mark.anyio


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
