"""Passing file descriptors (reference section 1.11)."""

from __future__ import annotations

from qmp_protocol.schema import Command, Empty, member


class Getfd(Command[Empty], name="getfd", takes_fds=True):
    """Receive a file descriptor that was passed with this command over a unix socket, and give it a name.

    A name that is in use gets the new descriptor; the old one is closed. When several descriptors come, the last one counts.

    Errors: GenericError when no descriptor came with the command.
    """

    fdname: str = member(max_length=255, doc="the name by which `netdev_add` asks for it")
