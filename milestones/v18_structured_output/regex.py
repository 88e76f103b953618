"""Regular expressions as nodes of an automaton.

What Python's `re` and ECMAScript both have and mean alike, or refused: no backreferences, no look-around, no flags.
"""
import re
from collections.abc import Iterable
from functools import cache

from .automaton import LAST_CODE, Begin, Chars, Either, End, Repeat, Then
from .params import RequestError

MOST_REPEATS = 10_000
MOST_DEPTH = 100
Ranges = tuple[tuple[int, int], ...]

# Where the two dialects differ, a class holds what is in it for both, and a negated class what is in it for neither.
NARROW = {"d": "0-9", "w": "a-zA-Z0-9_", "s": " \t\n\r\f\v"}
NEWLINES = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
ESCAPES = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}


def merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points in ascending ranges that do not touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def invert(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """All other code points.

    >>> invert([(0, 64), (66, 0x10FFFF)])
    ((65, 65),)
    """
    inverted, next_low = [], 0
    for low, high in merge(ranges):
        if next_low < low:
            inverted.append((next_low, low - 1))
        next_low = high + 1
    return (*inverted, (next_low, LAST_CODE)) if next_low <= LAST_CODE else tuple(inverted)


@cache
def narrow(letter: str) -> Ranges:
    """The characters of \\d, \\w or \\s in both dialects."""
    spec, ranges = NARROW[letter], []
    while spec:
        size = 3 if spec[1:2] == "-" else 1
        ranges.append((ord(spec[0]), ord(spec[size - 1])))
        spec = spec[size:]
    return merge(ranges)


@cache
def wide(letter: str) -> Ranges:
    """The characters of \\d, \\w or \\s in either dialect."""
    found = re.compile(f"\\{letter}+").finditer("".join(map(chr, range(LAST_CODE + 1))))
    more = [(0xFEFF, 0xFEFF)] if letter == "s" else []
    return merge([(match.start(), match.end() - 1) for match in found] + more)


@cache
def both_ways(letter: str) -> tuple[Ranges, Ranges]:
    """What \\d, \\w, \\s or their opposites \\D, \\W, \\S stand for, by `narrow` and by `wide`."""
    ways = narrow(letter.lower()), wide(letter.lower())
    return tuple(map(invert, ways)) if letter.isupper() else ways


class Parser:
    """Reads one pattern."""

    def __init__(self, pattern: str, param: str):
        self.pattern = pattern
        self.param = param
        self.at = 0
        self.depth = 0
        self.names: set[str] = set()

    def refuse(self, what: str, at: int | None = None) -> RequestError:
        place = self.at if at is None else at
        return RequestError(f"{self.param}: {what} at character {place} of {self.pattern[:200]!r}", self.param)

    @property
    def next(self) -> str:
        """The next character; "" at the end."""
        return self.pattern[self.at : self.at + 1]

    def take(self, text: str) -> bool:
        """Go past this text if it comes next."""
        if self.pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def parse(self):
        node = self.alternatives()
        if self.next:
            raise self.refuse("there is an unmatched )")
        return node

    def alternatives(self):
        parts = [self.sequence()]
        while self.take("|"):
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def sequence(self):
        parts = []
        while self.next and self.next not in "|)":
            parts.append(self.quantified())
        return parts[0] if len(parts) == 1 else Then(tuple(parts))

    def quantified(self):
        start = self.at
        node = self.atom()
        bounds = self.quantifier()
        if bounds is None:
            return node
        if isinstance(node, (Begin, End)):
            raise self.refuse("an anchor cannot be repeated", start)
        low, high = bounds
        if high is not None and low > high:
            raise self.refuse(f"{{{low},{high}}} has its bounds in the wrong order", start)
        if max(low, high or 0) > MOST_REPEATS:
            raise self.refuse(f"a part is repeated more than {MOST_REPEATS} times", start)
        # Lazy or not, the same texts match.
        self.take("?")
        if self.next and (self.next in "*+?" or self.quantifier()):
            raise self.refuse("two quantifiers follow each other")
        return Repeat(node, low, high)

    def quantifier(self) -> tuple[int, int | None] | None:
        """The bounds that a quantifier gives, if one comes next."""
        for text, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(text):
                return bounds
        if match := re.compile(r"\{([0-9]+)(,?)([0-9]*)\}").match(self.pattern, self.at):
            if len(match[1] + match[3]) > 12:
                raise self.refuse(f"a part is repeated more than {MOST_REPEATS} times")
            self.at = match.end()
            low = int(match[1])
            return low, int(match[3]) if match[3] else None if match[2] else low
        if self.pattern.startswith("{,", self.at):
            raise self.refuse("{, means a literal in one dialect and a quantifier in another; write {0,n} or \\{")
        return None

    def atom(self):
        start, character = self.at, self.next
        self.at += 1
        match character:
            case "(":
                return self.group(start)
            case "[":
                return Chars(self.char_class(start))
            case ".":
                return Chars(invert(NEWLINES))
            case "^":
                return Begin()
            case "$":
                return End()
            case "\\":
                return Chars(self.escape(start))
            case "*" | "+" | "?":
                raise self.refuse("there is nothing to repeat", start)
            case "{" if re.compile(r"[0-9]+,?[0-9]*\}").match(self.pattern, self.at):
                raise self.refuse("there is nothing to repeat", start)
        if "\ud800" <= character <= "\udfff":
            raise self.refuse("there is half a surrogate pair", start)
        return Chars(((ord(character), ord(character)),))

    def group(self, start: int):
        if self.take("?"):
            if named := re.compile(r"P?<[A-Za-z_][A-Za-z0-9_]*>").match(self.pattern, self.at):
                self.at = named.end()
                if named[0].lstrip("P") in self.names:
                    raise self.refuse("two groups have the same name", start)
                self.names.add(named[0].lstrip("P"))
            elif not self.take(":"):
                raise self.refuse("look-around, flags and conditions are not supported: (?", start)
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self.refuse(f"groups are nested more than {MOST_DEPTH} deep", start)
        node = self.alternatives()
        self.depth -= 1
        if not self.take(")"):
            raise self.refuse("this ( is not closed", start)
        return node

    def escape(self, start: int, in_class: bool = False) -> Ranges:
        """What the characters after a backslash stand for."""
        letter = self.next
        self.at += 1
        if letter and letter.lower() in NARROW:
            return both_ways(letter)[letter.isupper()]
        if letter in ESCAPES:
            code = ESCAPES[letter]
        elif letter == "b" and in_class:
            code = 8
        elif letter == "0" and not self.next.isdigit():
            code = 0
        elif letter in ("x", "u"):
            code = self.hexadecimal(2 if letter == "x" else 4, start)
            if 0xD800 <= code < 0xDC00 and letter == "u" and self.take("\\u"):
                low = self.hexadecimal(4, start)
                if not 0xDC00 <= low < 0xE000:
                    raise self.refuse("there is half a surrogate pair", start)
                code = 0x10000 + (code - 0xD800 << 10) + (low - 0xDC00)
            if 0xD800 <= code < 0xE000:
                raise self.refuse("there is half a surrogate pair", start)
        elif letter and not letter.isalnum():
            code = ord(letter)
        else:
            raise self.refuse(f"\\{letter} is not supported", start)
        return ((code, code),)

    def hexadecimal(self, size: int, start: int) -> int:
        digits = self.pattern[self.at : self.at + size]
        if not re.fullmatch(f"[0-9a-fA-F]{{{size}}}", digits):
            raise self.refuse(f"a character's code needs {size} hexadecimal digits", start)
        self.at += size
        return int(digits, 16)

    def char_class(self, start: int) -> Ranges:
        negated = self.take("^")
        if self.next == "]":
            raise self.refuse("a class cannot begin with ]; write \\]", start)
        # A character is in the class if it is, whichever way its letters are read. Both are needed: [\s\S] is everything.
        ways: tuple[list, list] = [], []
        while not self.take("]"):
            low, wide_low = self.class_atom(start)
            if self.next == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high, _ = self.class_atom(start)
                is_pair = len(low) == len(high) == 1 and low[0][0] == low[0][1] and high[0][0] == high[0][1]
                if not is_pair or low[0][0] > high[0][0]:
                    raise self.refuse("a class has a range without two ends in order", start)
                low = wide_low = ((low[0][0], high[0][0]),)
            ways[0].extend(low)
            ways[1].extend(wide_low)
        if negated:
            return invert((*ways[0], *ways[1]))
        return invert((*invert(ways[0]), *invert(ways[1])))

    def class_atom(self, start: int) -> tuple[Ranges, Ranges]:
        """What a class has here, with letters read narrowly and widely."""
        at, character = self.at, self.next
        if not character:
            raise self.refuse("this [ is not closed", start)
        self.at += 1
        if character == "\\":
            letter = self.next
            if letter and letter.lower() in NARROW:
                self.at += 1
                return both_ways(letter)
            return (self.escape(at, in_class=True),) * 2
        if "\ud800" <= character <= "\udfff":
            raise self.refuse("there is half a surrogate pair", at)
        if self.pattern[at : at + 2] in ("--", "&&", "||", "~~", "[:"):
            raise self.refuse(f"{self.pattern[at : at + 2]} in a class means other things elsewhere; escape it with \\", at)
        return (((ord(character), ord(character)),),) * 2


def parse_regex(pattern: str, param: str = "regex"):
    """The node of a pattern. RequestError where it has what is not supported, or is no pattern.

    >>> from .automaton import compile_node
    >>> number = compile_node(parse_regex("[1-9][0-9]*|0"))
    >>> number.accepts(b"120"), number.accepts(b"012")
    (True, False)
    """
    return Parser(pattern, param).parse()


def searching(node):
    """A node for texts in which the pattern occurs anywhere, as a schema's `pattern` means it."""
    anything = Repeat(Chars(((0, LAST_CODE),)))
    return Then((anything, node, anything))
