"""Boot times in the log: a guest that is built for it writes to port 0x3FF when its kernel starts and when it has booted.

The port is the serial port's scratch register, so this is a listener to `Serial.on_scratch`, and the write still arrives there.
Source: reference machine-x86_64, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable

MESSAGES = {0x01: "Kernel starts to boot!", 0x02: "Kernel boot complete!"}


def boot_time_hook(report: Callable[[str], None]) -> Callable[[int], None]:
    """Return a function that takes the values written to the port. `report` takes lines for the log, on vCPU threads."""
    said: set[int] = set()

    def written(value: int) -> None:
        # Each once: a driver that tests the scratch register writes any value as often as it likes.
        if value in MESSAGES and value not in said:
            said.add(value)
            report(MESSAGES[value])

    return written
