"""Commands on an image and what goes with it: commit, rebase, bitmap."""

from __future__ import annotations

from typing import Any

from ..errors import BlockError
from ..images import open_image, resolve_name
from .args import UsageError, parse, size
from .basic import _one_path, opened
from .copy import copy, own_parts
from .options import check_format
from .progress import Progress
from .secrets import SECRETS

_CHUNK = 2 << 20


def commit(words: list[str]) -> int:
    """Write what an image has into its backing image; then empty it, unless -d."""
    given = parse(words, {**SECRETS, "f": "value", "d": "", "p": "", "q": "", "r": "value", "allow-chain": ""})
    path = _one_path(given.words, "Image commit requires path")
    fmt = check_format(given.last("f"))
    with open_image(path, format=fmt, read_only=True, named=False, lock=False) as image:
        name, backing_format = getattr(image, "backing_file", None), getattr(image, "backing_format", None)
    if not name:
        raise BlockError(f"{path}: the image has no backing file")
    below = resolve_name(path, name, given.flag("allow-chain"))
    # The overlay reads only what it has itself, so its backing image can be open for writing beside it.
    with (
        opened(given, path, fmt, read_only=False, named=False, plain=True) as overlay,
        opened(given, below, backing_format, read_only=False, plain=True) as base,
    ):
        if overlay.size > base.size:
            base.resize(overlay.size)
        own = own_parts(overlay)
        with Progress(overlay.size, shown=given.flag("p"), quiet=given.flag("q")) as progress:
            rate = size(given.last("r") or "0", "rate limit")
            copy(overlay, base, 0, progress, zero=False, parts=own, rate=rate)
        base.flush()
        if not given.flag("d"):
            overlay.empty()
            overlay.flush()
    if not given.flag("q"):
        print("Image committed.")
    return 0


def rebase(words: list[str]) -> int:
    """Give an image another backing file: with its content unchanged, or (-u) only its name."""
    spec = {"f": "value", "b": "value", "F": "value", "u": "", "p": "", "q": "", "allow-chain": ""}
    given = parse(words, {**SECRETS, **spec})
    path = _one_path(given.words, "Image rebase requires path")
    new, new_format = given.last("b"), check_format(given.last("F"))
    if new is None:
        raise UsageError("rebase needs -b BACKING (empty for none)")
    if new and not new_format:
        raise UsageError("backing_file needs its format: -F FMT")
    unsafe = given.flag("u")
    with opened(given, path, check_format(given.last("f")), read_only=False, named=not unsafe) as image:
        if image.format != "qcow2":
            raise BlockError(f"{path}: a {image.format} image has no backing file")
        if not unsafe:
            base = opened(given, resolve_name(path, new, True), new_format, plain=True) if new else None
            _keep_content(image, base, given.flag("p"), given.flag("q"))
        image.set_backing(new or None, new_format)
    return 0


def _keep_content(image: Any, base: Any, shown: bool, quiet: bool) -> None:
    """Write into the image what would read differently over the new backing image, which is closed then."""
    try:
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


BITMAP = {"f": "value", "F": "value", "b": "value", "g": "value", "granularity": "=g", "q": "", "merge": "value"}
BITMAP |= {"add": "", "remove": "", "clear": "", "enable": "", "disable": ""}


def bitmap(words: list[str]) -> int:
    """Change a persistent dirty bitmap: the operations named, in the order in which they are first named."""
    given = parse(words, BITMAP)
    asked = [o for o in given.options if o in ("add", "remove", "clear", "enable", "disable", "merge")]
    if len(given.words) != 2:
        raise UsageError("Expecting image file name and bitmap name")
    if not asked:
        raise UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if given.last("g") is not None and "add" not in asked:
        raise UsageError("granularity only supported with --add")
    path, name = given.words
    with open_image(path, format=check_format(given.last("f")), read_only=False, named=False) as image:
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

        with open_image(path, format=fmt, named=False) as other:
            if other.format != "qcow2":
                raise BlockError(f"{path}: a {other.format} image has no bitmaps")
            theirs = Bitmaps(other)
            bitmaps.merge(name, theirs.find(source), theirs.bits(theirs.find(source)))
