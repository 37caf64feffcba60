"""The command measure: how large a new image would be."""

from __future__ import annotations

from typing import Any

from ..qcow2.bitmaps import load as load_bitmaps
from ..qcow2.create import check_options
from . import args
from .args import UsageError, parse
from .basic import _one_path, _output, opened
from .look import COMMON, mapped
from .options import check_format, creation_options, read_format, round_up

MEASURE = {**COMMON, "O": "value", "o": "value", "size": "value", "l": "value"}


def measure(words: list[str]) -> int:
    """How large a new image would be: at least (with what the source has), with every cluster allocated, and its bitmaps."""
    given = parse(words, MEASURE)
    target = check_format(given.last("O")) or "raw"
    pairs = args.option_list(given.all("o"))
    encrypted = pairs.get("encrypt.format")
    if "size" in pairs:
        raise UsageError("-o size has no effect on what is measured: expected --size N or an image")
    options = creation_options(given, target, pairs, dry=True)
    output = _output(given.last("output"))
    bitmaps: int | None = None
    if given.last("size") is not None:
        if given.words:
            raise UsageError("--size and an image do not go together")
        size, clusters = round_up(args.size(given.last("size") or "", "size")), 0
    else:
        path = _one_path(given.words, "Either --size N or one filename must be specified")
        with opened(given, path, read_format(given.last("f"))) as image:
            if given.last("l") is not None:
                from .convert import show_snapshot

                show_snapshot(image, given.last("l") or "")
            size = image.size
            if target == image.format == "qcow2" and image.header.version >= 3:
                bitmaps = _bitmaps_size(image, options.cluster_size)
            bits = options.cluster_size.bit_length() - 1
            clusters, last = 0, -1
            for m in mapped(image, 0, size):
                if m.data:
                    first = max(m.start >> bits, last + 1)
                    last = (m.start + m.length - 1) >> bits
                    clusters += last + 1 - first
    if target == "raw":
        required = full = size
    else:
        check_options(size, options)
        full = _qcow2_size(size, options)
        if encrypted:
            from ..luks import Spec

            full += -(-(options.luks_spec or Spec()).header_bytes // options.cluster_size) * options.cluster_size
        data = -(-size // options.cluster_size) * options.cluster_size
        required = full if options.preallocation in ("falloc", "full") else full - data + clusters * options.cluster_size
    if output == "json":
        import json

        found = {"required": required, "fully-allocated": full} | ({} if bitmaps is None else {"bitmaps": bitmaps})
        print(json.dumps(found, indent=4))
    else:
        print(
            f"required size: {required}\nfully allocated size: {full}" + ("" if bitmaps is None else f"\nbitmaps size: {bitmaps}")
        )
    return 0


def _bitmaps_size(image: Any, cluster: int) -> int:
    """Bytes of the image's bitmaps with everything in them marked or not in clusters of their own, tables and directory."""
    clusters = directory = 0
    for bitmap in load_bitmaps(image.file, image.header):
        granules = -(-image.size >> bitmap.granularity_bits)
        parts = -(-granules // (8 * cluster))
        clusters += parts + -(-parts * 8 // cluster)
        directory += -(-(24 + len(bitmap.name.encode("utf-8", "surrogateescape"))) // 8) * 8
    return (clusters + -(-directory // cluster)) * cluster


def _qcow2_size(size: int, o: Any) -> int:
    """Bytes of an image with every cluster allocated: header, L1, L2 tables, data, and what counts all of them."""
    cs = o.cluster_size
    entry = 16 if o.extended_l2 else 8
    clusters = -(-size // cs)
    l2_tables = -(-clusters * entry // cs)
    total = 1 + max(-(-l2_tables * 8 // cs), 1) + l2_tables + clusters
    per_block = cs * 8 // o.refcount_bits
    blocks = table = 1
    while True:
        need = -(-(total + blocks + table) // per_block)
        need_table = -(-need * 8 // cs)
        if (need, need_table) == (blocks, table):
            break
        blocks, table = max(need, blocks), max(need_table, table)
    return int((total + blocks + table) * cs)
