"""What clients of an NBD export can make it hold: little each, a known amount together, and nobody at the cost of others."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.nbd import budget
from block_qcow2.nbd import protocol as p
from block_qcow2.nbd.connection import Connection

from .test_nbd import receive

MiB = 1 << 20
SIZE = 32 * MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create_image(path, SIZE)
    with open_image(path, read_only=False) as made:
        made.write(0, b"x" * SIZE)
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[tuple[int, str]]:
    """The id of a server of `image`, and its socket. It ends when it is told to, whatever its clients do."""
    where = str(tmp_path / "s")
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", where, str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid, where
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def begin(client: socket.socket) -> None:
    """The shortest handshake there is."""
    client.settimeout(60)
    client.sendall(struct.pack(">IQII", 3, p.IHAVEOPT, p.OPT_EXPORT_NAME, 0))
    receive(client, 18 + 10)


def connected(where: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(where)
    begin(client)
    return client


def ask(client: socket.socket, length: int, kind: int = p.CMD_READ) -> None:
    client.sendall(p.REQUEST.pack(0x25609513, 0, kind, 7, 0, length))


def begun(client: socket.socket) -> bool:
    """Whether an answer comes."""
    return bool(client.recv(1, socket.MSG_PEEK))


def rss(pid: int) -> int:
    """Bytes of memory of its own that a process has."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss_Anon:")).split()[1]) << 10


def test_a_client_that_asks_for_much_and_reads_nothing_costs_a_batch_and_no_more(server: tuple[int, str]) -> None:
    """Many reads of all of the image, gigabytes, every one of which the page cache could answer at once."""
    pid, where = server
    with connected(where) as client:
        before = rss(pid)
        client.setblocking(False)
        with suppress(BlockingIOError):  # as many as it takes without reading
            for _ in range(3000):
                ask(client, SIZE // 2)
        client.settimeout(60)
        assert begun(client)
        for _ in range(20):
            client.recv(MiB, socket.MSG_WAITALL)
        assert rss(pid) - before < 128 * MiB


def test_clients_that_read_nothing_share_what_is_there_for_the_largest_requests(server: tuple[int, str]) -> None:
    pid, where = server
    with ExitStack() as stack:
        lazy = [stack.enter_context(connected(where)) for _ in range(14)]
        before = rss(pid)
        for client in lazy:
            ask(client, SIZE)
        with connected(where) as good:
            for _ in range(3):  # smaller ones wait for nobody
                ask(good, MiB)
                receive(good, 16 + MiB)
            assert rss(pid) - before < 128 * MiB
            ask(good, SIZE)
            for client in lazy:
                client.close()
            assert len(receive(good, 16 + SIZE)) == 16 + SIZE


def test_a_client_that_does_not_send_what_it_announced_costs_what_the_others_have_not(server: tuple[int, str]) -> None:
    pid, where = server
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(where)) for _ in range(14)]
        before = rss(pid)
        for client in slow:
            ask(client, SIZE, p.CMD_WRITE)
            client.settimeout(0.5)
            with suppress(TimeoutError):  # as much as the server takes, but for the last byte
                client.sendall(b"x" * (SIZE - 1))
        with connected(where) as good:
            good.sendall(p.REQUEST.pack(0x25609513, 0, p.CMD_WRITE, 7, 0, MiB) + b"y" * MiB)
            receive(good, 16)
            ask(good, MiB)
            assert receive(good, 16 + MiB)[16:] == b"y" * MiB
            assert rss(pid) - before < 128 * MiB


def test_who_holds_up_others_with_a_large_request_is_cut_off(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from block_qcow2.nbd.server import Export  # needs anyio, which is not there where these tests are left out

    monkeypatch.setattr(budget, "_TURN_SECONDS", 0)
    disk = open_disk(image, format="qcow2", read_only=True)
    export = Export(disk, {}, connections=16)
    threads = []
    with ExitStack() as stack:
        clients = []
        for _ in range(4):
            ours, theirs = socket.socketpair()
            threads.append(threading.Thread(target=Connection(theirs, export).run))
            threads[-1].start()
            clients.append(stack.enter_context(ours))
            begin(ours)
        *lazy, good = clients
        for client in lazy[:2]:
            ask(client, SIZE)
            assert begun(client)  # they have the two turns
        ask(good, SIZE)
        assert len(receive(good, 16 + SIZE)) == 16 + SIZE
        ends = [sum(map(len, iter(lambda c=client: c.recv(MiB), b""))) for client in lazy[:1]]  # type: ignore[misc]
        assert min(ends) < 16 + SIZE
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    disk.close()


def test_turns_come_in_the_order_in_which_they_are_asked_for() -> None:
    turns = budget.Budget(16)
    for _ in range(2):
        turns.take_turn(lambda: None)
    order: list[int] = []
    threads = []
    for i in range(4):
        asked = threading.Event()

        def wait(i: int = i, asked: threading.Event = asked) -> None:
            asked.set()
            turns.take_turn(lambda: None)
            order.append(i)
            turns.give_turn_back()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        asked.wait()
        while len(turns._waiting) <= i:
            pass
    turns.give_turn_back()
    for thread in threads:
        thread.join(60)
    assert order == [0, 1, 2, 3]


def test_who_gives_up_waiting_lets_the_next_one_through() -> None:
    turns = budget.Budget(16)
    for _ in range(2):
        turns.take_turn(lambda: None)

    def stopped() -> None:
        turns.give_turn_back()
        raise p.ProtocolError("cut off")

    with pytest.raises(p.ProtocolError):
        turns.take_turn(stopped)
    assert not turns.wanted()
    turns.take_turn(lambda: None)


@pytest.mark.parametrize("connections", [1, 2, 16, 100, 192])
def test_all_connections_together_stay_within_the_budget(connections: int) -> None:
    assert connections * budget.Budget(connections).part + 2 * p.MAX_PAYLOAD <= budget.TOTAL
