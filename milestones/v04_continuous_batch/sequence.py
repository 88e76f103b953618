"""The state of one request."""
import random

from .params import SamplingParams
from .text import TextStream


class Sequence:
    """The tokens of one request, and why it finished."""

    def __init__(
        self,
        seq_id: int,
        prompt_ids: list[int],
        params: SamplingParams,
        max_tokens: int,
        end_ids: tuple[int, ...],
        stream: TextStream,
    ):
        self.seq_id = seq_id
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(end_ids))
        self.seed = random.getrandbits(63) if params.seed is None else params.seed
        self.stream = stream
        self.logprobs = []
        self.finish_reason = None
        self.num_computed = 0
        self.row = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def new_ids(self) -> list[int]:
        """The tokens to feed next."""
        return self.token_ids[self.num_computed :]

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token_id: int) -> None:
        """Add one generated token, and finish if it is the last."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            self.finish("stop")
        elif self.num_output == self.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """Record why it finished: stop, length, abort or error."""
        self.finish_reason = reason
