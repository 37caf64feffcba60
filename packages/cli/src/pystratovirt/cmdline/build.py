"""Options to a Config: values are read by their declarations, then what depends on several options is checked.

Not here: the file system (see `files`), argv itself (see `lexer`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

from pystratovirt.slots import place

from .backends import (
    CHARDEVS,
    MAX_IOTHREADS,
    OBJECTS,
    Drive,
    Global,
    IoThread,
    Listener,
    Mon,
    Qmp,
    RngRandom,
    SocketChardev,
    StdioChardev,
    Trace,
)
from .config import Config
from .declare import Parameters, items, word_in_front
from .drivers import DRIVERS
from .errors import BadKey, CommandLineError, listing, show
from .lexer import lex
from .machine import Accel, Cpu, Machine, Memory, MemorySize, Smp, ignores_acpi
from .options import NETDEVS
from .values import ID, PATH, SOCKET_PATH, Reference, Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .backends import Chardev, Object
    from .drivers.base import Device
    from .netdevs import Connected
    from .numa import MemoryBackend, NumaEntry
    from .secrets import Secret

P = TypeVar("P", bound=Parameters)

_CHARDEV = Reference("chardev")
SERIAL_ID = "serial_chardev"
_COMMAND_LINE = Text(1 << 16)  # what a guest's architecture takes is checked by the boot loader


def build(argv: Sequence[str]) -> Config:
    """Return the configuration that `argv` (without the program's name) describes.

    Raises CommandLineError; Information for `-h` and `-V`.
    """
    given = lex(argv)
    if "h" in given or "V" in given:
        from .errors import Information
        from .help import help_text, version_text  # a start does not need it

        raise Information(help_text() if "h" in given else version_text())

    machine = _one(given, "machine", Machine) or Machine()
    _one(given, "accel", Accel)
    users = _Users(given)
    monitors = _monitors(given, users)
    serial = _serial(given, users)
    devices = [_device(text) for text in given.get("device", ())]
    append = _append(given)
    _check_devices(devices, users)
    place(devices, users.netdevs, acpi=machine.acpi, ignored=ignores_acpi(append))
    smp = _one(given, "smp", Smp) or Smp(cpus=1)
    memory, numa = _memory(given, machine), _numa(given, users)
    if numa:
        from .numa import arrange

        memory = arrange(numa, users.memory_backends, memory, smp.cpus)
    _check_without_effect(given)
    trace = _one(given, "trace", Trace)
    config = Config(
        machine=machine,
        cpu=_one(given, "cpu", Cpu) or Cpu(),
        smp=smp,
        memory=memory,
        kernel=_text(given, "kernel", PATH),
        initrd=_text(given, "initrd", PATH),
        append=append,
        drives=users.drives,
        iothreads=users.iothreads,
        rngs=users.rngs,
        secrets=users.secrets,
        memory_backends=users.memory_backends,
        numa=tuple(numa),
        chardevs=users.chardevs,
        netdevs=users.netdevs,
        devices=tuple(devices),
        serial=serial,
        monitors=monitors,
        freeze="S" in given,
        test_socket=_test_socket(given),
        trace=trace.file if trace else None,
        # Empty, as a script's variable may be, is as good as none.
        name=_text(given, "name", ID, empty=True) or "",
        log="D" in given,
        log_file=_text(given, "D", PATH, empty=True),
        daemonize="daemonize" in given,
        pidfile=_text(given, "pidfile", PATH),
        disable_seccomp="disable-seccomp" in given,
    )
    _check_whole(config)
    return config


def _text(given: Mapping[str, list[str]], name: str, kind: Text, *, empty: bool = False) -> str | None:
    values = given.get(name)
    if not values or (empty and not values[0]):
        return None
    try:
        return kind.parse(values[0])
    except ValueError as error:
        raise CommandLineError(f"-{name}", show(values[0]), str(error)) from None


def _one(given: Mapping[str, list[str]], name: str, schema: type[P]) -> P | None:
    values = given.get(name)
    return schema.parse(f"-{name}", values[0]) if values else None


def _memory(given: Mapping[str, list[str]], machine: Machine) -> Memory:
    amount = _one(given, "m", MemorySize)
    path = [text.replace('"', "") for text in given.get("mem-path", ())]  # libvirt's habit of quoting (reference, section 4.6)
    return Memory(
        size=amount.size if amount else Memory.size,
        path=_text({"mem-path": path}, "mem-path", PATH),
        prealloc="mem-prealloc" in given,
        share=machine.mem_share,
        dump=machine.dump_guest_core,
    )


def _numa(given: Mapping[str, list[str]], users: _Users) -> list[NumaEntry]:
    found: list[NumaEntry] = []
    for text in given.get("numa", ()):
        from .numa import ENTRIES, MEMDEV, NumaNode

        entry = _choose("-numa", text, ENTRIES, "type").parse("-numa", text)
        if isinstance(entry, NumaNode):
            where = f"node: memdev={show(entry.memdev)}"
            users.use("-numa", where, MEMDEV, entry.memdev, f"node {entry.nodeid}")
        found.append(entry)
    return found


def _check_without_effect(given: Mapping[str, list[str]]) -> None:
    """Read what says something about other machines: its mistakes are mistakes all the same."""
    seen: set[str] = set()
    for text in given.get("smbios", ()):
        from .smbios import TABLES

        try:
            number = dict(items(text)).get("type") or ""
        except BadKey as error:
            raise CommandLineError("-smbios", error.name, error.reason) from None
        table = TABLES.get(number)
        if table is None:
            raise CommandLineError("-smbios", show(text), f"needs type=NUMBER; there are: {listing(TABLES)}")
        table.parse("-smbios", text)
        if number in seen:
            raise CommandLineError("-smbios", f"type={number}", "given more than once")
        seen.add(number)
    for text in given.get("global", ()):
        Global.parse("-global", text)
    if len(given.get("global", ())) > 1:
        raise CommandLineError("-global", "", "given more than once")


def _append(given: Mapping[str, list[str]]) -> str:
    text = " ".join(given.get("append", ()))
    if text:
        _text({"append": [text]}, "append", _COMMAND_LINE)
    return text


def _test_socket(given: Mapping[str, list[str]]) -> str | None:
    values = given.get("mod-test")
    # StratoVirt's help shows the prefix, its code does not know it; both spellings mean the same socket here.
    return _text({"mod-test": [values[0].removeprefix("unix:")]}, "mod-test", SOCKET_PATH) if values else None


class _Users:
    """What other options refer to by id, and who uses it."""

    def __init__(self, given: Mapping[str, list[str]]) -> None:
        self.drives: dict[str, Drive] = {}
        self.iothreads: dict[str, IoThread] = {}
        self.rngs: dict[str, RngRandom] = {}
        self.secrets: dict[str, Secret] = {}
        self.memory_backends: dict[str, MemoryBackend] = {}
        self.chardevs: dict[str, Chardev] = {}
        self.netdevs: dict[str, Connected] = {}
        self._used: dict[tuple[str, str], str] = {}
        for text in given.get("drive", ()):
            self._drive(text)
        for text in given.get("object", ()):
            self._object(text)
        for drive in self.drives.values():
            self._secret_of(drive)
        for text in given.get("chardev", ()):
            self.add_chardev("-chardev", text)
        for text in given.get("netdev", ()):
            self._netdev(text)

    def _drive(self, text: str) -> None:
        drive = Drive.parse("-drive", text)
        _new("-drive", drive.id, self.drives)
        for other in self.drives.values():
            if other.file == drive.file and not (other.readonly and drive.readonly):
                raise CommandLineError(
                    "-drive",
                    f"id={show(drive.id)}: file={show(drive.file)}",
                    f"drive {show(other.id)} has it; only readonly drives can share a file",
                )
        self.drives[drive.id] = drive

    def _secret_of(self, drive: Drive) -> None:
        name = drive.key_secret
        if name is not None:
            where = f"id={show(drive.id)}: encrypt.key-secret={show(name)}"
            kind = cast("Reference", drive.keys["encrypt.key-secret"].kind)
            self.use("-drive", where, kind, name, f"drive {show(drive.id)}")

    def _object(self, text: str) -> None:
        made: Object = _choose("-object", text, OBJECTS, "type").parse("-object", text)
        if isinstance(made, IoThread):
            _new("-object", made.id, self.iothreads, "iothread: ")
            if len(self.iothreads) == MAX_IOTHREADS:
                raise CommandLineError("-object", f"iothread: id={show(made.id)}", f"at most {MAX_IOTHREADS} iothreads")
            self.iothreads[made.id] = made
        elif isinstance(made, RngRandom):
            _new("-object", made.id, self.rngs, "rng-random: ")
            self.rngs[made.id] = made
        elif made.selector == "secret":
            _new("-object", made.id, self.secrets, "secret: ")
            self.secrets[made.id] = cast("Secret", made)
        else:
            _new("-object", made.id, self.memory_backends, f"{made.selector}: ")
            self.memory_backends[made.id] = cast("MemoryBackend", made)

    def add_chardev(self, option: str, text: str) -> Chardev:
        """Add the chardev that `text` describes."""
        made: Chardev = _choose(option, text, CHARDEVS, "backend").parse(option, text)
        _new(option, made.id, self.chardevs)
        self.chardevs[made.id] = made
        return made

    def _netdev(self, text: str) -> None:
        made: Connected = _choose("-netdev", text, NETDEVS, "type").parse("-netdev", text)
        _new("-netdev", made.id, self.netdevs)
        for key in made.keys.values():
            if isinstance(key.kind, Reference):
                value = getattr(made, key.attribute)
                self.use("-netdev", f"{made.selector}: {key.name}={show(value)}", key.kind, value, f"netdev {show(made.id)}")
        self.netdevs[made.id] = made

    def use(self, option: str, where: str, kind: Reference, name: str, user: str) -> None:
        """Note that `user` refers to `name`; `where` is the text that does. Raises CommandLineError."""
        tables: dict[str, Mapping[str, object]] = {
            "drive": self.drives,
            "iothread": self.iothreads,
            "rng-random": self.rngs,
            "secret": self.secrets,
            "chardev": self.chardevs,
            "netdev": self.netdevs,
            "memory backend": self.memory_backends,
        }
        if name not in tables[kind.to]:
            raise CommandLineError(option, where, f"no such {kind.to}; there are: {listing(tables[kind.to])}")
        if kind.shared:
            return
        other = self._used.get((kind.to, name))
        if other:
            raise CommandLineError(option, where, f"already used by {other}")
        self._used[kind.to, name] = user


def _new(option: str, name: str, table: Mapping[str, object], where: str = "") -> None:
    if name in table:
        raise CommandLineError(option, f"{where}id={show(name)}", "given more than once")


def _choose(option: str, text: str, table: Mapping[str, type[P]], what: str) -> type[P]:
    word = word_in_front(text)
    found = table.get(word)
    if found is not None:
        return found
    if not word:
        raise CommandLineError(option, show(text), f"needs a {what} in front; there are: {listing(table)}")
    from . import notyet  # only a mistake pays for it

    if word in {"-device": notyet.DRIVERS, "-object": notyet.OBJECTS}.get(option, {}):
        raise CommandLineError(option, word, "not supported yet")
    raise CommandLineError(option, show(word), f"no such {what}; there are: {listing(table)}")


def _device(text: str) -> Device:
    return _choose("-device", text, DRIVERS, "driver").parse("-device", text)


def _serial(given: Mapping[str, list[str]], users: _Users) -> Chardev | None:
    values = given.get("serial")
    if not values:
        return None
    text = values[0]
    if text.startswith("chardev:"):
        name = text.removeprefix("chardev:")
        users.use("-serial", show(text), _CHARDEV, name, "-serial")
        chardev = users.chardevs[name]
    else:
        if (word := word_in_front(text)) not in CHARDEVS:
            from .qemu import serial  # only a mistake pays for it

            if advice := serial(text):
                raise CommandLineError("-serial", show(word), advice)
            _choose("-serial", text, CHARDEVS, "backend")
        try:
            if any(key == "id" for key, _ in items(text)):
                raise BadKey(show(text), "takes no id; -chardev BACKEND,id=ID with -serial chardev:ID does")
        except BadKey as error:
            raise CommandLineError("-serial", error.name, error.reason) from None
        chardev = users.add_chardev("-serial", f"{text},id={SERIAL_ID}")
        users.use("-serial", show(text), _CHARDEV, SERIAL_ID, "-serial")
    return chardev


def _monitors(given: Mapping[str, list[str]], users: _Users) -> tuple[Listener, ...]:
    found = []
    qmp = _one(given, "qmp", Qmp)
    if qmp:
        scheme, _, rest = qmp.uri.partition(":")
        host, _, port = rest.rpartition(":")
        wait = not qmp.nowait
        found.append(Listener(path=rest, wait=wait) if scheme == "unix" else Listener(host=host, port=int(port), wait=wait))
    mon = _one(given, "mon", Mon)
    if mon:
        where = f"chardev={show(mon.chardev)}"
        users.use("-mon", where, _CHARDEV, mon.chardev, "-mon")
        chardev = users.chardevs[mon.chardev]
        if not isinstance(chardev, SocketChardev):
            raise CommandLineError("-mon", where, "a monitor needs a socket chardev")
        if not chardev.server:
            raise CommandLineError("-mon", where, f"socket {show(chardev.id)} needs server here")
        wait = not chardev.nowait
        if chardev.path is not None:
            listener = Listener(path=chardev.path, chardev=chardev.id, wait=wait)
        else:
            listener = Listener(host=chardev.host, port=chardev.port or 0, chardev=chardev.id, wait=wait)
        if found and str(listener) == str(found[0]):
            raise CommandLineError("-mon", where, f"-qmp listens on {show(str(listener))} already")
        found.append(listener)
    return tuple(found)


def _check_devices(devices: list[Device], users: _Users) -> None:
    ids: set[str] = set()
    for number, device in enumerate(devices):
        where = f"{device.selector}: "
        for key in device.keys.values():
            value = getattr(device, key.attribute)
            if isinstance(key.kind, Reference) and value is not None:
                what = f"{where}{key.name}={show(value)}"
                users.use("-device", what, key.kind, value, f"{where}id={show(device.id)}")
        if device.id and device.id in ids:
            raise CommandLineError("-device", f"{where}id={show(device.id)}", "another device has this id")
        ids.add(device.id)
        try:
            device.join(devices[:number])
        except BadKey as error:
            raise CommandLineError("-device", where + (error.name or f"id={show(device.id)}"), error.reason) from None


def _check_whole(config: Config) -> None:
    if config.kernel is None and config.test_socket is None:
        raise CommandLineError("-machine", config.machine.type, "needs -kernel FILE")
    if config.pidfile is not None and not config.daemonize:
        raise CommandLineError("-pidfile", show(config.pidfile), "only together with -daemonize")
    stdio = [name for name, chardev in config.chardevs.items() if isinstance(chardev, StdioChardev)]
    if len(stdio) > 1:
        owner = f"standard input and output belong to {show(stdio[0])} already"
        if stdio[1] == SERIAL_ID:  # which nobody has typed
            raise CommandLineError("-serial", "stdio", owner)
        raise CommandLineError("-chardev", f"stdio: id={show(stdio[1])}", owner)
    if stdio and config.daemonize:
        where = "stdio" if stdio[0] == SERIAL_ID else f"stdio: id={show(stdio[0])}"
        raise CommandLineError("-daemonize", where, "a daemon has no standard input and output")
