"""What an engine gives back. Nothing here needs torch."""
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RequestOutput:
    """A finished request."""

    prompt_ids: list[int]
    token_ids: list[int]  # the token that ended it included
    text: str  # without that token
    finish_reason: str  # stop, length, or error: the next token's logits were not finite numbers
    logprobs: list[dict[int, float]] | None  # one dict per token
    seed: int
    prompt_logprobs: list[dict[int, float] | None] | None = None  # one per token of the prompt; the first has none
    stop_reason: int | str | None = None  # the token or the string that ended it


class StepOutput(NamedTuple):
    """One new token of one request; a step may give a request none, one or several, in order."""

    request_id: int
    token_id: int  # NO_TOKEN at an error
    text: str  # what became certain with this token: often less or more than the token alone
    logprobs: dict[int, float] | None
    finish_reason: str | None  # on the last token
    prompt_logprobs: list[dict[int, float] | None] | None = None  # on the first token
    stop_reason: int | str | None = None  # on the last token
    offset: int = 0  # how many characters come before this token's, including those held back


class Stats(NamedTuple):
    """How many requests an engine has, and how much of its cache is free."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
