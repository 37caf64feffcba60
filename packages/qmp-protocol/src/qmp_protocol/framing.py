"""Where one message ends and the next begins, in a stream that may arrive in any pieces.

QMP frames nothing: a message ends where its JSON object does (QMP specification, 2.1). Peers send one object a line, several on a
line, one over many lines, with and without a line end; all of that is read here. What comes out does not depend on how
the bytes were split.

After a bad message the stream goes on: at the end of that line when nothing was open, else where its brackets close, or at a
line that begins with `{` (nobody indents a new message, everybody indents the inside of one).

Not here: what the object means (`messages`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeAlias

import orjson

from qmp_protocol.messages import Json, Malformed
from qmp_protocol.syntax import BAD, DONE, ObjectScanner

SERVER_LIMIT: Final = 64 * 1024
"""Bytes in one message from a client. Without a bound, a client could make the server keep anything."""

CLIENT_LIMIT: Final = 16 * 1024 * 1024
"""Bytes in one message from a server: QEMU's `query-qmp-schema` takes 200 KB."""

TOO_LONG: Final = "The socket message is too long."  # StratoVirt's text

Frame: TypeAlias = "Mapping[str, Json] | Malformed"

_loads = orjson.loads
_INTERESTING = re.compile(rb'["{}\[\]\n]')
_OPENING = re.compile(rb'["{\[]')
_NO_OBJECT = "expected a JSON object at line 1 column 1"
_STRING_END = re.compile(rb'(?:[^"\\\n]++|\\[^\n])*+')
_SPACE = b" \t\r\n"


class Framer:
    """Turns bytes into JSON objects. What is no object comes out as Malformed, in its place among the others.

    Holds at most one unfinished message: `limit` bytes and what arrived with the last of them.
    """

    __slots__ = (
        "_buffer",
        "_clean",
        "_depth",
        "_limit",
        "_line_broke",
        "_patient",
        "_scanner",
        "_skip_in_string",
        "_skipping",
        "_started",
        "_waiting",
    )

    def __init__(self, limit: int = SERVER_LIMIT, *, patient: bool = False) -> None:
        """`limit` is the longest message in bytes; a longer one becomes one Malformed and is dropped as it arrives.

        `patient` is for peers that end each message with a line end, as servers do: nothing is looked into before that comes. It
        is faster for long messages in many pieces and changes when things come out, not what.
        """
        self._limit = limit
        self._patient = patient
        self._buffer = bytearray()  # starts at the unfinished message, or is empty
        self._scanner = ObjectScanner()
        self._clean = True  # nothing is unfinished and nothing is being skipped
        self._started = False  # the scanner has looked at the buffer
        self._waiting = False  # the buffer holds the first part of what may be a good line
        self._skipping = False  # inside a bad message, looking for its end
        self._depth = 0
        self._skip_in_string = False
        self._line_broke = False  # the last byte skipped was a line end

    @property
    def unfinished(self) -> bool:
        """Whether the end of the stream now would cut a message."""
        return bool(self._buffer) and not self._skipping

    def feed(self, data: bytes) -> list[Frame]:
        """Take the next bytes of the stream and return what they completed, oldest first."""
        if self._clean and len(data) <= self._limit:
            # What nearly every peer sends: one object.
            try:
                value = _loads(data)
            except orjson.JSONDecodeError:
                pass
            else:
                if type(value) is dict:
                    return [value]
        frames: list[Frame] = []
        if self._clean:
            # Next best: whole lines, each one object.
            lines = data.split(b"\n")
            limit, append = self._limit, frames.append
            for at, line in enumerate(lines):
                try:
                    value = _loads(line)
                except orjson.JSONDecodeError:
                    if not line.strip(_SPACE):
                        continue
                    if at < len(lines) - 1 and _OPENING.search(line) is None:
                        append(Malformed(_NO_OBJECT))
                        continue
                else:
                    if type(value) is dict and len(line) <= limit:
                        append(value)
                        continue
                data = b"\n".join(lines[at:])
                break
            else:
                return frames
        elif self._waiting and self._may_wait(data):
            self._buffer += data
            return frames
        self._waiting = False
        self._buffer += data
        self._run(frames)
        self._clean = not self._buffer and not self._skipping
        return frames

    def finish(self) -> list[Frame]:
        """The stream ended: return the Malformed that an unfinished message makes, if there is one."""
        frames: list[Frame] = []
        self._run(frames, final=True)
        if self.unfinished:
            frames.append(Malformed(f"EOF while parsing {self._scanner.inside}{self._place(len(self._buffer))}"))
        self._buffer.clear()
        self._reset()
        self._skipping = self._waiting = False
        self._clean = True
        return frames

    def _run(self, frames: list[Frame], final: bool = False) -> None:
        buffer = self._buffer
        while buffer:
            if self._skipping:
                if not self._skip():
                    return
                continue
            if not self._started:
                self._strip()
                if not buffer or self._take_line(frames):
                    continue
                if not final and self._may_wait(buffer):
                    self._waiting = True
                    return
            if not self._scan(frames):
                return

    def _may_wait(self, data: bytes | bytearray) -> bool:
        """Whether a patient reader can leave the message in front alone until its line ends."""
        return self._patient and b"\n" not in data and len(self._buffer) + len(data) <= self._limit

    def _strip(self) -> None:
        """Drop white space in front of a message."""
        buffer = self._buffer
        blank = len(buffer) - len(buffer.lstrip(_SPACE))
        if blank:
            del buffer[:blank]

    def _take_line(self, frames: list[Frame]) -> bool:
        """Try the first line as one whole object: orjson is much faster than the scanner."""
        buffer = self._buffer
        end = buffer.find(b"\n")
        stop = len(buffer) if end < 0 else end
        if end < 0 and not buffer.endswith(b"}"):
            return False
        line = buffer[:stop].rstrip(_SPACE)
        if len(line) > self._limit:
            return False
        try:
            value = _loads(line)
        except orjson.JSONDecodeError:
            return False
        if not isinstance(value, dict):
            return False
        frames.append(value)
        del buffer[: stop + 1]
        return True

    def _scan(self, frames: list[Frame]) -> bool:
        """Look on for the end of the message in front. False when its end is not here yet."""
        buffer, scanner = self._buffer, self._scanner
        self._started = True
        verdict = scanner.scan(buffer, self._limit)
        if verdict == DONE:
            text = bytes(buffer[: scanner.position])
            del buffer[: scanner.position]
            try:
                frames.append(_loads(text))
            except orjson.JSONDecodeError as error:  # a bad escape or bad UTF-8 inside a string
                frames.append(Malformed(str(error)))
            self._reset()
        elif verdict == BAD:
            frames.append(Malformed(scanner.reason + self._place(scanner.position)))
            self._begin_skip()
        elif len(buffer) > self._limit:
            frames.append(Malformed(TOO_LONG))
            self._begin_skip()
        else:
            return False
        return True

    def _place(self, position: int) -> str:
        before = self._buffer[:position]
        return f" at line {before.count(10) + 1} column {position - before.rfind(10)}"

    def _reset(self) -> None:
        self._scanner.reset()
        self._started = False

    def _begin_skip(self) -> None:
        scanner = self._scanner
        self._skipping = True
        self._depth = scanner.depth
        self._skip_in_string = scanner.in_string
        # The bad byte itself may begin the next message: a new line right after one that was cut short.
        self._line_broke = self._depth > 0 and self._buffer[scanner.position - 1] == 10
        del self._buffer[: scanner.position]
        self._reset()

    def _skip(self) -> bool:
        """Drop what belongs to a bad message, up to where the next one can begin. False when more bytes must tell."""
        buffer = self._buffer
        at = 0
        while at < len(buffer):
            if self._line_broke and buffer[at] == 0x7B:
                self._skipping = False
                break
            self._line_broke = False
            if self._skip_in_string:
                before, at = at, self._skip_string(at)
                if at == before and self._skip_in_string:
                    del buffer[:at]
                    return False
                continue
            match = _INTERESTING.search(buffer, at)
            if match is None:
                at = len(buffer)
                break
            byte = buffer[match.start()]
            if byte == 0x7B and self._depth == 0:
                at = match.start()
                self._skipping = False
                break
            at = match.end()
            if self._skip_past(byte):
                self._skipping = False
                break
        del buffer[:at]
        return True

    def _skip_string(self, at: int) -> int:
        """Return the offset behind what can be told of the string at `at`. An escape cut by the end of the input stays."""
        buffer = self._buffer
        match = _STRING_END.match(buffer, at)
        at = match.end() if match else at
        if at < len(buffer):
            if buffer[at] == 0x5C:
                if at + 1 == len(buffer):
                    return at
                at += 1  # an escaped line end: the line end counts
            elif buffer[at] == 0x22:
                at += 1
            self._skip_in_string = False  # no string goes over a line end
        return at

    def _skip_past(self, byte: int) -> bool:
        """Count one byte of structure. True when it ends the bad message."""
        if byte == 0x0A:
            self._line_broke = True
            return self._depth == 0
        if byte == 0x22:
            self._skip_in_string = True
        elif byte in b"{[":
            self._depth += 1
        elif self._depth:
            self._depth -= 1
            return self._depth == 0
        return False
