"""Saved state of whole machines, in test mode: what is saved, restored into a fresh machine, and saved again is equal.

The machines have every device, each with a driver that has been at work. A kernel and processes that do nothing stand for those
that serve queues of the last machine; what becomes of their requests is tested in virtio-devices (vhost_user, vsock_vhost).
"""

from __future__ import annotations

import gc
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deaf_peers import DeafBackEnd, deaf_network, deaf_vhost
from pystratovirt.cmdline import parse
from pystratovirt.devices import net
from pystratovirt.vm import VirtualMachine
from virtio_devices.balloon.device import BalloonState
from virtio_devices.console.device import ConsoleState
from virtio_devices.mmio_state import MmioState
from virtio_devices.net.backend import Backend
from virtio_devices.net.state import NetState
from virtio_devices.net.stream import StreamBackend
from virtio_devices.vhost_kernel import VhostKernel
from vmm_core.errors import StateError
from vmm_core.machine.core import MachineEvent
from vmm_core.state import State, decode, encode
from vmm_core.x86_64.layout import Microvm as Layout

LIMIT = 60.0  # seconds, for what takes a thousandth of one
MiB = 1 << 20
NET, BLK, CONSOLE, RNG, BALLOON, VSOCK, FS = 1, 2, 3, 4, 5, 19, 26  # virtio 1.2, section 5
RINGS = 16 * MiB  # where the test's drivers have their queues
QUEUE, SLOT = 0x1000, 0x1_0000  # of it for one queue, and for all of a slot


def post(event: MachineEvent) -> None:
    raise AssertionError(f"nobody asked for {event}")


class Machines:
    """Makes machines of one configuration."""

    cpus, many = 2, True
    types = frozenset((NET, BLK, CONSOLE, RNG, BALLOON, VSOCK))
    states: frozenset[type] = frozenset(
        (MmioState, NetState, ConsoleState, BalloonState)
    )  # that hold a trace of the drivers' work

    def __init__(self, machine: str, folder: Path) -> None:
        self._machine, self._folder = machine, folder
        self.acpi = "acpi=off" not in machine
        self.io_apic = self.acpi and self.many  # the second one
        self.cables: list[socket.socket | DeafBackEnd] = []
        self._number = 0
        (folder / "disk").write_bytes(bytes(MiB))

    def unplug(self) -> None:
        """Close the other sides of all devices, and wait for those that are threads. The machines are closed before."""
        while self.cables:
            self.cables.pop().close()

    def open_network(self, netdev: Any, _take: Any = None) -> Backend:
        """Stands in for a tap: one end of a socket pair."""
        ours, theirs = socket.socketpair()
        self.cables.append(theirs)
        return StreamBackend(netdev.id, ours)

    def options(self) -> list[str]:
        """Return the command line of one more machine: the sockets are its own."""
        self._number += 1
        folder = self._folder
        words = ["-machine", self._machine, "-mod-test", str(folder / "unused"), "-m", "128", "-smp", "2"]
        words += ["-object", "rng-random,id=r,filename=/dev/urandom", "iothread,id=io"]
        words += ["-serial", f"file,path={folder}/console"]
        # With ACPI, disks enough for slots whose interrupts are the second I/O APIC's; without, one slot of a disk is empty.
        for disk in range(14 if self.acpi else 3):
            words += ["-drive", f"file={folder}/disk,id=d{disk},direct=off,readonly=on"]
            words += ["-device", f"virtio-blk-device,drive=d{disk},id=d{disk},num-queues=2,iothread=io"]
        for card in range(2):
            words += ["-netdev", f"tap,id=n{card},ifname=unused{card}"]
            words += ["-device", f"virtio-net-device,netdev=n{card},id=n{card}"]
        words += ["-device", "virtio-rng-device,rng=r,id=rng", "virtio-balloon-device,id=balloon"]
        words += ["-device", f"virtio-vsock-device,id=vsock,guest-cid=7,path={folder}/v{self._number}"]
        words += ["-chardev", f"file,id=c,path={folder}/hvc", f"socket,id=p,path={folder}/p{self._number},server,nowait"]
        words += ["-device", "virtio-serial-device,id=vs,max_ports=4"]
        return [*words, "-device", "virtconsole,chardev=c,id=con", "virtserialport,chardev=p,id=port,nr=2"]

    def __call__(self) -> VirtualMachine:
        return VirtualMachine(parse(self.options()), post)


class OthersMachines(Machines):
    """The same with devices whose queues the kernel or another process serves."""

    cpus, many = 1, False
    types = frozenset((NET, BLK, VSOCK, FS))
    states: frozenset[type] = frozenset((MmioState, NetState))

    def open_network(self, netdev: Any, _take: Any = None) -> Backend:
        return deaf_network(netdev.id)

    def options(self) -> list[str]:
        self._number += 1
        words = ["-machine", self._machine, "-mod-test", str(self._folder / "unused"), "-m", "128"]
        words += ["-serial", f"file,path={self._folder}/console"]
        for peer in ("disk", "files", "switch"):
            path = str(self._folder / f"{peer}{self._number}")
            self.cables.append(DeafBackEnd(path))
            words += ["-chardev", f"socket,id={peer},path={path}"]
        words += ["-device", "vhost-user-blk-device,id=d,chardev=disk,num-queues=2"]
        words += ["-device", "vhost-user-fs-device,id=f,chardev=files,tag=share"]
        words += ["-netdev", "vhost-user,id=n1,chardev=switch,queues=2", "-netdev", "tap,id=n2,ifname=unused,vhost=on"]
        words += ["-device", "virtio-net-device,netdev=n1,id=n1,mq=on", "-device", "virtio-net-device,netdev=n2,id=n2"]
        return [*words, "-device", "vhost-vsock-device,id=v,guest-cid=5"]


@pytest.fixture(params=["microvm", "microvm,acpi=off", "microvm,mem-share=on"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    machines = (OthersMachines if "mem-share" in request.param else Machines)(request.param, tmp_path)
    monkeypatch.setattr(net, "open_netdev", machines.open_network)
    monkeypatch.setattr(VhostKernel, "open", deaf_vhost)
    yield machines
    machines.unplug()


@pytest.fixture
def machines(make: Machines) -> Iterator[tuple[VirtualMachine, VirtualMachine]]:
    with make() as first, make() as second:
        first.start()
        second.start()
        yield first, second


class Driver:
    """A driver of the device in one slot, which uses all of its queues."""

    def __init__(self, vm: VirtualMachine, slot: int) -> None:
        self.vm, self.slot = vm, slot
        self.access = vm.test_access()
        self.type = self.register(0x008)
        self._offered: dict[int, int] = {}

    def register(self, offset: int, value: int | None = None) -> int:
        address = Layout.slot(self.slot).base + offset
        if value is not None:
            self.access.write(address, value.to_bytes(4, "little"))
            return value
        return int.from_bytes(self.access.read(address, 4), "little")

    def start(self) -> None:
        self.register(0x070, 1)
        self.register(0x070, 3)
        # Many ports of a console; commands and filters of a network card; every device's VERSION_1.
        for word, bits in ((0, {CONSOLE: 1 << 1, NET: 1 << 17 | 1 << 18}.get(self.type, 0)), (1, 1)):
            self.register(0x024, word)
            self.register(0x020, bits)
        self.register(0x070, 11)
        for index in range(64):
            self.register(0x030, index)
            if not self.register(0x034):
                break
            ring = self._ring(index)
            self.register(0x038, 8)
            for offset, address in ((0x080, ring), (0x090, ring + 0x100), (0x0A0, ring + 0x200)):
                self.register(offset, address)
            self.register(0x044, 1)
        self.register(0x070, 15)
        assert self.register(0x070) == 15

    def request(self, queue: int, *parts: bytes | int) -> None:
        """Offer bytes to read and room to write, and wait until the device has used them."""
        ring, number = self._ring(queue), self._offered.get(queue, 0)
        at = ring + 0x400
        for index, part in enumerate(parts):
            length = part if isinstance(part, int) else len(part)
            if isinstance(part, bytes):
                self.access.write(at, part)
            flags = (index + 1 < len(parts)) | isinstance(part, int) << 1
            self.access.write(ring + 16 * index, struct.pack("<QIHH", at, length, flags, index + 1))
            at += length
        self.access.write(ring + 0x104 + 2 * (number % 8), bytes(2))
        self._offered[queue] = number + 1
        self.access.write(ring + 0x102, (number + 1).to_bytes(2, "little"))
        self.register(0x050, queue)
        deadline = time.monotonic() + LIMIT
        while int.from_bytes(self.access.read(ring + 0x202, 2), "little") != number + 1:
            assert time.monotonic() < deadline, f"the device of slot {self.slot} has not served queue {queue}"
            for loop in (self.vm.main_loop, *self.vm.io_threads.values()):
                loop.run(lambda: None)

    def _ring(self, queue: int) -> int:
        return RINGS + SLOT * self.slot + QUEUE * queue

    def work(self) -> None:
        """Do what leaves something to save. Nobody answers on a queue that is another's here."""
        device = self.vm.slots[self.slot].device
        if self.type == BLK and device is not None and 0 not in device.handed_over:
            self.request(0, struct.pack("<IIQ", 0, 0, 0), 512, 1)
        elif self.type == NET:
            self.request(2, b"\0\0", b"\1", 1)  # promiscuous
        elif self.type == CONSOLE:
            self.request(3, struct.pack("<IHH", 0, 0, 1))  # ready: the ports are made known to it, and wait for buffers
        elif self.type == RNG:
            self.request(0, 16)
        elif self.type == BALLOON:
            self.register(0x104, 5)  # pages


def touch(vm: VirtualMachine) -> list[Driver]:
    """Leave traces in every device that a guest can write to; return the drivers."""
    drivers = [Driver(vm, slot) for slot in vm.slots]
    for driver in drivers:
        driver.start()
        driver.work()
    access = vm.test_access()
    access.write_port(0x3FB, 1, 0x83)
    access.write_port(0x3F8, 1, 0x42)
    access.write_port(0x70, 1, 0x0B)
    access.write_port(0x71, 1, 0x56)
    access.write_port(0x70, 1, 0x40)
    access.write_port(0x71, 1, 0x99)
    if vm.machine.io_apic:
        access.write(Layout.SECOND_IO_APIC.base, (0x12).to_bytes(4, "little"))
        access.write(Layout.SECOND_IO_APIC.base + 0x10, (0x31).to_bytes(4, "little"))
    vm.machine.press_power_button()
    vm.machine.hypervisor.interrupt_line(5).trigger()
    return drivers


def saved(vm: VirtualMachine) -> dict[str, State]:
    vm.machine.pause()
    return vm.machine.save()


def moved(first: VirtualMachine, second: VirtualMachine) -> dict[str, State]:
    """Save one machine and restore the other, memory and all, through bytes as a snapshot has them. Returns the states."""
    states = saved(first)
    second.machine.pause()
    length = SLOT * (max(first.slots) + 1)
    second.machine.memory.write(RINGS, first.machine.memory.read(RINGS, length))
    second.machine.restore({name: decode(encode(state), type(state), name) for name, state in states.items()})
    return states


def test_the_machine_has_every_kind_of_device(make: Machines) -> None:
    with make() as vm:
        types = {Driver(vm, slot).type for slot in vm.slots}
        assert types == make.types
        assert ("io-apic" in vm.machine.components) is make.io_apic


def test_a_machine_is_the_same_after_save_and_restore(make: Machines, machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, second = machines
    touch(first)
    fresh = saved(second)
    states = moved(first, second)
    assert second.machine.save() == states
    names = {"rtc", "serial", "hypervisor", *(f"vcpu{cpu}" for cpu in range(make.cpus))}
    names |= ({"acpi", "acpi-slots"} if make.acpi else set()) | ({"io-apic"} if make.io_apic else set())
    assert {f"{kind}{slot}" for kind in ("virtio-mmio", "virtio") for slot in first.slots} | names == states.keys()
    # The test is about something: what can hold a trace holds one.
    traced = {name for name in states if states[name] != fresh[name]}
    assert traced >= {name for name in states if name.startswith("virtio-mmio")} | {"rtc", "serial", "hypervisor"}
    assert ("acpi" in traced, "io-apic" in traced) == (make.acpi, make.io_apic)
    assert {type(states[name]) for name in traced} >= make.states


def test_drivers_go_on_with_the_devices_of_the_other_machine(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, second = machines
    drivers = touch(first)
    moved(first, second)
    second.machine.resume()
    for driver in drivers:
        driver.vm, driver.access = second, second.test_access()
        assert driver.register(0x070) == 15
        driver.work()
        assert driver.register(0x070) == 15


def test_every_component_takes_part_in_reset(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, second = machines
    before = saved(second)
    touch(first)
    first.machine.reset()
    after = saved(first)
    for name in before.keys() - {"rtc", "serial", "hypervisor"}:  # time and CMOS, bytes on the wire, and what the test recorded
        assert after[name] == before[name], name


def test_a_state_of_another_machine_is_refused_by_name(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, _ = machines
    states = saved(first)
    del states["rtc"]
    with pytest.raises(StateError, match="rtc"):
        first.machine.restore(states)


def test_every_component_refuses_another_s_state_by_name(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, _ = machines
    touch(first)
    states = saved(first)
    for name in states:
        other = "serial" if name != "serial" else "rtc"
        with pytest.raises(StateError):
            first.machine.restore({**states, name: states[other]})
    first.machine.restore(states)
    assert first.machine.save() == states


@pytest.mark.parametrize("use", [touch, lambda vm: moved(vm, vm)], ids=["used", "restored"])
def test_building_and_closing_a_machine_gives_every_descriptor_back(make: Machines, use: Callable[[VirtualMachine], Any]) -> None:
    def descriptors() -> int:
        make.unplug()  # what serves a device from outside has ended, and holds nothing
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    gc.collect()  # what other tests left would go in the middle of this one
    with make():
        pass
    before = descriptors()
    for _ in range(3):
        with make() as vm:
            vm.start()
            use(vm)
            vm.machine.reset()
    assert descriptors() == before
