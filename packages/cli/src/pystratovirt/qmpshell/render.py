"""JSON for people: indented and, on a terminal, in colours.

Not here: where it is written.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|(\btrue\b|\bfalse\b|\bnull\b)|(-?\d[\d.eE+-]*)')

KEY: Final = "\x1b[34m"
TEXT: Final = "\x1b[32m"
WORD: Final = "\x1b[35m"
NUMBER: Final = "\x1b[36m"
EVENT: Final = "\x1b[33m"
ERROR: Final = "\x1b[31m"
OFF: Final = "\x1b[0m"


def to_text(value: Any, *, pretty: bool, colour: bool = False) -> str:
    """Return a JSON value as text: on one line, or indented if `pretty`, with escape sequences if `colour`."""
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if pretty else None).decode()
    # What a server sends is not to reach a terminal as a command: JSON escapes control characters below 0x20, not these.
    text = re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return _TOKEN.sub(_paint, text) if colour else text


def plain(text: str) -> str:
    """Return a server's text with what could steer a terminal made visible."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r\n", "\n"))


def paint(colour: str, text: str, *, on: bool) -> str:
    """Return `text` in a colour, if colours are on."""
    return f"{colour}{text}{OFF}" if on else text


def _paint(match: re.Match[str]) -> str:
    if match[1]:
        return f"{KEY}{match[1]}{OFF}{match[2]}" if match[2] else f"{TEXT}{match[1]}{OFF}"
    return f"{WORD}{match[0]}{OFF}" if match[3] else f"{NUMBER}{match[0]}{OFF}"
