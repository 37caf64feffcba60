"""Copying guest data from one image to another, and the command dd.

Reading (and compressing) runs ahead on threads, writing follows in order, unless any order will do. What reads as zeroes is
not written where the target reads as zeroes anyway. Not here: which images (`convert`).
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from ..errors import BlockError
from ..images import create_image, open_any
from ..zeroes import is_zero
from . import args
from .args import UsageError, parse
from .basic import opened
from .interrupt import Making
from .look import Mapped, joined, mapped
from .options import check_format, read_format
from .progress import Progress
from .secrets import SECRETS

_CHUNK = 1 << 20
_ZEROES = bytes(_CHUNK)
SPARSE = 4096  # bytes: what reads as zeroes in pieces of this size is left out
_SECTOR = 512
_OFFLOAD = 256 << 20  # bytes of one call: between two of them progress is told
_NO_OFFLOAD = {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.ETXTBSY}


class _Rules(NamedTuple):
    """How one copy goes."""

    zero: bool  # the target reads as zeroes already
    sparse: int  # bytes; 0: zeroes are written like everything else
    salvage: bool


def copy(
    source: Any,
    target: Any,
    base: int,
    progress: Progress,
    *,
    zero: bool,
    packed: bool = False,
    sparse: int = SPARSE,
    threads: int = 2,
    parts: Iterator[Mapped] | None = None,
    ordered: bool = True,
    offload: bool = False,
    salvage: bool = False,
    rate: int = 0,
) -> None:
    """Copy all guest data of `source` (or only `parts` of them) to `target` at `base`.

    `zero`: the target reads as zeroes already. `ordered=False`: threads write too, in any order. `offload`: let the kernel copy
    where it can. `salvage`: what cannot be read is zeroes, and a warning. `rate`: bytes a second, 0 for no limit.
    """
    # A thread that comes back from a read or write wants the interpreter now, not after the default 5 ms.
    sys.setswitchinterval(5e-5)
    rules = _Rules(zero, sparse, salvage)
    step = _CHUNK
    if packed:
        cluster = target.cluster_size
        if base % cluster:
            raise BlockError("compressed images are joined at cluster borders only")
        step = max(_CHUNK // cluster, 1) * cluster
    if parts is None:
        parts = _salvaged(source) if salvage else mapped(source, 0, source.size)
        parts = joined(parts)
    if offload:
        parts = _offloaded(source, target, base, parts, progress)
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="copy")
    waiting: deque[tuple[int, Future[Any]]] = deque()
    spare: list[bytearray] = []
    pack = target.compressor() if packed else None
    started = time.monotonic()
    sent = 0

    def finish() -> None:
        at, future = waiting.popleft()
        buffer, length, writes = future.result()
        if packed:
            for offset, data, small in writes:
                if len(data) == target.cluster_size or base + offset + len(data) == target.size:
                    target.write_compressed(base + offset, data, small)
                else:  # the target is longer, and what it has in this cluster stays
                    target.write(base + offset, data)
        elif writes is not None:
            _write(target, base + at, buffer, length, writes, zero)
        if buffer is not None:
            spare.append(buffer)
        progress.at(base + at)

    try:
        for at, length, data in _chunks(parts, source.size, step, packed):
            if not data:
                if not zero:
                    target.write_zeroes(base + at, length, unmap=True)
                continue
            buffer = spare.pop() if spare else bytearray(step)
            job: Callable[[], Any]
            if pack is not None:
                job = _pack_job(source, at, length, buffer, pack, target.cluster_size, rules)
            elif ordered:
                job = _read_job(source, at, length, buffer, rules)
            else:
                job = _copy_job(source, target, base, at, length, buffer, rules)
            waiting.append((at, pool.submit(job)))
            sent += length
            if len(waiting) > 2 * threads:
                finish()
            if rate:
                _pause(started + sent / rate)
        while waiting:
            finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _pause(until: float) -> None:
    left = until - time.monotonic()
    if left > 0:
        time.sleep(left)


def own_parts(image: Any) -> Iterator[Mapped]:
    """What an image has itself, zeroes included; what comes from its backing image is left out."""
    for e in image.block_status():
        if e.present or image.backing is None:
            zero = e.zero or not e.present
            yield Mapped(e.offset, e.length, 0, e.present, zero, not zero, e.compressed, e.host, image.path)


def _chunks(parts: Iterator[Mapped], size: int, step: int, packed: bool) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether there are data) in pieces of up to `step` bytes; whole clusters of the target if packed."""
    done = 0
    for part in parts:
        start, end = max(part.start, done), part.start + part.length
        if start >= end:
            continue
        if not part.data:
            yield start, end - start, False
            continue
        if packed:  # data anywhere in a cluster make it one of data
            start, end = start // step * step, min(-(-end // step) * step, size)
            start = max(start, done)
        at = start
        while at < end:
            n = min(step - at % step, end - at)
            yield at, n, True
            at += n
        done = end


# --- on the threads ---


def _read_job(source: Any, at: int, length: int, buffer: bytearray, rules: _Rules) -> Callable[[], Any]:
    def job() -> tuple[bytearray, int, list[tuple[int, int]]]:
        with memoryview(buffer) as view:
            _read(source, at, view[:length], rules.salvage)
        if not rules.sparse:
            return buffer, length, [(0, length)]
        # Against the whole buffer of zeroes first: one memcmp for the common case.
        if length == _CHUNK == len(buffer) and buffer == _ZEROES:
            return buffer, length, []
        return buffer, length, data_runs(buffer, length, rules.sparse)

    return job


def _copy_job(source: Any, target: Any, base: int, at: int, length: int, buffer: bytearray, rules: _Rules) -> Callable[[], Any]:
    read = _read_job(source, at, length, buffer, rules)

    def job() -> tuple[bytearray, int, None]:
        _, _, writes = read()
        _write(target, base + at, buffer, length, writes, rules.zero)
        return buffer, length, None

    return job


def _pack_job(
    source: Any, at: int, length: int, buffer: bytearray, pack: Callable[[Any], bytes], cluster: int, rules: _Rules
) -> Callable[[], Any]:
    def job() -> tuple[bytearray, int, list[tuple[int, bytes, bytes]]]:
        with memoryview(buffer) as view:
            _read(source, at, view[:length], rules.salvage)
            found = []
            for start in range(0, length, cluster):
                data = bytes(view[start : min(start + cluster, length)])
                if not (rules.zero and is_zero(memoryview(data))):
                    found.append((at + start, data, pack(data + bytes(cluster - len(data)))))
        return buffer, length, found

    return job


def _write(target: Any, at: int, buffer: bytearray, length: int, writes: list[tuple[int, int]], zero: bool) -> None:
    """Write the runs of data of a buffer; what is between them too, as zeroes, unless it is zero already."""
    done = 0
    with memoryview(buffer) as view:
        for start, end in writes:
            if not zero and start > done:
                target.write_zeroes(at + done, start - done, unmap=True)
            target.write_from(at + start, [view[start:end]])
            done = end
    if not zero and done < length:
        target.write_zeroes(at + done, length - done, unmap=True)


def data_runs(data: bytes | bytearray, length: int, piece: int) -> list[tuple[int, int]]:
    """(start, end) of the parts of the first `length` bytes that do not read as zeroes, in whole pieces."""
    found: list[tuple[int, int]] = []
    piece = min(piece, len(data) or 1)  # longer ones are not seen in one buffer
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


# --- images that cannot be read everywhere ---


def _read(source: Any, at: int, view: memoryview, salvage: bool) -> None:
    try:
        source.read_into(at, [view])
    except (OSError, BlockError):
        if not salvage:
            raise
        for start in range(0, len(view), _SECTOR):
            part = view[start : start + _SECTOR]
            try:
                source.read_into(at + start, [part])
            except (OSError, BlockError) as e:
                args.warn(f"warning: error while reading offset {at + start}: {args.text_of(e)}")
                part[:] = bytes(len(part))


def _salvaged(source: Any) -> Iterator[Mapped]:
    """What `mapped` says; where it cannot say anything, data are tried."""
    at = 0
    while at < source.size:
        try:
            for part in mapped(source, at, source.size - at):
                yield part
                at = part.start + part.length
        except (OSError, BlockError) as e:
            n = min(_CHUNK - at % _CHUNK, source.size - at)
            args.warn(f"warning: error while reading block status at offset {at}: {args.text_of(e)}")
            yield Mapped(at, n, 0, True, False, True, False, None, source.path)
            at += n


# --- copying in the kernel ---


def _offloaded(source: Any, target: Any, base: int, parts: Iterator[Mapped], progress: Progress) -> Iterator[Mapped]:
    """Let the kernel copy the parts that are the same in both files; yield what is left to be copied here."""
    works = target.format == "raw"
    for part in parts:
        if not (works and part.data and part.offset is not None and not part.compressed):
            yield part
            continue
        image = source
        for _ in range(part.depth):
            image = image.backing
        if getattr(image, "encrypted", False):
            yield part
            continue
        fd = (image.data_file if image.format == "qcow2" else image.file).fd
        done = 0
        try:
            while done < part.length:
                wanted = min(part.length - done, _OFFLOAD)
                n = os.copy_file_range(fd, target.file.fd, wanted, part.offset + done, base + part.start + done)
                if not n:
                    break  # the file ends here; what is behind reads as zeroes
                done += n
                progress.at(base + part.start + done)
        except OSError as e:
            if e.errno not in _NO_OFFLOAD:
                raise OSError(e.errno, e.strerror, target.path) from None
            works = False  # these two files never will
        if done < part.length:
            yield part._replace(start=part.start + done, length=part.length - done, offset=part.offset + done)


# --- dd ---


def dd(words: list[str]) -> int:
    """Copy blocks between images: bs=, count=, skip= as dd's; the target is created with the size of what is copied."""
    given = parse(words, {**SECRETS, "f": "value", "O": "value", "U": "", "force-share": "=U", "allow-chain": ""})
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
    if os.path.realpath(pairs["if"]) == os.path.realpath(pairs["of"]):
        raise UsageError(f"{pairs['of']} is the source and the target")
    with opened(given, pairs["if"], read_format(given.last("f"))) as source:
        start = min(args.size(pairs.get("skip", "0"), "skip") * block, source.size)
        length = source.size - start
        if "count" in pairs:
            length = min(length, args.size(pairs["count"], "count") * block)
        with Making() as making:
            size = -(-length // 512) * 512 if fmt == "qcow2" else length
            create_image(pairs["of"], size, format=fmt, made=making.made)
            with open_any(pairs["of"], format=fmt, read_only=False) as out, Progress(length, shown=False) as progress:
                at = 0
                while at < length:
                    data = source.read(start + at, min(_CHUNK, length - at))
                    with memoryview(data) as view:
                        for a, b in data_runs(data, len(data), SPARSE):
                            out.write(at + a, view[a:b])
                    at += len(data)
                    progress.at(at)
    return 0
