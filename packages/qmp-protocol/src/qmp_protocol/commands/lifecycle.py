"""Life-cycle commands: start, stop, reset, power, end (reference section 4)."""

from __future__ import annotations

from typing import Literal

from qmp_protocol.schema import Command, Empty, Struct, member


class QmpCapabilities(Command[Empty], name="qmp_capabilities"):
    """Choose capabilities. Optional here; other servers take no command before it.

    This server offers none, so `enable` can only be empty. It may be sent at any time and again.
    """

    enable: list[str] | None = member(default=None, doc="capabilities of the greeting to switch on")


class Quit(Command[Empty], name="quit"):
    """End the process with status 0. The reply comes first, then the event SHUTDOWN, then the end of the stream."""


class Stop(Command[Empty], name="stop"):
    """Stop all vCPUs. The event STOP comes before the reply.

    A machine that is paused stays so, and there is no event. (StratoVirt 2.4.0 answers that with an error without a text.)

    Errors: GenericError when the machine has ended or failed.
    """


class Cont(Command[Empty], name="cont"):
    """Let all vCPUs run on. The event RESUME comes before the reply.

    A machine that runs goes on, and there is no event. (StratoVirt 2.4.0 answers that with an error without a text, and also when
    another process has taken the lock of a drive's file meanwhile.)

    Errors: GenericError when the machine has ended or failed.
    """


class SystemPowerdown(Command[Empty], name="system_powerdown"):
    """Press the power button. The event POWERDOWN follows the reply; the guest decides what to do.

    A microvm without ACPI has no button, and ends.

    Errors: GenericError when the machine has ended.
    """


class SystemReset(Command[Empty], name="system_reset"):
    """Reset the machine. The event RESET follows the reply.

    A microvm without ACPI ends instead.

    Errors: GenericError when the machine has ended.
    """


class StatusInfo(Struct):
    """Whether the machine runs."""

    running: bool = member(doc="whether vCPUs run")
    singlestep: bool = member(default=False, doc="always false")
    status: Literal["running", "paused", "debug"] = member(doc="`running`, `paused`, or `debug` for any other state")


class QueryStatus(Command[StatusInfo], name="query-status"):
    """Say whether the machine runs."""
