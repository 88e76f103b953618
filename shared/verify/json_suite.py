"""Run the official JSON Schema Test Suite against a chapter's grammars: which instances can be generated under which schemas

    python -m shared.verify.json_suite [vNN] [--write]

Each test has a schema, an instance and whether it is valid. The instance is spelled as the chapter spells values, and fed
to the schema's grammar token by token: it can be generated if each token's bit is set, and the text may end behind the
last. So a test is

    right       valid and can be generated, or invalid and cannot
    rejected    valid, but cannot be generated
    refused     its schema is refused
    accepted    invalid, but can be generated: what must never happen

In three variants: the suite as it is; its schemas with a type wherever they have none, since most of them allow any JSON,
nested to any depth (then jsonschema says what is valid); and its formats of strings.

Reads: tests/golden/json_schema. Writes: docs/results/json_suite.json with --write.
"""

import argparse
import importlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from shared import results
from shared.chapters import ROOT, Chapter, find, last_with
from shared.checkpoints import checkpoint
from shared.programs import run

SUITE = ROOT / "tests" / "golden" / "json_schema" / "suite.json"
BACKENDS = ("own", "llguidance", "auto")
VARIANTS = ("as it is", "typed", "formats")
PLAIN = {"type": ["integer", "string", "boolean", "null"]}


class Counts(NamedTuple):
    """Of some tests, how many are right, and how many are wrong in each way."""

    right: int = 0
    rejected: int = 0
    refused: int = 0
    accepted: int = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(mine + its for mine, its in zip(self, other)))


class Case(NamedTuple):
    """A schema, and its instances with whether they are valid."""

    file: str
    description: str
    schema: dict | bool
    tests: list[tuple[str, object, bool]]


@cache
def cases(variant: str, chapter: Chapter) -> tuple[Case, ...]:
    """The tests of a variant."""
    return tuple(read_cases(variant, chapter))


def read_cases(variant: str, chapter: Chapter) -> Iterator[Case]:
    suite = json.loads(SUITE.read_text())
    for name, groups in suite["formats" if variant == "formats" else "files"].items():
        for group in groups:
            case = Case(name, group["description"], group["schema"], [tuple(each) for each in group["tests"]])
            if variant == "formats":
                yield case._replace(
                    schema=case.schema | {"type": "string"},
                    tests=[(what, data, valid and isinstance(data, str)) for what, data, valid in case.tests],
                )
            elif variant == "typed":
                yield from judged(case._replace(schema=typed(case.schema, json_schema_of(chapter))), case.schema)
            else:
                yield case


def json_schema_of(chapter: Chapter):
    return importlib.import_module(f"milestones.{chapter.name}.json_schema")


def typed(schema: dict | bool, words) -> dict | bool:
    """The schema with a type wherever one is missing and all keywords are about one, and without members and items of any kind.

    words: the chapter's module, which knows the keywords of each type.
    """
    if not isinstance(schema, dict):
        return schema
    schema = json.loads(json.dumps(schema))
    parts = [schema]
    while parts:
        part = parts.pop()
        rest = part.keys() - words.NOTES
        names = [name for name in ("integer", "string", "array", "object") if rest and rest <= words.OF_TYPE[name]]
        if names:
            part["type"] = names[0]
        if part.get("type") == "array":
            part["items"] = plain(part.get("items"))
        if part.get("type") == "object":
            missing = [name for name in part.get("required", ()) if name not in part.get("properties", {})]
            named = {name: plain(each) for name, each in part.get("properties", {}).items()}
            part["properties"] = named | dict.fromkeys(missing, PLAIN)
            part["additionalProperties"] = plain(part.get("additionalProperties", False))
        parts += [each for each, _ in words.parts_of(part, "") if isinstance(each, dict)]
    return schema


def opened(schema):
    """The schema without a word on additional members, where it forbids them."""
    if isinstance(schema, list):
        return [opened(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: opened(each) for name, each in schema.items() if (name, each) != ("additionalProperties", False)}


def plain(schema: dict | bool | None) -> dict | bool:
    """The schema, or one of plain values if it allows everything."""
    return PLAIN if schema in (None, True, {}) else schema


def judged(case: Case, before: dict | bool) -> Iterator[Case]:
    """The case as jsonschema judges it, if its schema is another one than before and needs no other file."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    if case.schema == before:
        return
    try:
        Draft202012Validator.check_schema(case.schema)
        validator = Draft202012Validator(case.schema)
        yield case._replace(tests=[(what, data, validator.is_valid(data)) for what, data, _ in case.tests])
    except (SchemaError, Unresolvable):
        return


def ordered(value, schema, root):
    """The value with its members in the schema's order."""
    schema = schema if isinstance(schema, dict) else {}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") or reference == "#":
        target = root
        try:
            for part in reference.split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~").replace("%25", "%").replace("%22", '"')
                target = target[int(part) if isinstance(target, list) else part]
        except (KeyError, IndexError, ValueError, TypeError):
            return value
        return ordered(value, target, root) if target is not schema else value
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        return [ordered(each, first[i] if i < len(first) else schema.get("items"), root) for i, each in enumerate(value)]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        names = [name for name in properties if name in value] + [name for name in value if name not in properties]
        return {name: ordered(value[name], properties.get(name, schema.get("additionalProperties")), root) for name in names}
    return value


@cache
def tokenizer_of(chapter: Chapter):
    return importlib.import_module(f"milestones.{chapter.name}.text").load_tokenizer(checkpoint("pocket"))


def grammars_of(chapter: Chapter, backend: str):
    """The chapter's grammars for the bundled model."""
    module = importlib.import_module(f"milestones.{chapter.name}.grammars")
    tokenizer = tokenizer_of(chapter)
    return module.Grammars(tokenizer, len(tokenizer), (tokenizer.eos_token_id,), backend, record=lambda compilation: None)


def can_generate(grammar, tokenizer, text: str) -> bool:
    """Whether a request with this grammar could have this text, and end behind it."""

    def allows(mask, token_id):
        return bool(mask[token_id >> 3] >> (token_id & 7) & 1)

    matcher = grammar.start(is_new_text=False)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    for index, token_id in enumerate(token_ids):
        if not allows(matcher.mask(), token_id):
            return False
        if not matcher.advance(token_id):
            return index == len(token_ids) - 1
    return allows(matcher.mask(), tokenizer.eos_token_id)


def outcomes(chapter: Chapter, backend: str, variant: str) -> Iterator[tuple[str, str, str, str]]:
    """Each test, with its file, what became of it, its description and its text."""
    grammars, tokenizer, spell = grammars_of(chapter, backend), tokenizer_of(chapter), json_schema_of(chapter).spell
    Params, RequestError = chapter.load().SamplingParams, chapter.load().RequestError
    for case in cases(variant, chapter):
        grammar = None
        # SamplingParams takes no bool, and the protocol neither.
        if isinstance(case.schema, dict):
            try:
                grammar = grammars.get(Params(json_schema=case.schema).constraint)
            except RequestError:
                pass
        for what, data, valid in case.tests:
            text = spell(ordered(data, case.schema, case.schema))
            if grammar is None:
                outcome = "refused"
            else:
                possible = can_generate(grammar, tokenizer, text)
                outcome = "right" if possible == valid else "rejected" if valid else "accepted"
            yield case.file, outcome, f"{case.description}: {what}", text


def counts(chapter: Chapter, backend: str, variant: str = "as it is") -> dict[str, Counts]:
    """What a backend makes of the tests of each file."""
    counted: dict[str, Counts] = {}
    for file, outcome, _, _ in outcomes(chapter, backend, variant):
        counted[file] = counted.get(file, Counts()).plus(Counts(**{outcome: 1}))
    return counted


def total(counted: dict[str, Counts]) -> Counts:
    return Counts(*map(sum, zip(*counted.values())))


def line(name: str, cells: dict[str, Iterable]) -> str:
    return f"{name:24}" + "".join(f"{' '.join(map(str, cell)):>20}" for cell in cells.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.verify.json_suite", description=__doc__.partition("\n")[0])
    parser.add_argument("chapter", nargs="?", metavar="vNN", help="default: the last that has grammars")
    parser.add_argument("--write", action="store_true", help="write docs/results/json_suite.json")
    parser.add_argument("--show", choices=("rejected", "accepted", "refused"), help="also print these tests")
    args = parser.parse_args(argv)
    try:
        chapter = find(args.chapter) if args.chapter else last_with("grammars")
    except ValueError as error:
        parser.error(str(error))
    if "grammars" not in chapter.capabilities:
        parser.error(f"{chapter.id} has no grammars; name a later chapter")
    everything = {}
    for variant in VARIANTS:
        by_backend = {backend: counts(chapter, backend, variant) for backend in BACKENDS}
        print(f"\n{variant}: right, rejected, refused, accepted")
        print(line("", {backend: [backend] for backend in BACKENDS}))
        for file in by_backend["own"]:
            print(line(file, {backend: counted[file] for backend, counted in by_backend.items()}))
        print(line("in all", {backend: total(counted) for backend, counted in by_backend.items()}))
        for backend in BACKENDS if args.show else ():
            for file, outcome, description, text in outcomes(chapter, backend, variant):
                if outcome == args.show:
                    print(f"{outcome} by {backend}: {file}: {description}: {text[:80]}")
        everything[variant.replace(" ", "_")] = {
            "tests": sum(total(by_backend["own"])),
            **{backend: total(counted)._asdict() for backend, counted in by_backend.items()},
            "files": {file: {backend: list(by_backend[backend][file]) for backend in BACKENDS} for file in by_backend["own"]},
        }
    if args.write:
        print(f"written to {results.write('json_suite', everything, 'python -m shared.verify.json_suite --write').relative_to(ROOT)}")
    return 1 if any(each[backend]["accepted"] for each in everything.values() for backend in BACKENDS) else 0


if __name__ == "__main__":
    run(main)
