"""stratovirt-img where standard streams are closed, full or left by their reader: no traceback, and no message in an image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from block_qcow2 import create_image, open_image

MiB = 1 << 20


def run(folder: Path, streams: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command with the redirections of a shell."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "block_qcow2.img", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_images(tmp_path: Path, streams: str) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "raw").write_bytes(content)
    assert run(tmp_path, streams, "convert", "-p", "-O", "qcow2", "raw", "made").returncode == 0
    with open_image(tmp_path / "made") as image:
        assert image.read(0, MiB) == content
    assert run(tmp_path, streams, "info", "made").returncode == 0
    before = (tmp_path / "made").read_bytes()
    done = run(tmp_path, streams, "convert", "-n", "-O", "qcow2", "raw", "none")
    assert done.returncode == 1
    assert done.stdout == ""  # an error is no result, wherever standard error leads
    # What fails in the middle of writing to an image that stays says so, and not into the image.
    (tmp_path / "longer").write_bytes(bytes(2 * MiB))
    assert run(tmp_path, streams, "convert", "-n", "-O", "qcow2", "longer", "made").returncode == 1
    assert (tmp_path / "made").read_bytes() == before


def test_a_full_standard_output_is_an_error(tmp_path: Path) -> None:
    create_image(tmp_path / "image", MiB)
    done = run(tmp_path, ">/dev/full", "info", "image")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr


def test_a_reader_that_has_gone_is_no_news(tmp_path: Path) -> None:
    create_image(tmp_path / "image", MiB)
    for words in (["info", "image"], ["compare", "image", "image"], ["compare", "-f", "raw", "image", "image"]):
        done = run(tmp_path, "| true; exit 0", *words)
        assert done.stderr == ""
