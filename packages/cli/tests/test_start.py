"""What a start takes: every module that is imported before the machine runs makes every start longer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# 3 to 60 ms each, with what they import themselves.
SLOW = {
    "anyio",
    "asyncio",
    "dataclasses",
    "inspect",
    "logging",
    "pathlib",
    "ssl",
    "subprocess",
    "tempfile",
    "typing_extensions",
    "urllib",
}

# Of use to machines only that have a network, many devices, or preallocated memory, or that somebody plugs something into.
UNUSED = {
    "pystratovirt.cmdline.drivers.net",
    "pystratovirt.cmdline.netdevs",
    "pystratovirt.hotplug",
    "vmm_core._prealloc",
    "vmm_core.x86_64.elf",
    "vmm_core.x86_64.io_apic",
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="a disk"),
        pytest.param(
            ["-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r,id=r"], id="entropy"
        ),
        pytest.param(
            [
                "-device",
                "virtio-serial-device,id=p",
                "-chardev",
                "socket,id=c,path={}/c,server,nowait",
                "-device",
                "virtconsole,chardev=c,id=c",
            ],
            id="a console on a socket",
        ),
        pytest.param(["-device", "virtio-balloon-device,id=b"], id="a balloon"),
        pytest.param(["-device", "virtio-vsock-device,id=v,guest-cid=7,path={}/v"], id="sockets"),
        pytest.param(["-D", "{}/log", "-name", "guest"], id="a log"),
    ],
)
def test_a_start_imports_nothing_slow_before_the_machine_runs(tmp_path: Path, options: list[str]) -> None:
    """The event loop of the monitors is the first slow one, and it is imported when the machine runs already."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "t"))
        listener.listen()
        program = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-X",
                    "importtime",
                    "-m",
                    "pystratovirt",
                    "-machine",
                    "microvm",
                    "-m",
                    "128",
                    "-serial",
                    "stdio",
                ),
                *("-drive", f"file={tmp_path}/disk,id=d,direct=off", "-device", "virtio-blk-device,drive=d,id=d"),
                *("-mod-test", str(tmp_path / "t"), "-qmp", f"unix:{tmp_path}/q,server,nowait"),
                *(option.format(tmp_path) for option in options),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "STRATOVIRT_LOG_LEVEL"},
        )
        with program:
            imported = first_imports(program)
            program.terminate()
    assert "pystratovirt.devices.blk" in imported
    assert not {name.partition(".")[0] for name in imported} & SLOW
    assert not {*imported} & UNUSED


def first_imports(program: subprocess.Popen[str]) -> list[str]:
    """The modules that Python reports, up to the event loop. What a module imports is reported before it, and indented."""
    assert program.stderr is not None
    found: list[tuple[int, str]] = []
    said: list[str] = []
    for line in program.stderr:
        if line.startswith("import time:"):
            name = line.rstrip().rpartition("| ")[2]
            depth = len(name) - len(name := name.lstrip())
            if name.startswith("anyio"):
                while found[-1][0] > depth:
                    found.pop()
                return [name for _, name in found]
            found.append((depth, name))
        else:
            said.append(line)
    raise AssertionError(f"it has ended without an event loop: {''.join(said)}")
