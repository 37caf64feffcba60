"""Commands that look at images and change nothing: info, map, compare."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from ..errors import BlockError
from ..images import open_any, resolve_name
from ..qcow2.bitmaps import load as load_bitmaps
from . import args
from .args import UsageError, human_size, one_line, parse
from .basic import _one_path, _output, listing, opened
from .options import cache_mode, read_format
from .progress import Progress
from .secrets import SECRETS, secrets

COMMON = {**SECRETS, "f": "value", "format": "=f", "output": "value", "U": "", "force-share": "=U", "allow-chain": ""}

# --- info ---


def info(words: list[str]) -> int:
    """Look at the metadata of one image; with --backing-chain (and --allow-chain) of those below it too."""
    given = parse(words, {**COMMON, "backing-chain": ""})
    path = _one_path(given.words, "Image info requires path")
    output = _output(given.last("output"))
    secrets(given)  # metadata are not encrypted: they only have to be right
    fmt, share = read_format(given.last("f")), given.flag("U")
    found: list[dict[str, Any]] = []
    names: list[Any] = []
    seen: set[tuple[int, int]] = set()
    while True:
        with open_any(path, format=fmt, force_share=share, named=False) as image:
            status = os.fstat(image.file.fd)
            if (status.st_dev, status.st_ino) in seen:
                raise BlockError(f"{path}: the chain of backing files comes back to this image")
            seen.add((status.st_dev, status.st_ino))
            found.append(_describe(image, path))
            names.append(_snapshots(image))
            backing = getattr(image, "backing_file", None)
            fmt = getattr(image, "backing_format", None)
        if not backing or not given.flag("backing-chain"):
            break
        path = _full_name(path, backing, given.flag("allow-chain"))
    if output == "json":
        import json

        print(json.dumps(found if given.flag("backing-chain") else found[0], indent=4))
    else:
        print("\n".join(_human(d, s) for d, s in zip(found, names, strict=True)), end="")
    return 0


def _full_name(path: str, name: str, allow: bool) -> str:
    """The path that an image means by a name, relative to where the image was looked for, as qemu-img says it."""
    resolved = resolve_name(path, name, allow)
    return resolved if name.startswith(("/", "file:")) else os.path.join(os.path.dirname(path), name)  # noqa: PTH118,PTH120


def _snapshots(image: Any) -> list[Any]:
    if image.format != "qcow2":
        return []
    from ..qcow2.snapshots import load

    return load(image.file, image.header)[0]


def _describe(image: Any, path: str) -> dict[str, Any]:
    status = os.fstat(image.file.fd)
    found: dict[str, Any] = {"virtual-size": image.size, "filename": path}
    cluster = getattr(image, "cluster_size", 0) or getattr(image, "block_size", 0)
    if cluster:
        found["cluster-size"] = cluster
    found |= {"format": image.format, "actual-size": status.st_blocks * 512}
    if image.format != "qcow2":
        if image.format == "vmdk":
            found["format-specific"] = {"type": "vmdk", "data": image.details()}
        found["dirty-flag"] = False
        return found
    h = image.header
    if image.encrypted:
        found["encrypted"] = True
    # In the order in which qemu-img 7.2 prints them.
    details: dict[str, Any] = {"compat": "0.10" if h.version == 2 else "1.1"}
    details["compression-type"] = "zstd" if h.compression_type else "zlib"
    if h.version >= 3:
        details["lazy-refcounts"] = bool(h.compatible & 1)
        described = [
            {
                "flags": [n for bit, n in ((1, "in-use"), (2, "auto")) if b.flags & bit],
                "name": b.name,
                "granularity": 1 << b.granularity_bits,
            }
            for b in load_bitmaps(image.file, h)
        ]
        if described:
            details["bitmaps"] = described
    details["refcount-bits"] = 1 << h.refcount_order
    if image.encrypted:
        details["encrypt"] = _encryption(image)
    if h.version >= 3:
        if image.data_file_name is not None:
            details["data-file"] = image.data_file_name
            details["data-file-raw"] = bool(h.autoclear & 2)
        details["corrupt"] = bool(h.incompatible & 2)
        details["extended-l2"] = h.extended_l2
    found["format-specific"] = {"type": "qcow2", "data": details}
    if image.backing_file is not None:
        found["backing-filename"] = image.backing_file
        with suppress(BlockError):  # it may be named in a way that cannot be opened: the name itself stands above
            found["full-backing-filename"] = _full_name(path, image.backing_file, True)
        if image.backing_format:
            found["backing-filename-format"] = image.backing_format
    found["dirty-flag"] = bool(h.incompatible & 1)
    snapshots = [
        {
            "icount": s.icount,
            "vm-clock-nsec": s.vm_clock_nsec % 10**9,
            "name": s.name,
            "date-sec": s.date_sec,
            "date-nsec": s.date_nsec,
            "vm-clock-sec": s.vm_clock_nsec // 10**9,
            "id": s.id,
            "vm-state-size": s.vm_state_size,
        }
        for s in _snapshots(image)
    ]
    for s in snapshots:
        if s["icount"] == (1 << 64) - 1:
            del s["icount"]
    if snapshots:
        found["snapshots"] = snapshots
    return found


def _human(d: dict[str, Any], snapshots: list[Any]) -> str:
    lines = [
        f"image: {one_line(d['filename'])}",
        f"file format: {d['format']}",
        f"virtual size: {human_size(d['virtual-size'])} ({d['virtual-size']} bytes)",
        f"disk size: {human_size(d['actual-size'])}",
    ]
    if "cluster-size" in d:
        lines.append(f"cluster_size: {d['cluster-size']}")
    if d.get("encrypted"):
        lines.insert(4, "encrypted: yes")
    if d["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "backing-filename" in d:
        full = d.get("full-backing-filename", d["backing-filename"])
        lines.append(
            f"backing file: {one_line(d['backing-filename'])}"
            + (f" (actual path: {one_line(full)})" if full != d["backing-filename"] else "")
        )
        if "backing-filename-format" in d:
            lines.append(f"backing file format: {one_line(d['backing-filename-format'])}")
    text = "\n".join(lines) + "\n"
    if snapshots:
        text += "Snapshot list:\n" + listing(snapshots).replace("\r\n", "\n")
    if "format-specific" in d:
        text += "Format specific information:\n"
        text += _tree(d["format-specific"]["data"], 1)
    return text


def _tree(values: dict[str, Any] | list[Any], depth: int) -> str:
    """Nested values as qemu-img prints them: lists by number, four more spaces a level."""
    text = ""
    items = values.items() if isinstance(values, dict) else ((f"[{i}]", v) for i, v in enumerate(values))
    for name, value in items:
        label = f"{'    ' * depth}{name.replace('-', ' ') if isinstance(values, dict) else name}:"
        if isinstance(value, dict | list):
            text += f"{label}\n{_tree(value, depth + 1)}"
        else:
            text += f"{label} {str(value).lower() if isinstance(value, bool) else one_line(str(value))}\n"
    return text


def _encryption(image: Any) -> dict[str, Any]:
    """What a LUKS header says to everybody."""
    from .. import luks

    header = luks.parse(image.read_luks)
    cipher, mode, ivgen, ivgen_hash = header.cipher_names()
    found: dict[str, Any] = {"ivgen-alg": ivgen, "hash-alg": header.kind, "cipher-alg": cipher, "uuid": header.uuid}
    if ivgen_hash:
        found["ivgen-hash-alg"] = ivgen_hash
    slots = []
    for slot in header.slots:
        used = {"iters": slot.rounds, "stripes": slot.stripes} if slot.active else {}
        shown = {"active": slot.active, "iters": 0, "key-offset": slot.offset * luks.SECTOR, "stripes": 0} | used
        slots.append({name: value for name, value in shown.items() if slot.active or name in ("active", "key-offset")})
    found |= {"format": "luks", "cipher-mode": mode, "slots": slots}
    return found | {"payload-offset": header.payload, "master-key-iters": header.rounds}


# --- map ---


class Mapped(NamedTuple):
    """Adjacent guest bytes of one kind, looked up through the whole chain."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    path: str


def mapped(image: Any, start: int, length: int, depth: int = 0) -> Iterator[Mapped]:
    """What backs each part of a range, from the image that has it. Parts are not joined."""
    end = min(start + length, image.size)
    for e in image.block_status(start, end - start):
        if not e.present and image.backing is not None:
            there = min(e.offset + e.length, image.backing.size)
            if there > e.offset:
                yield from mapped(image.backing, e.offset, there - e.offset, depth + 1)
            rest = max(there, e.offset)
            if rest < e.offset + e.length:
                yield Mapped(rest, e.offset + e.length - rest, depth, False, True, False, False, None, image.path)
            continue
        where = image.data_file.path if image.format == "qcow2" and image.external else image.path
        yield Mapped(e.offset, e.length, depth, e.present, e.zero, e.present and not e.zero, e.compressed, e.host, where)


def joined(parts: Iterator[Mapped]) -> Iterator[Mapped]:
    """Adjacent parts of one kind as one."""
    last: Mapped | None = None
    for part in parts:
        if last is not None and last[2:7] == part[2:7] and last.path == part.path:
            # Compressed data have no place of their own to compare.
            follows = part.offset == (last.offset + last.length if last.offset is not None else None)
            if follows:
                last = last._replace(length=last.length + part.length)
                continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last


def map(words: list[str]) -> int:
    given = parse(words, {**COMMON, "start-offset": "value", "s": "=start-offset", "max-length": "value", "l": "=max-length"})
    path = _one_path(given.words, "Image map requires path")
    output = _output(given.last("output"))
    start = args.size(given.last("start-offset") or "0", "start offset")
    with opened(given, path, read_format(given.last("f"))) as image:
        length = args.size(given.last("max-length") or str(image.size), "length")
        parts = joined(mapped(image, start, length))
        if output == "json":
            import json

            lines = []
            for m in parts:
                item: dict[str, Any] = {"start": m.start, "length": m.length, "depth": m.depth, "present": m.present}
                item |= {"zero": m.zero, "data": m.data}
                if m.offset is not None and m.present:
                    item["offset"] = m.offset
                lines.append(json.dumps(item).replace("{", "{ ").replace("}", "}"))
            print("[" + ",\n".join(lines) + "]")
            return 0
        print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        names = _names(image, path)
        for m in parts:
            if m.data and m.compressed:
                raise BlockError("File contains external, encrypted or compressed clusters.")
            if m.data:
                print(f"{_hex(m.start):<16}{_hex(m.length):<16}{_hex(m.offset or 0):<16}{one_line(names.get(m.path, m.path))}")
    return 0


def _names(image: Any, path: str) -> dict[str, str]:
    """What the files of a chain are called, from the names in it: relative ones stay so, as qemu-img has it."""
    found = {}
    while image is not None:
        found[image.path] = path
        if getattr(image, "external", False):
            found[image.data_file.path] = _full_name(path, image.data_file_name, True)
        if image.backing is not None:
            path = _full_name(path, image.backing_file, True)
        image = image.backing
    return found


def _hex(n: int) -> str:
    """As printf's %#x, which has no prefix for 0."""
    return hex(n) if n else "0"


# --- compare ---

COMPARE = {**COMMON, "F": "value", "T": "value", "s": "", "p": "", "q": ""}
_CHUNK = 2 << 20


def compare(words: list[str]) -> int:
    """Exit status as qemu-img's: 0 the same, 1 different, 2 not opened, 3 not mapped, 4 not read."""
    given = parse(words, COMPARE)
    if len(given.words) != 2:
        raise UsageError("Expecting two image file names")
    strict, quiet, cache = given.flag("s"), given.flag("q"), cache_mode(given, "T")
    status = 2

    def say(text: str) -> None:
        if not quiet:
            print(text)

    try:
        with (
            opened(given, given.words[0], read_format(given.last("f")), plain=True, cache=cache) as a,
            opened(given, given.words[1], read_format(given.last("F")), plain=True, cache=cache) as b,
            Progress(max(a.size, b.size), shown=given.flag("p"), quiet=quiet) as progress,
        ):
            status = 3
            if a.size != b.size:
                if strict:
                    say("Strict mode: Image size mismatch!")
                    return 1
                say("Warning: Image size mismatch!")
            differs = difference(a, b, min(a.size, b.size), strict, progress)
            if differs is None and a.size != b.size:
                longer = a if a.size > b.size else b
                at = first_nonzero(longer, min(a.size, b.size))
                differs = _content(at) if at is not None else None
    except BrokenPipeError:  # of our output: no image is a pipe
        raise
    except _ReadError as e:
        args.warn(args.text_of(e))
        return 4
    except (BlockError, OSError) as e:
        args.warn(args.text_of(e))
        return status
    say(differs or "Images are identical.")  # when the line of progress has ended
    return 1 if differs else 0


class _ReadError(BlockError):
    """Guest data cannot be read."""


def _read_into(image: Any, at: int, view: memoryview) -> None:
    try:
        image.read_into(at, [view])
    except (BlockError, OSError) as e:
        raise _ReadError(f"Error while reading offset {at} of {image.path}: {args.text_of(e)}") from e


def _content(at: int) -> str:
    return f"Content mismatch at offset {at}!"


def difference(a: Any, b: Any, size: int, strict: bool, progress: Progress) -> str | None:
    """Where two images first differ, None if they do not. `strict`: whether they have something there, and what, counts too."""
    one, other = bytearray(_CHUNK), bytearray(_CHUNK)
    left, right = _cursor(a, size), _cursor(b, size)
    at = 0
    x, y = next(left, None), next(right, None)
    while at < size and x is not None and y is not None:
        end = min(x.start + x.length, y.start + y.length)
        if strict and (x.present, x.zero, x.data) != (y.present, y.zero, y.data):
            return f"Strict mode: Offset {at} block status mismatch!"
        if x.data or y.data:
            n = min(end - at, _CHUNK)
            with memoryview(one) as v, memoryview(other) as w:
                _read_into(a, at, v[:n])
                _read_into(b, at, w[:n])
            if one != other if n == _CHUNK else one[:n] != other[:n]:
                return _content(at + next(i for i in range(n) if one[i] != other[i]))
            at += n
        else:
            at = end
        progress.at(at)
        if at >= x.start + x.length:
            x = next(left, None)
        if at >= y.start + y.length:
            y = next(right, None)
    return None


def _cursor(image: Any, size: int) -> Iterator[Mapped]:
    return joined(m._replace(offset=None if not m.data else m.offset) for m in mapped(image, 0, size))


def first_nonzero(image: Any, start: int) -> int | None:
    """The first offset from `start` that does not read as zero."""
    for m in mapped(image, start, image.size - start):
        at = m.start
        while m.data and at < m.start + m.length:
            data = bytearray(min(_CHUNK, m.start + m.length - at))
            with memoryview(data) as view:
                _read_into(image, at, view)
            stripped = data.lstrip(b"\0")
            if stripped:
                return at + len(data) - len(stripped)
            at += len(data)
    return None
