"""Events to every client, flow control, and who hears of the traffic; on asyncio and on trio."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from qmp_protocol import QmpError, SchemaError
from qmp_protocol.commands.lifecycle import Stop
from qmp_protocol.events import DeviceDeleted, Stopped
from qmp_server import Call, QmpServer
from server_watching import STATUS

pytestmark = pytest.mark.anyio


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
