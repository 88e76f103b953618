"""A request's parameters. Nothing here imports torch, so a process without a model can import this module."""
import hashlib
import sys
from dataclasses import dataclass, replace


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
        if not isinstance(self.new_text, bool):
            raise RequestError(f"new_text must be True or False, got {self.new_text!r}", "new_text")
        # Logits are divided by it in float32.
        if not is_number(self.temperature) or not 0 <= self.temperature <= 1e30:
            raise RequestError(f"temperature must be a number from 0 (greedy) to 1e30, got {self.temperature!r}", "temperature")
        if 0 < self.temperature < 1e-30:
            raise RequestError(f"temperature {self.temperature!r} is too small to divide by; use 0 for greedy", "temperature")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1 (off), got {self.top_p!r}", "top_p")


def choices(params: SamplingParams, num_choices: int) -> list[SamplingParams]:
    """The parameters of each of num_choices answers: the first unchanged, each of the others with its own seed.

    >>> [choice.seed == 7 for choice in choices(SamplingParams(seed=7), 3)]
    [True, False, False]
    """
    seeds = [params.seed, *(choice_seed(params.seed, i) for i in range(1, num_choices))]
    return [replace(params, seed=seed) for seed in seeds]


def choice_seed(seed: int | None, index: int) -> int | None:
    """A hash of the arguments; a seed of None, which means a fresh one for each request, stays None."""
    if seed is None:
        return None
    key = seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"choice").digest(), "little", signed=True)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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
