"""Why a start ends before a guest runs. Every message is one line that names the option and the reason; the status is 1."""

from __future__ import annotations


class StartError(Exception):
    """What was asked for cannot be started."""
