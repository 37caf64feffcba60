"""Network of a stock kernel: taps with many queues, the host kernel's vhost, passt; what is sent arrives whole, both ways."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import Qmp, Vmm

PROMPT = r"guest:\S*# "
WAIT = 120.0
PAYLOAD = hashlib.shake_256(b"network").digest(4 << 20)
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]

DHCP = b"""#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router" dev "$interface"
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def host_network() -> Iterator[None]:
    """Two taps with an address each, and a way out for passt to take over."""
    run("modprobe", "-a", "tun", "vhost_net", "dummy")
    for name, address in (("tapmq", "10.77.0.1/24"), ("tapvh", "10.78.0.1/24")):
        run("ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr", *(["multi_queue"] if name == "tapmq" else []))
        run("ip", "addr", "add", address, "dev", name)
        run("ip", "link", "set", name, "up")
    run("ip", "link", "add", "outside", "type", "dummy")
    run("ip", "addr", "add", "192.0.2.2/24", "dev", "outside")
    run("ip", "link", "set", "outside", "up")
    run("ip", "route", "add", "default", "via", "192.0.2.1")
    yield
    for name in ("tapmq", "tapvh", "outside"):
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def net_initrd(cloud_kernel: guests.Kernel) -> Path:
    return guests.initrd(cloud_kernel, (*guests.MODULES, "virtio_net"))


@pytest.fixture
def arguments(cloud_kernel: guests.Kernel, net_initrd: Path, folder: Path) -> list[object]:
    rootfs = guests.copy_image(guests.rootfs(files={"etc/dhcp": DHCP}), folder / "rootfs.ext4")
    return [
        *("-machine", "microvm", "-kernel", cloud_kernel.image, "-initrd", net_initrd, "-smp", 2, "-m", 512),
        *("-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1 net.ifnames=0"),
        *("-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio"),
    ]


class Peer:
    """A TCP server on this host: gives the payload to who connects, or takes what he sends."""

    def __init__(self, address: str) -> None:
        self._listener = socket.create_server((address, 0))
        self._listener.settimeout(WAIT)
        self.address, self.port = self._listener.getsockname()[:2]
        self.taken = ""
        self._thread: threading.Thread | None = None

    def _begin(self, serve: Callable[[socket.socket], None]) -> None:
        def once() -> None:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(WAIT)
                serve(connection)

        self._thread = threading.Thread(target=once)
        self._thread.start()

    def give(self) -> None:
        self._begin(lambda connection: connection.sendall(PAYLOAD))

    def take(self) -> None:
        def serve(connection: socket.socket) -> None:
            digest = hashlib.sha256()
            while data := connection.recv(1 << 20):
                digest.update(data)
            self.taken = digest.hexdigest()

        self._begin(serve)

    def wait(self) -> None:
        assert self._thread
        self._thread.join(WAIT)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self._listener.close()


def transfer(vmm: Vmm, listen: str, reach: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Move the payload from the host to the guest and back, and compare. `reach` is where the guest finds the host's `listen`."""
    peer = Peer(listen)
    try:
        peer.give()
        vmm.run(f"nc {reach} {peer.port} <&9 > /tmp/payload & echo", WAIT)
        meanwhile()
        peer.wait()
        vmm.run("wait")
        assert vmm.run("sha256sum < /tmp/payload", WAIT).split()[0] == DIGEST
        peer.take()
        vmm.run(f"nc {reach} {peer.port} < /tmp/payload > /dev/null & echo", WAIT)
        meanwhile()
        peer.wait()
        assert peer.taken == DIGEST
        vmm.run("wait; rm /tmp/payload")
    finally:
        peer.close()


@pytest.mark.soak
def test_what_is_sent_arrives_over_taps_vhost_and_passt_through_pauses_and_a_tap_that_is_deleted(
    start: Start, qmp: Connect, arguments: list[object], host_network: None
) -> None:
    vmm = start(
        *arguments,
        "-object", "iothread,id=io",
        "-netdev", "tap,id=mq,ifname=tapmq,queues=2", "-device", "virtio-net-device,netdev=mq,id=mq,mq=on,iothread=io",
        "-netdev", "user,id=out,tcp-ports=2222", "-device", "virtio-net-device,netdev=out,id=out",
        "-netdev", "tap,id=vh,ifname=tapvh,vhost=on", "-device", "virtio-net-device,netdev=vh,id=vh,mac=52:54:00:77:77:77",
    )  # fmt: skip
    vmm.expect(PROMPT)
    client = qmp()
    # Something to read from that never ends: passt of 2023 repeats what the host sends once a guest has closed its direction.
    vmm.run("mkfifo /tmp/never; exec 9<>/tmp/never")

    def pause() -> None:
        for _ in range(3):
            client.execute("stop")
            client.execute("cont")

    # A tap with two pairs of queues: the driver takes one a CPU.
    vmm.run("ip addr add 10.77.0.2/24 dev eth0; ip link set eth0 up")
    vmm.run("ping -c 2 -i 0.2 10.77.0.1")
    run(str(guests.busybox()), "ping", "-c", "2", "-i", "0.2", "10.77.0.2")
    assert vmm.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l").strip() == "2"
    transfer(vmm, "10.77.0.1", "10.77.0.1", pause)

    # The same through the host's kernel.
    vmm.run("ip addr add 10.78.0.2/24 dev eth2; ip link set eth2 up")
    assert vmm.run("cat /sys/class/net/eth2/address").strip() == "52:54:00:77:77:77"
    vmm.run("ping -c 2 -i 0.2 10.78.0.1")
    transfer(vmm, "10.78.0.1", "10.78.0.1", pause)

    # Without privileges: the gateway's address is the host's loopback, and a port of the host leads to the guest.
    vmm.run("ip link set eth1 up; udhcpc -q -n -i eth1 -s /etc/dhcp")
    assert "192.0.2.2/24" in vmm.run("ip addr show eth1")
    transfer(vmm, "127.0.0.1", "192.0.2.1", pause)
    vmm.run("(echo here I am | nc -l -p 2222 > /tmp/heard) &")
    vmm.run("until netstat -ltn | grep -q :2222; do usleep 100000; done")
    with socket.create_connection(("127.0.0.1", 2222), WAIT) as connection:
        connection.sendall(b"knock knock\n")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b"here I am\n"

    # A tap that is deleted takes the link with it, and nothing else.
    for number, name in ((0, "tapmq"), (2, "tapvh")):
        assert vmm.run(f"cat /sys/class/net/eth{number}/carrier").strip() == "1"
        run("ip", "link", "del", name)
        vmm.run(f"until [ $(cat /sys/class/net/eth{number}/carrier) = 0 ]; do usleep 100000; done")
    assert client.execute("query-status")["status"] == "running"
    transfer(vmm, "127.0.0.1", "192.0.2.1")
    vmm.send("poweroff")
    assert vmm.wait() == 0
    assert "the network is gone" in vmm.errors()


def test_passt_ends_with_a_vmm_that_is_killed(start: Start, qmp: Connect, arguments: list[object], host_network: None) -> None:
    vmm = start(*arguments, "-S", "-netdev", "user,id=n", "-device", "virtio-net-device,netdev=n")
    qmp().execute("query-status")
    (child,) = Path(f"/proc/{vmm.pid}/task/{vmm.pid}/children").read_text().split()
    assert Path(f"/proc/{child}/comm").read_text().startswith("passt")
    pidfd = os.pidfd_open(int(child))
    vmm.kill()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000)
    os.close(pidfd)
