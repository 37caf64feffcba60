"""What a vCPU that cannot go on says for itself. Loaded only when one does."""

from __future__ import annotations

from struct import Struct

from vmm_core.hypervisor import ExitReason
from vmm_core.hypervisor.kvm.ioctl import RUN_EXIT

# <linux/kvm.h>, KVM_EXIT_*
_NAMES = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 3: "HYPERCALL", 4: "DEBUG", 5: "HLT", 6: "MMIO", 7: "IRQ_WINDOW_OPEN", 8: "SHUTDOWN",
    9: "FAIL_ENTRY", 10: "INTR", 11: "SET_TPR", 12: "TPR_ACCESS", 16: "NMI", 17: "INTERNAL_ERROR", 18: "OSI", 21: "WATCHDOG",
    23: "EPR", 24: "SYSTEM_EVENT", 26: "IOAPIC_EOI", 27: "HYPERV", 28: "ARM_NISV", 29: "X86_RDMSR", 30: "X86_WRMSR",
    31: "DIRTY_RING_FULL", 32: "AP_RESET_HOLD", 33: "X86_BUS_LOCK", 34: "XEN", 37: "NOTIFY", 39: "MEMORY_FAULT",
}  # fmt: skip
_UNKNOWN, _EXCEPTION, _HLT, _SHUTDOWN, _FAIL_ENTRY, _INTERNAL_ERROR, _SYSTEM_EVENT, _MEMORY_FAULT = 0, 1, 5, 8, 9, 17, 24, 39
_SUBERRORS = {1: "EMULATION", 2: "SIMUL_EX", 3: "DELIVERY_EV", 4: "UNEXPECTED_EXIT_REASON"}  # KVM_INTERNAL_ERROR_*
_EVENTS = {
    1: ("SHUTDOWN", ExitReason.POWER_OFF),
    2: ("RESET", ExitReason.RESET),
    3: ("CRASH", ExitReason.CRASH),
}  # KVM_SYSTEM_EVENT_*

_EXCEPTION_DATA = Struct("<II")  # exception, error_code
_FAIL_ENTRY_DATA = Struct("<QI")  # hardware_entry_failure_reason, cpu
_ERROR_DATA = Struct("<II16Q")  # internal: suberror, ndata, data; system_event: type, ndata, data
_FAULT_DATA = Struct("<QQQ")  # memory_fault: flags, gpa, size


def explain(reason: int, run: memoryview) -> tuple[ExitReason, str]:
    """Return what the exit `reason` asks of the machine, and the words for it. `run` is the vCPU's kvm_run."""
    name = f"KVM_EXIT_{_NAMES.get(reason, reason)}"
    if reason == _SHUTDOWN:
        return ExitReason.SHUTDOWN, f"{name}: triple fault"
    if reason == _SYSTEM_EVENT:
        kind, count, *data = _ERROR_DATA.unpack_from(run, RUN_EXIT)
        event, meaning = _EVENTS.get(kind, (str(kind), ExitReason.CRASH))
        return meaning, f"{name}: KVM_SYSTEM_EVENT_{event}{_words(data[: min(count, 16)])}"
    return ExitReason.CRASH, name + _details(reason, run)


def _details(reason: int, run: memoryview) -> str:
    if reason == _HLT:
        return ": halted with nobody to wake it"
    if reason == _UNKNOWN:
        return f": hardware exit reason {_FAIL_ENTRY_DATA.unpack_from(run, RUN_EXIT)[0]:#x}"
    if reason == _EXCEPTION:
        vector, code = _EXCEPTION_DATA.unpack_from(run, RUN_EXIT)
        return f": exception {vector}, error code {code:#x}"
    if reason == _FAIL_ENTRY:
        why, cpu = _FAIL_ENTRY_DATA.unpack_from(run, RUN_EXIT)
        return f": the processor refused to enter the guest, reason {why:#x} on host CPU {cpu}"
    if reason == _INTERNAL_ERROR:
        suberror, count, *data = _ERROR_DATA.unpack_from(run, RUN_EXIT)
        return f": KVM_INTERNAL_ERROR_{_SUBERRORS.get(suberror, suberror)}{_words(data[: min(count, 16)])}"
    if reason == _MEMORY_FAULT:
        _, address, size = _FAULT_DATA.unpack_from(run, RUN_EXIT)
        return f": {size:#x} bytes at {address:#x}"
    return ": not expected here"


def _words(data: list[int]) -> str:
    return f", data {' '.join(f'{word:#x}' for word in data)}" if data else ""
