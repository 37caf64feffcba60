"""Source text of typed client methods, one for each command of a schema: `client.device_del(id="net-0")`.

`python -m qmp_protocol.schema.methods` prints the module `qmp_protocol.methods`, from StratoVirt's schema.

Not here: sending commands. A client inherits the methods and brings `call`.
"""

from __future__ import annotations

import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from qmp_protocol.schema.declare import Command, Empty, Schema
from qmp_protocol.schema.struct import Field, Struct, type_of
from qmp_protocol.schema.types import Object

_WIDTH = 130

_HEAD = '''\
"""Every command of StratoVirt as a method with typed arguments and a typed result, for clients to inherit.

Generated from the declarations in `qmp_protocol.commands` by `python -m qmp_protocol.schema.methods`: change those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
'''

_CLASS = '''

R = TypeVar("R")


class Methods:
    """The commands, for a client whose `call` blocks."""

    def call(self, command: Command[R], fds: Sequence[int] = ()) -> R:
        """Run a typed command and return its typed result. A client says how."""
        raise NotImplementedError
'''

_ASYNC_CLASS = '''

class AsyncMethods:
    """The commands, for a client whose `call` is awaited."""

    async def call(self, command: Command[R], fds: Sequence[int] = ()) -> R:
        """Run a typed command and return its typed result. A client says how."""
        raise NotImplementedError
'''


def methods(schema: Schema) -> str:
    """Return the text of the module."""
    imports: dict[str, set[str]] = {"qmp_protocol.schema": {"Command"}}
    sync = "".join(f"\n{method}" for method in _all(schema, imports, awaits=False))
    later = "".join(f"\n{method}" for method in _all(schema, imports, awaits=True))
    needed = "".join(_import(module, sorted(names)) for module, names in sorted(imports.items()))
    return _HEAD + needed + _CLASS + sync + _ASYNC_CLASS + later


def _import(module: str, names: list[str]) -> str:
    line = f"    from {module} import {', '.join(names)}\n"
    if len(line) <= _WIDTH:
        return line
    body = "".join(f"        {name},\n" for name in names)
    return f"    from {module} import (\n{body}    )\n"


def _all(schema: Schema, imports: dict[str, set[str]], *, awaits: bool) -> Iterator[str]:
    for command in schema.commands.values():
        yield "\n".join(_method(command, imports, awaits)) + "\n"


def _method(command: type[Command[Any]], imports: dict[str, set[str]], awaits: bool) -> Iterator[str]:
    hints = typing.get_type_hints(command, include_extras=True)
    fields = sorted(command.fields(), key=lambda field: not field.required)
    names = {field.attribute: _name(field) for field in fields}
    parameters = [_parameter(field, names[field.attribute], hints[field.attribute], imports) for field in fields]
    if command.takes_fds:
        parameters.insert(sum(field.required for field in fields), "fds: Sequence[int]")
    hint = command.result_hint()
    result_type = type_of(hint)
    nothing = isinstance(result_type, Object) and result_type.struct is Empty
    result = "None" if nothing else _hint(hint, imports)

    word, wait = ("async def", "await ") if awaits else ("def", "")
    name = command.name.replace("-", "_")
    line = f"    {word} {name}(self{', *, ' if parameters else ''}{', '.join(parameters)}) -> {result}:"
    if len(line) <= _WIDTH:
        yield line
    else:
        yield f"    {word} {name}("
        yield "        self,"
        yield "        *,"
        yield from (f"        {parameter}," for parameter in parameters)
        yield f"    ) -> {result}:"
    yield f'        """{_summary(command)}"""'
    yield f"        from {command.__module__} import {command.__name__}"
    yield ""
    fds = ", fds" if command.takes_fds else ""
    given = [f"{attribute}={name}" for attribute, name in names.items()]
    line = f"        {'' if nothing else 'return '}{wait}self.call({command.__name__}({', '.join(given)}){fds})"
    if len(line) <= _WIDTH:
        yield line
        return
    yield f"        command = {command.__name__}("
    yield from (f"            {each}," for each in given)
    yield "        )"
    yield f"        {'' if nothing else 'return '}{wait}self.call(command{fds})"


def _name(field: Field) -> str:
    return field.name.replace("-", "_").replace(".", "_")


def _parameter(field: Field, name: str, hint: Any, imports: dict[str, set[str]]) -> str:
    text = f"{name}: {_hint(hint, imports)}"
    if field.required:
        return text
    default = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
    return f"{text} = {default}"


def _hint(hint: Any, imports: dict[str, set[str]]) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _hint(arguments[0], imports)
    if origin is Literal:
        words = (f'"{word}"' for word in arguments)
        return f"Literal[{', '.join(words)}]"
    if origin is list:
        return f"list[{_hint(arguments[0], imports)}]"
    if origin in (typing.Union, types.UnionType):
        return " | ".join("None" if each is type(None) else _hint(each, imports) for each in arguments)
    if hint is Any:
        return "Any"
    if issubclass(hint, Struct):
        imports.setdefault(hint.__module__, set()).add(hint.__name__)
    return str(hint.__name__)


def _summary(command: type[Command[Any]]) -> str:
    """The first sentence of the documentation."""
    text = (inspect.getdoc(command) or "").split("\n\n")[0]
    text = f"{text} ".partition(". ")[0].removesuffix(". ").strip().removesuffix(".")
    return textwrap.shorten(f"{text}.", _WIDTH - 16, placeholder="…")


if __name__ == "__main__":
    from qmp_protocol.commands import STRATOVIRT

    print(methods(STRATOVIRT), end="")
