"""Tables whose values are loaded when they are first asked for, so that a start pays only for what it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Lazy(Mapping[str, Any]):
    """Maps a key to the attribute `name` of `package`.`module`, which is imported at the first look-up."""

    def __init__(self, package: str, places: dict[str, tuple[str, str]]) -> None:
        """Take `places`: key to (module, name)."""
        self._package, self._places = package, places

    def __getitem__(self, key: str) -> Any:
        module, name = self._places[key]
        return getattr(__import__(f"{self._package}.{module}", fromlist=[name]), name)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
