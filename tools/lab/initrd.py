"""Initial RAM file systems: a cpio archive writer, and which kernel modules go in and in which order.

The archive format is "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format.rst). Written here and not by
cpio(1) because device nodes in it then need no privileges, and equal content gives equal bytes.
"""

from __future__ import annotations

import lzma
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from .debian import Kernel, SetupError, tool


class Archive:
    """A newc archive being written. Every time stamp is 0 and every owner root."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen: set[str] = set()

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Add a folder and the folders above it; one that is there already is left alone."""
        name = name.strip("/")
        if not name or name in self._seen:
            return
        self.folder(name.rpartition("/")[0])
        self._add(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file with its folders."""
        self._place(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link with its folders."""
        self._place(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._place(name, stat.S_IFCHR | mode, b"", major, minor)

    def finish(self) -> bytes:
        """The whole archive, ended and padded to 512 bytes."""
        end = _entry("TRAILER!!!", 0, 0, b"", 0, 0)
        body = b"".join([*self._parts, end])
        return body + bytes(-len(body) % 512)

    def _place(self, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        name = name.strip("/")
        self.folder(name.rpartition("/")[0])
        self._add(name, mode, data, major, minor)

    def _add(self, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        if name in self._seen:
            raise ValueError(f"{name}: twice in the archive")
        self._seen.add(name)
        self._parts.append(_entry(name, len(self._seen), mode, data, major, minor))


def _entry(name: str, inode: int, mode: int, data: bytes, major: int, minor: int) -> bytes:
    path = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    head += bytes(-len(head) % 4)
    return head + data + bytes(-len(data) % 4)


def module_files(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """The modules with everything that they depend on, in an order in which they can be loaded one after the other.

    Names are as in /proc/modules, with - and _ alike. One that is built into the kernel is left out; an unknown one is an error.
    """
    builtin = {module_name(line) for line in (kernel.modules / "modules.builtin").read_text().split()}
    where: dict[str, Path] = {}
    needs: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        where[module_name(path)] = kernel.modules / path
        needs[module_name(path)] = [module_name(other) for other in rest.split()]
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in where:
            raise SetupError(f"kernel {kernel.release}: no module {name}")
        for other in needs[name]:
            visit(other)
        order.append(name)

    for name in names:
        visit(module_name(name))
    return [where[name] for name in order]


def module_bytes(path: Path) -> bytes:
    """A module as insmod takes it: unpacked, whatever the distribution packs its modules with."""
    data = path.read_bytes()
    match path.suffix:
        case ".ko":
            return data
        case ".xz":
            return lzma.decompress(data)
        case ".zst":
            return subprocess.run([tool("zstd"), "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
        case other:
            raise SetupError(f"{path}: modules packed as {other} are not supported yet")


def module_name(path: str) -> str:
    """A module's name as in /proc/modules, from the path of its file or another spelling.

    >>> module_name("kernel/arch/x86/kvm/kvm-amd.ko.xz")
    'kvm_amd'
    """
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")
