"""The register window of virtio-mmio (virtio 1.2, section 4.2.2): where registers are, and a picture of them in memory.

A guest that reads registers from memory needs no exit for it; what it writes there is the transport's (`mmio`).
"""

from __future__ import annotations

SIZE = 0x200  # bytes of the register window

MAGIC_VALUE, VERSION, DEVICE_ID = 0x000, 0x004, 0x008
DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x010, 0x014, 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x080, 0x090, 0x0A0  # low halves; the high ones follow
SHM_LEN, SHM_END = 0x0B0, 0x0C0
CONFIG_GENERATION, CONFIG = 0x0FC, 0x100

MAGIC = 0x7472_6976  # "virt"
ALL_ONES = 0xFFFF_FFFF


class ShownRegisters:
    """A picture of a device's registers in memory of SIZE bytes. The transport keeps it up to date, and orders who writes."""

    def __init__(self, memory: memoryview, device_type: int | None) -> None:
        """Show the registers that never change; only two of a placeholder's (None) are not 0. What was there is overwritten."""
        self._memory = memory
        self._words = words = memory.cast("I")
        memory[:] = bytes(SIZE)
        words[MAGIC_VALUE >> 2], words[VERSION >> 2] = MAGIC, 2
        if device_type is not None:
            words[DEVICE_ID >> 2] = device_type
            memory[SHM_LEN:SHM_END] = b"\xff" * (SHM_END - SHM_LEN)  # no such region, whichever is selected

    def features(self, features: int) -> None:
        """Show the features that are selected."""
        self._words[DEVICE_FEATURES >> 2] = features

    def queue(self, queue_size: int, ready: bool) -> None:
        """Show the registers of the queue that is selected."""
        words = self._words
        words[QUEUE_NUM_MAX >> 2] = queue_size
        words[QUEUE_READY >> 2] = ready

    def status(self, interrupts: int, status: int) -> None:
        """Show the registers that loops change."""
        self._words[INTERRUPT_STATUS >> 2] = interrupts
        self._words[STATUS >> 2] = status

    def config(self, generation: int, config: bytes) -> None:
        """Show the configuration space. Generation and content are neighbours and written as one.

        A driver that begins to read in the few nanoseconds of that sees a new generation with content of before, and has the
        notification of the change still to come.
        """
        end = min(CONFIG + len(config), SIZE)
        self._memory[CONFIG_GENERATION:end] = (generation.to_bytes(4, "little") + config)[: end - CONFIG_GENERATION]
