"""What `qmp schema` prints: a list of everything, or one command or event with its members in words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Final

from pystratovirt.qmpshell.model import Model

_CASES: Final = 5  # of one member that are listed


def overview(model: Model) -> str:
    """Return the names of all commands and events."""
    lines = ["Commands:"]
    for name in model.names("command"):
        summary = _documentation(model, name).split("\n")[0]
        lines.append(f"  {name:<40} {summary}".rstrip())
    lines += ["", "Events:"]
    for name in model.names("event"):
        summary = _documentation(model, name).split("\n")[0]
        lines.append(f"  {name:<40} {summary}".rstrip())
    return "\n".join(lines)


def details(model: Model, name: str) -> str:
    """Return what is known of one command or event. Raises KeyError when there is none of that name."""
    kind = model.kind(name)
    if kind not in ("command", "event"):
        raise KeyError(name)
    lines = [f"{name} ({kind})"]
    documentation = _documentation(model, name)
    if documentation:
        lines += ["", documentation]
    members = list(_members(model, model.arguments(name)))
    if members:
        lines += ["", "Arguments:" if kind == "command" else "Data:", *members]
    result = model.result(name)
    if result and model.members(result):
        lines += ["", "Returns an object:", *_members(model, result)]
    elif result and model.kind(result) != "object":
        lines += ["", f"Returns: {model.describe(result)}"]
        if model.kind(result) == "array":
            lines += _members(model, model.element(result))
    return "\n".join(lines)


def _members(model: Model, kind: str, prefix: str = "", seen: tuple[str, ...] = (), when: str = "") -> Iterator[str]:
    for member in model.shapes(kind):
        name = f"{prefix}{member.name}"
        condition = f"  ({prefix}{model.tag(kind)}={_some(member.cases)})" if member.cases else when
        if model.kind(member.type) == "object" and model.members(member.type) and member.type not in seen:
            yield from _members(model, member.type, f"{name}.", (*seen, member.type), condition)
        else:
            need = "" if not member.optional or member.cases else "  (optional)"
            yield f"  {name:<28} {model.describe(member.type)}{need}{condition}"


def _some(cases: tuple[str, ...]) -> str:
    return "|".join(cases if len(cases) <= _CASES else (*cases[: _CASES - 1], "…"))


def _documentation(model: Model, name: str) -> str:
    if not model.documented:
        return ""
    from qmp_protocol.commands import STRATOVIRT

    declared = STRATOVIRT.commands.get(name) or STRATOVIRT.events.get(name)
    return (inspect.getdoc(declared) or "") if declared else ""
