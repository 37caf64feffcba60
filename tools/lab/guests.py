"""What guests boot from: the distribution's stock kernels, an initrd with their modules, and an ext4 root image.

Everything is built without privileges, named by its content in the cache, and byte for byte the same each time. Images
in the cache are never written to: a guest gets a copy (copy_image).
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cache, debian
from .debian import Kernel, SetupError, tool
from .initrd import Archive, module_bytes, module_files, module_name

__all__ = ["MODULES", "Kernel", "busybox", "copy_image", "initrd", "kernel", "programs", "rootfs", "unpacked"]

# What a guest of either machine may need to reach its root, and the power button. Built-in ones are left out by themselves.
MODULES = (
    "virtio_mmio", "virtio_pci", "virtio_blk", "ext4", "crc32c_generic", "virtio_console", "virtio_rng", "button", "evdev",
)  # fmt: skip
# In the initrd's root folders of the image.
_FOLDERS = ("bin", "sbin", "dev", "proc", "sys", "tmp", "run", "root", "mnt", "etc", "var")
_UUID = "5ca1ab1e-0000-4000-8000-000000000001"  # a fixed one: equal content gives an equal image
_HERE = Path(__file__).parent / "guest"

kernel = debian.kernel
busybox = debian.busybox


def unpacked(kernel: Kernel) -> Path:
    """The ELF file inside of a bzImage that is compressed with LZ4 (Linux boot protocol: payload_offset, payload_length)."""

    def build(path: Path) -> None:
        image = kernel.image.read_bytes()
        setup = (image[0x1F1] or 4) + 1
        offset, length = struct.unpack_from("<II", image, 0x248)
        payload = image[setup * 512 + offset :][: length - 4]  # the size of what is inside is behind the frame
        data = subprocess.run([tool("lz4"), "-dc"], input=payload, capture_output=True, check=False).stdout
        if not data.startswith(b"\x7fELF"):
            raise SetupError(f"{kernel.image}: holds no ELF file compressed with LZ4")
        path.write_bytes(data)

    return cache.file(f"guests/vmlinux-{cache.digest(str(kernel.image), Path(__file__))}", build)


def initrd(
    kernel: Kernel,
    modules: Sequence[str] = MODULES,
    script: str | None = None,
    files: Mapping[str, bytes] | None = None,
    built: Mapping[str, Path] | None = None,
) -> Path:
    """An initrd with busybox and these modules (and what they depend on) for this kernel.

    It mounts root= and goes on there; with a `script` (text for busybox sh) it runs that instead, as PID 1. `files`
    are added: path in the archive to content, executable. `built`: modules to take instead of the kernel's own, by name.
    """
    instead = built or {}
    init, shell = (_HERE / "init").read_bytes(), busybox()
    extra = {**(files or {}), **({"script": script.encode()} if script is not None else {})}
    contents = [part for name, data in sorted(extra.items()) for part in (name, data)]

    def build(path: Path) -> None:
        archive = Archive()
        for folder in ("proc", "sys", "dev", "root", "mnt", "tmp"):
            archive.folder(folder)
        archive.device("dev/console", 5, 1)
        archive.file("bin/busybox", shell.read_bytes(), 0o755)
        for applet in _applets(shell):
            if applet != "busybox":
                archive.link(f"bin/{applet}", "busybox")
        archive.file("init", init, 0o755)
        for path_there, data in extra.items():
            archive.file(path_there, data, 0o755)
        for number, module in enumerate(module_files(kernel, modules)):
            name = module_name(module.name)
            archive.file(f"modules/{number:02}-{name}.ko", module_bytes(instead.get(name, module)))
        path.write_bytes(archive.finish())

    key = cache.digest(
        init, str(shell), str(kernel.image), " ".join(modules), *contents, *map(str, instead.values()), Path(__file__),
        _HERE.parent / "initrd.py",
    )  # fmt: skip
    return cache.file(f"guests/initrd-{key}", build)


def rootfs(size: int = 256, script: str | None = None, files: Mapping[str, bytes] | None = None) -> Path:
    """A root image: ext4, `size` MiB (a sparse file), with busybox and a root login shell on the console.

    `script` (text for sh) runs once at the end of the guest's start-up, before the shell. `files` are added: path to
    content, executable. `poweroff` and `reboot` take the ACPI or reset path of the machine, as on any Linux.
    """
    shell = busybox()
    extra = {**(files or {}), **({"test": script.encode()} if script is not None else {})}
    contents = [part for name, data in sorted(extra.items()) for part in (name, data)]
    base = [part for path in sorted(_HERE.rglob("*")) if path.is_file() for part in (str(path.relative_to(_HERE)), path)]

    def build(path: Path) -> None:
        tree = path.with_name("tree")
        for folder in _FOLDERS:
            (tree / folder).mkdir(parents=True)
        shutil.copyfile(shell, tree / "bin/busybox")
        (tree / "bin/busybox").chmod(0o755)
        for applet in _applets(shell):
            if applet != "busybox":
                (tree / "bin" / applet).symlink_to("busybox")
        for name in ("init", "poweroff", "reboot", "halt", "getty"):
            (tree / "sbin" / name).symlink_to("../bin/busybox")
        shutil.copytree(_HERE / "etc", tree / "etc", dirs_exist_ok=True)
        for name, data in extra.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(data)
        for entry in sorted(tree.rglob("*")):
            if not entry.is_symlink():
                entry.chmod(0o755)
            os.utime(entry, (0, 0), follow_symlinks=False)
        _make_ext4(path, tree, size)
        shutil.rmtree(tree)

    key = cache.digest(str(size), str(shell), *base, *contents, Path(__file__))
    return cache.file(f"guests/rootfs-{key}.ext4", build)


def programs(*names: str) -> dict[str, bytes]:
    """These programs of this machine with the shared libraries that they need, for `files` of a root image or initrd.

    Raises SetupError when one is not installed.
    """
    found: dict[str, bytes] = {}
    for name in names:
        program = Path(tool(name)).resolve()
        found[f"usr/bin/{name}"] = program.read_bytes()
        # Lines are "name => path (address)", or "path (address)" for the loader; the kernel's own library has no path.
        listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
        for line in listing.splitlines():
            path = next((word for word in line.split() if word.startswith("/")), None)
            if path is not None:
                found[path.lstrip("/")] = Path(path).read_bytes()
    return found


def copy_image(image: Path, target: Path) -> Path:
    """Copy an image for one guest to write to; holes stay holes, and file systems that can share the blocks do."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", "--", str(image), str(target)], check=True)
    return target


def _applets(busybox: Path) -> list[str]:
    return sorted(subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split())


def _make_ext4(image: Path, tree: Path, size: int) -> None:
    environment = {**os.environ, "E2FSPROGS_FAKE_TIME": "1", "SOURCE_DATE_EPOCH": "1"}  # the old name and the new one
    done = subprocess.run(
        [
            tool("mke2fs"), "-q", "-F", "-t", "ext4", "-d", str(tree), "-L", "guest-root", "-U", _UUID, "-m", "0",
            "-i", "32768", "-J", "size=4",  # small tables: a copy is made for every test
            "-E", f"root_owner=0:0,hash_seed={_UUID},lazy_itable_init=0,lazy_journal_init=0", str(image), f"{size}M",
        ],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SetupError(f"mke2fs: {done.stderr.strip()}")
    if os.geteuid() != 0:
        # The copied files belong to whoever runs this; in the guest they are root's.
        names = ["/" + str(entry.relative_to(tree)) for entry in sorted(tree.rglob("*"))]
        commands = "".join(f'sif "{name}" {field} 0\n' for name in names for field in ("uid", "gid"))
        done = subprocess.run(
            [tool("debugfs"), "-w", "-f", "-", str(image)],
            input=commands,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            raise SetupError(f"debugfs: {done.stderr.strip()}")
