"""The second I/O APIC: what a driver writes into the redirection table is where the interrupt goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.errors import HypervisorError, StateError
from vmm_core.state import decode, encode
from vmm_core.x86_64.io_apic import IoApic, IoApicState

IOREGSEL, IOWIN = 0x00, 0x10
MASKED = 1 << 16


class Routes(dict[int, tuple[int, int]]):
    """The hypervisor's side: interrupt number to message address and data."""

    broken = False

    def route_message(self, gsi: int, address: int, data: int) -> None:
        if self.broken:
            raise HypervisorError("no more routes")
        self[gsi] = (address, data)

    def unroute_message(self, gsi: int) -> None:
        self.pop(gsi, None)


@pytest.fixture
def routes() -> Routes:
    return Routes()


@pytest.fixture
def io_apic(routes: Routes) -> IoApic:
    return IoApic(routes, 1, 24)


def get(io_apic: IoApic, register: int) -> int:
    io_apic.write(IOREGSEL, 4, register)
    return io_apic.read(IOWIN, 4)


def put(io_apic: IoApic, register: int, value: int) -> None:
    io_apic.write(IOREGSEL, 4, register)
    io_apic.write(IOWIN, 4, value)


def redirect(io_apic: IoApic, pin: int, entry: int) -> None:
    """Write an entry as Linux does: the high half first, the half with the mask last."""
    put(io_apic, 0x11 + 2 * pin, entry >> 32)
    put(io_apic, 0x10 + 2 * pin, entry & 0xFFFF_FFFF)


def test_it_says_what_it_is(io_apic: IoApic) -> None:
    assert get(io_apic, 0) == get(io_apic, 2) == 1 << 24
    assert get(io_apic, 1) == 0x0017_0011  # 24 entries, an 82093AA
    assert io_apic.read(IOREGSEL, 4) == 1


def test_every_pin_is_masked_at_first(io_apic: IoApic, routes: Routes) -> None:
    assert [get(io_apic, 0x10 + 2 * pin) for pin in range(24)] == [MASKED] * 24
    assert routes == {}


def test_an_entry_is_the_message_that_its_interrupt_sends(io_apic: IoApic, routes: Routes) -> None:
    redirect(io_apic, 3, 0x05 << 56 | 0x31)
    assert routes == {27: (0xFEE0_5000, 0x31)}


def test_logical_destinations_and_delivery_modes_are_kept(io_apic: IoApic, routes: Routes) -> None:
    redirect(io_apic, 0, 0xFF << 56 | 1 << 11 | 1 << 8 | 0x41)
    assert routes == {24: (0xFEEF_F004, 0x141)}


def test_a_level_triggered_entry_sends_edges(io_apic: IoApic, routes: Routes) -> None:
    redirect(io_apic, 0, 1 << 15 | 1 << 13 | 0x41)
    assert routes == {24: (0xFEE0_0000, 0x41)}
    assert get(io_apic, 0x10) == 1 << 15 | 1 << 13 | 0x41


def test_masking_takes_the_route_away_and_unmasking_brings_it_back(io_apic: IoApic, routes: Routes) -> None:
    redirect(io_apic, 3, 0x31)
    redirect(io_apic, 3, MASKED | 0x31)
    assert routes == {}
    redirect(io_apic, 3, 0x31)
    assert routes == {27: (0xFEE0_0000, 0x31)}


def test_what_is_read_only_stays_zero(io_apic: IoApic) -> None:
    redirect(io_apic, 0, (1 << 64) - 1)
    assert get(io_apic, 0x10) == 0x1_FFFF & ~(1 << 12 | 1 << 14)
    assert get(io_apic, 0x11) == 0xFF00_0000
    put(io_apic, 0, 0xFFFF_FFFF)
    assert get(io_apic, 0) == 0xF << 24
    put(io_apic, 1, 0)
    assert get(io_apic, 1) == 0x0017_0011


def test_registers_that_do_not_exist_read_as_zero_and_take_nothing(io_apic: IoApic, routes: Routes) -> None:
    for register in (3, 0xF, 0x40, 0xFF):
        put(io_apic, register, 0x31)
        assert get(io_apic, register) == 0
    io_apic.write(0x20, 4, 0x31)
    assert io_apic.read(0x20, 4) == 0
    assert routes == {}


def test_reset_masks_everything(io_apic: IoApic, routes: Routes) -> None:
    redirect(io_apic, 3, 0x31)
    put(io_apic, 0, 5 << 24)
    io_apic.reset()
    assert routes == {}
    assert get(io_apic, 0) == 1 << 24
    assert get(io_apic, 0x16) == MASKED


def test_a_hypervisor_that_cannot_leaves_the_pin_as_it_was(io_apic: IoApic, routes: Routes) -> None:
    routes.broken = True
    redirect(io_apic, 3, 0x31)
    assert get(io_apic, 0x16) == MASKED


@given(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 2**64 - 1)), max_size=40))
def test_a_restored_copy_sends_the_same_messages_and_saves_the_same(writes: list[tuple[int, int]]) -> None:
    routes, others = Routes(), Routes()
    io_apic = IoApic(routes, 1, 24)
    for pin, entry in writes:
        redirect(io_apic, pin, entry)
    state = decode(encode(io_apic.save()), IoApicState, "io-apic")
    copy = IoApic(others, 1, 24)
    redirect(copy, 5, 0x77)
    copy.restore(state)
    assert others == routes
    assert copy.save() == io_apic.save()


@pytest.mark.parametrize(
    "state",
    [
        IoApicState(0, 0, (MASKED,) * 23),
        IoApicState(0, 0, (MASKED,) * 23 + (1 << 12,)),
        IoApicState(0, 0, (MASKED,) * 23 + (-1,)),
        IoApicState(256, 0, (MASKED,) * 24),
        IoApicState(0, 1, (MASKED,) * 24),
    ],
    ids=["too few entries", "read-only bit", "negative", "index", "id"],
)
def test_a_state_that_cannot_be_is_refused(io_apic: IoApic, state: IoApicState) -> None:
    with pytest.raises(StateError, match="io-apic"):
        io_apic.restore(state)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=30
    )
)
def test_no_access_breaks_it(accesses: list[tuple[bool, int, int, int]]) -> None:
    io_apic = IoApic(Routes(), 1, 24)
    for write, offset, size, value in accesses:
        if write:
            io_apic.write(offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= io_apic.read(offset, size) < 1 << 8 * size
