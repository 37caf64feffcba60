"""Commands on an image and what goes with it: commit, rebase, bitmap."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from ..errors import BlockError
from ..images import MAX_CHAIN, open_any, resolve_name
from .args import Given, UsageError, parse, size
from .basic import _one_path, opened
from .copy import copy, own_parts
from .look import Mapped, mapped
from .options import cache_mode, check_format
from .progress import Progress
from .secrets import SECRETS, secrets

_CHUNK = 2 << 20


COMMIT = {**SECRETS, "f": "value", "b": "value", "d": "", "p": "", "q": "", "r": "value", "t": "value", "allow-chain": ""}


def commit(words: list[str]) -> int:
    """Write what an image has into its backing image; then empty it, unless -d.

    With -b, what the images above that one have, as it reads through them; they stay as they are then.
    """
    given = parse(words, COMMIT)
    path = _one_path(given.words, "Image commit requires path")
    rate, cache = size(given.last("r") or "0", "rate limit"), cache_mode(given, "t")
    chain = _down_to(given, path, check_format(given.last("f")), given.last("b"))
    keep = given.flag("d") or given.last("b") is not None
    images: list[Any] = []
    with ExitStack() as stack:
        # Each reads only what it has itself, so that the last one can be open for writing beside them.
        for i, (name, fmt) in enumerate(chain[:-1]):
            image = opened(given, name, fmt, read_only=keep or i > 0, named=False, plain=True, cache=cache)
            stack.enter_context(image)
            images.append(image)
        for upper, lower in pairwise(images):
            upper.backing = lower
        top = images[0]
        base = stack.enter_context(opened(given, *chain[-1], read_only=False, plain=True, cache=cache))
        if top.size > base.size:
            base.resize(top.size)
        with Progress(top.size, shown=given.flag("p"), quiet=given.flag("q")) as progress:
            copy(top, base, 0, progress, zero=False, parts=_above(top, len(images)), rate=rate)
        base.flush()
        if not keep:
            top.empty()
            top.flush()
    if not given.flag("q"):
        print("Image committed.")
    return 0


def _down_to(given: Given, path: str, fmt: str | None, base: str | None) -> list[tuple[str, str | None]]:
    """Paths and formats of a chain from an image down to `base`, or to the one below it."""
    chain = [(path, fmt)]
    while len(chain) <= MAX_CHAIN:
        path, fmt = chain[-1]
        with open_any(path, format=fmt, named=False, lock=False) as image:
            name, backing_format = getattr(image, "backing_file", None), getattr(image, "backing_format", None)
        if not name:
            if base is not None and len(chain) > 1:
                raise UsageError(f"-b {base}: no backing file of {chain[0][0]}; there are: {', '.join(p for p, _ in chain[1:])}")
            raise BlockError(f"{path}: the image has no backing file")
        below = resolve_name(path, name, given.flag("allow-chain"))
        chain.append((below, backing_format))
        if base is None or base == name or os.path.realpath(base) == os.path.realpath(below):
            return chain
    raise BlockError(f"{chain[0][0]}: a chain of more than {MAX_CHAIN} backing files")


def _above(top: Any, count: int) -> Iterator[Mapped]:
    """What the upper `count` images of a chain have, zeroes included; what none of them has is left out."""
    if count == 1:
        yield from own_parts(top)
        return
    for part in mapped(top, 0, top.size):
        # Behind the end of a shorter image between them there are zeroes; under the last there is the base.
        if part.present or part.depth < count - 1:
            yield part


REBASE = {**SECRETS, "f": "value", "b": "value", "F": "value", "t": "value", "T": "value"}
REBASE |= {"u": "", "p": "", "q": "", "U": "", "force-share": "=U", "allow-chain": ""}


def rebase(words: list[str]) -> int:
    """Give an image another backing file: with its content unchanged, or (-u) only its name."""
    given = parse(words, REBASE)
    path = _one_path(given.words, "Image rebase requires path")
    new, new_format = given.last("b"), check_format(given.last("F"))
    if new is None:
        raise UsageError("rebase needs -b BACKING (empty for none)")
    if new and not new_format:
        raise UsageError("backing_file needs its format: -F FMT")
    unsafe = given.flag("u")
    cache, source_cache = cache_mode(given, "t"), cache_mode(given, "T")
    fmt = check_format(given.last("f"))
    with opened(given, path, fmt, read_only=False, named=not unsafe, cache=cache) as image:
        if image.format != "qcow2":
            raise BlockError(f"{path}: a {image.format} image has no backing file")
        if not unsafe:
            below = resolve_name(path, new, True) if new else None
            base = opened(given, below, new_format, plain=True, cache=source_cache) if below else None
            _keep_content(image, base, given.flag("p"), given.flag("q"))
        image.set_backing(new or None, new_format)
    return 0


class _Nothing:
    """Stands for the backing image of one that has none: zeroes are not left out then, as something will be below them."""

    size = 0

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """There is nothing to read."""

    def close(self) -> None:
        """There is nothing to close."""


def _keep_content(image: Any, base: Any, shown: bool, quiet: bool) -> None:
    """Write into the image what would read differently over the new backing image, which is closed then."""
    try:
        if image.backing is None and base is not None:
            image.backing = _Nothing()
        with Progress(image.size, shown=shown, quiet=quiet) as progress:
            for e in image.block_status():
                if e.present:
                    continue
                at, end = e.offset, e.offset + e.length
                while at < end:
                    n = min(_CHUNK, end - at)
                    if image.backing is not None or base is not None:
                        _keep_part(image, base, at, n)
                    at += n
                    progress.at(at)
        image.flush()
    finally:
        if base is not None:
            base.close()


def _keep_part(image: Any, base: Any, at: int, length: int) -> None:
    cluster = image.cluster_size
    before = image.read(at, length)
    after = b""
    if base is not None and at < base.size:
        after = base.read(at, min(length, base.size - at))
    after += bytes(length - len(after))
    for start in range(0, length, cluster):
        part = before[start : start + cluster]
        if part != after[start : start + cluster]:
            if part.count(0) == len(part):
                image.write_zeroes(at + start, len(part))
            else:
                image.write(at + start, part)


BITMAP = {**SECRETS, "f": "value", "F": "value", "b": "value", "g": "value", "granularity": "=g", "q": "", "merge": "value"}
BITMAP |= {"source-file": "=b", "source-format": "=F", "add": "", "remove": "", "clear": "", "enable": "", "disable": ""}


def bitmap(words: list[str]) -> int:
    """Change a persistent dirty bitmap: the operations named, in the order in which they are first named."""
    given = parse(words, BITMAP)
    secrets(given)  # bitmaps are not encrypted: they only have to be right
    asked = [o for o in given.options if o in ("add", "remove", "clear", "enable", "disable", "merge")]
    if len(given.words) != 2:
        raise UsageError("Expecting image file name and bitmap name")
    if not asked:
        raise UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if given.last("g") is not None and "add" not in asked:
        raise UsageError("granularity only supported with --add")
    path, name = given.words
    with open_any(path, format=check_format(given.last("f")), read_only=False, named=False) as image:
        if image.format != "qcow2":
            raise BlockError(f"{path}: a {image.format} image has no bitmaps")
        from ..qcow2.bitmaps import Bitmaps

        image.release_bitmaps()
        bitmaps = Bitmaps(image)
        for operation in asked:
            if operation == "add":
                bitmaps.add(name, size(given.last("g") or "65536", "granularity"))
            elif operation == "merge":
                _merge(bitmaps, name, given.all("merge"), given.last("b"), check_format(given.last("F")))
            elif operation in ("enable", "disable"):
                bitmaps.enable(name, operation == "enable")
            elif operation == "clear":
                bitmaps.clear(name)
            else:
                bitmaps.remove(name)
        bitmaps.store()
    return 0


def _merge(bitmaps: Any, name: str, sources: list[str], path: str | None, fmt: str | None) -> None:
    for source in sources:
        if path is None:
            found = bitmaps.find(source)
            bitmaps.merge(name, found, bitmaps.bits(found))
            continue
        from ..qcow2.bitmaps import Bitmaps

        with open_any(path, format=fmt, named=False) as other:
            if other.format != "qcow2":
                raise BlockError(f"{path}: a {other.format} image has no bitmaps")
            theirs = Bitmaps(other)
            bitmaps.merge(name, theirs.find(source), theirs.bits(theirs.find(source)))
