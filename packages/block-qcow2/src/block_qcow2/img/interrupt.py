"""What SIGINT, SIGTERM and SIGHUP do to a command: end it at once, and leave nothing half-made that looks complete.

A command that changes an image in place just dies: the engine writes in an order that survives power loss at any moment, and a
signal is less than that. While a new image is made (`Making`), a signal removes it first. Signals that were ignored when the
command began (nohup) stay ignored. Not here: serve, which ends in its own way.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ours: list[signal.Signals] = []  # those that end this process; none where a command is only a function call


def end_quietly() -> None:
    """Let the signals end this process, without Python's traceback."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            _ours.append(number)


class Making:
    """Files that are being made: removed if the body, a `with` statement's, fails or is interrupted.

    Signals wait from the start until the first file is named, as until then there may be a file that nobody knows of.
    """

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._kept: list[str] = []
        self._waiting = False

    def __enter__(self) -> Self:
        if _ours:
            signal.pthread_sigmask(signal.SIG_BLOCK, _ours)
            self._waiting = True
            for number in _ours:
                signal.signal(number, self._interrupted)
        return self

    def made(self, path: str) -> None:
        """This file is ours from here on, and what was in it is gone."""
        path = os.path.realpath(path)  # where there is a link, the file
        if path not in self._paths:
            self._paths.append(path)
        self._let_signals()

    def changed(self, path: str) -> None:
        """This image existed before and is written to: it stays, and that it is incomplete is said."""
        self._kept.append(path)
        self._let_signals()

    def _let_signals(self) -> None:
        if self._waiting:
            self._waiting = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ours)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._undo()
        for number in _ours:
            signal.signal(number, signal.SIG_DFL)
        self._let_signals()

    def _undo(self) -> None:
        for path in self._kept:
            _say(f"{path}: not everything was written")
        for path in self._paths:
            try:
                if os.path.isfile(path):  # noqa: PTH113
                    os.unlink(path)  # noqa: PTH108
                elif os.path.exists(path):  # noqa: PTH110
                    _wipe(path)
            except OSError as e:
                _say(f"{path}: not everything was written, and it cannot be removed: {e.strerror}")

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        # Nothing is unwound: threads may be in the middle of anything, and the kernel closes what is open.
        self._undo()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _wipe(path: str) -> None:
    """A device cannot be removed: its first bytes go, so that no program takes it for an image."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.pwrite(fd, bytes(4096), 0)
    finally:
        os.close(fd)
    _say(f"{path}: not everything was written: the start of it was wiped")


def _say(text: str) -> None:
    from .args import one_line

    # Not print: a signal may have come in the middle of one.
    os.write(2, f"stratovirt-img: {one_line(text)}\n".encode(errors="backslashreplace"))
