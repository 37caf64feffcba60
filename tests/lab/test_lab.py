"""The place where whole-VM tests run gives them what they need."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lab.probe import probe


def test_kvm_runs_guests() -> None:
    assert probe().native


def test_files_for_direct_access_can_be_had(direct_folder: Path) -> None:
    descriptor = os.open(direct_folder / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.close(descriptor)


@pytest.mark.skipif("LAB" not in os.environ, reason="this machine's network is not ours to change")
def test_taps_and_bridges_can_be_made() -> None:
    subprocess.run(["ip", "link", "add", "br-test", "type", "bridge"], check=True)
    subprocess.run(["ip", "tuntap", "add", "tap-test", "mode", "tap"], check=True)
    subprocess.run(["ip", "link", "set", "tap-test", "master", "br-test"], check=True)
    subprocess.run(["ip", "link", "del", "tap-test"], check=True)
    subprocess.run(["ip", "link", "del", "br-test"], check=True)


def test_vhost_devices_are_there() -> None:
    subprocess.run(["modprobe", "-a", "vhost_net", "vhost_vsock"], check=True)
    assert Path("/dev/vhost-net").exists()
    assert Path("/dev/vhost-vsock").exists()
