"""One thread stands still where it hurts most, and another one does what a guest, or who serves it, may do meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
LIMIT = 60.0  # seconds, for what takes a thousandth of one
A_WHILE = 0.2  # for what has to wait, or does not


class Other(threading.Thread):
    """A thread that remembers what it ended with."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as e:
            self.error = e

    def ended(self) -> BaseException | None:
        self.join(LIMIT)
        assert not self.is_alive(), "it hangs"
        return self.error


class Stop:
    """A place where the thread `who` stands still until it may go on; the others pass."""

    def __init__(self, function: Callable[..., Any], *, behind: bool = False) -> None:
        self._function, self._behind = function, behind
        self.who: threading.Thread | None = None
        self._reached, self._go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result = self._function(*arguments, **named) if self._behind else None
        if threading.current_thread() is self.who:
            self._reached.set()
            assert self._go_on.wait(LIMIT)
        return result if self._behind else self._function(*arguments, **named)

    def hold(self, work: Callable[[], Any]) -> Other:
        """Have another thread work until it is here."""

        def held() -> None:
            self.who = threading.current_thread()
            work()

        other = Other(held)
        assert self._reached.wait(LIMIT)
        return other

    def go_on(self) -> None:
        self._go_on.set()


@pytest.mark.parametrize("fails", [False, True], ids=["", "that fails"])
def test_a_flush_waits_for_what_another_thread_is_writing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    path, copy = tmp_path / "disk.qcow2", tmp_path / "copy.qcow2"
    create_image(path, MiB)
    found: list[bytes] = []
    with open_image(path, read_only=False) as image:
        image.write(0, b"new" * 1000)
        write_in_order: Any = image._write_in_order

        def maybe(*arguments: Any) -> None:
            if fails and threading.current_thread() is stop.who:
                raise OSError(5, "the disk is not well")
            write_in_order(*arguments)

        stop = Stop(maybe)
        monkeypatch.setattr(image, "_write_in_order", stop)
        first = stop.hold(image.flush)

        def flush_and_look() -> None:
            image.flush()
            shutil.copy(path, copy)  # what is there if the power goes now
            with open_image(copy) as after:
                found.append(after.read(0, 3000))

        second = Other(flush_and_look)
        second.join(A_WHILE)
        stop.go_on()
        assert isinstance(first.ended(), OSError if fails else type(None))
        assert second.ended() is None
    assert found == [b"new" * 1000]
