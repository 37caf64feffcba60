"""The memory balloon device (virtio 1.2, section 5.5): guest pages that the guest does without go back to the host.

Beside the specification's inflate, deflate, statistics and free page reporting, StratoVirt's private message queue (reference
virtio, section 9), by which a guest driver of its own sizes the balloon itself.

Pages of huge-page RAM are taken note of and not given back (`GuestMemory.discard`); pages that were allocated in advance are, and
come back one by one. Deflating needs no work: a page is there again when the guest touches it. Free page hints and page poison
are not offered. Not here: what a client may ask for in bytes and how it is told of changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

from virtio_devices.balloon.pages import PAGE_SHIFT, in_ram, page_numbers, runs
from virtio_devices.balloon.statistics import read_statistics
from virtio_devices.device import VirtioDevice
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import Loop, Timer
from vmm_core.state import expect, expect_range, versioned

QUEUE_SIZE = 256

# Feature bits (5.5.3)
F_STATS_VQ = 1 << 1
F_DEFLATE_ON_OOM = 1 << 2
F_REPORTING = 1 << 5
F_MESSAGE_VQ = 1 << 16  # StratoVirt's

NUM_PAGES, ACTUAL = 0, 4  # offsets in configuration space (5.5.4), 32 bits each
_U32 = Struct("<I")
_AUTO_CONFIG = Struct("<IIII")  # at offset 8: two reserved words, membuf-percent, monitor-interval
_MESSAGE = Struct("<HQ")  # packed: tag, pages

# Linux sends 256 page numbers a request, Windows 1,024. One request of a ring full of long buffers could keep the loop for hours.
_MAX_REQUEST = 4 * 16384  # bytes of page numbers
_TURN = 16384  # page numbers, or free ranges, before other descriptors of the loop have their turn
_CHANGE_DELAY = 1_000_000_000  # ns; many changes are one event (reference qmp, section 11)


@versioned(1)
class BalloonState(NamedTuple):
    """What a balloon knows beyond its transport's registers, in pages of 4 KiB."""

    num_pages: int
    actual: int
    changed: bool  # and nobody was told yet


class AutoBalloon(NamedTuple):
    """What the guest's own driver is told about sizing the balloon."""

    membuf_percent: int
    monitor_interval: int  # seconds


class BalloonDevice(VirtioDevice):
    """A virtio memory balloon. Its target comes from `set_target`, on any thread."""

    device_type = 5

    def __init__(
        self,
        name: str,
        loop: Loop,
        memory: GuestMemory,
        *,
        deflate_on_oom: bool = False,
        reporting: bool = False,
        statistics_interval: int = 0,
        auto: AutoBalloon | None = None,
        on_change: Callable[[], None] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Make a balloon for `memory`.

        `statistics_interval` asks the guest for statistics every so many seconds; 0 never does, and offers no queue for them.
        `on_change` is called on the loop, at most once a second, after the guest changed what it holds; `report` hears once of a
        host that does not take pages back.
        """
        options = (
            (F_DEFLATE_ON_OOM, deflate_on_oom),
            (F_STATS_VQ, statistics_interval > 0),
            (F_REPORTING, reporting),
            (F_MESSAGE_VQ, auto is not None),
        )
        features = sum(feature for feature, wanted in options if wanted)
        config = bytes(8) if auto is None else bytes(8) + _AUTO_CONFIG.pack(0, 0, *auto)
        super().__init__(name, [loop], features=features, queue_sizes=[QUEUE_SIZE] * len(_roles(features)), config=config)
        self.ram_pages = memory.size >> PAGE_SHIFT
        self.statistics: dict[str, int] = {}  # of the last time; replaced as one
        self.statistics_time = 0  # when that was, in seconds since 1970; 0 for never
        self._loop = loop
        self._memory = memory
        self._interval = statistics_interval * 1_000_000_000
        self._auto = auto is not None
        self.on_change = on_change
        self._report = report
        self._refused = False
        self._counted = dict.fromkeys(("inflated_pages", "deflated_pages", "reported_bytes", "returned_bytes"), 0)
        self._handlers: list[Callable[[int, SplitQueue], None]] = []
        self._change_timer: Timer | None = None
        self._change_noted = False  # the loop is about to hear of it
        self._statistics_timer: Timer | None = None
        self._statistics_buffer: int | None = None  # head of the driver's buffer, which is given back to ask for new values

    # What clients ask, on any thread

    def counters(self) -> dict[str, int]:
        """Return pages that were named, bytes that were reported free, and how much of both the host took back."""
        return dict(self._counted)

    @property
    def ready(self) -> bool:
        """Whether a driver listens."""
        return self.active and not self.broken

    @property
    def target(self) -> int:
        """How many pages the guest is asked to hold in the balloon."""
        return self.read_config(NUM_PAGES, 4)

    @property
    def held(self) -> int:
        """How many pages the guest says are in the balloon; never more than there are, whatever it says."""
        return min(self.read_config(ACTUAL, 4), self.ram_pages)

    def set_target(self, pages: int) -> None:
        """Ask the guest to hold so many pages, at most all. Kept for a driver that comes later."""
        self._set_config(NUM_PAGES, _U32.pack(max(0, min(pages, self.ram_pages))))

    # Configuration space and life

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take the driver's `actual`; nothing else is its to write (5.5.4)."""
        if offset == ACTUAL and size == 4 and value != self.read_config(ACTUAL, 4):
            self._patch_config(ACTUAL, _U32.pack(value & 0xFFFF_FFFF))
            self._note_change()

    def reset(self) -> None:
        """Forget the driver, and with it what it held: a driver that starts again has nothing in its balloon."""
        with self._lock:
            was_active = self.active
            super().reset()
            if was_active:
                if self.read_config(ACTUAL, 4):
                    self._patch_config(ACTUAL, bytes(4))
                    self._note_change()
                if self._auto:  # the target was the driver's own; a client's stays for the next one
                    self._patch_config(NUM_PAGES, bytes(4))

    def stop_queue(self, index: int) -> None:
        """Stop using one queue, and go on with the others: statistics came to rest with it."""
        with self._lock:
            super().stop_queue(index)
            if self._running:
                for other, queue in enumerate(self.queues):
                    if queue is not None:
                        self._kick_later(other)

    def close(self) -> None:
        """Reset, and tell nobody anything any more."""
        self.on_change = None
        super().close()
        self._loop.run(self._forget_change)

    def save(self) -> BalloonState:
        """Return target and size, and whether a change is still to be told."""
        return BalloonState(
            self.read_config(NUM_PAGES, 4), self.read_config(ACTUAL, 4), self._loop.run(lambda: self._change_timer is not None)
        )

    def restore(self, state: Any) -> None:
        """Put both back."""
        saved = expect(state, BalloonState, self.name)
        expect_range(saved.num_pages, 0, self.ram_pages, f"{self.name}: num_pages")
        expect_range(saved.actual, 0, 0xFFFF_FFFF, f"{self.name}: actual")
        if not isinstance(saved.changed, bool):
            raise StateError(f"{self.name}: changed: {saved.changed!r}")
        self._patch_config(NUM_PAGES, _U32.pack(saved.num_pages) + _U32.pack(saved.actual))
        self._loop.run(self._tell_later if saved.changed else self._forget_change)

    def _start(self) -> None:
        # Queues are numbered without gaps by what was negotiated: a driver knows no queue of a feature that it did not take.
        handlers = {
            "inflate": self._inflate,
            "deflate": self._deflate,
            "statistics": self._take_statistics,
            "reporting": self._take_report,
            "message": self._take_message,
        }
        self._handlers = [handlers[role] for role in _roles(self.negotiated)]

    def _process(self, index: int, queue: SplitQueue) -> None:
        if index < len(self._handlers):
            self._handlers[index](index, queue)
        elif queue.pending:
            raise QueueError("this queue exists with a feature that was not negotiated")

    def _drain(self, loop: Loop) -> None:
        # The driver's buffer goes back into the ring, and is read again after a pause or by another process.
        if self._statistics_timer is not None:
            self._statistics_timer.cancel()
            self._statistics_timer = None
        if self._statistics_buffer is not None:
            self._statistics_buffer = None
            queue = self.queues[_roles(self.negotiated).index("statistics")]
            if queue is not None:
                queue.put_back()

    # Queues, on the loop

    def _inflate(self, index: int, queue: SplitQueue) -> None:
        pages: list[int] = []
        heads = []
        budget = 4 * _TURN
        for head, readable, _ in queue.chains():
            if not readable:
                raise QueueError("a request without page numbers")
            if (length := sum(map(len, readable))) > _MAX_REQUEST:
                raise QueueError(f"a request of more than {_MAX_REQUEST // 4} page numbers")
            pages += page_numbers(b"".join(readable))
            heads.append(head)
            self._counted["inflated_pages"] += length // 4
            budget -= length
            if budget <= 0:
                self._kick_later(index)
                break
        for address, length in in_ram(runs(sorted(set(pages))), self._memory.regions):
            self._discard(self._memory.view(address, length))
        for head in heads:
            queue.add_used(head, 0)
        self._used(index, queue)

    def _deflate(self, index: int, queue: SplitQueue) -> None:
        for head, readable, _ in queue.chains():
            if not readable:
                raise QueueError("a request without page numbers")
            queue.add_used(head, 0)
            self._counted["deflated_pages"] += sum(map(len, readable)) // 4
        self._used(index, queue)

    def _take_report(self, index: int, queue: SplitQueue) -> None:
        budget = _TURN
        for head, _, writable in queue.chains():
            if not writable:
                raise QueueError("a report without free pages")
            for view in writable:
                self._discard(view)
            queue.add_used(head, sum(map(len, writable)))
            self._counted["reported_bytes"] += sum(map(len, writable))
            budget -= len(writable) + sum(map(len, writable)) // (1 << 20)
            if budget <= 0:
                self._kick_later(index)
                break
        self._used(index, queue)

    def _take_statistics(self, index: int, queue: SplitQueue) -> None:
        for head, readable, _ in queue.chains():
            if not readable:
                raise QueueError("a buffer without statistics")
            if self._statistics_buffer is not None:  # 5.5.6.3: there is one buffer; who has more gets the older one back
                queue.add_used(self._statistics_buffer, 0)
            self._statistics_buffer = head
            self.statistics, self.statistics_time = read_statistics(readable), int(time.time())
        self._used(index, queue)
        if self._statistics_buffer is not None and self._statistics_timer is None:
            self._statistics_timer = self._loop.call_later(self._interval, lambda: self._ask(index))

    def _ask(self, index: int) -> None:
        """Have the driver fill its buffer again (5.5.6.3)."""
        self._statistics_timer = None

        def give_back(index: int, queue: SplitQueue) -> None:
            head, self._statistics_buffer = self._statistics_buffer, None
            if head is not None:
                queue.add_used(head, 0)
                self._used(index, queue)

        self._guarded(index, give_back)

    def _take_message(self, index: int, queue: SplitQueue) -> None:
        target = None
        for head, readable, _ in queue.chains():
            if not readable:
                raise QueueError("an empty message")
            for view in readable:
                if len(view) < _MESSAGE.size:
                    raise QueueError(f"a message of {len(view)} bytes")
                _, target = _MESSAGE.unpack_from(view)
            queue.add_used(head, 0)
        self._used(index, queue)
        if target is not None:
            self.set_target(target)

    def _discard(self, view: memoryview) -> None:
        try:
            self._counted["returned_bytes"] += self._memory.discard(view)
        except OSError as error:
            # The guest has its way all the same; what it gave up is only not free for others.
            if not self._refused and self._report:
                self._report(f"{self.name}: the host does not take pages back: {error.strerror}")
            self._refused = True

    # Telling of changes

    def _note_change(self) -> None:
        """Have the loop tell of a change. On any thread; a driver may write faster than the loop gets to hear of it."""
        if not self._change_noted:
            self._change_noted = True
            self._loop.call_soon(self._tell_later)

    def _tell_later(self) -> None:
        self._change_noted = False
        if self._change_timer is None and self.on_change is not None:
            self._change_timer = self._loop.call_later(_CHANGE_DELAY, self._tell)

    def _tell(self) -> None:
        self._change_timer = None
        if (on_change := self.on_change) is not None:  # close() takes it away
            on_change()

    def _forget_change(self) -> None:
        if self._change_timer is not None:
            self._change_timer.cancel()
            self._change_timer = None


def _roles(features: int) -> list[str]:
    """Return what each queue is for, in order (5.5.2; the message queue is last in the reference)."""
    roles = ["inflate", "deflate"]
    roles += ["statistics"] if features & F_STATS_VQ else []
    roles += ["reporting"] if features & F_REPORTING else []
    roles += ["message"] if features & F_MESSAGE_VQ else []
    return roles
