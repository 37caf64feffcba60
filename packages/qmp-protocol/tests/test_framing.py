"""Any split of the bytes gives the same messages; what is no message gives an error in its place and hurts nobody else.

The properties here are tried on 21,000 streams, each cut in several ways.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_protocol.framing import TOO_LONG, Frame, Framer
from qmp_protocol.messages import Malformed
from qmp_protocol.syntax import MAX_DEPTH

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # lone surrogates are no UTF-8
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, json_values, max_size=4)


@st.composite
def written(draw: st.DrawFn, value: dict[str, Any]) -> bytes:
    """One object in one of the ways in which peers write it."""
    text = json.dumps(
        value,
        indent=draw(st.sampled_from([None, None, 1, "\t"])),
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([None, (",", ":"), (" , ", " : ")])),
    )
    blank = st.text(" \t\r\n", max_size=3)
    return (draw(blank) + text + draw(blank)).encode()


WAYS = 4  # of cutting each stream into pieces, each read both eagerly and patiently


def ways(stream: bytes, seed: int) -> Iterator[list[bytes]]:
    """The same bytes in WAYS different pieces."""
    yield [stream]
    yield [bytes([byte]) for byte in stream]
    rng = random.Random(seed)
    for _ in range(WAYS - 2):
        places = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(10)))
        yield [stream[a:b] for a, b in pairwise([0, *places, len(stream)])]


def frames(pieces: list[bytes], limit: int = 65536, *, patient: bool = False) -> list[Frame]:
    framer = Framer(limit, patient=patient)
    found = [frame for piece in pieces for frame in framer.feed(piece)]
    return found + framer.finish()


seeds = st.integers(0, 2**32)


@settings(max_examples=1_000, deadline=None)
@given(st.data(), st.lists(objects, max_size=5), seeds)
def test_any_messages_written_in_any_way_in_any_pieces_come_out_as_they_are(
    data: st.DataObject, values: list[dict[str, Any]], seed: int
) -> None:
    stream = b"".join(data.draw(written(value)) for value in values)
    for pieces in ways(stream, seed):
        assert frames(pieces) == values
        assert frames(pieces, patient=True) == values


fragments = st.lists(
    st.sampled_from(
        [
            b'{"execute":"stop"}',
            b'{"execute":"device_del","arguments":{"id":"a\\"}{"}}',
            b'{\n  "execute": "cont"\n}',
            b'{"execute":',
            b'"x"}',
            b'"\\u12',
            b"34",
            b"\xc3",
            b"\xbc",
            b"\r\n",
            b"\n",
            b" ",
            b"junk",
            b"[1,",
            b"}",
            b"\\",
        ]
    ),
    max_size=10,
).map(b"".join)


@settings(max_examples=13_000, deadline=None)
@given(fragments | st.binary(max_size=60) | st.text('{}[]":,\\\n 1aetrufls', max_size=60).map(str.encode), seeds)
def test_any_bytes_give_the_same_frames_in_any_pieces(stream: bytes, seed: int) -> None:
    whole = frames([stream])
    for pieces in ways(stream, seed):
        assert frames(pieces) == whole
        assert frames(pieces, patient=True) == whole


@settings(max_examples=1_500, deadline=None)
@given(st.lists(objects, max_size=2), st.integers(1, 40), st.binary(max_size=60), seeds)
def test_a_length_limit_gives_the_same_frames_in_any_pieces(
    values: list[dict[str, Any]], limit: int, junk: bytes, seed: int
) -> None:
    stream = b"\n".join([*(json.dumps(value).encode() for value in values), junk])
    whole = frames([stream], limit)
    for pieces in ways(stream, seed):
        assert frames(pieces, limit) == whole
        assert frames(pieces, limit, patient=True) == whole


garbage = st.binary(min_size=1, max_size=20).filter(
    lambda line: bool(line.strip()) and not set(line) & set(b"\n{[") and line.strip(b" \t\r") == line
)


@settings(max_examples=1_500, deadline=None)
@given(st.lists(objects | garbage, max_size=6), seeds)
def test_lines_of_garbage_between_messages_cost_one_error_each_and_no_message(items: list[Any], seed: int) -> None:
    stream = b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items)
    expected = [Malformed if isinstance(item, bytes) else item for item in items]
    for pieces in ways(stream, seed):
        assert [Malformed if isinstance(frame, Malformed) else frame for frame in frames(pieces)] == expected


@settings(max_examples=4_000, deadline=None)
@given(fragments | st.binary(max_size=80))
def test_after_any_garbage_the_second_whole_line_is_heard(junk: bytes) -> None:
    # The first may complete what the garbage began, as a nested object does.
    framer = Framer()
    framer.feed(junk + b"\n")
    framer.feed(b'{"execute":"a"}\n')
    assert framer.feed(b'{"execute":"b"}\n')[-1:] == [{"execute": "b"}]


def test_several_messages_on_one_line_are_all_read() -> None:
    assert frames([b'{"execute":"stop"}{"execute":"cont"} {"execute":"quit"}\r\n']) == [
        {"execute": "stop"},
        {"execute": "cont"},
        {"execute": "quit"},
    ]


def test_a_message_without_a_line_end_is_read_at_once() -> None:
    assert Framer().feed(b'{"execute":"stop"}') == [{"execute": "stop"}]


def test_a_message_whose_line_end_comes_later_is_one_message() -> None:
    framer = Framer()
    assert framer.feed(b'{"return":{}}\r') == [{"return": {}}]
    assert framer.feed(b"\n") == []
    assert framer.finish() == []


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        (b"hello", "expected a JSON object at line 1 column 1"),
        (b'"quit"', "expected a JSON object at line 1 column 1"),
        (b'["quit"]', "expected a JSON object at line 1 column 1"),
        (b"{'execute'}", "key must be a string at line 1 column 2"),
        (b'{"a" 1}', "expected `:` at line 1 column 6"),
        (b'{"a":}', "expected value at line 1 column 6"),
        (b'{"a":tru}', "expected value at line 1 column 6"),
        (b'{"a":01}', "invalid number at line 1 column 6"),
        (b'{"a":1 2}', "expected `,` or `}` at line 1 column 8"),
        (b'{"a":[1 2]}', "expected `,` or `]` at line 1 column 9"),
        (b'{"a":1,}', "trailing comma at line 1 column 8"),
        (b'{"a":[1,]}', "trailing comma at line 1 column 9"),
        (b'{"a":[1}', "expected `,` or `]` at line 1 column 8"),
        (b'{\n "a": "x\n"}', "control character (\\u0000-\\u001F) found while parsing a string at line 2 column 9"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_next_line_is_heard(text: bytes, desc: str) -> None:
    assert frames([text + b'\n{"execute":"stop"}']) == [Malformed(desc), {"execute": "stop"}]


@pytest.mark.parametrize(
    ("text", "what"), [(b'{"a":"x', "a string"), (b'{"a":[1,', "a list"), (b'{"a":', "an object"), (b'{"a":tr', "an object")]
)
def test_the_end_of_the_stream_inside_a_message_is_an_error(text: bytes, what: str) -> None:
    assert frames([text]) == [Malformed(f"EOF while parsing {what} at line 1 column {len(text) + 1}")]


def test_a_request_cut_short_does_not_swallow_the_one_on_the_next_line() -> None:
    assert frames([b'{"execute":"device_del","arguments":{"id":"net-0"}\n{"execute":"stop"}\n']) == [
        Malformed("expected `,` or `}` at line 2 column 1"),
        {"execute": "stop"},
    ]


def test_a_bad_message_over_many_lines_is_one_error() -> None:
    text = b'{\n  "execute": stop,\n  "arguments": {\n    "id": 1\n  }\n}\n{"execute":"cont"}\n'
    assert [type(frame) for frame in frames([text])] == [Malformed, dict]


def test_bad_utf8_and_bad_escapes_spoil_only_their_own_message() -> None:
    found = frames([b'{"a":"\xff"}{"b":1}{"c":"\\q"}{"d":2}'])
    assert [type(frame) is Malformed or frame for frame in found] == [True, {"b": 1}, True, {"d": 2}]


def test_a_message_over_the_limit_is_one_error_however_long_and_holds_no_memory() -> None:
    framer = Framer(1000)
    found = framer.feed(b'{"a":"' + b"x" * 900)
    for _ in range(100):
        found += framer.feed(b"x" * 1000)
        assert len(framer._buffer) <= 2000
    found += framer.feed(b'"}\n{"execute":"stop"}\n')
    assert found == [Malformed(TOO_LONG), {"execute": "stop"}]


def test_a_message_of_exactly_the_limit_passes() -> None:
    text = b'{"a":"' + b"x" * 92 + b'"}'
    assert len(text) == 100
    assert isinstance(frames([text], 100)[0], dict)
    assert frames([text], 99) == [Malformed(TOO_LONG)]


def test_nesting_is_bounded() -> None:
    text = b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}"
    assert frames([text]) == [Malformed(f"recursion limit exceeded at line 1 column {MAX_DEPTH + 5}")]


def test_a_message_byte_by_byte_is_scanned_once() -> None:
    # A quadratic reader takes minutes for this.
    text = b'{"a":"' + b"\\n" * 30000 + b'"}'
    framer = Framer()
    found = [frame for byte in text for frame in framer.feed(bytes([byte]))]
    assert found == [{"a": "\n" * 30000}]
