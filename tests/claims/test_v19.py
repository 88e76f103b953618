"""v19: an answer has parts: what is thought, what is said, what is called. The grammar allows only those that the splitter can tell apart."""

import importlib
import itertools
import json
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from math import inf
from typing import Literal

import jsonschema
import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field

from shared.checkpoints import checkpoint
from shared.verify.serving import serving, wait_until
from tests.support.grammars import Walker, distances
from tests.support.http import HTTP, events_of, post
from tests.support.tools import KINDS, MARKS, Script, compiled_here, message_of, tools_checkpoint, tools_tokenizer

# ---- parts, and texts of them

ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -99, "maximum": 99}, "note": {"type": "string", "maxLength": 6}},
    "required": ["a"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
FINISH = {"type": "object", "properties": {"ok": {"enum": [True, "</tool_call>", "é]}"]}}, "required": ["ok"], "additionalProperties": False}
SCHEMAS = {"add": ADD, "now": NOTHING, "add_all": FINISH}
ANGLES, SQUARES = ("<think>", "</think>"), ("[THINK]", "[/THINK]")
FAMILIES = ("hermes", "mistral", "mistral-args", "llama3", "nemotron", "apriel", "minimax")
CONTENTS = {
    "any": None,
    "regex": ("regex", "[a-c<\\[{][a-c<\\[{\n]{1,8}"),
    "choice": ("choice", ("yes", "no", "{}", "<tool_")),
    "json_schema": ("json_schema", json.dumps({"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2})),
}


@pytest.fixture
def new_parts(module):
    """Parts of a family. special: whether its markers are special tokens, as they are in Mistral's vocabularies."""

    def new_parts(family, thinks=False, is_special=False, names=(*SCHEMAS,), **options):
        parts, form = module("parts"), module("tools").FORMS[family]
        tools = tuple(parts.Tool(name, json.dumps(SCHEMAS[name]), True, "tools[0]") for name in names)
        thought = (SQUARES if family.startswith("mistral") else ANGLES) if thinks else None
        special = tuple(dict.fromkeys(text for text in (*(thought or ()), form.marker, form.middle) if is_special and text.startswith("[")))
        return parts.Parts(thought=thought, form=form, tools=tools, special=special, **{"is_single": form.is_single} | options)

    return new_parts


@pytest.fixture
def split(module):
    """What a text consists of, fed in these pieces."""

    def split(parts, pieces):
        numbers = itertools.count()
        splitter = module("parts").Splitter(parts, lambda: f"id{next(numbers)}")
        deltas = [delta for index, piece in enumerate(pieces) for delta in splitter.push(piece, last=index == len(pieces) - 1)]
        calls = [(call.id, call.name, call.arguments, call.is_whole) for call in splitter.calls]
        assert_told(deltas, splitter, calls)
        return splitter.thought, splitter.content, calls, splitter.calls_are_whole, splitter.thought_end, splitter.content_end

    return split


def assert_told(deltas, splitter, calls):
    """The deltas add up to the parts, in order, and none is empty."""
    assert "".join(delta.text for delta in deltas if delta.kind == "thought") == (splitter.thought or "")
    assert "".join(delta.text for delta in deltas if delta.kind == "content") == splitter.content
    assert [(delta.index, delta.text) for delta in deltas if delta.kind == "call"] == [(i, call[1]) for i, call in enumerate(calls)]
    for index, call in enumerate(calls):
        assert "".join(delta.text for delta in deltas if (delta.kind, delta.index) == ("arguments", index)) == call[2]
    order = [("thought", "content", "call", "arguments").index(delta.kind) for delta in deltas]
    assert [kind for kind in order if kind < 2] == sorted(kind for kind in order if kind < 2) and all(delta.text for delta in deltas)


def raw_of(parts, text):
    """The bytes of a text whose special tokens are tokens."""
    raw = text.encode()
    for name in parts.special:
        raw = raw.replace(name.encode(), b"\xff" + name.encode())
    return raw


def written(parts, thought, content, calls, rng=None):
    """A text of these parts, as a checkpoint writes it."""
    form, gap = parts.form, rng.choice(("", "\n", "\n\n")) if rng else ""
    text = content
    if thought is not None:
        text = f"{'' if parts.is_open else parts.thought[0]}{gap}{thought}{gap}{parts.thought[1]}{gap}{content}"
    if calls:
        text += gap * (thought is None or bool(content)) + form.marker + (rng.choice(form.before) if rng else form.before[0])
        text += form.between.join(f"{form.opening}{name}{form.middle}{arguments}{form.closing}" for name, arguments in calls) + form.after
    return text


def random_calls(rng, parts):
    calls = []
    for _ in range(1 if parts.is_single else rng.randrange(1, 4)):
        name = rng.choice([tool.name for tool in parts.tools])
        notes = ("", "x", "</tool", "é🙂", "[ARGS]"[bool(parts.special) :], "\\", '"}', "{[", "\n")
        values = {
            "add": [{"a": 1}, {"a": -99, "note": rng.choice(notes)}, {"a": rng.randrange(99), "note": rng.choice(notes)}],
            "now": [{}],
            "add_all": [{"ok": each} for each in FINISH["properties"]["ok"]["enum"]],
        }[name]
        calls.append((name, json.dumps(rng.choice(values), ensure_ascii=False)))
    return calls


def assert_cut(split, parts, text, whole):
    """A text that is cut off has the beginning of the parts of the whole, in one piece and in many. What only looks like a marker is not lost."""
    thought, said, calls, are_whole, *_ = got = split(parts, [text])
    assert split(parts, [*text]) == got
    assert not are_whole or calls == whole[2][: len(calls)]
    assert [call[1] for call in calls] == [call[1] for call in whole[2]][: len(calls)]
    assert all(its[2].startswith(mine[2]) and mine[3] == (mine[2] == its[2]) for mine, its in zip(calls, whole[2]))
    if not calls and whole[4] is not None and len(text) >= whole[4]:
        assert thought == whole[0] and said.startswith(whole[1][: len(said)])
        assert parts.form.marker in text or (parts.is_required and not said) or text[whole[4] :].strip("\n") == said.strip("\n")


VARIANTS = [
    pytest.param(family, thinks, is_open, is_special, id=f"{family}{' thinks' * thinks}{', open' * is_open}{', special' * is_special}")
    for family in FAMILIES
    for thinks, is_open in ((False, False), (True, False), (True, True))[: 3 if family in FAMILIES[:4] else 1]
    for is_special in ((False, True) if family.startswith("mistral") else (False,))
]


@pytest.mark.parametrize(("family", "thinks", "is_open", "is_special"), VARIANTS)
def test_what_is_written_in_a_form_is_accepted_and_told_apart(module, new_parts, split, rng, family, thinks, is_open, is_special):
    """However it is cut: in two at each place, and into characters."""
    for mode in ("auto", "required"):
        parts = new_parts(family, thinks, is_special, is_open=is_open, is_required=mode == "required")
        automaton = module("compiler").compile_here("parts", parts)
        for number in range(14):
            # The name of a special token is no part of a text.
            marker = parts.form.marker[bool(parts.special) :]
            thought = rng.choice(("", "So: é, then", f"call\n\n{marker} or not?", "<thin")) if is_open or (thinks and number % 3) else None
            said = "" if mode == "required" or (not parts.form.marker and number % 2) else rng.choice(("Hi é!", "a <tool_cal", "1 < 2\n[TOOL_", '{"nam'))
            calls = random_calls(rng, parts) if mode == "required" or not said or (parts.form.marker and number % 2) else []
            text = written(parts, thought, said, calls, rng)
            assert automaton.accepts(raw_of(parts, text)), text
            got = split(parts, [text])
            assert got[:4] == (thought, said, [(f"id{i}", *call, True) for i, call in enumerate(calls)], bool(calls)), text
            cuts = [[text[:place], text[place:]] for place in range(len(text))] + [[*text]]
            assert all(split(parts, pieces) == got for pieces in cuts), text
            for place in rng.sample(range(1, len(text) + 1), min(len(text), 12)):
                assert_cut(split, parts, text[:place], got)


# The server refuses a grammar of what is said where calls are JSON without a marker.
@pytest.mark.parametrize(
    ("family", "thinks", "is_open", "is_special", "content"),
    [
        pytest.param(*variant.values, content, id=f"{variant.id}-{content}", marks=[pytest.mark.whole] * (number % len(CONTENTS) != place))
        for number, variant in enumerate(VARIANTS)
        for place, content in enumerate(CONTENTS)
        if content == "any" or (variant.values[0] != "llama3" and variant.values[1:3] != (True, True))
    ],
)
def test_random_texts_of_the_grammar_have_valid_calls_and_no_marker_in_what_is_said(
    module, new_parts, split, rng, family, thinks, is_open, is_special, content
):
    form = module("tools").FORMS[family]
    modes = {"auto": {}, "required": {"is_required": True}, "none": {"names": ()}, "single": {"names": ("now",), "is_required": True, "is_single": True}}
    for options in modes.values() if content == "any" else (modes["auto"], modes["none"]):
        parts = new_parts(family, thinks, is_special, is_open=is_open, content=CONTENTS[content], **options)
        automaton = module("compiler").compile_here("parts", parts)
        walker = Walker(automaton)
        kinds = set()
        for text in (walk(walker, automaton, rng, parts) for _ in range(16)):
            got = split(parts, [text])
            assert split(parts, [*text]) == got, text
            place = rng.randrange(len(text) + 1)
            assert split(parts, [text[:place], text[place:]]) == got, text
            kinds.add(check_parts(parts, content, text, got))
        assert kinds >= ({"calls"} if options.get("is_required") else set() if not parts.tools else {"calls", "content"} if form.marker else {"content"})


def walk(walker, automaton, rng, parts):
    """A random text, in which calls and thoughts are not as rare as by chance."""
    opening, closing = parts.thought or ("", "")
    begin = raw_of(parts, rng.choice(("", closing, f"a{closing}") if parts.is_open else ("", "", opening, f"{opening}a{closing}")))
    begin += raw_of(parts, rng.choice(("", "Hi\n", parts.form.marker, f"{parts.form.marker}{parts.form.before[0]}{parts.form.opening}")))
    state = automaton.walk(1, begin)
    if not state:
        state, begin = 1, b""
    # A walk of the same automaton that begins elsewhere.
    raw = begin
    for _ in range(rng.randrange(40)):
        possible = [number for number, following in enumerate(walker.table[state]) if following]
        if not possible:
            break
        shortest = min(possible, key=lambda number: walker.ways[walker.table[state][number]])
        state, raw = walker.step(state, raw, shortest if walker.ways[state] and rng.random() < 0.5 else rng.choice(possible), rng)
    while walker.ways[state]:
        number = min(range(len(walker.table[state])), key=lambda number: walker.ways[walker.table[state][number]])
        state, raw = walker.step(state, raw, number, rng)
    assert automaton.accepts(raw)
    return raw.replace(b"\xff", b"").decode()


def check_parts(parts, content, text, got):
    """Whether a whole text has the parts that it may have; returns what it has."""
    thought, said, calls, are_whole, thought_end, content_end = got
    form = parts.form
    assert are_whole == bool(calls)
    for _, name, arguments, is_whole in calls:
        assert name in [tool.name for tool in parts.tools] and is_whole, text
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert len(calls) <= 1 or not parts.is_single
    assert (thought is None) <= (not parts.is_open) and (thought is None or parts.thought[1] not in thought), text
    if parts.is_required:
        assert calls and not said, text
    if form.marker:
        assert form.marker not in said, text
    if thought is None and parts.thought:
        assert not said.startswith(parts.thought[0]), text
    if not calls:
        assert text.endswith(said)
        if content == "json_schema":
            jsonschema.validate(json.loads(said), json.loads(CONTENTS[content][1]))
        elif content == "regex":
            assert re.fullmatch(CONTENTS[content][1], said), text
        elif content == "choice":
            assert said in CONTENTS[content][1], text
    elif content != "any":
        assert not said
    # What is thought and said is where the ends say.
    begin = thought_end or 0
    assert said.strip("\n") == text[begin : content_end if calls else None].strip("\n"), text
    return "calls" if calls else "content"


def test_what_the_splitter_could_not_tell_apart_is_not_in_the_grammar(module, new_parts):
    H = "hermes"
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    other = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    args, tag = "[TOOL_CALLS]now[ARGS]{}", '{"name": "now", "parameters": {}}'
    cases = (
        (H, {}, ("", "Hi", call, f"Hi\n\n{call}\n{call}", "<tool_cal"), (f"{call} ", f"{call}Hi", f"{call}{call}", "<tool_call>", "a<tool_call>b")),
        (H, {}, ("</tool_call>",), (call.replace("now", "then"), call.replace("{}", '{"a": 1}'), call.replace("{}", ""), call.replace("\n", ""), call[:-1])),
        (H, {"is_required": True}, (call, f"\n\n{call}"), ("", "Hi", f"Hi{call}", f"\n\n\n{call}")),
        (H, {"names": ()}, ("Hi",), (call, "<tool_call>", "Hi <tool_call>")),
        (H, {"is_single": True}, (call, f"Hi{call}"), (f"{call}\n{call}",)),
        (H, {"thinks": True}, ("Hi", f"<think>hm</think>{call}", "<think></think>"), ("<think>", "<think>hm", f"<think>{call}", "\n<think>")),
        (H, {"thinks": True}, (f"<think>{call}</think>Hi",), (f"<think>hm</think>{call}Hi", "<think>hm</think><tool_call>")),
        (H, {"thinks": True, "is_open": True}, ("hm</think>Hi", f"</think>{call}"), ("", "hm", call, f"hm{call}")),
        (H, {"thinks": True, "is_open": True, "is_required": True}, (f"hm\n</think>\n\n{call}",), (call, "hm</think>", "hm</think>Hi")),
        ("mistral", {}, (other, f"Hi{other}"), (f"{other} ", f"{other}Hi", "[TOOL_CALLS]", "[TOOL_CALLS][]", other[:-1])),
        ("mistral-args", {}, (args, f"Hi{args}{args}"), ("[TOOL_CALLS]now", f"{args} ", "[TOOL_CALLS]")),
        ("llama3", {}, (tag, f"\n{tag}", "Hi", '{"na', "{}"), (f"{tag}Hi", f"{tag}{tag}", '{"name": "x"}', '\n\n\n{"name": "', tag.replace("now", "no"))),
    )
    for family, options, accepted, refused in cases:
        for is_special in (False, True):
            parts = new_parts(family, is_special=is_special, **options)
            automaton = module("compiler").compile_here("parts", parts)
            for text in (*accepted, *refused):
                assert automaton.accepts(raw_of(parts, text)) == (text in accepted), (family, options, text)


@pytest.mark.parametrize("family", ["mistral", "mistral-args"])
def test_the_name_of_a_special_token_is_not_said_in_other_tokens(module, new_parts, family):
    """What is said would then look like a call, and a thought like its end, to whoever reads the text."""
    automaton = module("compiler").compile_here("parts", new_parts(family, thinks=True, is_special=True))
    assert automaton.accepts(b"[TOOL_CALL") and automaton.accepts(b"\xff[THINK][/THIN\xff[/THINK]Hi")
    assert not automaton.accepts(b"a[TOOL_CALLS]b") and not automaton.accepts(b"\xff[THINK]a[/THINK]b\xff[/THINK]Hi")


# ---- masks


def spellings(tokenizer):
    """What each token adds to a text, found without the chapter; for a special token, the byte 0xFF and its name."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    raws = []
    for token_id in range(len(tokenizer)):
        token, added = tokenizer.convert_ids_to_tokens(token_id), tokenizer.added_tokens_decoder.get(token_id)
        byte = re.fullmatch("<0x(..)>", token)
        if added:
            raws.append(b"\xff" * added.special + token.encode())
        elif byte or "▁" in tokenizer.get_vocab():
            raws.append(bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode())
        else:
            raws.append(bytes(byte_of[character] for character in token))
    return raws


@pytest.fixture
def new_grammars(module):
    def new_grammars(tokenizer, backend="own"):
        return module("grammars").Grammars(tokenizer, len(tokenizer) + 3, (1,), backend, record=lambda compilation: None)

    return new_grammars


def unpacked(mask, size):
    return np.unpackbits(mask, bitorder="little")[:size].astype(bool)


MASKED = [
    ("qwen3", "hermes", {"thinks": True}),
    ("spelled", "hermes", {"thinks": True, "is_open": True, "is_required": True}),
    ("magistral", "mistral-args", {"thinks": True, "is_special": True}),
    ("mistral old", "mistral", {"is_special": True}),
    ("mistral old", "mistral", {"is_special": True, "content": CONTENTS["json_schema"]}),
    ("llama31", "llama3", {}),
]
FEW = ("now", "add_all")  # their automata are small


@pytest.mark.parametrize(("kind", "family", "options"), MASKED, ids=[f"{kind}-{number}" for number, (kind, *_) in enumerate(MASKED)])
def test_a_mask_allows_what_a_walk_of_each_token_allows(new_parts, new_grammars, rng, kind, family, options):
    """Special tokens too: they are allowed only where the form has them, and no other is ever allowed, except the end token."""
    tokenizer = tools_tokenizer(kind)
    raws = spellings(tokenizer)
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    parts = new_parts(family, names=FEW, **options)
    grammar = new_grammars(tokenizer).get(("parts", parts))
    automaton, matcher = grammar.automaton, grammar.start(is_new_text=False)
    ways, table, classes = distances(automaton), automaton.table.tolist(), automaton.classes.tolist()
    ever = np.zeros(len(raws), bool)
    checked = {1, *rng.sample(range(1, len(table)), min(len(table) - 1, 70))}
    for state in range(1, len(table)):
        matcher.state = state
        allowed = unpacked(matcher.mask(), len(raws) + 3)
        ever |= allowed[: len(raws)]
        if state not in checked:
            continue
        for token_id, raw in enumerate(raws):
            at = state
            for byte in raw:
                at = table[at][classes[byte]]
            # An ordinary token that has the byte 0xFF is no part of any text.
            is_text = token_id in special or b"\xff" not in raw
            want = bool(automaton.accepting[state]) if token_id == 1 else is_text and ways[at] < inf
            assert allowed[token_id] == want, (state, raw)
        assert not allowed[len(raws) :].any()
    assert {tokenizer.convert_ids_to_tokens(int(token_id)) for token_id in np.flatnonzero(ever) if token_id in special} == {*parts.special, "</s>"}


# ---- the library


def tokens_of(grammar, size, rng, limit=120):
    """The tokens of a random text that a grammar allows, without the end token; None if it has no end within the limit."""
    matcher, ids = grammar.start(is_new_text=False), []
    for _ in range(limit):
        allowed = np.flatnonzero(unpacked(matcher.mask(), size)).tolist()
        if 1 in allowed and (len(allowed) == 1 or rng.random() < 0.15):
            return ids
        ids.append(rng.choice([token_id for token_id in allowed if token_id != 1]))
        if not matcher.advance(ids[-1]):
            return ids
    return None


def refused_at(grammar, ids, size):
    """The index of the first of these tokens that a mask does not allow, their number for the end; None if all are allowed."""
    matcher, goes_on = grammar.start(is_new_text=False), True
    for index, token_id in enumerate(ids):
        if not goes_on or not unpacked(matcher.mask(), size)[token_id]:
            return index
        goes_on = matcher.advance(token_id)
    return len(ids) if goes_on and not unpacked(matcher.mask(), size)[1] else None


@pytest.mark.parametrize(("kind", "family", "options"), MASKED, ids=[f"{kind}-{number}" for number, (kind, *_) in enumerate(MASKED)])
def test_the_library_accepts_what_the_automaton_accepts(new_parts, new_grammars, split, rng, kind, family, options):
    """In the tokens that the tokenizer makes. To the library, an added token such as <think> is no part of any other text."""
    tokenizer = tools_tokenizer(kind)
    size, added = len(tokenizer) + 3, tokenizer.get_added_vocab()
    parts = new_parts(family, names=FEW, **options)
    form = parts.form
    own, its = (new_grammars(tokenizer, backend).get(("parts", parts)) for backend in ("own", "llguidance"))
    walker = Walker(own.automaton)
    texts = [written(parts, "hm" if parts.is_open else None, "", random_calls(rng, parts), rng) for _ in range(20)]
    texts += [walk(walker, own.automaton, rng, parts) for _ in range(25)]
    compared = 0
    for text in texts:
        thought, said, calls, *_ = split(parts, [text])
        ids = tokenizer(text, add_special_tokens=False).input_ids
        # A space that is not in the text.
        ids = ids[1:] if ids and tokenizer.convert_ids_to_tokens(ids[0]) == "▁" else ids
        if any(name in (thought or "") + said + "".join(call[2] for call in calls) for name in added) or tokenizer.decode(ids) != text:
            continue
        # It does not go back to where a text might have ended: line breaks before a call without a marker begin what is said.
        if calls and not form.marker and text.startswith("\n"):
            continue
        for grammar in (own, its):
            place = refused_at(grammar, ids, size)
            assert place is None, (text, tokenizer.convert_ids_to_tokens(ids[:place]), tokenizer.convert_ids_to_tokens(ids[place:]))
        compared += 1
    assert compared > 8
    for ids in filter(None, (tokens_of(its, size, rng) for _ in range(12))):
        text = tokenizer.decode(ids)
        check_parts(parts, "json_schema" if parts.content else "any", text, split(parts, [text]))


TREE = {
    "type": "object",
    "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
    "required": ["kids"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(("kind", "family", "options"), MASKED[1:4], ids=[kind for kind, *_ in MASKED[1:4]])
def test_calls_whose_arguments_nest_are_the_librarys_and_are_told_apart_too(module, new_parts, new_grammars, split, rng, kind, family, options):
    tokenizer = tools_tokenizer(kind)
    parts = new_parts(family, is_required=True, is_special="is_special" in options)
    parts = replace(parts, tools=(module("parts").Tool("tree", json.dumps(TREE), True, "tools[0]"), parts.tools[1]))
    grammar = new_grammars(tokenizer, "auto").get(("parts", parts))
    assert type(grammar).__name__ == "GuidanceGrammar"
    seen = set()
    for ids in filter(None, (tokens_of(grammar, len(tokenizer) + 3, rng, 200) for _ in range(25))):
        text = tokenizer.decode(ids)
        _, said, calls, are_whole, *_ = split(parts, [*text])
        assert are_whole and not said
        for _, name, arguments, _ in calls:
            jsonschema.validate(json.loads(arguments), TREE if name == "tree" else NOTHING)
            seen.add((name, "[{" in arguments))
    assert seen == {("now", False), ("tree", False), ("tree", True)}


@pytest.mark.parametrize("options", [{}, {"thinks": True, "is_required": True}, {"content": CONTENTS["choice"]}], ids=["any", "required", "choice"])
def test_the_library_follows_calls_of_many_tools(module, new_parts, new_grammars, split, rng, options):
    """What looks for escapes in their arguments used to be an automaton of a state for each set of names that are still possible."""
    tokenizer = tools_tokenizer("qwen3")
    parts, tool = new_parts("hermes", **options), module("parts").Tool
    others = tuple(tool(f"now_{number}", json.dumps(NOTHING), True, "tools[0]") for number in range(60))
    parts = replace(parts, tools=(tool("tree", json.dumps(TREE), True, "tools[0]"), *others))
    begun = time.monotonic()
    grammar = new_grammars(tokenizer, "auto").get(("parts", parts))
    assert type(grammar).__name__ == "GuidanceGrammar" and time.monotonic() - begun < 20
    for ids in filter(None, (tokens_of(grammar, len(tokenizer) + 3, rng, 200) for _ in range(12))):
        for _, name, arguments, _ in split(parts, [tokenizer.decode(ids)])[2]:
            jsonschema.validate(json.loads(arguments), TREE if name == "tree" else NOTHING)


def test_in_the_library_too_no_empty_line_begins_what_is_said_after_a_thought(module, new_parts, new_grammars):
    """The splitter would drop it, and what is left would be no choice."""
    tokenizer = tools_tokenizer("qwen3")
    parts = new_parts("hermes", thinks=True, content=("choice", ("yes", "\nno")))
    parts = replace(parts, tools=(module("parts").Tool("tree", json.dumps(TREE), True, "tools[0]"),))
    grammar = new_grammars(tokenizer, "auto").get(("parts", parts))
    for text, is_refused in (("\nyes", False), ("\n\nyes", False), ("\nno", True), ("\n\nno", True)):
        ids = tokenizer(f"<think>a</think>{text}", add_special_tokens=False).input_ids
        assert (refused_at(grammar, ids, len(tokenizer) + 3) is not None) == is_refused, text


# ---- what a template shows


def test_each_template_shows_its_form_and_how_it_thinks(module):
    forms = module("tools").FORMS
    shown = {
        "hermes": ("hermes", True, None, ()),
        "qwen3": ("hermes", True, ANGLES, ()),
        "r1": ("hermes", True, ANGLES, ()),
        "coder": (None, True, None, ()),
        "llama31": ("llama3", True, None, ()),
        "llama32": ("llama3", True, None, ()),
        "mistral": ("mistral-args", True, None, ("[TOOL_CALLS]", "[ARGS]")),
        "mistral old": ("mistral", True, None, ("[TOOL_CALLS]",)),
        "magistral": ("mistral-args", True, SQUARES, ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")),
        "nemotron": ("nemotron", True, None, ()),
        "apriel": ("apriel", True, None, ()),
        "minimax": ("minimax", True, None, ()),
        "no tools": ("hermes", False, None, ()),
        "spelled": ("hermes", True, ANGLES, ()),
        "all special": ("hermes", True, ANGLES, MARKS),
    }
    assert set(shown) == set(KINDS)
    for kind, (form, has_tools, thought, special) in shown.items():
        tokenizer = tools_tokenizer(kind)
        family = module("tools").family_of(tokenizer)
        assert (family.form, family.has_tools, family.thought) == (form and forms[form], has_tools, thought), kind
        assert sorted(family.special) == sorted(special), kind
        assert family.options == {"qwen3": {"enable_thinking"}, "spelled": {"enable_thinking"}, "llama31": {"builtin_tools"}}.get(kind, set())
        assert len(family.new_call_id()) == (9 if "mistral" in kind or kind == "magistral" else 29)
    # Of several templates, the one for tools counts.
    tokenizer.chat_template = {"default": KINDS["no tools"].template, "tool_use": KINDS["llama31"].template}
    assert module("tools").family_of(tokenizer).form == forms["llama3"]


# ---- over HTTP, by engines that say what the test wants

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": ADD}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "note": "é\\" }"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ASKED = [{"role": "user", "content": "What?"}]


@pytest.fixture(scope="module")
def served(chapter, tmp_path_factory):
    """Servers by the kind of their checkpoint, each with a script."""
    with ExitStack() as stack:
        servers = {}
        stack.enter_context(compiled_here(lambda name: importlib.import_module(f"milestones.{chapter.name}.{name}")))

        def served(kind):
            if kind not in servers:
                path = tools_checkpoint(kind, tmp_path_factory.mktemp("tools") / kind)
                engine = chapter.load().Engine(path, dtype="float32", max_num_seqs=4, max_model_len=1024)
                script = Script(engine)
                server = stack.enter_context(serving(chapter, engine, log_format="none"))
                server.say, server.engine, server.script = script.say, engine, script
                servers[kind] = server
            return servers[kind]

        yield served


@pytest.fixture
def server(served):
    return served("qwen3")


def ask(server, path="/v1/chat/completions", **body):
    body = {"model": "pocket", **({"messages": ASKED, "temperature": 0} if "chat" in path else {"input": "What?", "temperature": 0}), **body}
    answer = post(server, path, body)
    assert answer.status_code == 200, answer.text
    return events_of(answer) if body.get("stream") and "chat" in path else answer.json()


def whole_and_streamed(server, **body):
    """An answer as one body, its choices without ids, which are each call's own; the stream of the same must say the same."""
    whole = ask(server, **body)
    events = ask(server, stream=True, stream_options={"include_usage": True}, **body)
    [choice], streamed = whole["choices"], message_of(events)
    ids = [call["id"] for message in (choice["message"], streamed["message"]) for call in message.get("tool_calls", ())]
    assert len(set(ids)) == len(ids), "an id is used twice"
    for message in (choice["message"], streamed["message"]):
        for call in message.get("tool_calls", ()):
            del call["id"]
        message.pop("refusal", None)
    assert choice["message"] == streamed["message"]
    assert choice["finish_reason"] == streamed["finish_reason"]
    for usage in (whole["usage"], streamed["usage"]):
        del usage["prompt_tokens_details"]
    assert whole["usage"] == streamed["usage"]
    return choice["message"], choice["finish_reason"], whole["usage"]


def function(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ARGUMENTS = '{"a": 1, "note": "é\\" }"}'


@pytest.mark.parametrize("in_pieces", [False, True], ids=["tokens", "pieces"])
def test_an_answer_in_all_its_parts(server, in_pieces):
    said = server.say(f"<think>\nHm.\n</think>\n\nLet me\n\nsee.\n{CALL}\n{NOW}", in_pieces)
    message, reason, usage = whole_and_streamed(server, tools=TOOLS)
    assert message == {
        "role": "assistant",
        "content": "Let me\n\nsee.",
        "reasoning_content": "Hm.",
        "tool_calls": [function("add", ARGUMENTS), function("now", "{}")],
    }
    assert reason == "tool_calls" and usage["completion_tokens"] == len(said) + 1


def test_an_answer_without_calls_has_no_list_of_them(server):
    """Neither empty nor null: some clients take any list for calls."""
    for tools in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": [], "tool_choice": "none"}):
        server.say("<think>\nHm.\n</think>\n\nHi.")
        message, reason, _ = whole_and_streamed(server, **tools)
        assert message == {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."} and reason == "stop"
        server.say("Hi <tool.")
        assert whole_and_streamed(server, **tools)[0] == {"role": "assistant", "content": "Hi <tool."}
        server.say("")
        assert whole_and_streamed(server, **tools)[0] == {"role": "assistant", "content": ""}


def test_tool_choice_decides_what_may_be_called(server):
    """Whatever the model would like to say."""
    server.say(f"{NOW}\n{CALL}")
    named = {"type": "function", "function": {"name": "now"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}}
    for options, names in (
        ({}, ["now", "add"]),
        ({"tool_choice": "auto"}, ["now", "add"]),
        ({"tool_choice": "required"}, ["now", "add"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["now"]),
        ({"parallel_tool_calls": False}, ["now"]),
        ({"tool_choice": named}, ["now"]),
    ):
        message, reason, _ = whole_and_streamed(server, tools=TOOLS, **options)
        assert [call["function"]["name"] for call in message["tool_calls"]] == names and reason == "tool_calls", options
        assert message["content"] is None
    server.say(f"Hi.{NOW}\n{NOW}")
    message, reason, _ = whole_and_streamed(server, tools=TOOLS, tool_choice=allowed, max_tokens=60)
    assert message["content"] is None and {call["function"]["name"] for call in message["tool_calls"]} == {"now"}
    server.say(NOW)
    message, *_ = whole_and_streamed(server, tools=TOOLS, tool_choice="none", max_tokens=60)
    assert "tool_calls" not in message and "<tool_call>" not in message["content"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("coder", "apriel")])
def test_each_family_calls_in_its_own_form(served, kind):
    """And the client may send the answer back, with a result."""
    server = served(kind)
    parts = server.service.family
    form = parts.form
    call = form.marker + form.before[0] + form.opening + "add" + form.middle + '{"a": 2}' + form.closing + form.after
    thought = "".join(parts.thought or ()) if kind != "r1" else "</think>"
    server.say(thought + call)
    for choice in ("auto", "required"):
        answer = ask(server, tools=TOOLS, tool_choice=choice)
        [got] = answer["choices"]
        assert got["finish_reason"] == "tool_calls" and got["message"]["content"] is None
        assert [each["function"] for each in got["message"]["tool_calls"]] == [{"name": "add", "arguments": '{"a": 2}'}]
        assert not got["message"].get("reasoning_content")
    call_id = got["message"]["tool_calls"][0]["id"]
    turns = [*ASKED, got["message"], {"role": "tool", "tool_call_id": call_id, "content": "2 and nothing"}]
    server.say(("</think>" if kind == "r1" else "") + "It is 2.")
    answer = ask(server, messages=turns, tools=TOOLS)
    assert answer["choices"][0]["message"]["content"] == "It is 2." and answer["choices"][0]["finish_reason"] == "stop"
    prompt = detokenized(server, messages=turns, tools=TOOLS)
    # The template wrote them as this family does, with arguments that are no string in a string.
    assert '{"a": 2}' in prompt and "add" in prompt and "2 and nothing" in prompt


def detokenized(server, **body):
    tokens = post(server, "/tokenize", {"model": "pocket"} | body).json()
    return server.engine.tokenizer.decode(tokens["tokens"])


# ---- cut at every place

PARTS = f"<think>\nHm é.\n</think>\n\nLet <tool\n\n{CALL}\n{NOW}"


@pytest.mark.whole
@pytest.mark.parametrize("in_pieces", [False, True], ids=["tokens", "pieces"])
def test_an_answer_that_max_tokens_cuts_says_so_and_streams_the_same(server, rng, in_pieces):
    """At any token. Nothing is repaired, what is not yet known is not said, and no half of a marker is lost."""
    said = server.say(PARTS, in_pieces)
    [whole] = ask(server, tools=TOOLS)["choices"]
    within = 12 if in_pieces else 5  # the thought
    counts = [*sorted({within, *rng.sample(range(1, len(said)), 4 if in_pieces else 15)}), len(said), len(said) + 1]
    num_calls = 0
    for count in counts:
        message, reason, usage = whole_and_streamed(server, tools=TOOLS, max_tokens=count)
        text = server.engine.tokenizer.decode(said[:count])
        assert usage["completion_tokens"] == count and reason == ("tool_calls" if count > len(said) else "length")
        thought, said_so_far, calls = message.get("reasoning_content", ""), message["content"], message.get("tool_calls", [])
        if "</think>" not in text and text.startswith("<think>"):
            assert said_so_far is None and text.removeprefix("<think>").lstrip("\n") == thought
        elif "</think>" in text:
            assert thought == whole["message"]["reasoning_content"]
        if "</think>" in text and "<tool_call>" not in text:
            assert said_so_far == text.split("</think>")[1].lstrip("\n"), text
        elif "<tool_call>" in text:
            assert said_so_far == whole["message"]["content"]
        assert len(calls) == text.count('", "arguments": '), text
        for got, want in zip(calls, whole["message"]["tool_calls"]):
            assert got["function"]["name"] == want["function"]["name"]
            assert want["function"]["arguments"].startswith(got["function"]["arguments"].rstrip("\ufffd"))
        num_calls = len(calls)
    assert num_calls == 2 and ("tool_calls" in message) == bool(calls)


@pytest.mark.whole
def test_a_forced_call_that_max_tokens_cuts(server):
    """As soon as the name is known, it is a call; before, the message is empty. The template has ended the thought."""
    said = server.say(f"{NOW}\n{NOW}")
    seen = set()
    for count in [*range(1, len(said), 5), len(said), len(said) + 1]:
        message, reason, _ = whole_and_streamed(server, tools=TOOLS, tool_choice="required", max_tokens=count, chat_template_kwargs={"enable_thinking": False})
        text = server.engine.tokenizer.decode(said[:count])
        calls = message.get("tool_calls", [])
        assert len(calls) == text.count('", "arguments": ') and message["content"] is None and ("tool_calls" in message) == bool(calls)
        assert reason == ("tool_calls" if count > len(said) else "length") and "reasoning_content" not in message
        seen.add(len(calls))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("stop", "message", "calls"),
    [
        ("Hm", {"content": None}, []),
        (".\n</thi", {"content": None, "reasoning_content": "Hm é"}, []),
        ("</think>", {"content": None, "reasoning_content": "Hm é.\n"}, []),
        ("Let", {"content": "", "reasoning_content": "Hm é."}, []),
        ("<tool", {"content": "Let ", "reasoning_content": "Hm é."}, []),
        ("_call>", {"content": "Let <tool\n\n<tool", "reasoning_content": "Hm é."}, []),
        ("add", {"content": "Let <tool", "reasoning_content": "Hm é."}, []),
        ("note", {"content": "Let <tool", "reasoning_content": "Hm é."}, [("add", '{"a": 1, "')]),
        ('}"}}', {"content": "Let <tool", "reasoning_content": "Hm é."}, [("add", '{"a": 1, "note": "é\\" ')]),
        ("}}\n</tool_call>", {"content": "Let <tool", "reasoning_content": "Hm é."}, [("add", '{"a": 1, "note": "é\\" }"')]),
        ("now", {"content": "Let <tool", "reasoning_content": "Hm é."}, [("add", ARGUMENTS)]),
    ],
    ids=str,
)
def test_a_stop_string_ends_an_answer_wherever_it_is_and_a_call_that_it_cuts_is_none_to_run(server, stop, message, calls):
    """The reason is stop; a client that finds tool_calls would run a function with half of its arguments."""
    server.say(PARTS)
    got, reason, _ = whole_and_streamed(server, tools=TOOLS, stop=[stop])
    want = {"role": "assistant"} | message | ({"tool_calls": [function(*call) for call in calls]} if calls else {})
    assert got == want and reason == "stop"


def test_a_stop_string_after_all_calls_leaves_them_whole(server):
    server.say(CALL)
    message, reason, _ = whole_and_streamed(server, tools=TOOLS, tool_choice="required", stop=["</tool_call>"])
    assert message["tool_calls"] == [function("add", ARGUMENTS)] and reason == "tool_calls"


def test_a_client_that_leaves_within_a_call_leaves_nothing(server):
    server.say(PARTS)
    body = {"model": "pocket", "messages": ASKED, "tools": TOOLS, "stream": True, "temperature": 0}
    with HTTP.stream("POST", f"{server.url}/v1/chat/completions", json=body) as stream:
        for line in stream.iter_lines():
            if "arguments" in line:
                break
    wait_until(lambda: not server.engine.has_unfinished_requests() and not server.service.async_engine.active_generations)
    assert ask(server, tools=TOOLS)["choices"][0]["finish_reason"] == "tool_calls"


def test_choices_are_told_apart_each_by_itself(server):
    server.say(PARTS)
    answer = ask(server, tools=TOOLS, n=3)
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids) == 6
    events = ask(server, tools=TOOLS, n=3, stream=True)
    for index in range(3):
        own = [{"choices": [choice for choice in event["choices"] if choice["index"] == index]} for event in events]
        streamed = message_of(own)["message"]
        assert [call["function"] for call in streamed["tool_calls"]] == [call["function"] for call in answer["choices"][index]["message"]["tool_calls"]]


# ---- what reaches the template


def test_a_history_with_calls_reaches_the_template_as_it_expects_it(server, monkeypatch):
    """Arguments as objects, results with the name of their function, tools without what only this server needs."""
    seen = []
    tokenizer = server.service.async_engine.runner.tokenizer
    apply = type(tokenizer).apply_chat_template

    def spy(self, messages, **options):
        seen.append((messages, options))
        return apply(self, messages, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", spy)
    calls = [{"id": call_id, **function(name, arguments)} for call_id, name, arguments in (("c1", "add", '{"a": 1}'), ("c2", "now", ""))]
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " and"}]},
        {"role": "assistant", "content": "It is noon.", "tool_calls": []},
        {"role": "user", "content": "And?"},
    ]
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    server.say("")
    ask(server, messages=turns, tools=tools, chat_template_kwargs={"enable_thinking": False})
    [(messages, options)] = seen
    assert messages == [
        *ASKED,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                {"id": "c2", "type": "function", "function": {"name": "now", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "noon", "name": "now"},
        {"role": "tool", "tool_call_id": "c1", "content": "one and", "name": "add"},
        {"role": "assistant", "content": "It is noon."},
        {"role": "user", "content": "And?"},
    ]
    assert options["tools"] == TOOLS and options["enable_thinking"] is False


def test_a_template_that_knows_no_tools_gets_them_as_text(served):
    server = served("no tools")
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    results = [{"role": "tool", "tool_call_id": "c1", "content": text} for text in ("one", "two")]
    turns = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": "Well.", "tool_calls": calls}, *results]
    prompt = detokenized(server, messages=turns, tools=TOOLS)
    assert prompt.startswith("<s><|system|>Be brief.\n\nYou may call these functions") and '{"name": "now"}' in prompt
    assert 'Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|end|><|user|>' in prompt
    assert "<|user|><tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|end|>" in prompt
    assert detokenized(server, messages=ASKED, tools=TOOLS).startswith("<s><|system|>You may call")
    assert "may call" not in detokenized(server, messages=ASKED)


def test_the_end_of_a_prompt_says_whether_the_answer_is_thought(served):
    """It ends with <think>, with </think>, or with neither."""
    thinks, r1 = served("qwen3"), served("r1")
    for server in (thinks, r1):
        server.say("Hm.</think>Hi.")
    assert whole_and_streamed(r1)[0] == {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}
    assert whole_and_streamed(thinks)[0] == {"role": "assistant", "content": "Hm.</think>Hi."}
    assert whole_and_streamed(r1, max_tokens=1)[0]["content"] is None
    for server in (thinks, r1):
        server.say("<think>Hm.</think>Hi.")
    assert whole_and_streamed(thinks)[0] == {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}
    assert whole_and_streamed(thinks, chat_template_kwargs={"enable_thinking": False})[0]["content"] == "<think>Hm.</think>Hi."
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert detokenized(thinks, messages=ASKED, **off).endswith("<think>\n\n</think>\n\n")
        # This one always thinks, so it cannot be told not to.
        for path in ("/v1/chat/completions", "/tokenize"):
            assert refused(r1, path, {"messages": ASKED} | off)["param"] == next(iter(off))
    assert detokenized(r1, messages=ASKED).endswith("<think>\n")


def test_a_form_that_is_asked_for_begins_after_the_thought(served):
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": FINISH | {"properties": {"ok": {"type": "boolean"}}}}}
    for kind in ("qwen3", "r1", "magistral"):
        server = served(kind)
        opening, closing = server.service.family.thought
        server.say(f"{'' if kind == 'r1' else opening}Hm, well.{closing}" + '{"ok": true}')
        for tools in ({}, {"tools": TOOLS}):
            message, reason, _ = whole_and_streamed(server, response_format=shape, **tools)
            assert (message["reasoning_content"], message["content"], reason) == ("Hm, well.", '{"ok": true}', "stop")


# ---- what is counted


def test_the_tokens_of_a_thought_are_counted_exactly(served):
    """Its markers are part of it; neither what follows it nor the end token is."""
    for kind, opening in (("qwen3", "<think>"), ("spelled", "<think>"), ("r1", ""), ("magistral", "[THINK]")):
        server = served(kind)
        closing = server.service.family.thought[1]
        thought, rest = f"{opening}\nHm é🙂.\n{closing}", "\n\nHi."
        said = server.say(thought + rest)
        count = sum(len(server.engine.tokenizer.decode(said[: index + 1])) <= len(thought) for index in range(len(said)))
        before = counters(server)
        _, _, usage = whole_and_streamed(server)
        assert usage["completion_tokens_details"] == {"reasoning_tokens": count} and usage["completion_tokens"] == len(said) + 1
        _, _, usage = whole_and_streamed(server, max_tokens=2)
        # Two tokens that may begin a marker are no thought yet.
        cut = 0 if kind == "spelled" else 2
        assert usage["completion_tokens_details"] == {"reasoning_tokens": cut}
        response = ask(server, "/v1/responses")
        assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": count}
        assert counters(server) == {"reasoning_tokens": before["reasoning_tokens"] + 3 * count + 2 * cut, "tool_calls": before["tool_calls"]}
        server.say(rest)
        assert whole_and_streamed(server)[2]["completion_tokens_details"]["reasoning_tokens"] == (len(server.say(rest)) + 1 if kind == "r1" else 0)


def counters(server):
    # Those who ask within a moment get the same.
    server.service.shared.clear()
    scraped = HTTP.get(f"{server.url}/metrics").text
    return {name: float(re.search(f"^stepserve_{name}_total (.*)$", scraped, re.MULTILINE)[1]) for name in ("reasoning_tokens", "tool_calls")}


def test_calls_are_counted(server):
    before = counters(server)["tool_calls"]
    server.say(PARTS)
    ask(server, tools=TOOLS), ask(server, tools=TOOLS, n=2), ask(server, tools=TOOLS, stream=True)
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    ask(server, "/v1/responses", tools=tools)
    assert counters(server)["tool_calls"] == before + 2 * 5


@pytest.mark.parametrize("in_pieces", [False, True], ids=["tokens", "pieces"])
def test_logprobs_list_every_token_of_every_part(server, in_pieces):
    said = server.say(PARTS, in_pieces)
    answer = ask(server, tools=TOOLS, logprobs=True, top_logprobs=2)
    listed = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in listed).decode() == PARTS
    assert len(listed) == len(said) == answer["usage"]["completion_tokens"] - 1
    events = ask(server, tools=TOOLS, logprobs=True, top_logprobs=2, stream=True)
    streamed = [each for event in events for choice in event["choices"] if choice.get("logprobs") for each in choice["logprobs"]["content"]]
    assert [each["token"] for each in streamed] == [each["token"] for each in listed]


# ---- responses

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]


def response_events(server, **body):
    answer = post(server, "/v1/responses", {"model": "pocket", "input": "What?", "temperature": 0, "stream": True} | body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line.startswith("data: ")]


def plain_items(output):
    """A response's items, without ids, which must be unique."""
    ids = [each["id"] for each in output] + [each["call_id"] for each in output if each["type"] == "function_call"]
    assert len(set(ids)) == len(ids)
    return [{name: value for name, value in each.items() if name not in ("id", "call_id")} for each in output]


ITEMS = [
    {"status": "completed", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm é."}]},
    {
        "status": "completed",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Let <tool", "annotations": [], "logprobs": []}],
    },
    {"status": "completed", "type": "function_call", "name": "add", "arguments": ARGUMENTS},
    {"status": "completed", "type": "function_call", "name": "now", "arguments": "{}"},
]


@pytest.mark.parametrize("in_pieces", [False, True], ids=["tokens", "pieces"])
def test_a_response_has_an_item_for_each_part_and_events_of_each_in_order(server, in_pieces):
    server.say(PARTS, in_pieces)
    whole = ask(server, "/v1/responses", tools=FLAT)
    assert plain_items(whole["output"]) == ITEMS and whole["status"] == "completed"
    events = response_events(server, tools=FLAT)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [kind for kind, _ in itertools.groupby(event["type"].removeprefix("response.") for event in events)]
    thought = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"]
    said = [kind.replace("reasoning", "output") for kind in thought]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds == ["created", "in_progress", *thought, *said, *call, *call, "completed"]
    items = {}
    for event in events:
        if event["type"] == "response.output_item.added":
            items[event["output_index"]] = event["item"], ""
            assert event["output_index"] == len(items) - 1 and event["item"]["status"] == "in_progress" and not event["item"].get("arguments")
        elif event["type"].endswith(".delta"):
            item, text = items[event["output_index"]]
            assert event["item_id"] == item["id"] and event["delta"]
            items[event["output_index"]] = item, text + event["delta"]
        elif event["type"] == "response.output_item.done":
            item, text = items[event["output_index"]]
            done = event["item"]
            assert (done["id"], done.get("call_id")) == (item["id"], item.get("call_id")) and done["status"] == "completed"
            assert text == (done["arguments"] if done["type"] == "function_call" else done["content"][0]["text"])
    assert plain_items(events[-1]["response"]["output"]) == ITEMS


def test_a_conversation_of_responses_goes_on_with_results(server):
    """By previous_response_id, or by sending all items back: thoughts, messages, calls and results."""
    server.say(PARTS)
    first = ask(server, "/v1/responses", tools=FLAT)
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": f"result {call['name']}"} for call in calls]
    server.say("So it is.")
    seen = []
    for options in (
        {"previous_response_id": first["id"], "input": results},
        {"input": [{"role": "user", "content": "What?"}, *first["output"], *results]},
    ):
        answer = ask(server, "/v1/responses", tools=FLAT, **options)
        assert plain_items(answer["output"])[0]["content"][0]["text"] == "So it is."
        seen.append(answer["usage"]["input_tokens"])
    # Both are the same conversation, which is the one that chat has.
    turns = [
        {"role": "user", "content": "What?"},
        {
            "role": "assistant",
            "content": "Let <tool",
            "reasoning_content": "Hm é.",
            "tool_calls": [{"id": call["call_id"], **function(call["name"], call["arguments"])} for call in calls],
        },
        *({"role": "tool", "tool_call_id": each["call_id"], "content": each["output"]} for each in results),
    ]
    assert seen == [len(post(server, "/tokenize", {"messages": turns, "tools": TOOLS}).json()["tokens"])] * 2


@pytest.mark.whole
def test_a_response_that_is_cut_has_an_incomplete_item_and_does_not_go_on_within_a_call(server):
    said = server.say(PARTS)
    tokenizer, seen = server.engine.tokenizer, set()
    for count in (2, 4, *range(7, len(said), 13)):
        whole = ask(server, "/v1/responses", tools=FLAT, max_output_tokens=count)
        events = response_events(server, tools=FLAT, max_output_tokens=count)
        assert plain_items(whole["output"]) == plain_items(events[-1]["response"]["output"]) and events[-1]["type"] == "response.incomplete"
        assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
        text, last = tokenizer.decode(said[:count]), whole["output"][-1]
        in_call = '"arguments": ' in text.rpartition("<tool_call>")[2] and "}}" not in text.rpartition("<tool_call>")[2]
        if in_call:
            assert last["type"] == "function_call" and last["status"] == "incomplete"
        assert all(item["status"] == "completed" for item in whole["output"][:-1])
        on = post(server, "/v1/responses", {"model": "pocket", "input": "And?", "previous_response_id": whole["id"], "max_output_tokens": 1})
        assert on.status_code == (400 if in_call else 200), (text, on.text)
        if in_call:
            assert on.json()["error"]["param"] == "previous_response_id" and "cut off within a call" in on.json()["error"]["message"]
        seen.add((last["type"], last["status"]))
    assert {("reasoning", "incomplete"), ("message", "incomplete"), ("function_call", "incomplete")} <= seen


def test_a_response_that_is_cut_before_its_calls_name_has_an_incomplete_message(server):
    server.say('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    asked = {"tools": FLAT, "tool_choice": "required", "max_output_tokens": 4}
    answer = ask(server, "/v1/responses", **asked)
    assert [(item["type"], item["status"]) for item in answer["output"]] == [("message", "incomplete")] and answer["status"] == "incomplete"
    events = response_events(server, **asked)
    assert [event["item"]["status"] for event in events if event["type"] == "response.output_item.done"] == ["incomplete"]


def test_a_background_response_has_the_same_items(server):
    server.say(PARTS)
    answer = ask(server, "/v1/responses", tools=FLAT, background=True)
    address = f"{server.url}/v1/responses/{answer['id']}"
    wait_until(lambda: HTTP.get(address).json()["status"] == "completed")
    assert plain_items(HTTP.get(address).json()["output"]) == ITEMS


@pytest.mark.parametrize("in_pieces", [False, True], ids=["tokens", "pieces"])
def test_logprobs_of_a_response_are_those_of_its_message_alone(served, in_pieces):
    for kind, said in (("qwen3", PARTS), ("magistral", "[THINK]Hm é.[/THINK]Let <tool[TOOL_CALLS]now[ARGS]{}")):
        server = served(kind)
        server.say(said, in_pieces and kind == "qwen3")
        asked = {"tools": FLAT, "include": ["message.output_text.logprobs"]}
        answer = ask(server, "/v1/responses", **asked)
        [message] = [item for item in answer["output"] if item["type"] == "message"]
        listed = message["content"][0]["logprobs"]
        assert b"".join(bytes(each["bytes"]) for each in listed).decode().strip("\n") == "Let <tool" == message["content"][0]["text"]
        events = response_events(server, **asked)
        streamed = [each["token"] for event in events if event["type"] == "response.output_text.delta" for each in event["logprobs"]]
        assert streamed == [each["token"] for each in listed]


def test_a_response_chooses_tools_as_chat_does(server):
    server.say(f"{NOW}\n{NOW}\n{CALL}")
    for choice, names in (
        ("required", ["now", "now", "add"]),
        ({"type": "function", "name": "now"}, ["now"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}, ["now", "now"]),
    ):
        answer = ask(server, "/v1/responses", tools=FLAT, tool_choice=choice, max_output_tokens=150)
        assert [item["name"] for item in answer["output"] if item["type"] == "function_call"][: len(names)] == names
        assert answer["tool_choice"] == choice and [tool["name"] for tool in answer["tools"]] == ["add", "now"]
    answer = ask(server, "/v1/responses", tools=FLAT, tool_choice="none", max_output_tokens=20)
    assert [item["type"] for item in answer["output"]] == ["message"]


def test_an_answer_without_any_part_can_be_sent_back(server):
    """It is cut off before its thought has begun. Clients append the message to the conversation, whatever it holds."""
    ask(server, messages=[*ASKED, {"role": "assistant", "content": None, "refusal": None}, *ASKED], max_tokens=1)


# ---- what is refused

USED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def called_with(**fields):
    return {"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [USED | fields]}]}


REFUSED = (
    ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "c9", "content": "1"}]}, "messages[1].tool_call_id", "no call before it has this id"),
    ({"messages": [*ASKED, {"role": "tool", "content": "1"}]}, "messages[1].tool_call_id", "is missing"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "c1"}]}, "messages[0].tool_call_id", "is not for a message with the role user"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [USED]}]}, "messages[0].tool_calls", "is not for a message with the role user"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "system", "content": None}]}, "messages[0].content", "is missing"),
    (called_with(function={"name": "add", "arguments": '{"a": 1'}), "messages[1].tool_calls[0].function.arguments", "if the answer was cut off"),
    (called_with(function={"name": "add", "arguments": "[1]"}), "messages[1].tool_calls[0].function.arguments", "must be a JSON object: got [1]; if"),
    (called_with(function={"name": "add", "arguments": "{" * 3000}), "messages[1].tool_calls[0].function.arguments", "must be a JSON object"),
    (called_with(function={"name": "add", "arguments": '{"a": NaN}'}), "messages[1].tool_calls[0].function.arguments", "must be a JSON object"),
    (called_with(function={"name": "add", "arguments": '{"a": 1e400}'}), "messages[1].tool_calls[0].function.arguments", "must be a JSON object"),
    (called_with(function={"name": "add", "arguments": '{"a": ' + "1" * 5000 + "}"}), "messages[1].tool_calls[0].function.arguments", "must be a JSON object"),
    (called_with(function={"name": "add", "arguments": '{"a": [' + "{}, " * 60_000 + "{}]}"}), "messages", "the calls in messages have more than 50,000 values in their arguments"),
    (called_with(function={"name": "add", "arguments": {"a": 1}}), "messages[1].tool_calls[0].function.arguments", ""),
    (called_with(function={"name": "a b", "arguments": "{}"}), "messages[1].tool_calls[0].function.name", ""),
    ({"tools": [TOOLS[0], TOOLS[1], TOOLS[0]]}, "tools[2].function", "as an earlier one; rename one of them"),
    ({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, "tools[0].function.name", ""),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "should be 'function'"),
    ({"tools": [TOOLS[1]] * 129}, "tools", ""),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", ""),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "these are 'add', 'now'"),
    ({"chat_template_kwargs": {"enable_thinkin": False}}, "chat_template_kwargs", "does not know 'enable_thinkin'; it knows enable_thinking"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "does not know 'tools'"),
    ({"tools": TOOLS, "grammar": 'start: "a"'}, "grammar", "cannot be combined with tools"),
    ({"tools": TOOLS, "tool_choice": "required", "grammar": 'start: "a"'}, "grammar", "cannot be combined with tools"),
    ({"tools": TOOLS, "tool_choice": "none", "structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs.grammar", "cannot be combined with tools"),
    ({"tools": TOOLS, "min_tokens": 3}, "min_tokens", "cannot be combined with tools"),
)


def test_a_parameter_of_several_forms_has_its_own_name(server):
    for path, given, param in (
        ("/v1/chat/completions", {"type": "function", "function": {"name": 3}}, "tool_choice.function.name"),
        ("/v1/chat/completions", {"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": [{"type": "function", "function": {"name": "now"}}]}}, "tool_choice.allowed_tools.mode"),
        ("/v1/chat/completions", 3, "tool_choice"),
        ("/v1/responses", {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": 3}]}, "tool_choice.tools[0].name"),
    ):
        prompt = {"input": "a", "tools": FLAT} if path == "/v1/responses" else {"messages": ASKED, "tools": TOOLS}
        assert refused(server, path, prompt | {"tool_choice": given})["param"] == param, given


@pytest.mark.parametrize(("body", "param", "said"), REFUSED, ids=[f"{param}-{number}" for number, (_, param, _) in enumerate(REFUSED)])
def test_an_error_names_the_clients_own_parameter(server, body, param, said):
    error = refused(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 3} | body)
    assert error["param"].startswith(param) and said in error["message"], error


def refused(server, path, body):
    answer = post(server, path, {"model": "pocket"} | body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_an_error_of_a_response_names_its_parameter(server):
    result = {"type": "function_call_output", "call_id": "c9", "output": "1"}
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{"}
    for body, param in (
        ({"input": [result]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": "a"}, call]}, "input[1].arguments"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
        ({"input": "a", "tools": [FLAT[1]] * 2}, "tools[1]"),
        ({"input": "a", "tools": FLAT, "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
        ({"input": "a", "tools": [FLAT[1] | {"strict": True, "parameters": {"type": "object", "properties": {"x": {"foo": 1}}}}]}, "tools[0].parameters"),
    ):
        assert refused(server, "/v1/responses", body)["param"].startswith(param), body


def test_tools_are_refused_where_calls_have_a_form_that_is_not_known(served):
    error = refused(served("coder"), "/v1/chat/completions", {"messages": ASKED, "tools": TOOLS})
    assert error["param"] == "tools" and "in a form that is not known here" in error["message"]
    error = refused(served("llama32"), "/v1/chat/completions", {"messages": ASKED, "tools": TOOLS, "regex": "a"})
    assert error["param"] == "regex" and "whose calls are JSON too, without a marker" in error["message"]


STRANGE = {"type": "object", "properties": {"x": {"type": "string", "weird": 1}}, "required": ["x"], "additionalProperties": False}


def test_a_strict_tool_is_obeyed_or_refused_and_another_may_get_any_object(server):
    tool = {"type": "function", "function": {"name": "odd", "parameters": STRANGE}}
    strict = {"type": "function", "function": tool["function"] | {"strict": True}}
    for path, tools, param in (
        ("/v1/chat/completions", [TOOLS[0], strict], "tools[1].function.parameters"),
        ("/v1/responses", [FLAT[0], {"type": "function", **strict["function"]}], "tools[1].parameters"),
    ):
        error = refused(server, path, ({"messages": ASKED} if "chat" in path else {"input": "a"}) | {"tools": tools})
        assert error["param"] == param and "'weird' is not supported" in error["message"]
    server.say('<tool_call>\n{"name": "odd", "arguments": {"y": [1, {"z": "}"}]}}\n</tool_call>')
    message, reason, _ = whole_and_streamed(server, tools=[tool], tool_choice="required")
    assert message["tool_calls"] == [function("odd", '{"y": [1, {"z": "}"}]}')] and reason == "tool_calls"
    # Nor may the library refuse what nobody has to obey, as the schema that zod writes for a record.
    record = {"type": "object", "properties": {"m": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "odd", "parameters": record}}
    message, reason, _ = whole_and_streamed(server, tools=[tool], tool_choice="required")
    assert message["tool_calls"] == [function("odd", '{"y": [1, {"z": "}"}]}')] and reason == "tool_calls"
    error = refused(server, "/v1/chat/completions", {"messages": ASKED, "tools": [tool | {"function": tool["function"] | {"strict": True}}]})
    assert error["param"] == "tools[0].function.parameters" and "propertyNames" in error["message"]
    # What is not an object is not allowed, whatever the model would like.
    server.say('<tool_call>\n{"name": "odd", "arguments": "x"')
    message, *_ = whole_and_streamed(server, tools=[tool], tool_choice="required", max_tokens=40)
    assert message["tool_calls"][0]["function"]["arguments"].startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 1},
        {"enum": ["a", "b"]},
        {"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/x"}]}}},
        {"allOf": [{"type": ["string", "null"]}]},
    ],
)
def test_a_schema_that_allows_no_object_is_refused_or_any_object(server, schema):
    """It used to be a server error: no token was possible."""
    tool = {"type": "function", "function": {"name": "odd", "parameters": schema}}
    server.say('<tool_call>\n{"name": "odd", "arguments": {"y": 1}}\n</tool_call>')
    message, reason, _ = whole_and_streamed(server, tools=[tool], tool_choice="required")
    assert message["tool_calls"] == [function("odd", '{"y": 1}')] and reason == "tool_calls"
    error = refused(server, "/v1/chat/completions", {"messages": ASKED, "tools": [tool | {"function": tool["function"] | {"strict": True}}]})
    assert error["param"] == "tools[0].function.parameters"


def test_a_response_is_json_whatever_its_tools_have(server):
    for field in ({"x": float("nan")}, {"parameters": {"type": "object", "description": float("inf")}}):
        body = {"model": "pocket", "input": "a", "tools": [{"type": "function", "name": "f"} | field]}
        answer = post(server, "/v1/responses", json.dumps(body).encode())
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("tools[0]"), answer.text
    for depth in (100, 300, 400, 450, 600):
        nested = '{"x": ' * depth + "{}" + "}" * depth
        for way in ("stream", "background"):
            text = '{"model": "pocket", "input": "a", "max_output_tokens": 1, "%s": true, "tools": [{"type": "function", "name": "f", "parameters": {"properties": {"x": {"default": %s}}}}]}'
            answer = post(server, "/v1/responses", (text % (way, nested)).encode())
            assert answer.status_code == 400 or answer.status_code == 200 and answer.text, (depth, way)


def test_a_schema_that_leads_to_an_anchor_may_be_an_object(module):
    schema = {"$ref": "#a", "$defs": {"x": {"$anchor": "a", "type": "object"}}}
    assert module("guidance").may_be_object(schema, schema, {})


def test_the_values_of_all_calls_are_counted_together(server):
    """Each call's are parsed and written on the event loop."""
    calls = [{"id": f"c{number}", "type": "function", "function": {"name": "add", "arguments": '{"a": [' + "[]," * 9_000 + "[]]}"}} for number in range(3)]
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    error = refused(server, "/v1/chat/completions", {"messages": [*ASKED, turn]})
    assert error["param"] == "messages" and "more than 50,000 values" in error["message"]
    items = [{"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls]
    error = refused(server, "/v1/responses", {"input": items})
    assert error["param"] == "input" and "more than 50,000 values" in error["message"]


def test_a_function_without_parameters_gets_an_empty_object(server):
    """Whichever way it says so; and what a schema does not name is not in the arguments."""
    for parameters in (None, {}, {"type": "object"}, {"type": "object", "properties": {}}, {"type": "object", "properties": {}, "additionalProperties": False}):
        tool = {"type": "function", "function": {"name": "go"} | ({} if parameters is None else {"parameters": parameters})}
        server.say('<tool_call>\n{"name": "go", "arguments": {"a": 1}}\n</tool_call>')
        message, *_ = whole_and_streamed(server, tools=[tool], tool_choice="required", parallel_tool_calls=False)
        assert message["tool_calls"] == [function("go", "{}")], parameters
    open_schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    server.say('<tool_call>\n{"name": "go", "arguments": {"a": 1, "b": 2}}\n</tool_call>')
    tool = {"type": "function", "function": {"name": "go", "parameters": open_schema}}
    message, *_ = whole_and_streamed(server, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    assert set(json.loads(message["tool_calls"][0]["function"]["arguments"])) == {"a"}


# ---- the official client


class Add(BaseModel):
    """Add two numbers."""

    a: Literal[1, 2]
    b: int = Field(ge=0, le=99)


class Say(BaseModel):
    """Say something."""

    words: list[Literal["a", "é"]] = Field(max_length=3)


def test_openais_client_parses_calls_and_accumulates_their_streams(server):
    add, say = openai.pydantic_function_tool(Add), openai.pydantic_function_tool(Say)
    calls = ('{"name": "Add", "arguments": {"a": 2, "b": 40}}', '{"name": "Say", "arguments": {"words": ["é"]}}')
    server.say("<think>\nHm.\n</think>\n\n" + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "pocket", "messages": ASKED, "tools": [add, say], "temperature": 0}
        with client.chat.completions.stream(**asked) as stream:
            done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
            streamed = stream.get_final_completion()
        assert [(event.name, event.index) for event in done] == [("Add", 0), ("Say", 1)] and done[0].parsed_arguments == Add(a=2, b=40)
        for completion in (client.chat.completions.parse(**asked), streamed):
            [choice] = completion.choices
            assert [call.function.parsed_arguments for call in choice.message.tool_calls] == [Add(a=2, b=40), Say(words=["é"])]
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
        flat = [{"type": "function", **tool["function"]} for tool in (add, say)]
        asked = {"model": "pocket", "input": "What?", "tools": flat, "temperature": 0}
        with client.responses.stream(**asked) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_response()
        for response in (client.responses.parse(**asked), streamed):
            calls = [item for item in response.output if item.type == "function_call"]
            assert [json.loads(call.arguments) for call in calls] == [{"a": 2, "b": 40}, {"words": ["é"]}]
            assert [item.type for item in response.output] == ["reasoning", "function_call", "function_call"]


def test_a_grammar_of_parts_is_compiled_in_a_process_of_its_own(module, new_parts):
    """The source is pickled as it is; an error's parameter comes back with it."""
    parts, compiler = new_parts("mistral-args", thinks=True, is_special=True), module("compiler")
    apart, here = compiler.compile_apart("parts", parts), compiler.compile_here("parts", parts)
    assert all(np.array_equal(mine, its) for mine, its in zip(apart, here, strict=True))
    tool = module("parts").Tool("odd", json.dumps(STRANGE), True, "tools[7].function.parameters")
    with pytest.raises(module("params").RequestError, match="'weird' is not supported") as caught:
        compiler.compile_apart("parts", replace(parts, tools=(tool,)))
    assert caught.value.param == "tools[7].function.parameters"


def test_no_effort_is_no_thought_or_refused(module):
    tools = module("tools")
    form = tools.FORMS["hermes"]
    thinks = tools.Family(form, True, ("<think>", "</think>"), frozenset({"enable_thinking"}), ())
    assert tools.without_thought(thinks, {}, "none", "reasoning_effort") == {"enable_thinking": False}
    assert tools.without_thought(thinks, {"enable_thinking": False}, "none", "reasoning_effort") == {"enable_thinking": False}
    with pytest.raises(module("params").RequestError, match="reasoning_effort is none, but enable_thinking in chat_template_kwargs is not false; send only one of them"):
        tools.without_thought(thinks, {"enable_thinking": True}, "none", "reasoning_effort")
    assert tools.without_thought(thinks, {}, None, "reasoning_effort") == {}
    assert tools.without_thought(thinks._replace(thought=None), {}, "none", "reasoning_effort") == {}
    with pytest.raises(module("params").RequestError, match="reasoning.effort is none, but this checkpoint always thinks; leave it out") as caught:
        tools.without_thought(thinks._replace(options=frozenset()), {}, "none", "reasoning.effort")
    assert caught.value.param == "reasoning.effort"


@pytest.mark.parametrize(
    "schema, closed",
    [
        (None, True),
        ({}, True),
        ({"type": "object"}, True),
        ({"type": "object", "properties": {}, "title": "Nothing"}, True),
        ({"type": "object", "additionalProperties": False}, True),
        ({"type": "object", "additionalProperties": {}}, False),
        ({"type": "object", "additionalProperties": True}, False),
        ({"type": "object", "required": ["a"]}, False),
    ],
)
def test_only_a_schema_without_members_has_no_arguments(module, schema, closed):
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert (module("protocol").closed_arguments(schema) == nothing) == closed


def test_empty_lines_between_parts_have_no_logprobs_in_a_response(module):
    parts, form = module("parts"), module("tools").FORMS["hermes"]
    tool = parts.Tool("now", '{"type": "object", "properties": {}, "additionalProperties": false}', False, "tools")
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for thought in ("", "<think>\nWell.\n</think>\n\n"):
        for said in ("", "Hi", "Hi, you"):
            for pieces in ([*thought, *said, *("\n" if said else ""), *call], [thought, said, "\n" if said else "", call]):
                answer = module("answers").PartedAnswer(0, parts.Parts(("<think>", "</think>"), form=form, tools=(tool,)), lambda: "id")
                kept, offset = [], 0
                for index, piece in enumerate(pieces):
                    last = index + 1 == len(pieces)
                    output = module("outputs").StepOutput(0, index, piece, {index: 0.0}, "stop" if last else None, offset=offset)
                    offset += len(piece)
                    _, tokens = answer.push_parts(output)
                    kept += answer.tokens_said(tokens)
                assert answer.said == (said or None)
                assert "".join(pieces[token_id] for _, token_id, _ in kept) == said, (pieces, kept)


def test_a_response_lists_all_tokens_of_its_first_character(module):
    """They have one offset. All but the last used to be taken for empty lines."""
    parts = module("parts")
    for thought in ("", "<think>a</think>\n\n"):
        pieces = [*thought, "", "", "🙂", " Hi", "", "é"]
        answer = module("answers").PartedAnswer(0, parts.Parts(("<think>", "</think>") if thought else None), lambda: "id")
        kept, offset = [], 0
        for index, piece in enumerate(pieces):
            output = module("outputs").StepOutput(0, index, piece, {index: 0.0}, "stop" if index + 1 == len(pieces) else None, offset=offset)
            offset += len(piece)
            _, tokens = answer.push_parts(output)
            kept += [token_id for _, token_id, _ in answer.tokens_said(tokens)]
        assert kept == [*range(len(thought), len(pieces))] and answer.said == "🙂 Hié"


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}FORM{% endfor %}{% endfor %}"
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>',
    "llama3": '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
}


@pytest.mark.parametrize(
    "begin, form, has_tools, known",
    [
        ("{% if tools %}x{% endif %}", "llama3", True, True),
        ("{% set tools = tools or [] %}", "llama3", True, True),
        ("", "llama3", False, False),
        ("", "hermes", False, True),
    ],
)
def test_tools_are_written_by_the_template_or_as_in_hermes(module, begin, form, has_tools, known):
    tokenizer = module("text").load_tokenizer(checkpoint("pocket"))
    tokenizer.chat_template = begin + CALLS.replace("FORM", WRITTEN[form])
    family = module("tools").family_of(tokenizer)
    assert (family.has_tools, family.form) == (has_tools, module("tools").FORMS[form] if known else None)
    assert "tools" not in family.options
