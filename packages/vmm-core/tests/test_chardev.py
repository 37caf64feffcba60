"""Back ends of character devices: every kind of descriptor a person may hand us, peers that come and go, and none lost."""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from vmm_core.clock import MonotonicClock, VirtualClock
from vmm_core.devices.chardev import CharBackend, FileBackend
from vmm_core.devices.chardev_client import connect_tcp, connect_unix
from vmm_core.devices.chardev_socket import SocketListener, listen_tcp, listen_unix
from vmm_core.devices.chardev_terminal import PtyBackend, StdioBackend
from vmm_core.devices.serial import DATA, LSR, Serial
from vmm_core.directloop import DirectLoop
from vmm_core.errors import ChardevError
from vmm_core.hypervisor.testmode import RecordedLine
from vmm_core.threads import IoThread

GENEROUS = 60  # seconds

B = TypeVar("B", bound=CharBackend)


class Frontend:
    """A device that keeps what it gets and has as much room as a test says."""

    def __init__(self) -> None:
        self.room = 1 << 20
        self.got = bytearray()
        self.peers: list[bool] = []
        self.ready = 0

    def input_room(self) -> int:
        return self.room

    def receive(self, data: bytes) -> None:
        assert 0 < len(data) <= self.room
        self.room -= len(data)
        self.got += data

    def output_ready(self) -> None:
        self.ready += 1

    def peer_changed(self, connected: bool) -> None:
        self.peers.append(connected)


class Pausing(Frontend):
    """One whose machine is paused the moment it hears that a peer has gone."""

    def __init__(self, loop: IoThread) -> None:
        super().__init__()
        self.pauses = False
        self.paused, self.heard = threading.Event(), threading.Semaphore(0)
        self._loop = loop

    def receive(self, data: bytes) -> None:
        super().receive(data)
        self.heard.release()

    def peer_changed(self, connected: bool) -> None:
        super().peer_changed(connected)
        if self.pauses and not connected:
            self.pauses = False

            def pause() -> None:
                self._loop.quiesce()
                self.paused.set()

            threading.Thread(target=pause).start()
            while not self._loop._interrupted:
                os.sched_yield()


class Desk:
    """A loop, a front end, and the reports; closes what the tests give it."""

    def __init__(self) -> None:
        self.loop = DirectLoop("test", VirtualClock())
        self.front = Frontend()
        self.reports: list[str] = []
        self.undo: list[Callable[[], object]] = []

    def start(self, backend: B) -> B:
        backend.start(self.loop, self.front)
        self.undo.append(backend.close)
        self.loop.poll()
        return backend

    def until(self, condition: Callable[[], bool]) -> None:
        """Run the loop until `condition` holds: terminals pass bytes on in the kernel's own time."""
        for _ in range(GENEROUS * 10):
            self.loop.poll()
            if condition():
                return
            select.select([self.loop._epoll.fileno()], [], [], 0.1)
        raise AssertionError("it did not come about")

    def pipe(self) -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self.undo += [lambda: os.close(reader), lambda: os.close(writer)]
        return reader, writer

    def close(self) -> None:
        for step in reversed(self.undo):
            step()
        self.loop.close()


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def desk() -> Iterator[Desk]:
    gc.collect()  # what other tests left for it would go in the middle of this one
    before = open_descriptors()
    desk = Desk()
    yield desk
    desk.close()
    assert open_descriptors() == before


# Standard input and output


def test_pipes_on_standard_input_and_output(desk: Desk) -> None:
    (keyboard, typed), (shown, screen) = desk.pipe(), desk.pipe()
    stdio = desk.start(StdioBackend(desk.reports.append, keyboard, screen))
    os.write(typed, b"ls\n")
    desk.loop.poll()
    assert desk.front.got == b"ls\n"
    assert stdio.write(b"bin etc\r\n") == 9
    assert os.read(shown, 100) == b"bin etc\r\n"
    assert os.get_blocking(screen)  # the descriptor that the shell shares stays as it was
    assert desk.front.peers == [True]


def test_a_file_on_standard_input_is_read_as_fast_as_there_is_room(desk: Desk, tmp_path: Path) -> None:
    script = bytes(range(256)) * 100
    (tmp_path / "script").write_bytes(script)
    _, screen = desk.pipe()
    file = os.open(tmp_path / "script", os.O_RDONLY | os.O_CLOEXEC)
    desk.undo.append(lambda: os.close(file))
    desk.front.room = 10
    stdio = desk.start(StdioBackend(desk.reports.append, file, screen))
    assert desk.front.got == script[:10]
    while len(desk.front.got) < len(script):
        desk.front.room = 7001
        stdio.input_wanted()
        desk.loop.poll()
    assert desk.front.got == script
    assert stdio.write(b"still here") == 10
    assert desk.reports == []


def test_dev_null_on_standard_input_is_no_input_and_no_error(desk: Desk) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    desk.undo.append(lambda: os.close(null))
    stdio = desk.start(StdioBackend(desk.reports.append, null, null))
    assert stdio.write(b"swallowed") == 9
    assert (bytes(desk.front.got), desk.reports) == (b"", [])


def test_the_end_of_input_is_not_the_end_of_output(desk: Desk) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    shown, screen = desk.pipe()
    desk.undo.append(lambda: os.close(reader))
    stdio = desk.start(StdioBackend(desk.reports.append, reader, screen))
    os.write(writer, b"bye")
    os.close(writer)
    desk.loop.poll()
    desk.loop.poll()
    assert desk.front.got == b"bye"
    stdio.write(b"hello")
    assert os.read(shown, 100) == b"hello"


def test_without_room_input_stays_in_the_pipe(desk: Desk) -> None:
    (keyboard, typed), (_, screen) = desk.pipe(), desk.pipe()
    stdio = desk.start(StdioBackend(desk.reports.append, keyboard, screen))
    desk.front.room = 3
    os.write(typed, b"abcdef")
    desk.loop.poll()
    assert desk.front.got == b"abc"
    desk.front.room = 100
    stdio.input_wanted()
    desk.loop.poll()
    assert desk.front.got == b"abcdef"


def test_a_full_pipe_takes_a_part_and_says_when_there_is_room(desk: Desk) -> None:
    (keyboard, _), (shown, screen) = desk.pipe(), desk.pipe()
    stdio = desk.start(StdioBackend(desk.reports.append, keyboard, screen))
    data = b"x" * 1_000_000
    taken = stdio.write(data)
    assert 0 < taken < len(data)
    assert stdio.write(b"more") == 0
    desk.loop.poll()
    assert desk.front.ready == 0
    received = 0
    while received < taken:
        received += len(os.read(shown, 65536))
    desk.loop.poll()
    assert desk.front.ready == 1


def test_a_reader_of_standard_output_that_went_away_is_reported_once(desk: Desk) -> None:
    keyboard, _ = desk.pipe()
    shown, screen = os.pipe2(os.O_CLOEXEC)
    desk.undo.append(lambda: os.close(screen))
    stdio = desk.start(StdioBackend(desk.reports.append, keyboard, screen))
    os.close(shown)
    assert [stdio.write(b"lost") for _ in range(3)] == [4, 4, 4]
    desk.loop.poll()
    assert desk.reports == ["stdio: output ended: Broken pipe"]


def test_a_socket_as_standard_input_and_output_gets_its_mode_back(desk: Desk) -> None:
    ours, theirs = socket.socketpair()
    stdio = StdioBackend(desk.reports.append, ours.fileno(), ours.fileno())
    stdio.start(desk.loop, desk.front)
    theirs.send(b"in")
    desk.loop.poll()
    assert stdio.write(b"out") == 3
    assert (bytes(desk.front.got), theirs.recv(10)) == (b"in", b"out")
    stdio.close()
    stdio.close()
    assert os.get_blocking(ours.fileno())
    ours.close()
    theirs.close()


def test_a_pipe_that_cannot_be_opened_anew_gets_its_mode_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (keyboard, _), (shown, screen) = desk.pipe(), desk.pipe()

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "no /proc here")

    monkeypatch.setattr(os, "open", refuse)
    stdio = StdioBackend(desk.reports.append, keyboard, screen)
    monkeypatch.undo()
    assert not os.get_blocking(screen)
    stdio.start(desk.loop, desk.front)
    assert stdio.write(b"hello") == 5
    assert os.read(shown, 100) == b"hello"
    stdio.close()
    assert os.get_blocking(keyboard)
    assert os.get_blocking(screen)


def test_a_closed_standard_input_is_an_error_and_leaves_nothing_open(desk: Desk) -> None:
    reader, _ = desk.pipe()
    gone = 1 << 20  # more than a process may have
    with pytest.raises(ChardevError, match=r"^standard input: Bad file descriptor$"):
        StdioBackend(desk.reports.append, gone, reader)
    ours, theirs = socket.socketpair()
    with pytest.raises(ChardevError, match=r"^standard output: Bad file descriptor$"):
        StdioBackend(desk.reports.append, ours.fileno(), gone)
    assert os.get_blocking(ours.fileno())
    ours.close()
    theirs.close()


def test_a_terminal_is_raw_while_the_guest_has_it_and_as_before_afterwards(desk: Desk) -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    stdio = StdioBackend(desk.reports.append, slave, slave)
    assert termios.tcgetattr(slave) == before  # not before the start, which may fail
    stdio.start(desk.loop, desk.front)
    raw = termios.tcgetattr(slave)
    assert raw[tty.LFLAG] & (termios.ISIG | termios.ICANON | termios.ECHO) == 0  # Ctrl-C is the guest's
    assert raw[tty.OFLAG] == before[tty.OFLAG]
    os.write(master, b"\x03x\r")
    desk.until(lambda: desk.front.got == b"\x03x\r")
    stdio.close()
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


RAW_TERMINAL = """
import signal, sys, termios, time
from vmm_core.clock import MonotonicClock
from vmm_core.devices.chardev_terminal import StdioBackend
from vmm_core.devices.serial import Serial
from vmm_core.directloop import DirectLoop
from vmm_core.hypervisor.testmode import RecordedLine
uart = Serial(RecordedLine(4), DirectLoop("main", MonotonicClock()), print)
uart.connect(StdioBackend(print))
assert not termios.tcgetattr(0)[3] & termios.ICANON
"""


def test_a_process_that_ends_without_closing_anything_leaves_the_terminal_as_it_was() -> None:
    program = f"""{RAW_TERMINAL}
raise KeyError("a bug")
"""
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    done = subprocess.run(
        [sys.executable, "-c", program], stdin=slave, stdout=slave, stderr=subprocess.PIPE, check=False, timeout=GENEROUS
    )
    assert b"KeyError: 'a bug'" in done.stderr
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGUSR1, signal.SIGTERM, signal.SIGABRT])
def test_a_process_that_a_signal_ends_leaves_the_terminal_as_it_was(number: signal.Signals) -> None:
    program = f"""{RAW_TERMINAL}
print("raw", file=sys.stderr, flush=True)
while True:
    time.sleep(0.05)  # pause() would miss a signal that comes just before it
"""
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen([sys.executable, "-c", program], stdin=slave, stdout=slave, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.read(3) == b"raw"
    process.send_signal(number)
    assert process.wait(GENEROUS) == -number, "it ends as by that signal"
    process.stderr.close()
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


def test_signals_are_left_alone_when_the_terminal_is_given_back(desk: Desk) -> None:
    master, slave = os.openpty()
    stdio = StdioBackend(desk.reports.append, slave, slave)
    stdio.start(desk.loop, desk.front)
    assert signal.getsignal(signal.SIGQUIT) is not signal.SIG_DFL
    stdio.close()
    assert signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL
    os.close(slave)
    os.close(master)


def test_a_terminal_that_goes_away_ends_input_and_output_and_nothing_else(desk: Desk) -> None:
    master, slave = os.openpty()
    stdio = StdioBackend(desk.reports.append, slave, slave)
    stdio.start(desk.loop, desk.front)
    os.close(master)
    desk.loop.poll()
    assert stdio.write(b"lost") == 4
    stdio.close()
    os.close(slave)


def test_a_terminal_that_has_gone_before_the_start_is_refused(desk: Desk) -> None:
    master, slave = os.openpty()
    stdio = StdioBackend(desk.reports.append, slave, slave)
    os.close(master)
    with pytest.raises(ChardevError, match=r"^standard input: Input/output error$"):
        stdio.start(desk.loop, desk.front)
    stdio.close()
    os.close(slave)


# Files


def test_a_file_is_written_from_its_beginning_and_not_cut(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"0123456789")
    file = desk.start(FileBackend(str(path), desk.reports.append))
    assert file.write(b"abc") == 3
    assert path.read_bytes() == b"abc3456789"


def test_a_new_file_is_the_users_alone(desk: Desk, tmp_path: Path) -> None:
    desk.start(FileBackend(str(tmp_path / "log"), desk.reports.append))
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) & 0o077 == 0


def test_a_file_that_cannot_be_opened_is_named(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(ChardevError, match=r"^cannot open .*/no/log: No such file or directory$"):
        FileBackend(str(tmp_path / "no" / "log"), desk.reports.append)


def test_a_full_disk_is_reported_once_and_tried_again(desk: Desk) -> None:
    file = desk.start(FileBackend("/dev/full", desk.reports.append))
    assert [file.write(b"lost"), file.write(b"lost")] == [4, 4]
    assert desk.reports == ["/dev/full: output lost: No space left on device"]


# Pseudo-terminals


def attach(pty: PtyBackend) -> int:
    return os.open(pty.path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


def test_a_pty_can_be_attached_to_left_and_attached_to_again(desk: Desk) -> None:
    pty = desk.start(PtyBackend(desk.reports.append))
    assert desk.reports == [f'Pty path is: "{pty.path}"']
    assert pty.write(b"nobody sees this") == 16
    for visit in (b"first", b"second"):
        terminal = attach(pty)
        desk.until(lambda: desk.front.peers == [True])
        desk.front.peers.clear()
        assert pty.write(b"\r\nlogin: ") == 9
        assert os.read(terminal, 100) == b"\r\nlogin: "  # raw: nothing added
        os.write(terminal, visit + b"\r")
        desk.until(lambda: desk.front.got.endswith(visit + b"\r"))  # noqa: B023 - called before the next visit
        os.close(terminal)
        desk.until(lambda: desk.front.peers == [False])
        desk.front.peers.clear()


def test_a_reader_of_a_pty_that_stalls_holds_output_and_one_that_leaves_lets_it_go(desk: Desk) -> None:
    pty = desk.start(PtyBackend(desk.reports.append))
    terminal = attach(pty)
    desk.loop.poll()
    data = b"x" * 1_000_000
    assert pty.write(data) < len(data)
    assert desk.front.ready == 0
    os.close(terminal)
    desk.until(lambda: desk.front.ready > 0)
    assert pty.write(data) == len(data)


# Sockets


@pytest.fixture
def server(desk: Desk, tmp_path: Path) -> SocketListener:
    return desk.start(listen_unix(str(tmp_path / "console"), desk.reports.append))


def connect(desk: Desk, server: SocketListener) -> socket.socket:
    address = server.address
    peer = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    desk.undo.append(peer.close)
    peer.connect(address)  # type: ignore[arg-type]
    peer.setblocking(False)
    desk.loop.poll()
    return peer


def test_a_peer_talks_and_leaves_and_the_next_one_talks(desk: Desk, server: SocketListener) -> None:
    assert server.write(b"nobody sees this") == 16
    for word in (b"one", b"two"):
        peer = connect(desk, server)
        peer.send(word)
        desk.loop.poll()
        assert desk.front.got.endswith(word)
        assert server.write(b"answer") == 6
        assert peer.recv(100) == b"answer"
        peer.close()
        desk.loop.poll()
    assert desk.front.peers == [True, False, True, False]


def test_a_second_peer_waits_for_the_first_to_leave(desk: Desk, server: SocketListener) -> None:
    first, second = connect(desk, server), connect(desk, server)
    second.send(b"me too")
    desk.loop.poll()
    assert desk.front.got == b""
    first.close()
    desk.loop.poll()
    assert desk.front.got == b"me too"


def test_a_peer_that_resets_the_connection_is_a_peer_that_left(desk: Desk) -> None:
    server = desk.start(listen_tcp("127.0.0.1", 0, desk.reports.append))
    peer = connect(desk, server)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    desk.loop.poll()
    assert desk.front.peers == [True, False]
    connect(desk, server).send(b"again")
    desk.loop.poll()
    assert desk.front.got == b"again"


def test_a_peer_that_leaves_while_the_guest_does_not_read_is_noticed_when_it_does(desk: Desk, server: SocketListener) -> None:
    desk.front.room = 2
    peer = connect(desk, server)
    peer.send(b"abcd")
    peer.close()
    desk.loop.poll()  # and does not spin on the hang-up
    assert (bytes(desk.front.got), desk.front.peers) == (b"ab", [True])
    desk.front.room = 10
    server.input_wanted()
    desk.loop.poll()
    assert (bytes(desk.front.got), desk.front.peers) == (b"abcd", [True, False])


def test_what_a_peer_sent_before_it_left_is_read_even_after_output_to_it_failed(desk: Desk, server: SocketListener) -> None:
    desk.front.room = 2
    peer = connect(desk, server)
    peer.send(b"abcd")
    peer.close()
    desk.loop.poll()
    assert server.write(b"too late") == 8
    desk.loop.poll()
    assert desk.front.got == b"ab"
    desk.front.room = 10
    server.input_wanted()
    desk.loop.poll()
    assert (bytes(desk.front.got), desk.front.peers) == (b"abcd", [True, False])
    connect(desk, server)
    assert desk.front.peers == [True, False, True]


def test_a_peer_that_left_does_not_keep_the_next_one_out_while_the_guest_does_not_read(
    desk: Desk, server: SocketListener
) -> None:
    desk.front.room = 2
    peer = connect(desk, server)
    peer.send(b"abcd")
    peer.close()
    desk.loop.poll()
    server.write(b"too late")
    second = connect(desk, server)
    assert server.write(b"panic: halted") == 13
    assert second.recv(100) == b"panic: halted"
    assert desk.front.peers == [True, False, True]


def test_a_process_out_of_descriptors_tries_again_later(
    desk: Desk, server: SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept(self: socket.socket) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket.socket, "accept", accept)
    peer = connect(desk, server)
    assert desk.reports == [f"{server.name}: cannot accept: Too many open files"]
    monkeypatch.undo()
    peer.send(b"patience")
    desk.loop.poll()
    assert desk.front.got == b"patience"


def refuse_watches(desk: Desk, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Have the kernel take no more descriptors to watch, for a while."""
    add_fd, left = desk.loop.add_fd, [times]

    def add(fd: int, events: int, callback: Callable[[int], None]) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add_fd(fd, events, callback)

    monkeypatch.setattr(desk.loop, "add_fd", add)


def test_a_peer_that_cannot_be_watched_is_heard_later_and_the_next_one_as_well(
    desk: Desk, server: SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_watches(desk, monkeypatch, 2)
    first = connect(desk, server)
    first.send(b"one")
    desk.until(lambda: desk.front.got == b"one")
    first.close()
    desk.until(lambda: desk.front.peers == [True, False])
    connect(desk, server).send(b"two")
    desk.until(lambda: desk.front.got == b"onetwo")


def test_a_door_that_cannot_be_watched_is_tried_again_later(
    desk: Desk, server: SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = connect(desk, server)
    first.close()
    refuse_watches(desk, monkeypatch, 1)
    desk.loop.poll()
    assert desk.reports == [f"{server.name}: cannot listen: No space left on device"]
    connect(desk, server).send(b"heard")
    desk.until(lambda: desk.front.got == b"heard")


def test_a_stalled_peer_holds_output_until_it_reads(desk: Desk, server: SocketListener) -> None:
    peer = connect(desk, server)
    data = b"x" * 10_000_000
    taken = server.write(data)
    assert taken < len(data)
    left = taken
    while left:
        left -= len(peer.recv(1 << 20))
    desk.loop.poll()
    assert desk.front.ready == 1


def test_output_that_waited_for_a_peer_goes_on_to_the_next_one_that_takes_its_place(desk: Desk, server: SocketListener) -> None:
    desk.front.room = 2
    stalled = connect(desk, server)
    stalled.send(b"abcd")  # half of which the guest does not read
    data = b"x" * 10_000_000
    assert server.write(data) < len(data)
    stalled.shutdown(socket.SHUT_WR)
    desk.loop.poll()
    assert desk.front.ready == 0
    second = connect(desk, server)
    assert desk.front.ready == 1
    assert server.write(b"hello") == 5
    assert second.recv(100) == b"hello"


def test_word_of_a_peer_that_is_gone_opens_no_door_behind_the_next_one(tmp_path: Path) -> None:
    failed: list[Exception] = []
    thread = IoThread("console", MonotonicClock(), lambda where, error: failed.append(error))
    front = Pausing(thread)
    server = listen_unix(str(tmp_path / "console"), lambda line: None)
    thread.start()
    server.start(thread, front)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second, socket.socket(socket.AF_UNIX) as third:
        first.connect(str(tmp_path / "console"))
        first.sendall(b"first")
        assert front.heard.acquire(timeout=GENEROUS)
        thread.quiesce()
        first.close()
        second.connect(str(tmp_path / "console"))
        server.write(b"to nobody")  # fails, which the loop hears of soon
        front.pauses = True
        thread.resume()
        assert front.paused.wait(GENEROUS)  # the loop has seen the first peer go, and nothing else
        thread.resume()
        second.sendall(b"here")
        assert front.heard.acquire(timeout=GENEROUS)
        third.connect(str(tmp_path / "console"))
        for _ in range(3):  # turns of the loop, of which each sees who knocks
            thread.run(lambda: None)
        assert front.peers == [True, False, True]
    server.close()
    thread.stop()
    assert failed == []


def test_a_unix_socket_is_the_users_alone_and_removed_at_the_end(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "console"
    server = listen_unix(str(path), desk.reports.append)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.close()
    server.close()
    assert not path.exists()


def test_a_dead_socket_is_replaced_and_any_other_file_is_not(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "console"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    desk.start(listen_unix(str(path), desk.reports.append))
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ChardevError, match="is there already and is not a socket"):
        listen_unix(str(tmp_path / "precious"), desk.reports.append)
    assert (tmp_path / "precious").read_text() == "data"


def test_a_socket_that_somebody_serves_is_not_taken_from_him(desk: Desk, server: SocketListener, tmp_path: Path) -> None:
    with pytest.raises(ChardevError, match=r"console is in use: somebody listens on it$"):
        listen_unix(str(tmp_path / "console"), desk.reports.append)
    desk.loop.poll()
    connect(desk, server).send(b"still served")
    desk.loop.poll()
    assert desk.front.got == b"still served"


def test_a_path_that_somebody_else_took_over_is_left_alone(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "console"
    server = listen_unix(str(path), desk.reports.append)
    path.unlink()
    path.write_text("someone else's")
    server.close()
    assert path.exists()


def test_what_cannot_be_listened_on_is_named(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(ChardevError, match=r"^cannot listen on .*: AF_UNIX path too long$"):
        listen_unix(str(tmp_path / ("x" * 120)), desk.reports.append)
    with pytest.raises(ChardevError, match=r"^cannot listen on 192.0.2.1:1: Cannot assign requested address$"):
        listen_tcp("192.0.2.1", 1, desk.reports.append)
    with pytest.raises(ChardevError, match=r"^cannot listen on 127.0.0.1:99999: "):
        listen_tcp("127.0.0.1", 99999, desk.reports.append)


def test_a_peer_that_leaves_before_the_guest_reads_makes_room_for_the_next(desk: Desk, server: SocketListener) -> None:
    """An agent's socket: one client after the other gives up while the guest has not opened its port yet."""
    desk.front.room = 0
    for _ in range(3):
        peer = connect(desk, server)
        peer.send(b"anyone?")
        desk.loop.poll()
        peer.close()
        desk.loop.poll()
    connect(desk, server).send(b"still here")
    desk.loop.poll()
    assert desk.front.peers == [True, False] * 3 + [True]
    desk.front.room = 100
    server.input_wanted()
    desk.loop.poll()
    assert desk.front.got == b"still here"


def test_output_from_another_thread_is_whole_while_peers_come_and_go(tmp_path: Path) -> None:
    failed: list[Exception] = []
    thread = IoThread("console", MonotonicClock(), lambda where, error: failed.append(error))
    thread.start()
    server = listen_unix(str(tmp_path / "console"), lambda line: None)
    server.start(thread, Frontend())
    line = b"0123456789abcdef\n"
    done = threading.Event()

    def guest() -> None:
        while not done.is_set():
            assert server.write(line) in range(len(line) + 1)

    writer = threading.Thread(target=guest)
    writer.start()
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "console"))
            assert line in peer.recv(4096, socket.MSG_WAITALL)
    done.set()
    writer.join()
    server.close()
    thread.stop()
    assert failed == []


# A start that waits for its client


def test_a_client_that_was_waited_for_is_the_first_peer(desk: Desk, tmp_path: Path) -> None:
    server = listen_unix(str(tmp_path / "console"), desk.reports.append)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "console"))
        assert server.wait(desk.pipe()[0])
        desk.start(server)
        assert server.write(b"welcome") == 7
        assert peer.recv(100) == b"welcome"
    desk.loop.poll()
    assert desk.front.peers == [True, False]
    connect(desk, server)
    assert desk.front.peers == [True, False, True]


def test_waiting_for_a_client_can_be_interrupted(desk: Desk, tmp_path: Path) -> None:
    server = listen_unix(str(tmp_path / "console"), desk.reports.append)
    reader, writer = desk.pipe()
    os.write(writer, b"signal")
    assert not server.wait(reader)
    server.close()
    assert not (tmp_path / "console").exists()


def test_a_client_that_was_waited_for_is_let_go_when_the_start_fails(desk: Desk, tmp_path: Path) -> None:
    server = listen_unix(str(tmp_path / "console"), desk.reports.append)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "console"))
        assert server.wait(desk.pipe()[0])
        server.close()
        assert peer.recv(100) == b""


# Sockets that this side connects


@pytest.fixture
def daemon(desk: Desk, tmp_path: Path) -> socket.socket:
    """Someone who listens, and is connected to."""
    listener = socket.socket(socket.AF_UNIX)
    desk.undo.append(listener.close)
    listener.bind(str(tmp_path / "daemon"))
    listener.listen()
    listener.setblocking(False)
    return listener


def accepted(desk: Desk, daemon: socket.socket) -> socket.socket:
    peer, _ = daemon.accept()
    desk.undo.append(peer.close)
    return peer


def test_a_client_connects_at_once_and_talks(desk: Desk, daemon: socket.socket, tmp_path: Path) -> None:
    client = desk.start(connect_unix(str(tmp_path / "daemon"), desk.reports.append))
    peer = accepted(desk, daemon)
    peer.send(b"question")
    desk.loop.poll()
    assert client.write(b"answer") == 6
    assert (bytes(desk.front.got), peer.recv(100)) == (b"question", b"answer")
    peer.close()
    desk.loop.poll()
    assert desk.front.peers == [True, False]
    assert desk.reports == [f"{tmp_path}/daemon: the peer has left"]
    assert client.write(b"nobody hears this") == 17


def test_a_client_without_reconnect_needs_its_peer_at_the_start(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(ChardevError, match=r"^cannot connect to .*/nobody: No such file or directory$"):
        connect_unix(str(tmp_path / "nobody"), desk.reports.append)
    with pytest.raises(ChardevError, match=r"^cannot connect to .*: AF_UNIX path too long$"):
        connect_unix("x" * 200, desk.reports.append)
    with socket.socket(socket.AF_INET) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ChardevError, match=rf"^cannot connect to 127.0.0.1:{port}: Connection refused$"):
            connect_tcp("127.0.0.1", port, desk.reports.append)


def test_a_client_with_reconnect_finds_its_peer_again_and_again(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "daemon"
    client = desk.start(connect_unix(str(path), desk.reports.append, reconnect=1))
    desk.loop.poll()
    assert desk.reports == [f"{path}: cannot connect: No such file or directory; trying again every 1 second"]
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.bind(str(path))
            daemon.listen()
            daemon.setblocking(False)
            desk.loop.poll()
            peer, _ = daemon.accept()
            assert client.write(b"hello again") == 11
            assert peer.recv(100) == b"hello again"
        path.unlink()
        peer.close()
        desk.loop.poll()
        assert desk.front.peers[-1] is False
        desk.loop.poll()
    assert desk.front.peers == [True, False] * 3
    assert len(desk.reports) == 4, "one report for each time that it is away"


def test_a_tcp_client_connects_in_the_background(desk: Desk) -> None:
    with socket.socket(socket.AF_INET6) as daemon:
        daemon.bind(("::1", 0))
        client = desk.start(connect_tcp("::1", daemon.getsockname()[1], desk.reports.append, reconnect=1))
        desk.until(lambda: bool(desk.reports))  # refused, by way of EINPROGRESS
        daemon.listen()
        desk.until(lambda: desk.front.peers == [True])
        peer, _ = daemon.accept()
        client.write(b"over TCP")
        assert peer.recv(100) == b"over TCP"
        client.close()
        assert peer.recv(100) == b""
        peer.close()


def test_a_client_that_cannot_watch_its_peer_tries_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET) as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.listen()
        refuse_watches(desk, monkeypatch, 1)
        client = desk.start(connect_tcp(*daemon.getsockname(), desk.reports.append, reconnect=1))
        desk.until(lambda: desk.front.peers == [True])
        assert len(desk.reports) == 1
        assert "cannot connect: No space left on device" in desk.reports[0]
        client.close()


def test_a_client_can_be_closed_while_it_looks_for_its_peer(desk: Desk, tmp_path: Path) -> None:
    client = desk.start(connect_unix(str(tmp_path / "nobody"), desk.reports.append, reconnect=5))
    client.close()
    client.close()
    desk.loop.poll()
    never_started = connect_tcp("127.0.0.1", 1, desk.reports.append, reconnect=5)
    never_started.close()
    assert len(desk.reports) == 1


# A serial port on a thread, from end to end


def test_many_bytes_go_through_a_serial_port_both_ways_and_whole() -> None:
    failed: list[Exception] = []
    thread = IoThread("console", MonotonicClock(), lambda where, error: failed.append(error))
    thread.start()
    (keyboard, typed), (shown, screen) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    uart = Serial(RecordedLine(4), thread, lambda line: None)
    uart.connect(StdioBackend(lambda line: None, keyboard, screen))
    data = os.urandom(10_000)
    received = bytearray()

    def type_it() -> None:
        with os.fdopen(typed, "wb") as file:
            file.write(data)

    def watch() -> None:
        with os.fdopen(shown, "rb") as file:
            while len(received) < len(data):
                received.extend(file.read1())

    people = [threading.Thread(target=type_it), threading.Thread(target=watch)]
    for person in people:
        person.start()
    echoed = 0
    while echoed < len(data):  # a guest that echoes what it reads, byte by byte
        status = uart.read(LSR, 1)
        if status & 0x21 == 0x21:
            uart.write(DATA, 1, uart.read(DATA, 1))
            echoed += 1
        else:
            os.sched_yield()
    for person in people:
        person.join()
    assert received == data
    uart.close()
    thread.stop()
    os.close(keyboard)
    os.close(screen)
    assert failed == []
