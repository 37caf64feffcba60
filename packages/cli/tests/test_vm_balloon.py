"""The balloon of a whole machine in test mode: what a client asks, what the guest sees, and in which order a client is told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pystratovirt.cmdline import parse
from pystratovirt.cmdline.errors import CommandLineError
from pystratovirt.qmp_handlers.balloon import FLOOR, PAGE, pages_for

LIMIT = 60.0  # seconds, for what takes a tenth of one
WINDOW = 0xF010_0000 + 6 * 0x200  # the first slot behind those of disks and network devices
MiB = 1 << 20
INACTIVE = {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}


class Machine:
    """A machine with a balloon, its test socket, and a client."""

    def __init__(self, folder: Path, properties: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "test"))
        listener.listen()
        listener.settimeout(LIMIT)
        command = [sys.executable, "-m", "pystratovirt", "-m", "512", "-mod-test", str(folder / "test")]
        command += ["-qmp", f"unix:{folder}/qmp,server,nowait", "-device", f"virtio-balloon-device,id=b{properties}"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.test, _ = listener.accept()
        listener.close()
        self.test.settimeout(LIMIT)
        self.qmp = socket.socket(socket.AF_UNIX)
        self.qmp.settimeout(LIMIT)
        self.qmp.connect(str(folder / "qmp"))
        self.lines = self.qmp.makefile("rb")
        assert "QMP" in self.read()

    def ask(self, request: str) -> str:
        self.test.sendall(request.encode())
        reply = b""
        while not reply.endswith(b"\n"):
            reply += self.test.recv(4096)
        return reply.decode().strip()

    def register(self, offset: int) -> int:
        return int(self.ask(f"readl {WINDOW + offset:#x}").removeprefix("OK "), 16)

    def write(self, offset: int, value: int) -> None:
        assert self.ask(f"writel {WINDOW + offset:#x} {value:#x}") == "OK"

    def start_driver(self) -> None:
        for status in (1, 3):
            self.write(0x70, status)
        self.write(0x24, 1)
        self.write(0x20, 1)  # VIRTIO_F_VERSION_1
        for status in (11, 15):
            self.write(0x70, status)
        assert self.register(0x70) == 15

    def read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.lines.readline())
        message.pop("timestamp", None)
        return message

    def execute(self, command: str, **arguments: int) -> list[dict[str, Any]]:
        """Run a command; return its reply behind the events before it."""
        self.qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        messages = [self.read()]
        while "event" in messages[-1]:
            messages.append(self.read())
        return messages

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in (self.lines, self.qmp, self.test):
            end.close()


Make = Callable[..., Machine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Machine] = []

    def make(properties: str = "") -> Machine:
        made.append(Machine(tmp_path, properties))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


def changed(actual: int) -> dict[str, Any]:
    return {"event": "BALLOON_CHANGED", "data": {"actual": actual}}


def test_a_client_moves_the_balloon_and_hears_of_it_in_the_order_of_the_reference(make: Make) -> None:
    machine = make()
    assert machine.register(0x08) == 5
    assert machine.execute("query-balloon") == [{"return": {"actual": 512 * MiB}}]
    assert machine.execute("balloon", value=384 * MiB) == [{"error": INACTIVE}]
    machine.start_driver()
    assert machine.register(0x100) == 128 * MiB // PAGE, "the target waited for the driver"
    assert machine.execute("balloon", value=256 * MiB + 4095) == [changed(512 * MiB), {"return": {}}]
    assert machine.register(0x100) == 256 * MiB // PAGE
    assert machine.register(0x60) == 2, "a configuration change interrupt"
    machine.write(0x104, 100 * MiB // PAGE)
    assert machine.execute("query-balloon") == [{"return": {"actual": 412 * MiB}}]
    machine.write(0x104, 256 * MiB // PAGE)
    machine.ask("clock_step 999000000")
    machine.ask("clock_step 1000000")
    assert machine.read() == changed(256 * MiB)
    assert machine.execute("query-balloon") == [{"return": {"actual": 256 * MiB}}]
    assert machine.execute("balloon", value=1 << 63) == [changed(256 * MiB), {"return": {}}]
    assert machine.register(0x100) == 0
    assert machine.execute("balloon", value=0) == [changed(256 * MiB), {"return": {}}]
    assert machine.register(0x100) == (512 * MiB - FLOOR) // PAGE
    machine.write(0x104, 0xFFFFFFFF)
    assert machine.execute("query-balloon") == [{"return": {"actual": 0}}]


def test_options_are_what_the_guest_is_offered(make: Make) -> None:
    machine = make(",deflate-on-oom=true,free-page-reporting=true,auto-balloon=true,membuf-percent=30,monitor-interval=20")
    assert machine.register(0x10) == 1 << 2 | 1 << 5 | 1 << 16
    machine.write(0x30, 3)
    assert machine.register(0x34) == 256, "four queues"
    machine.write(0x30, 4)
    assert machine.register(0x34) == 0
    assert [machine.register(0x100 + offset) for offset in (0, 4, 8, 12, 16, 20)] == [0, 0, 0, 0, 30, 20]


def test_without_options_it_is_stratovirt_s_device(make: Make) -> None:
    machine = make()
    assert machine.register(0x10) == 0
    machine.write(0x30, 2)
    assert machine.register(0x34) == 0, "two queues"
    assert machine.execute("query-balloon") == [{"return": {"actual": 512 * MiB}}]


@pytest.mark.parametrize(
    ("value", "pages"),
    [(0, 8192), (FLOOR, 8192), (FLOOR + 4095, 8192), (FLOOR + 4096, 8193), (1 << 40, 65536), ((1 << 64) - 1, 65536)],
)
def test_a_guest_keeps_what_its_kernel_needs_and_gets_no_more_than_it_was_given(value: int, pages: int) -> None:
    assert pages_for(value, 65536) == pages
    assert pages_for(0, 1000) == 500


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (["virtio-balloon-device"], "needs id=..."),
        (["virtio-balloon-device,id=a", "virtio-balloon-device,id=b"], "one virtio-balloon-device per machine"),
        (["virtio-balloon-device,id=a,auto-balloon=true,membuf-percent=81"], "membuf-percent=81: must be 20 to 80"),
        (["virtio-balloon-device,id=a,auto-balloon=true,monitor-interval=4"], "monitor-interval=4: must be 5 to 300"),
        (["virtio-balloon-device,id=a,bus=pcie.0"], "has no PCI address"),
    ],
)
def test_a_balloon_that_cannot_be_is_refused(devices: list[str], words: str) -> None:
    with pytest.raises(CommandLineError, match=words):
        parse(["-kernel", "k", *(word for device in devices for word in ("-device", device))])


def test_bounds_of_the_automatic_balloon_do_not_matter_without_it() -> None:
    assert parse(["-kernel", "k", "-device", "virtio-balloon-device,id=a,membuf-percent=5"]).devices[0].id == "a"
