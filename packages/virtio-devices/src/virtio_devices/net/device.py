"""The network device (virtio 1.2, section 5.1): pairs of queues, each moved by the loop that owns it over a lane of the back end.

A back end may come and go while a driver is active: without one the link is down, and what is sent is lost. With a back end that
has the kernel serve the queues (vhost), only the control queue is served here.

Not here: frames themselves (`backend`, `tap`, `stream`), commands (`control`), and receive-side scaling, which is not offered.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from virtio_devices.device import F_VERSION_1, DeviceError, VirtioDevice
from virtio_devices.net.backend import Backend, Lane, Statistics
from virtio_devices.net.features import (
    CONFIG,
    CONFIG_STATUS,
    CONTROL,
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_VLAN,
    F_GUEST_ANNOUNCE,
    F_MAC,
    F_MQ,
    F_MRG_RXBUF,
    F_STATUS,
    GUEST_OFFLOADS,
    OFFLOADS,
    PAIRS_MAX,
    REQUIREMENTS,
    S_ANNOUNCE,
    S_LINK_UP,
)
from virtio_devices.net.filter import RxFilter
from virtio_devices.net.state import NetState, fits, saved_state, saved_wishes
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.errors import StateError, VmmError
from vmm_core.loop import Loop
from vmm_core.state import expect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_core.guestmem import GuestMemory

QUEUE_SIZE_MIN, QUEUE_SIZE_MAX = 256, 4096  # reference virtio, section 6.1


class NetDevice(VirtioDevice):
    """A virtio network device."""

    device_type = 1

    def __init__(
        self,
        name: str,
        loops: Sequence[Loop],
        memory: GuestMemory,
        *,
        mac: bytes,
        backend: Backend | None = None,
        pairs: int = 1,
        queue_size: int = 256,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Make a device with up to `pairs` pairs of queues on `backend`, which its owner closes after the device, or on none yet.

        Pair n is served by loop n modulo the number of `loops`, the control queue by the first. `report` hears of a lost network.

        Raises DeviceError for a MAC that is not a unicast address, ValueError for a number or size of queues that cannot be.
        """
        if not 1 <= pairs <= PAIRS_MAX:
            raise ValueError(f"{name}: {pairs} pairs of queues; there are 1 to {PAIRS_MAX}")
        if not QUEUE_SIZE_MIN <= queue_size <= QUEUE_SIZE_MAX or queue_size & (queue_size - 1):
            raise ValueError(f"{name}: queue size {queue_size} is not a power of two from {QUEUE_SIZE_MIN} to {QUEUE_SIZE_MAX}")
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise DeviceError(f"{name}: {mac.hex(':')} is no address of one device")
        owners = [loops[pair % len(loops)] for pair in range(pairs) for _ in "rt"] if loops else []
        super().__init__(
            name,
            [*owners, *loops[:1]],
            features=0,
            queue_sizes=[queue_size] * (2 * pairs + 1),
            config=CONFIG.pack(mac, S_LINK_UP if backend else 0, pairs if pairs > 1 else 0, 0),
        )
        self.pairs = pairs  # that a driver may use
        self.wishes = RxFilter(mac)
        self._own_mac = mac  # what a driver finds that has not set another
        self._memory = memory
        self._report = report
        self._backend: Backend | None = None
        self._lanes: list[Lane] = []
        self._elsewhere: set[int] = set()  # pairs that the back end serves now
        self._status_lock = threading.Lock()  # of the status field
        self._control = 2 * pairs
        self._enabled_pairs = 1
        self._guest_offloads = 0
        self._announce = False  # at the next resume
        self._restored: NetState | None = None
        self._past = Statistics()  # of back ends that were taken out
        self._use(backend)

    # The network, from the thread that owns the machine

    @property
    def has_backend(self) -> bool:
        """Whether there is a back end."""
        return self._backend is not None

    @property
    def mac(self) -> bytes:
        """The address that the driver reads, and may have set."""
        return self._config[1][:6]

    def give_mac(self, mac: bytes) -> None:
        """Have another address of its own: what the next driver finds, and one that is there keeps what it has."""
        with self._lock:
            self._own_mac = mac
            if not self.active:
                self._patch_config(0, mac)

    @property
    def link_up(self) -> bool:
        """Whether the driver is told that there is a network."""
        return bool(self._config[1][CONFIG_STATUS] & S_LINK_UP)

    def read_config(self, offset: int, size: int) -> int:
        """Return a part of the configuration space. Between drivers nothing watches the network, so that is looked after here.

        A driver that reads it from memory hears of a network that has gone when it is ready (`_start`).
        """
        if not self.active:
            with self._lock:
                if not self.active:
                    self._look()
        return super().read_config(offset, size)

    def _look(self) -> None:
        """Notice that the network has gone."""
        backend = self._backend
        if backend is not None and self.link_up and not backend.alive():
            self.lost(backend.obituary())

    def attach(self, backend: Backend) -> None:
        """Put a back end in, and tell the driver. The owner closes it after detach() or close().

        Raises DeviceError when there is one, or when it cannot do what an active driver has negotiated.
        """
        with self._lock:
            if self._backend is not None:
                raise DeviceError(f"{self.name}: has a network already")
            if self.active:
                self._expect_features(backend)
            running = self._running
            if running:
                self._halt()
            try:
                self._use(backend)
                if backend.alive():
                    self._set_status(S_LINK_UP, True)  # first, so that what begins can be lost
                else:
                    self._report_loss(backend.obituary())
                if self.active:
                    self._begin()
                if running:
                    self._go()
            except (VmmError, OSError) as error:
                self._let_go()
                self._set_status(S_LINK_UP, False)
                if running and not self._running:
                    self._go_or_break()
                raise DeviceError(f"{self.name}: {error}") from None

    def detach(self) -> Backend:
        """Take the back end out, tell the driver, and return it; nothing touches it any more.

        Raises DeviceError when there is none.
        """
        with self._lock:
            backend = self._backend
            if backend is None:
                raise DeviceError(f"{self.name}: has no network")
            running = self._running
            if running:
                self._halt()
            self._let_go()
            if running:
                self._go_or_break()
            self._set_status(S_LINK_UP, False)
            return backend

    def statistics(self) -> Statistics:
        """Return what went through, over all pairs. With vhost the kernel does not count."""
        parts = [self._past, *(lane.statistics() for lane in self._lanes)]
        return Statistics(*map(sum, zip(*parts, strict=True)))

    def counters(self) -> dict[str, int]:
        """Return the statistics; none of what a back end moves by itself."""
        backend = self._backend
        return {} if backend is not None and backend.serves_queues else self.statistics()._asdict()

    def _expect_features(self, backend: Backend) -> None:
        """Raise DeviceError when a back end has not what the driver negotiated."""
        if missing := self.negotiated & ~_offered(backend, self.pairs):
            raise DeviceError(f"{self.name}: the driver uses features {missing:#x}, which {backend.name} has not")

    def _use(self, backend: Backend | None) -> None:
        self._backend = backend
        self._lanes = []
        if backend is not None:
            count = min(self.pairs, backend.pairs)
            self._lanes = [backend.lane(self, pair, self._loops[2 * pair]) for pair in range(count)]
        self.features = _offered(backend, self.pairs)

    def _let_go(self) -> None:
        """Forget the back end. Every loop is at rest, and so is it."""
        self._past = self.statistics()
        self.handed_over = frozenset()
        offered = self.features
        self._use(None)
        self.features = offered if self.active else self.features

    def _set_status(self, bit: int, on: bool, *, quietly: bool = False) -> None:
        """Change a bit of the status field, and tell the driver unless it is the one who did."""
        with self._status_lock:
            old = self._config[1][CONFIG_STATUS]
            new = old | bit if on else old & ~bit
            if new == old:
                return
            if quietly:
                self._patch_config(CONFIG_STATUS, bytes([new]))
            else:
                self._set_config(CONFIG_STATUS, bytes([new]))

    # Life

    def accepts(self, features: int) -> bool:
        """Tell whether what was chosen fits together (5.1.3.1)."""
        return all(not features & chosen or features & needed for chosen, needed in REQUIREMENTS)

    def _start(self) -> None:
        self._control = 2 * self.pairs if self.negotiated & F_MQ else 2
        self.wishes = RxFilter(self.mac, vlans=frozenset() if self.negotiated & F_CTRL_VLAN else None)
        self._enabled_pairs = 1  # 5.1.6.5.5: until the driver says otherwise
        self._guest_offloads = self.negotiated & GUEST_OFFLOADS
        restored, self._restored = self._restored, None
        if restored is not None:
            self._take(restored)
        backend = self._backend
        if backend is not None:
            self._expect_features(backend)  # it may have come after the driver had chosen
        self._look()
        alive = backend is not None and backend.alive() and not any(lane.dead for lane in self._lanes)
        self._set_status(S_LINK_UP, alive, quietly=True)
        self._begin()

    def _begin(self) -> None:
        """Have the back end ready for the driver. Every loop is at rest."""
        backend = self._backend
        if backend is None:
            return
        for lane in self._lanes:
            lane.begin(bool(self.negotiated & F_MRG_RXBUF))
        self._enable_lanes()
        try:
            backend.set_offloads(self._guest_offloads)
            backend.set_pairs(min(self._enabled_pairs, len(self._lanes)))
        except OSError as error:
            self.lost(error.strerror or str(error))  # a network that has gone is no reason to refuse the driver
            return
        if backend.serves_queues:
            # Without many queues the third one is the control queue, and ours.
            self.handed_over = frozenset(range(2 * (len(self._lanes) if self.negotiated & F_MQ else 1)))

    def _enable_lanes(self) -> None:
        for pair, lane in enumerate(self._lanes):
            lane.enabled = pair < self._enabled_pairs

    def _go(self) -> None:
        self._begin_elsewhere()
        super()._go()

    def _go_or_break(self) -> None:
        """Go on without a network. Where the host has no room for that the driver's reset tries again."""
        try:
            self._go()
        except (VmmError, OSError) as error:
            self._break(str(error))

    def _halt(self) -> None:
        try:
            super()._halt()
        finally:
            self._end_elsewhere()

    def resume(self) -> None:
        """Go on after pause(). A driver that came here from elsewhere is asked to tell the network (5.1.6.5.4)."""
        with self._lock:
            super().resume()
            if self._announce and self.active and self.negotiated & F_GUEST_ANNOUNCE and self.negotiated & F_STATUS:
                self._set_status(S_ANNOUNCE, True)
            self._announce = False

    def stop_queue(self, index: int) -> None:
        """Stop using one queue."""
        with self._lock:
            if index in self.handed_over:
                running = self._running
                if running:
                    self._halt()
                self.queues[index] = None
                if running:
                    self._go()
                return
            super().stop_queue(index)
            if self._running:
                for other, queue in enumerate(self.queues):  # lanes of that loop were put to rest with it
                    if queue is not None and self._loops[other] is self._loops[index] and other not in self.handed_over:
                        self._kick_later(other)
                for pair in self._elsewhere:
                    lane = self._lanes[pair]
                    if lane.loop is self._loops[index]:
                        lane.loop.run(lane.guard)

    def _drain(self, loop: Loop) -> None:
        for pair, lane in enumerate(self._lanes):
            if lane.loop is loop:
                lane.rest(self.queues[2 * pair])

    def _stop(self) -> None:
        self._patch_config(0, self._own_mac)

    def close(self) -> None:
        """Reset, and let go of the back end, which is its owner's."""
        with self._lock:
            super().close()
            self._let_go()

    # Pairs that the back end serves: on the control queue's loop, and where nothing runs on it

    def _begin_elsewhere(self) -> None:
        """Hand over the pairs that the driver uses."""
        backend, notifier = self._backend, self._notifier
        if not self.handed_over or backend is None or notifier is None or self.broken:
            return  # of a broken one nobody knows where its rings stand
        features = self.negotiated
        for pair, lane in enumerate(self._lanes):
            rx, tx = self.queues[2 * pair : 2 * pair + 2]
            if not lane.enabled or lane.dead or rx is None or tx is None or pair in self._elsewhere:
                continue
            kicks = self._kicks[2 * pair : 2 * pair + 2]
            calls = [notifier.used_fd(2 * pair), notifier.used_fd(2 * pair + 1)]
            try:
                backend.begin_pair(pair, self._memory, features, (rx, tx), kicks, calls)
                lane.loop.run(lane.guard)
            except (VmmError, OSError) as error:
                self.lost(str(error))
                return
            self._elsewhere.add(pair)
            for index, kick in zip((2 * pair, 2 * pair + 1), kicks, strict=True):
                os.eventfd_write(kick, 1)  # what was offered before has no kick of its own
                notifier.queue_used(index)  # nor an interrupt what was used

    def _end_elsewhere(self, beyond: int = 0) -> None:
        """Take back the pairs from number `beyond` on."""
        backend = self._backend
        for pair in sorted(self._elsewhere):
            if pair < beyond or backend is None:
                continue
            self._elsewhere.discard(pair)
            lane = self._lanes[pair]
            lane.loop.run(lambda lane=lane: lane.rest(None))  # type: ignore[misc]
            rx, tx = self.queues[2 * pair : 2 * pair + 2]
            assert rx is not None
            assert tx is not None
            try:
                backend.end_pair(pair, (rx, tx))
            except QueueError as error:
                self._break(f"queues {2 * pair} and {2 * pair + 1}: {error}")
            except (VmmError, OSError) as error:
                self.lost(str(error))

    # Work: on the loop that owns the queue

    def _process(self, index: int, queue: SplitQueue) -> None:
        if index == self._control:
            self._serve_control(queue)
        elif index >> 1 >= len(self._lanes):
            if index & 1:
                self._discard(index, queue)
        elif index & 1:
            self._lanes[index >> 1].transmit(queue)
        else:
            self._lanes[index >> 1].receive(queue)

    def _discard(self, index: int, queue: SplitQueue) -> None:
        """Lose what is sent: there is no network."""
        for head, _, _ in queue.chains():
            queue.add_used(head, 0)
        self._used(index, queue)
        if queue.enable_kicks():
            self._kick_later(index)

    def _serve_control(self, queue: SplitQueue) -> None:
        from virtio_devices.net.control import serve_commands  # not before a driver has something to say

        try:
            serve_commands(self, queue)
        finally:
            self._used(self._control, queue)
        if queue.enable_kicks():
            self._kick_later(self._control)

    # For lanes, on their loops

    @property
    def working(self) -> bool:
        """Whether queues may be touched now."""
        return self._running and not self.broken

    @property
    def rx_filter(self) -> RxFilter | None:
        """The filter, or None while there is nothing to be filtered."""
        wishes = self.wishes
        return None if wishes.promiscuous else wishes

    def publish(self, index: int, queue: SplitQueue) -> None:
        """Publish what was given back."""
        self._used(index, queue)

    def serve(self, index: int) -> None:
        """Serve a queue now."""
        self._guarded(index, self._process)

    def serve_later(self, index: int) -> None:
        """Serve a queue after the loop's other work."""
        self._kick_later(index)

    def lost(self, reason: str) -> None:
        """Turn the link down for good. On any thread."""
        if self.link_up:
            self._report_loss(reason)
        self._set_status(S_LINK_UP, False)

    def _report_loss(self, reason: str) -> None:
        if self._report:
            self._report(f"{self.name}: the network is gone: {reason or 'the other side has gone'}")

    # For commands, on the control queue's loop

    def set_mac(self, mac: bytes) -> None:
        """Take the driver's address, until a reset; without a driver, the device's own."""
        self._patch_config(0, mac)
        if not self.active:
            self._own_mac = mac
        self.wishes = self.wishes._replace(mac=mac)

    def announced(self) -> None:
        """Take the wish for an announcement back."""
        self._set_status(S_ANNOUNCE, False, quietly=True)

    def set_pairs(self, count: int) -> bool:
        """Use the first `count` pairs."""
        if not 1 <= count <= self.pairs:
            return False
        backend, lanes = self._backend, self._lanes
        elsewhere = set(self._elsewhere)
        done = True
        if backend is not None:
            # A queue that is detached reports an error, so nobody may watch it any more.
            self._end_elsewhere(count)
            for pair, lane in enumerate(lanes[count:], count):

                def end(lane: Lane = lane, queue: SplitQueue | None = self.queues[2 * pair]) -> None:
                    lane.enabled = False
                    lane.rest(queue)

                lane.loop.run(end)
            try:
                backend.set_pairs(min(count, len(lanes)))
            except OSError:
                done, count = False, min(count, self._enabled_pairs)
        self._enabled_pairs = count
        self._enable_lanes()
        if self._running:
            self._begin_elsewhere()
            for index in range(2 * len(lanes)):
                # Also what waits in a pair that is not used any more: it is lost, as there will be no kick for it.
                if index not in self.handed_over:
                    self._kick_later(index)
            for pair in elsewhere - self._elsewhere:
                # The same of those that the back end had; their kicks are nobody's here, so it is done now.
                lanes[pair].loop.run(lambda pair=pair: self._guarded(2 * pair + 1, self._drop))  # type: ignore[misc]
        return done

    def _drop(self, index: int, queue: SplitQueue) -> None:
        self._lanes[index >> 1].drop_all(queue)

    def set_guest_offloads(self, features: int) -> bool:
        """Change what frames the driver takes."""
        try:
            if self._backend is not None:
                self._backend.set_offloads(features)
        except (VmmError, OSError):
            return False
        self._guest_offloads = features
        return True

    # Saved state

    def save(self) -> NetState:
        """Return what the driver said over the control queue. While paused."""
        if not self.active:
            return NetState(self.mac, False, 0, 0, 0, (), (), None)
        announcing = bool(self._config[1][CONFIG_STATUS] & S_ANNOUNCE)
        return saved_state(self.mac, announcing, self._enabled_pairs, self._guest_offloads, self.wishes)

    def restore(self, state: Any) -> None:
        """Put a saved state back, before or after the transport's. Raises StateError when it does not fit."""
        saved = expect(state, NetState, self.name)
        offloads = self.negotiated & GUEST_OFFLOADS if self.active else GUEST_OFFLOADS
        if not fits(saved, self.pairs, offloads):
            raise StateError(f"{self.name}: the saved state does not fit")
        with self._lock:
            self._patch_config(0, saved.mac)
            self._announce = saved.pairs > 0
            self._set_status(S_ANNOUNCE, saved.announcing, quietly=True)
            if self.active and saved.pairs:
                self._take(saved)
                self._begin()
            else:
                self._restored = saved if saved.pairs else None

    def _take(self, saved: NetState) -> None:
        self._enabled_pairs = saved.pairs
        self._guest_offloads = saved.guest_offloads & self.negotiated
        self.wishes = saved_wishes(saved)


def _offered(backend: Backend | None, pairs: int) -> int:
    """Return the features of a device with a back end, or with one that may come."""
    offloads = OFFLOADS if backend is None else backend.features
    features = F_VERSION_1 | F_MAC | F_STATUS | CONTROL | offloads
    features |= Backend.queue_features if backend is None else backend.queue_features
    features |= (F_MQ if pairs > 1 else 0) | (F_CTRL_GUEST_OFFLOADS if offloads & GUEST_OFFLOADS else 0)
    # A back end may have what the driver could not accept: DPDK without TSO still says that it can do ECN with it.
    for chosen, needed in REQUIREMENTS:
        if features & chosen and not features & needed:
            features &= ~chosen
    return features
