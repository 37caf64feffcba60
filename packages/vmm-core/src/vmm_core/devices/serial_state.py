"""The saved state of a serial port (`serial`)."""

from __future__ import annotations

from typing import NamedTuple

from vmm_core.devices.serial_output import LIMIT
from vmm_core.errors import StateError
from vmm_core.state import expect, expect_range, versioned

FIFO = 16  # bytes of the receiver
INPUT = 1024  # bytes taken from the host ahead of the guest

_MASKS = (
    ("ier", 0x0F),
    ("fcr", 0xC1),
    ("lcr", 0xFF),
    ("mcr", 0x1F),
    ("lsr_errors", 0x1E),
    ("msr_lines", 0xF0),
    ("msr_changes", 0x0F),
    ("scr", 0xFF),
    ("divisor", 0xFFFF),
)


@versioned(1)
class SerialState(NamedTuple):
    """Everything that the guest can see or has written, and bytes that have not reached the other side."""

    ier: int
    fcr: int
    lcr: int
    mcr: int
    lsr_errors: int
    msr_lines: int
    msr_changes: int
    scr: int
    divisor: int
    transmitter_empty: bool  # the THRE interrupt is pending
    looped: bytes
    arrived: int
    input: bytes
    output: bytes


def checked(state: object) -> SerialState:
    """Return `state` if a UART can be in it. Raises StateError."""
    new = expect(state, SerialState, "serial")
    for field, mask in _MASKS:
        if getattr(new, field) & ~mask:
            raise StateError(f"serial.{field}: {getattr(new, field):#x} has bits outside {mask:#x}")
    expect_range(len(new.looped), 0, FIFO, "serial.looped: length")
    expect_range(len(new.input), 0, INPUT, "serial.input: length")
    expect_range(new.arrived, 0, min(FIFO, len(new.input)), "serial.arrived")
    expect_range(len(new.output), 0, LIMIT, "serial.output: length")
    return new
