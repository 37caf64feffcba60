"""The exception tree of qmp-protocol: what a peer is told, and what a caller did wrong."""

from __future__ import annotations

from typing import Final

GENERIC_ERROR: Final = "GenericError"
COMMAND_NOT_FOUND: Final = "CommandNotFound"
DEVICE_NOT_ACTIVE: Final = "DeviceNotActive"
DEVICE_NOT_FOUND: Final = "DeviceNotFound"
KVM_MISSING_CAP: Final = "KVMMissingCap"
OPERATION_THROTTLED: Final = "OperationThrottled"  # StratoVirt's own class, for flow control

ERROR_CLASSES: Final = (
    GENERIC_ERROR,
    COMMAND_NOT_FOUND,
    DEVICE_NOT_ACTIVE,
    DEVICE_NOT_FOUND,
    KVM_MISSING_CAP,
    OPERATION_THROTTLED,
)


class QmpProtocolError(Exception):
    """Anything that qmp-protocol raises. The base class of every other error in this package."""


class QmpError(QmpProtocolError):
    """An error reply: `class_name` is one of the error classes above, `desc` is one line for a person.

    A server's handler raises it to answer a command; a client raises it when it receives one.
    """

    def __init__(self, class_name: str, desc: str) -> None:
        super().__init__(f"{class_name}: {desc}")
        self.class_name = class_name
        self.desc = desc


class LocalProtocolError(QmpProtocolError):
    """The caller used a connection in a way its state does not allow. A bug of the caller, never of the peer."""


class SchemaError(QmpProtocolError):
    """A declaration that contradicts itself, or a typed value that does not fit its declaration."""
