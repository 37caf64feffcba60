"""The harness waits for what it is told, no longer than needed, and says what it saw when it does not come."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.vmm import Failure, Qmp, QmpError, Vmm, end_session, session_processes


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Vmm]:
    """A shell stands for a guest with a shell on its console; it echoes what is typed, as a terminal does."""
    script = 'printf "guest:~# "; while IFS= read -r line; do echo "$line"; eval "$line"; printf "guest:~# "; done'
    with Vmm(["sh", "-c", script], tmp_path) as vmm:
        yield vmm


def test_a_command_in_the_guest_gives_its_output_and_not_its_echo(guest: Vmm) -> None:
    guest.expect("# ")
    assert guest.run("echo hello; echo world") == "hello\nworld\n"
    assert guest.run("printf x") == "x"
    assert guest.run("true &") == ""


def test_a_command_that_fails_in_the_guest_fails_the_test(guest: Vmm) -> None:
    guest.expect("# ")
    with pytest.raises(Failure, match="exit status 3"):
        guest.run("(exit 3)")


def test_expect_goes_on_after_the_last_match(guest: Vmm) -> None:
    guest.send("echo one; echo one")
    guest.expect("^one$")
    guest.expect("^one$")
    with pytest.raises(Failure, match="no '\\^one"):
        guest.expect("^one$", timeout=0)


def test_the_end_of_the_vmm_is_not_waited_out(tmp_path: Path) -> None:
    with Vmm(["sh", "-c", "echo oops >&2; exit 4"], tmp_path) as vmm:
        with pytest.raises(Failure, match=r"ended with status 4(.|\n)*oops"):
            vmm.expect("never")
        assert vmm.wait() == 4


def test_children_left_by_a_vmm_are_found_and_ended(tmp_path: Path) -> None:
    with Vmm(["sh", "-c", "sleep 1000 & echo started; wait"], tmp_path) as vmm:
        vmm.expect("started")
    assert len(session_processes(vmm.pid)) == 1
    end_session(vmm.pid)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """A QMP server that sends an event before each reply, in small pieces."""
    path = tmp_path / "qmp.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b'{"QMP": {}}\r\n')
            for line in lines:
                name = json.loads(line)["execute"]
                answer: dict[str, object] = {"return": {"name": name}}
                if name == "bad":
                    answer = {"error": {"class": "CommandNotFound", "desc": "no"}}
                event = {"event": f"BEFORE-{name}"}
                for byte in (json.dumps(event) + "\r\n" + json.dumps(answer) + "\r\n").encode():
                    connection.sendall(bytes([byte]))

    thread = threading.Thread(target=serve)
    thread.start()
    yield path
    thread.join()
    listener.close()


def test_replies_and_events_are_told_apart(server: Path) -> None:
    with Qmp(server) as qmp:
        assert qmp.greeting == {"QMP": {}}
        assert qmp.execute("query-x") == {"name": "query-x"}
        assert qmp.event("BEFORE-query-x") == {"event": "BEFORE-query-x"}
        assert [event["event"] for event in qmp.events] == ["BEFORE-qmp_capabilities"]


def test_an_error_reply_is_an_exception(server: Path) -> None:
    with Qmp(server) as qmp, pytest.raises(QmpError, match="CommandNotFound: no") as caught:
        qmp.execute("bad")
    assert caught.value.kind == "CommandNotFound"


def test_an_event_that_does_not_come_is_a_failure_that_names_the_others(server: Path) -> None:
    with Qmp(server) as qmp, pytest.raises(Failure, match=r"no event STOP .*BEFORE-qmp_capabilities"):
        qmp.event("STOP", timeout=0)
