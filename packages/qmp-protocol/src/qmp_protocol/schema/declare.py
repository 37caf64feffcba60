"""What a command and an event are: a structure of arguments with a name, a result, and where it exists.

Not here: the commands themselves (`qmp_protocol.commands`), and what they do (a server's handlers).
"""

from __future__ import annotations

import inspect
import re
import typing
from enum import Flag
from typing import Any, ClassVar, Generic, Self, TypeVar

from qmp_protocol.errors import COMMAND_NOT_FOUND, ERROR_CLASSES, GENERIC_ERROR, QmpError, SchemaError
from qmp_protocol.messages import ABSENT, Absent, Json, shorten
from qmp_protocol.schema.struct import Struct, type_of

R_co = TypeVar("R_co", covariant=True)

_ERRORS = re.compile(r"^Errors: (.*?)\.(?:$|\n\n)", re.MULTILINE | re.DOTALL)
_ERROR = re.compile(rf"(?:^|; )({'|'.join(ERROR_CLASSES)}) (.*?)(?=; (?:{'|'.join(ERROR_CLASSES)}) |$)", re.DOTALL)


class Machines(Flag):
    """The machine types of StratoVirt on which something exists."""

    NONE = 1
    MICROVM = 2
    Q35 = 4
    VIRT = 8
    STANDARD = Q35 | VIRT
    ALL = NONE | MICROVM | Q35 | VIRT


class Empty(Struct):
    """An object without members: what a command returns that has nothing to say."""

    strict: ClassVar[bool] = False


class Command(Struct, Generic[R_co]):
    """Base of every command: its members are the arguments, its type argument is the result.

    A subclass says its wire `name`, the version it came with, the machines that have it, and whether arguments that are not
    declared are refused. Its docstring is its page in the reference; the paragraph "Errors:" of it says which error classes it
    answers with, and when.
    """

    name: ClassVar[str] = ""
    since: ClassVar[str] = ""
    machines: ClassVar[Machines] = Machines.ALL
    refusal: ClassVar[str] = ""
    takes_fds: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        name: str = "",
        since: str = "2.4.0",
        machines: Machines = Machines.ALL,
        refusal: str = "",
        strict: bool = True,
        takes_fds: bool = False,
    ) -> None:
        """`refusal` is the error text on machines that lack the command; `takes_fds`: file descriptors come with it."""
        super().__init_subclass__()
        cls.name, cls.since, cls.machines, cls.refusal = name, since, machines, refusal
        cls.strict, cls.takes_fds = strict, takes_fds

    @classmethod
    def wire_name(cls) -> str:
        return cls.name.replace("-", "_")

    @classmethod
    def parse(cls, arguments: Json | Absent) -> Self:
        """Return the typed command for the `arguments` of a message. Raises QmpError that says what is wrong with them."""
        if arguments is ABSENT:
            if any(field.required for field in cls.fields()):
                raise QmpError(GENERIC_ERROR, "missing field `arguments`")
            return cls()
        return cls.from_json(arguments)

    @classmethod
    def result_hint(cls) -> Any:
        """The annotation of the result: a Struct, a list, or a JSON type."""
        for base in cls.__dict__.get("__orig_bases__", ()):
            if typing.get_origin(base) is Command:
                return typing.get_args(base)[0]
        raise SchemaError(f"{cls.__name__} does not say what it returns")

    @classmethod
    def errors(cls) -> dict[str, str]:
        """The error classes that the command answers with, each with its condition, as its docstring tells them.

        Beyond these, any command is refused with GenericError for its arguments and where it does not exist, and with
        OperationThrottled when it comes too soon.
        """
        found = _ERRORS.search(inspect.getdoc(cls) or "")
        if found is None:
            return {}
        return {name: " ".join(text.split()) for name, text in _ERROR.findall(found[1])}

    def to_json(self) -> dict[str, Json]:
        """Return the arguments. Members that have their default are left out, as the server knows it, but for `always` ones."""
        result: dict[str, Json] = {}
        for field in self.fields():
            value = getattr(self, field.attribute)
            if field.required or value != field.default or self._members[field.attribute].always:
                result[field.name] = self.member_to_json(field.attribute)
        return result

    def parse_result(self, value: Json) -> R_co:
        """Return the typed result for the value of a reply. Raises QmpError when a server's answer does not fit.

        What other servers have beside what is declared is no error (`schema.lenient`): a choice may be another word.
        """
        from qmp_protocol.schema.lenient import read  # for clients only

        return typing.cast(R_co, read(type_of(self.result_hint()), value))


class Notification(Struct):
    """Base of every event: its members are the event's data."""

    name: ClassVar[str] = ""
    since: ClassVar[str] = ""
    machines: ClassVar[Machines] = Machines.ALL

    def __init_subclass__(cls, *, name: str = "", since: str = "2.4.0", machines: Machines = Machines.ALL) -> None:
        super().__init_subclass__()
        cls.name, cls.since, cls.machines = name, since, machines

    @classmethod
    def wire_name(cls) -> str:
        return cls.name


class Schema:
    """The commands and events of one kind of server, in the order in which it lists them."""

    def __init__(self, commands: tuple[type[Command[Any]], ...], events: tuple[type[Notification], ...]) -> None:
        """Raises SchemaError when two have the same name."""
        self.commands = {command.name: command for command in commands}
        self.events = {event.name: event for event in events}
        if len(self.commands) != len(commands) or len(self.events) != len(events) or "" in self.commands:
            raise SchemaError("two commands or two events have the same name, or one has none")

    def command(self, name: str) -> type[Command[Any]]:
        """Return the declaration of a command. Raises QmpError CommandNotFound."""
        try:
            return self.commands[name]
        except KeyError:
            raise QmpError(COMMAND_NOT_FOUND, f"The command {shorten(name)} has not been found") from None
