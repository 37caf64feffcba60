"""The reference page of a schema, in Markdown: what the declarations say, and nothing else.

`python -m qmp_protocol.schema.reference` prints the page of StratoVirt's schema.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from qmp_protocol.schema.declare import Command, Empty, Machines, Notification, Schema
from qmp_protocol.schema.struct import Field, Struct, type_of
from qmp_protocol.schema.types import Array, Boolean, Choice, Integer, Number, Object, Switch, Text, Type

_INTRODUCTION = """\
# QMP reference

Generated from the declarations in `qmp_protocol.commands` and `qmp_protocol.events` by `python -m qmp_protocol.schema.reference`.

Every command and every event of StratoVirt, with the types of its members. Which of them this virtual machine monitor already
answers stands in `compatibility.md`. *Since* is the StratoVirt version whose behaviour is declared here. Members that are not
declared are refused, except where a command says that it ignores them. For the wire protocol see QEMU's QMP specification.
"""


def reference(schema: Schema) -> str:
    """Return the page."""
    return "\n".join(_page(schema)) + "\n"


def _page(schema: Schema) -> Iterator[str]:
    yield _INTRODUCTION
    yield "## Commands\n"
    shared: dict[str, type[Struct]] = {}
    for command in schema.commands.values():
        yield from _command(command, shared)
    yield "## Events\n"
    for event in schema.events.values():
        yield from _event(event, shared)
    yield "## Structures\n"
    done: set[str] = set()
    while len(done) < len(shared):  # a structure may name further ones
        for name in [name for name in shared if name not in done]:
            done.add(name)
            yield f"### {name}\n"
            yield _text(shared[name]) + "\n"
            yield from _members(shared[name].fields(), shared)


def _command(command: type[Command[Any]], shared: dict[str, type[Struct]]) -> Iterator[str]:
    yield f"### {command.name}\n"
    yield _text(command) + "\n"
    yield from _members(command.fields(), shared)
    result = type_of(command.result_hint())
    if not (isinstance(result, Object) and result.struct is Empty):
        yield f"Returns: {_type(result, shared)}\n"
    notes = [f"Since: {command.since}.", f"Machines: {_machines(command.machines)}."]
    if command.refusal:
        notes.append(f"Elsewhere: GenericError `{command.refusal}`.")
    if not command.strict:
        notes.append("Other arguments are ignored.")
    if command.takes_fds:
        notes.append("File descriptors travel with it.")
    yield " ".join(notes) + "\n"


def _event(event: type[Notification], shared: dict[str, type[Struct]]) -> Iterator[str]:
    yield f"### {event.name}\n"
    yield _text(event) + "\n"
    yield from _members(event.fields(), shared)
    yield f"Since: {event.since}. Machines: {_machines(event.machines)}.\n"


def _members(fields: tuple[Field, ...], shared: dict[str, type[Struct]]) -> Iterator[str]:
    if not fields:
        return
    yield "| member | type | | |"
    yield "|---|---|---|---|"
    for field in fields:
        yield f"| `{field.name}` | {_type(field.type, shared)} | {_need(field)} | {field.doc} |"
    yield ""


def _need(field: Field) -> str:
    if field.required:
        return "required"
    if field.default is None or isinstance(field.default, Struct) or field.default == "":
        return "optional"
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"default `{default}`"


def _type(kind: Type, shared: dict[str, type[Struct]]) -> str:
    if isinstance(kind, Object):
        name = kind.struct.__name__
        shared.setdefault(name, kind.struct)
        return f"[{name}](#{name.lower()})"
    if isinstance(kind, Array):
        return f"list of {_type(kind.item, shared)}"
    if isinstance(kind, Choice):
        words = ", ".join(f"`{value}`" for value in kind.values)
        others = ", ".join(f"`{word}` for `{value}`" for word, value in kind.others.items())
        return words + (f" (also {others})" if others else "")
    if isinstance(kind, Switch):
        return f"`{kind.off}` or `{kind.on}`"
    if isinstance(kind, Text):
        return f"string (at most {kind.longest} characters)" if kind.longest else "string"
    if isinstance(kind, Integer):
        return kind.name
    if isinstance(kind, Boolean):
        return "boolean"
    return "number" if isinstance(kind, Number) else "any"


def _machines(machines: Machines) -> str:
    if machines == Machines.ALL:
        return "all"
    return ", ".join(flag.name.lower() for flag in machines if flag.name)


def _text(thing: type) -> str:
    return inspect.getdoc(thing) or ""


if __name__ == "__main__":
    from qmp_protocol.commands import STRATOVIRT

    print(reference(STRATOVIRT), end="")
