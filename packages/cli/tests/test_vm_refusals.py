"""Machines that cannot be built as asked, each with the option that is to blame."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

import block_qcow2
from pystratovirt.cmdline import parse
from pystratovirt.errors import VmError
from pystratovirt.main import main
from pystratovirt.vm import VirtualMachine
from running_vm import holdings
from vmm_core import _available
from vmm_core.errors import HypervisorError
from vmm_core.hypervisor.testmode import RecordedLine, RecordingHypervisor

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


def test_memory_that_the_hypervisor_refuses_is_one_line_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise HypervisorError("KVM_SET_USER_MEMORY_REGION: Cannot allocate memory")

    monkeypatch.setattr(RecordingHypervisor, "map_memory", refuse)
    before = holdings()
    assert refusal() == "KVM_SET_USER_MEMORY_REGION: Cannot allocate memory"
    assert holdings() == before


@pytest.mark.parametrize("gsi", [4, 5, 16], ids=["the serial port", "a disk", "the machine itself"])
def test_a_wire_that_the_hypervisor_refuses_is_one_line_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, gsi: int
) -> None:
    make = RecordingHypervisor.interrupt_line

    def refuse(hypervisor: RecordingHypervisor, number: int) -> RecordedLine:
        if number == gsi:
            raise HypervisorError("KVM_IRQFD: Too many open files")
        return make(hypervisor, number)

    monkeypatch.setattr(RecordingHypervisor, "interrupt_line", refuse)
    before = holdings()
    assert refusal("-serial", "file,path=/dev/null") == "KVM_IRQFD: Too many open files"
    assert holdings() == before


def none_left(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_disk_that_there_is_no_descriptor_for_is_blamed_on_its_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_qcow2, "open_disk", none_left)
    assert refusal("-drive", f"id=d,file={tmp_path}/disk") == f"-drive id=d: {tmp_path}/disk: Too many open files"


def test_a_device_that_gets_no_place_in_the_machine_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pystratovirt.vm.MmioTransport", none_left)
    path = tmp_path / "vsock"
    options = ["-mod-test", "unused", "-device", f"virtio-vsock-device,id=v,guest-cid=3,path={path}"]
    before = holdings()
    with pytest.raises(OSError, match="Too many open files"):
        VirtualMachine(parse(options), print)
    assert not path.exists()
    assert holdings() == before


@pytest.mark.parametrize("what", [MemoryError(), OSError(errno.ENFILE, "Too many open files in system")])
def test_a_host_without_room_ends_a_start_with_one_line(
    what: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise what

    monkeypatch.setattr("pystratovirt.events.EventChannel", fail)
    with pytest.raises(SystemExit) as caught:
        main(["-mod-test", "unused"])
    assert caught.value.code == 1
    why = "Cannot allocate memory" if isinstance(what, MemoryError) else "Too many open files in system"
    assert capfd.readouterr().err == f"stratovirt: out of resources: {why}\n"
