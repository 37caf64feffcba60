"""What is run again in a fresh lab: few failures, and what a lab that died had not come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lab import probe, suite, summary


class Labs:
    """Stands for labs that run tests: each is (what is written down, whether pytest came to its report, exit status)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *runs: tuple[str, bool, int], native: bool = False) -> None:
        self.runs, self.commands = list(runs), list[Sequence[str]]()
        monkeypatch.setattr(suite, "_lab", self.run)
        monkeypatch.setattr(probe, "probe", lambda: probe.Answer(native, "a test says so"))

    def run(self, command: Sequence[str], out: Path, dmesg: str, report: Path, limit: float) -> int:
        lines, reported, status = self.runs.pop(0)
        self.commands.append(command)
        with (out / suite.OUTCOMES).open("a") as file:
            file.write(lines)
        if reported:
            suite.write_report(report, [line.split()[1] for line in lines.splitlines() if line.startswith("passed")])
        return status


def test_nothing_runs_again_when_everything_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("passed a::b\n", True, 0))
    assert suite.run(["pytest"], tmp_path, 1) == 0
    assert len(labs.commands) == 1


def test_what_failed_runs_once_more_and_counts_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("passed a::b\nfailed a::c\npassed a::c\npassed a::d\n", True, 1), ("passed a::c\n", True, 0))
    assert suite.run(["pytest"], tmp_path, 1) == 0
    assert (tmp_path / "passed.txt").read_text() == "a::b\na::d\n"
    assert labs.commands[1][-1] == f"--passed-already={tmp_path}/passed.txt"
    assert sum(summary.report(file).passed for file in tmp_path.glob("lab*.xml")) == 3


def test_what_fails_twice_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Labs(monkeypatch, ("failed a::c\n", True, 1), ("failed a::c\n", True, 1))
    assert suite.run(["pytest"], tmp_path, 1) == 1


def test_a_lab_that_died_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("passed a::b\npassed a", False, 125), ("passed a::c\n", True, 0))
    assert suite.run(["pytest"], tmp_path, 1) == 0
    assert (tmp_path / "passed.txt").read_text() == "a::b\n"
    assert len(labs.commands) == 2


def test_many_failures_are_no_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("".join(f"failed a::{n}\n" for n in range(suite.AGAIN_MAX + 1)), True, 1))
    assert suite.run(["pytest"], tmp_path, 1) == 1
    assert len(labs.commands) == 1


def test_a_machine_that_runs_guests_itself_runs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("failed a::c\n", True, 1), native=True)
    assert suite.run(["pytest"], tmp_path, 1) == 1
    assert len(labs.commands) == 1
