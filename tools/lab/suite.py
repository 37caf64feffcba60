"""The whole-VM tests as CI runs them: in one lab host, and what failed there once more in a fresh one.

The lab is QEMU's software emulation of a processor with SVM, and QEMU 7.2's is not exact: about once in some minutes of two
busy CPUs, a guest's CPU shuts down or the lab host's own kernel finds its stack broken, whoever's VMM runs. So a few failures
are run again, once, in a lab host that was booted for them, and named; what fails twice has failed. Where this machine's own
KVM runs the tests nothing is run again.

Not here: booting (`host`), and what a test writes down about itself (tests/lab/conftest.py).
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from . import probe
from .progress import say

OUTCOMES = "outcomes.txt"  # in the folder of results: lines of an outcome, a space, and a test's id
AGAIN_MAX = 6  # more failures than the emulation explains
AGAIN_LIMIT = 900.0  # seconds

_LAB = Path(__file__).with_name("lab")


def outcomes(path: Path) -> dict[str, str]:
    """What tests wrote down: id to `passed`, `failed` or `skipped`, a failure in any phase being one. A torn line is nothing."""
    found: dict[str, str] = {}
    text = path.read_text() if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        outcome, _, name = line.partition(" ")
        if found.get(name) != "failed":
            found[name] = outcome
    return found


def write_report(path: Path, names: Sequence[str]) -> None:
    """Write a JUnit XML report of tests that passed."""
    suite = ET.Element("testsuite", name="pytest", tests=str(len(names)))
    for name in names:
        file, _, rest = name.partition("::")
        ET.SubElement(suite, "testcase", classname=file, name=rest)
    ET.ElementTree(suite).write(path, encoding="unicode")


def run(command: Sequence[str], out: Path, limit: float) -> int:
    """Run `command`, pytest with its arguments, and again what failed; its reports are lab.xml and lab.again.xml in `out`.

    `limit` is the seconds that the first run may take. Returns the exit status: 0 when every test passed in one of the runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("lab*.xml"), *out.glob(OUTCOMES)):
        old.unlink()
    report, log = out / "lab.xml", out / OUTCOMES
    status = _lab(command, out, "host-kernel.log", report, limit)
    if status == 0 or probe.probe().native:
        return status
    seen = outcomes(log)
    failed = [name for name, outcome in seen.items() if outcome == "failed"]
    died = not report.exists()
    if not (failed or died) or len(failed) > AGAIN_MAX or not seen:
        return status
    passed = [name for name, outcome in seen.items() if outcome == "passed"]
    if died:
        say(f"The lab ended after {len(passed)} tests; the others run in a fresh one.")
    say("Once more in a fresh lab, because the emulation of SVM is not exact:" + "".join(f"\n  {name}" for name in failed))
    passed_file = out / "passed.txt"
    passed_file.write_text("".join(f"{name}\n" for name in passed))
    again = [*command, f"--passed-already={passed_file}"]
    status = _lab(again, out, "host-kernel-again.log", out / "lab.again.xml", limit if died else AGAIN_LIMIT)
    if report.exists():
        report.rename(out / "first-run.xml")
    write_report(report, passed)
    if status == 0 and failed:
        say("Passed the second time:" + "".join(f"\n  {name}" for name in failed))
    return status


def _lab(command: Sequence[str], out: Path, dmesg: str, report: Path, limit: float) -> int:
    lab = [sys.executable, str(_LAB), "auto", "--timeout", f"{limit:g}", "--out", str(out), "--dmesg", str(out / dmesg), "--"]
    return subprocess.run([*lab, *command, f"--junitxml={report}"], check=False).returncode
