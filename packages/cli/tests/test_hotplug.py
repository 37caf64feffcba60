"""Disks and networks that come and go over QMP, in test mode: what clients are answered, what guests see, and what is left."""

from __future__ import annotations

import errno
import gc
import os
import resource
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk
from block_qcow2.errors import ImageInUseError
from block_qcow2.qcow2.create import Options
from deaf_peers import DeafBackEnd, DeafTap, deaf_kernel
from guest_driver import GET_ID, IN, OUT, Driver, until
from pystratovirt.cmdline.backends import Drive
from pystratovirt.cmdline.declare import Parameters
from pystratovirt.cmdline.netdevs import Tap, User, VhostUser
from pystratovirt.cmdline.values import Choice, Integer
from pystratovirt.devices import net
from qmp_protocol.commands.block import BlockdevAdd, BlockdevCache, BlockdevFile
from qmp_protocol.commands.device import NetdevAdd
from qmp_protocol.schema import Struct
from running_vm import STATUS, Refused, RunningVm, holdings, open_pair
from virtio_devices.device import DeviceError
from virtio_devices.mmio import NEEDS_RESET
from virtio_devices.net import tap, vhost
from virtio_devices.net.stream import StreamBackend
from virtio_devices.vhost_kernel import VhostKernel
from vmm_core.state import decode, encode

MiB = 1 << 20
CONFIG_CHANGE = 2
SECOND = 1_000_000_000  # ns


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 1 MiB."""
    path = tmp_path / "image"
    path.write_bytes(bytes(MiB))
    return path


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[RunningVm]:
    with RunningVm(tmp_path) as vm:
        yield vm


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[RunningVm]:
    """A machine with a root disk from the command line, in slot 0."""
    (tmp_path / "root").write_bytes(bytes(2 * MiB))
    options = ("-drive", f"file={tmp_path}/root,id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=blk0")
    with RunningVm(tmp_path, *options) as vm:
        yield vm


def refusal(vm: RunningVm, command: str, /, **arguments: Any) -> str:
    with pytest.raises(Refused) as caught:
        vm.run(command, **arguments)
    assert caught.value.kind == "GenericError"
    return str(caught.value)


def is_locked(path: Path) -> bool:
    disk = open_disk(str(path), format="raw", direct=False, aio="threads")
    try:
        disk.lock()
    except ImageInUseError:
        return True
    finally:
        disk.close()
    return False


class TestTheManual:
    def test_a_drive_is_added_and_removed_as_printed(self, vm: RunningVm, tmp_path: Path) -> None:
        # O_DIRECT does not work on every file system of a temporary folder; the rest is as in the manual.
        (tmp_path / "block").write_bytes(bytes(MiB))
        file = {"driver": "file", "filename": str(tmp_path / "block"), "aio": "threads"}
        added = vm.answers("blockdev-add", node_name="drive-0", file=file, cache={"direct": False}, read_only=False)
        assert added == [{"return": {}}]
        assert vm.answers("blockdev-del", node_name="drive-0") == [{"return": {}}]

    def test_a_chardev_is_added_and_removed_as_printed(self, vm: RunningVm) -> None:
        backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/path/to/socket"}}, "server": False}}
        assert vm.answers("chardev-add", id="chardev_id", backend=backend) == [{"return": {}}]
        assert vm.answers("chardev-remove", id="chardev_id") == [{"return": {}}]

    def test_the_event_comes_before_the_reply_of_device_del(self, vm: RunningVm, image: Path) -> None:
        vm.add_drive("net-0", image)
        vm.run("device_add", id="net-0", driver="virtio-blk-mmio", addr="0x0")
        event, reply = vm.answers("device_del", id="net-0")
        assert (event["event"], event["data"]) == ("DEVICE_DELETED", {"device": "net-0", "path": "net-0"})
        assert reply == {"return": {}}


class TestTheReference:
    def test_disk_in_disk_out(self, booted: RunningVm, image: Path) -> None:
        """Transcript 20.5; one disk of the command line holds slot 0."""
        vm = booted
        file = {"driver": "file", "filename": str(image)}
        text = refusal(vm, "blockdev-add", node_name="data1", file=file)
        assert text == "Invalid parameter 'aio' for 'low performance expected when use sync io with \"direct\" on'"
        vm.add_drive("data1", image)
        add: dict[str, Any] = {"id": "data1", "driver": "virtio-blk-mmio"}
        assert refusal(vm, "device_add", **add, addr="0x0") == "The slot 0 is occupied already."
        vm.run("device_add", **add, addr="0x1")
        assert refusal(vm, "device_add", **add, addr="9") == "A maximum of block 4 replaceable devices are supported."
        assert [each.get("event") for each in vm.answers("device_del", id="data1")] == ["DEVICE_DELETED", None]
        assert refusal(vm, "device_del", id="data1") == "Device data1 not found"

    def test_kata_s_sequence(self, booted: RunningVm, image: Path) -> None:
        vm = booted
        file = {"driver": "file", "filename": str(image), "aio": "threads"}
        for _ in range(3):
            vm.run("blockdev-add", node_name="disk-7", driver="raw", file=file, cache={"direct": False, "no-flush": False})
            vm.run("device_add", id="disk-7", driver="virtio-blk-mmio", drive="disk-7", addr="1")
            vm.run("device_del", id="disk-7")
        assert refusal(vm, "device_add", id="disk-7", driver="virtio-blk-mmio") == "Failed to find device configuration."

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"driver": "virtio-blk-mmio", "addr": "x"}, "Invalid addr for device d"),
            ({"driver": "virtio-blk-mmio", "addr": ""}, "Invalid addr for device d"),
            ({"driver": "virtio-blk-mmio", "addr": "0x"}, "Invalid addr for device d"),
            ({"driver": "virtio-blk-mmio", "addr": "-1"}, "Invalid addr for device d"),
            ({"driver": "virtio-blk-mmio", "addr": "9" * 5000}, "Invalid addr for device d"),
            ({"driver": "virtio-rng-device"}, "Unsupported replaceable device type."),
            ({"driver": "virtio-blk-mmio", "addr": "4"}, "A maximum of block 4 replaceable devices are supported."),
            ({"driver": "virtio-blk-mmio", "lun": 3}, "A maximum of block 4 replaceable devices are supported."),
            ({"driver": "virtio-net-mmio", "addr": "2"}, "A maximum of net 2 replaceable devices are supported."),
            ({"driver": "virtio-net-mmio"}, "The device type is net, but the target config is not for this type."),
            (
                {"driver": "virtio-blk-mmio", "serial": "s" * 21},
                "d: failed to update config. blk-slot0: a serial number has at most 20 bytes",
            ),
        ],
    )
    def test_a_place_that_cannot_be_is_refused_in_stratovirt_s_words(
        self, vm: RunningVm, image: Path, arguments: dict[str, Any], text: str
    ) -> None:
        assert refusal(vm, "device_add", id="d", driver="virtio-blk-mmio") == "Failed to find device configuration."
        vm.add_drive("d", image)
        assert refusal(vm, "device_add", id="d", **arguments) == text
        vm.run("device_add", id="d", driver="virtio-blk-mmio")  # what was refused left the slot free

    @pytest.mark.parametrize(
        ("arguments", "slot"), [({}, 0), ({"lun": 0}, 1), ({"addr": "0X3"}, 3), ({"lun": 0, "addr": "2"}, 2)]
    )
    def test_the_place_comes_from_addr_or_lun(self, vm: RunningVm, image: Path, arguments: dict[str, Any], slot: int) -> None:
        vm.add_drive("d", image)
        vm.run("device_add", id="d", driver="virtio-blk-device", **arguments)
        assert [vm.capacity(each) for each in range(4)] == [2048 * (each == slot) for each in range(4)]

    def test_what_is_there_already_is_refused(self, booted: RunningVm, image: Path, tmp_path: Path) -> None:
        vm = booted
        other = tmp_path / "other"
        other.write_bytes(bytes(MiB))
        vm.add_drive("d", image)
        shared = "file can only be shared with read_only. Is it used more than once or another process using the same file?"
        for name in ("d", "e"):
            with pytest.raises(Refused, match="Failed to add drive"):
                vm.add_drive(name, image)
        with pytest.raises(Refused) as caught:
            vm.add_drive("e", tmp_path / "root")
        assert str(caught.value) == f"Failed to add drive {tmp_path}/root, {shared}"
        for name in ("d", "blk0", "rootfs"):
            with pytest.raises(Refused, match=f"^{name} is already registered\\.$"):
                vm.add_drive(name, other)
        assert not is_locked(other)
        vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="1")
        assert refusal(vm, "device_add", id="d", driver="virtio-blk-mmio", addr="2") == "Device id d existed"

    @pytest.mark.parametrize("direct", [True, False])
    def test_what_holds_no_image_is_not_even_opened(self, vm: RunningVm, tmp_path: Path, direct: bool) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
            file = {"driver": "file", "filename": str(path), "aio": "threads"}
            answer = refusal(vm, "blockdev-add", node_name="d", file=file, cache={"direct": direct})
            assert answer == f"{path} is not a regular file or block device."
            assert "is not a regular file" in refusal(vm, "human-monitor-command", command_line=f"drive_add 0 id=d,file={path}")

    def test_six_drives_and_networks_are_the_most(self, vm: RunningVm, tmp_path: Path) -> None:
        for number in range(7):
            (tmp_path / f"d{number}").write_bytes(bytes(MiB))
        for number in range(6):
            vm.add_drive(f"d{number}", tmp_path / f"d{number}")
        with pytest.raises(Refused, match=r"^A maximum of  6 replaceable devices are supported\.$"):
            vm.add_drive("d6", tmp_path / "d6")
        assert not is_locked(tmp_path / "d6")
        vm.run("device_del", id="d0")
        vm.add_drive("d6", tmp_path / "d6")


class TestLettingGo:
    def test_a_name_can_be_added_again_right_after_device_del(self, vm: RunningVm, image: Path) -> None:
        for _ in range(3):
            vm.add_drive("d", image)
            vm.run("device_add", id="d", driver="virtio-blk-mmio")
            assert is_locked(image)
            vm.run("device_del", id="d")
            assert not is_locked(image)

    def test_blockdev_del_after_device_del_succeeds_once(self, vm: RunningVm, image: Path) -> None:
        vm.add_drive("d", image)
        vm.run("device_add", id="d", driver="virtio-blk-mmio")
        assert refusal(vm, "blockdev-del", node_name="d") == "Drive d is in use: device d has it"
        vm.run("device_del", id="d")
        vm.run("blockdev-del", node_name="d")
        assert refusal(vm, "blockdev-del", node_name="d") == "Drive d not found"

    def test_a_blockdev_del_that_is_late_does_not_hit_a_new_drive_of_the_name(self, vm: RunningVm, image: Path) -> None:
        vm.add_drive("d", image)
        vm.run("device_del", id="d")
        vm.add_drive("d", image)
        vm.run("blockdev-del", node_name="d")
        assert refusal(vm, "blockdev-del", node_name="d") == "Drive d not found"

    def test_a_drive_that_was_never_plugged_can_be_removed_either_way(self, vm: RunningVm, image: Path) -> None:
        vm.add_drive("d", image)
        assert vm.answers("device_del", id="d")[0]["event"] == "DEVICE_DELETED"
        vm.add_drive("d", image)
        vm.run("blockdev-del", node_name="d")
        assert not is_locked(image)

    def test_a_disk_of_the_command_line_goes_like_any_other(self, booted: RunningVm, tmp_path: Path) -> None:
        vm = booted
        assert vm.capacity(0) == 4096
        assert refusal(vm, "device_del", id="rootfs") == "Device rootfs not found"  # that is its drive
        vm.run("device_del", id="blk0")
        assert vm.capacity(0) == 0
        assert not is_locked(tmp_path / "root")
        vm.add_drive("rootfs", tmp_path / "root")
        vm.run("device_add", id="new", driver="virtio-blk-mmio", drive="rootfs")
        assert vm.capacity(0) == 4096
        assert refusal(vm, "device_del", id="rootfs") == "Device rootfs not found"
        vm.run("device_del", id="new")

    def test_a_disk_of_the_command_line_comes_back_under_its_own_id(self, booted: RunningVm, tmp_path: Path) -> None:
        vm = booted
        for _ in range(2):
            vm.run("device_del", id="blk0")
            vm.add_drive("blk0", tmp_path / "root")
            vm.run("device_add", id="blk0", driver="virtio-blk-mmio", addr="0")
            assert vm.capacity(0) == 4096

    def test_the_id_of_a_device_that_stays_is_not_given_twice(self, tmp_path: Path, image: Path) -> None:
        options = ("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r,id=rng0")
        console = ("-device", "virtio-serial-device,id=s", "-chardev", f"file,id=c,path={tmp_path}/log")
        with RunningVm(tmp_path, *options, *console, "-device", "virtconsole,chardev=c,id=port0") as vm:
            vm.add_drive("d", image)
            for name in ("rng0", "s", "port0"):
                assert refusal(vm, "device_add", id=name, driver="virtio-blk-mmio", drive="d") == f"Device id {name} existed"

    @pytest.mark.parametrize(("name", "text"), [("", "id: empty"), ("é" * 200, "id: at most 255 bytes, this is 400")])
    def test_a_device_that_nobody_could_name_is_not_made(self, vm: RunningVm, image: Path, name: str, text: str) -> None:
        vm.add_drive("d", image)
        assert refusal(vm, "device_add", id=name, driver="virtio-blk-mmio", drive="d") == text

    def test_a_failed_open_leaves_nothing(self, vm: RunningVm, tmp_path: Path) -> None:
        before = holdings()
        folder, missing, broken = tmp_path / "folder", tmp_path / "missing", tmp_path / "broken"
        folder.mkdir()
        broken.write_bytes(b"no qcow2")
        with pytest.raises(Refused, match=f"^{folder} is not a regular file or block device"):
            vm.add_drive("d", folder)
        with pytest.raises(Refused, match=f"^failed to open the file for block {missing}. Error: "):
            vm.add_drive("d", missing)
        with pytest.raises(Refused, match="Error: "):
            vm.add_drive("d", broken, driver="qcow2")
        assert holdings() == before
        assert refusal(vm, "blockdev-del", node_name="d") == "Drive d not found"

    def test_an_image_that_another_process_has_is_refused(self, vm: RunningVm, image: Path) -> None:
        disk = open_disk(str(image), format="raw", direct=False, aio="threads")
        disk.lock()
        with pytest.raises(Refused, match=r"^Failed to get write lock on file: .*another process using the same file"):
            vm.add_drive("d", image)
        disk.close()
        vm.add_drive("d", image)


class TestTheGuest:
    def test_a_driver_is_told_of_a_disk_that_comes_and_goes(self, vm: RunningVm, image: Path) -> None:
        vm.drive_slot(2)
        vm.add_drive("d", image)
        vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="2")
        assert vm.interrupts(2) == CONFIG_CHANGE
        assert vm.capacity(2) == MiB // 512
        vm.run("device_del", id="d")
        assert vm.interrupts(2) == CONFIG_CHANGE
        assert vm.capacity(2) == 0

    def test_a_machine_that_stands_still_can_be_changed(self, vm: RunningVm, image: Path) -> None:
        vm.drive_slot(1)
        vm.run("stop")
        vm.add_drive("d", image)
        vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="1")
        vm.run("cont")
        assert vm.capacity(1) == MiB // 512
        vm.run("stop")
        vm.run("device_del", id="d")
        vm.run("cont")
        assert vm.capacity(1) == 0

    def test_a_disk_stays_over_a_reset(self, vm: RunningVm, image: Path) -> None:
        vm.add_drive("d", image)
        vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="3")
        vm.run("system_reset")
        assert vm.read()["event"] == "RESET"
        assert vm.run("query-status")["status"] == "running"
        assert vm.capacity(3) == MiB // 512
        vm.run("device_del", id="d")

    def test_state_goes_to_a_machine_with_the_same_things_plugged(self, tmp_path: Path, image: Path) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        for folder in (first, second):
            folder.mkdir()
        with RunningVm(first) as source, RunningVm(second) as target:
            for vm in (source, target):
                vm.add_drive("d", image, read_only=True)
                vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="1")
                vm.run("stop")
            source.run("cont")
            source.drive_slot(1)
            source.run("device_del", id="d")
            source.add_drive("d", image, read_only=True)
            source.run("device_add", id="d", driver="virtio-blk-mmio", addr="1")
            source.run("stop")
            states = source.vm.machine.save()
            target.vm.machine.restore({name: decode(encode(state), type(state), name) for name, state in states.items()})
            assert target.vm.machine.save() == states
            target.run("cont")
            target.run("device_del", id="d")
            assert target.interrupts(1) == CONFIG_CHANGE


class TestPluggedDisks:
    """What a drive and device_add say reaches the disk that is plugged in, and goes with it."""

    def test_a_serial_number_and_a_limit(self, vm: RunningVm, image: Path, tmp_path: Path) -> None:
        (tmp_path / "other").write_bytes(bytes(MiB))
        vm.add_drive("d", image, **{"throttling.iops-total": 10})
        vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="1", serial="A1")
        disk = Driver(vm, 1, 1)
        assert disk.disk(GET_ID, room=20)[:3] == b"A1\0"
        for _ in range(11):
            disk.disk(IN, room=512, waits=False)
        vm.access.clock_step(SECOND // 10)
        assert disk.used(0) < 6, "ten a second, and not all at once"
        for _ in range(20):
            vm.access.clock_step(SECOND // 10)
        until(lambda: disk.used(0) == 12)
        vm.run("device_del", id="d")
        vm.add_drive("e", tmp_path / "other")
        vm.run("device_add", id="e", driver="virtio-blk-mmio", addr="1")
        disk = Driver(vm, 1, 1)
        assert disk.disk(GET_ID, room=20) == bytes(21)
        for _ in range(12):
            disk.disk(IN, room=512)  # without a word about time

    def test_a_disk_that_can_only_be_read(self, vm: RunningVm, image: Path) -> None:
        vm.add_drive("d", image, read_only=True)
        vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="0")
        disk = Driver(vm, 0, 1)
        assert disk.disk(IN, room=512) == bytes(513)
        assert disk.disk(OUT, b"x" * 512) != b"\0"
        assert image.read_bytes() == bytes(MiB)

    def test_a_driver_that_was_there_before_reads_and_writes_what_is_plugged_in(self, vm: RunningVm, image: Path) -> None:
        disk = Driver(vm, 3, 1)
        assert disk.disk(IN, room=512)[-1:] == b"\1", "nothing is there"
        for turn in (b"a", b"b"):
            vm.add_drive("d", image)
            vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="0x3")
            assert disk.disk(OUT, turn * 512) == b"\0"
            assert disk.disk(IN, room=512) == turn * 512 + b"\0"
            vm.run("device_del", id="d")
            assert image.read_bytes()[:512] == turn * 512
            assert disk.disk(IN, room=512)[-1:] == b"\1"


class TestNetworks:
    """With socket pairs, passed by getfd, in the place of taps; see tests/lab for those."""

    @pytest.fixture(autouse=True)
    def pairs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(net, "open_netdev", open_pair)

    @pytest.fixture
    def cabled(self, tmp_path: Path) -> Iterator[RunningVm]:
        """A machine with two cards from the command line; the first has no id."""
        netdevs = ("-netdev", "tap,id=a,ifname=one", "-netdev", "tap,id=b,ifname=two")
        cards = ("-device", "virtio-net-device,netdev=a", "-device", "virtio-net-device,netdev=b,id=nic1")
        with RunningVm(tmp_path, *netdevs, *cards) as vm:
            yield vm

    @pytest.fixture
    def peer(self, vm: RunningVm) -> Iterator[socket.socket]:
        ours, theirs = socket.socketpair()
        vm.run("getfd", (theirs.fileno(),), fdname="tapA")
        theirs.close()
        with ours:
            yield ours

    def link(self, vm: RunningVm, slot: int) -> bool:
        return bool(vm.register(slot, 0x104) >> 16 & 1)

    def test_a_passed_descriptor_is_plugged_and_closed_with_the_device(self, vm: RunningVm, peer: socket.socket) -> None:
        """Transcript 20.6, but that netdev_del works."""
        vm.run("netdev_add", id="nic7", fds="tapA")
        vm.run("device_add", id="nic7", driver="virtio-net-mmio", addr="0x1")
        assert refusal(vm, "netdev_del", id="nic7") == "Netdev nic7 is in use: device nic7 has it"
        assert refusal(vm, "getfd", fdname="tapB") == "Invalid SCM message"
        assert [self.link(vm, slot) for slot in (4, 5)] == [False, True]
        event, _ = vm.answers("device_del", id="nic7")
        assert event["data"] == {"device": "nic7", "path": "nic7"}
        assert not self.link(vm, 5)
        assert peer.recv(1) == b""
        vm.run("netdev_del", id="nic7")
        assert refusal(vm, "netdev_del", id="nic7") == "Netdev nic7 not found"

    def test_a_netdev_add_that_fails_leaves_the_netdev_del_behind_device_del_as_it_was(self, cabled: RunningVm) -> None:
        cabled.run("device_del", id="nic1")
        assert "Add netdev error" in refusal(cabled, "netdev_add", id="b", fds="nobody")
        cabled.run("netdev_del", id="b")
        assert refusal(cabled, "netdev_del", id="b") == "Netdev b not found"

    @pytest.mark.parametrize("more", [{}, {"type": "tap"}, {"queues": 1, "script": "no"}])
    def test_a_network_that_names_no_tap_is_a_card_without_a_link(self, vm: RunningVm, more: dict[str, Any]) -> None:
        for _ in range(2):
            vm.run("netdev_add", id="n", **more)
            vm.run("device_add", id="n", driver="virtio-net-mmio")
            assert refusal(vm, "netdev_del", id="n") == "Netdev n is in use: device n has it"
            vm.drive_slot(4)
            assert not self.link(vm, 4)
            vm.run("device_del", id="n")
        vm.run("netdev_add", id="n", **more)
        vm.run("netdev_del", id="n")

    def test_a_card_of_the_command_line_comes_back_under_its_own_id(self, cabled: RunningVm) -> None:
        vm = cabled
        for _ in range(2):
            vm.run("device_del", id="nic1")
            assert not self.link(vm, 5)
            vm.run("netdev_add", id="nic1", ifname="three")
            vm.run("device_add", id="nic1", driver="virtio-net-mmio", addr="1")
            assert self.link(vm, 5)

    def test_no_id_is_not_the_name_of_a_card_that_has_none(self, cabled: RunningVm) -> None:
        vm = cabled
        assert refusal(vm, "device_del", id="") == "id: empty"
        assert self.link(vm, 4)
        assert refusal(vm, "netdev_del", id="a") == "Netdev a is in use: a device without an id has it"

    def test_a_card_that_the_kernel_serves_leaves_the_slots_and_stays(self, tmp_path: Path) -> None:
        options = ("-netdev", "tap,id=v,ifname=v,vhost=on", "-device", "virtio-net-device,netdev=v,id=nic0")
        with RunningVm(tmp_path, *options) as vm:
            vm.run("netdev_add", id="n", ifname="n")
            vm.run("device_add", id="n", driver="virtio-net-mmio", addr="0")
            assert [self.link(vm, slot) for slot in (4, 5, 6)] == [True, False, True]
            assert refusal(vm, "device_del", id="nic0") == "Device nic0 is in no slot that can be emptied"
            assert refusal(vm, "netdev_del", id="v") == "Netdev v is in use: device nic0 has it"

    def test_a_guest_with_acpi_finds_a_card_that_was_not_there(self, vm: RunningVm, peer: socket.socket) -> None:
        present, event, ged = 0xF000_0020, 0xF000_0000, vm.vm.machine.interrupt_line(16)
        assert vm.access.read(present, 4) == bytes(4)
        vm.run("netdev_add", id="n", fds="tapA")
        vm.run("device_add", id="n", driver="virtio-net-mmio", mac="52:54:00:00:00:99")
        assert ged.take() == 1  # type: ignore[attr-defined]
        assert vm.access.read(event, 4) == (1 << 12).to_bytes(4, "little")
        assert vm.access.read(present, 4) == (1 << 4).to_bytes(4, "little")
        assert vm.access.read(0xF010_0900, 8)[:6] == bytes.fromhex("525400000099")
        vm.run("device_del", id="n")
        assert vm.access.read(present, 4) == (1 << 4).to_bytes(4, "little")  # Linux would not let go of it
        vm.run("system_reset")
        assert vm.read()["event"] == "RESET"
        assert vm.access.read(present, 4) == bytes(4)

    @pytest.mark.parametrize("driver", [False, True])
    def test_an_address_that_came_with_a_network_goes_with_it(self, vm: RunningVm, peer: socket.socket, driver: bool) -> None:
        def mac() -> str:
            return vm.access.read(0xF010_0900, 8)[:6].hex(":")

        vm.run("netdev_add", id="n", fds="tapA")
        vm.run("device_add", id="n", driver="virtio-net-mmio", mac="52:54:00:00:00:99")
        if driver:
            vm.drive_slot(4)
        vm.run("device_del", id="n")
        if driver:
            assert mac() == "52:54:00:00:00:99", "a driver keeps what it has"
            vm.register(4, STATUS, 0)
        vm.run("netdev_add", id="m")
        vm.run("device_add", id="m", driver="virtio-net-mmio")
        assert mac() == "52:54:00:12:34:56"

    def test_a_descriptor_stays_passed_when_the_command_fails(self, vm: RunningVm, peer: socket.socket, image: Path) -> None:
        vm.add_drive("n", image)
        assert refusal(vm, "netdev_add", id="n", fds="tapA") == "n is already registered."
        assert "Add netdev error: m: no descriptor" in refusal(vm, "netdev_add", id="m", fds="tapB")
        assert "no address of one device" in refusal(vm, "device_add", id="n", driver="virtio-net-mmio", mac="01:00:00:00:00:00")
        vm.run("netdev_add", id="m", fds="tapA")
        assert refusal(vm, "netdev_add", id="o", fds="tapA") == "Add netdev error: o: no descriptor"
        assert refusal(vm, "device_add", id="m", driver="virtio-blk-mmio") == (
            "The device type is blk, but the target config is not for this type."
        )

    def test_a_descriptor_stays_passed_however_few_the_process_may_open_by_then(
        self, vm: RunningVm, peer: socket.socket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def taken_in_vain(netdev: Tap, take: Callable[[str], int | None]) -> None:
            os.close(take(netdev.descriptors[0]) or 0)
            raise DeviceError("no tap")

        with monkeypatch.context() as now:
            now.setattr(net, "open_netdev", taken_in_vain)
            now.setattr(resource, "getrlimit", lambda _: (0, 1 << 20))
            assert refusal(vm, "netdev_add", id="n", fds="tapA") == "Add netdev error: no tap"
        vm.run("netdev_add", id="n", fds="tapA")

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"vhost": True}, "Tap device is missing, use 'ifname' or 'fd' to configure a tap device"),
            ({"ifname": "t", "fds": "tapA"}, "give one of the two"),
            ({"ifname": "much-too-long-for-one"}, "ifname: at most 15 bytes"),
            ({"ifname": "t", "queues": 17}, "The 'queues' 17 is bigger than max queue num 16"),
            ({"fds": "tapA", "vhostfd": "v"}, "Argument 'vhostfd' is not needed for virtio-net device"),
            ({"fds": ":".join(f"t{number}" for number in range(17))}, "The num of fd 17 is bigger than max queue num 16"),
            ({"fd": "tapA:tapB"}, "fd: at most 1 descriptor"),
            ({"fd": ""}, "fd: empty"),
            ({"fds": "tapA:"}, "fds: an empty name"),
            ({"fds": "a", "vhost": True, "vhostfds": ":".join("v" * 17)}, "vhostfds: at most 16 descriptors"),
            ({"id": "", "ifname": "t"}, "id: empty"),
            ({"ifname": "t", "tcp-ports": "80"}, "netdev_add: tcp-ports is for type user"),
            ({"type": "user", "tcp-ports": ""}, "tcp-ports: empty"),
            ({"type": "user", "fd": "3"}, "netdev_add: fd is for type tap"),
            ({"type": "user", "queues": 2}, "queues: 2: a user netdev has one pair of queues"),
            ({"type": "user", "queues": 17}, "The 'queues' 17 is bigger than max queue num 16"),
            ({"type": "vhost-user", "chardev": "c", "ifname": "t"}, "netdev_add: ifname is for type tap"),
        ],
    )
    def test_a_network_that_contradicts_itself_is_refused(self, vm: RunningVm, arguments: dict[str, Any], text: str) -> None:
        assert text in refusal(vm, "netdev_add", **{"id": "n", **arguments})


def test_five_hundred_disks_and_cards_in_turn_leave_nothing(
    vm: RunningVm, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """With drivers that are there all the time, and use what they get. With a real guest under load: tests/lab."""
    monkeypatch.setattr(net, "open_netdev", open_pair)
    other = tmp_path / "other.qcow2"
    create_image(str(other), format="qcow2", size=MiB)
    disks = {slot: Driver(vm, slot, 1) for slot in range(4)}
    for slot in (4, 5):
        vm.drive_slot(slot)
    before, held = holdings(), 0
    tracemalloc.start(1)
    request.addfinalizer(tracemalloc.stop)
    for number in range(500):
        if number == 100:  # what is loaded or kept once is there
            before, held = holdings(), python_memory()
        if number % 2:
            vm.run("netdev_add", id="n", ifname="t")
            vm.run("device_add", id="n", driver="virtio-net-mmio", addr=str(number // 2 % 2))
            vm.run("device_del", id="n")
        else:
            slot = number // 2 % 4
            file, kind = (image, "raw") if number % 3 else (other, "qcow2")
            vm.add_drive("d", file, driver=kind)
            vm.run("device_add", id="d", driver="virtio-blk-mmio", addr=str(slot))
            data = bytes([number % 251]) * 512
            assert disks[slot].disk(OUT, data) == b"\0"
            assert disks[slot].disk(IN, room=512) == data + b"\0"
            vm.run("device_del", id="d")
    assert holdings() == before
    assert python_memory() - held < 40_000, "100 bytes a round"


def python_memory() -> int:
    """Bytes that objects have which are still there; what the allocator keeps beside them goes up and down by a megabyte."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


class TestNetworksThatOthersCarry:
    """The kernel (vhost) or another process (vhost-user), in the slots that clients fill. See tests/lab for real ones."""

    def link(self, vm: RunningVm) -> bool:
        return bool(vm.register(4, 0x104) >> 16 & 1)

    def test_a_process_carries_a_network_for_as_long_as_it_is_plugged_in(self, tmp_path: Path) -> None:
        with RunningVm(tmp_path, machine="microvm,mem-share=on") as vm:
            before = holdings()
            for _ in range(2):
                path = tmp_path / "switch"
                peer = DeafBackEnd(str(path))
                backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": False}}
                vm.run("chardev-add", id="c", backend=backend)
                vm.run("netdev_add", id="n", type="vhost-user", chardev="c", queues=2)
                assert refusal(vm, "chardev-remove", id="c") == "Chardev c is in use"
                assert "is in use" in refusal(vm, "netdev_add", id="m", type="vhost-user", chardev="c")
                vm.run("device_add", id="n", driver="virtio-net-mmio", addr="0")
                assert self.link(vm)
                vm.drive_slot(4)
                assert self.link(vm)
                event, _ = vm.answers("device_del", id="n")
                assert event["event"] == "DEVICE_DELETED"
                assert not self.link(vm)
                vm.run("netdev_del", id="n")
                vm.run("chardev-remove", id="c")
                peer.close()  # it waits until nobody is connected
                path.unlink()
            assert holdings() == before

    def test_memory_that_nobody_else_sees_is_none_for_a_process(self, tmp_path: Path) -> None:
        with RunningVm(tmp_path, "-chardev", f"socket,id=c,path={tmp_path}/switch") as vm:
            peer = DeafBackEnd(str(tmp_path / "switch"))
            before = holdings()
            assert refusal(vm, "netdev_add", id="n", type="vhost-user", chardev="c") == (
                "Add netdev error: n: Failed to initial vhost user memory map, consider using command mem-share=on"
            )
            assert holdings() == before
            peer.close()

    def test_passed_descriptors_of_taps_and_of_vhost_belong_together(
        self, vm: RunningVm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As whoever has privileges opens them and passes them to a machine that has none."""
        made: list[tuple[str, list[int]]] = []

        class Taps(DeafTap):
            def __init__(self, name: str, fds: list[int]) -> None:
                made.append((name, [os.fstat(fd).st_ino for fd in fds]))
                self.name, self.fds, self.pairs = name, fds, len(fds)

        kernels: list[int] = []

        def kernel(name: str, fd: int) -> VhostKernel:
            kernels.append(os.fstat(fd).st_ino)
            return VhostKernel(name, fd, ioctl=deaf_kernel)

        monkeypatch.setattr(tap, "adopt_tap", Taps)
        monkeypatch.setattr(vhost, "VhostKernel", kernel)
        before = holdings()
        passed: dict[str, int] = {}
        for name in ("tapA", "tapB", "vA", "vB"):
            ours, theirs = socket.socketpair()
            vm.run("getfd", (theirs.fileno(),), fdname=name)
            passed[name] = os.fstat(theirs.fileno()).st_ino
            ours.close()
            theirs.close()
        assert "vhostfds: 1 descriptor for 2 pairs" in refusal(
            vm, "netdev_add", id="n", vhost=True, fds="tapA:tapB", vhostfds="vA"
        )
        assert made == []
        vm.run("netdev_add", id="n", vhost=True, fds="tapA:tapB", vhostfds="vA:vB")
        assert made == [("n", [passed["tapA"], passed["tapB"]])]
        assert kernels == [passed["vA"], passed["vB"]]
        vm.run("device_add", id="n", driver="virtio-net-mmio", addr="0")
        vm.drive_slot(4)
        assert self.link(vm)
        vm.run("device_del", id="n")
        assert not self.link(vm)
        assert holdings() == before


def test_a_network_without_vhost_and_without_a_tap_is_one_without_a_link(vm: RunningVm) -> None:
    vm.run("netdev_add", id="n", vhost=False)
    vm.run("device_add", id="n", driver="virtio-net-mmio")


def test_of_a_drive_and_a_network_of_one_name_a_device_gets_the_one_that_fits_its_driver(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "open_netdev", open_pair)
    options = ("-drive", f"file={image},id=a,direct=off", "-netdev", "tap,id=a,ifname=t0", "-netdev", "tap,id=b,ifname=t1")
    with RunningVm(tmp_path, *options) as vm:
        vm.run("device_add", id="b", driver="virtio-net-mmio", addr="1")
        vm.run("device_add", id="n", driver="virtio-net-mmio", netdev="a", drive="a")
        vm.run("device_add", id="a", driver="virtio-blk-mmio")
        assert vm.capacity(0) == image.stat().st_size // 512
        assert [backend.device for backend in vm.vm.hotplug.backends("net")] == ["n", "b"]


class TestOneDeclaration:
    """What the command line and QMP both say is the same, with the same bounds."""

    def fields(self, command: type[Struct]) -> dict[str, Any]:
        return {field.name: field.type for field in command.fields()}

    def test_blockdev_add_has_every_key_of_a_drive(self) -> None:
        members = {**self.fields(BlockdevFile), **self.fields(BlockdevCache), **self.fields(BlockdevAdd)}
        names = {"id": "node-name", "file": "filename", "format": "driver", "readonly": "read-only"}
        for name, key in Drive.keys.items():
            if name == "if":  # what comes over QMP is for a device
                continue
            member = members[names.get(name, name)]
            if isinstance(key.kind, Integer):
                assert (member.low, member.high) == (key.kind.low, key.kind.high), name
            elif isinstance(key.kind, Choice):
                assert tuple(value.replace("iou", "io_u") for value in member.values) == key.kind.names, name
            elif hasattr(member, "values"):
                assert {key.kind.parse(value) for value in member.values} == {True, False}, name

    @pytest.mark.parametrize("netdev", [Tap, User, VhostUser])
    def test_netdev_add_has_every_key_of_a_network(self, netdev: type[Parameters]) -> None:
        # Who may speak QMP may not choose a program to be run.
        assert netdev.keys.keys() - {"path"} <= self.fields(NetdevAdd).keys()

    def test_ports_of_a_user_network_reach_the_program(self, vm: RunningVm, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Any] = []
        monkeypatch.setattr(net, "open_netdev", lambda netdev, take: made.append(netdev) or StreamBackend("u", socket.socket()))
        vm.run("netdev_add", id="u", type="user", tcp_ports="8080:80")
        vm.run("netdev_add", id="v", type="user", queues=1)
        assert made == [User(id="u", tcp_ports="8080:80"), User(id="v")]


class TestOtherCommands:
    def test_to_stop_or_go_on_twice_is_no_news(self, vm: RunningVm) -> None:
        for command, event in (("stop", "STOP"), ("cont", "RESUME")):
            first, reply = vm.answers(command)
            assert (first["event"], reply) == (event, {"return": {}})
            assert vm.answers(command) == [{"return": {}}]
            assert vm.answers("query-status")[0]["return"]["running"] == (command == "cont")

    def test_the_human_monitor_adds_and_removes_drives(self, vm: RunningVm, image: Path) -> None:
        def line(text: str) -> Any:
            return vm.run("human-monitor-command", command_line=text)

        assert line(f"drive_add 0 id=d,file={image},direct=off,if=none") == {}
        vm.run("device_add", id="d", driver="virtio-blk-mmio", addr="0")
        assert line("info block").split("\r\n") == [
            f"d: {image} (raw)",
            "    Attached to:      d",
            "    Cache mode:       writeback",
            "",
        ]
        with pytest.raises(Refused, match="is in use"):
            line("drive_del d")
        vm.run("device_del", id="d")
        assert line("drive_del d") == {}
        for text, error in {
            "drive_add 0": "Invalid number of arguments",
            "drive_del": "Invalid number of arguments",
            "drive_del nothing": "Drive nothing not found",
            "drive_add 0 id=x": "needs file=",
            f"drive_add 0 id=x,file={image},aio=what": "aio=what: must be",
        }.items():
            with pytest.raises(Refused, match=error):
                line(text)

    def test_the_human_monitor_shows_what_devices_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(net, "open_netdev", open_pair)
        (tmp_path / "disk").write_bytes(bytes(MiB))
        options = (
            *("-drive", f"file={tmp_path}/disk,id=d,direct=off", "-device", "virtio-blk-device,drive=d,id=blk0"),
            *("-netdev", "tap,id=a,ifname=tap0,queues=2", "-device", "virtio-net-device,netdev=a,mac=52:54:00:00:00:01"),
            *("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r,id=rng0"),
            *("-device", "virtio-serial-device,id=s", "-chardev", f"file,id=c,path={tmp_path}/log"),
            *("-device", "virtconsole,chardev=c,id=p", "-device", "virtio-balloon-device,id=b"),
            *("-device", f"virtio-vsock-device,id=v,guest-cid=3,path={tmp_path}/vsock"),
        )
        with RunningVm(tmp_path, *options) as vm:

            def info(what: str) -> list[str]:
                text: str = vm.run("human-monitor-command", command_line=f"info {what}")
                assert text.endswith("\r\n")
                return text.split("\r\n")[:-1]

            vm.run("netdev_add", id="n")
            vm.run("netdev_add", id="later", ifname="tap1")
            vm.run("device_add", id="n", driver="virtio-net-mmio", addr="1", mac="52:54:00:00:00:02")
            nothing = "rx_frames=0,rx_bytes=0,rx_dropped=0,rx_filtered=0,tx_frames=0,tx_bytes=0,tx_dropped=0"
            assert info("network") == [
                "slot4: index=0,type=nic,model=virtio-net-device,macaddr=52:54:00:00:00:01,link=up",
                " \\ a: index=0,type=tap,ifname=tap0,queues=2",
                f"    {nothing}",
                "n: index=0,type=nic,model=virtio-net-device,macaddr=52:54:00:00:00:02,link=down",
                " \\ n: index=0,type=none",
                f"    {nothing}",
                "later: index=0,type=tap,ifname=tap1",
            ]
            lines = info("stats")
            assert lines[0::2] == [
                "blk0 (virtio-blk-device):",
                "slot4 (virtio-net-device):",
                "n (virtio-net-device):",
                "rng0 (virtio-rng-device):",
                "s (virtio-serial-device):",
                "b (virtio-balloon-device):",
                "v (virtio-vsock-device):",
            ]
            assert lines[1] == ("    reads=0,read_bytes=0,writes=0,written_bytes=0,flushes=0,discards=0,zeroes=0,failed=0")
            assert lines[7] == "    requests=0,bytes=0,delays=0"
            vm.run("device_del", id="blk0")
            assert "blk0" not in "".join(info("stats"))

    def test_drives_are_listed(self, booted: RunningVm, image: Path) -> None:
        vm = booted
        create_image(str(image.with_suffix(".qcow2")), format="qcow2", size=8 * MiB)
        vm.add_drive("q", image.with_suffix(".qcow2"), driver="qcow2", read_only=True, **{"throttling.iops-total": 100})
        first, second = vm.run("query-block")
        assert (first["device"], first["qdev"]) == ("rootfs", "blk0")
        assert (second["device"], second["qdev"]) == ("q", "")
        node = second["inserted"]
        assert node["image"] == {"filename": str(image.with_suffix(".qcow2")), "format": "qcow2", "virtual-size": 8 * MiB}
        assert (node["ro"], node["iops"], node["drv"]) == (True, 100, "qcow2")
        assert vm.run("query-named-block-nodes") == [first["inserted"], node]
        (counted,) = vm.run("query-blockstats")
        assert (counted["device"], counted["qdev"]) == ("rootfs", "blk0")
        assert counted["stats"].keys() >= {"rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations"}
        vm.run("device_add", id="q", driver="virtio-blk-mmio", addr="3")
        assert vm.capacity(3) == 8 * MiB // 512
        assert [each["device"] for each in vm.run("query-blockstats")] == ["rootfs", "q"]

    @pytest.mark.parametrize(
        ("more", "text"),
        [
            ({"cache": {"direct": False}, "file": {"aio": "native"}}, 'native aio type should be used with "direct" on'),
            ({"driver": "qcow2", "l2-cache-size": "1G"}, "Invalid l2 cache size: 1G: at most 32 MiB"),
            ({"driver": "qcow2", "refcount-cache-size": "x"}, "Invalid refcount cache size: x: not a size"),
            ({"node-name": ""}, "node-name: empty"),
            ({"driver": "raw", "external-files": "allow"}, "external-files=allow: only for a qcow2 image"),
            ({"driver": "raw", "encrypt.key-secret": "s"}, "encrypt.key-secret=s: only for a qcow2 image"),
            ({"driver": "qcow2", "encrypt.key-secret": "s"}, "encrypt.key-secret: no -object secret has the id s"),
            ({"throttling.bps-total": (1 << 40) + 1}, "expected u64 from 0 to 1099511627776 (member `throttling.bps-total`)"),
            ({"file": {"filename": "/a\0b"}}, "filename: contains a NUL character"),
        ],
    )
    def test_a_drive_that_contradicts_itself_is_refused(
        self, vm: RunningVm, image: Path, more: dict[str, Any], text: str
    ) -> None:
        arguments: dict[str, Any] = {"node-name": "d", "cache": {"direct": False}, "file": {}, **more}
        arguments["file"] = {"driver": "file", "filename": str(image), "aio": "threads", **arguments["file"]}
        assert text in refusal(vm, "blockdev-add", **arguments)

    def test_a_drive_can_be_limited_and_may_open_other_files_as_on_the_command_line(self, vm: RunningVm, tmp_path: Path) -> None:
        base, top = tmp_path / "base", tmp_path / "top"
        create_image(str(base), format="qcow2", size=MiB)
        create_image(str(top), MiB, options=Options(backing_file=str(base), backing_format="qcow2"))
        limits = {"throttling.bps-total": 1 << 20, "throttling.iops-total": 50, "l2-cache-size": "1M"}
        with pytest.raises(Refused, match=r"Error: .*backing"):
            vm.add_drive("q", top, driver="qcow2", **limits)
        vm.add_drive("q", top, driver="qcow2", **limits, **{"external-files": "allow"})
        (listed,) = vm.run("query-block")
        assert (listed["inserted"]["bps"], listed["inserted"]["iops"]) == (1 << 20, 50)
        assert vm.vm.drives["q"].l2_cache_size == 1 << 20

    def test_character_devices_come_and_go(self, tmp_path: Path) -> None:
        def backend(path: str, server: bool = False) -> dict[str, Any]:
            return {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, "server": server}}

        with RunningVm(tmp_path, "-chardev", f"file,id=log,path={tmp_path}/log", "-serial", "chardev:log") as vm:
            vm.run("chardev-add", id="c", backend=backend("/run/c"))
            assert vm.run("query-chardev") == [
                {"label": "log", "filename": "file", "frontend-open": True},
                {"label": "c", "filename": "unix:/run/c", "frontend-open": False},
            ]
            for name in ("c", "log"):
                assert refusal(vm, "chardev-add", id=name, backend=backend("/x")) == f'Chardev "{name}" has been added'
            assert refusal(vm, "chardev-add", id="d", backend=backend("/x", True)) == "Invalid parameter 'backend' for 'server'"
            assert "at most 107 bytes" in refusal(vm, "chardev-add", id="d", backend=backend("/" + "x" * 200))
            assert refusal(vm, "chardev-add", id="", backend=backend("/x")) == "id: empty"
            assert refusal(vm, "chardev-remove", id="log") == "Chardev log is in use"
            vm.run("chardev-remove", id="c")
            assert refusal(vm, "chardev-remove", id="c") == "Chardev c not found"
            for number in range(63):
                vm.run("chardev-add", id=f"c{number}", backend=backend("/run/c"))
            assert refusal(vm, "chardev-add", id="more", backend=backend("/run/c")) == "at most 64 character devices"


def test_without_room_for_watches_devices_come_and_go_or_all_is_as_before(vm: RunningVm, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int, events: int, callback: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # epoll_ctl(2): max_user_watches

    def plug() -> None:
        vm.run("device_add", id="net0", driver="virtio-net-mmio", addr="0x0")

    monkeypatch.setattr(net, "open_netdev", open_pair)
    vm.run("netdev_add", id="net0", ifname="cable")
    plug()
    Driver(vm, 4, 3)
    with monkeypatch.context() as now:
        now.setattr(vm.vm.main_loop, "add_fd", no_room)
        assert vm.answers("device_del", id="net0")[0]["event"] == "DEVICE_DELETED"
    assert vm.register(4, STATUS) & NEEDS_RESET, "nobody looks at its queues any more"
    vm.run("netdev_add", id="net0", ifname="cable")
    plug()
    Driver(vm, 4, 3)
    vm.run("device_del", id="net0")
    vm.run("netdev_add", id="net0", ifname="cable")
    with monkeypatch.context() as now:
        now.setattr(vm.vm.main_loop, "add_fd", no_room)
        with pytest.raises(Refused, match=r"No space left on device$"):
            plug()
    assert vm.register(4, STATUS) & NEEDS_RESET
    plug()
    Driver(vm, 4, 3)


@pytest.mark.parametrize("shortage", [ImportError("no room for a module"), MemoryError(), RuntimeError("can't start new thread")])
def test_a_network_that_the_host_has_no_room_for_leaves_its_name_free(
    vm: RunningVm, monkeypatch: pytest.MonkeyPatch, shortage: Exception
) -> None:
    def fail(netdev: object, take: object) -> None:
        raise shortage

    with monkeypatch.context() as now:
        now.setattr(net, "open_netdev", fail)
        refusal(vm, "netdev_add", id="net0", ifname="cable")
    monkeypatch.setattr(net, "open_netdev", open_pair)
    vm.run("netdev_add", id="net0", ifname="cable")
    vm.run("netdev_del", id="net0")


def test_a_disk_that_cannot_come_to_rest_can_be_unplugged_later(
    vm: RunningVm, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm.add_drive("disk", image)
    vm.run("device_add", id="disk", driver="virtio-blk-mmio", addr="0x0")
    vm.drive_slot(0)
    device = vm.vm.slots[0].device
    with monkeypatch.context() as now:

        def refuse(lane: object) -> None:
            raise MemoryError

        now.setattr(device, "_finish", refuse)
        refusal(vm, "device_del", id="disk")
    vm.run("device_del", id="disk")
    assert not is_locked(image)
