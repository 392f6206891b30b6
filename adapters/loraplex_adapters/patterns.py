"""Matching the module patterns of peft's rank_pattern and alpha_pattern in bounded time.

peft runs these keys as regular expressions, and an adapter's author chooses them. Here a small subset is matched by
an automaton over bit sets instead, so that no pattern can take long: literals, ``.``, escapes, ``\\d``, ``\\w``, character
classes, ``* + ?`` on one character, groups of alternatives, ``^`` at the start and ``$`` at the end.
"""

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex_adapters.errors import UnsupportedAdapter

MAX_PATTERNS = 1024
MAX_PATTERN_CHARS = 256
MAX_QUANTIFIERS = 8
MAX_AUTOMATA = 64

_CLASSES = {"d": frozenset(string.digits), "w": frozenset(string.ascii_letters + string.digits + "_")}
_LITERAL = frozenset(string.ascii_letters + string.digits + "_-/: ")
_FIXED = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+\$?")

Charset = frozenset[str] | None  # None matches any character


@dataclass(frozen=True)
class _Atom:
    chars: Charset
    quantifier: str = ""  # "", "?" or "*"; "x+" is spelled "x" then "x*"


@dataclass(frozen=True)
class _Fixed:
    """A pattern without quantifiers, classes or groups: one string in which some dots match any character."""

    text: str
    wild: frozenset[int]
    anchored: bool

    def matches(self, path: str) -> bool:
        start = len(path) - len(self.text)
        if start < 0 or (start > 0 and (self.anchored or path[start - 1] != ".")):
            return False
        if path.endswith(self.text):
            return True
        return bool(self.wild) and all(i in self.wild or char == path[start + i] for i, char in enumerate(self.text))


class _Automaton:
    """One alternative-free sequence of atoms, stepped over a whole path with all its states in one integer."""

    def __init__(self, atoms: list[_Atom], anchored: bool) -> None:
        self.anchored = anchored
        self.accept = 1 << len(atoms)
        self.any = sum(1 << i for i, atom in enumerate(atoms) if atom.chars is None)
        self.by_char: dict[str, int] = {}
        for i, atom in enumerate(atoms):
            for char in atom.chars or ():
                self.by_char[char] = self.by_char.get(char, 0) | 1 << i
        self.star = sum(1 << i for i, atom in enumerate(atoms) if atom.quantifier == "*")
        self.skippable = sum(1 << i for i, atom in enumerate(atoms) if atom.quantifier)

    def _close(self, states: int) -> int:
        while (more := states | (states & self.skippable) << 1) != states:
            states = more
        return states

    def matches(self, path: str) -> bool:
        states, previous = 0, "."
        for position, char in enumerate(path):
            if previous == "." and (position == 0 or not self.anchored):
                states |= 1  # a match may start at the path's start or after any dot
            states = self._close(states)
            hit = states & (self.any | self.by_char.get(char, 0))
            states = hit << 1 | hit & self.star
            previous = char
        return bool(self._close(states) & self.accept)


class ModulePatterns:
    """An ordered set of patterns; ``first`` answers as peft's own lookup does: the first pattern that matches wins.

    Raises: UnsupportedAdapter (``pattern_unsupported``) for a pattern outside the subset above or beyond its limits.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._matchers: list[tuple[str, list[_Fixed] | list[_Automaton]]] = []
        num_automata = 0
        for pattern in patterns:
            if len(self._matchers) >= MAX_PATTERNS:
                raise _unsupported(pattern, f"there are more than {MAX_PATTERNS} patterns")
            if len(pattern) > MAX_PATTERN_CHARS:
                raise _unsupported(pattern, f"it is longer than {MAX_PATTERN_CHARS} characters")
            if _FIXED.fullmatch(pattern):
                self._matchers.append((pattern, [_fixed(pattern)]))
                continue
            automata = [_automaton(pattern, atoms) for atoms in _Parser(pattern).alternatives()]
            num_automata += len(automata)
            if num_automata > MAX_AUTOMATA:
                raise _unsupported(pattern, f"the patterns spell out more than {MAX_AUTOMATA} alternatives")
            self._matchers.append((pattern, automata))

    def first(self, path: str) -> str | None:
        """The first pattern that matches ``path`` or a dotted suffix of it, or None."""
        return next((pattern for pattern, any_of in self._matchers if any(m.matches(path) for m in any_of)), None)


def _unsupported(pattern: str, why: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"The module pattern {pattern[:80]!r} in adapter_config.json cannot be matched safely: {why}. "
        "Write module names such as 'q_proj' or 'model.layers.0.self_attn.q_proj' instead.",
        code="pattern_unsupported",
    )


def _fixed(pattern: str) -> _Fixed:
    body = pattern.removeprefix("^").removesuffix("$")
    text = body.replace("\\.", "\0")
    wild = frozenset(i for i, char in enumerate(text) if char == ".")
    return _Fixed(text.replace("\0", "."), wild, pattern.startswith("^"))


_START = _Atom(frozenset("^"), "start")
_END = _Atom(frozenset("$"), "end")


def _automaton(pattern: str, atoms: list[_Atom]) -> _Automaton:
    anchored = bool(atoms) and atoms[0] is _START
    atoms = atoms[1:] if anchored else atoms
    atoms = atoms[:-1] if atoms and atoms[-1] is _END else atoms
    if any(atom in (_START, _END) for atom in atoms):
        raise _unsupported(pattern, "'^' and '$' may stand only at its start and end")
    if sum(bool(atom.quantifier) for atom in atoms) > MAX_QUANTIFIERS:
        raise _unsupported(pattern, f"it has more than {MAX_QUANTIFIERS} quantifiers")
    return _Automaton(atoms, anchored)


class _Parser:
    """Recursive descent over one pattern; groups are spelled out into their alternatives."""

    MAX_DEPTH = 4

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.depth = 0

    def alternatives(self) -> list[list[_Atom]]:
        found = self._either()
        if self.at != len(self.pattern):
            raise _unsupported(self.pattern, f"unexpected {self.pattern[self.at]!r}")
        return found

    def _peek(self) -> str:
        return self.pattern[self.at] if self.at < len(self.pattern) else ""

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise _unsupported(self.pattern, "it ends too early")
        self.at += 1
        return char

    def _either(self) -> list[list[_Atom]]:
        found = self._sequence()
        while self._peek() == "|":
            self.at += 1
            found += self._sequence()
        return found

    def _sequence(self) -> list[list[_Atom]]:
        found: list[list[_Atom]] = [[]]
        while self._peek() not in ("", "|", ")"):
            items = self._group() if self._peek() == "(" else [self._atom()]
            found = [left + right for left in found for right in items]
            if len(found) > MAX_AUTOMATA:
                raise _unsupported(self.pattern, f"it spells out more than {MAX_AUTOMATA} alternatives")
        return found

    def _group(self) -> list[list[_Atom]]:
        self.depth += 1
        if self.depth > self.MAX_DEPTH:
            raise _unsupported(self.pattern, f"its groups nest deeper than {self.MAX_DEPTH}")
        self.at += 3 if self.pattern.startswith("(?:", self.at) else 1
        found = self._either()
        if self._next() != ")":
            raise _unsupported(self.pattern, "a group is not closed")
        self.depth -= 1
        if self._peek() in ("*", "+", "?", "{"):
            raise _unsupported(self.pattern, "a group is repeated")
        return found

    def _atom(self) -> list[_Atom]:
        char = self._next()
        if char in "^$":
            return [_START if char == "^" else _END]
        chars = self._charset(char)
        quantifier = self._peek()
        if quantifier == "{":
            raise _unsupported(self.pattern, "it counts repetitions")
        if quantifier == "" or quantifier not in "*+?":
            return [_Atom(chars)]
        self.at += 1
        if self._peek() == "?":  # lazy or greedy, the same paths match
            self.at += 1
        if self._peek() in ("*", "+", "?", "{"):
            raise _unsupported(self.pattern, "it repeats a repetition")
        return [_Atom(chars), _Atom(chars, "*")] if quantifier == "+" else [_Atom(chars, quantifier)]

    def _charset(self, char: str) -> Charset:
        if char == ".":
            return None
        if char == "\\":
            return self._escaped()
        if char == "[":
            return self._class()
        if char not in _LITERAL:
            raise _unsupported(self.pattern, f"{char!r} is not supported")
        return frozenset(char)

    def _escaped(self) -> frozenset[str]:
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum():
            raise _unsupported(self.pattern, f"'\\{char}' is not supported")
        return frozenset(char)

    def _class(self) -> frozenset[str]:
        found: set[str] = set()
        while (char := self._next()) != "]":
            if char == "\\":
                found |= self._escaped()
            elif char not in _LITERAL and char != ".":
                raise _unsupported(self.pattern, f"{char!r} in a character class is not supported")
            elif self._peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                found |= {chr(code) for code in range(ord(char), ord(self._next()) + 1) if code < 128}
            else:
                found.add(char)
        return frozenset(found)
