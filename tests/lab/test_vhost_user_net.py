"""A network card that a real switch of another project carries (vhost-user): DPDK's testpmd between the guest and a tap."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import debian, guests
from lab.network import bring_up, configure, never_ending, run, transfer
from lab.vmm import WAIT, Failure, Qmp, Vmm

PROMPT = r"guest:\S*# "

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


class Switch:
    """Forwards frames between a vhost-user socket on which it listens and a tap of its own, in `queues` pairs of queues."""

    def __init__(self, folder: Path, queues: int = 2) -> None:
        self.queues = queues
        self.path = folder / "net.sock"
        self._log = folder / "testpmd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until the tap is there."""
        self.path.unlink(missing_ok=True)  # one that was killed leaves it
        queues = self.queues
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    debian.tool("dpdk-testpmd"), "-l", "0-1", "--no-shconf", "--no-huge", "-m", "128", "--no-pci",
                    "--vdev", f"net_vhost0,iface={self.path},queues={queues}", "--vdev", "net_tap0,iface=tapvu",
                    "--", "--forward-mode=io", "--total-num-mbufs=8192", "--auto-start",
                    f"--rxq={queues}", f"--txq={queues}", "--stats-period=3600",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "RUNTIME_DIRECTORY": str(self.path.parent)},
            )  # fmt: skip
        until(lambda: self.path.exists() and Path("/sys/class/net/tapvu").exists(), self._log)
        configure("tapvu", "10.82.0.1/24")

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(log.read_text())
        time.sleep(0.05)


@pytest.fixture
def switch(request: pytest.FixtureRequest, folder: Path) -> Iterator[Switch]:
    run("modprobe", "tun")
    made = Switch(folder, getattr(request, "param", 2))
    made.start()
    yield made
    made.kill()
    made.path.unlink(missing_ok=True)


@pytest.fixture
def arguments(cloud_kernel: guests.Kernel, folder: Path, rootfs: Path) -> list[object]:
    """A microVM on memory that others may map, without a card. -qmp is folder/qmp.sock."""
    return [
        "-machine", "microvm,mem-share=on", "-smp", 2, "-m", 512, "-kernel", cloud_kernel.image,
        "-initrd", guests.initrd(cloud_kernel, (*guests.MODULES, "virtio_net")),
        "-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1 net.ifnames=0",
        "-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs",
        "-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio",
    ]  # fmt: skip


@pytest.mark.soak
def test_a_switch_carries_frames_both_ways_dies_and_comes_back(
    start: Start, qmp: Connect, arguments: list[object], switch: Switch
) -> None:
    vmm = start(
        *arguments,
        "-chardev", f"socket,id=vu,path={switch.path}",
        "-netdev", "vhost-user,id=net,chardev=vu,queues=2",
        "-device", "virtio-net-device,netdev=net,id=net,mq=on,mac=52:54:00:82:00:02",
    )  # fmt: skip
    vmm.expect(PROMPT)
    client = qmp()
    never_ending(vmm)
    assert vmm.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l").strip() == "2"
    vmm.run("ip addr add 10.82.0.2/24 dev eth0; ip link set eth0 up; until ping -c 1 -W 5 10.82.0.1; do sleep 1; done")
    run(str(guests.busybox()), "ping", "-c", "2", "-W", "20", "10.82.0.2")

    def pause() -> None:
        for _ in range(2):
            client.execute("stop")
            client.execute("cont")

    transfer(vmm, "10.82.0.1", "10.82.0.1", pause)

    # Frames wait while it is away.
    switch.kill()
    vmm.run("ping -c 1 -W 200 10.82.0.1 > /tmp/ping & echo")
    assert client.execute("query-status")["status"] == "running"
    switch.start()
    vmm.run("wait; until ping -c 1 -W 5 10.82.0.1; do sleep 1; done")
    transfer(vmm, "10.82.0.1", "10.82.0.1")
    vmm.send("poweroff")
    assert vmm.wait() == 0
    assert "Traceback" not in vmm.errors()


@pytest.mark.soak
@pytest.mark.parametrize("switch", [1], indirect=True)  # as many pairs as a card has that clients plug in
def test_a_switch_is_plugged_into_a_running_guest_and_pulled_out(
    start: Start, qmp: Connect, arguments: list[object], switch: Switch
) -> None:
    vmm = start(*arguments)
    vmm.expect(PROMPT)
    client = qmp()
    never_ending(vmm)
    before = len(list(Path(f"/proc/{vmm.pid}/fd").iterdir()))
    for _ in range(2):
        backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": str(switch.path)}}, "server": False}}
        client.execute("chardev-add", {"id": "vu", "backend": backend})
        client.execute("netdev_add", {"id": "net", "type": "vhost-user", "chardev": "vu"})
        client.execute("device_add", {"id": "net", "driver": "virtio-net-mmio", "addr": "0x0"})
        bring_up(vmm, "eth0", "10.82.0.2/24")
        vmm.run("until ping -c 1 -W 5 10.82.0.1; do sleep 1; done")
        transfer(vmm, "10.82.0.1", "10.82.0.1")
        client.execute("device_del", {"id": "net"})
        assert client.event("DEVICE_DELETED")["data"]["device"] == "net"
        vmm.run("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do usleep 100000; done")
        client.execute("chardev-remove", {"id": "vu"})
        assert len(list(Path(f"/proc/{vmm.pid}/fd").iterdir())) <= before
    vmm.send("poweroff")
    assert vmm.wait() == 0
    assert "Traceback" not in vmm.errors()
