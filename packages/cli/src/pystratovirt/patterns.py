"""Regular expressions that take time in proportion to pattern and text, whatever they are (Thompson's construction).

Patterns come from clients and are tried on the main loop, so the standard library's `re`, whose time can double with each
character, is no choice. The syntax is that of StratoVirt's (Rust's `regex`) as far as it makes sense for names in ASCII:
literals, `.`, `[a-z]`, `\\d \\w \\s`, `* + ? {m,n}`, groups, `|`, `^ $ \\b \\B`, and the flag `i`. As there, nothing looks
around or refers back.

Not here: where a match is and what its groups are; only whether there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

LONGEST: Final = 256  # characters of a pattern
LARGEST: Final = 320  # instructions that it may become: `(a{9}){9}` is short and not small
_DEEPEST: Final = 50  # groups in groups
_MOST_TIMES: Final = 1000


class PatternError(ValueError):
    """No regular expression, or too large a one; one line."""


# A set of ASCII characters is a number with a bit for each.
_EVERY: Final = (1 << 128) - 1


def _set(characters: str) -> int:
    return sum(1 << ord(each) for each in set(characters))


_DIGIT: Final = _set("0123456789")
_LOWER: Final = _set("abcdefghijklmnopqrstuvwxyz")
_UPPER: Final = _LOWER >> 32
_WORD: Final = _DIGIT | _LOWER | _UPPER | _set("_")
_SPACE: Final = _set(" \t\n\r\f\v")
_DOT: Final = _EVERY & ~_set("\n")
_CLASSES: Final = {"d": _DIGIT, "w": _WORD, "s": _SPACE, "D": _EVERY & ~_DIGIT, "W": _EVERY & ~_WORD, "S": _EVERY & ~_SPACE}
_CONTROLS: Final = {"a": 7, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_POSIX: Final = {
    "alpha": _LOWER | _UPPER,
    "alnum": _LOWER | _UPPER | _DIGIT,
    "digit": _DIGIT,
    "lower": _LOWER,
    "upper": _UPPER,
    "space": _SPACE,
    "word": _WORD,
    "xdigit": _DIGIT | _set("abcdefABCDEF"),
    "punct": sum(1 << code for code in range(33, 127)) & ~(_LOWER | _UPPER | _DIGIT),
}
_ASSERTIONS: Final = {"A": "^", "z": "$", "b": "b", "B": "B"}


# What a pattern says


class _One(NamedTuple):
    """One character of a set."""

    characters: int


class _At(NamedTuple):
    """A place: `^`, `$`, `b`, `B`."""

    place: str


class _Row(NamedTuple):
    """One after the other; nothing at all if there are none."""

    parts: list[_Node]


class _Either(NamedTuple):
    """One of them."""

    parts: list[_Node]


class _Times(NamedTuple):
    """From `low` to `high` times; None: without an end."""

    part: _Node
    low: int
    high: int | None


_Node: TypeAlias = "_One | _At | _Row | _Either | _Times"


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._any_case = False

    def parse(self) -> _Node:
        node = self._alternatives()
        if self._at < len(self._text):
            raise self._error("`)` without `(`")
        return node

    def _error(self, why: str) -> PatternError:
        return PatternError(f"no regular expression: {why} at character {self._at + 1}")

    def _peek(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _take(self, text: str) -> bool:
        if self._text.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _next(self, what: str) -> str:
        if self._at == len(self._text):
            raise self._error(f"{what} does not end")
        self._at += 1
        return self._text[self._at - 1]

    def _alternatives(self) -> _Node:
        before = self._any_case  # a flag holds to the end of its group
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        self._any_case = before
        return parts[0] if len(parts) == 1 else _Either(parts)

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            if self._peek() in "*+?{":
                raise self._error(f"nothing for `{self._peek()}` to repeat")
            node = self._atom()
            while repeated := self._repeated(node):
                node = repeated
            parts.append(node)
        return _Row(parts)

    def _repeated(self, node: _Node) -> _Node | None:
        low: int
        high: int | None
        if self._take("*"):
            low, high = 0, None
        elif self._take("+"):
            low, high = 1, None
        elif self._take("?"):
            low, high = 0, 1
        elif self._take("{"):
            low, high = self._bounds()
        else:
            return None
        self._take("?")  # as few as possible: whether there is a match is the same
        return _Times(node, low, high)

    def _bounds(self) -> tuple[int, int | None]:
        low = self._number()
        high: int | None = low
        if self._take(","):
            high = None if self._peek() == "}" else self._number()
        if not self._take("}"):
            raise self._error("`{` wants `n}`, `n,}` or `n,m}`")
        if high is not None and high < low:
            raise self._error(f"{low} is more than {high}")
        return low, high

    def _number(self) -> int:
        digits = ""
        while self._peek().isascii() and self._peek().isdigit():
            digits += self._next("a number")
        if not digits:
            raise self._error("`{` wants `n}`, `n,}` or `n,m}`")
        if len(digits) > 4 or int(digits) > _MOST_TIMES:
            raise self._error(f"more than {_MOST_TIMES} repetitions")
        return int(digits)

    def _atom(self) -> _Node:
        character = self._next("the pattern")
        if character == "(":
            return self._group()
        if character == "[":
            return self._one(self._class())
        if character == ".":
            return _One(_DOT)
        if character in "^$":
            return _At(character)
        if character == "\\":
            letter = self._peek()
            if letter in _ASSERTIONS:
                self._at += 1
                return _At(_ASSERTIONS[letter])
            return self._one(self._escape())
        return self._one(_bit(character))

    def _one(self, characters: int) -> _Node:
        return _One(self._fold(characters))

    def _fold(self, characters: int) -> int:
        if self._any_case:
            characters |= (characters & _UPPER) << 32 | (characters & _LOWER) >> 32
        return characters

    def _group(self) -> _Node:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"more than {_DEEPEST} groups in each other")
        before = self._any_case
        if self._take("?") and not self._named() and not self._flags():
            self._depth -= 1
            return _Row([])  # (?i): for what follows it
        node = self._alternatives()
        if not self._take(")"):
            raise self._error("a group does not end")
        self._any_case = before
        self._depth -= 1
        return node

    def _named(self) -> bool:
        """Read a group's name, which is of no use here."""
        if not (self._take("P<") or (self._text[self._at + 1 : self._at + 2] not in ("=", "!") and self._take("<"))):
            return False
        name = ""
        while (character := self._next("a group's name")) != ">":
            name += character
        if not name.isidentifier():
            raise self._error("no name of a group")
        return True

    def _flags(self) -> bool:
        """Read flags. True when a group follows."""
        value = True
        while (character := self._next("a group")) not in ":)":
            if character == "-" and value:
                value = False
            elif character == "i":
                self._any_case = value
            elif character not in "msuU":  # of lines and of greed: a name has one line, and how much matches is not asked
                self._at -= 1
                raise self._error("only the flag `i` is known, and nothing looks around or refers back")
        return character == ":"

    def _escape(self) -> int:
        """Read what is behind a backslash, as a set."""
        character = self._next("an escape")
        if character in _CLASSES:
            return _CLASSES[character]
        if character in _CONTROLS:
            return 1 << _CONTROLS[character]
        if character in "xuU":
            return _bit(self._code(character))
        if character.isascii() and character.isalnum():
            self._at -= 1
            raise self._error(f"unknown escape `\\{character}`")
        return _bit(character)

    def _code(self, letter: str) -> str:
        digits = ""
        if self._take("{"):
            while (character := self._next("an escape")) != "}":
                digits += character
        else:
            for _ in range({"x": 2, "u": 4, "U": 8}[letter]):
                digits += self._next("an escape")
        try:
            return chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise self._error(f"no code of a character: {digits}") from None

    def _class(self) -> int:
        """Read what is behind `[`, up to its end."""
        negated = self._take("^")
        found = 0
        first = True
        while first or self._peek() != "]":
            first = False
            found |= self._range()
        self._at += 1
        return _EVERY & ~self._fold(found) if negated else found

    def _range(self) -> int:
        if self._peek() == "[":
            return self._posix()
        if self._text[self._at : self._at + 2] in ("&&", "~~", "--"):
            raise self._error("sets of sets are not known")
        low = self._member()
        if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
            self._at += 1
            high = self._member()
            if isinstance(low, int) or isinstance(high, int) or low > high:
                raise self._error("a range has no beginning or no end")
            return sum(1 << code for code in range(ord(low), min(ord(high), 127) + 1))
        return low if isinstance(low, int) else _bit(low)

    def _member(self) -> str | int:
        """Read a character, or a set behind a backslash."""
        character = self._next("a set of characters")
        if character != "\\":
            return character
        found = self._escape()
        return chr(found.bit_length() - 1) if found.bit_count() == 1 else found

    def _posix(self) -> int:
        for name, characters in _POSIX.items():
            if self._take(f"[:{name}:]"):
                return characters
            if self._take(f"[:^{name}:]"):
                return _EVERY & ~characters
        raise self._error("sets in sets are not known: `\\[` is the bracket")


def _bit(character: str) -> int:
    """The set of one character; none that is not ASCII occurs in a name."""
    return 1 << ord(character) if character.isascii() else 0


# The machine: a list of instructions, of which some number is to be obeyed at the same time. A set of them is a number with bits.


class _Take(NamedTuple):
    """Take one of these characters and go on behind."""

    characters: int


class _Test(NamedTuple):
    """Go on behind if this is such a place."""

    place: str


class _Jump(NamedTuple):
    """Go on at all of these."""

    targets: tuple[int, ...]


class _Place(NamedTuple):
    """What can be said of a place in a text."""

    first: bool
    last: bool
    edge: bool  # of a word


_HOLDS: Final[dict[str, Callable[[_Place], bool]]] = {
    "^": lambda place: place.first,
    "$": lambda place: place.last,
    "b": lambda place: place.edge,
    "B": lambda place: not place.edge,
}


class Pattern:
    """A compiled pattern."""

    def __init__(self, text: str) -> None:
        """Raises PatternError."""
        if len(text) > LONGEST:
            raise PatternError(f"the pattern is longer than {LONGEST} characters")
        self.text = text
        self._program: list[_Take | _Test | _Jump] = []
        self._visits = 0
        self._compile(_Parser(text).parse())
        self._end = 1 << len(self._program)
        self._takers = [each.characters if isinstance(each, _Take) else 0 for each in self._program]
        self._taking: dict[str, int] = {}
        self._reached: dict[tuple[int, _Place], int] = {}

    @property
    def size(self) -> int:
        """How many instructions the pattern is."""
        return len(self._program)

    def found_in(self, text: str) -> bool:
        """Tell whether the pattern matches anywhere in an ASCII text.

        Takes at most `size` steps for each character, and `size` times as many once.
        """
        entered = 0
        word_before = False
        for at in range(len(text) + 1):
            last = at == len(text)
            word = not last and bool(_WORD >> ord(text[at]) & 1)
            place = _Place(at == 0, last, word != word_before)
            word_before = word
            entered |= 1  # a match may begin anywhere
            waiting = 0
            while entered:
                lowest = entered & -entered
                waiting |= self._reach(lowest.bit_length() - 1, place)
                entered ^= lowest
            if waiting & self._end:
                return True
            if not last:
                entered = (waiting & self._who_takes(text[at])) << 1
        return False

    def _reach(self, start: int, place: _Place) -> int:
        """The instructions that wait for a character once `start` is entered at such a place, and the end if it comes to that."""
        known = self._reached.get((start, place))
        if known is not None:
            return known
        seen = waiting = 0
        todo = [start]
        while todo:
            at = todo.pop()
            if seen >> at & 1:
                continue
            seen |= 1 << at
            instruction = self._program[at] if at < len(self._program) else None
            if isinstance(instruction, _Jump):
                todo += instruction.targets
            elif isinstance(instruction, _Test):
                if _HOLDS[instruction.place](place):
                    todo.append(at + 1)
            else:
                waiting |= 1 << at
        self._reached[start, place] = waiting
        return waiting

    def _who_takes(self, character: str) -> int:
        found = self._taking.get(character)
        if found is None:
            code = ord(character)
            found = sum(1 << at for at, characters in enumerate(self._takers) if characters >> code & 1)
            self._taking[character] = found
        return found

    # From nodes to instructions

    def _emit(self, instruction: _Take | _Test | _Jump) -> int:
        if len(self._program) == LARGEST:
            raise PatternError(f"the pattern is too large: more than {LARGEST} characters and repetitions in all")
        self._program.append(instruction)
        return len(self._program) - 1

    def _compile(self, node: _Node) -> None:
        self._visits += 1
        if self._visits > 8 * LARGEST:  # `((){99}){99}` has no instruction to count
            raise PatternError("the pattern is too large")
        if isinstance(node, _One):
            self._emit(_Take(node.characters))
        elif isinstance(node, _At):
            self._emit(_Test(node.place))
        elif isinstance(node, _Row):
            for part in node.parts:
                self._compile(part)
        elif isinstance(node, _Either):
            self._compile_any(node)
        else:
            self._compile_times(node)

    def _compile_any(self, node: _Either) -> None:
        fork = self._emit(_Jump(()))
        starts, ends = [], []
        for part in node.parts:
            starts.append(len(self._program))
            self._compile(part)
            ends.append(self._emit(_Jump(())))
        self._program[fork] = _Jump(tuple(starts))
        for end in ends:
            self._program[end] = _Jump((len(self._program),))

    def _compile_times(self, node: _Times) -> None:
        for _ in range(node.low):
            self._compile(node.part)
        if node.high is None:
            fork = self._emit(_Jump(()))
            self._compile(node.part)
            self._emit(_Jump((fork,)))
            self._program[fork] = _Jump((fork + 1, len(self._program)))
            return
        forks = []
        for _ in range(node.high - node.low):
            forks.append(self._emit(_Jump(())))
            self._compile(node.part)
        for fork in forks:
            self._program[fork] = _Jump((fork + 1, len(self._program)))
