"""Typed results of whichever server: what is understood is checked, what is beside it is no error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_protocol import QmpError
from qmp_protocol.commands import COMMANDS
from qmp_protocol.commands.block import QueryBlock
from qmp_protocol.commands.debug import QueryVnc, SwitchAudioRecord, TraceGetState
from qmp_protocol.commands.lifecycle import QueryStatus, Stop
from qmp_protocol.commands.machine import QueryBalloon, QueryCpus, QueryHotpluggableCpus, QueryMigrate
from qmp_protocol.commands.query import QomListTypes, QueryVersion
from qmp_protocol.schema import Command, Empty
from qmp_protocol.schema.lenient import read
from qmp_protocol.schema.struct import type_of
from qmp_protocol.schema.types import Anything, Array, Boolean, Choice, Integer, Object, Switch, Text, Type


def test_a_word_that_is_not_declared_stays_what_it_is() -> None:
    # QEMU, started with -S
    status = QueryStatus().parse_result({"status": "prelaunch", "singlestep": False, "running": False})
    assert (status.status, status.running) == ("prelaunch", False)


def test_members_that_are_not_declared_are_left_out_at_every_depth() -> None:
    version = QueryVersion().parse_result({"qemu": {"major": 7, "minor": 2, "micro": 22, "nano": 1}, "package": "p", "build": []})
    assert (version.qemu.major, version.package) == (7, "p")
    (place,) = QueryHotpluggableCpus().parse_result(
        [{"props": {"core-id": 0, "thread-id": 0, "socket-id": 0, "node-id": 0}, "vcpus-count": 1, "type": "t", "extra": None}]
    )
    assert place.props.core_id == 0


@pytest.mark.parametrize("command", [QueryHotpluggableCpus(), QueryBlock(), QueryCpus()], ids=lambda command: command.name)
def test_an_empty_object_is_an_empty_list(command: Command[Any]) -> None:
    assert command.parse_result({}) == []  # StratoVirt's standard machines


def test_what_servers_leave_out_has_a_default() -> None:
    assert QueryMigrate().parse_result({}).status == "none"
    assert QueryVnc().parse_result({"enabled": False}).clients is None
    assert QomListTypes().parse_result([{"name": "container"}])[0].parent is None
    assert QueryStatus().parse_result({"status": "running", "running": True}).singlestep is False


def test_a_switch_has_one_word_for_on() -> None:
    states = TraceGetState(name_="").parse_result(
        [
            {"name": name, "state": state}
            for name, state in (("a", "enabled"), ("b", "disabled"), ("c", "unavailable"), ("d", True))
        ]
    )
    assert [each.state for each in states] == [True, False, False, True]


def test_numbers_may_be_larger_than_declared() -> None:
    assert QueryBalloon().parse_result({"actual": 2**64}).actual == 2**64


@pytest.mark.parametrize(
    ("command", "value", "desc"),
    [
        (QueryStatus(), {"status": "running"}, "missing field `running`"),
        (QueryStatus(), {"status": 1, "running": True}, "invalid type: integer `1`, expected a string (member `status`)"),
        (QueryStatus(), [], "invalid type: sequence, expected struct StatusInfo"),
        (QueryCpus(), {"a": 1}, "invalid type: map, expected a sequence"),
        (QueryCpus(), [{"CPU": True}], "expected u32 (member `[0].CPU`)"),
        (QueryBalloon(), {"actual": 1.5}, "invalid type: floating point `1.5`, expected u64 (member `actual`)"),
        # A success in StratoVirt, of a command that it has not: nobody must take it for done.
        (
            SwitchAudioRecord(authorized="on"),
            "switch_audio_record not supported for VM",
            "switch_audio_record not supported for VM",
        ),
    ],
)
def test_what_is_missing_or_of_another_kind_is_refused_by_name(command: Command[Any], value: Any, desc: str) -> None:
    with pytest.raises(QmpError) as caught:
        command.parse_result(value)
    assert desc in caught.value.desc


def test_nothing_to_say_may_be_said_with_members() -> None:
    assert Stop().parse_result({"elapsed": 1}) == Empty()


def values(kind: Type) -> st.SearchStrategy[Any]:
    """Values of a type as a server of ours sends them."""
    if isinstance(kind, Object):
        required = {field.name: values(field.type) for field in kind.struct.fields() if field.required}
        optional = {field.name: values(field.type) for field in kind.struct.fields() if not field.required}
        return st.fixed_dictionaries(required, optional=optional)
    if isinstance(kind, Array):
        return st.lists(values(kind.item), max_size=2)
    if isinstance(kind, Choice):
        return st.sampled_from(kind.values)
    if isinstance(kind, Switch):
        return st.sampled_from((kind.off, kind.on))
    if isinstance(kind, Integer):
        return st.integers(kind.low, kind.high)
    if isinstance(kind, Boolean):
        return st.booleans()
    assert isinstance(kind, Text | Anything)
    return st.text(max_size=3)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
@settings(deadline=None)
@given(data=st.data())
def test_what_fits_exactly_is_understood_as_before(command: type[Command[Any]], data: st.DataObject) -> None:
    kind = type_of(command.result_hint())
    value = data.draw(values(kind))
    assert read(kind, value) == kind.check(value, "")
