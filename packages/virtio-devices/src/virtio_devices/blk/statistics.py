"""What a block device counts."""

from __future__ import annotations

from typing import NamedTuple


class Statistics(NamedTuple):
    """Requests that went to the disk since it was put in, and bytes of their data."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0  # that the driver asked for
    discards: int = 0
    zeroes: int = 0  # write-zeroes requests
    failed: int = 0  # of any kind, and those that could not go to the disk


READS, READ_BYTES, WRITES, WRITTEN_BYTES, FLUSHES, DISCARDS, ZEROES, FAILED = range(len(Statistics._fields))
