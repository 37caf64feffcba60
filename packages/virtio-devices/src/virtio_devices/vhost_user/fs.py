"""A folder of the host as a file system (virtio-fs: virtio 1.2, section 5.11), served by virtiofsd over vhost-user.

Not here: files, which this process never sees; notifications of the back end, and its shared memory region (DAX), which are not
offered.
"""

from __future__ import annotations

from collections.abc import Callable

from virtio_devices.device import DeviceError
from virtio_devices.vhost_user.device import VhostUserDevice, enough_queues, offered
from virtio_devices.vhost_user.session import Session
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import Loop

TAG_MAX = 36  # bytes (5.11.4); one of them need not be zero
QUEUE_SIZE = 128  # reference virtio, section 1.1
_QUEUES = 2  # 5.11.2: hiprio, and one for requests


class VhostUserFs(VhostUserDevice):
    """A virtio file system device behind a vhost-user socket."""

    device_type = 26

    def __init__(
        self,
        name: str,
        loop: Loop,
        memory: GuestMemory,
        path: str,
        *,
        tag: str,
        retry: float | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Connect to the back end at `path`; guests mount it by `tag`. `retry` as for disks.

        Raises DeviceError for a tag that is empty or too long, and when nobody is there or cannot serve a file system.
        """
        encoded = tag.encode(errors="surrogateescape")
        if not 0 < len(encoded) <= TAG_MAX:
            raise DeviceError(f"{name}: a tag has 1 to {TAG_MAX} bytes")
        session = Session(name, path, memory, settles=True, retry=retry)
        try:
            if session.queues:
                enough_queues(name, session, _QUEUES)
            super().__init__(
                name,
                loop,
                memory,
                session,
                features=offered(session, 0),
                queue_sizes=[QUEUE_SIZE] * _QUEUES,
                config=encoded.ljust(TAG_MAX, b"\0") + (_QUEUES - 1).to_bytes(4, "little"),
                report=report,
            )
        except BaseException:
            session.close()
            raise
