"""What happens when KVM says no. The ioctl layer is a fake here, and no KVM is needed."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from kvm_guest import real_mode
from vmm_core.bus import Bus
from vmm_core.errors import HypervisorError, StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.hypervisor import ExitReason
from vmm_core.hypervisor.kvm import KvmHypervisor, ioctl
from vmm_core.hypervisor.kvm import vcpu as vcpu_module
from vmm_core.hypervisor.kvm.system import Kvm
from vmm_core.hypervisor.kvm.vcpu import KICK, KvmVcpu
from vmm_core.hypervisor.kvm.x86_64 import VcpuArch, VmArch, msrs, structs
from vmm_core.topology import CpuTopology

PATIENCE = 60.0
Handler = Callable[[Any], int]


class FakeKvm:
    """Answers ioctls: by a handler of the request's name, otherwise with success. `calls` has the names in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        requests = [value for module in (ioctl, structs) for value in vars(module).values() if isinstance(value, ioctl.Request)]
        self._names = {request.number: request.name for request in requests}
        self.handlers: dict[str, Handler] = {
            "KVM_GET_API_VERSION": lambda _: 12,
            "KVM_CHECK_EXTENSION": lambda _: 64,
            "KVM_GET_VCPU_MMAP_SIZE": lambda _: 3 * mmap.PAGESIZE,
            "KVM_CREATE_VM": lambda _: os.eventfd(0),
            "KVM_CREATE_VCPU": lambda _: os.eventfd(0),
        }

    def __call__(self, _fd: int, number: int, argument: Any = 0) -> int:
        name = self._names[number]
        self.calls.append(name)
        return self.handlers.get(name, lambda _: 0)(argument)

    def fail(self, name: str, reason: int) -> None:
        def refuse(_argument: Any) -> int:
            raise OSError(reason, os.strerror(reason))

        self.handlers[name] = refuse


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> FakeKvm:
    fake = FakeKvm()
    monkeypatch.setattr(ioctl, "_ioctl", fake)
    monkeypatch.setattr(ioctl, "call_with_address", lambda fd, request, address: ioctl.call(fd, request, address & 0xFF))
    return fake


def descriptors(*, settle: bool = False) -> list[str]:
    """Return what this process has open; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_a_host_without_kvm_is_told_so() -> None:
    with pytest.raises(HypervisorError) as caught:
        KvmHypervisor(CpuTopology.flat(1), "/nonexistent/kvm")
    assert str(caught.value) == (
        "Failed to open /nonexistent/kvm: No such file or directory (this host has no KVM, or its module is not loaded)"
    )


def test_a_user_without_permission_is_told_which_group_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HypervisorError, match=r"/dev/kvm: Permission denied \(the user may not use it; .* group kvm\)"):
        Kvm({})


def test_a_file_that_is_not_kvm_is_named() -> None:
    before = descriptors(settle=True)
    with pytest.raises(HypervisorError, match="/dev/null is not KVM: KVM_GET_API_VERSION: Inappropriate ioctl for device"):
        Kvm({}, "/dev/null")
    assert descriptors() == before


def test_an_interface_of_another_age_is_refused(kvm: FakeKvm) -> None:
    kvm.handlers["KVM_GET_API_VERSION"] = lambda _: 11
    with pytest.raises(HypervisorError, match="/dev/null speaks version 11 of the KVM interface; version 12 is needed"):
        Kvm({}, "/dev/null")


def test_missing_capabilities_are_named(kvm: FakeKvm) -> None:
    lacking = {ioctl.CAP_IRQFD, structs.CAP_PIT2}
    kvm.handlers["KVM_CHECK_EXTENSION"] = lambda number: 0 if number in lacking else 1
    before = descriptors(settle=True)
    with pytest.raises(HypervisorError, match=r"^/dev/null lacks KVM_CAP_IRQFD, KVM_CAP_PIT2$"):
        KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    assert descriptors() == before


def test_an_error_names_the_call_and_the_reason(kvm: FakeKvm) -> None:
    kvm.fail("KVM_CREATE_VM", errno.EBUSY)
    with pytest.raises(HypervisorError, match="Failed to create VM in KVM: Device or resource busy"):
        KvmHypervisor(CpuTopology.flat(1), "/dev/null")


@pytest.mark.parametrize(
    "name",
    [
        "KVM_CREATE_IRQCHIP",
        "KVM_SET_GSI_ROUTING",
        "KVM_SET_IDENTITY_MAP_ADDR",
        "KVM_SET_TSS_ADDR",
        "KVM_CREATE_PIT2",
        "KVM_GET_IRQCHIP",
        "KVM_GET_PIT2",
        "KVM_GET_SUPPORTED_CPUID",
        "KVM_GET_MSR_INDEX_LIST",
    ],
)
def test_a_set_up_that_fails_half_way_leaves_nothing_behind(kvm: FakeKvm, name: str) -> None:
    kvm.fail(name, errno.ENOMEM)
    before = descriptors(settle=True)
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    with pytest.raises(HypervisorError, match=f"^{name}: Cannot allocate memory$"):
        hypervisor.interrupt_line(4)
    hypervisor.close()
    assert descriptors() == before


def test_set_up_is_in_the_order_that_kvm_wants_with_memory_first_because_it_waits_behind_the_others(kvm: FakeKvm) -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    memory = GuestMemory([(0, 1 << 20)])
    hypervisor.map_memory(memory)
    hypervisor.interrupt_line(4)
    hypervisor.interrupt_line(5)
    hypervisor.close()
    memory.close()
    made = [name for name in kvm.calls if "GET" not in name and "CHECK" not in name]
    assert made == [
        "KVM_CREATE_VM",
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_CREATE_IRQCHIP",
        "KVM_SET_GSI_ROUTING",
        "KVM_SET_IDENTITY_MAP_ADDR",
        "KVM_SET_TSS_ADDR",
        "KVM_CREATE_PIT2",
        "KVM_IRQFD",
        "KVM_IRQFD",
    ]


@pytest.mark.parametrize("name", ["KVM_CREATE_VCPU", "KVM_GET_SREGS", "KVM_GET_LAPIC", "KVM_SET_CPUID2", "KVM_GET_MSRS"])
def test_a_vcpu_that_cannot_be_made_is_a_clear_error_and_leaves_nothing_behind(kvm: FakeKvm, name: str) -> None:
    kvm.handlers["KVM_GET_MSR_INDEX_LIST"] = lambda data: data.__setitem__(slice(0, 4), b"\1\0\0\0") or 0
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    before = descriptors(settle=True)
    kvm.fail(name, errno.EINVAL)
    with pytest.raises(HypervisorError, match=f"{name}: Invalid argument"):
        hypervisor.create_vcpu(0, Bus("p", 1), Bus("m", 1), Listener(), None)
    assert descriptors() == before
    hypervisor.close()


def test_an_interrupt_line_that_cannot_be_made_leaves_nothing_behind(kvm: FakeKvm) -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    kvm.fail("KVM_IRQFD", errno.EBUSY)
    before = descriptors(settle=True)
    with pytest.raises(HypervisorError, match="KVM_IRQFD: Device or resource busy"):
        hypervisor.interrupt_line(4)
    assert descriptors() == before
    hypervisor.close()


def test_a_message_that_kvm_refuses_changes_nothing(kvm: FakeKvm) -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    hypervisor.interrupt_line(4)
    sent: list[int] = []
    kvm.fail("KVM_SET_GSI_ROUTING", errno.EINVAL)
    with pytest.raises(HypervisorError, match="KVM_SET_GSI_ROUTING"):
        hypervisor.route_message(30, 0xFEE0_0000, 0x40)
    kvm.handlers["KVM_SET_GSI_ROUTING"] = lambda data: sent.append(int.from_bytes(data[:4], "little")) or 0
    hypervisor.route_message(31, 0xFEE0_0000, 0x40)
    hypervisor.route_message(31, 0xFEE0_0000, 0x40)  # nothing new: no call
    hypervisor.unroute_message(31)
    assert sent == [41, 40]
    hypervisor.close()


def test_without_the_capability_writes_are_not_coalesced(kvm: FakeKvm) -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    kvm.handlers["KVM_CHECK_EXTENSION"] = lambda _: 0
    hypervisor.coalesce(0x3F8, 1, port=True)
    assert "KVM_REGISTER_COALESCED_MMIO" not in kvm.calls
    hypervisor.close()


def test_interrupted_calls_are_repeated(kvm: FakeKvm) -> None:
    answers = [errno.EINTR, errno.EINTR, 0]

    def answer(_argument: Any) -> int:
        if reason := answers.pop(0):
            raise OSError(reason, os.strerror(reason))
        return 5

    kvm.handlers["KVM_CREATE_VM"] = answer
    assert ioctl.call(0, ioctl.CREATE_VM) == 5


def test_the_cpuid_buffer_grows_until_the_table_fits(kvm: FakeKvm) -> None:
    tried: list[int] = []

    def supported(data: bytearray) -> int:
        tried.append(int.from_bytes(data[:4], "little"))
        assert len(data) == 8 + 40 * tried[-1]
        if tried[-1] < 700:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        data[:4] = (700).to_bytes(4, "little")
        return 0

    kvm.handlers["KVM_GET_SUPPORTED_CPUID"] = supported
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    hypervisor.interrupt_line(4)
    assert tried == [256, 512, 1024]
    hypervisor.close()


def test_a_cpuid_table_without_end_is_an_error_and_no_loop(kvm: FakeKvm) -> None:
    kvm.fail("KVM_GET_SUPPORTED_CPUID", errno.E2BIG)
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    with pytest.raises(HypervisorError, match="KVM_GET_SUPPORTED_CPUID: Argument list too long"):
        hypervisor.interrupt_line(4)
    hypervisor.close()


class MsrBank:
    """MSRs 0 to 599, of which some cannot be read or written. KVM stops at the first of those."""

    def __init__(self, kvm: FakeKvm, refused: set[int]) -> None:
        self.values = {index: index * 3 for index in range(600) if index not in refused}
        self.read_only: set[int] = set()
        kvm.handlers["KVM_GET_MSRS"] = lambda data: self._each(data, write=False)
        kvm.handlers["KVM_SET_MSRS"] = lambda data: self._each(data, write=True)

    def _each(self, data: bytearray, *, write: bool) -> int:
        count = int.from_bytes(data[:4], "little")
        assert 0 < count < 256
        for i in range(count):
            index, value = structs.MSR_ENTRY.unpack_from(data, 8 + 16 * i)
            if index not in self.values or (write and index in self.read_only):
                return i
            if write:
                self.values[index] = value
            else:
                structs.MSR_ENTRY.pack_into(data, 8 + 16 * i, index, self.values[index])
        return count


@pytest.mark.parametrize("refused", [set(), {0}, {599}, {0, 1, 254, 255, 256, 599}, set(range(600))])
def test_an_msr_that_kvm_refuses_does_not_cost_the_others(kvm: FakeKvm, refused: set[int]) -> None:
    bank = MsrBank(kvm, refused)
    assert msrs.get(0, range(600)) == [(i, i * 3) for i in range(600) if i not in refused]
    assert msrs.put(0, [(i, i + 1) for i in range(600)]) == sorted(refused)
    assert bank.values == {i: i + 1 for i in range(600) if i not in refused}


def test_the_msr_list_is_asked_for_its_length_first(kvm: FakeKvm) -> None:
    offered = [0x10, 0x480, 0x491, 0x492, 0x6E0]

    def index_list(data: bytearray) -> int:
        room = int.from_bytes(data[:4], "little")
        data[:4] = len(offered).to_bytes(4, "little")
        if room < len(offered):
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        data[4:] = struct.pack(f"<{len(offered)}I", *offered)
        return 0

    kvm.handlers["KVM_GET_MSR_INDEX_LIST"] = index_list
    assert msrs.index_list(0) == [0x10, 0x492, 0x6E0]


def test_the_fixed_routes_are_those_of_a_pc() -> None:
    routes = [ioctl.ROUTE_IRQCHIP.unpack(route) for route in VmArch.pins()]
    chips = {0: "master", 1: "slave", 2: "ioapic"}
    by_gsi = {gsi: sorted((chips[chip], pin) for g, _, _, chip, pin in routes if g == gsi) for gsi in range(25)}
    assert by_gsi[0] == [("ioapic", 0), ("master", 0)]
    assert by_gsi[9] == [("ioapic", 9), ("slave", 1)]
    assert by_gsi[16] == [("ioapic", 16)]
    assert by_gsi[23] == [("ioapic", 23)]
    assert by_gsi[24] == []


@pytest.mark.parametrize(("xsave", "xsave2", "size"), [(0, 0, None), (1, 0, 4096), (1, 4096, 4096), (1, 11008, 11008)])
def test_the_floating_point_state_is_of_the_form_that_the_host_has(
    kvm: FakeKvm, xsave: int, xsave2: int, size: int | None
) -> None:
    answers = {structs.CAP_XSAVE: xsave, structs.CAP_XSAVE2: xsave2, structs.CAP_XCRS: xsave}
    kvm.handlers["KVM_CHECK_EXTENSION"] = lambda number: answers.get(number, 64)
    sent: dict[str, bytes] = {}
    for name in ("KVM_SET_FPU", "KVM_SET_XSAVE"):
        kvm.handlers[name] = lambda data, name=name: sent.__setitem__(name, bytes(data)) or 0
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    arch = VcpuArch(hypervisor._system, 0, 0, real_mode(), b"", [])
    arch.load_boot()
    state = arch.save()
    arch.restore(state)
    if size is None:
        assert (state.xsave, state.xcrs, state.fpu) == (None, None, bytes(416))
        assert sent == {"KVM_SET_FPU": bytes(416)}
        arch.load_boot()
        assert sent["KVM_SET_FPU"][128:130] + sent["KVM_SET_FPU"][408:412] == b"\x7f\x03\x80\x1f\0\0"
    else:
        assert (state.xsave, state.fpu) == (bytes(size), None)
        assert sent == {"KVM_SET_XSAVE": bytes(size)}
    hypervisor.close()


def test_an_msr_that_cannot_be_put_back_is_named_unless_it_has_its_value_anyway(kvm: FakeKvm) -> None:
    bank = MsrBank(kvm, set())
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    arch = VcpuArch(hypervisor._system, 0, 0, real_mode(), b"", [5, 6, 7])
    state = arch.save()
    bank.read_only = {6}
    arch.restore(state)
    bank.values = {5: 0, 6: 1, 7: 0}
    with pytest.raises(StateError, match=r"^CPU 0: this host cannot hold MSR 0x6=0x12$"):
        arch.restore(state)
    assert bank.values == {5: 15, 6: 1, 7: 21}  # it did not cost the others
    hypervisor.close()


def test_the_deadline_is_put_back_after_every_other_msr(kvm: FakeKvm) -> None:
    order: list[int] = []

    def put(data: bytearray) -> int:
        entries = list(structs.MSR_ENTRY.iter_unpack(memoryview(data)[8:]))
        order.extend(index for index, _ in entries)
        return len(entries)

    kvm.handlers["KVM_SET_MSRS"] = put
    kvm.handlers["KVM_GET_MSRS"] = lambda data: int.from_bytes(data[:4], "little")
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    arch = VcpuArch(hypervisor._system, 0, 0, real_mode(), b"", [0x6E0, 0x10, 0x174])
    arch.restore(arch.save())
    assert order == [0x10, 0x174, 0x6E0]
    assert kvm.calls.index("KVM_SET_LAPIC") < kvm.calls.index("KVM_SET_MSRS") < kvm.calls.index("KVM_SET_VCPU_EVENTS")
    hypervisor.close()


def test_a_boot_register_that_kvm_refuses_names_the_vcpu(kvm: FakeKvm) -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    arch = VcpuArch(hypervisor._system, 0, 7, real_mode(), b"", [])
    kvm.fail("KVM_SET_SREGS", errno.EINVAL)
    with pytest.raises(HypervisorError, match=r"^CPU 7: KVM_SET_SREGS: Invalid argument$"):
        arch.load_boot()
    hypervisor.close()


def test_only_the_first_vcpu_runs_at_boot(kvm: FakeKvm) -> None:
    states: list[bytes] = []
    kvm.handlers["KVM_SET_MP_STATE"] = lambda data: states.append(bytes(data)) or 0
    hypervisor = KvmHypervisor(CpuTopology.flat(2), "/dev/null")
    for index in (0, 1):
        VcpuArch(hypervisor._system, 0, index, real_mode(), b"", []).load_boot()
    assert states == [b"\0\0\0\0", b"\1\0\0\0"]  # RUNNABLE, UNINITIALIZED
    hypervisor.close()


def test_the_local_apic_starts_with_the_pic_on_lint0_and_nmi_on_lint1(kvm: FakeKvm) -> None:
    sent: list[bytes] = []

    def fresh(data: bytearray) -> int:
        data[0x350:0x354] = data[0x360:0x364] = (0x1_0000).to_bytes(4, "little")  # masked
        return 0

    kvm.handlers["KVM_GET_LAPIC"] = fresh
    kvm.handlers["KVM_SET_LAPIC"] = lambda data: sent.append(bytes(data)) or 0
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    VcpuArch(hypervisor._system, 0, 0, real_mode(), b"", []).load_boot()
    assert sent[0][0x350:0x354] == (0x1_0700).to_bytes(4, "little")
    assert sent[0][0x360:0x364] == (0x1_0400).to_bytes(4, "little")
    hypervisor.close()


def test_guests_without_the_paravirtual_clock_do_not_mind_its_pause(kvm: FakeKvm) -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1), "/dev/null")
    kvm.handlers["KVM_GET_VCPU_MMAP_SIZE"] = lambda _: 4096
    kvm.fail("KVM_KVMCLOCK_CTRL", errno.EINVAL)
    hypervisor.pause_clock()
    hypervisor._arch.resume_clock([0, 1])
    assert kvm.calls.count("KVM_KVMCLOCK_CTRL") == 2
    hypervisor.close()


def test_hosts_of_another_architecture_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = os.uname_result(("Linux", "host", "6.1", "1", "riscv64"))
    monkeypatch.setattr(os, "uname", lambda: names)
    with pytest.raises(HypervisorError, match="machines of riscv64 hosts are not supported yet"):
        KvmHypervisor(CpuTopology.flat(1))


# The run loop, with a script in place of a guest


class Listener:
    def __init__(self) -> None:
        self.exits: Queue[tuple[int, ExitReason, str]] = Queue()

    def vcpu_exited(self, index: int, reason: ExitReason, report: str) -> None:
        self.exits.put((index, reason, report))


class Registers:
    """The architecture's side of a vCPU whose state nobody looks at."""

    def load_boot(self) -> None:
        pass

    def describe(self) -> str:
        return "RIP=fake"


class Memory:
    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        return 0x8877665544332211 & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


class Script:
    """A vCPU whose KVM_RUN returns what it is told, and then stays in the guest until it is kicked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Callable[[memoryview], None]] = []
        self._fd = os.memfd_create("kvm_run")
        os.ftruncate(self._fd, 3 * mmap.PAGESIZE)
        self._map = mmap.mmap(self._fd, 3 * mmap.PAGESIZE)
        self.run = memoryview(self._map)
        self.device, self.listener = Memory(), Listener()
        self._ticker = threading.Event()
        pio, mmio = Bus("ports", 1 << 16), Bus("memory", 1 << 52)
        pio.add(0, 1 << 16, self.device, "all")
        mmio.add(0, 1 << 52, self.device, "all")
        registers: Any = Registers()
        size = 3 * mmap.PAGESIZE
        self.vcpu = KvmVcpu(os.dup(self._fd), 3, size, (pio, mmio), self.listener, registers, lambda: None)
        monkeypatch.setattr(vcpu_module, "ioctl", self._kvm_run)
        monkeypatch.setattr(ioctl, "_ioctl", lambda *_: 0)

    def _kvm_run(self, _fd: int, number: int, _argument: int) -> int:
        assert number == ioctl.RUN.number
        if self.steps:
            self.steps.pop(0)(self.run)
            return 0
        if not self.run[1]:
            signal.sigwait({KICK})
        raise InterruptedError(errno.EINTR, "kicked")

    def exit(self, reason: int, data: bytes = b"") -> None:
        def step(run: memoryview) -> None:
            run[8:12] = reason.to_bytes(4, "little")
            run[32 : 32 + len(data)] = data

        self.steps.append(step)

    def fail(self, number: int) -> None:
        def step(_run: memoryview) -> None:
            raise OSError(number, os.strerror(number))

        self.steps.append(step)

    def play(self) -> None:
        """Run the script to its end and leave the vCPU paused."""
        self.vcpu.start()
        self.vcpu.resume()
        while self.steps and self.listener.exits.empty():
            self._ticker.wait(0.001)
        self.vcpu.request_pause()
        assert self.vcpu.wait_paused(PATIENCE)

    def close(self) -> None:
        self.vcpu.stop()
        self.run.release()
        self._map.close()
        os.close(self._fd)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    made = Script(monkeypatch)
    yield made
    made.close()


def mmio(address: int, data: int, length: int, *, write: bool) -> bytes:
    return struct.pack("<QQIB", address, data, length, write)


def test_a_memory_access_of_8_bytes_is_one_access(script: Script) -> None:
    script.exit(6, mmio(0x1000, 0x8877665544332211, 8, write=True))
    script.exit(6, mmio(0x1008, 0, 8, write=False))
    script.play()
    assert script.device.log == [("write", 0x1000, 8, 0x8877665544332211), ("read", 0x1008, 8)]
    assert script.run[40:48].tobytes() == bytes.fromhex("1122334455667788")


def test_bytes_beyond_the_length_of_a_write_are_not_seen(script: Script) -> None:
    script.exit(6, mmio(0x1000, 0xFFFF_FFFF_FFFF_FF42, 1, write=True))
    script.play()
    assert script.device.log == [("write", 0x1000, 1, 0x42)]


@pytest.mark.parametrize("length", [3, 5, 6, 7])
def test_odd_lengths_are_taken_byte_by_byte(script: Script, length: int) -> None:
    script.exit(6, mmio(0x1000, 0x0807060504030201, length, write=True))
    script.exit(6, mmio(0x2000, 0, length, write=False))
    script.play()
    assert script.device.log[:length] == [("write", 0x1000 + i, 1, i + 1) for i in range(length)]
    assert script.device.log[length:] == [("read", 0x2000 + i, 1) for i in range(length)]
    assert script.run[40 : 40 + length].tobytes() == b"\x11" * length


@pytest.mark.parametrize(
    ("reason", "data", "meaning", "words"),
    [
        (8, b"", ExitReason.SHUTDOWN, "KVM_EXIT_SHUTDOWN: triple fault"),
        (24, struct.pack("<II", 1, 0), ExitReason.POWER_OFF, "KVM_EXIT_SYSTEM_EVENT: KVM_SYSTEM_EVENT_SHUTDOWN"),
        (24, struct.pack("<IIQ", 2, 1, 7), ExitReason.RESET, "KVM_SYSTEM_EVENT_RESET, data 0x7"),
        (24, struct.pack("<II", 3, 0), ExitReason.CRASH, "KVM_SYSTEM_EVENT_CRASH"),
        (24, struct.pack("<II", 99, 0), ExitReason.CRASH, "KVM_SYSTEM_EVENT_99"),
        (5, b"", ExitReason.CRASH, "KVM_EXIT_HLT: halted with nobody to wake it"),
        (9, struct.pack("<QI", 0x80000021, 1), ExitReason.CRASH, "KVM_EXIT_FAIL_ENTRY: .* reason 0x80000021 on host CPU 1"),
        (17, struct.pack("<IIQQ", 1, 2, 5, 6), ExitReason.CRASH, "INTERNAL_ERROR: KVM_INTERNAL_ERROR_EMULATION, data 0x5 0x6"),
        (17, struct.pack("<II", 77, 0xFFFF_FFFF), ExitReason.CRASH, "KVM_INTERNAL_ERROR_77, data( 0x[0-9a-f]+){16}\n"),
        (0, struct.pack("<Q", 0x33), ExitReason.CRASH, "KVM_EXIT_UNKNOWN: hardware exit reason 0x33"),
        (1, struct.pack("<II", 14, 2), ExitReason.CRASH, "KVM_EXIT_EXCEPTION: exception 14, error code 0x2"),
        (39, struct.pack("<QQQ", 0, 0x5000, 0x1000), ExitReason.CRASH, "KVM_EXIT_MEMORY_FAULT: 0x1000 bytes at 0x5000"),
        (4, b"", ExitReason.CRASH, "KVM_EXIT_DEBUG: not expected here"),
        (12345, b"", ExitReason.CRASH, "KVM_EXIT_12345: not expected here"),
    ],
)
def test_an_exit_that_ends_the_guest_is_reported_with_registers(
    script: Script, reason: int, data: bytes, meaning: ExitReason, words: str
) -> None:
    script.exit(reason, data)
    script.play()
    index, told, report = script.listener.exits.get(timeout=PATIENCE)
    assert (index, told) == (3, meaning)
    assert re.search(words, report), report
    assert report.endswith("\nRIP=fake")


def test_an_error_of_kvm_run_is_reported_with_its_reason(script: Script) -> None:
    script.fail(errno.EFAULT)
    script.play()
    assert script.listener.exits.get(timeout=PATIENCE)[1:] == (ExitReason.CRASH, "KVM_RUN: Bad address\nRIP=fake")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "a disk"), HypervisorError("a route"), ZeroDivisionError("a bug")])
def test_an_error_that_escapes_a_device_is_told_with_its_story(
    script: Script, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def write(_offset: int, _size: int, _value: int) -> None:
        raise error

    monkeypatch.setattr(script.device, "write", write)
    script.exit(6, mmio(0x1000, 1, 1, write=True))
    script.exit(6, mmio(0x1001, 1, 1, write=True))  # the rest of the same access
    script.play()
    _, meaning, report = script.listener.exits.get(timeout=PATIENCE)
    assert meaning is ExitReason.CRASH
    assert report.startswith("error in a device:\nTraceback")
    assert str(error) in report
    assert script.steps == []  # KVM was let complete the access
    assert script.run[1] == 0


def test_a_system_without_room_for_a_thread_is_an_error_of_start(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HypervisorError, match="CPU 3: can't start new thread"):
            script.vcpu.start()


def test_what_is_no_exit_is_passed_over(script: Script) -> None:
    script.fail(errno.EAGAIN)  # an application processor has been woken
    script.fail(errno.EINTR)  # a signal that was none of ours
    script.exit(10)  # KVM_EXIT_INTR
    script.exit(6, mmio(0x1000, 1, 1, write=True))
    script.play()
    assert script.device.log == [("write", 0x1000, 1, 1)]
    assert script.listener.exits.empty()


def test_registers_that_cannot_be_read_do_not_cost_the_report(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Registers) -> str:
        raise ioctl.KvmError("KVM_GET_REGS", errno.EIO)

    monkeypatch.setattr(Registers, "describe", refuse)
    script.exit(8)
    script.play()
    report = script.listener.exits.get(timeout=PATIENCE)[2]
    assert report == "KVM_EXIT_SHUTDOWN: triple fault\nregisters cannot be read: KVM_GET_REGS: Input/output error"


def test_a_device_that_never_returns_makes_stopping_an_error_and_no_hang(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu_module, "_STOP_LIMIT", 0.01)
    inside, leave = threading.Event(), threading.Event()

    def write(_offset: int, _size: int, _value: int) -> None:
        inside.set()
        leave.wait(PATIENCE)

    monkeypatch.setattr(script.device, "write", write)
    script.exit(6, mmio(0x1000, 1, 1, write=True))
    script.vcpu.start()
    script.vcpu.resume()
    assert inside.wait(PATIENCE)
    with pytest.raises(HypervisorError, match="CPU 3 did not stop within"):
        script.vcpu.stop()
    leave.set()
    monkeypatch.setattr(vcpu_module, "_STOP_LIMIT", PATIENCE)


def test_a_thread_that_cannot_be_set_up_is_an_error_of_start(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(ioctl, "_ioctl", refuse)
    with pytest.raises(HypervisorError, match="CPU 3: KVM_SET_SIGNAL_MASK: Invalid argument"):
        script.vcpu.start()


def test_a_boot_state_that_kvm_refuses_is_an_error_of_start(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Registers) -> None:
        raise HypervisorError("CPU 3: KVM_SET_SREGS: Invalid argument")

    monkeypatch.setattr(Registers, "load_boot", refuse)
    with pytest.raises(HypervisorError, match="KVM_SET_SREGS"):
        script.vcpu.start()
