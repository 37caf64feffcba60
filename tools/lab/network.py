"""The host's side of a guest's network: taps with addresses, a way out for passt, and a TCP peer that compares what arrives.

For tests and benchmarks of any VMM. All of it needs root, which the lab's command has.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .vmm import Vmm

WAIT = 120.0  # seconds, for what takes one or two
PAYLOAD = hashlib.shake_256(b"network").digest(4 << 20)
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()
OUTSIDE = "192.0.2.2"  # this host, as the way out sees it
GATEWAY = "192.0.2.1"  # what a guest of passt takes for this host's loopback
ANSWERS = "198.51.100.1"  # this host, for a guest of passt that pings: passt leads no echo to the loopback
_PING_GROUPS = "/proc/sys/net/ipv4/ping_group_range"  # whose programs may ping: nobody's, unless somebody says so
# For busybox udhcpc.
DHCP = b"""#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router" dev "$interface"
"""


def run(*command: str) -> str:
    """Run a command of the host and return what it prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def delete(name: str) -> None:
    """Remove an interface, if it is still there."""
    subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


def configure(name: str, address: str) -> None:
    """Give an interface an address with its prefix length, and bring it up."""
    run("ip", "addr", "add", address, "dev", name)
    run("ip", "link", "set", name, "up")


@contextmanager
def tap(name: str, address: str, *flags: str) -> Iterator[str]:
    """A tap that stays until the end. `flags` as for `ip tuntap`, such as multi_queue."""
    run("modprobe", "tun")
    run("ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr", *flags)
    try:
        configure(name, address)
        yield name
    finally:
        delete(name)


def open_tap(name: str, *, queues: bool = False) -> int:
    """A descriptor of a tap, as a client that has the privilege opens one for a VMM that has not; one of many with `queues`."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    iff_tap, iff_no_pi, iff_vnet_hdr, iff_multi_queue = 0x0002, 0x1000, 0x4000, 0x0100
    flags = iff_tap | iff_no_pi | iff_vnet_hdr | (iff_multi_queue if queues else 0)
    fcntl.ioctl(fd, 0x4004_54CA, struct.pack("16sH22x", name.encode(), flags))  # TUNSETIFF
    return fd


@contextmanager
def way_out() -> Iterator[None]:
    """An interface with a default route, which passt looks for."""
    run("modprobe", "dummy")
    run("ip", "link", "add", "outside", "type", "dummy")
    try:
        configure("outside", f"{OUTSIDE}/24")
        run("ip", "route", "add", "default", "via", GATEWAY)
        yield
    finally:
        delete("outside")


@contextmanager
def echoes() -> Iterator[None]:
    """This host answers a guest of passt that pings ANSWERS."""
    file = Path(_PING_GROUPS)
    before = file.read_text()
    run("ip", "addr", "add", f"{ANSWERS}/32", "dev", "lo")
    try:
        file.write_text("0 2147483647")
        yield
    finally:
        file.write_text(before)
        subprocess.run(["ip", "addr", "del", f"{ANSWERS}/32", "dev", "lo"], check=False, capture_output=True)


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
        """Send the payload to the next who connects."""
        self._begin(lambda connection: connection.sendall(PAYLOAD))

    def take(self) -> None:
        """Read all that the next who connects sends; its hash is `taken`."""

        def serve(connection: socket.socket) -> None:
            digest = hashlib.sha256()
            while data := connection.recv(1 << 20):
                digest.update(data)
            self.taken = digest.hexdigest()

        self._begin(serve)

    def wait(self) -> None:
        """Wait until that is done."""
        assert self._thread
        self._thread.join(WAIT)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """Listen no longer."""
        self._listener.close()


def bring_up(vmm: Vmm, card: str, address: str) -> None:
    """Have a guest wait for a card that was plugged in and for its link, and give it `address` and no other."""
    vmm.run(f"until [ -e /sys/class/net/{card} ]; do usleep 100000; done; ip link set {card} up")
    vmm.run(f"until [ $(cat /sys/class/net/{card}/carrier) = 1 ]; do usleep 100000; done; ip addr flush dev {card}")
    vmm.run(f"ip addr add {address} dev {card}")


def never_ending(vmm: Vmm) -> None:
    """Give the guest something to read from that never ends, as descriptor 9 of its shell.

    passt of 2023 repeats what the host sends once a guest has closed its direction.
    """
    vmm.run("mkfifo /tmp/never; exec 9<>/tmp/never")


def transfer(vmm: Vmm, listen: str, reach: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Move the payload from the host to the guest and back, and compare. After never_ending().

    `listen` is an address of the host, and `reach` is where the guest finds it. `meanwhile` is called once each way.
    """
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
