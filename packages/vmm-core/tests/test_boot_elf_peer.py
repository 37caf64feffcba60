"""What is read of ELF files is what pyelftools reads of them (docs/decisions.md says why pyelftools does not do it itself)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_boot_elf import MIB, PT_NOTE, Part, elf, note
from vmm_core.x86_64.elf import parse_elf
from vmm_core.x86_64.image import ImageFile

BASE = 0xFFFF_FFFF_8000_0000
ENTRIES = 6 * MIB  # where every file has a segment, so that any entry point that it names is in one


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return tmp_path / "vmlinux"


def load(place: int, size: int, zeros: int) -> Part:
    """Return a segment of `size` bytes and `zeros` more at so many mebibytes."""
    return Part(b"t" * size, place * MIB, BASE + place * MIB, size + zeros)


LOADS = st.permutations([load(6, 100, 0), *(load(place, 10 * place, place << 16) for place in range(1, 5))])
NOTES = st.lists(
    st.builds(
        note,
        st.sampled_from([b"Xen\0", b"Linux\0", b"X\0"]),
        st.sampled_from([1, 6, 18]),
        st.sampled_from([b"", b"abc", (ENTRIES + 5).to_bytes(4, "little"), (ENTRIES + 6).to_bytes(8, "little")]),
    ),
    max_size=6,
).map(lambda notes: Part(b"".join(notes), kind=PT_NOTE))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(loads=LOADS, notes=st.lists(NOTES, max_size=2), first=st.booleans(), entry=st.integers(ENTRIES, ENTRIES + 99))
def test_segments_entry_points_and_notes_are_read_alike(
    kernel: Path, loads: list[Part], notes: list[Part], first: bool, entry: int
) -> None:
    image = elf(*([*notes, *loads] if first else [*loads, *notes]), entry=entry)
    kernel.write_bytes(image)
    with ImageFile(str(kernel)) as opened:
        ours = parse_elf(opened)
    theirs: Any = ELFFile(io.BytesIO(image))
    fields = ("p_paddr", "p_memsz", "p_offset", "p_filesz", "p_vaddr")
    segments = [tuple(segment[field] for field in fields) for segment in theirs.iter_segments("PT_LOAD")]
    assert [tuple(segment) for segment in ours.segments] == sorted(segments)
    assert ours.entry == theirs["e_entry"]
    pvh = [
        int.from_bytes(found["n_descdata"], "little")
        for segment in theirs.iter_segments("PT_NOTE")
        for found in segment.iter_notes()
        if (found["n_name"], found["n_type"]) == ("Xen", 18) and found["n_descsz"] in (4, 8)
    ]
    assert ours.pvh_entry == (pvh[0] if pvh else None)
