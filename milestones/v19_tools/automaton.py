"""Automata over bytes: what a regular expression or a schema describes, as a table that takes a step for each byte.

S states   C classes of bytes that no state tells apart

A description is a tree of the nodes below. `compile_node` makes a nondeterministic automaton of it, and of that a table.
Nothing here imports torch: a process of its own compiles.
"""
from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

DEAD, START = 0, 1  # states of every automaton; nothing leads out of DEAD
MOST_STATES = 20_000  # of a table
MOST_PARTS = 200_000  # states of a nondeterministic automaton
LAST_CODE = 0x10FFFF
SPECIAL = b"\xff"  # before the name of a special token
# The code points that UTF-8 encodes in one, two, three and four bytes; surrogates are no characters.
UTF8_RANGES = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, LAST_CODE))


class TooLarge(ValueError):
    """An automaton with more states than are allowed."""


class Chars(NamedTuple):
    """One character of these ranges of code points, both ends included."""

    ranges: tuple[tuple[int, int], ...]


class Text(NamedTuple):
    """Exactly this text."""

    text: str


class Special(NamedTuple):
    """A special token, by its name. Texts cannot spell it: it begins with a byte that UTF-8 does not have."""

    name: str


class Then(NamedTuple):
    """One part after another."""

    parts: tuple


class Either(NamedTuple):
    """One of the parts."""

    parts: tuple


class Repeat(NamedTuple):
    """A part, at least low times and at most high times; high None: any number of times."""

    part: object
    low: int = 0
    high: int | None = None


class Joined(NamedTuple):
    """A part, at least once, with a separator between each two."""

    part: object
    separator: object


class Begin(NamedTuple):
    """Nothing, where no byte has been read yet."""


class End(NamedTuple):
    """Nothing, where no byte follows."""


class Members(NamedTuple):
    """Parts in this order, of which those that are not required may be missing, with a separator between those that are there."""

    parts: tuple
    required: tuple[bool, ...]
    separator: str


class Automaton(NamedTuple):
    """A deterministic automaton, which is a node too. DEAD is the only state from which no accepting state can be reached.

    >>> automaton = compile_node(Then((Text("a"), Repeat(Text("b")))))
    >>> automaton.accepts(b"abb"), automaton.accepts(b"ba")
    (True, False)
    """

    table: np.ndarray  # [S, C] int32: the next state
    classes: np.ndarray  # [256] uint8: the class of each byte
    accepting: np.ndarray  # [S] bool

    def walk(self, state: int, text: bytes) -> int:
        """The state after these bytes."""
        for byte in text:
            state = self.table[state, self.classes[byte]]
        return int(state)

    def accepts(self, text: bytes) -> bool:
        return bool(self.accepting[self.walk(START, text)])

    @property
    def is_empty(self) -> bool:
        """Whether it accepts nothing at all."""
        return not self.accepting.any()

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.classes.nbytes + self.accepting.nbytes


# What a node becomes: the state in which it begins, and the one in which it ends.
Piece = tuple[int, int]


class Builder:
    """A nondeterministic automaton. A state has edges that read a byte, and links that read nothing."""

    def __init__(self):
        self.edges: list[list[tuple[int, int, int]]] = []  # of each state: first byte, last byte, next state
        self.links: list[list[int]] = []
        self.begin_links: list[list[int]] = []  # followed only before the first byte
        self.end_links: list[list[int]] = []  # followed only after the last byte

    def state(self) -> int:
        if len(self.edges) == MOST_PARTS:
            raise TooLarge(f"it has more than {MOST_PARTS} parts")
        for each in (self.edges, self.links, self.begin_links, self.end_links):
            each.append([])
        return len(self.edges) - 1

    def build(self, node) -> Piece:
        """Add a node."""
        match node:
            case Chars(ranges):
                return self.chars(ranges)
            case Text(text):
                return self.text(text.encode())
            case Special(name):
                return self.text(SPECIAL + name.encode())
            case Then(parts):
                return self.join([self.build(part) for part in parts])
            case Either(parts):
                begin, end = self.state(), self.state()
                for part in parts:
                    first, last = self.build(part)
                    self.links[begin].append(first)
                    self.links[last].append(end)
                return begin, end
            case Repeat(part, low, high):
                return self.repeat(part, low, high)
            case Joined(part, separator):
                first, last = self.build(part)
                begin, end = self.build(separator)
                self.links[last].append(begin)
                self.links[end].append(first)
                return first, last
            case Begin():
                begin, end = self.state(), self.state()
                self.begin_links[begin].append(end)
                return begin, end
            case End():
                begin, end = self.state(), self.state()
                self.end_links[begin].append(end)
                return begin, end
            case Members():
                return self.members(node)
            case Automaton():
                return self.embed(node)

    def join(self, pieces: list[Piece]) -> Piece:
        begin = end = self.state()
        for first, last in pieces:
            self.links[end].append(first)
            end = last
        return begin, end

    def text(self, text: bytes) -> Piece:
        begin = end = self.state()
        for byte in text:
            following = self.state()
            self.edges[end].append((byte, byte, following))
            end = following
        return begin, end

    def chars(self, ranges: tuple[tuple[int, int], ...]) -> Piece:
        begin, end = self.state(), self.state()
        # Characters that end alike share the states of their ends.
        states: dict[tuple, int] = {(): end}
        for low, high in ranges:
            for byte_ranges in map(tuple, utf8_ranges(low, high)):
                for rest in (byte_ranges[at:] for at in range(len(byte_ranges) - 1, 0, -1)):
                    if rest not in states:
                        states[rest] = self.state()
                        self.edges[states[rest]].append((*rest[0], states[rest[1:]]))
                self.edges[begin].append((*byte_ranges[0], states[byte_ranges[1:]]))
        return begin, end

    def repeat(self, part, low: int, high: int | None) -> Piece:
        begin = end = self.state()
        for _ in range(low):
            first, last = self.build(part)
            self.links[end].append(first)
            end = last
        if high is None:
            first, last = self.build(part)
            hub = self.state()
            self.links[end].append(hub)
            self.links[hub].append(first)
            self.links[last].append(hub)
            return begin, hub
        final = self.state()
        for _ in range(high - low):
            self.links[end].append(final)
            first, last = self.build(part)
            self.links[end].append(first)
            end = last
        self.links[end].append(final)
        return begin, final

    def members(self, node: Members) -> Piece:
        # Two states before each part: nothing is written yet, or something is, so that a separator must come first.
        begin = bare = self.state()
        some = self.state()
        for part, required in zip(node.parts, node.required, strict=True):
            first, last = self.build(part)
            self.links[bare].append(first)
            comma, after = self.text(node.separator.encode())
            self.links[some].append(comma)
            self.links[after].append(first)
            if required:
                bare, some = self.state(), last
            else:
                next_bare, next_some = self.state(), self.state()
                self.links[bare].append(next_bare)
                self.links[some].append(next_some)
                self.links[last].append(next_some)
                bare, some = next_bare, next_some
        end = self.state()
        self.links[bare].append(end)
        self.links[some].append(end)
        return begin, end

    def embed(self, automaton: Automaton) -> Piece:
        states = [self.state() for _ in automaton.table]
        end = self.state()
        bounds = [0, *(np.flatnonzero(np.diff(automaton.classes)) + 1).tolist(), 256]
        for state, row in enumerate(automaton.table.tolist()):
            for low, high in zip(bounds, bounds[1:]):
                if following := row[automaton.classes[low]]:
                    self.edges[states[state]].append((low, high - 1, states[following]))
            if automaton.accepting[state]:
                self.links[states[state]].append(end)
        return states[START], end

    def closure(self, states: set[int], *more: list[list[int]]) -> frozenset[int]:
        """These states and all that links lead to."""
        found, todo = set(states), list(states)
        while todo:
            state = todo.pop()
            for links in (self.links, *more):
                for following in links[state]:
                    if following not in found:
                        found.add(following)
                        todo.append(following)
        return frozenset(found)

    def determinize(self, piece: Piece) -> Automaton:
        """The table whose states are sets of this automaton's states."""
        begin, end = piece
        cuts = sorted({0, *(cut for edges in self.edges for low, high, _ in edges for cut in (low, high + 1) if cut < 256)})
        initial = self.closure({begin}, self.begin_links)
        numbers = {frozenset(): DEAD, initial: START}
        todo, rows = deque([initial]), [[DEAD] * len(cuts)]
        accepting = [False]
        closures: dict[int, frozenset[int]] = {}
        while todo:
            states = todo.popleft()
            more = (self.begin_links, self.end_links) if states is initial else (self.end_links,)
            accepting.append(end in self.closure(states, *more))
            reached: list[set[int]] = [set() for _ in cuts]
            for state in states:
                for low, high, following in self.edges[state]:
                    if following not in closures:
                        closures[following] = self.closure({following})
                    for index in range(bisect_right(cuts, low) - 1, bisect_right(cuts, high)):
                        reached[index] |= closures[following]
            row = []
            for each in map(frozenset, reached):
                if each not in numbers:
                    if len(numbers) == MOST_STATES:
                        raise TooLarge(f"it has more than {MOST_STATES} states")
                    numbers[each] = len(numbers)
                    todo.append(each)
                row.append(numbers[each])
            rows.append(row)
        classes = np.searchsorted(cuts, np.arange(256), side="right") - 1
        return trim(np.array(rows, np.int32), classes.astype(np.uint8), np.array(accepting))


def compile_node(node) -> Automaton:
    """The automaton of a tree of nodes. TooLarge if it has too many states."""
    builder = Builder()
    return builder.determinize(builder.build(node))


def trim(table: np.ndarray, classes: np.ndarray, accepting: np.ndarray) -> Automaton:
    """Make DEAD of every state from which no accepting state can be reached, and renumber the others."""
    sources, columns = table.nonzero()
    targets = table[sources, columns]
    order = targets.argsort()
    sources, starts = sources[order], np.searchsorted(targets[order], np.arange(len(table) + 1))
    alive = accepting.copy()
    todo = np.flatnonzero(alive).tolist()
    while todo:
        state = todo.pop()
        for before in np.unique(sources[starts[state] : starts[state + 1]]).tolist():
            if not alive[before]:
                alive[before] = True
                todo.append(before)
    alive[DEAD], alive[START] = False, True
    numbers = np.where(alive, np.cumsum(alive), DEAD)
    kept = np.concatenate([[DEAD], np.flatnonzero(alive)])
    # Classes that no state tells apart any more become one.
    columns, merged = np.unique(numbers[table[kept]].astype(np.int32), axis=1, return_inverse=True)
    return Automaton(np.ascontiguousarray(columns), merged.reshape(-1)[classes].astype(np.uint8), accepting[kept])


def combine(left: Automaton, right: Automaton, accept: Callable[[bool, bool], bool]) -> Automaton:
    """The automaton that reads with both, and accepts what `accept` says of the two."""
    pairs, merged = np.unique(np.stack([left.classes, right.classes]), axis=1, return_inverse=True)
    numbers, todo = {(DEAD, DEAD): DEAD, (START, START): START}, deque([(START, START)])
    rows, accepting = [[DEAD] * pairs.shape[1]], [accept(False, False)]
    left_rows, right_rows = left.table[:, pairs[0]].tolist(), right.table[:, pairs[1]].tolist()
    while todo:
        one, other = todo.popleft()
        accepting.append(accept(bool(left.accepting[one]), bool(right.accepting[other])))
        row = []
        for pair in zip(left_rows[one], right_rows[other]):
            if pair not in numbers:
                if len(numbers) == MOST_STATES:
                    raise TooLarge(f"it has more than {MOST_STATES} states")
                numbers[pair] = len(numbers)
                todo.append(pair)
            row.append(numbers[pair])
        rows.append(row)
    return trim(np.array(rows, np.int32), merged.reshape(-1).astype(np.uint8), np.array(accepting))


def both(left: Automaton, right: Automaton) -> Automaton:
    """What both accept."""
    return combine(left, right, lambda one, other: one and other)


def without(left: Automaton, right: Automaton) -> Automaton:
    """What left accepts and right does not."""
    return combine(left, right, lambda one, other: one and not other)


def utf8_ranges(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """The encodings of the characters from low to high, as sequences of ranges of bytes.

    >>> list(utf8_ranges(0x7F, 0x80))
    [[(127, 127)], [(194, 194), (128, 128)]]
    """
    for first, last in UTF8_RANGES:
        if max(low, first) <= min(high, last):
            yield from split_range(chr(max(low, first)).encode(), chr(min(high, last)).encode())


def split_range(low: bytes, high: bytes) -> Iterator[list[tuple[int, int]]]:
    """The byte strings between two of equal length, as sequences of ranges; continuation bytes are 0x80 to 0xBF."""
    if len(low) == 1:
        yield [(low[0], high[0])]
        return
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    first, last = low[0], high[0]
    if first == last:
        for rest in split_range(low[1:], high[1:]):
            yield [(first, first), *rest]
        return
    if low[1:] != least:
        for rest in split_range(low[1:], most):
            yield [(first, first), *rest]
        first += 1
    full = last if high[1:] == most else last - 1
    if first <= full:
        yield [(first, full), *[(0x80, 0xBF)] * (len(low) - 1)]
    if full < last:
        for rest in split_range(least, high[1:]):
            yield [(last, last), *rest]
