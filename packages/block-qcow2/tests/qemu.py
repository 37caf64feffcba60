"""QEMU's image tools, the reference that these tests compare with (Debian package qemu-utils). Missing, the tests fail."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def qemu_img(*words: Any, status: int = 0) -> str:
    """Run qemu-img; its exit status has to be `status`. Returns what it printed."""
    for _ in range(20):
        done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
        # It times its key derivation by getrusage(), and gives up where the clock of that has not ticked meanwhile.
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == status, f"qemu-img {' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def qemu_io(path: Path | str, *commands: str, fmt: str = "qcow2") -> str:
    """Run qemu-io commands on an image; none may fail."""
    words = ["qemu-io", "-f", fmt]
    for command in commands:
        words += ["-c", command]
    done = subprocess.run([*words, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def is_clean(path: Path) -> None:
    """qemu-img finds nothing wrong with an image."""
    qemu_img("check", "-q", path)
