"""The log: lines that clients match, levels, rotation, and that it never stops anything."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pystratovirt import log
from pystratovirt.log import DEBUG, ERROR, INFO, TRACE, WARN, Log, level_from

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}: \[(\d+)\]\[(\d+)\]\[([^:]+): (\d+)\]:([A-Z]+): (.*)\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.log"


@pytest.fixture
def journal(path: Path):
    journal = Log(INFO, str(path))
    yield journal
    journal.close()


def day_before(path: Path) -> None:
    """Give the file the age of a day, whatever the day is."""
    yesterday = time.time() - 86400
    os.utime(path, (yesterday, yesterday))


def test_a_line_has_the_form_that_clients_match(journal: Log, path: Path) -> None:
    journal.write(INFO, "VmConfig is ready", "/usr/lib/python3/site-packages/pystratovirt/main.py", 12)
    line = path.read_text()
    match = LINE.fullmatch(line)
    assert match
    assert match.groups() == (
        str(os.getpid()),
        str(threading.get_native_id()),
        "pystratovirt/main.py",
        "12",
        "INFO",
        "VmConfig is ready",
    )
    assert re.search("([^:]):INFO: ", line)  # Kata Containers' expression


def test_the_place_of_the_call_is_in_the_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_log", Log(TRACE, str(path)))
    for call in (log.error, log.warn, log.info, log.debug, log.trace):
        call("here")
    log._log.close()
    places = [LINE.fullmatch(line) for line in path.read_text().splitlines(keepends=True)]
    assert [match and match.group(5) for match in places] == ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]
    assert {match and match.group(3) for match in places} == {"test_log.py"}


def test_lines_above_the_level_are_not_written(journal: Log, path: Path) -> None:
    journal.write(DEBUG, "no", "f", 1)
    journal.write(WARN, "yes", "f", 1)
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("error", ERROR),
        ("WARN", WARN),
        ("Info", INFO),
        ("debug", DEBUG),
        ("trace", TRACE),
        ("", INFO),
        ("all", INFO),
        (None, INFO),
    ],
)
def test_levels_are_named_in_any_case(text: str | None, level: int) -> None:
    assert level_from(text) == level


def test_what_a_client_says_stays_one_line(journal: Log, path: Path) -> None:
    journal.write(INFO, "QMP: --> a\nb\x1b[2J\udc80", "f", 1)
    assert path.read_text().endswith(":INFO: QMP: --> a\\nb\\x1b[2J\\udc80\n")


@given(st.text())
@settings(deadline=None)
def test_any_message_is_one_line(text: str) -> None:
    reader, writer = os.pipe()
    journal = Log(INFO, f"/proc/self/fd/{writer}")
    os.close(writer)
    journal.write(INFO, text, "f", 1)
    journal.close()
    with os.fdopen(reader) as lines:
        assert LINE.fullmatch(lines.read())


def test_an_endless_message_is_cut(journal: Log, path: Path) -> None:
    journal.write(INFO, "x" * 1_000_000, "f", 1)
    assert path.stat().st_size < 70_000


def test_a_log_file_is_appended_to_and_private(path: Path) -> None:
    path.write_text("before\n")
    journal = Log(INFO, str(path))
    journal.write(INFO, "after", "f", 1)
    journal.close()
    assert path.read_text().startswith("before\n")
    fresh = path.with_name("fresh")
    Log(INFO, str(fresh)).close()
    assert stat.S_IMODE(fresh.stat().st_mode) & ~0o640 == 0


def test_a_file_that_is_full_is_renamed_and_six_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "ROTATE_SIZE", 100)
    journal = Log(INFO, str(path))
    for number in range(10):
        journal.write(INFO, f"{number:0100}", "f", 1)
    journal.close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["vm.log", *(f"vm.log{n}" for n in range(1, 7))]
    assert path.read_text() == ""
    assert [(path.parent / f"vm.log{n}").read_text()[-2:-1] for n in range(1, 7)] == list("987654")


def test_a_file_of_another_day_is_renamed_after_the_first_line(path: Path) -> None:
    path.write_text("old\n")
    day_before(path)
    journal = Log(INFO, str(path))
    journal.write(INFO, "new", "f", 1)
    journal.write(INFO, "newer", "f", 1)
    journal.close()
    assert "newer" in path.read_text()
    assert (path.parent / "vm.log1").read_text().startswith("old\n")


def test_a_rotation_that_fails_is_not_tried_with_each_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "ROTATE_SIZE", 1000)
    attempts = []

    def refuse(*names: object) -> None:
        attempts.append(names)
        raise PermissionError

    monkeypatch.setattr(os, "rename", refuse)
    journal = Log(INFO, str(path))
    for _ in range(30):
        journal.write(INFO, "x" * 100, "f", 1)
    journal.close()
    assert path.read_text().count("\n") == 30
    assert len(attempts) <= 5


def test_a_device_is_never_renamed() -> None:
    journal = Log(INFO, os.devnull)
    journal._day = -1
    journal.write(INFO, "x", "f", 1)
    journal.close()
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_costs_the_line_and_nothing_else() -> None:
    journal = Log(INFO, "/dev/full")
    journal.write(INFO, "lost", "f", 1)
    journal.write(INFO, "lost", "f", 1)
    journal.close()
    assert journal.dropped == 2


def test_a_reader_that_has_gone_costs_the_line_and_nothing_else(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    journal = Log(INFO, str(tmp_path / "pipe"))
    os.close(reader)
    journal.write(INFO, "lost", "f", 1)
    journal.close()
    assert journal.dropped == 1


def test_lines_of_many_threads_do_not_mix(journal: Log, path: Path) -> None:
    threads = [threading.Thread(target=lambda: [journal.write(INFO, "x" * 500, "f", 1) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 200
    assert all(LINE.fullmatch(line) for line in lines)


def test_setup_takes_the_level_from_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_log", Log())
    monkeypatch.setenv("STRATOVIRT_LOG_LEVEL", "debug")
    log.setup(str(path))
    assert log.enabled(DEBUG)
    monkeypatch.delenv("STRATOVIRT_LOG_LEVEL")
    log.setup(None, wanted=False)
    assert (log.enabled(WARN), log.enabled(INFO)) == (True, False)


def test_what_libraries_say_to_logging_arrives_here(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(root, "handlers", [])
    journal = Log(INFO, str(path))
    monkeypatch.setattr(log, "_log", journal)
    try:
        log.adopt_logging()
        logging.getLogger("library").warning("lost %s", "it")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        journal.close()
    assert ":WARN: library: lost it\n" in path.read_text()
