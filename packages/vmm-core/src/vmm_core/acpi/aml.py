"""AML, the byte code of ACPI definition blocks: one function a construct, each returns its encoding (ACPI 6.5, section 20.2).

Terms are `bytes`, so composing them is composing calls:

    device("PWRB", name("_HID", eisa_id("PNP0C0C")), name("_UID", integer(0)))

Mistakes in what the caller composes are ValueErrors; nothing here sees a guest's data.
Not here: resource descriptors (`resources`), table headers (`tables`), an interpreter or disassembler.
"""

from __future__ import annotations

from typing import Final

_EXT_OP: Final = b"\x5b"

# 20.2.6 objects in a method
LOCAL0: Final = b"\x60"
ARG0: Final = b"\x68"

# 20.2.5.2 operation region address spaces and field flags
SYSTEM_MEMORY: Final = 0
SYSTEM_IO: Final = 1
BYTE_ACCESS: Final = 1
DWORD_ACCESS: Final = 3
WRITE_AS_ZEROS: Final = 2 << 5


def name_string(path: str) -> bytes:
    """Encode a name (20.2.2): segments of up to four characters between dots, after `\\` for the root or `^` for parents."""
    rest = path.lstrip("\\^")
    prefix = path[: len(path) - len(rest)].encode("ascii")
    segments = [segment(part) for part in rest.split(".")] if rest else []
    if len(segments) > 255 or (b"\\" in prefix and prefix != b"\\"):
        raise ValueError(f"not an ACPI name: {path!r}")
    match segments:
        case []:
            return prefix + b"\0"
        case [one]:
            return prefix + one
        case [one, two]:
            return prefix + b"\x2e" + one + two
        case _:
            return prefix + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def segment(text: str) -> bytes:
    """Encode a NameSeg (20.2.2): a letter or underscore, then letters, digits and underscores; padded to four."""
    if not (
        1 <= len(text) <= 4
        and text.isascii()
        and text.replace("_", "A").isalnum()
        and text.upper() == text
        and not text[0].isdigit()
    ):
        raise ValueError(f"not an ACPI name segment: {text!r}")
    return text.ljust(4, "_").encode("ascii")


def package_length(content: int) -> bytes:
    """Encode the PkgLength (20.2.4) in front of `content` bytes; it counts itself too."""
    for size in (1, 2, 3, 4):
        length = content + size
        if length <= (0x3F if size == 1 else (1 << 4 + 8 * (size - 1)) - 1):
            return _package_length(length, size)
    raise ValueError(f"{content} bytes are more than a package length can say")


def _package_length(length: int, size: int) -> bytes:
    if size == 1:
        return bytes([length])
    return bytes([(size - 1) << 6 | length & 0xF]) + (length >> 4).to_bytes(size - 1, "little")


def integer(value: int) -> bytes:
    """Encode an unsigned number of up to 64 bits (20.2.3), as short as it goes."""
    if value in (0, 1):
        return bytes([value])  # ZeroOp, OneOp
    for prefix, size in ((b"\x0a", 1), (b"\x0b", 2), (b"\x0c", 4), (b"\x0e", 8)):
        if 0 < value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"not a 64-bit number: {value}")


def string(text: str) -> bytes:
    """Encode a string (20.2.3): ASCII without NUL."""
    data = text.encode("ascii")
    if 0 in data:
        raise ValueError(f"an ACPI string ends at its first NUL: {text!r}")
    return b"\x0d" + data + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode a compressed EISA id such as PNP0C0C (19.3.4): three letters of five bits, four hexadecimal digits."""
    letters, digits = text[:3], text[3:]
    if not (len(text) == 7 and letters.isascii() and letters.isalpha() and letters.isupper()):
        raise ValueError(f"not an EISA id: {text!r}")
    value = 0
    for letter in letters:
        value = value << 5 | ord(letter) - 0x40
    return b"\x0c" + value.to_bytes(2, "big") + bytes.fromhex(digits)


def buffer(data: bytes) -> bytes:
    """Encode a buffer of bytes (20.2.5.4, DefBuffer)."""
    content = integer(len(data)) + data
    return b"\x11" + package_length(len(content)) + content


def package(*elements: bytes) -> bytes:
    """Encode a package of at most 255 elements (20.2.5.4, DefPackage)."""
    content = bytes([len(elements)]) + b"".join(elements)
    return b"\x12" + package_length(len(content)) + content


def name(path: str, value: bytes) -> bytes:
    """Give an object a name (20.2.5.1, DefName)."""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Put terms into a name space that exists already (20.2.5.1, DefScope)."""
    content = name_string(path) + b"".join(terms)
    return b"\x10" + package_length(len(content)) + content


def device(path: str, *terms: bytes) -> bytes:
    """Declare a device (20.2.5.2, DefDevice)."""
    content = name_string(path) + b"".join(terms)
    return _EXT_OP + b"\x82" + package_length(len(content)) + content


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Declare a method of 0 to 7 arguments (20.2.5.2, DefMethod)."""
    if not 0 <= arguments <= 7:
        raise ValueError(f"a method cannot have {arguments} arguments")
    content = name_string(path) + bytes([arguments | serialized << 3]) + b"".join(terms)
    return b"\x14" + package_length(len(content)) + content


def operation_region(path: str, space: int, address: int, length: int) -> bytes:
    """Declare an operation region (20.2.5.2, DefOpRegion); `space` is SYSTEM_MEMORY or SYSTEM_IO."""
    return _EXT_OP + b"\x80" + name_string(path) + bytes([space]) + integer(address) + integer(length)


def field(region: str, flags: int, *fields: tuple[str, int]) -> bytes:
    """Name the bits of a region, lowest first (20.2.5.2, DefField); `fields` are names and widths in bits."""
    content = name_string(region) + bytes([flags])
    for part, bits in fields:
        content += segment(part) + _field_width(bits)
    return _EXT_OP + b"\x81" + package_length(len(content)) + content


def _field_width(bits: int) -> bytes:
    """Encode a PkgLength that counts bits, and not itself (20.2.5.2, NamedField)."""
    if bits <= 0x3F:
        return _package_length(bits, 1)
    size = next(size for size in (2, 3, 4) if bits < 1 << 4 + 8 * (size - 1))
    return _package_length(bits, size)


def store(value: bytes, target: bytes) -> bytes:
    """Assign (20.2.5.4, DefStore)."""
    return b"\x70" + value + target


def and_(left: bytes, right: bytes) -> bytes:
    """Bitwise and, as a value (20.2.5.4, DefAnd without a target)."""
    return b"\x7b" + left + right + b"\0"


def if_(condition: bytes, *terms: bytes) -> bytes:
    """Run terms when the condition is not zero (20.2.5.3, DefIfElse)."""
    content = condition + b"".join(terms)
    return b"\xa0" + package_length(len(content)) + content


def notify(target: str, value: int) -> bytes:
    """Tell the operating system about a device (20.2.5.3, DefNotify)."""
    return b"\x86" + name_string(target) + integer(value)


def return_(value: bytes) -> bytes:
    """End a method with a value (20.2.5.3, DefReturn)."""
    return b"\xa4" + value
