"""Children that cannot outlive this process, and signals that end it and them in order."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_GIVE_UP = 10.0  # seconds that a program has for it


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


def give_up(process: subprocess.Popen[str], group: bool) -> None:
    """Tell a program what the interrupt key would.

    With `group`, which it then has of its own: and see it and all that it has started end, in ten seconds at most. Without: one
    that has begun something better finished, as apt with dpkg, finishes that, and its caller waits.
    """
    try:
        # Not every one can be told: it may have ended, or be root's, by sudo, which hears the terminal only.
        with suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.send_signal(signal.SIGINT)
        if group:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GIVE_UP)
    finally:
        if group:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit(128 + n) within, as SIGINT raises KeyboardInterrupt, so that every clean-up runs.

    One that is ignored (nohup) stays so.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    caught = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
