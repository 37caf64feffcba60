"""Network of a stock kernel: taps with many queues, the host kernel's vhost, passt; what is sent arrives whole, both ways."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import guests
from lab.network import DHCP, GATEWAY, OUTSIDE, WAIT, bring_up, never_ending, open_tap, run, tap, transfer, way_out
from lab.vmm import Qmp, Vmm

PROMPT = r"guest:\S*# "

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


@pytest.fixture
def host_network() -> Iterator[None]:
    """Two taps with an address each, and a way out for passt to take over."""
    run("modprobe", "vhost_net")
    with tap("tapmq", "10.77.0.1/24", "multi_queue"), tap("tapvh", "10.78.0.1/24"), way_out():
        yield


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
    never_ending(vmm)

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
    assert f"{OUTSIDE}/24" in vmm.run("ip addr show eth1")
    transfer(vmm, "127.0.0.1", GATEWAY, pause)
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
    transfer(vmm, "127.0.0.1", GATEWAY)
    vmm.send("poweroff")
    assert vmm.wait() == 0
    assert "the network is gone" in vmm.errors()


@pytest.mark.soak
def test_descriptors_of_taps_and_of_vhost_that_were_opened_by_others_carry_frames(
    start: Start, qmp: Connect, arguments: list[object]
) -> None:
    """By number on the command line, two pairs of queues; and by name over QMP, for a card that is plugged in and pulled out."""
    run("modprobe", "vhost_net")
    with tap("tapnum", "10.77.0.1/24", "multi_queue"), tap("tapqmp", "10.78.0.1/24"), ExitStack() as opened:

        def opens(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        def vhost() -> int:
            return opens(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))

        taps = [opens(open_tap("tapnum", queues=True)) for _ in range(2)]
        vhosts = [vhost() for _ in range(2)]
        vmm = start(
            *arguments,
            "-netdev", f"tap,id=num,fds={taps[0]}:{taps[1]},vhost=on,vhostfds={vhosts[0]}:{vhosts[1]}",
            "-device", "virtio-net-device,netdev=num,id=num,mq=on,mac=52:54:00:77:00:01",
            descriptors=[*taps, *vhosts],
        )  # fmt: skip
        vmm.expect(PROMPT)
        client = qmp()
        never_ending(vmm)
        assert vmm.run("cat /sys/class/net/eth0/address").strip() == "52:54:00:77:00:01"
        assert vmm.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l").strip() == "2"
        vmm.run("ip addr add 10.77.0.2/24 dev eth0; ip link set eth0 up; ping -c 2 -i 0.2 10.77.0.1")
        run(str(guests.busybox()), "ping", "-c", "2", "-i", "0.2", "10.77.0.2")
        transfer(vmm, "10.77.0.1", "10.77.0.1")

        before = len(list(Path(f"/proc/{vmm.pid}/fd").iterdir()))
        for _ in range(2):
            with ExitStack() as passed:
                for name, fd in (("tapA", open_tap("tapqmp")), ("vhostA", os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))):
                    passed.callback(os.close, fd)
                    client.execute("getfd", {"fdname": name}, fds=[fd])
            client.execute("netdev_add", {"id": "net-0", "fds": "tapA", "vhost": True, "vhostfds": "vhostA"})
            client.execute("device_add", {"id": "net-0", "driver": "virtio-net-mmio", "addr": "0x0"})
            bring_up(vmm, "eth1", "10.78.0.2/24")
            vmm.run("ping -c 2 -i 0.2 10.78.0.1")
            transfer(vmm, "10.78.0.1", "10.78.0.1")
            client.execute("device_del", {"id": "net-0"})
            vmm.run("until [ $(cat /sys/class/net/eth1/carrier) = 0 ]; do usleep 100000; done")
            assert len(list(Path(f"/proc/{vmm.pid}/fd").iterdir())) <= before
        vmm.send("poweroff")
        assert vmm.wait() == 0
        assert "Traceback" not in vmm.errors()


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
