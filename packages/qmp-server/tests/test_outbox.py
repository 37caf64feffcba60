"""The outgoing bytes of one client: in order, bounded, and never waited for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from qmp_server.outbox import Outbox, Overflow


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_what_the_socket_takes_goes_out_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(pair[0], 100)
    outbox.put(b"hello")
    assert len(outbox) == 0
    assert pair[1].recv(100) == b"hello"


def test_what_it_does_not_take_goes_out_later_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(pair[0], 1 << 30)
    sent = bytearray()
    while not outbox:
        outbox.put(b"x" * 100_000)
        sent += b"x" * 100_000
    outbox.put(b"the end")
    sent += b"the end"
    pair[1].setblocking(False)
    got = bytearray()
    while len(got) < len(sent):
        got += pair[1].recv(1 << 20)
        outbox.flush()
    assert got == sent
    assert outbox.flush()


def test_a_client_that_does_not_read_costs_no_more_than_the_limit(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(pair[0], 5000)
    while not outbox:
        outbox.put(b"x" * 1000)
    for _ in range(4):
        outbox.put(b"x" * 1000)
    with pytest.raises(Overflow, match="more than 5000 bytes wait"):
        outbox.put(b"x" * 1001)
    assert len(outbox) <= 5000
    assert not outbox.flush()


def test_a_client_that_is_gone_is_an_oserror_and_no_signal(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        Outbox(pair[0], 100).put(b"x")
