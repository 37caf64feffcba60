"""Slots that are filled later: what the register shows, when an event is sent, and what a power-on makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.devices.acpi_slots import AcpiSlots, AcpiSlotsState
from vmm_core.errors import StateError
from vmm_core.state import decode, encode

EVENT_4 = 0x100 << 4


@pytest.fixture
def events() -> list[int]:
    return []


@pytest.fixture
def slots(events: list[int]) -> AcpiSlots:
    """Slots 4 and 5 were empty at power-on."""
    slots = AcpiSlots(events.append)
    slots.clear(4)
    slots.clear(5)
    slots.reset()
    return slots


def test_an_empty_slot_that_is_filled_appears_with_an_event(slots: AcpiSlots, events: list[int]) -> None:
    assert slots.empty == [4, 5]
    assert slots.read(0, 4) == 0
    slots.fill(4)
    assert events == [EVENT_4]
    assert slots.read(0, 4) == 1 << 4


def test_a_guest_is_told_once_of_a_slot_that_comes_and_goes(slots: AcpiSlots, events: list[int]) -> None:
    for _ in range(3):
        slots.fill(4)
        slots.clear(4)
    assert events == [EVENT_4]
    assert slots.read(0, 4) == 1 << 4  # Linux would not take it a second time


def test_a_slot_that_was_there_at_power_on_needs_no_event(slots: AcpiSlots, events: list[int]) -> None:
    slots.clear(0)
    slots.fill(0)
    assert events == []
    assert slots.read(0, 4) == 0


def test_the_next_power_on_finds_what_is_filled_then(slots: AcpiSlots, events: list[int]) -> None:
    slots.fill(4)
    slots.clear(0)
    slots.reset()
    assert slots.empty == [0, 5]
    assert slots.read(0, 4) == 0
    slots.fill(0)
    assert events == [EVENT_4, 0x100]


def test_writing_does_nothing_and_parts_can_be_read(slots: AcpiSlots) -> None:
    slots.fill(4)
    slots.write(0, 4, 0)
    assert [slots.read(offset, 1) for offset in range(4)] == [1 << 4, 0, 0, 0]


def test_a_slot_without_an_event_is_refused(slots: AcpiSlots) -> None:
    for number in (-1, 24):
        with pytest.raises(ValueError, match="has no event"):
            slots.fill(number)


@given(st.lists(st.tuples(st.sampled_from(["fill", "clear", "reset"]), st.integers(0, 23)), max_size=20))
def test_a_restored_copy_behaves_as_the_original(steps: list[tuple[str, int]]) -> None:
    first, second = AcpiSlots(lambda event: None), AcpiSlots(lambda event: None)
    for step, number in steps:
        getattr(first, step)(*(() if step == "reset" else (number,)))
    second.restore(decode(encode(first.save()), AcpiSlotsState, "acpi-slots"))
    assert second.save() == first.save()
    for each in (first, second):
        each.reset()
    assert second.empty == first.empty


@pytest.mark.parametrize("state", [AcpiSlotsState(1 << 24, 0, 0), AcpiSlotsState(0, -1, 0), None])
def test_a_state_that_cannot_be_is_refused(slots: AcpiSlots, state: object) -> None:
    with pytest.raises(StateError, match="acpi-slots"):
        slots.restore(state)
