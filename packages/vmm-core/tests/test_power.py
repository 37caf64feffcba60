"""Reset and power-off: what a guest asks for reaches the listener, and nothing that it does by accident."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.clock import DueTimer, VirtualClock
from vmm_core.devices.acpi_pm import REMIND, REMIND_LAST, AcpiPm, AcpiPmState
from vmm_core.devices.debugport import boot_time_hook
from vmm_core.devices.i8042 import I8042
from vmm_core.devices.serial import SCR, Serial
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.hypervisor.testmode import RecordedLine
from vmm_core.state import decode, encode

CONTROL, STATUS, RESET = 0, 1, 2
S5 = 0x20 | 5 << 2
LOOP = DirectLoop("idle", VirtualClock())


class Owner:
    """Takes requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def reset_requested(self, report: str) -> None:
        self.asked.append(("reset", report))

    def power_off_requested(self, report: str) -> None:
        self.asked.append(("off", report))


class Waits(DirectLoop):
    """Notes how long timers are."""

    def __init__(self, name: str, clock: VirtualClock) -> None:
        super().__init__(name, clock)
        self.delays: list[int] = []

    def call_later(self, delay_ns: int, callback: Callable[[], None], *, host: bool = False) -> DueTimer:
        self.delays.append(delay_ns)
        return super().call_later(delay_ns, callback, host=host)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def line() -> RecordedLine:
    return RecordedLine(16)


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = DirectLoop("test", VirtualClock())
    yield loop
    loop.close()


@pytest.fixture
def pm(owner: Owner, line: RecordedLine, loop: DirectLoop) -> AcpiPm:
    return AcpiPm(owner, line, loop, reset_value=0x42)


# Keyboard controller


def test_linux_resets_through_the_keyboard_controller_without_waiting(owner: Owner) -> None:
    controller = I8042(owner)
    assert controller.read(0, 1) & 0x02 == 0  # the input buffer is empty: the command may be written now
    controller.write(0, 1, 0xFE)
    assert owner.asked == [("reset", "guest reset through the keyboard controller")]


def test_a_probe_finds_an_output_buffer_that_never_empties_and_gives_up(owner: Owner) -> None:
    controller = I8042(owner)
    for _ in range(20):
        assert controller.read(0, 1) & 0x01
        assert controller.data_port.read(0, 1) == 0xFF
    controller.data_port.write(0, 1, 0xFE)
    assert owner.asked == []


@given(st.integers(0, 255))
def test_only_commands_that_pulse_the_reset_line_reset(command: int) -> None:
    owner = Owner()
    I8042(owner).write(0, 1, command)
    assert bool(owner.asked) == (command >= 0xF0 and command % 2 == 0)


# ACPI


def test_soft_off_is_a_request_to_power_off(pm: AcpiPm, owner: Owner) -> None:
    pm.registers.write(CONTROL, 1, S5)
    assert owner.asked == [("off", "guest power-off through ACPI")]


@given(st.integers(0, 255).filter(lambda value: value & 0x3C != S5))
def test_any_other_sleep_type_and_a_type_without_enable_do_nothing(value: int) -> None:
    owner = Owner()
    AcpiPm(owner, RecordedLine(16), LOOP, reset_value=0x42).registers.write(CONTROL, 1, value)
    assert owner.asked == []


@given(st.integers(0, 255))
def test_only_the_value_of_the_tables_resets(value: int) -> None:
    owner = Owner()
    AcpiPm(owner, RecordedLine(16), LOOP, reset_value=0x42).registers.write(RESET, 1, value)
    assert owner.asked == ([("reset", "guest reset through ACPI")] if value == 0x42 else [])


def test_sleep_registers_read_as_never_slept(pm: AcpiPm) -> None:
    pm.registers.write(STATUS, 1, 0x80)
    assert [pm.registers.read(register, 1) for register in (CONTROL, STATUS, RESET)] == [0, 0, 0]


def test_a_wide_write_is_one_to_each_register(pm: AcpiPm, owner: Owner) -> None:
    pm.registers.write(STATUS, 2, 0x4200)
    pm.registers.write(RESET, 8, 0xFFFF_FF42)
    assert [what for what, _ in owner.asked] == ["reset", "reset"]


def test_the_power_button_interrupts_and_is_read_once(pm: AcpiPm, line: RecordedLine) -> None:
    pm.press_power_button()
    assert line.take() == 1
    assert (pm.events.read(0, 4), pm.events.read(0, 4)) == (1, 0)


def test_an_event_does_not_replace_one_that_was_not_read(pm: AcpiPm) -> None:
    pm.raise_event(0x10)
    pm.press_power_button()
    assert pm.events.read(0, 4) == 0x11


def test_reading_a_part_of_the_events_does_not_lose_the_rest(pm: AcpiPm) -> None:
    pm.press_power_button()
    assert (pm.events.read(1, 1), pm.events.read(0, 1), pm.events.read(0, 2)) == (0, 0, 0)
    pm.events.write(0, 4, 0)
    assert pm.events.read(0, 4) == 1


def test_a_reset_forgets_the_button(pm: AcpiPm) -> None:
    pm.press_power_button()
    pm.reset()
    assert pm.events.read(0, 4) == 0


def test_an_event_that_comes_before_the_guest_listens_is_told_of_until_it_is_read(
    pm: AcpiPm, line: RecordedLine, loop: DirectLoop
) -> None:
    pm.press_power_button()
    assert line.take() == 1  # lost: the guest has the interrupt masked
    for _ in range(2):
        loop.poll()
        assert line.take() == 1
    assert pm.events.read(0, 4) == 1
    loop.poll()
    assert line.take() == 0


def test_reminders_come_ever_less_often_and_end_with_the_machine(owner: Owner, line: RecordedLine) -> None:
    loop = Waits("test", VirtualClock())
    pm = AcpiPm(owner, line, loop, reset_value=0x42)
    pm.press_power_button()
    for _ in range(9):
        loop.poll()
    assert loop.delays == [*(REMIND << number for number in range(7)), *[REMIND_LAST] * 3]
    pm.press_power_button()
    assert loop.delays[-1] == REMIND
    pm.close()
    pm.close()
    loop.poll()
    assert line.take() == 11
    loop.close()


def test_events_are_state(pm: AcpiPm, owner: Owner, line: RecordedLine, loop: DirectLoop) -> None:
    pm.press_power_button()
    state = pm.save()
    pm.close()
    fresh = AcpiPm(owner, line, loop, reset_value=0x42)
    fresh.restore(decode(encode(state), AcpiPmState, "acpi"))
    assert fresh.save() == state
    assert line.take() == 1
    loop.poll()
    assert line.take() == 1
    assert fresh.events.read(0, 4) == 1
    for wrong in (AcpiPmState(-1), AcpiPmState(1 << 32), None):
        with pytest.raises(StateError, match=r"^acpi"):
            fresh.restore(wrong)


# Boot times


def test_boot_times_are_logged_once_and_the_scratch_register_keeps_the_value(line: RecordedLine) -> None:
    log: list[str] = []
    loop = DirectLoop("test", VirtualClock())
    uart = Serial(line, loop, log.append)
    uart.on_scratch(boot_time_hook(log.append))
    for value in (0x01, 0x01, 0x55, 0x02):
        uart.write(SCR, 1, value)
    assert log == ["Kernel starts to boot!", "Kernel boot complete!"]
    assert uart.read(SCR, 1) == 0x02
    loop.close()
