"""From the declaration of a character device to its open back end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt.cmdline.backends import FileChardev, PtyChardev, StdioChardev
from vmm_core.devices import chardev as backends

if TYPE_CHECKING:
    from collections.abc import Callable

    from pystratovirt.cmdline.backends import Chardev
    from vmm_core.devices.chardev import CharBackend


def open_chardev(chardev: Chardev, report: Callable[[str], None]) -> CharBackend:
    """Open a character device; its user closes it. `report` gets sentences for people. Raises VmmError or OSError."""
    if isinstance(chardev, StdioChardev):
        return backends.StdioBackend(report)
    if isinstance(chardev, FileChardev):
        return backends.FileBackend(chardev.path, report)
    if isinstance(chardev, PtyChardev):
        return backends.PtyBackend(report)
    from vmm_core.devices.chardev_socket import listen_tcp, listen_unix

    if chardev.path is not None:
        return listen_unix(chardev.path, report)
    assert chardev.port is not None  # the command line has either
    return listen_tcp(chardev.host, chardev.port, report)
