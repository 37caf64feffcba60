"""The whole-VM tests as CI runs them: shared out over lab hosts, and what failed there once more in a fresh one.

A guest with one CPU keeps one core busy with its emulation, so two lab hosts side by side take little more than half the time of
one. Each takes the next test that no other has taken, and has a folder of its own below the folder of results, named by its
number.

The lab is QEMU's software emulation of a processor with SVM, and that is not exact (CONTRIBUTING.md says what is known). So a few
failures are run again, once, in a lab host that was booted for them, and named; what fails twice has failed. Where this machine's
own KVM runs the tests there is one run, and nothing is run again.

Not here: booting (`host`), and what a test writes down about itself (tests/lab/conftest.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import probe
from .progress import say

OUTCOMES = "outcomes.txt"  # in a host's folder: lines of an outcome, a space, and a test's id
AGAIN_MAX = 6  # more failures than the emulation explains
HOSTS_MAX = 2  # a third has no core on the smallest machine, and two are enough for the time that there is
_HOST_MEMORY = 5 << 30  # bytes that a lab host may come to, with what emulates it
_NO_TESTS = 5  # pytest's exit status for that

_LAB = Path(__file__).with_name("lab")


class Part(NamedTuple):
    """What one lab host was asked to run."""

    number: int
    folder: Path  # of its results
    report: Path  # JUnit XML; missing when the host died

    @classmethod
    def of(cls, out: Path, number: int) -> Part:
        """Return part `number` of a run with results in `out`, its folder empty."""
        folder = out / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return cls(number, folder, folder / "lab.xml")


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


def hosts() -> int:
    """How many lab hosts this machine runs side by side."""
    cpus = len(os.sched_getaffinity(0))
    return max(1, min(HOSTS_MAX, cpus, _available(Path("/proc/meminfo").read_text()) // _HOST_MEMORY))


def _available(meminfo: str) -> int:
    """Bytes that can be had, what only caches files included; 0 when the kernel does not say."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def run(command: Sequence[str], out: Path, limit: float) -> int:
    """Run `command`, pytest with its arguments, and again what failed; the reports are lab.*.xml in `out`.

    `limit` is the seconds that all of it may take. Returns the exit status: 0 when every test passed in one of the runs.
    """
    end = time.monotonic() + limit
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("lab*.xml"):
        old.unlink()
    native = probe.probe().native
    count = 1 if native else hosts()
    parts = [Part.of(out, number) for number in range(1, count + 1)]
    claims = out / "claims"
    shutil.rmtree(claims, ignore_errors=True)
    claims.mkdir()
    asked = [[*command, *([f"--claims={claims}"] if count > 1 else [])] for part in parts]
    statuses = _together(asked, parts, limit)
    seen = {name: outcome for part in parts for name, outcome in outcomes(part.folder / OUTCOMES).items()}
    died = [part for part in parts if not part.report.exists()]
    status = next((status for status in statuses if status), 0)
    if not status and not seen:
        status = _NO_TESTS
    failed = [name for name, outcome in seen.items() if outcome == "failed"]
    left = end - time.monotonic()
    if status == 0 or native or not (failed or died) or len(failed) > AGAIN_MAX or not seen or left <= 0:
        for part in set(parts) - set(died):
            shutil.copy(part.report, out / f"lab.{part.number}.xml")
        return status
    passed = [name for name, outcome in seen.items() if outcome == "passed"]
    if died:
        say(f"A lab host ended before its tests did; after {len(passed)} tests the others run in a fresh one.")
    say("Once more in a fresh lab, because the emulation of SVM is not exact:" + "".join(f"\n  {name}" for name in failed))
    passed_file = out / "passed.txt"
    passed_file.write_text("".join(f"{name}\n" for name in passed))
    again = Part.of(out, count + 1)
    (status,) = _together([[*command, f"--passed-already={passed_file}"]], [again], left)
    write_report(out / "lab.first.xml", passed)
    if again.report.exists():
        shutil.copy(again.report, out / "lab.again.xml")
    if status == 0 and failed:
        say("Passed the second time:" + "".join(f"\n  {name}" for name in failed))
    return status


def _together(commands: Sequence[Sequence[str]], parts: Sequence[Part], limit: float) -> list[int]:
    """Run each command in a lab host of its own, their lines marked with the host's number when there are several."""
    running: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for command, part in zip(commands, parts, strict=True):
            process = _lab(command, part, limit)
            running.append(process)
            readers.append(threading.Thread(target=_pass_on, args=(process, f"[{part.number}] " if len(parts) > 1 else "")))
            readers[-1].start()
        for reader in readers:
            reader.join()
        return [process.wait() for process in running]
    except BaseException:
        for process in running:
            process.terminate()  # it ends its host in order
        for process in running:
            process.wait()
        raise


def _lab(command: Sequence[str], part: Part, limit: float) -> subprocess.Popen[str]:
    # All of them see the folder of results: what they share is in it.
    lab = [sys.executable, str(_LAB), "auto", "--timeout", f"{limit:g}", "--out", str(part.folder.parent)]
    lab += ["--dmesg", str(part.folder / "host-kernel.log"), "--", "env", f"LAB_OUT={part.folder}"]
    words = [*lab, *command, f"--junitxml={part.report}"]
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _pass_on(process: subprocess.Popen[str], mark: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(mark + line, end="", flush=True)
