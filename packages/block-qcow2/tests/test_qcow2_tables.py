"""The cache of L2 tables, and what it remembers of the one that was asked for last."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from block_qcow2.qcow2.tables import L2Cache, L2Table

steps = st.lists(st.tuples(st.sampled_from(("get", "put", "drop", "touch", "written", "clear")), st.integers(1, 3)))


@settings(max_examples=500)
@given(steps)
def test_the_table_that_was_asked_for_last_is_remembered_as_long_as_it_is_the_one_in_the_cache(
    what: list[tuple[str, int]],
) -> None:
    """Whoever asks by way of the memory must not read a table that was given up, nor change one that nobody will write."""
    cache = L2Cache(2)
    for step, number in what:
        offset = number << 16
        if step == "get":
            found = cache.get(offset)
            assert found is None or cache.last is found
        elif step == "put":
            cache.put(L2Table(offset, array("Q", bytes(64))))
        elif step == "touch" and (table := cache.get(offset)):
            cache.touch(table, 0, 1)
        elif step == "written":
            for table in cache.dirty.values():
                table.clean()
            cache.dirty.clear()
        elif step == "drop":
            cache.drop(offset)
        elif step == "clear":
            cache.clear()
        assert cache.last_offset == (-1 if cache.last is None else cache.last.offset)
        assert cache.last is None or cache.last is cache._tables.get(cache.last_offset)
