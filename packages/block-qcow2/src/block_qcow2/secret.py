"""Passphrases as they are handed over: as text or in a file, as they are or in base64 (QEMU's `-object secret`).

Not here: what a passphrase opens (`luks`).
"""

from __future__ import annotations

from .errors import OpenError

MAX = 64 << 10  # bytes of a file: anything longer was not meant


def read_secret(what: str, *, data: str | None = None, file: str | None = None, format: str = "raw") -> bytes:
    """The bytes that one of `data` and `file` stands for; `format` is "raw" or "base64", whose white space does not count.

    Errors call it `what`. Raises OpenError: the file cannot be read or is too long, it is no base64, or there is nothing.
    """
    if data is not None:
        found = data.encode("utf-8", "surrogateescape")
    else:
        assert file is not None
        try:
            with open(file, "rb") as opened:  # noqa: PTH123 -- pathlib is not imported at a start
                found = opened.read(MAX + 1)
        except OSError as e:
            raise OpenError(f"{what}: {file}: {e.strerror}") from None
        if len(found) > MAX:
            raise OpenError(f"{what}: {file}: expected at most {MAX} bytes")
    if format == "base64":
        import binascii

        try:
            found = binascii.a2b_base64(b"".join(found.split()), strict_mode=True)
        except binascii.Error as e:
            raise OpenError(f"{what}: no base64: {e}") from None
    if not found:
        raise OpenError(f"{what}: is empty, expected a passphrase")
    return found
