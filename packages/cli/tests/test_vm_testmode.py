"""The whole machine in test mode: the command with `-mod-test` and QMP beside it, as device test suites drive a VMM."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

LIMIT = 60.0  # seconds, for what takes a tenth of one
SLOT = 0xF010_0000


class Harness:
    """A test suite's side: it listens on the test socket, and is a QMP client."""

    def __init__(self, folder: Path, *options: str, stdout: Any = subprocess.PIPE) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "test"))
        listener.listen()
        listener.settimeout(LIMIT)
        command = [sys.executable, "-m", "pystratovirt", "-machine", "microvm", "-mod-test", str(folder / "test")]
        command += ["-qmp", f"unix:{folder}/qmp,server,nowait", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)
        self.test, _ = listener.accept()
        listener.close()
        self.test.settimeout(LIMIT)
        self.qmp = socket.socket(socket.AF_UNIX)
        self.qmp.settimeout(LIMIT)
        self.qmp.connect(str(folder / "qmp"))  # it is there when the test socket is connected
        self.lines = self.qmp.makefile("rb")
        assert "QMP" in json.loads(self.lines.readline())

    def ask(self, request: str) -> str:
        self.test.sendall(request.encode())
        reply = b""
        while not reply.endswith(b"\n"):
            data = self.test.recv(65536)
            assert data, self.process.stderr and self.process.stderr.read()
            reply += data
        assert reply.endswith(b"\r\n")
        return reply[:-2].decode()

    def execute(self, command: str) -> list[dict[str, Any]]:
        """Run a command; return its reply and the events before it."""
        self.qmp.sendall(json.dumps({"execute": command}).encode())
        messages = []
        while not messages or "event" in messages[-1]:
            messages.append(json.loads(self.lines.readline()))
        return messages

    def register(self, slot: int, offset: int) -> int:
        return int(self.ask(f"readl {SLOT + slot * 0x200 + offset:#x}").removeprefix("OK "), 16)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.lines.close()
        self.qmp.close()
        self.test.close()


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    harness = Harness(
        tmp_path,
        *("-drive", f"file={tmp_path}/disk,id=d,direct=off", "-device", "virtio-blk-device,drive=d,id=d"),
        *("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r,id=rng"),
        *("-serial", f"file,path={tmp_path}/console"),
    )  # fmt: skip
    yield harness
    harness.close()


def test_slots_hold_four_disks_two_network_devices_and_then_the_rest(harness: Harness) -> None:
    assert [harness.register(slot, 0) for slot in range(8)] == [0x74726976] * 7 + [0]
    assert [harness.register(slot, 8) for slot in range(7)] == [2, 2, 2, 2, 1, 1, 4]
    # Capacity in sectors: the first disk has its drive, the others wait for one.
    assert [harness.register(slot, 0x100) for slot in range(4)] == [2048, 0, 0, 0]


def test_memory_and_ports_answer_over_the_socket(harness: Harness) -> None:
    assert harness.ask("write 0x1000 4 0x01020304") == "OK"
    assert harness.ask("readl 0x1000") == "OK 0x0000000004030201"
    assert harness.ask("read 0x1000 4") == "OK 0x01020304"
    assert harness.ask("outb 0x3f8 0x41") == "OK"
    assert harness.ask("fly me to the moon") == "Unsupported command: fly"
    assert harness.ask("readl") != "OK"


def test_time_stands_still_until_it_is_told_to_move(harness: Harness) -> None:
    assert harness.ask("clock_step 1000") == "OK 1000"
    assert harness.ask("clock_set 500") == "OK 1000"
    assert harness.ask("clock_set 5000") == "OK 5000"


def test_qmp_runs_beside_the_test_socket(harness: Harness) -> None:
    assert harness.execute("query-status") == [{"return": {"running": True, "singlestep": False, "status": "running"}}]
    assert [next(iter(message)) for message in harness.execute("stop")] == ["event", "return"]
    assert harness.execute("query-status")[0]["return"]["status"] == "paused"
    assert [next(iter(message)) for message in harness.execute("cont")] == ["event", "return"]
    assert harness.execute("quit") == [{"return": {}}]
    assert json.loads(harness.lines.readline())["event"] == "SHUTDOWN"
    assert harness.process.wait(LIMIT) == 0


def test_closing_the_test_socket_ends_the_process(harness: Harness) -> None:
    harness.test.close()
    assert harness.process.wait(LIMIT) == 1


def test_a_reset_gives_the_machine_its_power_on_state(harness: Harness, tmp_path: Path) -> None:
    assert harness.ask(f"writel {SLOT + 0x70:#x} 1") == "OK"
    assert harness.register(0, 0x70) == 1
    assert harness.execute("system_reset") == [{"return": {}}]
    assert json.loads(harness.lines.readline())["event"] == "RESET"
    assert harness.register(0, 0x70) == 0


def test_a_guest_that_asks_for_power_off_through_acpi_ends_the_process(harness: Harness) -> None:
    assert harness.ask("writeb 0xf0000010 0x34") == "OK"  # SLP_EN and SLP_TYP 5
    assert json.loads(harness.lines.readline())["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert harness.process.wait(LIMIT) == 0


class TestAGuestThatIsToldToIgnoreAcpi:
    """As Kata Containers' guests are, on a machine that has it all the same: what they meet is StratoVirt's machine."""

    @pytest.fixture
    def kata(self, tmp_path: Path) -> Iterator[Harness]:
        harness = Harness(tmp_path, "-append", "reboot=k panic=1 acpi=off console=hvc0")
        yield harness
        harness.close()

    def test_a_panic_ends_the_process(self, kata: Harness) -> None:
        assert kata.ask("outb 0x64 0xfe") == "OK"  # the keyboard controller's reset line: reboot=k
        assert json.loads(kata.lines.readline())["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert kata.process.wait(LIMIT) == 0

    @pytest.mark.parametrize("command", ["system_reset", "system_powerdown"])
    def test_a_client_s_reset_and_power_button_end_the_process(self, kata: Harness, command: str) -> None:
        assert kata.execute(command) == [{"return": {}}]
        assert json.loads(kata.lines.readline())["event"] == "SHUTDOWN"
        assert kata.process.wait(LIMIT) == 0

    def test_the_clock_keeps_a_driver_from_claiming_the_interrupt_of_the_fourth_disk(self, kata: Harness) -> None:
        kata.ask("outb 0x70 0x0b")
        assert int(kata.ask("inb 0x71").removeprefix("OK "), 16) & 2 == 0  # register B, 24 hours: Linux wants them


def test_a_guest_that_looks_at_acpi_has_a_clock_with_24_hours(harness: Harness) -> None:
    harness.ask("outb 0x70 0x0b")
    assert int(harness.ask("inb 0x71").removeprefix("OK "), 16) & 2


def test_the_guest_s_output_reaches_its_file_before_the_end(harness: Harness, tmp_path: Path) -> None:
    for byte in b"bye\n":
        harness.ask(f"outb 0x3f8 {byte:#x}")
    harness.execute("quit")
    assert harness.process.wait(LIMIT) == 0
    assert (tmp_path / "console").read_bytes() == b"bye\n"


@pytest.mark.parametrize("serial", ["stdio", "file,path=/dev/full"])
def test_output_that_is_lost_is_one_warning(tmp_path: Path, serial: str) -> None:
    with Path("/dev/full").open("wb") as full:
        harness = Harness(tmp_path, "-serial", serial, stdout=full)
    for byte in b"two\nlines\n":
        harness.ask(f"outb 0x3f8 {byte:#x}")
    harness.execute("quit")
    assert harness.process.wait(LIMIT) == 0
    assert harness.process.stderr is not None
    errors = harness.process.stderr.read().decode()
    harness.close()
    assert re.fullmatch(r".*:WARN: .*: output .*: No space left on device\n", errors)


def test_nothing_of_kvm_is_opened_in_test_mode(harness: Harness) -> None:
    links = []
    for fd in Path(f"/proc/{harness.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # what it opens for a moment, such as a module
            links.append(str(fd.readlink()))
    assert any(link.startswith("socket:") for link in links)
    assert "/dev/kvm" not in links


def test_starts_in_a_row_leave_nothing(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        harness = Harness(folder)
        harness.execute("quit")
        assert harness.process.wait(LIMIT) == 0
        harness.close()
        assert sorted(entry.name for entry in folder.iterdir()) == ["test"]
