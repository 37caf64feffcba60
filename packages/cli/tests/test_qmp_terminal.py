"""The interactive shell and Tab in the system's shells, on real pseudo-terminals."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import anyio
import pytest

from qmp_server import Call, QmpServer, listen_unix

PATIENCE = 60.0  # seconds: only a hang takes longer
_ESCAPES = re.compile(rb"\x1b(?:\[[0-9;?=>]*[A-Za-z]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[=>()][0-9A-Z]?)")
CTRL_C, CTRL_D, TAB = "\x03", "\x04", "\t"


class Terminal:
    """A program on a terminal: what it shows, and keys for it."""

    def __init__(self, *command: str, **env: str) -> None:
        self._fd, theirs = os.openpty()
        termios.tcsetwinsize(self._fd, (50, 200))
        # setsid of util-linux gives it the terminal; forking here, with threads about, is asking for trouble.
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50", **env},
        )
        os.close(theirs)
        self.shown = b""
        self._seen = 0
        self._answered = 0  # questions where the cursor is

    def expect(self, text: str) -> None:
        """Wait until `text` is shown, after what was expected before."""
        while (at := _ESCAPES.sub(b"", self.shown).find(text.encode(), self._seen)) < 0:
            assert self._read(), f"ended without {text!r}: {self.shown!r}"
        self._seen = at + len(text)

    def keys(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def _read(self) -> bytes:
        assert select.select([self._fd], [], [], PATIENCE)[0], f"nothing more after {self.shown!r}"
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux: the other end of the terminal is closed
            data = b""
        self.shown += data
        # Some programs ask the terminal where the cursor is before they go on. A question may come in two pieces.
        while self.shown.count(b"\x1b[6n") > self._answered:
            self._answered += 1
            self.keys("\x1b[1;1R")
        return data

    def ends(self) -> int:
        """Wait for the program's end and return its exit status."""
        while self._read():
            pass
        return self._process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QmpServer]:
    made = QmpServer(rate=0)
    made.register("query-status", lambda _, call: {"running": True, "singlestep": False, "status": "running"})
    made.register("stop", lambda _, call: call.emit("STOP"))
    made.register("human-monitor-command", lambda arguments, call: f"did {arguments.command_line}\r\n")

    @made.handler("cont", concurrent=True)
    async def cont(_: Any, call: Call) -> None:
        await anyio.sleep_forever()

    made.drain_time = 0.05
    listener = listen_unix(tmp_path / "qmp.sock")
    thread = threading.Thread(target=anyio.run, args=(made.serve, [listener]))
    thread.start()
    yield made
    made.close()
    thread.join()


def _shell(folder: Path, *options: str, **env: str) -> Terminal:
    command = [sys.executable, "-m", "pystratovirt.qmpshell", "-s", str(folder / "qmp.sock"), *options]
    return Terminal(*command, XDG_STATE_HOME=str(folder / "state"), **env)


def test_a_person_can_work_with_it(server: QmpServer, tmp_path: Path) -> None:
    with _shell(tmp_path) as terminal:
        terminal.expect("Connected to StratoVirt-2.4.0")
        terminal.expect("(qmp)")
        terminal.keys(f"query-st{TAB}")
        terminal.expect("atus")  # what is typed already may be drawn earlier
        terminal.keys("\r")
        terminal.expect('"status": "running"')
        assert b"\x1b[0;32m" in terminal.shown  # in colours
        terminal.expect("(qmp)")
        server.emit("POWERDOWN")  # shown as it comes, while the prompt waits
        terminal.expect("POWERDOWN")
        terminal.expect("(qmp)")
        terminal.keys(f"device_add multi{TAB}")
        terminal.expect("function=")
        terminal.keys(f"on {CTRL_C}hmp info snapshots\r")  # drops the line
        terminal.expect("did info snapshots")
        terminal.keys("\x1b[A\x1b[A\r")  # the line before the last
        terminal.expect('"status": "running"')
        terminal.expect("(qmp)")
        terminal.keys(CTRL_D)
        assert terminal.ends() == 0
    history = (tmp_path / "state/pystratovirt/qmp_history").read_text()
    assert "+hmp info snapshots" in history


def test_a_command_that_does_not_answer_can_be_left_alone(server: QmpServer, tmp_path: Path) -> None:
    with _shell(tmp_path) as terminal:
        terminal.expect("(qmp)")
        terminal.keys("cont\r")
        _wait_until_cooked(terminal)
        terminal.keys(CTRL_C)
        terminal.expect("Not waited for any longer")
        terminal.expect("(qmp)")
        terminal.keys("help device_del\r")  # the server answers one command of a client after the other
        terminal.expect("Remove a device")
        terminal.expect("(qmp)")
        terminal.keys("exit\r")
        assert terminal.ends() == 0


def test_no_color_is_obeyed(server: QmpServer, tmp_path: Path) -> None:
    with _shell(tmp_path, NO_COLOR="1") as terminal:
        terminal.expect("(qmp)")
        terminal.keys("query-status\r")
        terminal.expect('"running"')
        assert b"\x1b[0;32m" not in terminal.shown
        terminal.expect("(qmp)")
        terminal.keys(CTRL_D)
        assert terminal.ends() == 0


def test_the_end_of_the_server_ends_it(server: QmpServer, tmp_path: Path) -> None:
    with _shell(tmp_path) as terminal:
        terminal.expect("(qmp)")
        server.close()
        terminal.expect("The server hung up.")
        assert terminal.ends() == 0


def test_one_command_on_a_terminal_is_shown_for_people(server: QmpServer, tmp_path: Path) -> None:
    with _shell(tmp_path, "query-status") as terminal:
        terminal.expect('  "running": true,\r\n')
        assert terminal.ends() == 0
    assert b"\x1b[34m" in terminal.shown


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(qmp completion bash)"; PS1="ready "'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -D; eval "$(qmp completion zsh)"; PS1="ready "'),
    "fish": (["fish", "--no-config", "-i"], 'qmp completion fish | source; function fish_prompt; echo "ready "; end'),
}


@pytest.mark.parametrize("name", SHELLS)
def test_tab_completes_in_the_shells_of_the_system(tmp_path: Path, name: str) -> None:
    command, setup = SHELLS[name]
    if shutil.which(command[0]) is None:
        pytest.fail(f"{name} is not installed, and in CI it must be") if os.environ.get("CI") else pytest.skip(f"no {name}")
    # What is completed is shown by what runs: "qmp" says its words instead of doing anything.
    (tmp_path / "qmp").write_text(
        f'#!/bin/sh\ncase $1 in __complete|completion) exec {sys.executable} -m pystratovirt.qmpshell "$@";; esac\n'
        'for word in "$@"; do printf "<%s>" "$word"; done; echo " $#"\n'
    )
    (tmp_path / "qmp").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with Terminal(*command, PATH=path, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path), PYTHONPATH=_python_path()) as terminal:
        if name == "fish":  # what is typed before it listens is lost
            terminal.expect("@")
        terminal.keys(f"{setup}\r")
        terminal.expect("ready ")
        terminal.expect("ready ")
        for typed, done in {
            f"qmp query-sta{TAB}": "<query-status> 1",
            f"qmp -s /x wait SHUT{TAB}": "<-s></x><wait><SHUTDOWN> 4",
            f"qmp blockdev-add file.aio=na{TAB}": "<blockdev-add><file.aio=native> 2",
            f"qmp device_del i{TAB}net-0": "<device_del><id=net-0> 2",
            f"qmp schema blockdev-a{TAB}": "<schema><blockdev-add> 2",
        }.items():
            terminal.keys(typed)
            terminal.keys("\r")  # a shell completes before it looks at the next key
            terminal.expect(done)
            terminal.expect("ready ")


def _python_path() -> str:
    return os.pathsep.join(path for path in sys.path if path)


def _wait_until_cooked(terminal: Terminal) -> None:
    """Return when the terminal turns Ctrl-C into a signal again, because a command is running and no prompt is shown."""
    terminal.expect("cont")
    for _ in range(int(PATIENCE / 0.01)):
        if termios.tcgetattr(terminal._fd)[3] & termios.ISIG:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the prompt did not give the terminal back")
