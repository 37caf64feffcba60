"""The host's end of a character device: where the bytes of a serial port or console come from and go to.

A front end (the guest's device) and a back end (terminal, file, pty; sockets in `chardev_socket`) meet on one loop. Input is
read only as far as the front end has room, so it waits in the host's kernel and none is lost; output that the host does not
take stays with the front end, which makes its guest wait.

Not here: the command line's words for these, and what a guest sees.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from vmm_core.errors import ChardevError
from vmm_core.loop import READ, WRITE, Loop

CHUNK = 4096  # bytes read at a time

Report = Callable[[str], None]


class CharFrontend(Protocol):
    """The guest's device. All methods are called on the loop's thread."""

    def input_room(self) -> int:
        """How many bytes receive() takes now."""
        ...

    def receive(self, data: bytes) -> None:
        """Take input; never more than input_room() said."""
        ...

    def output_ready(self) -> None:
        """The back end takes bytes again after a short write()."""
        ...

    def peer_changed(self, connected: bool) -> None:
        """Somebody is at the other end from now on, or nobody is."""
        ...


class CharBackend(Protocol):
    """The host's end. One front end, from start() to close()."""

    def start(self, loop: Loop, frontend: CharFrontend) -> None:
        """Begin to read; everything happens on `loop` from here on. Raises ChardevError."""
        ...

    def write(self, data: bytes | memoryview) -> int:
        """Hand over output, without waiting; returns how many bytes were taken. On the loop's thread.

        When that is less than given, output_ready() follows. Output that nobody can ever read (no peer, a broken pipe, a full
        disk) counts as taken; what was lost is reported once.
        """
        ...

    def input_wanted(self) -> None:
        """The front end has room again. From any thread; cheap when input was not held up."""
        ...

    def close(self) -> None:
        """Give everything back; the last bytes were written before. Twice is fine."""
        ...


class Stream:
    """Bytes in from one descriptor and out to another, or the same. Watches only what it waits for. On the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        frontend: CharFrontend,
        read_fd: int | None,
        write_fd: int | None,
        ended: Callable[[bool, OSError | None], None],
    ) -> None:
        """Descriptors stay the caller's and are non-blocking or never block.

        `ended` is told once for each direction (True: input) when it is over, with the reason if it is more than the end.
        """
        self._loop = loop
        self._frontend = frontend
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._ended = ended
        self._watched: dict[int, int] = {}
        self._held = False  # input waits for room
        self._blocked = False  # output waits for the host
        self._reading_soon = False  # the input is one that epoll cannot watch
        self._update()

    def write(self, data: bytes | memoryview) -> int:
        """Write what the descriptor takes now."""
        if self._write_fd is None:
            return len(data)
        try:
            taken = os.write(self._write_fd, data)
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self._end(False, error)
            return len(data)
        if taken < len(data):
            self._blocked = True
            self._update()
        return taken

    def input_wanted(self) -> None:
        """Go on reading if it was held up for want of room. From any thread."""
        if self._held:
            self._loop.call_soon(self._go_on)

    def close(self) -> None:
        """Watch nothing any more."""
        self._read_fd = self._write_fd = None
        self._update()

    def _go_on(self) -> None:
        self._held = False
        self._update()

    def _update(self) -> None:
        """Bring what is watched in line with what is waited for.

        Nothing waited for is nothing watched: a hang-up is reported whatever the mask, for ever.
        """
        wanted: dict[int, int] = {}
        if self._read_fd is not None and not self._held:
            wanted[self._read_fd] = READ
        if self._write_fd is not None and self._blocked:
            wanted[self._write_fd] = wanted.get(self._write_fd, 0) | WRITE
        for fd in self._watched.keys() - wanted.keys():
            self._loop.remove_fd(fd)
            del self._watched[fd]
        for fd, events in wanted.items():
            if fd not in self._watched:
                self._watch(fd, events)
            elif self._watched[fd] != events:
                self._loop.modify_fd(fd, events)
                self._watched[fd] = events

    def _watch(self, fd: int, events: int) -> None:
        try:
            self._loop.add_fd(fd, events, self._event)
        except PermissionError:
            # Regular files and /dev/null are always ready and epoll says so by refusing them (epoll_ctl(2), EPERM).
            if events & READ and not self._reading_soon:
                self._reading_soon = True
                self._loop.call_soon(self._read_soon)
        else:
            self._watched[fd] = events

    def _event(self, mask: int) -> None:
        if mask & ~WRITE and self._read_fd is not None and not self._held:
            self._read()
        if mask & ~READ and self._blocked:
            self._blocked = False
            self._update()
            self._frontend.output_ready()

    def _read(self) -> None:
        if self._read_fd is None:
            return
        room = self._frontend.input_room()
        if room == 0:
            self._held = True  # before the second look: a guest that makes room in between sees this and calls input_wanted()
            room = self._frontend.input_room()
            if room == 0:
                self._update()
                return
            self._held = False
        try:
            data = os.read(self._read_fd, min(room, CHUNK))
        except BlockingIOError:
            return
        except OSError as error:
            self._end(True, error)
            return
        if not data:
            self._end(True, None)
            return
        self._frontend.receive(data)

    def _read_soon(self) -> None:
        """Read a part of what is always ready, and come back for more in the loop's next turn."""
        self._reading_soon = False
        if not self._held:
            self._read()
            self._update()

    def _end(self, reading: bool, error: OSError | None) -> None:
        if reading:
            self._read_fd = None
        else:
            self._write_fd = None
            self._blocked = False
        self._update()
        self._ended(reading, error)


class FdBackend:
    """A back end over descriptors that are there from the beginning. Closes them at the end."""

    def __init__(self, name: str, read_fd: int | None, write_fd: int, report: Report) -> None:
        """`name` appears in reports: what the descriptors are."""
        self._name = name
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._report = report
        self._loop: Loop | None = None
        self._stream: Stream | None = None
        self._closed = False

    def start(self, loop: Loop, frontend: CharFrontend) -> None:
        """Begin to read."""

        def begin() -> None:
            self._stream = Stream(loop, frontend, self._read_fd, self._write_fd, self._ended)
            frontend.peer_changed(True)

        self._loop = loop
        loop.run(begin)

    def write(self, data: bytes | memoryview) -> int:
        """Hand over output (`CharBackend`)."""
        return len(data) if self._stream is None else self._stream.write(data)

    def input_wanted(self) -> None:
        """There is room again (`CharBackend`)."""
        if self._stream is not None:
            self._stream.input_wanted()

    def close(self) -> None:
        """Stop watching and close the descriptors. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._loop is not None and self._stream is not None:
            self._loop.run(self._stream.close)
        for fd in {self._read_fd, self._write_fd} - {None}:
            os.close(fd)  # type: ignore[arg-type]

    def _ended(self, reading: bool, error: OSError | None) -> None:
        if reading and (error is None or error.errno == errno.EIO):
            return  # the end of a file, or a terminal that went away: output may go on
        reason = "end of file" if error is None else os.strerror(error.errno or 0)
        self._report(f"{self._name}: {'input' if reading else 'output'} ended: {reason}")


class FileBackend(FdBackend):
    """Output into a file, from its beginning, without truncating it. No input. Source: reference usb-display-misc, section 17.

    A write that fails (a full disk) loses that output and no other: the next one is tried again.
    """

    def __init__(self, path: str, report: Report) -> None:
        """Open or create `path`. Raises ChardevError."""
        try:
            # Non-blocking matters when the path is a FIFO or a terminal.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ChardevError(f"cannot open {path}: {error.strerror}") from None
        super().__init__(path, None, fd, report)
        self._failing = False

    def write(self, data: bytes | memoryview) -> int:
        """Write, and say once when the file takes nothing."""
        try:
            taken = os.write(self._write_fd, data)
        except BlockingIOError:
            return super().write(data)
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._report(f"{self._name}: output lost: {error.strerror}")
            return len(data)
        if taken == len(data):
            self._failing = False
            return taken
        return taken + self.write(memoryview(data)[taken:])  # a disk that fills up takes a part, then says why


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


class StdioBackend(FdBackend):
    """Standard input and output, whatever they are: terminal, pipe, file or /dev/null.

    A terminal is in raw mode from start() to close(), or to the end of the process if that comes first.
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

            restore = raw_mode(self._terminal, keep_output=True)
            atexit.register(restore)
            self._undo += [restore, lambda: atexit.unregister(restore)]
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
        self._report(f"Pty path is: {self.path}")
        loop.run(self._look)

    def write(self, data: bytes | memoryview) -> int:
        """Hand over output (`CharBackend`); nobody there is nobody who misses it."""
        return len(data) if self._stream is None else self._stream.write(data)

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
