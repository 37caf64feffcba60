"""A Config back to a command line: for logs, for starting the same machine elsewhere, and to prove that parsing loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .backends import Mon, Qmp, Trace
from .build import SERIAL_ID
from .machine import MemorySize

if TYPE_CHECKING:
    from .config import Config
    from .declare import Parameters


def render(config: Config) -> list[str]:
    """Return arguments (without the program's name) that parse to `config`. The Config has to come from a parse."""
    argv = ["-machine", config.machine.render(), "-cpu", config.cpu.render(), "-smp", config.smp.render()]
    argv += ["-m", MemorySize(size=config.memory.size).render()]
    in_file = any(backend.path is not None for backend in config.memory_backends.values()) and config.memory.nodes
    for option, text in (
        ("-mem-path", None if in_file else config.memory.path),
        ("-kernel", config.kernel),
        ("-initrd", config.initrd),
        ("-append", config.append or None),
        ("-mod-test", config.test_socket),
        ("-name", config.name or None),
        ("-pidfile", config.pidfile),
    ):
        if text is not None:
            argv += [option, text]
    for option, on in (
        ("-mem-prealloc", config.memory.prealloc),
        ("-S", config.freeze),
        ("-daemonize", config.daemonize),
        ("-disable-seccomp", config.disable_seccomp),
    ):
        argv += [option] * on
    if config.trace is not None:
        argv += ["-trace", Trace(file=config.trace).render()]
    if config.log:
        argv += ["-D", config.log_file] if config.log_file is not None else ["-D"]
    chardevs = [chardev for chardev in config.chardevs.values() if chardev is not config.serial or chardev.id != SERIAL_ID]
    groups: list[tuple[str, list[Parameters]]] = [
        ("-drive", [*config.drives.values()]),
        (
            "-object",
            [*config.iothreads.values(), *config.rngs.values(), *config.secrets.values(), *config.memory_backends.values()],
        ),
        ("-numa", [*config.numa]),
        ("-chardev", [*chardevs]),
        ("-netdev", [*config.netdevs.values()]),
        ("-device", [*config.devices]),
    ]
    argv += [text for option, group in groups for item in group for text in (option, item.render())]
    if config.serial is not None:
        inline = config.serial.id == SERIAL_ID
        argv += ["-serial", _without_id(config.serial) if inline else f"chardev:{config.serial.id}"]
    for listener in config.monitors:
        if listener.chardev:
            argv += ["-mon", Mon(chardev=listener.chardev, mode="control").render()]
        else:
            uri = f"unix:{listener.path}" if listener.path is not None else f"tcp:{listener.host}:{listener.port}"
            argv += ["-qmp", Qmp(uri=uri, server=True, nowait=not listener.wait).render()]
    return argv


def _without_id(chardev: Parameters) -> str:
    return chardev.render().replace(f",id={SERIAL_ID}", "")
