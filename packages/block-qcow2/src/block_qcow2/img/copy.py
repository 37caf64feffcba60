"""Commands that copy guest data into another image: convert, dd.

Reading (and compressing) runs ahead on threads, writing follows in order; what reads as zeroes is not written. A target that
is not finished is removed.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ..errors import BlockError
from ..images import create_image, open_image
from ..zeroes import is_zero
from . import args
from .args import UsageError, parse
from .basic import check_format, key_file, qcow2_options, read_format
from .look import Mapped, joined, mapped
from .progress import Progress

CONVERT = {
    "f": "value",
    "O": "value",
    "o": "value",
    "c": "",
    "n": "",
    "l": "value",
    "S": "value",
    "m": "value",
    "p": "",
    "q": "",
    "U": "",
    "force-share": "=U",
    "allow-chain": "",
    "target-is-zero": "",
    "key-file": "value",
    "t": "value",
}
_CHUNK = 1 << 20
_ZEROES = bytes(_CHUNK)
_SPARSE = 4096  # bytes: what reads as zeroes in pieces of this size is left out


def convert(words: list[str]) -> int:
    given = parse(words, CONVERT)
    if len(given.words) < 2:
        raise UsageError("Must specify image file name and output file name")
    *sources, target = given.words
    fmt = check_format(given.last("O")) or "raw"
    pairs = args.option_list(given.all("o"))
    packed = given.flag("c")
    if packed and fmt != "qcow2":
        raise UsageError(f"Compression not supported for format {fmt}")
    if given.flag("n") and pairs:
        raise UsageError("-o has no effect on an image that exists already")
    sparse = args.size(given.last("S") or str(_SPARSE), "sparse size")
    if sparse % 512:
        raise UsageError("Invalid sparse size: expected a multiple of 512, or 0")
    # One reader and one writer keep a disk busy; more of them only fight over the page cache. Compression scales.
    usual = min(os.cpu_count() or 1, 8) if packed else 1
    threads = args.number(given.last("m") or str(usual), "number of threads", 1, 16)
    opened: list[Any] = []
    try:
        for name in sources:
            if os.path.realpath(name) == os.path.realpath(target):
                raise UsageError(f"{target} is a source and the target")
            image = open_image(
                name,
                format=read_format(given.last("f")),
                allow=given.flag("allow-chain"),
                force_share=given.flag("U"),
                passphrase=key_file(given),
            )
            opened.append(image)
            if given.last("l") is not None:
                _show_snapshot(image, given.last("l") or "")
        size = sum(i.size for i in opened)
        cache = given.last("t") or ("writeback" if given.flag("n") else "unsafe")
        if cache not in ("writeback", "unsafe"):
            raise UsageError(f"-t {cache}: expected writeback (on the disk when done) or unsafe (in the page cache)")
        with _Target(target, fmt, size, pairs, existing=given.flag("n"), volatile=cache == "unsafe") as out:
            zero = not given.flag("n") or given.flag("target-is-zero")
            with Progress(size, shown=given.flag("p"), quiet=given.flag("q")) as progress:
                base = 0
                for image in opened:
                    copy(image, out, base, progress, zero=zero, packed=packed, sparse=sparse, threads=threads)
                    base += image.size
    finally:
        for image in opened:
            image.close()
    return 0


def _show_snapshot(image: Any, name: str) -> None:
    from ..qcow2.snapshots import Snapshots

    if image.format != "qcow2":
        raise BlockError(f"{image.path}: a {image.format} image has no snapshots")
    name = name.removeprefix("snapshot.name=").removeprefix("snapshot.id=")
    found = Snapshots(image).find(name, by_id=True)
    image.show_snapshot(found.l1_table_offset, found.l1_size, found.disk_size)


class _Target:
    """The image that is written. What was created for it is removed when the copy does not finish."""

    def __init__(self, path: str, fmt: str, size: int, pairs: dict[str, str], *, existing: bool, volatile: bool = False) -> None:
        self._path = path
        self._made = False
        options = qcow2_options(pairs) if fmt == "qcow2" else None
        if fmt == "raw" and pairs:
            raise UsageError(f"Format raw does not support parameter '{next(iter(pairs))}'")
        if not existing:
            create_image(path, size, format=fmt, options=options)
            self._made = True
        try:
            self.image = open_image(path, format=fmt, read_only=False, allow=options is not None and bool(options.backing_file))
            self.image.file.volatile = volatile
            if self.image.size < size:
                raise BlockError(f"{path}: {self.image.size} bytes are too few for {size}")
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Any:
        return self.image

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            try:
                if kind is None:
                    self.image.flush()
            finally:
                self.image.close()
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()

    def _remove(self) -> None:
        if self._made and os.path.isfile(self._path):  # noqa: PTH113
            os.unlink(self._path)  # noqa: PTH108


def copy(
    source: Any,
    target: Any,
    base: int,
    progress: Progress,
    *,
    zero: bool,
    packed: bool = False,
    sparse: int = _SPARSE,
    threads: int = 2,
    parts: Iterator[Mapped] | None = None,
) -> None:
    """Copy all guest data of `source` to `target` at `base`. `zero`: the target reads as zeroes already."""
    # A thread that comes back from a read or write wants the interpreter now, not after the default 5 ms.
    sys.setswitchinterval(5e-5)
    step = _CHUNK
    if packed:
        cluster = target.cluster_size
        if base % cluster:
            raise BlockError("compressed images are joined at cluster borders only")
        step = max(_CHUNK // cluster, 1) * cluster
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="copy")
    waiting: deque[tuple[int, Future[Any]]] = deque()
    spare: list[bytearray] = []
    pack = target.compressor() if packed else None

    def finish() -> None:
        at, future = waiting.popleft()
        buffer, writes = future.result()
        if packed:
            for offset, data, small in writes:
                target.write_compressed(base + offset, data, small)
        elif writes:
            with memoryview(buffer) as view:
                for start, end in writes:
                    target.write_from(base + at + start, [view[start:end]])
        if buffer is not None:
            spare.append(buffer)
        progress.at(base + at)

    try:
        for at, length, data in _chunks(source, step, packed, parts):
            if not data:
                if not zero:
                    target.write_zeroes(base + at, length, unmap=True)
                continue
            buffer = spare.pop() if spare else bytearray(step)
            job: Callable[[], Any]
            if pack is not None:
                job = _pack_job(source, at, length, buffer, pack, target.cluster_size)
            else:
                job = _read_job(source, at, length, buffer, sparse if zero else 0)
            waiting.append((at, pool.submit(job)))
            if len(waiting) > 2 * threads:
                finish()
        while waiting:
            finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(source: Any, step: int, packed: bool, parts: Iterator[Mapped] | None) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether there are data) in pieces of up to `step` bytes; whole clusters of the target if packed."""
    done = 0
    for part in parts if parts is not None else joined(mapped(source, 0, source.size)):
        start, end = max(part.start, done), part.start + part.length
        if start >= end:
            continue
        if not part.data:
            yield start, end - start, False
            continue
        if packed:  # data anywhere in a cluster make it one of data
            start, end = start // step * step, min(-(-end // step) * step, source.size)
            start = max(start, done)
        at = start
        while at < end:
            n = min(step - at % step, end - at)
            yield at, n, True
            at += n
        done = end


def _read_job(source: Any, at: int, length: int, buffer: bytearray, sparse: int) -> Callable[[], Any]:
    def job() -> tuple[bytearray, list[tuple[int, int]]]:
        with memoryview(buffer) as view:
            source.read_into(at, [view[:length]])
        if not sparse:
            return buffer, [(0, length)]
        # Against the whole buffer of zeroes first: one memcmp for the common case.
        if length == _CHUNK == len(buffer) and buffer == _ZEROES:
            return buffer, []
        return buffer, data_runs(buffer, length, sparse)

    return job


def data_runs(data: bytes | bytearray, length: int, piece: int) -> list[tuple[int, int]]:
    """(start, end) of the parts of the first `length` bytes that do not read as zeroes, in whole pieces."""
    found: list[tuple[int, int]] = []
    zeroes = bytes(piece)
    whole = length // piece * piece
    start = -1
    # startswith is a memcmp in place: random data cost one comparison of a few bytes.
    for at in range(0, whole, piece):
        if data.startswith(zeroes, at):
            if start >= 0:
                found.append((start, at))
                start = -1
        elif start < 0:
            start = at
    if whole < length and any(data[whole:length]):
        start = whole if start < 0 else start
        whole = length
    if start >= 0:
        found.append((start, whole))
    return found


def _pack_job(
    source: Any, at: int, length: int, buffer: bytearray, pack: Callable[[Any], bytes], cluster: int
) -> Callable[[], Any]:
    def job() -> tuple[None, list[tuple[int, bytes, bytes]]]:
        with memoryview(buffer) as view:
            source.read_into(at, [view[:length]])
            found = []
            for start in range(0, length, cluster):
                data = bytes(view[start : min(start + cluster, length)])
                if not is_zero(memoryview(data)):
                    found.append((at + start, data, pack(data + bytes(cluster - len(data)))))
        return None, found

    return job


# --- dd ---


def dd(words: list[str]) -> int:
    """Copy blocks between images: bs=, count=, skip= as dd's; the target is created with the size of what is copied."""
    given = parse(words, {"f": "value", "O": "value", "U": "", "force-share": "=U", "allow-chain": ""})
    pairs = {}
    for word in given.words:
        name, equals, value = word.partition("=")
        if name not in ("if", "of", "bs", "count", "skip") or not equals:
            raise UsageError(f"unrecognized operand {word}")
        pairs[name] = value
    if "if" not in pairs or "of" not in pairs:
        raise UsageError("Must specify both input and output file names")
    block = args.size(pairs.get("bs", "512"), "bs")
    if not block:
        raise UsageError("Invalid bs '0': expected at least 1")
    fmt = check_format(given.last("O")) or "raw"
    with open_image(
        pairs["if"], format=read_format(given.last("f")), allow=given.flag("allow-chain"), force_share=given.flag("U")
    ) as source:
        start = min(args.size(pairs.get("skip", "0"), "skip") * block, source.size)
        length = source.size - start
        if "count" in pairs:
            length = min(length, args.size(pairs["count"], "count") * block)
        size = -(-length // 512) * 512 if fmt == "qcow2" else length
        with _Target(pairs["of"], fmt, size, {}, existing=False) as out, Progress(length, shown=False) as progress:
            at = 0
            while at < length:
                data = source.read(start + at, min(_CHUNK, length - at))
                with memoryview(data) as view:
                    for a, b in data_runs(data, len(data), _SPARSE):
                        out.write(at + a, view[a:b])
                at += len(data)
                progress.at(at)
    return 0
