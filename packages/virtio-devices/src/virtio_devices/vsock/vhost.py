"""The socket device on the kernel's vhost-vsock: the kernel moves packets, and AF_VSOCK sockets of the host are the other end.

Not here: the ioctls that all of vhost shares (`virtio_devices.vhost_kernel`).
"""

from __future__ import annotations

from struct import Struct

from virtio_devices.device import DeviceError
from virtio_devices.queue import QueueError, SplitQueue
from virtio_devices.vhost_kernel import TRANSPORT_FEATURES, Request, VhostKernel
from virtio_devices.vsock.device import EVENT, RX, TX, VsockDevice
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import Loop

F_SEQPACKET = 1 << 1  # 5.10.3

SET_GUEST_CID = Request("VHOST_VSOCK_SET_GUEST_CID", 0x60, writes=8)
SET_RUNNING = Request("VHOST_VSOCK_SET_RUNNING", 0x61, writes=4)

_U64, _INT = Struct("<Q"), Struct("<i")


class VhostVsockDevice(VsockDevice):
    """A socket device whose rx and tx queues belong to the kernel while a driver is there; ours are only the events."""

    def __init__(self, name: str, loop: Loop, memory: GuestMemory, guest_cid: int, vhost: VhostKernel) -> None:
        """Serve with `vhost`, an open /dev/vhost-vsock, which the device owns from here on, also when this fails.

        The context id is taken on the whole host now, and not when a driver comes: whoever starts the machine hears that it is
        taken. Raises DeviceError then, and ValueError for an id that no guest can have.
        """
        try:
            features = vhost.features() & (TRANSPORT_FEATURES | F_SEQPACKET)
            super().__init__(name, [loop], guest_cid, features=features)
            vhost.ioctl(SET_GUEST_CID, bytearray(_U64.pack(guest_cid)))
        except BaseException:
            vhost.close()
            raise
        self._memory = memory
        self._vhost = vhost

    def resume(self) -> None:
        """Go on after pause(). A kernel that refuses leaves a broken device, and the machine goes on."""
        try:
            super().resume()
        except DeviceError as error:
            self._paused = False
            self._break(str(error))

    def stop_queue(self, index: int) -> None:
        """Stop using one queue. The kernel serves both of its queues or none."""
        with self._lock:
            if index in self.handed_over and self._running:
                self._stop_kernel()
            super().stop_queue(index)

    def close(self) -> None:
        """Reset, and give the context id back."""
        super().close()
        self._vhost.close()

    def _start(self) -> None:
        assert self._notifier is not None
        vhost, queues = self._vhost, self.queues
        self.handed_over = frozenset((RX, TX))
        vhost.set_features(self.negotiated)
        vhost.set_memory(self._memory)
        for index in (RX, TX):
            queue = queues[index]
            if queue is None:
                raise DeviceError(f"{self.name}: the driver has not set up queue {index}")
            vhost.hand_over(index, queue, self._kicks[index], self._notifier.used_fd(index))

    def _stop(self) -> None:
        for index in (RX, TX):
            try:
                self._vhost.release(index)
            except DeviceError as error:
                self._break(str(error))

    def _go(self) -> None:
        super()._go()
        if not self.broken and all(self.queues[index] is not None for index in (RX, TX)):
            self._vhost.ioctl(SET_RUNNING, bytearray(_INT.pack(1)))
            # The kernel has not seen kicks for what was offered while it stood still.
            self._kick_later(RX)
            self._kick_later(TX)

    def _halt(self) -> None:
        self._stop_kernel()
        super()._halt()

    def _stop_kernel(self) -> None:
        """Stop the kernel's work, and take its place in the rings."""
        try:
            self._vhost.ioctl(SET_RUNNING, bytearray(_INT.pack(0)))
            for index in (RX, TX):
                if (queue := self.queues[index]) is not None:
                    self._vhost.take_indices(index, queue)
        except (DeviceError, QueueError) as error:
            self._break(str(error))

    def _process(self, index: int, queue: SplitQueue) -> None:
        if index == EVENT:
            self._send_events(index, queue)
