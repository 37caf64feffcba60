"""The command amend: changing options of an image in place. Not here: the changes (`qcow2.amend`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import BlockError
from ..images import open_any, unlock
from .args import Given, UsageError, boolean, number, option_list, parse, size
from .basic import _one_path
from .options import apply_cache, cache_mode, check_format, is_direct
from .progress import Progress
from .secrets import SECRETS, passphrase, secret

AMEND = {**SECRETS, "f": "value", "o": "value", "t": "value", "q": "", "p": "", "force": "", "allow-chain": ""}
_OPTIONS = ("backing_file", "backing_fmt", "compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size")
_ENCRYPT = ("state", "keyslot", "old-secret", "new-secret", "iter-time")
_COMPAT = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


def amend(words: list[str]) -> int:
    """Change options of an image in place; what cannot be changed is refused by name, before anything is."""
    given = parse(words, AMEND)
    pairs = option_list(given.all("o"))
    if "help" in pairs or "?" in pairs:
        names = sorted([*_OPTIONS, *(f"encrypt.{name}" for name in _ENCRYPT)])
        print("Amend options for 'qcow2':\n" + "\n".join(f"  {name}" for name in names))
        return 0
    if not pairs:
        raise UsageError("Must specify options (-o)")
    path = _one_path(given.words, "Image amend requires path")
    encrypt = {name.removeprefix("encrypt."): pairs.pop(name) for name in list(pairs) if name.startswith("encrypt.")}
    for name in pairs:
        if name not in _OPTIONS:
            raise UsageError(f"Invalid parameter '{name}': amend changes {', '.join(_OPTIONS)}, encrypt.*")
    for name in encrypt:
        if name not in _ENCRYPT:
            raise UsageError(f"Invalid parameter 'encrypt.{name}': expected encrypt.{{{','.join(_ENCRYPT)}}}")
    compat = None
    if "compat" in pairs:
        if pairs["compat"] not in _COMPAT:
            raise UsageError(f"Invalid value '{pairs['compat']}' for compat: expected 0.10 or 1.1")
        compat = _COMPAT[pairs["compat"]]
    lazy = boolean(pairs["lazy_refcounts"], "lazy_refcounts") if "lazy_refcounts" in pairs else None
    if lazy and compat == 2:
        raise UsageError("lazy_refcounts needs compat=1.1")
    bits = number(pairs["refcount_bits"], "refcount_bits", 1, 64) if "refcount_bits" in pairs else None
    data_raw = boolean(pairs["data_file_raw"], "data_file_raw") if "data_file_raw" in pairs else None
    new_size = size(pairs["size"], "size") if "size" in pairs else None
    if new_size is not None and new_size % 512:
        raise UsageError(f"The new size {new_size} is not aligned to 512")
    # Only resizing and going back to version 2 look at guest data.
    named = new_size is not None or compat == 2
    fmt = check_format(given.last("f"))
    cache = cache_mode(given, "t")
    with open_any(
        path, format=fmt, read_only=False, named=named, allow=given.flag("allow-chain"), direct=is_direct(cache)
    ) as image:
        apply_cache(image, cache)
        if image.format != "qcow2":
            raise BlockError(f"{path}: a {image.format} image has no options to change")
        if new_size is not None and image.encrypted:
            unlock(image, passphrase(given) or b"")
        from ..qcow2 import amend as changes

        steps: list[Callable[[], object]] = []
        if encrypt:
            steps.append(lambda: _keys(given, image, encrypt))
        if compat == 3:
            steps.append(image.upgrade)
        if bits is not None:
            steps.append(lambda: changes.set_refcount_bits(image, bits))
        if lazy is not None and (lazy or image.header.version >= 3):
            steps.append(lambda: image.set_lazy_refcounts(lazy))
        if "data_file" in pairs or data_raw is not None:
            steps.append(lambda: changes.set_data_file(image, pairs.get("data_file"), data_raw))
        if new_size is not None:
            steps.append(lambda: image.resize(new_size))
        if "backing_file" in pairs or "backing_fmt" in pairs:
            name = pairs.get("backing_file", image.backing_file)
            backing_format = check_format(pairs.get("backing_fmt", image.backing_format))
            if name and not backing_format:
                raise UsageError("backing_file needs its format: backing_fmt")
            steps.append(lambda: image.set_backing(name or None, backing_format))
        if compat == 2:
            steps.append(lambda: changes.downgrade(image))
        with Progress(len(steps), shown=given.flag("p"), quiet=given.flag("q")) as progress:
            for i, step in enumerate(steps):
                step()
                progress.at(i + 1)
    return 0


def _keys(given: Given, image: Any, encrypt: dict[str, str]) -> None:
    """Add or erase a key slot of a LUKS image."""
    from .. import luks
    from ..qcow2.amend import KeySlots

    state = encrypt.get("state")
    if state not in ("active", "inactive"):
        raise UsageError("encrypt.state: expected active (add a passphrase) or inactive (erase one)")
    slot = number(encrypt["keyslot"], "encrypt.keyslot", 0, 7) if "keyslot" in encrypt else None
    old = secret(given, encrypt["old-secret"]) if "old-secret" in encrypt else None
    slots = KeySlots(image)
    if state == "active":
        if "new-secret" not in encrypt:
            raise UsageError("encrypt.state=active needs encrypt.new-secret=ID")
        words = old or passphrase(given)
        if words is None:
            raise UsageError("a passphrase that opens the image is needed: --key-file, --key-secret or encrypt.old-secret=ID")
        rounds = luks.rounds_for(number(encrypt.get("iter-time", "500"), "encrypt.iter-time", 1, 1 << 20))
        slots.add(words, secret(given, encrypt["new-secret"]), slot=slot, rounds=rounds, force=given.flag("force"))
        return
    if "new-secret" in encrypt or "iter-time" in encrypt:
        raise UsageError("encrypt.state=inactive goes with encrypt.old-secret or encrypt.keyslot only")
    if (slot is None) == (old is None):
        raise UsageError("encrypt.state=inactive needs encrypt.old-secret=ID or encrypt.keyslot=N")
    slots.erase(slot=slot, old=old, force=given.flag("force"))
