"""The machine itself, with devices of the test's own: plugging and unplugging, pausing, and an end that reaches everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from vmm_core.clock import VirtualClock
from vmm_core.directloop import DirectLoop
from vmm_core.errors import HypervisorError
from vmm_core.guestmem import GuestMemory
from vmm_core.hypervisor.testmode import RecordingHypervisor
from vmm_core.machine.core import MachineEvent, VmStatus
from vmm_core.machine.microvm import Microvm
from vmm_core.state import versioned
from vmm_core.topology import CpuTopology
from vmm_core.x86_64.layout import Microvm as Layout

MiB = 1 << 20


BELL = 0x50  # an offset in a window


@versioned(1)
class NoState(NamedTuple):
    """A fake has none."""


class FakeDevice:
    """What a slot takes, with a doorbell, and a diary."""

    def __init__(self, diary: list[str] | None = None) -> None:
        self.diary = diary if diary is not None else []
        self.shown = memoryview(bytearray(4))
        self.doorbells: tuple[tuple[int, int, int], ...] = ((BELL, 0, os.eventfd(0, os.EFD_NONBLOCK)),)

    def read(self, offset: int, size: int) -> int:
        return 0x74726976

    def write(self, offset: int, size: int, value: int) -> None:
        pass

    def mirror(self, memory: memoryview | None) -> None:
        self.diary.append("in memory" if memory is not None else "not in memory")
        self.shown[:4] = b"late"  # as a loop may do until it is told
        if memory is not None:
            self.shown = memory
            memory[:] = b"virt" * (Layout.SLOT_SIZE // 4)

    def note(self, what: str) -> Callable[[], None]:
        return lambda: self.diary.append(what)

    def __getattr__(self, name: str) -> Any:
        if name in ("pause", "resume", "reset"):
            return self.note(name)
        raise AttributeError(name)

    def save(self) -> NoState:
        return NoState()

    def restore(self, state: Any) -> None:
        pass

    def close(self) -> None:
        self.diary.append("close")
        bells, self.doorbells = self.doorbells, ()
        for _, _, fd in bells:
            os.close(fd)


class Maker:
    """Makes machines and closes them."""

    def __init__(self) -> None:
        self.made: list[Microvm] = []
        self.hypervisor = RecordingHypervisor()

    def __call__(self, *, acpi: bool = True, acpi_ignored: bool = False, cpus: int = 2) -> Microvm:
        def post(event: MachineEvent) -> None:
            raise AssertionError(f"nobody asked for {event}")

        clock = VirtualClock()
        self.hypervisor = RecordingHypervisor()
        memory = GuestMemory(Layout.ram(2 * MiB))
        topology = CpuTopology(cpus, cpus)
        self.made.append(
            Microvm(
                self.hypervisor,
                memory,
                post,
                topology=topology,
                clock=clock,
                loop=DirectLoop("main", clock),
                acpi=acpi,
                acpi_ignored=acpi_ignored,
            )
        )
        return self.made[-1]


@pytest.fixture
def make() -> Iterator[Maker]:
    maker = Maker()
    yield maker
    for machine in maker.made:
        machine.close()


class ShowingHypervisor(RecordingHypervisor):
    """Has registers in memory, as KVM does."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    def show(self, address: int, size: int) -> memoryview | None:
        self.shown_at, self.shown = address, memoryview(bytearray(size))
        return self.shown

    def set_shown(self, address: int, shown: bool) -> None:
        assert address == self.shown_at
        self.asked.append(shown)


def test_windows_are_in_memory_that_reads_as_the_bus_answers() -> None:
    hypervisor, clock, diary = ShowingHypervisor(), VirtualClock(), list[str]()
    memory = GuestMemory(Layout.ram(2 * MiB))
    loop = DirectLoop("main", clock)
    machine = Microvm(hypervisor, memory, lambda event: None, topology=CpuTopology(1, 1), clock=clock, loop=loop)
    whole = b"\xff" * len(hypervisor.shown)
    assert (hypervisor.shown_at, len(whole) % 4096) == (Layout.VIRTIO_MMIO.base, 0)
    assert bytes(hypervisor.shown) == whole
    machine.plug(9, FakeDevice(diary), "card")
    place = 9 * Layout.SLOT_SIZE
    assert bytes(hypervisor.shown) == whole[:place] + b"virt" * (Layout.SLOT_SIZE // 4) + whole[place + Layout.SLOT_SIZE :]
    machine.unplug(9)
    assert bytes(hypervisor.shown) == whole
    assert diary == ["in memory", "not in memory", "close"]
    machine.show_registers(False)
    machine.show_registers(True)
    assert hypervisor.asked == [False, True]
    machine.close()


def started(make: Maker, *slots: int, **options: Any) -> Microvm:
    machine = make(**options)
    for slot in slots:
        machine.plug(slot, FakeDevice(), f"slot{slot}")
    machine.finish()
    machine.start()
    return machine


@pytest.mark.parametrize(
    ("acpi", "ignored", "in_use"), [(True, False, True), (True, True, False), (False, False, False), (False, True, False)]
)
def test_a_guest_that_does_not_look_at_acpi_has_the_clock_and_power_of_a_machine_without(
    make: Maker, acpi: bool, ignored: bool, in_use: bool
) -> None:
    machine = started(make, acpi=acpi, acpi_ignored=ignored)
    assert machine.acpi_in_use == in_use
    assert machine.press_power_button() == in_use
    machine.pio.write(0x70, 1, 0x0B)
    assert bool(machine.pio.read(0x71, 1) & 2) == in_use  # register B: 24 hours
    assert (bytes(machine.memory.view(0xE_0000, 8)) == b"RSD PTR ") == acpi


class TestPlugging:
    def test_a_device_can_come_and_go_while_the_machine_runs(self, make: Maker) -> None:
        machine = started(make, 0)
        device = FakeDevice()
        window = Layout.slot(3).base
        machine.plug(3, device, "slot3")
        assert machine.mmio.read(window, 4) == 0x74726976
        assert make.hypervisor.ring(window + BELL, 4, 0)
        assert "slot3" in machine.components
        machine.unplug(3)
        assert machine.mmio.read(window, 4) == 0xFFFF_FFFF
        assert not make.hypervisor.ring(window + BELL, 4, 0)
        assert device.diary == ["close"]
        assert all(vcpu.running for vcpu in machine.vcpus)  # type: ignore[attr-defined]
        assert "slot3" not in machine.components

    def test_only_the_writes_that_a_device_names_are_events(self, make: Maker) -> None:
        machine = started(make)
        device = FakeDevice()
        acknowledged = os.eventfd(0, os.EFD_NONBLOCK)
        device.doorbells += ((0x64, 1, acknowledged),)
        machine.plug(3, device, "slot3")
        address = Layout.slot(3).base + 0x64
        assert make.hypervisor.ring(address, 4, 1)
        assert os.eventfd_read(acknowledged) == 1
        assert not any(make.hypervisor.ring(address, 4, value) for value in (0, 2, 3))
        machine.unplug(3)
        assert not make.hypervisor.ring(address, 4, 1)

    def test_another_device_can_take_the_slot_and_the_machine_goes_on_with_it(self, make: Maker) -> None:
        machine = started(make, 3)
        machine.unplug(3)
        device = FakeDevice()
        machine.plug(3, device, "slot3")
        machine.pause()
        assert set(machine.save()) == {"rtc", "acpi", "acpi-slots", "slot3", "hypervisor", "vcpu0", "vcpu1"}
        machine.resume()
        machine.reset()
        assert device.diary == ["pause", "resume", "pause", "reset", "resume"]

    def test_a_device_that_comes_while_the_machine_stands_still_stands_still(self, make: Maker) -> None:
        machine = started(make)
        machine.pause()
        device = FakeDevice()
        machine.plug(0, device, "slot0")
        assert device.diary == ["pause"]
        machine.resume()
        assert device.diary == ["pause", "resume"]

    def test_no_vcpu_is_in_the_guest_while_a_device_goes(self, make: Maker) -> None:
        machine = started(make, 0)
        running: list[bool] = []
        machine.slots[0].close = lambda: running.extend(vcpu.running for vcpu in machine.vcpus)  # type: ignore[method-assign, attr-defined]
        bells = machine.slots[0].doorbells
        machine.unplug(0)
        assert running == [False, False]
        for _, _, fd in bells:
            os.close(fd)

    def test_slots_that_are_taken_empty_or_not_there_are_refused_and_nothing_is_kept(self, make: Maker) -> None:
        machine = started(make, 0)
        device = FakeDevice()
        for number, text in ((0, "slot 0 is taken"), (41, "no virtio-mmio slot 41"), (40, "without a second I/O APIC")):
            with pytest.raises(ValueError, match=text):
                machine.plug(number, device, "new")
        with pytest.raises(ValueError, match="slot 1 is empty"):
            machine.unplug(1)
        assert "new" not in machine.components
        device.close()

    def test_a_hypervisor_that_refuses_a_doorbell_leaves_the_slot_free(
        self, make: Maker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = started(make)
        device = FakeDevice()
        device.doorbells += ((BELL, 1, os.eventfd(0)),)
        add = make.hypervisor.add_ioeventfd

        def refuse(address: int, size: int, fd: int, *, match: int | None = None, port: bool = False) -> None:
            if match == 1:
                raise HypervisorError("no more of them")
            add(address, size, fd, match=match, port=port)

        monkeypatch.setattr(make.hypervisor, "add_ioeventfd", refuse)
        with pytest.raises(HypervisorError):
            machine.plug(2, device, "slot2")
        assert device.diary == []
        assert not make.hypervisor.ring(Layout.slot(2).base + BELL, 4, 0)
        monkeypatch.undo()
        machine.plug(2, device, "slot2")

    def test_a_machine_without_acpi_has_eleven_slots(self, make: Maker) -> None:
        machine = make(acpi=False)
        device = FakeDevice()
        machine.plug(10, device, "last")
        with pytest.raises(ValueError, match="it has 0 to 10"):
            machine.plug(11, device, "one too many")


class TestTheSecondIoApic:
    def test_it_is_there_when_a_slot_needs_it_and_its_interrupts_are_messages(self, make: Maker) -> None:
        machine = started(make, *range(41))
        assert machine.io_apic is not None
        line = machine.interrupt_line(Layout.slot(40).gsi)
        register, window = Layout.SECOND_IO_APIC.base, Layout.SECOND_IO_APIC.base + 0x10
        pin = Layout.slot(40).gsi - 24
        machine.mmio.write(register, 4, 0x10 + 2 * pin)
        machine.mmio.write(window, 4, 0x51)
        line.trigger()
        assert make.hypervisor.take_message(0xFEE0_0000, 0x51)
        assert machine.memory.read(Layout.ACPI_TABLES.base, 0x8000).count(b"\x00\x00\xc1\xfe") == 1
        machine.reset()
        line.trigger()
        assert not make.hypervisor.take_message(0xFEE0_0000, 0x51)
        machine.pause()
        assert "io-apic" in machine.save()

    def test_it_is_not_there_otherwise(self, make: Maker) -> None:
        machine = started(make, *range(17))
        assert machine.io_apic is None
        assert machine.mmio.find(Layout.SECOND_IO_APIC.base) is None


class TestEmptySlots:
    def test_the_guest_hears_of_a_slot_that_is_filled(self, make: Maker) -> None:
        machine = make()
        machine.plug(4, FakeDevice(), "slot4")
        machine.clear(4)
        machine.finish()
        machine.start()
        assert machine.memory.read(Layout.ACPI_TABLES.base, 0x4000).count(b"ACPI0004") == 1
        machine.fill(4)
        assert make.hypervisor.lines[Layout.GED_GSI].edges == 1
        assert machine.mmio.read(Layout.GED_EVENT.base, 4) == 0x1000
        assert machine.mmio.read(Layout.SLOTS_PRESENT.base, 4) == 1 << 4
        machine.reset()
        assert machine.memory.read(Layout.ACPI_TABLES.base, 0x4000).count(b"ACPI0004") == 0  # it has been there from the start

    def test_without_acpi_there_is_nobody_to_tell(self, make: Maker) -> None:
        machine = started(make, 4, acpi=False)
        machine.clear(4)
        machine.fill(4)
        assert machine.mmio.find(Layout.SLOTS_PRESENT.base) is None


class TestPausingAndEnding:
    def test_what_the_guest_wrote_before_a_pause_is_delivered_before_devices_rest(
        self, make: Maker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = make()
        device = FakeDevice()
        machine.plug(0, device, "slot0")
        machine.finish()
        machine.start()
        monkeypatch.setattr(make.hypervisor, "flush_coalesced", lambda: device.diary.append("flush"))
        machine.pause()
        assert device.diary == ["flush", "pause"]

    def test_a_vcpu_that_cannot_be_stopped_keeps_nothing_else_from_its_end(
        self, make: Maker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = started(make, 0)
        stopped: list[int] = []

        def stuck() -> None:
            raise HypervisorError("CPU 0 does not leave")

        monkeypatch.setattr(machine.vcpus[0], "stop", stuck)
        monkeypatch.setattr(machine.vcpus[1], "stop", lambda: stopped.append(1))
        device: Any = machine.slots[0]
        with pytest.raises(ExceptionGroup, match="could not be closed") as caught:
            machine.close()
        assert [str(error) for error in caught.value.exceptions] == ["CPU 0 does not leave"]
        assert stopped == [1]
        assert device.diary == ["close"]
        assert machine.status is VmStatus.SHUTDOWN

    def test_shutdown_stops_every_vcpu_and_says_what_went_wrong(self, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = started(make)

        def stuck() -> None:
            raise HypervisorError("CPU 0 does not leave")

        monkeypatch.setattr(machine.vcpus[0], "stop", stuck)
        with pytest.raises(HypervisorError, match="CPU 0"):
            machine.shutdown()
        assert machine.vcpus[1].thread_id == 0
        machine.shutdown()  # it has ended
