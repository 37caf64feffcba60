"""The tables of docs/compatibility.md, made from the declarations.

`python -m pystratovirt.cmdline.docs docs/compatibility.md` puts them between their markers; a test compares. The sentences around
them are written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import notyet
from .backends import CHARDEVS, OBJECTS
from .declare import Key, Parameters
from .drivers import DRIVERS
from .options import IGNORED, LATER, NETDEVS, NUMA, OPTIONS, Option

_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def refresh(text: str) -> str:
    """Return `text` with every generated block made anew. Raises KeyError for a block of an unknown name."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{_BLOCKS[found[2]]()}\n{found[3]}", text)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _state(option: Option) -> str:
    if option.state in (IGNORED, LATER):
        return f"{option.state}{f'; {option.note}' if option.note else ''}"
    return f"differs: {option.note}" if option.note else "supported"


def _options() -> str:
    rows = []
    for option in OPTIONS.values():
        name = f"`-{option.name}`" + (", `-freeze`" if option.name == "S" else "")
        rows.append((name, option.help, _state(option)))
    rows += [("`-h`, `-help`", "show the options", "supported"), ("`-V`, `-version`", "show the version", "supported")]
    return _table(("Option", "Meaning", "State"), rows)


def _keys(schema: type[Parameters]) -> str:
    return _table(("Key", "Value", "Default", "Meaning", "State"), [_row(found) for found in schema.keys.values()])


def _row(found: Key) -> tuple[str, ...]:
    name = f"`{found.name}`" + (", first" if found.positional else "")
    if found.required:
        default = "required"
    else:
        default = "none" if found.default in (None, "", ()) else f"`{found.kind.render(found.default)}`"
    state = "not yet" if found.later else "supported"
    if found.note:
        state = f"{state}; {found.note}"
    return name, found.kind.allowed, default, found.doc, state


def _schemas() -> str:
    schemas = {option.name: option.schema for option in OPTIONS.values() if isinstance(option.schema, type)}
    return "\n".join(f"### `-{name}`\n\n{_keys(schema)}" for name, schema in schemas.items())


def _variants(option: str, table: dict[str, type[Parameters]]) -> str:
    return "\n".join(f"### `{option} {word}`\n\n{schema.__doc__}\n\n{_keys(schema)}" for word, schema in table.items())


def _missing(table: dict[str, str], what: str) -> str:
    return _table(
        (what, "What it is, or where it belongs", "State"), [(f"`{name}`", text, "not yet") for name, text in table.items()]
    )


_BLOCKS: dict[str, Callable[[], str]] = {
    "options": _options,
    "keys": _schemas,
    "devices": lambda: _variants("-device", {**DRIVERS}),
    "devices-later": lambda: _missing(notyet.DRIVERS, "Driver"),
    "objects": lambda: _variants("-object", {**OBJECTS}),
    "numa": lambda: _variants("-numa", {**NUMA}),
    "objects-later": lambda: _missing(notyet.OBJECTS, "Type"),
    "chardevs": lambda: _variants("-chardev", {**CHARDEVS}),
    "netdevs": lambda: _variants("-netdev", {**NETDEVS}),
}


def main() -> int:
    """Rewrite the file that is named. Returns the exit status."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m pystratovirt.cmdline.docs docs/compatibility.md\n")
        return 1
    path = Path(sys.argv[1])
    path.write_text(refresh(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
