"""A disk that another process serves (vhost-user-blk; virtio 1.2, section 5.2).

The disk's size, read-only flag and limits are the back end's, and may change while the guest runs. Not here: requests, which this
process never sees.
"""

from __future__ import annotations

from collections.abc import Callable

from virtio_devices.vhost_user.device import VhostUserDevice, enough_queues, offered
from virtio_devices.vhost_user.session import Session
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import Loop

QUEUES_MAX = 32

# Feature bits (5.2.3), as masks; the back end has to be asked for the configuration fields of each of them.
F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10
F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 11, 1 << 12, 1 << 13, 1 << 14
_WANTED = F_SIZE_MAX | F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_MQ | F_DISCARD | F_WRITE_ZEROES

CONFIG_SIZE = 60  # bytes of virtio_blk_config (5.2.4) up to the fields of secure erase, as every back end has them
_WRITEBACK = 32  # offset of the one byte that a driver may write
_NUM_QUEUES = 34


class VhostUserBlk(VhostUserDevice):
    """A virtio block device behind a vhost-user socket."""

    device_type = 2

    def __init__(
        self,
        name: str,
        loop: Loop,
        memory: GuestMemory,
        path: str,
        *,
        num_queues: int = 1,
        queue_size: int = 256,
        retry: float | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Connect to the back end at `path`; `retry` seconds between attempts to find it again, when it goes away.

        Raises DeviceError when nobody is there, or cannot serve such a disk; ValueError for queues that cannot be.
        """
        if not 1 <= num_queues <= QUEUES_MAX:
            raise ValueError(f"{name}: {num_queues} queues; there are 1 to {QUEUES_MAX}")
        if not 2 < queue_size <= 1024 or queue_size & (queue_size - 1):
            raise ValueError(f"{name}: queue size {queue_size} is not a power of two from 4 to 1024")
        session = Session(name, path, memory, config_size=CONFIG_SIZE, settles=True, retry=retry)
        self._num_queues = num_queues
        try:
            enough_queues(name, session, num_queues)
            super().__init__(
                name,
                loop,
                memory,
                session,
                features=offered(session, _WANTED if num_queues > 1 else _WANTED & ~F_MQ),
                queue_sizes=[queue_size] * num_queues,
                config=self._shown(session.config),
                records=True,
                report=report,
            )
        except BaseException:
            session.close()
            raise

    def _shown(self, config: bytes) -> bytes:
        queues = self._num_queues if self._num_queues > 1 else 0
        return config[:_NUM_QUEUES] + queues.to_bytes(2, "little") + config[_NUM_QUEUES + 2 :]

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take the driver's choice of a write cache (5.2.5); everything else there is read-only."""
        if offset == _WRITEBACK and size == 1 and self.negotiated & F_CONFIG_WCE and value in (0, 1):
            data = bytes([value])
            with self._writing:
                self._patch_config(_WRITEBACK, data)
                self._session.write_config(_WRITEBACK, data)
