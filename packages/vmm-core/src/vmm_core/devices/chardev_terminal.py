"""Character devices for people: standard input and output, and pseudo-terminals.

Not here: what happens to the bytes (`chardev.Stream`).
"""

from __future__ import annotations

import os
import select
import stat
import threading
from collections.abc import Callable
from contextlib import suppress

from vmm_core.devices.chardev import CharFrontend, FdBackend, Report, Stream
from vmm_core.errors import ChardevError
from vmm_core.loop import Loop


def raw_mode(fd: int, *, keep_output: bool) -> Callable[[], None]:
    """Put a terminal into raw mode, so that every key reaches the guest.

    `keep_output` keeps output processing, so that the host's own lines on the same terminal stay readable. Returns the
    function that puts the old mode back. Raises termios.error when `fd` is no terminal.
    """
    import termios

    before = termios.tcgetattr(fd)
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = termios.tcgetattr(fd)
    # cfmakeraw(3)
    iflag &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    if not keep_output:
        oflag &= ~termios.OPOST
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])

    def restore() -> None:
        with suppress(termios.error):  # the terminal is gone: nothing to put back
            termios.tcsetattr(fd, termios.TCSANOW, before)

    return restore


# What ends a process unless somebody minds. Faults are not among them: what Python's handler would come back to faults again.
_DEADLY = ("SIGHUP", "SIGQUIT", "SIGABRT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM")


def _before_death(restore: Callable[[], None]) -> Callable[[], None]:
    """Call `restore` when a signal that nobody minds ends the process, which it then does. Returns the function that undoes this.

    Only the main thread may mind signals; on any other nothing happens.
    """
    import signal

    def killed(number: int, _frame: object) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    minded: list[int] = []

    def undo() -> None:
        with suppress(ValueError):  # another thread closes: `restore` once more does no harm
            for number in minded:
                if signal.getsignal(number) is killed:
                    signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _DEADLY):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, killed)
                minded.append(number)
    return undo


class StdioBackend(FdBackend):
    """Standard input and output, whatever they are: terminal, pipe, file or /dev/null.

    A terminal is in raw mode from start() to close(), or to the end of the process if that comes first (but for SIGKILL).
    """

    def __init__(self, report: Report, read_fd: int = 0, write_fd: int = 1) -> None:
        """Take descriptors of its own for both. Raises ChardevError when one is closed."""
        self._undo: list[Callable[[], None]] = []
        self._terminal: int | None = None
        reader = self._private(read_fd, os.O_RDONLY, "standard input")
        try:
            writer = self._private(write_fd, os.O_WRONLY, "standard output")
        except ChardevError:
            os.close(reader)
            for step in self._undo:
                step()
            raise
        super().__init__("stdio", reader, writer, report)
        if os.isatty(reader):
            self._terminal = reader

    def start(self, loop: Loop, frontend: CharFrontend) -> None:
        """Put a terminal into raw mode and begin to read."""
        if self._terminal is not None:
            import atexit
            import termios

            try:
                restore = raw_mode(self._terminal, keep_output=True)
            except termios.error as error:  # it was one, and has hung up since
                raise ChardevError(f"standard input: {error.args[-1]}") from None
            atexit.register(restore)
            self._undo += [restore, lambda: atexit.unregister(restore), _before_death(restore)]
        super().start(loop, frontend)

    def close(self) -> None:
        """Put the terminal back and let go of the descriptors. Twice is fine."""
        undo, self._undo = self._undo, []
        for step in undo:
            step()
        super().close()

    def _private(self, fd: int, access: int, name: str) -> int:
        """A non-blocking descriptor for what `fd` is.

        O_NONBLOCK belongs to the open file, which is shared with the shell and with every log writer. So it is opened anew
        where that gives the same thing; only where it cannot be is the flag set on the shared one, until close().
        """
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode) or os.isatty(fd):
                try:
                    return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                except OSError:
                    pass  # no /proc, or a terminal of another user (su): below
            copy = os.dup(fd)
            if not stat.S_ISREG(mode) and os.get_blocking(copy):
                os.set_blocking(copy, False)
                # Through a copy of its own, because the original may be closed by then.
                keep = os.dup(fd)
                self._undo += [lambda: os.set_blocking(keep, True), lambda: os.close(keep)]
        except OSError as error:
            raise ChardevError(f"{name}: {error.strerror}") from None
        return copy


class PtyBackend:
    """A pseudo-terminal for programs such as screen or `virsh console` to attach to, and to leave, at any time.

    While nobody has it open, output is dropped: a guest must not wait for a reader who may never come.
    """

    POLL = 1_000_000_000  # nanoseconds between looks for someone who opened it: Linux tells of the last close only

    def __init__(self, report: Report) -> None:
        """Make the pair. Raises ChardevError when the system has none left. The path to attach to is `path`."""
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise ChardevError(f"cannot make a pseudo-terminal: {error.strerror}") from None
        self.path = os.ttyname(slave)
        raw_mode(slave, keep_output=False)
        os.close(slave)
        os.set_blocking(self._master, False)
        self._report = report
        self._loop: Loop | None = None
        self._frontend: CharFrontend | None = None
        self._stream: Stream | None = None
        self._closed = False

    def start(self, loop: Loop, frontend: CharFrontend) -> None:
        """Begin to look for someone who opens it."""
        self._loop, self._frontend = loop, frontend
        self._report(f'Pty path is: "{self.path}"')  # the quotes are StratoVirt's, whose clients look for the line
        loop.run(self._look)

    def write(self, data: bytes | memoryview) -> int:
        """Hand over output (`CharBackend`); nobody there is nobody who misses it."""
        stream = self._stream
        return len(data) if stream is None else stream.write(data)

    def input_wanted(self) -> None:
        """There is room again (`CharBackend`)."""
        if (stream := self._stream) is not None:
            stream.input_wanted()

    def close(self) -> None:
        """Close the pair. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._loop is not None:
            self._loop.run(self._drop)
        os.close(self._master)

    def _look(self) -> None:
        if self._closed or self._loop is None or self._frontend is None:
            return
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            self._loop.call_later(self.POLL, self._look, host=True)
            return
        self._stream = Stream(self._loop, self._frontend, self._master, self._master, self._ended)
        self._frontend.peer_changed(True)

    def _ended(self, reading: bool, error: OSError | None) -> None:
        self._drop()
        if self._frontend is not None:
            self._frontend.peer_changed(False)
            self._frontend.output_ready()  # what waited for the reader who left can go the way of the rest
        self._look()

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
