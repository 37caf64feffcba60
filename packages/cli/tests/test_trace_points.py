"""Every trace point fires: switched on while a machine runs in test mode, it writes a line when what it is named for happens.

Those of KVM are in tests/lab/test_trace_points.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest

from block_qcow2 import create_image, open_disk
from block_qcow2.errors import EngineError
from guest_driver import DISCARD, FLUSH, IN, OUT, WRITE_ZEROES, Driver, streams, until
from pystratovirt.trace import POINTS, Registry
from running_vm import CONFIG, RunningVm
from virtio_devices import vhost_kernel
from virtio_devices.vhost_kernel import VhostKernel
from virtio_devices.vhost_user import protocol
from virtio_devices.vhost_user.connection import Connection

MiB = 1 << 20
BLK, NET, RNG, CONSOLE = 0, 4, 6, 7  # slots of the machine below


def fired(lines: list[str]) -> set[str]:
    """The names of the points that wrote lines."""
    return {line[1:].partition("]")[0] for line in lines}


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningVm]:
    create_image(str(tmp_path / "disk"), 4 * MiB)
    (tmp_path / "other").write_bytes(bytes(MiB))
    options = (
        f"-drive file={tmp_path}/disk,id=d,format=qcow2,direct=off,discard=unmap -device virtio-blk-device,drive=d,id=b "
        "-netdev tap,id=n,ifname=t -device virtio-net-device,netdev=n,id=c "
        "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r,id=e "
        f"-chardev file,id=f,path={tmp_path}/console -device virtio-serial-device,id=s -device virtconsole,chardev=f,id=p "
        f"-serial socket,path={tmp_path}/serial,server,nowait"
    )
    with streams(monkeypatch), RunningVm(tmp_path, *options.split()) as vm:
        yield vm


def test_every_point_fires_when_it_is_switched_on_while_the_machine_runs(vm: RunningVm, tmp_path: Path) -> None:
    drivers = {slot: Driver(vm, slot, queues) for slot, queues in ((BLK, 1), (NET, 3), (RNG, 1), (CONSOLE, 2))}
    lines: list[str] = []
    registry = Registry(POINTS, lines.append)
    wanted = {point.name for point in POINTS if not point.name.startswith(("kvm_", "cpu_"))}
    registry.set_states("", True)
    try:
        exercise(vm, drivers, tmp_path)
        until(lambda: not wanted - fired(lines), lambda: f"silent: {wanted - fired(lines)}")
    finally:
        registry.close()
    assert all(line.isprintable() for line in lines)
    for _ in range(2):  # a thread may be in the middle of something that began while it was on
        count = len(lines)
        drivers[BLK].disk(FLUSH)
        vm.run("query-status")
    assert len(lines) == count, "what is off is silent"


def exercise(vm: RunningVm, drivers: dict[int, Driver], folder: Path) -> None:
    """Have everything happen once."""
    disk = drivers[BLK]
    disk.disk(OUT, b"x" * 512)
    disk.disk(IN, room=512)
    disk.disk(FLUSH)
    disk.disk(DISCARD, pack("<QII", 0, 1, 0))
    disk.disk(WRITE_ZEROES, pack("<QII", 0, 1, 0))
    vm.register(BLK, CONFIG)
    vm.register(BLK, CONFIG, 0)
    drivers[NET].request(2, bytes([0, 0, 1]), 1)  # VIRTIO_NET_CTRL_RX_PROMISC
    drivers[RNG].request(0, b"", 64)
    drivers[CONSOLE].request(1, b"hello")
    drivers[CONSOLE].request(0, b"", 64, waits=False)
    port = vm.access.write_port
    # Registers B and C of the clock: an interrupt each second, or none, and what has been raised. A second that ends between two
    # of these leaves no timer to take back.
    for _ in range(3):
        for index, value in ((0x0C, None), (0x0B, 0x10), (0x0B, 0x00), (0x0B, 0x10)):
            port(0x70, 1, index)
            vm.access.read_port(0x71, 1) if value is None else port(0x71, 1, value)
    vm.access.clock_step(2_000_000_000)
    for index, value in ((0x0A, 0x26), (0x0B, 0x40)):  # 1,024 interrupts a second of the machine's clock
        port(0x70, 1, index)
        port(0x71, 1, value)
    vm.access.clock_step(1_000_000_000)
    ask_a_kernel_and_a_process()
    port(0x3F9, 1, 1)  # the serial port tells of input
    port(0x3F8, 1, 0x41)
    vm.access.read_port(0x3FD, 1)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(folder / "serial"))
        peer.sendall(b"typed")
        until(lambda: vm.access.read_port(0x3FD, 1) & 1)
    vm.run("stop")
    vm.run("cont")
    vm.drive_slot(1)
    vm.add_drive("other", folder / "other")
    vm.run("device_add", id="other", driver="virtio-blk-mmio", addr="0x1")
    vm.run("device_del", id="other")


def ask_a_kernel_and_a_process() -> None:
    """Make every request of vhost, of a kernel that does anything and of a process that does not listen."""
    kernel = VhostKernel("card", os.open("/dev/null", os.O_RDWR), ioctl=lambda _fd, _number, _data: 0)
    for request in vars(vhost_kernel).values():
        if isinstance(request, vhost_kernel.Request):
            kernel.ioctl(request, bytearray(64))
    kernel.close()
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    connection.tell(protocol.SET_VRING_ENABLE, bytes(8))
    connection.close()
    theirs.close()


def test_points_of_one_place_are_switched_on_and_off_alone() -> None:
    lines: list[str] = []
    registry = Registry(POINTS, lines.append)
    original = VhostKernel.ioctl
    kernel = VhostKernel("card", os.open("/dev/null", os.O_RDWR), ioctl=lambda _fd, _number, _data: 0)
    for pattern, enable, expected in (
        ("^vhost_get_features$", True, {"vhost_get_features"}),
        ("^vhost_set_", True, {"vhost_get_features", "vhost_set_owner"}),
        ("^vhost_get_", False, {"vhost_set_owner"}),
        ("^vhost_", False, set()),
    ):
        registry.set_states(pattern, enable)
        lines.clear()
        kernel.ioctl(vhost_kernel.GET_FEATURES)
        kernel.ioctl(vhost_kernel.SET_OWNER)
        assert fired(lines) == expected
    kernel.close()
    assert VhostKernel.ioctl is original


@pytest.mark.parametrize("engine", ["off", "threads", "native", "io_uring"])
def test_requests_to_the_kernel_are_seen_whichever_engine_makes_them(tmp_path: Path, engine: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(MiB))
    disk = open_disk(str(tmp_path / "disk"), format="raw", direct=False, aio=engine)
    lines: list[str] = []
    registry = Registry(POINTS, lines.append)
    try:
        try:
            channel = disk.channel()
        except EngineError as error:
            pytest.skip(f"this host: {error}")
        registry.set_states("^(aio|block)_", True)
        channel.writev(0, [memoryview(bytearray(4096))], "write")  # which engine `off` does at once
        if engine == "off":
            channel.flush("flush")
        channel.submit()
        channel.drain()
    finally:
        registry.close()
        disk.close()
    assert {"aio_submit_request", "block_write_vectored", "block_drain_request"} <= fired(lines)


def test_a_point_on_an_inherited_method_leaves_nothing_behind() -> None:
    from virtio_devices.blk.device import BlkDevice

    registry = Registry(POINTS, lambda _line: None)
    assert "read_config" not in vars(BlkDevice)
    registry.set_states("virtio_blk_read_config", True)
    assert "read_config" in vars(BlkDevice)
    registry.close()
    assert "read_config" not in vars(BlkDevice)
