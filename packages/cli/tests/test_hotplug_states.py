"""Every sequence of hot-plug commands, against a model: answers, what the guest sees, and nothing left behind.

The server, the handlers, the machine and its devices are the real ones, in test mode. Networks are socket pairs that are passed
with getfd, and those of another process, which moves nothing. Some commands come while the process is out of descriptors.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from block_qcow2 import create_image
from block_qcow2.errors import ImageInUseError
from block_qcow2.locks import lock
from pystratovirt.devices import net
from running_vm import RunningVm, holdings, open_pair

NAMES = [f"n{number}" for number in range(6)]
FILES = ["raw", "other", "qcow2", "folder", "missing"]
SIZE = 1 << 20
SWITCH = "import sys; sys.path.insert(0, sys.argv[1]); from deaf_peers import serve_all; serve_all(sys.argv[2])"
MACHINE = "microvm,mem-share=on"

names = st.sampled_from(NAMES)
starved = st.sampled_from([False, False, False, True])


class Plugged(NamedTuple):
    """A device: which back end it has, and where."""

    kind: str
    backend: str
    slot: int


@contextmanager
def out_of_descriptors(really: bool) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if really:
        probe = os.open("/", os.O_RDONLY)
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))  # from the lowest that is free on
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lock(fd, str(path), write=True)
    except ImageInUseError:
        return True
    finally:
        os.close(fd)
    return False


class HotPlugging(RuleBasedStateMachine):
    """The model is which back ends there are, which device has which, and which character devices there are."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hp-", dir="/tmp"))
        for name in ("raw", "other"):
            (self.folder / name).write_bytes(bytes(SIZE))
        create_image(str(self.folder / "qcow2"), format="qcow2", size=SIZE)
        (self.folder / "folder").mkdir()
        self.original, net.open_netdev = net.open_netdev, open_pair  # type: ignore[assignment]
        self.drives: dict[str, tuple[str, bool]] = {}
        self.networks: set[str] = set()
        self.unconnected: set[str] = set()
        self.devices: dict[str, Plugged] = {}
        self.gone: set[tuple[str, str]] = set()
        self.passed: set[str] = set()
        self.far_ends: list[socket.socket] = []  # of all that were passed: a network whose other end is closed has no link
        self.chardevs: dict[str, bool] = {}  # whether something uses it
        self.led: set[str] = set()  # those that lead to the process below
        self.carried: dict[str, str] = {}  # networks of that process, by the chardev that they have
        words = [sys.executable, "-c", SWITCH, str(Path(__file__).parent), str(self.folder / "switch")]
        self.switch = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self.switch.stdout is not None
        assert self.switch.stdout.readline() == b"ready\n"
        self.paused = False

    @initialize(furnished=st.booleans())
    def start(self, furnished: bool) -> None:
        """Begin with an empty machine, or with devices of the command line under the same names."""
        options: list[str] = []
        if furnished:
            options += ["-chardev", f"file,id=n0,path={self.folder}/log", "-serial", "chardev:n0"]
            options += ["-drive", f"file={self.folder}/raw,id=n0,direct=off,aio=threads", "-netdev", "tap,id=n2,ifname=pair"]
            options += ["-netdev", "tap,id=n4,ifname=pair", "-object", "rng-random,id=r,filename=/dev/urandom"]
            options += ["-device", "virtio-blk-device,drive=n0,id=n1", "-device", "virtio-net-device,netdev=n2,id=n3"]
            options += ["-device", "virtio-net-device,netdev=n4", "-device", "virtio-rng-device,rng=r,id=n5"]
        self.reserved = {"n5"} if furnished else set()
        with RunningVm(self.folder, *options, machine=MACHINE) as self.vm:
            if furnished:
                self.vm.run("device_del", id="n1")
                self.vm.run("device_del", id="n3")
            self.know_what_an_idle_machine_holds()
        self.vm = RunningVm(self.folder, *options, machine=MACHINE)
        if furnished:
            self.drives, self.networks, self.chardevs = {"n0": ("raw", False)}, {"n2", "n4"}, {"n0": True}
            self.devices = {"n1": Plugged("blk", "n0", 0), "n3": Plugged("net", "n2", 4), "": Plugged("net", "n4", 5)}

    def know_what_an_idle_machine_holds(self) -> None:
        """What is loaded or started once and for all is there after a first round."""
        self.vm.drive_slot(0)
        for kind, name in (("other", "n0"), ("qcow2", "n1")):
            self.vm.add_drive(name, self.folder / kind, driver="qcow2" if kind == "qcow2" else "raw")
            self.vm.run("device_add", id=name, driver="virtio-blk-mmio")
            self.vm.run("device_del", id=name)
        self.pass_descriptor("n0")
        self.vm.run("netdev_add", id="n0", fds="n0")
        self.vm.run("device_add", id="n0", driver="virtio-net-mmio")
        self.vm.run("device_del", id="n0")
        self.passed.clear()
        self.close_far_ends()
        self.vm.run("chardev-add", id="n1", backend=self.socket("switch"))
        self.vm.run("netdev_add", id="n1", type="vhost-user", chardev="n1")
        self.vm.run("device_add", id="n1", driver="virtio-net-mmio")
        self.vm.run("device_del", id="n1")
        self.vm.run("chardev-remove", id="n1")
        self.idle = holdings()

    def socket(self, name: str) -> dict[str, Any]:
        """What chardev-add says of a socket of the test's folder."""
        return {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": str(self.folder / name)}}, "server": False}}

    def attempt(self, right: bool, command: str, starve: bool = False, **arguments: Any) -> bool:
        """Run a command that has to work exactly when it is `right`, or may fail as well when there are no descriptors."""
        with out_of_descriptors(starve):
            reply = self.vm.answers(command, **arguments)[-1]
        if "return" in reply:
            assert right, f"{command} {arguments} went through"
            return True
        assert reply["error"]["class"] == "GenericError"
        desc = reply["error"]["desc"]
        assert desc
        assert "failed: " not in desc or starve, f"{command} is a bug of ours: {desc}"
        assert not right or starve, f"{command} {arguments} was refused: {desc}"
        return False

    def pass_descriptor(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        self.vm.run("getfd", (theirs.fileno(),), fdname=name)
        self.passed.add(name)
        self.far_ends.append(ours)
        theirs.close()

    def close_far_ends(self) -> None:
        while self.far_ends:
            self.far_ends.pop().close()

    @property
    def taken(self) -> set[str]:
        """What a new back end cannot be called."""
        return {*self.drives, *self.networks, *self.devices}

    @property
    def full(self) -> bool:
        return len(self.drives) + len(self.networks) >= 6

    def waiting(self, name: str) -> str | None:
        """The kind of the back end of that name which no device has."""
        if name in {device.backend for device in self.devices.values()}:
            return None
        return "blk" if name in self.drives else "net" if name in self.networks else None

    def forget(self, backend: str) -> None:
        self.drives.pop(backend, None)
        self.networks.discard(backend)
        self.unconnected.discard(backend)
        if chardev := self.carried.pop(backend, None):
            self.chardevs[chardev] = False

    def may_open(self, file: str, read_only: bool) -> bool:
        if file not in ("raw", "other", "qcow2"):
            return False
        return all(other != file or (read_only and shared) for other, shared in self.drives.values())

    @rule(name=names, file=st.sampled_from(FILES), read_only=st.booleans(), human=st.booleans(), starve=starved)
    def add_drive(self, name: str, file: str, read_only: bool, human: bool, starve: bool) -> None:
        right = self.may_open(file, read_only) and name not in self.taken and not self.full
        image = "qcow2" if file == "qcow2" else "raw"
        if human:
            line = f"drive_add 0 id={name},file={self.folder / file},format={image},direct=off,aio=threads"
            line += f",readonly={'on' if read_only else 'off'}"
            done = self.attempt(right, "human-monitor-command", starve, command_line=line)
        else:
            arguments = {"node_name": name, "driver": image, "read_only": read_only, "cache": {"direct": False}}
            file_ = {"driver": "file", "filename": str(self.folder / file), "aio": "threads"}
            done = self.attempt(right, "blockdev-add", starve, file=file_, **arguments)
        if done:
            self.drives[name] = (file, read_only)
            self.gone.discard(("blk", name))

    @rule(name=names, descriptor=st.none() | names, starve=starved)
    def add_network(self, name: str, descriptor: str | None, starve: bool) -> None:
        right = (descriptor is None or descriptor in self.passed) and name not in self.taken and not self.full
        if self.attempt(right, "netdev_add", starve, id=name, **({} if descriptor is None else {"fds": descriptor})):
            self.networks.add(name)
            self.gone.discard(("net", name))
            if descriptor is None:
                self.unconnected.add(name)
            else:
                self.passed.remove(descriptor)

    @rule(name=names)
    def pass_a_descriptor(self, name: str) -> None:
        self.pass_descriptor(name)

    @rule(
        name=names,
        kind=st.sampled_from(["blk", "net", "rng"]),
        number=st.integers(0, 4),
        other=st.none() | names,
        starve=starved,
    )
    def plug(self, name: str, kind: str, number: int, other: str | None, starve: bool) -> None:
        backend = name if self.waiting(name) or other is None else other
        room = {"blk": 4, "net": 2}.get(kind, 0)
        slot = number + 4 * (kind == "net")
        right = self.waiting(backend) == kind and number < room and name not in {*self.devices, *self.reserved}
        right = right and slot not in {device.slot for device in self.devices.values()}
        more = {} if other is None else {"drive" if kind == "blk" else "netdev": other}
        if self.attempt(right, "device_add", starve, id=name, driver=f"virtio-{kind}-mmio", addr=hex(number), **more):
            self.devices[name] = Plugged(kind, backend, slot)

    @rule(name=names | st.just(""))
    def unplug(self, name: str) -> None:
        device = self.devices.get(name) if name else None
        kind, backend = (device.kind, device.backend) if device else (self.waiting(name), name)
        if self.attempt(kind is not None, "device_del", id=name):
            assert kind
            self.devices.pop(name, None)
            self.forget(backend)
            self.gone.add((kind, backend))

    @rule(name=names, kind=st.sampled_from(["blk", "net"]), human=st.booleans())
    def remove(self, name: str, kind: str, human: bool) -> None:
        there = name in (self.drives if kind == "blk" else self.networks)
        right = self.waiting(name) == kind if there else (kind, name) in self.gone
        if kind == "net":
            done = self.attempt(right, "netdev_del", id=name)
        elif human:
            done = self.attempt(right, "human-monitor-command", command_line=f"drive_del {name}")
        else:
            done = self.attempt(right, "blockdev-del", node_name=name)
        if done and there:
            self.forget(name)
        elif done:
            self.gone.remove((kind, name))

    @rule(name=names, leads=st.booleans())
    def add_a_character_device(self, name: str, leads: bool) -> None:
        backend = self.socket("switch" if leads else "nobody")
        if self.attempt(name not in self.chardevs, "chardev-add", id=name, backend=backend):
            self.chardevs[name] = False
            if leads:
                self.led.add(name)

    @rule(name=names)
    def remove_a_character_device(self, name: str) -> None:
        if self.attempt(self.chardevs.get(name) is False, "chardev-remove", id=name):
            del self.chardevs[name]
            self.led.discard(name)

    @rule(name=names, chardev=names, free=st.booleans(), starve=starved)
    def add_a_network_of_the_process(self, name: str, chardev: str, free: bool, starve: bool) -> None:
        if free:  # else hardly one in a thousand would be right
            chardev = min((each for each in self.led if not self.chardevs[each]), default=chardev)
            name = min((each for each in NAMES if each not in self.taken), default=name)
        right = self.chardevs.get(chardev) is False and chardev in self.led and name not in self.taken and not self.full
        if self.attempt(right, "netdev_add", starve, id=name, type="vhost-user", chardev=chardev):
            self.networks.add(name)
            self.gone.discard(("net", name))
            self.carried[name] = chardev
            self.chardevs[chardev] = True

    @rule(slot=st.integers(0, 5))
    def load_a_driver(self, slot: int) -> None:
        self.vm.drive_slot(slot)

    @rule(paused=st.booleans())
    def stop_or_go_on(self, paused: bool) -> None:
        self.attempt(True, "stop" if paused else "cont")
        self.paused = paused

    @rule()
    @precondition(lambda self: not self.paused)
    def reset(self) -> None:
        self.attempt(True, "system_reset")

    @invariant()
    def clients_are_told_what_there_is(self) -> None:
        users = {device.backend: name for name, device in self.devices.items() if device.kind == "blk"}
        listed = {each["device"]: each["qdev"] for each in self.vm.run("query-block")}
        assert listed == {name: users.get(name, "") for name in self.drives}
        assert {each["label"]: each["frontend-open"] for each in self.vm.run("query-chardev")} == self.chardevs

    @invariant()
    def the_guest_sees_what_is_plugged(self) -> None:
        plugged = {device.slot for device in self.devices.values() if device.backend not in self.unconnected}
        assert [self.vm.capacity(slot) for slot in range(4)] == [SIZE // 512 * (slot in plugged) for slot in range(4)]
        links = [self.vm.register(slot, 0x104) >> 16 & 1 for slot in (4, 5)]
        assert links == [int(slot in plugged) for slot in (4, 5)]

    @invariant()
    def images_are_locked_exactly_while_there_is_a_drive(self) -> None:
        used = {file for file, _ in self.drives.values()}
        for file in ("raw", "other", "qcow2"):
            assert is_locked(self.folder / file) == (file in used)

    def teardown(self) -> None:
        try:
            if hasattr(self, "idle"):
                self.end()
        finally:
            net.open_netdev = self.original
            self.switch.kill()
            self.switch.communicate()
            shutil.rmtree(self.folder)

    def end(self) -> None:
        """Take away what can be, and see that nothing else is left."""
        try:
            for name in {*self.devices, *self.drives, *self.networks}:
                if name in self.devices or self.waiting(name):
                    self.unplug(name)
            for name in list(self.passed):
                # Nobody else asks for them: what is in the table is closed when its name is used again, or at the end.
                free = next(each for each in NAMES if each not in self.taken)
                self.add_network(free, name, False)
                self.unplug(free)
            self.close_far_ends()
            assert holdings() == self.idle
        finally:
            self.close_far_ends()
            self.vm.close()


HotPlugging.TestCase.settings = settings(
    phases=[Phase.generate],  # to shrink a leak takes minutes; who looks for one lets it
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestEverySequence = HotPlugging.TestCase


@pytest.mark.soak
class TestEveryLongSequence(HotPlugging.TestCase):  # type: ignore[misc, name-defined]
    """The same for longer, and other sequences each time."""

    settings = settings(max_examples=1000, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck))
