"""Keys of -drive, -netdev, -chardev and -device that a guest or the host can see, each on a whole machine in test mode.

What a key means to a device is tested beside the device, and what the command line makes of it in test_cmdline: here, that the
one reaches the other. Keys that name a thread are in test_vm_iothreads, those of the balloon in test_vm_balloon.
"""

from __future__ import annotations

import os
import socket
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from struct import pack, unpack
from typing import Any

import pytest

import block_qcow2
from block_qcow2 import create_image
from deaf_peers import DeafBackEnd
from free_port import reserved_port
from guest_driver import DISCARD, FLUSH, GET_ID, IN, NUM_MAX, OUT, SEL, WRITE_ZEROES, Driver, streams, until
from pystratovirt.cmdline.backends import Drive
from running_vm import CONFIG, LIMIT, RunningVm
from virtio_devices.net.stream import StreamBackend

MiB = 1 << 20
DISK, CARD, OTHER = 0, 4, 6  # the first slots for disks, for network cards and for everything else
F_RO, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 5, 1 << 12, 1 << 13, 1 << 14  # virtio 1.2, section 5.2.3
F_NET_MQ = 1 << 22  # section 5.1.3
OK, UNSUPPORTED = b"\0", b"\2"  # section 5.2.6
SECOND = 1_000_000_000  # ns

Make = Callable[..., RunningVm]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make a machine of these words. {} is the test's folder."""
    with ExitStack() as stack:

        def make(words: str, machine: str = "microvm") -> RunningVm:
            return stack.enter_context(RunningVm(tmp_path, *words.replace("{}", str(tmp_path)).split(), machine=machine))

        yield make


def offered(vm: RunningVm, slot: int) -> int:
    features = 0
    for half in (0, 1):
        vm.register(slot, 0x014, half)
        features |= vm.register(slot, 0x010) << 32 * half
    return features


def queue_sizes(vm: RunningVm, slot: int) -> list[int]:
    """The largest size of each queue that there is."""
    sizes = []
    for index in range(64):
        vm.register(slot, SEL, index)
        sizes.append(vm.register(slot, NUM_MAX))
    assert 0 not in sizes[: 64 - sizes.count(0)], "queues come one after the other"
    return [size for size in sizes if size]


def config(vm: RunningVm, slot: int, offset: int, size: int) -> bytes:
    words = b"".join(vm.register(slot, CONFIG + at).to_bytes(4, "little") for at in range(0, offset + size, 4))
    return words[offset : offset + size]


class TestDisks:
    @pytest.fixture(autouse=True)
    def image(self, tmp_path: Path) -> Path:
        """4 MiB, none of which is a hole."""
        path = tmp_path / "disk"
        path.write_bytes(b"\x5a" * (4 * MiB))
        return path

    def test_a_serial_number_and_queues_of_a_size(self, make: Make) -> None:
        vm = make(
            "-drive file={}/disk,id=d,direct=off -device virtio-blk-device,drive=d,id=b,serial=A1,num-queues=3,queue-size=64"
        )
        assert queue_sizes(vm, DISK) == [64, 64, 64]
        assert config(vm, DISK, 34, 2) == b"\3\0"
        assert offered(vm, DISK) & F_MQ
        assert Driver(vm, DISK, 3).disk(GET_ID, room=20) == b"A1".ljust(20, b"\0") + OK

    def test_a_disk_that_can_only_be_read(self, make: Make, image: Path) -> None:
        vm = make("-drive file={}/disk,id=d,direct=off,readonly=on,discard=unmap -device virtio-blk-device,drive=d,id=b")
        assert offered(vm, DISK) & (F_RO | F_WRITE_ZEROES) == F_RO
        disk = Driver(vm, DISK, 1)
        assert disk.disk(IN, room=512) == b"\x5a" * 512 + OK
        assert disk.disk(OUT, bytes(512)) != OK
        assert image.read_bytes() == b"\x5a" * (4 * MiB)

    @pytest.mark.parametrize(("word", "frees"), [("unmap", True), ("ignore", False)])
    def test_what_is_discarded_is_free_where_the_drive_says_so(self, make: Make, image: Path, word: str, frees: bool) -> None:
        vm = make(f"-drive file={{}}/disk,id=d,direct=off,discard={word} -device virtio-blk-device,drive=d,id=b")
        assert bool(offered(vm, DISK) & F_DISCARD) is frees
        before = image.stat().st_blocks
        status = Driver(vm, DISK, 1).disk(DISCARD, pack("<QII", 0, 2048, 0))
        assert status == (OK if frees else UNSUPPORTED)
        assert before - image.stat().st_blocks == (2048 if frees else 0)

    @pytest.mark.parametrize(
        ("words", "frees"),
        [("", False), ("detect-zeroes=on,discard=unmap", False), ("detect-zeroes=unmap,discard=unmap", True)],
    )
    def test_written_zeroes_are_a_hole_where_the_drive_looks_for_them(
        self, make: Make, image: Path, words: str, frees: bool
    ) -> None:
        vm = make(f"-drive file={{}}/disk,id=d,direct=off{words and ','}{words} -device virtio-blk-device,drive=d,id=b")
        before = image.stat().st_blocks
        assert Driver(vm, DISK, 1).disk(OUT, bytes(64 << 10)) == OK
        assert before - image.stat().st_blocks == (128 if frees else 0)
        assert image.read_bytes() == bytes(64 << 10) + b"\x5a" * (4 * MiB - (64 << 10))

    def test_zeroes_are_written_by_a_request_of_their_own(self, make: Make, image: Path) -> None:
        vm = make("-drive file={}/disk,id=d,direct=off -device virtio-blk-device,drive=d,id=b")
        assert offered(vm, DISK) & F_WRITE_ZEROES
        assert Driver(vm, DISK, 1).disk(WRITE_ZEROES, pack("<QII", 0, 8, 0)) == OK
        assert image.read_bytes()[:8192] == bytes(4096) + b"\x5a" * 4096

    def test_what_it_has_done_is_to_be_had(self, make: Make) -> None:
        vm = make("-drive file={}/disk,id=d,direct=off -device virtio-blk-device,drive=d,id=b")
        disk = Driver(vm, DISK, 1)
        for _ in range(3):
            assert disk.disk(IN, room=1024)[-1:] == OK
        assert disk.disk(OUT, bytes(512)) == OK
        assert disk.disk(FLUSH) == OK
        (counted,) = vm.run("query-blockstats")
        stats = counted["stats"]
        assert (stats["rd_operations"], stats["rd_bytes"], stats["wr_operations"], stats["wr_bytes"]) == (3, 3072, 1, 512)
        assert stats["flush_operations"] == 1
        text = vm.run("human-monitor-command", command_line="info stats")
        assert "reads=3,read_bytes=3072,writes=1,written_bytes=512,flushes=1," in text

    @pytest.mark.parametrize(("limit", "passes"), [("iops-total=10", 1), ("bps-total=20480", 4)])
    def test_a_limit_holds_requests_until_their_time(self, make: Make, limit: str, passes: int) -> None:
        """A tenth of a second's worth at once, and one more, which the bucket then owes; the others each in their turn."""
        vm = make(f"-drive file={{}}/disk,id=d,direct=off,throttling.{limit} -device virtio-blk-device,drive=d,id=b")
        disk = Driver(vm, DISK, 1)
        for _ in range(12):
            disk.disk(IN, room=512, waits=False)
        until(lambda: disk.used(0) >= passes)
        now = disk.used(0)
        assert passes <= now <= passes + 1
        vm.access.clock_step(SECOND // 20)
        assert disk.used(0) < 12, "not all at once"
        for _ in range(40):
            vm.access.clock_step(SECOND // 20)
        until(lambda: disk.used(0) == 12)

    def test_every_key_reaches_the_image(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the engines make of them cannot be seen from here."""
        opened: list[tuple[str, dict[str, Any]]] = []
        original = block_qcow2.open_disk

        def open_disk(path: str, **more: Any) -> Any:
            opened.append((path, more))
            return original(path, **{**more, "direct": False, "aio": "threads"})  # as not every file system has others

        monkeypatch.setattr(block_qcow2, "open_disk", open_disk)
        create_image(str(tmp_path / "q"), format="qcow2", size=MiB)
        make(
            "-drive file={}/q,id=q,format=qcow2,direct=on,aio=io_uring,discard=on,detect-zeroes=unmap,external-files=allow,"
            "l2-cache-size=1M,refcount-cache-size=2M -drive file={}/disk,id=d,readonly=on"
        )
        both = dict(opened)
        assert both[f"{tmp_path}/q"] == {
            "format": "qcow2",
            "read_only": False,
            "direct": True,
            "aio": "io_uring",
            "discard": True,
            "detect_zeroes": "unmap",
            "allow": True,
            "l2_cache_bytes": MiB,
            "refcount_cache_bytes": 2 * MiB,
            "passphrase": None,
        }
        assert both[f"{tmp_path}/disk"]["read_only"] is True
        assert (both[f"{tmp_path}/disk"]["direct"], both[f"{tmp_path}/disk"]["aio"]) == (True, "native")


class Pairs(StreamBackend):
    """A stream that says it has several pairs of queues."""

    pairs = 3


class TestCards:
    @pytest.fixture(autouse=True)
    def network(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with streams(monkeypatch, Pairs):
            yield

    def test_an_address_and_queues_of_a_size(self, make: Make) -> None:
        vm = make("-netdev tap,id=n,ifname=t -device virtio-net-device,netdev=n,id=c,mac=52:54:00:aa:bb:cc,queue-size=1024")
        assert config(vm, CARD, 0, 6).hex(":") == "52:54:00:aa:bb:cc"
        assert queue_sizes(vm, CARD) == [1024] * 3
        assert not offered(vm, CARD) & F_NET_MQ

    def test_many_queues_where_they_are_asked_for(self, make: Make) -> None:
        vm = make("-netdev tap,id=n,ifname=t,queues=3 -device virtio-net-device,netdev=n,id=c,mq=on")
        assert offered(vm, CARD) & F_NET_MQ
        assert config(vm, CARD, 8, 2) == b"\3\0"
        assert queue_sizes(vm, CARD) == [256] * 7


class TestEntropy:
    def test_what_a_period_allows_is_what_a_guest_gets(self, make: Make) -> None:
        vm = make("-object rng-random,id=r,filename=/dev/zero -device virtio-rng-device,rng=r,id=e,max-bytes=200,period=2000")
        entropy = Driver(vm, OTHER, 1)  # 100 bytes a second
        assert "requests=0,bytes=0,delays=0" in vm.run("human-monitor-command", command_line="info stats")
        for _ in range(6):
            entropy.request(0, b"", 100, waits=False)
        until(lambda: entropy.used(0) >= 1)
        assert entropy.used(0) <= 2
        for expected in (3, 4):
            vm.access.clock_step(SECOND)
            until(lambda expected=expected: entropy.used(0) >= expected - 1)
            assert entropy.used(0) <= expected
        done = entropy.used(0)
        assert f"requests={done},bytes={100 * done}," in vm.run("human-monitor-command", command_line="info stats")


PORT_ADD, PORT_NAME, CONSOLE_PORT, READY, PORT_READY, PORT_OPEN = 1, 7, 4, 0, 3, 6  # virtio 1.2, section 5.3.6


class Terminal:
    """A driver of a console with ports, by their numbers."""

    def __init__(self, vm: RunningVm, ports: int) -> None:
        self._driver = Driver(vm, OTHER, 2 * ports + 2)

    def tell(self, port: int, event: int, value: int) -> None:
        self._driver.request(3, pack("<IHH", port, event, value))

    def hear(self) -> tuple[int, int, bytes]:
        """The next message: port, event and what follows the value."""
        data = self._driver.request(2, b"", 64)
        port, event, _ = unpack("<IHH", data[:8])
        return port, event, data[8:].rstrip(b"\0")

    def say(self, port: int, text: bytes) -> None:
        self._driver.request(1 if port == 0 else 2 * port + 3, text)

    def listen(self, port: int, count: int) -> bytes:
        return self._driver.request(0 if port == 0 else 2 * port + 2, b"", count)


class TestConsoles:
    def test_ports_have_the_numbers_and_names_that_were_asked_for(self, make: Make) -> None:
        vm = make(
            "-chardev file,id=a,path={}/a -chardev file,id=b,path={}/b -device virtio-serial-device,id=s,max_ports=5"
            " -device virtserialport,chardev=a,id=one,nr=3,name=agent.0 -device virtconsole,chardev=b,id=two"
        )
        assert config(vm, OTHER, 4, 4) == (5).to_bytes(4, "little")
        assert queue_sizes(vm, OTHER) == [256] * 12
        terminal = Terminal(vm, 5)
        terminal.tell(0, READY, 1)
        assert sorted(terminal.hear()[:2] for _ in range(2)) == [(0, PORT_ADD), (3, PORT_ADD)]
        for port in (0, 3):
            terminal.tell(port, PORT_READY, 1)
        said = []
        while not {(0, PORT_NAME), (3, PORT_NAME)} <= {(port, event) for port, event, _ in said}:
            said.append(terminal.hear())
        assert {(port, text) for port, event, text in said if event == PORT_NAME} == {(0, b"two"), (3, b"agent.0")}
        assert [port for port, event, _ in said if event == CONSOLE_PORT] == [0]

    @pytest.fixture
    def port(self) -> Iterator[int]:
        with reserved_port() as port:
            yield port

    @pytest.mark.parametrize("kind", ["file", "pty", "unix server", "tcp server", "unix client", "tcp client"])
    def test_what_is_said_on_either_side_is_heard_on_the_other(self, make: Make, tmp_path: Path, port: int, kind: str) -> None:
        tcp = f"socket,id=c,host=127.0.0.1,port={port}"
        chardev = {
            "file": "file,id=c,path={}/out",
            "pty": "pty,id=c",
            "unix server": "socket,id=c,path={}/peer,server,nowait",
            "tcp server": f"{tcp},server,nowait",
            "unix client": "socket,id=c,path={}/peer,reconnect=1",
            "tcp client": f"{tcp},reconnect=1",
        }[kind]
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX if "unix" in kind else socket.AF_INET))
            address: Any = f"{tmp_path}/peer" if "unix" in kind else ("127.0.0.1", port)
            if "client" in kind:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
                listener.settimeout(LIMIT)
            vm = make(f"-chardev {chardev} -device virtio-serial-device,id=s -device virtconsole,chardev=c,id=p")
            terminal = Terminal(vm, 1)
            for event in (READY, PORT_READY, PORT_OPEN):
                terminal.tell(0, event, 1)
            if kind == "file":
                terminal.say(0, b"from the guest")
                until(lambda: (tmp_path / "out").read_bytes() == b"from the guest")
                return
            for turn in (b"first", b"second"):  # the other side comes a second time
                peer = self.reach(stack, vm, kind, listener, address)
                peer.write(b"host " + turn)
                assert terminal.listen(0, 5 + len(turn)) == b"host " + turn
                terminal.say(0, b"guest " + turn)
                assert peer.read(6 + len(turn)) == b"guest " + turn
                peer.close()

    def reach(self, stack: ExitStack, vm: RunningVm, kind: str, listener: socket.socket, address: Any) -> Any:
        if kind == "pty":
            (listed,) = vm.run("query-chardev")
            path = listed["filename"].removeprefix("pty:")
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(fd)
            return stack.enter_context(os.fdopen(fd, "r+b", buffering=0))
        if "client" in kind:
            sock = listener.accept()[0]
        else:
            sock = socket.socket(listener.family)
            sock.connect(address)
        sock.settimeout(LIMIT)
        with sock:
            return stack.enter_context(sock.makefile("rwb", buffering=0))


@pytest.mark.parametrize(
    "words",
    [
        "-chardev file,id=c,path={}/out -serial chardev:c",
        "-serial chardev:c -chardev file,id=c,path={}/out",
        "-serial file,path={}/out",
    ],
)
def test_a_serial_port_leads_where_it_is_told_to_whatever_the_order(make: Make, tmp_path: Path, words: str) -> None:
    vm = make(words)
    for byte in b"hello\n":
        vm.access.write_port(0x3F8, 1, byte)
    until(lambda: (tmp_path / "out").read_bytes() == b"hello\n")


class TestOthersDevices:
    """With another process that takes queues and serves none."""

    @pytest.fixture(autouse=True)
    def peer(self, tmp_path: Path) -> Iterator[None]:
        back_end = DeafBackEnd(str(tmp_path / "peer"))
        yield
        back_end.close()

    def test_a_disk_has_the_queues_that_were_asked_for(self, make: Make) -> None:
        words = "-chardev socket,id=u,path={}/peer -device vhost-user-blk-device,id=d,chardev=u,num-queues=2,queue-size=512"
        vm = make(words, "microvm,mem-share=on")
        assert queue_sizes(vm, OTHER) == [512, 512]

    def test_a_client_sees_whether_there_is_a_back_end(self, make: Make) -> None:
        vm = make("-chardev socket,id=u,path={}/peer -device vhost-user-blk-device,id=d,chardev=u", "microvm,mem-share=on")
        assert vm.run("human-monitor-command", command_line="info stats").split("\r\n") == [
            "d (vhost-user-blk-device):",
            "    connected=1,back_ends=1,waiting=0",
            "",
        ]

    def test_a_folder_has_its_tag(self, make: Make) -> None:
        words = "-chardev socket,id=u,path={}/peer,server,nowait -device vhost-user-fs-device,id=f,chardev=u,tag=kataShared"
        vm = make(words, "microvm,mem-share=on")
        assert config(vm, OTHER, 0, 36) == b"kataShared".ljust(36, b"\0")


def test_every_key_of_a_drive_is_in_the_test_above() -> None:
    covered = {"id", "file", "format", "readonly", "direct", "aio", "discard", "detect-zeroes", "external-files"}
    covered |= {"throttling.iops-total", "throttling.bps-total", "l2-cache-size", "refcount-cache-size"}
    elsewhere = {"encrypt.key-secret", "media", "if"}  # test_vm_drives; of no effect; one value only
    assert set(Drive.keys) == covered | elsewhere
