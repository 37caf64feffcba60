"""The fuzz tests for longer, and with other examples every time. A failure prints the example and is kept by hypothesis."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_blk
import test_console
import test_console_ports
import test_mmio
import test_net
import test_queue_fuzz

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
longer = settings(max_examples=10_000, derandomize=False)


@given(test_blk.REQUESTS, st.booleans())
@longer
def test_no_request_escapes_hangs_or_leaves_its_disk(
    requests: list[tuple[int, int, list[bytes], list[int]]], inline: bool
) -> None:
    test_blk.check_requests(requests, inline)


@given(st.lists(test_mmio.WRITES, max_size=100), st.booleans())
@longer
def test_no_sequence_of_register_writes_escapes_and_reset_always_works(writes: list[tuple[int, int, int]], live: bool) -> None:
    test_mmio.check_writes(writes, live)


@given(st.lists(test_console.ACTIONS, max_size=60))
@longer
def test_no_byte_is_lost_or_out_of_order_either_way(actions: list[tuple[str, object]]) -> None:
    test_console.check_actions(actions)


@given(st.lists(test_console_ports.ACTIONS, max_size=100))
@longer
def test_nothing_that_a_console_s_driver_says_escapes_grows_or_outlives_a_reset(actions: list[tuple[str, object]]) -> None:
    test_console_ports.check_actions(actions)


@given(st.lists(test_net.ACTIONS, max_size=60), st.booleans(), st.booleans())
@longer
def test_nothing_on_a_network_escapes_hangs_or_outlives_a_reset(
    actions: list[tuple[str, int, object]], event_idx: bool, mergeable: bool
) -> None:
    test_net.check_actions(actions, event_idx, mergeable)


def test_a_million_random_rings_are_read_by_the_book_or_refused() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    source = random.Random(seed)
    for number in range(1_000_000):
        data = source.randbytes(120)
        try:
            test_queue_fuzz.check(data)
        except AssertionError as error:
            raise AssertionError(f"ring {number} of seed {seed}: {data.hex()}") from error
