"""Programs that are told to give up: what has begun something better finished does so, others end with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.vmm import session_processes

LIMIT = 60.0  # seconds, for what takes a tenth of one

FOLLOW = """
import sys
sys.path.insert(0, sys.argv[1])
from lab import debian, process, progress
process._GIVE_UP = 0.2
with process.orderly_end(), progress.Step("Working") as step:
    debian.follow(["sh", "-c", sys.argv[2]], step, group=sys.argv[3] == "group")
"""


# The same for one that is kept from the processor when the script has begun.
FOLLOW_LATE = f"""
import subprocess, time
begin = subprocess.Popen.__init__
def begin_late(self, *words, **more):
    begin(self, *words, **more)
    time.sleep(0.5)
subprocess.Popen.__init__ = begin_late
{FOLLOW}"""


def follow(script: str, folder: Path, how: str, program: str = FOLLOW) -> subprocess.Popen[str]:
    """Have a program follow a shell script, which makes the file `up` when it is under way."""
    os.mkfifo(folder / "up")
    tools = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", program, tools, f"cd {folder}; {script}", how],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    (folder / "up").read_text()
    return process


def test_what_has_begun_finishes_and_is_waited_for(tmp_path: Path) -> None:
    """As apt does with dpkg. It may say as much as it wants on the way."""
    script = "trap 'seq 100000; echo done > end; exit 3' INT; echo > up; while :; do sleep 0.01; done"
    process = follow(script, tmp_path, "alone")
    process.terminate()
    process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "end").read_text() == "done\n"


@pytest.mark.parametrize("program", [FOLLOW, FOLLOW_LATE], ids=["at once", "late"])
@pytest.mark.parametrize("trap", ["", "trap '' INT;"], ids=["that gives up", "that does not"])
def test_a_group_ends_with_all_that_it_has_started(tmp_path: Path, trap: str, program: str) -> None:
    process = follow(f"{trap} sleep 1000 & sleep 1000 & echo > up; wait; sleep 1000", tmp_path, "group", program)
    process.terminate()
    process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGTERM
    assert session_processes(process.pid) == []


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from lab.process import orderly_end
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with orderly_end():
    os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[1])], capture_output=True, text=True, check=True
    )
    assert done.stdout == "goes on\n"
