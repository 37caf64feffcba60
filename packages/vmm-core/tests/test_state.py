"""Saved states: what goes in comes out, and everything else is refused by name."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.errors import StateError
from vmm_core.state import decode, encode, expect, expect_range, versioned


@versioned(3)
class Inner(NamedTuple):
    number: int
    flag: bool


@versioned(7)
class Outer(NamedTuple):
    text: str
    data: bytes
    maybe: int | None
    pair: tuple[int, bytes]
    many: tuple[Inner, ...]
    numbers: list[int]
    inner: Inner | None


@dataclass(frozen=True)
class Older:
    VERSION: ClassVar[int] = 2
    number: int
    inner: Inner


inners = st.builds(Inner, number=st.integers(), flag=st.booleans())
outers = st.builds(
    Outer,
    text=st.text(),
    data=st.binary(),
    maybe=st.none() | st.integers(),
    pair=st.tuples(st.integers(), st.binary()),
    many=st.lists(inners).map(tuple),
    numbers=st.lists(st.integers()),
    inner=st.none() | inners,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)


def example() -> Outer:
    return Outer("t", b"d", None, (1, b"x"), (Inner(1, True),), [1, 2], None)


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    """The example's bytes with one place in the JSON replaced."""
    plain = json.loads(encode(example()))
    at = plain
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(plain).encode()


@given(outers)
def test_a_state_survives_the_way_to_bytes_and_back(state: Outer) -> None:
    assert decode(encode(state), Outer, "disk0") == state


def test_a_dataclass_is_a_state_too() -> None:
    state = Older(1, Inner(2, False))
    assert decode(encode(state), Older, "disk0") == state


@given(st.binary())
def test_arbitrary_bytes_are_refused_with_the_components_name(data: bytes) -> None:
    with pytest.raises(StateError, match=r"^disk0"):
        decode(data, Outer, "disk0")


@given(st.sampled_from(list(Outer._fields)), json_values)
def test_a_field_takes_its_own_type_and_refuses_every_other_by_name(field: str, value: Any) -> None:
    data = changed(("fields", field), value)
    try:
        state = decode(data, Outer, "disk0")
    except StateError as error:
        assert str(error).startswith(f"disk0.{field}")  # noqa: PT017 - either outcome is right, each has its rule
    else:
        assert decode(encode(state), Outer, "disk0") == state


@given(st.text(alphabet=string.ascii_letters + string.digits + "+/=-_é\n", max_size=12))
def test_text_that_is_not_base64_is_refused_and_never_another_error(text: str) -> None:
    data = changed(("fields", "data"), text)
    try:
        state = decode(data, Outer, "disk0")
    except StateError:
        pass
    else:
        assert decode(encode(state), Outer, "disk0") == state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("type",), "Inner", "disk0: state of type 'Inner', expected Outer"),
        (("version",), 8, "disk0: state version 8, this build reads version 7"),
        (("version",), True, "disk0: state version True, this build reads version 7"),
        (("version",), 7.0, "disk0: state version 7.0, this build reads version 7"),
        (("fields",), [], "disk0: not a saved state"),
        (("fields", "extra"), 1, "disk0: fields missing or unknown: extra"),
        (("fields", "pair"), [1], "disk0.pair: expected 2 items, got 1"),
        (("fields", "many", 0, "fields", "flag"), 1, r"disk0.many\[0\].flag: expected bool, got int"),
        (("fields", "numbers", 1), True, r"disk0.numbers\[1\]: expected int, got bool"),
        (("fields", "data"), "Ã©", "disk0.data: "),
    ],
)
def test_a_malformed_state_is_refused_with_the_place(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(StateError, match=f"^{message}"):
        decode(changed(path, value), Outer, "disk0")


def test_a_missing_field_is_named() -> None:
    plain = json.loads(encode(example()))
    del plain["fields"]["text"]
    with pytest.raises(StateError, match=r"^disk0: fields missing or unknown: text$"):
        decode(json.dumps(plain).encode(), Outer, "disk0")


def test_deeply_nested_bytes_are_refused_and_do_not_end_the_interpreter() -> None:
    with pytest.raises(StateError, match=r"^disk0: "):
        decode(b"[" * 1_000_000, Outer, "disk0")


def test_a_class_without_version_cannot_be_saved() -> None:
    class Forgotten(NamedTuple):
        number: int

    with pytest.raises(TypeError, match="Forgotten has no version"):
        encode(Forgotten(1))


def test_a_state_holds_plain_values_only() -> None:
    @versioned(1)
    class Loose(NamedTuple):
        value: float

    with pytest.raises(TypeError, match="cannot hold float"):
        encode(Loose(1.5))
    with pytest.raises(TypeError, match="cannot declare"):
        decode(b'{"type":"Loose","version":1,"fields":{"value":1}}', Loose, "disk0")


def test_a_state_of_another_component_is_refused() -> None:
    assert expect(Inner(1, True), Inner, "disk0") == Inner(1, True)
    with pytest.raises(StateError, match=r"^disk0: expected a state of type Inner, got tuple$"):
        expect((1, True), Inner, "disk0")


def test_a_number_out_of_range_is_refused() -> None:
    assert expect_range(15, 0, 15, "uart.ier") == 15
    for value in (-1, 16):
        with pytest.raises(StateError, match=r"^uart.ier: "):
            expect_range(value, 0, 15, "uart.ier")
