"""stratovirt-img against qemu-img on the same files in the same run: medians of 5, page cache warm.

Run: python bench/qcow2.py [NAME…]    (convert compressed check snapshot info nbd)
Needs qemu-utils, numpy, and 8 GB of disk where it runs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GiB = 1 << 30
RUNS = 5
OURS = [str(Path(sys.executable).parent / "stratovirt-img")]
THEIRS = ["qemu-img"]


def timed(command: list[str], before: Callable[[], None] | None = None) -> float:
    """Seconds of one run."""
    if before:
        before()
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def compare(name: str, words: list[str], before: Callable[[], None] | None = None, runs: int = RUNS) -> None:
    """Interleaved runs of both programs with the same words."""
    ours, theirs = [], []
    for _ in range(runs):
        theirs.append(timed([*THEIRS, *words], before))
        ours.append(timed([*OURS, *words], before))
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{name:34} ours {a:8.3f} s   qemu-img {b:8.3f} s   {a / b:5.2f}x", flush=True)


def source(folder: Path, size: int) -> Path:
    """Half random, half zero, in pieces of 1 MiB."""
    path = folder / "source.raw"
    with path.open("wb") as f:
        for i in range(size >> 20):
            f.write(os.urandom(1 << 20) if i % 2 else bytes(1 << 20))
    return path


def mapped(folder: Path) -> Path:
    """1 TiB, every cluster allocated, nothing in the data clusters."""
    path = folder / "mapped.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(path), "1T"], check=True)
    return path


def nbd(folder: Path) -> None:
    """4 KiB requests through each server with the same client, qemu-img bench: requests a second."""
    image = folder / "nbd.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "256M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 1 0 256M", str(image)], check=True, capture_output=True)
    socket = folder / "socket"
    servers = {
        "ours": [*OURS, "serve", "-k", str(socket), str(image)],
        "qemu-nbd": ["qemu-nbd", "-t", "-e", "16", "-f", "qcow2", "--cache=writeback", "-k", str(socket), str(image)],
    }
    count = 20_000
    for words in (["-d", "1"], ["-d", "32"], ["-d", "1", "-w"], ["-d", "32", "-w"]):
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(RUNS):
            for name, command in servers.items():
                server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                while not socket.exists():
                    time.sleep(0.01)
                start = time.perf_counter()
                # A step that is coprime to the size makes sequential requests random.
                run = ["qemu-img", "bench", "-f", "raw", "-c", str(count), "-s", "4096", "-S", "40419328", *words]
                subprocess.run([*run, f"nbd+unix:///?socket={socket}"], check=True, capture_output=True)
                rates[name].append(count / (time.perf_counter() - start))
                server.terminate()
                server.wait()
                socket.unlink(missing_ok=True)
        a, b = (statistics.median(rates[name]) for name in servers)
        print(f"NBD 4 KiB {' '.join(words):24} ours {a:8.0f} /s  qemu-nbd {b:8.0f} /s  {a / b:5.2f}x", flush=True)


def main() -> None:
    names = set(sys.argv[1:]) or {"convert", "compressed", "check", "snapshot", "info", "nbd"}
    folder = Path(tempfile.mkdtemp(prefix="bench-qcow2-", dir=Path.cwd()))
    try:
        if "nbd" in names:
            nbd(folder)
        if names & {"convert", "compressed"}:
            raw, out = source(folder, 2 * GiB), folder / "out"

            def fresh() -> None:
                out.unlink(missing_ok=True)
                os.sync()

            if "convert" in names:
                compare("convert raw to qcow2, 2 GiB", ["convert", "-f", "raw", "-O", "qcow2", str(raw), str(out)], fresh)
                image = folder / "image.qcow2"
                subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True)
                compare("convert qcow2 to raw, 2 GiB", ["convert", "-f", "qcow2", "-O", "raw", str(image), str(out)], fresh)
                image.unlink()
            if "compressed" in names:
                words = ["convert", "-c", "-m", "4", "-f", "raw", "-O", "qcow2", str(raw), str(out)]
                compare("convert compressed, 4 threads", words, fresh, runs=RUNS)
            fresh()
            raw.unlink()
        if names & {"check", "snapshot", "info"}:
            image, work = mapped(folder), folder / "work.qcow2"
            if "info" in names:
                compare("info", ["info", str(image)])
            if "check" in names:
                compare("check, 1 TiB mapped", ["check", str(image)])
            if "snapshot" in names:

                def again() -> None:
                    subprocess.run(["cp", "--sparse=always", str(image), str(work)], check=True)
                    os.sync()

                compare("snapshot create, 1 TiB mapped", ["snapshot", "-c", "s", str(work)], again, runs=RUNS)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
