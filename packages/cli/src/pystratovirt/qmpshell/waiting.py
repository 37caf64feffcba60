"""Which event is waited for: `wait DEVICE_DELETED device=d1`, in the shell, in scripts and from the system's shells.

Not here: waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pystratovirt.qmpshell.arguments import FALSE, TRUE, ArgumentError
from pystratovirt.qmpshell.model import Model
from qmp_protocol.messages import Event


class Wanted(NamedTuple):
    """One of some events, with some data."""

    names: frozenset[str]
    data: tuple[tuple[str, str], ...]

    def fits(self, event: Event) -> bool:
        """Tell whether this is the event that is waited for."""
        return event.name in self.names and all(_means(event.data.get(key), text) for key, text in self.data)


def wanted(model: Model, words: Sequence[str]) -> Wanted:
    """Return what the words behind `wait` mean. Raises ArgumentError: what never comes would be waited for without end."""
    names = [word for word in words if "=" not in word]
    if not names:
        raise ArgumentError("wait: which event?")
    events = model.names("event")
    for name in names:
        if name not in events:
            raise ArgumentError(f"wait: no event {name}; there are: {', '.join(events)}")
    members = {member.name for name in names for member in model.members(model.arguments(name))}
    data = [(key, text) for key, _, text in (word.partition("=") for word in words if "=" in word)]
    for key, _ in data:
        if key not in members:
            there_are = ", ".join(sorted(members)) or "none"
            raise ArgumentError(f"wait: {key}: no such data of {' or '.join(names)}; there are: {there_are}")
    return Wanted(frozenset(names), tuple(data))


def _means(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return text in (TRUE if value else FALSE)
    return value is not None and str(value) == text
