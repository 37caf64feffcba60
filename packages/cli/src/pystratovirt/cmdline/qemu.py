"""What QEMU's command line says in another form: what to write here instead. Read for refusals only.

Not here: forms of QEMU that mean the same in both, such as `server=on,wait=off`.
"""

from __future__ import annotations

from .errors import show

_ABSENT = ("none", "null")


def serial(text: str) -> str:
    """Return what to answer to `-serial TEXT` when it is in a form of QEMU's that has a counterpart; else nothing."""
    if text in _ABSENT:
        return "a machine has no serial port without -serial: leave it out"
    scheme, _, rest = text.partition(":")
    if scheme == "mon" and rest and not rest.startswith("mon:"):
        here = serial(rest) if ":" in rest else f"here it is {rest}"
        return f"nothing else shares a serial port; {here}" if here else ""
    where, _, options = rest.replace(",,", "\0").partition(",")
    where, options = (part.replace("\0", ",,") for part in (where, f",{options}" if options else ""))
    if scheme == "file":
        here = f"file,path={where or 'PATH'}"
    elif scheme == "unix":
        here = f"socket,path={where or 'PATH'}{options}"
    elif scheme == "tcp":
        host, _, port = where.rpartition(":")
        here = f"socket{f',host={host}' if host else ''},port={port or 'PORT'}{options}"
    else:
        return ""
    return f"is QEMU's form; here it is {show(here)}"
