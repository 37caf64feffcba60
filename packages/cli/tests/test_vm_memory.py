"""Guest memory as the command line has it: what holds it, who can map it, and where on the host it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pystratovirt.errors import VmError
from running_vm import RunningVm
from vmm_core import _placement

MiB = 1 << 20


def test_memory_of_nodes_lies_where_their_backends_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_placement, "mbind", lambda *call: asked.append(call) or 0)
    backends = (
        "memory-backend-memfd,id=a,size=96M,share=on,host-nodes=0:2,policy=interleave",
        "memory-backend-memfd,id=b,size=32M,share=on,host-nodes=1,policy=bind",
    )
    nodes = ("node,nodeid=1,cpus=0,memdev=b", "node,nodeid=0,cpus=1,memdev=a")
    with RunningVm(tmp_path, "-smp", "2", "-object", *backends, "-numa", *nodes) as vm:
        memory = vm.vm.machine.memory
        assert memory.shared
        assert memory.fd >= 0
        start = memory.host_address(memory.regions[0])
        assert [(address - start, size, list(nodes)) for address, size, _, nodes in asked] == [
            (0, 96 * MiB, [0, 2]),
            (96 * MiB, 32 * MiB, [1]),
        ]


def test_memory_of_a_node_can_be_in_a_file(tmp_path: Path) -> None:
    backend = f"memory-backend-file,id=m,size=128M,mem-path={tmp_path}/ram,share=on"
    with RunningVm(tmp_path, "-object", backend, "-numa", "node,nodeid=0,cpus=0,memdev=m") as vm:
        vm.access.write(64 * MiB, b"guest")
        with (tmp_path / "ram").open("rb") as file:
            file.seek(64 * MiB)
            assert file.read(5) == b"guest"
    assert (tmp_path / "ram").stat().st_size == 128 * MiB


def test_a_node_that_the_host_lacks_ends_the_start_with_its_number(tmp_path: Path) -> None:
    backend = "memory-backend-ram,id=m,size=128M,host-nodes=127,policy=bind"
    with pytest.raises(VmError, match=r"guest RAM on node 127 of the host \(policy bind\): "):
        RunningVm(tmp_path, "-object", backend, "-numa", "node,nodeid=0,cpus=0,memdev=m")
