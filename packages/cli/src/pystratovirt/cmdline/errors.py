"""What a command line that cannot be followed is answered with."""

from __future__ import annotations

_SHOWN = 120  # longer values are cut in messages: the message has to stay one readable line


def show(text: str, limit: int = _SHOWN) -> str:
    """Return `text` as one printable line of about `limit` characters: control characters and undecodable bytes escaped."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return printable(text) if text else '""'


def printable(text: str) -> str:
    """Return `text` as one line that does nothing to a terminal: control characters and undecodable bytes escaped."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def listing(names: object) -> str:
    """Return `names` (any iterable of strings) as `a, b, c`, cut after twenty."""
    shown = [show(name) for name in names]  # type: ignore[attr-defined]
    if not shown:
        return "none"
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")


class CommandLineError(Exception):
    """An option that cannot be followed. The text is one line: option, value, reason.

    `value` is what was typed, or as much of it as matters; empty when the option itself is the mistake.
    """

    def __init__(self, option: str, value: str, reason: str) -> None:
        self.option, self.value, self.reason = option, value, reason
        super().__init__(option, value, reason)

    def __str__(self) -> str:
        value = f" {show(self.value, 4 * _SHOWN)}" if self.value else ""  # several values, each cut when it was put here
        return f"{show(self.option)}{value}: {self.reason}"


class Information(Exception):
    """The command line asked for a text (`-h`, `-V`) and not for a virtual machine."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)


class BadKey(Exception):
    """One key of a parameter string, in conflict with the others. Becomes a CommandLineError where the option is known."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(name, reason)
