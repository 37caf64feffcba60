"""Real clients at the NBD server: qemu-io writes, zeroes, trims, flushes and reads against a model; nbdcopy reads everything.

Several clients work at once, each in a stripe of its own that shares clusters with its neighbours'.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .qemu import is_clean, qemu_img

SECTOR = 512
SECTORS = 3000  # of each client
CLIENTS = 3
ROUNDS = 2
OPERATIONS = 120  # of a client in a round
_UNKNOWN = -1  # after a trim: zeroes, or what was there


class Server:
    def __init__(self, image: Path, socket: Path) -> None:
        command = [sys.executable, "-m", "block_qcow2.img", "serve", "-f", "qcow2", "--discard", "-k", str(socket), str(image)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("Serving ")
        self.uri = f"nbd+unix:///?socket={socket}"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=60)
        assert (self.process.returncode, said) == (0, "")


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    image = tmp_path / "image"
    options = ["-o", request.param] if request.param else []
    qemu_img("create", "-f", "qcow2", *options, image, CLIENTS * SECTORS * SECTOR)
    found = Server(image, tmp_path / "socket")
    yield found
    if found.process.poll() is None:
        found.process.kill()
    found.process.communicate()


def operations(rng: random.Random, first: int, model: list[int]) -> list[str]:
    """qemu-io commands on one stripe that starts at sector `first`, and `model` after them: the value of each sector."""
    found = []
    for _ in range(OPERATIONS):
        at = rng.randrange(SECTORS)
        count = min(rng.choice([1, 1, 3, 8, 40, 200, 700]), SECTORS - at)
        where = f"{(first + at) * SECTOR} {count * SECTOR}"
        kind = rng.choice("wwwwzuddfrrr")
        if kind == "w":
            value = rng.randrange(1, 255)
            found.append(f"write -P {value} {where}")
            model[at : at + count] = [value] * count
        elif kind in "zu":
            found.append(f"write -z {'-u ' if kind == 'u' else ''}{where}")
            model[at : at + count] = [0] * count
        elif kind == "d":
            found.append(f"discard {where}")
            model[at : at + count] = [value if value == 0 else _UNKNOWN for value in model[at : at + count]]
        elif kind == "f":
            found.append("flush")
        elif model[at] != _UNKNOWN:
            same = next((n for n in range(count) if model[at + n] != model[at]), count)
            found.append(f"read -P {model[at]} {(first + at) * SECTOR} {same * SECTOR}")
    return found


def run_client(uri: str, commands: list[str]) -> None:
    words = ["qemu-io", "-f", "raw", "-d", "unmap"]
    for command in commands:
        words += ["-c", command]
    done = subprocess.run([*words, uri], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "failed" not in done.stdout
    assert done.stderr == ""


def agrees(content: bytes, models: list[list[int]]) -> None:
    assert len(content) == CLIENTS * SECTORS * SECTOR
    for number, value in enumerate(value for model in models for value in model):
        if value != _UNKNOWN:
            sector = content[number * SECTOR : (number + 1) * SECTOR]
            assert sector == bytes([value]) * SECTOR, f"sector {number}: {sector[:8].hex()}, expected {value:02x}"


@pytest.mark.parametrize("server", ["", "cluster_size=4k", "cluster_size=64k,extended_l2=on"], indirect=True)
def test_several_clients_agree_with_a_model(server: Server, tmp_path: Path) -> None:
    rng = random.Random(6)
    models = [[0] * SECTORS for _ in range(CLIENTS)]
    for _ in range(ROUNDS):
        work = [operations(rng, i * SECTORS, model) for i, model in enumerate(models)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(run_client, [server.uri] * CLIENTS, work))
        copy = tmp_path / "copy"
        assert shutil.which("nbdcopy"), "nbdcopy is needed (Debian package libnbd-bin)"
        subprocess.run(["nbdcopy", server.uri, str(copy)], check=True, timeout=120)
        agrees(copy.read_bytes(), models)
    server.stop()
    is_clean(tmp_path / "image")
    qemu_img("convert", "-O", "raw", tmp_path / "image", tmp_path / "after")
    agrees((tmp_path / "after").read_bytes(), models)
