"""What is left of the PC's keyboard controller on a machine without keyboard: the reset line, and an answer that ends probes.

Linux resets the machine through port 0x64 (`reboot=k`). It waits for the input buffer to be empty before that, and takes an
output buffer that is never empty for a controller that is not there: one status value says both, so neither wait happens.
StratoVirt answers 0xFF (reference machine-x86_64, section 2.4), which costs a guest that reboots 65,536 reads.

Not here: a keyboard. Without state: nothing that a guest writes is remembered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm_core.bus import BusDevice
    from vmm_core.devices.acpi_pm import PowerListener


_STATUS = 0xFD  # every bit but IBF (bit 1): output buffer full for ever, input buffer empty
_PULSE_MASK, _PULSE_RESET = 0xF1, 0xF0  # commands 0xF0 to 0xFF pulse the lines whose bit is 0; bit 0 is the reset line


class _DataPort:
    """Port 0x60: nothing is ever typed."""

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class I8042:
    """The command port, 0x64. Its neighbour 0x60 is `data_port`."""

    def __init__(self, listener: PowerListener) -> None:
        """`listener` takes the request for a reset, on a vCPU's thread."""
        self._listener = listener
        self.data_port: BusDevice = _DataPort()

    def read(self, offset: int, size: int) -> int:
        """Return the status; ports beyond it are empty."""
        return (1 << 8 * size) - 1 & ~0xFF | _STATUS

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a command: the ones that pulse the reset line do that, all others nothing."""
        if value & _PULSE_MASK == _PULSE_RESET:
            self._listener.reset_requested("guest reset through the keyboard controller")
