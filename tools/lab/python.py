"""Virtual environments that the tools make for themselves, in the cache and never in the checkout."""

from __future__ import annotations

import os
import shutil
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from . import cache
from .debian import follow
from .progress import Step


def environment(name: str, requirements: Sequence[str], *inputs: Path) -> Path:
    """The Python of a virtual environment with these requirements, made on first use; as pip takes them, paths included.

    Its name holds the Python version, the requirements and the contents of the `inputs`, so a change makes a new one.
    """
    key = cache.digest(sys.version, sys.base_prefix, *requirements, *inputs)

    def fill(folder: Path) -> None:
        with Step(f"Making a Python environment for {name}") as step:
            venv.EnvBuilder(symlinks=True).create(folder)
            scratch = folder / "scratch"  # of pip's own, which goes with the folder when pip does not get to it
            scratch.mkdir()
            modules = {
                "ensurepip": ["--default-pip"],
                "pip": ["--disable-pip-version-check", "--no-input", "install", "--progress-bar", "off", *requirements],
            }
            for module, words in modules.items():
                command = [str(folder / "bin/python"), "-m", module, *words]
                follow(command, step, {**os.environ, "TMPDIR": str(scratch)}, group=True)
            shutil.rmtree(scratch)
            # The scripts name their interpreter by its path, and the folder gets its name when it is complete.
            for script in (folder / "bin").iterdir():
                if script.is_file() and not script.is_symlink():
                    text = script.read_bytes()
                    script.write_bytes(text.replace(bytes(folder), bytes(cache.root() / f"python/{name}-{key}")))

    return cache.folder(f"python/{name}-{key}", fill) / "bin/python"
