"""What tests of the server look at from outside: an answer, open descriptors, clients that are still there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import anyio

from qmp_server import QmpServer

STATUS = {"return": {"running": True, "singlestep": False, "status": "running"}}


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds. Raises TimeoutError when it never does."""
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.005)


def open_files(*, settle: bool = False) -> int:
    """How many descriptors this process has; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def left_alone(server: QmpServer, but: int = 0) -> None:
    """Return when at most `but` clients are left."""
    with anyio.fail_after(30):
        while len(server._clients) > but:
            await anyio.sleep(0.01)
