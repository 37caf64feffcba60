"""How tests are shared out over lab hosts; what is run again in a fresh one: few failures, and what a host that died left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lab import probe, suite, summary


class Labs:
    """Stands for labs that run tests: each is (what is written down, whether pytest came to its report, exit status)."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *runs: tuple[str, bool, int], native: bool = False, hosts: int = 1
    ) -> None:
        self.runs, self.commands = list(runs), list[Sequence[str]]()
        monkeypatch.setattr(suite, "_together", self.together)
        monkeypatch.setattr(suite, "hosts", lambda: hosts)
        monkeypatch.setattr(probe, "probe", lambda: probe.Answer(native, "a test says so"))

    def together(self, commands: Sequence[Sequence[str]], parts: Sequence[suite.Part], limit: float) -> list[int]:
        return [self.run(command, part) for command, part in zip(commands, parts, strict=True)]

    def run(self, command: Sequence[str], part: suite.Part) -> int:
        lines, reported, status = self.runs.pop(0)
        self.commands.append(command)
        (part.folder / suite.OUTCOMES).write_text(lines)
        if reported:
            suite.write_report(part.report, [line.split()[1] for line in lines.splitlines() if line.startswith("passed")])
        return status


def reported(out: Path) -> int:
    return sum(summary.report(file).passed for file in out.glob("lab*.xml"))


def test_nothing_runs_again_when_everything_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("passed a::b\n", True, 0))
    assert suite.run(["pytest"], tmp_path, 1) == 0
    assert labs.commands == [["pytest"]]
    assert reported(tmp_path) == 1


def test_hosts_side_by_side_take_their_tests_from_one_list_and_all_must_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labs = Labs(monkeypatch, ("passed a::b\n", True, 0), ("passed a::c\n", True, 0), hosts=2)
    assert suite.run(["pytest"], tmp_path, 1) == 0
    assert labs.commands == [["pytest", f"--claims={tmp_path}/claims"]] * 2
    assert not list((tmp_path / "claims").iterdir())
    assert reported(tmp_path) == 2
    many = "".join(f"failed a::{n}\n" for n in range(suite.AGAIN_MAX + 1))
    Labs(monkeypatch, ("passed a::b\n", True, 0), (many, True, 1), hosts=2)
    assert suite.run(["pytest"], tmp_path, 1) == 1


def test_a_part_without_tests_is_fine_and_a_run_without_tests_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Labs(monkeypatch, ("passed a::b\n", True, 0), ("", True, 0), hosts=2)
    assert suite.run(["pytest"], tmp_path, 1) == 0
    Labs(monkeypatch, ("", True, 0), ("", True, 0), hosts=2)
    assert suite.run(["pytest"], tmp_path, 1) != 0


def test_what_failed_runs_once_more_and_counts_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(
        monkeypatch,
        ("passed a::b\nfailed a::c\npassed a::c\n", True, 1),
        ("passed a::d\n", True, 0),
        ("passed a::c\n", True, 0),
        hosts=2,
    )
    assert suite.run(["pytest"], tmp_path, 1) == 0
    assert (tmp_path / "passed.txt").read_text() == "a::b\na::d\n"
    assert labs.commands[2] == ["pytest", f"--passed-already={tmp_path}/passed.txt"]
    assert reported(tmp_path) == 3


def test_what_fails_twice_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Labs(monkeypatch, ("failed a::c\n", True, 1), ("failed a::c\n", True, 1))
    assert suite.run(["pytest"], tmp_path, 1) == 1


def test_a_lab_that_died_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(
        monkeypatch, ("passed a::b\npassed a", False, 125), ("passed a::x\n", True, 0), ("passed a::c\n", True, 0), hosts=2
    )
    assert suite.run(["pytest"], tmp_path, 1) == 0
    assert (tmp_path / "passed.txt").read_text() == "a::b\na::x\n"
    assert len(labs.commands) == 3


def test_nothing_runs_again_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("passed a::b\n", False, 124))
    assert suite.run(["pytest"], tmp_path, -1) == 124
    assert len(labs.commands) == 1


def test_many_failures_are_no_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("".join(f"failed a::{n}\n" for n in range(suite.AGAIN_MAX + 1)), True, 1))
    assert suite.run(["pytest"], tmp_path, 1) == 1
    assert len(labs.commands) == 1


def test_a_machine_that_runs_guests_itself_runs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = Labs(monkeypatch, ("failed a::c\n", True, 1), native=True, hosts=2)
    assert suite.run(["pytest"], tmp_path, 1) == 1
    assert len(labs.commands) == 1


def test_memory_that_only_caches_files_counts_as_there() -> None:
    meminfo = "MemTotal:       24684216 kB\nMemFree:          20000 kB\nMemAvailable:   20971520 kB\n"
    assert suite._available(meminfo) == 20 << 30
    assert suite._available("MemTotal: 1 kB\n") == 0


def test_the_lines_of_hosts_are_marked_and_their_ends_are_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lab = tmp_path / "lab"
    lab.write_text("import sys\nprint('is', sys.argv[-2])\nsys.exit(int(sys.argv[-2]))\n")
    monkeypatch.setattr(suite, "_LAB", lab)
    parts = [suite.Part.of(tmp_path, number) for number in (1, 2)]
    assert suite._together([["0"], ["3"]], parts, 60) == [0, 3]
    assert sorted(capfd.readouterr().out.splitlines()) == ["[1] is 0", "[2] is 3"]
