"""Drive a virtual machine monitor from a test: its process, its guest's console, its QMP socket.

Plain blocking code with deadlines, for tests and benchmarks of any VMM with QEMU's manners; it knows nothing of this
project's packages, so that a mistake in them cannot hide itself here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

WAIT = 240.0  # seconds: a limit for what comes in one or two, on a machine that emulates everything and is slow and busy
_POLL = 0.02  # seconds between two looks


class Failure(AssertionError):
    """What was waited for did not happen. The text has the end of the console and of the VMM's own output."""


class QmpError(Exception):
    """A QMP command was answered with an error."""

    def __init__(self, error: Mapping[str, str]) -> None:
        super().__init__(f"{error['class']}: {error['desc']}")
        self.kind = error["class"]
        self.description = error["desc"]


class Vmm:
    """A running VMM. Its standard output (the guest's console with -serial stdio) and error output go to files in `folder`.

    Use as a context manager; on leaving, whatever still runs is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        name: str = "vmm",
        environment: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Start `command`, which inherits `descriptors` under the same numbers."""
        self.command = list(command)
        self.console = folder / f"{name}.console"
        self.log = folder / f"{name}.log"
        self._seen = 0  # characters of the output that expect() has passed
        self._count = 0  # of commands run in the guest
        self.killed = False
        with self.console.open("wb") as out, self.log.open("wb") as err:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                # At this level it says what ended the guest.
                env={"STRATOVIRT_LOG_LEVEL": "info", **os.environ, **(environment or {})},
                pass_fds=descriptors,
                start_new_session=True,  # its session is how left-over children are found
            )

    @property
    def pid(self) -> int:
        """The process id of the VMM, which is its session's id too."""
        return self.process.pid

    def output(self) -> str:
        """Everything on the console so far, carriage returns dropped."""
        return self.console.read_bytes().decode(errors="replace").replace("\r", "")

    def errors(self) -> str:
        """Everything that the VMM wrote to standard error so far."""
        return self.log.read_text(errors="replace")

    def expect(self, pattern: str, timeout: float = WAIT) -> re.Match[str]:
        """Wait until the console shows `pattern` (a regular expression, multi-line) after what the last expect() matched.

        Fails after `timeout` seconds, and at once when the VMM has ended without it.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            match = compiled.search(self.output(), self._seen)
            if match:
                self._seen = match.end()
                return match
            if ended:
                raise Failure(f"the VMM ended with status {self.process.returncode} before {pattern!r}\n{self.state()}")
            if time.monotonic() > deadline:
                raise Failure(f"no {pattern!r} within {timeout:g} s\n{self.state()}")
            time.sleep(_POLL)

    def send(self, line: str) -> None:
        """Type a line on the console."""
        self.write(line.encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Put bytes into the VMM's standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def run(self, command: str, timeout: float = WAIT) -> str:
        """Run a shell command in the guest, whose console must be at a shell prompt; returns what it printed.

        Fails when its exit status is not 0. The marks around the output are computed by the guest's shell, so that the
        echo of the typed line is not taken for them.
        """
        self._count += 1
        mark = f"{self.pid}-{self._count}"
        between = "" if command.rstrip().endswith("&") else ";"  # what runs in the background has its separator already
        self.send(f"echo begin-''{mark}; {command}{between} echo end-''{mark}=$?=")
        self.expect(f"^begin-{mark}\n", timeout)
        start = self._seen
        match = self.expect(rf"end-{mark}=(\d+)=", timeout)
        text = self.output()[start : match.start()]
        if match[1] != "0":
            raise Failure(f"in the guest: {command!r}: exit status {match[1]}\n{text}")
        return text

    def wait(self, timeout: float = WAIT) -> int:
        """Wait until the VMM has ended; returns its exit status (negative for a signal)."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"the VMM did not end within {timeout:g} s\n{self.state()}") from None

    def signal(self, number: int) -> None:
        """Send a signal to the VMM's process."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        if self.process.poll() is None:
            self.killed = True
            self.process.kill()
        self.process.wait()
        if self.process.stdin and not self.process.stdin.closed:
            # It may not be reading any more; what it did not read does not matter.
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def state(self) -> str:
        """The command and the last lines of the console and the log, for messages."""
        return (
            f"  command: {' '.join(self.command)}\n"
            f"  console:\n{_last_lines(self.output(), 30)}\n  its error output:\n{_last_lines(self.errors(), 20)}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Qmp:
    """A blocking QMP client on a unix socket: one JSON object a line. Replies and events are kept apart.

    The connection is retried until `timeout`, because a socket appears some time after its VMM has been started.
    """

    def __init__(self, path: Path | str, timeout: float = WAIT, negotiate: bool = True) -> None:
        deadline = time.monotonic() + timeout
        self.events: list[dict[str, Any]] = []  # not yet taken by event(), oldest first
        self._buffer = b""
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._socket.close()
                if time.monotonic() > deadline:
                    raise Failure(f"nothing listens on {path} within {timeout:g} s") from None
                time.sleep(_POLL)
        self.greeting = self._read(timeout)
        if negotiate:
            self.execute("qmp_capabilities")

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = WAIT, fds: Sequence[int] = ()
    ) -> Any:
        """Run a command; returns its "return" member. Raises QmpError when the answer is an error. `fds` go with it."""
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        data = json.dumps(request).encode() + b"\n"
        if fds:
            socket.send_fds(self._socket, [data], list(fds))
        else:
            self.send(data)
        while True:
            message = self._read(timeout)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(message["error"])
            else:
                return message["return"]

    def event(self, name: str, timeout: float = WAIT) -> dict[str, Any]:
        """The oldest event of this name that was not taken yet; waits for it. Others stay in `events`, in order."""
        deadline = time.monotonic() + timeout
        while True:
            for number, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(number)
            try:
                message = self._read(deadline - time.monotonic())
            except Failure:
                raise Failure(f"no event {name} within {timeout:g} s; there were: {[e['event'] for e in self.events]}") from None
            if "event" not in message:
                raise Failure(f"a reply that nobody asked for: {message}")
            self.events.append(message)

    def send(self, data: bytes) -> None:
        """Put raw bytes on the socket."""
        self._socket.sendall(data)

    def read(self, timeout: float = WAIT) -> dict[str, Any]:
        """The next message, whatever it is."""
        return self._read(timeout)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _read(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            rest = deadline - time.monotonic()
            if rest <= 0:
                raise Failure(f"no QMP message within {timeout:g} s")
            self._socket.settimeout(rest)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                raise Failure(f"the QMP connection was closed; unread: {self._buffer!r}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def session_processes(session: int) -> list[str]:
    """The processes of a session that still run, as "pid name"."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name = text[text.index("(") + 1 : text.rindex(")")]
        state, _parent, _group, its_session = text[text.rindex(")") + 2 :].split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(f"{folder.name} {name}")
    return found


def end_session(session: int) -> None:
    """kill -9 every process of a session."""
    for entry in session_processes(session):
        try:
            os.kill(int(entry.split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            continue


def _last_lines(text: str, count: int) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-count:])
