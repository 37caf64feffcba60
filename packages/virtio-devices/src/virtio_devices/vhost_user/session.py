"""A back end over its whole life: found, served by, lost, found again. One thread a device talks to it, and nobody else.

The device says what should be: which rings run, which are enabled, what the driver wrote. The thread makes it so whenever there
is a back end, and waits for one while there is none; the guest's requests wait in their rings meanwhile. So neither a vCPU nor
the main loop waits for another process, except where guest memory must be at rest when a method returns: stop(), stop_ring() and
close() take no longer than the limits below.

Not here: the messages (`frontend`), and what the device is (`device` and its subclasses).
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from virtio_devices.device import DeviceError
from virtio_devices.vhost_user.connection import Connection
from virtio_devices.vhost_user.frontend import FrontEnd, Inflight, MemoryNotShared, Ring, memory_regions
from virtio_devices.vhost_user.ledger import Ledger, answered_in_order
from virtio_devices.vhost_user.protocol import P_INFLIGHT_SHMFD, BackEndError, Refused
from vmm_core.errors import VmmError
from vmm_core.guestmem import GuestMemory
from vmm_core.threads import name_thread

T = TypeVar("T")

REPLY_LIMIT = 5.0  # seconds that a back end has for one step: to introduce itself, to take rings, to give them back
SETTLE_LIMIT = 5.0  # seconds that requests under way have to come back before a ring is stopped
RETRY_FIRST, RETRY_MAX = 0.1, 3.0  # seconds between attempts to connect: doubled from the first to the last
_STEADY = 1.0  # a back end that was there for so long is looked for at once when it goes
_QUIET = 0.02  # seconds between two looks at what a back end says by itself: it cannot keep the processor busy with it


class Owner(Protocol):
    """The device, as its session sees it. Called on the session's thread; must not wait for the session."""

    def config_read(self, config: bytes) -> None:
        """Take the configuration space, which may have changed."""
        ...

    def used(self, index: int) -> None:
        """Interrupt the driver for queue `index`, whose call descriptor is the device's own. With ledgers only."""
        ...

    def unusable(self, reason: str) -> None:
        """Give up on this driver until it resets the device."""
        ...

    def report(self, text: str) -> None:
        """Tell people."""
        ...


class Job:
    """What a back end is to do for a driver: its negotiated features and its rings."""

    def __init__(self, features: int, rings: Sequence[Ring], *, queues: int, queue_size: int, ledgers: bool) -> None:
        """`queues` of `queue_size` is what a record of requests must have room for; `ledgers` asks for one of our own."""
        self.features, self.rings = features, list(rings)
        self.queues, self.queue_size = queues, queue_size
        self.ledgers = ledgers


class _Call:
    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.result: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()

    def execute(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # raised where it was called
            self.error = error
        self.done.set()


class Session:
    """The thread and what it knows. Methods may be called from any thread, one life-cycle method at a time."""

    def __init__(
        self,
        name: str,
        path: str,
        memory: GuestMemory,
        *,
        config_size: int = 0,
        settles: bool = False,
        reply_limit: float = REPLY_LIMIT,
        retry: float | None = None,
    ) -> None:
        """Connect to the socket at `path` and learn what is there. start() begins the thread.

        `settles` says that the device answers every request in its own time, so that stopping can wait for it. `retry` is a fixed
        number of seconds between attempts to connect.

        Raises DeviceError when nobody is there or cannot be used, or when guest memory cannot be shared.
        """
        self.name, self.path = name, path
        self._memory = memory
        self._config_size = config_size
        self._settles = settles
        self._reply_limit = reply_limit
        self._retry_first, self._retry_max = (RETRY_FIRST, RETRY_MAX) if retry is None else (retry, retry)
        self._keeps_record: bool | None = None  # as the first back end does; None: there was none
        self.found = 0  # how often a back end was there and could be used
        self._front: FrontEnd | None = None
        self._job: Job | None = None
        self._running = False  # the rings of the job are with the back end
        self._ledgers: dict[int, Ledger] = {}  # by ring index
        self._inflight: Inflight | None = None
        self._enabled: dict[int, bool] = {}  # what is to change; by ring index
        # What the driver wrote to the configuration space, by offset: it holds for each back end that comes.
        self._writes: dict[int, bytes] = {}
        self._unsaid: set[int] = set()  # offsets of what the back end has not heard of yet
        self._lock = threading.Lock()  # guards the three above
        self._calls: deque[_Call] = deque()
        self._ending = False
        self._delay = 0.0
        self._next_try = 0.0  # time.monotonic()
        self._since = 0.0
        self._told = ""  # the last reason why there is no back end that people were told
        self._listen_from = 0.0  # when what the back end says by itself is looked at again
        self._thread: threading.Thread | None = None
        self._event = self._err = -1
        try:
            memory_regions(memory)
            self._connect()
            self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except (OSError, BackEndError, MemoryNotShared) as error:
            self._release()
            reason = f"cannot connect to {path}: {error.strerror}" if isinstance(error, OSError) else str(error)
            if isinstance(error, BackEndError):
                reason = f"the back end at {path} {reason}"
            raise DeviceError(f"{name}: {reason}") from None

    def start(self, owner: Owner) -> None:
        """Begin to look after the back end, for `owner`.

        Raises DeviceError when the system gives no thread for it; the session is closed then.
        """
        self._owner = owner
        thread = threading.Thread(target=self._main, name=f"vu-{self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system's limit of threads
            self._release()
            raise DeviceError(f"{self.name}: {error}") from None
        self._thread = thread

    @property
    def features(self) -> int:
        """The features that the back end offers, of the device and of the protocol. Of the one found first, for good."""
        return self._features

    @property
    def queues(self) -> int:
        """How many queues the back end can serve; 0 when it does not say."""
        return self._queues

    @property
    def config(self) -> bytes:
        """The configuration space as it was at the beginning."""
        return self._config

    @property
    def keeps_record(self) -> bool:
        """Whether back ends record their requests under way themselves. As the first one does, for good."""
        return bool(self._keeps_record)

    @property
    def connected(self) -> bool:
        """Whether there is a back end at present."""
        return self._front is not None

    # What should be. These return at once.

    def begin(self, job: Job) -> None:
        """Let a back end do this from now on."""

        def take() -> None:
            self._job = job

        self._post(take)

    def add_rings(self, rings: Sequence[Ring]) -> None:
        """Let it serve these as well."""

        def take() -> None:
            if self._job is not None:
                self._job.rings.extend(rings)

        self._post(take)

    def enable(self, index: int, enabled: bool) -> None:
        """Let a ring have effects, or none."""
        with self._lock:
            self._enabled[index] = enabled
        self._wake()

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand on what the driver wrote. Of writes that come faster than they are taken, the last one at an offset counts."""
        with self._lock:
            self._writes[offset] = data
            self._unsaid.add(offset)
        self._wake()

    def as_written(self, config: bytes) -> bytes:
        """Return a back end's configuration space with what the driver wrote and it has not heard of yet."""
        with self._lock:
            for offset in self._unsaid:
                data = self._writes[offset]
                config = config[:offset] + data + config[offset + len(data) :]
        return config

    # What must have happened when they return

    def stop(self) -> None:
        """Take every ring back; each one's `base` then says where it stands (None: at the used index)."""
        self._run(self._stop_job)

    def stop_ring(self, index: int) -> None:
        """Take one ring back, for good."""
        self._run(lambda: self._stop_ring(index))

    def forget(self) -> None:
        """Let go of what was kept for a driver that is gone. After stop()."""
        self._run(self._forget)

    def record(self) -> Inflight | None:
        """Return the record of requests under way. While stopped."""
        return self._inflight

    def give_record(self, record: Inflight) -> None:
        """Take over the record of a saved state, for the next back end. While stopped."""

        def take() -> None:
            self._drop_inflight()
            self._inflight = record

        self._run(take)

    def close(self) -> None:
        """Hang up and end the thread. Twice is fine."""
        thread = self._thread
        if thread is not None:
            self._ending = True
            self._wake()
            thread.join()
            self._thread = None
            for call in self._calls:  # nobody waits for them: life-cycle methods come one at a time
                call.execute()
            self._calls.clear()
        self._release()

    def _release(self) -> None:
        if self._front is not None:
            self._front.close()
            self._front = None
        self._ledgers.clear()
        self._drop_inflight()
        for fd in (self._event, self._err):
            if fd >= 0:
                os.close(fd)
        self._event = self._err = -1

    # Between threads

    def _post(self, function: Callable[[], None]) -> None:
        self._calls.append(_Call(function))
        self._wake()

    def _run(self, function: Callable[[], T]) -> T:
        if self._thread is None:
            return function()
        call = _Call(function)
        self._calls.append(call)
        self._wake()
        call.done.wait()
        if call.error is not None:
            raise call.error
        result: T = call.result  # type: ignore[assignment]
        return result

    def _wake(self) -> None:
        if self._event >= 0:
            os.eventfd_write(self._event, 1)

    # The thread

    def _main(self) -> None:
        name_thread(f"vu-{self.name}")
        while not self._ending:
            try:
                while self._calls:
                    self._calls.popleft().execute()
                self._make_it_so()
                self._watch()
            except (BackEndError, OSError) as error:
                self._lost(error)
            except Exception as error:
                # Guest memory at the end of a machine, or a mistake of ours; who waits for this thread must not do so for ever.
                self._lost(BackEndError(f"cannot be served: {error!r}"))

    def _make_it_so(self) -> None:
        """Bring what is nearer to what should be."""
        if self._front is None:
            if time.monotonic() < self._next_try:
                return
            self._connect()
            self._owner.config_read(self._config_now)
            self._say("")
        front, job = self._front, self._job
        assert front is not None
        if job is None:
            return
        self._start_job(front, job)
        with self._lock:
            enabled, self._enabled = self._enabled, {}
        for ring in job.rings:
            if ring.index in enabled:
                ring.enabled = enabled[ring.index]
                front.connection.limit(self._reply_limit)
                front.enable(ring.index, ring.enabled)
        self._hand_on_writes(front)

    def _hand_on_writes(self, front: FrontEnd) -> None:
        """Tell the back end what the driver wrote. Of what it refuses its successors do not hear."""
        with self._lock:
            writes = {offset: self._writes[offset] for offset in self._unsaid}
            self._unsaid.clear()
        for offset, data in writes.items():
            front.connection.limit(self._reply_limit)
            try:
                front.write_config(offset, data)
            except Refused:
                with self._lock:
                    if offset not in self._unsaid:  # or the driver has written something else meanwhile
                        del self._writes[offset]
                raise

    def _connect(self) -> None:
        connection = Connection.open(self.path)
        # Who keeps the record does not change under a driver: requests that one back end left must be found by the next.
        front = FrontEnd(connection, config_size=self._config_size, records=self._keeps_record is not False)
        try:
            connection.limit(self._reply_limit)
            front.negotiate()
            if self._keeps_record and not front.protocol & P_INFLIGHT_SHMFD:
                raise BackEndError("keeps no record of requests under way, the one before did")
        except BaseException:
            front.close()
            raise
        if self._keeps_record is None:
            self._features, self._queues, self._config = front.features, front.queues, front.config
            self._keeps_record = bool(front.protocol & P_INFLIGHT_SHMFD)
        self._config_now = front.config
        self._front = front
        self.found += 1
        self._since = time.monotonic()

    def _start_job(self, front: FrontEnd, job: Job) -> None:
        """Hand over what the back end does not have yet."""
        rings = [ring for ring in job.rings if ring not in front.rings]
        if self._running and not rings:
            return
        front.connection.limit(self._reply_limit)
        if not self._running:
            _drain(self._err)  # what was said of a driver before, and came late
            front.set_up(job.features, self._memory)
            self._hand_on_writes(front)  # before the first request
            if self._inflight is None:
                self._inflight = front.new_inflight(job.queues, job.queue_size)
            front.give_inflight(self._inflight)
        if job.ledgers and self._inflight is None:
            for ring in rings:
                self._ledgers[ring.index] = ledger = Ledger(ring.queue, self._memory)
                ledger.exact = ring.base is None or ring.base == self._memory.load(ring.queue.used + 2, 2)
        self._running = True  # also when the next line fails: some rings may run then
        front.start(rings, self._memory, self._err)
        for ring in rings:
            # The one before may have given requests back and died before it called.
            os.eventfd_write(ring.call, 1)

    def _stop_job(self) -> None:
        job, self._job = self._job, None
        with self._lock:
            self._enabled.clear()
        if job is None or not self._running or self._front is None:
            return
        front = self._front
        try:
            if self._settles:
                front.settle(job.rings, self._memory, SETTLE_LIMIT)
            front.connection.limit(self._reply_limit)
            for ring in job.rings:
                front.stop(ring)
        except (BackEndError, OSError, VmmError) as error:
            self._lost(error, job)
        self._running = False
        self._ledgers.clear()
        self._hear_errors()

    def _stop_ring(self, index: int) -> None:
        job, front = self._job, self._front
        ring = next((ring for ring in job.rings if ring.index == index), None) if job else None
        if job is None or ring is None:
            return
        job.rings.remove(ring)
        if not self._running or front is None:
            return
        try:
            if self._settles:
                front.settle([ring], self._memory, SETTLE_LIMIT)
            front.connection.limit(self._reply_limit)
            front.stop(ring)
        except (BackEndError, OSError, VmmError) as error:
            self._lost(error)
        self._ledgers.pop(index, None)

    def _forget(self) -> None:
        self._drop_inflight()
        with self._lock:
            self._writes.clear()
            self._unsaid.clear()
        front = self._front
        if front is not None:
            try:
                front.connection.limit(self._reply_limit)
                front.reset_device()
            except (BackEndError, OSError) as error:
                self._lost(error)

    def _drop_inflight(self) -> None:
        inflight, self._inflight = self._inflight, None
        if inflight is not None:
            inflight.close()

    def _lost(self, error: Exception, job: Job | None = None) -> None:
        """Hang up, keep what the next back end needs, and plan to look for it."""
        now = time.monotonic()
        front, self._front = self._front, None
        with self._lock:
            self._unsaid |= self._writes.keys()
        if front is not None and now - self._since >= _STEADY:
            self._delay = 0.0
        self._next_try = now + self._delay
        self._delay = min(max(2 * self._delay, self._retry_first), self._retry_max)
        if front is not None:
            front.close()
        job = job or self._job
        if job is not None and self._running:
            self._keep(job)
        self._running = False
        if front is not None or not isinstance(error, OSError):
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._say(f"the back end at {self.path} {reason}")

    def _keep(self, job: Job) -> None:
        """Remember what was under way when the back end was lost."""
        for ring in job.rings:
            ledger = self._ledgers.pop(ring.index, None)
            if ring.base is not None or self._inflight is not None:
                continue  # stopped in good order, or never begun; or recorded elsewhere
            if not (ledger.offer_again() if ledger else answered_in_order(ring.queue, self._memory)):
                # Guessing could let a request that is done write where the guest has something else by now, so no successor gets
                # any of it.
                self._job = None
                self._owner.unusable(f"queue {ring.index}: it is not known what the back end had under way")
        self._ledgers.clear()

    def _say(self, text: str) -> None:
        """Tell people what has changed, once."""
        if text == self._told:
            return
        self._told = text
        self._owner.report(
            f"{self.name}: {text}; the guest waits" if text else f"{self.name}: the back end at {self.path} is back"
        )

    def _watch(self) -> None:
        """Wait until something happens, and take note of it."""
        front, now = self._front, time.monotonic()
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        timeout: float | None = None
        if front is None:
            timeout = max(0.0, self._next_try - now)
        else:
            poll.register(front.connection, select.POLLIN | select.POLLRDHUP)
            if now < self._listen_from:
                timeout = self._listen_from - now
            else:
                if self._running:
                    poll.register(self._err, select.POLLIN)
                if front.channel_fd >= 0:
                    poll.register(front.channel_fd, select.POLLIN)
            for ring in self._watched_rings():
                poll.register(ring.call, select.POLLIN)
        events = dict(poll.poll(None if timeout is None else timeout * 1000 + 1))
        if self._event in events:
            _drain(self._event)
        if front is None:
            return
        for ring in self._watched_rings():
            if ring.call in events:
                _drain(ring.call)
                self._ledgers[ring.index].look()
                self._owner.used(ring.index)
        if self._err in events:
            self._listen_from = time.monotonic() + _QUIET
            self._hear_errors()
        if front.channel_fd in events:
            self._listen_from = time.monotonic() + _QUIET
            front.connection.limit(self._reply_limit)
            front.changes(lambda: self._owner.config_read(front.read_config()))
        if front.connection.fileno() in events:
            front.connection.limit(0)
            front.connection.receive()  # raises when the connection has ended
            raise BackEndError("answers what nobody asked")

    def _hear_errors(self) -> None:
        """Take what the back end says of the rings that it has, or has just given back; later it is another driver's."""
        if _drain(self._err):
            self._owner.unusable("the back end reports an error of a queue")

    def _watched_rings(self) -> list[Ring]:
        return [ring for ring in self._job.rings if ring.index in self._ledgers] if self._job and self._running else []


def _drain(fd: int) -> bool:
    """Return whether there was an event."""
    with suppress(BlockingIOError):
        return os.eventfd_read(fd) > 0
    return False
