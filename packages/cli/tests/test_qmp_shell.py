"""The interactive shell, driven through prompt_toolkit's pipe instead of a terminal."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from pystratovirt.qmpshell.asyncclient import AsyncClient
from pystratovirt.qmpshell.client import QmpConnectionError, QmpTimeout
from pystratovirt.qmpshell.model import Model
from pystratovirt.qmpshell.shell import Shell, _Completer, _history, _model
from qmp_protocol import encode
from qmp_server import Call, QmpServer, listen_unix


class Screen(DummyOutput):
    """Keeps what is written."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def write(self, data: str) -> None:
        self._pieces.append(data)

    def write_raw(self, data: str) -> None:
        self._pieces.append(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QmpServer]:
    made = QmpServer(rate=0)
    made.register("query-status", lambda _, call: {"running": True, "singlestep": False, "status": "running"})
    made.register("stop", lambda _, call: call.emit("STOP"))
    made.register("human-monitor-command", lambda arguments, call: f"did {arguments.command_line}\r\n")

    @made.handler("quit")
    def quit_(_: Any, call: Call) -> None:
        call.emit_after("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        call.after_reply(made.close)

    listener = listen_unix(tmp_path / "qmp.sock")
    thread = threading.Thread(target=anyio.run, args=(made.serve, [listener]))
    thread.start()
    yield made
    made.close()
    thread.join()


Talk = Callable[..., tuple[int, str]]


@pytest.fixture
def talk(server: QmpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Type lines into a shell until it ends; returns its status and what it showed."""
    monkeypatch.setenv("NO_COLOR", "1")

    async def converse(lines: list[str]) -> tuple[int, str]:
        client = await AsyncClient.connect(str(tmp_path / "qmp.sock"), 30)
        screen = Screen()
        try:
            with create_pipe_input() as keys:
                shell = Shell(client, await _model(client), input=keys, output=screen)
                keys.send_text("".join(f"{line}\r" for line in lines) + "\x04")
                async with asyncio.timeout(60):
                    return await shell.run(), screen.text
        finally:
            client.close()

    return lambda *lines: asyncio.run(converse(list(lines)))


def test_a_line_is_a_command_and_its_result_is_shown(talk: Talk) -> None:
    status, text = talk("query-status")
    assert status == 0
    assert "Connected to StratoVirt-2.4.0" in text
    assert '"status": "running"' in text


def test_events_are_shown_as_they_come(talk: Talk) -> None:
    _, text = talk("stop", "query-status")
    assert "STOP {}" in text


def test_a_line_may_be_json(talk: Talk) -> None:
    _, text = talk('{"execute":"query-status"}', "{nonsense", '{"a":1}')
    assert '"status": "running"' in text
    assert "not JSON" in text
    assert 'an object with "execute" is wanted' in text


def test_mistakes_are_told_and_the_shell_goes_on(talk: Talk) -> None:
    status, text = talk("no-such", "device_del id", "device_del 'id=x", "cont", "query-status")
    assert status == 0
    assert "CommandNotFound: The command no-such has not been found" in text
    assert "id: not key=value" in text
    assert "No closing quotation" in text
    assert "The command cont is not supported yet" in text
    assert '"status": "running"' in text


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("balloon value=99999999999999999999999", "from -2^63 to 2^64-1 is wanted"),
        ('{"execute":"balloon","arguments":{"value":99999999999999999999999}}', "more than 64 bits"),
        ('{"execute":"stop","arguments":' + "[" * 260 + "]" * 260 + "}", "cannot be sent"),
        ("unknown " + ".".join("a" * 300) + "=1", "cannot be sent"),
        ("wait NO_SUCH_EVENT", "no event NO_SUCH_EVENT; there are: BALLOON_CHANGED"),
        ("schema a b", "one name at most"),
        ("no-\u202esuch", "no-\\u202esuch"),
    ],
)
def test_what_cannot_be_is_told_and_the_shell_goes_on_with_the_right_replies(talk: Talk, line: str, problem: str) -> None:
    status, text = talk(line, "query-status")
    assert status == 0
    assert problem in text
    assert text.index(problem) < text.index('"status": "running"')


def test_a_reply_that_is_nested_as_deep_as_json_goes_is_shown(
    talk: Talk, server: QmpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = b'{"return":' + b"[" * 1000 + b"1" + b"]" * 1000 + b',"id":"%d"}\r\n'
    monkeypatch.setattr("qmp_server.client.encode", lambda reply: deep % int(reply.id) if reply.id == "2" else encode(reply))
    status, text = talk("human-monitor-command command-line=x", "query-status")
    assert status == 0
    assert text.count("]") >= 1000
    assert '"status": "running"' in text


def test_an_event_is_waited_for_from_the_last_command_on(talk: Talk, server: QmpServer) -> None:
    @server.handler("cont", in_thread=True)
    def cont(_: Any, call: Call) -> None:
        threading.Timer(0.01, lambda: server.emit("RESUME")).start()

    _, text = talk("stop", "wait STOP", "cont", "wait RESUME", "query-status")
    assert text.index("STOP {}") < text.index("RESUME {}") < text.index('"status": "running"')


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_ends_the_wait_and_not_the_shell_however_early_it_comes(
    talk: Talk, server: QmpServer, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    @server.handler("cont", concurrent=True)
    async def cont(_: Any, call: Call) -> None:
        await anyio.sleep_forever()

    original = Shell._do

    async def do(self: Shell, line: str) -> None:
        if line == "cont":
            interrupt = functools.partial(os.kill, os.getpid(), signal.SIGINT)
            interrupt() if early else asyncio.get_running_loop().call_later(0.05, interrupt)
            if early:
                await asyncio.sleep(0.01)  # between the prompt and the command
        await original(self, line)

    monkeypatch.setattr(Shell, "_do", do)
    server.drain_time = 0.05
    status, text = talk("cont", "help device_del")
    assert status == 0
    assert "Not waited for any longer" in text
    assert "Remove a device" in text


def test_a_wait_ends_with_the_server(talk: Talk, server: QmpServer) -> None:
    @server.handler("cont", in_thread=True)
    def cont(_: Any, call: Call) -> None:
        threading.Timer(0.01, server.close).start()

    assert "The server hung up" in talk("cont", "wait DEVICE_DELETED device=d")[1]


def test_the_human_monitor_and_help_are_there(talk: Talk) -> None:
    _, text = talk("hmp info snapshots", "help", "schema device_add", "help nonsense")
    assert "wait EVENT..." in text
    assert "did info snapshots" in text
    assert "blockdev-snapshot-internal-sync" in text
    assert "num-queues" in text
    assert "no command or event nonsense" in text


def test_quit_asks_because_it_ends_the_machine_and_not_the_shell(talk: Talk) -> None:
    status, text = talk("quit", "n", "query-status")
    assert status == 0
    assert '"status": "running"' in text
    assert "SHUTDOWN" not in text


def test_the_shell_ends_with_the_server(talk: Talk) -> None:
    status, text = talk("quit", "y")
    assert status == 0
    assert "SHUTDOWN" in text
    assert "host-qmp-quit" in text


def test_exit_leaves_the_machine_alone(talk: Talk) -> None:
    assert talk("exit", "quit", "y")[0] == 0
    assert '"status": "running"' in talk("query-status")[1]


def test_tab_completes_commands_arguments_and_values() -> None:
    completer = _Completer(Model.stratovirt())

    def offered(line: str) -> list[str]:
        return [each.text for each in completer.get_completions(Document(line), CompleteEvent())]

    assert offered("query-sta") == ["query-status"]
    assert offered("exi") == ["exit"]
    assert offered("blockdev-add file.aio=n") == ["file.aio=native"]
    assert offered("help device_a") == offered("schema device_a") == ["device_add"]
    assert offered("wait SHUT") == ["SHUTDOWN"]
    assert offered('{"execute":"que') == []


def test_a_comment_is_no_command(talk: Talk) -> None:
    _, text = talk("# don't", "query-status # of the machine")
    assert text.count('"status": "running"') == 1
    assert "No closing quotation" not in text


def test_the_history_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    _history().append_string("device_del id=secret")
    (file,) = tmp_path.rglob("qmp_history")
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").touch()
    (tmp_path / "taken/pystratovirt/qmp_history").mkdir(parents=True)
    for state in (tmp_path / "file", tmp_path / "taken", None, tmp_path):
        if state:
            monkeypatch.setenv("XDG_STATE_HOME", str(state))
        else:
            monkeypatch.delenv("XDG_STATE_HOME")
            monkeypatch.setattr(Path, "home", homeless)
        history = _history()
        if state == tmp_path:  # it cannot be written any more
            (tmp_path / "pystratovirt/qmp_history").unlink()
            (tmp_path / "pystratovirt/qmp_history").mkdir()
            assert list(history.load_history_strings()) == []
        history.append_string("query-status")
        assert history.get_strings() == ["query-status"]


class TestConnecting:
    def test_to_nobody_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(QmpConnectionError, match="No such file"):
            asyncio.run(AsyncClient.connect(str(tmp_path / "none"), 1))

    def test_to_a_silent_peer_ends(self, tmp_path: Path) -> None:
        with listen_unix(tmp_path / "s"), pytest.raises(QmpTimeout):
            asyncio.run(AsyncClient.connect(str(tmp_path / "s"), 0.05))

    def test_to_a_peer_that_does_not_speak_qmp_ends(self, tmp_path: Path) -> None:
        with listen_unix(tmp_path / "s") as listener:
            listener.socket.setblocking(True)
            thread = threading.Thread(target=_answer_badly, args=(listener.socket,))
            thread.start()
            with pytest.raises(QmpConnectionError, match="does not speak QMP"):
                asyncio.run(AsyncClient.connect(str(tmp_path / "s"), 30))
            thread.join()


def _answer_badly(door: Any) -> None:
    sock, _ = door.accept()
    with sock:
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")
        sock.recv(1)
