"""The interactive shell: one line a command, events as they come, completion and history.

Built on prompt_toolkit, which is loaded only here. Not here: what a line means (`arguments`), and the one-shot client (`main`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.shortcuts import print_formatted_text

from pystratovirt.qmpshell import arguments, render
from pystratovirt.qmpshell.asyncclient import AsyncClient
from pystratovirt.qmpshell.client import QmpConnectionError
from pystratovirt.qmpshell.completion import words_after
from pystratovirt.qmpshell.describe import details, overview
from pystratovirt.qmpshell.model import Model
from qmp_protocol.errors import QmpError
from qmp_protocol.messages import ABSENT, Absent, Event, Json

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

_HELP = """\
COMMAND [KEY=VALUE...]   run a command; Tab completes; dots go into objects (file.filename=/x)
{"execute": ...}         the same as JSON
help [NAME]              what the server can do, or one command or event
hmp WORD...              a line of the human monitor
exit, Ctrl-D             leave; the virtual machine goes on"""

_LOCAL = ("help", "hmp", "exit")


def run_shell(address: str, timeout: float) -> int:
    """Connect, and talk to the user until he leaves or the server does. Returns the exit status."""
    return asyncio.run(_main(address, timeout))


async def _main(address: str, timeout: float) -> int:
    client = await AsyncClient.connect(address, timeout)
    try:
        shell = Shell(client, await _model(client), history=_history())
        return await shell.run()
    finally:
        client.close()


async def _model(client: AsyncClient) -> Model:
    if str(client.greeting.version.get("package", "")).startswith("StratoVirt"):
        return Model.stratovirt()
    try:
        entries = await client.execute("query-qmp-schema")
    except QmpError:
        return Model.stratovirt()
    return Model(list(entries)) if isinstance(entries, list) and entries else Model.stratovirt()


def _history() -> History:
    """The file of earlier lines, readable only for its owner; lines of this run alone when it cannot be written."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    path = state / "pystratovirt" / "qmp_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


class _Completer(Completer):
    def __init__(self, model: Model) -> None:
        self._model = model

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if line.lstrip().startswith("{"):
            return
        *before, word = line.split(" ")
        before = [each for each in before if each]
        if before[:1] == ["help"]:
            found = [each for each in self._model.names("command") + self._model.names("event") if each.startswith(word)]
        else:
            found = words_after(self._model, before, word)
            if not before:
                found += [each for each in _LOCAL if each.startswith(word)]
        for each in found:
            yield Completion(each, start_position=-len(word))


class _Interrupted(Exception):
    """Ctrl-C."""


class Shell:
    """One conversation. `run` is all of it."""

    def __init__(
        self,
        client: AsyncClient,
        model: Model,
        *,
        history: History | None = None,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        """`input` and `output` are the terminal unless given."""
        self._client = client
        self._model = model
        self._output = output
        self._colour = not os.environ.get("NO_COLOR")
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=_Completer(model),
            complete_while_typing=False,
            auto_suggest=AutoSuggestFromHistory(),
            interrupt_exception=_Interrupted,  # KeyboardInterrupt in a task would end the event loop
            input=input,
            output=output,
        )

    async def run(self) -> int:
        """Read lines until the user leaves or the server hangs up. Returns the exit status."""
        version = self._client.greeting.version
        name = render.plain(str(version.get("package") or "a QMP server"))
        self._say(f"Connected to {name}. help tells more, Ctrl-D leaves.")
        with patch_stdout(raw=True):
            events = asyncio.create_task(self._show_events())
            try:
                return await self._converse()
            finally:
                events.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await events

    async def _converse(self) -> int:
        while True:
            try:
                line = await self._prompt("(qmp) ")
            except _Interrupted:
                continue  # Ctrl-C drops the line
            except EOFError:
                return 0
            if line is None:
                await asyncio.sleep(0)  # the last events are shown first
                self._say("The server hung up.")
                return 0
            if line.strip() == "exit":
                return 0
            try:
                await self._do(line.strip())
            except QmpError as error:
                self._say(render.paint(render.ERROR, render.plain(str(error)), on=self._colour))
            except (arguments.ArgumentError, ValueError, RecursionError) as error:
                self._say(render.plain(str(error)))
            except _Interrupted:
                self._say("Not waited for any longer; the command itself goes on.")
            except QmpConnectionError as error:
                self._say(render.plain(str(error)))
                return 3

    async def _prompt(self, text: str) -> str | None:
        """Ask for a line; None when the server hangs up meanwhile."""
        asking = asyncio.create_task(self._session.prompt_async(text))
        await asyncio.wait((asking, self._client.ended), return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError, EOFError, _Interrupted):
                await asking
            return None
        return asking.result()

    async def _do(self, line: str) -> None:
        if not line:
            return
        if line.startswith("{"):
            command, values = _from_json(line)
        else:
            command, *words = shlex.split(line)
            if command == "help":
                self._say(self._help(words))
                return
            if command == "hmp":
                text = await self._execute("human-monitor-command", {"command-line": " ".join(words)})
                self._say(render.plain(text).rstrip("\n") if isinstance(text, str) else "")
                return
            values = arguments.parse(self._model, command, words) if words else ABSENT
        if command == "quit" and not await self._sure():
            return
        result = await self._execute(command, values)
        self._say(render.to_text(result, pretty=True, colour=self._colour))

    async def _execute(self, command: str, values: Json | Absent) -> Json:
        """Run a command. Ctrl-C ends the wait for its reply and nothing else."""
        return await _interruptible(self._client.execute(command, values))

    async def _sure(self) -> bool:
        answer = await self._prompt("This ends the virtual machine (exit leaves the shell). End it? [y/N] ")
        return answer is not None and answer.strip().lower() in ("y", "yes")

    def _help(self, words: list[str]) -> str:
        if not words:
            return f"{_HELP}\n\n{overview(self._model)}"
        try:
            return details(self._model, words[0])
        except KeyError:
            return f"no command or event {words[0]}"

    async def _show_events(self) -> None:
        while True:
            event = await self._client.events.get()
            self._say(f"{render.paint(render.EVENT, render.plain(event.name), on=self._colour)} {self._data(event)}")

    def _data(self, event: Event) -> str:
        return render.to_text(event.data, pretty=False, colour=self._colour)

    def _say(self, text: str) -> None:
        print_formatted_text(ANSI(text), output=self._output, file=None if self._output else sys.stdout)


def _from_json(line: str) -> tuple[str, Json | Absent]:
    try:
        value: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value.get("execute"), str):
        raise ValueError('an object with "execute" is wanted')  # noqa: TRY004 - it is the user's mistake
    return value["execute"], value.get("arguments", ABSENT)


async def _interruptible(work: Coroutine[Any, Any, Json]) -> Json:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: no Ctrl-C comes here
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await asyncio.wait((task,))
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)
        task.cancel()
    if task.cancelled():
        raise _Interrupted
    return task.result()
