"""`-netdev`: networks that a device can be given, declared for the command line and for QMP's netdev_add alike.

Not here: opening them (`pystratovirt.devices.net`), and what a guest sees of them (`drivers.net`).
"""

from __future__ import annotations

from .declare import Parameters, key
from .errors import BadKey, show
from .values import ID, PATH, SWITCH, Integer, Kind, Reference, Text

PAIRS_MAX = 16


class Descriptors(Kind[tuple[str, ...]]):
    """Numbers of open descriptors, separated by `:`. (QMP also takes names here, which `getfd` gave; `most`: so many.)"""

    allowed = "descriptor numbers, separated by `:`"

    def __init__(self, most: int = PAIRS_MAX) -> None:
        self._most = most

    def split(self, text: str) -> tuple[str, ...]:
        """Return the numbers or names in `text` of QMP's; raise ValueError when there are too many, or one is empty."""
        parts = self._split(text, self._most)
        if not all(parts):
            raise ValueError("an empty name" if len(parts) > 1 else "empty")
        return parts

    @staticmethod
    def _split(text: str, most: int) -> tuple[str, ...]:
        parts = tuple(text.split(":"))
        if len(parts) > most:
            raise ValueError(f"at most {most} descriptor{'s' if most > 1 else ''}")
        return parts

    def parse(self, text: str) -> tuple[str, ...]:
        parts = self._split(text, PAIRS_MAX)  # of `fd` and `fds` alike, as in StratoVirt
        for part in parts:
            if not (part.isascii() and part.isdigit() and len(part) < 10):
                raise ValueError("not a descriptor's number" if len(parts) == 1 else f"{show(part)} is not a descriptor's number")
        return parts

    def render(self, value: tuple[str, ...]) -> str:
        return ":".join(value)


class _Ports(Text):
    allowed = "PORT, FIRST-LAST or HOST:GUEST; several with `,,` between"


class Tap(Parameters, selector="tap"):
    """A tap of the host's kernel, by its name or by open descriptors of it, served here or by the kernel (vhost-net)."""

    id: str = key(ID, doc="the name that a device uses")
    ifname: str | None = key(Text(15), default=None, doc="name of the interface; made when there is none")
    fd: tuple[str, ...] | None = key(Descriptors(1), default=None, doc="open descriptors of it, one for each pair of queues")
    fds: tuple[str, ...] | None = key(Descriptors(), default=None, doc="the same")
    queues: int = key(Integer(1, PAIRS_MAX, bits=16), default=1, doc="pairs of queues; at least as many as there are descriptors")
    vhost: bool = key(SWITCH, default=False, doc="the host's kernel moves the frames")
    vhostfd: tuple[str, ...] | None = key(
        Descriptors(1), default=None, doc="open descriptors of /dev/vhost-net, one for each pair of queues"
    )
    vhostfds: tuple[str, ...] | None = key(Descriptors(), default=None, doc="the same")

    @property
    def descriptors(self) -> tuple[str, ...]:
        """Those of the tap; none when it is opened by name."""
        return self.fd or self.fds or ()

    @property
    def vhost_descriptors(self) -> tuple[str, ...]:
        """Those of vhost-net; none when it is opened here."""
        return self.vhostfd or self.vhostfds or ()

    @property
    def pairs(self) -> int:
        """How many pairs of queues."""
        return max(self.queues, len(self.descriptors), len(self.vhost_descriptors))

    def check(self) -> None:
        given = [name for name in ("ifname", "fd", "fds") if getattr(self, name) is not None]
        if not given:
            raise BadKey("", "Tap device is missing, use 'ifname' or 'fd' to configure a tap device")
        if len(given) > 1:
            raise BadKey(given[1], f"{given[0]} says already which tap; give one of the two")
        if not self.vhost and self.vhost_descriptors:
            name = "vhostfd" if self.vhostfd else "vhostfds"
            raise BadKey(name, "Argument 'vhostfd' is not needed for virtio-net device (it needs vhost=on)")
        if self.vhostfd and self.vhostfds:
            raise BadKey("vhostfds", "vhostfd says already which descriptor; give one of the two")
        for name in ("fd", "fds", "vhostfd", "vhostfds"):
            found = getattr(self, name) or ()
            if found and len(found) != self.pairs:
                raise BadKey(name, f"{len(found)} descriptor{'s' if len(found) > 1 else ''} for {self.pairs} pairs of queues")
            if len(set(found)) != len(found):
                raise BadKey(name, "the same descriptor twice")


class User(Parameters, selector="user"):
    """The host's network without privileges, by the program passt, which is started and ended with the VM."""

    id: str = key(ID, doc="the name that a device uses")
    path: str = key(PATH, default="passt", doc="the program, looked for in $PATH")
    tcp_ports: str | None = key(_Ports(4096), default=None, doc="ports of the host that lead to the guest's")
    udp_ports: str | None = key(_Ports(4096), default=None, doc="the same for UDP")


class VhostUser(Parameters, selector="vhost-user"):
    """A network that another process carries, over a unix socket. Guest memory has to be shared (`-machine mem-share=on`)."""

    id: str = key(ID, doc="the name that a device uses")
    chardev: str = key(Reference("chardev"), doc="the socket of that process: `-chardev socket,path=…`, without server")
    queues: int = key(Integer(1, PAIRS_MAX, bits=16), default=1, doc="pairs of queues")


class Unconnected(Parameters):
    """No network: what netdev_add makes of an id and nothing else. A card that has it has no link. Not for the command line."""

    id: str = key(ID, doc="the name that a device uses")


Connected = Tap | User | VhostUser
Netdev = Connected | Unconnected
