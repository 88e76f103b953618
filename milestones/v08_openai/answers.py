"""What a request has said so far."""
from collections import deque

from .outputs import StepOutput


class Answer:
    """What one request has said so far."""

    def __init__(self, index: int, wants_tokens: bool = True):
        self.index = index
        self.wants_tokens = wants_tokens  # False: what is computed is thrown away
        self.text = ""
        self.num_tokens = 0
        self.finish_reason = None
        self.prompt_logprobs = None
        self.pending: deque[tuple[int, int, dict[int, float]]] = deque()  # tokens whose text is not certain yet, with offsets

    def push(self, output: StepOutput) -> tuple[str, list[tuple[int, int, dict[int, float]]]]:
        """Take a token; return the text that became certain, and the tokens that begin in it: offset, id, logprobs.

        A token that is not in the text, because it ended it or belongs to a stop string, is not among them.
        """
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason = output.finish_reason
        if not self.wants_tokens:
            self.finish_reason = "length"  # whatever the token was
            return "", []
        self.num_tokens += 1
        self.text += output.text
        if output.logprobs is not None and not isinstance(output.stop_reason, int):
            self.pending.append((output.offset, output.token_id, output.logprobs))
        # At the end of a text all that waits is in it, unless a stop string was found.
        end = float("inf") if output.finish_reason and not isinstance(output.stop_reason, str) else len(self.text)
        ready = []
        while self.pending and self.pending[0][0] < end:
            ready.append(self.pending.popleft())
        return output.text, ready
