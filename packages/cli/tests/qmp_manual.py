"""The examples of StratoVirt's QMP manual and what has to come back, for the program in test mode and for one in the lab.

Not here: the machines that they are replayed to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qmp_protocol.commands import STRATOVIRT
from vm_process import Client


class Example(NamedTuple):
    """What a client sends, and what comes back in that order."""

    request: dict[str, Any]
    printed: list[dict[str, Any]]


class Refusal(NamedTuple):
    """Why a microvm cannot do what the manual shows, and what it answers."""

    desc: str
    why: str
    kind: str = "GenericError"


def _lacks(command: str, why: str) -> Refusal:
    return Refusal(STRATOVIRT.commands[command].refusal, why)


REFUSED = {
    "cameradev_add": _lacks("cameradev_add", "the manual: MicroVM is not supported"),
    "cameradev_del": _lacks("cameradev_del", "the manual: MicroVM is not supported"),
    "migrate": Refusal("The command migrate is not supported yet", "snapshots to files and migration do not exist yet"),
    "blockdev-snapshot-internal-sync": _lacks(
        "blockdev-snapshot-internal-sync", "StratoVirt's microvm says success and makes no snapshot, which helps nobody"
    ),
    "blockdev-snapshot-delete-internal-sync": _lacks("blockdev-snapshot-delete-internal-sync", "the same"),
    "query-vcpu-reg": Refusal(
        "not supported or arguments error", "603000000013df1a is a register of aarch64: the manual: only aarch64 is supported now"
    ),
    "query-display-image": _lacks("query-display-image", "the manual: only stdvm and gtk: a microvm has no screen"),
    "switch-audio-record": _lacks("switch-audio-record", "a microvm has no scream device"),
}
"""Examples that are answered with an error, word by word, and not as printed."""

# What the manual's list of events says and its example leaves out: BALLOON_CHANGED is "emitted when the virtual machine changes
# the actual BALLOON level". StratoVirt sends it before the reply.
EVENTS_LEFT_OUT = {"balloon": ["BALLOON_CHANGED"]}

EXACT = {"device_del", "query-status", "query-balloon", "query-mem-gpa"}

GREETING = '{ "QMP": { "version": { "StratoVirt": { "micro":1, "minor":0, "major":0 }, "package":"" }, "capabilities":[] } }'


def examples() -> list[Example]:
    """Every example, in the order of the manual."""
    text = (Path(__file__).parent / "qmp_manual_examples.txt").read_text()
    # Two misprints of the manual.
    text = text.replace(', vm-clock-nsec"', ', "vm-clock-nsec"').replace('"ds":', '"seconds":')
    found: list[Example] = []
    for line in text.splitlines():
        if line.startswith("-> "):
            found.append(Example(json.loads(line[3:]), []))
        elif line.startswith("<- "):
            found[-1].printed.append(json.loads(line[3:]))
    return found


def shape(value: Any) -> Any:
    """A value without its values: names and kinds."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return int if isinstance(value, int) and not isinstance(value, bool) else type(value)


def check_greeting(greeting: Any) -> None:
    """As printed, with the member `qemu` beside `StratoVirt`, which clients of today read."""
    version = dict(greeting["QMP"]["version"])
    assert version.pop("qemu").keys() == {"major", "minor", "micro"}
    shown = {"QMP": {**greeting["QMP"], "version": version}}
    assert shape(shown) == shape(json.loads(GREETING))
    assert greeting["QMP"]["capabilities"] == []


class Replay:
    """All examples in the order of the manual, but for `quit`, which comes last."""

    def __init__(
        self,
        client: Client,
        *,
        arguments: Mapping[str, Mapping[str, Any]],
        before: Mapping[str, Callable[[], None]],
        refused: Mapping[str, Refusal] = REFUSED,
        exact: Collection[str] = EXACT,
        fds: Mapping[str, Sequence[int]],
    ) -> None:
        """`arguments` replace those of a command in the manual, which name files of whoever reads it; `before` prepares the
        machine for a command; `fds` go along with it; of `exact` commands the values count, and not only their kinds.
        """
        self._client = client
        self._arguments = arguments
        self._before = before
        self._refused = refused
        self._exact = exact
        self._fds = fds

    def run(self) -> None:
        """Replay everything. At the end the machine has ended too."""
        check_greeting(self._client.greeting)
        everything = examples()
        last = [each for each in everything if each.request["execute"] == "quit"]
        for example in [each for each in everything if each not in last]:
            self._one(example)
            self._expect_silence(example.request["execute"])
        self._one(*last)
        assert self._client.read() is None, "the end of the stream"

    def _one(self, example: Example) -> None:
        command = example.request["execute"]
        if command in self._before:
            self._before[command]()
        request = dict(example.request)
        if command in self._arguments:
            request["arguments"] = {**request["arguments"], **self._arguments[command]}
        self._client.send(json.dumps(request) + "\n", self._fds.get(command, ()))
        if command in self._refused:
            desc, _, kind = self._refused[command]
            assert self._client.read() == {"error": {"class": kind, "desc": desc}}, command
            return
        for name in EVENTS_LEFT_OUT.get(command, ()):
            assert self._client.read()["event"] == name
        got = [self._client.read() for _ in example.printed]
        assert [_kind(message) for message in got] == [_kind(message) for message in example.printed], f"{command}: {got}"
        assert shape(got) == shape(example.printed), command
        if command in self._exact:
            assert [_timeless(message) for message in got] == [_timeless(message) for message in example.printed]

    def _expect_silence(self, command: str) -> None:
        """Nothing comes behind what was printed."""
        self._client.send(json.dumps({"execute": "query-kvm", "id": command}))
        assert self._client.read().get("id") == command, f"something came behind {command}"


def _kind(message: dict[str, Any]) -> str:
    return str(message.get("event") or next(iter(message)))


def _timeless(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "timestamp"}
