"""Signals to stratovirt-img at chosen moments, sent by the process to itself so that nothing depends on time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# Runs the command; when a function is called for the nth time, the process signals itself.
_RUNNER = """
import importlib, os, sys
number, module, name, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
sys.argv[1:] = sys.argv[5:]
left = [count]
def send():
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), number)
if name:
    holder = importlib.import_module(module)
    *inside, name = name.split(".")
    for part in inside:
        holder = getattr(holder, part)
    original = getattr(holder, name)
    def wrapper(*a, **k):
        send()
        return original(*a, **k)
    setattr(holder, name, wrapper)
else:
    class Finder:
        def find_spec(self, wanted, path=None, target=None):
            if wanted == module:
                send()
    sys.meta_path.insert(0, Finder())
from block_qcow2.img import main
sys.exit(main())
"""


def interrupted(tmp_path: Path, number: int, where: str, *words: str, count: int = 1) -> subprocess.CompletedProcess[str]:
    module, _, name = where.partition(":")
    command = [sys.executable, "-c", _RUNNER, str(int(number)), module, name, str(count), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"\x5a" * (8 * MiB))
    return path


# Moments of a conversion: its modules load, the target is there, data are written, it is flushed, it is closed.
MOMENTS = [
    ("block_qcow2.img.args:", 1),
    ("block_qcow2.img.convert:", 1),
    ("block_qcow2.locks:lock", 2),
    ("block_qcow2.qcow2.create:write_empty", 1),
    ("block_qcow2.hostfile:HostFile.pwrite", 1),
    ("block_qcow2.img.copy:_write", 1),
    ("block_qcow2.img.copy:_write", 6),
    ("block_qcow2.qcow2.image:Qcow2Image.flush", 1),
    ("block_qcow2.qcow2.image:Qcow2Image.close", 1),
]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("where", "count"), MOMENTS)
def test_a_signal_leaves_no_target_and_no_traceback(
    tmp_path: Path, source: Path, number: signal.Signals, where: str, count: int
) -> None:
    done = interrupted(tmp_path, number, where, "convert", "-O", "qcow2", "source", "out", count=count)
    assert done.returncode == -number, done.stderr
    assert done.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "words",
    [
        ["dd", "if=source", "of=out", "bs=1M"],
        ["convert", "source", "out"],
        ["create", "-f", "qcow2", "-o", "preallocation=full", "out", "8M"],
        ["create", "-f", "raw", "-o", "preallocation=full", "out", "8M"],
        ["create", "-f", "qcow2", "-o", "preallocation=metadata,data_file=data", "out", "8M"],
    ],
    ids=" ".join,
)
def test_every_command_that_makes_an_image_removes_it(
    tmp_path: Path, source: Path, number: signal.Signals, words: list[str]
) -> None:
    done = interrupted(tmp_path, number, "block_qcow2.hostfile:HostFile.writev", *words, count=3)
    assert (done.returncode, done.stderr) == (-number, "")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_a_target_replaces_goes_too_and_a_link_leads_to_it(tmp_path: Path, source: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("old")
    done = interrupted(tmp_path, signal.SIGTERM, "block_qcow2.img.copy:_write", "convert", "source", "link")
    assert done.returncode == -signal.SIGTERM
    assert not (tmp_path / "old").exists()


def test_an_image_in_use_outlives_a_signal_during_its_refusal(tmp_path: Path, source: Path) -> None:
    (tmp_path / "busy").write_bytes(b"precious")
    done = interrupted(tmp_path, signal.SIGTERM, "block_qcow2.locks:lock", "convert", "source", "busy", count=2)
    assert done.returncode == -signal.SIGTERM
    # The signal came before the file was emptied, and waited until it was ours.
    assert not (tmp_path / "busy").exists()
    (tmp_path / "busy").write_bytes(b"precious")
    done = interrupted(tmp_path, signal.SIGTERM, "block_qcow2.images:create_image", "convert", "-f", "vdi", "source", "busy")
    assert done.returncode == 1  # not a vdi image: nothing was made
    assert (tmp_path / "busy").read_bytes() == b"precious"


def test_an_existing_target_stays_and_is_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").write_bytes(bytes(8 * MiB))
    done = interrupted(tmp_path, signal.SIGTERM, "block_qcow2.img.copy:_write", "convert", "-n", "source", "out", count=3)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == "stratovirt-img: out: not everything was written\n"
    assert (tmp_path / "out").stat().st_size == 8 * MiB


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "words",
    [
        ["snapshot", "-c", "a", "image"],
        ["resize", "--allow-chain", "image", "+64M"],
        ["rebase", "--allow-chain", "-b", "", "image"],
        ["commit", "--allow-chain", "image"],
        ["amend", "-o", "refcount_bits=32", "image"],
        ["bitmap", "--add", "image", "b"],
    ],
    ids=lambda w: w[0],
)
def test_an_image_changed_in_place_survives(tmp_path: Path, words: list[str], count: int) -> None:
    base, image = tmp_path / "base", tmp_path / "image"
    qemu_img("create", "-f", "qcow2", base, "4M")
    qemu_io(base, "write -P 1 0 2M")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    qemu_io(image, "write -P 2 1M 2M")
    done = interrupted(tmp_path, signal.SIGTERM, "block_qcow2.hostfile:HostFile.writev", *words, count=count)
    assert done.returncode in (0, -signal.SIGTERM), done.stderr
    assert done.stderr == ""
    qemu_img("check", "-q", "-r", "leaks", image)
    is_clean(image)
    qemu_io(image, "read -P 1 0 1M", "read -P 2 1M 2M")


def test_signals_that_were_ignored_stay_ignored(tmp_path: Path, source: Path) -> None:
    """As under nohup."""
    command = ["sh", "-c", 'trap "" HUP INT; exec "$@"', "sh", sys.executable, "-c", _RUNNER]
    for number in (signal.SIGHUP, signal.SIGINT):
        words = [str(int(number)), "block_qcow2.img.copy", "_write", "1", "convert", "source", "out"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "out").read_bytes() == source.read_bytes()
