"""The interactive shell: one line a command, events as they come, completion and history.

Built on prompt_toolkit, which is loaded only here. Not here: what a line means (`arguments`), and the one-shot client (`main`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
from pystratovirt.qmpshell.waiting import Wanted, wanted
from qmp_protocol.errors import QmpError
from qmp_protocol.messages import ABSENT, Absent, Event, Json

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

T = TypeVar("T")

_RECENT = 1000

_HELP = """\
COMMAND [KEY=VALUE...]         run a command; Tab completes; dots go into objects (file.filename=/x)
{"execute": ...}               the same as JSON
wait EVENT... [KEY=VALUE...]   wait for one of these events with these data, from the last command on; Ctrl-C gives up
schema [NAME]                  what the server can do, or one command or event
help [NAME]                    the same, behind these lines
hmp WORD...                    a line of the human monitor
exit, Ctrl-D                   leave; the virtual machine goes on"""

_LOCAL = ("help", "hmp", "schema", "wait", "exit")


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
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
        path = state / "pystratovirt" / "qmp_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        usable = path.is_file()
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where the home is
        usable = False
    return _History(str(path)) if usable else InMemoryHistory()


class _History(FileHistory):
    """Goes on without its file: a disk that is full meanwhile must not get in the way of a command."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return ()

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


class _Completer(Completer):
    def __init__(self, model: Model) -> None:
        self._model = model

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if line.lstrip().startswith("{"):
            return
        *before, word = line.split(" ")
        before = [each for each in before if each]
        if before[:1] in (["help"], ["schema"]):
            found = [each for each in self._model.names("command") + self._model.names("event") if each.startswith(word)]
        elif before[:1] == ["wait"]:
            found = [each for each in self._model.names("event") if each.startswith(word)]
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
        self._recent: deque[Event] = deque(maxlen=_RECENT)  # shown since the last command was begun, and not waited for
        self._news = asyncio.Event()
        self._work: asyncio.Future[Any] | None = None  # what Ctrl-C ends the wait for
        self._interrupted = False  # since the last line was asked for
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
        name = render.line(str(version.get("package") or "a QMP server"))
        self._say(f"Connected to {name}. help tells more, Ctrl-D leaves.")
        with patch_stdout(raw=True), self._interrupts():
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
                self._say(render.paint(render.ERROR, render.line(str(error)), on=self._colour))
            except (arguments.ArgumentError, ValueError, RecursionError) as error:
                self._say(render.line(str(error)))
            except _Interrupted:
                self._say("Not waited for any longer; the command itself goes on.")
            except QmpConnectionError as error:
                self._say(render.line(str(error)))
                return 3

    async def _prompt(self, text: str) -> str | None:
        """Ask for a line; None when the server hangs up meanwhile."""
        self._interrupted = False
        # While a line is typed, Ctrl-C is a key.
        asking = asyncio.create_task(self._session.prompt_async(text, handle_sigint=False))
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
            command, values = arguments.from_json(line)
        else:
            if not (split := arguments.split(line)):
                return
            command, *words = split
            if command == "help":
                self._say(self._help(words))
                return
            if command == "schema":
                self._say(self._schema(words))
                return
            if command == "wait":
                await self._interruptible(self._wait(wanted(self._model, words)))
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
        self._recent.clear()
        return await self._interruptible(self._client.execute(command, values))

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Take Ctrl-C from the first prompt to the end: there must be no moment between two in which it would end the shell."""

        def interrupt() -> None:
            self._interrupted = True
            if self._work is not None:
                self._work.cancel()

        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: no Ctrl-C comes here
            loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(signal.SIGINT)

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` until Ctrl-C. Raises _Interrupted."""
        self._work = task = asyncio.ensure_future(work)
        try:
            await asyncio.sleep(0)  # it has begun, and the command is on its way
            if self._interrupted:
                task.cancel()
            await asyncio.wait((task,))
        finally:
            self._work = None
            task.cancel()
        if task.cancelled():
            raise _Interrupted
        return task.result()

    async def _sure(self) -> bool:
        answer = await self._prompt("This ends the virtual machine (exit leaves the shell). End it? [y/N] ")
        return answer is not None and answer.strip().lower() in ("y", "yes")

    async def _wait(self, what: Wanted) -> None:
        """Wait until such an event has been shown, or the server has hung up."""
        while True:
            self._news.clear()
            while self._recent:
                if what.fits(self._recent.popleft()):
                    return
            news = asyncio.create_task(self._news.wait())
            try:
                await asyncio.wait((news, self._client.ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
            if self._client.ended.done() and not self._recent:
                return

    def _help(self, words: list[str]) -> str:
        return self._schema(words) if words else f"{_HELP}\n\n{self._schema([])}"

    def _schema(self, words: list[str]) -> str:
        if len(words) > 1:
            return "one name at most"
        try:
            return render.plain(details(self._model, words[0]) if words else overview(self._model))
        except KeyError:
            return render.line(f"no command or event {words[0]}")

    async def _show_events(self) -> None:
        while True:
            event = await self._client.events.get()
            self._say(f"{render.paint(render.EVENT, render.line(event.name), on=self._colour)} {self._data(event)}")
            self._recent.append(event)
            self._news.set()

    def _data(self, event: Event) -> str:
        return render.to_text(event.data, pretty=False, colour=self._colour)

    def _say(self, text: str) -> None:
        print_formatted_text(ANSI(text), output=self._output, file=None if self._output else sys.stdout)
