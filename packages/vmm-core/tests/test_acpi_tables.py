"""The microvm's ACPI tables: found as a guest finds them, read by a parser of the test's own, and accepted by Intel's iasl."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from struct import unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.acpi import tables
from vmm_core.errors import BootError
from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.acpi_tables import acpi_tables, write_acpi_tables
from vmm_core.x86_64.layout import Microvm

LEGACY = [Microvm.slot(number) for number in range(Microvm.LEGACY_SLOTS)]
ALL = [Microvm.slot(number) for number in range(Microvm.SLOTS)]


def machine(
    apic_ids: Sequence[int] = (0, 1),
    slots: Sequence[object] = LEGACY,
    *,
    serial: bool = True,
    rtc: bool = True,
    empty: Sequence[int] = (),
) -> GuestMemory:
    memory = GuestMemory(Microvm.ram(2 << 20))
    write_acpi_tables(memory, acpi_tables(apic_ids, slots, serial=serial, rtc=rtc, empty=empty))  # type: ignore[arg-type]
    return memory


def table_at(memory: GuestMemory, address: int) -> bytes:
    table = memory.read(address, memory.load(address + 4, 4))
    assert sum(table) % 256 == 0
    return table


def find(memory: GuestMemory) -> dict[str, bytes]:
    """Return all tables by signature, found from the root pointer that a scan finds (ACPI 6.5, section 5.2.5.1)."""
    root = next(a for a in range(0xE_0000, 0x10_0000, 16) if memory.read(a, 8) == b"RSD PTR ")
    pointer = memory.read(root, 36)
    assert sum(pointer[:20]) % 256 == sum(pointer) % 256 == 0
    assert pointer[15] == 2
    found = {"XSDT": table_at(memory, memory.load(root + 24, 8))}
    for (address,) in [unpack_from("<Q", found["XSDT"], at) for at in range(36, len(found["XSDT"]), 8)]:
        table = table_at(memory, address)
        found[table[:4].decode()] = table
    found["DSDT"] = table_at(memory, unpack_from("<Q", found["FACP"], 140)[0])
    return found


def madt_entries(madt: bytes) -> list[bytes]:
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    return entries


def disassemble(table: bytes, folder: Path) -> str:
    """Return iasl's reading of a table. Fails unless it reads it without complaint and, if AML, compiles it again."""
    name = table[:4].decode().lower()
    (folder / f"{name}.dat").write_bytes(table)
    result = run(["iasl", "-d", f"{name}.dat"], folder)
    assert "Error" not in result
    assert "Warning" not in result
    assert "Invalid" not in result
    text = (folder / f"{name}.dsl").read_text()
    assert "ERROR" not in text
    if name == "dsdt":
        assert "0 Errors, 0 Warnings, 0 Remarks" in run(["iasl", f"{name}.dsl"], folder)
    return text


def run(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def test_the_root_pointer_is_where_scanning_guests_look_and_where_the_loader_is_told() -> None:
    memory = GuestMemory(Microvm.ram(2 << 20))
    assert write_acpi_tables(memory, acpi_tables([0], LEGACY, serial=True)) == 0xE_0000
    assert memory.read(0xE_0000, 8) == b"RSD PTR "


@pytest.mark.parametrize("slots", [[], LEGACY, ALL], ids=["no slots", "StratoVirt's slots", "all slots"])
@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("rtc", [False, True])
def test_iasl_reads_every_table_without_complaint(tmp_path: Path, slots: Sequence[object], serial: bool, rtc: bool) -> None:
    found = find(machine([0, 1, 300], slots, serial=serial, rtc=rtc, empty=(4, 5)))
    assert set(found) == {"XSDT", "FACP", "APIC", "DSDT"}
    for table in found.values():
        disassemble(table, tmp_path)


def test_the_namespace_has_every_slot_with_its_window_and_wire(tmp_path: Path) -> None:
    text = disassemble(find(machine(slots=ALL))["DSDT"], tmp_path)
    blocks = re.findall(r"Device \(VR(..)\)(.*?)\n        }\n", text, re.DOTALL)
    assert [int(number, 16) for number, _ in blocks] == [slot.number for slot in ALL]
    for slot, (_, block) in zip(ALL, blocks, strict=True):
        assert 'Name (_HID, "LNRO0005")' in block
        assert f"0x{slot.base:08X},         // Address Base" in block
        assert "0x00000200,         // Address Length" in block
        assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )" in block
        assert f"0x{slot.gsi:08X},\n" in block
        assert "Name (_CCA, One)" in block


def test_the_generic_event_device_presses_the_power_button(tmp_path: Path) -> None:
    text = disassemble(find(machine())["DSDT"], tmp_path)
    device = text[text.index("Device (GED)") : text.index("Device (PWRB)")]
    assert 'Name (_HID, "ACPI0013" /* Generic Event Device */)' in device
    assert "0x00000010,\n" in device
    assert "OperationRegion (EREG, SystemMemory, 0xF0000000, 0x04)" in device
    assert "Field (EREG, DWordAcc, NoLock, WriteAsZeros)" in device
    assert re.search(
        r"Method \(_EVT, 1, Serialized\).*Local0 = ESEL.*If \(\(Local0 & One\)\)\s*{\s*Notify \(PWRB, 0x80\)", device, re.DOTALL
    )
    assert "PNP0C0C" in text[text.index("Device (PWRB)") :]


def test_only_devices_that_exist_are_described(tmp_path: Path) -> None:
    text = disassemble(find(machine(slots=[], serial=False, rtc=False))["DSDT"], tmp_path)
    assert re.findall(r"Device \((\w+)\)", text) == ["GED", "PWRB"]
    text = disassemble(find(machine(slots=LEGACY[2:3]))["DSDT"], tmp_path)
    assert re.findall(r"Device \((\w+)\)", text) == ["VR02", "COM1", "RTC", "GED", "PWRB"]


def test_an_empty_slot_is_a_container_that_comes_with_its_bit_and_is_looked_into_on_its_event(tmp_path: Path) -> None:
    text = disassemble(find(machine(empty=[4, 5]))["DSDT"], tmp_path)
    assert "OperationRegion (SREG, SystemMemory, 0xF0000020, 0x04)" in text
    assert re.search(r"Field \(SREG, DWordAcc, NoLock, WriteAsZeros\)\s*{\s*SPRE,   32", text)
    for number, bit in ((4, "0x10"), (5, "0x20")):
        container = text[text.index(f"Device (SL0{number})") :].partition("\n        }\n")[0]
        assert '"ACPI0004" /* Module Device */' in container
        status = rf"Method \(_STA.*If \(\(SPRE & {bit}\)\)\s*{{\s*Return \(0x0F\)\s*}}\s*Return \(Zero\)"
        assert re.search(status, container, re.DOTALL)
        assert f"Device (VR0{number})" in container
        assert re.search(rf"If \(\(Local0 & 0x0*{0x100 << number:X}\)\)\s*{{\s*Notify \(SL0{number}, One\)", text)
    assert re.findall(r"\n        Device \(VR(..)\)", text) == [f"{number:02X}" for number in range(11) if number not in (4, 5)]


def test_soft_off_is_sleep_type_five(tmp_path: Path) -> None:
    text = disassemble(find(machine())["DSDT"], tmp_path)
    assert re.search(r"Name \(\\?_S5, Package \(0x04\)  // _S5_: S5 System State\s*{\s*0x05,\s*Zero,\s*Zero,\s*Zero", text)


def test_the_fadt_is_that_of_a_hardware_reduced_machine_with_sleep_and_reset_registers(tmp_path: Path) -> None:
    table = find(machine())["FACP"]
    text = disassemble(table, tmp_path)
    for line in (
        "Hardware Reduced (V5) : 1",
        "Reset Register Supported (V2) : 1",
        "Control Method Power Button (V1) : 1",
        "8042 Present on ports 60/64 (V2) : 0",
    ):
        assert line in text
    assert (table[8], table[131], len(table)) == (6, 5, 276)
    assert table[36:109] == bytes(72) + b"\x32"  # no fixed registers, no SCI; the clock's century
    assert unpack_from("<BBBBQB", table, 116) == (0, 8, 0, 1, 0xF000_0012, 0x42)
    assert unpack_from("<BBBBQ", table, 244) == (0, 8, 0, 1, 0xF000_0010)
    assert unpack_from("<BBBBQ", table, 256) == (0, 8, 0, 1, 0xF000_0011)
    assert table[148:244] == bytes(96)


@pytest.mark.parametrize("rtc", [False, True])
def test_the_fadt_says_whether_there_is_a_clock(rtc: bool) -> None:
    table = find(machine(rtc=rtc))["FACP"]
    assert bool(table[109] & 1 << 5) != rtc
    assert table[108] == (0x32 if rtc else 0)


def test_the_madt_lists_every_cpu_and_the_io_apic() -> None:
    entries = madt_entries(find(machine([0, 1, 4, 5]))["APIC"])
    assert [unpack_from("<BBI", entry, 2) for entry in entries if entry[0] == 0] == [(0, 0, 1), (1, 1, 1), (2, 4, 1), (3, 5, 1)]
    assert [unpack_from("<BxII", entry, 2) for entry in entries if entry[0] == 1] == [(0, 0xFEC0_0000, 0)]
    assert [entry for entry in entries if entry[0] == 4] == [b"\x04\x06\xff\0\0\x01"]
    assert {entry[0] for entry in entries} == {0, 1, 4}


def test_apic_ids_above_254_have_x2apic_entries() -> None:
    entries = madt_entries(find(machine([254, 255, 256]))["APIC"])
    assert [entry[3] for entry in entries if entry[0] == 0] == [254]
    assert [unpack_from("<III", entry, 4) for entry in entries if entry[0] == 9] == [(255, 1, 1), (256, 1, 2)]
    assert [entry for entry in entries if entry[0] == 10] == [b"\x0a\x0c\0\0\xff\xff\xff\xff\x01\0\0\0"]


def test_the_second_io_apic_is_there_when_a_slot_needs_it() -> None:
    def io_apics(count: int) -> list[tuple[int, ...]]:
        entries = madt_entries(find(machine(slots=ALL[:count]))["APIC"])
        return [unpack_from("<BxII", entry, 2) for entry in entries if entry[0] == 1]

    first, second = (0, 0xFEC0_0000, 0), (1, 0xFEC1_0000, 24)
    assert io_apics(17) == [first]
    assert io_apics(18) == [first, second]


@given(
    cpus=st.integers(1, 254),
    slots=st.lists(st.sampled_from(ALL), unique=True),
    serial=st.booleans(),
    rtc=st.booleans(),
    empty=st.lists(st.integers(0, 23)),
)
def test_tables_are_found_whole_for_every_machine(
    cpus: int, slots: list[object], serial: bool, rtc: bool, empty: list[int]
) -> None:
    found = find(machine(range(cpus), slots, serial=serial, rtc=rtc, empty=empty))
    assert set(found) == {"XSDT", "FACP", "APIC", "DSDT"}
    assert found["DSDT"].count(b"LNRO0005") == len(slots)


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BootError, match="do not fit"):
        acpi_tables(range(20_000), [], serial=False)


def test_every_table_begins_as_stratovirts_do() -> None:
    table = tables.table("TEST", 7, b"body")
    assert unpack_from("<4sIB", table) == (b"TEST", 40, 7)
    assert table[10:36] == b"STRATOVIRTTEST" + b"\x01\0\0\0" + bytes(8)
    assert sum(table) % 256 == 0
