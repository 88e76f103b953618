"""Grammars for tests, and random texts that an automaton accepts."""

import math
import re

import numpy as np

REGEXES = (
    "abc",
    "a|b|",
    "(ab|a)(bc|c)?",
    "a*b+c?",
    "a{2}b{0,2}c{3,}",
    "(a{0,3}b){2,4}",
    "[a-c][^a-c]*",
    "[^\\d\\s][\\w-]*",
    "\\D\\S\\W",
    "[\\d.]+|[^\\D5]",
    "-?(0|[1-9][0-9]*)(\\.[0-9]+)?",
    "^(yes|no)$",
    "(^a|b)*c",
    "(a|b$)+",
    "\\x41\\u00e9\\t\\.\\[\\\\",
    "(?:a)(?P<name>b)(?<other>c)*?",
    "[à-ö]+|日本|[🙂-🙏]{1,2}",
    "[\\]\\-^a]+",
    ".{3}",
    "(((a?)*b)*c)*",
)
CHOICES = (("yes", "no", " maybe"), ("a", "ab", "abc", ""), ("é", "è", "日本語", "日本", "🙂🙃", "\n"), ("left", "right"))
NAMED = {"properties": {"é ": {"type": "boolean"}, 'quote"': {"type": "null"}, "c": {"type": "integer", "minimum": 7}}}
# In each, members come in this order, so that json.dumps spells its values as the grammar does.
SCHEMAS = {
    "null": {"type": "null"},
    "types": {"type": ["boolean", "null", "integer"], "title": "a note"},
    "bounds": {"type": "integer", "minimum": -17, "exclusiveMaximum": 1204},
    "multiples": {"type": "integer", "minimum": -100, "multipleOf": 7},
    "string": {"type": "string", "maxLength": 4},
    "long string": {"type": "string", "minLength": 3},
    "pattern": {"type": "string", "pattern": '^["\\\\\\n\\x01é🙂a-c]{2,5}$'},
    "search": {"type": "string", "pattern": "b[0-9]", "maxLength": 6},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "ipv4": {"type": "string", "format": "ipv4", "maxLength": 9},
    "uuid": {"type": "string", "format": "uuid"},
    "enum": {"enum": ["a", 'b"\n\u2028', 3, -1.5, None, True, ["x", {"y": 1}]]},
    "const": {"const": {"a": [1, "é"], "b": {}}},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"enum": [1, 2]}], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "closed tuple": {"type": "array", "prefixItems": [{"const": "x"}, {"type": "null"}, {"type": "boolean"}], "items": False, "minItems": 2},
    "object": {"type": "object", "additionalProperties": False, "required": ["c"]} | NAMED,
    "all optional": {"type": "object", "additionalProperties": False} | NAMED,
    "open object": {"type": "object", "properties": {"c": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
    "nothing": {"type": "object", "additionalProperties": False},
    "any of": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "null"}}, {"type": "array", "items": {"const": 1}}]},
    "one of": {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False}]},
    "all of": {"allOf": [{"type": "boolean"}]},
    "reference": {"type": "array", "items": {"$ref": "#/$defs/a~1b%25"}, "$defs": {"a/b%": {"enum": [1, "é"]}}},
    "number": {"type": "number"},
}


class Walker:
    """Random texts that an automaton accepts."""

    def __init__(self, automaton):
        self.table = automaton.table.tolist()
        self.accepting = automaton.accepting.tolist()
        self.ways = distances(automaton)
        self.bytes_of = [np.flatnonzero(automaton.classes == number).tolist() for number in range(automaton.table.shape[1])]

    def text(self, rng, length=12):
        """Some steps at random, then the shortest way to an end, as bytes."""
        state, text = 1, b""
        for _ in range(rng.randrange(length)):
            possible = [number for number, following in enumerate(self.table[state]) if following]
            if not possible or (self.accepting[state] and rng.random() < 0.1):
                break
            state, text = self.step(state, text, rng.choice(possible), rng)
        while self.ways[state]:
            number = min(range(len(self.table[state])), key=lambda number: self.ways[self.table[state][number]])
            state, text = self.step(state, text, number, rng)
        return text

    def step(self, state, text, number, rng):
        return self.table[state][number], text + bytes([rng.choice(self.bytes_of[number])])


def distances(automaton):
    """Of each state, the number of bytes to an end; infinite if there is none."""
    before = [[] for _ in automaton.table]
    for state, row in enumerate(automaton.table.tolist()):
        for following in set(row):
            before[following].append(state)
    ways = [math.inf] * len(before)
    todo = np.flatnonzero(automaton.accepting).tolist()
    number = 0
    while todo:
        for state in todo:
            ways[state] = min(ways[state], number)
        number += 1
        todo = [state for each in todo for state in before[each] if ways[state] > number]
    return ways


def for_python(pattern):
    """The pattern with the same meaning for Python's re: there $ is also before a line break at the end, and groups are named with P."""
    return re.sub(r"(?<!\\)\$", r"\\Z", pattern).replace("(?<", "(?P<")
