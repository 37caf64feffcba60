"""A virtual machine in test mode with its main loop on a thread of this process, and a client at its QMP socket."""

from __future__ import annotations

import gc
import json
import socket
import threading
from array import array
from pathlib import Path
from typing import Any, Self

import anyio

from pystratovirt.cmdline import parse
from pystratovirt.cmdline.netdevs import Tap
from pystratovirt.events import EventChannel
from pystratovirt.runtime import Runtime
from pystratovirt.vm import VirtualMachine
from qmp_protocol.framing import Framer
from qmp_server.sockets import listen_unix
from virtio_devices.device import DeviceError
from virtio_devices.net.backend import Backend
from virtio_devices.net.stream import StreamBackend

LIMIT = 60.0  # seconds, for what takes a hundredth of one
SLOT = 0xF010_0000
STATUS, INTERRUPT_STATUS, INTERRUPT_ACK, CONFIG = 0x70, 0x60, 0x64, 0x100


class Refused(Exception):
    """An error reply."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error["desc"])
        self.kind = error["class"]


class RunningVm:
    """Close it at the end. `options` are those of the command line beside the machine's type."""

    def __init__(self, folder: Path, *options: str, machine: str = "microvm") -> None:
        self.folder = folder
        self.events = EventChannel()
        arguments = ["-machine", machine, "-mod-test", str(folder / "unused"), "-m", "128", *options]
        self.vm = VirtualMachine(parse(arguments), self.events.post)
        self.vm.start()
        self.access = self.vm.test_access()
        path = folder / "qmp"
        runtime = Runtime(self.vm, self.events, rate=0)
        listener = listen_unix(str(path))
        self._thread = threading.Thread(target=lambda: anyio.run(runtime.run, [listener]), name="main loop")
        self._thread.start()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT)
        self._socket.connect(str(path))
        self._framer = Framer(1 << 24)
        self._messages: list[Any] = []
        self.read()

    # QMP

    def read(self) -> Any:
        """The next message, whatever it is."""
        while not self._messages:
            self._messages += self._framer.feed(self._socket.recv(65536))
        return self._messages.pop(0)

    def answers(self, command: str, fds: tuple[int, ...] = (), /, **arguments: Any) -> list[Any]:
        """Run a command; every message up to its reply. `_` in the name of an argument stands for `-`."""
        request = {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self._socket.sendmsg([json.dumps(request).encode() + b"\n"], passed)
        messages = [self.read()]
        while "event" in messages[-1]:
            messages.append(self.read())
        return messages

    def run(self, command: str, fds: tuple[int, ...] = (), /, **arguments: Any) -> Any:
        """Run a command and return its result. Raises Refused."""
        reply = self.answers(command, fds, **arguments)[-1]
        if "error" in reply:
            raise Refused(reply["error"])
        return reply["return"]

    def add_drive(self, name: str, path: Path, **more: Any) -> None:
        self.run("blockdev-add", node_name=name, file={"driver": "file", "filename": str(path)}, cache={"direct": False}, **more)

    # The guest's side

    def register(self, slot: int, offset: int, value: int | None = None) -> int:
        """Read a register of a slot, or write it."""
        address = SLOT + 0x200 * slot + offset
        if value is not None:
            self.access.write(address, value.to_bytes(4, "little"))
            return value
        return int.from_bytes(self.access.read(address, 4), "little")

    def drive_slot(self, slot: int) -> None:
        """Be a driver of what is in a slot, which has negotiated VERSION_1 only and uses no queue."""
        for offset, value in ((STATUS, 0), (STATUS, 3), (0x24, 1), (0x20, 1), (STATUS, 11), (STATUS, 15)):
            self.register(slot, offset, value)
        assert self.register(slot, STATUS) == 15

    def capacity(self, slot: int) -> int:
        """Sectors of a disk."""
        return self.register(slot, CONFIG) | self.register(slot, CONFIG + 4) << 32

    def interrupts(self, slot: int) -> int:
        """What the device of a slot wants to tell, which is then told."""
        pending = self.register(slot, INTERRUPT_STATUS)
        self.register(slot, INTERRUPT_ACK, pending)
        return pending

    # The end

    def close(self) -> None:
        self._socket.sendall(b'{"execute":"quit"}\n')
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        self._socket.close()
        self.vm.close()
        self.events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def holdings() -> tuple[list[str], list[str]]:
    """What this process holds: its descriptors, by what they are, and its threads."""
    gc.collect()
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    numbers = [link.partition(":")[0] if link.startswith(("socket:", "pipe:")) else link for link in links]
    return sorted(numbers), sorted(thread.name for thread in threading.enumerate())


def open_pair(netdev: Any, take: Any = None) -> Backend:
    """Stands in for `devices.net.open_netdev`: a descriptor that was passed is one end of a socket pair, a name makes one."""
    assert isinstance(netdev, Tap)
    if netdev.ifname:
        return _Cable(netdev.id)
    fd = take(netdev.descriptors[0])
    if fd is None:
        raise DeviceError(f"{netdev.id}: no descriptor")
    return StreamBackend(netdev.id, socket.socket(fileno=fd))


class _Cable(StreamBackend):
    """A stream that nobody uses the other end of."""

    def __init__(self, name: str) -> None:
        end, self._other = socket.socketpair()
        super().__init__(name, end)

    def close(self) -> None:
        super().close()
        self._other.close()
