"""Guest RAM: who may touch it, and how. Every guest address in this project passes through this class.

A guest may hand a device any 64-bit number at any time; an access that is not wholly RAM raises GuestMemoryError and
touches nothing. All typed accesses are little-endian.

Not here: what the RAM is used for, the guest-physical map (`layout`), and device registers (`vmm_core.bus`).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from struct import Struct
from typing import Any, NamedTuple

from vmm_core.errors import GuestMemoryError

PAGE_SIZE = mmap.PAGESIZE

_MADV_REMOVE = 9  # madvise(2); in `mmap` only where the C library names it
_MAP_NORESERVE = 0x4000  # mmap(2); a name in `mmap` only since Python 3.13
_THP_SIZE = 2 << 20  # what one entry of the second page table level maps, on x86_64 and on aarch64 with 4 KiB pages
_MAX_SIZE = 1 << 52  # physical address width of the architectures; keeps every sum below far from ssize_t's end

# Native-order pack functions store and load 2, 4 and 8 aligned bytes with one machine access each, which rings rely on.
_LOAD = {1: Struct("<B").unpack_from, 2: Struct("<H").unpack_from, 4: Struct("<I").unpack_from, 8: Struct("<Q").unpack_from}
_STORE = {1: Struct("<B").pack_into, 2: Struct("<H").pack_into, 4: Struct("<I").pack_into, 8: Struct("<Q").pack_into}


class Region(NamedTuple):
    """A stretch of RAM: guest addresses `base` to `base + size - 1`, found at `offset` in the backing file."""

    base: int
    size: int
    offset: int


class Placement(NamedTuple):
    """Where the next `size` bytes of RAM are to lie: which `nodes` of the host, and how strictly.

    `mode` is `default` (nodes are not looked at), `preferred`, `bind` or `interleave`, as in set_mempolicy(2).
    """

    size: int
    mode: str = "default"
    nodes: tuple[int, ...] = ()


class GuestMemory:
    """The RAM of one machine, mapped into this process.

    Views stay valid as long as somebody holds them, even after close(): the mapping goes when the last one does. Reads
    and writes may come from any thread; close() belongs to the machine.
    """

    def __init__(
        self,
        regions: Sequence[tuple[int, int]],
        *,
        path: str | None = None,
        share: bool = False,
        prealloc: int = 0,
        dump: bool = True,
        placement: Sequence[Placement] = (),
    ) -> None:
        """Map RAM for `regions`, pairs of (base, size in bytes), ascending, disjoint and in whole pages.

        `path` names a file, or a directory for an unlinked temporary file, that holds the RAM (hugetlbfs included).
        `share` makes other processes that map the file see guest memory; without a path it is then a memfd. `prealloc`
        is the number of threads that touch every page now, 0 for none. Without `dump`, RAM is left out of core dumps.
        `placement` says on which nodes of the host RAM lies, one piece after the other; all of it, or nothing.

        Raises GuestMemoryError when a region or piece is malformed, or the system or the file cannot give that much, or there;
        PreallocError when it cannot give that much now.
        """
        self.regions: tuple[Region, ...] = tuple(_checked(regions))
        self.size = sum(region.size for region in self.regions)
        self.shared = share
        self.fd = -1
        self.page_size = PAGE_SIZE  # of what holds the RAM: larger on hugetlbfs
        self._maps: list[memoryview] = []
        self._madvise: Any = None  # the C library's, once discard() was called
        self._first_base, self._first_size, self._first = 0, 0, memoryview(b"")
        self._rest: tuple[tuple[int, int, memoryview], ...] = ()
        in_memory = True  # and not on a disk that it can be written back to
        grown = False
        try:
            if path is not None:
                self.fd, self.page_size, in_memory, grown = _open_backing(path, self.size, self.regions)
            elif share:
                self.fd = _open_memfd(self.size)
            for region in self.regions:
                self._maps.append(_map(region, self.fd, share=share, dump=dump))
            if placement:
                from vmm_core._placement import place

                place(self.regions, self._maps, placement, self.page_size)
            if prealloc > 0:
                from vmm_core._prealloc import expect_blocks, expect_room, populate

                # Huge pages are a pool, which says itself what it has left: at the mapping.
                if self.page_size == PAGE_SIZE:
                    if in_memory or not share:
                        present = os.fstat(self.fd).st_blocks * 512 if self.fd >= 0 and share else 0
                        expect_room(self.size - present)
                    if share and self.fd >= 0:
                        expect_blocks(self.fd, self.size)
                populate(self._maps, self.fd if share else -1, self.size, prealloc)
        except BaseException:
            if grown:
                with suppress(OSError):
                    os.ftruncate(self.fd, 0)  # as it was: what was allocated of it may be all that the disk had
            self.close()
            raise
        self._first_base, self._first_size, _ = self.regions[0]
        self._first = self._maps[0]
        self._rest = tuple((r.base, r.size, view) for r, view in zip(self.regions[1:], self._maps[1:], strict=True))

    def view(self, addr: int, length: int) -> memoryview:
        """Return `length` writable bytes of RAM at `addr`, without a copy.

        Raises GuestMemoryError unless all of them are RAM of one region; an empty view does not exist.
        """
        start = addr - self._first_base
        end = start + length
        if 0 <= start < end <= self._first_size:
            return self._first[start:end]
        for base, size, view in self._rest:
            start = addr - base
            end = start + length
            if 0 <= start < end <= size:
                return view[start:end]
        raise self._refusal(addr, length)

    def read(self, addr: int, length: int) -> bytes:
        """Return a copy of `length` bytes at `addr`. Raises GuestMemoryError like view()."""
        return self.view(addr, length).tobytes()

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` (contiguous bytes, at least one) to `addr`. Raises GuestMemoryError like view()."""
        self.view(addr, len(data))[:] = data

    def load(self, addr: int, size: int) -> int:
        """Return the little-endian number of `size` bytes (1, 2, 4 or 8) at `addr`. Raises GuestMemoryError like view()."""
        start = addr - self._first_base
        if 0 <= start <= self._first_size - size:
            value: int = _LOAD[size](self._first, start)[0]
        else:
            value = _LOAD[size](self.view(addr, size))[0]
        return value

    def store(self, addr: int, size: int, value: int) -> None:
        """Store `value` as a little-endian number of `size` bytes (1, 2, 4 or 8); it must fit. Raises like view()."""
        start = addr - self._first_base
        if 0 <= start <= self._first_size - size:
            _STORE[size](self._first, start, value)
        else:
            _STORE[size](self.view(addr, size), 0, value)

    def expect_writes(self, addr: int, length: int) -> None:
        """Say that all of `length` bytes at `addr` are about to be written, so that huge pages are no waste there.

        Reading a kernel of 14 MB into fresh RAM took 11 to 16 ms here without, 2.7 ms with. A hint: where there are no huge
        pages nothing happens. Raises GuestMemoryError like view().
        """
        from ctypes import addressof, c_char

        view = self.view(addr, length)
        mapping = view.obj
        assert isinstance(mapping, mmap.mmap)
        start = addressof(c_char.from_buffer(view)) - addressof(c_char.from_buffer(mapping))
        skip = start % PAGE_SIZE
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE, start - skip, length + skip)

    def discard(self, view: memoryview) -> int:
        """Give the whole pages within `view` (a view of RAM from here) back to the host; return how many bytes that were.

        The guest finds zeros there, or what a private mapping's file holds, and memory comes back when it writes. Nothing is
        given back of huge pages: the host's pool may have none left then, and a guest's write would be a SIGBUS here.

        Raises OSError when the system refuses (memory that is locked, a file system that cannot).
        """
        if self.page_size != PAGE_SIZE:
            return 0
        import ctypes

        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        end = (start + len(view)) & -PAGE_SIZE
        start = (start + PAGE_SIZE - 1) & -PAGE_SIZE
        if start >= end:
            return 0
        # Of a private mapping only our copy of the page goes; of a shared one the page itself, or every peer would hold it.
        advice = _MADV_REMOVE if self.shared else mmap.MADV_DONTNEED
        if (madvise := self._madvise) is None:  # this one releases the GIL, which mmap.madvise does not
            madvise = self._madvise = ctypes.CDLL(None, use_errno=True).madvise
            madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        while madvise(start, end - start, advice):
            number = ctypes.get_errno()
            if number not in (errno.EINTR, errno.EAGAIN):
                raise OSError(number, os.strerror(number))
        return end - start

    def host_address(self, region: Region) -> int:
        """Return where `region` is mapped in this process. For the memory tables of hypervisor and vhost, and nothing else."""
        from ctypes import addressof, c_char

        return addressof(c_char.from_buffer(self.view(region.base, region.size)))

    def close(self) -> None:
        """Give the RAM back, as soon as no view of it is left; every later access raises GuestMemoryError. Twice is fine."""
        self._first_size, self._rest = 0, ()
        self._first = memoryview(b"")
        # Each view holds its mapping, and the last one to go unmaps it. Closing a mapping under a view cannot be done.
        self._maps.clear()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _refusal(self, addr: int, length: int) -> GuestMemoryError:
        if not self._maps:
            return GuestMemoryError("guest memory is closed")
        if length <= 0:
            return GuestMemoryError(f"an access of {length} bytes at {addr:#x}")
        ram = ", ".join(f"{r.base:#x} to {r.base + r.size - 1:#x}" for r in self.regions)
        return GuestMemoryError(f"{length:#x} bytes at {addr:#x} are not all RAM; RAM is {ram}")


def _checked(regions: Sequence[tuple[int, int]]) -> Iterator[Region]:
    if not regions:
        raise GuestMemoryError("a machine needs at least one region of RAM")
    offset = end = 0
    for base, size in regions:
        if base % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise GuestMemoryError(f"RAM of {size:#x} bytes at {base:#x} is not in whole pages of {PAGE_SIZE:#x} bytes")
        if base < end:
            raise GuestMemoryError(f"RAM at {base:#x} begins before the end of the region below it, {end:#x}")
        end = base + size
        if end > _MAX_SIZE:
            raise GuestMemoryError(f"RAM of {size:#x} bytes at {base:#x} goes beyond the physical address space")
        yield Region(base, size, offset)
        offset += size


def _open_memfd(size: int) -> int:
    import fcntl

    try:
        fd = os.memfd_create("stratovirt_anon_mem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise GuestMemoryError(f"cannot create a memory file for guest RAM: {error.strerror}") from None
    try:
        os.ftruncate(fd, size)
        # A peer that has the descriptor could otherwise cut the file short, and our next access would be a SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise GuestMemoryError(f"cannot get {size:#x} bytes of shared memory for guest RAM: {error.strerror}") from None
    return fd


def _open_backing(path: str, size: int, regions: Sequence[Region]) -> tuple[int, int, bool, bool]:
    """Open or make the file of `-mem-path`, at least `size` bytes long. An existing file is never grown unless empty.

    Return its descriptor, the size of its pages, whether it is nowhere but in memory, and whether it was empty."""
    try:
        fd = _open_temporary(path) if os.path.isdir(path) else os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)  # noqa: PTH112
    except OSError as error:
        raise GuestMemoryError(f"cannot open {path} for guest RAM: {error.strerror}") from None
    try:
        kind = _file_system(fd)
        page = os.fstatvfs(fd).f_bsize if kind == "hugetlbfs" else PAGE_SIZE
        for region in regions:
            if region.size % page:
                # The kernel would round such a mapping up, and then refuse to unmap it.
                raise GuestMemoryError(
                    f"RAM of {region.size:#x} bytes is not in whole huge pages of {path}, {page:#x} bytes each"
                )
        present = os.fstat(fd).st_size
        if present == 0:
            os.ftruncate(fd, size)
        elif present < size:
            raise GuestMemoryError(f"Backing file {path} does not has sufficient resource for allocating RAM (size is {size:#x})")
    except OSError as error:
        os.close(fd)
        raise GuestMemoryError(f"cannot make {path} {size:#x} bytes long for guest RAM: {error.strerror}") from None
    except GuestMemoryError:
        os.close(fd)
        raise
    return fd, page, kind in ("tmpfs", "ramfs", "hugetlbfs"), present == 0


def _open_temporary(folder: str) -> int:
    """Return a file in `folder` that has no name any more."""
    for _ in range(100):
        path = f"{folder}/stratovirt_backmem_{os.urandom(3).hex()}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        os.unlink(path)  # noqa: PTH108
        return fd
    raise FileExistsError(17, "every temporary name tried is taken")


def _file_system(fd: int) -> str:
    """Return the name of the file system that `fd` is on; empty when it is on none that is mounted here."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:  # noqa: PTH123
        for line in mounts:  # proc(5): id parent major:minor root mount-point options [tags] - type source options
            fields, _, kind = line.partition(" - ")
            if fields.split()[2] == number:
                return kind.split()[0]
    return ""


def _map(region: Region, fd: int, *, share: bool, dump: bool) -> memoryview:
    size, skew = region.size, 0
    flags = mmap.MAP_SHARED if share else mmap.MAP_PRIVATE
    if fd < 0:
        # A guest may be given more than the host has free, as long as it does not use it.
        flags |= mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        size += _THP_SIZE
    try:
        mapping = mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=0 if fd < 0 else region.offset)
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise GuestMemoryError(f"cannot map {region.size:#x} bytes of guest RAM at {region.base:#x}: {reason}") from None
    if fd < 0:
        # Huge pages need guest and host addresses that agree in their low 21 bits; older kernels place mappings anywhere.
        from ctypes import addressof, c_char

        skew = (region.base - addressof(c_char.from_buffer(mapping))) % _THP_SIZE
    if not dump:
        mapping.madvise(mmap.MADV_DONTDUMP)
    return memoryview(mapping)[skew : skew + region.size]
