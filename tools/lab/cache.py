"""Where the lab keeps what it downloads and builds: content-named folders that appear whole or not at all.

The cache lies outside the checkout, in $XDG_CACHE_HOME/pystratovirt (~/.cache/pystratovirt); deleting it is safe.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def root() -> Path:
    """The cache folder, created on first use.

    >>> root().is_dir()
    True
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "pystratovirt"
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: bytes | str | Path) -> str:
    """A short name for content: 16 hex digits of the SHA-256 over all parts; a Path counts with the bytes of its file."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One builder at a time, across processes. The kernel drops the lock when its holder dies."""
    locks = root() / "locks"
    locks.mkdir(exist_ok=True)
    with (locks / name.replace("/", "_")).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder(name: str, fill: Callable[[Path], None]) -> Path:
    """The cache folder `name`; when it is not there yet, `fill` makes its content in a scratch folder that is then renamed.

    Two processes that ask at once build it once. A builder that fails or dies leaves nothing that looks finished; what one
    that was killed has left goes when the next one begins.
    """
    target = root() / name
    if target.is_dir():
        return target
    with _locked(name):
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        scratches = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp names them
        for entry in filter(lambda entry: scratches.fullmatch(entry.name), list(target.parent.iterdir())):
            shutil.rmtree(entry, ignore_errors=True)  # nobody's: the lock is ours
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            fill(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target


def file(name: str, make: Callable[[Path], None]) -> Path:
    """The cache file `name`, made by `make(path)` when it is not there yet; the same promises as folder()."""
    target = root() / name

    def fill(scratch: Path) -> None:
        make(scratch / target.name)

    # A folder of one file: the rename of a folder is what makes it appear whole.
    return folder(f"{name}.d", fill) / target.name
