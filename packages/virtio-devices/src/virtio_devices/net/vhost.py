"""A tap whose frames the host's kernel moves itself (vhost-net): the device hands its queues over, a pair to each descriptor.

Not here: the ioctls that all vhost devices have (`virtio_devices.vhost_kernel`), and the tap (`tap`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.net.backend import Backend, Lane
from virtio_devices.net.features import F_MRG_RXBUF
from virtio_devices.queue import SplitQueue
from virtio_devices.vhost_kernel import Request, VhostKernel
from vmm_core.loop import Loop, Timer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_devices.net.backend import Owner
    from virtio_devices.net.tap import TapBackend
    from vmm_core.guestmem import GuestMemory

PATH = "/dev/vhost-net"

_LOOK_NS = 1_000_000_000  # between two looks at the tap

_NET_SET_BACKEND = Request("VHOST_NET_SET_BACKEND", 0x30, writes=8)
_VRING_FILE = Struct("<Ii")  # vhost_vring_file: index, fd
_RX, _TX = 0, 1  # vrings of one descriptor
_FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_MRG_RXBUF  # of the driver's choice, what the kernel has to know


class VhostBackend(Backend):
    """A tap and a vhost descriptor for each of its queues."""

    serves_queues = True

    def __init__(self, tap: TapBackend, vhosts: Sequence[VhostKernel]) -> None:
        """Own `tap` and `vhosts`, as many as the tap has queues. Raises DeviceError, and closes nothing then."""
        if len(vhosts) != tap.pairs:
            raise DeviceError(f"{tap.name}: {len(vhosts)} vhost descriptors for {tap.pairs} queues of the tap")
        known = vhosts[0].features()
        for vhost in vhosts[1:]:
            known &= vhost.features()
        if not known & F_VERSION_1:
            raise DeviceError(f"{tap.name}: this kernel's vhost-net does not speak virtio 1")
        self.name, self.pairs, self.features = tap.name, tap.pairs, tap.features
        self.queue_features = known & _FEATURES & ~F_VERSION_1
        self._tap = tap
        self._vhosts = list(vhosts)

    def lane(self, owner: Owner, pair: int, loop: Loop) -> Lane:
        """Return a lane that moves nothing, and notices when the tap is gone."""
        return _KernelLane(owner, pair, loop, self._tap)

    def alive(self) -> bool:
        """Tell whether the interface is still there."""
        return self._tap.alive()

    def set_offloads(self, features: int) -> None:
        """Have the tap hand over frames with as much unfinished as the driver takes."""
        self._tap.set_offloads(features)

    def set_pairs(self, count: int) -> None:
        """Attach the first `count` queues to the interface, and no other."""
        self._tap.set_pairs(count)

    def begin_pair(
        self,
        pair: int,
        memory: GuestMemory,
        features: int,
        queues: Sequence[SplitQueue],
        kicks: Sequence[int],
        calls: Sequence[int],
    ) -> None:
        """Let the kernel serve a pair."""
        vhost = self._vhosts[pair]
        vhost.set_features(features & _FEATURES)
        vhost.set_memory(memory)
        for index in (_RX, _TX):
            vhost.hand_over(index, queues[index], kicks[index], calls[index])
        begun = 0
        try:
            for index in (_RX, _TX):
                self._bind(vhost, index, self._tap.fds[pair])
                begun += 1
        except DeviceError:
            for index in range(begun):
                self._bind(vhost, index, -1)
            raise

    def end_pair(self, pair: int, queues: Sequence[SplitQueue]) -> None:
        """Take a pair back."""
        vhost = self._vhosts[pair]
        steps: list[Callable[[], None]] = [lambda index=index: self._bind(vhost, index, -1) for index in (_RX, _TX)]  # type: ignore[misc]
        steps += [lambda index=index: vhost.take_indices(index, queues[index]) for index in (_RX, _TX)]  # type: ignore[misc]
        steps += [lambda index=index: vhost.release(index) for index in (_RX, _TX)]  # type: ignore[misc]
        failure: Exception | None = None
        for step in steps:  # all of them: what can be taken back is
            try:
                step()
            except Exception as error:
                failure = failure or error
        if failure:
            raise failure

    def close(self) -> None:
        """Close all descriptors."""
        for vhost in self._vhosts:
            vhost.close()
        self._tap.close()

    @staticmethod
    def _bind(vhost: VhostKernel, index: int, fd: int) -> None:
        vhost.ioctl(_NET_SET_BACKEND, bytearray(_VRING_FILE.pack(index, fd)))


class _KernelLane(Lane):
    """A pair of queues that the kernel serves. It looks after the tap from time to time.

    A deleted tap wakes who waits for frames, and nobody who waits for errors alone; but each frame would be a wake-up then.
    """

    def __init__(self, owner: Owner, pair: int, loop: Loop, tap: TapBackend) -> None:
        """Make a lane at rest."""
        super().__init__(owner, pair, loop, tap.fds[pair])
        self._tap = tap
        self._timer: Timer | None = None

    def guard(self) -> None:
        """Look after the tap, until rest()."""
        if self._tap.alive():
            self._timer = self.loop.call_later(_LOOK_NS, self.guard, host=True)
        else:
            self._timer = None
            self._die("the other side has gone")

    def rest(self, rx: SplitQueue | None) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def receive(self, queue: SplitQueue) -> None:
        """Nothing to do: the kernel does it."""

    def transmit(self, queue: SplitQueue) -> None:
        """Nothing to do, as for receive()."""


def open_vhost(tap: TapBackend, fds: Sequence[int] = ()) -> VhostBackend:
    """Open vhost for every queue of `tap`, on the open descriptors `fds` if there are any, and take all of them over.

    Raises DeviceError, and leaves all of them to the caller then.
    """
    if fds and len(fds) != tap.pairs:
        raise DeviceError(f"{tap.name}: The num of vhostfds must equal to fds")
    vhosts: list[VhostKernel] = []
    import os

    try:
        for pair in range(tap.pairs):
            # The caller's descriptor stays its own until all is well.
            vhosts.append(VhostKernel(tap.name, os.dup(fds[pair])) if fds else VhostKernel.open(tap.name, PATH))  # noqa: PERF401
        backend = VhostBackend(tap, vhosts)
    except BaseException:
        for vhost in vhosts:
            vhost.close()
        raise
    for fd in fds:
        os.close(fd)
    return backend
