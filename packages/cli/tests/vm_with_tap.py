"""`python vm_with_tap.py ARGUMENTS…` is the program with a stand-in for the tap `tap0`, which takes root and /dev/net/tun.

In the lab (`tests/lab/test_manual.py`) it is a tap.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from pystratovirt.cmdline.netdevs import Tap
from pystratovirt.devices import net
from pystratovirt.main import main
from virtio_devices.net.backend import Backend
from virtio_devices.net.stream import StreamBackend

_OTHER_ENDS: list[socket.socket] = []


def open_tap0(netdev: Any, take: Any = None) -> Backend:
    """Stands in for `devices.net.open_netdev`."""
    assert isinstance(netdev, Tap)
    assert netdev.ifname == "tap0"
    ours, other = socket.socketpair()
    _OTHER_ENDS.append(other)
    return StreamBackend(netdev.id, ours)


net.open_netdev = open_tap0
sys.exit(main())
