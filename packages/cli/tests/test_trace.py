"""Trace points: every one of them stands for something, costs nothing while off, and cannot be used to stall the machine."""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pystratovirt.trace import POINTS, Registry, TraceError, TracePoint, _find

NAMES = [point.name for point in POINTS]


class Device:
    def write(self, offset: int, data: bytes, *, flag: bool = False) -> int:
        return offset + len(data)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def registry(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    home = types.ModuleType("device_home")
    monkeypatch.setattr(home, "Device", Device, raising=False)
    monkeypatch.setitem(sys.modules, "device_home", home)
    points = [TracePoint("device_write", ("device_home:Device.write",)), *POINTS]
    made = Registry(points, lines.append)
    yield made
    made.close()


@pytest.mark.parametrize("point", POINTS, ids=NAMES)
def test_every_point_stands_for_methods_that_exist(point: TracePoint) -> None:
    for target in point.targets:
        owner, method = _find(target)
        assert callable(getattr(owner, method))


def test_names_are_stratovirts_or_our_own_and_each_is_there_once() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(re.fullmatch("[a-z][a-z0-9_]{1,49}", name) for name in NAMES)


def test_a_point_writes_a_line_for_each_call_while_it_is_on(registry: Registry, lines: list[str]) -> None:
    registry.set_states("device_write", True)
    assert Device().write(0x10, b"abc", flag=True) == 0x13
    registry.set_states("device_write", False)
    Device().write(1, b"")
    assert lines == ["[device_write] Device.write offset=0x10 data=<3 bytes> flag=True"]


def test_a_point_that_is_off_is_the_original(registry: Registry) -> None:
    original = Device.write
    registry.set_states("device_write", True)
    registry.set_states("device_write", True)
    assert Device.write is not original
    registry.set_states("device_write", False)
    registry.set_states("device_write", False)
    assert Device.write is original


def test_patterns_match_anywhere_in_a_name(registry: Registry) -> None:
    assert registry.states("serial_r") == [("serial_read", False), ("serial_receive", False)]
    assert registry.states("io_serial_") == [(name, False) for name in NAMES if name.startswith("virtio_serial")]
    registry.set_states("^serial_w", True)
    assert dict(registry.states("^serial"))["serial_write"] is True
    assert registry.states("no such name") == []
    registry.set_states("no such name", True)


def test_everything_can_be_switched_on_and_off(registry: Registry) -> None:
    before = {target: _original(target) for point in POINTS for target in point.targets}
    registry.set_states("", True)
    assert all(state for _, state in registry.states(""))
    registry.set_states(".*", False)
    assert {target: _original(target) for target in before} == before


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("device_home:Device.gone", "AttributeError: .*gone"),
        ("no_such_module:Device.write", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("builtins:len", "AttributeError: .*__code__"),
    ],
)
def test_points_of_a_pattern_are_switched_all_or_none(registry: Registry, target: str, reason: str) -> None:
    original = Device.write
    broken = Registry(
        [TracePoint("good", ("device_home:Device.write",)), TracePoint("bad", ("device_home:Device.write", target))]
    )
    for pattern in ("", "bad"):
        with pytest.raises(TraceError, match=f"^bad cannot be switched: {reason}"):
            broken.set_states(pattern, True)
        assert broken.states("") == [("good", False), ("bad", False)]
        assert Device.write is original
    broken.set_states("good", True)
    assert Device.write is not original
    broken.close()
    assert Device.write is original


def test_a_file_of_patterns_switches_points_on(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("  rtc_[rw].*\n\n   \nserial_read\n")
    registry.enable_from_file(str(tmp_path / "t"))
    assert [name for name, state in registry.states("") if state] == ["rtc_read", "rtc_write", "serial_read"]


@pytest.mark.parametrize(("content", "problem"), [(b"rtc\n(\n", "line 2: no regular expression"), (b"\xff", "utf-8")])
def test_a_bad_file_says_where(registry: Registry, tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError, match=problem):
        registry.enable_from_file(str(tmp_path / "t"))
    with pytest.raises(TraceError, match="No such file"):
        registry.enable_from_file(str(tmp_path / "none"))
    with pytest.raises(TraceError, match=r"^/dev/zero: more than 65536 bytes"):
        registry.enable_from_file("/dev/zero")


@settings(max_examples=200, deadline=None)
@given(st.text("ab.*+?{}()[]|^$\\_1,\n\0\ud800ä", max_size=300))
@example(".?" * 20 + "0")
@example(".?" * 127 + "0")
@example("(.?){200}0")
@example("(a|e|i|o|u|_)*(virtio|kvm|serial)*" * 7 + "0")
def test_any_pattern_of_a_client_is_refused_or_quick(pattern: str) -> None:
    with contextlib.suppress(TraceError):
        Registry().states(pattern)  # or the test's time limit strikes


@pytest.mark.parametrize("pattern", ["(", "a{1001}", "(?=a)", "\\", "x" * 257, "\ud800", "[\n"])
def test_what_is_no_pattern_is_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(TraceError, match=r"^no regular expression: [ -~]+$"):
        Registry().states(pattern)


def _original(target: str) -> object:
    owner, method = _find(target)
    return owner.__dict__.get(method)
