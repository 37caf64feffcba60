"""The lab host: QEMU with software emulation running a stock kernel that has a real /dev/kvm.

run() boots it, runs one command in a copy-on-write view of this machine's files and returns the command's exit status.
Everything between this process and its children goes over inherited descriptors, so no socket, pipe or temporary file
exists that could be left behind; the children die with this process, however it ends.

Not here: what is downloaded (debian.py) and who asks (cli.py).
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import cache, debian
from .forward import Multiplexer
from .initrd import Archive, module_bytes, module_files, module_name
from .process import Child, orderly_end
from .progress import say
from .streams import Stream

# Loaded in this order, each after what it depends on: the way to this machine's files, and meanwhile KVM and what tests use.
MODULES = ("virtio_pci", "virtiofs", "overlay", "virtio_console"), ("kvm", "kvm_amd", "tun", "vhost")
# Each of those after `quiet` saves a tenth of a second or more of the boot; a stable TSC also serves the guests in the lab.
COMMAND_LINE = "console=ttyS0 panic=-1 quiet mitigations=off cryptomgr.notests tsc=reliable random.trust_cpu=on"
PORTS = ("stdout", "stderr", "stdin", "control", "dmesg")  # virtio-serial ports 1 to 5; inside.sh has the other ends
_FORWARD_PORT = 10  # and up: one for each forwarded socket
_CONSOLE_KEPT = 64 * 1024  # bytes of the lab host's own console, for the message when it dies
_LAST_WORDS = 25  # lines of that, or from where the kernel says what went wrong, which a long trace may follow
_TROUBLE = re.compile(r"sysrq: |BUG: |Oops|Kernel panic|Out of memory|general protection fault", re.IGNORECASE)
_CHUNK = 64 * 1024
_LOOK = 1.0  # seconds between two looks at the clock and at who started us
_PATIENCE = 4
HEARTBEAT = 10.0  # seconds; that often the lab host says that it lives (inside.sh)


class LabError(Exception):
    """The lab itself failed, not the command in it. The text says how, with the end of the lab host's console."""


class _NotUpError(LabError):
    """The lab host did not come up in time."""


@dataclass(frozen=True)
class Options:
    """How to boot the lab host and what comes back from it."""

    arch: str = "x86_64"
    smp: int = 2
    memory: int = 4096  # MiB
    timeout: float | None = None  # seconds, for the whole run
    # Seconds for what takes 4 to 20. One that takes longer stands still more often than it is slow; then the lab host is started
    # once more, and has _PATIENCE times as long.
    boot_timeout: float = 60.0
    stall: float = 300.0  # seconds, more than HEARTBEAT
    out: Path | None = None  # a folder that the command sees as $LAB_OUT
    dmesg: Path | None = None  # a file for the lab host's kernel log
    tty: bool = False  # the command gets a terminal of its own; ours is in raw mode meanwhile
    stdin: bool = False  # our standard input goes to the command
    qemu: Sequence[str] = ()  # further arguments for QEMU
    environment: Mapping[str, str] = field(default_factory=dict)  # added to ours
    forward: Mapping[Path, str] = field(default_factory=dict)  # sockets made here, and where in the lab they lead
    verbose: bool = False  # the lab host's console goes to standard error


def assets() -> tuple[debian.Kernel, Path]:
    """The lab host's kernel and its initramfs, downloaded and built when they are not in the cache."""
    kernel = debian.kernel("cloud")
    busybox = debian.busybox()
    here = Path(__file__).parent
    init, inside = (here / "init.sh").read_bytes(), (here / "inside.sh").read_bytes()

    def build(path: Path) -> None:
        archive = Archive()
        for name in ("proc", "sys", "dev"):
            archive.folder(name)
        archive.device("dev/console", 5, 1)
        archive.file("bin/busybox", busybox.read_bytes(), 0o755)
        archive.file("init", init, 0o755)
        archive.file("lab/inside.sh", inside, 0o755)
        placed: set[Path] = set()
        for stage, names in enumerate(MODULES, start=1):
            for number, module in enumerate(module_files(kernel, names)):
                if module not in placed:
                    archive.file(f"modules/{stage}-{number:02}-{module_name(module.name)}.ko", module_bytes(module))
                    placed.add(module)
        path.write_bytes(archive.finish())

    key = cache.digest(init, inside, repr(MODULES), str(kernel.image), str(busybox))
    return kernel, cache.file(f"lab/{key}/initrd", build)


def job_script(command: Sequence[str], folder: str, environment: Mapping[str, str]) -> str:
    """The shell script that runs a command in a folder with exactly this environment.

    >>> print(job_script(["echo", "a b"], "/tmp", {"X": "1"}), end="")
    cd -- /tmp || exit 125
    exec /usr/bin/env -i X=1 echo 'a b'
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    return f"cd -- {shlex.quote(folder)} || exit 125\nexec /usr/bin/env -i {shlex.join([*variables, *command])}\n"


def run(command: Sequence[str], options: Options) -> int:
    """Boot the lab host, run the command in it, return its exit status (128 + n when signal n ended it).

    Raises LabError when the lab host does not boot or dies, TimeoutError when options.timeout is over, and
    KeyboardInterrupt or SystemExit when a signal ends it; nothing is left running in any case.
    """
    if options.arch != "x86_64":
        raise LabError(f"--arch {options.arch}: not supported yet; there is: x86_64")
    kernel, initrd = assets()
    if os.geteuid() != 0:
        _become_root()
    token = secrets.token_hex(16)
    deadline = None if options.timeout is None else time.monotonic() + options.timeout

    def once(boot_timeout: float) -> int:
        with ExitStack() as stack:
            host = _Host(stack, replace(options, boot_timeout=boot_timeout), token)
            host.start(kernel, initrd, _job_archive(command, kernel, options, token))
            return host.serve(deadline)

    with orderly_end():
        try:
            return once(options.boot_timeout)
        except _NotUpError as error:  # QEMU 7.2 hangs once in some hundred boots when it emulates several CPUs
            say(f"lab: {error}\nlab: starting it once more")
        return once(_PATIENCE * options.boot_timeout)


def _become_root() -> None:
    """Start this process anew as root through sudo; raises LabError when there is no sudo.

    The daemon that shares this machine's files has to be root's: it changes its root folder, and the overlay on top asks it
    to open files without touching their access times, which only a file's owner and root may.
    """
    sudo = shutil.which("sudo")
    if sudo is None:
        raise LabError("root is needed to share this machine's files with the lab: run this as root")
    kept = [f"{name}={os.environ[name]}" for name in ("HOME", "PATH", "XDG_CACHE_HOME") if name in os.environ]
    os.execv(sudo, [sudo, "--preserve-env", *kept, *sys.orig_argv])


def nested_paging(version: str) -> bool:
    """Whether the lab's KVM shall use nested paging on a QEMU that calls itself `version`.

    What 7.2 emulates of it is not exact (CONTRIBUTING.md), and on 10.0 no guest starts without. Those between were not tried.
    """
    found = re.search(r"version (\d+)\.", version)
    return found is not None and int(found[1]) >= 10


def _qemu_version() -> str:
    return subprocess.run([debian.tool("qemu-system-x86_64"), "--version"], capture_output=True, text=True, check=False).stdout


def _job_archive(command: Sequence[str], kernel: debian.Kernel, options: Options, token: str) -> bytes:
    """What differs from run to run, as a second archive behind the initramfs (the kernel unpacks both)."""
    environment = {**os.environ, **options.environment, "LAB": "1"}
    if options.out:
        environment["LAB_OUT"] = str(options.out.resolve())
    size = shutil.get_terminal_size() if options.tty else None
    parameters = {
        "LAB_TOKEN": token,
        "LAB_NPT": "1" if nested_paging(_qemu_version()) else "0",
        "LAB_MODULES": str(kernel.modules),
        "LAB_SHARE": str(options.out.resolve()) if options.out else "",
        "LAB_STDIN": "1" if options.stdin else "",
        "LAB_FORWARD": " ".join(options.forward.values()),
        "LAB_PYTHON": sys.executable,
        "LAB_RELAY": str(Path(__file__).with_name("forward.py").resolve()),
        "LAB_TTY": f"{size.lines} {size.columns}" if size else "",
    }
    archive = Archive()
    archive.file("lab/job", os.fsencode(job_script(command, str(Path.cwd()), environment)))
    archive.file("lab/parameters", "".join(f"{name}={shlex.quote(value)}\n" for name, value in parameters.items()).encode())
    return archive.finish()


class _Host:
    """One running lab host: its processes and the sockets to it. The ExitStack owns all of them."""

    def __init__(self, stack: ExitStack, options: Options, token: str) -> None:
        self._stack = stack
        self._options = options
        # poll and not epoll: standard input may be a regular file, which epoll refuses.
        self._selector = stack.enter_context(selectors.PollSelector())
        self._children: list[Child] = []
        self._ports: dict[str, socket.socket] = {}
        self._console = bytearray()
        self._control = bytearray()
        self._input = bytearray()
        self._log = bytearray()
        self._up = False  # our standard input is the next host's if this one never comes up
        self._silence = 0.0  # seconds that we have waited for a word of the lab host, in vain
        self._status: int | None = None
        end = b"\1" + token.encode()
        self._streams = {
            "stdout": Stream(end, lambda data: _write(1, data)),
            "stderr": Stream(end, lambda data: _write(2, data)),
            "dmesg": Stream(end, self._log.extend),
        }

    def start(self, kernel: debian.Kernel, initrd: Path, job: bytes) -> None:
        """Start the file sharing daemons and QEMU."""
        options = self._options
        memory = f"{options.memory}M"
        initrd_fd = os.memfd_create("lab-initrd")
        fds = [initrd_fd]
        with os.fdopen(os.dup(initrd_fd), "wb") as file:
            file.write(initrd.read_bytes() + job)
        arguments = [
            debian.tool("qemu-system-x86_64"), "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-nic", "none",
            "-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", str(options.smp), "-m", memory,
            "-object", f"memory-backend-memfd,id=ram,size={memory},share=on",
            "-machine", "q35,memory-backend=ram,usb=off,sata=off,smbus=off",
            "-kernel", str(kernel.image), "-initrd", f"/dev/fd/{initrd_fd}", "-append", COMMAND_LINE,
            "-device", "virtio-serial-pci",
        ]  # fmt: skip

        def chardev(name: str, descriptor: int) -> None:
            fds.append(descriptor)
            arguments.extend(["-chardev", f"socket,id={name},fd={descriptor}"])

        chardev("console", self._port("console"))
        arguments += ["-serial", "chardev:console"]
        for number, name in enumerate(PORTS, start=1):
            chardev(name, self._port(name))
            arguments += ["-device", f"virtserialport,nr={number},chardev={name}"]
        if options.tty:
            chardev("tty", self._port("tty"))
            arguments += ["-device", f"virtconsole,nr={len(PORTS) + 1},chardev=tty"]
        for number, path in enumerate(options.forward):
            chardev(f"forward{number}", self._forward(path))
            arguments += ["-device", f"virtserialport,nr={_FORWARD_PORT + number},chardev=forward{number}"]
        shares = {"root": Path("/")}
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            shares["out"] = options.out.resolve()
        for tag, folder in shares.items():
            chardev(tag, self._share(folder))
            arguments += ["-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}"]
        self._children.insert(0, Child(self._stack, [*arguments, *options.qemu], fds))
        for descriptor in fds:
            os.close(descriptor)

    def serve(self, deadline: float | None) -> int:
        """Move bytes until the command has ended; return its status. `deadline` is on the monotonic clock, in seconds."""
        up_by = time.monotonic() + self._options.boot_timeout
        parent = os.getppid()
        if self._options.tty:
            self._stack.enter_context(_raw_terminal())
        for descriptor in (1, 2):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                self._selector.register(descriptor, selectors.EVENT_READ, "reader gone")
        while not self._finished():
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the command did not end within {self._options.timeout:g} s")
            if not self._up and time.monotonic() >= up_by:
                limit = f"{self._options.boot_timeout:g} s"
                raise _NotUpError(f"the lab host did not come up within {limit}:\n{self._last_words()}")
            if self._up and self._silence >= self._options.stall:
                raise LabError(f"the lab host stands still: not a word for {self._options.stall:g} s:\n{self._last_words()}")
            if os.getppid() != parent:
                raise SystemExit(128 + signal.SIGHUP)  # who started us is gone, and nobody waits for the result
            # Only what was waited for counts: who reads our output may have it wait for long, and so may who stopped us.
            before = time.monotonic()
            ready = self._selector.select(_LOOK)
            self._silence += min(time.monotonic() - before, _LOOK)
            for key, mask in ready:
                self._handle(key, mask)
        if self._options.dmesg:
            self._options.dmesg.write_bytes(self._log)
        if self._status is None:
            raise LabError(f"the lab host ended before the command did:\n{self._last_words()}")
        return self._status

    def _finished(self) -> bool:
        if not self._ports:
            return True  # QEMU is gone
        return self._status is not None and all(stream.ended for stream in self._streams.values())

    def _handle(self, key: selectors.SelectorKey, mask: int) -> None:
        name: str = key.data if isinstance(key.data, str) else ""
        if not name:
            key.data(mask)
        elif name == "input":
            self._read_input()
        elif name == "reader gone":
            raise BrokenPipeError("nobody reads the output any more")
        else:
            if mask & selectors.EVENT_WRITE:
                self._write_input()
            if mask & selectors.EVENT_READ and name in self._ports:
                self._read_port(name)

    def _read_port(self, name: str) -> None:
        connection = self._ports[name]
        try:
            data = connection.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            del self._ports[name]
            if name in self._streams:
                self._streams[name].close()
        elif name in self._streams:
            self._streams[name].feed(data)
        elif name == "tty":
            _write(1, data)
        elif name == "console":
            self._console += data
            del self._console[:-_CONSOLE_KEPT]
            if self._options.verbose:
                _write(2, data)
        elif name == "control":
            self._silence = 0.0
            self._control += data
            *lines, self._control[:] = bytes(self._control).split(b"\n")
            for line in lines:
                if line == b"up":
                    self._comes_up()
                elif line.startswith(b"exit "):
                    self._status = int(line[5:])

    def _comes_up(self) -> None:
        self._up = True
        if self._options.tty or self._options.stdin:
            self._selector.register(0, selectors.EVENT_READ, "input")

    @property
    def _input_port(self) -> str:
        return "tty" if self._options.tty else "stdin"

    def _read_input(self) -> None:
        """Take from our standard input; no more before that is on its way (back pressure)."""
        try:
            data = os.read(0, _CHUNK)
        except OSError:
            data = b""  # a terminal that was hung up
        self._selector.unregister(0)
        connection = self._ports.get(self._input_port)
        if connection is None:
            return
        if data:
            self._input += data
            self._write_input()
        else:
            connection.shutdown(socket.SHUT_WR)

    def _write_input(self) -> None:
        connection = self._ports.get(self._input_port)
        if connection is None:
            return
        try:
            del self._input[: connection.send(self._input)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._input.clear()
        if self._input:
            self._selector.modify(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, self._input_port)
        else:
            self._selector.modify(connection, selectors.EVENT_READ, self._input_port)
            self._selector.register(0, selectors.EVENT_READ, "input")

    def _last_words(self) -> str:
        for child in self._children:
            child.kill()
        text = b"".join([*(child.output() for child in self._children), self._console]).decode(errors="replace")
        lines = text.replace("\r", "").splitlines()
        start = next((i for i, line in enumerate(lines) if _TROUBLE.search(line)), len(lines))
        return "\n".join(f"    {line}" for line in lines[max(0, min(start, len(lines) - _LAST_WORDS)) :])

    def _port(self, name: str) -> int:
        """A socket pair whose one end this process watches; returns the other end's descriptor, for QEMU."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._stack.enter_context(ours)
        self._selector.register(ours, selectors.EVENT_READ, name)
        self._ports[name] = ours
        return theirs.detach()

    def _forward(self, path: Path) -> int:
        """Forward a socket that will be made at `path`; returns the port's descriptor, for QEMU."""
        ours, theirs = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        for owned in (ours, listener):
            self._stack.enter_context(owned)

        def ready() -> None:
            path.unlink(missing_ok=True)  # left by a run that was killed
            listener.bind(str(path))
            self._stack.callback(path.unlink, missing_ok=True)
            listener.listen()
            self._selector.register(listener, selectors.EVENT_READ, lambda _: multiplexer.add(listener.accept()[0]))

        multiplexer = Multiplexer(self._selector, ours.fileno(), ready=ready)
        self._stack.callback(multiplexer.close)
        return theirs.detach()

    def _share(self, folder: Path) -> int:
        """Start a daemon that shares a folder; returns a descriptor connected to it, for QEMU."""
        program = debian.virtiofsd()
        # One descriptor for every file that the lab has seen: as many as we may.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = 1_000_000 if limit == resource.RLIM_INFINITY else min(limit, 1_000_000)
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connection:
            listener.bind("")  # a name that the kernel chooses, in no file system, gone with the socket
            listener.listen(1)
            connection.connect(listener.getsockname())
            if "libexec" in program:  # the newer one, in Rust
                arguments = [f"--shared-dir={folder}", "--cache=always", "--sandbox=chroot"]
            else:
                arguments = ["-o", f"source={folder}", "-o", "cache=always", "-o", "sandbox=chroot"]
            command = [program, f"--fd={listener.fileno()}", f"--rlimit-nofile={limit}", *arguments]
            self._children.append(Child(self._stack, command, [listener.fileno()]))
            return connection.detach()


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it; a descriptor that somebody made non-blocking is waited for."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            with selectors.PollSelector() as selector:
                selector.register(descriptor, selectors.EVENT_WRITE)
                selector.select()


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Our terminal passes every key on, Ctrl-C included; put back as it was afterwards."""
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
