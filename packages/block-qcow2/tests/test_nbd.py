"""stratovirt-img serve: QEMU and libnbd use what is exported, and a bad client hurts only itself."""

from __future__ import annotations

import json
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_qcow2 import create_image, open_image
from block_qcow2.nbd import protocol as p
from block_qcow2.qcow2.create import Options

from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20
SIZE = 16 * MiB
Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Serve an image on a unix socket; its path."""
    servers: list[subprocess.Popen[str]] = []

    def run(image: Path, *words: str) -> str:
        where = str(tmp_path / f"nbd{len(servers)}")
        command = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", where, *words, str(image)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        servers.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == f"Serving {image} on {where}\n"
        return where

    yield run
    for server in servers:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert server.stdout is not None
        server.stdout.close()
    assert not [f for f in tmp_path.iterdir() if f.is_socket()]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create_image(path, SIZE, options=Options(cluster_size=4096))
    return path


def url(where: str) -> str:
    return f"nbd+unix:///?socket={where}"


def test_qemu_writes_and_reads_through_it(start: Start, image: Path) -> None:
    where = start(image, "--discard")
    commands = ["write -P 1 0 1M", "write -P 2 5000 70000", "write -z 2M 1M", "discard 0 4096", "flush", "read -P 2 5000 70000"]
    qemu_io(url(where), *commands, "write -f -P 3 15M 1M", "read -P 3 15M 1M", "read -P 0 2M 1M", fmt="raw")
    qemu_img("check", "-q", "-U", image)
    info = json.loads(qemu_img("info", "--output", "json", url(where)))
    assert info["virtual-size"] == SIZE
    parts = json.loads(qemu_img("map", "--output", "json", url(where)))
    assert [(e["start"], e["data"]) for e in parts] == [(0, False), (4096, True), (MiB, False), (15 * MiB, True)]


def test_nbdinfo_and_nbdcopy(start: Start, image: Path, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 * MiB) + bytes(SIZE - 3 * MiB)
    source = tmp_path / "source"
    source.write_bytes(content)
    where = start(image)
    subprocess.run(["nbdcopy", str(source), url(where)], check=True)
    out = tmp_path / "out"
    subprocess.run(["nbdcopy", url(where), str(out)], check=True)
    assert out.read_bytes() == content
    said = json.loads(subprocess.run(["nbdinfo", "--json", url(where)], check=True, capture_output=True, text=True).stdout)
    assert said["protocol"] == "newstyle-fixed"
    assert said["structured"] is True
    [export] = said["exports"]
    assert (export["export-size"], export["can_multi_conn"], export["is_read_only"]) == (SIZE, True, False)
    mapped = json.loads(
        subprocess.run(["nbdinfo", "--map", "--json", url(where)], check=True, capture_output=True, text=True).stdout
    )
    assert sum(e["length"] for e in mapped if e["type"] == 0) == 3 * MiB


def test_a_read_only_export_refuses_writes(start: Start, image: Path) -> None:
    before = image.read_bytes()
    where = start(image, "-r")
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 1M", url(where)], capture_output=True, check=False)
    assert done.returncode != 0
    qemu_img("info", url(where))
    assert image.read_bytes() == before


def test_what_was_written_is_there_when_the_server_is_gone(start: Start, image: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", str(tmp_path / "s"), str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        qemu_io(url(str(tmp_path / "s")), "write -P 7 1M 1M", fmt="raw")
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    is_clean(image)
    with open_image(image) as opened:
        assert opened.read(MiB, MiB) == b"\7" * MiB


def test_over_tcp_and_by_name(image: Path) -> None:
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-b", "127.0.0.1", "-p", "0", "-x", "disk one", str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        try:
            qemu_img("info", f"nbd://{address}/disk%20one")
            assert "not" in qemu_img("info", f"nbd://{address}/other", status=1)
        finally:
            server.terminate()
            assert server.wait(30) == 0


def test_an_export_in_use_is_locked(start: Start, image: Path) -> None:
    start(image)
    assert "lock" in qemu_img("info", image, status=1)


def test_bad_clients_do_not_disturb_good_ones(start: Start, image: Path) -> None:
    where = start(image)
    rng = random.Random(9)
    for i in range(60):
        with socket.socket(socket.AF_UNIX) as bad:
            bad.connect(where)
            good_start = struct.pack(">I", 3) + struct.pack(">QIIIH", p.IHAVEOPT, p.OPT_GO, 6, 0, 0)
            junk = rng.randbytes(rng.randrange(200))
            with suppress(OSError):
                bad.sendall(good_start + junk if i % 2 else junk)
                if i % 3 == 0:
                    bad.shutdown(socket.SHUT_WR)
                    bad.settimeout(10)
                    while bad.recv(65536):
                        pass
    qemu_io(url(where), "write -P 1 0 64k", "read -P 1 0 64k", fmt="raw")


def test_requests_outside_the_disk_are_errors_and_not_the_end(start: Start, image: Path) -> None:
    where = start(image)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(where)
        client.sendall(struct.pack(">I", 3) + struct.pack(">QII", p.IHAVEOPT, p.OPT_EXPORT_NAME, 0))
        receive(client, 18 + 10)
        for kind, offset, length, error in (
            (p.CMD_READ, SIZE - 1, 2, 22),
            (p.CMD_READ, 0, p.MAX_PAYLOAD + 1, 22),
            (p.CMD_TRIM, 1 << 63, 1, 22),
            (p.CMD_WRITE_ZEROES, SIZE, 4096, 22),
            (77, 0, 0, 22),
            (p.CMD_BLOCK_STATUS, 0, 4096, 22),
            (p.CMD_READ, 0, 0, 0),
            (p.CMD_FLUSH, 0, 0, 0),
        ):
            client.sendall(p.REQUEST.pack(0x25609513, 0, kind, 42, offset, length))
            assert struct.unpack(">IIQ", receive(client, 16)) == (0x67446698, error, 42), (kind, offset, length)
        client.sendall(p.REQUEST.pack(0x25609513, 0, p.CMD_DISC, 0, 0, 0))
        assert client.recv(1) == b""


def receive(client: socket.socket, n: int) -> bytes:
    client.settimeout(30)
    data = b""
    while len(data) < n:
        part = client.recv(n - len(data))
        assert part, "the server hung up"
        data += part
    return data


def shake(data: bytes, cuts: list[int]) -> tuple[bytes, Any]:
    handshake = p.Handshake("x", 1 << 20, p.HAS_FLAGS, (1, 4096, 1 << 25))
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    ended: Any = None
    for a, b in pairwise(edges):
        try:
            handshake.feed(data[a:b])
        except p.ProtocolError as e:
            ended = str(e)
            break
    return bytes(handshake.output), (handshake.done, handshake.structured, handshake.block_status, ended)


options = st.lists(
    st.tuples(
        st.integers(0, 11),
        st.one_of(st.binary(max_size=40), st.just(b"\0\0\0\1x\0\0"), st.just(b"\0\0\0\1x\0\0\0\1\0\0\0\x0fbase:allocation")),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(options=options, cuts=st.lists(st.integers(0, 400), max_size=8), flags=st.integers(0, 5))
def test_any_split_of_a_handshake_gives_the_same_answers(options: list[tuple[int, bytes]], cuts: list[int], flags: int) -> None:
    data = struct.pack(">I", flags) + b"".join(struct.pack(">QII", p.IHAVEOPT, o, len(d)) + d for o, d in options)
    assert shake(data, cuts) == shake(data, [])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_handshake_or_a_protocol_error(data: bytes) -> None:
    shake(data, [])


def test_an_endless_handshake_is_ended() -> None:
    handshake = p.Handshake("x", 1, 1, (1, 1, 1))
    handshake.feed(struct.pack(">I", 3))
    with pytest.raises(p.ProtocolError, match="too many"):
        handshake.feed(struct.pack(">QII", p.IHAVEOPT, 99, 0) * 100)
    with pytest.raises(p.ProtocolError):
        p.Handshake("x", 1, 1, (1, 1, 1)).feed(struct.pack(">IQII", 3, p.IHAVEOPT, 1, 1 << 31))
