"""AML encodings against the grammar of the specification, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.acpi import aml
from vmm_core.acpi.resources import interrupt, io_ports, memory, resource_template


@pytest.mark.parametrize(
    ("path", "encoding"),
    [
        ("_SB", b"_SB_"),
        ("\\_SB", b"\\_SB_"),
        ("\\", b"\\\0"),
        ("^^A", b"^^A___"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)
def test_names(path: str, encoding: bytes) -> None:
    assert aml.name_string(path) == encoding


@pytest.mark.parametrize("path", ["TOOLONG", "1ABC", "ab", "A..B", "A-B", "Ä", "\\^A", "A.", "\\\\A"])
def test_what_is_no_name_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not an ACPI name"):
        aml.name_string(path)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (0, b"\x01"),
        (62, b"\x3f"),
        (63, b"\x41\x04"),
        (4093, b"\x4f\xff"),
        (4094, b"\x81\x00\x01"),
        (0xF_FFFC, b"\x8f\xff\xff"),
        (0xF_FFFD, b"\xc1\x00\x00\x01"),
    ],
)
def test_package_lengths_count_themselves(content: int, encoding: bytes) -> None:
    assert aml.package_length(content) == encoding


def test_an_impossible_package_length_is_refused() -> None:
    with pytest.raises(ValueError, match="more than a package length can say"):
        aml.package_length(1 << 28)


@given(st.integers(0, (1 << 28) - 5))
def test_package_lengths_decode_to_what_they_cover(content: int) -> None:
    encoding = aml.package_length(content)
    extra = encoding[0] >> 6
    value = encoding[0] & (0xF if extra else 0x3F)
    for index in range(extra):
        value |= encoding[1 + index] << 4 + 8 * index
    assert value == content + len(encoding)
    assert len(encoding) == 1 + extra


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        (0, b"\0"),
        (1, b"\x01"),
        (2, b"\x0a\x02"),
        (0xFF, b"\x0a\xff"),
        (0x100, b"\x0b\0\x01"),
        (0x1_0000, b"\x0c\0\0\x01\0"),
        (1 << 32, b"\x0e\0\0\0\0\x01\0\0\0"),
        (2**64 - 1, b"\x0e" + b"\xff" * 8),
    ],
)
def test_integers_are_as_short_as_they_go(value: int, encoding: bytes) -> None:
    assert aml.integer(value) == encoding


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integers_beyond_64_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="not a 64-bit number"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("PNP0A03", b"\x0c\x41\xd0\x0a\x03"), ("PNP0C0C", b"\x0c\x41\xd0\x0c\x0c"), ("ABC1234", b"\x0c\x04\x43\x12\x34")],
)
def test_eisa_ids_are_compressed(text: str, encoding: bytes) -> None:
    assert aml.eisa_id(text) == encoding


@pytest.mark.parametrize("text", ["PNP0A0", "pnp0A03", "PN10A03", "PNP0X03", "ACPI0013"])
def test_what_is_no_eisa_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an EISA id|non-hexadecimal"):
        aml.eisa_id(text)


@pytest.mark.parametrize(
    ("term", "encoding"),
    [
        (aml.string("GED"), b"\x0dGED\0"),
        (aml.buffer(b"ab"), b"\x11\x05\x0a\x02ab"),
        (aml.package(aml.integer(5), aml.integer(0)), b"\x12\x05\x02\x0a\x05\0"),
        (aml.name("A", aml.integer(1)), b"\x08A___\x01"),
        (aml.scope("\\_SB", aml.name("A", aml.integer(0))), b"\x10\x0c\\_SB_\x08A___\0"),
        (aml.device("PWRB"), b"\x5b\x82\x05PWRB"),
        (aml.method("_EVT", 1, serialized=True), b"\x14\x06_EVT\x09"),
        (aml.operation_region("R", aml.SYSTEM_MEMORY, 0xF000_0000, 4), b"\x5b\x80R___\0\x0c\0\0\0\xf0\x0a\x04"),
        (aml.operation_region("R", aml.SYSTEM_IO, 1, 1), b"\x5b\x80R___\x01\x01\x01"),
        (aml.field("R", aml.DWORD_ACCESS | aml.WRITE_AS_ZEROS, ("A", 32)), b"\x5b\x81\x0bR___\x43A___\x20"),
        (aml.field("R", aml.BYTE_ACCESS, ("A", 64)), b"\x5b\x81\x0cR___\x01A___\x40\x04"),
        (aml.store(aml.ARG0, aml.LOCAL0), b"\x70\x68\x60"),
        (aml.and_(aml.LOCAL0, aml.integer(1)), b"\x7b\x60\x01\0"),
        (aml.if_(aml.LOCAL0, aml.notify("PWRB", 0x80)), b"\xa0\x09\x60\x86PWRB\x0a\x80"),
        (io_ports(0x3F8, 8), b"\x47\x01\xf8\x03\xf8\x03\x01\x08"),
        (memory(0xF010_0000, 0x200), b"\x86\x09\0\x01\0\0\x10\xf0\0\x02\0\0"),
        (interrupt(17), b"\x89\x06\0\x03\x01\x11\0\0\0"),
        (resource_template(), b"\x11\x05\x0a\x02\x79\0"),
    ],
)
def test_terms(term: bytes, encoding: bytes) -> None:
    assert term == encoding


def test_strings_that_cannot_be_said_are_refused() -> None:
    with pytest.raises(ValueError, match="ends at its first NUL"):
        aml.string("a\0b")
    with pytest.raises(ValueError, match="ascii"):
        aml.string("ä")


@pytest.mark.parametrize("arguments", [-1, 8])
def test_a_method_has_at_most_seven_arguments(arguments: int) -> None:
    with pytest.raises(ValueError, match="arguments"):
        aml.method("M", arguments)
