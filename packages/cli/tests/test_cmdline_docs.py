"""The compatibility page says what the declarations say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pystratovirt.cmdline import docs, notyet
from pystratovirt.cmdline.drivers import DRIVERS
from pystratovirt.cmdline.options import OPTIONS

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"


def test_the_tables_on_the_page_are_those_of_the_declarations() -> None:
    text = PAGE.read_text()
    assert docs.refresh(text) == text, "run: python -m pystratovirt.cmdline.docs docs/compatibility.md"


def test_the_page_has_every_table() -> None:
    assert set(re.findall(r"<!-- generated: (\S+) -->", PAGE.read_text())) == set(docs._BLOCKS)


def test_every_option_and_driver_has_a_state() -> None:
    text = PAGE.read_text()
    for name in OPTIONS:
        assert f"| `-{name}`" in text
    for driver in DRIVERS:
        assert f"### `-device {driver}`\n" in text
    for driver in notyet.DRIVERS:
        assert f"| `{driver}` |" in text


def test_nothing_is_both_supported_and_not() -> None:
    assert not set(DRIVERS) & set(notyet.DRIVERS)


def test_the_command_rewrites_the_page_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: options -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["docs", str(page)])
    assert docs.main() == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "\nold\n" not in text
    assert "`-kernel`" in text
