"""`-h` and `-V`, made from the declarations."""

from __future__ import annotations

from .options import IGNORED, LATER, MANY, OPTIONS, OTHER, Option

STRATOVIRT = "2.4.0"  # whose command line and QMP this program speaks
_COLUMN = 38
_WIDTH = 100

_EXAMPLE = """\
Example: a kernel with a root disk, its console here, QMP on a socket
  stratovirt -machine microvm -smp 2 -m 512 -kernel vmlinuz -append "console=ttyS0 root=/dev/vda rw" \\
    -drive file=rootfs.ext4,id=rootfs,direct=off -device virtio-blk-device,drive=rootfs,id=disk0 \\
    -qmp unix:/tmp/qmp.sock,server,nowait -serial stdio
"""


def version_text() -> str:
    """Return the line of `-V`. Clients look for `StratoVirt` and the number after it."""
    from importlib.metadata import version  # slow, and only -V and -h want it

    return f"StratoVirt {STRATOVIRT} (pystratovirt {version('pystratovirt')})\n"


def help_text() -> str:
    """Return the text of `-h`: every option that does something, in groups, then an example."""
    groups: dict[str, list[Option]] = {}
    for option in OPTIONS.values():
        if option.state not in (IGNORED, LATER):
            groups.setdefault(option.group, []).append(option)
    lines = [version_text(), "Start a virtual machine on Linux KVM.\n\nUsage: stratovirt [OPTION [VALUE]]...\n"]
    for group, options in groups.items():
        lines.append(f"\n{group}:\n")
        for option in options:
            lines += _entry(option)
    ignored = [f"-{option.name}" for option in OPTIONS.values() if option.state is IGNORED]
    lines.append(f"\n{OTHER}, without effect:\n")
    lines += _wrapped(ignored, indent="  ")
    lines.append("\nOther:\n" + "".join(_row(*row) for row in (("-h, -help", "this text"), ("-V, -version", "the version"))))
    return "".join([*lines, "\n", _EXAMPLE])


def _entry(option: Option) -> list[str]:
    left = f"-{option.name} {option.metavar}".rstrip() + (" ..." if option.arity is MANY else "")
    lines = [_row(left, option.help)]
    if isinstance(option.schema, type):
        names = [found.name for found in option.schema.keys.values() if not found.later and not found.positional]
        if names:
            lines += _wrapped(names, indent=" " * _COLUMN + "keys: ")
    elif option.schema:
        for word, schema in option.schema.items():
            names = [found.name for found in schema.keys.values() if not found.later]
            lines += _wrapped(names, indent=" " * _COLUMN + f"{word}: ")
    return lines


def _row(left: str, text: str) -> str:
    start = f"  {left}"
    return f"{start:<{_COLUMN}}{text}\n" if len(start) < _COLUMN else f"{start}\n{'':<{_COLUMN}}{text}\n"


def _wrapped(words: list[str], indent: str) -> list[str]:
    lines, line = [], indent
    for number, word in enumerate(words):
        word += "," if number < len(words) - 1 else ""
        if len(line) + len(word) > _WIDTH and line.strip():
            lines.append(line.rstrip() + "\n")
            line = " " * len(indent)
        line += word + " "
    return [*lines, line.rstrip() + "\n"]
