"""What KVM keeps for a whole machine: interrupts, doorbells, coalesced writes, dirty pages, clock, chips."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from kvm_guest import LOOP, MMIO, PATIENCE, PORT, Guest, flat_mode, kvm_trouble, real_mode
from vmm_core.clock import MonotonicClock
from vmm_core.directloop import DirectLoop
from vmm_core.errors import HypervisorError, LifecycleError, StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.hypervisor.kvm import KvmHypervisor
from vmm_core.machine.core import MachineEvent
from vmm_core.machine.microvm import Kernel, Microvm
from vmm_core.state import decode, encode
from vmm_core.topology import CpuTopology
from vmm_core.x86_64.layout import Microvm as Layout

pytestmark = pytest.mark.skipif(bool(kvm_trouble()), reason=kvm_trouble())

MiB = 1 << 20
OUT_AL = bytes((0xE6, PORT))
WAIT = b"\xf4\xeb\xfd"  # hlt; jmp
# Both PICs' initialization words: vectors from 0x20 on, IRQ 4 open
PIC = b"\xb0\x11\xe6\x20\xb0\x20\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21\xb0\xef\xe6\x21"
IRET = b"\xcf"
EOI = b"\xb0\x20\xe6\x20"
SPURIOUS_APIC = b"\xc7\x05\xf0\x00\xe0\xfe\xff\x01\0\0"  # mov dword [0xFEE000F0], 0x1FF: local APIC on
# An emulating KVM has no IRET in protected mode: drop the frame and wait for the next interrupt in the handler.
WAIT_AGAIN = b"\x83\xc4\x0c\xfb" + WAIT  # add esp, 12; sti; hlt
APIC_EOI = b"\xc7\x05\xb0\x00\xe0\xfe\0\0\0\0"


@pytest.fixture
def guest() -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def make(*args: Any, **kwargs: Any) -> Guest:
        guests.append(Guest(*args, **kwargs))
        return guests[-1]

    yield make
    for made in guests:
        made.close()


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def wait_for(fd: int) -> int:
    """Return the counter of an event descriptor as soon as it is not zero."""
    assert select.select([fd], [], [], PATIENCE)[0], "no event"
    return os.eventfd_read(fd)


def test_an_edge_on_a_line_interrupts_a_waiting_guest(guest: Callable[..., Guest]) -> None:
    g = guest(PIC + OUT_AL + b"\xfb" + WAIT, real_mode())
    g.gate(0x24, b"\xb0\x99" + OUT_AL + EOI + IRET, at=0x3000)
    line = g.hypervisor.interrupt_line(4)
    g.run()
    assert g.next()[-1] == 0xEF
    for _ in range(20):
        line.trigger()
        assert g.next()[-1] == 0x99


def test_another_process_can_pull_a_line_by_its_descriptor(guest: Callable[..., Guest]) -> None:
    g = guest(PIC + OUT_AL + b"\xfb" + WAIT, real_mode())
    g.gate(0x24, b"\xb0\x99" + OUT_AL + EOI + IRET, at=0x3000)
    fd = os.dup(g.hypervisor.interrupt_line(4).fileno())
    g.run()
    assert g.next()[-1] == 0xEF
    os.eventfd_write(fd, 1)
    assert g.next()[-1] == 0x99
    os.close(fd)


def test_a_line_is_the_same_object_for_the_same_number(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP)
    assert g.hypervisor.interrupt_line(4) is g.hypervisor.interrupt_line(4)
    assert g.hypervisor.interrupt_line(5).gsi == 5


@pytest.mark.parametrize("gsi", [-1, 1 << 20])
def test_a_line_that_does_not_exist_is_a_clear_error(guest: Callable[..., Guest], gsi: int) -> None:
    with pytest.raises(HypervisorError, match=f"interrupt {gsi} does not exist; KVM has"):
        guest(LOOP).hypervisor.interrupt_line(gsi)


def test_pulling_a_line_of_a_closed_machine_does_nothing(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP)
    line = g.hypervisor.interrupt_line(4)
    g.close()
    line.trigger()
    assert line.fileno() == -1


def test_a_number_can_stand_for_a_message_and_for_another_one_later(guest: Callable[..., Guest]) -> None:
    g = guest(SPURIOUS_APIC + b"\xfb" + OUT_AL + WAIT, flat_mode())
    g.gate(0x40, b"\xb0\x40" + OUT_AL + APIC_EOI + WAIT_AGAIN, at=0x3000)
    g.gate(0x41, b"\xb0\x41" + OUT_AL + APIC_EOI + WAIT_AGAIN, at=0x3100)
    g.hypervisor.route_message(30, 0xFEE0_0000, 0x40)
    line = g.hypervisor.interrupt_line(30)
    g.run()
    g.next()
    line.trigger()
    assert g.next()[-1] == 0x40
    g.hypervisor.route_message(30, 0xFEE0_0000, 0x41)
    line.trigger()
    assert g.next()[-1] == 0x41
    g.hypervisor.unroute_message(30)
    line.trigger()
    g.hypervisor.route_message(30, 0xFEE0_0000, 0x40)
    line.trigger()
    assert g.next()[-1] == 0x40  # not 0x41


def test_pins_cannot_become_messages(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP)
    for gsi in (-1, 0, 23, 1 << 20):
        with pytest.raises(HypervisorError, match=f"interrupt {gsi} cannot be a message; those are 24 to"):
            g.hypervisor.route_message(gsi, 0xFEE0_0000, 0x40)
    g.hypervisor.unroute_message(25)


def test_a_doorbell_rings_without_the_bus(guest: Callable[..., Guest], event: int) -> None:
    g = guest(b"\xa3" + MMIO.to_bytes(4, "little") + OUT_AL + LOOP, flat_mode(rax=7))
    g.hypervisor.add_ioeventfd(MMIO, 4, event)
    g.run()
    assert g.next()[0] == "port"
    assert os.eventfd_read(event) == 1


def test_a_doorbell_can_want_a_certain_value(guest: Callable[..., Guest], event: int) -> None:
    store = b"\xa3" + MMIO.to_bytes(4, "little") + b"\x40"  # mov [MMIO], eax; inc eax
    g = guest(store * 3 + OUT_AL + LOOP, flat_mode(rax=6))
    g.hypervisor.add_ioeventfd(MMIO, 4, event, match=7)
    g.run()
    assert [g.next() for _ in range(3)] == [("mmio", "write", 0, 4, 6), ("mmio", "write", 0, 4, 8), ("port", "write", 0, 1, 9)]
    assert os.eventfd_read(event) == 1


def test_shown_memory_is_read_without_an_exit_and_written_like_a_device(guest: Callable[..., Guest], event: int) -> None:
    load = b"\xa1" + MMIO.to_bytes(4, "little")  # mov eax, [MMIO]
    store = b"\xa3" + MMIO.to_bytes(4, "little") + b"\x40"  # mov [MMIO], eax; inc eax
    g = guest(load + OUT_AL + store * 2 + load + OUT_AL + LOOP, flat_mode())
    shown = g.hypervisor.show(MMIO, 0x1000)
    assert shown is not None
    shown.cast("I")[0] = 5
    g.hypervisor.add_ioeventfd(MMIO, 4, event, match=5)
    g.run()
    seen = [g.next() for _ in range(3)]
    assert seen == [("port", "write", 0, 1, 5), ("mmio", "write", 0, 4, 6), ("port", "write", 0, 1, 5)]
    assert os.eventfd_read(event) == 1
    assert shown.cast("I")[0] == 5, "the guest cannot write there"


def test_what_the_owner_puts_into_shown_memory_is_seen_at_once(guest: Callable[..., Guest]) -> None:
    load = b"\xa1" + MMIO.to_bytes(4, "little")
    g = guest(load + OUT_AL + b"\xeb" + (256 - 9).to_bytes(1, "little"), flat_mode())
    shown = g.hypervisor.show(MMIO, 0x1000)
    assert shown is not None
    g.run()
    for value in (0, 7, 9):
        shown.cast("I")[0] = value
        while g.next()[4] != value:
            pass


def test_reads_of_shown_memory_can_be_given_back_to_the_bus_while_the_guest_runs(guest: Callable[..., Guest]) -> None:
    load = b"\xa1" + MMIO.to_bytes(4, "little")
    g = guest(load + OUT_AL + b"\xeb" + (256 - 9).to_bytes(1, "little"), flat_mode())
    shown = g.hypervisor.show(MMIO, 0x1000)
    assert shown is not None
    shown.cast("I")[0] = 5
    g.run()
    assert g.next() == ("port", "write", 0, 1, 5)
    for _ in range(3):
        for _ in range(2):
            g.hypervisor.set_shown(MMIO, False)
        while g.next()[:2] != ("mmio", "read"):
            pass
        for _ in range(2):
            g.hypervisor.set_shown(MMIO, True)
        kinds = []
        while kinds[-3:] != ["port"] * 3:
            kinds.append(g.next()[0])
    assert g.next() == ("port", "write", 0, 1, 5)
    g.close()
    g.hypervisor.set_shown(MMIO, False)


def test_shown_memory_comes_behind_ram() -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1))
    with pytest.raises(LifecycleError, match="no memory yet"):
        hypervisor.show(MMIO, 0x1000)
    hypervisor.close()


def test_a_doorbell_can_be_a_port_and_of_any_size(guest: Callable[..., Guest], event: int) -> None:
    g = guest(b"\xe6\x12\xe7\x12\x66\xe7\x12" + OUT_AL + LOOP)
    g.hypervisor.add_ioeventfd(0x12, 0, event, port=True)
    g.run()
    assert g.next() == ("port", "write", 0, 1, 0)
    assert os.eventfd_read(event) == 3


def test_a_doorbell_can_be_taken_away(guest: Callable[..., Guest], event: int) -> None:
    g = guest(b"\xe6\x12" + LOOP)
    g.hypervisor.add_ioeventfd(0x12, 1, event, match=0, port=True)
    with pytest.raises(HypervisorError, match="KVM_IOEVENTFD: File exists"):
        g.hypervisor.add_ioeventfd(0x12, 1, event, match=0, port=True)
    g.hypervisor.remove_ioeventfd(0x12, 1, event, match=0, port=True)
    with pytest.raises(HypervisorError, match="KVM_IOEVENTFD: No such file"):
        g.hypervisor.remove_ioeventfd(0x12, 1, event, match=0, port=True)
    g.run()
    assert g.next()[2] == 2


def test_coalesced_writes_wait_until_somebody_asks(guest: Callable[..., Guest]) -> None:
    # out 0x18, al twice; mov [MMIO + 8], eax; mov byte [0x2000], 1; jmp $
    code = b"\xe6\x18\x40\xe6\x18" + b"\xa3" + (MMIO + 8).to_bytes(4, "little") + b"\xc6\x05\0\x20\0\0\x01"
    g = guest(code + LOOP, flat_mode())
    g.hypervisor.coalesce(0x18, 1, port=True)
    g.hypervisor.coalesce(MMIO + 8, 4)
    g.run()
    wait_until(lambda: g.memory.load(0x2000, 1) == 1)
    assert g.device.events.empty()
    g.hypervisor.flush_coalesced()
    assert [g.device.events.get_nowait() for _ in range(3)] == [
        ("port", "write", 8, 1, 0),
        ("port", "write", 8, 1, 1),
        ("mmio", "write", 8, 4, 1),
    ]


def test_coalesced_writes_come_before_the_next_access(guest: Callable[..., Guest]) -> None:
    # mov ecx, 1000; mov dx, 0x18; out dx, al; inc al; loop; in al, PORT
    g = guest(b"\xb9\xe8\x03\0\0\x66\xba\x18\0\xee\xfe\xc0\xe2\xfb\xe4\x10" + LOOP, flat_mode())
    g.hypervisor.coalesce(0x18, 1, port=True)
    g.run()
    assert [g.next()[-1] for _ in range(1000)] == [i & 0xFF for i in range(1000)]  # more than the ring holds
    assert g.next()[1] == "read"


def test_coalesced_writes_come_before_a_pause(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xe6\x18\xc6\x05\0\x20\0\0\x01" + LOOP, flat_mode())
    g.hypervisor.coalesce(0x18, 1, port=True)
    g.run()
    wait_until(lambda: g.memory.load(0x2000, 1) == 1)
    g.pause()
    assert g.device.events.get_nowait() == ("port", "write", 8, 1, 0)


def test_flushing_is_harmless_before_the_start_and_after_the_end(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP)
    g.hypervisor.flush_coalesced()
    g.hypervisor.coalesce(0x18, 1, port=True)
    g.hypervisor.flush_coalesced()
    g.run()
    g.close()
    g.hypervisor.flush_coalesced()


def test_coalescing_is_arranged_before_the_start(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP).run()
    with pytest.raises(LifecycleError, match="only before the vCPUs start"):
        g.hypervisor.coalesce(0x18, 1, port=True)


def test_dirty_pages_are_those_that_the_guest_wrote_since_the_last_time(guest: Callable[..., Guest]) -> None:
    # mov [0x9000], eax; out; mov [0x9000], eax; mov [0x8FFFF], al; out; jmp
    code = b"\xa3\0\x90\0\0" + OUT_AL + b"\xa3\0\x90\0\0\xa2\xff\xff\x08\0" + OUT_AL
    g = guest(code + LOOP, flat_mode())
    g.hypervisor.start_dirty_log()
    gate = threading.Event()
    original = g.device.write

    def write(offset: int, size: int, value: int) -> None:
        original(offset, size, value)
        gate.wait(PATIENCE)

    g.device.write = write  # type: ignore[method-assign]
    g.run()
    g.next()
    first = pages(g)
    gate.set()
    g.next()
    g.pause()
    second = pages(g)
    # KVM may count a page that it made writable on a read.
    assert (0x9 in first, 0x8F in first) == (True, False)
    assert second >= {0x9, 0x8F}
    assert pages(g) == set()
    g.hypervisor.stop_dirty_log()
    with pytest.raises(HypervisorError, match="KVM_GET_DIRTY_LOG"):
        g.hypervisor.dirty_pages()


def test_the_dirty_bitmap_has_a_bit_for_every_page_of_every_region() -> None:
    hypervisor = KvmHypervisor(CpuTopology.flat(1))
    memory = GuestMemory([(0, 13 * 4096), (1 << 32, 4096)])
    hypervisor.map_memory(memory)
    hypervisor.start_dirty_log()
    assert [(base, len(bitmap)) for base, bitmap in hypervisor.dirty_pages()] == [(0, 2), (1 << 32, 1)]
    hypervisor.close()
    memory.close()


def test_memory_is_mapped_once(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP)
    with pytest.raises(LifecycleError, match="has its memory already"):
        g.hypervisor.map_memory(g.memory)


def test_the_clock_stands_still_while_paused_and_goes_on_from_there(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP).run()
    g.pause()
    g.hypervisor.pause_clock()
    before = clock(g)
    assert clock(g) == before
    g.hypervisor._arch._set_clock(before + 3_600_000_000_000)  # as if the pause took an hour
    g.hypervisor.resume_clock()
    assert before <= clock(g) < before + 3_600_000_000_000
    g.hypervisor.resume_clock()
    g.resume()


def test_the_state_of_the_chips_survives_a_round_trip(guest: Callable[..., Guest]) -> None:
    # PIC set up, PIT channel 0 in mode 2 with a count of 0x1234
    first = guest(PIC + b"\xb0\x34\xe6\x43\xb0\x34\xe6\x40\xb0\x12\xe6\x40" + OUT_AL + WAIT).run()
    first.next()
    first.pause()
    first.hypervisor.pause_clock()
    state = first.hypervisor.vm_state.save()
    state = decode(encode(state), type(state), "kvm")
    second = guest(LOOP)
    second.hypervisor.pause_clock()
    assert second.hypervisor.vm_state.save() != state
    second.hypervisor.vm_state.restore(state)
    assert timeless(second.hypervisor.vm_state.save()) == timeless(state)
    assert second.hypervisor.vm_state.save().clock == state.clock


def test_reset_brings_the_chips_back_to_power_on(guest: Callable[..., Guest]) -> None:
    g = guest(PIC + b"\xb0\x34\xe6\x43\xb0\x34\xe6\x40\xb0\x12\xe6\x40" + OUT_AL + WAIT)
    fresh = g.hypervisor.vm_state.save()
    g.run()
    g.next()
    g.pause()
    assert timeless(g.hypervisor.vm_state.save()) != timeless(fresh)
    g.hypervisor.reset()
    assert timeless(g.hypervisor.vm_state.save()) == timeless(fresh)


def test_a_broken_machine_state_is_refused(guest: Callable[..., Guest]) -> None:
    g = guest(LOOP)
    good = g.hypervisor.vm_state.save()
    for state, message in (
        (replace(good, pit=good.pit[1:]), "kvm: pit has 111 bytes, expected 112"),
        (replace(good, ioapic=b""), "kvm: ioapic has 0 bytes"),
        (replace(good, clock=-1), "kvm: clock -1"),
        (None, "kvm: expected a state of type KvmVmState, got NoneType"),
    ):
        with pytest.raises(StateError, match=message):
            g.hypervisor.vm_state.restore(state)


def pages(g: Guest) -> set[int]:
    [(base, bitmap)] = g.hypervisor.dirty_pages()
    assert base == 0
    bits = int.from_bytes(bitmap, "little")
    return {page for page in range(8 * len(bitmap)) if bits >> page & 1}


def test_a_guest_that_tries_every_way_to_reset_is_stopped_by_the_first_and_boots_again(tmp_path: Path) -> None:
    # 64-bit code: mov eax, 0xF0000012; mov byte [rax], 0x42; mov al, 0xFE; out 0x64, al; ud2 (a triple fault: there is no IDT)
    code = b"\xb8" + Layout.RESET.base.to_bytes(4, "little") + b"\xc6\x00\x42\xb0\xfe\xe6\x64\x0f\x0b"
    (tmp_path / "kernel").write_bytes((code + b"Linux version 1 (a@b) (gcc 12) #1 SMP\n").ljust(MiB, b"\0"))
    asked: SimpleQueue[MachineEvent] = SimpleQueue()
    topology, time = CpuTopology.flat(2), MonotonicClock()
    loop = DirectLoop("main", time)
    machine = Microvm(
        KvmHypervisor(topology),
        GuestMemory(Layout.ram(32 * MiB)),
        asked.put,
        topology=topology,
        clock=time,
        loop=loop,
        kernel=Kernel(str(tmp_path / "kernel")),
    )
    try:
        machine.finish()
        (tmp_path / "kernel").unlink()
        machine.start()
        for _ in range(3):
            event = asked.get(timeout=PATIENCE)
            assert event.report == "guest reset through ACPI"
            assert all(vcpu.wait_paused(PATIENCE) for vcpu in machine.vcpus)
            assert asked.empty()
            machine.reset()
            assert not machine.is_current(event)
    finally:
        machine.close()
        loop.close()


def clock(g: Guest) -> int:
    return int(g.hypervisor.vm_state.save().clock)


def timeless(state: Any) -> Any:
    """Return the state without when the PIT's counters were loaded (count_load_time, the last field of each channel)."""
    pit = bytearray(state.pit)
    for channel in range(3):
        pit[24 * channel + 16 : 24 * channel + 24] = bytes(8)
    return replace(state, pit=bytes(pit), clock=0)


def wait_until(condition: Callable[[], bool]) -> None:
    """Give the vCPU threads time until `condition` holds."""
    ticker = threading.Event()
    for _ in range(int(PATIENCE * 1000)):
        if condition():
            return
        ticker.wait(0.001)
    raise AssertionError("it does not happen")
