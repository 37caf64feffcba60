"""The Python API as the README of packages/cli shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab import guests

README = Path(__file__).parents[2] / "packages/cli/README.md"


def test_a_program_boots_a_guest_and_hears_of_its_end(
    cloud_kernel: guests.Kernel, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    initrd = guests.initrd(cloud_kernel, script="echo hello from $$; /bin/busybox poweroff -f\n")
    monkeypatch.chdir(folder)
    exec(example, {"KERNEL": str(cloud_kernel.image), "INITRD": str(initrd)})
    assert "EventKind.POWER_OFF" in capsys.readouterr().out
    assert "hello from 1" in Path("console.log").read_text()
