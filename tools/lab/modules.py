"""Kernel modules that the distribution does not build: one driver of the kernel's own source with another option.

Stock Debian kernels have CONFIG_VIRTIO_MMIO without CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, so nothing in them reads the
`virtio_mmio.device=` words by which a microVM without ACPI tells of its devices. The option only concerns that driver: built
with it against the kernel's headers, it fits the stock kernel.

Needs a C compiler, make and xz on this machine; headers and source are only unpacked.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from . import cache, debian
from .debian import Kernel, SetupError, tool
from .progress import Step

_DRIVER = "drivers/virtio/virtio_mmio.c"
_MAKEFILE = "obj-m := virtio_mmio.o\nccflags-y := -DCONFIG_VIRTIO_MMIO_CMDLINE_DEVICES\n"


def virtio_mmio_with_words(kernel: Kernel) -> Path:
    """The kernel's virtio_mmio module with CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, built once.

    Raises SetupError where there is no compiler, or no source of this kernel.
    """

    def build(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="pystratovirt-") as scratch:
            headers = _headers(kernel, Path(scratch))
            module = Path(scratch, "module")
            module.mkdir()
            (module / "Makefile").write_text(_MAKEFILE)
            (module / "virtio_mmio.c").write_bytes(_source(kernel))
            with Step("Building virtio_mmio"):
                # The compiler that made the kernel need not be here: CC= on the command line goes before the headers' own.
                debian.run([tool("make"), "-C", str(headers), f"M={module}", f"CC={tool('gcc')}", "modules"])
            path.write_bytes((module / "virtio_mmio.ko").read_bytes())

    return cache.file(f"modules/{kernel.image.parent.parent.name}-{cache.digest(_MAKEFILE)}/virtio_mmio.ko", build)


def _headers(kernel: Kernel, folder: Path) -> Path:
    """Unpack the kernel's headers with what they need; returns the folder to build against."""
    package = f"linux-headers-{kernel.release}"
    needed = re.findall(r"Depends: (linux-(?:headers|kbuild)-\S+)", debian.depends(package))
    debian.unpack([package, *needed], folder)
    headers = folder / "usr/src" / package
    makefile = headers / "Makefile"  # one line, with the path that the package expects to be installed at
    makefile.write_text(makefile.read_text().replace("/usr/src", str(folder / "usr/src")))
    return headers


def _source(kernel: Kernel) -> bytes:
    """The driver's source, out of the archive in the source package."""
    version = re.match(r"\d+\.\d+", kernel.release)
    if version is None:
        raise SetupError(f"kernel {kernel.release}: no version of a source package")
    name = f"linux-source-{version[0]}"
    with tempfile.TemporaryDirectory(prefix="pystratovirt-") as scratch:
        debian.unpack([name], Path(scratch))
        with Step(f"Looking for {_DRIVER}"):
            command = [tool("tar"), "--extract", "--to-stdout", "--occurrence=1", f"--file={scratch}/usr/src/{name}.tar.xz"]
            done = subprocess.run([*command, f"{name}/{_DRIVER}"], capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise SetupError(f"{name}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
