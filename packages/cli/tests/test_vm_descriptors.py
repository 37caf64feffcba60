"""A process that may not open many files: what it says when they do not suffice, and what clients can do to it when they do."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

from vm_process import Client, Vm


def test_descriptors_that_a_client_passes_leave_enough_for_everybody_else(tmp_path: Path) -> None:
    with Vm(tmp_path) as vm, Client(vm.unix) as client:
        resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE, (80, 80))
        reader, writer = os.pipe()
        refused = ""
        passed = 0
        while not refused:
            client.send(json.dumps({"execute": "getfd", "arguments": {"fdname": str(passed)}}), [writer])
            refused = client.read().get("error", {}).get("desc", "")
            passed += not refused
        assert (passed, refused) == (20, "at most 20 descriptors can wait for a device")
        with Client(vm.unix) as other:
            assert other.run("query-status")["return"]["running"] is True
            drive = {"node-name": "d", "file": {"driver": "file", "filename": str(tmp_path / "disk")}, "cache": {"direct": False}}
            (tmp_path / "disk").write_bytes(bytes(1 << 20))
            assert other.run("blockdev-add", drive) == {"return": {}}
        os.close(reader)
        os.close(writer)
