"""Test mode: a machine without KVM, and the line protocol that drives it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.bus import Bus
from vmm_core.clock import VirtualClock
from vmm_core.directloop import DirectLoop
from vmm_core.errors import HypervisorError, StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.hypervisor.testmode import MachineAccess, RecordedLine, RecordingHypervisor
from vmm_core.state import decode, encode
from vmm_core.testprotocol import LONGEST_REQUEST, TestProtocol

RAM = 0x20000
HIGH = 0x100000
DEVICE = 0x80000


class Registers:
    """A device that keeps what is written and remembers how."""

    def __init__(self) -> None:
        self.cells = bytearray(0x100)
        self.seen: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return int.from_bytes(self.cells[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size))
        self.cells[offset : offset + size] = value.to_bytes(size, "little")


class Nobody:
    def vcpu_exited(self, index: int, reason: Any, report: str) -> None:
        raise AssertionError("an idle vCPU exited")


class Bench:
    """A machine with RAM in two pieces, one memory device, one port device, and the protocol in front."""

    def __init__(self) -> None:
        self.hypervisor = RecordingHypervisor()
        self.memory = GuestMemory([(0, RAM), (HIGH, RAM)])
        self.hypervisor.map_memory(self.memory)
        self.mmio, self.pio = Bus("memory bus", 1 << 52), Bus("port bus", 1 << 16)
        self.device, self.port = Registers(), Registers()
        self.mmio.add(DEVICE, 0x100, self.device, "device")
        self.pio.add(0x3F8, 8, self.port, "port")
        self.clock = VirtualClock()
        self.access = MachineAccess(self.hypervisor, self.memory, self.mmio, self.pio, self.clock)
        self.protocol = TestProtocol(self.access)

    def ask(self, request: str) -> str:
        reply = self.protocol.receive(request.encode() + b"\n").decode()
        assert reply.endswith("\r\n")
        return reply[:-2]

    def close(self) -> None:
        self.hypervisor.close()
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


# Requests and replies


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        ("write 0x1000 4 0a0b0c0d", "OK"),
        ("read 0x1000 4", "OK 0x0a0b0c0d"),
        ("read 1000 2", "OK 0x0a0b"),
        ("readb 0x1001", "OK 0x000000000000000b"),
        ("readw 0x1000", "OK 0x0000000000000b0a"),
        ("readl 0x1000", "OK 0x000000000d0c0b0a"),
        ("readq 0x1000", "OK 0x000000000d0c0b0a"),
        ("writeb 1000 ff", "OK"),
        ("writew 1002 0xBEEF", "OK"),
        ("read 1000 5", "OK 0xff0befbe00"),
        ("writel 1000 1", "OK"),
        ("writeq 1008 0x0123456789abcdef", "OK"),
        ("read 1000 10", "OK 0x0100000000000000efcdab8967452301"),
        ("write 1000 2 0xabc", "OK"),  # an odd digit count gets a leading zero
        ("read 1000 2", "OK 0x0abc"),
        ("memset 1000 7 0a0B", "OK"),
        ("read 1000 8", "OK 0x0a0b0a0b0a0b0a00"),
        ("read 1000 0", "OK 0x"),
        ("  readb   1001  ", "OK 0x000000000000000b"),
        ("clock_step", "OK 0"),
        ("clock_step 100", "OK 100"),
        ("clock_step -5", "OK 100"),
        ("clock_set 250", "OK 250"),
        ("clock_set 10", "OK 250"),
        ("query_msix 4276092928 33", "OK FALSE"),
        ("query_intx 48", "OK FALSE"),
        ("eoi_intx 48", "OK FALSE"),
        ("query_irq 4", "OK FALSE"),
        ("outb 3ff 5a", "OK"),
        ("inb 0x3ff", "OK 0x000000000000005a"),
        ("outw 3f8 1234", "OK"),
        ("inw 3f8", "OK 0x0000000000001234"),
        ("outl 3f8 12345678", "OK"),
        ("inl 3f8", "OK 0x0000000012345678"),
        ("inb 80", "OK 0x0000000000000000"),
        ("outb 80 1", "OK"),
        ("hello world", "Unsupported command: hello"),
        ("READB 0", "Unsupported command: READB"),
        ("", "Unsupported command: "),
    ],
)
def test_replies_are_the_references_line_by_line(bench: Bench, request_: str, reply: str) -> None:
    """Each request on a machine that has had the ones above it."""
    for before, expected in CONVERSATION:
        if (before, expected) == (request_, reply):
            break
        bench.ask(before)
    assert bench.ask(request_) == reply


CONVERSATION: list[tuple[str, str]] = next(
    mark.args[1]
    for mark in test_replies_are_the_references_line_by_line.pytestmark  # type: ignore[attr-defined]
    if mark.name == "parametrize"
)


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        ("readb", "Error: readb: 1 argument expected, 0 given"),
        ("read 0", "Error: read: 2 arguments expected, 1 given"),
        ("write 0 1", "Error: write: 3 arguments expected, 2 given"),
        ("readb 0xzz", "Error: readb: '0xzz' is not a hexadecimal number"),
        ("readb 0x", "Error: readb: '0x' is not a hexadecimal number"),
        ("readb 0X10", "Error: readb: '0X10' is not a hexadecimal number"),
        ("readb 1_0", "Error: readb: '1_0' is not a hexadecimal number"),
        ("readb -1", "Error: readb: '-1' is not a hexadecimal number"),
        ("readb 10000000000000000", "Error: readb: '10000000000000000' is more than 0xffffffffffffffff"),
        ("readq ffffffffffffffff", "Error: readq: 0x8 bytes at 0xffffffffffffffff go beyond the address space"),
        ("writeb 0 100", "Error: writeb: '100' is more than 0xff"),
        ("writew 0 10000", "Error: writew: '10000' is more than 0xffff"),
        ("write 0 2 aa", "Error: write: 2 bytes announced, 1 given"),
        ("write 0 1 aabb", "Error: write: 1 bytes announced, 2 given"),
        ("memset 0 8 abc", "Error: memset: the pattern has an odd number of digits"),
        ("read 0 ffffffffffff", "Error: read: 0xffffffffffff bytes are more than 0x1000000"),
        ("clock_step 1e9", "Error: clock_step: '1e9' is not a decimal number"),
        ("clock_step 9223372036854775808", "Error: clock_step: '9223372036854775808' is more than 9223372036854775807"),
        ("clock_set", "Error: clock_set: 1 argument expected, 0 given"),
        ("query_msix 0xfee00000 33", "Error: query_msix: '0xfee00000' is not a decimal number"),
        ("query_msix 1 4294967296", "Error: query_msix: '4294967296' is more than 4294967295"),
        ("query_irq ٣", "Error: query_irq: '��' is not a decimal number"),
        ("inb 10000", "Error: inb: '10000' is more than 0xffff"),
    ],
)
def test_a_malformed_request_is_answered_and_ends_nothing(bench: Bench, request_: str, reply: str) -> None:
    assert bench.ask(request_) == reply
    assert bench.ask("readb 0") == "OK 0x0000000000000000"


def test_a_number_of_a_million_digits_is_answered_at_once(bench: Bench) -> None:
    assert bench.ask("clock_set " + "9" * 1_000_000).startswith("Error: clock_set: '99999")
    assert bench.ask("readb " + "f" * 1_000_000).startswith("Error: readb: 'fffff")
    assert bench.ask("readb " + "0" * 1_000_000) == "OK 0x0000000000000000"


# Framing

requests = st.sampled_from(
    ["readb 0", "writel 1000 1", "read 1000 4", "nonsense", "readb zz", "clock_step 5", "write 1000 3 010203", "write 0 2 01"]
)


def replies_of(pieces: list[bytes]) -> bytes:
    bench = Bench()
    try:
        return b"".join(bench.protocol.receive(piece) for piece in pieces)
    finally:
        bench.close()


@given(st.lists(requests, min_size=1, max_size=6), st.sampled_from([b"\n", b"\r\n"]))
def test_requests_that_arrive_together_are_answered_like_single_ones(lines: list[str], end: bytes) -> None:
    encoded = [line.encode() + end for line in lines]
    assert replies_of([b"".join(encoded)]) == replies_of(encoded)


@given(st.lists(requests, min_size=1, max_size=6))
def test_a_peer_that_sends_no_newlines_gets_the_same_replies(lines: list[str]) -> None:
    whole = [line for line in lines if line != "write 0 2 01"]  # looks like the beginning of a longer one
    assert replies_of([line.encode() for line in whole]) == replies_of([line.encode() + b"\n" for line in whole])


@given(st.lists(requests, min_size=1, max_size=6))
def test_a_newline_that_comes_after_its_request_is_not_another_request(lines: list[str]) -> None:
    pieces = [piece for line in lines for piece in (line.encode(), b"\n")]
    assert replies_of(pieces) == replies_of([line.encode() + b"\n" for line in lines])


@given(st.binary(min_size=1, max_size=64), st.integers(1, 200))
def test_a_long_write_may_arrive_in_any_two_pieces(data: bytes, cut: int) -> None:
    request = f"write 0x1000 {len(data):x} {data.hex()}\n".encode()
    # Cut after the command and before the last byte: one digit is a byte too, when it is all that came.
    cut = max(len("write"), min(len(request) - 3, cut))
    bench = Bench()
    replies = bench.protocol.receive(request[:cut]) + bench.protocol.receive(request[cut:])
    assert replies == b"OK\r\n"
    assert bench.memory.read(0x1000, len(data)) == data
    bench.close()


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_no_bytes_end_the_connection_and_replies_are_lines(pieces: list[bytes]) -> None:
    replies = replies_of([*pieces, b"\nreadb 0\n"])
    assert replies.endswith(b"OK 0x0000000000000000\r\n")
    assert all(line == b"" or line.endswith(b"\r") for line in replies.split(b"\n"))


def test_an_endless_request_is_refused_once_and_then_skipped(bench: Bench) -> None:
    bench.ask("readb 0")
    block = b"a" * 65536
    replies = b"".join(bench.protocol.receive(block) for _ in range(2 * LONGEST_REQUEST // len(block)))
    assert replies == b"Error: a request is longer than 4194304 bytes\r\n"
    assert len(bench.protocol._pending) <= LONGEST_REQUEST
    assert bench.protocol.receive(b"\nreadb 0\n") == b"OK 0x0000000000000000\r\n"


# Accesses


def test_an_access_reaches_a_device_once_and_whole(bench: Bench) -> None:
    for size, letter in ((1, "b"), (2, "w"), (4, "l"), (8, "q")):
        bench.ask(f"write{letter} {DEVICE + 0x10:x} 7")
        assert bench.ask(f"read{letter} {DEVICE + 0x10:x}") == f"OK 0x{7:016x}"
        assert bench.device.seen == [(0x10, size), (0x10, size)]
        bench.device.seen.clear()


def test_a_buffer_is_cut_into_accesses_that_a_device_understands(bench: Bench) -> None:
    bench.ask(f"write {DEVICE + 1:x} c 0102030405060708090a0b0c")
    assert bench.device.seen == [(1, 1), (2, 2), (4, 4), (8, 4), (12, 1)]
    assert bench.ask(f"read {DEVICE + 1:x} c") == "OK 0x0102030405060708090a0b0c"


def test_what_is_not_there_reads_as_zeros_and_takes_writes(bench: Bench) -> None:
    assert bench.ask("readl d0000000") == "OK 0x0000000000000000"
    assert bench.ask("writel d0000000 1") == "OK"
    assert bench.ask("read d0000000 3") == "OK 0x000000"


def test_a_buffer_may_cross_from_ram_to_nothing_and_back_to_ram(bench: Bench) -> None:
    assert bench.ask(f"memset 0 {HIGH + 16:x} 5a") == "OK"
    assert bench.memory.read(RAM - 4, 4) == b"ZZZZ"
    assert bench.memory.read(HIGH, 17) == b"Z" * 16 + b"\0"
    assert bytes(bench.device.cells) == b"Z" * 0x100
    assert bench.ask(f"read {RAM - 2:x} 4") == "OK 0x5a5a0000"


# Doorbells


class Doorbell:
    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)

    def rung(self) -> int:
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    bell = Doorbell()
    yield bell
    os.close(bell.fd)


def test_a_write_to_a_doorbell_rings_and_does_not_reach_the_device(bench: Bench, bell: Doorbell) -> None:
    bench.hypervisor.add_ioeventfd(DEVICE + 0x50, 4, bell.fd)
    assert bench.ask(f"writel {DEVICE + 0x50:x} 3") == "OK"
    assert (bell.rung(), bench.device.seen) == (1, [])


def test_a_write_of_another_size_or_value_is_the_devices(bench: Bench, bell: Doorbell) -> None:
    bench.hypervisor.add_ioeventfd(DEVICE + 0x50, 4, bell.fd, match=3)
    bench.ask(f"writew {DEVICE + 0x50:x} 3")
    bench.ask(f"writel {DEVICE + 0x50:x} 4")
    assert (bell.rung(), len(bench.device.seen)) == (0, 2)
    bench.ask(f"writel {DEVICE + 0x50:x} 3")
    assert (bell.rung(), len(bench.device.seen)) == (1, 2)


def test_a_doorbell_of_any_size_rings_for_all(bench: Bench, bell: Doorbell) -> None:
    bench.hypervisor.add_ioeventfd(DEVICE, 0, bell.fd)
    for letter in "bwlq":
        bench.ask(f"write{letter} {DEVICE:x} 1")
    assert bell.rung() == 4


def test_port_doorbells_are_ports_only(bench: Bench, bell: Doorbell) -> None:
    bench.hypervisor.add_ioeventfd(0x3F8, 1, bell.fd, port=True)
    bench.ask("writeb 3f8 1")
    assert bell.rung() == 0
    bench.ask("outb 3f8 1")
    assert (bell.rung(), bench.port.seen) == (1, [])


def test_a_removed_doorbell_is_silent(bench: Bench, bell: Doorbell) -> None:
    bench.hypervisor.add_ioeventfd(DEVICE, 4, bell.fd, match=1)
    with pytest.raises(HypervisorError, match="already"):
        bench.hypervisor.add_ioeventfd(DEVICE, 4, bell.fd, match=1)
    bench.hypervisor.remove_ioeventfd(DEVICE, 4, bell.fd, match=1)
    bench.ask(f"writel {DEVICE:x} 1")
    assert bell.rung() == 0
    with pytest.raises(HypervisorError, match="no ioeventfd"):
        bench.hypervisor.remove_ioeventfd(DEVICE, 4, bell.fd, match=1)


def test_a_doorbell_rung_without_end_neither_blocks_nor_fails(bench: Bench, bell: Doorbell) -> None:
    os.eventfd_write(bell.fd, (1 << 64) - 2)
    bench.hypervisor.add_ioeventfd(DEVICE, 4, bell.fd)
    assert bench.ask(f"writel {DEVICE:x} 1") == "OK"


# Interrupts


def test_an_edge_is_recorded_until_it_is_asked_for(bench: Bench) -> None:
    line = bench.hypervisor.interrupt_line(5)
    assert line is bench.hypervisor.interrupt_line(5)
    line.trigger()
    assert bench.ask("query_irq 6") == "OK FALSE"
    assert bench.ask("query_irq 5") == "OK TRUE"
    assert bench.ask("query_irq 5") == "OK FALSE"


def test_intx_is_asked_without_effect_and_taken_one_by_one(bench: Bench) -> None:
    line = bench.hypervisor.interrupt_line(48)
    line.trigger()
    line.trigger()
    assert [bench.ask("query_intx 48") for _ in range(2)] == ["OK TRUE", "OK TRUE"]
    assert [bench.ask("eoi_intx 48") for _ in range(3)] == ["OK TRUE", "OK TRUE", "OK FALSE"]
    assert bench.ask("query_intx 48") == "OK FALSE"


def test_an_edge_through_the_descriptor_is_an_edge(bench: Bench) -> None:
    line = bench.hypervisor.interrupt_line(5)
    os.eventfd_write(line.fileno(), 2)
    line.trigger()
    assert line.take() == 3
    assert line.fileno() == line.fileno()


def test_a_message_is_recorded_once_by_address_and_data(bench: Bench) -> None:
    bench.hypervisor.route_message(24, 0xFEE0_0000, 33)
    line = bench.hypervisor.interrupt_line(24)
    line.trigger()
    os.eventfd_write(line.fileno(), 1)
    assert bench.ask(f"query_msix {0xFEE0_0000} 34") == "OK FALSE"
    assert bench.ask(f"query_msix {0xFEE0_0000} 33") == "OK TRUE"
    assert bench.ask(f"query_msix {0xFEE0_0000} 33") == "OK FALSE"
    assert bench.ask("query_irq 24") == "OK FALSE"
    bench.hypervisor.unroute_message(24)
    line.trigger()
    assert bench.ask("query_irq 24") == "OK TRUE"


# Time


def test_time_moves_by_the_protocol_and_runs_devices(bench: Bench) -> None:
    loop = DirectLoop("test", bench.clock)
    ran: list[int] = []
    loop.call_later(33, lambda: ran.append(bench.clock.now()))
    loop.call_later(1000, lambda: ran.append(bench.clock.now()))
    assert bench.ask("clock_step") == "OK 33"
    assert ran == [33]
    assert bench.ask("clock_set 5000") == "OK 5000"
    assert ran == [33, 1000]
    assert bench.ask("clock_step") == "OK 5000"
    loop.close()


# The hypervisor's other duties


def test_vcpus_stand_idle_and_obey(bench: Bench) -> None:
    vcpu = bench.hypervisor.create_vcpu(1, bench.pio, bench.mmio, Nobody(), None)
    assert (vcpu.index, vcpu.thread_id) == (1, 0)
    vcpu.start()
    assert vcpu.thread_id != 0
    vcpu.resume()
    assert not vcpu.wait_paused(0)
    vcpu.request_pause()
    assert vcpu.wait_paused(0)
    vcpu.reset()
    vcpu.stop()
    vcpu.stop()
    assert vcpu.thread_id == 0


def test_a_vcpus_state_fits_that_vcpu_only(bench: Bench) -> None:
    one, two = (bench.hypervisor.create_vcpu(index, bench.pio, bench.mmio, Nobody(), None) for index in (0, 1))
    state = one.save()
    one.restore(decode(encode(state), type(state), "CPU 0"))  # type: ignore[type-var]
    assert one.save() == state
    with pytest.raises(StateError, match="CPU 1"):
        two.restore(state)


def test_records_are_state(bench: Bench) -> None:
    bench.hypervisor.interrupt_line(4).trigger()
    bench.hypervisor.route_message(24, 0xFEE0_0000, 33)
    bench.hypervisor.interrupt_line(24).trigger()
    saved = bench.hypervisor.vm_state.save()
    other = RecordingHypervisor()
    other.interrupt_line(9).trigger()
    other.vm_state.restore(decode(encode(saved), type(saved), "test mode"))  # type: ignore[type-var]
    assert other.vm_state.save() == saved
    assert other.take_message(0xFEE0_0000, 33)
    assert other.interrupt_line(4).take() == 1
    with pytest.raises(StateError, match="test mode"):
        other.vm_state.restore(None)


def test_a_dirty_log_is_refused_by_name(bench: Bench) -> None:
    for ask in (bench.hypervisor.start_dirty_log, bench.hypervisor.dirty_pages):
        with pytest.raises(HypervisorError, match="test mode keeps no dirty log"):
            ask()


def test_close_leaves_no_descriptor() -> None:
    gc.collect()  # what other tests left for it would go in the middle of this one
    before = {entry.name for entry in Path("/proc/self/fd").iterdir()}
    hypervisor = RecordingHypervisor()
    hypervisor.interrupt_line(1).fileno()
    hypervisor.close()
    hypervisor.close()
    line = RecordedLine(3)
    assert line.edges == 0
    assert {entry.name for entry in Path("/proc/self/fd").iterdir()} == before
