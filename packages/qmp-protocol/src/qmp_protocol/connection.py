"""The two ends of a QMP connection as state machines. Bytes go in and events come out; messages go in and bytes come out.

Illegal use raises LocalProtocolError; illegal input becomes an event and the connection goes on.
File descriptors travel beside the bytes: a `getfd` gets those that arrived with any byte of it.

Not here: sockets, waiting, time, and what a command's arguments mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from qmp_protocol import messages
from qmp_protocol.errors import COMMAND_NOT_FOUND, GENERIC_ERROR, LocalProtocolError
from qmp_protocol.framing import CLIENT_LIMIT, SERVER_LIMIT, Frame, Framer
from qmp_protocol.messages import ABSENT, Absent, Error, Event, Execute, Greeting, Json, Malformed, Return, encode

if TYPE_CHECKING:
    from qmp_protocol.schema import Command

CAPABILITIES: Final = "qmp_capabilities"


class State(Enum):
    """Where a connection is. Both ends use the same names."""

    OPENING = "opening"  # no greeting yet
    GREETED = "greeted"  # greeting sent or received, capabilities not negotiated
    READY = "ready"
    CLOSED = "closed"


# What a server's application sees -----------------------------------------------------------------------------------


class Negotiated(NamedTuple):
    """`qmp_capabilities` was accepted. The server answers it with `Return({}, id)`."""

    enabled: tuple[str, ...] = ()
    id: Json | Absent = ABSENT


class CommandReceived(NamedTuple):
    """A command to run. `fds` are now the receiver's to close."""

    command: str
    arguments: Json | Absent
    id: Json | Absent
    fds: tuple[int, ...] = ()


class Rejected(NamedTuple):
    """Input that is answered with `error` and otherwise ignored."""

    error: Error


class DescriptorsUnused(NamedTuple):
    """Descriptors that no command asked for. The application closes them."""

    fds: tuple[int, ...]


class PeerClosed(NamedTuple):
    """The peer will send no more."""


ServerEvent: TypeAlias = Negotiated | CommandReceived | Rejected | DescriptorsUnused | PeerClosed


# What a client's application sees -----------------------------------------------------------------------------------


class Reply(NamedTuple):
    """The answer to `command`. `request` is the number that `execute` gave it."""

    request: int
    command: str
    message: Return | Error


class BadMessage(NamedTuple):
    """The server sent something that is not QMP, or answered what was not asked."""

    desc: str


ClientEvent: TypeAlias = Greeting | Negotiated | Reply | Event | BadMessage | PeerClosed


# The transitions ----------------------------------------------------------------------------------------------------


class Input(Enum):
    """What can happen to a connection. A pair that is not in the table is refused."""

    GREET = "the greeting"
    NEGOTIATE = "capabilities negotiation"
    COMMAND = "a command"
    REPLY = "a reply"
    EVENT = "an event"
    CLOSE = "the end of the stream"


_GREETED, _READY, _CLOSED = State.GREETED, State.READY, State.CLOSED

SERVER: Final[dict[tuple[State, Input], State]] = {
    (State.OPENING, Input.GREET): _GREETED,
    (_GREETED, Input.NEGOTIATE): _READY,
    (_GREETED, Input.COMMAND): _GREETED,  # StratoVirt's: negotiation is optional. QEMU's server lacks this line.
    (_GREETED, Input.REPLY): _GREETED,
    (_GREETED, Input.EVENT): _GREETED,
    (_READY, Input.NEGOTIATE): _READY,  # StratoVirt's: any number of times
    (_READY, Input.COMMAND): _READY,
    (_READY, Input.REPLY): _READY,
    (_READY, Input.EVENT): _READY,
    (State.OPENING, Input.CLOSE): _CLOSED,
    (_GREETED, Input.CLOSE): _CLOSED,
    (_READY, Input.CLOSE): _CLOSED,
}

STRICT_SERVER: Final = {pair: state for pair, state in SERVER.items() if pair != (_GREETED, Input.COMMAND)}
"""QEMU's server: no command before `qmp_capabilities`."""

CLIENT: Final[dict[tuple[State, Input], State]] = {
    (State.OPENING, Input.GREET): _GREETED,
    (State.OPENING, Input.EVENT): State.OPENING,  # StratoVirt's server may send an event before its greeting
    (_GREETED, Input.NEGOTIATE): _GREETED,  # asked; the reply moves on
    (_GREETED, Input.REPLY): _READY,
    (_GREETED, Input.EVENT): _GREETED,
    (_READY, Input.COMMAND): _READY,
    (_READY, Input.REPLY): _READY,
    (_READY, Input.EVENT): _READY,
    (State.OPENING, Input.CLOSE): _CLOSED,
    (_GREETED, Input.CLOSE): _CLOSED,
    (_READY, Input.CLOSE): _CLOSED,
}


class ServerConnection:
    """A server's end: `greet()` once, `receive()` what arrives, `send()` replies and events."""

    def __init__(
        self,
        greeting: Greeting,
        *,
        strict: bool = False,
        fd_commands: frozenset[str] = frozenset({"getfd"}),
        max_message: int = SERVER_LIMIT,
    ) -> None:
        """`strict` refuses commands before negotiation, as QEMU does. `fd_commands` take descriptors. `max_message`: bytes."""
        self._greeting = greeting
        self._table = STRICT_SERVER if strict else SERVER
        self._fd_commands = fd_commands
        self._framer = Framer(max_message)
        self._fds: tuple[int, ...] = ()
        self.state = State.OPENING

    def greet(self) -> bytes:
        """Return the greeting's bytes. Raises LocalProtocolError the second time."""
        self._move(Input.GREET)
        return encode(self._greeting)

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> list[ServerEvent]:
        """Take bytes, and the descriptors that came with them, and return what they mean. Empty `data` is the end of the stream.

        Raises LocalProtocolError before the greeting and after the end.
        """
        if self.state is State.CLOSED or self.state is State.OPENING:
            raise LocalProtocolError(f"nothing can be received on a connection that is {self.state.value}")
        events: list[ServerEvent] = []
        frames = self._framer.feed(data) if data else self._framer.finish()
        # What came in earlier reads belongs to the message that was unfinished then: to the first one here.
        earlier, now = self._fds, tuple(fds)
        if frames:
            self._fds = earlier or now
            for frame in frames:
                events.append(self._understand(frame))
                if earlier:
                    self._drop_fds(events)
                    earlier, self._fds = (), now
        elif now:
            self._drop_fds(events)  # the newest count: a message cut into many reads must not pile up descriptors
            self._fds = now
        if not self._framer.unfinished:
            self._drop_fds(events)
        if not data:
            self._move(Input.CLOSE)
            events.append(PeerClosed())
        return events

    def send(self, message: Return | Error | Event) -> bytes:
        """Return the bytes of a reply or an event. Raises LocalProtocolError before the greeting.

        After the peer's end of stream the answers to what it sent before may still go out.
        """
        if self.state is State.OPENING:
            raise LocalProtocolError("the greeting comes first")
        return encode(message)

    def close(self) -> tuple[int, ...]:
        """End the connection from this side. Returns descriptors that no command got; the caller closes them. Harmless twice."""
        self.state = State.CLOSED
        fds, self._fds = self._fds, ()
        return fds

    def _understand(self, frame: Frame) -> ServerEvent:
        request = frame if type(frame) is Malformed else messages.decode_request(frame)  # type: ignore[arg-type]
        if isinstance(request, Malformed):
            return Rejected(Error(GENERIC_ERROR, request.desc, request.id))
        command, arguments, id_ = request
        if command == CAPABILITIES:
            return self._negotiate(arguments, id_)
        if (self.state, Input.COMMAND) not in self._table:
            desc = f"Expecting capabilities negotiation with '{CAPABILITIES}'"
            return Rejected(Error(COMMAND_NOT_FOUND, desc, id_))
        fds: tuple[int, ...] = ()
        if self._fds and command in self._fd_commands:
            fds, self._fds = self._fds, ()
        return CommandReceived(command, arguments, id_, fds)

    def _negotiate(self, arguments: Json | Absent, id_: Json | Absent) -> ServerEvent:
        enable: Json = []
        if isinstance(arguments, dict):
            enable = arguments.get("enable", [])
            unknown = next((name for name in arguments if name != "enable"), None)
            if unknown is not None:
                return _rejected(f"unknown field `{messages.shorten(unknown)}`, expected `enable`", id_)
        elif arguments is not ABSENT:
            return _rejected(f"invalid type: {messages.describe(arguments)}, expected struct {CAPABILITIES}", id_)
        if not isinstance(enable, list) or not all(isinstance(name, str) for name in enable):
            return _rejected("invalid type: expected a list of strings (member `enable`)", id_)
        names = tuple(name for name in enable if isinstance(name, str))
        for name in names:
            if name not in self._greeting.capabilities:
                return _rejected(f"unknown capability `{messages.shorten(name)}` (member `enable`)", id_)
        self._move(Input.NEGOTIATE)
        return Negotiated(names, id_)

    def _drop_fds(self, events: list[ServerEvent]) -> None:
        if self._fds:
            events.append(DescriptorsUnused(self._fds))
            self._fds = ()

    def _move(self, what: Input) -> None:
        self.state = _next_state(self._table, self.state, what)


class ClientConnection:
    """A client's end: `receive()` what arrives; after the greeting `negotiate()`, then `execute()` at will.

    Replies are matched to commands by id, and those without an id (StratoVirt sends some) by their order.
    """

    def __init__(self, *, max_message: int = CLIENT_LIMIT) -> None:
        """`max_message` is the longest message taken from the server, in bytes."""
        self._framer = Framer(max_message, patient=True)
        self._waiting: dict[str, tuple[int, str]] = {}  # id -> (number, command), in the order of sending
        self._count = 0
        self.state = State.OPENING
        self.greeting: Greeting | None = None

    @property
    def outstanding(self) -> int:
        """How many commands have no reply yet."""
        return len(self._waiting)

    def negotiate(self, enable: Sequence[str] = ()) -> bytes:
        """Return the bytes that ask for `enable` of the greeting's capabilities.

        Raises LocalProtocolError unless just greeted.
        """
        self._move(Input.NEGOTIATE)
        if self._waiting:
            raise LocalProtocolError("negotiation is under way")
        return self._send(CAPABILITIES, {"enable": list(enable)} if enable else ABSENT)[1]

    def execute(self, command: str, arguments: Json | Absent = ABSENT) -> tuple[int, bytes]:
        """Return a number for the command and its bytes; the Reply carries the number.

        Raises LocalProtocolError unless ready, and TypeError on arguments that JSON cannot carry; nothing is waited for then.
        """
        self._move(Input.COMMAND)
        return self._send(command, arguments)

    def call(self, command: Command[Any]) -> tuple[int, bytes]:
        """Return what `execute` does, for a typed command. `command.parse_result` makes the typed result of its Reply."""
        return self.execute(command.name, command.to_json() or ABSENT)

    def receive(self, data: bytes) -> list[ClientEvent]:
        """Take bytes and return what they mean. Empty `data` is the end of the stream; after it LocalProtocolError is raised."""
        if self.state is State.CLOSED:
            raise LocalProtocolError("nothing can be received on a connection that is closed")
        frames = self._framer.feed(data) if data else self._framer.finish()
        events = [self._understand(frame) for frame in frames]
        if not data:
            self._move(Input.CLOSE)
            events.append(PeerClosed())
        return events

    def _send(self, command: str, arguments: Json | Absent) -> tuple[int, bytes]:
        number = self._count + 1
        id_ = str(number)  # a string: StratoVirt takes no other
        line = encode(Execute(command, arguments, id_))
        # Only what goes out may be waited for: a reply without an id goes to the oldest.
        self._count = number
        self._waiting[id_] = (number, command)
        return number, line

    def _understand(self, frame: Frame) -> ClientEvent:
        message = frame if type(frame) is Malformed else messages.decode_response(frame)  # type: ignore[arg-type]
        if isinstance(message, Malformed):
            return BadMessage(message.desc)
        if isinstance(message, Event):
            return message
        if isinstance(message, Greeting):
            if (self.state, Input.GREET) not in CLIENT:
                return BadMessage("a second greeting")
            self._move(Input.GREET)
            self.greeting = message
            return message
        return self._match(message)

    def _match(self, message: Return | Error) -> ClientEvent:
        id_ = message.id
        if id_ is ABSENT or id_ is None:
            id_ = next(iter(self._waiting), None)
        found = self._waiting.pop(id_, None) if isinstance(id_, str) else None
        if found is None:
            return BadMessage("a reply to no command")
        number, command = found
        if command == CAPABILITIES and self.state is State.GREETED and isinstance(message, Return):
            self._move(Input.REPLY)
            return Negotiated()
        return Reply(number, command, message)

    def _move(self, what: Input) -> None:
        self.state = _next_state(CLIENT, self.state, what)


def _next_state(table: dict[tuple[State, Input], State], state: State, what: Input) -> State:
    try:
        return table[state, what]
    except KeyError:
        raise LocalProtocolError(f"{what.value} is not possible on a connection that is {state.value}") from None


def _rejected(desc: str, id_: Json | Absent) -> Rejected:
    return Rejected(Error(GENERIC_ERROR, desc, id_))
