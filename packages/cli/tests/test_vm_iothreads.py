"""Which thread serves the queues of a device: the one that it names."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from pystratovirt.devices import net
from running_vm import RunningVm, open_pair
from virtio_devices.balloon.device import BalloonDevice
from virtio_devices.blk.device import BlkDevice
from virtio_devices.console.device import ConsoleDevice
from virtio_devices.device import VirtioDevice
from virtio_devices.net.device import NetDevice
from virtio_devices.rng import RngDevice
from virtio_devices.vsock.user import UserVsockDevice

LIMIT = 60.0  # seconds
RINGS = 0x10_0000


def drive(vm: RunningVm, slot: int, queue: int) -> None:
    """Be a driver that has set up one queue and offers nothing."""
    for status in (0, 1, 3):
        vm.register(slot, 0x70, status)
    vm.register(slot, 0x24, 1)
    vm.register(slot, 0x20, 1)  # VERSION_1
    vm.register(slot, 0x70, 11)
    vm.register(slot, 0x30, queue)
    vm.register(slot, 0x38, 4)
    for number, offset in enumerate((0x80, 0x90, 0xA0)):
        vm.register(slot, offset, RINGS + 0x1000 * number)
    vm.register(slot, 0x44, 1)
    vm.register(slot, 0x70, 15)
    assert vm.register(slot, 0x70) == 15


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("kind", "slot", "queue", "options"),
    [
        (BlkDevice, 0, 0, "-drive file={}/disk,id=d,direct=off -device virtio-blk-device,drive=d,id=x"),
        (NetDevice, 4, 1, "-netdev tap,id=n,ifname=n -device virtio-net-device,netdev=n,id=x"),
        (RngDevice, 6, 0, "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r,id=x"),
        (BalloonDevice, 6, 0, "-device virtio-balloon-device,id=x"),
        (ConsoleDevice, 6, 1, "-device virtio-serial-device,id=x"),
        (UserVsockDevice, 6, 1, "-device virtio-vsock-device,guest-cid=3,path={}/vsock,id=x"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_queue_is_served_by_the_thread_that_the_device_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[VirtioDevice],
    slot: int,
    queue: int,
    options: str,
    named: bool,
) -> None:
    monkeypatch.setattr(net, "open_netdev", open_pair)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    served: list[int] = []
    called = threading.Event()
    original = kind._process

    def process(self: Any, index: int, ring: Any) -> None:
        served.append(threading.get_native_id())
        called.set()
        original(self, index, ring)

    monkeypatch.setattr(kind, "_process", process)
    words = [word.replace("{}", str(tmp_path)) for word in options.split()]
    words[-1] += ",iothread=io" if named else ""
    with RunningVm(tmp_path, "-object", "iothread,id=io", *words) as vm:
        drive(vm, slot, queue)
        assert called.wait(LIMIT)
        threads = {each["id"]: each["thread-id"] for each in vm.run("query-iothreads")}
        assert set(served) == {threads["io"] if named else vm.vm.main_loop.thread_id}


def test_what_a_console_is_connected_to_is_served_by_its_thread_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from virtio_devices.console.port import ConsolePort

    heard: list[int] = []
    called = threading.Event()

    def room(self: ConsolePort) -> int:
        heard.append(threading.get_native_id())
        called.set()
        return 0

    monkeypatch.setattr(ConsolePort, "input_room", room)
    path = tmp_path / "console"
    options = ("-object", "iothread,id=io", "-chardev", f"socket,id=c,path={path},server,nowait")
    console = ("-device", "virtio-serial-device,id=s,iothread=io", "-device", "virtconsole,chardev=c,id=p")
    with RunningVm(tmp_path, *options, *console) as vm, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        peer.sendall(b"hello")
        assert called.wait(LIMIT)
        assert set(heard) == {vm.vm.io_threads["io"].thread_id}
