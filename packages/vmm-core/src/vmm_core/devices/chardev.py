"""The host's end of a character device: where the bytes of a serial port or console come from and go to.

A front end (the guest's device) and a back end meet on one loop. Input is read only as far as the front end has room, so it
waits in the host's kernel and none is lost; output that the host does not take stays with the front end, which makes its guest
wait.

Not here: terminals (`chardev_terminal`), sockets (`chardev_socket`, `chardev_client`), the command line's words for these, and
what a guest sees.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from threading import Lock
from typing import Protocol

from vmm_core.errors import ChardevError
from vmm_core.loop import READ, WRITE, Loop

CHUNK = 4096  # bytes read at a time
RETRY = 1_000_000_000  # nanoseconds to wait when the process has no descriptor left, or may watch no more of them

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
        """Hand over output, without waiting; returns how many bytes were taken. From any thread, but one at a time.

        When that is less than given, output_ready() follows, later and on the loop. Output that nobody can ever read (no peer,
        a broken pipe, a full disk) counts as taken; what was lost is reported once.
        """
        ...

    def input_wanted(self) -> None:
        """The front end has room again. From any thread; cheap when input was not held up."""
        ...

    def close(self) -> None:
        """Give everything back; the last bytes were written before. Twice is fine."""
        ...


class Stream:
    """Bytes in from one descriptor and out to another, or the same. Watches only what it waits for.

    On the loop's thread, but for write() and input_wanted().
    """

    def __init__(
        self,
        loop: Loop,
        frontend: CharFrontend,
        read_fd: int | None,
        write_fd: int | None,
        ended: Callable[[bool, OSError | None], None],
        hung_up: Callable[[], None] | None = None,
    ) -> None:
        """Descriptors stay the caller's and are non-blocking or never block.

        `ended` is told once for each direction (True: input) when it is over, with the reason if it is more than the end.
        `hung_up` is told once when the peer of a socket is gone although what it sent still waits for room.
        """
        self._loop = loop
        self._frontend = frontend
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._ended = ended
        self._hung_up = hung_up
        self._writing = Lock()  # guards _write_fd: a descriptor is not closed, and its number another's, while it is written to
        self._watched: dict[int, int] = {}
        self._held = False  # input waits for room
        self._blocked = False  # output waits for the host
        self._reading_soon = False  # the input is one that epoll cannot watch
        self._watching_later = False  # there was no room for a watch
        self._closed = False
        self._update()

    def write(self, data: bytes | memoryview) -> int:
        """Write what the descriptor takes now. From any thread; what comes of it happens on the loop."""
        with self._writing:
            fd = self._write_fd
            if fd is None:
                return len(data)
            try:
                taken = os.write(fd, data)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                reason = error  # the name of the exception ends with this block
                self._write_fd = None
                self._loop.call_soon(lambda: self._end(False, reason))
                return len(data)
        if taken < len(data):
            self._blocked = True
            self._loop.call_soon(self._update)
        return taken

    def input_wanted(self) -> None:
        """Go on reading if it was held up for want of room. From any thread."""
        if self._held:
            self._loop.call_soon(self._go_on)

    def close(self) -> None:
        """Watch nothing any more, and let go of the descriptors. `ended` hears nothing after that."""
        self._closed = True
        with self._writing:
            self._read_fd = self._write_fd = None
        self._update()

    def _go_on(self) -> None:
        self._held = False
        self._update()

    def _update(self) -> None:
        """Bring what is watched in line with what is waited for.

        Nothing waited for is nothing watched: a hang-up is reported whatever the mask, for ever. So it is listened for only once.
        """
        wanted: dict[int, int] = {}
        if self._read_fd is not None and not self._held:
            wanted[self._read_fd] = READ
        elif self._read_fd is not None and self._hung_up is not None:
            wanted[self._read_fd] = select.EPOLLRDHUP
        writer = self._write_fd  # it may be gone the next moment
        if writer is not None and self._blocked:
            wanted[writer] = wanted.get(writer, 0) | WRITE
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
        except OSError:  # the user's limit of watches is reached, or memory is short: a peer waits until there is room
            if not self._watching_later:
                self._watching_later = True
                self._loop.call_later(RETRY, self._watch_again, host=True)
        else:
            self._watched[fd] = events

    def _watch_again(self) -> None:
        self._watching_later = False
        self._update()

    def _event(self, mask: int) -> None:
        if mask & ~WRITE and self._read_fd is not None:
            if not self._held:
                self._read()
            elif self._hung_up is not None:
                hung_up, self._hung_up = self._hung_up, None
                self._update()
                hung_up()
        if mask & ~(READ | select.EPOLLRDHUP) and self._blocked:
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
        if self._closed:
            return  # a failed write is told of soon, and by then its owner may have another stream
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
        stream = self._stream
        return len(data) if stream is None else stream.write(data)

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
