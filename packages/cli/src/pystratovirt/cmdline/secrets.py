"""Secrets that other options refer to: the passphrases of encrypted images. QEMU's `-object secret`; StratoVirt has none.

Not here: what is done with them (`pystratovirt.drives`).
"""

from __future__ import annotations

from .declare import Parameters, key
from .errors import BadKey
from .values import ID, PATH, Choice, Text


class Secret(Parameters, selector="secret"):
    """A passphrase. Everybody on the host can read command lines: `data` is for tests, `file` for everything else."""

    id: str = key(ID, doc="the name that a drive uses")
    data: str | None = key(Text(4096), default=None, doc="the passphrase itself")
    file: str | None = key(PATH, default=None, doc="a file that holds nothing but the passphrase, read when the drive is opened")
    format: str = key(Choice("raw", "base64"), default="raw", doc="how it is written")

    def check(self) -> None:
        if (self.data is None) == (self.file is None):
            raise BadKey("secret", "needs one of data and file")
