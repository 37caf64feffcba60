"""Saved state of whole machines, in test mode: what is saved, restored into a fresh machine, and saved again is equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pystratovirt.cmdline import parse
from pystratovirt.vm import VirtualMachine
from vmm_core.errors import StateError
from vmm_core.machine.core import MachineEvent
from vmm_core.state import State, decode, encode

SLOT = 0xF010_0000


def post(event: MachineEvent) -> None:
    raise AssertionError(f"nobody asked for {event}")


@pytest.fixture(params=["microvm", "microvm,acpi=off"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    return [
        *("-machine", request.param, "-mod-test", str(tmp_path / "unused"), "-smp", "2"),
        *("-drive", f"file={tmp_path}/disk,id=d,direct=off,readonly=on", "-device", "virtio-blk-device,drive=d,id=d"),
        *("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r,id=rng"),
        *("-device", "virtio-serial-device,id=vs", "-chardev", f"file,id=c,path={tmp_path}/hvc"),
        *("-device", "virtconsole,chardev=c,id=con", "-serial", f"file,path={tmp_path}/console"),
    ]


@pytest.fixture
def machines(options: list[str]) -> Iterator[tuple[VirtualMachine, VirtualMachine]]:
    with VirtualMachine(parse(options), post) as first, VirtualMachine(parse(options), post) as second:
        first.start()
        second.start()
        yield first, second


def touch(vm: VirtualMachine) -> None:
    """Leave traces in every device that a guest can write to."""
    access = vm.test_access()
    for slot in range(8):
        window = SLOT + slot * 0x200
        for offset, value in (
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, 8),
            (0x80, 0x1000 * slot),
        ):
            access.write(window + offset, value.to_bytes(4, "little"))
    access.write_port(0x3FB, 1, 0x83)
    access.write_port(0x3F8, 1, 0x42)
    access.write_port(0x70, 1, 0x0B)
    access.write_port(0x71, 1, 0x56)
    access.write_port(0x70, 1, 0x40)
    access.write_port(0x71, 1, 0x99)
    vm.machine.press_power_button()
    vm.machine.hypervisor.interrupt_line(5).trigger()


def saved(vm: VirtualMachine) -> dict[str, State]:
    vm.machine.pause()
    return vm.machine.save()


def test_a_machine_is_the_same_after_save_and_restore(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, second = machines
    touch(first)
    states = saved(first)
    assert states != saved(second)
    # Through bytes, as a snapshot has them.
    second.machine.restore({name: decode(encode(state), type(state), name) for name, state in states.items()})
    assert second.machine.save() == states
    assert {f"virtio-mmio{slot}" for slot in range(8)} | {"rtc", "serial", "hypervisor", "vcpu0", "vcpu1"} <= states.keys()


def test_every_component_takes_part_in_reset(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, second = machines
    before = saved(second)
    touch(first)
    first.machine.reset()
    after = saved(first)
    for name in before.keys() - {"rtc", "serial", "hypervisor"}:  # time and CMOS, bytes on the wire, and what the test recorded
        assert after[name] == before[name], name


def test_a_state_of_another_machine_is_refused_by_name(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, _ = machines
    states = saved(first)
    del states["rtc"]
    with pytest.raises(StateError, match="rtc"):
        first.machine.restore(states)


def test_every_component_refuses_another_s_state_by_name(machines: tuple[VirtualMachine, VirtualMachine]) -> None:
    first, _ = machines
    states = saved(first)
    for name in states:
        other = "serial" if name != "serial" else "rtc"
        with pytest.raises(StateError):
            first.machine.restore({**states, name: states[other]})


def test_building_and_closing_a_machine_gives_every_descriptor_back(options: list[str]) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    with VirtualMachine(parse(options), post):
        pass
    before = descriptors()
    for _ in range(5):
        with VirtualMachine(parse(options), post) as vm:
            vm.start()
            touch(vm)
            vm.machine.reset()
    assert descriptors() == before
