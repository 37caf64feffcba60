"""Images over vhost-user-blk: QEMU boots from one, and a front end that does everything wrong only ends itself."""

from __future__ import annotations

import errno
import gc
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from block_qcow2 import create_image, open_disk, open_image, unix_socket
from block_qcow2.errors import BlockError
from block_qcow2.qcow2.create import Options
from block_qcow2.vhost_user import protocol as p
from block_qcow2.vhost_user import server
from block_qcow2.vhost_user.virtqueue import Record

from .conftest import open_descriptors
from .qemu import is_clean
from .vhost_user_front import (
    AVAIL,
    DATA,
    DESC,
    DISCARD,
    EVENT,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    FLUSH,
    GET_ID,
    IN,
    OUT,
    SIZE,
    USED,
    USER,
    USUAL,
    WRITE_ZEROES,
    Front,
    Memory,
)

MiB = 1 << 20
DISK = 8 * MiB
OK, IOERR, UNSUPP = 0, 1, 2


class Server:
    """Serves an image on a thread."""

    def __init__(self, image: Path, where: Path, **options: Any) -> None:
        self.path = str(where)
        self.complaints: list[str] = []
        self._stop = os.eventfd(0)
        opened = {name: options.pop(name) for name in ("read_only", "aio", "discard") if name in options}
        self.disk: Any = open_disk(image, format="qcow2", **opened)
        self.disk.lock()
        ready = threading.Event()

        def run() -> None:
            with unix_socket.listening(self.path) as listener:
                ready.set()
                server.serve(self.disk, listener, stop=self._stop, report=self.complaints.append, **options)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert ready.wait(30)

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.disk.close()
        os.close(self._stop)
        assert not Path(self.path).exists()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create_image(path, DISK, options=Options(cluster_size=4096))
    return path


Serve = Callable[..., Server]


@pytest.fixture
def serve(image: Path, tmp_path: Path) -> Iterator[Serve]:
    """Serve the image; everything is given back at the end."""
    gc.collect()
    before = open_descriptors()
    servers: list[Server] = []

    def run(**options: Any) -> Server:
        servers.append(Server(image, tmp_path / f"s{len(servers)}", **options))
        return servers[-1]

    yield run
    for one in servers:
        one.close()
    left = open_descriptors().items() - before.items()
    assert not left, f"left open: {left}"
    is_clean(image)


@contextmanager
def front(one: Server, memory: Memory | None = None) -> Iterator[Front]:
    """Connect; the memory goes with the connection unless it was lent."""
    shared = memory or Memory()
    connected = Front(one.path, shared)
    try:
        yield connected
    finally:
        connected.close()
        if memory is None:
            shared.close()


def content(n: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(n)


def test_what_is_written_is_read_and_is_in_the_image(serve: Serve, image: Path) -> None:
    data = content(64 << 10)
    with front(serve(serial="twenty bytes of name")) as driver:
        driver.start()
        assert driver.request(OUT, 8, data) == (OK, b"")
        assert driver.request(FLUSH)[0] == OK
        assert driver.request(IN, 8, room=len(data)) == (OK, data)
        assert driver.request(IN, 9, room=512) == (OK, data[512:1024])
        assert driver.request(IN, 4096, room=4096) == (OK, bytes(4096))
        assert driver.request(GET_ID, room=20) == (OK, b"twenty bytes of name")
    with open_image(image, lock=False) as opened:
        assert opened.read(4096, len(data)) == data


@pytest.mark.parametrize("aio", ["off", "threads"])
def test_every_queue_is_served_and_finishes_out_of_order(serve: Serve, aio: str) -> None:
    with front(serve(queues=4, aio=aio)) as driver:
        driver.start(queues=4)
        assert driver.number(p.GET_QUEUE_NUM) == 4
        for q in range(4):
            assert driver.request(OUT, 1000 * q, content(8192, q), queue=q, at=DATA + q * 0x8000)[0] == OK
        for q in range(4):  # many at once: header, data and status of each apart
            for n in range(16):
                at = DATA + (q * 16 + n) * 0x1000
                driver.memory.write(at, struct.pack("<IIQ", IN, 0, 1000 * q + n))
                driver.chain(q, 3 * n, [(at, 16, False), (at + 16, 512, True), (at + 528, 1, True)])
                driver.offer(q, 3 * n, kick=False)
            os.write(driver.kicks[q], EVENT)
        for q in range(4):
            assert sorted(driver.used(q)[0] for _ in range(16)) == [3 * n for n in range(16)]
            for n in range(16):
                at = DATA + (q * 16 + n) * 0x1000
                assert driver.memory.read(at + 16, 513) == content(8192, q)[512 * n : 512 * n + 512] + b"\0"


def test_discard_and_zeroes(serve: Serve) -> None:
    with front(serve(discard=True)) as driver:
        driver.start(features=USUAL | 1 << 13 | 1 << 14)
        assert driver.request(OUT, 0, b"x" * 65536)[0] == OK
        assert driver.request(WRITE_ZEROES, data=struct.pack("<QII", 1, 2, 0))[0] == OK
        assert driver.request(DISCARD, data=struct.pack("<QII", 64, 64, 0))[0] == OK
        assert driver.request(IN, 0, room=65536) == (OK, b"x" * 512 + bytes(1024) + b"x" * (32768 - 1536) + bytes(32768))
        assert driver.request(WRITE_ZEROES, data=struct.pack("<QII", 0, 1, 8))[0] == UNSUPP
        assert driver.request(DISCARD, data=struct.pack("<QII", 0, 1, 1))[0] == UNSUPP
        assert driver.request(DISCARD, data=struct.pack("<QII", 0, 1, 0) * 2)[0] == IOERR
        assert driver.request(DISCARD, data=struct.pack("<QII", DISK // 512, 1, 0))[0] == IOERR
        assert driver.request(DISCARD, data=struct.pack("<QII", 1 << 60, 1, 0))[0] == IOERR


def test_requests_outside_the_disk_fail_alone(serve: Serve) -> None:
    with front(serve()) as driver:
        driver.start()
        for kind, sector, room in ((IN, DISK // 512, 512), (IN, 0, 511), (IN, (1 << 64) - 1, 512), (IN, DISK // 512 - 1, 1024)):
            assert driver.request(kind, sector, room=room)[0] == IOERR
        assert driver.request(OUT, DISK // 512, bytes(512))[0] == IOERR
        assert driver.request(99)[0] == UNSUPP
        assert driver.request(DISCARD, data=bytes(16))[0] == UNSUPP  # was not offered
        assert driver.request(IN, 0, room=512)[0] == OK


def test_a_read_only_image_is_not_written(serve: Serve, image: Path) -> None:
    before = image.read_bytes()
    with front(serve(read_only=True)) as driver:
        assert driver.number(p.GET_FEATURES) & 1 << 5
        driver.start()
        assert driver.request(OUT, 0, bytes(512))[0] == IOERR
        assert driver.request(FLUSH)[0] == OK
        assert driver.request(IN, 0, room=512)[0] == OK
    assert image.read_bytes() == before


def test_indirect_tables_and_buffers_across_regions(serve: Serve) -> None:
    data = content(16384)
    with front(serve()) as driver:
        driver.start()
        border = MiB - 8192
        assert driver.request(OUT, 0, data, at=border, indirect=DATA)[0] == OK
        assert driver.request(IN, 0, room=16384, at=border - 100, indirect=MiB - 24) == (OK, data)
        assert driver.request(IN, 0, room=16384, at=border) == (OK, data)


def test_without_event_index_and_without_protocol_features(serve: Serve) -> None:
    with front(serve()) as driver:
        driver.send(p.SET_OWNER)
        driver.features = 1 << 32 | 1 << 9
        driver.send(p.SET_FEATURES, p.U64.pack(driver.features))
        regions = driver.memory.regions()
        table = p.REGIONS.pack(2) + b"".join(p.REGION.pack(*r) for r in regions)
        driver.send(p.SET_MEM_TABLE, table, driver.memory.fds)
        kick, call = os.eventfd(0), os.eventfd(0)
        driver.events += [kick, call]
        driver.kicks[0], driver.calls[0], driver.next[0], driver.seen[0] = kick, call, 0, 0
        driver.send(p.SET_VRING_NUM, p.VRING_STATE.pack(0, SIZE))
        driver.send(p.SET_VRING_ADDR, p.VRING_ADDR.pack(0, 0, USER + DESC, USER + USED, USER + AVAIL, 0))
        driver.send(p.SET_VRING_KICK, p.U64.pack(0), [kick])
        driver.send(p.SET_VRING_CALL, p.U64.pack(0), [call])
        assert driver.request(OUT, 0, b"y" * 512)[0] == OK
        assert driver.request(IN, 0, room=512) == (OK, b"y" * 512)


def config_of(driver: Front, offset: int, size: int) -> bytes:
    data = driver.ask(p.GET_CONFIG, p.CONFIG.pack(offset, size, 0) + bytes(size))
    return data[p.CONFIG.size :]


def test_the_configuration_space(serve: Serve) -> None:
    with front(serve(queues=3, discard=True)) as driver:
        driver.negotiate()
        config = config_of(driver, 0, 60)
        assert struct.unpack_from("<Q", config)[0] == DISK // 512
        assert struct.unpack_from("<I", config, 20)[0] == 512
        assert (config[32], struct.unpack_from("<H", config, 34)[0]) == (1, 3)
        assert driver.acked(p.SET_CONFIG, p.CONFIG.pack(32, 1, 0) + b"\0")
        assert config_of(driver, 32, 1) == b"\0"
        assert not driver.acked(p.SET_CONFIG, p.CONFIG.pack(0, 8, 0) + bytes(8))
        assert not driver.acked(p.SET_CONFIG, p.CONFIG.pack(32, 1, 0) + b"\7")
        assert config_of(driver, 60, 196) == bytes(196)
        for offset, size in ((0, 0), (1, 256), (0xFFFFFFFF, 2)):
            assert driver.ask(p.GET_CONFIG, p.CONFIG.pack(offset, size, 0) + bytes(size)) == b""


@pytest.mark.parametrize("how", ["a driver that cannot flush", "write-through mode"])
def test_every_write_is_flushed_for(serve: Serve, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    one = serve()
    flushes: list[int] = []
    flush = one.disk.image.flush
    monkeypatch.setattr(one.disk.image, "flush", lambda: (flushes.append(1), flush())[1])
    with front(one) as driver:
        driver.start(features=USUAL & ~(1 << 9) if how.startswith("a driver") else USUAL)
        if how == "write-through mode":
            assert driver.request(OUT, 0, bytes(512))[0] == OK
            assert flushes == []
            assert driver.acked(p.SET_CONFIG, p.CONFIG.pack(32, 1, 0) + b"\0")
        assert driver.request(OUT, 0, b"1" * 512)[0] == OK
        assert flushes == [1]
        assert driver.request(IN, 0, room=512)[0] == OK
        assert flushes == [1]
        monkeypatch.undo()


def test_stopping_a_ring_says_where_it_goes_on(serve: Serve) -> None:
    with front(serve()) as driver:
        driver.start(base=65530)
        for i in range(10):  # over the wrap of the index
            assert driver.request(OUT, i, bytes(512))[0] == OK
        assert p.VRING_STATE.unpack(driver.ask(p.GET_VRING_BASE, p.VRING_STATE.pack(0, 0))) == (0, 4)
        driver.offer(0, 0, kick=False)
        driver.next[0] = 4
        driver.start_queue(0, 4)
        driver.next[0] = 5
        assert driver.used(0)[0] == 0  # what was offered meanwhile is served without a kick


def test_memory_comes_and_goes_by_slots(serve: Serve) -> None:
    with front(serve()) as driver:
        driver.negotiate()
        assert driver.number(p.GET_MAX_MEM_SLOTS) >= 8
        for region, fd in zip(driver.memory.regions(), driver.memory.fds, strict=True):
            assert driver.acked(p.ADD_MEM_REG, bytes(8) + p.REGION.pack(*region), [fd])
        assert not driver.acked(p.ADD_MEM_REG, bytes(8) + p.REGION.pack(*driver.memory.regions()[0]), driver.memory.fds[:1])
        driver.start_queue(0)
        assert driver.request(OUT, 0, b"z" * 512, at=MiB + 512)[0] == OK
        assert driver.acked(p.REM_MEM_REG, bytes(8) + p.REGION.pack(*driver.memory.regions()[1]))
        assert not driver.acked(p.REM_MEM_REG, bytes(8) + p.REGION.pack(*driver.memory.regions()[1]))
        assert driver.request(IN, 0, room=512) == (OK, b"z" * 512)
        driver.chain(0, 0, [(MiB + 512, 16, False), (DATA, 513, True)])  # memory that has gone
        driver.offer(0, 0)
        with pytest.raises(BlockError):
            _alive(driver)


def _alive(driver: Front) -> None:
    """Raises if ring 0 is not served any more."""
    driver.send(p.GET_VRING_BASE, p.VRING_STATE.pack(0, 0))
    _, data, _ = driver.receive()
    if p.VRING_STATE.unpack(data)[1] != driver.next[0]:
        raise BlockError("the ring was left behind")


def test_the_memory_table_may_change_while_rings_run(serve: Serve) -> None:
    with front(serve()) as driver:
        driver.start()
        for i in range(5):
            assert driver.request(OUT, i, content(512, i))[0] == OK
            driver.share_memory()
            assert driver.request(IN, i, room=512) == (OK, content(512, i))


def test_what_another_back_end_left_unfinished_is_done_first(serve: Serve) -> None:
    one = serve()
    memory = Memory()
    with front(one, memory) as driver:
        driver.start()
        assert driver.request(OUT, 0, b"first".ljust(512))[0] == OK
        driver.send(p.GET_INFLIGHT_FD, p.INFLIGHT.pack(0, 0, 1, SIZE))
        _, answer, [inflight] = driver.receive()
    total, offset, queues, size = p.INFLIGHT.unpack(answer)
    assert (offset, queues, size) == (0, 1, SIZE)
    # The other back end: took three requests, told the driver of one of them, and was killed before it wrote that down.
    for n, head in enumerate((10, 20, 30)):
        at = DATA + n * 0x1000
        memory.write(at, struct.pack("<IIQ", OUT, 0, n) + bytes([n + 1]) * 512 + b"\xee")
        for i, part in enumerate(((at, 16, F_NEXT), (at + 16, 512, F_NEXT), (at + 528, 1, F_WRITE))):
            memory.write(DESC + 16 * (head + i), struct.pack("<QIHH", *part, head + i + 1))
    region = bytearray(total)
    record = Record(memoryview(region), SIZE)
    assert record.recover(1) is None
    for head in (30, 10, 20):
        record.taken(head)
    record.given_back(10)
    memory.write(USED + 2, struct.pack("<H", 2))
    memory.write(AVAIL + 2, struct.pack("<H", 4))
    os.pwrite(inflight, region, 0)
    with front(one, memory) as driver:
        driver.negotiate()
        driver.share_memory()
        assert driver.acked(p.SET_INFLIGHT_FD, answer, [inflight])
        driver.start_queue(0, 2)
        driver.seen[0], driver.next[0] = 2, 4
        assert [driver.used(0)[0], driver.used(0)[0]] == [30, 20]  # in the order in which they came; 10 is done
        assert memory.read(DATA + 528, 1) == b"\xee"
        assert driver.request(IN, 0, room=2048) == (OK, b"first".ljust(512) + b"\2" * 512 + b"\3" * 512 + bytes(512))
        assert p.VRING_STATE.unpack(driver.ask(p.GET_VRING_BASE, p.VRING_STATE.pack(0, 0))) == (0, 5)
        assert not any(os.pread(inflight, total, 0)[16 :: Record.ENTRY][:SIZE])
    os.close(inflight)
    memory.close()


# --- front ends that do wrong ---


def spoil(driver: Front, how: str) -> None:
    """One broken ring each."""
    chain, describe = driver.chain, driver.describe
    good = [(DATA, 16, False), (DATA + 16, 513, True)]
    driver.memory.write(DATA, struct.pack("<IIQ", IN, 0, 0))
    if how == "a chain that loops":
        for i in range(2):
            describe(0, i, DATA, 512, F_NEXT, 1 - i)
    elif how == "a descriptor behind the table":
        describe(0, 0, DATA, 16, F_NEXT, SIZE)
    elif how == "a head behind the table":
        driver.memory.write(AVAIL + 4, struct.pack("<H", 5000))
        driver.memory.write(AVAIL + 2, struct.pack("<H", 1))
        os.write(driver.kicks[0], EVENT)
        return
    elif how == "an index that is too far ahead":
        driver.memory.write(AVAIL + 2, struct.pack("<H", SIZE + 1))
        os.write(driver.kicks[0], EVENT)
        return
    elif how == "a buffer that is nowhere":
        chain(0, 0, [good[0], (1 << 40, 513, True)])
    elif how == "a buffer that ends nowhere":
        chain(0, 0, [good[0], (2 * MiB - 512, 513, True)])
    elif how == "a buffer at the end of the address space":
        chain(0, 0, [good[0], ((1 << 64) - 100, 513, True)])
    elif how == "an empty buffer":
        chain(0, 0, [good[0], (DATA, 0, True)])
    elif how == "reading after writing":
        chain(0, 0, [good[1], good[0]])
    elif how == "no status":
        chain(0, 0, [good[0]])
    elif how == "a short header":
        chain(0, 0, [(DATA, 15, False), good[1]])
    elif how == "a table in a table":
        driver.memory.write(0x8000, struct.pack("<QIHH", 0x9000, 16, F_INDIRECT, 0))
        describe(0, 0, 0x8000, 16, F_INDIRECT)
    elif how == "an odd table":
        describe(0, 0, 0x8000, 17, F_INDIRECT)
    elif how == "an endless table":
        describe(0, 0, 0, 0xFFFFFFF0, F_INDIRECT)
    else:
        raise AssertionError(how)
    driver.offer(0, 0)


MISTAKES = """a chain that loops|a descriptor behind the table|a head behind the table|an index that is too far ahead
a buffer that is nowhere|a buffer that ends nowhere|a buffer at the end of the address space|an empty buffer|reading after writing
no status|a short header|a table in a table|an odd table|an endless table"""


@pytest.mark.parametrize("how", MISTAKES.replace("\n", "|").split("|"))
def test_a_broken_ring_is_left_alone_and_its_neighbour_served(serve: Serve, how: str) -> None:
    one = serve(queues=2)
    with front(one) as driver:
        driver.start(queues=2)
        err = os.eventfd(0)
        driver.events.append(err)
        assert driver.acked(p.SET_VRING_ERR, p.U64.pack(0), [err])
        spoil(driver, how)
        assert select.select([err], [], [], 30)[0]
        assert driver.request(OUT, 0, bytes(512), queue=1, at=DATA + 0x4000)[0] == OK
        assert len(one.complaints) == 1
        assert "ring 0" in one.complaints[0]
        # After a reset it works again.
        driver.ask(p.GET_VRING_BASE, p.VRING_STATE.pack(0, 0))
        driver.memory.write(AVAIL, bytes(4))
        driver.memory.write(USED, bytes(4))
        driver.start_queue(0)
        assert driver.request(IN, 0, room=512)[0] == OK


def odd_messages(memory: Memory) -> list[tuple[str, int, bytes, list[int]]]:
    null = os.open("/dev/null", os.O_RDWR)
    opath = os.open("/", os.O_PATH)
    fds = memory.fds
    table = p.REGIONS.pack(1) + p.REGION.pack(0, MiB, USER, 0)
    return [
        ("an unknown message", 99, b"", []),
        ("a short number", p.SET_FEATURES, b"123", []),
        ("unknown features", p.SET_FEATURES, p.U64.pack(1 << 50), []),
        ("unknown protocol features", p.SET_PROTOCOL_FEATURES, p.U64.pack(1 << 40), []),
        ("a table without descriptors", p.SET_MEM_TABLE, table, []),
        ("a table with too many descriptors", p.SET_MEM_TABLE, table, fds),
        ("a table of nine", p.SET_MEM_TABLE, p.REGIONS.pack(9) + bytes(9 * 32), fds),
        ("a table cut off", p.SET_MEM_TABLE, table[:20], fds[:1]),
        ("an empty table", p.SET_MEM_TABLE, b"", []),
        ("a device as memory", p.SET_MEM_TABLE, table, [null]),
        ("a folder as memory", p.SET_MEM_TABLE, table, [opath]),
        ("more memory than the file has", p.SET_MEM_TABLE, p.REGIONS.pack(1) + p.REGION.pack(0, 2 * MiB, USER, 0), fds[:1]),
        ("memory behind the file", p.SET_MEM_TABLE, p.REGIONS.pack(1) + p.REGION.pack(0, 4096, USER, 1 << 62), fds[:1]),
        ("memory that wraps", p.SET_MEM_TABLE, p.REGIONS.pack(1) + p.REGION.pack((1 << 64) - 4096, MiB, USER, 0), fds[:1]),
        ("no memory", p.SET_MEM_TABLE, p.REGIONS.pack(1) + p.REGION.pack(0, 0, USER, 0), fds[:1]),
        ("overlapping memory", p.SET_MEM_TABLE, p.REGIONS.pack(2) + p.REGION.pack(0, MiB, USER, 0) * 2, fds),
        ("a ring too many", p.SET_VRING_NUM, p.VRING_STATE.pack(7, 64), []),
        ("a ring of no size", p.SET_VRING_NUM, p.VRING_STATE.pack(0, 0), []),
        ("an odd size", p.SET_VRING_NUM, p.VRING_STATE.pack(0, 48), []),
        ("a large size", p.SET_VRING_NUM, p.VRING_STATE.pack(0, 65536), []),
        ("a wild base", p.SET_VRING_BASE, p.VRING_STATE.pack(0, 65536), []),
        ("logging", p.SET_VRING_ADDR, p.VRING_ADDR.pack(0, 1, 0, 0, 0, 0), []),
        ("short addresses", p.SET_VRING_ADDR, bytes(39), []),
        ("a kick without a descriptor", p.SET_VRING_KICK, p.U64.pack(0), []),
        ("a kick by polling", p.SET_VRING_KICK, p.U64.pack(1 << 8), []),
        ("two kicks", p.SET_VRING_KICK, p.U64.pack(0), fds),
        ("a folder as kick", p.SET_VRING_KICK, p.U64.pack(0), [opath]),
        ("a call of a ring too many", p.SET_VRING_CALL, p.U64.pack(255), [null]),
        ("a short configuration", p.SET_CONFIG, b"1234", []),
        ("a configuration that lies", p.SET_CONFIG, p.CONFIG.pack(32, 5, 0) + b"\1", []),
        ("an inflight buffer for too many", p.SET_INFLIGHT_FD, p.INFLIGHT.pack(1 << 20, 0, 9, 64), fds[:1]),
        ("an inflight buffer that is too small", p.SET_INFLIGHT_FD, p.INFLIGHT.pack(100, 0, 1, 64), fds[:1]),
        ("an inflight buffer behind its file", p.SET_INFLIGHT_FD, p.INFLIGHT.pack(4096, 1 << 40, 1, 64), fds[:1]),
        ("an inflight buffer without one", p.SET_INFLIGHT_FD, p.INFLIGHT.pack(4096, 0, 1, 64), []),
        ("a region without one", p.ADD_MEM_REG, bytes(8) + p.REGION.pack(0, MiB, USER, 0), []),
        ("a region that is not there", p.REM_MEM_REG, bytes(40), []),
    ]


@pytest.mark.parametrize("acknowledged", [True, False])
def test_wrong_messages_end_the_front_end_or_are_answered_so(serve: Serve, acknowledged: bool) -> None:
    one = serve()
    memory = Memory()
    odd = odd_messages(memory)
    for name, request, payload, fds in odd:
        with front(one, memory) as driver:
            driver.negotiate()
            if acknowledged:
                assert not driver.acked(request, payload, fds), name
                assert driver.number(p.GET_QUEUE_NUM) == 1, name
            else:
                driver.send(request, payload, fds)
                with pytest.raises((EOFError, ConnectionResetError)):
                    driver.receive()
        assert len(one.complaints) == 1, name
        one.complaints.clear()
    for fd in {fd for *_, fds in odd for fd in fds} - set(memory.fds):
        os.close(fd)
    with front(one, memory) as driver:
        driver.start()
        assert driver.request(IN, 0, room=512)[0] == OK
    memory.close()


def test_a_ring_without_memory_or_a_start_is_refused(serve: Serve) -> None:
    with front(serve()) as driver:
        driver.negotiate()
        kick = os.eventfd(0)
        driver.events.append(kick)
        for number, address in ((64, USER), (64, 0), (64, USER + 1)):
            assert driver.acked(p.SET_VRING_NUM, p.VRING_STATE.pack(0, number))
            assert driver.acked(p.SET_VRING_KICK, p.U64.pack(0), [kick])
            driver.acked(p.SET_VRING_ENABLE, p.VRING_STATE.pack(0, 1))
            assert not driver.acked(p.SET_VRING_ADDR, p.VRING_ADDR.pack(0, 0, address, address + 8192, address + 4096, 0))


def test_a_kick_that_ends_does_not_keep_the_server_busy(serve: Serve) -> None:
    with front(serve()) as driver:
        driver.negotiate()
        driver.share_memory()
        driver.start_queue(0)
        r, w = os.pipe()
        assert driver.acked(p.SET_VRING_KICK, p.U64.pack(0), [r])
        os.close(r)
        os.close(w)
        for _ in range(10):
            assert driver.number(p.GET_QUEUE_NUM) == 1


def test_the_next_front_end_waits_until_the_first_has_gone(serve: Serve) -> None:
    one = serve()
    with front(one) as first:
        first.start()
        with front(one) as second:
            second.send(p.GET_FEATURES)
            second.socket.settimeout(0.1)
            with pytest.raises(TimeoutError):
                second.receive()
            assert first.request(IN, 0, room=512)[0] == OK
            first.close()
            first.events.clear()
            second.socket.settimeout(30)
            assert second.receive()[0] == p.GET_FEATURES


def test_a_front_end_that_leaves_with_requests_in_flight(serve: Serve, image: Path) -> None:
    one = serve(aio="threads")
    for seed in range(5):
        with front(one) as driver:
            driver.start()
            for n in range(20):
                at = DATA + n * 0x8000
                driver.memory.write(at, struct.pack("<IIQ", OUT, 0, n * 32) + content(16384, seed))
                driver.chain(0, 3 * n, [(at, 16, False), (at + 16, 16384, False), (at + 20000, 1, True)])
                driver.offer(0, 3 * n, kick=n == 19)
    assert one.complaints == []


def test_a_system_without_descriptors_turns_front_ends_away_and_serves_the_next(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, blk = socket.socket.accept, server.Blk
    full = [True, True]

    def no_accept(sock: socket.socket) -> Any:
        if len(full) == 2 and sock.family == socket.AF_UNIX:
            full.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(sock)

    def no_channel(*args: Any, **options: Any) -> Any:
        if full:
            full.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        return blk(*args, **options)

    monkeypatch.setattr(socket.socket, "accept", no_accept)
    monkeypatch.setattr(server, "Blk", no_channel)
    one = serve()
    with socket.socket(socket.AF_UNIX) as early:
        early.connect(one.path)
        early.settimeout(30)
        assert early.recv(1) == b""
    with front(one) as driver:
        driver.start()
        assert driver.request(IN, 0, room=512) == (OK, bytes(512))
    assert len(one.complaints) == 1
    assert "turned away" in one.complaints[0]


def test_a_socket_that_is_in_use_is_not_taken_and_a_stale_one_is(serve: Serve, tmp_path: Path) -> None:
    one = serve()
    with pytest.raises(BlockError, match="in use"), unix_socket.listening(one.path):
        pass
    assert Path(one.path).is_socket()
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    with unix_socket.listening(str(stale)):
        assert stale.stat().st_mode & 0o777 == 0o600
    assert not stale.exists()


messages = st.lists(
    st.tuples(
        st.integers(0, 42),
        st.one_of(
            st.binary(max_size=60),
            st.tuples(st.integers(0, 3), st.integers(0, 70000)).map(lambda t: p.VRING_STATE.pack(*t)),
            st.sampled_from([0, 1, 1 << 8, 1 << 29, 1 << 30, USUAL]).map(p.U64.pack),
            st.sampled_from([0, USER, USER + 4096]).map(lambda u: p.VRING_ADDR.pack(0, 0, u, u + 8192, u + 4096, 0)),
            st.just(p.REGIONS.pack(1) + p.REGION.pack(0, MiB, USER, 0)),
        ),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=messages, cut=st.integers(0, 30))
def test_any_messages_leave_the_server_serving(
    shared: tuple[Server, Memory], messages: list[tuple[int, bytes, int, bool]], cut: int
) -> None:
    one, memory = shared
    with front(one, memory) as driver, suppress(OSError):
        for request, payload, fds, ack in messages:
            driver.send(request, payload, memory.fds[:fds], ack=ack)
        driver.socket.sendall(bytes(cut))
        driver.socket.shutdown(socket.SHUT_WR)
        while driver.socket.recv(65536):
            pass
    with front(one, memory) as driver:
        driver.negotiate()


@pytest.fixture
def shared(serve: Serve) -> Iterator[tuple[Server, Memory]]:
    memory = Memory()
    yield serve(), memory
    memory.close()


# --- the command, and QEMU ---


def boot_sector() -> bytes:
    """Real-mode code: copy sectors 1 to 8 to sector 100 with the BIOS, then end QEMU with 65, or with 67 if that failed."""
    packets = [struct.pack("<BBHHHQ", 16, 0, 8, 0x8000, 0, lba) for lba in (1, 100)]
    at = 0x7C00 + 0x40
    code = b"\x31\xc0\x8e\xd8"  # xor ax, ax; mov ds, ax
    code += b"\xbe" + struct.pack("<H", at) + b"\xb4\x42\xcd\x13"  # mov si, packet; mov ah, 0x42; int 0x13
    write = b"\xbe" + struct.pack("<H", at + 16) + b"\xb8\x00\x43\xcd\x13"  # mov si, packet; mov ax, 0x4300; int 0x13
    done = b"\xb0\x20\xeb\x02"  # mov al, 0x20; jmp out
    code += b"\x72" + bytes([len(write) + 2 + len(done)]) + write + b"\x72" + bytes([len(done)]) + done  # jc failed
    code += b"\xb0\x21\xba\xf4\x00\xee\xf4"  # failed: mov al, 0x21; out: mov dx, 0xf4; out dx, al; hlt
    return (code.ljust(0x40, b"\0") + b"".join(packets)).ljust(510, b"\0") + b"\x55\xaa"


def test_qemu_boots_from_it(tmp_path: Path) -> None:
    disk, where = tmp_path / "disk.qcow2", tmp_path / "s"
    create_image(disk, DISK)
    data = content(4096)
    with open_image(disk, read_only=False) as opened:
        opened.write(0, boot_sector() + data)
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "--type", "vhost-user-blk", "-k", str(where), str(disk)]
    machine = ["-machine", "q35,memory-backend=m", "-accel", "tcg", "-m", "64M", "-nodefaults", "-display", "none", "-no-reboot"]
    machine += ["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-device", "isa-debug-exit,iobase=0xf4"]
    machine += ["-chardev", f"socket,id=c,path={where}", "-device", "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=0"]
    with subprocess.Popen([*command, "--num-queues", "2"], stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            assert serving.stdout.readline() == f"Serving {disk} on {where}\n"
            done = subprocess.run(["qemu-system-x86_64", *machine], timeout=120, capture_output=True, text=True, check=False)
            assert done.returncode == 65, done.stderr
        finally:
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(30) == 0
    is_clean(disk)
    with open_image(disk) as opened:
        assert opened.read(100 * 512, 4096) == data


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--type", "vhost"], "expected nbd or vhost-user-blk"),
        (["--type", "vhost-user-blk"], "needs a socket"),
        (["--type", "vhost-user-blk", "-k", "s", "-p", "1"], "-p"),
        (["--type", "vhost-user-blk", "-k", "s", "--num-queues", "65"], "Invalid number of queues '65'"),
        (["--type", "vhost-user-blk", "-k", "s", "--serial", "x" * 21], "up to 20 bytes"),
        (["--num-queues", "2", "-k", "s"], "--num-queues does not go with --type nbd"),
    ],
)
def test_words_that_do_not_go_together(words: list[str], says: str, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from block_qcow2.img import main

    assert main(["serve", *words, str(image)]) == 1
    assert says in capsys.readouterr().err
