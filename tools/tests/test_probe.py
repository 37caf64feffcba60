"""The probe answers in one line, and never with an exception."""

from __future__ import annotations

from pathlib import Path

from lab.probe import probe


def test_without_a_device_the_answer_is_no_and_says_why(tmp_path: Path) -> None:
    answer = probe(str(tmp_path / "kvm"))
    assert not answer.native
    assert answer.reason.endswith("kvm: No such file or directory")


def test_a_device_that_is_not_kvm_is_no() -> None:
    answer = probe("/dev/zero")
    assert not answer.native
    assert answer.reason.startswith("/dev/zero cannot run a 64-bit guest: ")
