"""From the declaration of a drive to its open and locked image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from block_qcow2.disk import Disk
    from pystratovirt.cmdline.backends import Drive
    from pystratovirt.cmdline.secrets import Secret


def open_image(drive: Drive, secrets: Mapping[str, Secret]) -> Disk:
    """Open and lock an image; its passphrase is one of `secrets`. Raises BlockError, and has nothing open then."""
    from block_qcow2.errors import BlockError, ExternalFileError, PassphraseNeededError

    try:
        return _open(drive, secrets)
    # How a drive is told what the image needs: the library that says so has no keys.
    except ExternalFileError as error:
        raise BlockError(f"{error} (external-files=allow)") from None
    except PassphraseNeededError as error:
        raise BlockError(f"{error} (encrypt.key-secret=ID, of an -object secret)") from None
    except OSError as error:  # no descriptor left, or no memory: engines need both
        raise BlockError(f"{drive.file}: {error.strerror or error}") from None


def _open(drive: Drive, secrets: Mapping[str, Secret]) -> Disk:
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
        passphrase=_passphrase(secrets[drive.key_secret]) if drive.key_secret is not None else None,
    )
    try:
        # From here to the end, pauses included: StratoVirt lets go of a paused machine's images, and whoever opens one then has
        # it changed under him by the resumed guest.
        disk.lock()
    except BaseException:
        disk.close()
        raise
    return disk


def _passphrase(secret: Secret) -> bytes:
    """What a secret stands for. Raises BlockError."""
    from block_qcow2 import read_secret

    return read_secret(f"secret {secret.id}", data=secret.data, file=secret.file, format=secret.format)
