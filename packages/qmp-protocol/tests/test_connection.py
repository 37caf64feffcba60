"""Both ends of a connection: what is allowed when, and what the application sees."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmp_protocol import (
    ABSENT,
    BadMessage,
    ClientConnection,
    CommandReceived,
    DescriptorsUnused,
    Error,
    Event,
    Greeting,
    LocalProtocolError,
    Negotiated,
    PeerClosed,
    Rejected,
    Reply,
    Return,
    ServerConnection,
    State,
    Timestamp,
    encode,
)
from qmp_protocol.commands import GREETING
from qmp_protocol.commands.device import DeviceDel
from qmp_protocol.commands.lifecycle import QueryStatus
from qmp_protocol.connection import CLIENT, SERVER, STRICT_SERVER, Input, _next_state


def server(**options: Any) -> ServerConnection:
    connection = ServerConnection(GREETING, **options)
    connection.greet()
    return connection


def client() -> ClientConnection:
    connection = ClientConnection()
    connection.receive(encode(GREETING))
    return connection


def ready_client() -> ClientConnection:
    connection = client()
    connection.negotiate()
    connection.receive(b'{"return":{}}\r\n')
    return connection


@pytest.mark.parametrize("table", [SERVER, STRICT_SERVER, CLIENT])
def test_every_transition_that_is_not_in_the_table_is_refused_in_the_same_words(table: dict[tuple[State, Input], State]) -> None:
    for state, what in product(State, Input):
        if (state, what) in table:
            assert isinstance(_next_state(table, state, what), State)
        else:
            with pytest.raises(LocalProtocolError, match=f"{what.value} is not possible on a connection that is {state.value}"):
                _next_state(table, state, what)


def test_the_greeting_suits_the_manual_and_existing_clients() -> None:
    line = ServerConnection(GREETING).greet()
    assert line.endswith(b"\r\n")
    body = orjson.loads(line)["QMP"]
    assert body["capabilities"] == []
    assert body["version"]["qemu"] == {"micro": 1, "minor": 0, "major": 5}
    assert set(body["version"]["StratoVirt"]) == {"micro", "minor", "major"}
    assert body["version"]["package"] == "StratoVirt-2.4.0"


def test_the_greeting_is_sent_once_and_before_anything_else() -> None:
    connection = ServerConnection(GREETING)
    with pytest.raises(LocalProtocolError):
        connection.receive(b"{}")
    with pytest.raises(LocalProtocolError):
        connection.send(Return({}))
    connection.greet()
    with pytest.raises(LocalProtocolError):
        connection.greet()


def test_commands_need_no_negotiation_as_in_stratovirt() -> None:
    assert server().receive(b'{"execute":"stop"}') == [CommandReceived("stop", ABSENT, ABSENT)]


def test_a_strict_server_takes_no_command_before_negotiation_as_qemu() -> None:
    connection = server(strict=True)
    (event,) = connection.receive(b'{"execute":"stop","id":1}')
    assert isinstance(event, Rejected)
    assert event.error.class_name == "CommandNotFound"
    assert event.error.id == 1
    assert connection.receive(b'{"execute":"qmp_capabilities"}{"execute":"stop"}') == [
        Negotiated(),
        CommandReceived("stop", ABSENT, ABSENT),
    ]


def test_capabilities_may_be_negotiated_again() -> None:
    connection = server()
    assert connection.receive(b'{"execute":"qmp_capabilities"}' * 2) == [Negotiated(), Negotiated()]
    assert connection.state is State.READY


@pytest.mark.parametrize(
    "arguments", [b"[]", b"null", b'{"enable":["oob"]}', b'{"enable":1}', b'{"enable":[1]}', b'{"enabled":[]}']
)
def test_capabilities_that_were_not_offered_are_refused(arguments: bytes) -> None:
    connection = server()
    (event,) = connection.receive(b'{"execute":"qmp_capabilities","arguments":' + arguments + b',"id":"x"}')
    assert isinstance(event, Rejected)
    assert event.error.id == "x"
    assert connection.state is State.GREETED


def test_offered_capabilities_can_be_enabled() -> None:
    connection = ServerConnection(Greeting({}, ("oob",)))
    connection.greet()
    assert connection.receive(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}') == [Negotiated(("oob",))]


def nested(depth: int, inside: Any, wrap: int) -> Any:
    """`inside` in as many lists (wrap 1), objects (2) or both in turn (3)."""
    for level in range(depth):
        inside = [inside] if wrap == 1 or (wrap == 3 and level % 2) else {"a": inside}
    return inside


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=500, deadline=None)
@given(json_values, st.integers(0, 1100), st.integers(1, 3), st.sampled_from(["query-status", "qmp_capabilities", None, 1]))
@example(2**64, 0, 1, "query-status")
@example(-(2**63) - 1, 0, 1, "query-status")
@example(2**64 - 1, 0, 1, "query-status")
@example(-(2**63), 128, 3, "query-status")
@example(1, 129, 1, "query-status")
@example(1, 254, 1, "query-status")
@example(1, 255, 2, None)
@example(1, 1022, 3, "qmp_capabilities")
def test_an_id_comes_back_as_it_was_or_is_refused_and_the_next_command_is_heard(
    id_: Any, depth: int, wrap: int, name: Any
) -> None:
    id_ = nested(depth, id_, wrap)
    try:
        text = json.dumps({"execute": name, "id": id_} if name else {"id": id_}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    connection = server()
    event, after = connection.receive(text + b'\n{"execute":"stop"}\n')
    assert after == CommandReceived("stop", ABSENT, ABSENT)
    if isinstance(event, Rejected):
        answer = event.error
    else:
        assert isinstance(event, CommandReceived | Negotiated)
        answer = Error("GenericError", "no", event.id)  # has a level more than a success
    line = json.loads(connection.send(answer))
    if answer.id is ABSENT:
        assert depth > 100 or "number" in answer.desc
        assert "(member `id`)" in answer.desc or "recursion limit" in answer.desc
    else:
        assert json.dumps(line["id"]) == json.dumps(id_)


@pytest.mark.parametrize(
    ("id_", "desc"),
    [
        (
            "18446744073709551616",
            "invalid value: floating point `1.8446744073709552e+19`, expected a number from -2^63 to 2^64-1",
        ),
        ('[{"a":-9223372036854775809}]', "expected a number from -2^63 to 2^64-1 (member `id`)"),
        ("[" * 129 + "1" + "]" * 129, "recursion limit exceeded (member `id`)"),
    ],
)
def test_an_id_that_could_not_come_back_as_it_was_is_refused_in_words(id_: str, desc: str) -> None:
    (event,) = server().receive(b'{"execute":"stop","id":%b}' % id_.encode())
    assert isinstance(event, Rejected)
    assert desc in event.error.desc
    assert event.error.id is ABSENT


@pytest.mark.parametrize(
    ("line", "desc"),
    [
        (b"{}", "missing field `execute`"),
        (b'{"exec-oob":"x"}', "missing field `execute`"),
        (b'{"execute":1}', "invalid type: integer `1`, expected variant identifier (member `execute`)"),
        (b'{"execute":"stop","foo":1}', "unknown field `foo`, expected `arguments` or `id`"),
    ],
)
def test_a_request_that_is_none_is_answered_and_the_next_one_is_heard(line: bytes, desc: str) -> None:
    assert server().receive(line + b'\n{"execute":"stop"}') == [
        Rejected(Error("GenericError", desc)),
        CommandReceived("stop", ABSENT, ABSENT),
    ]


def test_an_error_in_a_request_names_its_id() -> None:
    (event,) = server().receive(b'{"id":[1]}')
    assert event == Rejected(Error("GenericError", "missing field `execute`", [1]))


def test_the_end_of_the_stream_is_an_event_and_the_last_one() -> None:
    connection = server()
    events = connection.receive(b'{"execute":') + connection.receive(b"")
    assert isinstance(events[0], Rejected)
    assert events[1] == PeerClosed()
    with pytest.raises(LocalProtocolError):
        connection.receive(b"x")
    assert connection.send(Return({})) == b'{"return":{}}\r\n'


class TestDescriptors:
    GETFD = b'{"execute":"getfd","arguments":{"fdname":"a"}}\n'
    OTHER = b'{"execute":"query-status"}\n'

    @pytest.mark.parametrize("at", range(1, len(GETFD)))
    @pytest.mark.parametrize("with_first", [True, False])
    def test_arrive_with_their_command_however_its_bytes_are_split(self, at: int, with_first: bool) -> None:
        connection = server()
        events = connection.receive(self.GETFD[:at], (7,) if with_first else ())
        events += connection.receive(self.GETFD[at:], () if with_first else (7,))
        if at == len(self.GETFD) - 1 and not with_first:
            # The last byte is a line end, behind the command.
            assert events[-1] == DescriptorsUnused((7,))
        else:
            assert [event.fds for event in events if isinstance(event, CommandReceived)] == [(7,)]

    def test_wait_through_other_commands_of_the_same_read(self) -> None:
        events = server().receive(self.OTHER + self.GETFD, (7,))
        assert [event.fds for event in events if isinstance(event, CommandReceived)] == [(), (7,)]

    def test_that_nobody_asked_for_are_handed_back(self) -> None:
        assert server().receive(self.OTHER, (7, 8))[-1] == DescriptorsUnused((7, 8))

    def test_do_not_wait_for_a_later_command(self) -> None:
        connection = server()
        connection.receive(self.OTHER, (7,))
        (event,) = connection.receive(self.GETFD)
        assert isinstance(event, CommandReceived)
        assert event.fds == ()

    def test_of_two_commands_in_one_stream_go_each_to_its_own(self) -> None:
        connection = server()
        events = connection.receive(self.GETFD[:10], (7,)) + connection.receive(self.GETFD[10:] + self.GETFD, (8,))
        assert [event.fds for event in events if isinstance(event, CommandReceived)] == [(7,), (8,)]

    def test_do_not_pile_up_behind_an_unfinished_message(self) -> None:
        connection = server()
        assert connection.receive(b"{", (7,)) == []
        assert connection.receive(b'"', (8,)) == [DescriptorsUnused((7,))]
        assert connection.receive(b"")[-2:] == [DescriptorsUnused((8,)), PeerClosed()]

    @given(
        st.lists(
            st.tuples(st.binary(max_size=30) | st.sampled_from([GETFD, OTHER, GETFD[:9], GETFD[9:]]), st.booleans()), max_size=12
        )
    )
    def test_are_each_handed_on_exactly_once_whatever_the_client_does(self, reads: list[tuple[bytes, bool]]) -> None:
        connection = server()
        given_, seen = list[int](), list[int]()
        events = list[Any]()
        for number, (data, passes) in enumerate(reads):
            if data:
                given_ += [number] if passes else []
                events += connection.receive(data, (number,) if passes else ())
        events += connection.receive(b"")
        for event in events:
            if isinstance(event, CommandReceived | DescriptorsUnused):
                seen += event.fds
        assert sorted(seen) == given_


def test_a_client_negotiates_and_matches_replies_by_id() -> None:
    connection = ready_client()
    assert connection.state is State.READY
    first, line = connection.execute("query-status")
    second, _ = connection.execute("stop", {})
    assert orjson.loads(line)["execute"] == "query-status"
    assert isinstance(orjson.loads(line)["id"], str)  # StratoVirt takes no other id
    replies = connection.receive(encode(Return(2, "3")) + encode(Return(1, "2")))
    assert replies == [Reply(second, "stop", Return(2, "3")), Reply(first, "query-status", Return(1, "2"))]


@pytest.mark.parametrize("wrong", [10**30, {1, 2}, nested(300, 1, 3)], ids=["too large", "no JSON", "too deep"])
def test_a_command_that_cannot_be_sent_takes_no_other_command_s_reply(wrong: Any) -> None:
    connection = ready_client()
    with pytest.raises(TypeError):
        connection.execute("balloon", {"value": wrong})
    assert connection.outstanding == 0
    number, _ = connection.execute("stop")
    # StratoVirt sends some replies without an id: they are matched by their order.
    assert connection.receive(encode(Return({}))) == [Reply(number, "stop", Return({}))]


def test_typed_commands_have_typed_results() -> None:
    connection = ready_client()
    command = QueryStatus()
    number, line = connection.call(command)
    assert "arguments" not in orjson.loads(line)
    (reply,) = connection.receive(encode(Return({"running": True, "status": "running"}, "2")))
    assert isinstance(reply, Reply)
    assert reply.request == number
    assert isinstance(reply.message, Return)
    assert command.parse_result(reply.message.value).running is True
    _, line = connection.call(DeviceDel(id="d"))
    assert orjson.loads(line)["arguments"] == {"id": "d"}


pieces = st.lists(
    st.binary(max_size=40)
    | st.sampled_from(
        [b'{"execute":', b'"qmp_capabilities"', b"}", b'{"return":{}', b',"id":"1"}', b'{"QMP":{', b'{"event":', b"\n"]
    )
    | st.dictionaries(
        st.sampled_from(["execute", "arguments", "id", "return", "error", "event", "data", "timestamp", "QMP", "class", "desc"]),
        st.none() | st.integers() | st.text(max_size=3) | st.just({}) | st.just([]) | st.just({"enable": [1]}),
    ).map(lambda value: json.dumps(value).encode()),
    max_size=12,
)


@given(pieces, st.booleans())
def test_a_server_survives_whatever_a_client_sends(pieces: list[bytes], strict: bool) -> None:
    connection = server(strict=strict)
    for piece in pieces:
        if piece:
            connection.receive(piece)
    assert connection.receive(b"")[-1] == PeerClosed()


@given(pieces, st.integers(0, 2))
def test_a_client_survives_whatever_a_server_sends(pieces: list[bytes], stage: int) -> None:
    connection = (ClientConnection, client, ready_client)[stage]()
    if stage == 2:
        connection.execute("query-status")
    for piece in pieces:
        if piece:
            connection.receive(piece)
    assert connection.receive(b"")[-1] == PeerClosed()


def test_replies_without_an_id_are_matched_in_order() -> None:
    connection = ready_client()
    first, _ = connection.execute("a")
    connection.execute("b")
    (reply,) = connection.receive(encode(Error("GenericError", "no")))
    assert reply == Reply(first, "a", Error("GenericError", "no"))


def test_a_client_may_not_run_commands_before_negotiation() -> None:
    with pytest.raises(LocalProtocolError):
        ClientConnection().negotiate()
    with pytest.raises(LocalProtocolError):
        client().execute("stop")
    connection = client()
    connection.negotiate()
    with pytest.raises(LocalProtocolError):
        connection.negotiate()


def test_a_refused_negotiation_can_be_tried_again() -> None:
    connection = client()
    connection.negotiate(["oob"])
    (reply,) = connection.receive(encode(Error("GenericError", "no", "1")))
    assert isinstance(reply, Reply)
    connection.negotiate()
    assert connection.receive(b'{"return":{}}') == [Negotiated()]


def test_events_reach_a_client_at_any_time() -> None:
    event = Event("STOP", {}, Timestamp(1, 2))
    connection = ClientConnection()
    assert connection.receive(encode(event)) == [event]
    connection.receive(encode(GREETING))
    assert connection.receive(encode(event)) == [event]


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"junk\n",
        b'{"return":{},"id":"9"}',
        b'{"return":{},"id":{"a":1}}',
        b'{"event":1}',
        b'{"event":"STOP","timestamp":{}}',
        b'{"error":"x"}',
        b'{"error":{"class":1,"desc":""}}',
        b'{"QMP":{}}',
        b'{"QMP":{"version":{},"capabilities":[]}}',
    ],
)
def test_what_is_not_qmp_is_an_event_and_the_client_goes_on(line: bytes) -> None:
    connection = ready_client()
    (event,) = connection.receive(line)
    assert isinstance(event, BadMessage)
    connection.execute("stop")
    (reply,) = connection.receive(b'{"return":{},"id":"2"}')
    assert isinstance(reply, Reply)


def test_a_server_that_hangs_up_is_an_event() -> None:
    connection = ready_client()
    assert connection.receive(b"") == [PeerClosed()]
    with pytest.raises(LocalProtocolError):
        connection.execute("stop")
