"""The last line of a run counts what the test runners counted, and never hides a failure."""

from __future__ import annotations

import json
from pathlib import Path

from lab.summary import Counts, environments

CASES = {
    "ok": "<testcase/>",
    "bad": "<testcase><failure/></testcase>",
    "error": "<testcase><error/></testcase>",
    "skip": "<testcase><skipped/></testcase>",
}


def run(folder: Path, **outcomes: bool | None) -> dict[str, Counts]:
    """A tox run with these environments: True for success, None for not run."""
    entries = {
        name: {} if good is None else {"result": {"success": good, "exit_code": 0 if good else 1, "skipped": False}}
        for name, good in outcomes.items()
    }
    (folder / "result.json").write_text(json.dumps({"testenvs": entries}))
    return environments(folder / "result.json", [folder])


def write(path: Path, *cases: str) -> None:
    path.write_text("<testsuites><testsuite>" + "".join(CASES[case] for case in cases) + "</testsuite></testsuites>")


def test_reports_are_counted_case_by_case(tmp_path: Path) -> None:
    write(tmp_path / "unit.xml", "ok", "ok", "bad", "error", "skip")
    assert run(tmp_path, unit=False) == {"unit": Counts(passed=2, failed=2, skipped=1)}


def test_the_reports_of_one_environment_add_up(tmp_path: Path) -> None:
    write(tmp_path / "lab.xml", "ok")
    write(tmp_path / "lab.boots.xml", "ok", "ok")
    write(tmp_path / "label.xml", "bad")
    assert run(tmp_path, lab=True) == {"lab": Counts(passed=3)}


def test_an_environment_without_a_report_is_one(tmp_path: Path) -> None:
    assert run(tmp_path, lint=True, types=False, soak=None) == {"lint": Counts(passed=1), "types": Counts(failed=1)}


def test_a_failure_that_no_report_shows_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "cov.xml", "ok", "ok")
    assert run(tmp_path, cov=False) == {"cov": Counts(passed=2, failed=1)}


def test_the_line_is_pytests() -> None:
    assert Counts(12, 0, 0).line() == "12 passed, 0 failed"
    assert Counts(12, 1, 2).line() == "12 passed, 1 failed, 2 skipped"
