"""QMP in the log: each message is a line of its own at level INFO (reference command-line, section 10)."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from pystratovirt import log, runtime
from pystratovirt.runtime import LOGGED
from running_vm import RunningVm
from vm_process import Client, Vm

LINE = re.compile(r".*:INFO: QMP: (-->|<--) (.*)")


def traffic(path: Path) -> list[tuple[str, ...]]:
    return [found.groups() for line in path.read_text().splitlines() if (found := LINE.fullmatch(line))]


def test_commands_replies_and_events_are_lines_of_the_log() -> None:
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder:
        vm = Vm(Path(folder))
        with Client(vm.unix) as client:
            client.run("stop")
            client.run("query-\u202eevil\n")
            client.run("device_del", {"id": "x" * 8000})
        lines = traffic(vm.log)
        vm.close()
    assert lines[0][0] == "<--"
    assert lines[0][1].startswith('{"QMP":')
    assert lines[1] == ("-->", '{"execute":"stop"}')
    assert '"event":"STOP"' in lines[2][1]
    assert lines[3] == ("<--", '{"return":{}}')
    direction, shown = lines[4]
    assert direction == "-->"
    assert shown.isascii(), "what would turn a terminal's text around is escaped"
    assert "evil" in shown
    assert "has not been found" in lines[5][1]
    assert re.fullmatch(r'\{"execute":"device_del".*x\.\.\. \([0-9]+ more\)', lines[6][1])
    assert len(lines[6][1]) < LOGGED + 100


@pytest.mark.parametrize(("level", "heard"), [("warn", False), ("info", True), ("trace", True)])
def test_nothing_is_prepared_for_a_log_that_does_not_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, heard: bool
) -> None:
    made: list[object] = []
    original = runtime.QmpServer
    monkeypatch.setattr(runtime, "QmpServer", lambda **options: made.append(options["traffic"]) or original(**options))
    monkeypatch.setitem(os.environ, log.LEVEL_VARIABLE, level)
    log.setup(str(tmp_path / "log"))
    try:
        with RunningVm(tmp_path) as vm:
            vm.run("query-status")
    finally:
        monkeypatch.undo()
        log.setup(None, wanted=False)
    assert [each is not None for each in made] == [heard]
    assert (len(traffic(tmp_path / "log")) > 0) == heard


@pytest.mark.parametrize(
    ("level", "levels"),
    [
        ("error", set()),
        ("warn", {"WARN"}),
        ("info", {"WARN", "INFO"}),
        ("debug", {"WARN", "INFO", "DEBUG"}),
        ("TRACE", {"WARN", "INFO", "DEBUG", "TRACE"}),
        ("nonsense", {"WARN", "INFO"}),
    ],
)
@pytest.mark.parametrize("to_file", [True, False])
def test_what_the_environment_asks_for_is_in_the_log_and_nothing_else(
    tmp_path: Path, level: str, levels: set[str], to_file: bool
) -> None:
    path = tmp_path / "lines"
    with Vm(tmp_path, "-D", *([str(path)] if to_file else []), level=level) as vm, Client(vm.unix) as client:
        assert client.run("trace-set-state", {"name": "virtio_tpt_read_config", "enable": True}) == {"return": {}}
        vm.drive_slot(0)
        for offset, value in (
            (0x70, 0),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, 3),
            (0x44, 1),
            (0x70, 15),
        ):
            vm.register(0, offset, value)  # a queue of a size that cannot be, which is worth a warning
        vm.register(0, 0)
        client.run("query-status")
        lines = (path if to_file else vm.log).read_text().splitlines()
        assert not to_file or vm.log.read_text() == ""
    assert {found[1] for line in lines if (found := re.search(r"\]:([A-Z]+): ", line))} == levels
