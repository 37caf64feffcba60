"""The entropy device (virtio 1.2, section 5.4): random bytes from a character device of the host, read into guest memory.

Not here: randomness of its own. What the source does not give, the guest does not get; its request waits.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from virtio_devices.device import DeviceError, VirtioDevice
from virtio_devices.limit import LeakyBucket
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.loop import Loop, Timer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_core.clock import Clock

QUEUE_SIZE = 256
RATE_MIN, RATE_MAX = 64, 1_000_000_000  # bytes a second (reference virtio, section 10)

_READ_MAX = 1 << 20  # bytes of one request, and of one turn of the loop
_EMPTY_NS = 10_000_000  # how long a source that has nothing right now is left alone
_FAILED_NS = 1_000_000_000  # and one that fails


def open_source(path: str) -> int:
    """Open a source of random bytes. Raises DeviceError unless `path` is a character device that can be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DeviceError(f"The path of random file {path} is not existed") from None
    except OSError as error:
        raise DeviceError(f"random file {path}: {error.strerror}") from None
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        os.close(fd)
        raise DeviceError(f"The type of random file {path} is not a character special file")
    return fd


class RngDevice(VirtioDevice):
    """A virtio entropy device."""

    device_type = 4

    def __init__(
        self, name: str, loop: Loop, clock: Clock, source: int, *, rate: int = 0, report: Callable[[str], None] | None = None
    ) -> None:
        """Serve from the descriptor `source`, which the device owns from here on; it must not block.

        `rate` limits to that many bytes a second, RATE_MIN to RATE_MAX; 0 is no limit. `report` hears of a failing source.

        Raises ValueError when the rate is out of range.
        """
        if rate and not RATE_MIN <= rate <= RATE_MAX:
            raise ValueError("The bytes per second of rng device must >= 64 and <= 1000000000.")
        super().__init__(name, [loop], features=0, queue_sizes=[QUEUE_SIZE])
        self._loop = loop
        self._source = source
        self._bucket = LeakyBucket(clock, rate) if rate else None
        # A request for more than a second's worth would let the bucket overflow at once, and then wait for hours.
        self._request_max = min(_READ_MAX, rate) if rate else _READ_MAX
        self._report = report
        self._failing = False
        self._timer: Timer | None = None
        self._requests = self._bytes = self._delays = 0

    def counters(self) -> dict[str, int]:
        """Return how many requests got how many bytes, and how often one had to wait for the limit or the source."""
        return {"requests": self._requests, "bytes": self._bytes, "delays": self._delays}

    def close(self) -> None:
        """Reset, and close the source."""
        super().close()
        source, self._source = self._source, -1
        if source >= 0:
            os.close(source)

    def _process(self, index: int, queue: SplitQueue) -> None:
        if self._timer is not None:
            return
        budget = _READ_MAX
        for head, _, writable in queue.chains():
            if not writable:
                raise QueueError("a request without room for random bytes")
            views = _cut(writable, self._request_max)
            # What comes is paid for when it has come: a source may give less than was asked for, or nothing.
            if self._bucket is not None and (delay := self._bucket.take(0)):
                self._wait(queue, delay)
                break
            written = self._read(views)
            if not written:
                self._wait(queue, _FAILED_NS if self._failing else _EMPTY_NS, host=True)
                break
            if self._bucket is not None:
                self._bucket.charge(written)
            queue.add_used(head, written)
            self._requests += 1
            self._bytes += written
            budget -= written
            if budget <= 0:
                self._kick_later(index)
                break
        self._used(index, queue)

    def _read(self, views: list[memoryview]) -> int:
        """Read random bytes into `views` and return how many; 0 when there are none now."""
        try:
            written = os.readv(self._source, views)
        except BlockingIOError:
            return 0
        except OSError as error:
            written, reason = 0, error.strerror
        else:
            reason = "end of file"
        if not written and not self._failing and self._report:
            self._report(f"{self.name}: no random bytes from the source: {reason}")
        self._failing = not written
        return written

    def _wait(self, queue: SplitQueue, delay: int, *, host: bool = False) -> None:
        """Leave the request in the ring, and come back after `delay` nanoseconds of the machine's time or the host's."""
        queue.put_back()
        self._delays += 1

        def again() -> None:
            self._timer = None
            self._guarded(0, self._process)

        self._timer = self._loop.call_later(delay, again, host=host)

    def _drain(self, loop: Loop) -> None:
        """Nothing is ever under way between two turns of the loop."""

    def _stop(self) -> None:
        def forget() -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        self._loop.run(forget)


def _cut(views: list[memoryview], limit: int) -> list[memoryview]:
    """Return the first `limit` bytes of `views`."""
    length = 0
    for at, view in enumerate(views):
        length += len(view)
        if length >= limit:
            return [*views[:at], view[: len(view) - (length - limit)]]
    return views
