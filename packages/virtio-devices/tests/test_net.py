"""The network device: frames both ways, the control queue, many queues, and networks that come and go."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net_cable import BROADCAST, MAC, OTHER, Cable, Net, frame
from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.mmio import CONFIG_CHANGE
from virtio_devices.mmio_registers import SIZE
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import (
    CLASS_ANNOUNCE,
    CLASS_GUEST_OFFLOADS,
    CLASS_MAC,
    CLASS_MQ,
    CLASS_RX,
    CLASS_VLAN,
    CONTROL,
    F_CSUM,
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_VLAN,
    F_CTRL_VQ,
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_MAC,
    F_MQ,
    F_MRG_RXBUF,
    F_STATUS,
    GUEST_OFFLOADS,
    HEADER,
    MAC_ADDR_SET,
    MAC_TABLE_SET,
    OFFLOADS,
    RX_ALLMULTI,
    RX_ALLUNI,
    RX_NOBCAST,
    RX_NOMULTI,
    RX_NOUNI,
    RX_PROMISC,
    VLAN_ADD,
    VLAN_DEL,
)
from virtio_devices.net.filter import RxFilter
from virtio_devices.net.state import NetState
from virtio_driver import DATA, descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import WRITE
from vmm_core.state import decode, encode

OK, ERR = 0, 1
LINK_UP, ANNOUNCE = 1, 2
Make = Callable[..., Net]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def cables() -> Iterator[list[Cable]]:
    cables: list[Cable] = []
    yield cables
    for cable in cables:
        cable.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop, cables: list[Cable]) -> Iterator[Make]:
    made: list[Net] = []

    def make(cable: Cable | None = None, *, pairs: int = 1, **options: object) -> Net:
        if cable:
            cables.append(cable)
        reports: list[str] = []
        device = NetDevice("net0", [loop], memory, mac=MAC, backend=cable, pairs=pairs, report=reports.append, **options)  # type: ignore[arg-type]
        made.append(Net(device, memory, loop))
        made[-1].said = reports  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for driver in made:
        driver.close()
        driver.close()
    assert not watched(loop)


# What is offered


def test_a_device_with_every_offload_offers_what_a_driver_may_leave_to_the_host(make: Make) -> None:
    driver = make(Cable())
    expected = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | OFFLOADS | CONTROL | F_MAC | F_STATUS | F_MRG_RXBUF
    assert driver.offered() == expected | F_CTRL_GUEST_OFFLOADS
    assert driver.config(0, 4).to_bytes(4, "little") + driver.config(4, 2).to_bytes(2, "little") == MAC
    assert (driver.link, driver.config(8, 2)) == (LINK_UP, 0)


def test_many_pairs_show_in_features_and_configuration(make: Make) -> None:
    driver = make(Cable(4), pairs=4)
    assert driver.offered() & F_MQ
    assert driver.config(8, 2) == 4
    assert len(driver.device.queue_sizes) == 9


def test_a_network_without_offloads_offers_none(make: Make) -> None:
    assert not make(Cable(features=0)).offered() & (OFFLOADS | F_CTRL_GUEST_OFFLOADS)


def test_what_a_back_end_has_without_what_it_needs_is_not_offered(make: Make) -> None:
    """DPDK's without TSO has ECN for it; a driver that takes all that is offered must be welcome."""
    ecn, ufo = 1 << 13, 1 << 14
    driver = make(Cable(features=F_CSUM | ecn | ufo | F_GUEST_TSO4))
    assert driver.offered() & OFFLOADS == F_CSUM | ufo
    assert driver.negotiate(driver.offered())


@pytest.mark.parametrize("features", [F_GUEST_TSO4, 1 << 13 | F_CSUM, F_MQ, F_CTRL_VLAN])
def test_a_feature_without_the_one_it_needs_is_refused(make: Make, features: int) -> None:
    driver = make(Cable(2), pairs=2)
    assert not driver.negotiate(F_VERSION_1 | features)


@pytest.mark.parametrize(
    ("options", "complaint"), [({"pairs": 0}, "1 to 16"), ({"pairs": 17}, "1 to 16"), ({"queue_size": 128}, "256")]
)
def test_numbers_that_cannot_be_are_refused(make: Make, options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(**options)


@pytest.mark.parametrize("mac", [b"\1" + bytes(5), bytes(6), b"short"])
def test_a_mac_that_is_no_device_s_is_refused(memory: GuestMemory, loop: DirectLoop, mac: bytes) -> None:
    with pytest.raises(DeviceError, match="no address"):
        NetDevice("net0", [loop], memory, mac=mac)


# Frames out


def test_a_frame_is_sent_with_its_header_untouched(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    header = bytes(range(HEADER))
    driver.request(header, frame(1000), queue=1)
    assert cable.received() == [header + frame(1000)]
    assert driver.device.statistics().tx_bytes == 1000


def test_a_scattered_frame_is_sent_in_one_piece(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.request(bytes(4), bytes(8) + frame(64)[:20], frame(64)[20:], queue=1)
    assert cable.received() == [bytes(HEADER) + frame(64)]


def test_frames_wait_in_the_ring_while_the_network_takes_none_and_none_is_lost(make: Make) -> None:
    cable = Cable()
    cable.near[0].setsockopt(1, 7, 4096)  # SO_SNDBUF: a few frames
    driver = make(cable).up(size=64)
    frames = [frame(60, fill=number) for number in range(30)]
    sent = driver.say(*frames)
    assert len(sent) < 30, "the socket takes fewer"
    got = cable.received()
    for _ in range(30):
        driver.loop.poll()
        got += cable.received()
    assert got == [bytes(HEADER) + one for one in frames]
    assert len(sent) + len(driver.rings[1].collect()) == 30


def test_a_frame_that_the_network_refuses_is_lost_and_no_other(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    cable.near[0].setsockopt(1, 7, 4096)  # SO_SNDBUF
    for data in (frame(60), frame(60_000), frame(61)):
        driver.offer(bytes(HEADER), data, queue=1)
    driver.kick(1)
    assert [len(one) for one in cable.received()] == [72, 73]
    assert driver.device.statistics()[4:] == (2, 121, 1)
    assert not driver.broken


@pytest.mark.parametrize("parts", [(16,), (bytes(12), frame(), 16)])
def test_a_chain_to_send_that_is_writable_breaks_the_device(make: Make, parts: tuple[bytes | int, ...]) -> None:
    driver = make(Cable()).up()
    driver.offer(*parts, queue=1)
    driver.kick(1)
    assert driver.broken
    driver.restart()
    assert not driver.broken


# Frames in


@pytest.mark.parametrize("mergeable", [True, False])
def test_frames_arrive_in_order_each_in_its_buffer(make: Make, mergeable: bool) -> None:
    cable = Cable()
    driver = make(cable).up(mergeable=mergeable)
    driver.room(*[1600] * 8)
    frames = [frame(60 + 100 * number, fill=number) for number in range(8)]
    for one in frames:
        cable.send(one)
    driver.loop.poll()
    assert driver.heard() == frames
    assert driver.device.statistics()[:2] == (8, sum(map(len, frames)))


def test_the_header_reaches_the_driver_with_the_number_of_buffers(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    laid = driver.offer(4, 7, 1600)
    driver.kick()
    cable.send(frame(), header=b"\1\2" + bytes(10))
    driver.loop.poll()
    assert driver.written(laid)[:HEADER] == b"\1\2" + bytes(8) + b"\1\0"


def test_a_large_frame_lies_in_as_many_buffers_as_it_needs(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    frames = [frame(size, fill=number) for number, size in enumerate((9000, 60, 20_000, 60, 1600, 14))]
    for one in frames:
        driver.room(*[2048] * 11)
        cable.send(one)
        driver.loop.poll()
        assert driver.heard() == [one]
        driver.status = 0
        driver._next = DATA
        driver.up()


def test_a_frame_without_enough_buffers_waits_for_more(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up(size=16)
    driver.room(2048)
    cable.send(frame(9000))
    cable.send(frame(60))
    driver.loop.poll()
    assert driver.heard() == []
    driver.room(2048, 2048)
    assert driver.heard() == []
    driver.room(2048, 2048, 2048)
    assert driver.heard() == [frame(9000), frame(60)]


def test_a_frame_that_no_ring_of_the_driver_can_hold_is_dropped_and_the_next_ones_arrive(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up(size=8)
    driver.room(*[1600] * 8)
    cable.send(frame(60_000))
    cable.send(frame(60))
    driver.loop.poll()
    assert driver.heard() == [frame(60)]
    assert driver.device.counters()["rx_dropped"] == driver.device.statistics().rx_dropped == 1


def test_without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped_whole(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up(mergeable=False)
    driver.room(1600, 1600)
    cable.send(frame(9000))
    cable.send(frame(60))
    driver.loop.poll()
    assert driver.heard() == [frame(60)]


def test_what_is_no_frame_is_dropped(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.room(1600)
    cable.ends[0].send(b"x" * 25)
    cable.send(frame())
    driver.loop.poll()
    assert driver.heard() == [frame()]


@pytest.mark.parametrize("event_idx", [True, False])
def test_without_buffers_frames_wait_and_nothing_spins(make: Make, event_idx: bool) -> None:
    cable = Cable()
    driver = make(cable).up(without=0 if event_idx else F_EVENT_IDX)
    for number in range(5):
        cable.send(frame(60 + number))
    assert driver.loop.poll() <= 2, "there is nothing to do"
    assert not driver.rings[0].kicks_unwanted
    assert driver.rings[0].avail_event == 0
    driver.room(1600, 1600)
    assert driver.heard() == [frame(60), frame(61)]
    assert driver.loop.poll() == 0
    driver.room(1600, 1600, 1600)
    assert driver.heard() == [frame(62), frame(63), frame(64)]


def test_while_there_are_buffers_the_driver_need_not_kick(make: Make) -> None:
    driver = make(Cable()).up()
    driver.room(1600)
    assert driver.rings[0].kicks_unwanted


def test_buffers_that_may_be_merged_need_not_hold_more_than_a_header(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.room(12, 13, 20, 64, 12, 1600)
    cable.send(frame(60))
    cable.send(frame(61))
    driver.loop.poll()
    assert driver.heard() == [frame(60), frame(61)]


@pytest.mark.parametrize(("parts", "mergeable"), [((b"x" * 64,), True), ((11,), True), ((25,), False), ((b"x" * 16, 2048), True)])
def test_a_receive_buffer_that_is_none_breaks_the_device_and_a_reset_mends_it(
    make: Make, parts: tuple[bytes | int, ...], mergeable: bool
) -> None:
    cable = Cable()
    driver = make(cable).up(mergeable=mergeable)
    driver.offer(*parts)
    cable.send(frame())
    driver.kick()
    assert driver.broken
    assert driver.loop.poll() <= 1
    driver.restart()
    driver.room(1600)
    assert driver.heard() == [frame()]


def test_a_burst_is_one_interrupt(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.room(*[1600] * 8)
    edges = driver.line.edges
    for _ in range(8):
        cable.send(frame())
    driver.loop.poll()
    assert driver.line.edges == edges + 1


# Life


def test_buffers_in_hand_are_back_in_the_ring_when_the_device_rests(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.room(*[2048] * 5)
    cable.send(frame(9000))
    driver.loop.poll()
    assert driver.heard() == [frame(9000)]
    driver.restart()
    driver.room(*[2048] * 6)
    driver.transport.pause()
    saved = driver.transport.save()
    assert [(queue.next_avail, queue.next_used) for queue in saved.queues] == [(0, 0)] * 3
    cable.send(frame(9000))
    driver.loop.poll()
    assert driver.heard() == []
    driver.transport.resume()
    driver.loop.poll()
    assert driver.heard() == [frame(9000)]


def test_after_a_reset_nothing_is_received(make: Make, memory: GuestMemory) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.room(*[1600] * 4)
    driver.status = 0
    before = memory.read(DATA, 0x4000)
    cable.send(frame())
    driver.loop.poll()
    assert memory.read(DATA, 0x4000) == before


def test_one_queue_is_stopped_and_the_other_goes_on(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.room(1600, 1600)
    driver.write(0x030, 1)
    driver.write(0x044, 0)
    driver.loop.poll()
    cable.send(frame())
    driver.loop.poll()
    assert driver.heard() == [frame()]
    driver.write(0x030, 0)
    driver.write(0x044, 0)
    cable.send(frame())
    assert driver.loop.poll() <= 2


def test_queues_that_the_driver_leaves_alone_do_no_harm(make: Make) -> None:
    cable = Cable()
    driver = make(cable)
    assert driver.negotiate()
    driver.enable(1)
    driver.status |= 4
    cable.send(frame())
    assert driver.loop.poll() <= 2


@pytest.mark.parametrize("transport_first", [True, False])
def test_a_saved_device_goes_on_elsewhere_and_asks_for_an_announcement(make: Make, transport_first: bool) -> None:
    cable = Cable(2)
    driver = make(cable, pairs=2).up(size=16)
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 2)) == OK
    assert driver.command(CLASS_RX, RX_PROMISC, b"\0") == OK
    assert driver.command(CLASS_MAC, MAC_ADDR_SET, OTHER) == OK
    assert driver.command(CLASS_MAC, MAC_TABLE_SET, struct.pack("<I", 1) + MAC, struct.pack("<I", 65) + bytes(390)) == OK
    assert driver.command(CLASS_VLAN, VLAN_ADD, struct.pack("<H", 7)) == OK
    assert driver.command(CLASS_GUEST_OFFLOADS, 0, struct.pack("<Q", F_GUEST_CSUM)) == OK
    driver.transport.pause()
    registers, state = driver.transport.save(), driver.device.save()
    assert decode(encode(state), NetState, "net0") == state
    other = Cable(2)
    heir = make(other, pairs=2)
    heir.rings = driver.rings
    parts = [(heir.transport, registers), (heir.device, state)]
    for part, saved in parts if transport_first else reversed(parts):
        part.restore(saved)
    assert (heir.transport.save(), heir.device.save()) == (registers, state)
    assert other.counts[-1] == 2
    assert other.offloads[-1] == F_GUEST_CSUM
    assert heir.device.mac == OTHER
    heir.transport.resume()
    heir.loop.poll()
    assert heir.link == LINK_UP | ANNOUNCE
    assert heir.command(CLASS_ANNOUNCE, 0) == OK
    assert heir.link == LINK_UP


def test_a_device_that_nobody_drives_is_saved_too(make: Make) -> None:
    state = make(Cable()).device.save()
    heir = make(Cable())
    heir.device.restore(state)
    heir.up()
    assert heir.device.save().guest_offloads == GUEST_OFFLOADS


@pytest.mark.parametrize(
    "change",
    [
        {"mac": b"short"},
        {"pairs": 2},
        {"pairs": -1},
        {"guest_offloads": F_CSUM},
        {"switches": 64},
        {"switches": -1},
        {"unicast": (b"x",)},
        {"multicast": (bytes(6),) * 65},
        {"vlans": (4096,)},
    ],
)
def test_a_state_that_does_not_fit_is_refused(make: Make, change: dict[str, object]) -> None:
    device = make(Cable()).up().device
    with pytest.raises(StateError, match="net0"):
        device.restore(device.save()._replace(**change))
    with pytest.raises(StateError, match="net0"):
        device.restore(RxFilter(MAC))


# The control queue


def test_the_address_is_the_driver_s_to_change(make: Make) -> None:
    driver = make(Cable()).up()
    generation = driver.read(0x0FC)
    assert driver.command(CLASS_MAC, MAC_ADDR_SET, OTHER) == OK
    assert driver.config(0, 4).to_bytes(4, "little") == OTHER[:4]
    assert driver.read(0x0FC) == generation
    assert driver.command(CLASS_MAC, MAC_ADDR_SET, OTHER[:5]) == ERR
    driver.status = 0
    assert driver.device.mac == MAC, "the next driver finds the device's own"


def listens(driver: Net, cable: Cable, *frames: bytes) -> list[bytes]:
    """Return which of these frames arrive."""
    for one in frames:
        cable.send(one)
    driver.loop.poll()
    return driver.heard()


MULTI = bytes.fromhex("01005e000001")


def test_the_filter_lets_through_what_the_driver_asked_for(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up(size=64)
    driver.room(*[1600] * 32)
    own, other, multi, broad = (frame(to=to) for to in (MAC, OTHER, MULTI, BROADCAST))
    every = [own, other, multi, broad]
    assert listens(driver, cable, *every) == every
    assert driver.command(CLASS_RX, RX_PROMISC, b"\0") == OK
    assert listens(driver, cable, *every) == [own, broad]
    assert driver.device.statistics().rx_filtered == 2
    for command, expected in (
        (RX_ALLMULTI, [own, multi, broad]),
        (RX_ALLUNI, [own, other, broad]),
        (RX_NOMULTI, [own, broad]),
        (RX_NOUNI, [broad]),
        (RX_NOBCAST, [own]),
    ):
        assert driver.command(CLASS_RX, command, b"\1") == OK
        assert listens(driver, cable, *every) == expected
        assert driver.command(CLASS_RX, command, b"\0") == OK
    table = struct.pack("<I", 1) + OTHER + struct.pack("<I", 1) + MULTI
    assert driver.command(CLASS_MAC, MAC_TABLE_SET, table) == OK
    assert listens(driver, cable, *every) == every
    assert driver.command(CLASS_MAC, MAC_TABLE_SET, bytes(8)) == OK
    assert listens(driver, cable, *every) == [own, broad]


def test_frames_of_a_vlan_need_its_membership_whatever_their_priority(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    driver.room(*[1600] * 8)
    assert driver.command(CLASS_RX, RX_PROMISC, b"\0") == OK
    tagged = frame(tag=0xE005)
    assert listens(driver, cable, tagged) == []
    assert driver.command(CLASS_VLAN, VLAN_ADD, struct.pack("<H", 5)) == OK
    assert listens(driver, cable, tagged) == [tagged]
    assert driver.command(CLASS_VLAN, VLAN_DEL, struct.pack("<H", 5)) == OK
    assert listens(driver, cable, tagged) == []
    assert driver.command(CLASS_VLAN, VLAN_ADD, struct.pack("<H", 4096)) == ERR


def test_a_table_that_is_too_long_lets_everything_of_its_kind_through_until_the_next_one(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up(size=32)
    driver.room(*[1600] * 8)
    assert driver.command(CLASS_RX, RX_PROMISC, b"\0") == OK
    assert driver.command(CLASS_MAC, MAC_TABLE_SET, struct.pack("<I", 65) + bytes(390) + bytes(4)) == OK
    assert listens(driver, cable, frame(to=OTHER), frame(to=MULTI)) == [frame(to=OTHER)]
    assert driver.command(CLASS_MAC, MAC_TABLE_SET, struct.pack("<I", 64) + bytes(384) + struct.pack("<I", 1) + bytes(6)) == OK
    assert listens(driver, cable, frame(to=OTHER), frame(to=MULTI)) == [frame(to=MULTI)]


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (CLASS_RX, RX_PROMISC, b"\2"),
        (CLASS_RX, RX_PROMISC, b""),
        (CLASS_RX, 6, b"\1"),
        (CLASS_MAC, MAC_TABLE_SET, b"\1\0\0"),
        (CLASS_MAC, MAC_TABLE_SET, struct.pack("<I", 0xFFFF_FFFF) + bytes(10)),
        (CLASS_MAC, MAC_TABLE_SET, bytes(4) + struct.pack("<I", 2) + bytes(11)),
        (CLASS_MAC, 2, bytes(8)),
        (CLASS_VLAN, 2, bytes(2)),
        (CLASS_VLAN, VLAN_ADD, b"\1"),
        (CLASS_MQ, 0, struct.pack("<H", 1)),
        (CLASS_GUEST_OFFLOADS, 0, struct.pack("<Q", F_CSUM)),
        (CLASS_GUEST_OFFLOADS, 0, b"\0"),
        (200, 200, bytes(64)),
    ],
)
def test_a_command_that_is_wrong_is_answered_so(make: Make, kind: int, command: int, data: bytes) -> None:
    driver = make(Cable()).up()
    assert driver.command(kind, command, data) == ERR
    assert not driver.broken


def test_a_command_of_a_feature_that_was_not_negotiated_is_refused(make: Make) -> None:
    driver = make(Cable())
    driver.start(F_VERSION_1 | F_CTRL_VQ)
    assert driver.command(CLASS_RX, RX_PROMISC, b"\1") == ERR
    assert driver.command(CLASS_MAC, MAC_ADDR_SET, OTHER) == ERR
    assert driver.command(CLASS_VLAN, VLAN_ADD, bytes(2)) == ERR


@pytest.mark.parametrize("parts", [(b"\0", 1), (b"\0\0\1",), (1,)])
def test_what_is_no_command_breaks_the_device(make: Make, parts: tuple[bytes | int, ...]) -> None:
    driver = make(Cable()).up()
    driver.offer(*parts, queue=2)
    driver.kick(2)
    assert driver.broken


def test_offloads_are_those_negotiated_and_then_those_commanded(make: Make) -> None:
    cable = Cable()
    driver = make(cable).up()
    assert cable.offloads == [GUEST_OFFLOADS]
    assert driver.command(CLASS_GUEST_OFFLOADS, 0, struct.pack("<Q", F_GUEST_CSUM)) == OK
    assert cable.offloads[-1] == F_GUEST_CSUM


# Many queues


def test_only_the_first_pair_works_until_the_driver_says_otherwise(make: Make) -> None:
    cable = Cable(3)
    driver = make(cable, pairs=3).up(size=16)
    assert cable.counts == [1]
    for pair in range(3):
        driver.room(1600, 1600, pair=pair)
        cable.send(frame(60 + pair), pair)
    driver.loop.poll()
    assert [driver.heard(pair) for pair in range(3)] == [[frame(60)], [], []]
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 3)) == OK
    assert cable.counts == [1, 3]
    driver.loop.poll()
    assert [driver.heard(pair) for pair in range(3)] == [[], [frame(61)], [frame(62)]]
    driver.say(frame(), pair=2)
    assert cable.received(2) == [bytes(HEADER) + frame()]
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 1)) == OK
    cable.send(frame(), 2)
    assert driver.loop.poll() <= 2
    assert driver.heard(2) == []
    assert len(driver.say(frame(), pair=2)) == 1, "it comes back, and goes nowhere"
    assert cable.received(2) == []


@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_that_wait_in_a_pair_that_is_given_up_come_back(make: Make, event_idx: bool) -> None:
    """The driver was told not to kick: nobody else would ever take them."""
    cable = Cable(2)
    cable.near[1].setsockopt(1, 7, 4096)  # SO_SNDBUF: a few frames
    driver = make(cable, pairs=2).up(without=0 if event_idx else F_EVENT_IDX)
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 2)) == OK
    sent = len(driver.say(*[frame(1500)] * 8, pair=1))
    assert sent < 8
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 1)) == OK
    assert len(driver.rings[3].collect()) == 8 - sent
    assert driver.device.statistics().tx_dropped == 8 - sent


@pytest.mark.parametrize("count", [0, 4, 65535])
def test_a_number_of_pairs_out_of_range_is_refused(make: Make, count: int) -> None:
    cable = Cable(3)
    driver = make(cable, pairs=3).up()
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", count)) == ERR
    assert cable.counts == [1]


def test_without_multi_queue_the_third_queue_is_the_control_queue(make: Make) -> None:
    driver = make(Cable(2), pairs=2)
    assert driver.negotiate(driver.offered() & ~(F_MQ | F_EVENT_IDX))
    driver.rings = [driver.enable(index) for index in range(3)]
    driver.status |= 4
    driver.loop.poll()
    assert driver.command(CLASS_RX, RX_PROMISC, b"\1") == OK


def test_a_device_may_have_more_pairs_than_its_network(make: Make) -> None:
    cable = Cable(1)
    driver = make(cable, pairs=2).up(size=16)
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 2)) == OK
    driver.room(1600, pair=1)
    assert len(driver.say(frame(), pair=1)) == 1
    assert len(driver.say(frame())) == 1
    assert len(cable.received()) == 1


# Networks that come and go


def test_without_a_network_the_link_is_down_and_what_is_sent_is_lost(make: Make) -> None:
    driver = make().up()
    assert driver.link == 0
    driver.room(1600)
    assert len(driver.say(frame(), frame())) == 2
    assert driver.heard() == []


def test_a_network_is_put_in_and_taken_out_under_a_driver(make: Make, cables: list[Cable]) -> None:
    driver = make().up(size=64)
    driver.room(*[1600] * 16)
    before = descriptors(settle=True)
    for number in range(5):
        cable = Cable()
        driver.device.attach(cable)
        assert driver.link == LINK_UP
        assert driver.read(0x060) & CONFIG_CHANGE
        assert cable.offloads == [GUEST_OFFLOADS], "the new tap has what was negotiated with the driver"
        cable.send(frame(60 + number))
        driver.loop.poll()
        assert driver.heard() == [frame(60 + number)]
        driver.say(frame())
        assert len(cable.received()) == 1
        with pytest.raises(DeviceError, match="already"):
            driver.device.attach(cable)
        assert driver.device.detach() is cable
        assert driver.link == 0
        cable.close()
        assert len(driver.say(frame())) == 1
    with pytest.raises(DeviceError, match="no network"):
        driver.device.detach()
    assert descriptors() == before
    assert driver.device.statistics()[:2] == (5, 310)
    assert not driver.broken


def test_a_network_that_cannot_do_what_was_negotiated_is_refused(make: Make, cables: list[Cable]) -> None:
    driver = make().up()
    cables.append(Cable(features=0))
    with pytest.raises(DeviceError, match="the driver uses features"):
        driver.device.attach(cables[-1])
    assert driver.link == 0
    driver.status = 0
    driver.device.attach(cables[-1])
    assert not driver.offered() & OFFLOADS
    driver.up().room(1600)
    cables[-1].send(frame())
    driver.loop.poll()
    assert driver.heard() == [frame()]


def test_a_network_that_cannot_be_begun_is_let_go_of_and_the_device_goes_on(
    make: Make, cables: list[Cable], loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make().up()
    driver.room(1600)
    cables.append(Cable())
    watch, calls = loop.add_fd, []

    def add_fd(fd: int, events: int, callback: Callable[[int], None]) -> None:
        calls.append(fd)
        if len(calls) == 2:  # the first queue is at work by now
            loop.poll()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # epoll_ctl(2): max_user_watches
        watch(fd, events, callback)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "add_fd", add_fd)
        with pytest.raises(DeviceError, match="No space left"):
            driver.device.attach(cables[-1])
    assert cables[-1].near[0].fileno() in calls
    assert cables[-1].near[0].fileno() not in watched(loop)
    assert len(driver.say(frame())) == 1
    assert driver.link == 0


def test_what_another_network_offers_is_seen_in_registers_in_memory(make: Make, cables: list[Cable]) -> None:
    driver = make()
    registers = memoryview(bytearray(SIZE))
    driver.transport.mirror(registers)
    cables.append(Cable(features=0))
    for change in (lambda: driver.device.attach(cables[-1]), driver.device.detach):
        offered = registers.cast("I")[0x010 >> 2]
        change()
        assert registers.cast("I")[0x010 >> 2] ^ offered == OFFLOADS | F_CTRL_GUEST_OFFLOADS
        assert registers.cast("I").tolist() == [driver.read(at) for at in range(0, SIZE, 4)]


def test_a_network_that_comes_while_a_driver_has_chosen_more_makes_it_choose_again(make: Make, cables: list[Cable]) -> None:
    driver = make()
    assert driver.negotiate()
    cables.append(Cable(features=0))
    driver.device.attach(cables[-1])
    driver.status |= 4
    assert driver.broken
    assert "the driver uses features" in driver.transport.needs_reset_reason
    driver.status = 0
    driver.up().room(1600)
    cables[-1].send(frame())
    driver.loop.poll()
    assert driver.heard() == [frame()]


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_tap_that_is_deleted_turns_the_link_down_and_nothing_else(
    make: Make, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    driver = make(Cable()).up()
    driver.room(1600)

    def gone(*_: object) -> int:
        raise OSError(77, "File descriptor in bad state")

    monkeypatch.setattr(f"virtio_devices.net.tap.os.{how}v", gone)
    if how == "read":
        driver.device._backend.send(frame())  # type: ignore[union-attr]
    assert len(driver.say(frame())) == 1
    monkeypatch.undo()
    assert driver.link == 0
    assert driver.read(0x060) & CONFIG_CHANGE
    assert len(driver.said) == 1  # type: ignore[attr-defined]
    assert driver.loop.poll() == 0
    assert not driver.broken
    assert len(driver.say(frame(), frame())) == 2


def test_a_tap_that_was_deleted_before_the_driver_came_turns_the_link_down(make: Make) -> None:
    cable = Cable()
    cable.gone = True
    driver = make(cable).up()
    assert driver.link == 0
    assert not driver.broken


def test_closing_under_load_leaves_nothing(make: Make) -> None:
    cable = Cable()
    before = descriptors(settle=True)
    driver = make(cable).up()
    driver.room(*[1600] * 4)
    for _ in range(4):
        cable.send(frame())
    driver.offer(bytes(HEADER), frame(), queue=1)
    driver.close()
    cable.close()
    assert len(descriptors()) < len(before)


# Anything that a driver and a network may do

SIZES = st.sampled_from([0, 1, 11, 12, 25, 26, 60, 64, 1500, 2048, 5000])
PART = st.one_of(SIZES, SIZES.map(bytes))
ACTIONS = st.one_of(
    st.tuples(st.just("offer"), st.integers(0, 4), st.lists(PART, min_size=1, max_size=4)),
    st.tuples(st.just("kick"), st.integers(0, 4), st.just([])),
    st.tuples(st.just("send"), st.integers(0, 1), st.integers(0, 9000)),
    st.tuples(st.just("command"), st.integers(0, 6), st.binary(max_size=40)),
    st.tuples(st.just("stop"), st.integers(0, 4), st.just([])),
    st.tuples(st.just("pause"), st.just(0), st.just([])),
    st.tuples(st.just("swap"), st.just(0), st.just([])),
    st.tuples(st.just("restart"), st.just(0), st.just([])),
)


def check_actions(actions: list[tuple[str, int, object]], event_idx: bool, mergeable: bool) -> None:
    memory = GuestMemory([(0, 1 << 20)])
    loop = new_loop()
    cable: Cable | None = Cable(2)
    cables = [cable]
    device = NetDevice("net0", [loop], memory, mac=MAC, backend=cable, pairs=2)
    driver = Net(device, memory, loop)
    without = (0 if event_idx else F_EVENT_IDX) | (0 if mergeable else F_MRG_RXBUF)
    driver.start(without=without, size=16)
    try:
        for what, index, data in actions:
            if driver._next > 0xF_0000:
                driver._next = DATA
            if what == "offer":
                driver.offer(*[part for part in data if part], queue=index)  # type: ignore[attr-defined]
            elif what == "kick":
                driver.kick(index)
            elif what == "send" and cable:
                try:
                    cable.send(bytes(data), index)  # type: ignore[call-overload]
                except BlockingIOError:
                    cable.received(index)
            elif what == "command":
                driver.offer(bytes([index]) + data, 1, queue=4)  # type: ignore[operator]
                driver.kick(4)
            elif what == "stop":
                driver.write(0x030, index)
                driver.write(0x044, 0)
            elif what == "pause":
                driver.transport.pause()
                for queue in driver.transport.save().queues:
                    assert driver.broken or queue.next_avail == queue.next_used
                device.save()
                driver.transport.resume()
            elif what == "swap":
                if device.has_backend:
                    device.detach()
                    cable = None
                else:
                    cable = Cable(2)
                    cables.append(cable)
                    device.attach(cable)
            elif what == "restart":
                driver.status = 0
                driver._next = DATA
                driver.start(without=without, size=16)
            loop.poll()
        driver.status = 0
        driver._next = DATA
        driver.start(without=F_EVENT_IDX, size=16)
        assert not driver.broken
        if cable:
            for end in cable.near:
                while True:
                    try:
                        end.recv(1 << 17)
                    except BlockingIOError:
                        break
            driver.room(4096)
            cable.send(frame(77))
            loop.poll()
            assert driver.heard() == [frame(77)]
    finally:
        driver.close()
        assert not watched(loop)
        for one in cables:
            one.close()  # type: ignore[union-attr]
        loop.close()
        memory.close()


@given(st.lists(ACTIONS, max_size=40), st.booleans(), st.booleans())
def test_nothing_that_a_driver_or_a_network_does_escapes_hangs_or_outlives_a_reset(
    actions: list[tuple[str, int, object]], event_idx: bool, mergeable: bool
) -> None:
    check_actions(actions, event_idx, mergeable)


@given(st.binary(max_size=200), st.integers(1, 40))
def test_no_command_escapes_whatever_is_in_it(data: bytes, split: int) -> None:
    memory = GuestMemory([(0, 1 << 20)])
    loop = new_loop()
    cable = Cable()
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, backend=cable), memory, loop)
    driver.up()
    parts = [data[at : at + split] for at in range(0, len(data), split)][:7]
    driver.offer(*parts, 1, queue=2)
    driver.kick(2)
    assert driver.broken == (len(b"".join(parts)) < 2)
    driver.close()
    cable.close()
    loop.close()
    memory.close()


def test_a_network_that_cannot_be_watched_is_looked_at_again_later(
    make: Make, loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    cable = Cable()
    driver = make(cable).up()
    add_fd, refused = loop.add_fd, []

    def no_room(fd: int, events: int, callback: Callable[[int], None]) -> None:
        if fd != cable.near[0].fileno() or len(refused) == 3:
            add_fd(fd, events, callback)
            return
        refused.append(events)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # epoll_ctl(2): max_user_watches

    monkeypatch.setattr(loop, "add_fd", no_room)
    driver.room(2000, 2000)
    cable.send(frame(fill=1))
    for _ in range(4):
        loop.poll()
    assert driver.heard() == [frame(fill=1)]
    assert len(refused) == 3
    cable.send(frame(fill=2))
    loop.poll()
    assert driver.heard() == [frame(fill=2)]
    refused.clear()
    driver.transport.pause()
    assert loop.poll() == 0, "nothing is left to be done later"
    driver.transport.resume()


def test_frames_to_send_wait_for_a_watch_as_well(make: Make, loop: DirectLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    cable = Cable()
    cable.near[0].setsockopt(1, 7, 4096)  # SO_SNDBUF: a few frames
    driver = make(cable).up(size=64)
    add_fd, refused = loop.add_fd, []

    def no_room(fd: int, events: int, callback: Callable[[int], None]) -> None:
        if fd != cable.near[0].fileno() or refused:
            add_fd(fd, events, callback)
            return
        refused.append(events)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop, "add_fd", no_room)
    frames = [frame(60, fill=number) for number in range(30)]
    driver.say(*frames)
    assert refused == [WRITE]
    sent: list[bytes] = []
    for _ in range(40):
        sent += cable.received()
        loop.poll()
    assert sent == [bytes(HEADER) + one for one in frames]
