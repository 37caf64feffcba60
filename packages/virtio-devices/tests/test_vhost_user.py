"""Devices behind vhost-user sockets: what a driver and a back end see of each other, also when the back end goes and comes."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhost_backend import ACK, CHANNEL, CONFIG, INFLIGHT, LIMIT, MQ, PROTOCOL, RESET, VERSION_1, hold
from vhost_guest import BLK, RECORDS, Make, MakeGuest
from virtio_devices.device import F_VERSION_1, DeviceError
from virtio_devices.mmio import DRIVER_OK
from virtio_devices.vhost_user.blk import CONFIG_SIZE, F_CONFIG_WCE, F_MQ, VhostUserBlk
from virtio_devices.vhost_user.device import VhostUserState
from virtio_devices.vhost_user.fs import VhostUserFs
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.state import decode, encode

SET_FEATURES, SET_MEM_TABLE, SET_VRING_BASE, GET_VRING_BASE, SET_CONFIG, GET_INFLIGHT, SET_INFLIGHT, RESET_DEVICE = (
    2, 5, 10, 11, 25, 31, 32, 34,
)  # fmt: skip


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 16)], share=True)
    yield memory
    memory.close()


@pytest.mark.parametrize("protocol", [CONFIG, CONFIG | ACK, CONFIG | MQ | ACK | CHANNEL | INFLIGHT | RESET])
def test_requests_are_answered_by_the_back_end(back_end: Make, guest: MakeGuest, protocol: int) -> None:
    back_end(protocol=protocol)
    driver = guest().start()
    assert driver.ask(b"hello", 8) == b"HELLO..."
    assert driver.ask(b"again", 5) == b"AGAIN"


def test_every_queue_of_a_disk_is_served(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_MQ)
    driver = guest(num_queues=4).start()
    assert driver.config(34, 2) == 4
    for index in range(4):
        assert driver.ask(f"queue {index}".encode(), 7, queue=index) == f"QUEUE {index}".encode()
    assert len(server.rings) == 4


def test_more_queues_than_the_back_end_has_are_refused(back_end: Make, guest: MakeGuest) -> None:
    back_end(**BLK, queues=2)
    with pytest.raises(DeviceError, match=r"disk0: the back end at .*vu has 2 queues, not 3"):
        guest(num_queues=3)


def test_a_file_system_has_its_tag_and_two_queues(back_end: Make, guest: MakeGuest) -> None:
    back_end(protocol=ACK)
    driver = guest("fs").start()
    assert driver.transport.read(0x008, 4) == 26
    assert bytes(driver.config(at, 1) for at in range(40)) == b"share".ljust(36, b"\0") + b"\1\0\0\0"
    assert driver.ask(b"high", 4, queue=0) == b"HIGH"
    assert driver.ask(b"request", 7, queue=1) == b"REQUEST"


@pytest.mark.parametrize("tag", ["", "x" * 37])
def test_a_tag_that_cannot_be_is_refused(memory: GuestMemory, loop: DirectLoop, tag: str) -> None:
    with pytest.raises(DeviceError, match="a tag has 1 to 36 bytes"):
        VhostUserFs("fs0", loop, memory, "/nowhere", tag=tag)


def test_a_host_without_threads_is_named_and_nothing_stays_open(
    back_end: Make, memory: GuestMemory, loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = back_end(**BLK)

    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as host:
        host.setattr(threading.Thread, "start", none_left)
        with pytest.raises(DeviceError, match=r"^disk0: can't start new thread$"):
            VhostUserBlk("disk0", loop, memory, str(server.path))


def test_a_tag_is_bytes_as_they_are_in_an_argument(back_end: Make, memory: GuestMemory, loop: DirectLoop) -> None:
    server = back_end(protocol=ACK)
    device = VhostUserFs("fs0", loop, memory, str(server.path), tag="\udcff")
    assert device.read_config(0, 2) == 0x00FF
    device.close()


def test_features_that_need_more_than_a_ring_are_not_offered(back_end: Make, guest: MakeGuest) -> None:
    back_end(protocol=ACK, features=(1 << 42) - 1)
    offered = guest("fs").offered()
    assert offered == F_VERSION_1 | 1 << 28 | 1 << 29


def test_a_back_end_of_legacy_devices_is_refused(back_end: Make, guest: MakeGuest) -> None:
    back_end(**BLK, features=PROTOCOL)
    with pytest.raises(DeviceError, match="knows legacy virtio only"):
        guest()


def test_a_disk_without_configuration_space_is_refused(back_end: Make, guest: MakeGuest) -> None:
    back_end(protocol=MQ)
    with pytest.raises(DeviceError, match="does not give its configuration space"):
        guest()


def test_nobody_on_the_socket_is_an_error_that_names_it(guest: MakeGuest, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"disk0: cannot connect to .*vu: No such file or directory"):
        guest()


def test_memory_that_is_not_shared_is_refused_in_stratovirt_s_words(back_end: Make, loop: DirectLoop, tmp_path: Path) -> None:
    private = GuestMemory([(0, 1 << 20)])
    server = back_end(**BLK)
    with pytest.raises(DeviceError, match="Failed to initial vhost user memory map, consider using command mem-share=on"):
        VhostUserBlk("disk0", loop, private, server.path)
    private.close()


# Configuration space


def test_the_disk_s_size_is_the_back_end_s_and_may_change(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK, config=(100).to_bytes(8, "little") + bytes(CONFIG_SIZE - 8))
    driver = guest().start()
    assert driver.config(0, 8) == 100
    generation = driver.read(0x0FC)
    server.change_config((200).to_bytes(8, "little") + bytes(CONFIG_SIZE - 8), need_reply=True)
    while not driver.transport.interrupt_status & 2:
        driver.line.wait()
    assert driver.config(0, 8) == 200
    assert driver.read(0x0FC) != generation


def test_the_driver_s_choice_of_a_write_cache_reaches_the_back_end(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_CONFIG_WCE)
    driver = guest().start()
    driver.write(0x100 + 32, 1, 1)
    server.until(lambda: SET_CONFIG in server.names())
    assert driver.ask(b"sync", 4) == b"SYNC"
    assert server.config[32] == 1
    assert driver.config(32, 1) == 1


def test_the_driver_s_choice_of_a_write_cache_holds_for_the_next_back_end_too(back_end: Make, guest: MakeGuest) -> None:
    config = bytearray(CONFIG_SIZE)
    config[32] = 1  # writes are cached until a flush, unless the driver wants it otherwise
    server = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_CONFIG_WCE, config=bytes(config))
    driver = guest(retry=0.01).start()
    driver.write(0x100 + 32, 0, 1)
    server.until(lambda: SET_CONFIG in server.names())
    assert driver.ask(b"before", 6) == b"BEFORE"
    server.kill()
    successor = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_CONFIG_WCE, config=bytes(config))
    assert driver.ask(b"after", 5) == b"AFTER"
    assert successor.config[32] == 0
    assert driver.config(32, 1) == 0
    assert successor.names().index(SET_CONFIG) < successor.names().index(SET_VRING_BASE)


def test_the_driver_s_choice_holds_while_the_back_end_changes_something_else(
    back_end: Make, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_CONFIG_WCE)
    driver = guest().start()
    assert isinstance(driver.device, VhostUserBlk)
    shown = driver.device._shown
    vcpus: list[threading.Thread] = []

    def shown_and_then_the_driver_writes(config: bytes) -> bytes:
        result = shown(config)
        if not vcpus:
            vcpus.append(threading.Thread(target=driver.write, args=(0x100 + 32, 1, 1)))
            vcpus[0].start()
            vcpus[0].join(0.1)  # it may have to wait for us
        return result

    monkeypatch.setattr(driver.device, "_shown", shown_and_then_the_driver_writes)
    server.change_config((2048).to_bytes(CONFIG_SIZE, "little"))
    while driver.config(0, 8) != 2048:
        driver.line.wait()
    vcpus[0].join()
    assert driver.config(32, 1) == 1


def test_a_choice_that_a_back_end_refuses_is_not_made_again(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_CONFIG_WCE)
    driver = guest(retry=0.01).start()
    server.answers[SET_CONFIG] = lambda _: struct.pack("=IIIQ", SET_CONFIG, 5, 8, 1)
    driver.write(0x100 + 32, 1, 1)
    server.until(lambda: SET_CONFIG in server.names())
    assert driver.ask(b"after", 5) == b"AFTER"
    assert server.names().count(SET_CONFIG) == 1


def test_other_fields_are_read_only(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_CONFIG_WCE)
    driver = guest().start()
    for offset, size, value in ((0, 4, 1), (32, 2, 1), (32, 1, 2)):
        driver.write(0x100 + offset, value, size)
    assert driver.ask(b"sync", 4) == b"SYNC"
    assert SET_CONFIG not in server.names()
    assert not any(server.config)


# Life


def test_a_driver_comes_and_goes_over_one_connection(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(protocol=MQ | ACK | CONFIG | INFLIGHT | RESET)
    driver = guest().start()
    for turn in range(5):
        assert driver.ask(b"turn", 4) == b"TURN"
        driver.restart()
        assert server.names().count(RESET_DEVICE) == turn + 1
    # A fresh record for each driver; the last one may just be on its way.
    server.until(lambda: server.names().count(SET_INFLIGHT) >= server.names().count(GET_INFLIGHT) >= 5)
    assert server.connections == 1


def test_while_paused_the_back_end_has_no_ring_and_then_goes_on_where_it_was(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest().start()
    for turn in range(1, 4):
        driver.ask(b"x", 1)
        driver.transport.pause()
        assert not any(ring.started for ring in server.rings.values())
        assert driver.transport.save().queues[0].next_avail == turn
        driver.transport.pause()
        driver.transport.resume()
    assert driver.ask(b"on", 2) == b"ON"


def test_what_was_offered_during_a_pause_is_served_after_it(back_end: Make, guest: MakeGuest) -> None:
    back_end(**BLK)
    driver = guest().start()
    driver.transport.pause()
    laid = driver.offer(b"waiting", 7)
    driver.kick()
    driver.transport.resume()
    driver.collect(1)
    assert driver.written(laid) == b"WAITING"


def test_a_pause_waits_for_requests_under_way(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(hold, **BLK)
    driver = guest().start()
    driver.offer(b"slow", 4)
    driver.kick()
    server.holds(1)
    pausing = threading.Thread(target=driver.transport.pause)
    pausing.start()
    server.release()
    pausing.join(LIMIT)
    assert server.log[-1][0] == GET_VRING_BASE
    saved = driver.transport.save().queues[0]
    assert saved.next_avail == saved.next_used == 1


def test_a_queue_is_stopped_alone(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK, features=VERSION_1 | PROTOCOL | F_MQ)
    driver = guest(num_queues=2).start()
    assert driver.ask(b"a", 1, queue=1) == b"A"
    driver.write(0x030, 1)
    driver.write(0x044, 0)
    assert not server.rings[1].started
    assert driver.ask(b"b", 1, queue=0) == b"B"
    driver.transport.pause()
    driver.transport.resume()
    assert driver.ask(b"c", 1, queue=0) == b"C"


def test_a_ring_that_the_back_end_reports_as_broken_breaks_the_device_until_reset(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest().start()
    driver.ask(b"x", 1)
    server.do(lambda: os.eventfd_write(server.rings[0].err, 1))
    while not driver.broken:
        driver.line.wait()
    assert driver.restart().ask(b"better", 6) == b"BETTER"


def test_an_error_of_a_queue_that_was_taken_back_is_not_the_next_driver_s(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest().start()
    driver.ask(b"x", 1)
    err = os.dup(server.rings[0].err)
    driver.status = 0
    os.eventfd_write(err, 1)  # the back end is late to say so
    os.close(err)
    server.change_config((2048).to_bytes(CONFIG_SIZE, "little"))
    while driver.config(0, 8) != 2048:  # until the session has looked at everything that the back end says
        os.sched_yield()
    assert driver.status == 0
    assert driver.restart().ask(b"better", 6) == b"BETTER"


def test_an_error_of_a_queue_that_comes_while_a_pause_takes_it_back_breaks_the_device(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest().start()
    driver.ask(b"x", 1)

    def say_so_at_last(payload: bytes) -> bytes:
        os.eventfd_write(server.rings[0].err, 1)
        answer: bytes = server._handle(GET_VRING_BASE, payload, [])
        return struct.pack("=III", GET_VRING_BASE, 5, len(answer)) + answer

    server.answers[GET_VRING_BASE] = say_so_at_last
    driver.transport.pause()
    assert driver.broken
    driver.transport.resume()
    assert driver.restart().ask(b"better", 6) == b"BETTER"


# The back end goes away


@pytest.mark.parametrize("options", [BLK, RECORDS], ids=["without record", "with record"])
def test_requests_wait_for_a_back_end_that_comes_back(back_end: Make, guest: MakeGuest, options: dict[str, int]) -> None:
    server = back_end(**options)
    driver = guest(retry=0.01).start()
    assert driver.ask(b"before", 6) == b"BEFORE"
    server.kill()
    laid = driver.offer(b"between", 7)
    driver.kick()
    back_end(**options)
    driver.collect(1)
    assert driver.written(laid) == b"BETWEEN"
    assert driver.ask(b"after", 5) == b"AFTER"
    assert not driver.broken
    assert [report.partition(": ")[2] for report in driver.reports] == [
        f"the back end at {server.path} has closed the connection; the guest waits",
        f"the back end at {server.path} is back",
    ]


def test_back_ends_and_what_waits_for_them_are_counted(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest(retry=0.01)
    assert driver.device is not None
    assert driver.device.counters() == {"connected": 1, "back_ends": 1, "waiting": 0}
    driver.start()
    assert driver.ask(b"before", 6) == b"BEFORE"
    assert driver.device.counters() == {"connected": 1, "back_ends": 1, "waiting": 0}
    server.kill()
    for _ in range(2):
        driver.offer(b"between", 7)
    driver.kick()
    while driver.device.counters() != {"connected": 0, "back_ends": 1, "waiting": 2}:
        time.sleep(0.001)
    back_end(**BLK)
    driver.collect(2)
    assert driver.device.counters() == {"connected": 1, "back_ends": 2, "waiting": 0}
    ring = driver.rings[0]
    driver.memory.store(ring.avail + 2, 2, 0xFFFF)
    assert driver.device.counters()["waiting"] == ring.size, "what a driver writes is no number of requests"
    driver.memory.store(ring.avail + 2, 2, 3)


@pytest.mark.parametrize("options", [BLK, RECORDS], ids=["without record", "with record"])
@pytest.mark.parametrize("newest_first", [False, True])
def test_each_request_is_answered_once_whatever_was_under_way_when_the_back_end_died(
    back_end: Make, guest: MakeGuest, options: dict[str, int], newest_first: bool
) -> None:
    server = back_end(hold, **options)
    driver = guest(retry=0.01)
    driver.start(size=16)
    answered: list[int] = []
    for turn in range(12):
        offered = [driver.offer(f"turn {turn} request {n}".encode(), 20) for n in range(4)]
        assert offered
        driver.kick()
        server.holds(4)
        server.release(2, last=newest_first)
        answered += driver.collect(2)
        killed = server
        killed.kill()
        server = back_end(hold, **options)
        server.holds(2)
        server.release()
        answered += driver.collect(2)
        driver._next = 0x4_0000
        assert len(killed.served) + len(server.served) >= 4
        server.served.clear()
    assert len(answered) == 48
    assert not driver.broken


def test_an_answer_whose_call_was_lost_with_the_back_end_is_noticed(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(hold, **BLK)
    driver = guest(retry=0.01).start()
    laid = driver.offer(b"silent", 6)
    driver.kick()
    server.holds(1)
    server.release(call=False)
    server.kill()
    back_end(**BLK)
    driver.collect(1)
    assert driver.written(laid) == b"SILENT"


def test_without_any_record_a_device_with_unknown_requests_under_way_is_broken(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(hold, **BLK)
    driver = guest(retry=0.01).start()
    ring = driver.rings[0]
    driver.offer(b"first", 5)
    driver.kick()
    server.holds(1)
    for _ in range(3):  # more than a ring's worth goes by, and nobody is called
        for _ in range(6):
            driver.offer(b"more", 4)
        driver.kick()
        server.holds(7)
        for _ in range(6):
            server.release(1, last=True, call=False)
        assert len(ring.collect()) == 6
        driver._next = 0x4_0000
    server.kill()
    while not driver.broken:
        driver.line.wait()
    assert "it is not known what the back end had under way" in driver.transport.needs_reset_reason
    successor = back_end(**BLK)
    successor.until(lambda: successor.connections)
    driver.transport.pause()
    driver.transport.resume()
    driver.status = 0  # the session's thread has done all of the above
    assert SET_MEM_TABLE not in successor.names()
    assert driver.restart().ask(b"anew", 4) == b"ANEW"


def test_a_driver_may_come_while_the_back_end_is_away(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest(retry=0.01)
    server.kill()
    driver.start()
    laid = driver.offer(b"early", 5)
    driver.kick()
    back_end(**BLK)
    driver.collect(1)
    assert driver.written(laid) == b"EARLY"


def test_everything_works_while_the_back_end_is_away(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest(retry=0.01).start()
    driver.ask(b"x", 1)
    server.kill()
    driver.transport.pause()
    assert driver.transport.save().queues[0].next_avail == 1
    driver.transport.resume()
    driver.restart()
    driver.status = 0
    back_end(**BLK)
    assert driver.start().ask(b"back", 4) == b"BACK"


def test_a_successor_that_cannot_do_what_was_negotiated_is_not_used(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest(retry=0.01).start()
    server.kill()
    lesser = back_end(**BLK, features=VERSION_1 | PROTOCOL)
    lesser.until(lambda: lesser.connections > 1)
    assert SET_MEM_TABLE not in lesser.names()
    lesser.kill()
    back_end(**BLK)
    assert driver.ask(b"good", 4) == b"GOOD"
    assert any("no longer offers features 0x10000000, which the driver has taken" in text for text in driver.reports)


def test_a_successor_s_configuration_space_is_shown_to_the_driver(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest(retry=0.01).start()
    server.kill()
    back_end(**BLK, config=b"\7" + bytes(CONFIG_SIZE - 1))
    while not driver.transport.interrupt_status & 2:
        driver.line.wait()
    assert driver.config(0, 8) == 7


# Saved state


@pytest.mark.parametrize("options", [BLK, RECORDS], ids=["without record", "with record"])
@pytest.mark.parametrize("device_first", [False, True])
def test_a_saved_disk_goes_on_in_another_process(
    back_end: Make, guest: MakeGuest, memory: GuestMemory, options: dict[str, int], device_first: bool
) -> None:
    server = back_end(**options)
    driver = guest().start()
    for _ in range(3):
        driver.ask(b"x", 1)
    driver.transport.pause()
    assert driver.device is not None
    states = (driver.transport.save(), driver.device.save())
    state = decode(encode(states[1]), VhostUserState, "disk0")
    driver.transport.close()
    server.kill()

    back_end(**options)
    successor = guest()
    assert successor.device is not None
    if device_first:
        successor.device.restore(state)
    successor.transport.restore(states[0])
    if not device_first:
        successor.device.restore(state)
    assert (successor.transport.save(), successor.device.save()) == states
    successor.rings = driver.rings
    successor.transport.resume()
    assert successor.ask(b"here", 4) == b"HERE"


def test_requests_under_way_are_saved_with_the_back_end_s_record(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(hold, **RECORDS)
    driver = guest(retry=60).start()
    laid = [driver.offer(f"request {n}".encode(), 9) for n in range(3)]
    driver.kick()
    server.holds(3)
    server.release(1, last=True)
    driver.collect(1)
    server.kill()
    driver.transport.pause()
    assert driver.device is not None
    states = (driver.transport.save(), driver.device.save())
    driver.transport.close()

    back_end(**RECORDS)
    successor = guest()
    assert successor.device is not None
    successor.transport.restore(states[0])
    successor.device.restore(states[1])
    assert (successor.transport.save(), successor.device.save()) == states
    successor.rings = driver.rings
    successor.transport.resume()
    successor.collect(2)
    assert [driver.written(one) for one in laid] == [b"REQUEST 0", b"REQUEST 1", b"REQUEST 2"]


def test_a_state_that_does_not_fit_is_refused(back_end: Make, guest: MakeGuest) -> None:
    back_end(**BLK)
    device = guest().device
    assert device is not None
    for state in (
        VhostUserState(26, bytes(CONFIG_SIZE), None),
        VhostUserState(2, bytes(8), None),
        VhostUserState(2, bytes(CONFIG_SIZE), b""),
        VhostUserState(2, bytes(CONFIG_SIZE), b"record"),
        (),
    ):
        with pytest.raises(StateError, match="disk0"):
            device.restore(state)


def test_a_driver_that_is_set_up_wrongly_never_reaches_the_back_end(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest()
    driver.negotiate()
    driver.status |= DRIVER_OK  # without a queue
    driver.write(0x050, 0)
    driver.status = 0
    assert driver.start().ask(b"fine", 4) == b"FINE"
    assert server.names().count(SET_VRING_BASE) == 1
