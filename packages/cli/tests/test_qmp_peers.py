"""Unmodified foreign peers: the Python package qemu.qmp as a client of our server, QEMU's programs as servers of our client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from qemu.qmp import ExecuteError, QMPClient

from block_qcow2 import create_image
from pystratovirt.qmpshell.asyncclient import AsyncClient
from pystratovirt.qmpshell.client import QmpClient
from pystratovirt.qmpshell.main import main
from pystratovirt.qmpshell.model import Model
from qmp_protocol import QmpError
from qmp_protocol.commands import COMMANDS, STRATOVIRT
from qmp_protocol.commands.block import BlockdevCache, BlockdevFile
from qmp_protocol.events import DeviceDeleted
from qmp_server import Call, QmpServer, listen_tcp, listen_unix


@pytest.fixture
def server() -> QmpServer:
    made = QmpServer(rate=0)
    made.register("query-status", lambda _, call: {"running": True, "singlestep": False, "status": "running"})

    @made.handler("stop")
    def stop(_: Any, call: Call) -> None:
        call.emit("STOP")

    @made.handler("quit")
    def quit_(_: Any, call: Call) -> None:
        call.emit_after("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        call.after_reply(made.close)

    return made


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, server: QmpServer, tmp_path: Path) -> Iterator[Any]:
    listener = listen_unix(tmp_path / "qmp.sock") if request.param == "unix" else listen_tcp("127.0.0.1", 0)
    where = listener.socket.getsockname()
    thread = threading.Thread(target=anyio.run, args=(server.serve, [listener]))
    thread.start()
    yield where
    server.close()
    thread.join()


class TestQemusClient:
    """The package qemu.qmp."""

    def test_negotiates_runs_every_query_and_hears_events(self, address: Any, server: QmpServer) -> None:
        async def talk() -> tuple[dict[str, Any], list[str]]:
            client = QMPClient("test")
            results: dict[str, Any] = {}
            heard: list[str] = []
            await client.connect(address)
            with client.listener() as listener:
                for name in [name for name in STRATOVIRT.commands if name.startswith("query-")]:
                    try:
                        results[name] = await client.execute(name)
                    except ExecuteError as error:
                        results[name] = error
                await client.execute("stop")
                heard.append((await listener.get())["event"])
                server.emit(DeviceDeleted(device="d", path="d"))
                heard.append((await listener.get())["event"])
                await client.execute("quit")
                heard.append((await listener.get())["event"])
            with contextlib.suppress(EOFError):  # the server hung up first
                await client.disconnect()
            return results, heard

        results, heard = asyncio.run(asyncio.wait_for(talk(), 60))
        assert results["query-status"]["status"] == "running"
        assert len(results["query-commands"]) == 62
        assert any(entry["name"] == "blockdev-add" for entry in results["query-qmp-schema"])
        assert heard == ["STOP", "DEVICE_DELETED", "SHUTDOWN"]
        # What has no handler here is refused in words, not by silence.
        assert "not supported yet" in str(results["query-balloon"])

    def test_gets_errors_with_their_class(self, address: Any) -> None:
        async def talk() -> str:
            client = QMPClient("test")
            await client.connect(address)
            with pytest.raises(ExecuteError) as caught:
                await client.execute("no-such-command")
            await client.disconnect()
            return str(caught.value.error_class)

        assert asyncio.run(asyncio.wait_for(talk(), 60)) == "CommandNotFound"

    def test_is_not_confused_by_an_event_during_negotiation(self, address: Any, server: QmpServer) -> None:
        stop = threading.Event()

        def shout() -> None:
            while not stop.is_set():
                server.emit("STOP")
                stop.wait(0.001)

        async def talk() -> None:
            for _ in range(20):
                client = QMPClient("test")
                await client.connect(address)
                await client.execute("query-status")
                await client.disconnect()

        shouter = threading.Thread(target=shout)
        shouter.start()
        try:
            asyncio.run(asyncio.wait_for(talk(), 60))
        finally:
            stop.set()
            shouter.join()


SCRIPTS = {
    # As in the manual and as people write them: ncat, socat.
    "ncat": ["ncat", "-U"],
    "socat": ["socat", "-t30", "-"],
}


@pytest.mark.parametrize("tool", SCRIPTS)
@pytest.mark.parametrize("address", ["unix"], indirect=True)
def test_shell_scripts_get_their_answers(address: str, tool: str) -> None:
    _need(tool)
    command = [*SCRIPTS[tool], address if tool == "ncat" else f"UNIX-CONNECT:{address}"]
    request = b'{"execute":"qmp_capabilities"}\n{ "execute": "query-status" }\n{"execute":"quit"}'
    done = subprocess.run(command, input=request, capture_output=True, timeout=60, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["QMP", "return", "return", "return", "event"]
    assert done.stdout.count(b"\r\n") == 5


@contextlib.contextmanager
def qemu(path: Path) -> Iterator[None]:
    program = [_need("qemu-system-x86_64"), "-machine", "none", "-display", "none", "-nodefaults"]
    yield from _running([*program, "-qmp", f"unix:{path},server=on,wait=off"], path)


@contextlib.contextmanager
def pc(path: Path) -> Iterator[None]:
    program = [_need("qemu-system-x86_64"), "-machine", "pc,accel=tcg", "-m", "64", "-display", "none", "-nodefaults", "-S"]
    program += ["-smp", "1,maxcpus=2", "-object", "iothread,id=io0", "-device", "virtio-balloon-pci"]
    yield from _running([*program, "-qmp", f"unix:{path},server=on,wait=off"], path)


@contextlib.contextmanager
def storage_daemon(path: Path) -> Iterator[None]:
    program = [_need("qemu-storage-daemon"), "--chardev", f"socket,path={path},server=on,wait=off,id=c"]
    yield from _running([*program, "--monitor", "chardev=c"], path)


class TestOurClient:
    """Against QEMU's own servers."""

    @pytest.mark.parametrize("peer", [qemu, storage_daemon])
    def test_negotiates_and_reads_the_schema(self, tmp_path: Path, peer: Any) -> None:
        with peer(tmp_path / "s"), QmpClient(str(tmp_path / "s"), timeout=60) as client:
            assert "qemu" in client.greeting.version
            model = Model.of(client)
            assert "blockdev-add" in model.names("command")
            assert "filename" in {member.name for member in model.members(model.arguments("blockdev-add"))}
            assert client.execute("query-named-block-nodes") == []

    def test_runs_commands_and_hears_events(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with qemu(tmp_path / "s"):
            where = ["-s", str(tmp_path / "s"), "-t", "60"]
            assert main([*where, "stop", "-w", "STOP"]) == 0
            assert main([*where, "blockdev-add", "node-name=n", "driver=null-co", "size=0x1000"]) == 0
            assert main([*where, "query-named-block-nodes"]) == 0
            assert main([*where, "hmp", "info", "status"]) == 0
            assert main([*where, "no-such-command"]) == 1
            assert main([*where, "quit", "-w", "SHUTDOWN"]) == 0
        out, err = capsys.readouterr()
        assert '"event":"STOP"' in out
        assert '"virtual-size":4096' in out
        assert "VM status: paused" in out
        assert '"event":"SHUTDOWN"' in out
        assert "CommandNotFound" in err

    def test_hears_events_of_the_storage_daemon(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with storage_daemon(tmp_path / "s"):
            where = ["-s", str(tmp_path / "s"), "-t", "60"]
            assert main([*where, "blockdev-add", "node-name=n", "driver=null-co", "size=0x1000"]) == 0
            assert main([*where, "nbd-server-start", "addr.type=unix", f"addr.data.path={tmp_path}/nbd"]) == 0
            assert main([*where, "block-export-add", "type=nbd", "id=e", "node-name=n"]) == 0
            assert main([*where, "block-export-del", "id=e", "-w", "BLOCK_EXPORT_DELETED"]) == 0
            assert main([*where, "quit"]) == 0
        assert '"event":"BLOCK_EXPORT_DELETED","data":{"id":"e"}' in capsys.readouterr().out


class TestTypedMethods:
    """`client.query_status()` and the like against QEMU, whose words and members are not all StratoVirt's."""

    def test_understand_every_answer_to_a_query(self, tmp_path: Path) -> None:
        with pc(tmp_path / "s"), QmpClient(str(tmp_path / "s"), timeout=60) as client:
            assert (client.query_status().status, client.query_status().running) == ("prelaunch", False)
            known = {each.name for each in client.query_commands()}
            queries = [each.name for each in COMMANDS if each.name.startswith(("query-", "qom-list-types"))]
            refused = {}
            for name in known.intersection(queries):
                try:
                    getattr(client, name.replace("-", "_"))()
                except QmpError as error:
                    refused[name] = error.desc
            assert refused.keys() <= {"query-sev-capabilities"}, refused  # which wants an AMD processor's device
            assert len(known.intersection(queries)) > 20
            assert client.query_migrate().status == "none"
            assert client.query_version().package == client.greeting.version["package"]
            assert client.query_balloon().actual == 64 << 20
            assert [each.id for each in client.query_iothreads()] == ["io0"]
            assert len(client.query_hotpluggable_cpus()) == 2
            assert "pc" in {machine.name.partition("-")[0] for machine in client.query_machines()}
            assert client.device_list_properties(typename="virtio-balloon-pci")

    def test_do_what_their_names_say(self, tmp_path: Path) -> None:
        create_image(str(tmp_path / "disk"), 1 << 20)
        (tmp_path / "raw").write_bytes(bytes(1 << 20))
        with pc(tmp_path / "s"), QmpClient(str(tmp_path / "s"), timeout=60) as client:
            client.cont()
            assert client.wait_event(60).name == "RESUME"
            client.stop()
            assert client.wait_event(60).name == "STOP"
            assert client.query_status().status == "paused"
            file = BlockdevFile(driver="file", filename=str(tmp_path / "disk"), aio="threads")
            client.blockdev_add(node_name="d", file=file, cache=BlockdevCache(direct=False), driver="qcow2")
            file = BlockdevFile(driver="file", filename=str(tmp_path / "raw"), aio="threads")
            client.blockdev_add(node_name="r", file=file, cache=BlockdevCache(direct=False))
            assert {"d", "r"} <= {node["node-name"] for node in client.query_named_block_nodes()}
            client.device_add(id="disk0", driver="virtio-blk-pci", drive="d", addr="0x5")
            assert client.query_block()[0]["inserted"]["node-name"] == "d"
            with pytest.raises(QmpError, match="is in use"):
                client.blockdev_del(node_name="d")
            with (tmp_path / "disk").open() as opened:
                client.getfd(fds=[opened.fileno()], fdname="f")
            assert "paused" in client.human_monitor_command(command_line="info status")
            client.system_reset()
            client.wait_event(60, lambda event: event.name == "RESET")
            client.quit()
            assert client.wait_event(60, lambda event: event.name == "SHUTDOWN").data["reason"] == "host-qmp-quit"

    def test_that_are_awaited_do_the_same(self, tmp_path: Path) -> None:
        async def talk() -> tuple[str, int, str]:
            client = await AsyncClient.connect(str(tmp_path / "s"), 60)
            try:
                status, balloon = await asyncio.gather(client.query_status(), client.query_balloon())
                await client.cont()
                return status.status, balloon.actual, (await client.events.get()).name
            finally:
                client.close()

        with pc(tmp_path / "s"):
            assert asyncio.run(asyncio.wait_for(talk(), 60)) == ("prelaunch", 64 << 20, "RESUME")


def _running(command: list[str], path: Path) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        for _ in range(6000):
            if process.poll() is not None or _answers(path):
                break
            threading.Event().wait(0.01)
        assert process.poll() is None, f"{command[0]} ended at once"
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def _need(tool: str) -> str:
    found = shutil.which(tool)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{tool} is not installed, and in CI it must be")
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found
