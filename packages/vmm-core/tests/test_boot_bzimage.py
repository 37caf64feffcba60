"""bzImages: what a stock kernel looks like loads as the boot protocol says, and anything else is a one-line error."""

from __future__ import annotations

import os
from pathlib import Path
from struct import pack_into

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm_core.errors import BootError
from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.boot import LoadedKernel, load_kernel
from vmm_core.x86_64.image import ImageFile
from vmm_core.x86_64.layout import Microvm

MIB = 1 << 20
SETUP_SECTS = 3
SETUP = (SETUP_SECTS + 1) * 512
KERNEL = bytes(range(256)) * 16  # what must be found at the load address

# Offsets in the setup header (boot.rst) and how wide the field is.
FIELDS = {
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "jump": (0x201, "<B"),
    "version": (0x206, "<H"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "payload_offset": (0x248, "<I"),
    "payload_length": (0x24C, "<I"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}
STOCK = {
    "setup_sects": SETUP_SECTS,
    "syssize": len(KERNEL) // 16,
    "boot_flag": 0xAA55,
    "jump": 0x6A,
    "version": 0x20F,
    "loadflags": 1,
    "code32_start": 0x10_0000,
    "initrd_addr_max": 0x7FFF_FFFF,
    "kernel_alignment": 0x20_0000,
    "relocatable": 1,
    "xloadflags": 0x7F,
    "cmdline_size": 2047,
    "payload_offset": 0x300,
    "payload_length": 0x400,
    "pref_address": 0x100_0000,
    "init_size": 2 * MIB,
}


def bzimage(*, tail: bytes = b"", **fields: int) -> bytes:
    """Return a bzImage with a stock header but for `fields`."""
    image = bytearray(SETUP) + KERNEL + tail
    image[0x202:0x206] = b"HdrS"
    for name, value in {**STOCK, **fields}.items():
        offset, form = FIELDS[name]
        pack_into(form, image, offset, value)
    return bytes(image)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return tmp_path / "vmlinuz"


def ram(size: int = 32 * MIB) -> GuestMemory:
    return GuestMemory(Microvm.ram(size))


def boot(kernel: Path, image: bytes, memory: GuestMemory | None = None, **arguments: object) -> LoadedKernel:
    kernel.write_bytes(image)
    return load_kernel(memory or ram(), str(kernel), **arguments)  # type: ignore[arg-type]


def refusal(kernel: Path, image: bytes, memory: GuestMemory | None = None) -> str:
    with pytest.raises(BootError) as caught:
        boot(kernel, image, memory)
    message = str(caught.value)
    assert message.startswith(str(kernel))
    assert "\n" not in message
    return message.removeprefix(f"{kernel}: ")


def boot_or_refuse(kernel: Path, image: bytes) -> LoadedKernel | None:
    """Return what was loaded, or None for a BootError of one line. Anything else fails the test."""
    try:
        return boot(kernel, image)
    except BootError as error:
        if "\n" in str(error):
            raise
        return None


def test_a_stock_kernel_starts_at_its_64_bit_entry_where_it_prefers_to_be(kernel: Path) -> None:
    memory = ram()
    loaded = boot(kernel, bzimage(), memory)
    assert loaded.protocol == "bzImage"
    assert loaded.vcpu_boot.registers["rip"] == 0x100_0200
    assert memory.read(0x100_0000, len(KERNEL)) == KERNEL
    assert loaded.kernel == (0x100_0000, 2 * MIB)


def test_a_signature_behind_the_kernel_is_not_loaded(kernel: Path) -> None:
    memory = ram()
    boot(kernel, bzimage(tail=b"\xff" * 64), memory)
    assert memory.read(0x100_0000 + len(KERNEL), 64) == bytes(64)


def test_setup_sects_of_zero_means_four(kernel: Path) -> None:
    image = bytearray(bzimage(setup_sects=0))
    image[SETUP:SETUP] = bytes(512)
    memory = ram()
    boot(kernel, bytes(image), memory)
    assert memory.read(0x100_0000, len(KERNEL)) == KERNEL


def test_a_kernel_that_cannot_be_relocated_is_loaded_where_it_says(kernel: Path) -> None:
    memory = ram()
    loaded = boot(kernel, bzimage(relocatable=0), memory)
    assert loaded.vcpu_boot.registers["rip"] == 0x10_0200
    assert memory.read(0x10_0000, len(KERNEL)) == KERNEL
    assert loaded.kernel == (0x10_0000, 17 * MIB)  # up to where it moves itself and unpacks


def test_a_relocatable_kernel_is_aligned_as_it_asks(kernel: Path) -> None:
    loaded = boot(kernel, bzimage(pref_address=0x100_0001, kernel_alignment=0x40_0000))
    assert loaded.vcpu_boot.registers["rip"] == 0x140_0200


@pytest.mark.parametrize("missing", range(16))
def test_the_last_paragraph_need_not_be_padded(kernel: Path, missing: int) -> None:
    memory = ram()
    boot(kernel, bzimage()[: SETUP + len(KERNEL) - missing], memory)
    assert memory.read(0x100_0000, len(KERNEL) - missing) == KERNEL[: len(KERNEL) - missing]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boot_flag": 0}, "broken bzImage: boot_flag is 0x0000 and not 0xaa55"),
        ({"version": 0x20B}, "kernel too old: boot protocol 2.11 has no 64-bit entry point, 2.12 is needed"),
        ({"xloadflags": 0x7E}, "a 32-bit kernel: no 64-bit entry point (xloadflags 0x7e)"),
        ({"loadflags": 0}, "a zImage, which loads below 1 MiB; a bzImage is needed"),
        ({"jump": 0x61}, "broken bzImage: the setup header ends at 0x263"),
        ({"jump": 0x8F}, "broken bzImage: the setup header ends at 0x291"),
        ({"syssize": len(KERNEL) // 16 + 1}, f"truncated: {SETUP + len(KERNEL)} bytes of {SETUP + len(KERNEL) + 16}"),
        ({"syssize": 0xFFFF_FFFF}, f"truncated: {SETUP + len(KERNEL)} bytes of {SETUP + 0xFFFF_FFFF * 16}"),
        ({"syssize": 0x20}, "broken bzImage: a kernel of 512 bytes"),
        ({"kernel_alignment": 0}, "broken bzImage: kernel_alignment 0x0 is not a power of two"),
        ({"kernel_alignment": 0x30_0000}, "broken bzImage: kernel_alignment 0x300000 is not a power of two"),
        ({"pref_address": 0xF_F000, "kernel_alignment": 1}, "broken bzImage: a load address of 0xff000, which is never free RAM"),
        ({"pref_address": 2**64 - 1}, "broken bzImage: a load address of 0x10000000000000000, which is never free RAM"),
        ({"code32_start": 0x1000, "relocatable": 0}, "broken bzImage: a load address of 0x1000, which is never free RAM"),
        ({"payload_length": len(KERNEL)}, "broken bzImage: the payload ends 768 bytes behind the kernel"),
        ({"init_size": 16 * MIB + 1}, "does not fit: needs 16777217 bytes of RAM at 0x1000000, where the machine has 16777216"),
        ({"pref_address": 0x4000_0000}, "does not fit: needs 2097152 bytes of RAM at 0x40000000, where the machine has 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_kernel_that_cannot_start_is_refused_with_the_reason(kernel: Path, fields: dict[str, int], message: str) -> None:
    assert refusal(kernel, bzimage(**fields)) == message


def test_a_kernel_cut_off_in_its_header_is_refused(kernel: Path) -> None:
    assert refusal(kernel, bzimage()[:0x264]) == "truncated: 612 bytes do not hold the setup header of a bzImage"


def test_the_command_line_may_be_as_long_as_the_kernel_says(kernel: Path) -> None:
    memory = ram()
    boot(kernel, bzimage(cmdline_size=10), memory, command_line="0123456789")
    assert memory.read(Microvm.COMMAND_LINE.base, 11) == b"0123456789\0"
    with pytest.raises(BootError, match="kernel command line: 11 bytes; this kernel takes at most 10"):
        boot(kernel, bzimage(cmdline_size=10), memory, command_line="0123456789a")


def test_a_kernel_that_takes_any_command_line_gets_no_more_than_there_is_room_for(kernel: Path) -> None:
    room = Microvm.COMMAND_LINE.size - 1
    boot(kernel, bzimage(cmdline_size=0xFFFF_FFFF), command_line="x" * room)
    with pytest.raises(BootError, match=f"at most {room}"):
        boot(kernel, bzimage(cmdline_size=0xFFFF_FFFF), command_line="x" * (room + 1))


def test_the_zero_page_has_the_kernels_own_header_and_what_the_loader_adds(kernel: Path, tmp_path: Path) -> None:
    memory = ram()
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"cpio" * 100)
    loaded = boot(kernel, bzimage(), memory, initrd_path=str(initrd), command_line="quiet", rsdp=0xE_0000)
    page = memory.read(Microvm.ZERO_PAGE.base, 4096)

    def field(offset: int, size: int) -> int:
        return int.from_bytes(page[offset : offset + size], "little")

    assert loaded.vcpu_boot.registers["rsi"] == 0x7000
    assert page[0x202:0x206] == b"HdrS"
    assert field(0x258, 8) == 0x100_0000  # pref_address, out of the image
    assert field(0x1EF, 1) == 0  # sentinel: a loader that clears it has cleared the page
    assert field(0x210, 1) == 0xFF
    assert field(0x228, 4) == 0x2_0000
    assert field(0xC8, 4) == 0
    assert loaded.initrd == (field(0x218, 4), 400)
    assert field(0x21C, 4) == 400
    assert field(0xC0, 8) == 0
    assert field(0x70, 8) == 0xE_0000
    assert field(0x238, 4) == 2047
    assert field(0x1E8, 1) == len(loaded.memory_map)
    table = [
        (field(0x2D0 + 20 * i, 8), field(0x2D8 + 20 * i, 8), field(0x2E0 + 20 * i, 4)) for i in range(len(loaded.memory_map))
    ]
    assert table == loaded.memory_map


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mebibytes=st.integers(19, 4096),
    size=st.integers(1, 4096 * MIB),
    initrd_addr_max=st.sampled_from([0x37FF_FFFF, 0x7FFF_FFFF, 0xFFFF_FFFF]),
)
def test_a_ram_disk_lies_in_ram_between_the_kernel_and_its_limit_or_is_refused(
    kernel: Path, tmp_path: Path, mebibytes: int, size: int, initrd_addr_max: int
) -> None:
    memory = PlacesOnly(Microvm.ram(mebibytes * MIB))
    initrd = tmp_path / "initrd"
    initrd.touch()
    os.truncate(initrd, size)
    kernel.write_bytes(bzimage(initrd_addr_max=initrd_addr_max))
    room = min(mebibytes * MIB, Microvm.LOW_RAM_LIMIT, initrd_addr_max + 1) - 18 * MIB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "load", PlacesOnly.load)
        refusal = ""
        try:
            loaded = load_kernel(memory, str(kernel), str(initrd))
        except BootError as error:
            refusal = str(error)
    if refusal:
        assert "initrd: does not fit" in refusal
        assert size > room - 4096
        return
    assert loaded.initrd is not None
    assert loaded.initrd.size == size
    assert loaded.initrd.base >= loaded.kernel.end
    assert loaded.initrd.base % 4096 == 0
    assert loaded.initrd.end <= room + 18 * MIB
    assert memory.view(*loaded.initrd)


class PlacesOnly(GuestMemory):
    """Guest memory that files are not really read into, so that a RAM disk may have any size."""

    @staticmethod
    def load(file: ImageFile, memory: GuestMemory, address: int, offset: int, length: int) -> None:
        memory.view(address, length)


def test_a_kernel_says_how_high_its_ram_disk_may_lie(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(5000))
    loaded = boot(kernel, bzimage(initrd_addr_max=0x17F_FFFF), initrd_path=str(initrd))
    assert loaded.initrd == (0x17F_E000, 5000)


def test_a_ram_disk_that_would_meet_the_kernel_goes_as_high_as_ram_allows(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"cpio")
    loaded = boot(kernel, bzimage(pref_address=0x37E0_0000), ram(1024 * MIB), initrd_path=str(initrd))
    assert loaded.initrd == (0x3FFF_F000, 4)


def test_a_ram_disk_never_lies_over_the_kernel(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.touch()
    os.truncate(initrd, 14 * MIB)
    loaded = boot(kernel, bzimage(), initrd_path=str(initrd))
    assert loaded.initrd == (18 * MIB, 14 * MIB)
    os.truncate(initrd, 14 * MIB + 1)
    with pytest.raises(BootError, match=r"initrd: does not fit: 14680065 bytes, and 14680064 of RAM are left"):
        boot(kernel, bzimage(), initrd_path=str(initrd))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            name: st.integers(0, 256 ** {"B": 1, "H": 2, "I": 4, "Q": 8}[form[1]] - 1) for name, (_, form) in FIELDS.items()
        },
    )
)
def test_any_header_is_loaded_into_ram_or_refused(kernel: Path, fields: dict[str, int]) -> None:
    loaded = boot_or_refuse(kernel, bzimage(**fields))
    if loaded is not None:
        assert loaded.kernel.base >= MIB
        assert loaded.kernel.end <= 32 * MIB
        assert loaded.kernel.base <= loaded.vcpu_boot.registers["rip"] < loaded.kernel.end


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 0x290), junk=st.binary(min_size=1, max_size=64), length=st.integers(0, SETUP + len(KERNEL)))
def test_any_damage_is_loaded_or_refused(kernel: Path, start: int, junk: bytes, length: int) -> None:
    image = bytearray(bzimage())
    image[start : start + len(junk)] = junk
    boot_or_refuse(kernel, bytes(image[:length]))
