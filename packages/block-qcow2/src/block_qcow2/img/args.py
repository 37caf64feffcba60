"""The words of a stratovirt-img command line: options, sizes, option lists. Not here: what they mean to a command.

One or two dashes before a name are the same, options and other words mix, `--` ends the options. A value is the next word, or
follows `=`, or, after a single letter, stands right behind it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from ..errors import BlockError

_SIZE = re.compile(r"\+?([0-9]+)(\.[0-9]+)?([bBkKmMgGtTpPeE]?)")
_NUMBER = re.compile(r"[0-9]{1,20}")
_DIGITS = 100  # of a size: more are a mistake, and Python refuses thousands of them in words of its own
_SCALE = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_MAX = (1 << 63) - 1  # what a file offset can be


def one_line(text: str) -> str:
    """The text with control characters as escapes: a file name may hold anything, a message is one line."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match[0])[1:-1], text)


def text_of(error: Exception) -> str:
    """What an error says, the file first."""
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    text = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {text}" if isinstance(error.filename, str | bytes) else text


def warn(text: str) -> None:
    print(f"stratovirt-img: {one_line(text)}", file=sys.stderr)


def fail(text: str) -> int:
    """Say what went wrong; the exit status of it."""
    warn(text)
    return 1


class UsageError(BlockError):
    """The command line is wrong; the message says which word and what would be right."""


class Given:
    """What a command line gave: `options` in order of first mention, `words` that are no options."""

    def __init__(self) -> None:
        self.options: dict[str, list[str]] = {}
        self.words: list[str] = []

    def flag(self, name: str) -> bool:
        return name in self.options

    def last(self, name: str) -> str | None:
        """The last value of an option: repeating one overrides it."""
        values = self.options.get(name)
        return values[-1] if values else None

    def all(self, name: str) -> list[str]:
        return self.options.get(name, [])


def parse(words: Sequence[str], spec: Mapping[str, str]) -> Given:
    """Parse the words after a command. `spec`: option name to "" (a flag), "value", or "=name" (another name for one)."""
    given = Given()
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            given.words += left
            break
        if not word.startswith("-") or word == "-":
            given.words.append(word)
            continue
        typed, equals, value = word.lstrip("-").partition("=")
        dashes = len(word) - len(word.lstrip("-"))
        name, attached = typed, value if equals else None
        if name not in spec and dashes == 1 and name[:1] in spec:
            if _kind(spec, name[0]) == "value":
                name, attached = name[0], word[2:]
            elif attached is None and all(_kind(spec, letter) == "" for letter in name):
                for letter in name:
                    given.options.setdefault(_target(spec, letter), [])
                continue
        if name in ("image-opts", "target-image-opts") and name not in spec:
            raise UsageError(f"option '{word}': images are given as a file name, their format with -f")
        if name not in spec or dashes > 2:
            raise UsageError(f"unrecognized option '{word}'")
        target = _target(spec, name)
        if _kind(spec, name) == "":
            if attached is not None:
                raise UsageError(f"option '{word}' takes no value")
            given.options.setdefault(target, [])
            continue
        if attached is None:
            if not left or (left[0].startswith("-") and left[0] != "-"):
                raise UsageError(f"missing argument for option '{word}'")
            attached = left.pop(0)
        given.options.setdefault(target, []).append(attached)
    return given


def _target(spec: Mapping[str, str], name: str) -> str:
    return spec[name][1:] if spec.get(name, "").startswith("=") else name


def _kind(spec: Mapping[str, str], name: str) -> str | None:
    return spec.get(_target(spec, name))


def size(text: str, what: str = "size") -> int:
    """Bytes: digits, perhaps a fraction, perhaps one of b K M G T P E (1024-based)."""
    match = _SIZE.fullmatch(text)
    if not match or len(text) > _DIGITS:
        raise UsageError(f"Invalid {what} '{text}': expected a number, with a suffix of b, K, M, G, T, P or E if wanted")
    digits, fraction, suffix = match.groups()
    scale = 1 << _SCALE[suffix.lower()]
    if fraction and scale == 1:
        raise UsageError(f"Invalid {what} '{text}': a fraction of a byte")
    value = int(digits) * scale + (int(fraction[1:]) * scale // 10 ** (len(fraction) - 1) if fraction else 0)
    if value > _MAX:
        raise UsageError(f"Invalid {what} '{text}': more than {_MAX} bytes")
    return value


def number(text: str, what: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    value = int(text) if _NUMBER.fullmatch(text) else -1
    if not low <= value <= high:
        raise UsageError(f"Invalid {what} '{text}': expected {low} to {high}")
    return value


def boolean(text: str, what: str) -> bool:
    if text in ("on", "yes", "true"):
        return True
    if text in ("off", "no", "false"):
        return False
    raise UsageError(f"Invalid value '{text}' for {what}: expected on or off")


def option_list(values: Sequence[str]) -> dict[str, str]:
    """The pairs of all `-o a=1,b=2` lists; a later one overrides. A doubled comma is a comma in a value."""
    pairs: dict[str, str] = {}
    for text in values:
        for item in text.replace(",,", "\0").split(","):
            name, equals, value = item.partition("=")
            if not name:
                raise UsageError(f"Invalid parameter '{text}'")
            pairs[name] = value.replace("\0", ",") if equals else "on"
    return pairs


def human_size(n: int) -> str:
    """Three significant digits and a binary unit, as qemu-img writes them."""
    unit = 0
    value = float(n)
    # 1000 and not 1024: "0.98 MiB" rather than "1000 KiB"
    while value >= 1000 and unit < 6:
        value /= 1024
        unit += 1
    return f"{value:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[unit]}"
