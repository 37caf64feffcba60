"""Raw images: byte n of the disk is byte n of the file. A format without metadata, so all there is here is the channels."""

from __future__ import annotations

import threading
from typing import Any

from . import locks
from .disk import Channel
from .errors import OpenError
from .hostfile import HostFile
from .pool import WorkerPool

# As many blocking calls as one disk may have at the host: more never made a disk faster, and each holds a stack.
THREADS = 16
_DETECT_ZEROES = ("off", "on", "unmap")
ENGINES = ("off", "native", "io_uring", "threads")


def check_options(path: str, aio: str, detect_zeroes: str) -> None:
    """Refuse what no disk has."""
    if aio not in ENGINES:
        raise OpenError(f"{path}: aio={aio}: there is no such engine; there are: {', '.join(ENGINES)}")
    if detect_zeroes not in _DETECT_ZEROES:
        raise OpenError(f"{path}: detect_zeroes={detect_zeroes}: must be one of {', '.join(_DETECT_ZEROES)}")


class RawDisk:
    """`disk.Disk` over one raw file or block device."""

    def __init__(
        self,
        file: HostFile,
        *,
        aio: str = "off",
        discard: bool = False,
        detect_zeroes: str = "off",
        any_size: bool = False,
    ) -> None:
        if file.size % file.alignment and not any_size:
            raise OpenError(f"{file.path}: the size of the raw file, {file.size}, is not aligned to {file.alignment}")
        self.file = file
        self.path = file.path
        self.size = file.size
        self.read_only = file.read_only
        self.request_alignment = file.alignment
        self.discard = discard
        self.detect_zeroes = detect_zeroes
        self._aio = aio
        self._pool = WorkerPool(THREADS, "block-io")
        self._channels: set[Any] = set()
        self._lock = threading.Lock()

    def channel(self) -> Channel:
        """A new channel for one I/O thread. EngineError where the host does not offer the disk's engine."""
        channel: Any
        if self._aio == "native":
            from .engines.native import NativeChannel

            channel = NativeChannel(self, self._pool)
        elif self._aio == "io_uring":
            from .engines.uring import UringChannel

            channel = UringChannel(self, self._pool)
        else:
            from .engines.threads import ThreadChannel

            channel = ThreadChannel(self, self._pool, inline=self._aio == "off")
        with self._lock:
            self._channels.add(channel)
        return channel  # type: ignore[no-any-return]

    def forget(self, channel: Any) -> None:
        with self._lock:
            self._channels.discard(channel)

    def lock(self) -> None:
        locks.lock(self.file.fd, self.path, write=not self.read_only)

    def unlock(self) -> None:
        locks.unlock(self.file.fd)

    def flush(self) -> None:
        if not self.read_only:
            self.file.flush()

    def drain(self) -> None:
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.drain()

    def close(self) -> None:
        self.close_channels()
        self.file.close()

    def close_channels(self) -> None:
        """End the channels and the threads; the file stays open."""
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.close()
        self._pool.close()
