"""Progress on a terminal, a real one (pty): everything long shows it and ends at 100 %; nothing does where nobody looks."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from .qemu import qemu_img, qemu_io

MiB = 1 << 20


def everything(terminal: int) -> bytes:
    """What is shown until nobody has the other side any more. It comes in pieces, also when that has been a while ago."""
    shown = b""
    with suppress(OSError):  # EIO: the other side has gone
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    return shown


def on_a_terminal(folder: Path, *words: str) -> str:
    """What a command shows on standard error, which is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "block_qcow2.img", *words]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = everything(ours)
    assert process.returncode == 0, shown
    return shown.decode()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "raw").write_bytes(b"\7" * (4 * MiB))
    qemu_img("create", "-f", "qcow2", tmp_path / "base", "8M")
    qemu_io(tmp_path / "base", "write -P 1 0 8M")
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "base", "-F", "qcow2", tmp_path / "top")
    qemu_io(tmp_path / "top", "write -P 2 1M 4M")
    return tmp_path


def test_a_reader_who_leaves_stops_nothing_half_way(images: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "block_qcow2.img", "snapshot", "-p", "-c", "one", "base"]
    assert subprocess.run(command, cwd=images, stderr=writer, check=False).returncode == 0
    os.close(writer)
    assert "one" in qemu_img("snapshot", "-l", images / "base")


LONG = [
    ["convert", "-O", "qcow2", "raw", "out"],
    ["convert", "-C", "raw", "out"],
    ["convert", "-c", "-O", "qcow2", "raw", "out"],
    ["dd", "if=raw", "of=out", "bs=1M"],
    ["check", "base"],
    ["snapshot", "-c", "now", "base"],
    ["compare", "base", "base"],
    ["commit", "--allow-chain", "top"],
    ["rebase", "--allow-chain", "-b", "", "top"],
    ["amend", "-o", "refcount_bits=32", "base"],
    ["create", "-f", "qcow2", "-o", "preallocation=metadata", "out", "64M"],
    ["create", "-f", "qcow2", "-o", "preallocation=full", "out", "4M"],
    ["create", "-f", "raw", "-o", "preallocation=falloc", "out", "4M"],
    ["resize", "--preallocation", "full", "base", "+4M"],
]


@pytest.mark.parametrize("words", LONG, ids=lambda w: " ".join(w[:3]))
def test_what_may_take_long_shows_how_far_it_is(images: Path, words: list[str]) -> None:
    shown = on_a_terminal(images, *words)
    shares = [float(share) for share in re.findall(r" {4}\((\d+\.\d\d)/100%\)\r", shown)]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert shown.endswith("(100.00/100%)\r\r\n")  # the terminal makes CR LF of the end of the line


@pytest.mark.parametrize("words", [w for w in LONG if w[0] != "dd"], ids=lambda w: " ".join(w[:3]))
def test_quiet_is_quiet_on_a_terminal_too(images: Path, words: list[str]) -> None:
    assert on_a_terminal(images, words[0], "-q", *words[1:]) == ""


def test_commands_that_take_no_time_show_nothing(images: Path) -> None:
    for words in (["info", "raw"], ["create", "-f", "qcow2", "new", "1M"], ["resize", "-f", "raw", "raw", "+1M"]):
        assert on_a_terminal(images, *words) == ""


@pytest.mark.parametrize("words", LONG, ids=lambda w: " ".join(w[:3]))
def test_nothing_is_shown_where_nobody_looks(images: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "block_qcow2.img", *words]
    done = subprocess.run(command, cwd=images, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_pipe_may_ask_for_it(images: Path) -> None:
    command = [sys.executable, "-m", "block_qcow2.img", "convert", "-p", "-O", "qcow2", "raw", "out"]
    done = subprocess.run(command, cwd=images, capture_output=True, check=True)
    assert done.stderr.endswith(b"(100.00/100%)\r\n")


def test_what_fails_does_not_claim_to_be_done(images: Path) -> None:
    command = [sys.executable, "-m", "block_qcow2.img", "convert", "-p", "-O", "qcow2", "raw", "missing/out"]
    done = subprocess.run(command, cwd=images, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"100.00" not in done.stderr


def test_a_result_stands_on_a_line_of_its_own(images: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "block_qcow2.img", "compare", "-f", "raw", "-F", "raw", "raw", "raw"]
    subprocess.run(command, cwd=images, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    assert everything(ours).endswith(b"(100.00/100%)\r\r\nImages are identical.\r\n")
