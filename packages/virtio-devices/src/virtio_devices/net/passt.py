"""Network without privileges: the program passt, which translates a guest's frames into sockets of the host.

It is started with one end of a socket pair and ends when the other end is closed, also by a VMM that is killed: there is no path,
no file and no process that could be left behind.

Not here: the stream between the two (`stream`).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from socket import AF_UNIX, SOCK_STREAM, socketpair
from struct import pack, unpack

from virtio_devices.device import DeviceError
from virtio_devices.net.stream import FRAME_MAX, StreamBackend

PROGRAM = "passt"
START_LIMIT = 60.0  # seconds; it takes 0.02, and a host where everything is emulated a thousand times that
_END_LIMIT = 2.0  # seconds between the end of the stream and the end of the process
_OBITUARY_LIMIT = 0.2  # the same where other devices wait meanwhile
_FD = 3  # the child's end of the stream
_TEXT_MAX = 1 << 16

# What every start says that is no error: it looks for a system log, and gives up root's rights.
_CHATTER = ("Failed to send ", "Don't run as root")

# A question that it answers once it works: who has this address? (RFC 826; the addresses are link-local, the sender's nobody's)
_SENDER = bytes.fromhex("0200a9fe0707")
_ARP = b"\xff" * 6 + _SENDER + pack(">HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + _SENDER + bytes([169, 254, 7, 7]) + bytes(6)
_ARP += bytes([169, 254, 254, 254])


class PasstBackend(StreamBackend):
    """A stream to a passt process, which lives as long as this does."""

    def __init__(self, name: str, program: str = PROGRAM, arguments: Sequence[str] = ()) -> None:
        """Start `program` with `arguments` of its own, and wait until it works. Raises DeviceError with its last words."""
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        self._pid = self._errors = -1
        self._status: int | None = None  # of the process that has ended, as waitpid() has it
        self._said_last = ""
        try:
            super().__init__(name, ours)
            with theirs:
                self._spawn(program, arguments, theirs.fileno())
            self._wait()
        except BaseException:
            self.close()
            raise

    def _spawn(self, program: str, arguments: Sequence[str], stream: int) -> None:
        self._errors, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # what is too much for the pipe is lost, and blocks nobody
        try:
            self._pid = os.posix_spawnp(
                program,
                [program, "--foreground", "--quiet", "--fd", str(_FD), *arguments],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, write, 2),
                    (os.POSIX_SPAWN_DUP2, stream, _FD),
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                    (os.POSIX_SPAWN_DUP2, 0, 1),
                    *((os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd > _FD),
                ],
                setpgroup=0,  # the interrupt key of our terminal is for us
                setsigmask=[],
                setsigdef=[signal.SIGPIPE],
            )
        except FileNotFoundError:
            raise DeviceError(f"{self.name}: {program}: not found; -netdev user needs the program passt") from None
        except OSError as error:
            raise DeviceError(f"{self.name}: {program}: {error.strerror}") from None
        finally:
            os.close(write)

    def _wait(self) -> None:
        """Return once it answers. Until then the guest's first frames could get lost, and a mistake would go unseen."""
        with suppress(OSError):  # it is at its end already, as recv() will tell
            self._stream.send(pack(">I", len(_ARP)) + _ARP)
        deadline = time.monotonic() + START_LIMIT
        (length,) = unpack(">I", self._read(4, deadline))
        self._read(min(length, FRAME_MAX), deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        poll = select.poll()
        poll.register(self._stream.fileno(), select.POLLIN)
        data = b""
        while len(data) < count:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise DeviceError(f"{self.name}: passt does not answer within {START_LIMIT:g} s")
            try:
                part = self._stream.recv(count - len(data))
            except BlockingIOError:
                continue
            except ConnectionResetError:
                part = b""
            if not part:
                raise DeviceError(f"{self.name}: {self.obituary()}")
            data += part
        return data

    def obituary(self) -> str:
        """Return how it ended, in its own words. The same however often somebody asks."""
        status = self._reap(_OBITUARY_LIMIT)
        how = "does not talk any more" if status is None else f"ended with {_words(status)}"
        self._said_last = self._said() or self._said_last
        return f"passt {how}: {self._said_last}" if self._said_last else f"passt {how}"

    def close(self) -> None:
        """Close the stream and see the process end."""
        super().close()
        if self._pid > 0 and self._reap(_END_LIMIT) is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        self._pid = -1
        errors, self._errors = self._errors, -1
        if errors >= 0:
            os.close(errors)

    def _reap(self, limit: float) -> int | None:
        """Wait up to `limit` seconds for its end; return its status, None while it runs on."""
        if self._pid <= 0:
            return self._status
        flags = 0
        try:
            pidfd = os.pidfd_open(self._pid)
        except OSError:  # no descriptor left, which is no reason to leave a process behind: see where it is by now
            flags = os.WNOHANG
        else:
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(limit * 1000):
                    return None
            finally:
                os.close(pidfd)
        pid, status = os.waitpid(self._pid, flags)
        if not pid:
            return None
        self._pid, self._status = -1, status
        return status

    def _said(self) -> str:
        try:
            text = os.read(self._errors, _TEXT_MAX).decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(_CHATTER)]
        return "; ".join(lines[:2])


def _inheritable() -> list[int]:
    """Return the descriptors that a child would get: those that whoever started us meant for us, such as taps."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        with suppress(OSError):  # the listing's own is gone by now
            if os.get_inheritable(int(name)):
                found.append(int(name))
    return found


def _words(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"status {code}" if code >= 0 else f"signal {-code}"
