"""What the tests of the block package share."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from block_qcow2.img import main

# Where it is set, output that is lost at the end of a program would go unnoticed.
os.environ.pop("PYTHONUNBUFFERED", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs an extra (zstandard, cryptography, anyio), so that the bare package can be tested without.

    Everything runs where all extras are installed; nothing is skipped there.
    """
    for item in items:
        if item.path.name.startswith(("test_nbd", "test_qcow2_luks")) or any(
            word in item.nodeid for word in ("zstd", "encrypted", "serve -k")
        ):
            item.add_marker(pytest.mark.extras)


class Driver:
    """Plays the I/O thread: issues one request at a time on a channel and waits for its result."""

    def __init__(self, disk: Any) -> None:
        self.disk = disk
        self.channel = disk.channel()
        self._poll = select.poll()
        self._poll.register(self.channel.completion_fd, select.POLLIN)

    def wait(self, inline: int | None) -> int:
        if inline is not None:
            return inline
        [(_, result)] = self.wait_for(1)
        return result

    def wait_for(self, count: int) -> list[tuple[Any, int]]:
        self.channel.submit()
        found: list[tuple[Any, int]] = []
        while len(found) < count:
            assert self._poll.poll(60_000), "no completion within a minute"
            found += self.channel.completions()
        return found

    def read(self, offset: int, length: int, pieces: int = 1) -> bytes:
        data = bytearray(length)
        assert self.wait(self.channel.readv(offset, cut(data, pieces), "read")) == 0
        return bytes(data)

    def write(self, offset: int, data: bytes, pieces: int = 1) -> int:
        return self.wait(self.channel.writev(offset, cut(bytearray(data), pieces), "write"))


def cut(data: bytearray, pieces: int) -> list[memoryview]:
    """Views that together are `data`."""
    view = memoryview(data)
    step = max(1, len(data) // pieces)
    edges = [*range(0, len(data), step)][:pieces] or [0]
    return [view[a:b] for a, b in zip(edges, [*edges[1:], len(data)], strict=True)]


@pytest.fixture
def descriptors_stay(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a descriptor open."""
    before = open_descriptors()
    yield
    left = open_descriptors().items() - before.items()
    assert not left, f"left open: {left}"


def open_descriptors() -> dict[str, str]:
    """What this process has open: descriptor number to name, the descriptor that lists them excepted."""
    return {fd.name: str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def img(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> Said:
        capsys.readouterr()
        status = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return Said(status, out, err)

    return run
