"""Builds the body of an answer from its tokens."""
import json
from collections.abc import AsyncIterator

from .async_engine import Generation
from .protocol import CompletionRequest, new_id, now


class Writer:
    """Turns one call's outputs into its response: one body, or the events of a stream."""

    def __init__(
        self,
        body: CompletionRequest,
        generation: Generation,
        num_prompt: int,
    ):
        self.body = body
        self.generation = generation
        self.num_prompt = num_prompt
        self.num_tokens = 0
        self.head = {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": body.model}

    def usage(self) -> dict:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt + self.num_tokens,
        }

    async def pieces(self) -> AsyncIterator[dict]:
        """Yield the text as it becomes final; the last piece has the finish reason."""
        async for index, output in self.generation:
            self.num_tokens += 1
            # Part of a character is held back until the rest of it arrives.
            if output.text or output.finish_reason:
                yield {"index": index, "text": output.text, "finish_reason": output.finish_reason}

    async def whole(self) -> dict:
        pieces = [piece async for piece in self.pieces()]
        choice = {
            "index": 0,
            "text": "".join(piece["text"] for piece in pieces),
            "finish_reason": pieces[-1]["finish_reason"],
        }
        return self.head | {"choices": [choice], "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yield the data of each event."""
        async for piece in self.pieces():
            yield self.chunk([piece])
        if self.body.include_usage:
            yield self.chunk([], self.usage())
        yield "[DONE]"

    def chunk(self, pieces: list, usage: dict | None = None) -> str:
        data = self.head | {"choices": pieces}
        return event(data | {"usage": usage} if self.body.include_usage else data)


def event(data: dict) -> str:
    """Return data as ASCII JSON: some clients take a raw U+2028 for the end of a line."""
    return json.dumps(data)
