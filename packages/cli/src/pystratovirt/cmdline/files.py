"""Checks that need the file system, made before the process goes to the background, so that the caller sees the mistake.

A friendly early answer only: whoever opens a file later still handles that it is gone or something else by then.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from .errors import CommandLineError, show

if TYPE_CHECKING:
    from .config import Config


def check_files(config: Config) -> None:
    """Check that the files named in `config` exist and are of the right type. Raises CommandLineError."""
    for option, path in (("-kernel", config.kernel), ("-initrd", config.initrd)):
        if path is not None:
            _expect(option, show(path), path, (stat.S_IFREG,), "a regular file")
    for drive in config.drives.values():
        where = f"id={show(drive.id)}: file={show(drive.file)}"
        _expect("-drive", where, drive.file, (stat.S_IFREG, stat.S_IFBLK), "a regular file or a block device")
    for backend in config.memory_backends.values():
        if backend.path is not None and os.path.exists(backend.path):  # noqa: PTH110 - as below; else it is made
            where = f"{backend.selector}: mem-path={show(backend.path)}"
            _expect("-object", where, backend.path, (stat.S_IFREG, stat.S_IFDIR), "a regular file or a folder")
    for rng in config.rngs.values():
        where = f"rng-random: filename={show(rng.filename)}"
        _expect("-object", where, rng.filename, (stat.S_IFCHR,), "a character device")


def _expect(option: str, where: str, path: str, types: tuple[int, ...], what: str) -> None:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - pathlib is not imported at a start
    except OSError as error:
        raise CommandLineError(option, where, error.strerror or "cannot be examined") from None
    except ValueError as error:  # a NUL or a surrogate that no file system encoding has
        raise CommandLineError(option, where, str(error)) from None
    if stat.S_IFMT(mode) not in types:
        raise CommandLineError(option, where, f"not {what}")
