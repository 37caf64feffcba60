"""Debugging, display, audio, tracing, the human monitor and test helpers (reference sections 13.2, 14 and 15)."""

from __future__ import annotations

from typing import Any, Literal

from qmp_protocol.schema import Command, Empty, Machines, Struct, member, u64


class VncClient(Struct):
    """Somebody who looks at the screen."""

    host: str = member(doc="address:port")
    family: str
    service: str


class VncInfo(Struct):
    """The VNC server."""

    enabled: bool
    host: str | None = member(default=None, doc="QEMU leaves this and the following out when there is no server")
    family: str | None = member(default=None)
    service: str | None = member(default=None)
    auth: str | None = member(default=None)
    clients: list[VncClient] | None = member(default=None)


class QueryVnc(
    Command[VncInfo], name="query-vnc", machines=Machines.STANDARD, strict=False, refusal="The service of VNC is not supported"
):
    """Describe the VNC server and its clients."""


class DisplayImage(Struct):
    """Where screen shots went."""

    file_dir: str = member("fileDir")
    is_success: bool = member("isSuccess")


class QueryDisplayImage(
    Command[DisplayImage],
    name="query-display-image",
    machines=Machines.STANDARD,
    strict=False,
    refusal="query-display-image is not supported",
):
    """Write a PNG of each active console into `stratovirt-images` under the directory for temporary files."""


class SwitchAudioRecord(
    Command[Empty],
    name="switch-audio-record",
    machines=Machines.STANDARD,
    refusal="switch_audio_record not supported for VM",
):
    """Allow or forbid the scream device to record with the host's microphone."""

    authorized: Literal["on", "off"]


class TraceState(Struct):
    """A trace point and whether it is on."""

    name: str
    state: bool = member(words=("disabled", "enabled"), doc="words as in the manual; StratoVirt 2.4.0 itself sends a boolean")


class TraceGetState(Command[list[TraceState]], name="trace-get-state"):
    """List the trace points whose names match, and whether they are on.

    Errors: GenericError when the pattern is no regular expression.
    """

    name_: str = member("name", doc="a regular expression, found anywhere in a name")


class TraceSetState(Command[Empty], name="trace-set-state"):
    """Switch the trace points whose names match, all of them or none. No match is no error.

    Errors: GenericError when the pattern is no regular expression, or one of the points cannot be switched.
    """

    name_: str = member("name", doc="a regular expression, found anywhere in a name")
    enable: bool


class HumanMonitorCommand(
    Command[Any],
    name="human-monitor-command",
    machines=Machines.MICROVM | Machines.STANDARD,
    refusal="human-monitor-command is not supported yet",
):
    """Run a line of the human monitor: `drive_add`, `drive_del`, `info block|network|snapshots|stats`.

    Errors: GenericError when the line is none of these, and whatever the command meets.
    """

    command_line: str = member("command-line", doc="words separated by single spaces")


class InputEvent(
    Command[Empty],
    name="input_event",
    machines=Machines.STANDARD,
    refusal="input_event: this machine has neither keyboard nor pointer",
    strict=False,
):
    """Press or release a key, or move and click the pointer, as a user would. Without such a device nothing happens.

    Errors: GenericError when the key or the value is malformed.
    """

    key: str = member(doc="`keyboard` or `pointer`")
    value: str = member(doc="`SCANCODE,DOWN` or `X,Y,BUTTONS,DOWN`, decimal")


class UpdateRegion(Command[Empty], name="update_region", machines=Machines.STANDARD, refusal="The micro vm is not supported"):
    """Add or delete a region of guest memory, to test the memory topology.

    Errors: GenericError when the region cannot be added or deleted.
    """

    update_type: Literal["add", "delete"]
    region_type: Literal["io_region", "rom_device_region", "ram_device_region"]
    offset: u64 = member(doc="guest physical address")
    size: u64 = member(high=65535, doc="bytes")
    priority: u64 = member(doc="truncated to 32 bits with a sign")
    read_only_mode: bool | None = member(default=None, doc="ROM device: read from memory")
    ioeventfd: bool | None = member(default=None)
    ioeventfd_data: u64 | None = member(default=None, doc="absent: any value")
    ioeventfd_size: u64 | None = member(default=None)
    device_fd_path: str | None = member(default=None, doc="file behind a ROM or RAM device")
