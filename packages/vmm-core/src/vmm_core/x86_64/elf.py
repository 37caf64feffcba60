"""The part of an ELF file that a loader needs: segments, entry point and the PVH note (System V ABI; Xen, docs/misc/pvh.pandoc).

A parser of our own because this lies on the start path: its import takes 1 ms, that of pyelftools longer than a whole start may
(docs/decisions.md). It reads two tables, checks every number in them, and knows nothing of sections and symbols.
"""

from __future__ import annotations

from itertools import pairwise
from struct import Struct
from typing import Final, NamedTuple

from vmm_core.errors import BootError
from vmm_core.x86_64.image import ImageFile
from vmm_core.x86_64.layout import Microvm, Range

# Elf64_Ehdr behind e_ident: e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum
_EHDR = Struct("<HHIQQQIHHH")
_PHDR = Struct("<IIQQQQQQ")  # Elf64_Phdr: p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
_NHDR = Struct("<III")  # Elf64_Nhdr: n_namesz, n_descsz, n_type

_CLASS_64, _LITTLE_ENDIAN = 2, 1  # e_ident
_ET_EXEC, _ET_DYN = 2, 3
_EM_X86_64 = 62
_MACHINES: Final = {3: "i386", 40: "arm", 183: "aarch64", 243: "riscv", 21: "ppc64", 22: "s390"}
_PT_LOAD, _PT_NOTE = 1, 4
_MAX_SEGMENTS = 64  # kernels have a handful
_MAX_NOTES = 1 << 16  # bytes; kernels have half a kilobyte
_XEN_ELFNOTE_PHYS32_ENTRY = 18


class Segment(NamedTuple):
    """`file_size` bytes at `offset` of the file, followed by zeros up to `size` bytes, belong at guest-physical `address`."""

    address: int
    size: int
    offset: int
    file_size: int
    virtual: int

    @property
    def range(self) -> Range:
        return Range(self.address, self.size)


class Elf(NamedTuple):
    """An executable for x86_64. Entry points are guest-physical."""

    segments: list[Segment]  # ascending and disjoint
    entry: int
    pvh_entry: int | None


def parse_elf(file: ImageFile) -> Elf:
    """Read and check the headers. Raises BootError when the file is truncated, foreign, or contradicts itself."""
    path, head = file.path, file.head(16 + _EHDR.size)
    if len(head) < 16 + _EHDR.size:
        raise BootError(f"{path}: truncated: {file.size} bytes do not hold an ELF header")
    if head[4] != _CLASS_64:
        raise BootError(f"{path}: not a 64-bit ELF file; an x86_64 kernel is needed")
    if head[5] != _LITTLE_ENDIAN:
        raise BootError(f"{path}: a big-endian ELF file; an x86_64 kernel is needed")
    kind, machine, _, entry, phoff, _, _, _, phentsize, phnum = _EHDR.unpack_from(head, 16)
    if machine != _EM_X86_64:
        raise BootError(f"{path}: an ELF file for {_MACHINES.get(machine, f'machine {machine}')}; an x86_64 kernel is needed")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise BootError(f"{path}: not an executable ELF file (type {kind})")
    if phentsize != _PHDR.size or not 0 < phnum <= _MAX_SEGMENTS:
        raise BootError(f"{path}: broken ELF file: {phnum} program headers of {phentsize} bytes")
    _inside(file, phoff, phnum * _PHDR.size, "the program headers")
    segments: list[Segment] = []
    pvh_entry: int | None = None
    for p_type, _, offset, vaddr, paddr, filesz, memsz, align in _PHDR.iter_unpack(file.read(phoff, phnum * _PHDR.size)):
        if p_type == _PT_LOAD and memsz:
            segments.append(_segment(file, Segment(paddr, memsz, offset, filesz, vaddr)))
        elif p_type == _PT_NOTE and pvh_entry is None and filesz <= _MAX_NOTES:
            _inside(file, offset, filesz, "a note segment")
            pvh_entry = _pvh_entry(file.read(offset, filesz), 8 if align == 8 else 4)
    segments.sort()
    for below, above in pairwise(segments):
        if above.address < below.range.end:
            raise BootError(f"{path}: broken ELF file: segments at {below.address:#x} and {above.address:#x} overlap")
    if not segments:
        raise BootError(f"{path}: broken ELF file: nothing to load")
    if pvh_entry is not None and not any(s.address <= pvh_entry < s.range.end for s in segments):
        raise BootError(f"{path}: broken ELF file: the PVH entry point {pvh_entry:#x} is in no segment")
    return Elf(segments, _physical_entry(path, entry, segments) if pvh_entry is None else entry, pvh_entry)


def _inside(file: ImageFile, offset: int, length: int, what: str) -> None:
    if offset + length > file.size:
        raise BootError(f"{file.path}: truncated: {what} would end at byte {offset + length} of {file.size}")


def _segment(file: ImageFile, segment: Segment) -> Segment:
    if segment.file_size > segment.size:
        raise BootError(f"{file.path}: broken ELF file: a segment of {segment.size} bytes has {segment.file_size} in the file")
    _inside(file, segment.offset, segment.file_size, "a segment")
    if segment.address < Microvm.KERNEL_BASE or segment.range.end > Microvm.LOW_RAM_LIMIT:
        raise BootError(
            f"{file.path}: a segment of {segment.size} bytes at {segment.address:#x} "
            f"is not between {Microvm.KERNEL_BASE:#x} and {Microvm.LOW_RAM_LIMIT:#x}"
        )
    return segment


def _physical_entry(path: str, entry: int, segments: list[Segment]) -> int:
    """Return the guest-physical entry point. Linux gives a physical one in e_entry, other kernels a virtual one."""
    for segment in segments:
        if segment.address <= entry < segment.range.end:
            return entry
    for segment in segments:
        if segment.virtual <= entry < segment.virtual + segment.size:
            return segment.address + entry - segment.virtual
    raise BootError(f"{path}: broken ELF file: the entry point {entry:#x} is in no segment")


def _pvh_entry(notes: bytes, align: int) -> int | None:
    """Return the value of the PHYS32_ENTRY note among `notes`. Whatever does not parse ends the search."""
    at = 0
    while at + _NHDR.size <= len(notes):
        namesz, descsz, kind = _NHDR.unpack_from(notes, at)
        name = at + _NHDR.size
        desc = _up(name + namesz, align)
        if kind == _XEN_ELFNOTE_PHYS32_ENTRY and notes[name : name + namesz] == b"Xen\0" and descsz in (4, 8):
            return int.from_bytes(notes[desc : desc + descsz], "little") if desc + descsz <= len(notes) else None
        at = _up(desc + descsz, align)
    return None


def _up(value: int, align: int) -> int:
    return (value + align - 1) & -align
