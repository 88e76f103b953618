"""Grammars: what an automaton accepts is what the pattern or the schema says, and a mask is what a walk over the vocabulary says."""

import datetime
import json
import re
import time
from functools import partial
from math import inf

import jsonschema
import numpy as np
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shared.checkpoints import make_tokenizer
from shared.verify import json_suite
from tests.support.grammars import CHOICES, NAMED, REGEXES, SCHEMAS, Walker, distances, for_python

pytestmark = pytest.mark.needs("grammars")


@pytest.fixture
def compiled(module):
    """The automaton of a regex, of a tuple of choices, or of a schema."""

    def compiled(source):
        kind = {str: "regex", tuple: "choice", dict: "json_schema"}[type(source)]
        return module("compiler").compile_here(kind, json.dumps(source) if kind == "json_schema" else source)

    return compiled


@pytest.fixture
def RequestError(chapter):
    return chapter.load().RequestError


# ---- regular expressions

PIECES = ("a", "b", "c", "1", " ", "-", "\n", "A", "_", "é", "日", "🙂", "\u2028", "\x85", "٣", "\x1c", "\r", "\ufeff")
# Where the dialects of Python and ECMAScript differ in ASCII.
DIFFER = "\r\x1c\x1d\x1e\x1f"


def texts(automaton, rng, count):
    """Random texts, texts that the automaton accepts, and such with a change."""
    walker = Walker(automaton)
    for _ in range(count):
        text = walker.text(rng).decode()
        yield text
        at = rng.randrange(len(text) + 1)
        yield text[:at] + rng.choice(PIECES) + text[at + rng.randrange(2) :]
        yield text[:at] + text[at + 1 :]
        yield "".join(rng.choices(PIECES[: rng.choice((4, 9, len(PIECES)))], k=rng.randrange(5)))


def check(automaton, pattern, rng, count, match=re.fullmatch):
    """A text of ASCII is accepted exactly if it matches; of other texts, only such as match."""
    narrow, wide = re.compile(for_python(pattern), re.ASCII), re.compile(for_python(pattern))
    for text in texts(automaton, rng, count):
        accepts = automaton.accepts(text.encode())
        if accepts:
            assert match(wide, text), (pattern, text)
        if text.isascii() and not set(text) & set(DIFFER):
            assert accepts == bool(match(narrow, text)), (pattern, text)


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_pattern_means_what_it_means_to_re(compiled, rng, pattern):
    check(compiled(pattern), pattern, rng, 60)


def random_pattern(rng, depth=3):
    kind = rng.randrange(8) if depth else 0
    if kind < 2:
        return rng.choice(
            ("a", "b", "c", ".", "\\d", "\\w", "\\s", "\\W", "[ab]", "[^a]", "[^\\w]", "[a-c1]", "[^\\s\\D]", "é", "[à-é日]", "[^日]", "🙂", "^", "$")
        )
    parts = [random_pattern(rng, depth - 1) for _ in range(rng.choice((1, 2, 3)))]
    if kind < 5:
        return "".join(parts)
    if kind == 5:
        return f"({'|'.join(parts)})"
    return f"(?:{parts[0]}){rng.choice(('*', '+', '?', '{2}', '{0,2}', '{1,}', '*?', '{1,3}?'))}"


def test_random_patterns_mean_what_they_mean_to_re(compiled, module, rng, RequestError):
    node, compile_node = module("regex").parse_regex, module("automaton").compile_node
    searching, counted = module("regex").searching, 0
    for _ in range(100):
        pattern = random_pattern(rng)
        try:
            automaton = compiled(pattern)
        except RequestError as error:
            if "an anchor cannot be repeated" in str(error):
                continue
            assert "matches no text, or only the empty one" in str(error)
            assert not any(re.fullmatch(for_python(pattern), text) for text in ("a", "ab", "1", "é", "🙂", "cc"))
            continue
        check(automaton, pattern, rng, 6)
        if not counted % 3:
            check(compile_node(searching(node(pattern))), pattern, rng, 3, re.search)
        counted += 1
    assert counted > 55


def test_where_the_dialects_differ_only_what_both_accept_is(compiled):
    """ECMAScript's . stops at four line ends, its \\s has U+FEFF; Python's \\d, \\w and \\s have more."""
    for pattern, neither in (
        (".", "\n\r\u2028\u2029"),
        ("\\d", "٣४"),
        ("\\w", "éſİ日"),
        ("\\s", "\ufeff\x85\xa0\u2028\x1c"),
        ("\\S", "\ufeff\x85\xa0\u2028\x1c \n"),
        ("\\D", "٣४5"),
        ("\\W", "é日a_"),
        ("[^\\d]", "٣5"),
        ("[^\\S]", "\ufeff\xa0\x85\x1c"),
    ):
        automaton = compiled(pattern)
        assert not [text for text in neither if automaton.accepts(text.encode())], pattern
        assert not automaton.accepts(b"\xed\xa0\x80") and not automaton.accepts(b"\xc0\x80") and not automaton.accepts(b"\xff")


def test_a_class_of_opposites_is_everything(compiled):
    """Every character is in one of the two, whichever dialect says in which."""
    for pattern in ("[\\s\\S]", "[\\w\\W]", "[\\d\\D]", "[\\S\\s]", "[^\\S]|[^\\s]|[\\s\\S]"):
        automaton = compiled(pattern)
        assert all(automaton.accepts(text.encode()) for text in "a_1 \n\u00a0\ufeff\u3000\u0085\x1céſ日٣🙂"), pattern
    assert not any(compiled("[^\\s\\S]|x").accepts(text.encode()) for text in "a \u00a0\ufeff日")
    assert compiled("[\\w日]").accepts("日".encode()) and not compiled("[\\w-]").accepts("日".encode())


def test_every_character_is_its_bytes(compiled, module):
    """At the ends of each length of UTF-8, by bytes, with nothing between them."""
    ends = (0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFF, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x3FFFF, 0x10FFFF)
    Chars, compile_node = module("automaton").Chars, module("automaton").compile_node
    for low in ends:
        for high in ends:
            if low <= high:
                automaton = compile_node(Chars(((low, high),)))
                for code in {code for end in ends for code in (end - 1, end, end + 1)}:
                    if 0 <= code <= 0x10FFFF and not 0xD800 <= code < 0xE000:
                        assert automaton.accepts(chr(code).encode()) == (low <= code <= high), (low, code, high)
    count = sum(compiled("[\\u07fe-\\u0801]").accepts(bytes(raw)) for raw in ([0xDF, 0xBE], [0xDF, 0xBF], [0xE0, 0xA0, 0x80], [0xE0, 0xA0, 0x81]))
    assert count == 4


REFUSED = (
    ("a)b", "there is an unmatched )", 1),
    ("a(b", "this ( is not closed", 1),
    ("x^*", "an anchor cannot be repeated", 1),
    ("ab{3,2}", "{3,2} has its bounds in the wrong order", 1),
    ("ab{10001}", "a part is repeated more than 10000 times", 1),
    ("a{1,10001}", "a part is repeated more than 10000 times", 0),
    ("a{1234567,123456}", "a part is repeated more than 10000 times", 1),
    ("a**", "two quantifiers follow each other", 2),
    ("a{2}{3}", "two quantifiers follow each other", 7),
    ("a??+", "two quantifiers follow each other", 3),
    ("ab{,3}", "{, means a literal in one dialect", 2),
    ("a|*b", "there is nothing to repeat", 2),
    ("(+)", "there is nothing to repeat", 1),
    ("a(?=b)", "look-around, flags and conditions are not supported", 1),
    ("(?i)a", "look-around, flags and conditions are not supported", 0),
    ("(?<!a)b", "look-around, flags and conditions are not supported", 0),
    ("(" * 101, "groups are nested more than 100 deep", 100),
    ("a\\1", "\\1 is not supported", 1),
    ("a\\b", "\\b is not supported", 1),
    ("\\p{L}", "\\p is not supported", 0),
    ("\\01", "\\0 is not supported", 0),
    ("ab\\", "\\ is not supported", 2),
    ("\\xg1", "a character's code needs 2 hexadecimal digits", 0),
    ("a\\u12", "a character's code needs 4 hexadecimal digits", 1),
    ("\\ud83d", "there is half a surrogate pair", 0),
    ("\\ud83d\\u0041", "there is half a surrogate pair", 0),
    ("a\\udc00", "there is half a surrogate pair", 1),
    ("a[b", "this [ is not closed", 1),
    ("a[]b]", "a class cannot begin with ]", 1),
    ("[^]]", "a class cannot begin with ]", 0),
    ("a[c-b]", "a class has a range without two ends in order", 1),
    ("[\\d-z]", "a class has a range without two ends in order", 0),
    ("[a&&b]", "&& in a class means other things elsewhere", 2),
    ("a[--b]", "-- in a class means other things elsewhere", 2),
    ("[[:alpha:]]", "[: in a class means other things elsewhere", 1),
    ("\ud83d", "there is half a surrogate pair", 0),
    ("[\ud83d]", "there is half a surrogate pair", 1),
)


@pytest.mark.parametrize(("pattern", "said", "place"), REFUSED, ids=[pattern.encode("ascii", "backslashreplace").decode() for pattern, *_ in REFUSED])
def test_what_is_not_supported_is_refused_with_its_place(module, RequestError, pattern, said, place):
    with pytest.raises(RequestError) as caught:
        module("regex").parse_regex(pattern, "my_param")
    assert caught.value.param == "my_param" and said in str(caught.value)
    assert str(caught.value).startswith("my_param: ") and f" at character {place} of " in str(caught.value)


def test_a_pair_of_surrogates_is_a_character(compiled):
    automaton = compiled("\\ud83d\\ude42")
    assert automaton.accepts("🙂".encode()) and not automaton.accepts(b"?")


def test_a_pattern_without_texts_or_only_the_empty_one_is_refused(compiled, RequestError):
    for source in ("", "a^", "$a", "(|)", "[^\\x00-\\U]"[:0], ("",), "()*"):
        with pytest.raises(RequestError, match="matches no text, or only the empty one"):
            compiled(source)


# ---- automata


def test_products_are_intersections_and_differences(compiled, module, rng):
    both, without = module("automaton").both, module("automaton").without
    sources = ["a*b", "(a|b)*", "[ab]{2,3}", "a?b?c?", "[^b]+", "é|a"]
    for one in sources:
        for other in sources:
            left, right = compiled(one), compiled(other)
            common, rest = both(left, right), without(left, right)
            for text in ("", "a", "b", "ab", "ba", "aab", "abc", "c", "é", "aaa", "bb", "ac"):
                raw = text.encode()
                assert common.accepts(raw) == (left.accepts(raw) and right.accepts(raw))
                assert rest.accepts(raw) == (left.accepts(raw) and not right.accepts(raw))
            assert without(left, left).is_empty and not both(left, left).is_empty
            assert_dead_is_dead(common), assert_dead_is_dead(rest)


def assert_dead_is_dead(automaton):
    """From every state but DEAD an end can be reached, and from DEAD none; only the beginning may be without one."""
    ways = distances(automaton)
    assert ways[0] == inf and (automaton.table[0] == 0).all()
    assert all(way < inf for way in ways[2:])


@pytest.mark.parametrize("source", [*REGEXES, *CHOICES, *SCHEMAS.values()], ids=str)
def test_every_state_can_still_become_a_text(compiled, source):
    assert_dead_is_dead(compiled(source))


def test_what_would_become_too_large_is_unsupported(compiled, module, monkeypatch):
    """The states of a table, of a product and the parts before; the limits are lowered, because reaching them takes seconds."""
    automaton, Unsupported = module("automaton"), module("json_schema").Unsupported
    assert (automaton.MOST_STATES, automaton.MOST_PARTS) == (20_000, 200_000)
    monkeypatch.setattr(automaton, "MOST_STATES", 200)
    monkeypatch.setattr(automaton, "MOST_PARTS", 3_000)
    factors = {"minimum": 0, "maximum": 10**6, "multipleOf": 97}
    for source, said in (
        ("(a|b)*a(a|b){8}", "it has more than 200 states"),
        ("a{3001}", "it has more than 3000 parts"),
        ({"type": "string", "pattern": "(a|b)*a(a|b){8}"}, "it has more than 200 states"),
        ({"type": "string", "maxLength": 1_500}, "it has more than 3000 parts"),
        ({"type": "integer"} | factors, "it has more than 200 states"),
    ):
        with pytest.raises(Unsupported, match=f"is too large: {said}; use shorter bounds or fewer parts"):
            compiled(source)
    assert len(compiled("(a|b)*a(a|b){5}").table) < 200


# ---- masks


def tokenizer_of(name):
    """A tokenizer, and what its tokens add to a text and to one that they begin, found without the chapter."""
    tokenizer = json_suite.checkpoint("pocket") if name == "pocket" else make_tokenizer(name)
    if name == "pocket":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    later, special = [], {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token_id in special:
            later.append(b"")
        elif name == "metaspace":
            byte = re.fullmatch("<0x(..)>", token)
            later.append(bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode())
        else:
            later.append(bytes(byte_of[character] for character in token))
    first = [raw.removeprefix(b" ") for raw in later] if name == "metaspace" else later
    return tokenizer, first, later


@pytest.fixture(params=["pocket", "metaspace"], scope="module")
def spelled(request):
    return tokenizer_of(request.param)


def unpacked(mask, vocab_size):
    return np.unpackbits(mask, bitorder="little")[:vocab_size].astype(bool)


def brute(automaton, ways, state, spellings, vocab_size, end_ids):
    """Each token of its own, byte by byte; whether a text can follow is known from the distances."""
    allowed = np.zeros(vocab_size, bool)
    table, classes = automaton.table.tolist(), automaton.classes.tolist()
    for token_id, raw in enumerate(spellings):
        at = state
        for byte in raw:
            at = table[at][classes[byte]]
        allowed[token_id] = bool(raw) and ways[at] < inf
    for token_id in end_ids:
        allowed[token_id] = bool(automaton.accepting[state])
    return allowed


MASKED = [
    "a*b+c?",
    "[à-ö]+|日本|[🙂-🙏]{1,2}",
    " ?[A-Z][a-z]{1,8}\\.",
    ".{3}",
    *CHOICES,
    *(SCHEMAS[name] for name in ("pattern", "object", "enum", "tuple", "bounds")),
]


@pytest.mark.parametrize("source", MASKED, ids=str)
def test_a_mask_is_a_walk_over_the_whole_vocabulary(module, Params, spelled, source):
    """In every state, for a text's first token and later ones; ids that the tokenizer lacks are never allowed, and few are enough."""
    tokenizer, first, later = spelled
    kind = {str: "regex", tuple: "choice", dict: "json_schema"}[type(source)]
    end_ids = (tokenizer.eos_token_id, 3)
    for vocab_size in (len(tokenizer) + 13, len(tokenizer) - 90):
        grammars = module("grammars").Grammars(tokenizer, vocab_size, end_ids, "own", record=lambda compilation: None)
        grammar = grammars.get(Params(**{kind: source}).constraint)
        ways = distances(grammar.automaton)
        matcher = grammar.start(is_new_text=True)
        assert (unpacked(matcher.mask(), vocab_size) == brute(grammar.automaton, ways, 1, first[:vocab_size], vocab_size, end_ids)).all()
        matcher = grammar.start(is_new_text=False)
        for state in range(1, len(grammar.automaton.table)):
            matcher.state = state
            want = brute(grammar.automaton, ways, state, later[:vocab_size], vocab_size, end_ids)
            assert (unpacked(matcher.mask(), vocab_size) == want).all(), state


@pytest.mark.parametrize("backend", ["own", "llguidance"])
@pytest.mark.parametrize("source", ["[à-ö]{2}|日本|[🙂-🙏]{1,2}", SCHEMAS["object"], SCHEMAS["enum"], ("a", "ab", " b")], ids=str)
def test_random_tokens_that_masks_allow_are_the_text(module, Params, spelled, rng, source, backend):
    """What Hugging Face decodes of them, and what the stream shows, as a text of its own and after a prompt."""
    tokenizer, *_ = spelled
    grammars = module("grammars").Grammars(tokenizer, len(tokenizer) + 5, (tokenizer.eos_token_id,), backend, record=lambda compilation: None)
    kind = {str: "regex", tuple: "choice", dict: "json_schema"}[type(source)]
    grammar = grammars.get(Params(**{kind: source}).constraint)
    own = module("compiler").compile_here(*Params(**{kind: source}).constraint)
    prompt_ids = tokenizer("Once upon", add_special_tokens=False).input_ids
    for is_new_text in (True, False):
        for _ in range(12):
            matcher, ids = grammar.start(is_new_text), []
            while True:
                allowed = np.flatnonzero(unpacked(matcher.mask(), len(tokenizer) + 5)).tolist()
                token_id = rng.choice(allowed)
                if token_id == tokenizer.eos_token_id:
                    break
                ids.append(token_id)
                if not matcher.advance(token_id):
                    break
            stream = module("text").TextStream(tokenizer, None if is_new_text else prompt_ids)
            text = "".join([stream.push([token_id], last=False) for token_id in ids] + [stream.push([], last=True)])
            if backend == "own" or kind != "json_schema":
                assert own.accepts(text.encode()), (is_new_text, ids, text)
            else:
                # The library may write an escape in another way.
                jsonschema.validate(json.loads(text), source)
            if is_new_text:
                assert tokenizer.decode(ids) == text


def test_kept_masks_are_bounded_and_each_states_own(module):
    masks, made = module("masks").Masks(most_bytes=100), []

    def make(key):
        made.append(key)
        return np.full(30, key, np.uint8)

    for key in (1, 2, 3, 1, 4, 2, 1):
        assert masks.get((key,), partial(make, key))[0] == key
        assert masks.nbytes == sum(mask.nbytes for mask in masks.kept.values()) <= 100
    # 1 was asked for again before 4 came, so 2 went.
    assert made == [1, 2, 3, 4, 2] and [key for (key,) in masks.kept] == [4, 2, 1]
    assert len(masks.get((9,), lambda: np.zeros(500, np.uint8))) == 500 and [*masks.kept] == [(9,)]
    assert module("masks").Masks().most_bytes == module("masks").MASK_BYTES == 64 * 2**20


# ---- schemas


def checker():
    """jsonschema's formats, and those of dates and times by Python's datetime."""
    formats = jsonschema.FormatChecker()

    def is_time(value):
        clock, zone = re.fullmatch("(.*?)(Z|[+-]..:..)", value).groups()
        return datetime.time.fromisoformat(clock) is not None and datetime.time.fromisoformat(f"{clock}{zone.replace('Z', '+00:00')}") is not None

    formats.checks("time", raises=(ValueError, AttributeError))(is_time)
    formats.checks("date", raises=ValueError)(lambda value: len(value) == 10 and datetime.date.fromisoformat(value) is not None)
    formats.checks("date-time", raises=(ValueError, AttributeError))(
        lambda value: value[10] == "T" and datetime.date.fromisoformat(value[:10]) is not None and is_time(value[11:])
    )
    return formats


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_texts_of_a_schema_are_json_that_it_allows(compiled, module, rng, name):
    """And they are spelled as json.dumps spells their values: white space has no room to run on."""
    schema, seen = SCHEMAS[name], set()
    automaton = compiled(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker())
    walker = Walker(automaton)
    for _ in range(100):
        text = walker.text(rng, length=rng.choice((5, 20, 60))).decode()
        value = json.loads(text)
        validator.validate(value)
        seen.add(text)
        if name not in ("number", "open object"):
            assert module("json_schema").spell(value) == json.dumps(value, ensure_ascii=False) == text
    assert len(seen) > 25 or len(automaton.table) < 60


def test_values_that_a_schema_allows_can_be_spelled(compiled, module, rng):
    """By hand, since no library makes them: those at the edges."""
    spell = module("json_schema").spell
    for name, valid, invalid in (
        ("types", [True, None, 0, -12, 10**30], [1.5, "x", []]),
        ("bounds", [-17, -1, 0, 9, 10, 99, 1000, 1203], [-18, 1204, 1203.5, -100]),
        ("multiples", [-98, -7, 0, 7, 7 * 10**20], [-105, 1, -99, 7 * 10**20 + 1]),
        ("string", ["", "éé🙂\n", '"\\\x01\x1f', "abcd"], ["abcde", "éé🙂\n."]),
        ("long string", ["🙂" * 3, "x" * 500], ["ab", "🙂" * 2]),
        ("pattern", ['"\\', "\n\x01é🙂a"], ['"', "aad", "aaaaaa"]),
        ("search", ["b1", "  b9  ", "bbb3"], ["b", "", "1b", "xxxxxb1"]),
        ("date", ["2024-02-29", "2000-02-29", "0001-01-01", "9999-12-31"], ["2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31", "2024-1-01", "2024-13-01"]),
        ("time", ["00:00:00Z", "23:59:59.123456-23:59"], ["24:00:00Z", "23:59:60Z", "12:00Z", "12:00:00", "12:00:00.Z", "12:00:00+24:00"]),
        ("ipv4", ["0.0.0.0", "9.99.2.25", "255.0.0.1"], ["256.0.0.1", "1.2.3", "01.2.3.4", "1.1.1.1.1"]),
        ("enum", ["a", 'b"\n\u2028', 3, -1.5, None, True, ["x", {"y": 1}]], [False, 1.5, "b", ["x"]]),
        ("array", [[True], [False, True, True]], [[], [True] * 4, [1]]),
        ("tuple", [[None], [None, 2], [None, 1, True, False]], [[], [1], [None, True], [None, 1, True, True, True]]),
        ("closed tuple", [["x", None], ["x", None, False]], [["x"], ["x", None, False, True], []]),
        ("object", [{"c": 7}, {"é ": True, "c": 8}, {"é ": False, 'quote"': None, "c": 70}], [{}, {"c": 6}, {"c": 7, "d": 1}, {'quote"': None}]),
        ("all optional", [{}, {'quote"': None}, {"é ": True}, {"c": 9}], [{"d": 1}, {"c": 1}]),
        ("open object", [{}, {"c": None}, {"x": True, "": False, '"': True}, {"c": None, "cc": False}], [{"c": True}, {"x": None}, {"x": True, "c": None, "y": 1}]),
        ("nothing", [{}], [{"a": 1}, None]),
        ("one of", ["ab", {"a": 1}, {}], ["abc", {"a": 2}]),
        ("reference", [[], [1, "é", 1]], [["x"], [2]]),
        ("number", [0, -1, 1.5, 1e-07, 1e300, 123456789.25], ["1", None]),
    ):  # fmt: skip
        automaton, validator = compiled(SCHEMAS[name]), jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=checker())
        for value in valid:
            validator.validate(value)
            assert automaton.accepts(spell(value).encode()), (name, value)
        for value in invalid:
            assert not validator.is_valid(value) or name == "time", (name, value)
            assert not automaton.accepts(spell(value).encode()), (name, value)
    for text in (b'{ "c": 7}', b'{"c":7}', b'{"c": 7 }', b'{"c": 7}\n', b'{"c": 07}', b'{"c": 7, }', b'{"c": 7.0}', b'{"c": +7}', b'{"c": 7, "c": 7}'):
        assert not compiled(SCHEMAS["object"]).accepts(text), text
    for raw in (b'"\x01"', b'"\n"', b'"\x1f"', b'"\\x"', b'"\\/"', b'"\\u0041"', b'"\\ud83d"', b'"\\u000A"', b'"', b'"""', b'"\\"'):
        assert not compiled(SCHEMAS["string"]).accepts(raw), raw
    assert compiled(SCHEMAS["string"]).accepts(b'"\\u0001\\n\x7f"')


def test_every_integer_between_any_bounds(compiled, RequestError, rng):
    """Each of -250 to 1300, against arithmetic; and no other spelling of one."""
    for _ in range(60):
        low, high = sorted(rng.choice((rng.randrange(-120, 1100), rng.randrange(-12, 13), rng.randrange(-120, 1100) + 0.5)) for _ in range(2))
        schema, divisor = {"type": "integer"}, rng.choice((1, 1, 3, 25, 4.0))
        for keyword, bound in (
            ("minimum", low),
            ("maximum", high),
            ("exclusiveMinimum", low - rng.randrange(3)),
            ("exclusiveMaximum", high + rng.randrange(3)),
        ):
            if rng.random() < 0.5:
                schema[keyword] = bound
        if divisor != 1:
            schema["multipleOf"] = divisor
        validator = jsonschema.Draft202012Validator(schema)
        want = {value for value in range(-250, 1300) if validator.is_valid(value)}
        try:
            automaton = compiled(schema)
        except RequestError as error:
            assert "no integer is allowed" in str(error) and not want
            continue
        assert {value for value in range(-250, 1300) if automaton.accepts(b"%d" % value)} == want, schema
        for text in (b"-0", b"00", b"01", b"-01", b"1.0", b"1e1", b"", b"-", b"+1"):
            assert not automaton.accepts(text), (schema, text)


UNSUPPORTED = (
    (True, "the schema: any JSON value is allowed"),
    ({}, "the schema: any JSON value is allowed"),
    (False, "the schema: no value is allowed"),
    ({"description": "x"}, "the schema: values of any type are allowed; give a type"),
    ({"type": "array", "items": {"minimum": 3}}, "/items: values of any type are allowed"),
    ({"type": "string", "not": {"const": "a"}}, "the schema: not is not supported"),
    ({"type": "string", "if": {"const": "a"}}, "the schema: if is not supported"),
    ({"enum": [1], "minimum": 3}, "the schema: enum beside minimum is not supported"),
    ({"const": 1, "enum": [1]}, "the schema: enum beside const is not supported"),
    ({"enum": [1, "a"], "type": "null"}, "the schema: no value of enum has the type"),
    ({"$ref": "#/$defs/a", "type": "null", "$defs": {"a": {"type": "null"}}}, "the schema: $ref beside type is not supported"),
    ({"anyOf": [{"type": "null"}], "allOf": [{"type": "null"}]}, "the schema: anyOf beside allOf is not supported"),
    ({"type": "array", "items": {"$ref": "#"}}, "/items/$ref: # contains itself"),
    ({"type": "array", "items": {"$id": "x", "type": "null"}}, "/items: $id inside a schema is not supported, as references would begin there"),
    ({"$ref": "other.json"}, "/$ref: 'other.json' is not supported"),
    ({"oneOf": [{"type": "string"}, {"const": "a"}]}, "/oneOf: 0 and 1 may allow the same value; use anyOf"),
    ({"oneOf": [{"type": "integer"}, {"const": 1.5}, {"type": "number"}]}, "/oneOf: 0 and 2 may allow the same value; use anyOf"),
    ({"allOf": [{"type": "null"}, {"type": "null"}]}, "/allOf: more than one schema is not supported"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "the schema: no integer is allowed"),
    ({"type": "integer", "minimum": 1, "maximum": 6, "multipleOf": 7}, "the schema: no integer is allowed"),
    ({"type": "integer", "multipleOf": 0.5}, "the schema: multipleOf is 0.5, but only integers up to 10000 are supported"),
    ({"type": "integer", "multipleOf": 10_001}, "multipleOf is 10001, but only integers up to 10000"),
    ({"type": "number", "minimum": 0}, "the schema: minimum is not supported for numbers that are not integers"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "the schema: no string is allowed, as minLength is larger"),
    ({"type": "string", "format": "email"}, "the schema: the format 'email' is not supported; date, time, "),
    ({"type": "string", "pattern": "^a{3}$", "maxLength": 2}, "the schema: no string is allowed"),
    ({"type": "array"}, "/items: any JSON value is allowed"),
    ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "the schema: uniqueItems is not supported"),
    ({"type": "array", "items": {"type": "null"}, "contains": {"type": "null"}}, "the schema: contains is not supported"),
    ({"type": "array", "items": False, "minItems": 1}, "the schema: no array is allowed, as minItems is larger"),
    ({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}, "the schema: no array is allowed"),
    ({"type": "object"}, "the schema: members of any name and value are allowed"),
    ({"type": "object", "additionalProperties": False, "required": ["a"]}, "the schema: 'a' is required, but is not in properties"),
    ({"type": "object", "additionalProperties": False, "minProperties": 1}, "the schema: minProperties is not supported"),
    ({"type": "object", "additionalProperties": False, "patternProperties": {"a": True}}, "the schema: patternProperties is not supported"),
    ({"type": "object", "additionalProperties": False, "properties": {"a/b": {"type": "object"}}}, "/properties/a/b: members of any name"),
    ({"type": "object", "additionalProperties": False, "properties": {"a": False}, "required": ["a"]}, "/properties/a: no value is allowed"),
)
INVALID = (
    ([], "must be a JSON Schema, which is an object, true or false, got list"),
    ({"foo": 1}, "the schema: the keyword 'foo' is not supported; leave it out"),
    ({"type": "array", "items": {"maxItem": 1}}, "/items: the keyword 'maxItem' is not supported"),
    ({"$defs": {"a": {"x-y": 1}}, "type": "null"}, "/$defs/a: the keyword 'x-y' is not supported"),
    ({"type": "text"}, "the schema: type must be one of null, boolean, integer"),
    ({"type": []}, "type must be one of"),
    ({"type": ["null", "null"]}, "type must be one of"),
    ({"enum": []}, "enum must be a list of at least one value"),
    ({"minLength": -1}, "minLength must be an integer from 0 up, got -1"),
    ({"maxItems": 1.5}, "maxItems must be an integer from 0 up"),
    ({"minimum": "1"}, "minimum must be a number below 1e300, got "),
    ({"maximum": True}, "maximum must be a number below 1e300, got true"),
    ({"exclusiveMinimum": -1e301}, "exclusiveMinimum must be a number below 1e300, got -1"),
    ({"multipleOf": 0}, "multipleOf must be a number above 0"),
    ({"items": [{}]}, "items must be a schema"),
    ({"anyOf": []}, "anyOf must be a list of at least one schema"),
    ({"oneOf": [1]}, "oneOf must be a list of at least one schema"),
    ({"properties": []}, "properties must be an object of schemas"),
    ({"required": ["a", "a"]}, "required must be a list of different names"),
    ({"pattern": 1}, "pattern must be a string"),
    ({"uniqueItems": 1}, "uniqueItems must be true or false"),
    ({"$ref": "#/$defs/b", "$defs": {}}, "/$ref: there is no schema at #/$defs/b"),
    ({"$ref": "#/type", "$comment": "x", "$defs": {"a": {}}, "type": "null"}, "the schema: $ref beside type"),
    ({"$ref": "#/enum/0", "$defs": {"x": {"enum": [1]}}}, "/$ref: there is no schema at #/enum/0"),
    ({"$ref": "#/$defs/x/enum", "$defs": {"x": {"enum": [1]}}}, "/$ref: there is no schema at #/$defs/x/enum"),
    ({"type": "string", "pattern": "a("}, "json_schema: this ( is not closed at character 1 of 'a('"),
    ({"$ref": "#/examples/0", "examples": [{"type": "string", "maxLenght": 2}]}, "$ref leads to '#/examples/0', which is no schema there; move it to $defs"),
    ({"type": "array", "items": {"$ref": "#/default"}, "default": {"minLength": "x"}}, "/items: $ref leads to '#/default', which is no schema there"),
)


@pytest.mark.parametrize(("schema", "said"), [*UNSUPPORTED, *INVALID], ids=str)
def test_what_cannot_be_obeyed_is_refused_by_name(module, RequestError, schema, said):
    with pytest.raises(RequestError) as caught:
        module("json_schema").compile_schema(schema)
    assert said in str(caught.value) and str(caught.value).startswith("json_schema") and caught.value.param == "json_schema"
    if (schema, said) in UNSUPPORTED:
        assert isinstance(caught.value, module("json_schema").Unsupported)


def test_a_schema_is_nested_only_so_deep(compiled, module, RequestError):
    def nested(depth):
        schema = {"type": "null"}
        for _ in range(depth - 1):
            schema = {"type": "array", "items": schema, "maxItems": 1}
        return schema

    deepest = compiled(nested(module("json_schema").MOST_DEPTH))
    assert deepest.accepts(b"[" * 31 + b"null" + b"]" * 31) and deepest.accepts(b"[]")
    with pytest.raises(RequestError, match="is nested more than 32 deep; use fewer levels"):
        compiled(nested(module("json_schema").MOST_DEPTH + 1))


def test_references_that_lead_on_and_on_are_refused(compiled, module):
    chain = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(2_000)} | {"2000": {"type": "null"}}
    with pytest.raises(module("json_schema").Unsupported, match="json_schema is nested too deeply; use fewer levels"):
        compiled({"$ref": "#/$defs/0", "$defs": chain})
    assert compiled({"$ref": "#/$defs/1990", "$defs": chain}).accepts(b"null")


def test_a_member_that_may_not_be_there_is_left_out(compiled):
    automaton = compiled({"type": "object", "properties": {"a": False, "b": {"type": "null"}}, "additionalProperties": False})
    assert automaton.accepts(b'{"b": null}') and automaton.accepts(b"{}") and not automaton.accepts(b'{"a": null}')


def test_no_keyword_is_read_and_forgotten(module, RequestError):
    """Each known keyword that is no note changes what is accepted, or is refused."""
    words = module("json_schema")
    harmless = {
        "type": "null", "enum": [1], "const": 1, "anyOf": [{"type": "null"}], "oneOf": [{"type": "null"}], "allOf": [{"type": "null"}], "$ref": "#/$defs/a",
        "not": {"type": "null"}, "if": {"type": "null"}, "then": {"type": "null"}, "else": {"type": "null"}, "$dynamicRef": "#a", "$dynamicAnchor": "a",
        "$vocabulary": {}, "items": {"type": "null"}, "prefixItems": [{"type": "null"}], "uniqueItems": True, "contains": {"type": "null"},
        "unevaluatedItems": False, "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": False, "patternProperties": {"a": False},
        "propertyNames": {"const": "b"}, "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"a": False}, "unevaluatedProperties": False,
        "pattern": "a", "format": "date", "multipleOf": 7,
    }  # fmt: skip
    bases = {
        "string": {"type": "string", "maxLength": 3},
        "integer": {"type": "integer"},
        "number": {"type": "number"},
        "array": {"type": "array", "items": {"type": "integer"}},
        "object": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "additionalProperties": {"type": "integer"}},
    }
    probes = [b'"abc"', b'""', b"1", b"8", b"-1", b"1.5", b"[1, 1, 1]", b"[]", b'{"a": 1}', b"{}", b'{"b": 1}', b'{"z": 1}', b"null"]
    for kind, base in bases.items():
        before = [words.compile_schema(base).accepts(raw) for raw in probes]
        for keyword in words.OF_TYPE[kind] | words.OF_ANY:
            value = harmless.get(keyword, 2)
            if base.get(keyword) == value:
                continue
            try:
                after = words.compile_schema(base | {keyword: value, "$defs": {"a": {"type": "null"}}})
            except RequestError as error:
                assert keyword in str(error) or (keyword == "format" and "no string" in str(error)), (kind, keyword)
            else:
                assert [after.accepts(raw) for raw in probes] != before, (kind, keyword)
    assert NAMED["properties"]


def test_a_closed_schema_allows_only_what_the_one_that_was_sent_allows(module, chapter, RequestError, rng):
    """Random texts of schemas whose objects are closed where they do not say, judged by jsonschema with the schema as it was."""
    words, num_closed, num_walked = module("json_schema"), 0, 0
    by_tag = [{"type": "object", "properties": {"a": {"const": tag}, "b": {"type": "null"}}, "required": ["a"]} for tag in (1, 2)]
    a, b = ({"type": "object", "properties": {name: {"type": "integer"}}, "required": ["a"][: name == "a"]} for name in "ab")
    schemas = [
        {"oneOf": [a, b]},
        {"oneOf": by_tag},
        {"anyOf": [a, b]},
        {"allOf": [a, b]},
        {"not": a} | b,
        a | {"additionalProperties": True},
        {"type": "array", "items": a},
    ]
    schemas += [
        {"properties": {"properties": a}, "type": "object"},
        {"enum": [{"properties": {"a": 1}}]},
        a | {"required": ["z"]},
        {"$ref": "#/$defs/a", "$defs": {"a": a}},
    ]
    for variant in ("as it is", "typed"):
        for case in json_suite.cases(variant, chapter):
            schemas += [case.schema if variant == "as it is" else json_suite.opened(case.schema)] if isinstance(case.schema, dict) else []
    for schema in schemas:
        before = json.dumps(schema)
        try:
            closed = words.close(schema)
            automaton = words.compile_schema(closed)
        except RequestError:
            continue
        finally:
            assert json.dumps(schema) == before
        num_closed += closed != schema
        validator, walker = jsonschema.Draft202012Validator(schema), Walker(automaton)
        for _ in range(4):
            text = walker.text(rng, 60).decode()
            assert validator.is_valid(json.loads(text)), (schema, text)
            num_walked += 1
    assert num_closed > 20 and num_walked > 200
    # A discriminated union, and whatever is only named so, can be closed.
    assert words.compile_schema(words.close({"oneOf": by_tag})).accepts(b'{"a": 2, "b": null}')
    assert words.close({"enum": [{"properties": {"a": 1}}]}) == {"enum": [{"properties": {"a": 1}}]}


def test_a_closed_schema_leaves_what_is_demanded_possible(module):
    """An alternative must not forbid what the schema around it requires."""
    words = module("json_schema")
    tagged = [{"properties": {"kind": {"const": tag}}, "required": ["kind"]} for tag in "ab"]
    outer = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
    inner = {"type": "object", "properties": {"m": {"type": "null"}}}
    for schema, value in (
        (outer | {"oneOf": tagged}, {"id": "x", "kind": "a"}),
        (outer | {"anyOf": tagged}, {"id": "x", "kind": "a"}),
        ({"anyOf": tagged, "oneOf": [{"required": ["id"], "properties": {"id": {"const": 1}}}]}, {"id": 1, "kind": "b"}),
        ({"type": "object", "properties": {"ab": inner}, "patternProperties": {"^a": {"required": ["n"]}}}, {"ab": {"n": 1}}),
    ):
        for each in (schema, {"type": "array", "items": schema}, {"type": "object", "properties": {"x": schema}, "required": ["x"]}):
            closed = words.close(each)
            wrapped = {"array": [value], "object": {"x": value}}[each["type"]] if each is not schema else value
            jsonschema.Draft202012Validator(each).validate(wrapped)
            jsonschema.Draft202012Validator(closed).validate(wrapped)
    # Alone, alternatives with a tag are closed.
    alone = words.close({"oneOf": [{"type": "object", **each} for each in tagged]})
    assert all(each["additionalProperties"] is False for each in alone["oneOf"])


def test_closing_a_schema_takes_no_longer_because_many_refer_to_one_part(module):
    """It is done on the event loop. Without care, each of these spells all values again."""
    words = module("json_schema")
    large = {"properties": {"k": {"enum": [0] * 25_000}}, "required": ["k"]}
    many = {"properties": {f"k{i}": {"const": 0} for i in range(1_000)}, "required": [f"k{i}" for i in range(1_000)]}
    reference = {"$ref": "#/$defs/x"}
    for part in (large, many):
        for schema in ({"oneOf": [reference] * 2_000, "$defs": {"x": part}}, {"anyOf": [{"oneOf": [reference]}] * 2_000, "$defs": {"x": part}}):
            began = time.perf_counter()
            words.close(schema)
            assert time.perf_counter() - began < 1


def test_the_library_cannot_spell_a_name_in_another_way(chapter, Params):
    """A property's name as an escape would be another property to it, with any value."""
    grammars, tokenizer = json_suite.grammars_of(chapter, "llguidance"), json_suite.tokenizer_of(chapter)
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"type": "integer"}}
    grammar = grammars.get(Params(json_schema=schema).constraint)
    for text, possible in (
        ('{"a": 1}', True),
        ('{"b": 2}', True),
        ('{"a": 1, "\\n\\u0001": 2}', True),
        ('{"a": 2}', False),
        ('{"\\u0061": 2}', False),
        ('{"b\\u0061": 2}', False),
    ):
        assert json_suite.can_generate(grammar, tokenizer, text) == possible, text


LARGE = 2**53 + 1
REFUSED_THERE = (
    ({"type": "integer", "minimum": LARGE}, "the schema: minimum has a number beyond 9007199254740992, which is not supported here"),
    ({"type": "array", "items": {"exclusiveMaximum": -LARGE}}, "/items: exclusiveMaximum has a number beyond"),
    ({"enum": ["a", [{"b": LARGE}]]}, "the schema: enum has a number beyond"),
    ({"properties": {"a": {"const": 1e300}}}, "/properties/a: const has a number beyond"),
    ({"type": "object", "minProperties": 2}, "the schema: minProperties above 1 is not supported; list the names in required"),
    ({"type": "string", "format": "uuid", "pattern": "a"}, "the schema: format beside pattern is not supported; leave one out"),
    ({"items": {"format": "iri"}}, "/items: the format 'iri' is not supported; date, date-time, duration, email, hostname, ipv4, ipv6, time, uri, uuid are"),
    ({"patternProperties": {"a": {"pattern": "(?=a)"}}}, "look-around, flags and conditions are not supported"),
    ({"type": "object", "propertyNames": {"maxLength": 1}}, "json_schema is refused: "),
    ({"foo": 1}, "the keyword 'foo' is not supported"),
    ({"$id": "http://x/y", "$ref": "http://x/y#/default", "default": {"format": "date"}}, "which is not supported; leave the address out"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum 0 with an opposite bound less than 1 away"),
    ({"allOf": [{"type": "number", "minimum": -0.5}, {"exclusiveMaximum": 0}]}, "exclusiveMaximum 0 with an opposite bound less than 1 away"),
)


def test_bounds_of_different_numbers_are_not_compared(module):
    """Only a number that has to keep both could be the excluded one."""
    rate, share = {"type": "number", "exclusiveMinimum": 0}, {"type": "number", "minimum": 0, "maximum": 0.5}
    exactly = module("guidance").exactly
    exactly({"type": "object", "properties": {"rate": rate, "share": share, "loss": {"type": "number", "exclusiveMaximum": 0}}})
    exactly({"anyOf": [rate, share]})
    for schema in ({"allOf": [rate, share]}, rate | {"anyOf": [share]}, {"$ref": "#/$defs/a", "anyOf": [share], "$defs": {"a": rate}}):
        with pytest.raises(ValueError, match="exclusiveMinimum 0 with an opposite bound less than 1 away"):
            exactly(schema)


@pytest.mark.parametrize(("schema", "said"), REFUSED_THERE, ids=str)
def test_what_the_library_would_not_obey_is_refused_before(chapter, Params, RequestError, schema, said):
    with pytest.raises(RequestError) as caught:
        json_suite.grammars_of(chapter, "llguidance").get(Params(json_schema=schema).constraint)
    assert said in str(caught.value) and caught.value.param == "json_schema"


def test_patterns_and_formats_mean_the_same_to_the_library(chapter, Params):
    """They are written character by character, and formats of dates as patterns: by itself it takes them more loosely."""
    grammars, tokenizer = json_suite.grammars_of(chapter, "llguidance"), json_suite.tokenizer_of(chapter)
    for schema, valid, invalid in (
        ({"pattern": "^\\S\\d$"}, ["a1"], ["\ufeff1", "a٣", " 1", "a11"]),
        ({"pattern": "a|^b$"}, ["xa", "b"], ["bb", "x"]),
        ({"pattern": "^(é|[🙂-🙃]){2,3}$"}, ["é🙂", "🙃" * 3], ["é", "🙂a"]),
        ({"format": "date"}, ["2024-02-29"], ["2021-02-29", "0000-01-01"]),
        ({"format": "time"}, ["23:59:59Z"], ["22:59:60Z", "24:00:00Z"]),
    ):
        grammar = grammars.get(Params(json_schema={"type": "string"} | schema).constraint)
        for text in valid + invalid:
            assert json_suite.can_generate(grammar, tokenizer, json.dumps(text, ensure_ascii=False)) == (text in valid), (schema, text)


def test_a_library_that_gives_up_allows_nothing(module, chapter, Params, monkeypatch):
    """Then the request ends with an error; and a tokenizer that it cannot read is told as such."""
    grammars, tokenizer = json_suite.grammars_of(chapter, "llguidance"), json_suite.tokenizer_of(chapter)
    matcher = grammars.get(Params(grammar='start: "ab" | "cd"').constraint).start(False)
    assert matcher.mask().any()
    matcher.advance(tokenizer("x", add_special_tokens=False).input_ids[0])
    assert not matcher.mask().any()

    def unreadable(*_, **__):
        raise RuntimeError("no such decoder")

    monkeypatch.setattr("llguidance.hf.from_tokenizer", unreadable)
    with pytest.raises(ValueError, match="llguidance cannot read this tokenizer: no such decoder"):
        json_suite.grammars_of(chapter, "llguidance")


# ---- the official suite

# The file's commit of the suite, and this chapter's grammars: right, valid but rejected, refused, invalid but accepted.
WHOLE = {
    ("own", "as it is"): (166, 1, 1090, 0),
    ("llguidance", "as it is"): (568, 13, 676, 0),
    ("auto", "as it is"): (568, 13, 676, 0),
    ("own", "typed"): (250, 5, 628, 0),
    ("own", "formats"): (144, 10, 337, 0),
    ("auto", "formats"): (275, 18, 198, 0),
}


@pytest.mark.parametrize(("backend", "variant"), WHOLE)
def test_the_official_suite_has_nothing_invalid_that_is_accepted(chapter, backend, variant):
    counted = json_suite.counts(chapter, backend, variant)
    assert not {file: counts for file, counts in counted.items() if counts.accepted}
    assert tuple(json_suite.total(counted)) == WHOLE[backend, variant]


def test_what_is_valid_but_rejected_is_known(chapter):
    """Members in another order; and formats, which this suite takes as notes, or with spellings of times that few read."""
    rejected = [what for variant in ("as it is", "formats") for _, outcome, what, _ in json_suite.outcomes(chapter, "own", variant) if outcome == "rejected"]
    assert len(rejected) == 11 and "object" in rejected[0]
    assert all("leap second" in what or "case-insensitive" in what for what in rejected[1:]), rejected


def generated(grammar, tokenizer, rng, most_tokens=40):
    """A random text of a grammar, token by token; None if it has not ended after that many."""
    matcher, ids = grammar.start(is_new_text=False), []
    while len(ids) < most_tokens:
        allowed = np.flatnonzero(np.unpackbits(matcher.mask(), bitorder="little")).tolist()
        token_id = tokenizer.eos_token_id if tokenizer.eos_token_id in allowed and rng.random() < 0.5 else rng.choice(allowed)
        if token_id == tokenizer.eos_token_id:
            return tokenizer.decode(ids)
        ids.append(token_id)
        if not matcher.advance(token_id):
            return tokenizer.decode(ids)
    return None


@pytest.mark.parametrize("backend", ["own", "auto"])
def test_whatever_is_generated_of_the_suites_schemas_is_valid(chapter, Params, RequestError, rng, backend):
    """Not only the suite's own instances: random texts, judged by jsonschema."""
    grammars, tokenizer, judged, num_valid, num_schemas = json_suite.grammars_of(chapter, backend), json_suite.tokenizer_of(chapter), 0, 0, 0
    for case in (*json_suite.cases("as it is", chapter), *json_suite.cases("typed", chapter)):
        if not isinstance(case.schema, dict):
            continue
        try:
            grammar = grammars.get(Params(json_schema=case.schema).constraint)
        except RequestError:
            continue
        num_schemas += 1
        validator = jsonschema.Draft202012Validator(case.schema)
        for _ in range(5 if backend == "own" else 2):
            text = generated(grammar, tokenizer, rng)
            judged += 1
            if text is not None:
                assert validator.is_valid(json.loads(text)), (case.file, case.description, text)
                num_valid += 1
    assert num_schemas > 100 and num_valid > judged / 2


def test_the_suites_command_prints_and_writes(chapter, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(json_suite, "BACKENDS", ("own",))
    monkeypatch.setattr(json_suite, "VARIANTS", ("formats",))
    written = {}
    monkeypatch.setattr(json_suite.results, "write", lambda name, value, command: written.update({name: value, "command": command}) or json_suite.ROOT / "x")
    assert json_suite.main([chapter.id, "--write", "--show", "accepted"]) == 0
    assert written["json_suite"]["formats"]["own"] == {"right": 144, "rejected": 10, "refused": 337, "accepted": 0}
    assert written["command"] == "python -m shared.verify.json_suite --write" and "uuid" in capsys.readouterr().out


# ---- what was found by attacks


def closed_object(properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def random_walk(chapter, grammar, seed):
    """A text by random tokens, and whether it ended as whole."""
    tokenizer, matcher, rng, spelled = json_suite.tokenizer_of(chapter), grammar.start(is_new_text=True), np.random.default_rng(seed), b""
    spellings = json_suite.grammars_of(chapter, "own").spellings
    for _ in range(200):
        allowed = np.flatnonzero(np.unpackbits(matcher.mask(), bitorder="little"))
        if not len(allowed):
            return spelled, False
        token_id = int(rng.choice(allowed))
        if token_id == tokenizer.eos_token_id:
            return spelled, True
        spelled += spellings[token_id]
        if not matcher.advance(token_id):
            return spelled, True
    return spelled, False


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"anyOf": [{"$ref": "#"}]},
    ],
)
def test_a_schema_that_no_value_ends_never_finishes_as_whole(chapter, schema):
    """The library gives up on these, and then says that it has stopped."""
    grammars, Params = json_suite.grammars_of(chapter, "auto"), chapter.load().SamplingParams
    try:
        matcher = grammars.get(Params(json_schema=schema).constraint).start(is_new_text=True)
    except chapter.load().RequestError:
        return
    for _ in range(2000):
        allowed = np.flatnonzero(np.unpackbits(matcher.mask(), bitorder="little"))
        if not len(allowed):
            return
        assert matcher.advance(int(allowed[0])), "it finished"


MEMBERS = {"a": {"type": "integer"}, "b": {"type": "integer"}}


@pytest.mark.parametrize(
    "alternatives",
    [
        [closed_object(MEMBERS), closed_object(dict(reversed(MEMBERS.items())))],
        [{"const": {"a": 1, "b": 2}}, {"const": {"b": 2, "a": 1}}],
        [{"type": "array", "items": closed_object(MEMBERS)}, {"type": "array", "items": closed_object(dict(reversed(MEMBERS.items()))), "minItems": 1}],
    ],
)
def test_alternatives_that_differ_in_the_order_of_members_are_not_told_apart(chapter, alternatives):
    with pytest.raises(chapter.load().RequestError, match="may allow the same value"):
        json_suite.json_schema_of(chapter).compile_schema({"oneOf": alternatives})


def test_alternatives_with_a_tag_are_told_apart_in_any_order(chapter):
    tagged = [closed_object({"t": {"const": 1}, "b": {"type": "integer"}}), closed_object({"b": {"type": "integer"}, "t": {"const": 2}})]
    automaton = json_suite.json_schema_of(chapter).compile_schema({"oneOf": tagged})
    assert automaton.accepts(b'{"b": 1, "t": 2}') and automaton.accepts(b'{"t": 1, "b": 1}') and not automaton.accepts(b'{"t": 2, "b": 1}')


@pytest.mark.parametrize("name", ["a\nb", "\x1f", "\x7f", "\b"])
def test_the_library_gets_no_names_that_it_would_spell_in_several_ways(chapter, name):
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    with pytest.raises(chapter.load().RequestError, match="control character"):
        json_suite.grammars_of(chapter, "llguidance").get(chapter.load().SamplingParams(json_schema=schema).constraint)


@pytest.mark.parametrize("schema", [{"type": "string", "pattern": "^\x7f\n$"}, {"enum": ["\x7f", "a\x01"]}])
def test_the_library_can_end_texts_with_control_characters(chapter, schema):
    grammar = json_suite.grammars_of(chapter, "llguidance").get(chapter.load().SamplingParams(json_schema=schema).constraint)
    for seed in range(10):
        text, ended = random_walk(chapter, grammar, seed)
        assert ended and jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


@pytest.mark.parametrize("source", ['start: start "a"', "start: ("])
def test_a_grammar_that_matches_nothing_is_refused(chapter, source):
    with pytest.raises(chapter.load().RequestError, match="grammar"):
        json_suite.grammars_of(chapter, "auto").get(("grammar", source))


@pytest.mark.parametrize("pattern, what", [("{1}", "nothing to repeat"), ("a|{2}", "nothing to repeat"), ("(?P<a>x)(?P<a>y)", "the same name")])
def test_what_both_dialects_refuse_is_refused(chapter, pattern, what):
    with pytest.raises(chapter.load().RequestError, match=what):
        json_suite.grammars_of(chapter, "own").get(("regex", pattern))
