"""The trace points of KVM fire: on a machine that is built, reset and taken apart with them switched on. No guest runs.

All others: packages/cli/tests/test_trace_points.py.
"""

from __future__ import annotations

from pathlib import Path

from lab import guests
from pystratovirt.cmdline import parse
from pystratovirt.trace import POINTS, Registry
from pystratovirt.vm import VirtualMachine
from vmm_core.x86_64.layout import Microvm


def test_every_point_of_kvm_fires(cloud_kernel: guests.Kernel) -> None:
    lines: list[str] = []
    registry = Registry(POINTS, lines.append)
    registry.set_states("^(kvm|cpu)_", True)
    try:
        run(cloud_kernel.image)
    finally:
        registry.close()
    fired = {line[1:].partition("]")[0] for line in lines}
    wanted = {point.name for point in POINTS if point.name.startswith(("kvm_", "cpu_"))}
    assert wanted - fired <= {"kvm_get_fpu", "kvm_set_fpu"}  # of a host without XSAVE


def run(kernel: Path) -> None:
    """Build a machine that waits for `cont`, do to it what its guest would, and end it."""
    devices = [f"-object rng-random,id=r{n},filename=/dev/urandom -device virtio-rng-device,rng=r{n},id=e{n}" for n in range(12)]
    words = f"-machine microvm -m 256 -S -kernel {kernel} {' '.join(devices)}".split()
    with VirtualMachine(parse(words), lambda _event: None) as vm:
        vm.start()
        vm.machine.press_power_button()
        # A redirection entry of the second I/O APIC (82093AA, section 3.2.4), which is a route of a message.
        registers = Microvm.SECOND_IO_APIC.base
        for index, value in ((0x11, 0), (0x10, 0x30)):
            vm.machine.mmio.write(registers, 4, index)
            vm.machine.mmio.write(registers + 0x10, 4, value)
        vm.machine.reset()
        vm.machine.restore(vm.machine.save())
