"""StratoVirt's own commands: create, check, resize, snapshot. Not here: how images work."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from .. import prealloc
from ..errors import BlockError
from ..images import create_image, open_any, resolve_name, unlock
from ..qcow2.create import Options
from . import args
from .args import UsageError, one_line, parse
from .interrupt import Making
from .options import (
    apply_cache,
    asks_for_help,
    cache_mode,
    check_format,
    creation_options,
    is_direct,
    preallocation,
    read_format,
    round_up,
    take_size,
)
from .progress import Progress
from .secrets import SECRETS, passphrase, secrets

CREATE = {**SECRETS, "f": "value", "o": "value", "b": "value", "F": "value", "q": "", "u": ""}


def opened(
    given: args.Given,
    path: str,
    fmt: str | None,
    *,
    read_only: bool = True,
    plain: bool = False,
    cache: str = "writeback",
    **options: Any,
) -> Any:
    """Open an image as a command line says: -U, --allow-chain, and the passphrase of what is encrypted.

    `plain`: a passphrase may be of another image of the command. -U of a command that writes is for what the image names.
    """
    share = given.flag("U")
    image = open_any(
        path,
        format=fmt,
        read_only=read_only,
        allow=given.flag("allow-chain"),
        force_share=share and read_only,
        share_named=share,
        direct=is_direct(cache),
        **options,
    )
    try:
        apply_cache(image, cache)
        words = passphrase(given)
        named = given.last("key-file") is not None or given.last("key-secret") is not None
        if words is not None and not unlock(image, words) and named and not plain:
            raise BlockError(f"{path}: the image is not encrypted: it has no passphrase")
    except BaseException:
        image.close()
        raise
    return image


def create(words: list[str]) -> int:
    given = parse(words, CREATE)
    fmt = check_format(given.last("f")) or "raw"
    pairs = args.option_list(given.all("o"))
    if asks_for_help(pairs, fmt):
        return 0
    if given.last("b") is not None:
        pairs["backing_file"] = given.last("b") or ""
    if given.last("F") is not None:
        pairs["backing_fmt"] = given.last("F") or ""
    if not given.words:
        raise UsageError("Image creation requires path and size parameters")
    if len(given.words) > 2:
        raise UsageError(f"Unexpected argument: {given.words[2]}")
    path = given.words[0]
    size = take_size(pairs)
    options = creation_options(given, fmt, pairs, key_file=True)
    if len(given.words) == 2:
        if size is not None:
            raise UsageError("The image size must be specified only once")
        size = args.size(given.words[1], "image size")
    elif size is None:
        if not options.backing_file:
            raise UsageError("Image creation requires size parameters")
        size = _backing_size(path, options)
    size = round_up(size)
    if not size:
        raise UsageError("Image size 0 is invalid, it can't be zero")
    if options.backing_file and not given.flag("u"):
        if not options.backing_format:
            raise UsageError("backing_file needs its format: -F FMT")
        _backing_size(path, options)  # it is there and opens
    with Making() as making, Progress(1, shown=False, quiet=given.flag("q")) as progress:
        create_image(path, size, format=fmt, options=options, made=making.made, report=progress.of)
    if not given.flag("q"):
        print(_created(fmt, size, options))
    return 0


def _backing_size(path: str, options: Options) -> int:
    name = resolve_name(path, options.backing_file or "", True)
    # The user names this file: it may be looked at, what it names in turn may not.
    with open_any(name, format=options.backing_format, named=False) as image:
        return int(image.size)


def _created(fmt: str, size: int, o: Options) -> str:
    if fmt == "raw":
        return f"Stratovirt-img: fmt=raw size={size}" + (f" preallocation={o.preallocation}" if o.preallocation != "off" else "")
    text = (
        f"Stratovirt-img: fmt=qcow2 cluster_size={o.cluster_size} extended_l2={_on(o.extended_l2)} "
        f"compression_type={o.compression_type} size={size}"
    )
    if o.backing_file:
        text += f" backing_file={o.backing_file}" + (f" backing_fmt={o.backing_format}" if o.backing_format else "")
    if o.data_file:
        text += f" data_file={o.data_file} data_file_raw={_on(o.data_file_raw)}"
    if o.preallocation != "off":
        text += f" preallocation={o.preallocation}"
    if o.version == 2:
        text += " compat=0.10"
    return text + f" lazy_refcounts={_on(o.lazy_refcounts)} refcount_bits={o.refcount_bits}"


def _on(value: bool) -> str:
    return "on" if value else "off"


# --- check ---

CHECK = {
    **SECRETS,
    "T": "value",
    "p": "",
    "r": "value",
    "repair": "=r",
    "no_print_error": "",
    "f": "value",
    "format": "=f",
    "output": "value",
    "q": "",
    "U": "",
    "force-share": "=U",
}


def check(words: list[str]) -> int:
    """Exit status as qemu-img's: 0 clean, 1 not checked, 2 corrupt, 3 leaks, 63 a format that cannot be checked."""
    given = parse(words, CHECK)
    secrets(given)  # metadata are not encrypted: they only have to be right
    direct = is_direct(cache_mode(given, "T"))
    repair = given.last("r") or "none"
    if given.last("r") not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r \"{repair}\"(expects 'leaks' or 'all')")
    output = _output(given.last("output"))
    if repair != "none" and given.flag("U"):
        raise UsageError("-U is for reading: what -r repairs is locked")
    path = _one_path(given.words, "Image check requires path")
    fmt = read_format(given.last("f"))
    image = open_any(
        path,
        format=fmt,
        read_only=repair == "none",
        force_share=given.flag("U"),
        for_repair=True,
        named=False,
        direct=direct,
    )
    with image:
        if image.format != "qcow2":
            args.warn("This image format does not support checks")
            return 63
        from ..qcow2.check import check as check_qcow2

        quiet = given.flag("no_print_error") or given.flag("q") or output == "json"
        with Progress(1, shown=given.flag("p"), quiet=given.flag("q")) as progress:
            report = (lambda line: None) if quiet else print
            result = check_qcow2(image, repair=repair, report=report, progress=progress.of)
    if output == "json":
        import json

        print(json.dumps(_check_json(path, image.format, result), indent=4))
    elif not given.flag("q"):
        print(_summary(result), end="")
    if result.check_errors:
        return 1
    if result.corruptions:
        return 2
    return 3 if result.leaks else 0


def _summary(r: Any) -> str:
    text = ""
    if r.leaks_fixed or r.corruptions_fixed:
        text += (
            f"The following inconsistencies were found and repaired:\n\n\t{r.leaks_fixed} leaked clusters\n"
            f"\t{r.corruptions_fixed} corruptions\n\nDouble checking the fixed image now..\n"
        )
    if r.clean:
        text += "No errors were found on the image.\n"
    if r.corruptions:
        text += (
            f"{r.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it.\n"
        )
    if r.leaks:
        text += f"{r.leaks} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n"
    if r.check_errors:
        text += f"{r.check_errors} internal errors have occurred during the check.\n"
    if r.total_clusters and r.allocated_clusters:
        share = r.allocated_clusters * 100 / r.total_clusters
        pieces = r.fragmented_clusters * 100 / r.allocated_clusters
        packed = r.compressed_clusters * 100 / r.allocated_clusters
        text += (
            f"{r.allocated_clusters}/{r.total_clusters} = {share:.2f}% allocated, {pieces:.2f}% fragmented, "
            f"{packed:.2f}% compressed clusters\n"
        )
    if r.image_end_offset:
        text += f"Image end offset: {r.image_end_offset}\n"
    return text


def _check_json(path: str, fmt: str, r: Any) -> dict[str, Any]:
    counts = {
        "total-clusters": r.total_clusters,
        "fragmented-clusters": r.fragmented_clusters,
        "allocated-clusters": r.allocated_clusters,
        "compressed-clusters": r.compressed_clusters,
        "corruptions": r.corruptions,
        "leaks": r.leaks,
        "corruptions-fixed": r.corruptions_fixed,
        "leaks-fixed": r.leaks_fixed,
    }
    found = {"image-end-offset": r.image_end_offset} | {name: value for name, value in counts.items() if value}
    return {**found, "check-errors": r.check_errors, "filename": path, "format": fmt}


# --- resize ---


RESIZE = {**SECRETS, "f": "value", "shrink": "", "preallocation": "value", "q": "", "p": "", "allow-chain": ""}


def resize(words: list[str]) -> int:
    if len(words) < 2:
        raise UsageError("Not enough arguments")
    given = parse(words[:-1], RESIZE)
    if len(given.words) != 1:
        raise UsageError(f"Unexpected argument: {given.words[1]}" if given.words else "Expecting image file name and size")
    word = words[-1]
    mode = preallocation(given.last("preallocation"))
    with opened(given, given.words[0], check_format(given.last("f")), read_only=False) as image:
        step = args.size(word.lstrip("+-"), "size") if word[:1] in "+-" else 0
        new = image.size + step if word[0] == "+" else image.size - step if word[0] == "-" else args.size(word, "size")
        if new < 0 or (new < image.size and not given.flag("shrink")):
            raise UsageError("The shrink operation is not supported without --shrink: it loses data")
        if new % 512:
            raise UsageError(f"The new size {new} is not aligned to 512")
        if mode != "off":
            _check_preallocation(image, new, mode)
        old = image.size
        image.resize(new, shrink=True)
        if mode != "off":
            try:
                with Progress(new - old, shown=given.flag("p"), quiet=given.flag("q")) as progress:
                    _preallocate(image, old, mode, progress)
            except (OSError, BlockError):
                with suppress(OSError, BlockError):  # what was taken is given back: the host has no room for it
                    image.resize(old, shrink=True)
                raise
        image.flush()
    if not given.flag("q"):
        print("Image resized.")
    return 0


def _check_preallocation(image: Any, new: int, mode: str) -> None:
    if new < image.size:
        raise UsageError("Preallocation can only be used for growing images")
    if image.format == "raw":
        if mode == "metadata":
            raise UsageError("Unsupported preallocation mode: metadata is of qcow2 images")
    elif image.encrypted:
        raise UsageError("--preallocation does not go with encrypted images: what was never written would be noise")
    elif image.backing is not None and image.backing.size > image.size:
        raise UsageError("--preallocation: the backing file is longer than the image, and would show through")


def _preallocate(image: Any, old: int, mode: str, progress: Progress) -> None:
    if image.format == "raw":
        prealloc.fill(image.file, old, image.size, mode, progress.of)
        return
    from ..qcow2.create import preallocate

    preallocate(image, old, mode, progress.of)


# --- snapshot ---

SNAPSHOT = {
    **SECRETS, "f": "value", "l": "", "a": "value", "c": "value", "d": "value", "p": "", "q": "", "U": "", "force-share": "=U",
}  # fmt: skip


def snapshot(words: list[str]) -> int:
    given = parse(words, SNAPSHOT)
    secrets(given)
    asked = [o for o in ("l", "a", "c", "d") if given.flag(o)]
    if len(asked) > 1:
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    path = _one_path(given.words, "Image snapshot requires path")
    what = asked[0] if asked else "l"
    name = given.last(what) or ""
    changing = what != "l"
    if changing and given.flag("U"):
        raise UsageError(f"-U is for reading: what -{what} changes is locked")
    with (
        open_any(
            path, format=check_format(given.last("f")), read_only=not changing, force_share=given.flag("U"), named=False
        ) as image,
        Progress(1, shown=given.flag("p"), quiet=given.flag("q")) as progress,
    ):
        if image.format != "qcow2":
            raise BlockError(f"Could not create snapshot '{name}'(Operation not supported)")
        from ..qcow2.snapshots import Snapshots

        table = Snapshots(image, progress.of)
        if what == "l":
            print("Snapshot list:")
            print(listing(table.list), end="")
        elif what == "c":
            table.create(name)
        elif what == "a":
            table.apply(table.find(name, by_id=True))
        else:
            table.delete(table.find(name))
    return 0


def listing(snapshots: list[Any]) -> str:
    """StratoVirt's table, whose lines end in CR LF."""
    lines = [f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"]
    for s in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(s.date_sec))
        seconds, ms = s.vm_clock_nsec // 10**9, s.vm_clock_nsec // 10**6 % 1000
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{ms:03}"
        icount = "" if s.icount == (1 << 64) - 1 else str(s.icount)
        lines.append(f"{one_line(s.id):<9} {one_line(s.name):<16} {s.vm_state_size:>6} B{date:>20}{clock:>13}{icount:>11}")
    return "".join(line + "\r\n" for line in lines)


def _one_path(words: list[str], missing: str) -> str:
    if not words:
        raise UsageError(missing)
    if len(words) > 1:
        raise UsageError(f"Unexpected argument: {words[1]}")
    return words[0]


def _output(name: str | None) -> str:
    if name not in (None, "human", "json"):
        raise UsageError(f"--output {name}: expected human or json")
    return name or "human"
