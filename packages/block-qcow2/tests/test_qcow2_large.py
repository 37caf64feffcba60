"""Large images open and work in little memory: what is cached is bounded, whatever the image's size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .qemu import is_clean

MiB = 1 << 20
# Resident memory of the whole process, interpreter included. README: "Memory".
LIMIT_MIB = 160

_HEAD = """
import sys
from block_qcow2 import create_image, open_image
from block_qcow2.qcow2.snapshots import Snapshots
path = sys.argv[1]
"""
# Not ru_maxrss: that begins with what the process was before it executed this program.
_TAIL = """
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory(code: str, path: Path) -> int:
    """Run code in a process of its own; its largest resident size in MiB."""
    done = subprocess.run([sys.executable, "-c", _HEAD + code + _TAIL, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_sixteen_tebibytes(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    code = """
create_image(path, 16 << 40)
with open_image(path, read_only=False) as image:
    for i in range(500):
        image.write(i * (32 << 30) + 12345, b"x" * 5000)
    image.flush()
    Snapshots(image).create("s")
    image.write((16 << 40) - 5, b"end..")
with open_image(path) as image:
    assert image.read(7 * (32 << 30) + 12340, 10) == bytes(5) + b"x" * 5
    assert image.read((16 << 40) - 5, 5) == b"end.."
    assert sum(e.length for e in image.block_status() if e.present) == 501 * 65536
"""
    assert memory(code, path) < LIMIT_MIB
    is_clean(path)
    assert path.stat().st_blocks * 512 < 120 * MiB


def test_a_hundred_thousand_l2_tables(tmp_path: Path) -> None:
    path = tmp_path / "tables.qcow2"
    code = """
from block_qcow2.qcow2.create import Options
step = 2 << 20  # what one table of 4 KiB maps
create_image(path, 100_000 * step, options=Options(cluster_size=4096))
with open_image(path, read_only=False) as image:
    for i in range(100_000):
        image.write(i * step, b"y")
with open_image(path, read_only=False) as image:
    assert sum(map(bool, image.l1)) == 100_000
    assert image.read(77_777 * step, 2) == b"y\\0"
    image.write(99_999 * step + 5000, b"z")
"""
    assert memory(code, path) < LIMIT_MIB
    is_clean(path)
