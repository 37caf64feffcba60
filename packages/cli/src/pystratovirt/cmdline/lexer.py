"""argv to options and their values (reference command-line, section 1). Values are not looked into here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import CommandLineError
from .options import FLAG, LATER, MANY, ONE, OPTIONS, canonical

if TYPE_CHECKING:
    from collections.abc import Sequence


def lex(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each option given, in order; `h` and `V` among them. `argv` is without the program's name.

    Options have one dash and are matched exactly. What follows `--` is left alone. Values of an option given several times are
    pooled. A value may begin with a dash where the option still needs one and the text is not itself an option: StratoVirt
    refuses that, so nothing it accepts changes its meaning. Raises CommandLineError.
    """
    found: dict[str, list[str]] = {}
    current = ""
    taken = 0  # values since the latest option
    for argument in argv:
        if argument == "--":
            break
        name = canonical(argument)
        if name:
            _complete(current, taken)
            if name in found and name in OPTIONS and OPTIONS[name].arity not in (MANY, FLAG):
                raise CommandLineError(f"-{name}", "", "given more than once")
            found.setdefault(name, [])
            current, taken = name, 0
        elif argument.startswith("-") and (taken or not current or OPTIONS[current].arity not in (ONE, MANY)):
            raise CommandLineError(argument, "", _unknown(argument))
        elif not current:
            raise CommandLineError(argument, "", "a value without an option; options begin with '-'")
        else:
            _room(current, taken, argument)
            found[current].append(argument)
            taken += 1
    _complete(current, taken)
    for name in found:
        if name in OPTIONS and OPTIONS[name].state is LATER and "h" not in found and "V" not in found:
            raise CommandLineError(f"-{name}", "", "not supported yet")
    return found


def _complete(name: str, taken: int) -> None:
    if name in OPTIONS and OPTIONS[name].arity in (ONE, MANY) and not taken:
        raise CommandLineError(f"-{name}", "", f"needs a value: -{name} {OPTIONS[name].metavar}")


def _room(name: str, taken: int, argument: str) -> None:
    arity = OPTIONS[name].arity if name in OPTIONS else FLAG
    if arity is FLAG:
        raise CommandLineError(f"-{name}", argument, "takes no value")
    if taken and arity is not MANY:
        raise CommandLineError(f"-{name}", argument, "takes one value, this is a second one")


def _unknown(argument: str) -> str:
    import difflib  # only a mistake pays for it

    typed, known = argument.lstrip("-").partition("=")[0][:40], [*OPTIONS, "help", "version", "freeze"]
    # A longer or shorter word for the same thing, such as QEMU's -monitor, comes before what only looks like it.
    near = [name for name in known if len(name) > 2 and typed.startswith(name)] or difflib.get_close_matches(typed, known, n=1)
    hint = f"did you mean -{near[0]}?" if near else "-h lists the options"
    return f"no such option; {hint}"
