"""The MC146818A: time in every format, halted and running, and interrupts that come when they are due."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.clock import VirtualClock
from vmm_core.devices import rtc_time
from vmm_core.devices.rtc import Rtc, RtcState
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.hypervisor.testmode import RecordedLine
from vmm_core.state import decode, encode

SECOND = 1_000_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
A, B, C, D = 10, 11, 12, 13


class Machine:
    """A clock on a machine whose time and whose host's time go together unless a test says otherwise."""

    def __init__(self, start: datetime = datetime(2024, 2, 29, 23, 59, 58, tzinfo=UTC), memory: int = 512 << 20) -> None:
        self.wall = int((start - EPOCH).total_seconds()) * SECOND
        self.clock = VirtualClock()
        self.loop = DirectLoop("test", self.clock)
        self.line = RecordedLine(8)
        self.rtc = Rtc(self.clock, self.loop, self.line, memory_size=memory, wall=lambda: self.wall)

    def get(self, register: int) -> int:
        self.rtc.write(0, 1, register)
        return self.rtc.read(1, 1)

    def set(self, register: int, value: int) -> None:
        self.rtc.write(0, 1, register)
        self.rtc.write(1, 1, value)

    def passes(self, nanoseconds: int) -> None:
        """Let both clocks go on, timers running on the way at their own time."""
        end = self.clock.now() + nanoseconds
        while (deadline := self.loop.next_deadline()) is not None and deadline <= end:
            self.wall += deadline - self.clock.now()
            self.clock.set(deadline)
            self.loop.poll()
        self.wall += end - self.clock.now()
        self.clock.set(end)

    def time(self) -> tuple[int, ...]:
        """Century, year, month, day, hours, minutes, seconds as the registers show them."""
        return tuple(self.get(register) for register in (0x32, 9, 8, 7, 4, 2, 0))

    def set_time(self, *values: int) -> None:
        self.set(B, self.get(B) | SET)
        for register, value in zip((0x32, 9, 8, 7, 4, 2, 0), values, strict=True):
            self.set(register, value)
        self.set(B, self.get(B) & ~SET)

    def interrupts(self) -> int:
        return self.line.take()

    def close(self) -> None:
        self.rtc.close()
        self.loop.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


# Time


def test_the_time_is_the_hosts_in_decimal_digits_and_24_hours(machine: Machine) -> None:
    assert machine.time() == (0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58)
    assert machine.get(6) == 5  # a Thursday
    machine.passes(3 * SECOND)
    assert machine.time() == (0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x01)


def test_binary_and_twelve_hours_are_shown_when_asked_for(machine: Machine) -> None:
    machine.set(B, BINARY | H24)
    assert machine.time() == (20, 24, 2, 29, 23, 59, 58)
    machine.set(B, 0)
    assert machine.get(4) == 0x91  # 11 in the evening
    machine.set(B, BINARY)
    assert machine.get(4) == 0x8B


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_noon_and_midnight_in_twelve_hours(hour: int, shown: int) -> None:
    machine = Machine(datetime(2024, 1, 1, hour, tzinfo=UTC))
    machine.set(B, 0)
    assert machine.get(4) == shown
    machine.set_time(0x20, 0x24, 0x01, 0x01, shown, 0x00, 0x00)
    machine.set(B, BINARY | H24)
    assert machine.get(4) == hour
    machine.close()


def test_a_time_that_the_guest_set_goes_on_from_there(machine: Machine) -> None:
    machine.set_time(0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    assert machine.time() == (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    machine.passes(SECOND)
    assert machine.time() == (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)


def test_a_halted_clock_shows_what_is_written_and_does_not_move(machine: Machine) -> None:
    machine.set(B, SET | H24)
    machine.passes(5 * SECOND)
    assert machine.time() == (0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58)
    machine.set(0, 0x77)  # no number of seconds, but what a register can hold
    assert machine.get(0) == 0x77
    machine.set(B, H24)
    assert machine.get(0) == 0x59


def test_halting_keeps_the_fraction_of_the_second(machine: Machine) -> None:
    machine.passes(600_000_000)
    machine.set_time(0x20, 0x24, 0x01, 0x01, 0x00, 0x00, 0x00)
    machine.passes(400_000_000 - 1)
    assert machine.get(0) == 0x00
    machine.passes(1)
    assert machine.get(0) == 0x01


def test_the_first_update_comes_half_a_second_after_a_divider_reset(machine: Machine) -> None:
    """As Linux sets the time: SET, divider reset, time, divider on, SET off."""
    machine.passes(900_000_000)
    machine.set(B, SET | H24)
    machine.set(A, 0x70)
    for register, value in ((0x32, 0x20), (9, 0x30), (8, 0x01), (7, 0x02), (4, 0x03), (2, 0x04), (0, 0x05)):
        machine.set(register, value)
    machine.passes(7 * SECOND)
    for step in ((B, H24), (A, 0x26)):
        machine.set(*step)
    machine.passes(500_000_000 - 1)
    assert machine.time() == (0x20, 0x30, 0x01, 0x02, 0x03, 0x04, 0x05)
    machine.passes(1)
    assert machine.get(0) == 0x06


def test_the_divider_may_also_be_switched_on_before_the_clock_is(machine: Machine) -> None:
    machine.set(B, SET | H24)
    machine.set(A, 0x70)
    machine.passes(300_000_000)
    machine.set(A, 0x26)
    machine.passes(100_000_000)
    machine.set(B, H24)
    machine.passes(400_000_000 - 1)
    assert machine.get(0) == 0x58
    machine.passes(1)
    assert machine.get(0) == 0x59


def test_a_register_written_without_halting_takes_effect_at_once(machine: Machine) -> None:
    machine.set(2, 0x30)
    assert machine.time()[-2:] == (0x30, 0x58)
    machine.passes(2 * SECOND)
    assert machine.time()[-2:] == (0x31, 0x00)


def test_update_in_progress_comes_before_the_update_and_goes_with_it(machine: Machine) -> None:
    machine.passes(SECOND - 244_001)
    assert machine.get(A) == 0x26
    machine.passes(1)
    assert machine.get(A) == 0xA6
    assert machine.interrupts() == 0
    machine.passes(244_000)
    assert machine.get(A) == 0x26
    machine.passes(SECOND - 1)
    machine.set(B, SET | H24)
    assert machine.get(A) == 0x26  # a halted clock never updates


def test_a_pause_of_the_machine_does_not_stop_the_time(machine: Machine) -> None:
    machine.wall += 3600 * SECOND
    assert machine.time()[3:] == (0x01, 0x00, 0x59, 0x58)


@given(st.integers(rtc_time.FIRST, rtc_time.LAST))
def test_dates_are_those_of_the_calendar(seconds: int) -> None:
    moment = rtc_time.Moment.of(seconds)
    if moment.year >= 1:  # where Python's calendar begins
        expected = EPOCH + timedelta(seconds=seconds)
        assert moment[:3] == (expected.year, expected.month, expected.day)
        assert moment[4:] == (expected.hour, expected.minute, expected.second)
        assert moment.weekday == expected.isoweekday() % 7 + 1
    assert rtc_time.days_of(*moment[:3]) == seconds // rtc_time.DAY


@given(st.integers(rtc_time.FIRST, rtc_time.LAST), st.sampled_from([0, BINARY, H24, BINARY | H24]))
def test_registers_say_the_time_in_every_format(seconds: int, b: int) -> None:
    moment = rtc_time.Moment.of(seconds)
    cells = {index: moment.register(index, b) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)}
    assert rtc_time.from_registers(cells, b) == seconds


@given(st.lists(st.integers(0, 255), min_size=8, max_size=8), st.sampled_from([0, BINARY, H24, BINARY | H24]))
def test_any_bytes_in_the_registers_are_some_time(values: list[int], b: int) -> None:
    cells = dict(zip((0, 2, 4, 6, 7, 8, 9, 0x32), values, strict=True))
    assert rtc_time.FIRST <= rtc_time.from_registers(cells, b) <= rtc_time.LAST


# Interrupts


def test_an_update_interrupts_once_until_it_is_acknowledged(machine: Machine) -> None:
    machine.set(B, UIE | H24)
    machine.passes(SECOND - 1)
    assert machine.interrupts() == 0
    machine.passes(1)
    assert machine.interrupts() == 1
    machine.passes(3 * SECOND)
    assert machine.interrupts() == 0
    assert machine.get(C) & ~AF == IRQF | UF | PF
    assert machine.get(C) == 0
    machine.passes(SECOND)
    assert machine.interrupts() == 1


def test_flags_rise_without_interrupts_and_go_when_read(machine: Machine) -> None:
    machine.get(C)
    machine.passes(SECOND)
    assert machine.get(C) == UF | PF
    assert machine.get(C) == 0
    assert (machine.interrupts(), machine.loop.next_deadline()) == (0, None)


@pytest.mark.parametrize(("rate", "nanoseconds"), [(1, 3_906_250), (2, 7_812_500), (3, 122_071), (6, 976_563), (15, 500_000_000)])
def test_the_periodic_interrupt_keeps_its_rate(machine: Machine, rate: int, nanoseconds: int) -> None:
    machine.set(A, 0x20 | rate)
    machine.set(B, PIE | H24)
    for count in range(1, 5):
        due = -(-count * nanoseconds_exact(rate)[0] // nanoseconds_exact(rate)[1])
        machine.passes(due - machine.clock.now() - 1)
        assert machine.interrupts() == 0
        machine.passes(1)
        assert machine.interrupts() == 1
        assert machine.get(C) & PF
    assert abs(machine.clock.now() - 4 * nanoseconds) <= 4


def nanoseconds_exact(rate: int) -> tuple[int, int]:
    ticks = {1: 128, 2: 256}.get(rate, 1 << (rate - 1))
    return ticks * SECOND, 32768


def test_a_rate_of_nothing_and_a_stopped_divider_give_no_periods(machine: Machine) -> None:
    for a in (0x20, 0x76):
        machine.set(A, a)
        machine.set(B, PIE | H24)
        machine.get(C)
        machine.passes(2 * SECOND)
        assert machine.interrupts() == 0
        assert machine.get(C) & PF == 0


def test_an_alarm_comes_at_its_time_and_again_when_that_comes_again(machine: Machine) -> None:
    for register, value in ((5, 0x00), (3, 0xFF), (1, 0x01)):
        machine.set(register, value)
    machine.set(B, AIE | H24)
    machine.passes(3 * SECOND - 1)
    assert machine.interrupts() == 0
    machine.passes(1)
    assert machine.interrupts() == 1
    assert machine.get(C) & (IRQF | AF) == IRQF | AF
    machine.passes(60 * SECOND - 1)
    assert machine.interrupts() == 0
    machine.passes(1)
    assert machine.interrupts() == 1


def test_an_alarm_that_matches_anything_comes_every_second(machine: Machine) -> None:
    for register in (1, 3, 5):
        machine.set(register, 0xC0)
    machine.set(B, AIE | H24)
    for _ in range(3):
        machine.passes(SECOND)
        assert machine.interrupts() == 1
        machine.get(C)


def test_an_alarm_that_passed_in_a_pause_comes_after_it(machine: Machine) -> None:
    for register, value in ((5, 0x12), (3, 0x00), (1, 0x00)):
        machine.set(register, value)
    machine.set(B, AIE | H24)
    machine.wall += 86_400 * SECOND
    machine.passes(SECOND)
    assert machine.interrupts() == 1


def test_an_alarm_that_is_no_time_never_comes(machine: Machine) -> None:
    machine.set(1, 0x75)
    for register in (3, 5):
        machine.set(register, 0xFF)
    machine.set(B, AIE | H24)
    machine.passes(70 * SECOND)
    machine.wall += 3 * 86_400 * SECOND
    machine.passes(SECOND)
    assert machine.interrupts() == 0
    assert machine.get(C) & AF == 0


alarms = st.integers(0, 255)


@given(st.integers(0, 10**10), alarms, alarms, alarms, st.sampled_from([0, BINARY, H24, BINARY | H24]))
def test_the_next_alarm_is_the_first_second_that_matches(after: int, hours: int, minutes: int, seconds: int, b: int) -> None:
    found = rtc_time.next_match(after, hours, minutes, seconds, b)

    def matches(second: int) -> bool:
        moment = rtc_time.Moment.of(second)
        shown = (rtc_time.to_hour(moment.hour, b), moment.register(2, b), moment.register(0, b))
        return all(want & 0xC0 == 0xC0 or want == have for want, have in zip((hours, minutes, seconds), shown, strict=True))

    if found is None:
        assert not any(matches(after + step) for step in range(1, 200))
    else:
        assert after < found <= after + rtc_time.DAY
        if not_decimal(hours, minutes, seconds, b):
            return
        assert matches(found)
        assert not any(matches(second) for second in range(after + 1, min(found, after + 200)))


def not_decimal(hours: int, minutes: int, seconds: int, b: int) -> bool:
    """Whether a value has a digit above nine: read as the number it makes, which no register shows."""
    return not b & BINARY and any(value & 0xF > 9 for value in (hours & 0x7F, minutes, seconds) if value & 0xC0 != 0xC0)


def test_halting_switches_update_interrupts_off(machine: Machine) -> None:
    machine.set(B, SET | UIE | H24)
    assert machine.get(B) == SET | H24


def test_enabling_what_is_flagged_already_interrupts_at_once(machine: Machine) -> None:
    machine.passes(2 * SECOND)
    machine.set(B, UIE | H24)
    assert machine.interrupts() == 1


def test_a_clock_without_a_line_only_flags() -> None:
    clock = VirtualClock()
    loop = DirectLoop("test", clock)
    wall = [0]
    rtc = Rtc(clock, loop, None, memory_size=128 << 20, wall=lambda: wall[0])
    rtc.write(0, 2, 0x1200 | B)  # index and data in one access
    wall[0] += SECOND
    clock.set(SECOND)
    rtc.write(0, 1, C)
    assert rtc.read(1, 1) == IRQF | UF | PF
    rtc.close()
    rtc.close()
    loop.close()


# RAM and the rest


@pytest.mark.parametrize(
    ("memory", "extended", "above_16m", "above_4g"),
    [(128 << 20, 0xFC00, 112 << 4, 0), (3 << 30, 0xFC00, 0xBF00, 0), (5 << 30, 0xFC00, 0xBF00, 0x8000)],
)
def test_memory_sizes_are_where_firmware_looks(memory: int, extended: int, above_16m: int, above_4g: int) -> None:
    machine = Machine(memory=memory)

    def number(*registers: int) -> int:
        return sum(machine.get(register) << 8 * at for at, register in enumerate(registers))

    assert number(0x15, 0x16) == 640
    assert number(0x17, 0x18) == number(0x30, 0x31) == extended
    assert number(0x34, 0x35) == above_16m
    assert number(0x5B, 0x5C, 0x5D) == above_4g
    machine.close()


def test_ram_keeps_what_is_written_and_bit_7_of_the_index_is_not_an_address(machine: Machine) -> None:
    machine.set(0x8F, 0x5A)
    assert machine.get(0x0F) == 0x5A
    assert machine.rtc.read(0, 1) == 0xFF


def test_status_registers_cannot_be_written(machine: Machine) -> None:
    machine.set(C, 0xFF)
    machine.set(D, 0x00)
    assert (machine.get(C), machine.get(D)) == (0, 0x80)


def test_reset_switches_interrupts_off_and_keeps_time_and_ram(machine: Machine) -> None:
    machine.set(0x40, 7)
    machine.set_time(0x20, 0x30, 0x01, 0x01, 0x00, 0x00, 0x00)
    machine.set(B, PIE | AIE | UIE | BINARY | H24)
    machine.passes(SECOND)
    machine.interrupts()
    machine.rtc.reset()
    machine.passes(5 * SECOND)
    assert machine.interrupts() == 0
    assert machine.get(B) == BINARY | H24
    assert machine.get(0x40) == 7
    assert machine.time() == (20, 30, 1, 1, 0, 0, 6)


# State

steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 127), st.integers(0, 255)),
        st.tuples(st.just("get"), st.integers(0, 127), st.just(0)),
        st.tuples(st.just("pass"), st.just(0), st.integers(0, 3 * SECOND)),
    ),
    max_size=25,
)


@given(steps)
def test_state_survives_whatever_a_guest_did(done: list[tuple[str, int, int]]) -> None:
    machine = Machine()
    for what, register, value in done:
        if what == "set":
            # The fastest rates make thousands of timers a second; what they do is tested above.
            machine.set(register, value | 0x0C if register == A else value)
        elif what == "get":
            assert 0 <= machine.get(register) <= 255
        else:
            machine.passes(value)
    state = machine.rtc.save()
    fresh = Machine(datetime(2030, 1, 1, tzinfo=UTC))
    fresh.wall = machine.wall
    fresh.rtc.restore(decode(encode(state), RtcState, "rtc"))
    assert fresh.rtc.save() == state
    assert fresh.time() == machine.time()
    machine.close()
    fresh.close()


def test_an_enabled_interrupt_goes_on_after_restore(machine: Machine) -> None:
    machine.set(B, UIE | H24)
    fresh = Machine()
    fresh.wall = machine.wall
    fresh.rtc.restore(machine.rtc.save())
    fresh.passes(SECOND)
    assert fresh.interrupts() == 1
    fresh.close()


def test_updates_go_on_at_once_on_a_host_whose_clock_is_behind(machine: Machine) -> None:
    machine.set(B, UIE | H24)
    fresh = Machine()
    fresh.wall = machine.wall - 3600 * SECOND
    fresh.rtc.restore(machine.rtc.save())
    fresh.passes(SECOND)
    assert fresh.interrupts() == 1
    fresh.close()


@pytest.mark.parametrize(("field", "value"), [("cells", bytes(127)), ("selected", 128), ("offset", 1 << 80), ("seen", 1 << 50)])
def test_a_state_that_no_clock_can_be_in_is_refused(machine: Machine, field: str, value: object) -> None:
    with pytest.raises(StateError, match=rf"^rtc\.{field}"):
        machine.rtc.restore(machine.rtc.save()._replace(**{field: value}))  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"^rtc"):
        machine.rtc.restore(3)


def test_a_clock_that_counts_to_twelve_says_so_until_a_guest_sets_it_otherwise(machine: Machine) -> None:
    rtc = Rtc(machine.clock, machine.loop, None, memory_size=1 << 28, hours_24=False, wall=lambda: 13 * 3600 * SECOND)
    rtc.write(0, 1, B)
    assert not rtc.read(1, 1) & H24
    rtc.write(0, 1, 4)
    assert rtc.read(1, 1) == 0x81  # one in the afternoon
    rtc.close()
