"""No command opens what an image names, and exit codes and kernel copies are what they are said to be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import Options, create_image, open_image

MiB = 1 << 20

# Every command, on an image ("evil") that names a data file, or a backing file.
COMMANDS = [
    ["amend", "-o", "size=2M", "evil"],
    ["amend", "-o", "lazy_refcounts=on", "evil"],
    ["amend", "-o", "data_file_raw=on", "evil"],
    ["bench", "-c", "1", "evil"],
    ["bench", "-w", "-c", "1", "evil"],
    ["bitmap", "--add", "evil", "b"],
    ["bitmap", "--add", "--merge", "c", "-b", "evil", "-F", "qcow2", "plain", "b"],
    ["check", "evil"],
    ["check", "-r", "all", "evil"],
    ["commit", "evil"],
    ["compare", "evil", "plain"],
    ["compare", "plain", "evil"],
    ["convert", "evil", "out"],
    ["convert", "-n", "plain", "evil"],
    ["convert", "-n", "-O", "qcow2", "plain", "evil"],
    ["convert", "-O", "qcow2", "-B", "evil", "-F", "qcow2", "plain", "out"],
    ["create", "-f", "qcow2", "-b", "evil", "-F", "qcow2", "out"],
    ["create", "-f", "qcow2", "-b", "evil", "-F", "qcow2", "-o", "extended_l2=on,preallocation=metadata", "out"],
    ["dd", "if=evil", "of=out"],
    ["info", "evil"],
    ["info", "--backing-chain", "evil"],
    ["info", "--backing-chain", "--output", "json", "evil"],
    ["map", "evil"],
    ["measure", "-O", "qcow2", "evil"],
    ["rebase", "-b", "plain", "-F", "qcow2", "evil"],
    ["rebase", "-b", "evil", "-F", "qcow2", "plain"],
    ["rebase", "-u", "-b", "plain", "-F", "qcow2", "evil"],
    ["resize", "evil", "+1M"],
    ["resize", "--shrink", "evil", "512K"],
    ["serve", "-k", "socket", "evil"],
    ["serve", "--type", "vhost-user-blk", "-k", "socket", "evil"],
    ["snapshot", "-l", "evil"],
    ["snapshot", "-c", "a", "evil"],
    ["snapshot", "-d", "a", "evil"],
    ["snapshot", "-a", "a", "evil"],
]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The last part of every path that is opened, by whatever means."""
    names: list[str] = []
    original = os.open

    def noting(path: Any, *words: Any, **more: Any) -> int:
        names.append(os.path.basename(os.fspath(path)))  # noqa: PTH119
        return original(path, *words, **more)

    monkeypatch.setattr("os.open", noting)
    return names


@pytest.mark.parametrize(
    "named", [Options(data_file="secret"), Options(backing_file="secret", backing_format="raw")], ids=["data", "backing"]
)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_nothing_that_an_image_names_is_opened(img: Any, opened: list[str], named: Options, words: list[str]) -> None:
    create_image("evil", MiB, options=named)
    create_image("plain", MiB)
    Path("secret").write_bytes(b"secret")
    opened.clear()
    said = img(*words)
    assert "secret" not in opened
    assert Path("secret").read_bytes() == b"secret"
    assert "evil" in opened
    if said.status:
        assert said.err.count("\n") == 1


def test_a_new_image_replaces_no_file_that_the_old_one_named(img: Any, opened: list[str]) -> None:
    create_image("evil", MiB, options=Options(data_file="secret"))
    Path("secret").write_bytes(b"secret")
    opened.clear()
    assert img("create", "-f", "qcow2", "evil", "1M").status == 0
    assert "secret" not in opened


def test_compare_says_3_where_it_cannot_be_known_what_is_there(img: Any) -> None:
    create_image("good", MiB)
    create_image("bad", MiB)
    with open_image("bad", read_only=False) as image:
        image.write(0, b"x")
        table = image.l1[0] & 0x00FFFFFFFFFFFE00  # type: ignore[attr-defined]
    with Path("bad").open("r+b") as file:
        file.seek(table)
        file.write(((1 << 63) | 0x200).to_bytes(8, "big"))  # not at the start of a cluster
    for words in (["good", "bad"], ["bad", "good"]):
        said = img("compare", *words)
        assert (said.status, said.out) == (3, "")
        assert said.err.startswith("stratovirt-img: bad: ")
        assert said.err.count("\n") == 1
    assert img("compare", "good", "missing").status == 2


@pytest.fixture
def kernel_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each os.copy_file_range, which this file system has to offer."""
    done: list[int] = []
    original = os.copy_file_range

    def counting(*words: Any) -> int:
        n = original(*words)
        done.append(n)
        return n

    monkeypatch.setattr("os.copy_file_range", counting)
    return done


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_the_kernel_copies_what_it_is_asked_to(img: Any, kernel_copies: list[int], fmt: str) -> None:
    data = os.urandom(3 * MiB) + bytes(MiB) + os.urandom(MiB)
    Path("plain").write_bytes(data)
    img("convert", "-O", fmt, "plain", "in")
    assert img("convert", "-C", "-O", "raw", "in", "out").status == 0
    assert Path("out").read_bytes() == data
    assert 4 * MiB <= sum(kernel_copies) <= 5 * MiB
    kernel_copies.clear()
    assert img("convert", "-O", "raw", "in", "out").status == 0
    assert kernel_copies == []


def test_where_the_kernel_cannot_copy_the_command_does(img: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refused(*_: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    data = os.urandom(MiB)
    Path("in").write_bytes(data)
    monkeypatch.setattr("os.copy_file_range", refused)
    assert img("convert", "-C", "in", "out").status == 0
    assert Path("out").read_bytes() == data
