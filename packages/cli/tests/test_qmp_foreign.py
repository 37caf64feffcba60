"""Foreign clients, unmodified, against the running program in test mode: the Python package qemu.qmp, ncat and socat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from qmp_protocol.commands import STRATOVIRT
from vm_process import LIMIT, Vm

# What a microvm in test mode answers with an error, in these words; every other query has a result.
REFUSED = {
    "query-vnc": STRATOVIRT.commands["query-vnc"].refusal,
    "query-display-image": STRATOVIRT.commands["query-display-image"].refusal,
    "query-vcpu-reg": "missing field `arguments`",
    "query-mem-gpa": "address not in hexadecimal",
}


@pytest.fixture
def vm() -> Iterator[Vm]:
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder:
        (Path(folder) / "disk").write_bytes(bytes(1 << 20))
        with Vm(Path(folder), "-device", "virtio-balloon-device,id=b", "-object", "iothread,id=io1") as vm:
            yield vm


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_qemus_client_negotiates_runs_every_query_and_hears_events(vm: Vm, transport: str) -> None:
    results: dict[str, Any] = {}
    refused: dict[str, str] = {}
    heard: list[Any] = []

    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(getattr(vm, transport))
        assert client.greeting is not None
        assert client.greeting._asdict()["QMP"]["version"]["package"] == "StratoVirt-2.4.0"
        with client.listener() as listener:
            for name in [each for each in STRATOVIRT.commands if each.startswith("query-")]:
                try:
                    results[name] = await client.execute(name)
                except ExecuteError as error:
                    refused[name] = str(error)
            await client.execute("stop")
            await client.execute("cont")
            await client.execute(
                "blockdev-add",
                {
                    "node-name": "d",
                    "file": {"driver": "file", "filename": str(Path(vm.unix).with_name("disk"))},
                    "cache": {"direct": False},
                },
            )
            await client.execute("device_add", {"id": "d", "driver": "virtio-blk-mmio", "addr": "0x0"})
            await client.execute("device_del", {"id": "d"})
            await client.execute("system_reset")
            await client.execute("quit")
            heard.extend([await listener.get() for _ in range(5)])
        with contextlib.suppress(EOFError):  # the server hung up first
            await client.disconnect()

    asyncio.run(asyncio.wait_for(talk(), LIMIT))
    assert refused == REFUSED
    assert results["query-status"] == {"running": True, "singlestep": False, "status": "running"}
    assert results["query-balloon"] == {"actual": 128 << 20}
    assert len(results["query-commands"]) == len(STRATOVIRT.commands)
    assert {"meta-type": "event", "name": "STOP", "arg-type": "q_empty"} in results["query-qmp-schema"]
    assert [event["event"] for event in heard] == ["STOP", "RESUME", "DEVICE_DELETED", "RESET", "SHUTDOWN"]
    assert heard[2]["data"] == {"device": "d", "path": "d"}
    assert vm.process.wait(LIMIT) == 0


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_qemus_client_gets_errors_with_their_class_and_comes_again(vm: Vm, transport: str) -> None:
    async def talk() -> str:
        client = QMPClient("test")
        for _ in range(3):
            await client.connect(getattr(vm, transport))
            await client.execute("query-status")
            await client.disconnect()
        await client.connect(getattr(vm, transport))
        with pytest.raises(ExecuteError) as caught:
            await client.execute("device_del", {"id": "none"})
        await client.disconnect()
        return f"{caught.value.error_class}: {caught.value}"

    assert asyncio.run(asyncio.wait_for(talk(), LIMIT)) == "GenericError: Device none not found"


SCRIPT = """\
{ "execute": "qmp_capabilities" }
{ "execute": "query-status", "id": "one" }
{ "execute": "stop" }
{ "execute": "cont" }
{ "execute": "no-such-command" }
{ "execute": "quit" }
"""
KINDS = ["QMP", "return", "return", "STOP", "return", "RESUME", "return", "error", "return", "SHUTDOWN"]

# As in the manual, and as people write them
TOOLS = {
    "ncat -U PATH": lambda vm: ["ncat", "-U", vm.unix],
    "ncat IP PORT": lambda vm: ["ncat", vm.tcp[0], str(vm.tcp[1])],
    "socat UNIX-CONNECT": lambda vm: ["socat", "-t30", "-", f"UNIX-CONNECT:{vm.unix}"],
    "socat TCP": lambda vm: ["socat", "-t30", "-", f"TCP:{vm.tcp[0]}:{vm.tcp[1]}"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_script_of_a_shell_gets_its_answers_and_ends_the_machine(vm: Vm, tool: str) -> None:
    command = TOOLS[tool](vm)
    _need(command[0])
    done = subprocess.run(command, input=SCRIPT.encode(), capture_output=True, timeout=LIMIT, check=False)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert [message.get("event") or next(iter(message)) for message in messages] == KINDS
    assert done.stdout.count(b"\r\n") == len(KINDS)
    assert messages[2]["id"] == "one"
    assert vm.process.wait(LIMIT) == 0


def test_a_line_at_a_time_works_as_typed_by_a_person(vm: Vm) -> None:
    _need("ncat")
    with subprocess.Popen(["ncat", "-U", vm.unix], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ncat:
        assert ncat.stdin
        assert ncat.stdout
        assert "QMP" in json.loads(ncat.stdout.readline())
        for line, kinds in (
            ('{"execute":"query-status"}', ["return"]),
            ('{"execute":"stop"}', ["event", "return"]),
            ("not json", ["error"]),
            ('{"execute":"system_reset"}', ["return", "event"]),
        ):
            ncat.stdin.write(line.encode() + b"\n")
            ncat.stdin.flush()
            assert [next(iter(json.loads(ncat.stdout.readline()))) for _ in kinds] == kinds


def _need(tool: str) -> None:
    if shutil.which(tool) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{tool} is not installed, and in CI it must be")
        pytest.skip(f"{tool} is not installed")
