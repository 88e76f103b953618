"""What an engine returns. Nothing here imports torch."""
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RequestOutput:
    """The result of a finished request."""

    prompt_ids: list[int]
    token_ids: list[int]  # including the token that ended it
    text: str  # without that token
    finish_reason: str  # stop, length, or error: the next token's logits were not finite numbers
    logprobs: list[dict[int, float]] | None  # one dict per token
    seed: int


class StepOutput(NamedTuple):
    """One new token of one request; a step may return none, one or several for a request, in order."""

    request_id: int
    token_id: int  # NO_TOKEN on an error
    text: str  # the text that became final with this token: often less or more than the token's own
    logprobs: dict[int, float] | None
    finish_reason: str | None  # on the last token
