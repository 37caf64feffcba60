"""The line protocol of test mode: requests and replies as bytes. Source: reference migration-and-test-mode, sections 10 to 13.

    readl 0xf0100000        OK 0x0000000074726976
    write 0x1000 4 0a0b0c0d OK
    clock_step              OK 33000000
    query_msix 4276092928 33 OK TRUE

Addresses, sizes and values are hexadecimal, with or without `0x`; times and interrupt numbers decimal. Requests end with a
newline, and any number of them may be on their way; one without a newline is taken as well when it is all that one read
brought, because existing harnesses send one request a write. What follows a newline in the same read is the beginning of a
request until its own newline comes. A request that makes no sense is answered with a line
`Error: <command>: <reason>`, a command that there is not with `Unsupported command: <command>`.

Beyond the reference: `inb`, `inw`, `inl` PORT and `outb`, `outw`, `outl` PORT VALUE (hexadecimal) for x86 ports, and
`query_irq GSI`, which says whether the line had an edge since the last time it was asked.

Not here: the socket (the composition connects it), and the machine (`hypervisor.testmode.MachineAccess`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

LONGEST_REQUEST = 4 << 20  # bytes: a `write` of 2 MiB
LONGEST_TRANSFER = 16 << 20  # bytes that one `read` or `memset` may cover

_HEX = frozenset("0123456789abcdefABCDEF")
_DECIMAL = frozenset("0123456789")
_U32, _U64, _I64 = 1 << 32, 1 << 64, 1 << 63


class Target(Protocol):
    """The machine under test (`vmm_core.hypervisor.testmode.MachineAccess`). Nothing here raises."""

    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...
    def fill(self, address: int, length: int, pattern: bytes) -> None: ...
    def read_port(self, port: int, size: int) -> int: ...
    def write_port(self, port: int, size: int, value: int) -> None: ...
    def clock_step(self, delta: int | None) -> int: ...
    def clock_set(self, time: int) -> int: ...
    def take_message(self, address: int, data: int) -> bool: ...
    def take_edges(self, gsi: int) -> bool: ...
    def is_pending(self, gsi: int) -> bool: ...
    def take_edge(self, gsi: int) -> bool: ...


class _Malformed(Exception):
    """The reason why a request makes no sense."""


class _Incomplete(_Malformed):
    """A `write` that announces more data than is there."""


class TestProtocol:
    """The server's end of one connection: bytes received in, bytes to send out."""

    __test__ = False  # not a test, whatever its name begins with

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pending = b""
        self._lines = False  # this peer ends its requests with newlines
        self._answered = False  # the last request was taken without its newline, which may still come
        self._skipping = False  # in a request that is too long, up to its end

    def receive(self, data: bytes) -> bytes:
        """Take what one read brought; return the replies to everything that is complete."""
        replies: list[str] = []
        if self._answered:
            data = data.removeprefix(b"\r")
            self._answered = not data  # the two may come one by one
            data = data.removeprefix(b"\n")
        alone = not self._pending
        *lines, rest = (self._pending + data).split(b"\n")
        for line in lines:
            self._lines = True
            if self._skipping:
                self._skipping = False
            else:
                replies.append(self._answer(line))
        self._pending = b"" if self._skipping else rest
        if len(self._pending) > LONGEST_REQUEST:
            self._pending = b""
            self._skipping = True
            replies.append(f"Error: a request is longer than {LONGEST_REQUEST} bytes")
        elif self._pending.strip() and ((alone and not lines) or not self._lines):
            reply = self._answer_unfinished(self._pending)
            if reply is not None:
                self._pending = b""
                self._answered = True
                replies.append(reply)
        return "".join(f"{reply}\r\n" for reply in replies).encode()

    def _answer(self, line: bytes) -> str:
        words = line.decode("ascii", "replace").split()
        try:
            return self._prepare(words)()
        except _Malformed as error:
            return f"Error: {words[0]}: {error}"

    def _answer_unfinished(self, line: bytes) -> str | None:
        """Answer a request without a newline, or None to wait for more of it.

        One that makes sense is a request. One that does not is the beginning of a request when its peer ends them with newlines,
        or when it is a `write` whose data are still on their way.
        """
        words = line.decode("ascii", "replace").split()
        try:
            action = self._prepare(words)
        except _Incomplete:
            return None
        except _Malformed as error:
            return None if self._lines else f"Error: {words[0]}: {error}"
        if self._lines and words[0] not in _COMMANDS:
            return None
        return action()

    def _prepare(self, words: list[str]) -> Callable[[], str]:
        """Check a whole request; return what does it. Raises _Malformed."""
        name = words[0] if words else ""
        command = _COMMANDS.get(name)
        if command is None:
            return lambda: f"Unsupported command: {name[:100]}"
        return command(self._target, words[1:])


def _count(arguments: list[str], *allowed: int) -> None:
    if len(arguments) not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise _Malformed(f"{wanted} argument{'' if allowed == (1,) else 's'} expected, {len(arguments)} given")


def _digits(text: str) -> str:
    digits = text.removeprefix("0x")
    if not digits or not _HEX.issuperset(digits):
        raise _Malformed(f"{text[:40]!r} is not a hexadecimal number")
    return digits


def _hex(text: str, limit: int = _U64) -> int:
    # Leading zeros first: the conversion of a long string is slow, and no number that fits is long.
    digits = _digits(text).lstrip("0") or "0"
    if len(digits) > 16 or (value := int(digits, 16)) >= limit:
        raise _Malformed(f"{text[:40]!r} is more than {limit - 1:#x}")
    return value


def _decimal(text: str, limit: int) -> int:
    digits = text.removeprefix("+")
    if not digits or not _DECIMAL.issuperset(digits):
        raise _Malformed(f"{text[:40]!r} is not a decimal number")
    digits = digits.lstrip("0") or "0"
    if len(digits) > 20 or (value := int(digits)) >= limit:
        raise _Malformed(f"{text[:40]!r} is more than {limit - 1}")
    return value


def _signed(text: str) -> int:
    return -_decimal(text[1:], _I64 + 1) if text.startswith("-") else _decimal(text, _I64)


def _range(address: str, size: str) -> tuple[int, int]:
    start, length = _hex(address), _hex(size)
    if length > LONGEST_TRANSFER:
        raise _Malformed(f"{length:#x} bytes are more than {LONGEST_TRANSFER:#x}")
    if start + length > _U64:
        raise _Malformed(f"{length:#x} bytes at {start:#x} go beyond the address space")
    return start, length


def _flag(value: bool) -> str:
    return "OK TRUE" if value else "OK FALSE"


def _done(action: Callable[[], None]) -> Callable[[], str]:
    def act() -> str:
        action()
        return "OK"

    return act


_Command = Callable[[Target, list[str]], Callable[[], str]]


def _read(target: Target, arguments: list[str]) -> Callable[[], str]:
    _count(arguments, 2)
    address, length = _range(*arguments)
    return lambda: f"OK 0x{target.read(address, length).hex()}"


def _write(target: Target, arguments: list[str]) -> Callable[[], str]:
    if len(arguments) < 3:
        raise _Incomplete(f"3 arguments expected, {len(arguments)} given")
    _count(arguments, 3)
    address, length = _range(*arguments[:2])
    digits = _digits(arguments[2])
    data = bytes.fromhex("0" * (len(digits) % 2) + digits)
    if len(data) != length:
        raise (_Incomplete if len(data) < length else _Malformed)(f"{length} bytes announced, {len(data)} given")
    return _done(lambda: target.write(address, data))


def _memset(target: Target, arguments: list[str]) -> Callable[[], str]:
    _count(arguments, 3)
    address, length = _range(*arguments[:2])
    digits = _digits(arguments[2])
    if len(digits) % 2:
        raise _Malformed("the pattern has an odd number of digits")
    pattern = bytes.fromhex(digits)
    return _done(lambda: target.fill(address, length, pattern))


def _read_number(size: int) -> _Command:
    def prepare(target: Target, arguments: list[str]) -> Callable[[], str]:
        _count(arguments, 1)
        address, _ = _range(arguments[0], f"{size:x}")
        return lambda: f"OK 0x{int.from_bytes(target.read(address, size), 'little'):016x}"

    return prepare


def _write_number(size: int) -> _Command:
    def prepare(target: Target, arguments: list[str]) -> Callable[[], str]:
        _count(arguments, 2)
        address, _ = _range(arguments[0], f"{size:x}")
        data = _hex(arguments[1], 1 << 8 * size).to_bytes(size, "little")
        return _done(lambda: target.write(address, data))

    return prepare


def _in(size: int) -> _Command:
    def prepare(target: Target, arguments: list[str]) -> Callable[[], str]:
        _count(arguments, 1)
        port = _hex(arguments[0], 1 << 16)
        return lambda: f"OK 0x{target.read_port(port, size):016x}"

    return prepare


def _out(size: int) -> _Command:
    def prepare(target: Target, arguments: list[str]) -> Callable[[], str]:
        _count(arguments, 2)
        port, value = _hex(arguments[0], 1 << 16), _hex(arguments[1], 1 << 8 * size)
        return _done(lambda: target.write_port(port, size, value))

    return prepare


def _clock_step(target: Target, arguments: list[str]) -> Callable[[], str]:
    _count(arguments, 0, 1)
    delta = _signed(arguments[0]) if arguments else None
    return lambda: f"OK {target.clock_step(delta)}"


def _clock_set(target: Target, arguments: list[str]) -> Callable[[], str]:
    _count(arguments, 1)
    time = _signed(arguments[0])
    return lambda: f"OK {target.clock_set(time)}"


def _query_msix(target: Target, arguments: list[str]) -> Callable[[], str]:
    _count(arguments, 2)
    address, data = _decimal(arguments[0], _U64), _decimal(arguments[1], _U32)
    return lambda: _flag(target.take_message(address, data))


def _line(ask: Callable[[Target, int], bool]) -> _Command:
    def prepare(target: Target, arguments: list[str]) -> Callable[[], str]:
        _count(arguments, 1)
        gsi = _decimal(arguments[0], _U32)
        return lambda: _flag(ask(target, gsi))

    return prepare


_COMMANDS: dict[str, _Command] = {
    "read": _read,
    "write": _write,
    "memset": _memset,
    "clock_step": _clock_step,
    "clock_set": _clock_set,
    "query_msix": _query_msix,
    "query_intx": _line(lambda target, gsi: target.is_pending(gsi)),
    "eoi_intx": _line(lambda target, gsi: target.take_edge(gsi)),
    "query_irq": _line(lambda target, gsi: target.take_edges(gsi)),
    **{f"read{letter}": _read_number(size) for letter, size in (("b", 1), ("w", 2), ("l", 4), ("q", 8))},
    **{f"write{letter}": _write_number(size) for letter, size in (("b", 1), ("w", 2), ("l", 4), ("q", 8))},
    **{f"in{letter}": _in(size) for letter, size in (("b", 1), ("w", 2), ("l", 4))},
    **{f"out{letter}": _out(size) for letter, size in (("b", 1), ("w", 2), ("l", 4))},
}
