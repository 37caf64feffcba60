"""How much memory this process can still get before something is killed for it. Loaded only by who wants much at once.

Sources: proc_meminfo(5); Linux, Documentation/admin-guide/cgroup-v2.rst ("Memory") and cgroup-v1/memory.rst.

Not here: pools of huge pages, which have limits of their own, and address space, which is not memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple


class Room(NamedTuple):
    """So many bytes can be had, and who says so: "this host", or a cgroup."""

    size: int
    where: str


class _Controller(NamedTuple):
    """Where one version of the memory controller has its files, and what they are called."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    page_cache: tuple[str, ...]  # lines of memory.stat: what goes when it must


_V2 = _Controller(("", "unified"), "memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Controller(
    ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)  # fmt: skip


def room(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> Room | None:
    """Return the least of what the host and every memory cgroup around this process have left; None if nobody says.

    Generous where there is doubt: free swap counts everywhere, and page cache counts as free.
    """
    host = _numbers(f"{proc}/meminfo", ":")
    swap = host.get("SwapFree", 0) << 10
    found = [Room((host["MemAvailable"] << 10) + swap, "this host")] if "MemAvailable" in host else []
    found += [left._replace(size=left.size + swap) for left in _cgroups(proc, cgroups)]
    return min(found, default=None)


def _cgroups(proc: str, root: str) -> Iterator[Room]:
    """Go through the cgroups that this process is in, from its own to the outermost that is visible."""
    with suppress(OSError), open(f"{proc}/self/cgroup") as memberships:  # noqa: PTH123 - pathlib is not imported at a start
        for line in memberships:  # cgroups(7): hierarchy-ID:controller-list:cgroup-path
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            controller = _V1 if controllers else _V2
            while True:
                for mount in controller.mounts:
                    left = _left(controller, os.path.join(root, mount, path.strip("/")))  # noqa: PTH118
                    if left is not None:
                        yield Room(left, f"its cgroup {path}")
                if path.strip("/") == "":
                    break
                path = path.rpartition("/")[0] or "/"


def _left(controller: _Controller, folder: str) -> int | None:
    """Return how much a cgroup has left; None for one without a limit, or that is not there (or not visible in a container)."""
    with suppress(OSError, ValueError):
        with open(f"{folder}/{controller.limit}") as file:  # noqa: PTH123
            limit = int(file.read())  # "max" is no number
        with open(f"{folder}/{controller.usage}") as file:  # noqa: PTH123
            usage = int(file.read())
        kept = _numbers(f"{folder}/memory.stat", " ")
        return max(limit - usage + sum(kept.get(name, 0) for name in controller.page_cache), 0)
    return None


def _numbers(path: str, separator: str) -> dict[str, int]:
    """Read a file of lines `name<separator>number …`."""
    numbers = {}
    with suppress(OSError), open(path) as file:  # noqa: PTH123
        for line in file:
            name, _, rest = line.partition(separator)
            value = rest.split()
            if value and value[0].isdecimal():
                numbers[name] = int(value[0])
    return numbers
