"""The command convert: what is copied from where to where, and how. Not here: the copying (`copy`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Self

from ..errors import BlockError
from ..images import create_image, open_any, resolve_name, unlock
from ..qcow2.create import Options
from . import args
from .args import UsageError, parse
from .basic import opened
from .copy import SPARSE, copy, own_parts
from .interrupt import Making
from .options import (
    apply_cache,
    asks_for_help,
    cache_mode,
    check_format,
    creation_options,
    is_direct,
    read_format,
    round_up,
    take_size,
)
from .progress import Progress
from .secrets import SECRETS

CONVERT = {
    **SECRETS,
    "f": "value",
    "O": "value",
    "o": "value",
    "B": "value",
    "F": "value",
    "c": "",
    "n": "",
    "l": "value",
    "S": "value",
    "m": "value",
    "W": "",
    "C": "",
    "r": "value",
    "p": "",
    "q": "",
    "U": "",
    "force-share": "=U",
    "allow-chain": "",
    "target-is-zero": "",
    "bitmaps": "",
    "skip-broken-bitmaps": "",
    "salvage": "",
    "t": "value",
    "T": "value",
}
_MAX_SPARSE = 16 << 20  # bytes, qemu-img's


def convert(words: list[str]) -> int:
    given = parse(words, CONVERT)
    fmt = check_format(given.last("O")) or "raw"
    if asks_for_help(args.option_list(given.all("o")), fmt):
        return 0
    if len(given.words) < 2:
        raise UsageError("Must specify image file name and output file name")
    *sources, target = given.words
    pairs = _target_options(given, fmt)
    _check(given, fmt, pairs, sources)
    packed = given.flag("c")
    sparse = args.size(given.last("S") or str(SPARSE), "sparse size")
    if sparse % 512 or sparse > _MAX_SPARSE:
        raise UsageError(f"Invalid sparse size {sparse}: expected a multiple of 512 up to {_MAX_SPARSE}, or 0")
    # One reader and one writer keep a disk busy; more of them only fight over the page cache. Compression scales.
    usual = min(os.cpu_count() or 1, 8) if packed or given.flag("W") else 1
    threads = args.number(given.last("m") or str(usual), "number of threads", 1, 16)
    rate = args.size(given.last("r") or "0", "rate limit")
    cache = cache_mode(given, "t", "writeback" if given.flag("n") else "unsafe")
    images: list[Any] = []
    try:
        for name in sources:
            if os.path.realpath(name) == os.path.realpath(target):
                raise UsageError(f"{target} is a source and the target")
            images.append(opened(given, name, read_format(given.last("f")), cache=cache_mode(given, "T")))
            if given.last("l") is not None:
                show_snapshot(images[-1], given.last("l") or "")
        bitmaps = _bitmaps(given, images[0]) if given.flag("bitmaps") else None
        size = sum(i.size for i in images)
        size = _wanted_size(pairs, size)
        with Target(target, fmt, size, given, pairs, cache) as out:
            zero = out.zero or given.flag("target-is-zero")
            with Progress(size, shown=given.flag("p"), quiet=given.flag("q")) as progress:
                base = 0
                for image in images:
                    copy(
                        image,
                        out.image,
                        base,
                        progress,
                        zero=zero,
                        packed=packed,
                        sparse=sparse,
                        threads=threads,
                        parts=own_parts(image) if out.backed else None,
                        ordered=not given.flag("W"),
                        offload=given.flag("C"),
                        salvage=given.flag("salvage"),
                        rate=rate,
                    )
                    base += image.size
            if bitmaps is not None:
                _copy_bitmaps(bitmaps, out.image)
    finally:
        for image in images:
            image.close()
    return 0


def _target_options(given: args.Given, fmt: str) -> dict[str, str]:
    pairs = args.option_list(given.all("o"))
    for option, name in (("B", "backing_file"), ("F", "backing_fmt")):
        if given.last(option) is not None:
            pairs[name] = given.last(option) or ""
    return pairs


def _wanted_size(pairs: dict[str, str], size: int) -> int:
    """The target's size: that of what is copied, or more if -o says so."""
    wanted = take_size(pairs)
    if wanted is None:
        return size
    if round_up(wanted) < size:
        raise UsageError(f"Invalid image size {wanted}: {size} bytes are to be copied")
    return round_up(wanted)


def _check(given: args.Given, fmt: str, pairs: dict[str, str], sources: list[str]) -> None:
    """Refuse what does not go together."""
    packed = given.flag("c")
    if packed and fmt != "qcow2":
        raise UsageError(f"Compression not supported for format {fmt}")
    if packed and given.flag("W"):
        raise UsageError("Out of order write and compress are mutually exclusive")
    if given.flag("C") and (packed or given.last("S") is not None):
        raise UsageError("Cannot enable copy offloading when -c or -S is used")
    if given.flag("n") and pairs:
        raise UsageError("-o, -B and -F have no effect on an image that exists already")
    if given.flag("target-is-zero") and not given.flag("n"):
        raise UsageError("--target-is-zero requires use of -n flag")
    if given.flag("skip-broken-bitmaps") and not given.flag("bitmaps"):
        raise UsageError("Use of --skip-broken-bitmaps requires --bitmaps")
    if given.flag("bitmaps") and len(sources) > 1:
        raise UsageError("Copying bitmaps only possible with single source")
    if given.flag("bitmaps") and given.last("l") is not None:
        raise UsageError("--bitmaps and -l do not go together: bitmaps are of the present content")
    if pairs.get("backing_file"):
        if len(sources) > 1:
            raise UsageError("Having a backing file for the target makes no sense when concatenating multiple input images")
        if not pairs.get("backing_fmt") and not pairs.get("backing_format"):
            raise UsageError("backing_file needs its format: -F FMT")


def show_snapshot(image: Any, name: str) -> None:
    """Let an image that is open for reading show a snapshot, by id or name."""
    from ..qcow2.snapshots import Snapshots

    if image.format != "qcow2":
        raise BlockError(f"{image.path}: a {image.format} image has no snapshots")
    found = find_snapshot(Snapshots(image), name)
    image.show_snapshot(found.l1_table_offset, found.l1_size, found.disk_size)


def find_snapshot(snapshots: Any, text: str) -> Any:
    """By id or name, or by "snapshot.id=ID,snapshot.name=NAME", which both have to be right if both are given."""
    if not text.startswith("snapshot."):
        return snapshots.find(text, by_id=True)
    pairs = args.option_list([text])
    for name in pairs:
        if name not in ("snapshot.id", "snapshot.name"):
            raise UsageError(f"Invalid parameter '{name}': expected snapshot.id or snapshot.name")
    ident, title = pairs.get("snapshot.id"), pairs.get("snapshot.name")
    for snapshot in snapshots.list:
        if ident in (None, snapshot.id) and title in (None, snapshot.name):
            return snapshot
    raise BlockError(f"No snapshot with {text.replace(',', ' and ')}")


def _bitmaps(given: args.Given, image: Any) -> list[tuple[Any, bytearray]]:
    """What is to be copied: read before anything is created."""
    if image.format != "qcow2":
        raise BlockError(f"{image.path}: a {image.format} image has no bitmaps")
    from ..qcow2.bitmaps import Bitmaps

    bitmaps = Bitmaps(image)
    found = []
    for bitmap in bitmaps.list:
        if not bitmap.consistent:
            if not given.flag("skip-broken-bitmaps"):
                raise BlockError(f"Cannot copy inconsistent bitmap '{bitmap.name}': --skip-broken-bitmaps leaves it out")
            args.warn(f"warning: Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        found.append((bitmap, bitmaps.bits(bitmap)))
    return found


def _copy_bitmaps(found: list[tuple[Any, bytearray]], target: Any) -> None:
    """Put bitmaps into the target: enabled where they are enabled in the source, as qemu-img does."""
    if target.format != "qcow2":
        raise BlockError(f"{target.path}: a {target.format} image has no bitmaps")
    from ..qcow2.bitmaps import AUTO, Bitmaps

    target.release_bitmaps()
    bitmaps = Bitmaps(target)
    for bitmap, content in found:
        bitmaps.add(bitmap.name, 1 << bitmap.granularity_bits).flags = bitmap.flags & AUTO
        bitmaps.merge(bitmap.name, bitmap, content)
    bitmaps.store()


class Target:
    """The image that is written. What was created for it is removed when the copy does not finish.

    `zero`: it reads as zeroes now. `backed`: what is not written to it comes from a backing file.
    """

    def __init__(self, path: str, fmt: str, size: int, given: args.Given, pairs: dict[str, str], cache: str) -> None:
        existing = given.flag("n")
        options = creation_options(given, fmt, pairs) if not existing else None
        self._making = Making()
        self._making.__enter__()
        try:
            if not existing:
                create_image(path, size, format=fmt, options=options, made=self._making.made)
            self.backed = options is not None and bool(options.backing_file)
            allow = given.flag("allow-chain") or _typed(path, options)
            self.image = open_any(path, format=fmt, read_only=False, allow=allow, direct=is_direct(cache))
            if existing:
                self._making.changed(path)
            try:
                if options is not None and options.passphrase is not None:
                    unlock(self.image, options.passphrase)
                apply_cache(self.image, cache)
                self.zero = not existing and not self.backed and not (fmt == "raw" and self.image.file.is_block)
                if self.image.size < size:
                    raise BlockError(f"{path}: {self.image.size} bytes are too few for {size}")
            except BaseException:
                self.image.close()
                raise
        except BaseException:
            self._making.__exit__(*sys.exc_info())
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            try:
                if kind is None:
                    self.image.flush()
            finally:
                self.image.close()
        except BaseException:
            self._making.__exit__(*sys.exc_info())
            raise
        self._making.__exit__(kind, *details)


def _typed(path: str, options: Options | None) -> Callable[[str], bool]:
    """What may be opened of what a new image names: what the user named himself, and nothing that this names in turn."""
    names = [n for n in (options.backing_file, options.data_file) if n] if options is not None else []
    paths = {resolve_name(path, name, True) for name in names}
    return lambda name: name in paths
