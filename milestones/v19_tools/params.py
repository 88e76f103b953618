"""A request's parameters. Nothing here imports torch, so a process without a model can import this module."""
import hashlib
import json
import sys
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property

from .parts import Parts


# The parameters of which a request has at most one, and how long its value may be.
GRAMMARS = ("regex", "choice", "json_schema", "json_object", "grammar", "parts")
MOST_GRAMMAR_BYTES = 100_000
# How many bad_words a request has at most, and how many bytes they have together. The engine's thread tokenizes them.
MOST_WORDS, MOST_WORD_BYTES = 128, 10_000


class RequestError(ValueError):
    """An invalid argument of a request.

    Attributes:
        param: the name of the argument, such as `temperature` or `prompts[3]`.
        code: the kind of error, for programs: `invalid_value` or `context_length_exceeded`.
    """

    def __init__(self, message: str, param: str, code: str = "invalid_value"):
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    >>> try:
    ...     SamplingParams(temperature=-1)
    ... except RequestError as error:
    ...     print(error)
    temperature must be a number from 0 (greedy) to 1e30, got -1
    """

    max_tokens: int | None = 16  # the most tokens to generate; None: as many as fit
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together reach this probability
    seed: int | None = None  # None: a fresh one for each request
    stop_token_ids: tuple[int, ...] = ()  # tokens that end the text, besides the checkpoint's own
    ignore_eos: bool = False  # continue past the checkpoint's own end tokens
    new_text: bool = False  # the output is a text of its own, such as a chat answer; otherwise it continues the prompt
    logprobs: int | None = None  # the number of likeliest tokens to report; None: off
    stop: tuple[str, ...] = ()  # strings; the text ends before the first of them that occurs in it
    prompt_logprobs: bool = False  # report logprobs of the prompt's tokens too
    priority: int = 0  # a smaller number is more important: it runs first, and is preempted last
    cache_salt: str | None = None  # requests share cached blocks only if they have the same salt
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these tokens, from -100 to 100
    frequency_penalty: float = 0.0  # taken from a token's logit each time that the token was generated
    presence_penalty: float = 0.0  # taken from a token's logit once it was generated
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt and output if they are positive, else multiplies
    min_p: float = 0.0  # sample from tokens with at least this share of the likeliest one's probability
    min_tokens: int = 0  # no token ends the text before there are as many
    bad_words: tuple[str, ...] = ()  # texts whose tokens, in this order, are never completed; other tokens may spell the same text
    # At most one of these; the text matches it as a whole, unless it is cut off.
    regex: str | None = None
    choice: tuple[str, ...] | None = None  # one of these texts
    json_schema: dict | str | None = None  # a JSON Schema
    json_object: bool = False  # any JSON object
    grammar: str | None = None  # in llguidance's variant of Lark
    parts: Parts | None = None  # what an answer consists of: a thought, something said, calls
    kept_special_tokens: tuple[str, ...] = ()  # special tokens that are part of the text, by name; all others are left out

    def __post_init__(self):
        check_integer("max_tokens", self.max_tokens, 1, optional=True)
        check_integer("top_k", self.top_k, 0)
        check_integer("seed", self.seed, -(2**63), 2**63 - 1, optional=True)
        check_integer("logprobs", self.logprobs, 0, optional=True)
        check_integer("priority", self.priority, -(2**31), 2**31 - 1)
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise RequestError(f"cache_salt must be a non-empty string or None, got {self.cache_salt!r}", "cache_salt")
        if not isinstance(self.stop_token_ids, (tuple, list)):
            raise RequestError(f"stop_token_ids must be a tuple of token ids, got {self.stop_token_ids!r}", "stop_token_ids")
        for token_id in self.stop_token_ids:
            check_integer("each of stop_token_ids", token_id, 0, param="stop_token_ids")
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop must be a tuple of non-empty strings, got {self.stop!r}", "stop")
        if not isinstance(self.prompt_logprobs, bool):
            raise RequestError(f"prompt_logprobs must be True or False, got {self.prompt_logprobs!r}", "prompt_logprobs")
        if self.prompt_logprobs and self.logprobs is None:
            raise RequestError("prompt_logprobs needs logprobs, which is None; set it to 0 or more", "prompt_logprobs")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, got {self.ignore_eos!r}", "ignore_eos")
        if not isinstance(self.kept_special_tokens, (tuple, list)) or not all(isinstance(name, str) for name in self.kept_special_tokens):
            raise RequestError(f"kept_special_tokens must be a tuple of names, got {self.kept_special_tokens!r}", "kept_special_tokens")
        if not isinstance(self.new_text, bool):
            raise RequestError(f"new_text must be True or False, got {self.new_text!r}", "new_text")
        # Logits are divided by it in float32.
        if not is_number(self.temperature) or not 0 <= self.temperature <= 1e30:
            raise RequestError(f"temperature must be a number from 0 (greedy) to 1e30, got {self.temperature!r}", "temperature")
        if 0 < self.temperature < 1e-30:
            raise RequestError(f"temperature {self.temperature!r} is too small to divide by; use 0 for greedy", "temperature")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1 (off), got {self.top_p!r}", "top_p")
        self.check_logits()
        self.check_grammar()

    def check_logits(self) -> None:
        check_integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}", "min_tokens")
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("min_p", self.min_p, 0, 1)
        if not is_number(self.repetition_penalty) or not 0.01 <= self.repetition_penalty <= 100:
            raise RequestError(f"repetition_penalty must be a number from 0.01 to 100, 1 being off, got {self.repetition_penalty!r}", "repetition_penalty")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError(f"logit_bias must be a mapping of token ids to numbers, got {self.logit_bias!r}", "logit_bias")
            for token_id, bias in self.logit_bias.items():
                check_integer("each token id of logit_bias", token_id, 0, param="logit_bias")
                check_number(f"logit_bias of token {token_id}", bias, -100, 100, param="logit_bias")
        if not isinstance(self.bad_words, (tuple, list)) or not all(isinstance(word, str) and word for word in self.bad_words):
            raise RequestError(f"bad_words must be a tuple of non-empty strings, got {self.bad_words!r}", "bad_words")
        if len(self.bad_words) > MOST_WORDS:
            raise RequestError(f"bad_words has {len(self.bad_words)} words, but at most {MOST_WORDS} are allowed; leave some out", "bad_words")
        try:
            num_bytes = sum(len(word.encode()) for word in self.bad_words)
        except UnicodeEncodeError:
            raise RequestError("bad_words hold half a surrogate pair, which is no character; remove it", "bad_words") from None
        if num_bytes > MOST_WORD_BYTES:
            raise RequestError(f"bad_words has {num_bytes} bytes, but at most {MOST_WORD_BYTES} are allowed; shorten it", "bad_words")

    def check_grammar(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(f"json_object must be True or False, got {self.json_object!r}", "json_object")
        given = [kind for kind in GRAMMARS if getattr(self, kind) is not (False if kind == "json_object" else None)]
        if len(given) > 1:
            raise RequestError(f"{given[0]} and {given[1]} are both given, but a text follows only one grammar; leave one out", given[1])
        if not given:
            return
        [kind] = given
        for other in ("regex", "grammar"):
            if kind == other and not isinstance(getattr(self, kind), str):
                raise RequestError(f"{kind} must be a string or None, got {getattr(self, kind)!r}", kind)
        if kind == "choice":
            are_texts = isinstance(self.choice, (tuple, list)) and all(isinstance(text, str) for text in self.choice)
            if not are_texts or not self.choice:
                raise RequestError(f"choice must be a tuple of at least one string, got {self.choice!r}", kind)
        if kind == "json_schema" and not isinstance(self.json_schema, (dict, str)):
            raise RequestError(f"json_schema must be a dict or a string of JSON, got {self.json_schema!r}", kind)
        if kind == "parts" and not isinstance(self.parts, Parts):
            raise RequestError(f"parts must be Parts or None, got {self.parts!r}", kind)
        _, source = self.constraint
        param = param_of(kind, source)
        try:
            num_bytes = source.nbytes if kind == "parts" else sum(len(text.encode()) for text in (source if kind == "choice" else [source]))
        except UnicodeEncodeError:
            raise RequestError(f"{param} holds half a surrogate pair, which is no character; remove it", param) from None
        if num_bytes > MOST_GRAMMAR_BYTES:
            raise RequestError(f"{param} has {num_bytes} bytes, but at most {MOST_GRAMMAR_BYTES} are allowed; shorten it", param)
        # These could forbid all tokens that the grammar allows.
        for name, inert in (("min_tokens", 0), ("bad_words", ()), ("ignore_eos", False)):
            if getattr(self, name) not in (inert, []):
                raise RequestError(f"{name} cannot be combined with {param}, which decides where a text may end and which words it has; leave one out", name)

    @cached_property
    def constraint(self) -> tuple[str, str | tuple[str, ...] | Parts] | None:
        """The kind of the grammar that the text must match, and its source; None if there is none."""
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "choice", tuple(self.choice)
        if self.json_schema is not None:
            return "json_schema", json_text(self.json_schema)
        if self.json_object:
            return "json_object", ""
        if self.grammar is not None:
            return "grammar", self.grammar
        return None if self.parts is None else ("parts", self.parts)

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything stands between the logits and the draw."""
        return bool(self.logit_bias or self.penalizes or self.min_tokens or self.bad_words or self.constraint)


def param_of(kind: str, source) -> str:
    """The parameter that demands a grammar, for messages."""
    return source.param if kind == "parts" else kind


def json_text(schema: dict | str, param: str = "json_schema") -> str:
    """A JSON Schema as JSON, with keys in the given order; param holds it, and is named in the error."""
    try:
        text = json.dumps(json.loads(schema) if isinstance(schema, str) else schema, ensure_ascii=False, allow_nan=False)
        text.encode()  # fails for half a surrogate pair
        return text
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{param} is not valid JSON: {error}", param) from None


def choices(params: SamplingParams, num_choices: int) -> list[SamplingParams]:
    """The parameters of each of num_choices answers: the first unchanged, each of the others with its own seed.

    >>> [choice.seed == 7 for choice in choices(SamplingParams(seed=7), 3)]
    [True, False, False]
    """
    answers = [copy(params) for _ in range(num_choices)]
    for i, answer in enumerate(answers[1:], start=1):
        # All else is checked, and the text of a schema is written once for all.
        object.__setattr__(answer, "seed", choice_seed(params.seed, i))
    return answers


def with_length(params: SamplingParams, max_tokens: int) -> SamplingParams:
    """The same parameters with another max_tokens, for another prompt of a call."""
    other = copy(params)
    object.__setattr__(other, "max_tokens", max_tokens)
    return other


def choice_seed(seed: int | None, index: int) -> int | None:
    """A hash of the arguments; a seed of None, which means a fresh one for each request, stays None."""
    if seed is None:
        return None
    key = seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"choice").digest(), "little", signed=True)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_number(name: str, value: object, low: float, high: float, param: str | None = None) -> None:
    """Raise RequestError unless value is a number from low to high."""
    if not is_number(value) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low} to {high}, got {value!r}", param or name)


def check_integer(
    name: str,
    value: object,
    low: int,
    high: int | None = None,
    *,
    optional: bool = False,
    param: str | None = None,
) -> None:
    """Raise RequestError unless value is an integer from low to high, or None if it is optional.

    name is what the message calls the value; param is the argument's name, by default the same.
    """
    if value is None and optional:
        return
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        upper = "up" if high is None else f"to {high}"
        message = f"{name} must be an integer from {low} {upper}{' or None' * optional}, got {value!r}"
        raise RequestError(message, param or name)


def check_ids(name: str, token_ids: list[int], vocab_size: int, param: str | None = None) -> None:
    """Raise RequestError unless all are token ids. A prompt can be long, so only a bad one is checked id by id."""
    if set(map(type, token_ids)) - {int} or min(token_ids, default=0) < 0 or max(token_ids, default=0) >= vocab_size:
        for token_id in token_ids:
            check_integer(name, token_id, 0, vocab_size - 1, param=param)
