"""vCPUs of a few instructions on whatever KVM this host has, emulating ones included. Linux guests are the lab's."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

from kvm_guest import LOOP, MMIO, PATIENCE, PORT, Guest, flat_mode, kvm_trouble, real_mode
from vmm_core.errors import HypervisorError, LifecycleError, StateError
from vmm_core.hypervisor import ExitReason
from vmm_core.hypervisor.kvm.vcpu import KICK
from vmm_core.state import decode, encode
from vmm_core.topology import CpuTopology

pytestmark = pytest.mark.skipif(bool(kvm_trouble()), reason=kvm_trouble())

OUT_AL = bytes((0xE6, PORT))
OUT_EAX = bytes((0xE7, PORT))  # 32-bit code

# 32-bit code: count in EBX and send every number, for ever
COUNT = b"\x89\xd8" + OUT_EAX + b"\x43\xeb\xf9"  # mov eax, ebx; out PORT, eax; inc ebx; jmp


@pytest.fixture
def guest() -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def make(*args: Any, **kwargs: Any) -> Guest:
        guests.append(Guest(*args, **kwargs))
        return guests[-1]

    yield make
    for made in guests:
        made.close()


def moffs(opcode: bytes, address: int) -> bytes:
    return opcode + address.to_bytes(4, "little")


def test_port_accesses_reach_the_bus_with_their_size_and_value(guest: Callable[..., Guest]) -> None:
    code = b"\xe6\x10\xe7\x12\x66\xe7\x14" + b"\xe4\x11\xe6\x10\xe5\x12\xe7\x12\x66\xe5\x14\x66\xe7\x14"
    g = guest(code + LOOP, real_mode(rax=0x44434241)).run()
    assert [g.next() for _ in range(3)] == [
        ("port", "write", 0, 1, 0x41),
        ("port", "write", 2, 2, 0x4241),
        ("port", "write", 4, 4, 0x44434241),
    ]
    for offset, size, value in ((1, 1, 0x11), (2, 2, 0x2211), (4, 4, 0x44332211)):
        assert g.next() == ("port", "read", offset, size)
        assert g.next()[-1] == value  # what the guest got, sent back


def test_a_vcpu_whose_device_asks_for_a_pause_runs_no_further_instruction(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xe6\x10\xe6\x11" + LOOP, cpus=2)  # out 0x10, al; out 0x11, al
    write = g.device.write

    def stop_all(offset: int, size: int, value: int) -> None:
        write(offset, size, value)
        if offset == 0:
            for vcpu in g.vcpus:
                vcpu.request_pause()

    g.device.write = stop_all  # type: ignore[method-assign]
    for vcpu in g.vcpus:
        vcpu.start()
    g.vcpus[0].resume()
    assert g.next()[2] == 0
    assert g.vcpus[0].wait_paused(PATIENCE)
    assert g.device.events.empty()
    g.vcpus[0].resume()
    assert g.next()[2] == 1


def test_string_accesses_come_element_by_element(guest: Callable[..., Guest]) -> None:
    # mov cx, 5; mov si, 0x2000; mov di, 0x3000; mov dx, PORT; rep outsb; mov cx, 3; rep insw; out PORT+1, al
    code = b"\xb9\x05\0\xbe\0\x20\xbf\0\x30\xba\x10\0\xf3\x6e\xb9\x03\0\xf3\x6d\xe6\x11"
    g = guest(code + LOOP)
    g.memory.write(0x2000, b"hello")
    g.run()
    assert bytes(g.next()[-1] for _ in range(5)) == b"hello"
    assert [g.next() for _ in range(3)] == [("port", "read", 0, 2)] * 3
    assert g.next()[2] == 1
    assert g.memory.read(0x3000, 8) == b"\x11\x22" * 3 + bytes(2)


def test_memory_accesses_reach_the_bus_with_their_size_and_value(guest: Callable[..., Guest]) -> None:
    writes = moffs(b"\xa2", MMIO) + moffs(b"\x66\xa3", MMIO + 2) + moffs(b"\xa3", MMIO + 4)
    read = moffs(b"\xa1", MMIO + 8) + OUT_EAX + b"\x31\xc0" + moffs(b"\xa0", MMIO + 1) + OUT_EAX
    g = guest(writes + read + LOOP, flat_mode(rax=0x84838281)).run()
    assert [g.next() for _ in range(3)] == [
        ("mmio", "write", 0, 1, 0x81),
        ("mmio", "write", 2, 2, 0x8281),
        ("mmio", "write", 4, 4, 0x84838281),
    ]
    assert [g.next() for _ in range(4)] == [
        ("mmio", "read", 8, 4),
        ("port", "write", 0, 4, 0x44332211),
        ("mmio", "read", 1, 1),
        ("port", "write", 0, 4, 0x11),
    ]


def test_an_access_across_a_page_end_comes_in_pieces_that_the_bus_knows(guest: Callable[..., Guest]) -> None:
    g = guest(moffs(b"\xa3", MMIO + 0xFFD) + moffs(b"\xa1", MMIO + 0xFFD) + OUT_EAX + LOOP, flat_mode(rax=0x44434241)).run()
    written: dict[int, int] = {}
    while (event := g.next())[1] == "write":
        name, _, offset, size, value = event
        assert (name, size in (1, 2, 4)) == ("mmio", True)
        written |= {offset + i: value >> 8 * i & 0xFF for i in range(size)}
    assert written == {0xFFD: 0x41, 0xFFE: 0x42, 0xFFF: 0x43, 0x1000: 0x44}
    sizes = [event[3]]
    while (event := g.next())[1] == "read":
        sizes.append(event[3])
    assert sum(sizes) == 4
    assert event[:4] == ("port", "write", 0, 4)


def test_an_access_that_nothing_answers_reads_as_all_ones(guest: Callable[..., Guest]) -> None:
    code = moffs(b"\xa1", 0xE000_0000) + OUT_EAX + b"\x31\xc0\xe4\x99" + OUT_EAX  # mov eax, [hole]; xor eax, eax; in al, 0x99
    g = guest(code + LOOP, flat_mode()).run()
    assert [g.next()[-1], g.next()[-1]] == [0xFFFF_FFFF, 0xFF]


def test_the_thread_has_the_name_and_number_that_clients_look_for(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP, cpus=2)
    assert [vcpu.thread_id for vcpu in g.vcpus] == [0, 0]
    g.run()
    names = {int(path.name): (path / "comm").read_text() for path in Path("/proc/self/task").iterdir()}
    assert [names[vcpu.thread_id] for vcpu in g.vcpus] == ["CPU 0/Kvm\n", "CPU 1/Kvm\n"]


def test_a_vcpu_starts_paused(guest: Callable[..., Guest]) -> None:
    g = guest(OUT_AL + LOOP)
    g.vcpus[0].start()
    assert g.vcpus[0].wait_paused(PATIENCE)
    assert g.device.events.empty()
    g.resume()
    assert g.next()[0] == "port"


def test_no_access_is_lost_or_doubled_by_pausing(guest: Callable[..., Guest]) -> None:
    g = guest(COUNT, flat_mode()).run()
    expected = 0
    for _ in range(50):
        assert g.next()[-1] == expected
        expected += 1
        g.pause()
        while not g.device.events.empty():
            assert g.next()[-1] == expected
            expected += 1
        state = g.vcpus[0].save()
        g.vcpus[0].restore(state)
        g.resume()


def test_a_read_that_a_pause_meets_is_complete_in_the_saved_registers(guest: Callable[..., Guest]) -> None:
    g = guest(b"\x31\xc0\xe4\x11" + OUT_EAX + b"\xeb\xf8", flat_mode())  # xor eax, eax; in al, 0x11; out PORT, eax; jmp
    pausing = threading.Event()
    answer = g.device.read

    def read(offset: int, size: int) -> int:
        if not pausing.is_set():
            pausing.set()
            g.vcpus[0].request_pause()  # a device may ask for it in the middle of an access
        return answer(offset, size)

    g.device.read = read  # type: ignore[method-assign]
    g.run()
    assert pausing.wait(PATIENCE)
    assert g.vcpus[0].wait_paused(PATIENCE)
    assert [g.next(), g.device.events.qsize()] == [("port", "read", 1, 1), 0]
    assert "RAX=0000000000000011" in registers(g)
    g.resume()
    assert g.next() == ("port", "write", 0, 4, 0x11)


def test_pausing_twice_and_resuming_twice_is_harmless(guest: Callable[..., Guest]) -> None:
    g = guest(COUNT, flat_mode()).run()
    for _ in range(3):
        g.pause()
        g.pause()
        g.resume()
        g.resume()
        assert g.next()


def test_a_kick_that_comes_before_the_guest_is_entered_is_not_lost(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP).run()
    for _ in range(200):
        g.resume()
        g.pause()


def test_a_waiting_application_processor_can_be_paused(guest: Callable[..., Guest]) -> None:
    g = guest(OUT_AL + LOOP, cpus=4).run()
    assert g.next()
    g.pause()
    g.resume()
    g.pause()


def test_reset_starts_over_with_the_boot_state(guest: Callable[..., Guest]) -> None:
    g = guest(b"\x40" + OUT_AL + LOOP, real_mode(rax=7)).run()  # inc ax
    for _ in range(3):
        assert g.next()[-1] == 8
        g.pause()
        g.vcpus[0].reset()
        g.hypervisor.reset()
        g.resume()


def test_a_saved_vcpu_goes_on_in_another_machine(guest: Callable[..., Guest]) -> None:
    first = guest(COUNT, flat_mode()).run()
    assert first.next()[-1] == 0
    first.pause()
    sent = 1 + first.device.events.qsize()
    state = first.vcpus[0].save()
    state = decode(encode(state), type(state), "CPU 0")
    second = guest(COUNT, flat_mode())
    second.vcpus[0].start()
    second.vcpus[0].restore(state)
    second.resume()
    assert second.next()[-1] == sent


def test_saving_twice_gives_the_same_but_for_the_time(guest: Callable[..., Guest]) -> None:
    g = guest(COUNT, flat_mode()).run()
    g.next()
    g.pause()
    first = g.vcpus[0].save()
    g.vcpus[0].restore(first)
    second = g.vcpus[0].save()
    # the TSC, and Hyper-V's reference counters derived from it
    running = {0x10, 0x4000_0010, 0x4000_0020}
    assert [msr for msr in first.msrs if msr[0] not in running] == [msr for msr in second.msrs if msr[0] not in running]
    for field in ("cpuid", "mp_state", "regs", "sregs", "fpu", "xsave", "xcrs", "debugregs", "lapic", "events"):
        assert getattr(first, field) == getattr(second, field), field


def test_a_state_that_does_not_fit_is_refused_before_anything_changes(guest: Callable[..., Guest]) -> None:
    from dataclasses import replace

    g = guest(LOOP, flat_mode(rbx=5)).run()
    g.pause()
    before = registers(g)
    good = g.vcpus[0].save()
    bad: list[tuple[Any, str]] = [
        (g.hypervisor.vm_state.save(), "CPU 0: expected a state of type KvmVcpuState"),
        (replace(good, regs=good.regs[:-1]), "CPU 0: regs has 143 bytes, expected 144"),
        (replace(good, sregs=b""), "sregs has 0 bytes"),
        (replace(good, lapic=good.lapic * 2), "lapic has 2048 bytes"),
        (replace(good, xsave=None, fpu=None), "CPU 0: .*(XSAVE|fpu)"),
        (replace(good, msrs=((1 << 32, 0),)), "CPU 0: MSR 0x100000000"),
        (replace(good, mp_state=-1), "mp_state -1"),
        (replace(good, cpuid=good.cpuid[:-1]), "cpuid"),
    ]
    for state, message in bad:
        with pytest.raises(StateError, match=message):
            g.vcpus[0].restore(state)
    assert registers(g) == before


def test_state_is_for_paused_vcpus(guest: Callable[..., Guest]) -> None:
    g = guest(OUT_AL + LOOP).run()
    state = None
    assert g.next()
    for action in (g.vcpus[0].save, g.vcpus[0].reset, lambda: g.vcpus[0].restore(state)):
        with pytest.raises(LifecycleError, match="CPU 0 is in the guest"):
            action()


def test_a_vcpu_starts_once(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP).run()
    with pytest.raises(LifecycleError, match="started already"):
        g.vcpus[0].start()


def test_stopping_ends_the_thread_whatever_the_vcpu_is_doing(guest: Callable[..., Guest]) -> None:
    for prepare in (lambda _: None, lambda g: g.vcpus[0].start(), Guest.run, lambda g: (g.run(), g.pause())):
        threads = threading.active_count()
        g = guest(LOOP)
        prepare(g)
        g.vcpus[0].stop()
        g.vcpus[0].stop()
        assert threading.active_count() == threads


def test_a_vcpu_can_neither_stop_nor_await_itself(guest: Callable[..., Guest]) -> None:
    g = guest(OUT_AL + LOOP)
    refusals: list[str] = []

    def write(_offset: int, _size: int, _value: int) -> None:
        for action in (g.vcpus[0].stop, lambda: g.vcpus[0].wait_paused(PATIENCE)):
            try:
                action()
            except LifecycleError as error:
                refusals.append(str(error))
        g.device.events.put(("done",))

    g.device.write = write  # type: ignore[method-assign]
    g.run()
    assert g.next() == ("done",)
    assert refusals == ["CPU 0 cannot stop itself", "CPU 0 cannot wait for itself"]


def test_a_device_that_raises_ends_the_guest_with_a_report_and_not_the_thread(guest: Callable[..., Guest]) -> None:
    g = guest(OUT_AL + LOOP)

    def write(_offset: int, _size: int, _value: int) -> None:
        raise ZeroDivisionError("a bug")

    g.device.write = write  # type: ignore[method-assign]
    g.run()
    index, reason, report = g.exits.get(timeout=PATIENCE)
    assert (index, reason) == (0, ExitReason.CRASH)
    assert "ZeroDivisionError: a bug" in report
    assert "RIP=" in report
    assert g.vcpus[0].wait_paused(PATIENCE)


def test_a_dead_vcpu_stays_out_of_the_guest_until_reset(guest: Callable[..., Guest]) -> None:
    g = guest(OUT_AL + LOOP)
    original = g.device.write

    def write(_offset: int, _size: int, _value: int) -> None:
        raise ZeroDivisionError

    g.device.write = write  # type: ignore[method-assign]
    g.run()
    g.exits.get(timeout=PATIENCE)
    g.device.write = original  # type: ignore[method-assign]
    g.resume()
    assert g.vcpus[0].wait_paused(PATIENCE)
    with pytest.raises(Empty):
        g.exits.get_nowait()
    g.pause()
    g.vcpus[0].reset()
    g.resume()
    assert g.next()[0] == "port"


def test_signals_for_the_process_are_not_for_vcpu_threads(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP).run()
    ordinary = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGPIPE, signal.SIGUSR1}
    assert blocked_signals(g.vcpus[0].thread_id) >= ordinary
    g.pause()
    assert blocked_signals(g.vcpus[0].thread_id) >= {*ordinary, KICK}  # open only in the guest


def blocked_signals(thread_id: int) -> set[int]:
    status = Path(f"/proc/self/task/{thread_id}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    return {number for number in range(1, 65) if mask >> number - 1 & 1}


def test_the_second_vcpu_starts_when_the_first_one_sends_for_it(guest: Callable[..., Guest]) -> None:
    init, sipi = b"\xc7\x05\x00\x03\xe0\xfe\x00\x45\x0c\x00", b"\xc7\x05\x00\x03\xe0\xfe\x02\x46\x0c\x00"  # ICR: all but self
    g = guest(init + sipi + LOOP, flat_mode(), cpus=4)
    # mov eax, 1; cpuid; shr ebx, 24; mov al, bl; out PORT, al
    g.memory.write(0x2000, b"\x66\xb8\x01\0\0\0\x0f\xa2\x66\xc1\xeb\x18\x88\xd8" + OUT_AL + LOOP)
    g.run()
    assert sorted(g.next()[-1] for _ in range(3)) == [1, 2, 3]


def test_apic_ids_leave_room_for_counts_that_are_no_power_of_two(guest: Callable[..., Guest]) -> None:
    topology = CpuTopology(6, 6, sockets=2, cores=3)
    init, sipi = b"\xc7\x05\x00\x03\xe0\xfe\x00\x45\x0c\x00", b"\xc7\x05\x00\x03\xe0\xfe\x02\x46\x0c\x00"
    g = guest(init + sipi + LOOP, flat_mode(), cpus=6, topology=topology)
    g.memory.write(0x2000, b"\x66\xb8\x01\0\0\0\x0f\xa2\x66\xc1\xeb\x18\x88\xd8" + OUT_AL + LOOP)
    g.run()
    assert sorted(g.next()[-1] for _ in range(5)) == [1, 2, 4, 5, 6]


def test_a_vcpu_too_many_is_a_clear_error(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP)
    with pytest.raises(HypervisorError, match=r"vCPU 100000 is one too many: KVM has at most \d+ a machine"):
        g.hypervisor.create_vcpu(100_000, *buses(), g, real_mode())
    with pytest.raises(HypervisorError, match="KVM_CREATE_VCPU: File exists"):
        g.hypervisor.create_vcpu(0, *buses(), g, real_mode())


def test_a_topology_beyond_8_bit_apic_ids_is_a_clear_error() -> None:
    topology = CpuTopology(252, 252, cores=84, threads=3)  # 7 and 2 bits
    g = None
    try:
        with pytest.raises(HypervisorError, match="would have APIC id 256; at most 254 is possible"):
            g = Guest(LOOP, cpus=252, topology=topology)
    finally:
        if g is not None:
            g.close()


def test_nothing_is_left_behind(guest: Callable[..., Guest]) -> None:
    gc.collect()  # what other tests left for it would go in the middle of this one
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    g = guest(OUT_AL + LOOP, cpus=2)
    g.hypervisor.interrupt_line(5)
    g.hypervisor.coalesce(PORT + 8, 1, port=True)
    g.run()
    g.next()
    g.close()
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
    assert "anon_inode:kvm" not in Path("/proc/self/maps").read_text()


def buses() -> tuple[Any, Any]:
    from vmm_core.bus import Bus

    return Bus("ports", 1 << 16), Bus("memory", 1 << 52)


def registers(g: Guest) -> str:
    """Return the registers of the first vCPU as its crash report would show them."""
    return g.vcpus[0].describe()
