"""Passphrases on a command line: --key-file FILE, or QEMU's --object secret,id=ID,(data=TEXT|file=FILE)[,format=raw|base64].

Not here: reading and decoding them (`secret`), what a passphrase opens.
"""

from __future__ import annotations

from ..secret import read_secret
from .args import Given, UsageError, option_list

# For the option table of every command that opens guest data.
SECRETS = {"key-file": "value", "key-secret": "value", "object": "value"}


def passphrase(given: Given) -> bytes | None:
    """What opens the encrypted images of a command; None where nothing was given.

    It is the content of --key-file, the secret that --key-secret names, or the only secret there is.
    """
    name = given.last("key-file")
    if name is not None:
        if given.last("key-secret") is not None:
            raise UsageError("--key-file and --key-secret do not go together")
        return read_secret("--key-file", file=name)
    ident = given.last("key-secret")
    if ident is not None:
        return secret(given, ident)
    found = secrets(given)
    if len(found) > 1:
        return None
    return next(iter(found.values()), None)


def secret(given: Given, ident: str) -> bytes:
    """The secret that some --object calls `ident`."""
    found = secrets(given)
    if ident not in found:
        raise UsageError(f"No secret with id '{ident}'" + (f"; there are: {', '.join(found)}" if found else ""))
    return found[ident]


def secrets(given: Given) -> dict[str, bytes]:
    """Every --object of a command line, by id."""
    found: dict[str, bytes] = {}
    for text in given.all("object"):
        kind = text.partition(",")[0].removeprefix("qom-type=")
        if kind != "secret":
            raise UsageError(f"--object {kind}: expected secret")
        pairs = option_list([text.partition(",")[2]]) if "," in text else {}
        ident = pairs.pop("id", "")
        source = [n for n in ("data", "file") if n in pairs]
        if not ident or len(source) != 1 or pairs.get("format", "raw") not in ("raw", "base64"):
            raise UsageError("--object secret needs id=, and data= or file=; format= is raw or base64")
        unknown = set(pairs) - {"data", "file", "format"}
        if unknown:
            raise UsageError(f"Invalid parameter '{min(unknown)}' of a secret")
        if ident in found:
            raise UsageError(f"the secret '{ident}' is given twice")
        found[ident] = read_secret(
            f"secret {ident}", data=pairs.get("data"), file=pairs.get("file"), format=pairs.get("format", "raw")
        )
    return found
