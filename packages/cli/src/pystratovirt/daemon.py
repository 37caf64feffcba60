"""`-daemonize` and `-pidfile`: to the background, and the caller learns whether the start succeeded.

The caller's process waits until the daemon says that it is ready (QMP can be reached) or is gone. Not here: when that is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import sys

from pystratovirt.errors import StartError

READY = b"\0"


class DaemonError(StartError):
    """The process cannot go to the background, or the process id cannot be written; one line that says why."""


class Daemon:
    """The background process's side: whoever started it waits to hear from it."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """Let go of the terminal and let the caller end with status 0.

        Standard input, output and error become /dev/null; other descriptors stay. Raises DaemonError when the caller is gone: it
        was interrupted, and nobody knows that this process exists.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        _flush()
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        try:
            os.write(self._pipe, READY)
        except BrokenPipeError:
            raise DaemonError("the process that started this one has gone") from None
        finally:
            self.close()

    def close(self) -> None:
        """Stop being waited for. Without `ready` before, the caller takes it for a failure."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


def _flush() -> None:
    """Write out what Python has buffered, so that it is neither written twice nor to /dev/null."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is when the descriptor was closed at the start
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def daemonize() -> Daemon:
    """Go to the background; return there, in a new session without a terminal. The caller's process does not return.

    Until `Daemon.ready` standard error is the caller's: a failure is written there, the process ends, and the caller's exit
    status is 1. Call it before any thread is started. Raises DaemonError.
    """
    _flush()
    try:
        reader, writer = os.pipe()  # closed on exec, so that no helper keeps the caller waiting
        interrupted = signal.getsignal(signal.SIGINT)
        if interrupted is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a waiting caller, without a traceback
        child = os.fork()
    except OSError as error:
        raise DaemonError(f"-daemonize: cannot fork: {error.strerror}") from None
    if child:
        os.close(writer)
        _wait_and_exit(child, reader)
    os.close(reader)
    os.setsid()
    signal.signal(signal.SIGINT, interrupted or signal.SIG_DFL)
    # A session leader that opens a terminal gets it as its own: the child of one does not.
    try:
        grandchild = os.fork()
    except OSError as error:
        os.write(2, f"stratovirt: -daemonize: cannot fork: {error.strerror}\n".encode())
        os._exit(1)
    if grandchild:
        os._exit(0)
    return Daemon(writer)


def _wait_and_exit(child: int, reader: int) -> None:
    """Be the caller: end with 0 once the daemon is ready, with 1 when it ends before."""
    status = 1
    try:
        os.waitpid(child, 0)
        if os.read(reader, 1) == READY:
            status = 0
    finally:
        os._exit(status)


class PidFile:
    """A file with this process's id, kept locked while the process lives.

    The lock tells a running owner from one that was killed: a stale file does not stop the next start, a running owner does.
    """

    def __init__(self, path: str) -> None:
        """Create the file. Raises DaemonError when another process holds it, or when it is something else than a pidfile."""
        self.path = path
        self._fd = -1
        self._locked = False
        try:
            self.path = os.path.abspath(path)  # noqa: PTH100 - pathlib is not imported at a start
            self._create()
        except OSError as error:
            self.remove()
            raise DaemonError(f"-pidfile {path}: {error.strerror}") from None
        except DaemonError as error:
            self.remove()
            raise DaemonError(f"-pidfile {path}: {error}") from None

    def _create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._fd = os.open(self.path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise DaemonError("exists and is not a file")
        content = os.pread(self._fd, 32, 0).strip()
        if content and not (content.isdigit() and len(content) <= 10):
            raise DaemonError("exists and does not hold a process id")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DaemonError(f"belongs to process {content.decode() or 'that is starting'}") from None
        self._locked = True
        if not self._is_ours():  # its owner ended and removed it between open and lock
            raise DaemonError("belonged to a process that is just ending; try again")
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d" % os.getpid(), 0)

    def _is_ours(self) -> bool:
        try:
            there, ours = os.stat(self.path, follow_symlinks=False), os.fstat(self._fd)  # noqa: PTH116 - as above
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def remove(self) -> None:
        """Remove the file, if it is still the one created here. Never raises."""
        if self._locked and self._is_ours():
            # A folder can have become read-only; the lock goes with the process, so the file counts as stale then.
            with contextlib.suppress(OSError):
                os.unlink(self.path)  # noqa: PTH108 - as above
        self.close()

    def close(self) -> None:
        """Let go of the file without removing it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._locked = False
