"""Every example of StratoVirt's QMP manual against the running program, over each of the sockets that the manual has.

What takes root and /dev/net/tun is done with the real thing in tests/lab/test_manual.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmp_manual import REFUSED, Refusal, Replay, examples
from qmp_protocol.commands import STRATOVIRT
from vm_process import LIMIT, Client, Vm

BALLOON_SLOT = 6
MiB = 1 << 20
MEMORY = 6144  # MiB, so that the manual's address is memory; as nobody writes to it, it takes nothing


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as name:
        yield Path(name)


def test_the_manual_has_the_examples_that_we_think() -> None:
    assert len(examples()) == 29
    assert {example.request["execute"] for example in examples()} <= set(STRATOVIRT.commands)
    assert REFUSED.keys() <= {example.request["execute"] for example in examples()}
    assert all(refusal.desc and refusal.why for refusal in REFUSED.values())


@pytest.mark.parametrize("swapped", [False, True], ids=["qmp unix, mon tcp", "qmp tcp, mon unix"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_every_example_of_the_manual_is_answered_as_printed(folder: Path, transport: str, swapped: bool) -> None:
    program = (str(Path(__file__).with_name("vm_with_tap.py")),)
    with (
        Vm(folder, "-device", "virtio-balloon-device,id=balloon", memory=str(MEMORY), swapped=swapped, program=program) as vm,
        Client(getattr(vm, transport)) as client,
    ):
        refused = dict(REFUSED)
        if transport == "tcp":
            refused["getfd"] = Refusal("Invalid SCM message", "descriptors travel over unix sockets only")
        with (folder / "passed").open("wb") as passed:
            Replay(
                client,
                arguments=_arguments(folder),
                before=_preparations(vm, client),
                refused=refused,
                fds={"getfd": [passed.fileno()]} if transport == "unix" else {},
            ).run()
        assert vm.process.wait(LIMIT) == 0
        assert not Path(vm.unix).exists()


def _arguments(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manual leaves to its readers: paths, and the name of a trace point."""
    disk = folder / "block"
    disk.write_bytes(bytes(MiB))
    file = {"driver": "file", "filename": str(disk), "aio": "native"}
    drive: dict[str, Any] = {"file": file}
    try:
        os.close(os.open(disk, os.O_RDONLY | os.O_DIRECT))
    except OSError:  # not every file system of a temporary folder can; that of the lab's test can
        drive = {"file": {**file, "aio": "threads"}, "cache": {"direct": False}}
    address = {"type": "unix", "data": {"path": str(folder / "socket")}}
    return {
        "blockdev-add": drive,
        "chardev-add": {"backend": {"type": "socket", "data": {"addr": address, "server": False}}},
        "trace-get-state": {"name": "^serial_read$"},
        "trace-set-state": {"name": "^serial_read$"},
    }


def _preparations(vm: Vm, client: Client) -> dict[str, Any]:
    """What has to be so for an example to come out as printed."""
    return {
        # Its own example has removed it.
        "device_add": lambda: client.run("netdev_add", {"id": "net-0", "ifname": "tap0"}),
        "balloon": lambda: vm.drive_slot(BALLOON_SLOT),
        # The guest gives what it was asked for: the field `actual` of virtio 1.2, section 5.5.4.
        "query-balloon": lambda: vm.register(BALLOON_SLOT, 0x104, (MEMORY - 2048) * MiB // 4096),
        "query-mem-gpa": lambda: vm.ask("writel 0x13c4d1d00 0xb9000001"),
    }
