"""Options of new images, -o NAME=VALUE,… by qemu-img's names: what there is, what each means, what is refused and why.

Not here: making an image (`images.create_image`), which options can be changed later (`amend`).
"""

from __future__ import annotations

from typing import Any

from ..images import FORMATS, READ_FORMATS
from ..prealloc import MODES
from ..qcow2.create import Options
from . import args
from .args import UsageError
from .secrets import passphrase, secret

_COMPAT = {"0.10": 2, "1.1": 3, "v2": 2, "v3": 3}
# name: (kind of value, what it is). Of raw images too: those of _RAW.
_HELP = {
    "backing_file": ("str", "File name of a base image"),
    "backing_fmt": ("str", "Image format of the base image"),
    "cluster_size": ("size", "qcow2 cluster size, 512 to 2M"),
    "compat": ("str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    "compression_type": ("str", "Compression method of clusters: zlib or zstd"),
    "data_file": ("str", "File name of an external data file"),
    "data_file_raw": ("bool (on/off)", "The external data file must stay valid as a raw image"),
    "encrypt.cipher-alg": ("str", "Encryption cipher: aes-128 or aes-256"),
    "encrypt.cipher-mode": ("str", "Cipher mode: xts or cbc"),
    "encrypt.format": ("str", "Encrypt the image: luks"),
    "encrypt.hash-alg": ("str", "Hash of the key derivation: sha1, sha224, sha256, sha384, sha512 or ripemd160"),
    "encrypt.iter-time": ("num", "Milliseconds to spend in the key derivation"),
    "encrypt.ivgen-alg": ("str", "Initialisation vectors: plain64, plain or essiv"),
    "encrypt.ivgen-hash-alg": ("str", "Hash of essiv: sha256"),
    "encrypt.key-secret": ("str", "ID of the secret that provides the passphrase"),
    "extended_l2": ("bool (on/off)", "Extended L2 tables"),
    "extent_size_hint": ("size", "Extent size hint for the image file, 0 for none"),
    "lazy_refcounts": ("bool (on/off)", "Postpone refcount updates"),
    "nocow": ("bool (on/off)", "Turn off copy-on-write of the file (btrfs)"),
    "preallocation": ("str", "Preallocation mode: off, metadata (not raw), falloc, full"),
    "refcount_bits": ("num", "Width of a reference count entry in bits"),
    "size": ("size", "Virtual disk size"),
}
_RAW = ("extent_size_hint", "nocow", "preallocation", "size")
_SPEC = {"cipher-alg": "cipher", "cipher-mode": "mode", "ivgen-alg": "ivgen", "ivgen-hash-alg": "ivgen_hash", "hash-alg": "hash"}
_MAX_EXTENT = (1 << 32) - 1  # linux/fs.h, fsx_extsize


def read_format(name: str | None) -> str | None:
    """A format that can at least be read."""
    return _one_of(READ_FORMATS, name)


def check_format(name: str | None) -> str | None:
    """A format that can be written."""
    return _one_of(FORMATS, name)


def _one_of(formats: tuple[str, ...], name: str | None) -> str | None:
    if name not in (None, *formats):
        raise UsageError(f"Unknown format type '{name}': expected {', '.join(formats)}")
    return name


# Cache modes by qemu-img's names: whether the page cache is left out. A command flushes at its end whatever the mode is, so
# that "writethrough" is "writeback"; "unsafe" does not.
_CACHE = {"writeback": False, "writethrough": False, "unsafe": False, "none": True, "directsync": True}


def cache_mode(given: args.Given, option: str, usual: str = "writeback") -> str:
    """The cache mode that -t or -T says."""
    mode = given.last(option) or usual
    if mode not in _CACHE:
        raise UsageError(f"-{option} {mode}: expected one of {', '.join(_CACHE)}")
    return mode


def is_direct(mode: str) -> bool:
    """Whether a cache mode leaves the page cache out."""
    return _CACHE[mode]


def apply_cache(image: Any, mode: str) -> None:
    """Let an open image not wait for the disk, if that is its cache mode."""
    image.file.volatile = mode == "unsafe"
    if getattr(image, "external", False):
        image.data_file.volatile = mode == "unsafe"


def listing(fmt: str) -> str:
    """The answer to -o help."""
    lines = [f"Supported {fmt} options:"]
    for name, (kind, text) in _HELP.items():
        if fmt == "qcow2" or name in _RAW:
            lines.append(f"  {f'{name}=<{kind}>':<22} - {text}")
    return "\n".join(lines)


def asks_for_help(pairs: dict[str, str], fmt: str) -> bool:
    """Whether -o help (or ?) was given; then it has been answered."""
    if "help" not in pairs and "?" not in pairs:
        return False
    print(listing(fmt))
    return True


def take_size(pairs: dict[str, str]) -> int | None:
    """The size that -o says, taken out of it."""
    text = pairs.pop("size", None)
    return None if text is None else args.size(text, "image size")


def round_up(size: int) -> int:
    """The size in whole sectors, as qemu-img rounds it."""
    return -(-size // 512) * 512


def creation_options(given: args.Given, fmt: str, pairs: dict[str, str], *, key_file: bool = False, dry: bool = False) -> Options:
    """What -o says of a new image, encryption included.

    `key_file`: --key-file is of the new image. `dry`: nothing is made, so that no passphrase is needed.
    """
    for name in pairs:
        _check_name(fmt, name)
    plain = {n: v for n, v in pairs.items() if not n.startswith("encrypt.")}
    encrypt = {n.removeprefix("encrypt."): v for n, v in pairs.items() if n.startswith("encrypt.")}
    options = _plain_options(plain)
    kind = encrypt.pop("format", None)
    if kind == "aes":
        raise UsageError("encrypt.format=aes: qcow2's old encryption is broken by design and not supported; luks is")
    if kind not in (None, "luks"):
        raise UsageError(f"Invalid value '{kind}' for encrypt.format: expected luks")
    if kind is None:
        if encrypt or (key_file and given.last("key-file")):
            what = f"encrypt.{min(encrypt)}" if encrypt else "--key-file"
            raise UsageError(f"{what} is of encrypted images: -o encrypt.format=luks")
        return options
    from .. import luks

    spec = luks.Spec(**{_SPEC[n]: v for n, v in encrypt.items() if n in _SPEC})
    spec.check()
    ident, time_ms = encrypt.get("key-secret"), encrypt.get("iter-time")
    rounds = args.number(time_ms, "encrypt.iter-time", 1, 1 << 20) if time_ms is not None else None
    if dry:
        return options._replace(luks_spec=spec)
    words = secret(given, ident) if ident is not None else passphrase(given) if key_file else None
    if words is None:
        raise UsageError("encrypt.format=luks needs a passphrase: encrypt.key-secret=ID" + (" or --key-file" if key_file else ""))
    options = options._replace(passphrase=words, luks_spec=spec)
    if rounds is not None:
        options = options._replace(luks_rounds=luks.rounds_for(rounds, spec.hash))
    return options


def _check_name(fmt: str, name: str) -> None:
    if name == "encryption":
        raise UsageError("encryption: qcow2's old AES is broken by design and not supported; encrypt.format=luks is")
    key = {"backing_format": "backing_fmt"}.get(name, name)
    if fmt == "qcow2" and key not in _HELP and key.replace("-", "_") not in _HELP:
        raise UsageError(f"Invalid parameter '{name}': '-o help' lists those of {fmt}")
    if fmt == "raw" and key not in _RAW:
        raise UsageError(f"Format raw does not support parameter '{name}': expected {', '.join(_RAW)}")


def _plain_options(pairs: dict[str, str]) -> Options:
    found: dict[str, Any] = {}
    for name, value in pairs.items():
        key = name.replace("-", "_")
        if key in ("cluster_size", "extent_size_hint"):
            found[key] = args.size(value, name)
        elif key == "refcount_bits":
            found[key] = args.number(value, name, 1, 64)
        elif key in ("extended_l2", "lazy_refcounts", "data_file_raw", "nocow"):
            found[key] = args.boolean(value, name)
        elif key in ("backing_fmt", "backing_format"):
            found["backing_format"] = value
        elif key == "compat":
            if value not in _COMPAT:
                raise UsageError(f"Invalid value '{value}' for compat: expected 0.10 or 1.1")
            found["version"] = _COMPAT[value]
        elif key == "preallocation":
            found[key] = preallocation(value)
        else:
            found[key] = value
    if found.get("extent_size_hint", 0) > _MAX_EXTENT:
        raise UsageError(f"Invalid extent_size_hint '{pairs.get('extent_size_hint')}': expected up to {_MAX_EXTENT}")
    return Options(**found)


def preallocation(mode: str | None) -> str:
    """A mode of preallocation."""
    if mode not in (None, *MODES):
        raise UsageError(f"Invalid preallocation mode '{mode}': expected {', '.join(MODES)}")
    return mode or "off"
