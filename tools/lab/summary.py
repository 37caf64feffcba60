"""One line for a whole test run: the test runners' own counts over all environments.

An environment without a test report (lint, types) counts as one; one that failed although its report shows no failure
(nothing collected, coverage too low, the lab did not boot) counts as one failure more.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Counts(NamedTuple):
    """Numbers of tests, in the words of pytest's last line."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def line(self) -> str:
        """As in "12 passed, 0 failed, 1 skipped"."""
        return f"{self.passed} passed, {self.failed} failed" + (f", {self.skipped} skipped" if self.skipped else "")


def report(path: Path) -> Counts:
    """The counts of one JUnit XML report. Errors of fixtures count as failures."""
    counts = Counts()
    for case in ET.parse(path).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts = counts.plus(Counts(failed=1))
        elif "skipped" in kinds:
            counts = counts.plus(Counts(skipped=1))
        else:
            counts = counts.plus(Counts(passed=1))
    return counts


def environments(result: Path, reports: Sequence[Path]) -> dict[str, Counts]:
    """The counts of each environment of a tox run.

    From its --result-json, and in these folders the reports <environment>.xml and <environment>.<part>.xml.
    """
    found = {}
    for name, entry in json.loads(result.read_text())["testenvs"].items():
        outcome = entry.get("result")
        if outcome is None or outcome["skipped"]:
            continue
        counts = Counts()
        files = [file for folder in reports for pattern in (f"{name}.xml", f"{name}.*.xml") for file in folder.glob(pattern)]
        for file in files:
            counts = counts.plus(report(file))
        if not files and outcome["success"]:
            counts = Counts(passed=1)
        elif not outcome["success"] and not counts.failed:
            counts = counts.plus(Counts(failed=1))
        found[name] = counts
    return found
