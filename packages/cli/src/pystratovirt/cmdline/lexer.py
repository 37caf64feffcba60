"""argv to options and their values (reference command-line, section 1). Values are not looked into here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import CommandLineError
from .options import FLAG, LATER, MANY, ONE, OPTIONS, canonical

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def lex(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each option given, in order; `h` and `V` among them. `argv` is without the program's name.

    Options have one dash and are matched exactly. What follows `--` is left alone. Values of an option given several times are
    pooled. A value may begin with a dash where the option still needs one and the text is not itself an option: StratoVirt
    refuses that, so nothing it accepts changes its meaning. Who asks for `-h` or `-V` gets it, unless something is no option: how
    often options are there, and with how many values, counts as little then as the values. Raises CommandLineError.
    """
    found: dict[str, list[str]] = {}
    mistakes: list[CommandLineError] = []
    current = ""
    taken = 0  # values since the latest option
    for argument in argv:
        if argument == "--":
            break
        name = canonical(argument)
        if name:
            mistakes += _incomplete(current, taken)
            if name in found and name in OPTIONS and OPTIONS[name].arity not in (MANY, FLAG):
                mistakes.append(CommandLineError(f"-{name}", "", "given more than once"))
            found.setdefault(name, [])
            current, taken = name, 0
        elif argument.startswith("-") and (taken or not _needs_value(current)):
            raise CommandLineError(argument, "", _unknown(argument))
        elif not current:
            raise CommandLineError(argument, "", "a value without an option; options begin with '-'")
        else:
            mistakes += _too_many(current, taken, argument)
            found[current].append(argument)
            taken += 1
    mistakes += _incomplete(current, taken)
    mistakes += [
        CommandLineError(f"-{name}", "", "not supported yet")
        for name in found
        if name in OPTIONS and OPTIONS[name].state is LATER
    ]
    if mistakes and "h" not in found and "V" not in found:
        raise mistakes[0]
    return found


def _needs_value(name: str) -> bool:
    return name in OPTIONS and OPTIONS[name].arity in (ONE, MANY)


def _incomplete(name: str, taken: int) -> Iterator[CommandLineError]:
    if _needs_value(name) and not taken:
        yield CommandLineError(f"-{name}", "", f"needs a value: -{name} {OPTIONS[name].metavar}")


def _too_many(name: str, taken: int, argument: str) -> Iterator[CommandLineError]:
    arity = OPTIONS[name].arity if name in OPTIONS else FLAG
    if arity is FLAG:
        yield CommandLineError(f"-{name}", argument, "takes no value")
    elif taken and arity is not MANY:
        yield CommandLineError(f"-{name}", argument, "takes one value, this is a second one")


def _unknown(argument: str) -> str:
    import difflib  # only a mistake pays for it

    typed, known = argument.lstrip("-").partition("=")[0][:40], [*OPTIONS, "help", "version", "freeze"]
    # A longer or shorter word for the same thing, such as QEMU's -monitor, comes before what only looks like it.
    near = [name for name in known if len(name) > 2 and typed.startswith(name)] or difflib.get_close_matches(typed, known, n=1)
    hint = f"did you mean -{near[0]}?" if near else "-h lists the options"
    return f"no such option; {hint}"
