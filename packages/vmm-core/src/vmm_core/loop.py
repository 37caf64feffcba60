"""I/O threads: one epoll loop a thread, owning the queues and descriptors assigned to it.

The data path lives here: kicks arrive as readable event descriptors, completions leave through irqfds, and neither the main
thread nor a vCPU takes part. Everything registered on a loop is called on its thread, one callback at a time.

Not here: QMP, signals and life cycle, which belong to the main thread's event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")

READ, WRITE = 1, 4  # EPOLLIN, EPOLLOUT


class Timer(Protocol):
    """A callback that is due once."""

    def cancel(self) -> None:
        """Forget the callback. Harmless after it ran, and twice."""
        ...


class Loop(Protocol):
    """What devices and block back ends need of an I/O thread.

    `threads.IoThread` is the implementation; `directloop.DirectLoop` is one without a thread."""

    @property
    def name(self) -> str: ...

    def add_fd(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Watch `fd` (level-triggered). `callback` gets the epoll event mask. One watch per descriptor. From any thread.

        Raises PermissionError for what epoll cannot watch (regular files), ValueError for a second watch.
        """
        ...

    def modify_fd(self, fd: int, events: int) -> None:
        """Change what is watched; 0 watches nothing but errors and hang-ups. ValueError when `fd` is not watched."""
        ...

    def remove_fd(self, fd: int) -> None:
        """Stop watching. When this returns on another thread, the callback is not running and will not run again.

        Harmless when `fd` is not watched. Hold no lock that the callback takes.
        """
        ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread. From any thread; returns at once."""
        ...

    def call_later(self, delay_ns: int, callback: Callable[[], None], *, host: bool = False) -> Timer:
        """Run `callback` on the loop's thread after `delay_ns` of the machine's clock. From any thread.

        `host` counts the host's time instead, for what the guest cannot see (batching of output, a peer that is away): it
        passes in test mode and while the machine's clock stands still.
        """
        ...

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread and return its result, or raise what it raised. Direct when already there.

        Works while the loop is quiesced, and directly on a loop that does not run: it is how an owner gets at what the loop
        owns. Two loops that run() on each other at once wait for ever.
        """
        ...
