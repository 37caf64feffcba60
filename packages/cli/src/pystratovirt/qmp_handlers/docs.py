"""The table of QMP commands in docs/compatibility.md, made by asking a server which commands have a handler.

`python -m pystratovirt.qmp_handlers.docs docs/compatibility.md` puts it between its markers; a test compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from pystratovirt.qmp_handlers import register_all
from qmp_protocol.commands import STRATOVIRT
from qmp_protocol.schema import Machines
from qmp_server.server import QmpServer

_BLOCK = re.compile(r"(<!-- QMP commands -->\n).*?(<!-- end of QMP commands -->)", re.DOTALL)

# What differs on purpose; a command that is not here and has a handler is as in StratoVirt.
NOTES: Final = {
    "qmp_capabilities": "the id comes back; `enable` may be an empty list",
    "stop": "a paused machine stays paused and the answer is success, without an event (StratoVirt: an error without a text); "
    "image files stay locked",
    "cont": "a running machine runs on and the answer is success, without an event (StratoVirt: an error without a text)",
    "system_powerdown": "presses the power button: POWERDOWN, and the guest decides; with `acpi=off` the machine ends with "
    "SHUTDOWN",
    "balloon": "leaves the guest 32 MiB, or half of its memory if that is less (StratoVirt: takes everything); values from "
    "16 TiB on do not wrap around",
    "query-balloon": "never less than zero; shows the guest's statistics too when the balloon asks for them",
    "blockdev-add": "every key of `-drive` but `if` (StratoVirt's microvm: raw without limits, `discard` and `detect-zeroes`); "
    "as there, `aio` has to be given unless `cache.direct` is false; the names of the command line's drives are taken too",
    "blockdev-del": "works; after `device_del`, which lets go of the drive as in StratoVirt, it succeeds once "
    "(StratoVirt's microvm: `blockdev_del not support yet`)",
    "netdev_add": "every key of `-netdev` but the `path` of `user`: all descriptors, `vhost`, `queues`, and the types "
    "`vhost-user` and `user` (StratoVirt's microvm: a tap by `ifname` or by the last of `fds`); opened at once; one without a "
    "tap gives a card without a link, as there; members of another type are refused (StratoVirt: ignored)",
    "netdev_del": "works; after `device_del` it succeeds once (StratoVirt's microvm: `netdev_del not support yet`)",
    "chardev-add": "works (StratoVirt's microvm: an error)",
    "chardev-remove": "works, unless something uses the device (StratoVirt's microvm: an error)",
    "device_add": "as there; also `serial`, `mac`, and `drive` or `netdev` when no back end is called as the device; a back end "
    "goes into one slot only; what failed leaves the slot free",
    "device_del": "as there; a drive that could not be closed properly is an error behind the event",
    "query-block": "the drives, as QEMU lists them (StratoVirt: always empty)",
    "query-named-block-nodes": "the drives' images, as QEMU lists them (StratoVirt: always empty)",
    "query-blockstats": "what devices asked of their drives, with QEMU's members (StratoVirt: always empty)",
    "query-chardev": "all of them (StratoVirt: pseudo-terminals)",
    "query-vcpu-reg": "works on x86_64, by the register's name (StratoVirt: on the virt machine only), and says which there are; "
    "no events",
    "block-commit": "succeeds without effect, as there",
    "system_reset": "RESET, and the guest boots again (StratoVirt: the machine ends, as here with `acpi=off`, but with SHUTDOWN)",
    "query-commands": "names as they are on the wire (StratoVirt: internal ones, which cannot all be run)",
    "query-qmp-schema": "QEMU's introspection format (StratoVirt: `{}`)",
    "query-command-line-options": "every option with parameters, from the parser's own declarations (StratoVirt: two of `drive`)",
    "query-iothreads": "the thread's own id (StratoVirt: the process's)",
    "query-mem-gpa": "works on a microvm; reads RAM only (StratoVirt's standard machines read device registers too)",
    "query-kvm": "says what is true",
    "query-migrate": "`setup`, as long as there is no migration",
    "human-monitor-command": "`drive_add`, `drive_del`, `info block`, `info network`, `info snapshots`, and `info stats`, which "
    "shows what each device counts (StratoVirt's microvm: none)",
    "getfd": "of several descriptors the others are closed; a name that is used again closes the old one; at most 256 wait, "
    "and at most a quarter of what the process may open",
    "trace-get-state": "only points that exist here, with StratoVirt's names; `state` is a word as in the manual (StratoVirt "
    "sends a boolean); patterns as for `trace-set-state`",
    "trace-set-state": "patterns are RE2's, of at most 256 characters (StratoVirt's are the same but for sets in sets and the "
    "flag `x`); lines go to the log at level TRACE",
}

# Where StratoVirt's microvm says the same words as a success, or nothing at all.
REFUSED_BETTER: Final = {
    "input_event": "an error that says so (StratoVirt: success without effect)",
    "switch-audio-record": "the words as an error (StratoVirt: as the result of a success)",
    "blockdev-snapshot-internal-sync": "an error that says so (StratoVirt: success without a snapshot)",
    "blockdev-snapshot-delete-internal-sync": "an error that says so (StratoVirt: success without effect)",
}


def refresh(text: str) -> str:
    """Return `text` with the generated block made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{table()}\n{found[2]}", text)


def table() -> str:
    """Return the table of all commands for a microvm."""
    machine = Machines.MICROVM
    handled = _handled()
    lines = ["| Command | State |", "| --- | --- |", "| `qmp_capabilities` | differs: " + NOTES["qmp_capabilities"] + " |"]
    for name, command in list(STRATOVIRT.commands.items())[1:]:
        note = NOTES.get(name, "")
        if name in handled:
            state = f"differs: {note}" if note else "supported"
        elif command.machines & machine:
            state = "not yet"
        elif name in REFUSED_BETTER:
            state = f"not on a microvm: {REFUSED_BETTER[name]}"
        else:
            state = f"refused as on StratoVirt's microvm: `{command.refusal}`"
        lines.append(f"| `{name}` | {state} |")
    return "\n".join(lines) + "\n"


def _handled() -> set[str]:
    server = QmpServer()
    nothing: Any = SimpleNamespace(vm=SimpleNamespace(slots={}), machine=SimpleNamespace())
    register_all(server, nothing, Machines.ALL)  # no machine lacks anything: what is registered is what exists
    return {name for name in STRATOVIRT.commands if name in server.dispatcher}


def main() -> int:
    """Rewrite the file that is named. Returns the exit status."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m pystratovirt.qmp_handlers.docs docs/compatibility.md\n")
        return 1
    path = Path(sys.argv[1])
    path.write_text(refresh(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
