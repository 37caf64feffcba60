"""The command line of StratoVirt: argv to a Config, or one line that says what is wrong.

    try:
        config = parse(["-kernel", "vmlinux", "-smp", "2"])
    except CommandLineError as error:
        print(error)  # -smp 300: at most 254 vCPUs

`parse` touches nothing outside its arguments; `parse_or_exit` is what the command does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pystratovirt.stdio import ensure_standard_descriptors, say

from .build import build as parse
from .config import Config
from .errors import CommandLineError, Information, printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["CommandLineError", "Config", "Information", "fail", "parse", "parse_or_exit"]

PROGRAM = "stratovirt"


def parse_or_exit(argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of this process's command line, its files checked.

    `-h` and `-V` print to standard output and exit with status 0; a mistake prints one line to standard error and exits with
    status 1.
    """
    from .files import check_files  # parse alone does not need it

    ensure_standard_descriptors()
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        check_files(config)
    except CommandLineError as error:
        fail(error)
    except Information as answer:
        say(1, answer.text)
        raise SystemExit(0) from None
    return config


def fail(error: Exception) -> NoReturn:
    """End the program: one line to standard error, status 1."""
    say(2, f"{PROGRAM}: {printable(str(error))}\n")  # parts of a machine name paths as they are
    raise SystemExit(1) from None
