"""The package's README says what works: its examples are run, the one that needs KVM in tests/lab/test_readme.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pystratovirt.main import main

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_a_command_line_is_parsed_and_refused_as_shown() -> None:
    exec(EXAMPLES[0], {})


def test_a_mistake_is_reported_as_shown(capfd: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"\$ stratovirt (.*)\n    (.*)\n", README)
    assert found
    with pytest.raises(SystemExit, match="1"):
        main(found[1].split())
    assert capfd.readouterr().err == found[2] + "\n"
