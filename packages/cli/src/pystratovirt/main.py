"""The command `stratovirt`: from argv to an exit status.

The order is what clients see (reference command-line, section 7.1): the monitor sockets can be connected to before the machine
is built, and are served once it runs. What takes long to import comes after the vCPUs have started.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import TYPE_CHECKING

from pystratovirt import log
from pystratovirt.cmdline import CommandLineError, fail, parse_or_exit
from pystratovirt.cmdline.errors import printable, show

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import NoReturn

    from pystratovirt.cmdline.backends import Listener as MonitorAddress
    from pystratovirt.cmdline.config import Config
    from pystratovirt.daemon import Daemon
    from pystratovirt.errors import StartError
    from pystratovirt.events import EventChannel
    from qmp_server.sockets import Listener

# How long a thread that comes back from a system call waits for one that runs Python. The default of 5 ms is what a guest would
# wait for an exit while an I/O thread is busy (measured: docs/decisions.md).
SWITCH_INTERVAL = 50e-6  # seconds

# Descriptors that have to be free when the machine starts: what fails from then on, fails with a guest. The event loop takes
# three, the QMP server one, the first client one, going to the background one for a moment, and a module that is imported two.
SPARE = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    gc.disable()  # nothing that is made until the machine runs is garbage, and looking for it takes a tenth of the start
    try:
        return _main(argv)
    except (OSError, MemoryError, ImportError) as error:
        fail(_out_of_resources(error))
    finally:
        gc.enable()


def _main(argv: Sequence[str] | None) -> int:
    config = parse_or_exit(argv)
    try:
        log.setup(config.log_file, wanted=config.log)
    except OSError as error:
        fail(CommandLineError("-D", config.log_file or "", error.strerror or str(error)))
    sys.setswitchinterval(SWITCH_INTERVAL)
    if config.trace:
        from pystratovirt.trace import TraceError, registry

        try:
            registry.enable_from_file(config.trace)
        except TraceError as error:
            fail(CommandLineError("-trace", f"file={show(config.trace)}", str(error).removeprefix(f"{config.trace}: ")))
    from pystratovirt.errors import StartError

    try:
        with contextlib.ExitStack() as stack:
            try:
                return _run(config, stack)
            except StartError as error:
                _give_up(config, error)
            except (OSError, MemoryError, ImportError) as error:
                _give_up(config, _out_of_resources(error))
    except StartError as error:  # of the end: a disk may lack what was written last
        _give_up(config, error)


def _out_of_resources(error: Exception) -> StartError:
    """Return what to say of a shortage that no part of the machine has noticed as its own. Raises any other `error`."""
    from pystratovirt.errors import StartError, shortage

    if why := shortage(error):
        return StartError(f"out of resources: {why}")
    raise error


def _give_up(config: Config, error: StartError) -> NoReturn:
    """Say why there is no machine, before anything is undone: with -daemonize the caller listens only as long.

    Or what went wrong while it was given back.
    """
    if config.log_file:
        log.error(str(error))
    fail(error)


def _run(config: Config, stack: contextlib.ExitStack) -> int:
    daemon: Daemon | None = None
    if config.daemonize:
        from pystratovirt.daemon import daemonize

        daemon = daemonize()
        stack.callback(daemon.close)
    if config.pidfile:
        from pystratovirt.daemon import PidFile

        stack.callback(PidFile(config.pidfile).remove)
    from pystratovirt.events import EventChannel
    from pystratovirt.vm import VirtualMachine

    events = EventChannel()
    stack.callback(events.close)
    events.catch_signals()
    listeners = [_listen(listener, stack) for listener in config.monitors]
    vm = stack.enter_context(VirtualMachine(config, events.post))
    test_socket = None
    if config.test_socket:
        test_socket = stack.enter_context(_connect_test_socket(config.test_socket))
    for where, listener in zip(config.monitors, listeners, strict=True):
        if where.wait:
            _wait_for_client(where, listener, events)
    _check_spare()
    vm.start()
    if daemon:
        daemon.ready()

    import anyio

    from pystratovirt.runtime import Runtime

    log.adopt_logging()
    gc.freeze()  # what is there by now stays
    gc.enable()
    return anyio.run(Runtime(vm, events, test_socket).run, listeners)


def _check_spare() -> None:
    """Raise OSError when the process may not open SPARE files more."""
    spare: list[int] = []
    try:
        while len(spare) < SPARE:
            spare.append(os.dup(2))
    finally:
        for fd in spare:
            os.close(fd)


def _listen(where: MonitorAddress, stack: contextlib.ExitStack) -> Listener:
    from pystratovirt.errors import VmError
    from qmp_server.sockets import listen_tcp, listen_unix

    try:
        listener = listen_unix(where.path) if where.path is not None else listen_tcp(where.host, where.port)
    except OSError as error:
        raise VmError(f"{_option(where)}: {error.strerror or error}") from None
    stack.callback(listener.close)
    return listener


def _wait_for_client(where: MonitorAddress, listener: Listener, events: EventChannel) -> None:
    """Wait until somebody has connected, who is greeted when the machine runs. A signal ends that. Raises VmError."""
    import select

    from pystratovirt.errors import VmError
    from pystratovirt.stdio import say

    say(2, f"stratovirt: waiting for a client on {printable(str(where))}\n")
    watch = select.poll()
    watch.register(listener.socket, select.POLLIN)
    watch.register(events, select.POLLIN)
    if events.fileno() in dict(watch.poll()):
        raise VmError(f"{_option(where)}: interrupted while waiting for a client")


def _option(where: MonitorAddress) -> str:
    return f"-mon chardev={where.chardev}" if where.chardev else f"-qmp {where}"


def _connect_test_socket(path: str) -> socket.socket:
    import socket

    from pystratovirt.errors import VmError

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise VmError(f"-mod-test {path}: {error.strerror or error}") from None
    sock.setblocking(False)
    return sock


if __name__ == "__main__":
    raise SystemExit(main())
