"""The command reaches the lab as it was typed, wrong orders are answered in one line, and a lab host that is still is ended."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import cli, host

word = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@given(st.lists(word, max_size=4), word)
def test_every_word_and_variable_arrives_unchanged(words: list[str], value: str) -> None:
    script = host.job_script(["printf", "%s\\0", *words, "end"], "/", {"X": value, "PATH": "/usr/bin:/bin"})
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert done.stdout == b"".join(item.encode() + b"\0" for item in [*words, "end"])
    script = host.job_script(["sh", "-c", 'printf %s "$X"; env'], "/", {"X": value, "PATH": "/usr/bin:/bin"})
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert done.stdout.startswith(value.encode())


@pytest.mark.parametrize(
    ("version", "nested"),
    [("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", False), ("QEMU emulator version 10.0.2", True), ("", False)],
)
def test_nested_paging_is_for_those_that_emulate_it(version: str, nested: bool) -> None:
    assert host.nested_paging(version) is nested


def test_the_commands_status_is_the_scripts(tmp_path: Path) -> None:
    def status(command: list[str], folder: str) -> int:
        script = host.job_script(command, folder, {"PATH": "/usr/bin:/bin"})
        return subprocess.run(["sh", "-c", script], capture_output=True, check=False).returncode

    assert status(["sh", "-c", "exit 7"], "/") == 7
    assert status(["/no/such/program"], "/") == 127
    assert status(["true"], str(tmp_path / "gone")) == 125


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "lab: no command: lab run [OPTIONS] -- COMMAND..."),
        (["run", "--arch", "aarch64", "--", "true"], "lab: --arch aarch64: not supported yet; there is: x86_64"),
        (["run", "--smp", "0", "--", "true"], "lab: --smp must be at least 1, --memory at least 512"),
        (["run", "--stall", "9", "--", "true"], "lab: --stall 9: must be more than 10 s: that often the lab host is heard of"),
        (
            ["run", "--stall", "nan", "--", "true"],
            "lab: --stall nan: must be more than 10 s: that often the lab host is heard of",
        ),
    ],
)
def test_a_wrong_order_is_one_line_and_status_125(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == cli.EXIT_LAB
    assert capsys.readouterr().err == message + "\n"


STALL = 0.3  # seconds


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[host._Host, dict[str, int]]]:
    """A lab host without a machine, and the machine's ends of its ports. It is up and has said nothing since."""
    monkeypatch.setattr(host, "_LOOK", STALL / 10)
    with ExitStack() as stack:
        served = host._Host(stack, host.Options(stall=STALL), "token")
        ports = {name: served._port(name) for name in ("stdout", "stderr", "dmesg", "control")}
        for descriptor in ports.values():
            stack.callback(os.close, descriptor)
        os.write(ports["control"], b"up\n")
        yield served, ports


def test_a_lab_host_of_which_nothing_is_heard_is_ended(still: tuple[host._Host, dict[str, int]]) -> None:
    with pytest.raises(host.LabError, match=r"stands still: not a word for 0\.3 s"):
        still[0].serve(None)


def test_a_lab_host_whose_output_nobody_took_for_long_did_not_stand_still(
    still: tuple[host._Host, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, ports = still
    taken = []

    def take(_descriptor: int, data: bytes) -> None:
        time.sleep(2 * STALL)
        os.write(ports["control"], b"alive\nexit 7\n")
        for name in ("stdout", "stderr", "dmesg"):
            os.write(ports[name], b"\1token")
        taken.append(data)

    monkeypatch.setattr(host, "_write", take)
    os.write(ports["stdout"], b"a page of a pager")
    assert served.serve(None) == 7
    assert taken == [b"a page of a pager"]
