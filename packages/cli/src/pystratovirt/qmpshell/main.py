"""The command `qmp`: from its words to a reply on standard output and an exit status.

Exit status: 0 done, 1 the server answered with an error, 2 wrong usage, 3 no connection, 4 nothing came in time.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pystratovirt.qmpshell import arguments, render
from pystratovirt.qmpshell.client import QmpClient, QmpConnectionError, QmpTimeout
from pystratovirt.qmpshell.model import Model
from pystratovirt.qmpshell.waiting import Wanted, wanted
from qmp_protocol.errors import QmpError
from qmp_protocol.messages import ABSENT

if TYPE_CHECKING:
    from qmp_protocol.messages import Event

DONE, REFUSED, USAGE, NO_CONNECTION, TIMED_OUT = range(5)

_EPILOG = """\
what to do:
  (nothing)                      an interactive shell; without a terminal, what follows here or JSON, line by line from standard
                                 input, to the first error
  COMMAND [KEY=VALUE...]         run a command and print its result as JSON; dots go into objects (file.filename=/x)
  wait EVENT... [KEY=VALUE...]   wait for one of these events with these data, and print it
  schema [NAME]                  say what the server can do; without -s, what StratoVirt can
  hmp WORD...                    run a line of the human monitor and print its text; -- before words that begin with -
  completion bash|zsh|fish       print a script that completes on Tab

exit status: 0 done, 1 the server answered with an error, 2 wrong usage, 3 no connection, 4 nothing came in time
"""


class Usage(Exception):
    """Wrong words; one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["__complete"]:
        return _complete(words[2:] if words[1:2] == ["--"] else words[1:])
    # argparse lets options stand between words, but not words that begin with "-" behind a "--".
    end = words.index("--") if "--" in words else len(words)
    options = _parser().parse_intermixed_args(words[:end])
    options.words = [*options.words, *words[end + 1 :]]
    render.escape_what_a_stream_lacks(sys.stdout)
    try:
        return _run(options)
    except Usage as error:
        return _complain(error, USAGE)
    except arguments.ArgumentError as error:
        return _complain(error, USAGE)
    except QmpError as error:
        return _complain(error, REFUSED)
    except QmpTimeout as error:
        return _complain(error, TIMED_OUT)
    except QmpConnectionError as error:
        return _complain(error, NO_CONNECTION)
    except RecursionError:
        return _complain(QmpConnectionError("the server's schema is too deep to be understood"), NO_CONNECTION)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails again when it flushes
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qmp",
        usage="qmp [-s ADDRESS] [options] [COMMAND [KEY=VALUE...]]",
        description="Talk QMP to a virtual machine monitor: this one, StratoVirt or QEMU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "-s",
        "--socket",
        metavar="ADDRESS",
        default=os.environ.get("QMP_SOCKET"),
        help="PATH, unix:PATH, HOST:PORT or tcp:HOST:PORT (default: $QMP_SOCKET)",
    )
    parser.add_argument(
        "-t", "--timeout", type=_seconds, metavar="SECONDS", help="how long to wait (default: 10; wait: for ever)"
    )
    parser.add_argument("-w", "--wait", metavar="EVENT", help="after the command, wait for this event and print it too")
    parser.add_argument(
        "--fd", type=_descriptor, metavar="NUMBER", action="append", help="pass this open descriptor with the command (getfd)"
    )
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--compact", action="store_true", help="one line of JSON, also on a terminal")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**9:
        raise argparse.ArgumentTypeError(f"{text}: seconds are wanted, 0 or more")
    return seconds


def _descriptor(text: str) -> int:
    try:
        number = int(text)
        os.fstat(number)
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(f"{text}: not an open descriptor") from None
    return number


class _Output:
    """Standard output as this command uses it: indented and coloured for people, one line a value for programs."""

    def __init__(self, options: argparse.Namespace) -> None:
        people = sys.stdout.isatty()
        self._pretty = people and not options.compact
        self.colour = options.color == "always" or (options.color == "auto" and people and not os.environ.get("NO_COLOR"))

    def value(self, value: Any) -> None:
        print(render.to_text(value, pretty=self._pretty, colour=self.colour), flush=True)

    def event(self, event: Event) -> None:
        seconds, microseconds = event.timestamp
        stamp = {"seconds": seconds, "microseconds": microseconds}
        self.value({"event": event.name, "data": event.data, "timestamp": stamp})


def _run(options: argparse.Namespace) -> int:
    words: list[str] = options.words
    output = _Output(options)
    first = words[0] if words else ""
    if options.fd and (not words or first in _VERBS):
        raise Usage("--fd: passed with which command?")
    if options.wait is not None and (not words or first in ("schema", "completion")):
        raise Usage("--wait: behind which command?")
    if first == "completion":
        return _print_script(words[1:])
    if first == "schema":
        return _print_schema(options, words[1:])
    if not options.socket:
        raise Usage("no server: -s ADDRESS or $QMP_SOCKET is needed")
    if not words and sys.stdin.isatty() and sys.stdout.isatty():
        from pystratovirt.qmpshell.shell import run_shell  # loads the terminal library

        return run_shell(options.socket, options.timeout or 10.0)
    with QmpClient(options.socket, timeout=10.0 if options.timeout is None else options.timeout) as client:
        session = _Session(client, output, options.timeout)
        if not words:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")  # names of files may be any bytes
            return session.script(sys.stdin)
        # Before the command runs: what is wrong with the wait must not be found out behind it.
        then = None if options.wait is None else wanted(session.model, [options.wait])
        session.run(words, fds=options.fd or ())
        if then:
            session.wait(then)
    return DONE


class _Session:
    """What is done over one connection."""

    def __init__(self, client: QmpClient, output: _Output, timeout: float | None) -> None:
        """`timeout` is for events; None waits for ever."""
        self._client = client
        self._output = output
        self._timeout = timeout

    @functools.cached_property
    def model(self) -> Model:
        """What the server can do: asked for when it is needed."""
        return Model.of(self._client)

    def run(self, words: Sequence[str], fds: Sequence[int] = ()) -> None:
        """Run one command, or a word of our own, and print what comes of it."""
        first = words[0]
        if first == "wait":
            self.wait(wanted(self.model, words[1:]))
        elif first == "schema":
            print(_schema_text(self.model, words[1:]), flush=True)
        elif first == "hmp":
            text = self._client.execute("human-monitor-command", {"command-line": " ".join(words[1:])})
            print(render.plain(text).rstrip("\n") if isinstance(text, str) else "", flush=True)
        else:
            values = arguments.parse(self.model, first, words[1:]) if len(words) > 1 else ABSENT
            self._output.value(self._client.execute(first, values, fds))

    def wait(self, what: Wanted) -> None:
        """Wait for an event and print it."""
        self._output.event(self._client.wait_event(self._timeout, what.fits))

    def script(self, lines: Iterable[str]) -> int:
        """Run what is on each line, as the shell does, until something fails."""
        for number, line in enumerate(lines, 1):
            try:
                if line.lstrip().startswith("{"):
                    self._output.value(self._client.execute(*arguments.from_json(line)))
                elif words := arguments.split(line):
                    self.run(words)
            except (arguments.ArgumentError, ValueError) as error:
                raise Usage(f"line {number}: {error}") from None
        return DONE


def _print_schema(options: argparse.Namespace, words: Sequence[str]) -> int:
    if options.socket:
        with QmpClient(options.socket, timeout=10.0 if options.timeout is None else options.timeout) as client:
            model = Model.of(client)
    else:
        model = Model.stratovirt()
    print(_schema_text(model, words))
    return DONE


def _schema_text(model: Model, words: Sequence[str]) -> str:
    from pystratovirt.qmpshell.describe import details, overview

    if len(words) > 1:
        raise arguments.ArgumentError("schema: one name at most")
    try:
        return render.plain(details(model, words[0]) if words else overview(model))
    except KeyError:
        raise arguments.ArgumentError(f"schema: no command or event {words[0]}") from None


def _print_script(words: Sequence[str]) -> int:
    from pystratovirt.qmpshell.scripts import SCRIPTS

    if len(words) != 1 or words[0] not in SCRIPTS:
        raise Usage(f"completion: for which shell? {', '.join(SCRIPTS)}")
    print(SCRIPTS[words[0]], end="")
    return DONE


_VERBS = ("wait", "schema", "hmp", "completion")
_VALUE_OPTIONS = ("-s", "--socket", "-t", "--timeout", "-w", "--wait", "--fd", "--color")


def _complete(words: Sequence[str]) -> int:
    """Print what can stand where the last of `words` has been begun."""
    from pystratovirt.qmpshell.completion import words_after

    *before, word = words or [""]
    plain: list[str] = []
    skip = False
    for each in before:
        if skip or each in _VALUE_OPTIONS:
            skip = not skip
        elif not each.startswith("-"):
            plain.append(each)
    if skip:
        return DONE  # the value of an option: the system's shell completes file names
    model = Model.stratovirt()
    if plain and plain[0] == "wait":
        found = model.names("event")
    elif plain and plain[0] == "schema":
        found = model.names("command") + model.names("event")
    elif plain and plain[0] == "completion":
        found = ["bash", "zsh", "fish"]
    else:
        found = words_after(model, plain, word) + ([] if plain else list(_VERBS))
    for each in found:
        if each.startswith(word):
            print(each)
    return DONE


def _complain(error: Exception, status: int) -> int:
    print(f"qmp: {render.line(str(error))}", file=sys.stderr)
    return status


def run() -> NoReturn:
    """The console script."""
    sys.exit(main())
