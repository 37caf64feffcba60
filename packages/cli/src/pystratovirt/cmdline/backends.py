"""What stands behind devices: drives, objects, character devices, monitor sockets.

Not here: what a guest sees of them (see `devices`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pystratovirt.lazy import Lazy

from .declare import Parameters, Record, key
from .errors import BadKey
from .values import ALLOW, FLAG, ID, PATH, SOCKET_PATH, SWITCH, UNMAP, Choice, Integer, Kind, MiB, Reference, Size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeAlias

    from .numa import MemoryBackend
    from .secrets import Secret

    Object: TypeAlias = "IoThread | RngRandom | Secret | MemoryBackend"

MAX_IOTHREADS = 8
MAX_IOPS = 1_000_000
MAX_BPS = 1 << 40
_CACHE = Size(0, 32 * MiB)
_NO_CACHE_WITHOUT_QCOW2 = "refused for a raw image (StratoVirt: no effect)"


class Drive(Parameters):
    """`-drive`: a disk image and how it is accessed."""

    id: str = key(ID, doc="the name that a device uses")
    file: str = key(PATH, doc="image file or block device")
    format: str = key(Choice("raw", "qcow2"), default="raw", doc="image format", note="a microvm of StratoVirt has raw only")
    readonly: bool = key(SWITCH, default=False, doc="the guest cannot write")
    direct: bool = key(SWITCH, default=True, doc="bypass the host's page cache (O_DIRECT)")
    aio: str | None = key(
        Choice("off", "native", "io_uring", "threads"), default=None, doc="how I/O is done; default native with direct, else off"
    )
    discard: bool = key(UNMAP, default=False, doc="discarded blocks are freed in the image")
    detect_zeroes: str = key(Choice("off", "on", "unmap"), default="off", doc="turn writes of zeroes into zeroed ranges or holes")
    iops_total: int | None = key(
        Integer(0, MAX_IOPS),
        default=None,
        name="throttling.iops-total",
        doc="operations per second; 0: unlimited",
        note="of all queues together, a tenth of a second's worth at once (StratoVirt: of each queue, a second's worth)",
    )
    bps_total: int | None = key(
        Integer(0, MAX_BPS),
        default=None,
        name="throttling.bps-total",
        doc="bytes per second; 0: unlimited",
        note="not in StratoVirt",
    )
    external_files: bool = key(
        ALLOW,
        default=False,
        doc="qcow2: whether the backing or data file that the image names may be opened",
        note="not in StratoVirt, which opens them; leave it at `deny` for images of others",
    )
    key_secret: str | None = key(
        Reference("secret", shared=True),
        default=None,
        name="encrypt.key-secret",
        doc="qcow2: the -object secret with the passphrase of an encrypted image",
        note="not in StratoVirt",
    )
    media: str = key(
        Choice("disk", "cdrom"),
        default="disk",
        doc="what a USB drive looks like",
        note="no effect on other drives, as in StratoVirt",
    )
    l2_cache_size: int | None = key(
        _CACHE, default=None, doc="qcow2: bytes of mapping tables kept in memory", note=_NO_CACHE_WITHOUT_QCOW2
    )
    refcount_cache_size: int | None = key(
        _CACHE, default=None, doc="qcow2: bytes of reference counts kept in memory", note=_NO_CACHE_WITHOUT_QCOW2
    )
    interface: str = key(
        Choice("none", later=("pflash",)),
        default="none",
        name="if",
        doc="`none`: for a -device",
        note="`pflash` is not supported yet",
    )

    def check(self) -> None:
        if self.aio == "native" and not self.direct:
            raise BadKey("aio=native", "needs direct=on")
        if self.aio == "off" and self.direct:
            raise BadKey("aio=off", "needs direct=off")
        if self.format != "qcow2":
            for name in ("l2-cache-size", "refcount-cache-size", "external-files", "encrypt.key-secret"):
                found = self.keys[name]
                value = getattr(self, found.attribute)
                if value != found.default:
                    raise BadKey(f"{name}={found.kind.render(value)}", "only for a qcow2 image")

    @property
    def engine(self) -> str:
        """How I/O is done: `off`, `native`, `io_uring` or `threads`."""
        return self.aio or ("native" if self.direct else "off")


class IoThread(Parameters, selector="iothread"):
    """A thread of its own for the I/O of the devices that name it."""

    id: str = key(ID, doc="the name that a device uses")


class RngRandom(Parameters, selector="rng-random"):
    """A source of random bytes on the host."""

    id: str = key(ID, doc="the name that a device uses")
    filename: str = key(PATH, doc="character device such as /dev/urandom")


OBJECTS: Mapping[str, type[Object]] = cast(
    "Mapping[str, type[Object]]",
    Lazy(
        "pystratovirt.cmdline",
        {
            "iothread": ("backends", "IoThread"),
            "rng-random": ("backends", "RngRandom"),
            "secret": ("secrets", "Secret"),
            "memory-backend-ram": ("numa", "MemoryBackendRam"),
            "memory-backend-file": ("numa", "MemoryBackendFile"),
            "memory-backend-memfd": ("numa", "MemoryBackendMemfd"),
        },
    ),
)


class StdioChardev(Parameters, selector="stdio"):
    """This process's standard input and output. At most one, and not with -daemonize."""

    id: str = key(ID, doc="the name that its user gives")


class PtyChardev(Parameters, selector="pty"):
    """A new pseudo-terminal; its path is logged and reported by query-chardev."""

    id: str = key(ID, doc="the name that its user gives")


class FileChardev(Parameters, selector="file"):
    """A file that output is written over, from its beginning; there is no input."""

    id: str = key(ID, doc="the name that its user gives")
    path: str = key(PATH, doc="the file, created when missing, never truncated")


class _Ip(Kind[str]):
    allowed = "a literal IP address"

    def parse(self, text: str) -> str:
        import socket  # only lines with a TCP chardev pay for it

        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                socket.inet_pton(family, text)
            except (OSError, ValueError):
                continue
            return text
        raise ValueError("not a literal IP address")


class SocketChardev(Parameters, selector="socket"):
    """A Unix socket (`path`) or a TCP socket (`host`, `port`), to connect to or, with `server`, to listen on."""

    id: str = key(ID, doc="the name that its user gives")
    path: str | None = key(
        SOCKET_PATH, default=None, doc="path of a Unix socket", note="longer than a socket address can hold: refused at once"
    )
    host: str = key(_Ip(), default="0.0.0.0", doc="TCP: literal address")  # StratoVirt's default
    port: int | None = key(Integer(1, 65535, bits=16), default=None, doc="TCP: port")
    server: bool = key(FLAG, default=False, doc="listen instead of connecting", note="`server=on` works too")
    nowait: bool = key(
        FLAG,
        default=False,
        inverse="wait",
        doc="with server: start without waiting for a client",
        note="`wait=off` works too; without it the start waits (StratoVirt: an error)",
    )
    reconnect: int = key(
        Integer(0, 86400, "seconds", bits=32),
        default=0,
        doc="without server: seconds between attempts to connect; 0: only at the start",
        note="not in StratoVirt",
    )

    def check(self) -> None:
        if self.nowait and not self.server:
            raise BadKey("nowait", "only with server")
        if self.reconnect and self.server:
            raise BadKey(f"reconnect={self.reconnect}", "only without server")
        if self.path is None and self.port is None:
            raise BadKey("", "needs path=FILE (Unix) or port=NUMBER (TCP)")
        if self.path is not None and self.port is not None:
            raise BadKey(f"port={self.port}", "a Unix socket (path=) has no port")
        if self.path is not None and self.host != "0.0.0.0":
            raise BadKey(f"host={self.host}", "a Unix socket (path=) has no host")


Chardev = StdioChardev | PtyChardev | FileChardev | SocketChardev
CHARDEVS: dict[str, type[Chardev]] = {"stdio": StdioChardev, "pty": PtyChardev, "file": FileChardev, "socket": SocketChardev}


class _Uri(Kind[str]):
    allowed = "unix:PATH or tcp:IPv4:PORT"

    def parse(self, text: str) -> str:
        scheme, _, rest = text.partition(":")
        if scheme == "unix":
            SOCKET_PATH.parse(rest)
        elif scheme == "tcp":
            host, _, port = rest.rpartition(":")
            _Ip().parse(host)
            Integer(1, 65535).parse(port)
        else:
            raise ValueError(f"must be {self.allowed}")
        return text


class Qmp(Parameters):
    """`-qmp`: a socket that speaks QMP."""

    uri: str = key(_Uri(), positional=True, doc="where to listen")
    server: bool = key(FLAG, default=False, doc="listen; required", note="`server=on` works too")
    nowait: bool = key(
        FLAG,
        default=False,
        inverse="wait",
        doc="start without waiting for a client",
        note="`wait=off` works too; without it vCPUs run once a client has connected (StratoVirt: an error)",
    )

    def check(self) -> None:
        if not self.server:
            raise BadKey(self.uri, f"needs server: a monitor socket is {self.uri},server,nowait")


class Trace(Parameters):
    """`-trace`: trace points that are on from the start."""

    file: str = key(
        PATH,
        doc="patterns of names, one a line",
        note="other keys are refused (StratoVirt: ignored); a line of blanks switches nothing on (StratoVirt: everything)",
    )


class Global(Parameters):
    """`-global`: a property of all devices of a kind."""

    fast_unplug: str | None = key(
        Choice("0", "1"), default=None, name="pcie-root-port.fast-unplug", doc="how a PCIe port lets go of its device"
    )


class Mon(Parameters):
    """`-mon`: a chardev that speaks QMP."""

    chardev: str = key(Reference("chardev"), doc="a socket with server; nowait as for -qmp")
    mode: str = key(Choice("control"), doc="`control` is QMP")
    id: str = key(ID, default="", doc="accepted for libvirt; no effect")


class Listener(Record):
    """Where QMP is served: a Unix socket at `path`, or TCP on `host` and `port`. `chardev` is set when it came from -mon.

    `wait`: no vCPU runs before a client has connected.
    """

    path: str | None = None
    host: str = ""
    port: int = 0
    chardev: str = ""
    wait: bool = False

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path is not None else f"tcp:{self.host}:{self.port}"
