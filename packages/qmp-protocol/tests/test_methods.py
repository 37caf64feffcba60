"""Typed client methods: one for each command, made from its declaration, saying the same as it."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qmp_protocol.methods
from qmp_protocol.commands import COMMANDS, STRATOVIRT
from qmp_protocol.commands.block import BlockdevCache, BlockdevFile
from qmp_protocol.commands.lifecycle import StatusInfo
from qmp_protocol.methods import AsyncMethods, Methods
from qmp_protocol.schema import Command, Empty
from qmp_protocol.schema.methods import methods
from qmp_protocol.schema.types import Anything, Array, Boolean, Choice, Integer, Object, Switch, Text, Type

RESULT = object()


class Recorder(Methods):
    """Keeps what it is asked to send."""

    def __init__(self) -> None:
        self.sent: list[tuple[Command[Any], tuple[int, ...]]] = []

    def call(self, command: Command[Any], fds: Sequence[int] = ()) -> Any:
        self.sent.append((command, tuple(fds)))
        return RESULT


class AsyncRecorder(AsyncMethods):
    def __init__(self) -> None:
        self.sent: list[tuple[Command[Any], tuple[int, ...]]] = []

    async def call(self, command: Command[Any], fds: Sequence[int] = ()) -> Any:
        self.sent.append((command, tuple(fds)))
        return RESULT


def sample(kind: Type) -> Any:
    """A value of a type that is not the usual default."""
    if isinstance(kind, Object):
        return kind.struct(**{field.attribute: sample(field.type) for field in kind.struct.fields()})
    if isinstance(kind, Array):
        return [sample(kind.item)]
    if isinstance(kind, Choice):
        return kind.values[-1]
    if isinstance(kind, Integer):
        return kind.high
    if isinstance(kind, Text):
        return "x"
    assert isinstance(kind, Boolean | Switch | Anything)
    return True


def method_name(command: type[Command[Any]]) -> str:
    return command.name.replace("-", "_")


def test_the_module_is_up_to_date() -> None:
    text = Path(qmp_protocol.methods.__file__).read_text()
    assert text == methods(STRATOVIRT), "run python -m qmp_protocol.schema.methods > src/qmp_protocol/methods.py"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_method_that_sends_it_with_every_argument(command: type[Command[Any]]) -> None:
    whole = {field.attribute: sample(field.type) for field in command.fields()}
    arguments = {field.name.replace("-", "_").replace(".", "_"): whole[field.attribute] for field in command.fields()}
    fds = (3, 4) if command.takes_fds else ()
    more = {"fds": fds} if fds else {}
    client, later = Recorder(), AsyncRecorder()
    result = getattr(client, method_name(command))(**arguments, **more)
    assert asyncio.run(getattr(later, method_name(command))(**arguments, **more)) is result
    assert client.sent == later.sent == [(command(**whole), fds)]
    assert result is (None if command.result_hint() is Empty else RESULT)
    assert command.parse(client.sent[0][0].to_json()) == command(**whole)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_method_needs_what_its_command_needs_and_its_result_is_declared(command: type[Command[Any]]) -> None:
    parameters = inspect.signature(getattr(Methods, method_name(command))).parameters
    needed = [name for name, each in parameters.items() if each.default is each.empty and name not in ("self", "fds")]
    assert len(needed) == sum(field.required for field in command.fields())
    if not any(field.required for field in command.fields()) and not command.takes_fds:
        client = Recorder()
        getattr(client, method_name(command))()
        assert client.sent[0][0].to_json() == {}


def test_arguments_that_say_the_default_are_left_out_unless_other_servers_want_them() -> None:
    client = Recorder()
    file = BlockdevFile(driver="file", filename="/x")
    client.blockdev_add(node_name="d", file=file, cache=BlockdevCache(direct=False), throttling_iops_total=5, media="disk")
    assert client.sent[0][0].to_json() == {
        "node-name": "d",
        "file": {"driver": "file", "filename": "/x", "aio": "off"},
        "cache": {"direct": False},
        "throttling.iops-total": 5,
        "driver": "raw",  # QEMU has no default for it
    }


def test_hints_are_those_of_the_declaration() -> None:
    import qmp_protocol.commands.lifecycle as declared

    hints = typing.get_type_hints(Methods.query_status, localns={"StatusInfo": declared.StatusInfo})
    assert hints == {"return": StatusInfo}


def test_a_client_without_call_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Methods().stop()
    with pytest.raises(NotImplementedError):
        asyncio.run(AsyncMethods().stop())


def test_importing_the_methods_imports_no_command() -> None:
    program = "import sys, qmp_protocol.methods; sys.exit('qmp_protocol.commands' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
