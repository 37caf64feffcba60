"""Standard descriptors that are closed, full or without a reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pystratovirt import log
from pystratovirt.cmdline import parse
from pystratovirt.main import main
from pystratovirt.stdio import say
from pystratovirt.vm import VirtualMachine
from vmm_core.devices.chardev_terminal import PtyBackend

SHELL = 'exec "$@" <&- >&- 2>&-'


def test_a_closed_standard_descriptor_is_never_given_to_a_file(tmp_path: Path) -> None:
    script = """
import os, sys
from pystratovirt.cmdline import parse_or_exit
from pystratovirt import log
parse_or_exit(["-kernel", sys.argv[1], "-machine", "microvm"])
image = os.open(sys.argv[1], os.O_RDWR)
log.error("this is not for the image")
os.write(image, (" ".join(os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)) + f" {image > 2}").encode())
"""
    image = tmp_path / "image"
    image.touch()
    subprocess.run(["sh", "-c", SHELL, "sh", sys.executable, "-c", script, str(image)], check=True)
    assert image.read_text() == "/dev/null /dev/null /dev/null True"


def test_a_wrong_command_line_has_its_status_when_nobody_reads_the_answer() -> None:
    script = "from pystratovirt.cmdline import parse_or_exit; parse_or_exit(['-smp', '300'])"
    assert subprocess.run(["sh", "-c", SHELL, "sh", sys.executable, "-c", script], check=False).returncode == 1


def test_a_start_that_fails_says_so_in_one_line_that_does_nothing_to_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["-mod-test", "unused", "-serial", "file,path=/none\n\x1b[31m/\udcff"])
    line = "stratovirt: -serial: cannot open /none\\n\\x1b[31m/\\udcff: No such file or directory\n"
    assert capfd.readouterr().err == line


def test_text_for_a_reader_that_has_gone_is_dropped() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    say(writer, "x" * 100_000)
    os.close(writer)


def test_text_arrives_whole_and_encodable(capfd: pytest.CaptureFixture[str]) -> None:
    say(1, "\udc80 done\n")
    assert capfd.readouterr().out == "\\udc80 done\n"


@pytest.mark.parametrize("level", ["warn", "info"])
def test_the_path_of_a_pseudo_terminal_is_told_whatever_is_logged(
    level: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_log", log.Log(log.level_from(level)))
    with VirtualMachine(parse(["-mod-test", "unused", "-chardev", "pty,id=tty", "-serial", "chardev:tty"]), print) as vm:
        backend = vm.chardevs["tty"]
        assert isinstance(backend, PtyBackend)
        path = f'Pty path is: "{backend.path}"'
    said = capfd.readouterr().err.splitlines()
    if level == "warn":
        assert said == [f"stratovirt: chardev tty: {path}"]
    else:
        assert [line.rpartition(":INFO: ")[2] for line in said] == [path]
