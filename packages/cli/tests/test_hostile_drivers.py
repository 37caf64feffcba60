"""A guest's driver that wants harm, against every device of the command line in a whole machine in test mode.

For each driver of the table: any register accesses and any rings, with addresses where RAM ends. Nothing that escapes, nothing
written or read beside guest memory, no more memory used than a bound, and a machine that answers its client and whose device
works again after a reset. What each device makes of its own requests is tested beside it, in virtio-devices.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from struct import pack
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from block_qcow2 import create_image
from deaf_peers import DeafBackEnd, deaf_network, deaf_vhost
from pystratovirt import log
from pystratovirt.cmdline.drivers import DRIVERS
from pystratovirt.devices import net
from running_vm import SLOT, STATUS, RunningVm
from virtio_devices.net.backend import Backend
from virtio_devices.net.stream import StreamBackend
from virtio_devices.vhost_kernel import VhostKernel
from virtio_devices.vhost_user import session

MiB = 1 << 20
RAM = 128 * MiB  # of a RunningVm
QUEUES = 8  # that are driven; no device here has more without being asked
ENTRIES = 16
SHARED = "microvm,mem-share=on"
RINGS, RINGS_SIZE = 0x1_0000, 0x1000  # where the rings are that make sense: descriptors, available at 0x400, used at 0x800
MEMORY_MAX = 48 * MiB  # that the monitor may use for itself meanwhile: far less than what a driver can name in its rings
PATTERN = b"not the guest's!"  # 16 bytes

SEL, NUM, READY, NOTIFY = 0x030, 0x038, 0x044, 0x050
DESC, AVAIL, USED = 0x080, 0x090, 0x0A0


COUNT = 0x8000  # where the flood below counts its rounds
# A vCPU that offers a request as soon as one is done, and rings all the time. A process, as guests hold no lock of Python's.
FLOOD = f"""
import mmap, os, sys
from struct import pack_into, unpack_from
memory, *bells = map(int, sys.argv[1:])
ram = mmap.mmap(memory, 0x10_0000)
for count in range(1, 1 << 32):
    pack_into("<I", ram, {COUNT}, count)
    for queue, bell in enumerate(bells):
        base = {RINGS} + {RINGS_SIZE} * queue
        (offered,), (done,) = unpack_from("<H", ram, base + 0x402), unpack_from("<H", ram, base + 0x802)
        if (offered - done) % 65536 < {ENTRIES}:
            pack_into("<H", ram, base + 0x402, (offered + 1) % 65536)
        os.write(bell, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
"""


class Specimen(NamedTuple):
    """A command line that has the driver's device, in `slot`. {} is a folder."""

    slot: int
    options: str
    machine: str = "microvm"


_SERIAL = Specimen(
    6,
    "-chardev socket,id=c0,path={}/c0,server,nowait -chardev file,id=c1,path={}/c1 -device virtio-serial-device,id=s"
    " -device virtconsole,chardev=c0,id=p0 -device virtserialport,chardev=c1,id=p1",
)
SPECIMENS = {
    "virtio-blk-device, not there": Specimen(1, ""),  # the empty slots that clients fill
    "virtio-net-device, not there": Specimen(5, ""),
    "virtio-blk-device": Specimen(
        0,
        "-object iothread,id=io -drive file={}/disk,id=d,format=qcow2,direct=off,discard=unmap"
        " -device virtio-blk-device,drive=d,id=b,num-queues=2,iothread=io",
    ),
    "virtio-net-device": Specimen(4, "-netdev tap,id=n,ifname=t -device virtio-net-device,netdev=n,id=c"),
    # The card with a back end that serves the queues: the control queue is ours all the same.
    "virtio-net-device, vhost=on": Specimen(6, "-netdev tap,id=n,ifname=t,vhost=on -device virtio-net-device,netdev=n,id=c"),
    "virtio-net-device, vhost-user": Specimen(
        6,
        "-chardev socket,id=u,path={}/peer -netdev vhost-user,id=n,chardev=u,queues=2"
        " -device virtio-net-device,netdev=n,id=c,mq=on",
        SHARED,
    ),
    "virtio-serial-device": _SERIAL,
    "virtconsole": _SERIAL,
    "virtserialport": _SERIAL,
    "virtio-rng-device": Specimen(6, "-object rng-random,id=r,filename=/dev/zero -device virtio-rng-device,rng=r,id=e"),
    "virtio-balloon-device": Specimen(
        6, "-device virtio-balloon-device,id=b,deflate-on-oom=on,free-page-reporting=on,guest-stats-polling-interval=1"
    ),
    "vhost-vsock-device": Specimen(6, "-device vhost-vsock-device,id=v,guest-cid=3"),
    "virtio-vsock-device": Specimen(6, "-device virtio-vsock-device,id=v,guest-cid=3,path={}/v"),
    "vhost-user-blk-device": Specimen(
        6, "-chardev socket,id=u,path={}/peer -device vhost-user-blk-device,id=d,chardev=u", SHARED
    ),
    "vhost-user-fs-device": Specimen(
        6, "-chardev socket,id=u,path={}/peer -device vhost-user-fs-device,id=f,chardev=u,tag=t", SHARED
    ),
}


class Victim(RunningVm):
    """A machine with one device to harm. `complaints` has what went wrong within."""

    def __init__(self, folder: Path, specimen: Specimen) -> None:
        self.slot = specimen.slot
        self.offered = dict.fromkeys(range(QUEUES), 0)  # available index of each queue
        super().__init__(folder, *specimen.options.replace("{}", str(folder)).split(), machine=specimen.machine)

    def write(self, offset: int, size: int, value: int) -> None:
        self.access.write(SLOT + 0x200 * self.slot + offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def read_register(self, offset: int, size: int) -> None:
        self.access.read(SLOT + 0x200 * self.slot + offset, size)

    def set(self, offset: int, value: int) -> None:
        self.write(offset, 4, value)

    def place(self, queue: int, size: int, *rings: int) -> None:
        """Say where a queue's three rings are."""
        self.set(SEL, queue)
        self.set(READY, 0)
        self.set(NUM, size)
        for offset, address in zip((DESC, AVAIL, USED), rings, strict=True):
            self.set(offset, address)
            self.set(offset + 4, address >> 32)
        self.set(READY, 1)

    def begin(self, refused: int) -> None:
        """Start a driver that takes everything that is offered but `refused`."""
        for status in (0, 1, 3):
            self.set(STATUS, status)
        for sel in (0, 1):
            self.set(0x014, sel)
            offered = self.register(self.slot, 0x010)
            self.set(0x024, sel)
            self.set(0x020, offered & ~(refused >> 32 * sel) | sel)  # VERSION_1 in any case
        self.set(STATUS, 11)
        for queue in range(QUEUES):
            base = RINGS + RINGS_SIZE * queue
            self.access.write(base, bytes(RINGS_SIZE))
            self.place(queue, ENTRIES, base, base + 0x400, base + 0x800)
            self.offered[queue] = 0
        self.set(STATUS, 15)

    def recover(self) -> None:
        """Reset the device, and be a driver that does everything right."""
        self.begin(0)
        assert self.register(self.slot, STATUS) == 15
        self.set(STATUS, 0)
        assert self.register(self.slot, STATUS) == 0

    def offer(self, queue: int, table: list[tuple[int, int, int, int]], heads: list[int], jump: int) -> None:
        """Write descriptors, offer some, and say that there are `jump` more than that."""
        base = RINGS + RINGS_SIZE * queue
        self.access.write(base, b"".join(pack("<QIHH", *descriptor) for descriptor in table))
        for head in heads:
            self.access.write(base + 0x404 + 2 * (self.offered[queue] % ENTRIES), pack("<H", head))
            self.offered[queue] += 1
        self.access.write(base + 0x402, pack("<H", (self.offered[queue] + jump) & 0xFFFF))
        self.set(NOTIFY, queue)

    def poke(self, address: int, data: bytes) -> None:
        """Write what a request may say, in RAM."""
        self.access.write(address % (RAM - 0x1000), data)

    def move_time(self, seconds: int) -> None:
        self.access.clock_step(seconds * 1_000_000_000)


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Victim]]:
    """Make the machine for a driver; at its end there were no errors in the log and no unexpected event."""
    complaints: list[str] = []
    ends: list[socket.socket] = []

    def open_netdev(netdev: Any, take: Any = None) -> Backend:
        if netdev.vhost:
            return deaf_network(netdev.id)
        ours, theirs = socket.socketpair()
        ends.append(theirs)
        return StreamBackend(netdev.id, ours)

    monkeypatch.setattr(net, "open_netdev", open_netdev)
    monkeypatch.setattr(VhostKernel, "open", deaf_vhost)
    monkeypatch.setattr(log, "error", complaints.append)
    monkeypatch.setattr(session, "SETTLE_LIMIT", 0.01)  # a deaf back end never answers, so waiting longer is no use
    create_image(str(tmp_path / "disk"), format="qcow2", size=4 * MiB)
    with ExitStack() as stack:

        def make(driver: str, *, shared: bool = False) -> Victim:
            if "peer" in SPECIMENS[driver].options:
                stack.callback(DeafBackEnd(str(tmp_path / "peer")).close)
            specimen = SPECIMENS[driver]
            return stack.enter_context(Victim(tmp_path, specimen._replace(machine=SHARED) if shared else specimen))

        yield make
    for end in ends:
        end.close()
    assert complaints == []


EDGES = st.sampled_from([0, 0x1000, RINGS, RAM, RAM + 4096, SLOT, 1 << 32, 1 << 63, 1 << 64])
ADDRESSES = st.one_of(
    st.builds(lambda edge, by: (edge + by) % (1 << 64), EDGES, st.sampled_from([-4096, -512, -16, -4, -1, 0, 1, 2, 16, 4096])),
    st.integers(0, RAM),
    st.integers(0, (1 << 64) - 1),
)
LENGTHS = st.sampled_from([0, 1, 4, 12, 16, 44, 512, 4095, 4096, 65536, RAM, RAM + 1, (1 << 32) - 1])
INDICES = st.one_of(st.integers(0, ENTRIES), st.integers(0, 0xFFFF))
QUEUE = st.integers(0, QUEUES - 1)
VALUES = st.one_of(st.sampled_from([0, 1, 2, 3, 8, 11, 15, 0x8000_0000, 0xFFFF_FFFF]), st.integers(0, (1 << 64) - 1))
SIZES = st.sampled_from([1, 2, 4, 8])
FLAGS = st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF))  # NEXT, WRITE, INDIRECT in every mixture
TABLES = st.lists(st.tuples(ADDRESSES, LENGTHS, FLAGS, INDICES), min_size=1, max_size=ENTRIES)

ACTIONS = st.one_of(
    st.tuples(st.just("begin"), st.sampled_from([0, 0, 1 << 28, 1 << 29, (1 << 32) - 1])),
    st.tuples(st.just("offer"), QUEUE, TABLES, st.lists(INDICES, max_size=ENTRIES), st.sampled_from([0, 0, 0, 1, 17, 0x8000])),
    st.tuples(st.just("offer"), QUEUE, TABLES, st.just([0]), st.just(0)),
    st.tuples(st.just("poke"), ADDRESSES, st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("place"), QUEUE, st.sampled_from([0, 1, 3, ENTRIES, 256, 32768, 65536]), ADDRESSES, ADDRESSES, ADDRESSES),
    st.tuples(st.just("write"), st.integers(0, 0x1FF), SIZES, VALUES),
    st.tuples(st.just("read_register"), st.integers(0, 0x1FF), SIZES),
    st.tuples(st.just("move_time"), st.integers(0, 10)),
)


class Surroundings:
    """What lies beside guest memory in its mapping: filled with a pattern, which must stay, and must stay there."""

    def __init__(self, vm: Victim) -> None:
        memory = vm.vm.machine.memory
        self._whole = memoryview(memory.view(0, 1).obj)  # longer than RAM, unless it is shared (see `vmm_core.guestmem`)
        spare = len(self._whole) - RAM
        # RAM is somewhere in it: what is found by a mark at its begin.
        memory.write(0, b"here RAM begins")
        start = next(at for at in range(0, spare + 1, 4096) if self._whole[at : at + 15] == b"here RAM begins")
        memory.write(0, bytes(15))
        self._parts = [self._whole[:start], self._whole[start + RAM :]]
        for part in self._parts:
            assert len(part) % len(PATTERN) == 0
            part[:] = PATTERN * (len(part) // len(PATTERN))

    def check(self, vm: Victim) -> None:
        for part in self._parts:
            assert part == PATTERN * (len(part) // len(PATTERN)), "written beside guest memory"
        found = PATTERN[8:] + PATTERN[:8]  # in any copy of 24 bytes or more, wherever it begins in the pattern or ends
        for half in (PATTERN, found):
            assert half not in vm.vm.machine.memory.read(0, RAM), "read from beside guest memory"
            for path in (vm.folder / "disk", vm.folder / "c1"):
                assert not path.exists() or half not in path.read_bytes(), f"read from beside guest memory into {path.name}"

    def close(self) -> None:
        for part in (*self._parts, self._whole):
            part.release()


def check_actions(vm: Victim, actions: list[tuple[Any, ...]]) -> None:
    """Do what a driver can do. Afterwards the device is as good as new."""
    for name, *arguments in actions:
        getattr(vm, name)(*arguments)
    assert vm.run("query-status")["status"] == "running"
    vm.recover()


def kept() -> int:
    """Bytes that Python holds, without what Hypothesis remembers of its examples: tens of MB after thousands."""
    elsewhere = tracemalloc.Filter(inclusive=False, filename_pattern="*/hypothesis/*")
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([elsewhere]).traces)


def attack(vm: Victim, examples: int, **more: Any) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **more)
    @given(st.lists(ACTIONS, max_size=12))
    def attempt(actions: list[tuple[Any, ...]]) -> None:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        check_actions(vm, [("begin", 0), *actions])
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < MEMORY_MAX, "one driver has the monitor use a lot of memory"

    surroundings = Surroundings(vm)
    tracemalloc.start(1)
    try:
        before = kept()
        attempt()
        assert kept() - before < MEMORY_MAX, "what drivers had the monitor use is not given back"
    finally:
        tracemalloc.stop()
    surroundings.check(vm)
    surroundings.close()


def test_there_is_a_specimen_of_every_driver() -> None:
    assert {name.partition(",")[0] for name in SPECIMENS} == set(DRIVERS)


@pytest.mark.parametrize("driver", sorted(SPECIMENS))
def test_nothing_that_a_driver_does_escapes_its_device(victim: Callable[..., Victim], driver: str) -> None:
    attack(victim(driver), 25, derandomize=True, phases=[Phase.generate])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("driver", sorted(SPECIMENS))
def test_nothing_that_a_driver_does_for_long_escapes_its_device(victim: Callable[..., Victim], driver: str) -> None:
    attack(victim(driver), 3000)


@pytest.mark.parametrize("driver", sorted(SPECIMENS))
def test_doorbells_without_end_do_not_keep_clients_waiting(victim: Callable[..., Victim], driver: str) -> None:
    vm = victim(driver, shared=True)
    vm.begin(0)
    bells = vm.vm.transports[vm.slot].notify_fds[:QUEUES]
    for queue in range(len(bells)):
        vm.offer(queue, [(RINGS, 16, 2, 0)], [0] * ENTRIES, 0)
    fds = (vm.vm.machine.memory.fd, *bells)
    with subprocess.Popen([sys.executable, "-c", FLOOD, *map(str, fds)], pass_fds=fds) as flood:
        try:
            asked = 0
            while asked < 20 or int.from_bytes(vm.access.read(COUNT, 4), "little") < 1000:
                assert vm.run("query-status")["status"] == "running"
                asked += 1
                assert flood.poll() is None
        finally:
            flood.kill()
    vm.recover()
