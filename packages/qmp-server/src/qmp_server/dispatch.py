"""From a command's name to its handler, and from what the handler does to the reply.

Not here: connections (`client`) and broadcasting (`server`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import anyio
import anyio.to_thread

from qmp_protocol.connection import CommandReceived
from qmp_protocol.errors import GENERIC_ERROR, QmpError, SchemaError
from qmp_protocol.messages import Error, Return
from qmp_protocol.schema import Command, Notification, Schema, Struct, to_json
from qmp_server.descriptors import close_all

if TYPE_CHECKING:
    from qmp_server.server import QmpServer

_log = logging.getLogger("qmp_server")

C = TypeVar("C", bound=Command[Any])
R = TypeVar("R")


class Call:
    """One command on its way through a handler: what came with it, and what is to follow its reply."""

    def __init__(self, server: QmpServer, received: CommandReceived) -> None:
        self.server = server
        self.command = received.command
        self._fds = received.fds
        self.later: list[Callable[[], object]] = []

    def emit(self, event: str | Notification, data: Mapping[str, Any] | None = None) -> None:
        """Send an event now, so before the reply."""
        self.server.emit(event, data)

    def emit_after(self, event: str | Notification, data: Mapping[str, Any] | None = None) -> None:
        """Send an event right behind the reply. It is not sent when the command fails."""
        self.later.append(lambda: self.server.emit(event, data))

    def after_reply(self, function: Callable[[], object]) -> None:
        """Call `function` on the event loop's thread once the reply is on its way. Not called when the command fails."""
        self.later.append(function)

    def take_fds(self) -> tuple[int, ...]:
        """Hand over the descriptors that came with the command; the caller closes them. The rest is closed after the call."""
        fds, self._fds = self._fds, ()
        return fds

    def close(self) -> None:
        """Close descriptors that the handler did not take."""
        close_all(self.take_fds())


AnyHandler: TypeAlias = Callable[[Any, Call], Any]


class _Entry(NamedTuple):
    function: AnyHandler
    in_thread: bool
    concurrent: bool


class Dispatcher:
    """The handlers of a server. One command runs at a time, over all clients, unless its handler was registered as concurrent."""

    def __init__(self, server: QmpServer, schema: Schema) -> None:
        self._server = server
        self._schema = schema
        self._handlers: dict[str, _Entry] = {}
        self._turn = anyio.Lock(fast_acquire=True)
        self._running: set[anyio.CancelScope] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._handlers

    def register(self, name: str, function: AnyHandler, *, in_thread: bool, concurrent: bool) -> None:
        """Set the handler of a command that the schema has. Raises SchemaError when it has not."""
        if name not in self._schema.commands:
            raise SchemaError(f"the schema has no command {name}")
        if in_thread and inspect.iscoroutinefunction(function):
            raise SchemaError(f"the handler of {name} is async and cannot run in a worker thread")
        self._handlers[name] = _Entry(function, in_thread, concurrent)

    async def answer(self, received: CommandReceived) -> tuple[Return | Error, list[Callable[[], object]]]:
        """Run a command. Returns its reply and what is to be done behind it. A handler's failure is a reply like any other."""
        name, arguments, id_, _ = received
        call = Call(self._server, received)
        try:
            command = self._schema.command(name).parse(arguments)
            entry = self._handlers.get(name)
            if entry is None:
                raise QmpError(GENERIC_ERROR, f"The command {name} is not supported yet")
            if entry.concurrent:
                result = await self._run(entry, command, call)
            else:
                async with self._turn:
                    result = await self._run(entry, command, call)
            return Return({} if result is None else _plain(result), id_), call.later
        except QmpError as error:
            return Error(error.class_name, error.desc, id_), []
        except BaseException as error:
            # SystemExit too: what one handler calls the end of the program must not be the end of every client.
            if is_from_outside(error):
                raise
            _log.exception("handler of %s failed", name)
            return Error(GENERIC_ERROR, f"{name} failed: {_in_words(error)}", id_), []
        finally:
            call.close()

    def cancel(self) -> None:
        """End the handlers that still run. Their commands are answered with an error."""
        for scope in self._running:
            scope.cancel()

    async def _run(self, entry: _Entry, command: Command[Any], call: Call) -> Any:
        if not entry.in_thread:
            try:
                result = entry.function(command, call)
            except anyio.get_cancelled_exc_class():  # it waited for nothing of ours: something of its own was cancelled
                raise QmpError(GENERIC_ERROR, f"{call.command} was cancelled") from None
            if not isinstance(result, Awaitable):
                return result
        # A command that began is carried out even when its client is dropped meanwhile: half a stop is worse than none.
        with anyio.CancelScope(shield=True) as scope:
            self._running.add(scope)
            try:
                if entry.in_thread:
                    return await anyio.to_thread.run_sync(entry.function, command, call, abandon_on_cancel=True)
                return await result
            except anyio.get_cancelled_exc_class():
                if scope.cancel_called:
                    raise
                raise QmpError(GENERIC_ERROR, f"{call.command} was cancelled") from None
            finally:
                self._running.discard(scope)
        raise QmpError(GENERIC_ERROR, f"{call.command} was cancelled: the server ends")


def _plain(result: Any) -> Any:
    """Return the JSON for what a handler returned, as far as its first look tells.

    JSON is not looked through: that takes thirty times as long for `query-qmp-schema` as writing it does.
    """
    first = result[0] if isinstance(result, list | tuple) and result else result
    return to_json(result) if isinstance(first, Struct) else result


def is_from_outside(error: BaseException) -> bool:
    """Whether an exception was not the handler's to raise: cancellation, Ctrl-C, the end of the event loop."""
    if isinstance(error, BaseExceptionGroup):
        return any(is_from_outside(each) for each in error.exceptions)
    return isinstance(error, KeyboardInterrupt | GeneratorExit | anyio.get_cancelled_exc_class())


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its __str__ is as wrong as the rest of it
        return type(error).__name__
