"""Every example of StratoVirt's QMP manual on a machine with KVM, a tap and direct I/O: what needs root and a real host.

The same replay in test mode, with a driver of the balloon and the manual's content in memory, is in the tests of packages/cli
(test_qmp_manual.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "cli" / "tests"))

from free_port import reserved_port
from lab import guests
from lab.vmm import Vmm
from qmp_manual import EXACT, REFUSED, Refusal, Replay
from vm_process import Client


@pytest.fixture
def tap0() -> Iterator[None]:
    subprocess.run(["modprobe", "tun"], check=True)
    subprocess.run(["ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"], check=True)
    subprocess.run(["ip", "link", "set", "tap0", "up"], check=True)
    yield
    subprocess.run(["ip", "link", "del", "tap0"], check=True)


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_every_example_of_the_manual_is_answered_as_printed(
    start: Callable[..., Vmm],
    cloud_kernel: guests.Kernel,
    folder: Path,
    direct_folder: Path,
    tap0: None,
    port: int,
    transport: str,
) -> None:
    (direct_folder / "block").write_bytes(bytes(1 << 20))
    unix, tcp = str(folder / "qmp.sock"), ("127.0.0.1", port)
    vmm = start(
        *("-machine", "microvm", "-smp", 2, "-m", 6144, "-S", "-kernel", cloud_kernel.image, "-append", "console=ttyS0 quiet"),
        *("-device", "virtio-balloon-device,id=balloon", "-serial", "stdio"),
        *("-qmp", f"unix:{unix},server,nowait" if transport == "unix" else f"tcp:127.0.0.1:{port},server,nowait"),
    )
    # Nobody drives the balloon: no guest has booted. For the same reason the memory at the manual's address is empty.
    refused = {**REFUSED, "balloon": Refusal("No balloon device has been activated", "no driver", "DeviceNotActive")}
    if transport == "tcp":
        refused["getfd"] = Refusal("Invalid SCM message", "descriptors travel over unix sockets only")
    with Client(unix if transport == "unix" else tcp, early=True) as client, (folder / "passed").open("wb") as passed:
        Replay(
            client,
            arguments={
                "blockdev-add": {"file": {"driver": "file", "filename": str(direct_folder / "block"), "aio": "native"}},
                "chardev-add": {
                    "backend": {
                        "type": "socket",
                        "data": {"addr": {"type": "unix", "data": {"path": str(folder / "peer")}}, "server": False},
                    }
                },
                "trace-get-state": {"name": "^serial_read$"},
                "trace-set-state": {"name": "^serial_read$"},
            },
            before={
                "stop": lambda: client.run("cont"),
                "device_add": lambda: client.run("netdev_add", {"id": "net-0", "ifname": "tap0"}),
            },
            refused=refused,
            exact=EXACT - {"query-balloon", "query-mem-gpa"},
            fds={"getfd": [passed.fileno()]} if transport == "unix" else {},
        ).run()
    assert vmm.wait() == 0
