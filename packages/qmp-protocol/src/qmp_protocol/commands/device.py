"""Hot-plug: devices, network, character and camera back ends, passed descriptors (reference sections 1.11, 8.3 to 10)."""

from __future__ import annotations

from typing import Literal

from qmp_protocol.schema import Command, Empty, Machines, Struct, member, u8, u16, usize


class DeviceAdd(Command[Empty], name="device_add"):
    """Add a device.

    On microvm the device goes into one of the slots that exist from boot, four for disks and two for network devices. Only
    `id`, `driver`, `addr`, `lun`, `serial` and `mac` count, and `drive` or `netdev` when no back end is called as the device. On
    standard machines the other members are the driver's properties, as on the command line; a PCI device wants `bus` (a root
    port) and `addr`.

    Errors: GenericError when the id is taken, the driver is unknown, or the place is taken or cannot be plugged into.
    """

    id: str = member(max_length=255)
    driver: str = member(doc="for example `virtio-blk-pci`; on microvm any name with `blk` or `net` in it")
    addr: str | None = member(default=None, doc="slot, on microvm among those of its kind, or slot.function; decimal or with 0x")
    lun: usize | None = member(default=None, doc="microvm: the slot minus one, when there is no `addr`")
    drive: str | None = member(default=None)
    romfile: str | None = member(default=None, doc="accepted, not used")
    share_rw: str | None = member("share-rw", default=None, doc="accepted, not used")
    bus: str | None = member(default=None)
    mac: str | None = member(default=None)
    netdev: str | None = member(default=None)
    chardev: str | None = member(default=None)
    disable_modern: str | None = member("disable-modern", default=None, doc="accepted, not used")
    mq: str | None = member(default=None, doc="`on` or `off`")
    vectors: str | None = member(default=None, doc="accepted, not used")
    serial: str | None = member(default=None)
    iothread: str | None = member(default=None)
    host: str | None = member(default=None, doc="vfio: domain:bus:device.function")
    boot_index: u8 | None = member("boot_index", default=None)
    sysfsdev: str | None = member(default=None, doc="vfio: path under /sys")
    queue_size: u16 | None = member("queue-size", default=None)
    port: str | None = member(default=None, doc="accepted, not used")
    backend: str | None = member(default=None, doc="accepted, not used")
    path: str | None = member(default=None, doc="accepted, not used")
    cameradev: str | None = member(default=None)
    hostbus: str | None = member(default=None)
    hostaddr: str | None = member(default=None)
    hostport: str | None = member(default=None)
    vendorid: str | None = member(default=None)
    productid: str | None = member(default=None)
    isobufs: str | None = member(default=None)
    isobsize: str | None = member(default=None)
    cpu_id: u8 | None = member("cpu-id", default=None)
    multifunction: bool | None = member(default=None)
    num_queues: u16 | None = member("num-queues", default=None)


class DeviceDel(Command[Empty], name="device_del"):
    """Remove a device. The event DEVICE_DELETED says when it is gone: on microvm and for USB before the reply, for PCI when the
    guest has let go of it.

    Errors: GenericError when there is no such device or it cannot be unplugged.
    """

    id: str


class NetdevAdd(Command[Empty], name="netdev_add"):
    """Add a network back end. On microvm `id` is also the `id` of the device to come.

    Errors: GenericError when the id is taken, the tap cannot be opened, or members contradict each other.
    """

    id: str = member(max_length=255)
    ifname: str | None = member(default=None, doc="name of a tap")
    fd: str | None = member(default=None, doc="a descriptor: its name from `getfd`, or its number")
    fds: str | None = member(default=None, doc="descriptors of a multi-queue tap, separated by `:`")
    vhost: bool | None = member(default=None, doc="use the host kernel's vhost-net")
    vhostfd: str | None = member(default=None)
    vhostfds: str | None = member(default=None)
    type: str | None = member(default=None, doc="`vhost-user` or `user`, or a tap whatever else it says")
    queues: u16 | None = member(default=None, doc="pairs of queues, 1 to 16")
    chardev: str | None = member(default=None, doc="the socket of a vhost-user process")
    tcp_ports: str | None = member("tcp-ports", default=None, doc="type `user`: ports of the host that lead to the guest's")
    udp_ports: str | None = member("udp-ports", default=None, doc="type `user`: the same for UDP")
    script: str | None = member(default=None, doc="never run")
    downscript: str | None = member(default=None, doc="never run")
    dnssearch: str | None = member(default=None, doc="accepted, not used")


class NetdevDel(
    Command[Empty], name="netdev_del", machines=Machines.MICROVM | Machines.STANDARD, refusal="netdev_del not support yet"
):
    """Remove a network back end. On microvm `device_del` has removed it already; saying so again succeeds once.

    Errors: GenericError when there is no such back end or a device uses it.
    """

    id: str


class ChardevPath(Struct):
    """Where a unix socket is."""

    path: str = member(max_length=4096)


class ChardevAddress(Struct):
    """A socket's address."""

    type: Literal["unix"]
    data: ChardevPath


class ChardevSocket(Struct):
    """A socket to connect to."""

    addr: ChardevAddress
    server: bool = member(doc="must be false")


class ChardevBackend(Struct):
    """What is behind a character device."""

    type: Literal["socket"]
    data: ChardevSocket


class ChardevAdd(
    Command[Empty],
    name="chardev-add",
    machines=Machines.MICROVM | Machines.STANDARD,
    refusal="chardev_add not supported yet for microVM",
):
    """Add a character device: a client's unix socket, for `netdev_add` with vhost-user.

    Errors: GenericError when the id is taken.
    """

    id: str = member(max_length=255)
    backend: ChardevBackend


class ChardevRemove(
    Command[Empty],
    name="chardev-remove",
    machines=Machines.MICROVM | Machines.STANDARD,
    refusal="chardev_remove not supported yet for microVM",
):
    """Remove a character device.

    Errors: GenericError when there is no such device or something uses it.
    """

    id: str


class CameradevAdd(
    Command[Empty], name="cameradev_add", machines=Machines.STANDARD, refusal="cameradev_add not supported for MicroVM"
):
    """Add a camera back end.

    Errors: GenericError when the id or the camera is taken, or the path is missing.
    """

    id: str
    driver: Literal["v4l2", "demo"]
    path: str | None = member(default=None, doc="the camera's device file; needed")


class CameradevDel(
    Command[Empty], name="cameradev_del", machines=Machines.STANDARD, refusal="cameradev_del not supported for MicroVM"
):
    """Remove a camera back end.

    Errors: GenericError when there is no such camera.
    """

    id: str


class Getfd(Command[Empty], name="getfd", takes_fds=True):
    """Receive a file descriptor that was passed with this command over a unix socket, and give it a name.

    A name that is in use gets the new descriptor; the old one is closed. When several descriptors come, the last one counts.

    Errors: GenericError when no descriptor came with the command, or when as many as there may be wait for a device already: 256,
    or a quarter of what the process may open.
    """

    fdname: str = member(max_length=255, doc="the name by which `netdev_add` asks for it")
