"""Grammars that no automaton can follow, such as recursive ones, by the library llguidance.

It computes each mask anew, by a parser that walks a tree of the vocabulary. What it would not obey exactly is refused first.
"""
import json
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .automaton import Begin, Chars, Either, End, Repeat, Then
from .json_schema import COLON, COMMA, FORMATS, check_schema, parts_of
from .params import RequestError
from .regex import parse_regex

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# The library reads the numbers of a schema as floating-point numbers, which are exact up to here.
LARGEST = 2**53
# Where any property may come next, it has about four possibilities for each. Its own limit is 2,000, beyond which it gives up in the middle of a text.
# To walk many takes seconds per token, so only a list of properties that needs more gets more.
MOST_PROPERTIES, MOST_POSSIBILITIES = 2_000, 2_000
# Formats of strings that it obeys. The others that are supported are given to it as patterns.
OTHER_FORMATS = ("duration", "email", "hostname", "ipv6", "uri")
# It spells a name that is in no property's list in any way, so that "\\u0061" could give the property "a" a value that
# its schema forbids. No escape may stand for a character that needs none.
ESCAPES = '([^\\\\]|\\\\(["\\\\bfnrt]|u00([01][0-9a-fA-F]|7[fF])))*'
SPELLING = {"whitespace_flexible": False, "item_separator": COMMA, "key_separator": COLON}


class Guidance:
    """The library, with a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: tuple[int, ...], drops_first_space: bool):
        """ValueError if the library is not installed or cannot read this tokenizer."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ValueError("this needs the package llguidance, which is not installed; pip install llguidance") from None
        self.vocab_size = vocab_size
        # A tokenizer may have tokens for which the model has no logits.
        self.num_ids = max(vocab_size, *(token_id + 1 for token_id in tokenizer.get_vocab().values()))
        self.last_byte = 0xFF >> -vocab_size % 8  # of a mask: the bits of tokens
        try:
            self.tokenizer = from_tokenizer(tokenizer, n_vocab=self.num_ids, eos_token=list(end_ids) or None)
        except Exception as error:
            raise ValueError(f"llguidance cannot read this tokenizer: {error}") from None
        self.first_mask = None  # of a new text's first token, if its text will lack a space: it must not begin with one
        if drops_first_space:
            is_plain = [not self.tokenizer.decode_bytes([token_id]).startswith(b" ") for token_id in range(vocab_size)]
            self.first_mask = np.packbits(is_plain, bitorder="little")

    def text(self, kind: str, source) -> str:
        """A grammar in the library's form. RequestError if it would not obey all of it."""
        from llguidance import LLMatcher

        match kind:
            case "grammar":
                return LLMatcher.grammar_from_lark(source)
            case "regex":
                return LLMatcher.grammar_from_regex(render(parse_regex(source)))
            case "choice":
                return LLMatcher.grammar_from_regex(render(Either(tuple(map(literal, source)))))
            case "json_object":
                return schema_grammar({"type": "object"})
            case "json_schema":
                return schema_grammar(exactly(json.loads(source)))

    def compile(self, text: str, param: str, num_properties: int) -> "GuidanceGrammar":
        """Compile a grammar in the library's form, whose longest list of properties is so long. RequestError, for this parameter, if it refuses it."""
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self.tokenizer, text, limits=LLParserLimits(max_items_in_row=max(MOST_POSSIBILITIES, 5 * num_properties)))
        if matcher.is_error():
            raise RequestError(f"{param} is refused: {brief(matcher.get_error())}", param)
        grammar = GuidanceGrammar(matcher, self)
        start = grammar.start(is_new_text=False)
        if not start.mask().any():
            if start.matcher.is_error():
                raise RequestError(f"{param} is refused: {brief(start.matcher.get_error())}", param)
            raise RequestError(f"{param} matches no text, or contains itself without an end", param)
        return grammar


def brief(error: str) -> str:
    """The first line of the library's message."""
    return next((line.strip() for line in error.splitlines() if line.strip()), "without a reason")[:500]


def schema_grammar(schema: dict | bool) -> str:
    """The library's grammar of a schema, with JSON spelled as our automata spell it."""
    return json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": SPELLING} if isinstance(schema, dict) else schema}]})


def exactly(schema: dict | bool) -> dict | bool:
    """The schema with patterns that mean the same to the library; RequestError for what it would not obey exactly."""
    check_schema(schema)
    todo, all_bounds, is_joined = [(schema, "")], [], False
    while todo:
        each, path = todo.pop()
        if isinstance(each, bool):
            continue
        where = path or "the schema"
        bounds = {keyword: each[keyword] for keyword in BOUNDS if keyword in each and each.get("type") != "integer"}
        all_bounds.append(list(bounds.items()))
        # Then a number may have to keep the bounds of several parts.
        is_joined = is_joined or "allOf" in each or len({"$ref", "anyOf", "oneOf"} & set(each)) + bool(bounds) > 1
        each.pop("$schema", None)  # It would read the schema by this draft's rules, and our automaton does not.
        for keyword in (*BOUNDS, "multipleOf", "const", "enum"):
            if any(abs(number) > LARGEST for number in numbers_in(each.get(keyword))):
                raise RequestError(f"json_schema: {where}: {keyword} has a number beyond {LARGEST}, which is not supported here", "json_schema")
        # It spells these in names in several ways, all of which are needed elsewhere.
        if any(code < 32 or code == 127 for name in each.get("properties", ()) for code in map(ord, name)):
            raise RequestError(f"json_schema: {where}: a property's name with a control character is not supported here", "json_schema")
        num_properties = len(each.get("properties", ()))
        if num_properties > MOST_PROPERTIES:
            message = f"json_schema: {where}: properties has {num_properties} entries, but at most {MOST_PROPERTIES} are supported; make some of them an object of their own"
            raise RequestError(message, "json_schema")
        # It may write a name twice, of which the second counts.
        if each.get("minProperties", 0) > 1:
            raise RequestError(f"json_schema: {where}: minProperties above 1 is not supported; list the names in required", "json_schema")
        name = each.get("format")
        if name in FORMATS:
            # The library has other ideas of some of these.
            if "pattern" in each:
                raise RequestError(f"json_schema: {where}: format beside pattern is not supported; leave one out", "json_schema")
            each["pattern"] = f"^({FORMATS[each.pop('format')]})$"
        elif name not in (None, *OTHER_FORMATS):
            supported = ", ".join(sorted({*FORMATS, *OTHER_FORMATS}))
            raise RequestError(f"json_schema: {where}: the format {name!r} is not supported; {supported} are", "json_schema")
        if "pattern" in each:
            each["pattern"] = render(parse_regex(each["pattern"], "json_schema"))
        todo += parts_of(each, path)
        if "patternProperties" in each:
            names = {name: render(parse_regex(name, "json_schema")) for name in each["patternProperties"]}
            if len(set(names.values())) < len(names):
                raise RequestError(f"json_schema: {where}: two names in patternProperties are the same pattern; leave one out", "json_schema")
            each["patternProperties"] = {names[name]: part for name, part in each["patternProperties"].items()}
    for bounds in [list(chain(*all_bounds))] if is_joined else all_bounds:
        check_excluded(bounds)
    # Only an object can say how its values are spelled.
    return {} if schema is True else schema


def check_excluded(bounds: list[tuple[str, float]]) -> None:
    """Raise RequestError for a whole number that is excluded less than 1 away from the opposite bound: the library allows it."""
    for keyword, number in bounds:
        others = [other for name, other in bounds if ("min" in name.lower()) != ("min" in keyword.lower())]
        if "exclusive" in keyword and number == int(number) and any(abs(number - other) < 1 for other in others):
            message = f"json_schema: {keyword} {number:g} with an opposite bound less than 1 away is not supported; allow {number:g}, or exclude a number beside it"
            raise RequestError(message, "json_schema")


def most_properties(kind: str, source) -> int:
    """The size of the largest list of properties in the schemas of a grammar."""
    todo = [json.loads(source)] if kind == "json_schema" else []
    most = 0
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            most = max(most, len(each.get("properties", ())))
            todo += [part for part, _ in parts_of(each, "")]
    return most


def numbers_in(value) -> Iterator[float]:
    """The numbers in a JSON value."""
    match value:
        case list():
            yield from chain.from_iterable(map(numbers_in, value))
        case dict():
            yield from chain.from_iterable(map(numbers_in, value.values()))
        case int() | float():
            yield value


def render(node) -> str:
    """A pattern for the library, every character of which is written as its code."""
    match node:
        case Chars(ranges):
            return "[" + "".join(f"\\x{{{low:X}}}-\\x{{{high:X}}}" for low, high in ranges) + "]"
        case Then(parts):
            return "".join(f"(?:{render(part)})" if isinstance(part, Either) else render(part) for part in parts)
        case Either(parts):
            return "|".join(map(render, parts))
        case Repeat(part, low, high):
            return f"(?:{render(part)}){{{low},{'' if high is None else high}}}"
        case Begin():
            return "^"
        case End():
            return "$"


def literal(text: str) -> Then:
    return Then(tuple(Chars(((ord(character), ord(character)),)) for character in text))


class GuidanceGrammar(NamedTuple):
    """A compiled grammar."""

    matcher: object  # of llguidance; never advanced
    guidance: Guidance
    guard: object | None = None  # a grammar of our own that the text must match too
    nbytes: int = 2**20  # the library does not tell

    def start(self, is_new_text: bool) -> "GuidanceMatcher":
        return GuidanceMatcher(self, is_new_text)


class GuidanceMatcher:
    """How far the text of one request is."""

    def __init__(self, grammar: GuidanceGrammar, is_new_text: bool):
        self.matcher = grammar.matcher.deep_copy()
        self.guidance = grammar.guidance
        self.guard = grammar.guard and grammar.guard.start(is_new_text)
        self.drops_space = is_new_text and self.guidance.first_mask is not None

    def mask(self) -> np.ndarray:
        """A bit for each token, [V / 8] uint8, whether it is allowed; all 0 if the library gave up."""
        bits = np.zeros(-(-self.guidance.num_ids // 32), np.int32)
        self.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self.matcher.is_error():
            bits[:] = 0
        bits = bits.view(np.uint8)[: -(-self.guidance.vocab_size // 8)]
        bits[-1] &= self.guidance.last_byte
        if self.drops_space:
            bits = bits & self.guidance.first_mask
        return bits if self.guard is None else bits & self.guard.mask()

    def advance(self, token_id: int) -> bool:
        """Read a token of the text; return whether any other may follow."""
        self.drops_space = False
        if self.guard is not None:
            self.guard.advance(token_id)
        self.matcher.consume_token(token_id)
        # After an error it says that it has stopped, too. The next mask is empty then, and the request fails.
        return self.matcher.is_error() or not self.matcher.is_stopped()
