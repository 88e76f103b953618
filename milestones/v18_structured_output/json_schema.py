"""JSON Schemas as nodes of an automaton. A keyword is obeyed exactly, or refused by name.

A value has one spelling: that of `json.dumps(value, ensure_ascii=False)`, members in the schema's order. So white space
does not run on, and a bound on a string's length counts its characters.

Source: JSON Schema 2020-12, https://json-schema.org/draft/2020-12.
"""
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import chain
from urllib.parse import unquote

import numpy as np

from .automaton import LAST_CODE, START, Automaton, Chars, Either, Members, Repeat, Text, Then, both, compile_node, without
from .params import RequestError
from .regex import invert, merge, parse_regex, searching

COMMA, COLON = ", ", ": "
MOST_DEPTH, MOST_MULTIPLE = 32, 10_000
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
# Characters that a string cannot hold as they are, by code point: their spelling.
ESCAPED = {code: json.dumps(chr(code))[1:-1] for code in (*range(32), ord('"'), ord("\\"))}
PLAIN = invert((code, code) for code in ESCAPED)
# Keywords that say nothing about which values are valid.
NOTES = {"$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "contentSchema", "default", "definitions"} | {
    "deprecated", "description", "discriminator", "example", "examples", "readOnly", "title", "writeOnly",
}  # fmt: skip
# For each type, the keywords that concern only its values.
OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"},
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties", "patternProperties"}
    | {"propertyNames", "dependentRequired", "dependentSchemas", "unevaluatedProperties"},
    "null": set(),
    "boolean": set(),
}
OF_TYPE["number"] = OF_TYPE["integer"]
OF_ANY = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "not", "if", "then", "else", "$dynamicRef", "$dynamicAnchor", "$vocabulary"}
KNOWN = NOTES | OF_ANY | set().union(*OF_TYPE.values())

MONTHS = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
FOURS = "0[48]|[2468][048]|[13579][26]"  # the last two digits of leap years, except 00
YEARS = "[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3}"  # there is no year 0
DATE = f"(({YEARS})-({MONTHS})|([0-9]{{2}}({FOURS})|({FOURS})00)-02-29)"
TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "ipv4": f"{BYTE}(\\.{BYTE}){{3}}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}


class Unsupported(RequestError):
    """A schema that cannot become an automaton, although it may be valid."""


class SchemaCompiler:
    """Makes nodes of the parts of one schema."""

    def __init__(self, schema: dict | bool, param: str = "json_schema", is_sorted: bool = False):
        """is_sorted: whether members come in the order of their names, so that equal values have one spelling in all schemas."""
        self.root = schema
        self.param = param
        self.is_sorted = is_sorted
        self.references: list[str] = []  # those that are being followed
        self.found: dict[str, object] = {}  # the node of each reference that was followed

    def unsupported(self, path: str, what: str) -> Unsupported:
        return Unsupported(f"{self.param}: {path or 'the schema'}: {what}", self.param)

    def node(self, schema: dict | bool, path: str = ""):
        """The node of the values that a schema allows. path: of the schema, for messages."""
        if schema is True or schema == {}:
            raise self.unsupported(path, "any JSON value is allowed, nested to any depth, which no automaton can follow")
        if schema is False:
            raise self.unsupported(path, "no value is allowed")
        if "$id" in schema and path:
            raise self.unsupported(path, "$id inside a schema is not supported, as references would begin there")
        rest = set(schema) - NOTES
        for keyword in ("enum", "const"):
            if keyword in rest:
                return self.constants(schema, keyword, rest - {keyword, "type"}, path)
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in rest:
                self.check_alone(keyword, rest - {keyword}, path)
                return getattr(self, keyword.strip("$"))(schema[keyword], f"{path}/{keyword}")
        if "type" not in rest:
            raise self.unsupported(path, "values of any type are allowed; give a type")
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        used = set().union({"type"}, *(OF_TYPE[name] for name in types))
        for keyword in sorted(rest & OF_ANY - used):
            raise self.unsupported(path, f"{keyword} is not supported")
        return Either(tuple(getattr(self, name)(schema, path) for name in types))

    def check_alone(self, keyword: str, others: Iterable[str], path: str) -> None:
        for other in sorted(others):
            raise self.unsupported(path, f"{keyword} beside {other} is not supported")

    # ---- for values of any type

    def constants(self, schema: dict, keyword: str, others: set[str], path: str):
        self.check_alone(keyword, others, path)
        types = schema.get("type", list(TYPES))
        types = types if isinstance(types, list) else [types]
        values = schema[keyword] if keyword == "enum" else [schema[keyword]]
        values = [value for value in values if any(is_type(value, name) for name in types)]
        if not values:
            raise self.unsupported(path, f"no value of {keyword} has the type")
        return Either(tuple(Text(spell(value, self.is_sorted)) for value in values))

    def ref(self, reference: str, path: str):
        if reference in self.found:
            return self.found[reference]
        if reference in self.references:
            raise self.unsupported(path, f"{reference} contains itself, nested to any depth, which no automaton can follow")
        if reference != "#" and not reference.startswith("#/"):
            raise self.unsupported(path, f"{reference!r} is not supported; a reference begins with #/, within the schema")
        target = resolve(reference, self.root)
        if not is_schema(target):
            raise RequestError(f"{self.param}: {path}: there is no schema at {reference}", self.param)
        self.references.append(reference)
        self.found[reference] = self.node(target, reference)
        self.references.pop()
        return self.found[reference]

    def anyOf(self, schemas: list, path: str):
        return Either(tuple(self.node(each, f"{path}/{i}") for i, each in enumerate(schemas)))

    def oneOf(self, schemas: list, path: str):
        """As anyOf, if no value is allowed by two of them."""
        comparing = SchemaCompiler(self.root, self.param, is_sorted=True)
        comparing.references = list(self.references)
        automata = [compile_node(comparing.node(each, f"{path}/{i}")) for i, each in enumerate(schemas)]
        for i, one in enumerate(automata):
            for j, other in enumerate(automata[:i]):
                # A value that both allow has a spelling in common, even a number, which may have several.
                if not both(one, other).is_empty:
                    raise self.unsupported(path, f"{j} and {i} may allow the same value; use anyOf")
        return self.anyOf(schemas, path)

    def allOf(self, schemas: list, path: str):
        if len(schemas) != 1:
            raise self.unsupported(path, "more than one schema is not supported")
        return self.node(schemas[0], f"{path}/0")

    # ---- for each type

    def null(self, schema: dict, path: str):
        return Text("null")

    def boolean(self, schema: dict, path: str):
        return Either((Text("true"), Text("false")))

    def integer(self, schema: dict, path: str):
        low = math.ceil(schema["minimum"]) if "minimum" in schema else -math.inf
        high = math.floor(schema["maximum"]) if "maximum" in schema else math.inf
        if "exclusiveMinimum" in schema:
            low = max(low, math.floor(schema["exclusiveMinimum"]) + 1)
        if "exclusiveMaximum" in schema:
            high = min(high, math.ceil(schema["exclusiveMaximum"]) - 1)
        if low > high:
            raise self.unsupported(path, "no integer is allowed")
        node = integers(low, high)
        if "multipleOf" in schema:
            divisor = schema["multipleOf"]
            if divisor != int(divisor) or divisor > MOST_MULTIPLE:
                raise self.unsupported(path, f"multipleOf is {divisor}, but only integers up to {MOST_MULTIPLE} are supported")
            node = both(compile_node(node), multiples(int(divisor)))
            if node.is_empty:
                raise self.unsupported(path, "no integer is allowed")
        return node

    def number(self, schema: dict, path: str):
        for keyword in sorted(OF_TYPE["number"] & set(schema)):
            raise self.unsupported(path, f"{keyword} is not supported for numbers that are not integers")
        return parse_regex("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")

    def string(self, schema: dict, path: str):
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if high is not None and low > high:
            raise self.unsupported(path, "no string is allowed, as minLength is larger than maxLength")
        nodes = [Repeat(Chars(((0, LAST_CODE),)), low, high)]
        if "pattern" in schema:
            nodes.append(searching(parse_regex(schema["pattern"], self.param)))
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise self.unsupported(path, f"the format {schema['format']!r} is not supported; {', '.join(FORMATS)} are")
            nodes.append(parse_regex(FORMATS[schema["format"]]))
        inside = reduce(both, [compile_node(spelled(node)) for node in nodes])
        if inside.is_empty:
            raise self.unsupported(path, "no string is allowed")
        return Then((Text('"'), inside, Text('"')))

    def array(self, schema: dict, path: str):
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        self.check_keywords(schema, OF_TYPE["array"] - {"items", "prefixItems", "minItems", "maxItems"}, path)
        first = [self.node(each, f"{path}/prefixItems/{i}") for i, each in enumerate(schema.get("prefixItems", []))]
        closed = schema.get("items", True) is False or (high is not None and high <= len(first))
        high = len(first) if closed and high is None else min(high, len(first)) if closed else high
        if high is not None and low > high:
            raise self.unsupported(path, "no array is allowed, as minItems is larger than the number of items that may be there")
        item = None if closed else self.node(schema.get("items", True), f"{path}/items")
        first = first or ([item] if item else [])
        node = Then(())
        if item:
            node = Repeat(Then((Text(COMMA), item)), max(0, low - len(first)), None if high is None else high - len(first))
        # Where an item is missing, all later ones are.
        for i in range(min(len(first), math.inf if high is None else high) - 1, -1, -1):
            node = Then((Text(COMMA) if i else Then(()), first[i], node))
            node = node if i < low else Repeat(node, 0, 1)
        return Then((Text("["), node, Text("]")))

    def object(self, schema: dict, path: str):
        self.check_keywords(schema, OF_TYPE["object"] - {"properties", "required", "additionalProperties"}, path)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if self.is_sorted:
            properties = dict(sorted(properties.items()))
        for name in required:
            if name not in properties:
                raise self.unsupported(path, f"{name!r} is required, but is not in properties")
        more = schema.get("additionalProperties", True)
        parts, needed = [], []
        for name, each in properties.items():
            value_path = f"{path}/properties/{name}"
            if each is False and name not in required:
                continue
            parts.append(Then((Text(spell(name) + COLON), self.node(each, value_path))))
            needed.append(name in required)
        if more is not False:
            if more is True or more == {}:
                raise self.unsupported(path, "members of any name and value are allowed, which no automaton can follow; add additionalProperties: false")
            # Of two members with one name the last one counts, so no other may have the name of a property.
            name = compile_node(Then((Text('"'), spelled(Repeat(Chars(((0, LAST_CODE),)))), Text('"'))))
            if properties:
                name = without(name, compile_node(Either(tuple(Text(spell(each)) for each in properties))))
            member = Then((name, Text(COLON), self.node(more, f"{path}/additionalProperties")))
            parts.append(Then((member, Repeat(Then((Text(COMMA), member))))))
            needed.append(False)
            if self.is_sorted:  # these may stand anywhere among the others
                return Then((Text("{"), Repeat(Chars(((0, LAST_CODE),)))))
        return Then((Text("{"), Members(tuple(parts), tuple(needed), COMMA), Text("}")))

    def check_keywords(self, schema: dict, refused: set[str], path: str) -> None:
        for keyword in sorted(refused & set(schema)):
            if not (keyword == "uniqueItems" and schema[keyword] is False):
                raise self.unsupported(path, f"{keyword} is not supported")


def resolve(reference: str, root):
    """What a reference within a schema refers to; None if there is nothing."""
    target = root
    for part in str(reference).split("/")[1:]:
        part = unquote(part).replace("~1", "/").replace("~0", "~")
        is_index = isinstance(target, list) and re.fullmatch("0|[1-9][0-9]{0,5}", part)
        try:
            target = target[int(part) if is_index else part]
        except (KeyError, IndexError, TypeError):
            return None
    return target


def spell(value, is_sorted: bool = False) -> str:
    """The spelling of a value, in which 2.0 is 2."""
    return json.dumps(plain(value), ensure_ascii=False, separators=(COMMA, COLON), sort_keys=is_sorted)


def plain(value):
    """A value with integers for whole numbers."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [plain(each) for each in value]
        case dict():
            return {name: plain(each) for name, each in value.items()}
    return value


def is_type(value, name: str) -> bool:
    """Whether a JSON value has a type of JSON Schema, in which 1.0 is an integer."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return is_number and value == int(value)
        case "number":
            return is_number
    return isinstance(value, {"string": str, "array": list, "object": dict}[name])


def spelled(node):
    """A node for characters as the same node for their spellings between the quotes of a string."""
    match node:
        case Chars(ranges):
            escapes = [Text(text) for code, text in ESCAPED.items() if any(low <= code <= high for low, high in ranges)]
            plain = invert(merge((*invert(ranges), *invert(PLAIN))))
            return Either((Chars(plain), *escapes)) if escapes else Chars(plain)
        case Then(parts):
            return Then(tuple(map(spelled, parts)))
        case Either(parts):
            return Either(tuple(map(spelled, parts)))
        case Repeat(part, low, high):
            return Repeat(spelled(part), low, high)
    return node


def integers(low: float, high: float):
    """The integers from low to high, without leading zeros; either may be infinite."""
    parts = []
    if low < 0:
        parts.append(Then((Text("-"), naturals(max(1, -high), -low))))
    if high >= 0:
        parts.append(naturals(max(0, low), high))
    return Either(tuple(parts))


def naturals(low: int, high: float):
    """The numerals from low to high, low being 0 or more."""
    parts, longest = [], len(str(low if high == math.inf else high))
    for size in range(len(str(low)), longest + 1):
        first, last = max(low, 10 ** (size - 1) if size > 1 else 0), min(high, 10**size - 1)
        parts.append(numerals(str(first), str(last)))
    if high == math.inf:
        parts.append(Then((digits("1", "9"), Repeat(digits("0", "9"), longest))))
    return Either(tuple(parts))


def digits(first: str, last: str) -> Chars:
    return Chars(((ord(first), ord(last)),))


def numerals(first: str, last: str):
    """The numerals between two of equal length."""
    if not first:
        return Then(())
    rest = len(first) - 1
    least, most = "0" * rest, "9" * rest
    if first[0] == last[0]:
        return Then((Text(first[0]), numerals(first[1:], last[1:])))
    low, high, parts = int(first[0]), int(last[0]), []
    if first[1:] != least:
        parts.append(Then((Text(first[0]), numerals(first[1:], most))))
        low += 1
    if last[1:] != most:
        parts.append(Then((Text(last[0]), numerals(least, last[1:]))))
        high -= 1
    if low <= high:
        parts.append(Then((digits(str(low), str(high)), Repeat(digits("0", "9"), rest, rest))))
    return Either(tuple(parts))


def multiples(divisor: int) -> Automaton:
    """The integers that a divisor divides: a state for each remainder of the digits so far, after DEAD, START and the sign's."""
    first = START + 2
    # Classes: the ten digits, the sign, all other bytes.
    table = np.zeros((first + divisor, 12), np.int32)
    remainders = np.arange(divisor)[:, None] * 10 + np.arange(10)
    table[first:, :10] = first + remainders % divisor
    table[START : first, :10] = first + np.arange(10) % divisor
    table[START, 10] = START + 1
    classes = np.full(256, 11, np.uint8)
    classes[ord("0") : ord("9") + 1], classes[ord("-")] = np.arange(10), 10
    accepting = np.zeros(len(table), bool)
    accepting[first] = True
    return Automaton(table, classes, accepting)


# ---- what a schema may look like


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_bound(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def is_schema(value) -> bool:
    return isinstance(value, (dict, bool))


def are_schemas(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_schema, value))


def are_named(value) -> bool:
    return isinstance(value, dict) and all(map(is_schema, value.values()))


def are_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def is_type_name(value) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names) and len(set(names)) == len(names)


VALUES: dict[str, tuple[Callable, str]] = (
    dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), (is_count, "an integer from 0 up"))
    | dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (is_bound, "a number below 1e300"))
    | dict.fromkeys(("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"), (is_schema, "a schema"))
    | dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), (are_schemas, "a list of at least one schema"))
    | dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), (are_named, "an object of schemas"))
    | dict.fromkeys(("pattern", "format", "$ref"), (lambda value: isinstance(value, str), "a string"))
    | {
        "type": (is_type_name, f"one of {', '.join(TYPES)}, or a list of some"),
        "enum": (lambda value: isinstance(value, list) and bool(value), "a list of at least one value"),
        "required": (are_names, "a list of different names"),
        "multipleOf": (lambda value: is_bound(value) and value > 0, "a number above 0 and below 1e300"),
        "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    }
)


def parts_of(schema: dict, path: str) -> Iterator[tuple[object, str]]:
    """The schemas directly inside a schema, with their paths."""
    for keyword, value in schema.items():
        check, _ = VALUES.get(keyword, (None, ""))
        if check is is_schema:
            yield value, f"{path}/{keyword}"
        elif check is are_schemas:
            yield from ((each, f"{path}/{keyword}/{i}") for i, each in enumerate(value))
        elif check is are_named:
            yield from ((each, f"{path}/{keyword}/{name}") for name, each in value.items())


def check_schema(schema: object, param: str = "json_schema") -> None:
    """Raise RequestError unless this is a schema whose every keyword is known, with a value of the kind it needs."""
    if not is_schema(schema):
        raise RequestError(f"{param} must be a JSON Schema, which is an object, true or false, got {type(schema).__name__}", param)
    todo, checked, references = [(schema, "", 1)], set(), []
    while todo:
        each, path, depth = todo.pop()
        if isinstance(each, bool):
            continue
        where = path or "the schema"
        checked.add(id(each))
        if depth > MOST_DEPTH:
            raise RequestError(f"{param}: {where[:200]} is nested more than {MOST_DEPTH} deep; use fewer levels", param)
        for keyword, value in each.items():
            if keyword not in KNOWN:
                raise RequestError(f"{param}: {where}: the keyword {keyword[:200]!r} is not supported; leave it out", param)
            check, kind = VALUES.get(keyword, (None, ""))
            if check and not check(value):
                raise RequestError(f"{param}: {where}: {keyword} must be {kind}, got {spell(value)[:200]}", param)
        todo += [(part, part_path, depth + 1) for part, part_path in parts_of(each, path)]
        if "$ref" in each:
            references.append((each["$ref"], where))
    for reference, where in references:
        if "#/" in reference[1:]:
            raise RequestError(f"{param}: {where}: $ref leads to {reference[:200]!r}, a path after an address, which is not supported; leave the address out", param)
        target = resolve(reference, schema) if reference.startswith("#/") else None
        if isinstance(target, dict) and id(target) not in checked:
            raise RequestError(f"{param}: {where}: $ref leads to {reference[:200]!r}, which is no schema there; move it to $defs", param)


# Beside these, `properties` does not say all that an object may have.
OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "allOf", "$ref", "not", "if", "dependentSchemas"}
# Keywords whose values have schemas by name, and those whose values hold none that is obeyed.
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
WITHOUT_SCHEMAS = NOTES - NAMED | {"enum", "const"}
MOST_TAGS = 16


def close(schema):
    """A schema whose objects have no members but those that it names, wherever it does not say whether they may.

    JSON Schema allows any others then, and a model that likes to go on adds some. A schema that puts objects together is
    left as it is: each part would forbid what the others name.

    >>> close({"properties": {"a": {"type": "null"}}})
    {'properties': {'a': {'type': 'null'}}, 'additionalProperties': False}
    """
    return schema if puts_together(schema, schema, {}) else closed(schema)


def closed(schema):
    """As `close`, for a schema that puts no others together."""
    match schema:
        case list():
            return [closed(each) for each in schema]
        case dict():
            named = {"properties", "$defs", "definitions"}
            parts = named | {"items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties"}
            result = {}
            for keyword, value in schema.items():
                if keyword in named and isinstance(value, dict):
                    value = {name: closed(each) for name, each in value.items()}
                result[keyword] = closed(value) if keyword in parts - named else value
            names, required = schema.get("properties"), schema.get("required", [])
            if isinstance(names, dict) and names and are_names(required) and set(required) <= set(names) and not OPEN & set(schema):
                result["additionalProperties"] = False
            return result
    return schema


def puts_together(schema, root, tags: dict[int, dict[str, list[str]]]) -> bool:
    """Whether a schema anywhere demands several schemas of one value, or that it is not allowed by another one. tags: see `told_apart`."""
    match schema:
        case list():
            return any(puts_together(each, root, tags) for each in schema)
        case dict():
            keywords = set(schema) - NOTES
            several = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
            beside = keywords & {"allOf", "$ref"} and len(keywords) > 1 or keywords & {"anyOf", "oneOf"} and len(keywords - {"type"}) > 1
            beside = beside or {"properties", "patternProperties"} <= keywords
            apart = "oneOf" not in schema or told_apart(schema["oneOf"], root, tags)
            if several or beside or not apart or keywords & {"not", "if", "contains", "dependentSchemas", "unevaluatedProperties"}:
                return True
            for keyword in set(schema) - WITHOUT_SCHEMAS:
                value = schema[keyword]
                parts = value.values() if keyword in NAMED and isinstance(value, dict) else [value]
                if any(puts_together(each, root, tags) for each in parts):
                    return True
    return False


def told_apart(schemas, root, tags: dict[int, dict[str, list[str]]]) -> bool:
    """Whether a member that all of these schemas require has other values in each: then no object is allowed by two.

    tags: what `tags_of` has returned for each schema, by its id; many alternatives may refer to one schema.
    """
    found: dict[str, list[list[str]]] = {}
    for schema in schemas if isinstance(schemas, list) else []:
        if isinstance(schema, dict) and set(schema) - NOTES == {"$ref"}:
            schema = resolve(schema["$ref"], root)
        if id(schema) not in tags:
            tags[id(schema)] = tags_of(schema)
        for name, values in tags[id(schema)].items():
            found.setdefault(name, []).append(values)
    return any(len(values) == len(schemas) and len(set(chain(*values))) == sum(map(len, values)) for values in found.values())


def tags_of(schema) -> dict[str, list[str]]:
    """The values of each member that an object must have, if the schema lists them: of the first MOST_TAGS members with at most as many values."""
    found: dict[str, list[str]] = {}
    if not (isinstance(schema, dict) and are_named(schema.get("properties")) and are_names(schema.get("required"))):
        return found
    for name in schema["required"]:
        member = schema["properties"].get(name)
        values = [member["const"]] if isinstance(member, dict) and "const" in member else isinstance(member, dict) and member.get("enum")
        if isinstance(values, list) and len(values) <= MOST_TAGS and len(found) < MOST_TAGS:
            found[name] = [spell(value, is_sorted=True) for value in values]
    return found


def compile_schema(schema: dict | bool, param: str = "json_schema") -> Automaton:
    """The automaton of the texts that a schema allows.

    Raises:
        Unsupported: if an automaton cannot follow it. RequestError: if it is no schema.

    >>> automaton = compile_schema({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False})
    >>> automaton.accepts(b'{"a": null}'), automaton.accepts(b'{"b": null}')
    (True, False)
    """
    check_schema(schema, param)
    return compile_node(SchemaCompiler(schema, param).node(schema))
