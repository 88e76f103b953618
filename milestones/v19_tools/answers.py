"""The answer to one request while it is generated."""
from collections import deque
from collections.abc import Callable

from .outputs import StepOutput
from .parts import Delta, Parts, Splitter


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


class PartedAnswer(Answer):
    """An answer that is taken apart: into what is thought, what is said, and what is called."""

    def __init__(self, index: int, parts: Parts, new_call_id: Callable[[], str]):
        super().__init__(index)
        self.parts = Splitter(parts, new_call_id)
        self.offsets: list[int] = []  # of tokens that may be part of a thought
        self.num_thought = 0  # tokens
        self.undecided: list[tuple[int, int, dict[int, float]]] = []  # tokens of which it is not known yet to which part they belong

    def push_parts(self, output: StepOutput) -> tuple[list[Delta], list[tuple[int, int, dict[int, float]]]]:
        """As `push`, with what the text adds to the parts."""
        text, tokens = self.push(output)
        parts = self.parts
        if parts.thought_end is None:
            self.offsets.append(output.offset)
        deltas = parts.push(text, last=output.finish_reason is not None)
        if self.offsets and (parts.thought_end is not None or output.finish_reason):
            end = float("inf") if parts.thought_end is None else parts.thought_end
            self.num_thought = sum(offset < end for offset in self.offsets) if parts.thought is not None else 0
            self.offsets = []
        if self.finish_reason == "stop" and parts.calls_are_whole:
            self.finish_reason = "tool_calls"
        return deltas, tokens

    def tokens_said(self, tokens: list[tuple[int, int, dict[int, float]]]) -> list[tuple[int, int, dict[int, float]]]:
        """Of these tokens and of earlier ones, those of which it is known now that they belong to what is said."""
        parts = self.parts
        tokens = self.undecided + tokens
        if parts.content_begin is None:
            self.undecided = tokens
            return []
        known = float("inf") if self.finish_reason else parts.num_read - len(parts.held)
        begin = 0 if parts.thought_end is None else parts.thought_end
        end = float("inf") if parts.content_end is None else parts.content_end
        self.undecided = [token for token in tokens if token[0] >= known]
        said = [token for token in tokens if token[0] < known and begin <= token[0] < end]
        # Those that end before it begins are line breaks. All tokens of one character have its offset.
        while any(said[0][0] < offset <= parts.content_begin for offset, *_ in said):
            said.pop(0)
        return said

    @property
    def may_be_silent(self) -> bool:
        """Whether it may have other parts than what is said, so that `said` may be None."""
        return self.parts.parts.form is not None or self.parts.parts.thought is not None

    @property
    def said(self) -> str | None:
        """What is said; None if the answer holds only calls, or was cut off in a thought or before a call's name."""
        parts = self.parts
        is_silent = parts.content_end is not None or parts.parts.is_required or (parts.thought is not None and parts.thought_end is None)
        return None if is_silent and not parts.content else parts.content
