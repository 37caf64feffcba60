"""QMP against the whole program in test mode (no KVM): the reference's transcripts, every query, every command."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pystratovirt.cmdline.options import OPTIONS as DECLARED
from pystratovirt.qmp_handlers import docs
from pystratovirt.qmp_handlers.debug import print_patiently
from pystratovirt.qmp_handlers.human import snapshot_table
from pystratovirt.trace import POINTS
from qmp_manual import examples
from qmp_protocol.commands import COMMANDS, STRATOVIRT
from qmp_protocol.schema.reference import reference
from qmp_protocol.schema.struct import type_of
from vm_process import LIMIT, Client, Vm

# Commands whose device does not exist in this program yet. A command that learns to work must leave this set.
NOT_YET = {
    "migrate",
    "migrate_cancel",
}
# What a microvm lacks, here and in StratoVirt.
NOT_ON_MICROVM = {
    "cameradev_add",
    "cameradev_del",
    "input_event",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-delete-internal-sync",
    "query-display-image",
    "query-vnc",
    "switch-audio-record",
    "update_region",
}


OPTIONS = ("-object", "iothread,id=io1")


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> Iterator[Vm]:
    options = (*OPTIONS, *getattr(request, "param", ()))
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder, Vm(Path(folder), *options) as made:
        yield made


@pytest.fixture
def vm_without_acpi() -> Iterator[Vm]:
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder, Vm(Path(folder), machine="microvm,acpi=off") as made:
        yield made


def test_every_command_is_answered_and_the_sets_above_are_true(vm: Vm) -> None:
    client = Client(vm.unix)
    ends = {"quit", "system_reset", "system_powerdown", "stop", "cont"}
    wrong: dict[str, Any] = {}
    for name, command in STRATOVIRT.commands.items():
        if name in ends:
            continue
        reply = client.run(name, _arguments(command))
        desc = reply.get("error", {}).get("desc", "")
        expected = (
            f"The command {name} is not supported yet"
            if name in NOT_YET
            else STRATOVIRT.commands[name].refusal
            if name in NOT_ON_MICROVM
            else None
        )
        if (expected is not None and desc != expected) or (
            expected is None and "not support" in desc and name not in ("query-mem-gpa", "query-vcpu-reg")
        ):
            wrong[name] = reply
    assert wrong == {}
    client.close()


def _arguments(command: Any) -> dict[str, Any]:
    """Arguments that pass validation."""
    known = next((each.request.get("arguments", {}) for each in examples() if each.request["execute"] == command.name), None)
    if known is not None:
        return dict(known)
    return {
        "human-monitor-command": {"command-line": "info snapshots"},
        "input_event": {"key": "keyboard", "value": "1,1"},
        "update_region": {"update_type": "add", "region_type": "io_region", "offset": 0, "size": 8, "priority": 0},
    }.get(command.name, {})


class TestQueries:
    @pytest.mark.parametrize("vm", [("-smp", "2,maxcpus=4,sockets=2,cores=1,threads=2")], indirect=True)
    def test_cpus_and_places_for_more_say_where_they_are(self, vm: Vm) -> None:
        client = Client(vm.unix)
        cpus = client.run("query-cpus")["return"]
        assert [cpu["CPU"] for cpu in cpus] == [0, 1]
        assert cpus[1] == {
            "CPU": 1,
            "arch": "x86",
            "current": True,
            "halted": False,
            "props": {"core-id": 0, "die_id": 0, "socket-id": 0, "thread-id": 1},
            "qom_path": "/machine/unattached/device[1]",
            "thread_id": cpus[1]["thread_id"],
        }
        # Test mode has no thread for each vCPU; those of KVM are looked at in tests/lab/test_boot.py.
        assert Path(f"/proc/{vm.process.pid}/task/{cpus[1]['thread_id']}").is_dir()
        places = client.run("query-hotpluggable-cpus")["return"]
        assert places[1] == {
            "props": cpus[1]["props"],
            "qom-path": "/machine/unattached/device[1]",
            "type": "host-x86-cpu",
            "vcpus-count": 1,
        }
        # Nothing is in the places of maxcpus.
        assert places[2:] == [
            {
                "props": {"core-id": 0, "die_id": 0, "socket-id": 1, "thread-id": thread},
                "type": "host-x86-cpu",
                "vcpus-count": 1,
            }
            for thread in (0, 1)
        ]

    def test_io_threads_are_threads_of_the_process(self, vm: Vm) -> None:
        (thread,) = Client(vm.unix).run("query-iothreads")["return"]
        assert thread["id"] == "io1"
        assert Path(f"/proc/{vm.process.pid}/task/{thread['thread-id']}").is_dir()

    @pytest.mark.parametrize("vm", [("-serial", "pty")], indirect=True)
    def test_a_pseudo_terminal_is_told(self, vm: Vm) -> None:
        monitor, serial = Client(vm.unix).run("query-chardev")["return"]
        assert monitor == {"label": "m", "filename": f"tcp:127.0.0.1:{vm.tcp[1]},server=on", "frontend-open": True}
        assert serial["label"] == "serial_chardev"
        assert serial["filename"].startswith("pty:/dev/pts/")
        assert serial["frontend-open"] is True
        assert Path(serial["filename"].removeprefix("pty:")).exists()

    def test_guest_memory_can_be_read(self, vm: Vm) -> None:
        client = Client(vm.unix)
        vm.ask("writel 0x100000 0xb9000001")
        assert client.run("query-mem-gpa", {"gpa": "100000"}) == {"return": "B9000001"}
        assert client.run("query-mem-gpa", {"gpa": "0" * 16 + "100000"}) == {"return": "B9000001"}
        assert client.run("query-mem-gpa", {"gpa": "100100"}) == {"return": "0"}
        for gpa, desc in {
            "0x100000": "address not in hexadecimal",
            "": "address not in hexadecimal",
            "f" * 17: "address not in hexadecimal",
            "7ffffff": "this gpa does not support query",  # only its first byte is RAM
            "fec00000": "this gpa does not support query",  # a device's: reading would change it
        }.items():
            assert client.run("query-mem-gpa", {"gpa": gpa})["error"]["desc"] == desc

    def test_the_memory_map_goes_to_standard_output(self, vm: Vm) -> None:
        assert Client(vm.unix).run("query-mem") == {"return": {}}
        text = vm.log.read_text()
        assert "0x0000000000000000-0x0000000007ffffff RAM" in text
        assert "virtio-mmio0" in text

    def test_trace_points_can_be_switched_and_write_to_the_log(self, vm: Vm) -> None:
        client = Client(vm.unix)
        states = client.run("trace-get-state", {"name": "^virtio_tpt"})["return"]
        assert states == [{"name": f"virtio_tpt_{kind}_config", "state": "disabled"} for kind in ("read", "write")]
        assert len(client.run("trace-get-state", {"name": ""})["return"]) == len(POINTS)
        assert client.run("trace-set-state", {"name": "virtio_tpt_read", "enable": True}) == {"return": {}}
        assert client.run("trace-get-state", {"name": "tpt_read"})["return"][0]["state"] == "enabled"
        vm.ask("readl 0xf0100000")
        assert client.run("trace-set-state", {"name": "virtio", "enable": False}) == {"return": {}}
        vm.ask("readl 0xf0100004")
        lines = [line for line in vm.log.read_text().splitlines() if "[virtio_tpt_read_config]" in line]
        assert len(lines) == 1
        assert "offset=0x0 size=0x4" in lines[0]
        assert client.run("trace-get-state", {"name": "("})["error"]["desc"].startswith("Failed to get trace state")
        assert client.run("trace-set-state", {"name": "(?=a)", "enable": True})["error"]["desc"].startswith(
            "Failed to set trace state"
        )

    def test_trace_points_of_a_file_are_on_from_the_start(self, tmp_path: Path) -> None:
        (tmp_path / "patterns").write_text("virtio_tpt_read\n\n  ^qmp_command$  \n   \n")
        with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder:
            vm = Vm(Path(folder), "-trace", f"file={tmp_path}/patterns")
            states = Client(vm.unix).run("trace-get-state", {"name": ""})["return"]
            vm.ask("readl 0xf0100000")
            vm.close()
            lines = vm.log.read_text()
        enabled = {each["name"] for each in states if each["state"] == "enabled"}
        assert enabled == {"virtio_tpt_read_config", "qmp_command"}
        assert "[virtio_tpt_read_config]" in lines

    def test_probes_find_what_they_look_for(self, vm: Vm) -> None:
        client = Client(vm.unix)
        assert client.run("query-target") == {"return": {"arch": "x86_64"}}
        assert [each["name"] for each in client.run("query-machines")["return"]] == ["none", "microvm", "q35"]
        assert client.run("qom-list", {"path": "/machine"}) == {"return": []}
        assert {"name": "virtio-gpu-pci", "parent": "virtio-gpu"} in client.run("qom-list-types", {"implements": "x"})["return"]
        assert client.run("device-list-properties", {"typename": "virtio-blk-pci"})["return"] == [
            {"name": "disable-legacy", "type": "OnOffAuto"},
            {"name": "num-queues", "type": "uint16"},
        ]
        (drive,) = client.run("query-command-line-options", {"option": "drive"})["return"]
        types = {each["name"]: each["type"] for each in drive["parameters"]}
        # The first two as in StratoVirt; QEMU's word for what is written otherwise than on and off is string.
        expected = {"discard": "string", "detect-zeroes": "string", "external-files": "string", "readonly": "boolean"}
        assert expected.items() <= types.items()
        assert (types["l2-cache-size"], types["throttling.iops-total"]) == ("size", "number")
        options = client.run("query-command-line-options")["return"]
        listed = {each["option"]: {parameter["name"] for parameter in each["parameters"]} for each in options}
        assert {"id", "path", "host", "port", "server"} <= listed["chardev"]
        assert {"drive", "netdev", "chardev", "guest-cid"} <= listed["device"]
        assert listed.keys() == {option.name for option in DECLARED.values() if option.schema is not None}
        assert client.run("query-kvm")["return"]["enabled"] is False
        assert client.run("query-migrate") == {"return": {"status": "setup"}}

    def test_the_human_monitor_knows_some_lines(self, vm: Vm) -> None:
        client = Client(vm.unix)

        def line(text: str) -> Any:
            return client.run("human-monitor-command", {"command-line": text})

        assert line("info snapshots") == {"return": "There is no snapshot available.\r\n"}
        assert line("info block") == {"return": ""}
        assert line("info block x")["error"]["desc"] == "Invalid number of arguments"
        assert line("info usb")["error"]["desc"] == "Unsupported command: info usb"
        assert line("savevm x")["error"]["desc"] == "Unsupported command: savevm"
        assert line("")["error"]["desc"] == "Unsupported command: "

    def test_results_fit_their_declarations(self, vm: Vm) -> None:
        client = Client(vm.unix)
        for command in COMMANDS:
            if command.name.startswith("query-") or command.name in ("qom-list", "qom-list-types", "device-list-properties"):
                reply = client.run(command.name)
                if "return" in reply:
                    type_of(command.result_hint()).check(reply["return"], "")  # to the letter, which parse_result() is not


class _Snapshot(NamedTuple):
    id: str
    name: str
    vm_state_size: int
    date_sec: int
    vm_clock_nsec: int
    icount: int = 2**64 - 1


def test_a_standard_output_that_nobody_reads_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    print_patiently("x" * 1_000_000, writer, 10)
    os.close(reader)
    print_patiently("x", writer, 10)
    os.close(writer)


def test_two_that_print_do_not_both_take_the_last_room(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    class Poll:
        def __init__(self) -> None:
            self._poll = poll()

        def register(self, fd: int, events: int) -> None:
            self._poll.register(fd, events)

        def poll(self, patience: int) -> list[tuple[int, int]]:
            found = self._poll.poll(patience)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # if they look at the same time, both have looked when the first one writes
            return found

    poll = select.poll
    monkeypatch.setattr(select, "poll", Poll)
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) - select.PIPE_BUF))
    printing = [threading.Thread(target=print_patiently, args=("x" * 8192, writer, 10), daemon=True) for _ in range(2)]
    for each in printing:
        each.start()
    for each in printing:
        each.join(LIMIT)
    assert not any(each.is_alive() for each in printing)
    os.close(reader)
    os.close(writer)


def test_the_table_of_commands_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs" / "compatibility.md"
    assert docs.refresh(page.read_text()) == page.read_text(), "run python -m pystratovirt.qmp_handlers.docs on it"


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs" / "qmp-reference.md"
    assert page.read_text() == reference(STRATOVIRT), "run python -m qmp_protocol.schema.reference > docs/qmp-reference.md"


def test_snapshots_are_listed_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    clock = ((25 * 60 + 2) * 60 + 3) * 10**9 + 450_000_000
    snapshots = [_Snapshot("1", "before-upgrade", 0, 1712000000, clock), _Snapshot("2", "odd\udcff", 7, 0, 0, 12)]
    assert snapshot_table({"vol9": snapshots}).split("\r\n") == [
        "List of snapshots present on all disks:",
        "None",
        "",
        "List of partial (non-loadable) snapshots on 'vol9':",
        "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT",
        "1         before-upgrade        0 B 2024-04-01 19:33:20  25:02:03.45           ",
        "2         odd\\udcff             7 B 1970-01-01 00:00:00  00:00:00.00         12",
        "",
    ]


class TestTranscripts:
    """Section 20 of the reference."""

    def test_pause_double_pause_resume(self, vm: Vm) -> None:
        client = Client(vm.unix)
        client.send('{"execute":"stop"}')
        assert client.read()["event"] == "STOP"
        assert client.read() == {"return": {}}
        assert client.run("query-status")["return"]["status"] == "paused"
        client.send('{"execute":"cont"}')
        assert client.read()["event"] == "RESUME"
        assert client.read() == {"return": {}}
        assert client.run("query-status")["return"]["running"] is True

    def test_quit_ends_with_the_event_and_then_the_stream(self, vm: Vm) -> None:
        client, other = Client(vm.unix), Client(vm.tcp)
        client.send('{"execute":"quit","id":"z"}\n')
        assert client.read() == {"return": {}, "id": "z"}
        event = client.read()
        assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        assert client.read() is None
        assert other.read()["event"] == "SHUTDOWN"
        assert vm.process.wait(LIMIT) == 0
        assert not Path(vm.unix).exists()

    @pytest.mark.parametrize("vm", [("-device", "virtio-balloon-device,id=b")], indirect=True)
    def test_nothing_happens_to_a_machine_behind_its_shutdown(self, vm: Vm) -> None:
        client = Client(vm.unix)
        chardev = '{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"p"}},"server":false}}}'
        late = {"system_powerdown": "{}", "system_reset": "{}", "balloon": '{"value":67108864}', "chardev-add": chardev}
        commands = "".join(f'{{"execute":"{command}","arguments":{arguments}}}' for command, arguments in late.items())
        client.send(f'{{"execute":"quit"}}{commands}')
        assert client.read() == {"return": {}}
        assert client.read()["event"] == "SHUTDOWN"
        for _ in late:
            assert client.read() == {"error": {"class": "GenericError", "desc": "the machine has ended"}}
        assert client.read() is None
        assert vm.process.wait(LIMIT) == 0

    @pytest.mark.parametrize("command", ["system_powerdown", "system_reset"])
    def test_power_and_reset_without_acpi_are_the_end(self, vm_without_acpi: Vm, command: str) -> None:
        vm = vm_without_acpi
        client, other = Client(vm.unix), Client(vm.tcp)
        client.send(f'{{"execute":"{command}","id":"p"}}')
        assert client.read() == {"return": {}, "id": "p"}
        event = client.read()
        assert (event["event"], event["data"]) == (
            "SHUTDOWN",
            {"guest": False, "reason": f"host-qmp-{command}".replace("_", "-")},
        )
        assert client.read() is None
        assert other.read()["event"] == "SHUTDOWN"
        assert vm.process.wait(LIMIT) == 0
        assert not Path(vm.unix).exists()

    def test_power_and_reset_with_acpi_are_the_guest_s_affair(self, vm: Vm) -> None:
        client, other = Client(vm.unix), Client(vm.tcp)
        for command, name in (("system_powerdown", "POWERDOWN"), ("system_reset", "RESET")):
            client.send(f'{{"execute":"{command}"}}')
            assert client.read() == {"return": {}}
            assert client.read()["event"] == other.read()["event"] == name
        assert client.run("query-status")["return"]["running"] is True

    def test_a_signal_ends_with_the_event(self, vm: Vm) -> None:
        client = Client(vm.unix)
        vm.process.terminate()
        assert client.read()["data"] == {"guest": False, "reason": "Guest shutdown by signal 15"}
        assert client.read() is None
        assert vm.process.wait(LIMIT) == 0

    def test_bad_requests(self, vm: Vm) -> None:
        client = Client(vm.unix)
        for text, desc in {
            '{"execute":"device_del"}': "missing field `arguments`",
            '{"execute":"stop","arguments":{"force":true}}': "unknown field `force`, there are no fields",
            "nonsense\n": "expected a JSON object at line 1 column 1",
        }.items():
            client.send(text)
            assert client.read() == {"error": {"class": "GenericError", "desc": desc}}

    def test_two_requests_in_one_packet_both_run(self, vm: Vm) -> None:
        client = Client(vm.unix)
        client.send('{"execute":"stop"}{"execute":"cont"}')
        assert [client.read().get("event") for _ in range(4)] == ["STOP", None, "RESUME", None]

    def test_too_many_requests_are_refused_in_words(self, vm: Vm) -> None:
        client = Client(vm.unix)
        client.send('{"execute":"query-status"}' * 400)
        replies = [client.read() for _ in range(400)]
        assert all("return" in reply for reply in replies[:101])
        refused = [reply["error"] for reply in replies if "error" in reply]
        assert refused[0] == {"class": "OperationThrottled", "desc": "More than 100 requests received during 1 second"}
