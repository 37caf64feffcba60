"""What is in the cache is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import cache


def test_a_folder_is_made_once(empty_cache: Path) -> None:
    made: list[Path] = []

    def fill(folder: Path) -> None:
        made.append(folder)
        (folder / "x").write_text("1")

    first, second = cache.folder("a/b", fill), cache.folder("a/b", fill)
    assert first == second == empty_cache / "a/b"
    assert (first / "x").read_text() == "1"
    assert len(made) == 1


def test_a_failed_maker_leaves_nothing(empty_cache: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cache.folder("a/b", fill)
    assert list((empty_cache / "a").iterdir()) == []


def test_what_a_killed_maker_left_goes_when_the_next_one_makes_it(empty_cache: Path) -> None:
    (empty_cache / "a/.b.abcd_123").mkdir(parents=True)
    (empty_cache / "a/.b.abcd_123/half").write_text("")
    others = [empty_cache / "a" / name for name in (".b.d.abcd_123", ".bb.abcd_123", "b.abcd_123", ".b.1")]
    for other in others:
        other.mkdir()
    made = cache.folder("a/b", lambda folder: (folder / "x").touch())
    assert sorted((empty_cache / "a").iterdir()) == sorted([made, *others])


def test_a_digest_tells_parts_from_their_concatenation(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"ab")
    assert cache.digest("ab", "c") != cache.digest("a", "bc")
    assert cache.digest(tmp_path / "f") == cache.digest(b"ab")
