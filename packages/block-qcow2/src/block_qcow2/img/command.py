"""The dispatch of stratovirt-img: each command is a function that gets its words and returns the exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

from .. import __version__
from ..errors import BlockError
from .args import UsageError, fail, text_of

# command: (module, one line of help)
COMMANDS = {
    "create": ("basic", "create [-f FMT] [-o NAME=VALUE,…|help] [-b BACKING [-F FMT]] [-u] [--key-file KEY] [-q] FILE [SIZE]"),
    "check": ("basic", "check [-r leaks|all] [-no_print_error] [-f FMT] [--output human|json] [-T CACHE] [-p] [-q] [-U] FILE"),
    "resize": ("basic", "resize [-f FMT] [--shrink | --preallocation MODE] [-p] [-q] [--allow-chain] FILE [+|-]SIZE"),
    "snapshot": ("basic", "snapshot [-f FMT] [-p] [-q] [-U] [-l | -a NAME | -c NAME | -d NAME] FILE"),
    "info": ("look", "info [-f FMT] [--output human|json] [--backing-chain] [--allow-chain] [-U] FILE"),
    "map": ("look", "map [-f FMT] [--output human|json] [--start-offset N] [--max-length N] [--allow-chain] [-U] FILE"),
    "compare": ("look", "compare [-f FMT] [-F FMT] [-T CACHE] [-s] [-q] [-p] [--allow-chain] [-U] FILE1 FILE2"),
    "measure": (
        "measure",
        "measure [-O FMT] [-o OPTIONS] [--output human|json] (--size N | [-f FMT] [-l SNAPSHOT] [--allow-chain] FILE)",
    ),
    "convert": (
        "convert",
        (
            "convert [-f FMT] [-O FMT] [-o OPTS] [-B BACKING -F FMT] [-cnpqUWC] [-l NAME] [-S N] [-m N] [-r RATE] [-t CACHE]"
            " [-T CACHE] [--bitmaps [--skip-broken-bitmaps]] [--salvage] [--target-is-zero] [--allow-chain] IN… OUT"
        ),
    ),
    "amend": ("amend", "amend [-f FMT] [-t CACHE] [-q] [-p] [--force] [--allow-chain] -o OPTIONS|help FILE"),
    "bench": (
        "export",
        (
            "bench [-f FMT] [-c COUNT] [-d DEPTH] [-o OFFSET] [-s SIZE] [-S STEP] [-w [--pattern N] [--flush-interval N"
            " [--no-drain]]] [-t CACHE] [-n | -i ENGINE] [-q] [-U] [--allow-chain] FILE"
        ),
    ),
    "bitmap": (
        "chain",
        "bitmap (--add [-g N] | --remove | --clear | --enable | --disable | --merge SRC [-b FILE [-F FMT]])… [-f FMT] FILE NAME",
    ),
    "serve": (
        "export",
        (
            "serve [--type nbd] [-f FMT] [-r] [-k SOCKET | -b HOST -p PORT] [-x NAME] [-e N] [-B BITMAP]… [--tls-creds FOLDER"
            " [--tls-verify-peer on|off]] [--aio off|threads|native|io_uring] [--direct] [--discard] [--allow-chain] FILE\n"
            "  serve --type vhost-user-blk -k SOCKET [--num-queues N] [--serial TEXT] [-f FMT] [-r] [--aio ENGINE] [--direct]"
            " [--discard] [--allow-chain] FILE"
        ),
    ),
    "dd": ("copy", "dd [-f FMT] [-O FMT] [-U] [--allow-chain] [bs=N] [count=N] [skip=N] if=FILE of=FILE"),
    "commit": ("chain", "commit [-f FMT] [-b BASE] [-d] [-p] [-q] [-r RATE] [-t CACHE] --allow-chain FILE"),
    "rebase": ("chain", "rebase [-f FMT] [-u] [-p] [-q] [-t CACHE] [-T CACHE] [-U] [--allow-chain] -b BACKING [-F FMT] FILE"),
}


def run(words: list[str]) -> int:
    """Run one command; return the exit status. What goes wrong is one line on standard error."""
    status = _report(words)
    try:
        sys.stdout.flush()
    except OSError:  # reported already; what is still in the buffer would make the exit status 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status


def _report(words: list[str]) -> int:
    try:
        status = _run(words)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            return fail(f"standard output: {e.strerror}")
    except BrokenPipeError:
        return 1  # whoever read our output has gone: that is no news to anybody
    except MemoryError:
        return fail("out of memory")
    except (BlockError, OSError, ValueError, OverflowError) as e:
        return fail(text_of(e))
    except KeyboardInterrupt:
        return 130
    return status


def _run(words: list[str]) -> int:
    if not words:
        raise UsageError("Not enough arguments (try 'stratovirt-img --help')")
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-v", "-V", "--version"):
        print(f"stratovirt-img version {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"Command not found: {name} (try 'stratovirt-img --help')")
    if any(word in ("-h", "-help", "--help") for word in (rest[: rest.index("--")] if "--" in rest else rest)):
        print(f"stratovirt-img {COMMANDS[name][1]}")
        return 0
    command: Callable[[list[str]], int] = getattr(import_module(f".{COMMANDS[name][0]}", __package__), name)
    return command(rest)


def usage() -> str:
    lines = "\n".join(f"  {line}" for _, line in COMMANDS.values())
    return (
        f"stratovirt-img: look at, make and change disk images (raw, qcow2)\n\n{lines}\n\n"
        "Files that an image names (backing file, data file) are opened only with --allow-chain.\n"
        "SIZE and N take a suffix of K, M, G, T, P or E (1024-based). Encrypted images are opened with --key-file FILE, or\n"
        "--object secret,id=ID,file=FILE (or data=, format=base64) and, where there are several, --key-secret ID."
    )
