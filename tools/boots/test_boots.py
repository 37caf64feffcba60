"""A command in the lab behaves as one here, and nothing of the lab is left when it is over, however it ended."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.vmm import Qmp

LAB = Path(__file__).resolve().parent.parent / "lab" / "lab"
WAIT = 280.0  # seconds; a boot takes three on an idle machine, and is begun once more after sixty when it stands still
STALL = "45"  # seconds


def lab(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a command in the lab. Once more if the emulation stood still under it, which is no fault of what is tested here."""
    words = [sys.executable, LAB, "run", "--stall", STALL, *map(str, arguments)]
    done = subprocess.run(words, input=stdin, capture_output=True, timeout=WAIT, check=False)
    if done.returncode == 125 and b"the lab host stands still" in done.stderr:
        done = subprocess.run(words, input=stdin, capture_output=True, timeout=WAIT, check=False)
    return done


def descendants(pid: int) -> set[int]:
    """The processes below one, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(text[text.rindex(")") + 2 :].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text[text.rindex(")") + 2] != "Z"


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_output_errors_and_status_come_back_apart() -> None:
    done = lab("--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)


def test_input_of_any_bytes_arrives_whole() -> None:
    data = os.urandom(3_000_000)
    assert lab("--", "cat", stdin=data).stdout == data


def test_a_signal_that_ends_the_command_is_told() -> None:
    assert lab("--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL


def test_the_command_sees_our_folder_files_and_environment_and_cannot_change_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_NAME", "a 'b' $c")
    (tmp_path / "file").write_text("before")
    done = lab("--", "sh", "-c", 'cat file; echo; echo changed >file; rm /bin/true; echo "$SOME_NAME"; pwd')
    assert done.stdout.decode() == f"before\na 'b' $c\n{tmp_path}\n"
    assert (tmp_path / "file").read_text() == "before"
    assert Path("/bin/true").exists()


def test_what_is_written_to_lab_out_stays(tmp_path: Path) -> None:
    done = lab(
        "--out",
        tmp_path / "out",
        "--dmesg",
        tmp_path / "dmesg",
        "--",
        "sh",
        "-c",
        'echo result >"$LAB_OUT/file"; echo "$LAB_OUT"',
    )
    assert done.stdout.decode() == f"{tmp_path}/out\n"
    assert (tmp_path / "out/file").read_text() == "result\n"
    assert "Linux version" in (tmp_path / "dmesg").read_text()


def test_a_background_process_does_not_hold_the_lab() -> None:
    assert lab("--", "sh", "-c", "sleep 1000 & echo done").stdout == b"done\n"


def test_a_lab_host_that_dies_says_so() -> None:
    done = lab("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000")
    assert done.returncode == 125
    assert b"the lab host ended before the command did" in done.stderr
    assert b"sysrq" in done.stderr.lower()


def test_a_lab_host_that_does_not_come_up_is_started_once_more() -> None:
    done = lab("--boot-timeout", "1", "--qemu=-S", "--", "true")  # -S: its CPUs stand still
    assert done.returncode == 125
    messages = [line for line in done.stderr.decode().splitlines() if line.startswith("lab: ")]
    assert messages == [
        "lab: the lab host did not come up within 1 s:",
        "lab: starting it once more",
        "lab: the lab host did not come up within 4 s:",
    ]


def test_a_lab_host_that_stands_still_is_ended() -> None:
    command = [sys.executable, LAB, "run", "--stall", "20", "--", "sh", "-c", "sleep 25; echo up; sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"up\n", "one that is at work is not ended"
        for pid in descendants(process.pid):
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu"):
                os.kill(pid, signal.SIGSTOP)
        assert process.stderr.readline() == b"lab: the lab host stands still: not a word for 20 s:\n"
        assert process.wait(WAIT) == 125


def test_a_timeout_ends_everything() -> None:
    done = lab("--timeout", "5", "--", "sleep", "1000")
    assert (done.returncode, done.stderr) == (124, b"lab: the command did not end within 5 s\n")


@pytest.fixture
def sleeper() -> Iterator[tuple[subprocess.Popen[bytes], set[int]]]:
    """A lab in which a command sleeps, and the processes that it consists of."""
    command = [sys.executable, LAB, "run", "--", "sh", "-c", "echo up; sleep 1000"]

    # A shell's background job ignores SIGINT, and so would what is started here; that would be the test's mistake.
    def take_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=take_interrupts) as process:  # noqa: PLW1509
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        children = descendants(process.pid)
        assert len(children) >= 2
        try:
            yield process, children
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_signal_leaves_no_process(sleeper: tuple[subprocess.Popen[bytes], set[int]], number: int, status: int) -> None:
    process, children = sleeper
    process.send_signal(number)
    assert process.wait(WAIT) == status
    assert eventually(lambda: not any(map(alive, children)))


def test_the_lab_ends_with_who_started_it() -> None:
    script = f"{sys.executable} {LAB} run -- sh -c 'echo up; sleep 1000' & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as shell:
        assert shell.stdout is not None
        started = int(shell.stdout.readline())
        assert shell.stdout.readline() == b"up\n"
        processes = {started} | descendants(started)
        shell.kill()
        assert eventually(lambda: not any(map(alive, processes)))


def test_a_reader_that_goes_away_ends_the_lab(sleeper: tuple[subprocess.Popen[bytes], set[int]]) -> None:
    process, children = sleeper
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(WAIT) == 128 + signal.SIGPIPE
    assert eventually(lambda: not any(map(alive, children)))


def test_a_forwarded_socket_leads_into_the_lab(tmp_path: Path) -> None:
    outside = tmp_path / "qmp.sock"
    qemu = "qemu-system-x86_64 -M none -display none -qmp unix:/run/x.sock,server=on,wait=off"
    command = [sys.executable, LAB, "run", "--forward", f"{outside}:/run/x.sock", "--", "sh", "-c", qemu]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            for _ in range(2):
                with Qmp(outside) as client:
                    assert client.execute("query-status")["running"]
            with Qmp(outside) as client:
                client.execute("quit")
            assert process.wait(WAIT) == 0
        finally:
            process.kill()
    assert not outside.exists()


def test_a_terminal_is_a_terminal_in_the_lab_and_is_put_back_afterwards() -> None:
    # exec: dash forgets a ^C that comes between the fork and the exec of a command.
    script = "tty; read line; echo got $line; exec sleep 1000"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(LAB), "run", "--", "sh", "-c", script])
    seen = b""

    def shows(text: bytes) -> bool:
        nonlocal seen
        if select.select([terminal], [], [], 0)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                return text in seen
        return text in seen

    assert eventually(lambda: shows(b"/dev/hvc0"))
    os.write(terminal, b"hello\r")
    assert eventually(lambda: shows(b"got hello"))
    os.write(terminal, b"\x03")  # goes through to the command: the lab ends because the command did
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
    os.close(terminal)
