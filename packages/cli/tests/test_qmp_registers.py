"""query-vcpu-reg of a machine that has registers: here of a state in the place of KVM's; see tests/lab for the real one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pystratovirt.qmp_handlers import debug
from qmp_protocol.commands.machine import QueryVcpuReg
from qmp_protocol.errors import QmpError
from vmm_core.errors import LifecycleError
from vmm_core.hypervisor.kvm.x86_64 import structs
from vmm_core.hypervisor.kvm.x86_64.state import KvmVcpuState

STATE = KvmVcpuState(
    cpuid=b"",
    mp_state=0,
    regs=structs.REGS.pack(*range(0xA0, 0xA0 + 18)),
    sregs=bytes(structs.SREGS_SIZE),
    fpu=None,
    xsave=None,
    xcrs=None,
    debugregs=bytes(structs.DEBUGREGS_SIZE),
    lapic=bytes(structs.LAPIC_SIZE),
    msrs=((0x10, 5),),
    events=bytes(structs.EVENTS_SIZE),
)


class Server:
    """Remembers handlers."""

    def __init__(self) -> None:
        self.handlers: dict[Any, Callable[..., Any]] = {}

    def handler(self, command: Any, **_: bool) -> Callable[[Any], Any]:
        return lambda function: self.handlers.setdefault(command, function)


def ask(addr: str, vcpu: int, state: Callable[[int], KvmVcpuState] = lambda _: STATE) -> Any:
    server: Any = Server()
    vm = SimpleNamespace(config=SimpleNamespace(test_socket=None), machine=SimpleNamespace(vcpus=[0, 1], vcpu_state=state))
    runtime: Any = SimpleNamespace(vm=vm)
    debug.register(server, runtime)
    return server.handlers[QueryVcpuReg](QueryVcpuReg(addr=addr, vcpu=vcpu), None)


def refusal(*arguments: Any) -> str:
    with pytest.raises(QmpError) as caught:
        ask(*arguments)
    assert caught.value.class_name == "GenericError"
    return caught.value.desc


def test_a_register_is_answered_in_hexadecimal() -> None:
    assert ask("rip", 1) == "B0"
    assert ask("msr:10", 0) == "5"


def test_a_name_that_is_none_is_answered_with_those_that_are() -> None:
    text = refusal("r99", 0)
    assert text.startswith("not supported or arguments error: addr: no register r99; there are: rax, rbx, ")
    assert text.endswith(", tsc, apic:OFFSET, msr:NUMBER")
    assert "\x1b" not in refusal("\x1b[2J", 0)
    assert len(refusal("r" * 60000, 0)) < 2000


def test_the_number_of_another_architecture_s_register_is_answered_in_stratovirt_s_words() -> None:
    assert refusal("603000000013df1a", 0) == "not supported or arguments error"


def test_a_vcpu_that_there_is_not_is_answered_with_those_that_there_are() -> None:
    assert refusal("rip", 2) == "not supported or arguments error: vcpu: 0 to 1"


def test_a_machine_that_has_ended_says_so() -> None:
    def ended(_: int) -> KvmVcpuState:
        raise LifecycleError("the vCPUs of a machine that is in state shutdown have no state")

    assert "in state shutdown" in refusal("rip", 0, ended)
