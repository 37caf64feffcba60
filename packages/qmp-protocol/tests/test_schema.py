"""Declarations: what they accept, how they refuse, and that StratoVirt's commands are all there."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_protocol import ABSENT, QmpError, SchemaError
from qmp_protocol.commands import COMMANDS, STRATOVIRT
from qmp_protocol.commands.block import BlockdevAdd, BlockdevCache, BlockdevFile
from qmp_protocol.commands.lifecycle import QueryStatus, StatusInfo, Stop
from qmp_protocol.commands.machine import CpuInfo, QueryCpus
from qmp_protocol.errors import ERROR_CLASSES
from qmp_protocol.events import EVENTS, DeviceDeleted
from qmp_protocol.schema import Command, Empty, Machines, Notification, Schema, Struct, member, u8
from qmp_protocol.schema.introspect import introspect
from qmp_protocol.schema.reference import reference

WIRE_NAMES = [
    "qmp_capabilities",
    "quit",
    "stop",
    "cont",
    "system_powerdown",
    "system_reset",
    "device_add",
    "device_del",
    "chardev-add",
    "chardev-remove",
    "netdev_add",
    "netdev_del",
    "cameradev_add",
    "cameradev_del",
    "query-hotpluggable-cpus",
    "query-cpus",
    "query-status",
    "getfd",
    "blockdev-add",
    "blockdev-del",
    "balloon",
    "query-mem",
    "query-mem-gpa",
    "query-balloon",
    "query-vnc",
    "query-display-image",
    "switch-audio-record",
    "migrate",
    "query-migrate",
    "migrate_cancel",
    "query-version",
    "query-commands",
    "query-target",
    "query-kvm",
    "query-machines",
    "query-events",
    "qom-list-types",
    "device-list-properties",
    "block-commit",
    "query-tpm-models",
    "query-tpm-types",
    "query-command-line-options",
    "query-migrate-capabilities",
    "query-qmp-schema",
    "query-sev-capabilities",
    "query-chardev",
    "qom-list",
    "qom-get",
    "query-block",
    "query-named-block-nodes",
    "query-blockstats",
    "query-block-jobs",
    "query-gic-capabilities",
    "query-iothreads",
    "update_region",
    "input_event",
    "human-monitor-command",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-delete-internal-sync",
    "query-vcpu-reg",
    "trace-get-state",
    "trace-set-state",
]


def refusal(name: str, arguments: Any) -> str:
    with pytest.raises(QmpError) as caught:
        STRATOVIRT.command(name).parse(arguments)
    assert caught.value.class_name == "GenericError"
    return caught.value.desc


def test_every_command_of_stratovirt_is_declared_in_its_order() -> None:
    assert list(STRATOVIRT.commands) == WIRE_NAMES


def test_every_event_of_stratovirt_is_declared_in_its_order() -> None:
    assert list(STRATOVIRT.events) == [
        "SHUTDOWN",
        "RESET",
        "STOP",
        "RESUME",
        "POWERDOWN",
        "CPU_RESIZE",
        "DEVICE_DELETED",
        "BALLOON_CHANGED",
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_is_documented_and_its_types_can_be_worked_out(command: type[Command[Any]]) -> None:
    assert command.__doc__
    command.fields()
    command.result_hint()
    if command.machines != Machines.ALL:
        assert command.refusal, "a machine that lacks a command must be able to say so"


def test_an_unknown_command_is_command_not_found() -> None:
    with pytest.raises(QmpError, match="The command query-name has not been found") as caught:
        STRATOVIRT.command("query-name")
    assert caught.value.class_name == "CommandNotFound"


@pytest.mark.parametrize(
    ("name", "arguments", "desc"),
    [
        ("device_del", ABSENT, "missing field `arguments`"),
        ("device_del", {}, "missing field `id`"),
        ("device_del", None, "invalid type: null, expected struct device_del"),
        ("device_del", "x", 'invalid type: string "x", expected struct device_del'),
        ("device_del", {"id": 1}, "invalid type: integer `1`, expected a string (member `id`)"),
        ("device_del", {"id": "a", "x": 1}, "unknown field `x`, expected `id`"),
        ("stop", {"force": True}, "unknown field `force`, there are no fields"),
        # Of two mistakes the first, and what is missing last, as StratoVirt's parser finds them.
        ("device_del", {"x": 1}, "unknown field `x`, expected `id`"),
        ("device_del", {"x": 1, "id": 1}, "unknown field `x`, expected `id`"),
        ("device_del", {"id": 1, "x": 1}, "invalid type: integer `1`, expected a string (member `id`)"),
        (
            "trace-set-state",
            {"enable": 1, "name": 2},
            "invalid type: integer `1`, expected a boolean (member `enable`)",
        ),
        (
            "blockdev-add",
            {"file": {"driver": "file", "x": 1}, "y": 1},
            "unknown field `x`, expected one of `driver`, `filename`, `aio` (member `file`)",
        ),
        ("trace-set-state", {"name": "a", "enable": True, "x": 1}, "unknown field `x`, expected `name` or `enable`"),
        (
            "cameradev_add",
            {"id": "a", "driver": "demo", "x": 1},
            "unknown field `x`, expected one of `id`, `driver`, `path`",
        ),
        ("balloon", {"value": "1"}, 'invalid type: string "1", expected u64 (member `value`)'),
        ("balloon", {"value": 1.5}, "invalid type: floating point `1.5`, expected u64 (member `value`)"),
        ("balloon", {"value": -1}, "invalid value: integer `-1`, expected u64 (member `value`)"),
        ("balloon", {"value": True}, "invalid type: boolean `true`, expected u64 (member `value`)"),
        ("balloon", ABSENT, "missing field `arguments`"),
        (
            "device_add",
            {"id": "a", "driver": "d", "boot_index": 256},
            "invalid value: integer `256`, expected u8 (member `boot_index`)",
        ),
        (
            "device_add",
            {"id": "a", "driver": "d", "multifunction": "on"},
            'invalid type: string "on", expected a boolean (member `multifunction`)',
        ),
        (
            "update_region",
            {"update_type": "add", "region_type": "io_region", "offset": 0, "size": 65536, "priority": 0},
            "invalid value: integer `65536`, expected u64 from 0 to 65535 (member `size`)",
        ),
        ("blockdev-add", {"node-name": "a"}, "missing field `file`"),
        ("blockdev-add", {"node-name": "a", "file": {"driver": "file"}}, "missing field `filename` (member `file`)"),
        (
            "blockdev-add",
            {"node-name": "a", "file": {"driver": "file", "filename": "f", "aio": "fast"}},
            "unknown variant `fast`, expected one of `off`, `native`, `iouring`, `threads` (member `file.aio`)",
        ),
        (
            "blockdev-add",
            {"node-name": "a", "file": {"driver": "file", "filename": "f"}, "media": "tape"},
            "unknown variant `tape`, expected `disk` or `cdrom` (member `media`)",
        ),
        (
            "getfd",
            {"fdname": "x" * 256},
            "invalid length 256, expected at most 255 characters (member `fdname`)",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(name: str, arguments: Any, desc: str) -> None:
    assert refusal(name, arguments) == desc


def test_null_for_an_optional_argument_is_the_same_as_leaving_it_out() -> None:
    command = STRATOVIRT.command("device_add")
    assert command.parse({"id": "a", "driver": "d", "bus": None}) == command.parse({"id": "a", "driver": "d"})


NEEDED: dict[str, dict[str, Any]] = {
    "balloon": {"value": 1},
    "migrate": {"uri": "file:x"},
    "input_event": {"key": "keyboard", "value": "1,1"},
    "update_region": {"update_type": "add", "region_type": "io_region", "offset": 0, "size": 8, "priority": 0},
}


@pytest.mark.parametrize("name", [command.name for command in COMMANDS if not command.strict])
def test_commands_that_are_not_strict_ignore_what_they_do_not_know(name: str) -> None:
    needed = NEEDED.get(name, {})
    command = STRATOVIRT.command(name)
    assert command.parse({**needed, "no-such-member": 1}) == command.parse(needed)


@pytest.mark.parametrize("name", [command.name for command in COMMANDS if command.strict])
def test_all_others_refuse_what_they_do_not_know(name: str) -> None:
    assert refusal(name, {**NEEDED.get(name, {}), "no-such-member": 1}).startswith("unknown field `no-such-member`, ")


def test_kata_s_blockdev_add_becomes_a_typed_value() -> None:
    parsed = BlockdevAdd.parse({"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": "/f", "aio": "native"}})
    assert parsed == BlockdevAdd(node_name="d", file=BlockdevFile(driver="file", filename="/f", aio="native"))
    assert parsed.cache is None
    assert parsed.read_only is False
    assert BlockdevCache().direct is True


@pytest.mark.parametrize(("spelling", "meant"), [("Native", "native"), ("IoUring", "iouring"), ("io_uring", "iouring")])
def test_other_spellings_of_an_engine_are_understood(spelling: str, meant: str) -> None:
    assert BlockdevFile.from_json({"driver": "file", "filename": "f", "aio": spelling}).aio == meant


def test_a_typed_command_goes_out_as_its_json() -> None:
    command = BlockdevAdd(node_name="d", file=BlockdevFile(driver="file", filename="/f"), cache=BlockdevCache(direct=False))
    sent = command.to_json()
    assert sent["node-name"] == "d"
    assert sent["cache"] == {"direct": False}
    assert "backing" not in sent
    assert BlockdevAdd.parse(sent) == command


def test_results_are_typed_too() -> None:
    result = QueryStatus().parse_result({"running": True, "singlestep": False, "status": "running"})
    assert result == StatusInfo(running=True, status="running")
    (cpu,) = QueryCpus().parse_result(
        [
            {
                "CPU": 0,
                "arch": "x86",
                "current": True,
                "halted": False,
                "props": {"core-id": 0, "die_id": 0, "socket-id": 0, "thread-id": 0},
                "qom_path": "/machine/unattached/device[0]",
                "thread_id": 4242,
            }
        ]
    )
    assert isinstance(cpu, CpuInfo)
    assert cpu.props.die_id == 0


def test_values_are_immutable_and_compare_by_content() -> None:
    event = DeviceDeleted(device="a", path="b")
    assert event == DeviceDeleted(device="a", path="b") != DeviceDeleted(device="a", path="c")
    assert repr(event) == "DeviceDeleted(device='a', path='b')"
    assert event != "a"
    with pytest.raises(AttributeError):
        event.device = "x"  # type: ignore[misc]


def test_a_value_with_a_wrong_member_is_refused_where_it_is_made() -> None:
    with pytest.raises(SchemaError, match="member path is missing"):
        DeviceDeleted(device="a")  # type: ignore[call-arg]
    with pytest.raises(SchemaError, match="no member x; there are: device, path"):
        DeviceDeleted(device="a", path="b", x=1)  # type: ignore[call-arg]


def test_a_schema_with_two_commands_of_one_name_is_refused() -> None:
    with pytest.raises(SchemaError):
        Schema((Stop, Stop), ())


def test_annotations_that_a_schema_cannot_have_are_refused() -> None:
    class Bad(Struct):
        odd: set[int]

    with pytest.raises(SchemaError):
        Bad.fields()


class Pet(Struct):
    name: str = member(max_length=3)
    legs: u8 = 4
    kinds: list[Literal["cat", "dog"]] = member(default=())
    weight: float | None = None


class Feed(Command[Empty], name="feed"):
    """Feed a pet."""

    pet: Pet


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["pet", "name", "legs", "kinds", "weight", "x"]), inner, max_size=5)
        ),
    )
)
def test_any_arguments_are_either_typed_or_refused_with_a_qmp_error(arguments: Any) -> None:
    try:
        feed = Feed.parse(arguments)
    except QmpError:
        return
    else:
        assert len(feed.pet.name) <= 3
        assert 0 <= feed.pet.legs <= 255
        assert Feed.parse(feed.to_json()) == feed


class Lamp(Struct):
    name: str
    lit: bool = member(words=("dark", "bright"), default=False)


def test_a_boolean_can_be_written_in_words() -> None:
    assert Lamp(name="a", lit=True).to_json() == {"name": "a", "lit": "bright"}
    assert Lamp(name="a").to_json() == {"name": "a", "lit": "dark"}
    assert Lamp.from_json({"name": "a", "lit": "bright"}).lit is True
    assert Lamp.from_json({"name": "a", "lit": True}).lit is True  # as StratoVirt sends it where its manual shows words
    for wrong, desc in (
        (1, "invalid type: integer `1`, expected a string"),
        ("on", "unknown variant `on`, expected `dark` or `bright`"),
    ):
        with pytest.raises(QmpError) as caught:
            Lamp.from_json({"name": "a", "lit": wrong})
        assert caught.value.desc == f"{desc} (member `lit`)"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_errors_of_a_command_are_those_of_its_documentation(command: type[Command[Any]]) -> None:
    errors = command.errors()
    assert set(errors) <= set(ERROR_CLASSES)
    assert bool(errors) == ("Errors:" in (command.__doc__ or ""))
    assert all(text and not text.startswith(ERROR_CLASSES) for text in errors.values())


def test_errors_are_told_with_their_conditions() -> None:
    assert STRATOVIRT.commands["balloon"].errors() == {
        "DeviceNotActive": "when there is no balloon or the guest has no driver for it"
    }
    assert list(STRATOVIRT.commands["blockdev-snapshot-internal-sync"].errors()) == ["DeviceNotFound", "GenericError"]


def test_list_items_are_checked_one_by_one() -> None:
    with pytest.raises(QmpError, match=r"unknown variant `cow`, expected `cat` or `dog` \(member `pet.kinds\[1\]`\)"):
        Feed.parse({"pet": {"name": "a", "kinds": ["cat", "cow"]}})


class TestIntrospection:
    def test_every_name_that_is_used_is_described_before_it_is_used(self) -> None:
        known: set[str] = set()
        for entry in introspect(STRATOVIRT):
            assert isinstance(entry, dict)
            used = [entry.get("arg-type"), entry.get("ret-type"), entry.get("element-type")]
            members = entry.get("members", [])
            assert isinstance(members, list)
            used += [member.get("type") for member in members if isinstance(member, dict)]
            assert {name for name in used if name} <= known
            name = entry["name"]
            assert isinstance(name, str)
            assert name not in known
            known.add(name)

    def test_follows_qemus_format(self) -> None:
        entries: dict[Any, Any] = {entry["name"]: entry for entry in introspect(STRATOVIRT) if isinstance(entry, dict)}
        add = entries["blockdev-add"]
        assert add["meta-type"] == "command"
        members = {member["name"]: member for member in entries[add["arg-type"]]["members"]}
        assert "default" not in members["node-name"]
        assert members["read-only"] == {"name": "read-only", "type": "bool", "default": None}
        aio = {member["name"]: member for member in entries[members["file"]["type"]]["members"]}["aio"]
        assert entries[aio["type"]]["meta-type"] == "enum"
        assert {"name": "iouring"} in entries[aio["type"]]["members"]
        assert entries["SHUTDOWN"]["meta-type"] == "event"
        assert entries[entries["query-cpus"]["ret-type"]]["meta-type"] == "array"
        assert entries["stop"]["arg-type"] == entries["stop"]["ret-type"] == "q_empty"

    def test_lists_every_command_and_event(self) -> None:
        names = {entry["name"] for entry in introspect(STRATOVIRT) if isinstance(entry, dict)}
        assert names >= set(STRATOVIRT.commands) | set(STRATOVIRT.events)


def test_the_reference_page_has_every_command_event_and_member() -> None:
    page = reference(STRATOVIRT)
    for declared in (*COMMANDS, *EVENTS):
        assert f"\n### {declared.name}\n" in page
        for field in declared.fields():
            assert f"| `{field.name}` |" in page
    assert "[BlockdevFile](#blockdevfile)" in page
    assert "\n### BlockdevFile\n" in page


def test_events_of_another_schema_do_not_mix() -> None:
    class Barked(Notification, name="BARKED"):
        """A dog barked."""

    schema = Schema((Feed,), (Barked,))
    assert list(schema.events) == ["BARKED"]
    assert "stop" not in schema.commands
