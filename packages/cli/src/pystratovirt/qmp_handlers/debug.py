"""Looking into a running machine: memory map, guest memory, registers, trace points (reference qmp, section 14)."""

from __future__ import annotations

import os
import select
from threading import Lock
from typing import TYPE_CHECKING, cast

from pystratovirt.cmdline.errors import show
from pystratovirt.trace import REGISTER_READS, TraceError, registry
from qmp_protocol.commands.debug import TraceGetState, TraceSetState, TraceState
from qmp_protocol.commands.machine import QueryMem, QueryMemGpa, QueryVcpuReg
from qmp_protocol.errors import GENERIC_ERROR, QmpError
from vmm_core.errors import GuestMemoryError, HypervisorError, VmmError

if TYPE_CHECKING:
    from pystratovirt.runtime import Runtime
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer
    from vmm_core.hypervisor.kvm.x86_64.state import KvmVcpuState

REGISTER_REFUSAL = "not supported or arguments error"  # StratoVirt's words


_printing = Lock()


def register(server: QmpServer, runtime: Runtime) -> None:
    """Register the debugging commands."""
    vm = runtime.vm

    # In a thread: who reads standard output may not do so for a while, and the machine must not wait for him.
    @server.handler(QueryMem, in_thread=True, concurrent=True)
    def query_mem(_: QueryMem, call: Call) -> None:
        machine = vm.machine
        lines = ["memory:"]
        lines += [f"  {region.base:#018x}-{region.base + region.size - 1:#018x} RAM" for region in machine.memory.regions]
        for bus in (machine.mmio, machine.pio):
            lines.append(f"{bus.name}:")
            lines += [f"  {each.base:#018x}-{each.base + each.length - 1:#018x} {each.name}" for each in bus.mappings]
        print_patiently("\n".join(lines) + "\n")

    @server.handler(QueryMemGpa, concurrent=True)
    def query_mem_gpa(arguments: QueryMemGpa, call: Call) -> str:
        digits = arguments.gpa
        if not digits or len(digits.lstrip("0")) > 16 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
            raise QmpError(GENERIC_ERROR, "address not in hexadecimal")
        try:
            # RAM only: reading a device's registers changes the device.
            return f"{int.from_bytes(vm.machine.memory.read(int(digits, 16), 4), 'little'):X}"
        except GuestMemoryError:
            raise QmpError(GENERIC_ERROR, "this gpa does not support query") from None

    @server.handler(QueryVcpuReg)
    def query_vcpu_reg(arguments: QueryVcpuReg, call: Call) -> str:
        if vm.config.test_socket is not None:
            raise QmpError(GENERIC_ERROR, REGISTER_REFUSAL)  # vCPUs of test mode have none
        last = len(vm.machine.vcpus) - 1
        if arguments.vcpu > last:
            raise QmpError(GENERIC_ERROR, f"{REGISTER_REFUSAL}: vcpu: 0 to {last}")
        from vmm_core.hypervisor.kvm.x86_64.registers import names, register  # and what states are made of

        try:
            state = cast("KvmVcpuState", vm.machine.vcpu_state(arguments.vcpu))
        except VmmError as error:
            raise QmpError(GENERIC_ERROR, str(error)) from None
        value = register(state, arguments.addr)
        if value is not None:
            return f"{value:X}"
        if arguments.addr.isalnum() and arguments.addr[:1].isdigit():  # the number of one of aarch64's, as in the manual
            raise QmpError(GENERIC_ERROR, REGISTER_REFUSAL)
        known = ", ".join((*names(state), "apic:OFFSET", "msr:NUMBER"))
        raise QmpError(GENERIC_ERROR, f"{REGISTER_REFUSAL}: addr: no register {show(arguments.addr)}; there are: {known}")

    @server.handler(TraceGetState, concurrent=True)
    def trace_get_state(arguments: TraceGetState, call: Call) -> list[TraceState]:
        try:
            return [TraceState(name=name, state=state) for name, state in registry.states(arguments.name_)]
        except TraceError as error:
            raise QmpError(GENERIC_ERROR, f"Failed to get trace state: {error}") from None

    @server.handler(TraceSetState, concurrent=True)
    def trace_set_state(arguments: TraceSetState, call: Call) -> None:
        try:
            registry.set_states(arguments.name_, arguments.enable)
            vm.machine.show_registers(not registry.is_on(REGISTER_READS))
        except (TraceError, HypervisorError) as error:
            raise QmpError(GENERIC_ERROR, f"Failed to set trace state: {error}") from None


def print_patiently(text: str, fd: int = 1, patience: int = 1000) -> None:
    """Write to standard output as far as somebody reads it: what is not taken within `patience` ms is dropped.

    A write that waits for ever would keep the process from ending.
    """
    # One at a time: of two that see room for one, the other would wait for ever.
    if not _printing.acquire(timeout=patience / 1000):
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        data = memoryview(text.encode())
        while data and poll.poll(patience):
            try:
                count = os.write(fd, data[: select.PIPE_BUF])  # a pipe that is writable takes this much without waiting
            except OSError:  # nobody reads it any more
                return
            data = data[count:]
    finally:
        _printing.release()
