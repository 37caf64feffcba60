"""What a vhost-user front end says, message by message, and back ends that answer wrongly, hang up, or come back as others."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhost_backend import ACK, CHANNEL, CONFIG, INFLIGHT, LIMIT, MQ, PROTOCOL, RESET, VERSION_1, hold
from vhost_guest import BLK, RECORDS, Guest, Make, MakeGuest
from virtio_devices.device import DeviceError
from virtio_devices.queue import SplitQueue
from virtio_devices.vhost_user.blk import CONFIG_SIZE, F_CONFIG_WCE, VhostUserBlk
from virtio_devices.vhost_user.connection import Connection
from virtio_devices.vhost_user.ledger import answered_in_order
from virtio_devices.vhost_user.session import Session
from virtio_driver import descriptors
from virtio_rings import Ring
from vmm_core.guestmem import GuestMemory

(
    GET_FEATURES, SET_FEATURES, SET_OWNER, MEM_TABLE, NUM, ADDR, BASE, GET_BASE, KICK, CALL, ERR, GET_PROTOCOL, SET_PROTOCOL,
    QUEUES, ENABLE, CHANNEL_FD, GET_CONFIG, SET_CONFIG, GET_INFLIGHT, SET_INFLIGHT, RESET_DEVICE,
) = (1, 2, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 21, 24, 25, 31, 32, 34)  # fmt: skip
EVERYTHING: dict[str, int] = {
    "protocol": MQ | ACK | CONFIG | CHANNEL | INFLIGHT | RESET,
    "features": VERSION_1 | PROTOCOL | F_CONFIG_WCE,
}

FIRST = [GET_FEATURES, GET_PROTOCOL, SET_PROTOCOL, SET_OWNER, QUEUES, CHANNEL_FD, GET_CONFIG]
HANDING_OVER = [NUM, BASE, ADDR, ERR, CALL, KICK, ENABLE]
BEGINNING = [SET_FEATURES, MEM_TABLE, GET_INFLIGHT, SET_INFLIGHT, *HANDING_OVER]
CHANGE = struct.pack("=III", 2, 1, 0)  # what a back end says of its configuration space


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 16)], share=True)
    yield memory
    memory.close()


def session(driver: Guest) -> Session:
    assert isinstance(driver.device, VhostUserBlk)
    return driver.device._session


def message(number: int, payload: bytes = b"", flags: int = 5) -> bytes:
    return struct.pack("=III", number, flags, len(payload)) + payload


# The conversation


def test_each_step_of_a_driver_s_life_is_these_messages_in_this_order(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**EVERYTHING)
    driver = guest()
    assert server.names() == FIRST
    driver.start()
    driver.ask(b"x", 1)
    assert server.names()[7:] == BEGINNING
    driver.transport.pause()
    assert server.names()[18:] == [ENABLE, GET_BASE]
    driver.transport.resume()
    driver.ask(b"x", 1)
    assert server.names()[20:] == [SET_FEATURES, MEM_TABLE, SET_INFLIGHT, *HANDING_OVER]
    driver.status = 0
    assert server.names()[30:] == [ENABLE, GET_BASE, RESET_DEVICE]


def test_messages_say_what_the_driver_has_set_up(back_end: Make, guest: MakeGuest, memory: GuestMemory) -> None:
    server = back_end(**EVERYTHING)
    driver = guest(queue_size=64).start(size=16)
    driver.ask(b"x", 1)
    driver.transport.pause()
    driver.transport.resume()
    driver.ask(b"x", 1)
    said: dict[int, list[bytes]] = {}
    for number, payload in server.log:
        said.setdefault(number, []).append(payload)
    ring = driver.rings[0]
    assert said[SET_FEATURES] == [struct.pack("=Q", VERSION_1 | PROTOCOL | F_CONFIG_WCE)] * 2
    assert said[SET_PROTOCOL] == [struct.pack("=Q", EVERYTHING["protocol"])]
    regions = [(region.base, region.size, region.base, region.offset) for region in memory.regions]
    assert said[MEM_TABLE] == [struct.pack("=II", 2, 0) + b"".join(struct.pack("=QQQQ", *region) for region in regions)] * 2
    assert said[GET_INFLIGHT] == [struct.pack("=QQHH4x", 0, 0, 1, 64)]
    assert said[SET_INFLIGHT] == [struct.pack("=QQHH4x", 16 + 16 * 64, 0, 1, 64)] * 2
    assert said[NUM] == [struct.pack("=II", 0, 16)] * 2
    assert said[BASE] == [struct.pack("=II", 0, 0), struct.pack("=II", 0, 1)]
    assert said[ADDR] == [struct.pack("=IIQQQQ", 0, 0, ring.desc, ring.used, ring.avail, 0)] * 2
    assert said[ENABLE] == [struct.pack("=II", 0, on) for on in (1, 0, 1)]
    assert said[GET_CONFIG] == [struct.pack("=III", 0, CONFIG_SIZE, 0) + bytes(CONFIG_SIZE)]


def test_descriptors_go_with_the_messages_that_have_a_use_for_them(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**EVERYTHING)
    guest().start().ask(b"x", 1)
    with_one = {CHANNEL_FD, SET_INFLIGHT, ERR, CALL, KICK}
    assert server.came == [(n, 2 if n == MEM_TABLE else int(n in with_one)) for n in FIRST + BEGINNING]


def test_a_file_system_has_neither_channel_nor_configuration_space(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(protocol=MQ | ACK | CONFIG | CHANNEL)
    guest("fs")
    assert server.names() == [GET_FEATURES, GET_PROTOCOL, SET_PROTOCOL, SET_OWNER, QUEUES]


# Back ends that are not what they should be

WRONG: dict[str, Callable[[int], bytes | tuple[bytes, int] | None]] = {
    "nothing": lambda number: None,
    "another message": lambda number: message(number + 1, bytes(8)),
    "no answer but a request": lambda number: message(number, bytes(8), 1),
    "another version": lambda number: message(number, bytes(8), 6),
    "no payload": message,
    "half of a header": lambda number: message(number)[:6],
    "half of a payload": lambda number: message(number, bytes(8))[:16],
    "a byte too few": lambda number: message(number, bytes(7)),
    "a byte too many": lambda number: message(number, bytes(9)),
    "more than anybody waits for": lambda number: struct.pack("=III", number, 5, 0xFFFF_FFFF),
    "two answers": lambda number: message(number, bytes(8)) * 2,
    "ones": lambda number: message(number, b"\xff" * 8),
    "a descriptor": lambda number: (message(number, bytes(8)), 1),
    "two descriptors": lambda number: (message(number, bytes(24)), 2),
    "too many descriptors": lambda number: (message(number, bytes(8)), 20),
}


def hang_up(_: int) -> None:
    raise ConnectionResetError


Answer = Callable[[int], bytes | tuple[bytes, int] | None]
LATER = [*BEGINNING, GET_BASE, RESET_DEVICE, SET_CONFIG]


@contextmanager
def impatient(number: int) -> Iterator[None]:
    """Let front ends wait for the answer to one message for a moment only. Others may come as late as a busy machine has them."""
    send = Connection.send

    def send_and_hurry(connection: Connection, data: bytes, fds: Sequence[int] = ()) -> None:
        send(connection, data, fds)
        if struct.unpack_from("=I", data) == (number,):
            connection.limit(0.05)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "send", send_and_hurry)
        yield


def live_through(back_end: Make, guest: MakeGuest, number: int, answer: Answer) -> None:
    """Let a back end answer one message wrongly, at whatever time of a driver's life; then let a good one take its place."""
    server = back_end(**EVERYTHING)
    driver = guest(retry=0.01)
    session(driver)._reply_limit = LIMIT
    given = threading.Event()

    def wrong(payload: bytes) -> bytes | tuple[bytes, int] | None:
        given.set()
        return answer(number)

    with impatient(number):
        if number in FIRST:  # a back end that comes back is told these again
            server.kill()
            server = back_end(**EVERYTHING, listen=False)
            server.answers[number] = wrong
            server.start()
        else:
            server.do(lambda: server.answers.update({number: wrong}))
        driver.start()
        driver.write(0x100 + 32, 1, 1)
        driver.offer(b"request", 7)
        driver.kick()
        if number in (GET_BASE, RESET_DEVICE):
            driver.collect(1)  # it has the ring
            driver.restart()
        assert given.wait(LIMIT)
        server.kill()
    good = back_end(**EVERYTHING)
    assert driver.restart().ask(b"well", 4) == b"WELL"
    driver.close()
    good.kill()


@pytest.mark.parametrize("what", [*WRONG, "an end"])
def test_no_wrong_answer_is_the_end_of_a_device(back_end: Make, guest: MakeGuest, what: str) -> None:
    for number in (*FIRST, *LATER):
        live_through(back_end, guest, number, WRONG.get(what, hang_up))


@pytest.mark.parametrize("what", [*WRONG, "an end"])
def test_a_wrong_answer_at_the_beginning_is_refused_or_harmless(
    back_end: Make, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert Session.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Session.__init__.__kwdefaults__, "reply_limit", 0.05)
    for number in FIRST:
        before = descriptors(settle=True)
        server = back_end(**EVERYTHING, listen=False)
        server.answers[number] = lambda _, number=number: WRONG.get(what, hang_up)(number)
        server.start()
        with suppress(DeviceError):
            guest().close()
        server.do(lambda: None)
        server.until(lambda server=server: server.connections > 0)
        server.close()
        assert descriptors() == before


ANSWERS = st.tuples(
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            message,
            st.integers(0, 40),
            st.one_of(st.binary(max_size=80), st.integers(0, (1 << 64) - 1).map(struct.Struct("=Q").pack)),
            st.sampled_from([5, 5, 5, 1, 4, 13, 0xFFFF_FFFF]),
        ),
    ).filter(bool),
    st.integers(0, 12),
    st.booleans(),
)


@settings(max_examples=60)
@given(number=st.sampled_from([*FIRST, *LATER]), answers=st.lists(ANSWERS, max_size=3), own=st.booleans())
def test_whatever_a_back_end_answers_the_next_one_serves(
    back_end: Make, guest: MakeGuest, number: int, answers: list[tuple[bytes, int, bool]], own: bool
) -> None:
    left = list(answers)

    def answer(number: int) -> bytes | tuple[bytes, int] | None:
        if not left:
            raise ConnectionResetError
        data, fds, end = left.pop()
        if own and len(data) >= 12:
            data = struct.pack("=I", number) + data[4:]
        if end:
            left.clear()
        return data, fds

    live_through(back_end, guest, number, answer)


# What the back end says by itself


def test_many_changes_of_the_configuration_space_are_read_together(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest().start()
    server.do(lambda: server.config.__setitem__(0, 9))
    for _ in range(50):
        server.say(CHANGE * 20)
    while driver.config(0, 8) != 9:
        driver.line.wait()
    assert driver.ask(b"works", 5) == b"WORKS"
    assert server.connections == 1
    assert server.names().count(GET_CONFIG) < 500


def test_a_disk_that_grows_before_there_is_a_driver_has_its_new_size_when_one_comes(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest()
    server.change_config(b"\x10" + bytes(CONFIG_SIZE - 1))
    server.until(lambda: server.names().count(GET_CONFIG) == 2)
    assert driver.start().ask(b"x", 1) == b"X"
    assert driver.config(0, 8) == 16


@pytest.mark.parametrize(
    "said",
    [
        (struct.pack("=III", 2, 2, 0), 0),
        (struct.pack("=III", 2, 1, 0xFFFF_FFFF), 0),
        (CHANGE, 30),
        (None, 0),
    ],
    ids=["another version", "more than anybody waits for", "too many descriptors", "an end"],
)
def test_a_channel_that_speaks_nonsense_is_hung_up_with_its_back_end_which_is_found_again(
    back_end: Make, guest: MakeGuest, said: tuple[bytes | None, int]
) -> None:
    server = back_end(**BLK)
    driver = guest(retry=0.01).start()
    driver.ask(b"x", 1)
    data, fds = said
    if data is None:
        server.do(server._channel.close)  # type: ignore[union-attr]
    else:
        server.say(data, fds)
    server.until(lambda: server.connections == 2)
    assert driver.ask(b"again", 5) == b"AGAIN"
    assert not driver.broken


def test_what_a_channel_says_and_nobody_knows_is_answered_by_a_failure(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**BLK)
    driver = guest().start()
    driver.ask(b"x", 1)
    answers: list[bytes] = []
    server.say(struct.pack("=III", 99, 1 | 8, 4) + b"news", 3)

    def listen() -> None:
        assert server._channel is not None
        server._channel.settimeout(LIMIT)
        answers.append(server._channel.recv(100))

    server.do(listen)
    assert answers == [struct.pack("=IIIQ", 99, 5, 8, 1)]
    assert driver.ask(b"goes on", 7) == b"GOES ON"


def test_a_changed_configuration_space_that_cannot_be_read_loses_the_back_end_and_not_the_disk(
    back_end: Make, guest: MakeGuest
) -> None:
    server = back_end(**BLK, config=b"\5" + bytes(CONFIG_SIZE - 1))
    driver = guest(retry=0.01).start()
    driver.ask(b"x", 1)
    server.do(lambda: server.answers.update({GET_CONFIG: lambda _: message(GET_CONFIG, bytes(12))}))
    server.say(CHANGE)
    server.until(lambda: server.connections > 1)
    server.kill()
    back_end(**BLK, config=b"\6" + bytes(CONFIG_SIZE - 1))
    assert driver.ask(b"again", 5) == b"AGAIN"
    assert driver.config(0, 8) == 6


# Coming and going


@pytest.mark.parametrize("options", [BLK, RECORDS], ids=["without record", "with record"])
def test_back_ends_that_die_and_come_back_leave_no_descriptor(back_end: Make, guest: MakeGuest, options: dict[str, int]) -> None:
    server = back_end(**options)
    driver = guest(retry=0.01).start()
    driver.ask(b"x", 1)
    before = descriptors(settle=True)
    for turn in range(20):
        if turn % 2:
            assert server._connection is not None
            server._connection.shutdown(socket.SHUT_RDWR)
        else:
            server.close()
            server = back_end(**options)
        assert driver.ask(b"on", 2) == b"ON"
        deadline = time.monotonic() + LIMIT
        while len(descriptors()) != len(before):  # an answer may be here before the last message of the conversation
            assert time.monotonic() < deadline, descriptors()
            time.sleep(0.01)


def test_a_socket_without_a_listener_is_tried_until_there_is_one(back_end: Make, guest: MakeGuest, tmp_path: Path) -> None:
    server = back_end(**BLK)
    driver = guest(retry=0.01).start()
    server.kill()
    (tmp_path / "vu").write_text("no socket")
    laid = driver.offer(b"patience", 8)
    driver.kick()
    (tmp_path / "vu").unlink()
    back_end(**BLK)
    driver.collect(1)
    assert driver.written(laid) == b"PATIENCE"


# Who knows what was under way


def test_the_record_that_one_back_end_made_is_its_successor_s(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(**RECORDS)
    driver = guest(retry=0.01).start()
    driver.ask(b"x", 1)
    server.do(lambda: server._area.__setitem__(-1, 0x77))  # type: ignore[union-attr]
    server.kill()
    successor = back_end(**RECORDS)
    driver.ask(b"x", 1)
    marks: list[int] = []
    successor.do(lambda: marks.append(successor._area[-1]))  # type: ignore[index]
    assert marks == [0x77]
    assert GET_INFLIGHT not in successor.names()
    assert successor.names().index(SET_INFLIGHT) < successor.names().index(NUM)


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), ((64 << 20) + 1, 0), ((1 << 64) - 1, 0), (4096, 1 << 63)], ids=["none", "large", "huge", "far"]
)
def test_a_record_of_a_size_that_cannot_be_is_refused(back_end: Make, guest: MakeGuest, size: int, offset: int) -> None:
    server = back_end(**RECORDS)
    driver = guest(retry=0.01)
    refused = [(message(GET_INFLIGHT, struct.pack("=QQHH4x", size, offset, 1, 256)), 1)]
    server.do(lambda: server.answers.update({GET_INFLIGHT: lambda _: refused[0]}))
    driver.start()
    server.until(lambda: server.names().count(GET_INFLIGHT) > 1)
    assert SET_INFLIGHT not in server.names()
    server.do(server.answers.clear)
    assert driver.ask(b"good", 4) == b"GOOD"


def test_a_successor_that_keeps_no_record_is_not_used_when_the_one_before_did(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(hold, **RECORDS)
    driver = guest(retry=0.01).start()
    laid = [driver.offer(f"request {n}".encode(), 9) for n in range(3)]
    driver.kick()
    server.holds(3)
    server.release(1, last=True)
    server.kill()
    lesser = back_end(**BLK)
    lesser.until(lambda: lesser.connections > 1)
    assert MEM_TABLE not in lesser.names()
    lesser.kill()
    back_end(**RECORDS)
    driver.collect(3)
    assert [driver.written(one) for one in laid] == [b"REQUEST 0", b"REQUEST 1", b"REQUEST 2"]
    assert any("keeps no record of requests under way, the one before did" in text for text in driver.reports)


def test_a_successor_that_could_keep_a_record_is_not_asked_to_when_the_one_before_kept_none(
    back_end: Make, guest: MakeGuest
) -> None:
    server = back_end(hold, **BLK)
    driver = guest(retry=0.01).start()
    laid = [driver.offer(f"request {n}".encode(), 9) for n in range(3)]
    driver.kick()
    server.holds(3)
    server.release(1, last=True)
    driver.collect(1)
    server.kill()
    successor = back_end(**RECORDS)
    driver.collect(2)
    assert [driver.written(one) for one in laid] == [b"REQUEST 0", b"REQUEST 1", b"REQUEST 2"]
    assert not {GET_INFLIGHT, SET_INFLIGHT} & set(successor.names())


def test_a_file_system_whose_daemon_answered_in_order_goes_on_with_the_next_one(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(hold, protocol=MQ | ACK)
    driver = guest("fs", retry=0.01).start()
    laid = [driver.offer(f"request {n}".encode(), 9, queue=1) for n in range(3)]
    driver.kick(1)
    server.holds(3, 1)
    server.release(1)
    driver.collect(1, 1)
    server.kill()
    back_end(protocol=MQ | ACK)
    driver.collect(2, 1)
    assert [driver.written(one) for one in laid] == [b"REQUEST 0", b"REQUEST 1", b"REQUEST 2"]
    assert not driver.broken


def test_a_file_system_whose_daemon_answered_out_of_order_is_broken_until_reset(back_end: Make, guest: MakeGuest) -> None:
    server = back_end(hold, protocol=MQ | ACK)
    driver = guest("fs", retry=0.01).start()
    for n in range(3):
        driver.offer(f"request {n}".encode(), 9, queue=1)
    driver.kick(1)
    server.holds(3, 1)
    server.release(1, last=True)
    driver.collect(1, 1)
    server.kill()
    while not driver.broken:
        driver.line.wait()
    assert "queue 1: it is not known what the back end had under way" in driver.transport.needs_reset_reason
    back_end(protocol=MQ | ACK)
    assert driver.restart().ask(b"anew", 4, queue=1) == b"ANEW"


@given(data=st.data(), size=st.sampled_from([2, 4, 8]), start=st.sampled_from([0, 3, 100, 65530]))
def test_in_order_is_what_has_been_given_back_as_it_was_offered(
    memory: GuestMemory, data: st.DataObject, size: int, start: int
) -> None:
    ring = Ring(memory, size)
    ring.start_at(start)
    for slot in range(size):  # the laps before
        memory.store(ring.avail + 4 + 2 * slot, 2, slot)
        memory.store(ring.used + 4 + 8 * slot, 8, slot)
    queue = SplitQueue(memory, size, ring.desc, ring.avail, ring.used)
    free, under_way, ordered = list(range(size)), [], True
    used = start
    for _ in range(data.draw(st.integers(0, 40))):
        if free and (not under_way or data.draw(st.booleans())):
            head = free.pop(data.draw(st.integers(0, len(free) - 1)))
            ring.offer(head)
            under_way.append(head)
        else:
            at = data.draw(st.integers(0, len(under_way) - 1)) if data.draw(st.booleans()) else 0
            ordered &= at == 0
            head = under_way.pop(at)
            free.append(head)
            memory.store(ring.used + 4 + 8 * (used % size), 8, head)
            used = (used + 1) & 0xFFFF
            memory.store(ring.used + 2, 2, used)
    said = answered_in_order(queue, memory)
    between = [memory.load(ring.avail + 4 + 2 * (at % size), 2) for at in range(used, used + len(under_way))]
    assert said or not ordered
    if ordered:
        assert between == under_way
    if said:
        assert len(set(between)) == len(between)
