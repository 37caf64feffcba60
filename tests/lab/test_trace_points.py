"""The trace points of KVM fire, on a machine that is built, reset and taken apart with them switched on; and that of reads of
registers, which a real guest makes.

All others: packages/cli/tests/test_trace_points.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import Qmp, Vmm
from pystratovirt.cmdline import parse
from pystratovirt.trace import POINTS, Registry
from pystratovirt.vm import VirtualMachine
from vmm_core.x86_64.layout import Microvm

PROMPT = r"guest:\S*# "


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


def test_reads_of_registers_are_traced_while_that_is_asked_for(
    start: Callable[..., Vmm],
    qmp: Callable[[], Qmp],
    cloud_kernel: guests.Kernel,
    initrd: Path,
    rootfs: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STRATOVIRT_LOG_LEVEL", "trace")
    vmm = start(
        *("-machine", "microvm", "-m", 256, "-kernel", cloud_kernel.image, "-initrd", initrd),
        *("-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1"),
        *("-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio", "-D", folder / "log"),
    )
    vmm.expect(PROMPT)
    client = qmp()

    def reads() -> int:
        """Lines that a hundred requests, each with an interrupt of its own, bring."""
        before = (folder / "log").read_text().count("[virtio_tpt_read_config]")
        vmm.run("dd if=/dev/vda of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null")
        return (folder / "log").read_text().count("[virtio_tpt_read_config]") - before

    assert reads() == 0
    for _ in range(2):
        client.execute("trace-set-state", {"name": "virtio_tpt_read_config", "enable": True})
        assert reads() >= 50
        client.execute("trace-set-state", {"name": "virtio_tpt_read_config", "enable": False})
        assert reads() == 0
    vmm.send("poweroff")
    assert vmm.wait() == 0


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
