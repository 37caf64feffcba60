"""What a person sees while something takes long: one line that fills up on a terminal, plain lines in a pipe."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Self


class Step:
    """One named piece of work, written to standard error. Use as a context manager.

    On a terminal: a bar that is redrawn in place and ends as one line with the time it took. Elsewhere: one line at the
    start, nothing while it goes on.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._tty = sys.stderr.isatty()
        self._start = 0.0
        self._drawn = -1

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self.note("...")
        if not self._tty:
            print(f"{self._what} ...", file=sys.stderr, flush=True)
        return self

    def update(self, percent: float) -> None:
        """Draw the bar at `percent` (0 to 100)."""
        if round(percent) != self._drawn:
            self._drawn = round(percent)
            full = round(24 * min(max(percent, 0.0), 100.0) / 100)
            self._draw(f"[{'#' * full}{'.' * (24 - full)}] {percent:3.0f}%")

    def note(self, text: str) -> None:
        """Say what is being done, where nobody knows how much there is."""
        self._draw(text)

    def _draw(self, state: str) -> None:
        if self._tty:
            line = f"{self._what}: {state}"
            sys.stderr.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tty:
            end = "failed" if kind else f"done in {time.monotonic() - self._start:.1f} s"
            sys.stderr.write(f"\r\x1b[K{self._what}: {end}\n")
            sys.stderr.flush()


def say(text: str) -> None:
    """One line for the person, on standard error."""
    print(text, file=sys.stderr, flush=True)
