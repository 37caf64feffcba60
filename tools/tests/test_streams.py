"""Bytes out of the lab host arrive unchanged and at once, whatever the pieces that they come in."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lab.streams import Stream

TOKEN = b"\x01abab\x01c"
# Few letters, so that what looks like the beginning of the token comes often.
text = st.text(alphabet="\x01abc", max_size=40).map(str.encode).filter(lambda data: TOKEN not in data)


def feed(pieces: list[bytes]) -> tuple[bytes, Stream]:
    out: list[bytes] = []
    stream = Stream(TOKEN, out.append)
    for piece in pieces:
        stream.feed(piece)
    return b"".join(out), stream


@given(text, text, st.lists(st.integers(0, 90)))
def test_any_split_of_the_bytes_gives_what_was_before_the_token(data: bytes, after: bytes, cuts: list[int]) -> None:
    whole = data + TOKEN + after
    places = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    got, stream = feed([whole[a:b] for a, b in pairwise(places)])
    # The first token counts; data itself may end in its beginning.
    assert got == whole[: whole.index(TOKEN)]
    assert stream.ended


@given(text)
def test_only_a_possible_beginning_of_the_token_is_held_back(data: bytes) -> None:
    got, stream = feed([data])
    held = data[len(got) :]
    assert data == got + held
    assert TOKEN.startswith(held)
    assert not stream.ended


def test_what_was_held_back_is_not_lost_when_the_port_closes() -> None:
    out: list[bytes] = []
    stream = Stream(TOKEN, out.append)
    stream.feed(b"text\x01ab")
    stream.close()
    assert b"".join(out) == b"text\x01ab"
