"""From tokens to the body of an answer."""
import json
from collections.abc import AsyncIterator

from .answers import Answer
from .async_engine import Generation
from .protocol import GenerationRequest, Usage, new_id, now
from .service import Service


class Writer:
    """Turns the outputs of one call into its answer: one body, or the events of a stream."""

    id_prefix: str
    chunk_model: type

    def __init__(
        self,
        service: Service,
        body: GenerationRequest,
        generation: Generation,
        answers: list[Answer],
        num_prompt: int,
    ):
        self.service = service
        self.body = body
        self.generation = generation
        self.answers = answers
        self.num_prompt = num_prompt
        self.head = {"id": new_id(self.id_prefix), "created": now(), "model": body.model}

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_tokens,
            total_tokens=self.num_prompt + self.num_tokens,
        )

    async def collect(self) -> list[list]:
        """Read every answer to its end; the logprobs of each one's tokens."""
        logprobs = [[] for _ in self.answers]
        async for index, output in self.generation:
            logprobs[index] += self.answers[index].push(output)[1]
        return logprobs

    async def stream(self) -> AsyncIterator[str]:
        """The data of each event."""
        async for piece in self.pieces():
            yield self.chunk([piece])
        if self.body.include_usage:
            yield self.chunk([], self.usage())
        yield "[DONE]"

    def chunk(self, pieces: list, usage: Usage | None = None) -> str:
        exclude = None if self.body.include_usage else {"usage"}
        return event(self.chunk_model(**self.head, choices=pieces, usage=usage).model_dump(exclude=exclude))


def event(data: dict) -> str:
    """JSON in ASCII: some clients take U+2028 for the end of a line."""
    return json.dumps(data)
