"""Messages and their bytes."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orjson import loads

from qmp_protocol import ABSENT, Error, Event, Execute, Greeting, Malformed, Return, Timestamp, encode
from qmp_protocol.framing import Framer
from qmp_protocol.messages import Json, decode_request, decode_response, describe

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | texts
data = st.dictionaries(texts, values, max_size=3)
ids = st.just(ABSENT) | values
whole = st.integers(0, 2**53)

responses = (
    st.builds(Return, values | data, ids)
    | st.builds(Error, texts, texts, ids)
    | st.builds(Event, texts, data, st.builds(Timestamp, whole, st.integers(0, 999999)))
    | st.builds(Greeting, data, st.lists(texts, max_size=3).map(tuple))
)


@given(responses)
def test_a_servers_messages_survive_encoding(message: Return | Error | Event | Greeting) -> None:
    line = encode(message)
    assert line.endswith(b"}\r\n")
    assert line.count(b"\n") == 1
    (value,) = Framer().feed(line)
    assert not isinstance(value, Malformed)
    assert decode_response(value) == message


@given(st.builds(Execute, texts, st.just(ABSENT) | data, ids))
def test_a_clients_commands_survive_encoding(message: Execute) -> None:
    (value,) = Framer().feed(encode(message))
    assert not isinstance(value, Malformed)
    assert decode_request(value) == message


def test_members_stand_in_stratovirts_order() -> None:
    assert encode(Return({"status": "running", "running": True, "a": {"z": 1, "b": 2}}, "x")) == (
        b'{"return":{"a":{"b":2,"z":1},"running":true,"status":"running"},"id":"x"}\r\n'
    )
    assert encode(Event("RESET", {"guest": True}, Timestamp(1, 2))) == (
        b'{"event":"RESET","data":{"guest":true},"timestamp":{"seconds":1,"microseconds":2}}\r\n'
    )
    assert encode(Error("GenericError", "d", None)) == b'{"error":{"class":"GenericError","desc":"d"},"id":null}\r\n'


def test_what_json_cannot_carry_is_refused() -> None:
    with pytest.raises(TypeError):
        encode(Return({1, 2}))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        encode("stop")  # type: ignore[arg-type]
    deep: Json = []
    for _ in range(5000):
        deep = [deep]
    for message in (Return(deep), Return({}, deep), Execute("stop", deep), Error("GenericError", "", deep)):
        with pytest.raises(TypeError):
            encode(message)


def test_text_that_is_no_unicode_goes_out_escaped() -> None:
    name = b"disk-\xff".decode(errors="surrogateescape")
    shown = "disk-\\udcff"
    assert decode_response(loads(encode(Return({name: [name, 1]}, name)))) == Return({shown: [shown, 1]}, shown)
    assert decode_response(loads(encode(Error("GenericError", name)))) == Error("GenericError", shown)
    event = Event("STOP", {"a": (name,)}, Timestamp(1, 2))
    assert decode_response(loads(encode(event))) == Event("STOP", {"a": [shown]}, Timestamp(1, 2))


def test_members_whose_names_become_the_same_when_escaped_are_all_there() -> None:
    name, escaped = "\udcff", "\\udcff"
    for members in ({name: 1, escaped: 2}, {escaped: 2, name: 1}, {name: 1, escaped: 2, "\\\\udcff": 3}):
        sent = loads(encode(Return(members)))["return"]
        assert sent[escaped] == 2
        assert sorted(sent.values()) == sorted(members.values())


def test_mappings_of_other_types_are_carried_like_dictionaries() -> None:
    proxy = MappingProxyType({"b": 1, "a": MappingProxyType({"c": 2})})
    assert encode(Return(proxy, "x")) == b'{"return":{"a":{"c":2},"b":1},"id":"x"}\r\n'
    assert encode(Return(proxy)) == b'{"return":{"a":{"c":2},"b":1}}\r\n'
    assert encode(Execute("stop", proxy)) == b'{"execute":"stop","arguments":{"b":1,"a":{"c":2}}}\r\n'
    assert encode(Event("STOP", proxy, Timestamp(1, 2))).startswith(b'{"event":"STOP","data":{"b":1,"a":{"c":2}},')


def test_messages_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Return({}).value = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "boolean `true`"),
        (1, "integer `1`"),
        (1.5, "floating point `1.5`"),
        ("x", 'string "x"'),
        ("x" * 70, 'string "' + "x" * 64 + '…"'),
        ([], "sequence"),
        ({}, "map"),
    ],
)
def test_values_are_described_as_stratovirt_does(value: Json, text: str) -> None:
    assert describe(value) == text
