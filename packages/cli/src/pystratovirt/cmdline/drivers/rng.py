"""The entropy device."""

from __future__ import annotations

from ..declare import key
from ..errors import BadKey
from ..values import Integer, Reference
from .base import IOTHREAD, Device

U64_MAX = (1 << 64) - 1


class VirtioRng(Device, selector="virtio-rng-device"):
    """A source of random numbers."""

    rng: str = key(Reference("rng-random"), doc="the -object rng-random it reads")
    max_bytes: int | None = key(Integer(1, U64_MAX), default=None, doc="bytes in a period; with period")
    period: int | None = key(Integer(1, U64_MAX), default=None, doc="milliseconds; with max-bytes")
    iothread: str | None = key(IOTHREAD, default=None, doc="the I/O thread that serves it", note="not in StratoVirt")

    def check(self) -> None:
        if (self.max_bytes is None) != (self.period is None):
            given, other = ("period", "max-bytes") if self.max_bytes is None else ("max-bytes", "period")
            raise BadKey(f"{given}={getattr(self, given.replace('-', '_'))}", f"needs {other} too")
        rate = self.rate
        if rate is not None and not 64 <= rate <= 1_000_000_000:
            raise BadKey(f"max-bytes={self.max_bytes}", f"{rate} bytes per second; must be 64 to 1000000000")

    @property
    def rate(self) -> int | None:
        """Bytes per second, or None for unlimited."""
        return self.max_bytes * 1000 // self.period if self.max_bytes is not None and self.period else None
