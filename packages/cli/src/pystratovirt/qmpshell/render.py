"""JSON for people: indented and, on a terminal, in colours.

Not here: where it is written.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import orjson

_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|(\btrue\b|\bfalse\b|\bnull\b)|(-?\d[\d.eE+-]*)')

KEY: Final = "\x1b[34m"
TEXT: Final = "\x1b[32m"
WORD: Final = "\x1b[35m"
NUMBER: Final = "\x1b[36m"
EVENT: Final = "\x1b[33m"
ERROR: Final = "\x1b[31m"
OFF: Final = "\x1b[0m"


# What a server says is not to steer a terminal, nor to be read in another order than it has: C0 and C1 controls, marks and
# overrides of direction, separators of lines and paragraphs.
_STEERING: Final = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_IN_JSON = re.compile(f"[{_STEERING}]")  # JSON itself escapes what is below 0x20
_IN_TEXT = re.compile(f"[\x00-\x08\x0b-\x1f{_STEERING}]")
_IN_LINE = re.compile(f"[\x00-\x1f{_STEERING}]")


def escape_what_a_stream_lacks(stream: Any) -> None:
    """Have text that the encoding of `stream` has no characters for written as JSON escapes, so that JSON stays JSON."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_ESCAPE)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)), error.end


_ESCAPE: Final = "pystratovirt.json-escape"
codecs.register_error(_ESCAPE, _escape)


def to_text(value: Any, *, pretty: bool, colour: bool = False) -> str:
    """Return a JSON value as text: on one line, or indented if `pretty`, with escape sequences if `colour`."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if pretty else None).decode()
    except TypeError:  # orjson reads deeper than it writes
        text = "".join(_deep(value, pretty=pretty))
    text = _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return _TOKEN.sub(_paint, text) if colour else text


def _deep(value: Any, *, pretty: bool) -> Iterator[str]:
    """Yield the pieces of a JSON text, however deep it is nested."""
    depth = 0
    todo: list[Any] = [value]  # last things first; a _Mark is text
    while todo:
        each = todo.pop()
        if isinstance(each, _Mark):
            depth += each.step
            yield each.text + ("\n" + "  " * depth if pretty and each.breaks else "")
        elif isinstance(each, dict | list) and each:
            opening, closing = "{}" if isinstance(each, dict) else "[]"
            items: list[Any] = []
            for item in each.items() if isinstance(each, dict) else each:
                if items:
                    items.append(_Mark(",", 0, True))
                if isinstance(each, dict):
                    items.append(_Mark(orjson.dumps(item[0]).decode() + (": " if pretty else ":"), 0, False))
                    items.append(item[1])
                else:
                    items.append(item)
            todo += [_Mark(closing, 0, False), _Mark("", -1, True), *reversed(items), _Mark(opening, 1, True)]
        else:
            yield orjson.dumps(each).decode()


class _Mark(NamedTuple):
    text: str
    step: int  # how much deeper it goes on
    breaks: bool  # whether a line ends behind it


def plain(text: str) -> str:
    """Return a server's text, of several lines, with what could steer a terminal made visible."""
    return _IN_TEXT.sub(_visible, text.replace("\r\n", "\n"))


def line(text: str) -> str:
    """The same for what is to be one line: an error, a name."""
    return _IN_LINE.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def paint(colour: str, text: str, *, on: bool) -> str:
    """Return `text` in a colour, if colours are on."""
    return f"{colour}{text}{OFF}" if on else text


def _paint(match: re.Match[str]) -> str:
    if match[1]:
        return f"{KEY}{match[1]}{OFF}{match[2]}" if match[2] else f"{TEXT}{match[1]}{OFF}"
    return f"{WORD}{match[0]}{OFF}" if match[3] else f"{NUMBER}{match[0]}{OFF}"
