"""LUKS version 1: the header with its key slots, and a file whose content is encrypted sector by sector.

Source: LUKS On-Disk Format Specification 1.2.3; for qcow2, docs/interop/qcow2.txt, "Data encryption": the header stands where
the extension says, and a sector's number is its offset in the image file divided by 512.

Ciphers come from the package `cryptography` (extra `luks`). Not here: who asks for the passphrase, other LUKS versions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from struct import Struct
from typing import Any, NamedTuple

from .errors import BlockError, ImageFormatError, UnsupportedFeatureError
from .hostfile import Cursor, HostFile
from .ranges import RangeGate

SECTOR = 512
_MAGIC = b"LUKS\xba\xbe"
# magic, version, cipher name, cipher mode, hash, payload offset (sectors), key bytes, digest, its salt and iterations, uuid
_HEADER = Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = Struct(">II32sII")  # active, iterations, salt, key material offset (sectors), stripes
_SLOTS, _ACTIVE, _DISABLED, _STRIPES = 8, 0x00AC71F3, 0x0000DEAD, 4000
_MAX_ITERATIONS = 1 << 26  # a header may ask for 2^32 rounds: half an hour of this machine for a wrong passphrase
_HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


class WrongPassphraseError(BlockError):
    """No key slot opens with the passphrase."""


def _modules() -> tuple[Any, Any, Any]:
    try:
        base = "cryptography.hazmat.primitives.ciphers"
        return import_module(base), import_module(f"{base}.algorithms"), import_module(f"{base}.modes")
    except ImportError:
        raise UnsupportedFeatureError("LUKS encryption needs the package cryptography: install block-qcow2[luks]") from None


class Cipher:
    """Encrypts and decrypts runs of sectors. `mode` is LUKS's: "xts-plain64", "cbc-essiv:sha256", …"""

    def __init__(self, mode: str, key: bytes) -> None:
        ciphers, algorithms, modes = _modules()
        self._new = ciphers.Cipher
        self._aes = algorithms.AES
        chain, _, iv = mode.partition("-")
        if chain not in ("xts", "cbc") or len(key) not in ((32, 64) if chain == "xts" else (16, 24, 32)):
            raise UnsupportedFeatureError(f"LUKS cipher aes-{mode} with a key of {len(key) * 8} bits is not supported")
        self._mode = modes.XTS if chain == "xts" else modes.CBC
        self._key = self._aes(key)
        self._iv = self._iv_generator(iv, key, modes)

    def _iv_generator(self, name: str, key: bytes, modes: Any) -> Callable[[int], bytes]:
        if name == "plain64":
            return lambda sector: sector.to_bytes(16, "little")
        if name == "plain":
            return lambda sector: (sector & 0xFFFFFFFF).to_bytes(16, "little")
        kind, _, digest = name.partition(":")
        if kind == "essiv" and digest in _HASHES:
            essiv = self._new(self._aes(hashlib.new(digest, key).digest()[:32]), modes.ECB())
            return lambda sector: bytes(essiv.encryptor().update(sector.to_bytes(16, "little")))
        raise UnsupportedFeatureError(f"LUKS initialisation vector {name!r} is not supported")

    def decrypt(self, sector: int, data: memoryview) -> None:
        """Decrypt whole sectors in place; the first has number `sector`."""
        for at in range(0, len(data), SECTOR):
            context = self._new(self._key, self._mode(self._iv(sector + at // SECTOR))).decryptor()
            data[at : at + SECTOR] = context.update(bytes(data[at : at + SECTOR]))

    def encrypt(self, sector: int, data: memoryview) -> None:
        """Encrypt whole sectors in place."""
        for at in range(0, len(data), SECTOR):
            context = self._new(self._key, self._mode(self._iv(sector + at // SECTOR))).encryptor()
            data[at : at + SECTOR] = context.update(bytes(data[at : at + SECTOR]))


class Slot(NamedTuple):
    """One key slot as it stands in the header. `offset` in sectors from the header."""

    active: bool
    rounds: int
    salt: bytes
    offset: int
    stripes: int


class Header(NamedTuple):
    """What a LUKS header says. Numbers that cost memory or time are checked."""

    mode: str
    kind: str  # the hash
    key_bytes: int
    digest: bytes
    salt: bytes
    rounds: int
    slots: list[Slot]
    payload: int  # offset in bytes from the header
    uuid: str

    def cipher_names(self) -> tuple[str, str, str, str]:
        """The cipher, its mode, how initialisation vectors are made, and the hash of that or "": by QEMU's names."""
        chain, _, iv = self.mode.partition("-")
        kind, _, digest = iv.partition(":")
        return f"aes-{self.key_bytes * 8 // (2 if chain == 'xts' else 1)}", chain, kind, digest


Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], None]


def parse(read: Read) -> Header:
    """The header that `read(offset, length)` reads. ImageFormatError, UnsupportedFeatureError."""
    data = read(0, _HEADER.size + _SLOTS * _SLOT.size)
    if data[:6] != _MAGIC:
        raise ImageFormatError("LUKS header: no magic number")
    _, version, name, mode, digest_name, payload, key_bytes, digest, salt, rounds, uuid = _HEADER.unpack_from(data)
    if version != 1:
        raise UnsupportedFeatureError(f"LUKS version {version}: only 1 is supported")
    cipher, mode, kind = (_text(field) for field in (name, mode, digest_name))
    if cipher != "aes" or kind not in _HASHES:
        raise UnsupportedFeatureError(f"LUKS cipher {cipher!r} with hash {kind!r} is not supported")
    if key_bytes not in (16, 24, 32, 64) or not 0 < rounds <= _MAX_ITERATIONS:
        raise ImageFormatError(f"LUKS header: key of {key_bytes} bytes, {rounds} iterations")
    slots = []
    for i in range(_SLOTS):
        active, slot_rounds, slot_salt, offset, stripes = _SLOT.unpack_from(data, _HEADER.size + i * _SLOT.size)
        if active == _ACTIVE and (stripes != _STRIPES or not 0 < slot_rounds <= _MAX_ITERATIONS):
            raise ImageFormatError(f"LUKS key slot {i}: {stripes} stripes, {slot_rounds} iterations")
        slots.append(Slot(active == _ACTIVE, slot_rounds, slot_salt, offset, stripes))
    _check_places(slots, key_bytes, payload)
    return Header(mode, kind, key_bytes, digest, salt, rounds, slots, payload * SECTOR, _text(uuid))


def _check_places(slots: list[Slot], key_bytes: int, payload: int) -> None:
    """Refuse key slots that are in the place of the header, of each other or of the payload: one of them changes the others."""
    sectors = -(-key_bytes * _STRIPES // SECTOR)
    end = -(-(_HEADER.size + _SLOTS * _SLOT.size) // SECTOR)
    for offset, number in sorted((slot.offset, number) for number, slot in enumerate(slots)):
        if offset < end or offset + sectors > payload:
            raise ImageFormatError(
                f"LUKS key slot {number}: key material at sector {offset}, expected {sectors} sectors from {end} to {payload}"
            )
        end = offset + sectors


def master_key(header: Header, read: Read, passphrase: bytes) -> tuple[bytes, int]:
    """The key of the payload, and the slot that `passphrase` opens. WrongPassphraseError if there is none."""
    for i, slot in enumerate(header.slots):
        if slot.active:
            key = _slot_key(header, slot, read, passphrase)
            if key is not None:
                return key, i
    raise WrongPassphraseError("no LUKS key slot opens with this passphrase")


def opens(header: Header, read: Read, slot: int, passphrase: bytes) -> bool:
    """Whether `passphrase` opens that slot."""
    return _slot_key(header, header.slots[slot], read, passphrase) is not None


def unlock(read: Read, passphrase: bytes) -> Cipher:
    """The cipher of the payload, if some key slot opens with `passphrase`.

    `read(offset, length)` reads from the LUKS header. Raises ImageFormatError, UnsupportedFeatureError, WrongPassphraseError.
    """
    header = parse(read)
    return Cipher(header.mode, master_key(header, read, passphrase)[0])


def _slot_key(header: Header, slot: Slot, read: Read, passphrase: bytes) -> bytes | None:
    size = header.key_bytes * slot.stripes
    material = bytearray(read(slot.offset * SECTOR, -(-size // SECTOR) * SECTOR))
    slot_key = hashlib.pbkdf2_hmac(header.kind, passphrase, slot.salt, slot.rounds, header.key_bytes)
    Cipher(header.mode, slot_key).decrypt(0, memoryview(material))
    key = _merge(bytes(material[:size]), header.key_bytes, slot.stripes, header.kind)
    return key if hashlib.pbkdf2_hmac(header.kind, key, header.salt, header.rounds, 20) == header.digest else None


def set_slot(header: Header, number: int, key: bytes, passphrase: bytes, rounds: int, write: Write) -> None:
    """Let `passphrase` open slot `number`, which holds `key`. `write(offset, data)` writes and flushes."""
    slot = header.slots[number]
    if slot.stripes != _STRIPES:
        raise ImageFormatError(f"LUKS key slot {number}: {slot.stripes} stripes")
    salt = os.urandom(32)
    if slot.active:
        erase_slot(header, number, write)
    write(slot.offset * SECTOR, _material(header.mode, header.kind, key, passphrase, salt, rounds))
    write(_HEADER.size + number * _SLOT.size, _SLOT.pack(_ACTIVE, rounds, salt, slot.offset, _STRIPES))


def erase_slot(header: Header, number: int, write: Write) -> None:
    """Nobody opens that slot any more: its key material is overwritten."""
    slot = header.slots[number]
    write(_HEADER.size + number * _SLOT.size, _SLOT.pack(_DISABLED, 0, bytes(32), slot.offset, slot.stripes))
    write(slot.offset * SECTOR, os.urandom(-(-header.key_bytes * _STRIPES // SECTOR) * SECTOR))


def _material(mode: str, kind: str, key: bytes, passphrase: bytes, salt: bytes, rounds: int) -> bytes:
    """What a slot keeps of the key: split, and encrypted with the passphrase."""
    slot_key = hashlib.pbkdf2_hmac(kind, passphrase, salt, rounds, len(key))
    material = bytearray(_split(key, _STRIPES, kind))
    material += bytes(-len(material) % SECTOR)
    Cipher(mode, slot_key).encrypt(0, memoryview(material))
    return bytes(material)


def rounds_for(milliseconds: int, kind: str = "sha256") -> int:
    """PBKDF2 iterations with the hash `kind` that take about so long here."""
    import time

    sample = 20_000
    start = time.perf_counter()
    hashlib.pbkdf2_hmac(kind, b"", bytes(32), sample, 64)
    return min(max(int(sample * milliseconds / 1000 / (time.perf_counter() - start)), 1000), _MAX_ITERATIONS)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("ascii", "replace")


def _diffuse(data: bytes, kind: str) -> bytes:
    size = hashlib.new(kind).digest_size
    out = b""
    for i, at in enumerate(range(0, len(data), size)):
        part = data[at : at + size]
        out += hashlib.new(kind, i.to_bytes(4, "big") + part).digest()[: len(part)]
    return out


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


def _merge(material: bytes, size: int, stripes: int, kind: str) -> bytes:
    """The anti-forensic splitter backwards (specification, section 2.4)."""
    d = bytes(size)
    for i in range(stripes - 1):
        d = _diffuse(_xor(d, material[i * size : (i + 1) * size]), kind)
    return _xor(d, material[(stripes - 1) * size :])


def _split(key: bytes, stripes: int, kind: str) -> bytes:
    parts, d = [], bytes(len(key))
    for _ in range(stripes - 1):
        parts.append(os.urandom(len(key)))
        d = _diffuse(_xor(d, parts[-1]), kind)
    return b"".join([*parts, _xor(d, key)])


class Spec(NamedTuple):
    """How a new image is encrypted, by QEMU's names."""

    cipher: str = "aes-256"
    mode: str = "xts"
    ivgen: str = "plain64"
    ivgen_hash: str = "sha256"  # of essiv
    hash: str = "sha256"

    def check(self) -> None:
        """UnsupportedFeatureError names the option that is not offered, and what is."""
        for option, value, offered in (
            ("cipher-alg", self.cipher, ("aes-128", "aes-256")),  # QEMU stops at the odd length of aes-192's slots
            ("cipher-mode", self.mode, ("xts", "cbc")),
            ("ivgen-alg", self.ivgen, ("plain64", "plain", "essiv")),
            ("ivgen-hash-alg", self.ivgen_hash, ("sha256",)),
            ("hash-alg", self.hash, _HASHES),
        ):
            if value not in offered:
                raise UnsupportedFeatureError(f"encrypt.{option}={value}: expected one of {', '.join(offered)}")

    @property
    def key_bytes(self) -> int:
        """Of the master key; xts takes two."""
        return int(self.cipher[4:]) // 8 * (2 if self.mode == "xts" else 1)

    @property
    def material_sectors(self) -> int:
        """Of one key slot: whole pages, as they are aligned."""
        return (self.key_bytes * _STRIPES + 8 * SECTOR - 1) // (8 * SECTOR) * 8

    @property
    def header_bytes(self) -> int:
        return (8 + self.material_sectors * _SLOTS) * SECTOR


def format_header(passphrase: bytes, *, rounds: int = 200_000, spec: Spec | None = None) -> bytes:
    """A new LUKS header with a new key and one key slot. A multiple of the sector size."""
    import uuid

    spec = spec or Spec()
    spec.check()
    iv = f"essiv:{spec.ivgen_hash}" if spec.ivgen == "essiv" else spec.ivgen
    kind, mode, key_bytes = spec.hash, f"{spec.mode}-{iv}", spec.key_bytes
    key = os.urandom(key_bytes)
    sectors = spec.material_sectors
    salt, slot_salt = os.urandom(32), os.urandom(32)
    digest = hashlib.pbkdf2_hmac(kind, key, salt, rounds, 20)
    material = _material(mode, kind, key, passphrase, slot_salt, rounds)
    payload, name = 8 + sectors * _SLOTS, str(uuid.uuid4()).encode()
    head = _HEADER.pack(_MAGIC, 1, b"aes", mode.encode(), kind.encode(), payload, key_bytes, digest, salt, rounds, name)
    for i in range(_SLOTS):
        where = 8 + i * sectors
        head += _SLOT.pack(_DISABLED if i else _ACTIVE, 0 if i else rounds, bytes(32) if i else slot_salt, where, _STRIPES)
    data = head.ljust(8 * SECTOR, b"\0") + material
    return data.ljust(spec.header_bytes, b"\0")


class CryptFile:
    """Does what HostFile does for guest data, encrypted by host offset. Does not own the file."""

    def __init__(self, file: HostFile, cipher: Cipher) -> None:
        self._file = file
        self._cipher = cipher
        self._edges = RangeGate()  # sectors that are changed in part: read, changed and written as one, read as it is
        self.path = file.path
        self.fd = file.fd
        self.direct = file.direct
        self.alignment = max(file.alignment, SECTOR)
        self.gate = file.gate

    @property
    def size(self) -> int:
        return self._file.size

    def read_some(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Decrypted; a file that ends before reads as encrypted zeroes did, so everything is there."""
        length = sum(map(len, buffers))
        start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        if start == offset and end == offset + length:
            data = self._sectors(start, end)
        else:
            # Somebody may be writing the rest of a sector: half of the old and half of the new one decrypt to neither.
            with self._edges.write(start, end):
                data = self._sectors(start, end)
        Cursor(buffers).copy_from(memoryview(data)[offset - start : offset - start + length])
        return length

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.read_some(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = sum(map(len, buffers))
        start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        if start == offset and end == offset + length:
            data = bytearray(b"".join(map(bytes, buffers)))
            self._cipher.encrypt(start // SECTOR, memoryview(data))
            with self._edges.write(start, end):
                self._file.pwrite(start, data)
            return
        with self._edges.write(start, end, exclusive=True):
            data = self._sectors(start, end)
            at = offset - start
            for buffer in buffers:
                data[at : at + len(buffer)] = buffer
                at += len(buffer)
            self._cipher.encrypt(start // SECTOR, memoryview(data))
            self._file.pwrite(start, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Zeroes have to be encrypted like anything else."""
        while length:
            n = min(length, 1 << 20)
            self.writev(offset, [memoryview(bytes(n))])
            offset += n
            length -= n

    def discard(self, offset: int, length: int) -> None:
        self._file.discard(offset, length)

    def flush(self) -> None:
        self._file.flush()

    def _sectors(self, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        with memoryview(data) as view:
            self._file.read_some(start, [view])
            self._cipher.decrypt(start // SECTOR, view)
        return data
