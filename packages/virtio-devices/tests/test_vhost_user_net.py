"""The network device with queues that another process serves: frames, pairs, and a back end that goes and comes back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from net_cable import MAC
from vhost_backend import ACK, EVENT_IDX, INDIRECT, INFLIGHT, MQ, PROTOCOL, VERSION_1, BackEnd
from vhost_guest import Guest, Make
from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import CLASS_MQ, F_CTRL_VQ, F_MQ, F_MRG_RXBUF, HEADER, OFFLOADS
from virtio_devices.vhost_user.net import VhostUserNetBackend
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory

OK = 0
NETWORK = {"protocol": MQ | ACK | INFLIGHT, "features": VERSION_1 | PROTOCOL | INDIRECT | EVENT_IDX | OFFLOADS | F_MRG_RXBUF}
MEM_TABLE, GET_INFLIGHT = 5, 31


def carry(index: int, readable: bytes, room: int) -> bytes | None:
    """Take what is sent; keep buffers for what may come."""
    return b"" if index & 1 else None


class Card(Guest):
    """A driver of a network card. `said` is what people are told."""

    device: NetDevice
    said: list[str]

    def up(self, size: int = 16) -> Card:
        self.start(size=size)
        return self

    def send(self, frame: bytes, pair: int = 0) -> None:
        """Send a frame, and wait until it is taken."""
        self.offer(bytes(HEADER), frame, queue=2 * pair + 1)
        self.kick(2 * pair + 1)
        self.collect(1, 2 * pair + 1)

    def command(self, kind: int, command: int, data: bytes) -> int:
        self.offer(bytes([kind, command]), data, 1, queue=len(self.rings) - 1)
        at = self._next - 16
        self.kick(len(self.rings) - 1)
        assert len(self.rings[-1].collect()) == 1
        return self.memory.read(at, 1)[0]

    @property
    def link(self) -> int:
        return self.config(6, 2)


MakeCard = Callable[..., Card]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 16)], share=True)
    yield memory
    memory.close()


@pytest.fixture
def network(back_end: Make) -> Make:
    return lambda **options: back_end(carry, **{**NETWORK, **options})


@pytest.fixture
def card(memory: GuestMemory, loop: DirectLoop, tmp_path: object) -> Iterator[MakeCard]:
    made: list[tuple[Card, VhostUserNetBackend]] = []

    def make(pairs: int = 1) -> Card:
        said: list[str] = []
        backend = VhostUserNetBackend("net0", f"{tmp_path}/vu", memory, pairs=pairs, retry=0.01, report=said.append)
        device = NetDevice("card", [loop], memory, mac=MAC, backend=backend, pairs=pairs, report=said.append)
        driver = Card(device, memory, loop)
        driver.said = said
        made.append((driver, backend))
        return driver

    yield make
    for driver, backend in made:
        driver.close()
        backend.close()
        backend.close()


def taken(server: BackEnd) -> list[bytes]:
    return [data[HEADER:] for data in server.served if data]


def test_what_is_offered_is_what_the_back_end_can(network: Make, card: MakeCard) -> None:
    network()
    wanted = OFFLOADS | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
    assert card().offered() & wanted == wanted


def test_a_back_end_that_can_little_is_offered_as_little(network: Make, card: MakeCard) -> None:
    network(features=VERSION_1 | PROTOCOL)
    assert not card().offered() & (OFFLOADS | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX)


def test_frames_go_out_and_come_in(network: Make, card: MakeCard) -> None:
    server = network()
    driver = card().up()
    driver.offer(2048, queue=0)
    driver.kick(0)
    driver.send(b"out")
    server.holds(1, 0)
    server.release(1)
    driver.collect(1, 0)
    assert taken(server) == [b"out"]


def test_pairs_are_handed_over_when_the_driver_uses_them(network: Make, card: MakeCard) -> None:
    server = network()
    driver = card(pairs=2).up()
    assert driver.device.negotiated & F_MQ
    driver.send(b"first")
    assert sorted(server.rings) == [0, 1]
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 2)) == OK
    driver.send(b"second", pair=1)
    assert all(server.rings[index].started for index in range(4))
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 1)) == OK
    assert [server.rings[index].started for index in range(4)] == [True, True, False, False]
    driver.send(b"third")
    assert taken(server) == [b"first", b"second", b"third"]


def test_more_pairs_than_the_back_end_has_are_refused(network: Make, card: MakeCard) -> None:
    network(queues=2)
    with pytest.raises(DeviceError, match=r"net0: the back end at .*vu has 2 pairs of queues, not 3"):
        card(pairs=3)


def test_the_control_queue_works_while_there_is_no_back_end(network: Make, card: MakeCard) -> None:
    server = network()
    driver = card().up()
    server.kill()
    assert driver.command(0, 0, b"\1") == OK  # promiscuous
    assert driver.negotiate(F_VERSION_1 | F_CTRL_VQ)


def test_frames_wait_for_a_back_end_that_comes_back_and_the_link_stays_up(network: Make, card: MakeCard) -> None:
    server = network()
    driver = card().up()
    for _ in range(3):
        driver.send(b"before")
    server.kill()
    driver.offer(bytes(HEADER), b"between", queue=1)
    driver.kick(1)
    assert driver.link & 1
    successor = network()
    driver.collect(1, 1)
    driver.send(b"after")
    assert taken(successor) == [b"between", b"after"]
    assert driver.link & 1
    assert driver.said == [
        f"net0: the back end at {server.path} has closed the connection; the guest waits",
        f"net0: the back end at {server.path} is back",
    ]


def test_buffers_that_a_back_end_had_are_its_successor_s(network: Make, card: MakeCard) -> None:
    server = network()
    driver = card().up()
    for _ in range(4):
        driver.offer(2048, queue=0)
    driver.kick(0)
    server.holds(4, 0)
    server.release(1)
    driver.collect(1, 0)
    server.kill()
    successor = network()
    successor.until(lambda: 0 in successor.rings and successor.rings[0].started)
    driver.send(b"x")
    driver.transport.pause()
    assert GET_INFLIGHT not in successor.names()


def test_a_back_end_that_answered_out_of_order_and_kept_no_record_costs_the_link_until_the_next_driver(
    network: Make, card: MakeCard
) -> None:
    server = network(protocol=MQ | ACK)
    driver = card().up()
    for _ in range(4):
        driver.offer(2048, queue=0)
    driver.kick(0)
    server.holds(4, 0)
    server.release(1, last=True)
    driver.collect(1, 0)
    server.kill()
    while driver.link & 1:
        driver.line.wait()
    successor = network(protocol=MQ | ACK)
    driver.transport.pause()
    driver.transport.resume()
    successor.until(lambda: successor.connections)
    driver.status = 0
    assert MEM_TABLE not in successor.names()
    driver.up()
    assert driver.link & 1
    driver.send(b"anew")
    assert taken(successor) == [b"anew"]


def test_while_paused_the_back_end_has_no_ring(network: Make, card: MakeCard) -> None:
    server = network()
    driver = card().up()
    for turn in range(1, 4):
        driver.send(b"x")
        driver.transport.pause()
        assert not any(ring.started for ring in server.rings.values())
        assert driver.transport.save().queues[1].next_avail == turn
        driver.transport.resume()
    driver.send(b"x")
    assert len(taken(server)) == 4


def test_a_back_end_is_taken_out_and_put_in_again_under_a_driver(network: Make, card: MakeCard) -> None:
    server = network()
    driver = card().up()
    driver.send(b"one")
    backend = driver.device.detach()
    assert not driver.link & 1
    assert not any(ring.started for ring in server.rings.values())
    driver.device.attach(backend)
    assert driver.link & 1
    driver.send(b"two")
    assert taken(server) == [b"one", b"two"]
    assert server.connections == 1
