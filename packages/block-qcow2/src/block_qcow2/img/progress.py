"""A line that says how far a long command is: on a terminal, or when asked for, and on standard error."""

from __future__ import annotations

import sys
import time
from typing import Self


class Progress:
    """Shows `done` of `total` a few times a second. Use as a context manager: it ends the line."""

    def __init__(self, total: int, *, shown: bool, quiet: bool = False) -> None:
        self._total = total
        self._shown = (shown or sys.stderr.isatty()) and not quiet
        self._next = 0.0

    def __enter__(self) -> Self:
        self.at(0)
        return self

    def at(self, done: int) -> None:
        if not self._shown:
            return
        now = time.monotonic()
        if now < self._next and done < self._total:
            return
        self._next = now + 0.2
        share = 100.0 * done / self._total if self._total else 100.0
        print(f"    ({share:.2f}/100%)", end="\r", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)
