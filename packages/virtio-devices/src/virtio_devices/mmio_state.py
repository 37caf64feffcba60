"""Saved state of the virtio-mmio transport: what a driver set through its registers."""

from __future__ import annotations

from typing import NamedTuple

from vmm_core.state import versioned


@versioned(1)
class QueueState(NamedTuple):
    """Registers of one queue, and its indices while it is ready."""

    size: int
    desc: int
    driver: int
    device: int
    ready: bool
    next_avail: int
    next_used: int


@versioned(1)
class MmioState(NamedTuple):
    """Everything that a driver set through the registers."""

    device_type: int
    status: int
    interrupt_status: int
    device_features_sel: int
    driver_features_sel: int
    driver_features: int
    unknown_features: bool
    queue_sel: int
    queues: tuple[QueueState, ...]
