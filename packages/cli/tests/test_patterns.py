"""Patterns of trace points: the same matches as a well-known engine, and never more work than size times length."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pystratovirt.patterns import LARGEST, LONGEST, Pattern, PatternError

SLOW_FOR_OTHERS = [
    ".?" * 20 + "0",
    ".*.*.*.*.*.*.*.*0",
    "^(a+)+$",
    "^(a|aa)+$",
    "(a|a)*0",
    "(.*a){12}0",
    "(?:a?){100}a{100}0",
    "(((a*)*)*)*0",
    "(" + "a|" * 100 + "a)*0",
    "(a?b?c?){40}0",
]


@pytest.mark.parametrize("pattern", SLOW_FOR_OTHERS)
def test_patterns_that_take_others_for_ever_take_a_step_for_each_character(pattern: str) -> None:
    assert not Pattern(pattern).found_in("a" * 3000 + "b")  # or the test's time limit strikes: others take 2**20 steps for 20


# Patterns as grammar: what both engines understand in the same way
_atoms = st.sampled_from(
    [*"ab_1", ".", "[ab]", "[^a]", "[a-c_]", "[]a]", "[a-]", r"\d", r"\w", r"\W", r"\.", r"[\d_]", "^", "$", r"\b"]
)
_atoms |= st.sampled_from([r"\B", r"\x61", r"\-"])


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.tuples(st.sampled_from(["(", "(?:", "(?P<n>"]), inner).map(lambda both: f"{both[0]}{both[1]})")
    # Not `**` and the like: there the two differ.
    repeats = st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "*?", "+?", "??"]))
    return (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map("|".join)
        | groups
        | repeats.map(lambda both: f"(?:{both[0]}){both[1]}")
    )


PATTERNS = st.recursive(_atoms, _grow, max_leaves=10)
TEXTS = st.text("ab_1-.", max_size=8)


@settings(max_examples=1000, deadline=None)
@given(PATTERNS, st.lists(TEXTS, min_size=4, max_size=4), st.booleans())
def test_what_matches_is_what_the_standard_library_finds(pattern: str, texts: list[str], any_case: bool) -> None:
    pattern = f"(?i){pattern}" if any_case else pattern
    try:
        other = re.compile(re.sub(r"\?P<n>", "?:", pattern), re.ASCII)
    except re.error:
        return
    ours = Pattern(pattern)
    for text in [*texts, *(text.upper() for text in texts)]:
        found = other.search(text) is not None
        # Its `$` also matches before a last line end, and its \B never in an empty text; neither is asked here.
        assert ours.found_in(text) == found or (text == "" and r"\B" in pattern), text


@settings(max_examples=1000, deadline=None)
@given(st.text("ab.*+?{}()[]|^$\\_1,-:i<>P&~", max_size=LONGEST))
@example(".?" * 127 + "0")
@example("(" * 128 + ")" * 128)
@example("((((a{99}){99}){99}){99})")
@example("((((){999}){999}){999}){999}")
@example("[" * 256)
@example("(?i" * 80)
@example("\\")
def test_any_text_is_refused_in_one_line_or_bounded(text: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert pattern.size <= LARGEST
        pattern.found_in("ab_ab_ab_ab_ab_ab_ab_ab_ab_ab_ab_ab_ab_1")
    assert refusal.isprintable()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "a group does not end at character 2"),
        (")", r"`\)` without"),
        ("[a", "does not end"),
        ("[[a]]", "sets in sets"),
        ("[a&&b]", "sets of sets"),
        ("[z-a]", "no beginning or no end"),
        ("*", "nothing for `\\*` to repeat"),
        ("a{", "wants `n}`"),
        ("a{2,1}", "2 is more than 1"),
        ("a{1001}", "more than 1000 repetitions"),
        ("(a{20}){20}", "too large"),
        ("(?=a)", "looks around"),
        ("(?<!a)", "looks around"),
        ("(?x)a", "only the flag `i`"),
        (r"\1", "unknown escape"),
        (r"\p{L}", "unknown escape"),
        (r"\x{110000}", "no code of a character"),
        ("x" * 257, "longer than 256"),
    ],
)
def test_what_is_wrong_is_said(pattern: str, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        Pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("", "anything", None),
        ("virtio_blk", "virtio_blk_execute", "virtio_net"),
        ("^(serial|rtc)_(read|write)$", "rtc_read", "rtc_read_x"),
        ("q.*p_a", "virtqueue_pop_avail", "virtqueue_add_used"),
        ("(?i)SERIAL", "serial_read", "rtc_read"),
        ("(?i:S)erial", "serial", "SERIAL"),
        ("(?i)[^a]", "b", "A"),
        ("(?i-i)S", "S", "s"),
        ("[[:alpha:]]_[[:^digit:]]", "a_b", "a_1"),
        (r"\Aqmp_\w+\z", "qmp_command", "a qmp_command"),
        (r"a*+", "b", None),
        ("ä|b", "b", "a"),
        ("[^ä]", "a", ""),
    ],
)
def test_patterns_of_stratovirt_mean_what_they_mean_there(pattern: str, yes: str, no: str | None) -> None:
    assert Pattern(pattern).found_in(yes)
    assert no is None or not Pattern(pattern).found_in(no)
