"""What the lab takes from the distribution: packages that are installed (QEMU) and packages that are only unpacked.

Everything comes through apt, which verifies it against the distribution's signed indexes. Kernels and busybox are
downloaded and unpacked into the cache and never installed, so that they cannot disturb the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import cache
from .process import give_up
from .progress import Step, say

VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")  # Debian 13 and later; Debian 12 (part of QEMU)
_APT = ("apt-get", "-q", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=300")
_NEEDED = {"qemu-system-x86_64": "qemu-system-x86", "depmod": "kmod", "mke2fs": "e2fsprogs", "dpkg": "dpkg"}
# What tests compare with and talk to.
_PEERS = {
    "qemu-img": "qemu-utils",
    "nbdinfo": "libnbd-bin",
    "iasl": "acpica-tools",
    "socat": "socat",
    "ncat": "ncat",
    "lz4": "lz4",
    "fio": "fio",
    "iperf3": "iperf3",
    "passt": "passt",
    "zsh": "zsh",
    "fish": "fish",
}
# What only long tests need, and is large.
_LARGE_PEERS = {
    "dpdk-testpmd": "dpdk-dev librte-meta-net librte-meta-mempool",
    "gcc": "gcc libc6-dev libelf1",  # of what comes with kernel headers
    "make": "make",
    "xz": "xz-utils",
}
# The flavour's meta package, whose dependency names the current kernel package. Cloud: the lab host and the usual guest.
_FLAVOURS = {
    "debian": {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"},
    "ubuntu": {"cloud": "linux-image-virtual", "generic": "linux-image-generic"},
}


class SetupError(Exception):
    """Something that the lab needs is missing and could not be had. The text says what and what to do."""


class Kernel(NamedTuple):
    """An unpacked distribution kernel."""

    release: str  # what `uname -r` says in it
    image: Path  # the bzImage
    modules: Path  # the folder lib/modules/<release>, with modules.dep


def tool(name: str) -> str:
    """The path of a program; the system folders are searched too, which a user's PATH often lacks."""
    path = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        # Each is installed by whoever has to have it first.
        way = "tools/test soak" if name in _LARGE_PEERS else "tools/test" if name in _PEERS else "tools/lab/lab setup"
        raise SetupError(f"{name}: not installed (package {(_NEEDED | _PEERS | _LARGE_PEERS).get(name, name)}); run '{way}'")
    return path


def virtiofsd() -> str:
    """The path of the daemon that shares this machine's files."""
    for path in VIRTIOFSD:
        if os.access(path, os.X_OK):
            return path
    raise SetupError("virtiofsd: not installed (package qemu-system-common or virtiofsd); run 'tools/lab/lab setup'")


def missing(peers: bool = False, large: bool = False) -> list[str]:
    """Names of the system packages that the lab needs and that are not installed, sorted; with those of the tests' `peers`.

    `large`: with those of the long tests too.
    """
    names = set()
    for program, package in (_NEEDED | (_PEERS if peers else {}) | (_LARGE_PEERS if large else {})).items():
        try:
            tool(program)
        except SetupError:
            names.update(package.split())
    if not any(os.access(path, os.X_OK) for path in VIRTIOFSD) and _candidate("virtiofsd"):
        names.add("virtiofsd")
    return sorted(names)


def install(packages: Sequence[str]) -> None:
    """Install system packages through apt, as root. Says what it installs. Nothing is upgraded or removed."""
    if not packages:
        return
    command = [*_APT, "--yes", "--no-install-recommends", "--no-remove", "install", *packages]
    if os.geteuid() != 0:
        sudo = shutil.which("sudo")
        if sudo is None:
            raise SetupError(
                f"root is needed to install {' '.join(packages)}: run as root 'apt-get install {' '.join(packages)}'"
            )
        command = [sudo, *command]
    say(f"Installing system packages: {' '.join(packages)}")
    try:
        _install(command)
    except SetupError:
        update()  # a fresh container has no indexes, and old ones name versions that the archive no longer has
        _install(command)


def _install(command: Sequence[str]) -> None:
    with Step("Installing") as step:
        follow([*command, "-o", "Dpkg::Use-Pty=0"], step, {**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def update() -> None:
    """Fetch the package indexes. Needs root, or sudo."""
    sudo = [] if os.geteuid() == 0 else [shutil.which("sudo") or "sudo"]
    with Step("Fetching the package indexes") as step:
        follow([*sudo, *_APT, "update"], step)


def kernel(flavour: str = "cloud") -> Kernel:
    """The distribution's stock kernel of a flavour ("cloud" or "generic"), downloaded once.

    The kernel found first stays in use until refresh(): a run never changes kernels by itself, and needs no network.
    """
    note = cache.root() / "kernels" / f"{flavour}.json"
    if note.is_file():
        found = cache.root() / "kernels" / json.loads(note.read_text())["folder"]
        if found.is_dir():
            return _kernel_in(found)
    return refresh(flavour)


def refresh(flavour: str) -> Kernel:
    """Look which kernel of the flavour is current, and download it if it is not in the cache."""
    meta = _FLAVOURS.get(_distribution(), _FLAVOURS["debian"]).get(flavour)
    if meta is None:
        raise SetupError(f"kernel flavour {flavour}: there are: cloud, generic")
    image = _kernel_package(meta)
    packages = [image]
    if image.startswith("linux-image-") and _distribution() == "ubuntu":
        packages.append(image.replace("linux-image-", "linux-modules-", 1))  # Ubuntu ships the modules apart

    def fill(scratch: Path) -> None:
        unpack(packages, scratch)
        if not (scratch / "lib").exists() and (scratch / "usr/lib").is_dir():
            (scratch / "lib").symlink_to("usr/lib")
        release = _kernel_release(scratch)
        run([tool("depmod"), "-b", str(scratch), release])

    folder = cache.folder(f"kernels/{image}_{_candidate(image)}".replace(":", "-"), fill)
    note = cache.root() / "kernels" / f"{flavour}.json"
    scratch = note.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({"folder": folder.name}))
    scratch.rename(note)
    return _kernel_in(folder)


def busybox() -> Path:
    """A static busybox, unpacked from the distribution's package and not installed."""
    found = next(iter(sorted((cache.root() / "busybox").glob("*/bin/busybox"))), None)
    if found is not None:
        return found

    def fill(scratch: Path) -> None:
        unpack(["busybox-static"], scratch)
        if not (scratch / "bin").exists():
            (scratch / "bin").symlink_to("usr/bin")

    return cache.folder(f"busybox/{_candidate('busybox-static')}".replace(":", "-"), fill) / "bin/busybox"


def _kernel_in(folder: Path) -> Kernel:
    release = _kernel_release(folder)
    return Kernel(release, folder / "boot" / f"vmlinuz-{release}", folder / "lib/modules" / release)


def _kernel_release(folder: Path) -> str:
    images = sorted((folder / "boot").glob("vmlinuz-*"))
    if not images:
        raise SetupError(f"{folder}: no boot/vmlinuz-* in the kernel package")
    return images[0].name.removeprefix("vmlinuz-")


def _kernel_package(meta: str) -> str:
    """The package that a meta package stands for: linux-image-cloud-amd64 gives linux-image-6.1.0-56-cloud-amd64."""
    for attempt in range(2):
        lines = _output(["apt-cache", "depends", meta], check=False).splitlines()
        for line in lines:
            name = line.strip().removeprefix("Depends: ")
            if name.startswith("linux-image-") and name != meta:
                return name
        if attempt == 0:
            update()  # a fresh container has no indexes
    raise SetupError(f"{meta}: apt knows no such kernel package")


def _candidate(package: str) -> str:
    """The version that apt would install, or an empty string."""
    for line in _output(["apt-cache", "policy", package], check=False).splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "Candidate" and value != "(none)":
            return value
    return ""


def depends(package: str) -> str:
    """What the package depends on, in apt's words."""
    return _output(["apt-cache", "--important", "depends", package])


def unpack(packages: Iterable[str], target: Path) -> None:
    """Download packages, verified by apt, and unpack them into a folder."""
    for package in packages:
        with tempfile.TemporaryDirectory(prefix="pystratovirt-") as scratch:
            _download(package, Path(scratch))
            (archive,) = Path(scratch).glob("*.deb")
            with Step(f"Unpacking {package}"):
                run([tool("dpkg"), "-x", str(archive), str(target)])


def _download(package: str, folder: Path) -> None:
    # Root without the download sandbox: its user could not write into a private folder, and apt would warn about it.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    for attempt in range(2):
        read, write = os.pipe()
        with Step(f"Downloading {package}") as step:
            command = [*_APT, *sandbox, "-o", f"APT::Status-Fd={write}", "download", package]
            with subprocess.Popen(
                command, cwd=folder, pass_fds=[write], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ) as process:
                try:
                    os.close(write)
                    with os.fdopen(read, errors="replace") as status:
                        for line in status:  # "dlstatus:1:42.5:Retrieving file 1 of 1"
                            fields = line.split(":")
                            if fields[0] == "dlstatus":
                                step.update(float(fields[2]))
                    assert process.stderr is not None
                    error = process.stderr.read().decode(errors="replace")
                except BaseException:
                    process.kill()  # a part of a file in a folder that goes too
                    raise
        if process.returncode == 0:
            return
        if attempt == 0:
            update()  # old indexes name versions that the archive no longer has
    raise SetupError(f"downloading {package}: {error.strip()}")


def _distribution() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("ID="):
            return line[3:].strip('"')
    return "debian"


def _output(command: Sequence[str], check: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SetupError(f"{command[0]}: not found; the lab needs a distribution with apt ({sys.platform})") from None
    if check and done.returncode:
        raise SetupError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def run(command: Sequence[str], env: dict[str, str] | None = None) -> None:
    """Run a command without its output, which a SetupError shows when it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL, env=env
    )
    if done.returncode:
        raise SetupError(f"{' '.join(command)}: exit status {done.returncode}: {(done.stderr or done.stdout).strip()}")


def follow(command: Sequence[str], step: Step, env: dict[str, str] | None = None, *, group: bool = False) -> None:
    """Run a command and show its last line as it goes; its whole output when it fails.

    When we are to end meanwhile it is told to give up, as `process.give_up` has it, and waited for.
    """
    lines = []
    # What is to end us waits until there is somebody who can be told: by then the command may have begun long ago.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
            process_group=0 if group else None,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before),  # noqa: PLW1509 - this process has one thread
        )
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    with process:
        assert process.stdout is not None
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for line in process.stdout:
                lines.append(line)
                step.note(line.strip())
        except BaseException:
            give_up(process, group)
            for _ in process.stdout:  # nothing that finishes what it has begun may fail for want of a reader
                pass
            raise
    if process.returncode:
        raise SetupError(f"{' '.join(command)}: exit status {process.returncode}: {''.join(lines[-20:]).strip()}")
