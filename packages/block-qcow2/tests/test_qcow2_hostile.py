"""Images made by an enemy: a clear error or guest data, never another exception, a hang, a host file, or a write."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_qcow2 import create_image, luks, open_disk, open_image
from block_qcow2.errors import BlockError, ImageCorruptError, ImageFormatError, UnsupportedFeatureError
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options, write_empty
from block_qcow2.qcow2.format import COPIED, Header, feature_name_table
from block_qcow2.qcow2.image import open_qcow2
from block_qcow2.qcow2.snapshots import Snapshots

from .memory_file import FULL, MemoryFile
from .qemu import qemu_img

KiB, MiB = 1 << 10, 1 << 20


PASSPHRASE = b"secret"


def seeds() -> list[bytes]:
    """Small images with everything in them."""
    kinds = [
        Options(cluster_size=512),
        Options(cluster_size=4096, refcount_bits=1),
        Options(version=2, cluster_size=512),
        Options(cluster_size=16384, extended_l2=True),
        Options(cluster_size=512, backing_file="below", backing_format="raw"),
        Options(cluster_size=4096, data_file="outside"),
    ]
    if util.find_spec("zstandard"):
        kinds.append(Options(cluster_size=4096, compression_type="zstd"))
    if util.find_spec("cryptography"):
        kinds.append(Options(cluster_size=512, passphrase=PASSPHRASE, luks_rounds=10))
    return [seed(i, options) for i, options in enumerate(kinds)]


def seed(number: int, options: Options) -> bytes:
    rng = random.Random(number)
    file: Any = MemoryFile()
    write_empty(file, 48 * KiB, options)
    with opened(file, read_only=False) as image:
        if image.encrypted:
            image.unlock(PASSPHRASE)
        if options.version == 3:
            table = Bitmaps(image)
            for name in ("first", "second"):
                bits = table.bits(table.add(name, 512))
                bits[3] = 0x5A
            table.store()
            image.follow_bitmaps()
        for _ in range(6):
            image.write(rng.randrange(42 * KiB), rng.randbytes(rng.randrange(1, 6 * KiB)))
        image.write_zeroes(20 * KiB, 9 * KiB)
        if not image.external and not image.encrypted:
            for at in range(0, 48 * KiB - image.cluster_size, 8 * KiB):
                image.write_compressed(at & -image.cluster_size, bytes(image.cluster_size))
        if options.refcount_bits > 1 and not image.external:
            snapshots = Snapshots(image)
            snapshots.create("one")
            image.write(0, b"y" * 5000)
            snapshots.create("two")
    return bytes(file.data)


def opened(file: Any, **options: Any) -> Any:
    """The image in `file`, over a backing file and with a data file that are whatever it names."""
    return open_qcow2(
        file,
        open_backing=lambda name, fmt: Below(),
        open_data_file=lambda name: MemoryFile(bytes(200 * KiB)),  # type: ignore[arg-type,return-value]
        **options,
    )


class Below:
    """A backing image of a few bytes."""

    size = 50 * KiB

    def read_into(self, offset: int, buffers: Any) -> None:
        for buffer in buffers:
            buffer[:] = b"b" * len(buffer)

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture(autouse=True, scope="module")
def few_rounds() -> Iterator[None]:
    """A LUKS header that asks for many rounds is refused, so that no test waits for them."""
    before, luks._MAX_ITERATIONS = luks._MAX_ITERATIONS, 1000
    yield
    luks._MAX_ITERATIONS = before


SEEDS = seeds()
mutations = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 111), st.integers(0, 40 * KiB)),
        st.one_of(
            st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x80" + bytes(7), b"\0" * 7 + b"\1"])
        ),
    ),
    min_size=1,
    max_size=4,
)


def provoke(data: bytes, which: int | None = None) -> None:
    """Everything that can be done to an image, or the third of it that `which` says, on a copy of these bytes."""
    for action in (look, repair, write) if which is None else ((look, repair, write)[which % 3],):
        action(data)


def look(data: bytes) -> None:
    try:
        readable: Any = MemoryFile(data)
        image = opened(readable)
    except BlockError:
        return
    if image.encrypted and image.header.luks_header:
        attempt(lambda: image.unlock(PASSPHRASE))
    attempt(lambda: image.read(0, min(image.size, 200 * KiB)))
    attempt(lambda: list(image.block_status(0, min(image.size, MiB))))
    attempt(lambda: Snapshots(image))
    attempt(lambda: [Bitmaps(image).bits(b) for b in Bitmaps(image).list])
    attempt(lambda: check(image))
    assert bytes(readable.data) == data, "a read-only image was written to"


def repair(data: bytes) -> None:
    image = writable(data)
    if image is not None:
        attempt(lambda: check(image, repair="all"))


def write(data: bytes) -> None:
    image = writable(data)
    if image is not None:
        write_everywhere(image)
        assert len(image.file.data) < FULL + len(data)


def writable(data: bytes) -> Any:
    try:
        return opened(MemoryFile(data), read_only=False, for_repair=True)
    except BlockError:
        return None


def write_everywhere(image: Any) -> None:
    attempt(image.follow_bitmaps)
    for offset in (0, 20 * KiB, 41 * KiB):
        if offset < image.size:
            attempt(lambda at=offset: image.write(at, b"w" * min(7000, image.size - at)))
    attempt(lambda: image.write_zeroes(0, min(image.size, 50 * KiB), unmap=True))
    attempt(lambda: image.discard(0, min(image.size, 100 * KiB)))
    attempt(lambda: Snapshots(image).create("x"))
    attempt(lambda: Snapshots(image).delete(Snapshots(image).find("one")))
    attempt(image.release_bitmaps)
    attempt(image.flush)


def attempt(action: Any) -> None:
    with suppress(BlockError, OSError):
        action()


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, len(SEEDS) - 1), changes=mutations)
def test_a_mutated_image_gives_errors_of_this_package_only(seed: int, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(SEEDS[seed])
    for at, value in changes:
        data[at : at + len(value)] = value
    provoke(bytes(data))


def mutate_words(seed: int) -> bytes:
    """A seed image with table-like words changed: where mutations hurt most."""
    rng = random.Random(seed)
    # The encrypted one, the last, is large and slow: its own structures are few.
    data = bytearray(rng.choice(SEEDS) if rng.random() < 0.2 else rng.choice(SEEDS[:-1]))
    for _ in range(rng.randrange(1, 6)):
        at = rng.choice([rng.randrange(14) * 8, rng.randrange(len(data) // 8) * 8])
        word = int.from_bytes(data[at : at + 8], "big")
        value = rng.choice(
            [
                word ^ 1 << rng.randrange(64),
                rng.getrandbits(64),
                rng.randrange(len(data)) & ~511,
                (rng.randrange(len(data)) & ~511) | COPIED,
                1 << 62 | rng.getrandbits(62),
                (1 << 64) - 1,
                0,
            ]
        )
        data[at : at + 8] = value.to_bytes(8, "big")
    return bytes(data)


@pytest.mark.heavy
@pytest.mark.parametrize("start", range(0, 50_000, 2500))
def test_fifty_thousand_wrong_tables_give_errors_of_this_package_only(start: int) -> None:
    for seed in range(start, start + 2500):
        provoke(mutate_words(seed), seed)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_as_a_header(tail: bytes) -> None:
    for head in (b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3"):
        with suppress(ImageFormatError):
            Header.parse(head + tail, 1 << 40)


def header(**fields: Any) -> bytes:
    h = Header()
    h.size, h.l1_size, h.l1_table_offset, h.refcount_table_offset, h.refcount_table_clusters = MiB, 1, 3 << 16, 1 << 16, 1
    for name, value in fields.items():
        setattr(h, name, value)
    return h.pack() + bytes(4 << 16)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"version": 4}, "version 4"),
        ({"cluster_bits": 22}, "cluster_bits is 22"),
        ({"size": 1 << 63}, "virtual size"),
        ({"l1_size": 1 << 31}, "l1_size"),
        ({"size": 1 << 40}, "l1_size is 1, expected at least"),
        ({"l1_table_offset": 12345}, "L1 table: offset 0x3039"),
        ({"l1_table_offset": 1 << 50}, "L1 table: 8 bytes at"),
        ({"l1_table_offset": 0}, "L1 table"),
        ({"refcount_table_clusters": 1 << 20}, "refcount_table_clusters"),
        ({"refcount_table_clusters": 0}, "refcount_table_clusters"),
        ({"nb_snapshots": 70000}, "nb_snapshots"),
        ({"nb_snapshots": 3, "snapshots_offset": 1 << 60}, "snapshot table"),
        ({"refcount_order": 7}, "refcount_order"),
        ({"header_length": 8}, "header_length"),
        ({"crypt_method": 3}, "encryption method 3"),
        ({"compression_type": 1}, "compression type 1"),
        ({"incompatible": 1 << 4, "cluster_bits": 13}, "extended L2"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    data = bytearray(header())
    if "header_length" in fields:
        data[100:104] = struct.pack(">I", fields["header_length"])
    elif "cluster_bits" in fields:
        data[20:24] = struct.pack(">I", fields["cluster_bits"])
        data[72:80] = struct.pack(">Q", fields.get("incompatible", 0))
    else:
        data = bytearray(header(**fields))
    with pytest.raises(ImageFormatError, match=says):
        Header.parse(data, len(data))


def test_an_unknown_incompatible_feature_is_refused_by_its_name() -> None:
    name = struct.pack(">BB46s", 0, 17, b"quantum clusters")
    h = Header()
    h.set_extension(0x6803F857, feature_name_table() + name)
    data = header(incompatible=1 << 17 | 1 << 40, extensions=h.extensions)
    with pytest.raises(UnsupportedFeatureError, match=r'"quantum clusters" \(bit 17\), bit 40'):
        Header.parse(data, len(data))


def test_an_old_aes_image_is_refused_and_not_served_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "crypt"
    secret = "secret,id=s,data=secret"
    qemu_img("create", "-q", "--object", secret, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "1M")
    with pytest.raises(UnsupportedFeatureError, match="encrypted"):
        open_image(path)


# --- what an image names ---


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "etc-shadow"
    path.write_bytes(b"root:secret" * 1000)
    return path


def test_a_backing_file_is_not_opened_unless_the_caller_allows_it(tmp_path: Path, victim: Path) -> None:
    # CVE-2024-32498: an uploaded image that names a file of the host.
    path = tmp_path / "evil.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", victim, "-F", "raw", path, "1M")
    for opening in (
        lambda: open_image(path),
        lambda: open_image(path, allow=lambda name: False),
        lambda: open_disk(path, format="qcow2"),
    ):
        with pytest.raises(UnsupportedFeatureError, match="has to be allowed"):
            opening()
    asked = []
    with open_image(path, allow=lambda name: not asked.append(name)) as image:  # type: ignore[func-returns-value]
        assert image.read(0, 11) == b"root:secret"
    assert asked == [str(victim)]


def test_a_data_file_is_not_opened_unless_the_caller_allows_it(tmp_path: Path, victim: Path) -> None:
    path, data = tmp_path / "evil.qcow2", tmp_path / "data"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, "1M")
    raw = path.read_bytes().replace(str(data).encode(), str(victim).encode()[: len(str(data))].ljust(len(str(data)), b"\0"))
    path.write_bytes(raw)
    for opening in (lambda: open_image(path), lambda: open_disk(path, format="qcow2", allow=lambda name: False)):
        with pytest.raises(UnsupportedFeatureError, match="has to be allowed"):
            opening()
    before = victim.read_bytes()
    with pytest.raises(UnsupportedFeatureError):
        open_image(path, read_only=False)
    assert victim.read_bytes() == before


@pytest.mark.parametrize("name", ["json:{}", "nbd://127.0.0.1/x", "ssh:host/x", "fat:/etc"])
def test_a_backing_file_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.qcow2"
    create_image(path, MiB, options=Options(backing_file=name, backing_format="raw"))
    with pytest.raises(UnsupportedFeatureError, match=r"not supported|only files"):
        open_image(path, allow=True)


def test_a_given_backing_format_is_believed(tmp_path: Path) -> None:
    # The backing file is raw by its overlay's word: what a guest wrote into it must not make it a qcow2 image.
    base, path = tmp_path / "base", tmp_path / "top"
    create_image(base, MiB, options=Options(backing_file="/etc/passwd", backing_format="raw"))
    create_image(path, MiB, options=Options(backing_file="base", backing_format="raw"))
    with open_image(path, allow=True) as image:
        assert image.read(0, 4) == b"QFI\xfb"


def test_a_chain_that_comes_back_to_itself_is_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    create_image(a, MiB, options=Options(backing_file="b", backing_format="qcow2"))
    create_image(b, MiB, options=Options(backing_file="a", backing_format="qcow2"))
    with pytest.raises(ImageFormatError, match="comes back"):
        open_image(a, allow=True)


def test_a_chain_that_does_not_end_is_refused(tmp_path: Path, descriptors_stay: None) -> None:
    for i in range(70):
        create_image(tmp_path / f"{i}", MiB, options=Options(backing_file=f"{i + 1}", backing_format="qcow2"))
    create_image(tmp_path / "70", MiB)
    with pytest.raises(ImageFormatError, match="more than 64"):
        open_image(tmp_path / "0", allow=True)


# --- metadata as targets ---


def l2_of(image: Any, at: int) -> int:
    return int(image.l1[at >> (image.cluster_bits + image.header.l2_bits)]) & 0x00FFFFFFFFFFFE00


@pytest.mark.parametrize("target", ["header", "l1", "refcount table", "refcount block", "l2"])
def test_guest_data_are_never_written_over_metadata(tmp_path: Path, target: str) -> None:
    path = tmp_path / "evil.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 65536)
        table = l2_of(image, 0)
        where = {
            "header": 0,
            "l1": image.header.l1_table_offset,
            "refcount table": image.header.refcount_table_offset,
            "refcount block": int(image.refcounts.table[0]),
            "l2": table,
        }[target]
    data = bytearray(path.read_bytes())
    data[table : table + 8] = (where | COPIED | (512 if target == "header" else 0)).to_bytes(8, "big")
    path.write_bytes(data)
    with open_image(path, read_only=False) as image:
        with pytest.raises(ImageCorruptError):
            image.write(0, b"evil" * 100)
        with pytest.raises(ImageCorruptError, match="refused"):
            image.write(500_000, b"anything")
    after = path.read_bytes()
    assert after[79] & 2, "the image is marked corrupt"
    assert after[80:] == data[80:]
    with pytest.raises(ImageFormatError, match="marked corrupt"):
        open_image(path, read_only=False)


@pytest.mark.parametrize("target", ["l1_table_offset", "refcount_table_offset", "refcount block", "snapshots_offset"])
def test_a_table_in_the_place_of_another_is_not_written(target: str) -> None:
    """Its entries would overwrite the other's."""
    file: Any = MemoryFile()
    write_empty(file, 64 * MiB, Options(cluster_size=4096))
    image = open_qcow2(file, read_only=False)
    image.write(0, b"x")
    image.snapshots.create("one")
    image.write(0, b"x")
    image.flush()
    header = image.header
    where = int(image.refcounts.table[0]) if target == "refcount block" else getattr(header, target)
    file.pwrite(header.l1_table_offset + 8 * 3, (where | COPIED).to_bytes(8, "big"))
    before = bytes(file.data)
    evil = [
        lambda image: image.write(3 * 2 * MiB + 100 * 4096, b"evil"),
        lambda image: image.write_zeroes(3 * 2 * MiB, 4096),
        lambda image: image.snapshots.create("two"),
        lambda image: image.resize(65 * MiB),
    ]
    for change in evil:
        file = MemoryFile(before)
        image = open_qcow2(file, read_only=False)
        with pytest.raises(ImageCorruptError, match=f"L2 table at {where:#x}, expected outside of the other metadata"):
            change(image)
        assert file.data[80:] == before[80:]


def test_two_refcount_blocks_in_one_place_are_not_written() -> None:
    file: Any = MemoryFile()
    write_empty(file, 64 * MiB, Options(cluster_size=4096))
    table = open_qcow2(file).header.refcount_table_offset
    file.pwrite(table + 8, bytes(file.pread(table, 8)))
    with pytest.raises(ImageCorruptError, match="refcount block at 0x2000, expected outside of the other metadata"):
        open_qcow2(file, read_only=False).write(0, b"x")


def test_applying_a_snapshot_whose_tables_are_in_the_place_of_others_is_refused() -> None:
    file: Any = MemoryFile()
    write_empty(file, 64 * MiB, Options(cluster_size=4096))
    image = open_qcow2(file, read_only=False)
    snapshot = image.snapshots.create("one")
    image.flush()
    where = image.header.refcount_table_offset
    file.pwrite(snapshot.l1_table_offset, where.to_bytes(8, "big"))
    before = bytes(file.data)
    image = open_qcow2(file, read_only=False)
    with pytest.raises(ImageCorruptError, match=f"L2 table of a snapshot at {where:#x}"):
        image.snapshots.apply("one")
    assert file.data[where : where + 8192] == before[where : where + 8192]


def test_snapshots_that_name_most_of_the_file_again_and_again_are_refused_at_once(tmp_path: Path) -> None:
    """65,536 of them, each with an L1 table of 32 MiB in clusters of 512 bytes: 4 thousand million clusters to be remembered."""
    path = tmp_path / "evil.qcow2"
    create_image(path, MiB, options=Options(cluster_size=512))
    with open_image(path, read_only=False) as image:
        image.snapshots.create("one")
        image.flush()
        (one,) = image.snapshots.list()
        table = 1 << 20
        step = 1 << 9
    with path.open("r+b") as file:
        entries = b"".join(one._replace(l1_table_offset=(64 << 20) + i * step, l1_size=4 << 20).pack() for i in range(65536))
        file.seek(table)
        file.write(entries)
        file.truncate(1 << 40)
        file.seek(60)
        file.write((65536).to_bytes(4, "big") + table.to_bytes(8, "big"))
    with open_image(path, read_only=False) as image, pytest.raises(ImageCorruptError, match=r"more than \d+ clusters"):
        image.write(0, b"x")


@pytest.mark.parametrize("lock", [True, False])
def test_an_image_that_names_itself_as_its_data_file_is_refused(tmp_path: Path, lock: bool) -> None:
    """Guest data would overwrite its header."""
    path = tmp_path / "evil.qcow2"
    create_image(path, MiB, options=Options(data_file="evil.data1"))
    (tmp_path / "evil.data1").unlink()
    (tmp_path / "evil.data1").hardlink_to(path)
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(ImageFormatError, match="names itself"):
            open_image(path, read_only=read_only, allow=True, lock=lock)
    assert path.read_bytes() == before


def test_without_what_it_names_an_image_has_no_place_for_guest_data(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    create_image(path, MiB, options=Options(data_file="data"))
    before = path.read_bytes()
    with (
        open_image(path, read_only=False, named=False) as image,
        pytest.raises(UnsupportedFeatureError, match="was not opened"),
    ):
        image.write(0, b"x" * 65536)
    assert path.read_bytes()[:512] == before[:512]


def test_a_compressed_bomb_unpacks_to_one_cluster_at_most(tmp_path: Path) -> None:
    import zlib

    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = stream.compress(bytes(30 * MiB)) + stream.flush()
    assert len(bomb) < 64 * KiB
    path = tmp_path / "bomb.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write_compressed(0, b"a" * 65536)
        entry = image._table(0).entries[0] if image._lock.acquire() else 0
        image._lock.release()
        image.flush()
        table = l2_of(image, 0)
        at = entry & ((1 << 54) - 1)
    data = bytearray(path.read_bytes())
    data[at : at + len(bomb)] = bomb
    data[table : table + 8] = (1 << 62 | 127 << 54 | at).to_bytes(8, "big")
    path.write_bytes(data)
    with open_image(path) as image:
        assert image.read(0, 65536) == bytes(65536)
