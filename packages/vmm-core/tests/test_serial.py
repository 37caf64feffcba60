"""The 16550A: what drivers rely on, what Linux probes for, and no byte lost in either direction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.clock import VirtualClock
from vmm_core.devices.serial import (
    DATA,
    FCR_IIR,
    FULL,
    IER,
    INPUT,
    LCR,
    LIMIT,
    LSR,
    MCR,
    MSR,
    SCR,
    Serial,
    SerialState,
)
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.hypervisor.testmode import RecordedLine
from vmm_core.state import decode, encode

DR, OE, BI, THRE, TEMT, FIFO_ERROR = 0x01, 0x02, 0x10, 0x20, 0x40, 0x80
NONE, MODEM, EMPTY, AVAILABLE, STATUS, TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C


class Host:
    """A back end that takes as much as it is told to."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.writes = 0
        self.room: int | None = None  # None: everything
        self.wanted = 0
        self.closed = 0

    def start(self, loop: object, frontend: object) -> None:
        pass

    def write(self, data: bytes | memoryview) -> int:
        self.writes += 1
        taken = len(data) if self.room is None else min(self.room, len(data))
        if self.room is not None:
            self.room -= taken
        self.got += data[:taken]
        return taken

    def input_wanted(self) -> None:
        self.wanted += 1

    def close(self) -> None:
        self.closed += 1


class Port:
    """A serial port with a host on one side and a driver on the other."""

    def __init__(self) -> None:
        self.line = RecordedLine(4)
        self.loop = DirectLoop("test", VirtualClock())
        self.reports: list[str] = []
        self.uart = Serial(self.line, self.loop, self.reports.append)
        self.host = Host()
        self.uart.connect(self.host)

    def get(self, register: int) -> int:
        return self.uart.read(register, 1)

    def set(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)

    def interrupted(self) -> bool:
        return self.line.take() > 0

    def source(self) -> int:
        return self.get(FCR_IIR) & 0x0F

    def send(self, data: bytes) -> None:
        for byte in data:
            self.set(DATA, byte)

    def drain(self) -> bytes:
        """Read until nothing more arrives."""
        data = bytearray()
        while burst := self.burst():
            data += burst
            self.loop.poll()
        return bytes(data)

    def burst(self) -> bytes:
        """Read what is there."""
        data = bytearray()
        while self.get(LSR) & DR:
            data.append(self.get(DATA))
        return bytes(data)

    def close(self) -> None:
        self.uart.close(0)
        self.loop.close()


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port()
    yield port
    port.close()


# Registers


def test_reset_values_are_the_ones_that_guests_of_stratovirt_see(port: Port) -> None:
    assert [port.get(register) for register in (IER, FCR_IIR, LCR, MCR, LSR, MSR, SCR)] == [0, 1, 3, 8, 0x60, 0xB0, 0]
    port.set(LCR, 0x83)
    assert (port.get(DATA), port.get(IER)) == (0x0C, 0)


def test_the_divisor_hides_behind_dlab_and_nothing_is_sent(port: Port) -> None:
    port.set(LCR, 0x80)
    port.set(DATA, 0x34)
    port.set(IER, 0x12)
    assert (port.get(DATA), port.get(IER)) == (0x34, 0x12)
    port.set(LCR, 0x03)
    assert port.get(IER) == 0
    port.loop.poll()
    assert port.host.got == b""


@pytest.mark.parametrize(("register", "mask"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_a_register_keeps_the_bits_it_has(port: Port, register: int, mask: int) -> None:
    port.set(register, 0xFF)
    assert port.get(register) == mask


@pytest.mark.parametrize("register", [LSR, MSR])
def test_status_registers_cannot_be_written(port: Port, register: int) -> None:
    before = port.get(register)
    port.set(register, ~before & 0xFF)
    assert port.get(register) == before


def test_a_wide_access_is_split_into_registers(port: Port) -> None:
    port.uart.write(LCR, 2, 0x0B07)
    assert (port.get(LCR), port.get(MCR)) == (0x07, 0x0B)
    assert port.uart.read(LCR, 4) == 0xB0600B07
    port.uart.write(SCR, 4, 0xFFFFFF5A)  # what hangs over the end is nobody's
    assert port.uart.read(SCR, 4) == 0x5A


def test_linux_detects_a_16550a(port: Port) -> None:
    """The steps of autoconfig() in the kernel's 8250 driver, with what each must see for `16550A`."""
    port.set(IER, 0)
    assert port.get(IER) & 0x0F == 0
    port.set(IER, 0x0F)
    assert port.get(IER) & 0x0F == 0x0F
    port.set(IER, 0)
    port.set(MCR, 0x1A)
    assert port.get(MSR) & 0xF0 == 0x90
    port.set(MCR, 0x08)
    port.set(LCR, 0xBF)
    port.set(FCR_IIR, 0)
    port.set(LCR, 0)
    port.set(FCR_IIR, 1)
    assert port.get(FCR_IIR) >> 6 == 3
    port.set(LCR, 0x80)
    assert port.get(FCR_IIR) != 0  # else a 16650
    port.set(LCR, 0xBF)
    assert port.get(FCR_IIR) != 0  # else a 16650V2
    port.set(LCR, 0)
    port.set(FCR_IIR, 0x21)
    first = port.get(FCR_IIR) >> 5
    port.set(FCR_IIR, 1)
    port.set(LCR, 0x80)
    port.set(FCR_IIR, 0x21)
    second = port.get(FCR_IIR) >> 5
    assert (first, second) == (6, 6)  # (6, 7) would be a 16750
    port.set(FCR_IIR, 1)
    port.set(LCR, 0)
    port.set(IER, 0x40)
    assert port.get(IER) & 0x40 == 0  # else an XScale port
    port.set(IER, 0)
    # size_fifo(): how many of 256 looped bytes come back
    port.set(FCR_IIR, 7)
    port.set(MCR, 0x10)
    port.send(bytes(range(256)))
    assert port.drain() == bytes(range(16))
    port.set(MCR, 0x08)
    # the THRE test: enabling the interrupt twice raises it twice
    for _ in range(2):
        port.set(IER, 2)
        assert port.source() == EMPTY
        port.set(IER, 0)
    assert port.host.got == b""


# Interrupts


def test_nothing_enabled_is_nothing_raised(port: Port) -> None:
    port.uart.receive(b"x")
    port.send(b"y")
    assert (port.source(), port.interrupted()) == (NONE, False)


def test_input_below_the_trigger_level_is_a_timeout_and_above_it_data(port: Port) -> None:
    port.set(FCR_IIR, 0x81)  # trigger at 8
    port.set(IER, 1)
    port.uart.receive(b"12345678")
    assert (port.source(), port.interrupted()) == (AVAILABLE, True)
    port.get(DATA)
    assert port.source() == TIMEOUT
    assert port.burst() == b"2345678"
    port.loop.poll()
    assert port.source() == NONE
    port.uart.receive(b"9")
    assert port.interrupted()


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_levels(port: Port, bits: int, level: int) -> None:
    port.set(FCR_IIR, 1 | bits)
    port.set(IER, 1)
    port.uart.receive(bytes(16))
    for left in range(16, 0, -1):
        assert port.source() == (AVAILABLE if left >= level else TIMEOUT)
        port.get(DATA)
    assert port.source() == NONE


def test_without_fifos_any_byte_is_data(port: Port) -> None:
    port.set(IER, 1)
    port.uart.receive(b"x")
    assert port.get(FCR_IIR) == AVAILABLE


def test_the_empty_transmitter_interrupts_when_enabled_until_it_is_seen(port: Port) -> None:
    port.set(IER, 2)
    assert port.interrupted()
    assert (port.source(), port.source()) == (EMPTY, NONE)


def test_a_driver_that_looks_after_its_bytes_finds_the_transmitter_empty(port: Port) -> None:
    port.set(IER, 2)
    port.source()
    port.send(b"sixteen bytes...")
    assert (port.source(), port.source()) == (EMPTY, NONE)


def test_a_driver_that_writes_its_last_bytes_and_disables_the_interrupt_is_not_interrupted_again(port: Port) -> None:
    """What Linux does for every line of output: the interrupt would cost two exits and find nothing."""
    port.set(IER, 3)
    assert port.interrupted()
    assert port.source() == EMPTY
    port.get(LSR)
    port.send(b"last")
    port.set(IER, 1)
    assert port.source() == NONE
    port.loop.poll()
    assert port.interrupted() is False


def test_a_driver_that_does_not_look_is_interrupted_when_the_host_has_the_bytes(port: Port) -> None:
    port.set(IER, 2)
    port.source()
    for data in (b"a", b"b"):
        port.interrupted()
        port.send(data)
        assert not port.interrupted()
        port.loop.poll()
        assert port.interrupted()
        assert port.host.got.endswith(data)


def test_an_interrupt_that_stays_pending_is_sent_again(port: Port) -> None:
    """Linux leaves after 512 rounds, even if more came meanwhile; nothing may have to fall and rise for it to come back."""
    port.set(FCR_IIR, 1)
    port.set(IER, 1)
    port.uart.receive(b"more than a driver reads in one interrupt")
    assert port.interrupted()
    port.source()
    port.get(DATA)
    for _ in range(3):
        port.loop.poll()
        assert port.interrupted()
    port.drain()
    port.line.take()
    port.loop.poll()
    assert not port.interrupted()


def test_without_fifos_every_byte_is_an_interrupt(port: Port) -> None:
    port.set(IER, 1)
    port.uart.receive(b"abc")
    for byte in b"abc":
        assert port.interrupted()
        assert port.get(DATA) == byte
    assert not port.interrupted()


def test_a_look_at_a_higher_source_does_not_take_back_the_transmitters(port: Port) -> None:
    port.set(IER, 3)
    port.uart.receive(b"x")
    assert port.source() == AVAILABLE
    port.get(DATA)
    assert port.source() == EMPTY


def test_sources_come_in_order_of_priority(port: Port) -> None:
    port.set(FCR_IIR, 1)
    port.set(MCR, 0x10)
    port.send(bytes(17))  # the 17th overruns
    port.set(MCR, 0x1F)  # modem lines change
    port.set(IER, 0x0F)
    assert port.source() == STATUS
    assert port.get(LSR) & OE
    assert port.source() == AVAILABLE
    port.burst()
    assert port.source() == EMPTY
    assert port.source() == MODEM
    assert port.get(MSR) & 0x0F
    assert port.source() == NONE


def test_enabling_raises_what_is_pending_already(port: Port) -> None:
    port.uart.receive(b"x")
    port.set(IER, 1)
    assert port.interrupted()
    port.set(IER, 1)  # a driver that lost an edge asks again this way
    assert port.interrupted()


# Loopback and line status


def test_loopback_keeps_bytes_from_the_host_and_from_the_guest_apart(port: Port) -> None:
    port.set(FCR_IIR, 1)
    port.uart.receive(b"host")
    port.set(MCR, 0x10)
    assert port.get(LSR) & DR == 0
    port.send(b"guest")
    assert port.drain() == b"guest"
    port.set(MCR, 0x08)
    assert port.drain() == b"host"
    port.loop.poll()
    assert port.host.got == b""


def test_an_overrun_is_reported_once(port: Port) -> None:
    port.set(FCR_IIR, 1)
    port.set(MCR, 0x10)
    port.send(bytes(range(17)))
    assert port.get(LSR) & OE
    assert port.get(LSR) & OE == 0
    assert port.drain() == bytes(range(16))


def test_without_fifos_an_overrun_replaces_the_byte(port: Port) -> None:
    port.set(MCR, 0x10)
    port.send(b"ab")
    assert port.get(LSR) & (OE | DR) == OE | DR
    assert port.drain() == b"b"


def test_a_looped_break_is_a_zero_byte_with_an_error(port: Port) -> None:
    port.set(FCR_IIR, 1)
    port.set(MCR, 0x10)
    port.set(LCR, 0x43)
    assert port.get(LSR) & (BI | DR | FIFO_ERROR) == BI | DR | FIFO_ERROR
    assert port.get(LSR) & (BI | FIFO_ERROR) == 0
    assert port.drain() == b"\0"


@pytest.mark.parametrize(("mcr", "msr"), [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x10, 0x00)])
def test_looped_modem_lines(port: Port, mcr: int, msr: int) -> None:
    port.set(MCR, mcr)
    assert port.get(MSR) & 0xF0 == msr


def test_modem_changes_are_told_once_and_ring_only_at_its_end(port: Port) -> None:
    port.set(MCR, 0x10)
    port.get(MSR)
    port.set(MCR, 0x1F)
    assert port.get(MSR) == 0xFB  # all lines up; changed: CTS, DSR, DCD, and not the ring indicator
    assert port.get(MSR) == 0xF0
    port.set(MCR, 0x10)
    assert port.get(MSR) == 0x0F


# Input


def test_setting_the_port_up_loses_nothing_that_was_typed_ahead(port: Port) -> None:
    port.uart.receive(b"root\n")
    port.set(FCR_IIR, 0x01)
    port.set(FCR_IIR, 0x07)
    port.set(FCR_IIR, 0x00)
    assert port.drain() == b"root\n"


def test_the_host_is_told_once_when_a_full_buffer_is_half_empty(port: Port) -> None:
    port.uart.receive(bytes(INPUT))
    assert port.uart.input_room() == 0
    while port.uart.input_room() < INPUT // 2:
        assert port.host.wanted == 0
        port.get(DATA)
        port.loop.poll()
    assert port.host.wanted == 1
    port.drain()
    assert port.host.wanted == 1


def test_a_paste_arrives_in_bursts_that_let_the_guest_out_of_its_interrupt(port: Port) -> None:
    paste = bytes(range(200)) * 5
    port.set(FCR_IIR, 1)
    port.set(IER, 1)
    port.uart.receive(paste)
    bursts = []
    while port.interrupted():
        bursts.append(port.burst())
        assert port.source() == NONE
        port.loop.poll()
    assert b"".join(bursts) == paste
    assert {len(burst) for burst in bursts[:-1]} == {16}


def test_a_key_is_there_at_once_and_the_next_one_a_little_later(port: Port) -> None:
    port.uart.receive(b"a")
    assert port.burst() == b"a"
    port.uart.receive(b"b")
    assert port.burst() == b""
    port.loop.poll()
    assert port.burst() == b"b"


def test_reading_without_input_reads_zero(port: Port) -> None:
    assert port.get(DATA) == 0


# Output


def test_bytes_written_one_by_one_reach_the_host_together(port: Port) -> None:
    port.send(b"Linux version 6.1 " * 50)
    assert port.host.writes == 0
    port.loop.poll()
    assert (bytes(port.host.got), port.host.writes) == (b"Linux version 6.1 " * 50, 1)


@pytest.mark.parametrize("ier", [0, 7])
def test_a_line_reaches_the_host_as_one_and_when_it_ends(port: Port, ier: int) -> None:
    port.set(IER, ier)
    port.send(b"Linux version 6.1\r\nCommand line: console=ttyS0\r\n[")
    assert (bytes(port.host.got), port.host.writes) == (b"Linux version 6.1\r\nCommand line: console=ttyS0\r\n", 2)
    port.loop.poll()
    assert (port.host.got[-1:], port.host.writes) == (b"[", 3)


def test_a_driver_that_polls_sees_errors_and_input_all_the_same(port: Port) -> None:
    assert port.get(LSR) == THRE | TEMT
    port.uart.receive(b"x")
    assert port.get(LSR) == THRE | TEMT | 0x01
    port.set(MCR, 0x10)
    port.set(LCR, 0x43)  # break, looped back
    assert port.get(LSR) & 0x10
    assert not port.get(LSR) & 0x10


def test_a_host_that_does_not_read_makes_the_guest_wait_and_loses_nothing(port: Port) -> None:
    port.host.room = 0
    port.set(IER, 2)
    sent = 0
    while port.get(LSR) & THRE:
        port.send(b"x")
        sent += 1
    assert sent == FULL
    assert port.get(LSR) & TEMT == 0
    assert port.source() == NONE
    port.send(b"y" * 200)  # a late burst, from a hypervisor that collects writes
    port.line.take()
    port.loop.poll()
    port.host.room = None
    port.uart.output_ready()
    assert port.host.got == b"x" * FULL + b"y" * 200
    assert port.get(LSR) & (THRE | TEMT) == THRE | TEMT
    assert (port.interrupted(), port.source()) == (True, EMPTY)
    assert port.reports == []


def test_a_guest_that_never_waits_is_bounded_and_the_loss_is_reported(port: Port) -> None:
    port.host.room = 0
    port.send(b"x")
    port.uart.flush()
    port.uart._output.waiting[:] = bytes(LIMIT - 1)
    port.send(b"abc")
    assert len(port.uart._output.waiting) == LIMIT
    port.host.room = None
    port.uart.output_ready()
    assert port.reports == ["serial: 2 bytes of output lost: the guest wrote on while nobody read 1048576 bytes"]
    assert port.host.got.endswith(b"a")


def test_a_guest_that_loses_bytes_for_long_is_reported_now_and_then_and_at_the_end(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000_000_000_000
    monkeypatch.setattr("vmm_core.devices.serial_output.time.monotonic_ns", lambda: now)
    port.host.room = 0
    port.send(b"x")
    port.uart.flush()
    port.uart._output.waiting[:] = bytes(LIMIT)
    for _ in range(100):
        port.send(b"y")
        port.loop.poll()
    now += 60_000_000_000
    port.send(b"z" * 7)
    port.loop.poll()
    port.send(b"end")
    port.uart.close(patience_ms=0)
    assert [report.split(" bytes")[0] for report in port.reports] == [f"serial: {n}" for n in (1, 106, 3, LIMIT)]


def test_a_port_with_nothing_at_the_other_end_swallows_and_still_interrupts() -> None:
    line, loop = RecordedLine(4), DirectLoop("test", VirtualClock())
    uart = Serial(line, loop, lambda line: None)
    uart.write(IER, 1, 2)
    line.take()
    uart.read(FCR_IIR, 1)
    uart.write(DATA, 1, 0x41)
    assert uart.read(LSR, 1) == 0x60
    assert line.take() == 1
    uart.close()
    loop.close()


@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=40).map(lambda data: ("send", data)),
            st.integers(0, 50).map(lambda room: ("room", room)),
            st.just(("poll", None)),
        ),
        max_size=30,
    )
)
def test_output_arrives_whole_and_in_order_however_the_host_takes_it(steps: list[tuple[str, object]]) -> None:
    port = Port()
    sent = bytearray()
    port.host.room = 0
    for step, value in steps:
        if step == "send":
            assert isinstance(value, bytes)
            port.send(value)
            sent += value
        elif step == "room":
            assert isinstance(value, int)
            port.host.room = value
            if port.uart._output._blocked:
                port.uart.output_ready()
        else:
            port.loop.poll()
        assert sent.startswith(port.host.got)
    port.host.room = None
    port.uart.output_ready()
    port.loop.poll()
    assert port.host.got == sent
    port.close()


def test_a_driver_that_is_through_with_its_bytes_wakes_no_loop_for_them(port: Port) -> None:
    """Linux enables the interrupt of an empty transmitter, answers it with bytes, and disables it after the last one."""
    for echo in (b"l", b"s", b" -l"):
        port.set(IER, 7)
        assert port.source() == EMPTY
        port.send(echo)
        assert not port.host.got.endswith(echo)
        port.set(IER, 5)
        assert port.host.got.endswith(echo)
    assert port.host.got == b"ls -l"


def test_a_long_output_does_not_wait_for_its_end(port: Port) -> None:
    port.set(IER, 7)
    port.send(b"x" * 5000)
    assert len(port.host.got) == 4096


def test_a_host_that_takes_nothing_is_asked_again_only_when_it_says_so(port: Port) -> None:
    port.host.room = 0
    for _ in range(10):
        port.send(b"x")
        port.set(IER, 5)
        port.loop.poll()
    assert port.host.writes == 1
    port.host.room = None
    port.uart.output_ready()
    assert port.host.got == b"x" * 10


def test_a_pause_shows_what_was_written_before_it(port: Port) -> None:
    port.send(b"last words")
    port.uart.pause()
    assert port.host.got == b"last words"
    port.uart.resume()


def test_close_writes_the_last_line_and_closes_the_back_end(port: Port) -> None:
    port.send(b"reboot: Power down\r\n")
    port.uart.close()
    port.uart.close()
    assert (bytes(port.host.got), port.host.closed) == (b"reboot: Power down\r\n", 1)


def test_close_does_not_wait_for_ever_and_reports_what_it_lost(port: Port) -> None:
    port.host.room = 3
    port.send(b"farewell")
    port.uart.close(patience_ms=20)
    assert port.host.closed == 1
    assert port.reports == ["serial: 5 bytes of output lost: nobody read them"]


def test_the_scratch_register_tells_its_hook(port: Port) -> None:
    seen: list[int] = []
    port.uart.on_scratch(seen.append)
    port.set(SCR, 0x5A)
    assert (seen, port.get(SCR)) == ([0x5A], 0x5A)


# State

accesses = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(0, 7), st.sampled_from([1, 2, 4])),
        st.tuples(st.just("set"), st.integers(0, 7), st.integers(0, 0xFFFF_FFFF)),
        st.tuples(st.just("receive"), st.binary(max_size=20), st.just(0)),
    ),
    max_size=40,
)


def played(steps: list[tuple[str, object, int]]) -> Port:
    port = Port()
    for step, where, value in steps:
        if step == "receive":
            assert isinstance(where, bytes)
            port.uart.receive(where[: port.uart.input_room()])
        elif step == "get":
            assert isinstance(where, int)
            assert 0 <= port.uart.read(where, value) < 1 << 8 * value
        else:
            assert isinstance(where, int)
            port.uart.write(where, 4 if value > 0xFF else 1, value)
    return port


@given(accesses)
def test_state_survives_whatever_a_guest_did(steps: list[tuple[str, object, int]]) -> None:
    port, fresh = played(steps), Port()
    state = port.uart.save()
    fresh.uart.restore(decode(encode(state), SerialState, "serial"))
    assert fresh.uart.save() == state
    registers = (FCR_IIR, MSR, LSR, DATA, FCR_IIR, MSR, LSR)
    assert [fresh.get(r) for r in registers] == [port.get(r) for r in registers]
    fresh.loop.poll()
    assert fresh.host.got == state.output
    port.close()
    fresh.close()


def test_bytes_that_had_not_left_at_the_save_still_interrupt_after_it(port: Port) -> None:
    port.set(IER, 2)
    port.source()
    port.send(b"x")
    fresh = Port()
    fresh.uart.restore(port.uart.save())
    fresh.loop.poll()
    assert fresh.interrupted()
    assert fresh.source() == EMPTY
    fresh.close()


@given(accesses)
def test_reset_gives_the_power_on_registers_back(steps: list[tuple[str, object, int]]) -> None:
    port = played(steps)
    port.uart.reset()
    registers = port.uart.save()._replace(input=b"", output=b"")
    fresh = Port()
    assert registers == fresh.uart.save()
    port.close()
    fresh.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ier", 0x10),
        ("fcr", 2),
        ("mcr", 0x20),
        ("divisor", 0x10000),
        ("scr", -1),
        ("looped", bytes(17)),
        ("input", bytes(INPUT + 1)),
        ("arrived", 1),
    ],
)
def test_a_state_that_no_uart_can_be_in_is_refused(port: Port, field: str, value: object) -> None:
    state = port.uart.save()._replace(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(StateError, match=rf"^serial\.{field}"):
        port.uart.restore(state)
    with pytest.raises(StateError, match="serial"):
        port.uart.restore(None)
