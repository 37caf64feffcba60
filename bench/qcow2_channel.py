"""What the block channel costs over the bare system call: 4 KiB page-cache reads, one core, medians of 5.

Run: python bench/qcow2_channel.py
"""

from __future__ import annotations

import os
import select
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from block_qcow2 import open_disk

COUNT = 200_000
SIZE = 64 << 20


def microseconds(run: Callable[[int], None], count: int) -> float:
    """Median time of one of `count` operations over 5 runs, in µs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run(count)
        times.append((time.perf_counter() - start) / count * 1e6)
    return statistics.median(times)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "disk"
        path.write_bytes(os.urandom(SIZE))
        buffers = [memoryview(bytearray(4096))]
        fd = os.open(path, os.O_RDONLY)

        def bare(count: int) -> None:
            for i in range(count):
                os.preadv(fd, buffers, i % 16384 * 4096)

        base = microseconds(bare, COUNT)
        os.close(fd)
        print(f"os.preadv                        {base:6.2f} us")
        disk = open_disk(path)
        channel = disk.channel()

        def inline(count: int) -> None:
            for i in range(count):
                channel.readv(i % 16384 * 4096, buffers, i)

        cost = microseconds(inline, COUNT)
        print(f"Channel.readv inline, aio=off    {cost:6.2f} us  {cost / base:5.2f}x")
        disk.close()
        for aio, direct in (("threads", True), ("native", True), ("io_uring", True), ("io_uring", False)):
            disk = open_disk(path, aio=aio, direct=direct)
            if not direct:
                disk.channel()
            cost = microseconds(lambda count, disk=disk: queued(disk, count), 20_000)  # type: ignore[misc]
            print(f"depth 32, aio={aio}, direct={direct}".ljust(33) + f"{cost:6.2f} us  {cost / base:5.2f}x")
            disk.close()


def queued(disk: Any, count: int) -> None:
    """`count` reads with 32 in flight."""
    import mmap

    channel = disk.channel()
    memory = memoryview(mmap.mmap(-1, 32 * 4096))
    poll = select.poll()
    poll.register(channel.completion_fd, select.POLLIN)
    free = list(range(32))
    issued = done = 0
    while done < count:
        while free and issued < count:
            slot = free.pop()
            if channel.readv(issued * 7919 % 16384 * 4096, [memory[slot * 4096 : slot * 4096 + 4096]], slot) is not None:
                free.append(slot)
                done += 1
            issued += 1
        channel.submit()
        if channel.in_flight:
            poll.poll()
            for slot, result in channel.completions():
                assert result == 0
                free.append(slot)
                done += 1
    channel.close()


if __name__ == "__main__":
    main()
