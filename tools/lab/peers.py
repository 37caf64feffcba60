"""Daemons of other projects that tests run beside a VMM."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import debian


def serve_files(shared: Path, path: Path, *, cache: str = "auto", stdout: int | None = None) -> subprocess.Popen[str]:
    """Start a real virtiofsd that serves the folder `shared` on the socket `path`, which is listened on when this returns."""
    program = debian.virtiofsd()
    if "libexec" in program:  # the newer one, in Rust
        options = [f"--shared-dir={shared}", f"--cache={cache}", "--sandbox=chroot"]
    else:
        options = ["-o", f"source={shared}", "-o", f"cache={cache}", "-o", "sandbox=chroot"]
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:  # with a path of its own it would leave a file in /run
        listener.bind(str(path))
        listener.listen(1)
        return subprocess.Popen(
            [program, f"--fd={listener.fileno()}", *options], stdout=stdout, text=True, pass_fds=[listener.fileno()]
        )


@contextmanager
def files_served(shared: Path, path: Path) -> Iterator[Path]:
    """The same until the end; yields `shared`."""
    daemon = serve_files(shared, path)
    try:
        yield shared
    finally:
        daemon.kill()
        daemon.wait()
        path.unlink(missing_ok=True)
