"""The kernel's side of vhost for tests: answers the ioctls on one descriptor, and remembers what it was told."""

from __future__ import annotations

import errno
import os
from struct import pack_into, unpack_from

_SIZES = {0x00: 8, 0x01: 0, 0x03: 8, 0x10: 8, 0x11: 40, 0x12: 8, 0x20: 8, 0x21: 8, 0x60: 8, 0x61: 4}


class FakeVhost:
    """A vhost device behind `fd`, a descriptor that the one who is tested closes."""

    def __init__(self, features: int = (1 << 33) | (1 << 32) | (15 << 26) | (1 << 24) | 2) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.offered = features
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.features = 0
        self.regions: list[tuple[int, int, int]] = []
        self.queues: dict[int, dict[str, object]] = {}
        self.cid = 0
        self.running = False

    def ioctl(self, fd: int, number: int, data: bytearray) -> int:
        assert fd == self.fd
        assert number >> 8 & 0xFF == 0xAF
        command, size, direction = number & 0xFF, number >> 16 & 0x3FFF, number >> 30
        assert size == _SIZES[command]
        assert len(data) >= size
        name = self._name(command, direction)
        self.calls.append(name)
        if name in self.fail:
            raise OSError(self.fail[name], os.strerror(self.fail[name]))
        getattr(self, f"_{name}")(data)
        return 0

    @staticmethod
    def _name(command: int, direction: int) -> str:
        names = {
            (0x00, 2): "get_features", (0x00, 1): "set_features", (0x01, 0): "set_owner", (0x03, 1): "set_mem_table",
            (0x10, 1): "num", (0x11, 1): "addr", (0x12, 1): "set_base", (0x12, 3): "get_base", (0x20, 1): "kick",
            (0x21, 1): "call", (0x60, 1): "cid", (0x61, 1): "set_running",
        }  # fmt: skip
        return names[command, direction]

    def _get_features(self, data: bytearray) -> None:
        pack_into("<Q", data, 0, self.offered)

    def _set_features(self, data: bytearray) -> None:
        (self.features,) = unpack_from("<Q", data)

    def _set_owner(self, data: bytearray) -> None: ...

    def _set_mem_table(self, data: bytearray) -> None:
        (count,) = unpack_from("<Q", data)
        assert len(data) == 8 + 32 * count
        self.regions = [unpack_from("<QQQ", data, 8 + 32 * at) for at in range(count)]

    def _queue(self, data: bytearray) -> tuple[dict[str, object], int]:
        index, value = unpack_from("<Ii", data)
        return self.queues.setdefault(index, {}), value

    def _idle(self) -> None:
        if self.running:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _num(self, data: bytearray) -> None:
        self._idle()
        queue, queue["num"] = self._queue(data)[0], self._queue(data)[1]

    def _set_base(self, data: bytearray) -> None:
        self._idle()
        queue, queue["base"] = self._queue(data)[0], self._queue(data)[1]

    def _get_base(self, data: bytearray) -> None:
        pack_into("<I", data, 4, self._queue(data)[0]["base"])

    def _addr(self, data: bytearray) -> None:
        self._queue(data)[0]["addr"] = unpack_from("<QQQ", data, 8)

    def _kick(self, data: bytearray) -> None:
        queue, queue["kick"] = self._queue(data)[0], self._queue(data)[1]

    def _call(self, data: bytearray) -> None:
        queue, queue["call"] = self._queue(data)[0], self._queue(data)[1]

    def _cid(self, data: bytearray) -> None:
        (self.cid,) = unpack_from("<Q", data)

    def _set_running(self, data: bytearray) -> None:
        (running,) = unpack_from("<i", data)
        self.running = bool(running)
