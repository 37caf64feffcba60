"""Byte streams out of the lab host, each ended by a token because a virtio-serial port has no reliable end of file."""

from __future__ import annotations

from collections.abc import Callable


class Stream:
    """Bytes from a port until the end token; what follows the token is dropped.

    Bytes are handed on as they come: only what may be the beginning of the token is held back.

    >>> parts: list[bytes] = []
    >>> stream = Stream(b"\\x01END", parts.append)
    >>> stream.feed(b"hello\\x01E")
    >>> stream.feed(b"ND")
    >>> parts, stream.ended
    ([b'hello'], True)
    """

    def __init__(self, token: bytes, sink: Callable[[bytes], None]) -> None:
        self._token = token
        self._sink = sink
        self._held = b""
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Take what arrived."""
        if self.ended:
            return
        data = self._held + data
        at = data.find(self._token)
        if at >= 0:
            self.ended, self._held = True, b""
            data = data[:at]
        else:
            keep = _overlap(data, self._token)
            data, self._held = data[: len(data) - keep], data[len(data) - keep :]
        if data:
            self._sink(data)

    def close(self) -> None:
        """The port closed without a token: hand on what was held back."""
        if not self.ended and self._held:
            self._sink(self._held)
        self.ended = True


def _overlap(data: bytes, token: bytes) -> int:
    """How many bytes at the end of data are a beginning of the token."""
    for length in range(min(len(data), len(token) - 1), 0, -1):
        if data.endswith(token[:length]):
            return length
    return 0
