"""The command reaches the lab as it was typed, and wrong orders are answered in one line."""

from __future__ import annotations

import subprocess
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
    ],
)
def test_a_wrong_order_is_one_line_and_status_125(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == cli.EXIT_LAB
    assert capsys.readouterr().err == message + "\n"
