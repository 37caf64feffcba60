"""`-smbios`: what SMBIOS tables say. A microvm has none, so the keys are checked and nothing follows, as on StratoVirt's."""

from __future__ import annotations

from .declare import Parameters, key
from .values import Integer, Kind, Text

_TEXT = Text(1 << 16)
_SPEED = Integer(0, (1 << 64) - 1)


class _Uuid(Kind[str]):
    allowed = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx, hexadecimal"

    def parse(self, text: str) -> str:
        parts = text.split("-")
        digits = "".join(parts)
        if [len(part) for part in parts] != [8, 4, 4, 4, 12] or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
            raise ValueError(f"must be {self.allowed}")
        return text


def _text(doc: str, name: str = "") -> str | None:
    return key(_TEXT, default=None, doc=doc, name=name)


class Smbios(Parameters):
    """A table. `type` says which, and has been looked at before."""

    type: str = key(_TEXT, doc="number of the table")


class Firmware(Smbios):
    """Type 0."""

    vendor: str | None = _text("who made the firmware")
    version: str | None = _text("its version")
    date: str | None = _text("its date")


class System(Smbios):
    """Type 1."""

    manufacturer: str | None = _text("who made the machine")
    product: str | None = _text("what it is called")
    version: str | None = _text("its version")
    serial: str | None = _text("its serial number")
    sku: str | None = _text("its number in a catalogue")
    family: str | None = _text("its family")
    uuid: str | None = key(_Uuid(), default=None, doc="its identity")


class Baseboard(Smbios):
    """Type 2."""

    manufacturer: str | None = _text("who made the board")
    product: str | None = _text("what it is called")
    version: str | None = _text("its version")
    serial: str | None = _text("its serial number")
    asset: str | None = _text("its owner's number")
    location: str | None = _text("where it is in the chassis")


class Chassis(Smbios):
    """Type 3."""

    manufacturer: str | None = _text("who made the chassis")
    version: str | None = _text("its version")
    serial: str | None = _text("its serial number")
    sku: str | None = _text("its number in a catalogue")
    asset: str | None = _text("its owner's number")


class Processor(Smbios):
    """Type 4."""

    sock_pfx: str | None = _text("what sockets' names begin with", "sock_pfx")
    manufacturer: str | None = _text("who made the processor")
    version: str | None = _text("its version")
    serial: str | None = _text("its serial number")
    asset: str | None = _text("its owner's number")
    part: str | None = _text("its number as a part")
    max_speed: int | None = key(_SPEED, default=None, doc="MHz at most")
    current_speed: int | None = key(_SPEED, default=None, doc="MHz at the start")


class MemoryModule(Smbios):
    """Type 17."""

    loc_pfx: str | None = _text("what modules' names begin with", "loc_pfx")
    bank: str | None = _text("the bank it is in")
    manufacturer: str | None = _text("who made it")
    serial: str | None = _text("its serial number")
    asset: str | None = _text("its owner's number")
    part: str | None = _text("its number as a part")
    speed: int | None = key(Integer(0, 0xFFFF, bits=16), default=None, doc="its speed")


TABLES: dict[str, type[Smbios]] = {
    "0": Firmware,
    "1": System,
    "2": Baseboard,
    "3": Chassis,
    "4": Processor,
    "17": MemoryModule,
}
