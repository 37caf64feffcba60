"""The package's README says what works: its examples are run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["memory", "machine"])
def test_an_example_runs_as_it_stands(example: str) -> None:
    exec(example, {})


def test_there_are_examples_and_none_needs_kvm() -> None:
    assert len(EXAMPLES) == 2
    assert not any("kvm" in example for example in EXAMPLES)
