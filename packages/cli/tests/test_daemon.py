"""Going to the background: what the caller sees, what is left behind. Each test starts a real process."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pystratovirt.daemon import DaemonError, PidFile

PROLOGUE = """
import os, signal, sys
from pystratovirt.daemon import DaemonError, PidFile, daemonize
go, out = int(sys.argv[1]), int(sys.argv[2])
def wait(): return os.read(go, 1)
def say(text): os.write(out, text.encode() + b"\\n")
"""


class Launch:
    """A process that goes to the background. It goes on when told to, and says things; it ends when the test lets go of it."""

    def __init__(self, script: str, *arguments: str) -> None:
        go, self._go = os.pipe()
        self._out, out = os.pipe()
        self.caller = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + script, str(go), str(out), *arguments],
            pass_fds=(go, out),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(go)
        os.close(out)
        self.said = os.fdopen(self._out)

    def tell(self) -> None:
        os.write(self._go, b"x")

    def status(self) -> int:
        return self.caller.wait(60)

    def end(self) -> str:
        """Let go of the daemon, wait for its end, return what it wrote to standard error."""
        if self._go >= 0:
            os.close(self._go)
            self._go = -1
            self.said.read()
            self.said.close()
            self._errors = self.caller.communicate(timeout=60)[1]
        return self._errors


@pytest.fixture
def launch() -> Iterator[type[Launch]]:
    made: list[Launch] = []

    class Recorded(Launch):
        def __init__(self, script: str, *arguments: str) -> None:
            super().__init__(script, *arguments)
            made.append(self)

    yield Recorded
    for one in made:
        one.end()


def test_the_caller_ends_with_0_when_the_daemon_is_ready_and_not_before(launch: type[Launch]) -> None:
    start = launch("daemon = daemonize(); say('up'); wait(); say('told'); daemon.ready(); wait()")
    assert start.said.readline() == "up\n"
    assert start.caller.poll() is None
    start.tell()
    assert start.said.readline() == "told\n"
    assert start.status() == 0


def test_a_failure_before_that_is_the_callers_status_and_its_line_the_callers_error(launch: type[Launch]) -> None:
    start = launch("daemonize(); sys.exit('stratovirt: -m 512G: not that much memory')")
    assert start.status() == 1
    assert start.end() == "stratovirt: -m 512G: not that much memory\n"


def test_a_daemon_that_is_killed_before_it_is_ready_is_a_failure(launch: type[Launch]) -> None:
    assert launch("daemonize(); os.kill(os.getpid(), signal.SIGKILL)").status() == 1


def test_a_daemon_ends_when_its_caller_was_interrupted(launch: type[Launch]) -> None:
    start = launch("""
daemon = daemonize(); say('up'); wait()
try: daemon.ready()
except DaemonError as error: say(str(error))
""")
    assert start.said.readline() == "up\n"
    start.caller.kill()
    start.status()
    start.tell()
    assert start.said.readline() == "the process that started this one has gone\n"


def test_ctrl_c_ends_the_caller_without_a_traceback(launch: type[Launch]) -> None:
    start = launch("signal.signal(signal.SIGINT, signal.default_int_handler); daemonize(); say('up'); wait()")
    assert start.said.readline() == "up\n"
    start.caller.send_signal(signal.SIGINT)
    assert start.status() == -signal.SIGINT
    assert start.end() == ""


def test_a_daemon_has_no_terminal_and_keeps_inherited_descriptors(launch: type[Launch]) -> None:
    start = launch("""
where, mask = os.getcwd(), os.umask(0o022)
daemon = daemonize()
say(str(os.getsid(0) != os.getpid() and os.getsid(0) != os.getsid(int(sys.argv[3]))))
daemon.ready()
say(' '.join(os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 1, 2)))
say(str(os.getcwd() == where and os.umask(0) == 0o022))
""", str(os.getpid()))  # fmt: skip
    assert start.said.read().splitlines() == ["True", "/dev/null /dev/null /dev/null", "True"]
    assert start.status() == 0


def test_helpers_of_the_daemon_do_not_keep_the_caller_waiting(launch: type[Launch]) -> None:
    start = launch("""
import subprocess
daemonize()
helper = subprocess.Popen(['sleep', '600'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
say(str(helper.pid))
""")
    helper = int(start.said.readline())
    try:
        assert start.status() == 1
    finally:
        os.kill(helper, signal.SIGKILL)


def test_a_pidfile_holds_the_id_alone_and_goes_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    pidfile = PidFile(str(path))
    assert path.read_text() == str(os.getpid())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    pidfile.remove()
    assert not path.exists()


def test_a_pidfile_of_a_running_process_is_refused(tmp_path: Path, launch: type[Launch]) -> None:
    path = tmp_path / "pid"
    start = launch("daemon = daemonize(); p = PidFile(sys.argv[3]); daemon.ready(); wait(); p.remove()", str(path))
    assert start.status() == 0
    with pytest.raises(DaemonError, match=rf"-pidfile {path}: belongs to process {path.read_text()}"):
        PidFile(str(path))
    start.tell()
    start.end()
    assert not path.exists()


def test_a_pidfile_of_a_killed_process_does_not_stop_the_next(tmp_path: Path, launch: type[Launch]) -> None:
    path = tmp_path / "pid"
    launch("PidFile(sys.argv[3]); os.kill(os.getpid(), signal.SIGKILL)", str(path)).status()
    assert path.exists()
    pidfile = PidFile(str(path))
    assert path.read_text() == str(os.getpid())
    pidfile.remove()


def test_a_file_that_is_no_pidfile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("do not lose this")
    with pytest.raises(DaemonError, match="does not hold a process id"):
        PidFile(str(path))
    assert path.read_text() == "do not lose this"


@pytest.mark.parametrize("kind", ["folder", "link", "fifo", "missing folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pid"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = path / "pid"
    gc.collect()  # what other tests left for it would go in the middle of this one
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DaemonError, match="-pidfile"):
        PidFile(str(path))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not (tmp_path / "elsewhere").exists()


def test_a_pidfile_in_a_folder_that_is_gone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    with pytest.raises(DaemonError, match=r"^-pidfile pid: No such file or directory$"):
        PidFile("pid")


def test_a_pidfile_that_another_took_over_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    pidfile = PidFile(str(path))
    path.unlink()
    path.write_text("1")
    pidfile.remove()
    assert path.read_text() == "1"
