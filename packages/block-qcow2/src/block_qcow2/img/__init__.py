"""The command stratovirt-img: StratoVirt's image tool with its defects mended, and what qemu-img has beyond it.

Results go to standard output, errors and progress to standard error. Here is only the way in, which loads nothing before it
has said what signals do: the commands are in `command`.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status. Without `argv` this is the process: its words, its signals, its output."""
    if argv is not None:
        from .command import run

        return run(argv)
    from .interrupt import end_quietly

    end_quietly()
    _open_streams()
    import sys

    from .command import run

    # File names are bytes: one that is not UTF-8 is printed as it is.
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    return run(sys.argv[1:])


def _open_streams() -> None:
    """Let streams that the caller closed lead nowhere: else an image is opened as one of them, and messages end up in it."""
    import os
    import sys

    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes the lowest that is free, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
