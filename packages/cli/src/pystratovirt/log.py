"""The log: where it goes, which lines, what a line looks like (reference command-line, section 10).

Not the standard library's `logging`, whose import alone costs a start 5 ms; `adopt_logging` brings what libraries say there into
this log. A line that cannot be written (disk full, reader gone) is dropped: the log never stops a virtual machine.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from _thread import RLock, get_native_id
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

ERROR, WARN, INFO, DEBUG, TRACE = range(1, 6)
NAMES = ("", "ERROR", "WARN", "INFO", "DEBUG", "TRACE")
LEVEL_VARIABLE = "STRATOVIRT_LOG_LEVEL"

ROTATE_SIZE = 100 << 20
KEPT_FILES = 6  # file1 is the newest, file6 the oldest
_MODE = 0o640
_LONGEST = 64 << 10  # characters of one message: clients choose how long their QMP lines are


def level_from(text: str | None, default: int = INFO) -> int:
    """Return the level that `text` names, in any case; `default` for anything else."""
    name = (text or "").upper()
    return NAMES.index(name) if name in NAMES[1:] else default


class Log:
    """Writes lines to one descriptor. Any thread may call it, a signal handler too."""

    def __init__(self, level: int = INFO, path: str | None = None) -> None:
        """Log to standard error, or to the file `path`: appended to, created with mode 0640. Raises OSError."""
        self.level = level
        self.dropped = 0  # lines that could not be written
        self._lock = RLock()
        self._path = ""
        self._fd = 2
        self._second, self._stamp, self._day = -1, "", -1
        self._size = self._next_size = 0
        if path is not None:
            self._open(path)

    def _open(self, path: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, _MODE)
        status = os.fstat(fd)
        self._fd = fd
        if stat.S_ISREG(status.st_mode):  # a terminal, a pipe or /dev/null is not renamed
            # An absolute path: the working directory may change under a relative one.
            self._path = os.path.abspath(path)  # noqa: PTH100 - pathlib is not imported at a start
            self._size, self._next_size = status.st_size, ROTATE_SIZE
            self._day = time.localtime(status.st_mtime).tm_mday

    def close(self) -> None:
        """Close the file; later lines go to standard error."""
        with self._lock:
            fd, self._fd, self._path = self._fd, 2, ""
            if fd != 2:
                os.close(fd)

    def write(self, level: int, message: str, file: str, line: int) -> None:
        """Write one line if `level` is wanted. Control characters are escaped: what a guest or client says stays one line."""
        if level > self.level:
            return
        if len(message) > _LONGEST:
            message = f"{message[:_LONGEST]}... ({len(message) - _LONGEST} more)"
        if not message.isprintable():
            message = message.encode("unicode_escape").decode("ascii")
        with self._lock:
            second, fraction = divmod(time.time_ns(), 1_000_000_000)
            if second != self._second:
                self._second = second
                self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(second))
            head = f"{self._stamp}.{fraction:09}: [{os.getpid()}][{get_native_id()}][{_short(file)}: {line}]"
            self._put(f"{head}:{NAMES[level]}: {message}\n".encode("utf-8", "backslashreplace"))
            if self._path:
                self._rotate_if_due()

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.write(self._fd, view)
                view = view[count:]
                self._size += count
        except OSError:
            self.dropped += 1

    def _rotate_if_due(self) -> None:
        day = int(self._stamp[8:10])
        if self._size < self._next_size and day == self._day:
            return
        # Whatever happens below, the next attempt is a day or 100 MiB away: a folder that is read-only must not cost every line.
        self._day, self._next_size = day, self._size + ROTATE_SIZE
        path, old = self._path, self._fd
        try:
            for number in range(KEPT_FILES, 0, -1):
                source = f"{path}{number - 1}" if number > 1 else path
                try:
                    os.rename(source, f"{path}{number}")  # noqa: PTH104 - as above
                except FileNotFoundError:
                    continue
            self._open(path)
        except OSError:
            return  # the old descriptor is still good
        self._day = day
        os.close(old)

    def _called(self, level: int, message: str, frame: FrameType) -> None:
        self.write(level, message, frame.f_code.co_filename, frame.f_lineno)


def _short(file: str) -> str:
    """Return a source path from its package on: `pystratovirt/log.py`."""
    for root in ("/site-packages/", "/src/"):
        _, found, rest = file.rpartition(root)
        if found:
            return rest
    return file.rpartition("/")[2]


_log = Log(level_from(os.environ.get(LEVEL_VARIABLE), WARN))


def setup(path: str | None, *, wanted: bool = True) -> None:
    """Send the log to the file `path`, or to standard error; the level comes from STRATOVIRT_LOG_LEVEL.

    Without the variable it is info when a log is `wanted` (`-D`) and warn when not: who starts a machine on a terminal sees its
    console and not a log. Raises OSError when the file cannot be opened.
    """
    global _log
    new = Log(level_from(os.environ.get(LEVEL_VARIABLE), INFO if wanted else WARN), path)
    old, _log = _log, new
    old.close()


def enabled(level: int) -> bool:
    """Whether lines of this level are written: ask before building an expensive message."""
    return level <= _log.level


def error(message: str) -> None:
    """Something failed."""
    if _log.level >= ERROR:
        _log._called(ERROR, message, sys._getframe(1))


def warn(message: str) -> None:
    """Something is not as it should be."""
    if _log.level >= WARN:
        _log._called(WARN, message, sys._getframe(1))


def info(message: str) -> None:
    """A step in the life of the machine."""
    if _log.level >= INFO:
        _log._called(INFO, message, sys._getframe(1))


def debug(message: str) -> None:
    """Of interest to who works on this program."""
    if _log.level >= DEBUG:
        _log._called(DEBUG, message, sys._getframe(1))


def trace(message: str) -> None:
    """Each event of a kind."""
    if _log.level >= TRACE:
        _log._called(TRACE, message, sys._getframe(1))


def adopt_logging() -> None:
    """Bring the lines of the standard library's `logging` here (asyncio reports lost exceptions there). Imports it."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = TRACE - min(record.levelno // 10, 4)  # DEBUG is 10, ERROR and above are 40 and more
            _log.write(level, self.format(record), record.pathname, record.lineno)

    threshold = {ERROR: 40, WARN: 30, INFO: 20, DEBUG: 10, TRACE: 1}[_log.level]
    logging.basicConfig(format="%(name)s: %(message)s", handlers=[Handler()], level=threshold, force=True)
