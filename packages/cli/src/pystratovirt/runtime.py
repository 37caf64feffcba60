"""The main loop: what the main thread does while a guest runs. QMP, signals, what the machine asks for, and the test socket.

Loaded after the vCPUs have been started, because the import of an event loop takes longer than everything before it.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import anyio
import anyio.abc

from pystratovirt import log
from pystratovirt.qmp_handlers import register_all
from qmp_protocol.events import Reset, Shutdown, Stopped
from qmp_server.server import QmpServer
from vmm_core.errors import VmmError
from vmm_core.machine.core import EventKind, MachineEvent, VmStatus

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from pystratovirt.events import EventChannel
    from pystratovirt.vm import VirtualMachine
    from qmp_server.sockets import Listener

TEST_CHUNK = 65536
RATE = 100  # StratoVirt's
LOGGED = 4096  # characters of a QMP message


class Runtime:
    """One run of a virtual machine, to its end."""

    def __init__(
        self, vm: VirtualMachine, events: EventChannel, test_socket: socket.socket | None = None, *, rate: int = RATE
    ) -> None:
        """Prepare to run `vm`, which has been started.

        `test_socket` is connected to whoever drives test mode. `rate` is QMP commands a second for each client, 0 for no limit.
        """
        self.vm = vm
        self.machine = vm.machine
        self.status = 0  # of the process
        self._events = events
        self._test_socket = test_socket
        self._ended = False
        self._qmp = QmpServer(rate=rate, traffic=_log_traffic if log.enabled(log.INFO) else None)
        register_all(self._qmp, self)

    async def run(self, listeners: Sequence[Listener]) -> int:
        """Serve until the machine ends; return the process's exit status. Takes the listeners over."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_events)
            if self._test_socket is not None:
                tasks.start_soon(self._serve_test_socket, self._test_socket)
            await self._qmp.serve(listeners)  # returns after end()
            tasks.cancel_scope.cancel()
        return self.status

    # What QMP handlers and the machine ask for, on the main thread

    def end(self, *, guest: bool, reason: str, status: int = 0) -> None:
        """End the guest, tell every client, and let run() return once they know. Once; later calls are ignored."""
        if self._ended:
            return
        self._ended = True
        self.status = status
        log.info(f"the virtual machine ends: {reason}")
        try:
            self.machine.shutdown()
        except Exception as error:  # whatever it is: it must not keep the process from ending
            log.error(_in_words(error))
            self.status = 1
        self._qmp.emit(Shutdown(guest=guest, reason=reason))
        self._qmp.close()

    def reset(self, *, guest: bool, reason: str) -> None:
        """Reset the machine and tell every client; a machine that cannot begin again ends.

        Without ACPI, or for a guest that is told not to look at it, a reset is the end, as on StratoVirt's microvm: its clients
        wait for the process, and have their guests end by one (`reboot=k panic=1`).
        """
        if self._ended:
            return
        if not self.machine.acpi_in_use:
            self.end(guest=guest, reason="guest-shutdown" if guest else reason)
            return
        log.info(f"the virtual machine is reset: {reason}")
        try:
            self.machine.reset()
        except Exception as error:  # whatever it is: half a reset is nothing to go on with
            log.error(f"reset failed: {_in_words(error)}")
            self.end(guest=False, reason="reset-failed", status=1)
        else:
            self._qmp.emit(Reset())

    def fail(self, report: str) -> None:
        """Bring a machine to rest that has lost a vCPU, and tell every client; someone may want to look at it."""
        log.error(report)
        was_running = self.machine.status is VmStatus.RUNNING
        try:
            self.machine.fail()
        except Exception as error:  # all the rest has come to rest
            log.error(_in_words(error))
        if was_running:  # who has stopped it, or heard of a first failure, knows that it stands still
            self._qmp.emit(Stopped())

    async def _watch_events(self) -> None:
        while True:
            await anyio.wait_readable(self._events.fileno())
            for event in self._events.drain():
                self._handle(event)

    def _handle(self, event: MachineEvent | signal.Signals) -> None:
        if isinstance(event, signal.Signals):
            log.info(f"Received kill signal, signal number: {event.value}")
            self.end(guest=False, reason=f"Guest shutdown by signal {event.value}")
        elif self.machine.status is VmStatus.SHUTDOWN:
            return
        elif not self.machine.is_current(event):
            log.info(f"what a guest before the reset asked for is dropped: {event.kind.value}: {event.report}")
        elif event.kind is EventKind.RESET:
            self.reset(guest=True, reason=event.report)
        elif event.kind is EventKind.POWER_OFF:
            log.info(event.report)
            self.end(guest=True, reason="guest-shutdown")
        else:
            self.fail(event.report)

    # Test mode: requests come on a socket that whoever tests listens on

    async def _serve_test_socket(self, sock: socket.socket) -> None:
        from vmm_core.testprotocol import TestProtocol

        protocol = TestProtocol(self.vm.test_access())
        while True:
            await anyio.wait_readable(sock)
            try:
                data = sock.recv(TEST_CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self.end(guest=False, reason="test socket closed", status=1)
                return
            await _send_all(sock, protocol.receive(data))


def _in_words(error: Exception) -> str:
    """Return what to log: the whole story of what is not for a user to put right."""
    if isinstance(error, VmmError | OSError):
        return str(error)
    import traceback

    return "".join(traceback.format_exception(error))


def _log_traffic(direction: str, line: bytes) -> None:
    """Write a message of QMP to the log, as StratoVirt does (reference command-line, section 10), or its beginning."""
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    more = len(text) - LOGGED
    log.info(f"QMP: {direction} {text}" if more <= 0 else f"QMP: {direction} {text[:LOGGED]}... ({more} more)")


async def _send_all(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await anyio.wait_writable(sock)
        except OSError:  # the peer is gone; the next read says so
            return
