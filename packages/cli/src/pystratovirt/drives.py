"""From the declaration of a drive to its open and locked image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from block_qcow2.disk import Disk
    from pystratovirt.cmdline.backends import Drive


def open_image(drive: Drive) -> Disk:
    """Open and lock an image. Raises BlockError, and has nothing open then."""
    from block_qcow2 import open_disk

    disk = open_disk(
        drive.file,
        format=drive.format,
        read_only=drive.readonly,
        direct=drive.direct,
        aio=drive.engine,
        discard=drive.discard,
        detect_zeroes=drive.detect_zeroes,
        allow=drive.external_files,
        l2_cache_bytes=drive.l2_cache_size or 0,
        refcount_cache_bytes=drive.refcount_cache_size or 0,
    )
    try:
        # From here to the end, pauses included: StratoVirt lets go of a paused machine's images, and whoever opens one then has
        # it changed under him by the resumed guest.
        disk.lock()
    except BaseException:
        disk.close()
        raise
    return disk
