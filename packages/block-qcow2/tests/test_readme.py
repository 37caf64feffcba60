"""The README's examples run."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest


def test_the_examples_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[1] / "README.md"
    failures, tests = doctest.testfile(str(readme), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (failures, tests > 10) == (0, True)
