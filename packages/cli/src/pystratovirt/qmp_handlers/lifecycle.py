"""Start, stop, reset, power and end over QMP (reference qmp, sections 1.12 and 4).

Not here: what happens when the guest itself asks for these (`pystratovirt.runtime`).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from qmp_protocol.commands.lifecycle import Cont, QueryStatus, Quit, StatusInfo, Stop, SystemPowerdown, SystemReset
from qmp_protocol.errors import GENERIC_ERROR, QmpError
from qmp_protocol.events import Powerdown, Resume, Stopped
from vmm_core.errors import VmmError
from vmm_core.machine.core import VmStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pystratovirt.runtime import Runtime
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer

QUIT_REASON = "host-qmp-quit"
POWERDOWN_REASON = "host-qmp-system-powerdown"  # where there is no button to press
RESET_REASON = "host-qmp-system-reset"


def register(server: QmpServer, runtime: Runtime) -> None:
    """Register the life-cycle commands."""
    machine = runtime.machine

    @server.handler(QueryStatus, concurrent=True)
    def query_status(_: QueryStatus, call: Call) -> StatusInfo:
        status = machine.status
        if status is VmStatus.RUNNING:
            return StatusInfo(running=True, status="running")
        return StatusInfo(running=False, status="paused" if status is VmStatus.PAUSED else "debug")

    @server.handler(Stop)
    def stop(_: Stop, call: Call) -> None:
        with errors_as_replies():
            if machine.pause():
                call.emit(Stopped())

    @server.handler(Cont)
    def cont(_: Cont, call: Call) -> None:
        with errors_as_replies():
            if machine.resume():
                call.emit(Resume())

    @server.handler(SystemReset)
    def system_reset(_: SystemReset, call: Call) -> None:
        expect_alive(runtime)
        call.after_reply(lambda: runtime.reset(guest=False, reason=RESET_REASON))

    @server.handler(SystemPowerdown)
    def system_powerdown(_: SystemPowerdown, call: Call) -> None:
        expect_alive(runtime)
        if machine.press_power_button():
            call.emit_after(Powerdown())
        else:
            call.after_reply(lambda: runtime.end(guest=False, reason=POWERDOWN_REASON))

    @server.handler(Quit)
    def quit_(_: Quit, call: Call) -> None:
        call.after_reply(lambda: runtime.end(guest=False, reason=QUIT_REASON))


def expect_alive(runtime: Runtime) -> None:
    """Refuse what no machine can do that has ended: clients are heard until they know. Raises QmpError."""
    if runtime.machine.status is VmStatus.SHUTDOWN:
        raise QmpError(GENERIC_ERROR, "the machine has ended")


@contextmanager
def errors_as_replies() -> Iterator[None]:
    """A machine that refuses, or a disk that fails, is an error reply."""
    try:
        yield
    except (VmmError, OSError) as error:
        raise QmpError(GENERIC_ERROR, str(error)) from None
