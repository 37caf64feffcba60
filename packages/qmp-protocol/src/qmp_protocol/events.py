"""Every event of StratoVirt, in the order of its `query-events` (reference section 2)."""

from __future__ import annotations

from qmp_protocol.schema import Machines, Notification, member, u64


class Shutdown(Notification, name="SHUTDOWN"):
    """The machine has shut down and the process is about to end."""

    guest: bool = member(doc="whether the guest did it")
    reason: str = member(doc="`host-qmp-quit`, `guest-shutdown`, or `Guest shutdown by signal N`")


class Reset(Notification, name="RESET"):
    """The machine was reset."""

    guest: bool = member(default=True, doc="always true, also after `system_reset`")


class Stopped(Notification, name="STOP"):
    """The vCPUs stopped."""


class Resume(Notification, name="RESUME"):
    """The vCPUs run again."""


class Powerdown(Notification, name="POWERDOWN"):
    """The power button was pressed."""


class CpuResize(Notification, name="CPU_RESIZE", machines=Machines.Q35):
    """The guest was told that a CPU comes or goes."""


class DeviceDeleted(Notification, name="DEVICE_DELETED"):
    """A device is gone; its id and its back end are free again."""

    device: str = member(doc="the device's id")
    path: str = member(doc="`/machine/peripheral/ID`; on microvm the bare id")


class BalloonChanged(Notification, name="BALLOON_CHANGED"):
    """The guest's memory target was set, or the guest changed what it holds."""

    actual: u64 = member(doc="bytes that the guest has")


EVENTS: tuple[type[Notification], ...] = (Shutdown, Reset, Stopped, Resume, Powerdown, CpuResize, DeviceDeleted, BalloonChanged)
