"""`key=value` words, typed by the schema of whichever server is at the other end."""

from __future__ import annotations

import json
import shlex
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pystratovirt.qmpshell import render
from pystratovirt.qmpshell.arguments import ArgumentError, from_json, parse, split
from pystratovirt.qmpshell.completion import words_after
from pystratovirt.qmpshell.describe import details, overview
from pystratovirt.qmpshell.model import Model
from qmp_protocol import Execute, Framer, Malformed, encode
from qmp_protocol.commands import COMMANDS, STRATOVIRT
from qmp_protocol.errors import QmpError

MODEL = Model.stratovirt()

# Shapes that QEMU's introspection has and StratoVirt's schema has not.
QEMU = Model(
    [
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": "number", "meta-type": "builtin", "json-type": "number"},
        {"name": "null", "meta-type": "builtin", "json-type": "null"},
        {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
        {"name": "[int]", "meta-type": "array", "element-type": "int"},
        {"name": "5", "meta-type": "enum", "values": ["file", "nbd"]},
        {"name": "6", "meta-type": "object", "members": [{"name": "filename", "type": "str"}]},
        {
            "name": "7",
            "meta-type": "object",
            "members": [{"name": "driver", "type": "5"}],
            "tag": "driver",
            "variants": [{"case": "file", "type": "6"}, {"case": "nbd", "type": "q_empty"}],
        },
        {"name": "8", "meta-type": "alternate", "members": [{"type": "7"}, {"type": "str"}]},
        {"name": "9", "meta-type": "alternate", "members": [{"type": "int"}, {"type": "null"}]},
        {
            "name": "10",
            "meta-type": "object",
            "members": [
                {"name": "ref", "type": "8"},
                {"name": "n", "type": "9", "default": None},
                {"name": "cpus", "type": "[int]", "default": None},
                {"name": "ratio", "type": "number", "default": None},
                {"name": "on", "type": "bool", "default": None},
                {"name": "addr", "type": "11", "default": None},
            ],
        },
        # Whatever the type of the address, there is a member `data`, but of another type.
        {"name": "12", "meta-type": "enum", "values": ["inet", "unix", "fd"]},
        {
            "name": "11",
            "meta-type": "object",
            "members": [{"name": "type", "type": "12"}],
            "tag": "type",
            "variants": [{"case": "inet", "type": "13"}, {"case": "unix", "type": "14"}, {"case": "fd", "type": "15"}],
        },
        {"name": "13", "meta-type": "object", "members": [{"name": "data", "type": "16"}]},
        {"name": "14", "meta-type": "object", "members": [{"name": "data", "type": "6"}]},
        {"name": "15", "meta-type": "object", "members": [{"name": "data", "type": "int"}]},
        {"name": "16", "meta-type": "object", "members": [{"name": "host", "type": "str"}]},
        {"name": "add", "meta-type": "command", "arg-type": "10", "ret-type": "q_empty"},
        "not an entry",
        {"meta-type": "no name"},
    ]
)


@pytest.mark.parametrize(
    ("command", "words", "arguments"),
    [
        ("device_del", "id=net-0", {"id": "net-0"}),
        ("device_del", "id=7", {"id": "7"}),
        ("device_del", "id=", {"id": ""}),
        ("device_del", "id=a=b", {"id": "a=b"}),
        ("balloon", "value=0x80000000", {"value": 0x80000000}),
        (
            "device_add",
            "id=a driver=d num-queues=4 multifunction=on",
            {"id": "a", "driver": "d", "num-queues": 4, "multifunction": True},
        ),
        (
            "blockdev-add",
            "node-name=d file.driver=file file.filename=/x file.aio=native cache.direct=off throttling.iops-total=9",
            {
                "node-name": "d",
                "file": {"driver": "file", "filename": "/x", "aio": "native"},
                "cache": {"direct": False},
                "throttling.iops-total": 9,
            },
        ),
        ("blockdev-add", 'file={"driver":"file"} file.filename=/x', {"file": {"driver": "file", "filename": "/x"}}),
        ("qmp_capabilities", "enable=oob,x", {"enable": ["oob", "x"]}),
        ("qmp_capabilities", 'enable=["oob"]', {"enable": ["oob"]}),
        ("qmp_capabilities", "enable=", {"enable": []}),
        ("chardev-add", "backend.data.addr.data.path=/s", {"backend": {"data": {"addr": {"data": {"path": "/s"}}}}}),
        ("unknown", "a=1 b=x c.d=true", {"a": 1, "b": "x", "c": {"d": True}}),
    ],
)
def test_words_become_typed_arguments(command: str, words: str, arguments: dict[str, Any]) -> None:
    assert parse(MODEL, command, words.split()) == arguments


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("ref.driver=file ref.filename=/x", {"ref": {"driver": "file", "filename": "/x"}}),
        ("ref=name", {"ref": "name"}),
        ("n=5 cpus=1,2 ratio=0.5 on=off", {"n": 5, "cpus": [1, 2], "ratio": 0.5, "on": False}),
        ("n=null", {"n": None}),
        ("addr.type=inet addr.data.host=x", {"addr": {"type": "inet", "data": {"host": "x"}}}),
        ("addr.type=unix addr.data.filename=/x", {"addr": {"type": "unix", "data": {"filename": "/x"}}}),
        ("addr.data.filename=/x addr.type=unix", {"addr": {"type": "unix", "data": {"filename": "/x"}}}),
        ("addr.type=fd addr.data=7", {"addr": {"type": "fd", "data": 7}}),
        ('addr={"type":"unix"} addr.data.filename=/x', {"addr": {"type": "unix", "data": {"filename": "/x"}}}),
        ("addr.data.host=x", {"addr": {"data": {"host": "x"}}}),
    ],
)
def test_qemus_shapes_are_understood(words: str, arguments: dict[str, Any]) -> None:
    assert parse(QEMU, "add", words.split()) == arguments


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("device_del", "net-0", "net-0: not key=value"),
        ("device_del", "=x", "=x: not key=value"),
        ("device_del", "ident=x", "ident: no such argument; there are: id"),
        ("stop", "x=1", "x: no such argument; there are: none"),
        ("device_del", "id=a id=b", "id: given twice"),
        ("balloon", "value=much", "value=much: a whole number is wanted (decimal, or with 0x)"),
        ("balloon", "value=18446744073709551616", "value=18446744073709551616: a whole number from -2^63 to 2^64-1 is wanted"),
        ("unknown", "a=18446744073709551616", "a=18446744073709551616: 18446744073709551616 has more than 64 bits"),
        ("blockdev-add", 'file={"a":99999999999999999999}', 'file={"a":99999999999999999999}: not JSON: '),
        ("unknown", ".".join("a" * 300) + "=1", "unknown: the arguments cannot be sent: Recursion limit reached"),
        ("trace-set-state", "enable=maybe", "enable=maybe: on or off is wanted"),
        ("blockdev-add", "file=/x", "file=/x: not JSON"),
        ("blockdev-add", "file=[1]", "file=[1]: an object is wanted"),
        ("blockdev-add", "file.name=/x", "file.name: no such argument; there are: driver, filename, aio"),
    ],
)
def test_a_wrong_word_is_named_with_what_is_allowed(command: str, words: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(MODEL, command, words.split())
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("word", ["ratio=nan", "ratio=inf", "ratio=1e999", "cpus=99999999999999999999"])
def test_numbers_that_json_has_not_are_refused(word: str) -> None:
    with pytest.raises(ArgumentError, match="number"):
        parse(QEMU, "add", [word])


keys = st.sampled_from(["id", "value", "file", "cache", "name", "enable", "a.b", "file.filename", "cache.direct"])
texts = st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)
typed = st.tuples(keys, texts | values.map(json.dumps)).map("=".join)


@settings(max_examples=300)
@given(st.sampled_from([*(command.name for command in COMMANDS), "unknown"]), st.lists(st.text(max_size=20) | typed, max_size=3))
def test_any_words_are_arguments_that_can_be_sent_or_refused(command: str, words: list[str]) -> None:
    try:
        arguments = parse(MODEL, command, words)
    except ArgumentError:
        return
    (sent,) = Framer().feed(encode(Execute(command, arguments, "1")))
    assert not isinstance(sent, Malformed)
    assert repr(sent["arguments"]) == repr(arguments)  # repr: 1 is not 1.0


@settings(max_examples=300)
@given(st.recursive(values, lambda inner: st.dictionaries(st.text(), inner, max_size=3)), st.integers(0, 300))
def test_a_line_of_json_is_sent_as_it_is_or_refused(inside: Any, depth: int) -> None:
    for _ in range(depth):
        inside = [inside]
    try:
        command, arguments = from_json(json.dumps({"execute": "stop", "arguments": inside}))
    except ArgumentError:
        return
    assert command == "stop"
    assert repr(arguments) == repr(json.loads(json.dumps(inside)))
    assert isinstance(Framer().feed(encode(Execute(command, arguments, "1")))[0], dict)


@pytest.mark.parametrize(
    "line", ["[]", "1", '{"execute":1}', "{", '{"execute":"stop","arguments":{"a":1e999}}', '{"execute":"stop","argument":{}}']
)
def test_a_line_of_json_that_is_no_command_is_refused(line: str) -> None:
    with pytest.raises(ArgumentError):
        from_json(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("device_del id=disk#1", ["device_del", "id=disk#1"]),
        ("device_del id=disk#1 # don't", ["device_del", "id=disk#1"]),
        ("  # it's nothing", []),
        ("a '#b' \"# c\" \\#d e'f g'#h #i", ["a", "#b", "# c", "#d", "ef g#h"]),
        ("a#", ["a#"]),
        ("", []),
    ],
)
def test_a_comment_begins_where_a_word_would(line: str, words: list[str]) -> None:
    assert split(line) == words


@given(st.lists(st.text("ab#'\"\\ \n", min_size=1)))
def test_quoted_words_come_back_as_they_are_and_a_comment_is_dropped(words: list[str]) -> None:
    assert split(shlex.join(words)) == words
    assert split(f"{shlex.join(words)} # it's \"one") == words


@pytest.mark.parametrize("line", ["'", 'a "b', "a\\"])
def test_open_quotes_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="No "):
        split(line)


@settings(max_examples=200)
@given(
    st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)), st.booleans()
)
def test_deep_values_are_written_as_others_are(value: Any, pretty: bool) -> None:
    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if pretty else None)
    except TypeError:  # large numbers, lone surrogates
        return
    assert "".join(render._deep(orjson.loads(text), pretty=pretty)) == orjson.dumps(
        orjson.loads(text), option=orjson.OPT_INDENT_2 if pretty else None
    ).decode("utf-8", "replace")


def test_a_value_that_is_nested_as_deep_as_json_goes_has_a_text() -> None:
    value: Any = {"a": "\u202e\x9b"}
    for _ in range(1000):
        value = [value]
    for pretty in (True, False):
        text = render.to_text(value, pretty=pretty, colour=False)
        assert json.loads(text.replace("\n", "").replace(" ", "").replace("[", "").replace("]", "")) == {"a": "\u202e\x9b"}
        assert text.count("[") == 1000
        assert text.isascii()


@pytest.mark.parametrize("steering", [*"\x1b\x00\x7f\x85\x9b\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069"])
def test_what_steers_a_terminal_or_turns_text_around_is_made_visible(steering: str) -> None:
    for text in (
        render.line(f"a{steering}b"),
        render.plain(f"a{steering}b"),
        render.to_text(f"a{steering}b", pretty=True),
        render.to_text({f"a{steering}b": 1}, pretty=False),
    ):
        assert steering not in text
        assert text.isprintable()
    assert json.loads(render.to_text(steering, pretty=True)) == steering
    assert render.line("two\nlines\tä") == "two\\x0alines\\x09ä"
    assert render.plain("two\r\nlines\tä") == "two\nlines\tä"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_what_completion_offers_is_understood(command: Any) -> None:
    words = []
    for key in words_after(MODEL, [command.name], ""):
        while key.endswith("."):
            key = words_after(MODEL, [command.name], key)[0]
        values = words_after(MODEL, [command.name], key)
        words.append(values[0] if values else f"{key}1")
    arguments = parse(MODEL, command.name, words)
    try:
        STRATOVIRT.command(command.name).parse(arguments)
    except QmpError as error:
        pytest.fail(f"{words}: {error}") if "unknown field" in error.desc else None


class TestCompletion:
    def test_begins_with_commands(self) -> None:
        assert words_after(MODEL, [], "query-st") == ["query-status"]

    def test_offers_arguments_that_are_not_there_yet(self) -> None:
        assert words_after(MODEL, ["trace-set-state"], "") == ["name=", "enable="]
        assert words_after(MODEL, ["trace-set-state", "name=x"], "") == ["enable="]

    def test_goes_into_objects(self) -> None:
        assert words_after(MODEL, ["blockdev-add"], "fi") == ["file."]
        assert words_after(MODEL, ["blockdev-add"], "file.f") == ["file.filename="]

    def test_offers_values(self) -> None:
        assert words_after(MODEL, ["blockdev-add"], "file.aio=n") == ["file.aio=native"]
        assert words_after(MODEL, ["trace-set-state"], "enable=") == ["enable=on", "enable=off"]
        assert words_after(QEMU, ["add"], "ref.driver=") == ["ref.driver=file", "ref.driver=nbd"]

    def test_follows_what_the_object_is_said_to_be(self) -> None:
        assert words_after(QEMU, ["add", "addr.type=unix"], "addr.d") == ["addr.data."]
        assert words_after(QEMU, ["add", "addr.type=unix"], "addr.data.") == ["addr.data.filename="]
        assert words_after(QEMU, ["add", "addr.type=fd"], "addr.d") == ["addr.data="]

    def test_of_what_nobody_knows_is_empty(self) -> None:
        assert words_after(MODEL, ["nonsense"], "x") == []
        assert words_after(MODEL, ["balloon"], "value=") == []
        assert words_after(MODEL, ["balloon"], "nonsense=") == []


def test_the_schema_says_when_a_member_has_which_type() -> None:
    lines = [" ".join(line.split()) for line in details(QEMU, "add").splitlines()]
    assert [line for line in lines if line.startswith("addr.")] == [
        "addr.type inet|unix|fd",
        "addr.data.host string (addr.type=inet)",
        "addr.data.filename string (addr.type=unix)",
        "addr.data int (addr.type=fd)",
    ]


def test_the_schema_is_shown_in_words() -> None:
    assert "query-status" in overview(MODEL)
    assert "BALLOON_CHANGED" in overview(MODEL)
    text = details(MODEL, "blockdev-add")
    assert "Add a drive that a device can use." in text
    assert "file.aio" in text
    assert "off|native|iouring|threads  (optional)" in text
    assert "running" in details(MODEL, "query-status")
    assert "list of" in details(MODEL, "query-cpus")
    assert "Data:" in details(MODEL, "SHUTDOWN")
    with pytest.raises(KeyError):
        details(MODEL, "str")
