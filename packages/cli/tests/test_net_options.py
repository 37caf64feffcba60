"""Networks on the command line, and in the machine that it describes."""

from __future__ import annotations

import gc
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pystratovirt.cmdline import CommandLineError, Config, parse
from pystratovirt.cmdline.drivers.net import VirtioNet
from pystratovirt.cmdline.netdevs import Tap, User
from pystratovirt.devices.net import MAC_FIRST, open_netdev
from pystratovirt.errors import VmError
from pystratovirt.vm import VirtualMachine
from virtio_devices.device import DeviceError
from virtio_devices.net.device import NetDevice
from vm_process import LIMIT, WINDOWS, Client, Vm

NET_SLOTS = (4, 5)


def descriptors(*, settle: bool = False) -> list[Path]:
    """Return what this process has open; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return list(Path("/proc/self/fd").iterdir())


# What passt does as long as nobody looks into the frames.
PROGRAM = f"""#!{sys.executable} -S
import os, socket
stream = socket.socket(fileno=3)
def read(count):
    data = b""
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            os._exit(0)
        data += part
    return data
while True:
    length = read(4)
    stream.sendall(length + read(int.from_bytes(length, "big")))
"""


def config(*argv: str) -> Config:
    return parse(["-kernel", "vmlinuz", *argv])


def test_a_tap_by_name_is_one_pair_of_queues() -> None:
    made = config("-netdev", "tap,id=n,ifname=tap0", "-device", "virtio-net-device,netdev=n")
    assert made.netdevs == {"n": Tap(id="n", ifname="tap0")}
    assert made.netdevs["n"].pairs == 1  # type: ignore[union-attr]
    assert made.devices == (VirtioNet(netdev="n"),)


def test_kata_containers_passes_descriptors_of_a_tap_with_many_queues() -> None:
    made = config("-netdev", "tap,id=n,fds=3:4:5", "-device", "virtio-net-device,netdev=n,id=n,mac=02:42:ac:11:00:02")
    tap = made.netdevs["n"]
    assert isinstance(tap, Tap)
    assert (tap.descriptors, tap.pairs) == (("3", "4", "5"), 3)
    other = Tap.parse("-netdev", "tap,id=n,fd=3:4:5,vhost=on,vhostfd=6:7:8")  # StratoVirt takes several under both names
    assert (other.descriptors, other.vhost_descriptors, other.pairs) == (tap.descriptors, ("6", "7", "8"), 3)
    assert made.devices[0].mac == bytes.fromhex("0242ac110002")  # type: ignore[attr-defined]


def test_every_key_is_read_and_written_back() -> None:
    text = "tap,id=n,fds=3:4,queues=2,vhost=on,vhostfds=5:6"
    tap = Tap.parse("-netdev", text)
    assert tap.render() == "tap,id=n,fds=3:4,queues=2,vhost=on,vhostfds=5:6"
    user = User.parse("-netdev", "user,id=n,path=/bin/p,tcp-ports=22,,80:8080,udp-ports=53")
    assert (user.path, user.tcp_ports, user.udp_ports) == ("/bin/p", "22,80:8080", "53")
    card = VirtioNet.parse("-device", "virtio-net-device,netdev=n,mac=52:54:00:AB:CD:EF,mq=on,queue-size=1024,vectors=4")
    assert card.render() == "virtio-net-device,netdev=n,mac=52:54:00:ab:cd:ef,mq=on,queue-size=1024,vectors=4"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("-netdev tap,id=n", "Tap device is missing, use 'ifname' or 'fd'"),
        ("-netdev tap,ifname=t", "needs id="),
        ("-netdev tap,id=n,ifname=a-name-of-16-byte", "at most 15 bytes"),
        ("-netdev tap,id=n,ifname=t,fd=3", "fd=3: ifname says already which tap"),
        ("-netdev tap,id=n,fd=" + ":".join(map(str, range(3, 20))), "at most 16 descriptors"),
        ("-netdev tap,id=n,fd=-1", "not a descriptor's number"),
        ("-netdev tap,id=n,fds=3:x", "'?x'? is not a descriptor's number"),
        ("-netdev tap,id=n,fds=3:3", "the same descriptor twice"),
        ("-netdev tap,id=n,fds=3:4,queues=3", "2 descriptors for 3 pairs"),
        ("-netdev tap,id=n,fds=" + ":".join(map(str, range(3, 20))), "at most 16 descriptors"),
        ("-netdev tap,id=n,ifname=t,queues=17", "at most 16"),
        ("-netdev tap,id=n,ifname=t,queues=0", "at least 1"),
        ("-netdev tap,id=n,ifname=t,vhostfd=3", "Argument 'vhostfd' is not needed"),
        ("-netdev tap,id=n,fds=3:4,vhost=on,vhostfds=5", "1 descriptor for 2 pairs"),
        ("-netdev tap,id=n,ifname=t,script=no", "no such key"),
        ("-netdev bridge,id=n", "no such type"),
        ("-netdev tap,id=n,ifname=t -netdev tap,id=n,ifname=u", "given more than once"),
        ("-device virtio-net-device,netdev=n", "no such netdev"),
        ("-netdev user,id=n -device virtio-net-device,netdev=n -device virtio-net-device,netdev=n", "already used"),
        ("-netdev user,id=n -device virtio-net-device,netdev=n,mac=1:2:3:4:5:6", "must be six bytes"),
        ("-netdev user,id=n -device 'virtio-net-device,netdev=n,mac=  :52:54:00:12:34'", "must be six bytes"),
        ("-netdev user,id=n -device virtio-net-device,netdev=n,mac=03:00:00:00:00:00", "no address of one device"),
        ("-netdev user,id=n -device virtio-net-device,netdev=n,mac=00:00:00:00:00:00", "nobody's"),
        ("-netdev user,id=n -device virtio-net-device,netdev=n,queue-size=128", "at least 256"),
        ("-netdev user,id=n -device virtio-net-device,netdev=n,queue-size=300", "power of two"),
        ("-netdev user,id=n -device virtio-net-device,netdev=n,addr=1", "no PCI address"),
    ],
)
def test_mistakes_are_named(options: str, complaint: str) -> None:
    with pytest.raises(CommandLineError, match=complaint):
        config(*shlex.split(options))


# Opening


def test_a_number_is_only_taken_for_a_descriptor_that_was_inherited() -> None:
    ours = os.open("/dev/null", os.O_RDWR)
    for text in (str(ours), "999999", "tapA"):
        with pytest.raises(DeviceError, match="no descriptor that was passed"):
            open_netdev(Tap(id="n", fd=(text,)))
    os.set_inheritable(ours, True)
    with pytest.raises(DeviceError, match="is no tap"):
        open_netdev(Tap(id="n", fd=(str(ours),)))
    assert os.get_inheritable(ours), "as it was, and open"
    os.close(ours)


def test_a_descriptor_is_one_descriptor_however_its_number_is_written() -> None:
    ours = os.open("/dev/null", os.O_RDWR)
    os.set_inheritable(ours, True)
    with pytest.raises(DeviceError, match=f"n: 0{ours}: the same descriptor twice"):
        open_netdev(Tap(id="n", fds=(str(ours), f"0{ours}")))
    assert os.get_inheritable(ours)
    os.close(ours)


def test_a_descriptor_that_was_passed_by_name_is_closed_when_it_is_of_no_use() -> None:
    passed = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(DeviceError, match=f"n: descriptor {passed} is no tap"):
        open_netdev(Tap(id="n", fds=("tapA",)), {"tapA": passed}.get)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(passed)


def test_a_name_that_no_interface_can_have_is_refused() -> None:
    with pytest.raises(DeviceError, match="no name of an interface"):
        open_netdev(Tap(id="n", ifname="a/b"))


# In a machine

Make = Callable[..., VirtualMachine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    (tmp_path / "passt").write_text(PROGRAM)
    (tmp_path / "passt").chmod(0o755)
    made: list[VirtualMachine] = []

    def make(*argv: str) -> VirtualMachine:
        arguments = [word.replace("PASST", f"{tmp_path}/passt") for word in argv]
        made.append(
            VirtualMachine(parse(["-machine", "microvm", "-m", "128", "-mod-test", "x", *arguments]), lambda _event: None)
        )
        return made[-1]

    yield make
    for vm in made:
        vm.close()


def cards(vm: VirtualMachine) -> list[NetDevice]:
    found = [vm.slots[slot].device for slot in NET_SLOTS]
    assert all(isinstance(device, NetDevice) for device in found)
    return found  # type: ignore[return-value]


def test_both_slots_have_a_card_whose_address_is_stratovirts(make: Make) -> None:
    first, second = cards(make())
    assert first.mac == MAC_FIRST
    assert second.mac == MAC_FIRST[:5] + b"\x57"
    assert not first.has_backend
    assert not first.link_up


def test_a_default_address_is_one_that_nobody_else_has(make: Make) -> None:
    vm = make("-netdev", "user,id=n,path=PASST", "-device", "virtio-net-device,netdev=n,mac=52:54:00:12:34:56")
    first, second = cards(vm)
    assert (first.mac, second.mac) == (MAC_FIRST, MAC_FIRST[:5] + b"\x57")
    assert first.link_up


def test_a_network_lives_as_long_as_the_machine(make: Make) -> None:
    before = descriptors(settle=True)
    vm = make("-netdev", "user,id=n,path=PASST", "-device", "virtio-net-device,netdev=n,id=net0", "-object", "iothread,id=io")
    pid = vm.networks["n"]._pid  # type: ignore[attr-defined]
    assert Path(f"/proc/{pid}").exists()
    vm.close()
    assert not Path(f"/proc/{pid}").exists()
    assert len(descriptors()) == len(before)


def test_a_network_that_cannot_be_opened_ends_the_start_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("#!/bin/sh\necho no route to anywhere >&2\nexit 7\n")
    (tmp_path / "broken").chmod(0o755)
    before = descriptors(settle=True)
    with pytest.raises(VmError, match="-netdev: n: passt ended with status 7: no route to anywhere"):
        make("-netdev", f"user,id=n,path={tmp_path}/broken", "-device", "virtio-net-device,netdev=n")
    assert len(descriptors()) == len(before)


def test_a_network_can_be_closed_and_its_card_goes_on(make: Make) -> None:
    vm = make("-netdev", "user,id=n,path=PASST", "-device", "virtio-net-device,netdev=n")
    card = cards(vm)[0]
    card.detach()
    vm.close_netdev("n")
    assert not vm.networks
    assert not vm.netdevs
    vm.open_netdev(User(id="m", path=vm.config.netdevs["n"].path))  # type: ignore[union-attr]
    card.attach(vm.networks["m"])
    assert card.link_up


def test_a_network_that_ends_before_the_guest_has_a_driver_is_a_link_that_is_down_and_nothing_else(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    options = ["-netdev", f"user,id=n,path={program}", "-device", "virtio-net-device,netdev=n,id=n"]
    with Vm(tmp_path, *options) as vm, Client(vm.unix) as client:
        link = f"readw {WINDOWS + 0x200 * NET_SLOTS[0] + 0x100 + 6:#x}"
        assert int(vm.ask(link).removeprefix("OK "), 16) == 1
        (pid,) = Path(f"/proc/{vm.process.pid}/task/{vm.process.pid}/children").read_text().split()
        process = os.pidfd_open(int(pid))
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], LIMIT)[0]
        os.close(process)
        assert client.run("query-status")["return"]["running"] is True
        assert int(vm.ask(link).removeprefix("OK "), 16) == 0
        vm.drive_slot(NET_SLOTS[0])
        assert int(vm.ask(link).removeprefix("OK "), 16) == 0
        assert client.run("device_del", {"id": "n"}) == {"return": {}}
        assert client.run("netdev_del", {"id": "n"}) == {"return": {}}
        assert client.run("query-status")["return"]["running"] is True
        assert vm.log.read_text().count("the network is gone: passt ended with signal 9") == 1
