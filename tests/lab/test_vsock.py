"""Sockets between a stock guest and the host: bulk data both ways from both sides, over pauses and a second driver."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import WAIT, Qmp, Vmm

MiB = 1 << 20
CID = 52
PAYLOAD = hashlib.shake_256(b"vsock").digest(12 * MiB)
DRIVER = "vmw_vsock_virtio_transport"

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


class Unix:
    """The host's side as unix sockets."""

    payload = PAYLOAD

    def __init__(self, folder: Path) -> None:
        self.path = folder / "v"
        self.device = f"virtio-vsock-device,id=vsock,guest-cid={CID},path={self.path}"

    def listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.path}_{port}")
        listener.listen()
        return listener

    def connect(self, port: int) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(WAIT)
        peer.connect(str(self.path))
        peer.sendall(b"CONNECT %d\n" % port)
        answer = b""
        while not answer.endswith(b"\n"):
            byte = peer.recv(1)
            if not byte:
                peer.close()
                raise ConnectionResetError
            answer += byte
        assert answer.startswith(b"OK ")
        return peer

    def forget(self, port: int) -> None:
        Path(f"{self.path}_{port}").unlink()


class Kernel:
    """The host's side as AF_VSOCK sockets. The kernel moves the bytes, which takes the lab long."""

    payload = PAYLOAD[: 3 * MiB]
    device = f"vhost-vsock-device,id=vsock,guest-cid={CID}"

    def __init__(self, folder: Path) -> None:
        subprocess.run(["modprobe", "vhost_vsock"], check=True)

    def listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_VSOCK)
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen()
        return listener

    def connect(self, port: int) -> socket.socket:
        peer = socket.socket(socket.AF_VSOCK)
        peer.settimeout(WAIT)
        try:
            peer.connect((CID, port))
        except OSError:
            peer.close()
            raise
        return peer

    def forget(self, port: int) -> None:
        """Nothing is left of a socket of the kernel's."""


def reach(host: Unix | Kernel, port: int) -> socket.socket:
    """Connect to the guest, as soon as somebody listens there."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            return host.connect(port)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def read_all(peer: socket.socket) -> bytes:
    peer.settimeout(WAIT)
    pieces = []
    while piece := peer.recv(MiB):
        pieces.append(piece)
    return b"".join(pieces)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def echo(peer: socket.socket, payload: bytes, meanwhile: Callable[[], None]) -> bytes:
    """Send everything and say so; return what comes back, to the end."""
    sender = threading.Thread(target=lambda: (peer.sendall(payload), peer.shutdown(socket.SHUT_WR)))
    sender.start()
    got = peer.recv(MiB)
    meanwhile()
    got += read_all(peer)
    sender.join()
    return got


@pytest.mark.parametrize("kind", [pytest.param(Unix, marks=pytest.mark.soak), Kernel])
def test_bulk_data_arrives_whole_in_both_directions_from_both_sides(
    start: Start, qmp: Connect, cloud_kernel: guests.Kernel, folder: Path, kind: type[Unix | Kernel]
) -> None:
    host = kind(folder)
    initrd = guests.initrd(cloud_kernel, (*guests.MODULES, DRIVER), files=guests.programs("socat"))
    vmm = start(
        "-machine", "microvm", "-m", 256, "-smp", 2, "-kernel", cloud_kernel.image, "-initrd", initrd,
        "-append", "console=ttyS0 quiet panic=-1", "-device", host.device,
        "-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio",
    )  # fmt: skip
    vmm.expect("here is a shell")
    client = qmp()
    with host.listen(5000) as listener:
        # The guest connects: to get, and to give back.
        vmm.run("socat -u VSOCK-CONNECT:2:5000 CREATE:/tmp/got >/tmp/log 2>&1 &")
        listener.settimeout(WAIT)
        with listener.accept()[0] as peer:
            peer.settimeout(WAIT)
            peer.sendall(host.payload)
        vmm.run("wait")
        assert vmm.run("sha256sum < /tmp/got").split()[0] == digest(host.payload)
        vmm.run("socat -u OPEN:/tmp/got VSOCK-CONNECT:2:5000 >/tmp/log 2>&1 &")
        with listener.accept()[0] as peer:
            assert digest(read_all(peer)) == digest(host.payload)
        vmm.run("wait")
    host.forget(5000)
    assert "reset by peer" in vmm.run("socat -u VSOCK-CONNECT:2:5000 - 2>&1 || true")

    # The host connects, and both talk at once; the machine stands still in the middle.
    vmm.run("socat VSOCK-LISTEN:52,reuseaddr,fork EXEC:cat >/tmp/log 2>&1 &")

    def pause() -> None:
        for _ in range(3):
            client.execute("stop")
            client.execute("cont")

    with reach(host, 52) as peer:
        assert digest(echo(peer, host.payload, pause)) == digest(host.payload)
    with pytest.raises(ConnectionResetError):
        host.connect(53)

    # A second driver has the device, and nothing of the first one's.
    open_peer = host.connect(52)
    before = len(list(Path(f"/proc/{vmm.pid}/fd").iterdir()))
    vmm.run(f"killall socat; until rmmod {DRIVER}; do usleep 100000; done")
    assert open_peer.recv(1) == b""
    open_peer.close()
    vmm.run(f"insmod /modules/*-{DRIVER}.ko")
    vmm.run("socat VSOCK-LISTEN:52,reuseaddr,fork EXEC:cat >/tmp/log 2>&1 &")
    with reach(host, 52) as peer:
        peer.sendall(b"once more")
        peer.shutdown(socket.SHUT_WR)
        assert read_all(peer) == b"once more"
    assert len(list(Path(f"/proc/{vmm.pid}/fd").iterdir())) <= before
    client.execute("quit")
    assert vmm.wait() == 0
