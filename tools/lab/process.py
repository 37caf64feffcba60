"""Children that cannot outlive this process, and signals that end it in order."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> Callable[[], None]:
    """What a child runs before its program starts, so that the kernel kills it when this process ends, however that comes."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def set_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the line above

    return set_signal


class Child:
    """A running program whose output is kept in memory. Killed and waited for when the stack unwinds.

    It has a session of its own: a terminal's Ctrl-C goes to this process, which then ends its children.
    """

    def __init__(self, stack: ExitStack, arguments: Sequence[str], pass_fds: Sequence[int]) -> None:
        self._log = os.memfd_create("child-log", os.MFD_CLOEXEC)
        stack.callback(os.close, self._log)
        self._process = subprocess.Popen(
            arguments,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - this process has one thread
        )
        stack.callback(self.kill)

    def kill(self) -> None:
        """End it now. Harmless when it has ended already."""
        self._process.kill()
        self._process.wait()

    def output(self) -> bytes:
        """What it has written so far (the last 64 KiB)."""
        size = os.fstat(self._log).st_size
        return os.pread(self._log, 65536, max(0, size - 65536))


@contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit(128 + n) within, as SIGINT raises KeyboardInterrupt, so that every clean-up runs."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
