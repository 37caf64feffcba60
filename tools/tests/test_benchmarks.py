"""Benchmarks that need neither a lab nor a peer still run: what they measure changes under them. No figure is judged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
LIMIT = 120.0  # seconds, for what takes one


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / words[0]), *words[1:]], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("batch", ["8", "64"])
def test_the_network_card_is_measured_in_every_shape(batch: str) -> None:
    printed = run("nic", "--rounds", "20", "--batch", batch)
    assert re.findall(r"(?m)^  (\S+) +\d+ ns a buffer", printed) == ["rx-64k", "rx-64", "tx-64", "tx-64k"]


@pytest.mark.parametrize("words", [[], ["--direct-descriptors"], ["--write"], ["--blocks", "32"]], ids=" ".join)
def test_the_virtqueue_is_measured(words: list[str]) -> None:
    assert re.search(r"queue \+ blk \+ raw +[\d.]+ us/request", run("virtqueue", "--requests", "2000", *words))


@pytest.mark.parametrize("name", ["blk", "boot", "exits", "footprint", "many", "net"])
def test_those_that_start_machines_say_what_they_do(name: str) -> None:
    assert run(name, "-h").startswith("usage: ")
