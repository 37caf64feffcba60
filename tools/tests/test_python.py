"""Environments that the tools make for themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lab import python


def test_an_environment_is_made_once_with_programs_that_run_where_it_lies_in_the_end(empty_cache: Path) -> None:
    made = python.environment("x", ["pip"])  # which is there, so nothing is downloaded
    assert made == python.environment("x", ["pip"])
    folder = made.parent.parent
    assert folder.parent == empty_cache / "python"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()) == ["bin", "include", "lib"]
    for program in ([made, "-m", "pip"], [made.with_name("pip")]):
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
        assert str(folder) in done.stdout
