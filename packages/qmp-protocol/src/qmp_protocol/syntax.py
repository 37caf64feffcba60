"""An incremental recogniser of one JSON object (RFC 8259): where it ends, or where it stops being JSON.

It builds no values; orjson does that once the end is known. Each byte is looked at once however the input is split, so a
peer that sends a message byte by byte costs no more than one that sends it whole.

Not here: what follows a bad message (`framing`).
"""

from __future__ import annotations

import re
from typing import Final

MAX_DEPTH: Final = 1024  # orjson's own limit: what one accepts, the other must

MORE: Final = 0
DONE: Final = 1
BAD: Final = 2

_TOKEN = re.compile(rb'[ \t\r\n]*+(?:([{}\[\]:,"])|([-+.0-9A-Za-z]++))')
_BLANK = re.compile(rb"[ \t\r\n]*+")
_STRING_BODY = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+')
_SCALAR = re.compile(rb"true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?")
_LONGEST_SCALAR = 1024  # a number cut by the end of the input is looked at again: this bounds how much

# What may come next. The innermost container decides what NEXT means.
_START, _VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END, _COLON, _NEXT = range(7)

_EXPECTED = {
    _START: "expected a JSON object",
    _VALUE: "expected value",
    _VALUE_OR_END: "expected value",
    _KEY: "key must be a string",
    _KEY_OR_END: "key must be a string",
    _COLON: "expected `:`",
}


class ObjectScanner:
    """Recognises one object at the start of a buffer that only grows at its end.

    `scan` may be called again with more bytes after MORE. After DONE, `position` is the offset behind the object; after BAD,
    that of the first byte that cannot be part of one, with `reason` set. `depth` is the number of containers open there.
    """

    __slots__ = ("_expect", "_in_string", "_key", "_stack", "position", "reason")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over at offset 0 of a new buffer."""
        self.position = 0
        self.reason = ""
        self._stack = bytearray()
        self._expect = _START
        self._in_string = False
        self._key = False

    @property
    def depth(self) -> int:
        return len(self._stack)

    @property
    def in_string(self) -> bool:
        return self._in_string

    @property
    def inside(self) -> str:
        """What the end of the input would cut: `a string`, `an object`, `a list` or `a value`."""
        if self._in_string:
            return "a string"
        if not self._stack:
            return "a value"
        return "an object" if self._stack[-1] == 0x7B else "a list"

    def scan(self, buffer: bytearray, limit: int) -> int:
        """Look at `buffer` up to offset `limit`. Returns MORE, DONE or BAD."""
        end = min(len(buffer), limit)
        while True:
            if self._in_string:
                if not self._finish_string(buffer, end):
                    return BAD if self.reason else MORE
                continue
            match = _TOKEN.match(buffer, self.position, end)
            if match is None:
                self.position = _BLANK.match(buffer, self.position, end).end()  # type: ignore[union-attr]
                if self.position == end:
                    return MORE
                return self._bad()
            if match[1] is None:
                verdict = self._scalar(match[2], match.start(2), match.end(), end)
            else:
                self.position = match.end() - 1
                verdict = self._punctuation(match[1][0])
            if verdict is not None:
                return verdict

    def _finish_string(self, buffer: bytearray, end: int) -> bool:
        match = _STRING_BODY.match(buffer, self.position, end)
        self.position = at = match.end() if match else self.position
        if at == end:
            return False
        if buffer[at] == 0x22:
            self.position = at + 1
            self._in_string = False
            self._expect = _COLON if self._key else _NEXT
            return True
        if buffer[at] == 0x5C:
            if at + 1 == end:
                return False  # the escape is cut
            self.position = at + 1
        self._in_string = False
        self.reason = "control character (\\u0000-\\u001F) found while parsing a string"
        return False

    def _scalar(self, text: bytes, start: int, stop: int, end: int) -> int | None:
        self.position = start
        if self._expect not in (_VALUE, _VALUE_OR_END):
            return self._bad()
        if stop == end and stop - start <= _LONGEST_SCALAR:
            return MORE
        if stop - start > _LONGEST_SCALAR or _SCALAR.fullmatch(text) is None:
            return self._bad("invalid number" if text[0] in b"-0123456789" else None)
        self.position = stop
        self._expect = _NEXT
        return None

    def _punctuation(self, byte: int) -> int | None:
        expect = self._expect
        if byte == 0x22:
            if expect in (_KEY, _KEY_OR_END):
                self._key = True
            elif expect in (_VALUE, _VALUE_OR_END):
                self._key = False
            else:
                return self._bad()
            self._in_string = True
        elif byte in b"{[":
            if expect not in (_VALUE, _VALUE_OR_END) and not (expect == _START and byte == 0x7B):
                return self._bad()
            if len(self._stack) == MAX_DEPTH:
                return self._bad("recursion limit exceeded")
            self._stack.append(byte)
            self._expect = _KEY_OR_END if byte == 0x7B else _VALUE_OR_END
        elif byte in b"}]":
            return self._close(byte)
        elif byte == 0x3A:
            if expect != _COLON:
                return self._bad()
            self._expect = _VALUE
        else:
            if expect != _NEXT:
                return self._bad()
            self._expect = _KEY if self._stack[-1] == 0x7B else _VALUE
        self.position += 1
        return None

    def _close(self, byte: int) -> int | None:
        expect = self._expect
        inside = self._stack[-1] if self._stack else 0
        if (byte == 0x7D and expect == _KEY) or (byte == 0x5D and expect == _VALUE and inside == 0x5B):
            return self._bad("trailing comma")
        fits = (
            inside == 0x7B and expect in (_KEY_OR_END, _NEXT)
            if byte == 0x7D
            else inside == 0x5B and expect in (_VALUE_OR_END, _NEXT)
        )
        if not fits:
            return self._bad()
        self._stack.pop()
        self._expect = _NEXT
        self.position += 1
        return None if self._stack else DONE

    def _bad(self, reason: str | None = None) -> int:
        if reason is None:
            if self._expect == _NEXT:
                reason = "expected `,` or `}`" if self._stack[-1] == 0x7B else "expected `,` or `]`"
            else:
                reason = _EXPECTED[self._expect]
        self.reason = reason
        return BAD
