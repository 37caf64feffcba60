"""The socket device on unix sockets: bytes arrive, in order and all of them; ends are passed on; nobody can make it hold more."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import socket
import stat
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.vsock import host, switch
from virtio_devices.vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
)
from virtio_devices.vsock.stream import BUF_ALLOC
from virtio_devices.vsock.switch import FIRST_HOST_PORT
from virtio_devices.vsock.user import UserVsockDevice
from virtio_driver import Driver, descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory
from vsock_guest import CID, EVENT, RX, TX, Guest

PORT, SERVICE = 1234, 80  # of the guest, of the host
Make = Callable[..., Guest]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "v")


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop, path: str) -> Iterator[Make]:
    before = descriptors(settle=True)
    made: list[Driver] = []

    def make(*, start: bool = True, without: int = F_EVENT_IDX, **options: Any) -> Guest:
        driver = Driver(UserVsockDevice("vsock0", loop, CID, path), memory, loop)
        made.append(driver)
        if not start:
            return driver  # type: ignore[return-value]
        return Guest(driver.start(without=without, size=64), **options)

    yield make
    for driver in made:
        driver.close()
        driver.close()
    assert not watched(loop)
    assert loop.next_deadline() is None
    assert descriptors() == before
    assert not Path(path).exists()


class Service:
    """Somebody on the host who listens at a port."""

    def __init__(self, path: str, port: int = SERVICE) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}_{port}")
        self.listener.listen(8)
        self.peers: list[socket.socket] = []

    def accept(self) -> socket.socket:
        self.listener.setblocking(False)
        peer, _ = self.listener.accept()
        peer.setblocking(False)
        self.peers.append(peer)
        return peer

    def close(self) -> None:
        for peer in (self.listener, *self.peers):
            peer.close()


@pytest.fixture
def service(path: str, make: Make) -> Iterator[Service]:
    service = Service(path)
    yield service
    service.close()


@pytest.fixture
def client(path: str, make: Make) -> Iterator[socket.socket]:
    """Somebody on the host who will connect to the guest."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        yield client


def connected(guest: Guest, service: Service, port: int = PORT) -> socket.socket:
    assert guest.connect(port, SERVICE).op == RESPONSE
    return service.accept()


def reached(guest: Guest, client: socket.socket, path: str, request: bytes = b"CONNECT 52\n") -> int:
    """Connect from the host to port 52; return the host's port."""
    client.connect(path)
    client.sendall(request)
    guest.driver.loop.poll()
    port, host_port = guest.accept()
    assert port == 52
    assert client.recv(100) == b"OK %d\n" % host_port
    return host_port


def device(guest: Guest) -> UserVsockDevice:
    assert isinstance(guest.driver.device, UserVsockDevice)
    return guest.driver.device


def ended(peer: socket.socket) -> bool:
    """Whether there is nothing to read any more, ever."""
    try:
        return not peer.recv(1)
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


# Connections


def test_the_guest_sees_its_context_id(make: Make) -> None:
    driver: Driver = make(start=False)  # type: ignore[assignment]
    assert driver.read(0x008) == 19
    assert driver.config(0, 8) == CID
    assert driver.offered() == F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("without", [0, F_EVENT_IDX])
def test_a_guest_reaches_a_service_of_the_host(make: Make, service: Service, together: bool, without: int) -> None:
    guest = make(together=together, without=without)
    response = guest.connect(PORT, SERVICE)
    assert (response.op, response.src_port, response.dst_port, response.src_cid) == (RESPONSE, SERVICE, PORT, 2)
    assert (response.buf_alloc, response.fwd_cnt) == (BUF_ALLOC, 0)
    peer = service.accept()
    guest.send(RW, PORT, SERVICE, b"to the host")
    assert peer.recv(100) == b"to the host"
    peer.sendall(b"to the guest")
    guest.driver.loop.poll()
    (packet,) = guest.packets()
    assert (packet.op, packet.data, packet.fwd_cnt) == (RW, b"to the guest", 11)
    counted = {"connections": 1, "rx_packets": 2, "rx_bytes": 12, "tx_packets": 2, "tx_bytes": 11}
    assert guest.driver.device.counters() == counted


def test_a_port_that_nobody_serves_is_refused(make: Make, path: str) -> None:
    guest = make()
    assert guest.connect(PORT, 81).op == RST
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(f"{path}_81")
    stale.close()
    assert guest.connect(PORT, 81).op == RST
    assert device(guest).connections == 0


def test_the_host_reaches_a_service_of_the_guest(make: Make, client: socket.socket, path: str) -> None:
    guest = make()
    host_port = reached(guest, client, path)
    assert host_port >= FIRST_HOST_PORT
    client.sendall(b"question")
    guest.driver.loop.poll()
    assert guest.packets()[0].data == b"question"
    guest.send(RW, 52, host_port, b"answer")
    assert client.recv(100) == b"answer"


def test_what_a_client_sends_before_the_answer_is_the_guest_s(make: Make, client: socket.socket, path: str) -> None:
    guest = make()
    client.connect(path)
    for piece in (b"CON", b"NECT 5", b"2\nearly ", b"words"):
        client.sendall(piece)
        guest.driver.loop.call_soon(lambda: None)
        guest.driver.loop._turn(0)
        guest.driver.loop._turn(0)
    guest.driver.loop.poll()
    port, host_port = guest.accept()
    assert guest.read(port, host_port) == b"early words"
    assert client.recv(100).startswith(b"OK ")


def test_a_guest_that_refuses_hangs_up_the_client(make: Make, client: socket.socket, path: str) -> None:
    guest = make()
    client.connect(path)
    client.sendall(b"CONNECT 52\n")
    guest.driver.loop.poll()
    (request,) = guest.packets()
    guest.send(RST, request.dst_port, request.src_port)
    assert client.recv(100) == b""
    assert device(guest).connections == 0


def test_a_client_that_does_not_wait_takes_its_request_back(make: Make, client: socket.socket, path: str) -> None:
    guest = make()
    client.connect(path)
    client.sendall(b"CONNECT 52\n")
    guest.driver.loop.poll()
    client.close()
    guest.driver.loop.poll()
    assert guest.ops() == [REQUEST, RST]
    assert device(guest).connections == 0


def test_a_guest_that_takes_no_requests_hears_of_no_client_that_has_gone(make: Make, path: str) -> None:
    guest = make(buffers=0)
    for _ in range(5):
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(b"CONNECT 52\n")
                guest.driver.loop.poll()
        guest.driver.loop.poll()
    assert device(guest).connections == 0
    assert not device(guest)._switch.packets


@pytest.mark.parametrize(
    "line",
    [
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"connect 52\n",
        b"\n",
        b"CONNECT 52" + b" " * 20,
        b"CONNECT \xb2\n",
    ],
)
def test_a_client_that_asks_for_no_port_is_hung_up(make: Make, client: socket.socket, path: str, line: bytes) -> None:
    guest = make()
    client.connect(path)
    client.sendall(line)
    guest.driver.loop.poll()
    assert ended(client)
    assert guest.packets() == []


def test_a_client_that_says_nothing_is_hung_up_after_a_while(make: Make, client: socket.socket, path: str) -> None:
    guest = make()
    client.connect(path)
    guest.driver.loop.poll()
    assert not ended(client)
    guest.driver.loop.poll()  # host time passes
    assert ended(client)


def test_without_a_driver_a_client_is_hung_up(make: Make, client: socket.socket, path: str) -> None:
    driver: Driver = make(start=False)  # type: ignore[assignment]
    client.connect(path)
    client.sendall(b"CONNECT 52\n")
    driver.loop.poll()
    assert ended(client)


def test_connections_do_not_mix(make: Make, service: Service) -> None:
    guest = make()
    peers = {port: connected(guest, service, port) for port in range(PORT, PORT + 5)}
    for port in peers:
        guest.send(RW, port, SERVICE, b"from %d" % port, kick=False)
    guest.kick()
    for port, peer in peers.items():
        assert peer.recv(100) == b"from %d" % port
        peer.sendall(b"to %d" % port)
    guest.driver.loop.poll()
    assert sorted((packet.dst_port, packet.data) for packet in guest.packets()) == [(port, b"to %d" % port) for port in peers]


# Bytes


@pytest.mark.parametrize("together", [False, True])
def test_bulk_from_host_to_guest_arrives_whole(make: Make, service: Service, together: bool) -> None:
    guest = make(together=together, buf_alloc=20_000)
    peer = connected(guest, service)
    payload = random.Random(1).randbytes(1_000_000)
    sent, got = 0, b""
    while len(got) < len(payload):
        with contextlib.suppress(BlockingIOError):
            sent += peer.send(payload[sent : sent + 50_000])
        guest.driver.loop.poll()
        before = len(got)
        for packet in guest.packets():
            got += packet.data
        assert len(got) - before <= 20_000, "no more than there is room for"
        guest.send(CREDIT_UPDATE, PORT, SERVICE)
    assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()


def test_bulk_from_guest_to_a_slow_host_arrives_whole_and_is_not_hoarded(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    chance = random.Random(2)
    payload = chance.randbytes(1_500_000)
    sent, credit_at, got = 0, 0, b""
    while len(got) < len(payload):
        while sent < len(payload) and sent - credit_at < BUF_ALLOC:
            size = min(chance.choice([1, 100, 4096, 30_000]), BUF_ALLOC - (sent - credit_at), len(payload) - sent)
            guest.send(RW, PORT, SERVICE, payload[sent : sent + size], kick=chance.random() < 0.3)
            sent += size
            guest.driver.loop.poll()
        guest.kick()
        held = next(iter(device(guest)._switch._connections.values())).backlog_size
        assert held <= BUF_ALLOC
        with contextlib.suppress(BlockingIOError):
            got += peer.recv(chance.choice([1, 1000, 100_000]))
        guest.driver.loop.poll()
        for packet in guest.packets():
            assert packet.op == CREDIT_UPDATE
            credit_at = packet.fwd_cnt
        if sent - credit_at >= BUF_ALLOC:
            guest.send(CREDIT_REQUEST, PORT, SERVICE)
            credit_at = guest.packets()[-1].fwd_cnt
    assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()


def test_a_guest_without_buffers_stops_the_host_and_goes_on_with_them(make: Make, service: Service) -> None:
    guest = make(buffers=4)
    peer = connected(guest, service)
    guest.hold = True
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += peer.send(b"x" * 10_000)
            guest.driver.loop.poll()
    taken = sum(packet.length for packet in guest.packets())
    assert 0 < taken <= 4 * 4096
    assert guest.packets() == []
    guest.hold = False
    guest.driver.rings[RX]._free = 0
    for at in range(4):
        guest._offer(0x4_0000 + at * 5000)
    guest.kick(RX)
    assert taken + len(guest.read(PORT, SERVICE)) == sent


def test_a_guest_without_credit_is_asked_once_and_gets_no_more(make: Make, service: Service) -> None:
    guest = make(buf_alloc=1000)
    peer = connected(guest, service)
    peer.sendall(b"x" * 3000)
    guest.driver.loop.poll()
    packets = guest.packets()
    assert sum(packet.length for packet in packets) == 1000
    guest.driver.loop.poll()
    assert [packet.op for packet in packets + guest.packets() if packet.op != RW] == [CREDIT_REQUEST]
    guest.send(CREDIT_UPDATE, PORT, SERVICE)
    assert sum(packet.length for packet in guest.packets()) == 1000
    guest.send(RW, PORT, SERVICE, b"any packet tells of credit")
    assert sum(packet.length for packet in guest.packets()) == 1000


def test_a_guest_that_asks_for_credit_hears_of_it(make: Make, service: Service) -> None:
    guest = make()
    connected(guest, service)
    guest.send(RW, PORT, SERVICE, b"x" * 10)
    guest.send(CREDIT_REQUEST, PORT, SERVICE)
    (packet,) = guest.packets()
    assert (packet.op, packet.fwd_cnt, packet.buf_alloc) == (CREDIT_UPDATE, 10, BUF_ALLOC)


def test_a_guest_that_sends_more_than_it_may_is_cut_off(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    for _ in range(30):
        guest.send(RW, PORT, SERVICE, b"y" * 30_000)
    assert RST in guest.ops()
    assert device(guest).connections == 0
    while peer.recv(100_000):
        pass


def test_bytes_that_come_one_by_one_are_kept_in_few_pieces(make: Make, service: Service) -> None:
    """Each in an object of its own would cost a thousand times what the guest is told that it may have under way."""
    guest = make()
    peers = [connected(guest, service, port) for port in (PORT, PORT + 1)]
    filled = [0, 0]
    kept = list(device(guest)._switch._connections.values())
    while not all(connection.backlog for connection in kept):
        for at in range(2):
            guest.send(RW, PORT + at, SERVICE, bytes(4096))
            filled[at] += 4096
    said = bytes(range(256)) * 20
    for byte in said:
        for at in range(2):
            guest.send(RW, PORT + at, SERVICE, bytes([byte]))
    assert all(len(connection.backlog) <= 4 + connection.backlog_size // 4096 for connection in kept)
    for at, peer in enumerate(peers):
        heard = b""
        while len(heard) < filled[at] + len(said):
            heard += peer.recv(1 << 20)
            guest.driver.loop.poll()
        assert heard == bytes(filled[at]) + said


def test_many_talkers_share_the_buffers(make: Make, service: Service) -> None:
    guest = make(buffers=8)
    peers = {port: connected(guest, service, port) for port in range(PORT, PORT + 4)}
    for peer in peers.values():
        peer.sendall(b"x" * 100_000)
    guest.driver.loop.poll()
    order: list[int] = []
    while found := guest.packets():
        order += [packet.dst_port for packet in found]
    assert set(order[:40]) == set(peers), "of a hundred packets, nobody waits for the others' last"
    assert len(order) == 100


# Ends


def test_a_host_that_says_no_more_still_hears(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    peer.sendall(b"last words")
    peer.shutdown(socket.SHUT_WR)
    guest.driver.loop.poll()
    data, end = guest.packets()
    assert (data.data, end.op, end.flags) == (b"last words", SHUTDOWN, SHUTDOWN_SEND)
    guest.send(RW, PORT, SERVICE, b"still here")
    assert peer.recv(100) == b"still here"
    guest.send(SHUTDOWN, PORT, SERVICE, flags=SHUTDOWN_SEND)
    assert ended(peer)
    assert [(packet.op, packet.flags) for packet in guest.packets()] == [(SHUTDOWN, SHUTDOWN_BOTH)]
    guest.send(SHUTDOWN, PORT, SERVICE, flags=SHUTDOWN_BOTH)
    assert guest.ops() == [RST]
    assert device(guest).connections == 0


def test_a_guest_that_says_no_more_still_hears(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    guest.send(RW, PORT, SERVICE, b"last words")
    guest.send(SHUTDOWN, PORT, SERVICE, flags=SHUTDOWN_SEND)
    assert peer.recv(100) == b"last words"
    assert peer.recv(100) == b""
    peer.sendall(b"x" * 10_000)
    peer.close()
    guest.driver.loop.poll()
    packets = guest.packets()
    assert sum(packet.length for packet in packets) == 10_000
    assert (packets[-1].op, packets[-1].flags) == (SHUTDOWN, SHUTDOWN_BOTH)


def test_a_guest_that_closes_is_answered_and_the_host_gets_what_it_sent(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(10):
        guest.send(RW, PORT, SERVICE, b"z" * 30_000)
        if not device(guest)._switch._connections:
            pytest.fail("cut off")
        if device(guest)._switch._connections[SERVICE, PORT].backlog_size + 30_000 > BUF_ALLOC:
            break
    held = device(guest)._switch._connections[SERVICE, PORT].backlog_size
    assert held
    guest.send(SHUTDOWN, PORT, SERVICE, flags=SHUTDOWN_BOTH)
    assert guest.ops()[-1] == RST
    assert device(guest).connections == 1, "what the host has not read is kept"
    assert guest.connect(PORT, SERVICE).op == RESPONSE, "the guest's port is free"
    got = b""
    while True:
        guest.driver.loop.poll()
        with contextlib.suppress(BlockingIOError):
            if not (data := peer.recv(10_000)):
                break
            got += data
    assert set(got) == {ord("z")}
    assert len(got) % 30_000 == 0
    assert len(got) >= held
    assert guest.packets() == [], "the port's new connection hears nothing of the old one"
    assert device(guest).connections == 1


@pytest.mark.parametrize("unread", [b"", b"not read"])
def test_a_host_that_hangs_up_has_said_what_it_said(make: Make, service: Service, unread: bytes) -> None:
    guest = make(buf_alloc=2000)
    peer = connected(guest, service)
    if unread:
        guest.send(RW, PORT, SERVICE, unread)
    peer.sendall(b"x" * 5000)
    peer.close()
    guest.driver.loop.poll()
    assert guest.driver.loop.poll() < 3, "a socket that has hung up is not watched"
    packets = guest.packets()
    while packets[-1].op != SHUTDOWN or packets[-1].flags != SHUTDOWN_BOTH:
        guest.send(CREDIT_UPDATE, PORT, SERVICE)
        packets += guest.packets()
    assert sum(packet.length for packet in packets) == 5000
    assert device(guest).connections == 0
    guest.send(CREDIT_UPDATE, PORT, SERVICE)
    assert guest.packets() == [], "a guest that still reads is left in peace"
    guest.send(RST, PORT, SERVICE)
    guest.send(CREDIT_UPDATE, PORT, SERVICE)
    assert guest.ops() == [RST], "and then there is no such connection"


def test_a_guest_that_writes_to_a_host_that_hung_up_still_gets_what_it_said(make: Make, service: Service) -> None:
    guest = make(buf_alloc=2000)
    peer = connected(guest, service)
    peer.sendall(b"x" * 5000)
    guest.driver.loop.poll()
    peer.close()
    got = 0
    flags = 0
    for _ in range(10):
        guest.send(RW, PORT, SERVICE, b"nobody reads this")
        for packet in guest.packets():
            assert packet.op in (RW, SHUTDOWN, CREDIT_REQUEST)
            got += packet.length
            flags |= packet.flags
        if flags == SHUTDOWN_BOTH:
            break
    assert (got, flags) == (5000, SHUTDOWN_BOTH)


def test_a_guest_that_hears_no_more_stops_the_host(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    guest.send(SHUTDOWN, PORT, SERVICE, flags=SHUTDOWN_RECEIVE)
    with pytest.raises(BrokenPipeError):
        peer.send(b"x")
    guest.send(RW, PORT, SERVICE, b"but it talks")
    assert peer.recv(100) == b"but it talks"
    peer.close()
    guest.driver.loop.poll()
    assert [(packet.op, packet.flags) for packet in guest.packets()] == [(SHUTDOWN, SHUTDOWN_BOTH)]


def test_an_aborted_connection_is_gone_on_both_sides(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    guest.send(RW, PORT, SERVICE, b"before")
    guest.send(RST, PORT, SERVICE)
    assert peer.recv(100) == b"before"
    assert ended(peer)
    assert guest.packets() == []
    assert device(guest).connections == 0


# Rules of packets


def test_packets_of_no_connection_are_refused_and_refusals_are_not(make: Make) -> None:
    guest = make()
    for op in (RESPONSE, RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, 0, 77):
        guest.send(op, PORT, SERVICE)
        (packet,) = guest.packets()
        assert (packet.op, packet.src_port, packet.dst_port) == (RST, SERVICE, PORT)
    guest.send(RST, PORT, SERVICE)
    assert guest.packets() == []


def test_other_types_and_other_hosts_are_refused(make: Make, service: Service) -> None:
    guest = make()
    guest.send(REQUEST, PORT, SERVICE, kind=2)
    (packet,) = guest.packets()
    assert (packet.op, packet.type) == (RST, 2)
    guest.send(REQUEST, PORT, SERVICE, dst_cid=99)
    (packet,) = guest.packets()
    assert (packet.op, packet.src_cid) == (RST, 99)
    guest.send(RST, PORT, SERVICE, kind=2)
    guest.send(REQUEST, PORT, SERVICE, src_cid=CID + 1)
    assert guest.packets() == []


@pytest.mark.parametrize("op", [REQUEST, RESPONSE, 0, 99])
def test_what_makes_no_sense_on_a_connection_ends_it(make: Make, service: Service, op: int) -> None:
    guest = make()
    peer = connected(guest, service)
    guest.send(op, PORT, SERVICE)
    assert guest.ops() == [RST]
    assert ended(peer)


def test_data_before_the_answer_and_after_the_end_is_refused(
    make: Make, client: socket.socket, service: Service, path: str
) -> None:
    guest = make()
    client.connect(path)
    client.sendall(b"CONNECT 52\n")
    guest.driver.loop.poll()
    (request,) = guest.packets()
    guest.send(RW, 52, request.src_port, b"too early")
    assert guest.ops() == [RST]
    assert ended(client)
    connected(guest, service)
    guest.send(SHUTDOWN, PORT, SERVICE, flags=SHUTDOWN_SEND)
    guest.send(RW, PORT, SERVICE, b"too late")
    assert guest.ops() == [RST]


def test_a_header_that_is_cut_off_or_promises_more_than_there_is_breaks_the_device(make: Make) -> None:
    guest = make()
    guest.send(RW, PORT, SERVICE, b"12345", length=6)
    assert guest.driver.broken
    guest = Guest(guest.driver.restart())
    ring = guest.driver.rings[TX]
    ring.offer(ring.chain((0x8_0000, HEADER.size - 1, False)))
    guest.driver.kick(TX)
    assert guest.driver.broken
    guest = Guest(guest.driver.restart(), buffers=4)
    assert guest.connect(PORT, SERVICE).op == RST


def test_a_packet_in_any_pieces_is_the_same_packet(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    raw = HEADER.pack(CID, 2, PORT, SERVICE, 26, 1, RW, 0, 1 << 18, 0) + b"abcdefghijklmnopqrstuvwxyz"
    guest.driver.memory.write(0xC_0000, raw)
    for cuts in ([1], [43], [44], [45], [10, 20, 44, 50], [44, 69], [30, 60]):
        edges = [0, *cuts, len(raw)]
        ring = guest.driver.rings[TX]
        ring.offer(ring.chain(*[(0xC_0000 + a, b - a, False) for a, b in pairwise(edges)]))
        guest.kick()
        assert peer.recv(100) == b"abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("pieces", [[20, 24, 100], [43, 101], [44, 100], [45, 99], [10, 10, 10, 10, 10, 94]])
def test_a_receive_buffer_in_any_pieces_is_filled_in_order(make: Make, service: Service, pieces: list[int]) -> None:
    guest = make(buffers=1)
    peer = connected(guest, service)
    guest.hold = True
    guest.driver.rings[RX].collect()
    peer.sendall(b"a")
    guest.driver.loop.poll()
    guest.packets()
    peer.sendall(bytes(range(100)))
    ring = guest.driver.rings[RX]
    where = 0xD_0000
    ring.offer(ring.chain(*[(where + sum(pieces[:at]), size, True) for at, size in enumerate(pieces)]))
    guest.kick(RX)
    assert ring.collect()[0][1] == HEADER.size + 100
    assert guest.driver.memory.read(where + HEADER.size, 100) == bytes(range(100))
    assert HEADER.unpack(guest.driver.memory.read(where, HEADER.size))[4] == 100


@pytest.mark.parametrize("size", [43, 44])
def test_a_receive_buffer_without_room_breaks_the_device(make: Make, service: Service, size: int) -> None:
    guest = make(buffers=1)
    peer = connected(guest, service)
    guest.hold = True
    peer.sendall(b"a")
    guest.driver.loop.poll()
    guest.packets()
    peer.sendall(b"b")
    ring = guest.driver.rings[RX]
    ring.offer(ring.chain((0xD_0000, size, True)))
    guest.kick(RX)
    assert guest.driver.broken


def test_a_guest_that_takes_no_answers_is_not_listened_to_until_it_does(make: Make) -> None:
    guest = make(buffers=2)
    guest.hold = True
    for _ in range(20):
        for _ in range(30):
            guest.send(RW, PORT, SERVICE, kick=False)
        guest.driver.kick(TX)
        if guest.driver.rings[TX].used_idx != guest.driver.rings[TX].avail_idx:
            break
        guest.driver.rings[TX].collect()
    assert len(device(guest)._switch.packets) == 256
    answers = len(guest.packets())
    guest.hold = False
    guest.driver.rings[RX]._free = 0
    guest._offer(0x4_0000)
    guest.kick(RX)
    while found := guest.packets():
        answers += len(found)
    assert answers == guest.driver.rings[TX].avail_idx == guest.driver.rings[TX].used_idx


# Bounds and life


def test_connections_are_bounded(
    make: Make, service: Service, client: socket.socket, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "MAX_CONNECTIONS", 3)
    guest = make()
    for port in range(3):
        connected(guest, service, port)
    assert guest.connect(3, SERVICE).op == RST
    client.connect(path)
    client.sendall(b"CONNECT 52\n")
    guest.driver.loop.poll()
    assert ended(client)
    guest.send(SHUTDOWN, 0, SERVICE, flags=SHUTDOWN_BOTH)
    guest.packets()
    connected(guest, service, 3)


def test_clients_that_say_nothing_leave_room_for_the_others(make: Make, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_HANDSHAKES_MAX", 2)
    guest = make()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for each in silent:
        each.connect(path)
        each.setblocking(False)
    guest.driver.loop._turn(0)
    guest.driver.loop._turn(0)
    guest.driver.loop._turn(0)
    assert [ended(each) for each in silent] == [False] * 3
    silent[2].sendall(b"CONNECT 52\n")
    guest.driver.loop.poll()
    guest.driver.loop.poll()
    assert guest.ops() == [REQUEST]
    for each in silent:
        each.close()


def test_a_host_without_descriptors_is_told_of_and_accepts_later(
    memory: GuestMemory, loop: DirectLoop, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    driver = Driver(UserVsockDevice("vsock0", loop, CID, path, report=said.append), memory, loop)
    guest = Guest(driver.start(size=64))
    listener = device(guest)._switch._listener

    class Full:
        """A socket of a process that has no descriptor left."""

        def __init__(self, real: socket.socket) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def accept(self) -> None:
            raise OSError(24, os.strerror(24))

    real = listener._socket
    monkeypatch.setattr(listener, "_socket", Full(real))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b"CONNECT 52\n")
        loop._turn(0)
        assert len(said) == 1
        assert "Too many open files" in said[0]
        monkeypatch.setattr(listener, "_socket", real)
        loop.poll()
        assert guest.ops() == [REQUEST]
    driver.close()


def test_a_host_without_descriptors_refuses_a_connection_and_hears_the_guest_s_next_one(
    make: Make, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make(without=0)

    def full(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(host.socket, "socket", full)
        assert guest.connect(PORT, SERVICE).op == RST
    connected(guest, service)


def test_a_paused_device_moves_nothing_and_goes_on_where_it_was(
    make: Make, service: Service, client: socket.socket, path: str
) -> None:
    guest = make()
    peer = connected(guest, service)
    loop, transport = guest.driver.loop, guest.driver.transport
    transport.pause()
    assert not watched(loop)
    peer.sendall(b"waits")
    client.connect(path)
    client.sendall(b"CONNECT 52\n")
    guest.send(RW, PORT, SERVICE, b"waits too")
    loop.poll()
    assert guest.packets() == []
    with pytest.raises(BlockingIOError):
        peer.recv(1)
    saved = transport.save()
    assert saved.queues[TX].next_avail == saved.queues[TX].next_used == 1
    transport.resume()
    loop.poll()
    assert peer.recv(100) == b"waits too"
    assert sorted(packet.op for packet in guest.packets()) == [REQUEST, RW]


def test_a_restored_driver_is_told_that_its_connections_are_gone(make: Make, service: Service) -> None:
    guest = make()
    connected(guest, service)
    guest.driver.offer(8, queue=EVENT)
    guest.driver.kick(EVENT)
    assert guest.driver.rings[EVENT].collect() == []
    guest.driver.transport.pause()
    states = guest.driver.transport.save(), device(guest).save()
    guest.driver.close()
    driver: Driver = make(start=False)  # type: ignore[assignment]
    driver.transport.pause()
    driver.transport.restore(states[0])
    assert driver.device is not None
    driver.device.restore(states[1])
    assert (driver.transport.save(), driver.device.save()) == states
    driver.transport.resume()
    driver.loop.poll()
    assert guest.driver.rings[EVENT].collect() == [(0, 4)]


def test_a_driver_without_a_buffer_for_the_news_is_asked_for_a_kick(make: Make) -> None:
    guest = make(without=0)
    ring = guest.driver.rings[EVENT]
    guest.driver.offer(8, queue=EVENT)
    guest.driver.kick(EVENT)
    for owed in range(2):
        guest.driver.transport.pause()
        device(guest).restore(device(guest).save())
        guest.driver.transport.resume()
        guest.driver.loop.poll()
        assert len(ring.collect()) == 1 - owed
    assert ring.avail_event == 1
    guest.driver.offer(8, queue=EVENT)
    guest.driver.kick(EVENT)
    assert len(ring.collect()) == 1


def test_a_reset_hangs_up_on_everybody_and_a_new_driver_begins_anew(
    make: Make, service: Service, client: socket.socket, path: str
) -> None:
    guest = make()
    peer = connected(guest, service)
    reached(guest, client, path)
    guest.driver.status = 0
    assert ended(peer)
    assert ended(client)
    assert device(guest).connections == 0
    guest = Guest(guest.driver.restart(), buffers=4)
    connected(guest, service)


def test_a_queue_that_is_stopped_stops_connections(make: Make, service: Service) -> None:
    guest = make()
    peer = connected(guest, service)
    peer.sendall(b"x")
    guest.driver.write(0x030, RX)
    guest.driver.write(0x044, 0)
    guest.driver.loop.poll()
    guest.send(RW, PORT, SERVICE, b"still sent")
    assert peer.recv(100) == b"still sent"


def test_the_socket_is_private_replaced_when_stale_and_removed_at_the_end(make: Make, path: str, tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    driver: Driver = make(start=False)  # type: ignore[assignment]
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    loop = new_loop()
    before = descriptors(settle=True)
    with pytest.raises(DeviceError, match=r"vsock1: .* is in use: somebody listens on it"):
        UserVsockDevice("vsock1", loop, CID, path)
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match="is there already and is not a socket"):
        UserVsockDevice("vsock1", loop, CID, str(tmp_path / "file"))
    with pytest.raises(DeviceError, match="cannot listen on /nonexistent/v"):
        UserVsockDevice("vsock1", loop, CID, "/nonexistent/v")
    with pytest.raises(DeviceError, match="more than 96 bytes"):
        UserVsockDevice("vsock1", loop, CID, "/tmp/" + "v" * 92)
    with pytest.raises(ValueError, match="guest-cid 2 is not within"):
        UserVsockDevice("vsock1", loop, 2, path)
    assert descriptors() == before
    loop.close()
    driver.close()
    assert not Path(path).exists()


def test_a_path_that_is_another_s_by_now_stays(memory: GuestMemory, loop: DirectLoop, path: str) -> None:
    driver = Driver(UserVsockDevice("vsock0", loop, CID, path), memory, loop)
    Path(path).unlink()
    Path(path).touch()
    driver.close()
    assert Path(path).exists()
    Path(path).unlink()


# Hostile drivers, and hosts that come and go

_PIECE = st.tuples(st.integers(0x3F000, 0x42000), st.integers(0, 6000), st.booleans())
_STEP = st.one_of(
    st.tuples(
        st.just("packet"),
        st.sampled_from([REQUEST, RESPONSE, RST, SHUTDOWN, RW, RW, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 9]),
        st.tuples(st.integers(0, 3), st.integers(79, 81), st.integers(0, 3), st.integers(0, 20_000), st.integers(0, 1 << 32)),
    ),
    st.tuples(st.just("host"), st.sampled_from(["send", "read", "shut", "close", "accept", "call"]), st.integers(0, 5)),
    st.tuples(st.just("take"), st.integers(0, 1), st.just(None)),
    st.tuples(st.just("raw"), st.sampled_from([RX, TX, EVENT]), st.lists(_PIECE, min_size=1, max_size=4)),
    st.tuples(st.just("pause"), st.integers(0, 1), st.just(None)),
    st.tuples(st.just("junk"), st.integers(0x40000, 0x41000), st.binary(min_size=1, max_size=64)),
)  # fmt: skip


@given(st.lists(_STEP, max_size=25))
def test_whatever_both_sides_do_the_device_works_after_a_reset_and_leaves_nothing(steps: list[Any]) -> None:
    import tempfile

    before = descriptors(settle=True)
    memory, loop = GuestMemory([(0, 1 << 20)]), new_loop()
    with tempfile.TemporaryDirectory() as folder:
        service = Service(f"{folder}/v")
        driver = Driver(UserVsockDevice("v", loop, CID, f"{folder}/v"), memory, loop)
        guest = Guest(driver.start(size=64, without=0))
        for kind, what, how in steps:
            if kind == "packet":
                port, host_port, flags, length, buf_alloc = how
                guest.send(
                    what, port, host_port, b"d" * length if what == RW else b"", flags=flags, buf_alloc=buf_alloc & 0xFFFFFFFF
                )
            elif kind == "host":
                with contextlib.suppress(OSError, IndexError):
                    _host(service, f"{folder}/v", what, how)
            elif kind == "take":
                with contextlib.suppress(KeyError, AssertionError):  # a ring that was written over
                    guest.hold = bool(what)
                    guest.packets()
            elif kind == "raw":
                driver.rings[what].offer(driver.rings[what].chain(*how))
                driver.kick(what)
            elif kind == "pause":
                driver.transport.pause()
                assert not watched(loop)
                driver.transport.save()
                driver.transport.resume()
            else:
                memory.write(what, how)
            loop.poll()
            assert device(guest).connections <= switch.MAX_CONNECTIONS
        guest = Guest(driver.restart(), buffers=4)
        assert guest.connect(PORT, 9999).op == RST
        driver.close()
        service.close()
        assert not watched(loop)
        loop.close()
    memory.close()
    assert descriptors() == before


def _host(service: Service, path: str, what: str, number: int) -> None:
    if what == "accept":
        service.accept()
    elif what == "call":
        peer = socket.socket(socket.AF_UNIX)
        service.peers.append(peer)
        peer.setblocking(False)
        peer.connect(path)
        peer.sendall(b"CONNECT %d\n" % number)
    elif what == "send":
        service.peers[number].send(b"h" * 10_000 * (number + 1))
    elif what == "read":
        service.peers[number].recv(50_000)
    elif what == "shut":
        service.peers[number].shutdown(number % 3)
    else:
        service.peers[number].close()


def test_a_connection_that_cannot_be_watched_is_refused_and_the_next_one_works(
    make: Make, service: Service, client: socket.socket, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make()
    loop = guest.driver.loop
    connected(guest, service, 1000)

    def no_room(fd: int, events: int, callback: Callable[[int], None]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # epoll_ctl(2): max_user_watches

    with monkeypatch.context() as now:
        now.setattr(loop, "add_fd", no_room)
        guest.send(REQUEST, PORT, SERVICE)
        assert guest.ops()[-1] == RST
        assert ended(service.accept())
        guest.driver.transport.pause()
        with pytest.raises(OSError, match="No space left"):
            guest.driver.transport.resume()
    guest.driver.transport.resume()
    connected(guest, service, 2000)
    reached(guest, client, path)


@pytest.mark.parametrize("room", range(3, 6))
def test_a_door_that_cannot_be_watched_again_after_a_pause_opens_later(
    make: Make, service: Service, client: socket.socket, path: str, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    guest = make()
    loop = guest.driver.loop
    connected(guest, service, 1000)
    client.connect(path)
    loop.poll()
    guest.driver.transport.pause()
    add_fd, left = loop.add_fd, [room]  # of which the kicks of the queues need three

    def little_room(fd: int, events: int, callback: Callable[[int], None]) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # epoll_ctl(2): max_user_watches
        add_fd(fd, events, callback)

    monkeypatch.setattr(loop, "add_fd", little_room)
    guest.driver.transport.resume()
    for _ in range(3):
        loop.poll()
    guest.ops()
    connected(guest, service, 2000)
    with socket.socket(socket.AF_UNIX) as late:
        reached(guest, late, path)
    guest.driver.transport.reset()
