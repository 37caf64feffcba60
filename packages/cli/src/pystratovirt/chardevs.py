"""From the declaration of a character device to its open back end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt.cmdline.backends import FileChardev, PtyChardev, StdioChardev
from pystratovirt.cmdline.errors import printable
from vmm_core.errors import ChardevError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pystratovirt.cmdline.backends import Chardev, SocketChardev
    from vmm_core.devices.chardev import CharBackend
    from vmm_core.devices.chardev_socket import SocketListener


def open_chardev(chardev: Chardev, report: Callable[[str], None], warn: Callable[[str], None]) -> CharBackend:
    """Open a character device; its user closes it. `report` gets sentences for people, `warn` those about lost output.

    A socket or pseudo-terminal whose peer comes and goes loses nothing that somebody waits for; that is no warning.

    A listening socket without `nowait` is waited for here: for starts only, and on the main thread. Raises ChardevError.
    """
    if isinstance(chardev, StdioChardev):
        from vmm_core.devices.chardev_terminal import StdioBackend

        return StdioBackend(warn)
    if isinstance(chardev, PtyChardev):
        from vmm_core.devices.chardev_terminal import PtyBackend

        return PtyBackend(lambda text: _announce(chardev.id, text, report))
    if isinstance(chardev, FileChardev):
        from vmm_core.devices.chardev import FileBackend

        return FileBackend(chardev.path, warn)
    if not chardev.server:
        return _connect(chardev, report)
    listener = _listen(chardev, report)
    if not chardev.nowait:
        try:
            _wait(listener, f"unix:{chardev.path}" if chardev.path is not None else f"tcp:{listener.name}")
        except BaseException:
            listener.close()
            raise
    return listener


def _announce(chardev: str, text: str, report: Callable[[str], None]) -> None:
    """Say what whoever starts a machine has to know to use it: in the log, or on standard error when the log leaves it out."""
    from pystratovirt import log
    from pystratovirt.stdio import say

    report(text)
    if not log.enabled(log.INFO):
        say(2, f"stratovirt: chardev {printable(chardev)}: {text}\n")


def _connect(chardev: SocketChardev, report: Callable[[str], None]) -> CharBackend:
    from vmm_core.devices.chardev_client import connect_tcp, connect_unix

    if chardev.path is not None:
        return connect_unix(chardev.path, report, chardev.reconnect)
    return connect_tcp(chardev.host, chardev.port or 0, report, chardev.reconnect)


def _listen(chardev: SocketChardev, report: Callable[[str], None]) -> SocketListener:
    from vmm_core.devices.chardev_socket import listen_tcp, listen_unix

    if chardev.path is not None:
        return listen_unix(chardev.path, report)
    return listen_tcp(chardev.host, chardev.port or 0, report)


def _wait(listener: SocketListener, address: str) -> None:
    """Wait for the first client; a signal that a handler was set up for ends that, as it ends the machine.

    People are told: a start that stands still, and does not say why, looks like one that has failed.
    """
    import os
    import signal

    from pystratovirt.stdio import say

    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        say(2, f"stratovirt: waiting for a client on {printable(address)}\n")
        if not listener.wait(reader):
            raise ChardevError(f"{listener.name}: interrupted while waiting for a client")
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
