"""Fixtures for the tests of this package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

from vhost_guest import back_end, guest, loop, nothing_is_left  # noqa: F401
from vmm_core.guestmem import GuestMemory

# The same examples every time: a run that fails can be run again.
settings.register_profile("virtio", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("virtio")


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """1 MiB of RAM at 0, and 64 KiB above a hole at 4 GiB."""
    memory = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 16)])
    yield memory
    memory.close()
