"""The answer to one request while it is generated."""
from collections import deque

from .outputs import StepOutput


class Answer:
    """The text that one request has generated so far, its token count and its finish reason."""

    def __init__(self, index: int, wants_tokens: bool = True):
        self.index = index
        self.wants_tokens = wants_tokens  # False: the generated tokens are discarded
        self.text = ""
        self.num_tokens = 0
        self.finish_reason = None
        self.prompt_logprobs = None
        self.num_cached = 0
        self.pending: deque[tuple[int, int, dict[int, float]]] = deque()  # tokens whose text is not final, with offsets

    def push(self, output: StepOutput) -> tuple[str, list[tuple[int, int, dict[int, float]]]]:
        """Add a token. Return the text that became final, and the tokens that begin in it: offset, id, logprobs.

        A token that is not in the text, because it ended it or belongs to a stop string, is left out.
        """
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason = output.finish_reason
        self.num_cached = output.num_cached
        if not self.wants_tokens:
            self.finish_reason = "length"  # even if the token was an end token
            return "", []
        self.num_tokens += 1
        self.text += output.text
        if output.logprobs is not None and not isinstance(output.stop_reason, int):
            self.pending.append((output.offset, output.token_id, output.logprobs))
        # When the answer finishes, all pending tokens are in its text, unless a stop string ended it.
        end = float("inf") if output.finish_reason and not isinstance(output.stop_reason, str) else len(self.text)
        ready = []
        while self.pending and self.pending[0][0] < end:
            ready.append(self.pending.popleft())
        return output.text, ready
