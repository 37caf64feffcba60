"""What a guest tells about its memory (virtio 1.2, section 5.5.6.3).

Not here: when it is asked.
"""

from __future__ import annotations

from struct import Struct

_STAT = Struct("<HQ")  # virtio_balloon_stat, packed: tag, value

# 5.5.6.4, and what later versions added; the names are those that QEMU's clients know (`guest-stats`).
NAMES = (
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
    "stat-oom-kills",
    "stat-alloc-stalls",
    "stat-async-scans",
    "stat-direct-scans",
    "stat-async-reclaims",
    "stat-direct-reclaims",
)
MAX_BYTES = 64 * _STAT.size  # of a buffer; what is beyond is not looked at


def read_statistics(views: list[memoryview]) -> dict[str, int]:
    """Return the values in a driver's buffer by name. Tags that are unknown are passed over (5.5.6.3.1), as is a cut-off one."""
    data = b""
    for view in views:
        data += view[: MAX_BYTES - len(data)]
        if len(data) >= MAX_BYTES:
            break
    found = {}
    for at in range(0, len(data) - _STAT.size + 1, _STAT.size):
        tag, value = _STAT.unpack_from(data, at)
        if tag < len(NAMES):
            found[NAMES[tag]] = value
    return found
