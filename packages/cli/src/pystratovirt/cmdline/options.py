"""Every option, declared once: the parser, the messages, `-h` and the documentation read this table.

Not here: what an option does (see `build`), and the keys of those that have them (see `machine`, `backends`, `devices`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pystratovirt.lazy import Lazy

from . import backends, drivers, machine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .declare import Parameters
    from .netdevs import Connected

NUMA: Mapping[str, type[Parameters]] = cast(
    "Mapping[str, type[Parameters]]",
    Lazy("pystratovirt.cmdline", {"node": ("numa", "NumaNode"), "dist": ("numa", "NumaDistance")}),
)

NETDEVS: Mapping[str, type[Connected]] = cast(
    "Mapping[str, type[Connected]]",
    Lazy(
        "pystratovirt.cmdline",
        {"tap": ("netdevs", "Tap"), "user": ("netdevs", "User"), "vhost-user": ("netdevs", "VhostUser")},
    ),
)

FLAG, ONE, OPTIONAL, MANY = (
    "flag",
    "one",
    "optional",
    "many",
)  # how many values: none; exactly one; at most one; any number, repeatable
SUPPORTED, IGNORED, LATER = "supported", "accepted, no effect", "not yet"


class Option:
    """One option: how many values it takes, what they are, what it is for, and how far it works.

    `schema`: the declaration of its parameter string, or one per word in front. `note`: what differs from StratoVirt.
    """

    __slots__ = ("arity", "group", "help", "metavar", "name", "note", "schema", "state")

    def __init__(
        self,
        name: str,
        arity: str,
        metavar: str,
        group: str,
        text: str,
        *,
        schema: type[Parameters] | Mapping[str, type[Parameters]] | None = None,
        state: str = SUPPORTED,
        note: str = "",
    ) -> None:
        self.name, self.arity, self.metavar, self.group, self.help = name, arity, metavar, group, text
        self.schema, self.state, self.note = schema, state, note


MACHINE, BOOT, BACKENDS, CONTROL, PROCESS, OTHER = (
    "Machine",
    "Boot",
    "Disks and devices",
    "Control",
    "Process",
    "Accepted for libvirt",
)
_FOR_LIBVIRT = "boot display msg no-user-config nodefaults nographic overcommit realtime rtc sandbox usb uuid"
_LIBVIRT = "accepted with any value, for libvirt"

_TABLE = (
    Option("machine", ONE, "TYPE[,KEY=VALUE...]", MACHINE, "kind of machine", schema=machine.Machine),
    Option("smp", ONE, "N[,KEY=VALUE...]", MACHINE, "vCPUs, 1 to 254 (default 1)", schema=machine.Smp),
    Option(
        "m", ONE, "SIZE", MACHINE, "memory, 128M to 512G (default 256M); a plain number counts MiB", schema=machine.MemorySize
    ),
    Option("mem-path", ONE, "PATH", MACHINE, "file, or folder for an unnamed file, that backs the memory"),
    Option(
        "mem-prealloc",
        FLAG,
        "",
        MACHINE,
        "touch all memory at start",
        note="more than the host, its cgroup or the disk of `-mem-path` has left is refused (StratoVirt: the OOM killer)",
    ),
    Option("cpu", ONE, "host", MACHINE, "CPU that the guest sees", schema=machine.Cpu),
    Option("accel", ONE, "kvm", MACHINE, "what runs the guest", schema=machine.Accel),
    Option(
        "numa",
        MANY,
        "node|dist,...",
        MACHINE,
        "nodes of CPUs and memory",
        schema=NUMA,
        note="the memory of all nodes is alike but for its place on the host; a guest of a microvm hears nothing of it, as there",
    ),
    Option(
        "kernel",
        ONE,
        "FILE",
        BOOT,
        "kernel: bzImage or ELF vmlinux",
        note="not needed with -mod-test",
    ),
    Option(
        "append",
        MANY,
        "TEXT",
        BOOT,
        "kernel command line; several are joined by a space",
        note="no limit of 255 bytes for a word; a first value may begin with `-`",
    ),
    Option("initrd", ONE, "FILE", BOOT, "initial RAM disk", note="the path may have 4096 bytes (StratoVirt: 255)"),
    Option("incoming", ONE, "URI", BOOT, "start from a saved state", state=LATER),
    Option(
        "smbios",
        MANY,
        "type=N,...",
        BOOT,
        "what SMBIOS tables say",
        state=IGNORED,
        note="as in StratoVirt on a microvm; keys and values are checked",
    ),
    Option("drive", MANY, "id=ID,file=FILE[,...]", BACKENDS, "disk image for a -device", schema=backends.Drive),
    Option("device", MANY, "DRIVER[,KEY=VALUE...]", BACKENDS, "add a device", schema=drivers.DRIVERS),
    Option(
        "object",
        MANY,
        "TYPE,id=ID[,...]",
        BACKENDS,
        "I/O thread, source of random bytes, memory of a node",
        schema=backends.OBJECTS,
    ),
    Option("chardev", MANY, "BACKEND,id=ID[,...]", BACKENDS, "where a console or monitor leads", schema=backends.CHARDEVS),
    Option(
        "serial",
        ONE,
        "BACKEND|chardev:ID",
        BACKENDS,
        "serial port: stdio, pty, file,path=..., socket,path=...,server,nowait",
        note="`chardev:ID` works whatever the order (StratoVirt: never); stdio needs no terminal",
    ),
    Option("netdev", MANY, "TYPE,id=ID[,...]", BACKENDS, "network for a -device", schema=NETDEVS),
    Option(
        "global",
        MANY,
        "DRIVER.KEY=VALUE",
        BACKENDS,
        "a property of all devices of a kind",
        schema=backends.Global,
        state=IGNORED,
        note="as in StratoVirt on a microvm; key and value are checked",
    ),
    Option("battery", FLAG, "", BACKENDS, "battery of the virt machine", state=IGNORED, note="as in StratoVirt on a microvm"),
    Option(
        "qmp",
        ONE,
        "unix:PATH|tcp:HOST:PORT,server,nowait",
        CONTROL,
        "serve QMP on a socket",
        schema=backends.Qmp,
        note="a VM without -qmp and -mon is allowed",
    ),
    Option("mon", ONE, "chardev=ID,mode=control", CONTROL, "serve QMP on a chardev", schema=backends.Mon),
    Option("S", FLAG, "", CONTROL, "start paused; QMP `cont` starts the vCPUs (also: -freeze)", note="may be repeated"),
    Option(
        "mod-test",
        ONE,
        "SOCKET",
        CONTROL,
        "test mode: no vCPUs, driven over a socket",
        note="works with microvm; needs no KVM, kernel or drive",
    ),
    Option(
        "trace",
        ONE,
        "file=FILE",
        CONTROL,
        "switch on the trace points that a file of patterns names",
        schema=backends.Trace,
        note="lines go to the log at level TRACE: STRATOVIRT_LOG_LEVEL=trace shows them",
    ),
    Option("name", ONE, "NAME", PROCESS, "name of the virtual machine"),
    Option(
        "D",
        OPTIONAL,
        "[FILE]",
        PROCESS,
        "log to FILE, or to standard error; level in STRATOVIRT_LOG_LEVEL",
        note="without it only warnings and errors are logged",
    ),
    Option(
        "daemonize",
        FLAG,
        "",
        PROCESS,
        "go to the background once QMP can be reached",
        note="the exit status tells whether the start succeeded (StratoVirt: always 0)",
    ),
    Option("pidfile", ONE, "FILE", PROCESS, "with -daemonize: write the process id to FILE", note="a stale file is taken over"),
    Option("disable-seccomp", FLAG, "", PROCESS, "no system call filter", note="there is no filter yet, with or without it"),
    Option("no-shutdown", OPTIONAL, "", OTHER, "stay after guest power-off", state=IGNORED, note="as in StratoVirt on a microvm"),
    *(Option(name, OPTIONAL, "", OTHER, _LIBVIRT, state=IGNORED, note="as in StratoVirt") for name in _FOR_LIBVIRT.split()),
    Option("vnc", ONE, "HOST:N", OTHER, "screen over VNC", state=LATER, note="an optional feature of StratoVirt"),
    Option("cameradev", MANY, "...", OTHER, "camera", state=LATER, note="an optional feature of StratoVirt"),
    Option(
        "windows_emu_pid", ONE, "PID", OTHER, "end with another process", state=LATER, note="an optional feature of StratoVirt"
    ),
)

OPTIONS: dict[str, Option] = {option.name: option for option in _TABLE}
ALIASES = {"freeze": "S", "help": "h", "version": "V"}


def canonical(argument: str) -> str:
    """Return the name of the option that `argument` is (`h` and `V` included); empty when it is none."""
    if not argument.startswith("-"):
        return ""
    name = argument[1:]
    name = ALIASES.get(name, name)
    return name if name in OPTIONS or name in ("h", "V") else ""
