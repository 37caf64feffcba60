"""File descriptors that clients passed with `getfd`, by name, until a device takes them.

Not here: receiving them (`client`).
"""

from __future__ import annotations

import contextlib
import os
import resource

from qmp_protocol.errors import GENERIC_ERROR, QmpError

# How many may wait. Names are used up one device at a time, and a device of many queues takes a tap and a vhost descriptor for
# each of its 16 pairs: this is room for eight of them at once. A client could else use up every descriptor of the process, and
# disks, new clients and modules need some; so it is no more than this part of what the process may open either, which can change.
_MOST = 256
_PART = 4


class DescriptorTable:
    """Named descriptors. What is in the table is open and belongs to it; `close` ends all."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._fds)

    def __contains__(self, name: str) -> bool:
        return name in self._fds

    def put(self, name: str, fd: int) -> None:
        """Own `fd` under `name` and close the one that had the name.

        Raises QmpError when there are too many; `fd` is closed then.
        """
        most = min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _PART)
        if name not in self._fds and len(self._fds) >= most:
            close_all((fd,))
            raise QmpError(GENERIC_ERROR, f"at most {most} descriptors can wait for a device")
        self.put_back(name, fd)

    def put_back(self, name: str, fd: int) -> None:
        """Own again what take() has handed over: there was room for it, whatever the process may open by now."""
        old = self._fds.get(name)
        self._fds[name] = fd
        if old is not None:
            close_all((old,))

    def take(self, name: str) -> int | None:
        """Hand over the descriptor called `name`, which is then the caller's to close; None when there is none."""
        return self._fds.pop(name, None)

    def close(self) -> None:
        """Close every descriptor."""
        close_all(tuple(self._fds.values()))
        self._fds.clear()


def close_all(fds: tuple[int, ...]) -> None:
    """Close descriptors that nobody wants.

    They are a client's: behind one may be a file whose last write fails only now (NFS, a full disk), which is not our error.
    """
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
