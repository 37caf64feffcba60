"""Commands that ask what the server and the machine are (reference section 6)."""

from __future__ import annotations

from typing import Any, Literal

from qmp_protocol.schema import Command, Struct, member, u32


class VersionTriple(Struct):
    """Three parts of a version."""

    major: u32
    minor: u32
    micro: u32


class VersionInfo(Struct):
    """What the server is."""

    qemu: VersionTriple = member(doc="the QEMU version whose schema clients may expect")
    package: str = member(doc="product and version")


class QueryVersion(Command[VersionInfo], name="query-version", strict=False):
    """Say what the server is."""


class CommandName(Struct):
    """The name of a command."""

    name: str


class QueryCommands(Command[list[CommandName]], name="query-commands", strict=False):
    """List every command by its name on the wire."""


class TargetInfo(Struct):
    """What the guest's CPU is."""

    arch: Literal["x86_64", "aarch64"]


class QueryTarget(Command[TargetInfo], name="query-target", strict=False):
    """Say what the guest's CPU is."""


class KvmInfo(Struct):
    """Whether KVM is used."""

    enabled: bool
    present: bool


class QueryKvm(Command[KvmInfo], name="query-kvm", strict=False):
    """Say whether KVM is there and used."""


class MachineInfo(Struct):
    """A machine type."""

    name: str
    cpu_max: u32 = member("cpu-max")
    hotpluggable_cpus: bool = member("hotpluggable-cpus")
    numa_mem_supported: bool = member("numa-mem-supported")
    deprecated: bool


class QueryMachines(Command[list[MachineInfo]], name="query-machines", strict=False):
    """List the machine types."""


class EventName(Struct):
    """The name of an event."""

    name: str


class QueryEvents(Command[list[EventName]], name="query-events", strict=False):
    """List every event."""


class ObjectType(Struct):
    """A type of object."""

    name: str
    parent: str | None = member(default=None, doc="QEMU leaves it out of types that are no device's")


class QomListTypes(Command[list[ObjectType]], name="qom-list-types", strict=False):
    """List the types of devices and objects. Filters are ignored."""


class DeviceProperty(Struct):
    """A property of a device type."""

    name: str
    type: str


class DeviceListProperties(Command[list[DeviceProperty]], name="device-list-properties", strict=False):
    """List properties of a device type. Unknown types are no error."""

    typename: str = ""


class OptionParameter(Struct):
    """A parameter of a command-line option."""

    name: str
    type: Literal["string", "boolean", "number", "size"]
    help: str | None = None


class CommandLineOption(Struct):
    """A command-line option."""

    option: str
    parameters: list[OptionParameter]


class QueryCommandLineOptions(Command[list[CommandLineOption]], name="query-command-line-options", strict=False):
    """List command-line options with their parameters."""

    option: str | None = member(default=None, doc="only this one")


class QueryQmpSchema(Command[list[Any]], name="query-qmp-schema", strict=False):
    """Describe every command, event and type, in the format of QEMU's introspection (`SchemaInfo`)."""


class QueryTpmModels(Command[list[str]], name="query-tpm-models", strict=False):
    """List TPM models. Always empty."""


class QueryTpmTypes(Command[list[str]], name="query-tpm-types", strict=False):
    """List TPM back ends. Always empty."""


class QuerySevCapabilities(Command[Any], name="query-sev-capabilities", strict=False):
    """Say what AMD SEV can do. Always an empty object."""


class QueryGicCapabilities(Command[list[Any]], name="query-gic-capabilities", strict=False):
    """List interrupt controller versions. Always empty."""


class ChardevInfo(Struct):
    """A character device."""

    label: str = member(doc="its id")
    filename: str = member(doc="`pty:` and a path, `unix:` and a path, `tcp:` and an address, `file` or `stdio`")
    frontend_open: bool = member("frontend-open", doc="whether something uses it")


class QueryChardev(Command[list[ChardevInfo]], name="query-chardev", strict=False):
    """List the character devices."""


class QomList(Command[list[Any]], name="qom-list", strict=False):
    """List an object's properties. Always empty."""

    path: str = ""


class QomGet(Command[list[Any]], name="qom-get", strict=False):
    """Read an object's property. Always an empty list."""

    path: str = ""
    property: str = ""
