"""The demo up to the guest: what it answers, and what it leaves when it is ended while it sets itself up for the first time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.vmm import session_processes

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds, for what takes five


def demo(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the demo in a session of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools/demo"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--qmp", ""], "--qmp '': must be the name of a QMP command, such as query-status"),
        (["--qmp", " "], "--qmp ' ': must be the name of a QMP command, such as query-status"),
        (["--qmp"], "--qmp expected one argument"),
        (["--qmp", "query-status", "--check"], "--check not allowed with argument --qmp"),
        (["--smp", "0"], "--smp 0: must be a whole number, at least 1"),
        (["--memory", "1G"], "--memory 1G: must be a whole number, at least 128"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_a_wrong_order_is_one_line_and_status_1_and_boots_nothing(arguments: list[str], answer: str, empty_cache: Path) -> None:
    process = demo(*arguments)
    assert process.communicate(timeout=LIMIT) == ("", f"tools/demo: {answer}\n")
    assert process.returncode == 1
    assert not empty_cache.exists()


def test_a_question_to_nobody_is_answered_with_where_nobody_was(empty_cache: Path) -> None:
    process = demo("--qmp", "query-status")
    assert process.communicate(timeout=LIMIT) == ("", f"tools/demo: nothing listens on {empty_cache}/demo.sock within 5 s\n")
    assert process.returncode == 1


def test_a_question_that_cannot_be_asked_is_answered_with_one_line(tmp_path: Path) -> None:
    process = demo("--qmp", "query-status", XDG_CACHE_HOME=str(tmp_path / ("x" * 120)))
    out, said = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (1, "")
    assert said.startswith("tools/demo: ")
    assert said.endswith("demo.sock: AF_UNIX path too long\n")


def test_a_second_demo_leaves_the_first_ones_disk_alone(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as guest:
        guest.bind(str(empty_cache / "demo.sock"))
        guest.listen()
        process = demo()
        out, said = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (1, "")
    assert said == f"tools/demo: a guest runs already, and answers on {empty_cache}/demo.sock; 'poweroff' in it ends it\n"


@pytest.mark.parametrize(
    ("arguments", "number"),
    [([], signal.SIGTERM), ([], signal.SIGINT), (["--check"], signal.SIGTERM), (["--check"], signal.SIGHUP)],
    ids=["SIGTERM", "SIGINT", "SIGTERM to a check", "SIGHUP to a check"],
)
def test_a_signal_during_the_first_set_up_ends_all_of_it_and_leaves_nothing(
    empty_cache: Path, tmp_path: Path, arguments: list[str], number: signal.Signals
) -> None:
    """It is sent while pip waits for an index that does not answer. Nothing is installed on the way: apt is not apt here."""
    programs, scratch = tmp_path / "programs", tmp_path / "scratch"
    scratch.mkdir()
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "sudo"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    with socket.socket() as index:
        index.bind(("127.0.0.1", 0))
        index.listen()
        index.settimeout(LIMIT)
        process = demo(
            *arguments,
            PATH=f"{programs}:{os.environ['PATH']}",
            TMPDIR=str(scratch),
            PIP_INDEX_URL=f"http://127.0.0.1:{index.getsockname()[1]}/simple",
            PIP_CONFIG_FILE=os.devnull,
            PIP_CACHE_DIR=str(tmp_path / "pip"),
            NO_PROXY="*",
        )
        try:
            connection, _ = index.accept()
        except TimeoutError:
            process.kill()
            raise AssertionError(process.communicate()) from None
        process.send_signal(number)
        out, said = process.communicate(timeout=LIMIT)
        connection.close()
    assert (process.returncode, out) == (128 + number, "")
    assert "Traceback" not in said
    assert session_processes(process.pid) == []
    assert list(scratch.iterdir()) == []
    assert sorted(path.name for path in empty_cache.rglob("*") if path.parent != empty_cache / "locks") == ["locks", "python"]
