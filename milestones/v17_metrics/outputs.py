"""What an engine returns. Nothing here imports torch."""
from dataclasses import dataclass, field
from typing import NamedTuple

from .records import Report


@dataclass(frozen=True)
class RequestOutput:
    """The result of a finished request."""

    prompt_ids: list[int]
    token_ids: list[int]  # including the token that ended it
    text: str  # without that token
    finish_reason: str  # stop, length, or error: the next token's logits were not finite numbers
    logprobs: list[dict[int, float]] | None  # one dict per token
    seed: int
    prompt_logprobs: list[dict[int, float] | None] | None = None  # one per prompt token; the first is None
    stop_reason: int | str | None = None  # the token or the string that ended it
    num_cached: int = field(default=0, compare=False)  # prompt tokens whose keys and values were found in the prefix cache


class StepOutput(NamedTuple):
    """One new token of one request; a step may return none, one or several for a request, in order."""

    request_id: int
    token_id: int  # NO_TOKEN on an error
    text: str  # the text that became final with this token: often less or more than the token's own
    logprobs: dict[int, float] | None
    finish_reason: str | None  # on the last token
    prompt_logprobs: list[dict[int, float] | None] | None = None  # on the first token
    stop_reason: int | str | None = None  # on the last token
    offset: int = 0  # the number of characters before this token's, including those held back
    num_cached: int = 0  # prompt tokens whose keys and values were found in the prefix cache


class Stats(NamedTuple):
    """The numbers of requests in an engine and of blocks in its cache."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    preempted: int = 0  # requests that have run and wait again; not counted in waiting
    preemptions: int = 0  # since the engine was created
    swapped_blocks: int = 0  # blocks of the swap space in use
    prompt_tokens: int = 0  # of all requests that have run, since the engine was created
    cached_tokens: int = 0  # of these, the ones found in the prefix cache
    max_num_seqs: int = 0
    findable_blocks: int = 0  # blocks that the prefix cache can find
    waits_for: str | None = None  # why waiting requests were left out of the last step: places, blocks, tokens, or a prefix that is being computed
    report: Report | None = None  # what has happened since the last message
