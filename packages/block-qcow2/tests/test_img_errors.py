"""What stratovirt-img says when something is wrong: one line that names the file or option, whatever was typed; no traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from block_qcow2 import create_image, open_image
from block_qcow2.errors import OpenError
from block_qcow2.hostfile import HostFile
from block_qcow2.img import main
from block_qcow2.qcow2.create import Options

from .qemu import qemu_img

MiB = 1 << 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["create", "x", "8E"], "Invalid image size '8E'"),
        (["create", "-f", "qcow2", "x", "8E"], "Invalid image size '8E'"),
        (["create", "-f", "qcow2", "-o", "cluster_size=0", "x", "1M"], "cluster_size=0: expected a power of two"),
        (["resize", "-f", "raw", "raw", "8E"], "Invalid size '8E'"),
        (["convert", "-S", "15E", "-O", "raw", "raw", "x"], "Invalid sparse size '15E'"),
        (["convert", "-S", "32M", "-O", "raw", "raw", "x"], "Invalid sparse size 33554432"),
        (["measure", "-O", "qcow2", "-o", "cluster_size=0", "--size", "1G"], "cluster_size=0"),
        (["bitmap", "-g", "0", "--add", "qcow2", "b"], "granularity 0"),
        (["info", "no\nsuch\x1bfile"], "no\\nsuch\\x1bfile: No such file"),
        (["compare", "no\nfile", "raw"], "no\\nfile: No such file"),
        (["frob\nnicate"], "Command not found: frob\\nnicate"),
        (["create", "x", "9" * 5000], "expected a number, with a suffix"),
        (["bench", "-c", "1_000", "raw"], "Invalid request count '1_000': expected 1 to"),
        (["create", "-f", "vdi", "x", "1M"], "Unknown format type 'vdi': expected raw, qcow2"),
        (["map", "-f", "qcow", "raw"], "Unknown format type 'qcow': expected raw, qcow2, vdi"),
        (["create", "-f", "qcow2", "-o", "clustersize=1", "x", "1M"], "Invalid parameter 'clustersize': '-o help' lists"),
        (["create", "-o", "cluster_size=512", "x", "1M"], "does not support parameter 'cluster_size': expected extent_size_hint"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_numbers_and_names_out_of_bounds(img: Any, words: list[str], says: str) -> None:
    img("create", "raw", "1M")
    img("create", "-f", "qcow2", "qcow2", "1M")
    said = img(*words)
    assert said.status == (2 if words[0] == "compare" else 1)
    assert said.out == ""
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not Path("x").exists()
    assert img("check", "qcow2").status == 0


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_a_loss_of_power_while_an_image_grows_with_its_space_leaves_it_whole(
    img: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    create_image("image", MiB)
    with open_image("image", read_only=False) as image:
        image.write(0, b"a" * MiB)
    lost: list[Path] = []

    def losing(original: Any) -> Any:
        def loses(*arguments: Any) -> None:
            lost.append(Path(f"lost {len(lost)}"))
            shutil.copy("image", lost[-1])
            original(*arguments)

        return loses

    with monkeypatch.context() as patch:
        for name in ("truncate", "flush"):
            patch.setattr(HostFile, name, losing(getattr(HostFile, name)))
        assert img("resize", f"--preallocation={mode}", "image", "+8M").status == 0
    for path in lost:
        with open_image(path) as image:
            assert not image.check().corruptions
            assert image.read(0, MiB) == b"a" * MiB


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files cannot grow beyond 4 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MiB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("words", [["-O", "raw"], ["-O", "qcow2"], ["-c", "-O", "qcow2"], ["-W", "-O", "qcow2"]], ids=" ".join)
def test_a_file_that_cannot_grow_is_named(img: Any, words: list[str]) -> None:
    for name in "abcd":
        Path(name).write_bytes(os.urandom(2 * MiB))
    assert img("convert", *words, *"abcd", "out") == (1, "", "stratovirt-img: out: File too large\n")
    assert not Path("out").exists()


def test_a_full_disk_and_a_failing_source_are_named(img: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in").write_bytes(b"\1" * MiB)

    def no_space(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("os.pwritev", no_space)
        assert img("convert", "in", "out") == (1, "", "stratovirt-img: out: No space left on device\n")
        assert img("create", "-f", "qcow2", "out", "1M") == (1, "", "stratovirt-img: out: No space left on device\n")
    with monkeypatch.context() as patch:
        patch.setattr("os.fdatasync", no_space)
        assert img("create", "-f", "qcow2", "out", "1M") == (1, "", "stratovirt-img: out: No space left on device\n")
    create_image("other", MiB, format="raw")
    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", broken)
        assert img("convert", "-f", "raw", "in", "out") == (1, "", "stratovirt-img: in: Input/output error\n")
        said = img("compare", "-f", "raw", "-F", "raw", "in", "other")
        assert (said.status, said.err) == (4, "stratovirt-img: Error while reading offset 0 of in: in: Input/output error\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "-w", "-U", "image"],
        ["check", "-r", "all", "-U", "image"],
        ["snapshot", "-U", "-c", "a", "image"],
        ["snapshot", "-U", "-d", "a", "image"],
        ["snapshot", "-U", "-a", "a", "image"],
    ],
    ids=" ".join,
)
def test_what_writes_does_not_share(img: Any, words: list[str]) -> None:
    img("create", "-f", "qcow2", "image", "1M")
    before = Path("image").read_bytes()
    said = img(*words)
    assert (said.status, "-U is for reading" in said.err) == (1, True)
    assert Path("image").read_bytes() == before


def test_the_library_does_not_share_what_it_writes(tmp_path: Path) -> None:
    create_image(tmp_path / "image", MiB)
    with pytest.raises(OpenError, match="sharing is for reading"):
        open_image(tmp_path / "image", read_only=False, force_share=True)


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "-O", "qcow2", "-B", "evil", "-F", "qcow2", "raw", "out"],
        ["convert", "-O", "qcow2", "-o", "data_file=evil.data", "-B", "evil", "-F", "qcow2", "raw", "out"],
        ["create", "-f", "qcow2", "-o", "preallocation=metadata,extended_l2=on", "-b", "evil", "-F", "qcow2", "out", "1M"],
        ["rebase", "--allow-chain=", "-b", "evil", "-F", "qcow2", "plain"],
    ],
    ids=lambda w: w[0],
)
def test_what_a_typed_backing_file_names_is_not_opened(img: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    words = [w for w in words if w != "--allow-chain="]
    Path("secret").write_bytes(b"secret" * MiB)
    img("create", "raw", "1M")
    img("create", "-f", "qcow2", "plain", "1M")
    create_image("evil", MiB, options=Options(backing_file="secret", backing_format="raw"))
    opened: list[str] = []
    original = os.open

    def noting(path: Any, *a: Any, **k: Any) -> int:
        opened.append(str(path))
        return original(path, *a, **k)

    monkeypatch.setattr("os.open", noting)
    said = img(*words)
    assert not [p for p in opened if p.endswith("secret")]
    if words[0] != "create":  # which need not look into it
        assert (said.status, "secret': opening it has to be allowed" in said.err) == (1, True), said
        assert not Path("out").exists()
    else:
        assert said.status == 0, said


def test_a_typed_backing_file_is_opened(img: Any) -> None:
    Path("base").write_bytes(b"\1" * MiB)
    Path("raw").write_bytes(b"\1" * (MiB // 2) + b"\2" * (MiB // 2))
    assert img("convert", "-O", "qcow2", "-B", "base", "-F", "raw", "raw", "out").status == 0
    qemu_img("compare", "-f", "raw", "-F", "qcow2", "raw", "out")


# --- whatever is typed ---

_COMMANDS = "create check resize snapshot info map compare measure convert amend bench bitmap dd commit rebase".split()  # noqa: SIM905
_NAMES = ["raw", "qcow2", "text", "folder", "absent", "new", "bad\nname", "", "-", "é", "\udcff"]
_NUMBERS = ["0", "1", "-1", "511", "512", "1M", "+1M", "-1M", "1.5M", "8E", "7.9E", "15E", "1e9", "99999999999999999999", "x"]
_PAIRS = [
    "cluster_size",
    "refcount_bits",
    "compat",
    "preallocation",
    "size",
    "encrypt.format",
    "backing_file",
    "data_file",
    "help",
]
_OPTIONS = [f"-{c}" for c in "fFoOblaBcdnpqrsStTuUwWCmgehpki"]
_LONG = "output size shrink add remove clear merge bitmaps salvage object key-file allow-chain force preallocation image-opts"
_LONG += " backing-chain start-offset max-length direct"
_OPTIONS += [f"--{name}" for name in _LONG.split()] + ["--"]
_VALUES = [
    "raw",
    "qcow2",
    "vdi",
    "vpc",
    "json",
    "leaks",
    "all",
    "none",
    "unsafe",
    "secret,id=a,data=b",
    "if=raw",
    "of=new",
    "bs=0",
]
_word = st.one_of(
    st.sampled_from(_NAMES + _NUMBERS + _VALUES + _OPTIONS),
    st.builds("{}={}".format, st.sampled_from(_PAIRS), st.sampled_from([*_NUMBERS, "on", "off", "luks", "full", "0.10"])),
)
# Sizes that take long are no matter of messages: files of at most 16 MiB, and few requests.
_SLOW = {"bench": ["-c", "3"]}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(command=st.sampled_from(_COMMANDS), words=st.lists(_word, max_size=6))
def test_any_command_line_ends_in_a_status_and_at_most_one_line(
    command: str, words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "raw").write_bytes(b"\1" * 4096 + bytes(MiB - 4096))
    (folder / "text").write_text("text\n")
    (folder / "folder").mkdir()
    create_image(folder / "qcow2", MiB, options=Options(cluster_size=4096))
    out, err = io.StringIO(), io.StringIO()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * MiB, before[1]))
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([command, *_SLOW.get(command, []), *words])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = [line for line in err.getvalue().splitlines() if "/100%)" not in line]
    if status == 0:
        assert not [line for line in lines if "warning" not in line]
    elif command == "compare":
        assert status in (1, 2, 3, 4)
        assert len(lines) == (status > 1 or not out.getvalue())
    elif command == "check":
        assert status in (1, 2, 3, 63)
        assert len(lines) == 1
    else:
        assert status == 1
        assert len(lines) == 1, (lines, command, words)
        assert lines[0].startswith("stratovirt-img: ")
