"""Machines that cannot be built as asked, each with the option that is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from pystratovirt.cmdline import parse
from pystratovirt.errors import VmError
from pystratovirt.vm import VirtualMachine
from vmm_core import _available
from vmm_core.errors import HypervisorError
from vmm_core.hypervisor.testmode import RecordingHypervisor

MiB = 1 << 20
KERNEL = b"\xfa\xf4Linux version 6.1.0 (a@b) (gcc 12) #1 SMP\n".ljust(MiB, b"k")


def refusal(*options: str) -> str:
    """Build a machine in test mode, and return the one line that it is refused with."""
    with pytest.raises(VmError) as caught, VirtualMachine(parse(["-m", "128", *options, "-mod-test", "unused"]), print):
        pass
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_cannot_hold_guest_memory_is_blamed_with_its_path() -> None:
    assert refusal("-mem-path", "/nonexistent/x") == (
        "-mem-path /nonexistent/x: cannot open /nonexistent/x for guest RAM: No such file or directory"
    )


def test_memory_that_is_to_be_there_from_the_start_and_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_available, "room", lambda: _available.Room(100 * MiB, "this host"))
    assert refusal("-mem-prealloc") == (
        "-mem-prealloc: 128 MiB of guest RAM cannot be there from the start: this host has 100 MiB"
    )


def test_each_part_of_what_is_booted_has_its_option(tmp_path: Path) -> None:
    kernel, missing = tmp_path / "kernel", tmp_path / "missing"
    kernel.write_bytes(KERNEL)
    assert refusal("-kernel", str(missing)) == f"-kernel: {missing}: cannot open: No such file or directory"
    assert (
        refusal("-kernel", str(kernel), "-initrd", str(missing)) == f"-initrd: {missing}: cannot open: No such file or directory"
    )
    assert refusal("-kernel", str(kernel), "-append", "x" * 3000).startswith("-append: kernel command line: 3")


def test_vcpus_that_the_hypervisor_refuses_are_blamed_on_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise HypervisorError("KVM_CREATE_VCPU: Cannot allocate memory")

    monkeypatch.setattr(RecordingHypervisor, "create_vcpu", refuse)
    (tmp_path / "kernel").write_bytes(KERNEL)
    assert refusal("-kernel", f"{tmp_path}/kernel", "-smp", "3") == "-smp 3: KVM_CREATE_VCPU: Cannot allocate memory"
