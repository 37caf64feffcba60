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
    """What devices and block back ends need of an I/O thread. `threads.IoThread` is the implementation."""

    @property
    def name(self) -> str: ...

    def add_fd(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Watch `fd` (level-triggered). `callback` gets the epoll event mask. One watch per descriptor. From any thread."""
        ...

    def modify_fd(self, fd: int, events: int) -> None:
        """Change what is watched; 0 watches nothing but errors and hang-ups."""
        ...

    def remove_fd(self, fd: int) -> None:
        """Stop watching. When this returns on another thread, the callback is not running and will not run again."""
        ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread. From any thread; returns at once."""
        ...

    def call_later(self, delay_ns: int, callback: Callable[[], None]) -> Timer:
        """Run `callback` on the loop's thread after `delay_ns` of the machine's clock. From any thread."""
        ...

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread and return its result, or raise what it raised. Direct when already there."""
        ...
