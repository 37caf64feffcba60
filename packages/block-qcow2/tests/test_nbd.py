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
from block_qcow2.qcow2.bitmaps import extents
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_in_order(image: Path, tmp_path: Path, number: int) -> None:
    """What clients wrote is written back, even if they did not flush, and the socket goes."""
    where = str(tmp_path / "s")
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", where, str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, socket.socket(socket.AF_UNIX) as client:
        assert server.stdout is not None
        server.stdout.readline()
        client.connect(where)
        client.sendall(struct.pack(">IQII", 3, p.IHAVEOPT, p.OPT_EXPORT_NAME, 0))
        client.sendall(p.REQUEST.pack(0x25609513, 0, p.CMD_WRITE, 1, 0, 4096) + b"y" * 4096)
        receive(client, 18 + 10 + 16)
        server.send_signal(number)
        assert server.wait(30) == 0
    assert not Path(where).exists()
    with open_image(image) as opened:
        assert opened.read(0, 4096) == b"y" * 4096


def test_a_server_that_is_there_keeps_its_socket(start: Start, image: Path, tmp_path: Path) -> None:
    where = start(image, "-r")
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", where, "-r", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"stratovirt-img: {where}: Address already in use\n")
    assert json.loads(qemu_img("info", "--output", "json", url(where)))["virtual-size"] == SIZE


@pytest.mark.parametrize("lost", [">/dev/full", ">&-"])
def test_a_server_that_cannot_say_where_it_is_says_so_in_one_line(image: Path, tmp_path: Path, lost: str) -> None:
    words = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", str(tmp_path / "s"), str(image)]
    with subprocess.Popen(["sh", "-c", f'exec "$@" {lost}', "sh", *words], stderr=subprocess.PIPE, text=True) as server:
        if lost == ">&-":  # nobody wants to hear it: it serves
            with socket.socket(socket.AF_UNIX) as client:
                while client.connect_ex(str(tmp_path / "s")):
                    assert server.poll() is None
                assert receive(client, 8) == b"NBDMAGIC"
            server.terminate()
        _, said = server.communicate(timeout=60)
    assert (server.returncode, said.count("\n")) == ((0, 0) if lost == ">&-" else (1, 1))


def test_a_name_of_any_bytes_is_a_name(start: Start, image: Path) -> None:
    where = start(image, "-x", "caf\udce9")
    done = subprocess.run(["nbdinfo", "--list", "--json", url(where)], check=True, capture_output=True)
    assert b"caf\xe9" in done.stdout or b"caf%E9" in done.stdout
    long = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", "never", "-x", "x" * 4097, str(image)]
    said = subprocess.run(long, capture_output=True, text=True, check=False).stderr
    assert said == "stratovirt-img: Invalid export name of 4097 bytes: expected up to 4096\n"


def test_clients_over_tcp_are_looked_after(image: Path) -> None:
    """One whose machine has gone would hold its place for ever: the kernel asks now and then whether it is there."""
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-b", "127.0.0.1", "-p", "0", str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            receive(client, 18)  # it is served
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        [timer] = [row[5] for row in rows if int(row[1].partition(":")[2], 16) == port and row[3] == "01"]
        assert timer.startswith("02:")  # the timer that is neither of retransmission nor of a probe for room
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


def test_dirty_bitmaps_are_told(start: Start, image: Path) -> None:
    for name in ("b0", "other"):
        qemu_img("bitmap", "--add", "-g", "4096", image, name)
    qemu_io(image, "write 0 8k", "write 1M 64k", "write 15M 1M")
    qemu_img("bitmap", "--add", image, "empty")
    where = start(image, "-r", "-B", "b0", "-B", "empty")
    command = ["nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", url(where)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    expected = [(0, 8192, 1), (8192, MiB - 8192, 0), (MiB, 65536, 1), (MiB + 65536, 14 * MiB - 65536, 0), (15 * MiB, MiB, 1)]
    assert [(e["offset"], e["length"], e["type"]) for e in found] == expected
    listed = json.loads(subprocess.run(["nbdinfo", "--json", url(where)], check=True, capture_output=True, text=True).stdout)
    assert listed["exports"][0]["contexts"] == ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:empty"]
    # QEMU shows dirty parts as those without data.
    source = f"driver=nbd,server.type=unix,server.path={where},x-dirty-bitmap=qemu:dirty-bitmap:b0"
    mapped = json.loads(qemu_img("map", "--output", "json", "--image-opts", source))
    assert [(e["start"], e["length"]) for e in mapped if not e["data"]] == [(a, n) for a, n, dirty in expected if dirty]


def test_a_bitmap_that_is_not_there_is_no_export(image: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", str(tmp_path / "s"), "-B", "b0", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "'b0' not found" in done.stderr) == (1, True)


@settings(max_examples=200, deadline=None)
@given(bits=st.binary(min_size=1, max_size=20), bits_each=st.integers(9, 12), data=st.data(), limit=st.integers(1, 30))
def test_extents_of_a_bitmap_are_its_bits(bits: bytes, bits_each: int, data: Any, limit: int) -> None:
    size = len(bits) * 8 << bits_each
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    found = extents(bits, bits_each, offset, length, limit)
    at = offset
    for n, state in found:
        for granule in range(at >> bits_each, (at + n - 1 >> bits_each) + 1):
            assert bits[granule >> 3] >> (granule & 7) & 1 == state
        at += n
    assert at == offset + length or len(found) == limit
    assert all(a[1] != b[1] for a, b in pairwise(found))


# --- TLS ---


def certify(folder: Path, names: tuple[str, ...] = ("server", "client"), *, ca: Any = None) -> Any:
    """Certificates of a new authority (or of `ca`), named as QEMU and libnbd want them; the authority."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder.mkdir(exist_ok=True)
    now = datetime.now(UTC)

    def certificate(name: str, key: Any, issuer: str, signer: Any, usage: Any) -> Any:
        subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, issuer))
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(by).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=2))
        builder = builder.add_extension(x509.BasicConstraints(ca=usage is None, path_length=None), critical=True)
        signs = usage is None
        builder = builder.add_extension(
            x509.KeyUsage(not signs, False, not signs, False, False, signs, False, False, False), critical=True
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    if ca is None:
        ca = ec.generate_private_key(ec.SECP256R1())
    (folder / "ca-cert.pem").write_bytes(certificate("authority", ca, "authority", ca, None))
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if name == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        (folder / f"{name}-cert.pem").write_bytes(certificate("localhost", key, "authority", ca, usage))
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{name}-key.pem").write_bytes(private)
    return ca


def with_tls(where: str, folder: Path) -> list[str]:
    creds = f"tls-creds-x509,id=t,endpoint=client,dir={folder}"
    opts = f"driver=nbd,server.type=unix,server.path={where},tls-creds=t,tls-hostname=localhost"
    return ["--object", creds, "--image-opts", opts]


def test_only_clients_with_certificates_get_an_encrypted_export(start: Start, image: Path, tmp_path: Path) -> None:
    certify(tmp_path / "pki")
    where = start(image, "--tls-creds", str(tmp_path / "pki"))
    content = random.Random(2).randbytes(2 * MiB)
    (tmp_path / "content").write_bytes(content + bytes(SIZE - len(content)))
    words = with_tls(where, tmp_path / "pki")
    assert json.loads(qemu_img("info", "--output", "json", *words))["virtual-size"] == SIZE
    qemu_img("convert", "-n", "-f", "raw", words[0], words[1], "--target-image-opts", tmp_path / "content", words[3])
    nbds = f"nbds+unix://user@localhost/?socket={where}&tls-certificates={tmp_path / 'pki'}"
    subprocess.run(["nbdcopy", nbds, str(tmp_path / "out")], check=True)
    assert (tmp_path / "out").read_bytes() == content + bytes(SIZE - len(content))
    mapped = subprocess.run(["nbdinfo", "--map", "--json", nbds], check=True, capture_output=True, text=True).stdout
    assert sum(e["length"] for e in json.loads(mapped) if e["type"] == 0) == 2 * MiB
    # without encryption, and with a certificate of somebody else's
    assert "TLS" in qemu_img("info", url(where), status=1)
    certify(tmp_path / "others")
    qemu_img("info", *with_tls(where, tmp_path / "others"), status=1)
    mixed = tmp_path / "mixed"
    certify(mixed)
    (mixed / "ca-cert.pem").write_bytes((tmp_path / "pki" / "ca-cert.pem").read_bytes())
    # TLS 1.3 clients learn with their first read that they were refused.
    qemu_img("info", *with_tls(where, mixed), status=1)
    (mixed / "client-cert.pem").unlink()
    qemu_img("info", *with_tls(where, mixed), status=1)
    assert json.loads(qemu_img("info", "--output", "json", *words))["virtual-size"] == SIZE


def test_clients_need_no_certificate_where_they_are_not_checked(start: Start, image: Path, tmp_path: Path) -> None:
    certify(tmp_path / "pki", ("server",))
    where = start(image, "--tls-creds", str(tmp_path / "pki"), "--tls-verify-peer", "off")
    assert json.loads(qemu_img("info", "--output", "json", *with_tls(where, tmp_path / "pki")))["virtual-size"] == SIZE


@pytest.mark.parametrize("broken", ["nothing there", "no authority", "no key", "a bad certificate"])
def test_certificates_that_cannot_be_used(image: Path, tmp_path: Path, broken: str) -> None:
    pki = tmp_path / "pki"
    if broken != "nothing there":
        certify(pki)
        name = {"no authority": "ca-cert.pem", "no key": "server-key.pem"}.get(broken)
        if name:
            (pki / name).unlink()
        else:
            (pki / "server-cert.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    command = [sys.executable, "-m", "block_qcow2.img", "serve", "-k", str(tmp_path / "s"), "--tls-creds", str(pki), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"stratovirt-img: --tls-creds {pki}: ")
    assert done.stderr.count("\n") == 1


def test_what_comes_in_the_clear_before_encryption_does_not_count() -> None:
    def option(number: int, data: bytes = b"") -> bytes:
        return struct.pack(">QII", p.IHAVEOPT, number, len(data)) + data

    handshake = p.Handshake("x", 1, 1, (1, 1, 1), tls=True)
    handshake.output.clear()
    handshake.feed(struct.pack(">I", 3) + option(p.OPT_STRUCTURED_REPLY) + option(p.OPT_GO, b"\0\0\0\1x\0\0"))
    assert not handshake.structured
    assert not handshake.done
    assert bytes(handshake.output).count(p.REP_ERR_TLS_REQD.to_bytes(4, "big")) == 2
    with pytest.raises(p.ProtocolError, match="encryption"):
        p.Handshake("x", 1, 1, (1, 1, 1), tls=True).feed(struct.pack(">I", 3) + option(p.OPT_EXPORT_NAME, b"x"))
    with pytest.raises(p.ProtocolError, match="behind"):
        handshake.feed(option(p.OPT_STARTTLS) + option(p.OPT_GO))
    handshake = p.Handshake("x", 1, 1, (1, 1, 1), tls=True)
    handshake.feed(struct.pack(">I", 3) + option(p.OPT_STARTTLS))
    assert handshake.start_tls
    handshake.secured()
    handshake.output.clear()
    handshake.feed(option(p.OPT_STARTTLS) + option(p.OPT_GO, b"\0\0\0\1x\0\0"))
    assert handshake.done
    assert bytes(handshake.output).count(p.REP_ERR_UNSUP.to_bytes(4, "big")) == 1


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
            (p.CMD_WRITE_ZEROES, SIZE, 4096, 28),
            (p.CMD_WRITE, SIZE, 0, 0),
            (77, 0, 0, 22),
            (p.CMD_BLOCK_STATUS, 0, 4096, 22),
            (p.CMD_READ, 0, 0, 0),
            (p.CMD_FLUSH, 0, 0, 0),
        ):
            client.sendall(p.REQUEST.pack(0x25609513, 0, kind, 42, offset, length))
            assert struct.unpack(">IIQ", receive(client, 16)) == (0x67446698, error, 42), (kind, offset, length)
        client.sendall(p.REQUEST.pack(0x25609513, 0, p.CMD_DISC, 0, 0, 0))
        assert client.recv(1) == b""


def test_flags_that_a_command_does_not_have_are_errors_and_not_the_end(start: Start, image: Path) -> None:
    where = start(image)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(where)
        client.sendall(struct.pack(">I", 3) + struct.pack(">QII", p.IHAVEOPT, p.OPT_EXPORT_NAME, 0))
        receive(client, 18 + 10)
        kinds = [p.CMD_READ, p.CMD_WRITE, p.CMD_FLUSH, p.CMD_TRIM, p.CMD_WRITE_ZEROES]
        own = {p.CMD_READ: p.CMD_FLAG_DF, p.CMD_WRITE_ZEROES: p.CMD_FLAG_NO_HOLE}
        for kind in kinds:
            data = b"x" * 512 if kind == p.CMD_WRITE else b""
            for flag in (1 << bit for bit in range(16)):
                client.sendall(p.REQUEST.pack(0x25609513, flag, kind, 42, 0, 0 if kind == p.CMD_FLUSH else 512) + data)
                known = flag in (p.CMD_FLAG_FUA, own.get(kind))  # any command may be asked to be on the disk
                error = 0 if known else 22
                assert struct.unpack(">IIQ", receive(client, 16)) == (0x67446698, error, 42), (kind, flag)
                if kind == p.CMD_READ and known:
                    receive(client, 512)
        client.sendall(p.REQUEST.pack(0x25609513, 1 << 15, p.CMD_DISC, 0, 0, 0))
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
    contexts = [p.BASE_ALLOCATION, p.DIRTY_BITMAP + b"b"]
    handshake = p.Handshake("x", 1 << 20, p.HAS_FLAGS, (1, 4096, 1 << 25), contexts=contexts)
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    ended: Any = None
    for a, b in pairwise(edges):
        try:
            handshake.feed(data[a:b])
        except p.ProtocolError as e:
            ended = str(e)
            break
    return bytes(handshake.output), (handshake.done, handshake.structured, handshake.chosen, ended)


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
