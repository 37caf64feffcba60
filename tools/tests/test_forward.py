"""A forwarded socket is the socket at the other end, for every client, however quickly they come and go."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.forward import Multiplexer


class Wall:
    """Both ends in one process: clients outside, an echo server's side of the connections inside."""

    def __init__(self, refuse: bool = False) -> None:
        self.selector = selectors.PollSelector()
        self.port = socket.socketpair()
        self.inside: list[socket.socket] = []
        self.clients: list[socket.socket] = []
        self.ready = False
        self.refuse = refuse
        self.outer = Multiplexer(self.selector, self.port[0].fileno(), ready=self.set_ready)
        self.inner = Multiplexer(self.selector, self.port[1].fileno(), opened=self.accept)

    def set_ready(self) -> None:
        self.ready = True

    def accept(self) -> socket.socket | None:
        if self.refuse:
            return None
        theirs, ours = socket.socketpair()
        self.inside.append(theirs)
        return ours

    def client(self) -> socket.socket:
        client, accepted = socket.socketpair()
        self.clients.append(client)
        self.outer.add(accepted)
        return client

    def settle(self) -> None:
        """Move everything that can be moved."""
        while events := self.selector.select(0):
            for key, mask in events:
                key.data(mask)

    def close(self) -> None:
        self.outer.close()
        self.inner.close()
        for item in (*self.port, *self.inside, *self.clients, self.selector):
            item.close()


@pytest.fixture
def wall() -> Iterator[Wall]:
    wall = Wall()
    yield wall
    wall.close()


def test_the_end_in_the_lab_tells_when_connections_can_be_made(wall: Wall) -> None:
    wall.inner.announce()
    wall.settle()
    assert wall.ready


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.binary(min_size=1, max_size=3000)), max_size=30))
def test_every_byte_arrives_in_order_on_its_own_connection(messages: list[tuple[int, bool, bytes]]) -> None:
    wall = Wall()
    try:
        clients = [wall.client() for _ in range(3)]
        wall.settle()
        sent: dict[socket.socket, bytes] = {}
        for number, outwards, data in messages:
            source, target = (wall.inside[number], clients[number]) if outwards else (clients[number], wall.inside[number])
            source.sendall(data)
            sent[target] = sent.get(target, b"") + data
        wall.settle()
        for target, data in sent.items():
            assert target.recv(1 << 20, socket.MSG_DONTWAIT) == data
    finally:
        wall.close()


def test_a_client_that_leaves_and_the_next_one_have_connections_of_their_own(wall: Wall) -> None:
    first = wall.client()
    first.sendall(b"one")
    first.close()
    second = wall.client()
    wall.settle()
    assert len(wall.inside) == 2
    assert wall.inside[0].recv(10) == b"one"
    assert wall.inside[0].recv(10) == b""
    second.sendall(b"two")
    wall.settle()
    assert wall.inside[1].recv(10) == b"two"


def test_what_a_server_says_before_it_hangs_up_arrives(wall: Wall) -> None:
    client = wall.client()
    wall.settle()
    wall.inside[0].sendall(b"bye")
    wall.inside[0].close()
    wall.settle()
    assert client.recv(10) == b"bye"
    assert client.recv(10) == b""


def test_a_refused_connection_is_closed() -> None:
    wall = Wall(refuse=True)
    client = wall.client()
    wall.settle()
    assert client.recv(10) == b""
    wall.close()


def test_a_client_that_never_reads_is_dropped_and_the_others_go_on(wall: Wall) -> None:
    deaf, other = wall.client(), wall.client()
    wall.settle()
    wall.inside[0].setblocking(False)
    total = 0
    for _ in range(10_000):
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            total += wall.inside[0].send(bytes(4096))
        wall.settle()
        if total > 4_000_000:
            break
    wall.inside[1].sendall(b"still here")
    wall.settle()
    assert other.recv(100) == b"still here"
    assert total < 4_000_000  # not all of it was taken into memory
    assert deaf.fileno() >= 0


def test_every_connection_ends_with_the_port(wall: Wall) -> None:
    client = wall.client()
    wall.settle()
    wall.port[1].shutdown(socket.SHUT_RDWR)
    wall.settle()
    assert client.recv(10) == b""
