"""A line that says how far a long command is: on a terminal, or when asked for, and on standard error."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self


class Progress:
    """Shows `done` of `total` a few times a second. Use as a context manager: it ends the line, at 100 % where all went well.

    Unless asked for, nothing is shown before the first report: what has nothing long to do stays quiet.
    """

    def __init__(self, total: int, *, shown: bool, quiet: bool = False) -> None:
        self._total = total
        self._asked = shown and not quiet
        self._shown = self._asked or (sys.stderr.isatty() and not quiet)
        self._next = 0.0
        self._share = -1.0  # the last that was shown

    def __enter__(self) -> Self:
        return self

    def at(self, done: int) -> None:
        if not self._shown:
            return
        now = time.monotonic()
        if now < self._next and done < self._total:
            return
        self._next = now + 0.2
        self._show(100.0 * done / self._total if self._total else 100.0)

    def of(self, done: int, total: int) -> None:
        """The same, of a total that is known now."""
        self._total = total
        self.at(done)

    def _show(self, share: float) -> None:
        if share != self._share:
            self._share = share
            try:
                print(f"    ({share:.2f}/100%)", end="\r", file=sys.stderr, flush=True)
            except OSError:  # nobody is there to see it, which is no reason to stop half-way
                self._shown = False
                sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 -- for good; else what is still in its buffer makes the exit status 120

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._shown or (not self._asked and self._share < 0):
            return
        if kind is None:
            self._show(100.0)
        with suppress(OSError):
            print(file=sys.stderr)
