"""The command `qmp`, run against a server: what it prints and how it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from pystratovirt.qmpshell.client import QmpClient, QmpConnectionError, QmpTimeout
from pystratovirt.qmpshell.main import main
from qmp_protocol import QmpError
from qmp_protocol.commands.block import BlockdevAdd
from qmp_protocol.commands.lifecycle import QueryStatus, StatusInfo
from qmp_protocol.events import DeviceDeleted
from qmp_server import Call, QmpServer, listen_tcp, listen_unix

EVENTS = "BALLOON_CHANGED, CPU_RESIZE, DEVICE_DELETED, POWERDOWN, RESET, RESUME, SHUTDOWN, STOP"
STATUS = {"running": True, "singlestep": False, "status": "running"}


class Machine:
    """A server that remembers what it was told."""

    def __init__(self, path: Path) -> None:
        self.server = server = QmpServer(rate=0)
        self.address = str(path)
        self.added: list[BlockdevAdd] = []
        self.lines: list[str] = []
        tcp = listen_tcp("127.0.0.1", 0)
        self.tcp = f"127.0.0.1:{tcp.socket.getsockname()[1]}"
        server.register("query-status", lambda _, call: STATUS)
        server.register("blockdev-add", lambda arguments, call: self.added.append(arguments))

        @server.handler("device_del")
        def device_del(arguments: Any, call: Call) -> None:
            if arguments.id == "none":
                raise QmpError("GenericError", "Device none not found")
            call.emit(DeviceDeleted(device="other", path="other"))
            call.emit_after(DeviceDeleted(device=arguments.id, path=arguments.id))

        @server.handler("human-monitor-command")
        def human_monitor_command(arguments: Any, call: Call) -> str:
            self.lines.append(arguments.command_line)
            return "List of snapshots present on all disks:\r\n\x1b[2JNone\r\n"

        @server.handler("quit")
        def quit_(_: Any, call: Call) -> None:
            call.emit_after("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
            call.after_reply(server.close)

        listeners = [listen_unix(path), tcp]
        self.thread = threading.Thread(target=anyio.run, args=(server.serve, listeners))
        self.thread.start()

    def end(self) -> None:
        self.server.close()
        self.thread.join()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path / "qmp.sock")
    monkeypatch.setenv("QMP_SOCKET", made.address)
    yield made
    made.end()


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Any:
    def read() -> Any:
        text = capsys.readouterr()
        assert text.err == ""
        return [json.loads(line) for line in text.out.splitlines()]

    return read


def test_a_command_prints_its_result_as_a_line_of_json(machine: Machine, output: Any) -> None:
    assert main(["-s", machine.address, "query-status"]) == 0
    assert output() == [STATUS]


@pytest.mark.parametrize("form", ["{}", "unix:{}"])
def test_unix_addresses_have_two_forms(machine: Machine, output: Any, form: str) -> None:
    assert main(["query-status", "-s", form.format(machine.address)]) == 0
    assert output() == [STATUS]


@pytest.mark.parametrize("form", ["{}", "tcp:{}"])
def test_tcp_addresses_have_two_forms(machine: Machine, output: Any, form: str) -> None:
    assert main(["-s", form.format(machine.tcp), "query-status"]) == 0
    assert output() == [STATUS]


def test_arguments_are_typed_by_the_schema(machine: Machine, output: Any) -> None:
    words = "blockdev-add node-name=d file.driver=file file.filename=/x cache.direct=off read-only=on"
    assert main(words.split()) == 0
    assert output() == [{}]
    (added,) = machine.added
    assert added.cache is not None
    assert (added.node_name, added.file.filename, added.cache.direct, added.read_only) == ("d", "/x", False, True)


def test_an_error_of_the_server_is_one_line_and_status_1(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device_del", "id=none"]) == 1
    assert capsys.readouterr() == ("", "qmp: GenericError: Device none not found\n")
    assert main(["no-such-command"]) == 1
    assert capsys.readouterr().err == "qmp: CommandNotFound: The command no-such-command has not been found\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device_del", "net-0"], "net-0: not key=value"),
        (["wait"], "wait: which event?"),
        (["wait", "STOPP"], f"wait: no event STOPP; there are: {EVENTS}"),
        (["wait", "DEVICE_DELETED", "STOP", "id=d"], "wait: id: no such data of DEVICE_DELETED or STOP; there are: device, path"),
        (["wait", "STOP", "a=1"], "wait: a: no such data of STOP; there are: none"),
        (
            ["balloon", "value=99999999999999999999999"],
            "value=99999999999999999999999: a whole number from -2^63 to 2^64-1 is wanted",
        ),
        (["schema", "no-such"], "schema: no command or event no-such"),
        (["schema", "a", "b"], "schema: one name at most"),
        (["completion", "csh"], "completion: for which shell? bash, zsh, fish"),
        (["-w", "STOP"], "--wait: behind which command?"),
        (["-w", "STOP", "schema"], "--wait: behind which command?"),
        (["-w", "", "query-status"], f"wait: no event ; there are: {EVENTS}"),
        (["--fd", "0"], "--fd: passed with which command?"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(
    machine: Machine, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    assert capsys.readouterr() == ("", f"qmp: {message}\n")


def test_without_an_address_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("QMP_SOCKET", raising=False)
    assert main(["stop"]) == 2
    assert capsys.readouterr().err == "qmp: no server: -s ADDRESS or $QMP_SOCKET is needed\n"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("/no/such/socket", "No such file or directory"),
        ("tcp:nonsense", "not HOST:PORT"),
        ("tcp:127.0.0.1:99999", "not HOST:PORT"),
    ],
)
def test_no_connection_is_one_line_and_status_3(capsys: pytest.CaptureFixture[str], address: str, reason: str) -> None:
    assert main(["-s", address, "stop"]) == 3
    assert capsys.readouterr().err == f"qmp: {address}: {reason}\n"


def test_a_peer_that_does_not_speak_qmp_is_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen_unix(tmp_path / "s") as listener:
        thread = threading.Thread(target=_greet, args=(listener.socket, b"220 mail.example ESMTP\r\n"))
        thread.start()
        assert main(["-s", str(tmp_path / "s"), "stop"]) == 3
        thread.join()
    assert capsys.readouterr().err.startswith("qmp: the peer does not speak QMP: ")


def test_a_peer_that_is_silent_is_status_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen_unix(tmp_path / "s"):  # accepts and never greets, as StratoVirt while it has another client
        assert main(["-s", str(tmp_path / "s"), "-t", "0", "stop"]) == 4
    assert capsys.readouterr().err == "qmp: no greeting in time\n"


def test_a_server_that_is_busy_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen_unix(tmp_path / "s", backlog=0), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(tmp_path / "s"))  # no room to wait is left
        assert main(["-s", str(tmp_path / "s"), "-t", "0.05", "stop"]) == 4
    assert capsys.readouterr().err.endswith("s: no connection in time\n")


def test_a_host_that_does_not_answer_is_status_4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered(*_: object) -> None:
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr(socket, "create_connection", unanswered)
    assert main(["-s", "192.0.2.1:4444", "stop"]) == 4
    assert capsys.readouterr().err == "qmp: 192.0.2.1:4444: no connection in time\n"


def test_a_wait_for_an_event_can_follow_a_command(machine: Machine, output: Any) -> None:
    assert main(["device_del", "id=d", "-w", "DEVICE_DELETED"]) == 0
    result, event = output()
    assert result == {}
    assert event["event"] == "DEVICE_DELETED"
    assert set(event["timestamp"]) == {"seconds", "microseconds"}


def test_the_end_of_the_machine_can_be_waited_for(machine: Machine, output: Any) -> None:
    assert main(["quit", "--wait", "SHUTDOWN"]) == 0
    assert output()[1]["data"] == {"guest": False, "reason": "host-qmp-quit"}
    machine.thread.join()


def test_waiting_takes_the_event_with_the_right_data(machine: Machine, output: Any) -> None:
    emitter = threading.Thread(target=_emit_when_greeted, args=(machine.server,))
    emitter.start()
    assert main(["wait", "STOP", "DEVICE_DELETED", "device=d2"]) == 0
    emitter.join()
    assert output()[0]["data"] == {"device": "d2", "path": "p"}


def test_waiting_in_vain_is_status_4(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = QmpClient.__init__
    monkeypatch.setattr(QmpClient, "__init__", lambda client, address, **_: connect(client, address, timeout=60))
    assert main(["wait", "STOP", "-t", "0.05"]) == 4
    assert capsys.readouterr().err == "qmp: no event in time\n"


def test_a_wait_for_what_never_comes_is_refused_before_the_command_runs(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["blockdev-add", "node-name=a", "file.driver=file", "file.filename=/x", "-w", "DEVICE_DELETETD"]) == 2
    assert capsys.readouterr().err.startswith("qmp: wait: no event DEVICE_DELETETD; there are: ")
    assert machine.added == []


@pytest.mark.parametrize("words", [["wait", "RESUME"], ["query-status"]])
def test_a_flood_of_other_events_does_not_keep_it_beyond_its_time(
    machine: Machine, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            machine.server.emit("STOP")

    @machine.server.handler("query-status", in_thread=True, concurrent=True)
    def query_status(_: Any, call: Call) -> dict[str, Any]:
        over.wait(60)
        return STATUS

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        assert main([*words, "-t", "0.3"]) == 4  # or the test's time limit strikes
    finally:
        over.set()
        flooding.join()
    assert capsys.readouterr().err.endswith("in time\n")


def test_the_human_monitors_text_cannot_steer_the_terminal(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hmp", "info", "snapshots"]) == 0
    assert machine.lines == ["info snapshots"]
    assert capsys.readouterr().out == "List of snapshots present on all disks:\n\\x1b[2JNone\n"


@pytest.mark.parametrize("words", [["hmp", "--", "info", "block", "-v"], ["--", "hmp", "info", "block", "-v"]])
def test_words_behind_two_dashes_may_begin_with_one(machine: Machine, words: list[str]) -> None:
    assert main(words) == 0
    assert machine.lines == ["info block -v"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_whatever_standard_output_can_hold(machine: Machine, encoding: str) -> None:
    text = "ä€\U0001f600"
    machine.server.register("query-status", lambda _, call: {"status": text})
    machine.server.register("human-monitor-command", lambda _, call: text)
    told = {}
    for words in (["query-status"], ["hmp", "info"]):
        done = subprocess.run(
            [sys.executable, "-m", "pystratovirt.qmpshell", "-s", machine.address, *words],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            check=True,
        )
        told[words[0]] = done.stdout.decode(encoding)
    assert json.loads(told["query-status"]) == {"status": text}
    assert json.loads(f'"{told["hmp"].strip()}"') == text


def test_commands_can_come_from_standard_input(machine: Machine, output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "# a comment\nquery-status\n\nblockdev-add node-name='a b' file.driver=file file.filename=/x\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(script))
    assert main([]) == 0
    assert output() == [STATUS, {}]
    assert machine.added[0].node_name == "a b"


def test_a_script_takes_what_the_shell_takes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = """\
        {"execute": "query-status"}
        {"execute":"blockdev-add","arguments":{"node-name":"j","file":{"driver":"file","filename":"/x"}},"id":7}
        device_del id=d
        wait DEVICE_DELETED device=d
        hmp info snapshots
        schema device_del
    """
    monkeypatch.setattr(sys, "stdin", io.StringIO(script))
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines[:3]] == [STATUS, {}, {}]
    assert json.loads(lines[3])["data"] == {"device": "d", "path": "d"}
    assert lines[4] == "List of snapshots present on all disks:"
    assert "device_del (command)" in lines
    assert machine.added[0].node_name == "j"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"execute":', "line 2: not JSON: "),
        ('{"run":"stop"}', 'line 2: an object with "execute" is wanted'),
        (
            '{"execute":"device_del","argument":{}}',
            "line 2: argument: no such member of a command; there are: execute, arguments",
        ),
        ('{"execute":"balloon","arguments":{"value":18446744073709551616}}', "line 2: not JSON: 18446744073709551616 has more"),
        ("wait NOTHING", "line 2: wait: no event NOTHING"),
        ("balloon value=x", "line 2: value=x: a whole number is wanted"),
        ("'", "line 2: No closing quotation"),
    ],
)
def test_a_line_that_cannot_be_is_named_by_its_number(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"query-status\n{line}\n"))
    assert main([]) == 2
    assert capsys.readouterr().err.startswith(f"qmp: {message}")


def test_a_script_may_hold_any_bytes(machine: Machine) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pystratovirt.qmpshell", "-s", machine.address],
        input=b"blockdev-add node-name=\xff file.driver=file file.filename=/x\n{\xff}\n",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"{}\n")
    assert done.stderr.startswith(b"qmp: line 2: not JSON")
    assert machine.added[0].node_name == "\\udcff"


def test_a_server_s_words_cannot_steer_the_terminal_nor_turn_around(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    @machine.server.handler("device_del")
    def device_del(arguments: Any, call: Call) -> None:
        raise QmpError("GenericError", "\x1b[2J\u202eevil\n\x9b1A")

    assert main(["device_del", "id=x"]) == 1
    assert capsys.readouterr().err == "qmp: GenericError: \\x1b[2J\\u202eevil\\x0a\\x9b1A\n"


def test_a_script_ends_at_its_first_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("device_del id=none\nblockdev-add node-name=a file.filename=/x\n"))
    assert main([]) == 1
    assert machine.added == []


def test_the_schema_is_shown_without_a_server_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("QMP_SOCKET", raising=False)
    assert main(["schema"]) == 0
    assert "human-monitor-command" in capsys.readouterr().out
    assert main(["schema", "device_add"]) == 0
    assert "num-queues" in capsys.readouterr().out


def test_colours_come_only_when_asked_for_or_on_a_terminal(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query-status", "--color", "always"]) == 0
    assert "\x1b[" in capsys.readouterr().out
    assert main(["query-status"]) == 0
    assert "\x1b[" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["query-sta"], ["query-status"]),
        (["wai"], ["wait"]),
        (["-s", "/x", "device_del", ""], ["id="]),
        (["-s", "/x", "wait", "SH"], ["SHUTDOWN"]),
        (["schema", "blockdev-a"], ["blockdev-add"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["blockdev-add", "file.aio=i"], ["file.aio=iouring"]),
        (["-s", ""], []),
    ],
)
def test_shells_can_complete(capsys: pytest.CaptureFixture[str], words: list[str], found: list[str]) -> None:
    assert main(["__complete", "--", *words]) == 0
    assert sorted(capsys.readouterr().out.split()) == found


def test_bash_completes_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    assert bash, "bash is part of every Debian"
    (tmp_path / "qmp").write_text(f'#!/bin/sh\nexec {sys.executable} -m pystratovirt.qmpshell "$@"\n')
    (tmp_path / "qmp").chmod(0o755)
    main(["completion", "bash"])
    program = capsys.readouterr().out + (
        'for COMP_LINE in "qmp query-sta" "qmp blockdev-add file.aio=na" "qmp device_del "; do\n'
        'COMP_POINT=${#COMP_LINE}; _qmp; printf "%s\\n" "${COMPREPLY[@]}"; done\n'
    )
    done = subprocess.run(
        [bash, "--norc", "-c", program],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["query-status", "native", "id="], "")


class TestClient:
    """The blocking client as a library."""

    def test_runs_typed_commands(self, machine: Machine) -> None:
        with QmpClient(machine.address) as client:
            assert client.call(QueryStatus()) == StatusInfo(running=True, status="running")
            assert client.greeting.version["package"] == "StratoVirt-2.4.0"

    def test_keeps_events_until_they_are_taken(self, machine: Machine) -> None:
        with QmpClient(machine.address) as client:
            client.execute("device_del", {"id": "d"})
            assert client.wait_event(60).data["device"] == "other"
            assert client.wait_event(60).data["device"] == "d"
            with pytest.raises(QmpTimeout):
                client.wait_event(0)

    def test_looks_at_all_that_has_come_even_without_time(self, machine: Machine) -> None:
        with QmpClient(machine.address) as client:
            for _ in range(3):
                client.execute("device_del", {"id": "d"})
            client.execute("query-status")
            assert client.wait_event(0, lambda event: event.data["device"] == "d").data["device"] == "d"
            machine.server.emit("STOP")
            assert client.wait_event(60, lambda event: event.name == "STOP").name == "STOP"
            assert not client.events

    def test_says_when_the_server_is_gone(self, machine: Machine) -> None:
        with QmpClient(machine.address) as client:
            machine.end()
            with pytest.raises(QmpConnectionError, match="hung up"):
                client.wait_event(60)
            with pytest.raises(QmpConnectionError):
                client.wait_event(0)


def _greet(door: socket.socket, text: bytes) -> None:
    door.setblocking(True)
    sock, _ = door.accept()
    with sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass


def _emit_when_greeted(server: QmpServer) -> None:
    # Events to nobody are lost; the client is there once the server has greeted it.
    while not server._clients:
        threading.Event().wait(0.005)
    server.emit(DeviceDeleted(device="d1", path="p"))
    server.emit(DeviceDeleted(device="d2", path="p"))
