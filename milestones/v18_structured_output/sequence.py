"""The state of one request."""
import random
from array import array

from .params import SamplingParams
from .prefix import block_key
from .text import TextStream


class History:
    """The different tokens of a sequence, and how often each was generated."""

    def __init__(self):
        self.token_ids = array("q")
        self.counts = array("q")  # 0 for a token that is only in the prompt
        self.places: dict[int, int] = {}  # of each token in the two arrays
        self.num_read = 0

    def read(self, token_ids: list[int], num_prompt: int) -> None:
        """Count the tokens that have come since the last call. The first num_prompt are the prompt's."""
        for index in range(self.num_read, len(token_ids)):
            token_id = token_ids[index]
            if token_id not in self.places:
                self.places[token_id] = len(self.token_ids)
                self.token_ids.append(token_id)
                self.counts.append(0)
            self.counts[self.places[token_id]] += index >= num_prompt
        self.num_read = len(token_ids)


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
        root_key: bytes,
        arrived: float = 0.0,
        matcher: object | None = None,
        bad_words: tuple[list[int], ...] = (),
    ):
        self.seq_id = seq_id
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(end_ids))
        self.seed = random.getrandbits(63) if params.seed is None else params.seed
        self.stream = stream
        self.stop_ids |= stream.stop_ids
        self.logprobs = []
        self.prompt_logprobs = [None] * self.num_prompt if params.prompt_logprobs else None  # the first has none
        self.finish_reason = None
        self.stop_reason = None
        self.num_computed = 0
        self.num_scheduled = 0  # tokens to feed in this step
        self.block_table = array("i")  # the blocks of its positions, in order
        self.preempted = False  # whether it has run and waits again
        self.swap_table = array("i")  # while it waits: the swap blocks that hold its positions, in order
        self.block_keys = [root_key]  # then those of its first blocks, as many as were needed so far
        self.num_published = 0  # blocks of its table that other sequences can find
        self.num_cached: int | None = None  # prompt tokens found in the prefix cache when it first ran
        # Seconds of time.monotonic(): its arrival, its first step, its first token and its last one.
        self.arrived = arrived
        self.began: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.longest_gap = 0.0  # between two of its tokens
        self.num_preemptions = 0
        self.num_early_preemptions = 0  # of these, before its first token
        self.matcher = matcher  # of its grammar, which its output follows so far
        self.is_stuck = False  # whether its grammar allows no token that the vocabulary has
        self.bad_words = bad_words  # token ids of each
        self.history = History()
        self.adjusts_logits = params.adjusts_logits

    @property
    def rank(self) -> tuple[int, int]:
        """The order in which requests are served: by priority, then by arrival; the smallest comes first."""
        return self.params.priority, self.seq_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def max_len(self) -> int:
        """The most positions that it may hold in the cache: all its tokens except the last, which is never fed."""
        return self.num_prompt + self.max_tokens - 1

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def new_ids(self) -> list[int]:
        """The tokens to feed in this step."""
        return self.token_ids[self.num_computed : self.num_computed + self.num_scheduled]

    @property
    def first_draw(self) -> int:
        """The first position that the next step decides: the new token's or, for prompt_logprobs, a prompt token's."""
        return self.num_computed + 1 if self.params.prompt_logprobs and self.num_output == 0 else self.num_tokens

    def knows(self, position: int) -> bool:
        """Whether the token at this position is already known: it is in the prompt, or was generated."""
        return position < self.num_tokens

    def block_key(self, index: int, block_size: int) -> bytes:
        """The key of its block number index, which its known tokens must fill."""
        while len(self.block_keys) <= index + 1:
            end = len(self.block_keys) * block_size
            self.block_keys.append(block_key(self.block_keys[-1], self.token_ids[end - block_size : end]))
        return self.block_keys[index + 1]

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
            self.finish("stop", by=token_id)
        elif self.matcher is not None and not self.matcher.advance(token_id):
            self.finish("stop")
        elif self.num_output == self.max_tokens:
            self.finish("length")

    def finish(self, reason: str, by: int | str | None = None) -> None:
        """Record why it finished: stop, length, abort or error."""
        self.finish_reason = reason
        self.stop_reason = by
