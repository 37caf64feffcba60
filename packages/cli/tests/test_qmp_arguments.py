"""`key=value` words, typed by the schema of whichever server is at the other end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pystratovirt.qmpshell.arguments import ArgumentError, parse
from pystratovirt.qmpshell.completion import words_after
from pystratovirt.qmpshell.describe import details, overview
from pystratovirt.qmpshell.model import Model
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
            ],
        },
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


@given(st.sampled_from([command.name for command in COMMANDS]), st.lists(st.text(max_size=20), max_size=3))
def test_any_words_are_arguments_or_refused(command: str, words: list[str]) -> None:
    try:
        parse(MODEL, command, words)
    except ArgumentError:
        return


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

    def test_of_what_nobody_knows_is_empty(self) -> None:
        assert words_after(MODEL, ["nonsense"], "x") == []
        assert words_after(MODEL, ["balloon"], "value=") == []
        assert words_after(MODEL, ["balloon"], "nonsense=") == []


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
