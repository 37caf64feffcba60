"""Listening sockets: replaced only when dead, private, removed only when ours."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qmp_server import Listener, listen_tcp, listen_unix


def test_only_the_owner_can_connect(tmp_path: Path) -> None:
    with listen_unix(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_the_file_goes_with_the_listener(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "s")
    listener.close()
    listener.close()
    assert not (tmp_path / "s").exists()


def test_the_file_is_found_again_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listener = listen_unix("s")
    monkeypatch.chdir("/")
    listener.close()
    assert not (tmp_path / "s").exists()


def test_a_short_name_is_enough_in_a_directory_whose_own_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    monkeypatch.chdir(folder)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind("s")
    stale.close()
    with listen_unix("s") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect("s")
        listener.socket.accept()[0].close()
        assert stat.S_IMODE((folder / "s").stat().st_mode) == 0o600
        monkeypatch.chdir("/")
    assert not (folder / "s").exists()


def test_a_file_that_somebody_else_put_there_is_left_alone(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "s")
    (tmp_path / "s").unlink()
    with listen_unix(tmp_path / "s"):
        listener.close()
        assert (tmp_path / "s").exists()


def test_the_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    program = "import sys, os, qmp_server; qmp_server.listen_unix(sys.argv[1]); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "s")], check=False).returncode == 9
    assert (tmp_path / "s").exists()
    with listen_unix(tmp_path / "s") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        listener.socket.accept()[0].close()


@pytest.mark.parametrize("backlog", [16, 0])
def test_the_socket_of_a_living_process_is_not_replaced(tmp_path: Path, backlog: int) -> None:
    with listen_unix(tmp_path / "s", backlog=backlog), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))  # with no backlog, it is full now
        with pytest.raises(OSError, match="another process listens") as caught:
            listen_unix(tmp_path / "s")
        assert caught.value.errno == errno.EADDRINUSE
        assert (tmp_path / "s").exists()


def test_a_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(FileExistsError, match="not a socket"):
        listen_unix(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long") as caught:
        listen_unix(tmp_path / ("x" * 120))
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_missing_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        listen_unix(tmp_path / "no" / "s")
    assert caught.value.filename == str(tmp_path / "no" / "s")


def test_of_many_that_find_a_dead_socket_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmp_server.sockets._LOCK_TRIES", 1 << 20)  # however long who has the lock is kept from the processor
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "s"))
    dead.close()
    won: list[Listener] = []
    start = threading.Barrier(8)

    def compete() -> None:
        start.wait()
        try:
            won.append(listen_unix(tmp_path / "s"))
        except OSError as error:
            assert error.errno == errno.EADDRINUSE  # noqa: PT017 - a failure of a thread fails the test

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    with won[0], socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))


@pytest.mark.parametrize("answer", [None, errno.EWOULDBLOCK, errno.ENOLCK])
def test_a_directory_that_cannot_be_locked_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None
) -> None:
    """Somebody else has locked it (None), is always quicker, or the file system has no locks."""
    monkeypatch.setattr("qmp_server.sockets._LOCK_PAUSE", 0)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    if answer is not None:

        def refuse(*_: int) -> None:
            raise OSError(answer, os.strerror(answer))

        monkeypatch.setattr("qmp_server.sockets.fcntl.flock", refuse)
    with listen_unix(tmp_path / "s"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
    os.close(holder)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_listens_on_the_address_it_was_given(host: str) -> None:
    with listen_tcp(host, 0) as listener:
        assert listener.socket.getsockname()[0] == host


def test_a_port_in_use_says_so() -> None:
    with listen_tcp("127.0.0.1", 0) as listener, pytest.raises(OSError, match="in use"):
        listen_tcp("127.0.0.1", listener.socket.getsockname()[1])


def test_making_a_socket_does_not_import_an_event_loop() -> None:
    program = (
        "import sys, qmp_server.sockets; sys.exit(any(m in sys.modules for m in ('anyio', 'asyncio', 'orjson', 'qmp_protocol')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
