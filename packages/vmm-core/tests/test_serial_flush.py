"""How often collected writes to a serial port are asked for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.clock import VirtualClock
from vmm_core.devices.serial import IER, LSR, Serial
from vmm_core.devices.serial_flush import SELDOM, SOON, SerialFlush
from vmm_core.directloop import DirectLoop

MS = 1_000_000


class Line:
    gsi = 4

    def trigger(self) -> None: ...

    def fileno(self) -> int:
        raise AssertionError("nobody interrupts from outside")


class Due:
    def __init__(self, at: int, callback: Callable[[], None]) -> None:
        self.at, self.callback = at, callback

    def cancel(self) -> None:
        self.at = -1


class SlowLoop:
    """A loop whose host's time passes when told to. It has nothing but timers."""

    def __init__(self) -> None:
        self.now = 0
        self.due: list[Due] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.due.append(Due(self.now, callback))

    def call_later(self, delay_ns: int, callback: Callable[[], None], *, host: bool = False) -> Due:
        assert host, "the guest's time may stand still"
        self.due.append(Due(self.now + delay_ns, callback))
        return self.due[-1]

    def advance(self, to: int) -> None:
        while ready := [due for due in self.due if 0 <= due.at <= to]:
            first = min(ready, key=lambda due: due.at)
            self.due.remove(first)
            self.now = max(self.now, first.at)
            first.callback()
        self.due = [due for due in self.due if due.at >= 0]
        self.now = to


class Machine:
    """A port, a hypervisor that collects what is written to it, and who asks for that."""

    def __init__(self) -> None:
        self.loop = SlowLoop()
        clock = VirtualClock()
        self.port = Serial(Line(), DirectLoop("port", clock), lambda line: None)
        self.collected = 0
        self.asked: list[int] = []
        SerialFlush(self.loop, self.flush, self.port)  # type: ignore[arg-type]

    def flush(self) -> None:
        self.asked.append(self.loop.now)
        while self.collected:
            self.collected -= 1
            self.port.write(0, 1, 65)

    def speak(self) -> None:
        """As a driver does: look at the line, which is an exit that delivers what there was, and write."""
        self.collected = 0
        self.port.read(LSR, 1)
        self.collected += 1


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_a_port_that_nobody_uses_wakes_the_machine_once_a_second(machine: Machine) -> None:
    machine.loop.advance(60_000 * MS)
    assert len(machine.asked) <= 63


@pytest.mark.parametrize("access", [lambda port: port.read(LSR, 1), lambda port: port.write(IER, 1, 2)])
def test_a_port_that_is_used_again_is_asked_soon(machine: Machine, access: Callable[[Serial], object]) -> None:
    machine.loop.advance(10_050 * MS)
    before = len(machine.asked)
    access(machine.port)
    machine.loop.advance(machine.loop.now + SOON)
    assert machine.asked[before:] == [10_050 * MS + SOON]


def test_a_guest_that_never_looks_waits_for_the_seldom_once(machine: Machine) -> None:
    machine.loop.advance(10_050 * MS)
    machine.collected = 1
    for _ in range(SELDOM // MS):
        if machine.collected:
            machine.loop.advance(machine.loop.now + MS)
    assert machine.collected == 0
    machine.collected = 1
    machine.loop.advance(machine.loop.now + SOON)
    assert machine.collected == 0


def test_a_port_in_use_is_asked_ten_times_a_second(machine: Machine) -> None:
    for _ in range(1000):
        machine.speak()
        machine.loop.advance(machine.loop.now + 10 * MS)
    assert 90 <= len(machine.asked) <= 110


class RacingPort:
    """A port that the guest uses at the moment at which `used` is looked at for the `at`-th time, just after that."""

    def __init__(self, at: int) -> None:
        self._looks = -at
        self._used = False
        self.hook: Callable[[], None] = lambda: None

    def on_use(self, hook: Callable[[], None]) -> None:
        self.hook = hook

    @property
    def used(self) -> bool:
        seen = self._used
        self._looks += 1
        if self._looks == 0 and not seen:
            self._used = True
            self.hook()
        return seen

    @used.setter
    def used(self, used: bool) -> None:
        self._used = used


@pytest.mark.parametrize("at", range(1, 8))
def test_a_use_at_the_very_moment_of_a_look_is_not_lost(at: int) -> None:
    loop, asked, port = SlowLoop(), list[int](), RacingPort(at)
    SerialFlush(loop, lambda: asked.append(loop.now), port)  # type: ignore[arg-type]
    loop.advance(20_000 * MS)
    assert min(after - before for before, after in pairwise(asked)) == SOON


@given(st.lists(st.integers(1, 3000), max_size=30))
def test_what_a_driver_writes_comes_soon_whenever_it_speaks(pauses: list[int]) -> None:
    machine = Machine()
    for pause in pauses:
        machine.loop.advance(machine.loop.now + pause * MS)
        machine.speak()
        said = machine.loop.now
        machine.loop.advance(said + SOON)
        assert machine.collected == 0
