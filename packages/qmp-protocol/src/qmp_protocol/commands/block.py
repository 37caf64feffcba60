"""Drives: back ends, queries and internal snapshots (reference sections 6, 8.1, 8.2 and 13.1)."""

from __future__ import annotations

from typing import Any, Literal

from qmp_protocol.schema import Command, Empty, Machines, Struct, member, u32, u64


class BlockdevFile(Struct):
    """The file under a drive."""

    driver: str = member(doc="how the file is reached; `file` is meant whatever it says")
    filename: str = member(max_length=4096, doc="path of a regular file or block device")
    aio: Literal["off", "native", "iouring", "threads"] = member(
        default="off",
        also={"Off": "off", "Native": "native", "IoUring": "iouring", "Threads": "threads", "io_uring": "iouring"},
        doc="the I/O engine; `native` and `iouring` want `cache.direct`",
    )


class BlockdevCache(Struct):
    """How the host caches a drive's file."""

    direct: bool = member(default=True, doc="bypass the host's page cache")
    no_flush: bool | None = member("no-flush", default=None, doc="accepted, not used")


class BlockdevAdd(Command[Empty], name="blockdev-add"):
    """Add a drive that a device can use.

    On microvm `node-name` is also the `id` of the device to come, and at most six drives and networks can wait or be plugged.

    Errors: GenericError when the name is taken, or the file cannot be opened, is no file or block device, is in use, or does
    not suit the I/O engine.
    """

    node_name: str = member("node-name", max_length=255, doc="the drive's id")
    file: BlockdevFile
    cache: BlockdevCache | None = member(default=None)
    read_only: bool = member("read-only", default=False, doc="refuse writes")
    driver: Literal["raw", "qcow2"] = member(default="raw", always=True, doc="image format")
    media: Literal["disk", "cdrom"] = member(default="disk")
    discard: Literal["unmap", "ignore"] = member(
        default="ignore",
        also={"on": "unmap", "yes": "unmap", "true": "unmap", "off": "ignore", "no": "ignore", "false": "ignore"},
        doc="whether the guest's discards reach the file",
    )
    detect_zeroes: Literal["off", "on", "unmap"] = member("detect-zeroes", default="off", doc="what to do with writes of zeroes")
    throttling_iops_total: u64 | None = member(
        "throttling.iops-total", default=None, high=1_000_000, doc="requests a second; absent: no limit"
    )
    throttling_bps_total: u64 | None = member(
        "throttling.bps-total", default=None, high=1 << 40, doc="bytes a second; absent: no limit; not in StratoVirt"
    )
    external_files: Literal["deny", "allow"] = member(
        "external-files",
        default="deny",
        doc="qcow2: whether the backing or data file that the image names may be opened; not in StratoVirt",
    )
    l2_cache_size: str | None = member("l2-cache-size", default=None, doc="qcow2: a number with K, M or G (none: M), at most 32M")
    refcount_cache_size: str | None = member("refcount-cache-size", default=None, doc="qcow2: as `l2-cache-size`")
    encrypt_key_secret: str | None = member(
        "encrypt.key-secret",
        default=None,
        doc="qcow2: the command line's -object secret with the passphrase of an encrypted image; not in StratoVirt",
    )
    backing: str | None = member(default=None, doc="accepted, not used")
    id: str | None = member(default=None, doc="accepted, not used")
    options: str | None = member(default=None, doc="accepted, not used")


class BlockdevDel(
    Command[Empty], name="blockdev-del", machines=Machines.MICROVM | Machines.STANDARD, refusal="blockdev_del not support yet"
):
    """Remove a drive. On microvm `device_del` has removed it already; saying so again succeeds once.

    Errors: GenericError when there is no such drive or a device uses it.
    """

    node_name: str = member("node-name", doc="the drive's id")


class BlockCommit(Command[Empty], name="block-commit", strict=False):
    """Answer a capability probe. Nothing is committed."""


class QueryBlock(Command[list[Any]], name="query-block", strict=False):
    """List the drives, with what QEMU's command of this name tells of each."""


class QueryNamedBlockNodes(Command[list[Any]], name="query-named-block-nodes", strict=False):
    """List the drives' images, with what QEMU's command of this name tells of each."""


class QueryBlockstats(Command[list[Any]], name="query-blockstats", strict=False):
    """List what devices asked of their drives, with the members of QEMU's command that are counted here.

    `rd_bytes`, `wr_bytes`, `rd_operations`, `wr_operations`, `flush_operations` and `unmap_operations`, of each drive that a
    device has.
    """


class QueryBlockJobs(Command[list[Any]], name="query-block-jobs", strict=False):
    """List block jobs. Always empty: there are none."""


_SNAPSHOT_REFUSAL = "internal snapshots are not supported on microvm"


class BlockdevSnapshotInternalSync(
    Command[Empty], name="blockdev-snapshot-internal-sync", machines=Machines.STANDARD, refusal=_SNAPSHOT_REFUSAL
):
    """Make a snapshot inside a qcow2 image that a device uses.

    Errors: DeviceNotFound when no device uses a qcow2 drive of that name; GenericError when the snapshot exists or I/O fails.
    """

    device: str = member(doc="the drive's id")
    name_: str = member("name", doc="the snapshot's name")


class SnapshotInfo(Struct):
    """One internal snapshot."""

    id: str
    name: str
    vm_state_size: u64 = member("vm-state-size", doc="bytes; 0: the image holds no machine state")
    date_sec: u32 = member("date-sec", doc="seconds since the epoch")
    date_nsec: u32 = member("date-nsec")
    vm_clock_sec: u64 | None = member(
        "vm-clock-sec", default=None, doc="how long the machine had run; StratoVirt 2.4.0 leaves it out"
    )
    vm_clock_nsec: u64 = member("vm-clock-nsec", doc="nanoseconds beyond that; without `vm-clock-sec`, all of them")
    icount: u64 | None = member(default=None, doc="2^64 - 1: none; QEMU leaves it out then")


class BlockdevSnapshotDeleteInternalSync(
    Command[SnapshotInfo], name="blockdev-snapshot-delete-internal-sync", machines=Machines.STANDARD, refusal=_SNAPSHOT_REFUSAL
):
    """Delete a snapshot inside a qcow2 image that a device uses, and say what it was.

    Errors: DeviceNotFound when no device uses a qcow2 drive of that name; GenericError when there is no such snapshot or I/O
    fails.
    """

    device: str = member(doc="the drive's id")
    name_: str = member("name", doc="the snapshot's name")
