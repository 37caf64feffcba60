"""Virtual environments that the tools make for themselves, in the cache and never in the checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from . import cache
from .debian import SetupError
from .progress import Step


def environment(name: str, requirements: Sequence[str], *inputs: Path) -> Path:
    """The Python of a virtual environment with these requirements, made on first use; as pip takes them, paths included.

    Its name holds the Python version, the requirements and the contents of the `inputs`, so a change makes a new one.
    """
    key = cache.digest(sys.version, sys.base_prefix, *requirements, *inputs)

    def fill(folder: Path) -> None:
        with Step(f"Making a Python environment for {name}"):
            # Where it will be: the scripts in it name their interpreter by its path.
            builder = venv.EnvBuilder(with_pip=True, symlinks=True)
            builder.create(folder)
            command = [
                str(folder / "bin/python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                *requirements,
            ]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SetupError(f"pip install {' '.join(requirements)}: {done.stderr.strip()}")
            for script in (folder / "bin").iterdir():
                if script.is_file() and not script.is_symlink():
                    text = script.read_bytes()
                    script.write_bytes(text.replace(bytes(folder), bytes(cache.root() / f"python/{name}-{key}")))

    return cache.folder(f"python/{name}-{key}", fill) / "bin/python"
