"""Builds the body of an answer from its tokens."""
import json
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from .answers import Answer
from .async_engine import Generation, paced
from .outputs import StepOutput
from .protocol import GenerationRequest, new_id, now
from .service import Service


class Writer:
    """Turns one call's outputs into its response: one body, or the events of a stream."""

    id_prefix: str
    kind: str
    chunk_kind: str

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
        self.head = {"id": new_id(self.id_prefix), "object": self.kind, "created": now(), "model": body.model}

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def num_cached(self) -> int:
        # A prompt is counted once, by the first of its n answers.
        return sum(answer.num_cached for answer in self.answers[:: self.body.n])

    def usage(self) -> dict:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }

    async def whole(self) -> Response:
        """Return the response as one body. Logprobs may take megabytes; most are serialized as they arrive."""
        async for index, output in self.generation:
            await self.add(self.answers[index], output)
        # The head without its closing brace. All parts are ASCII, so each character is one byte.
        parts = [to_json(self.head)[:-1], ', "choices": [']
        async for answer in paced(self.answers):
            parts += [", "] * (answer.index > 0) + [to_json(self.choice(answer))]
        parts += [f'], "usage": {to_json(self.usage())}}}']
        headers = {"content-length": str(sum(map(len, parts)))}
        return StreamingResponse(paced(parts), headers=headers, media_type="application/json")

    async def add(self, answer: Answer, output: StepOutput) -> None:
        """Add one output to an answer that is sent as one body."""
        raise NotImplementedError

    def choice(self, answer: Answer) -> dict:
        """Return a finished answer as an item of `choices`."""
        raise NotImplementedError

    async def stream(self) -> AsyncIterator[str]:
        """Yield the data of each event."""
        async for piece in self.pieces():
            yield self.chunk([piece])
        if self.body.include_usage:
            yield self.chunk([], self.usage())
        yield "[DONE]"

    def chunk(self, pieces: list, usage: dict | None = None) -> str:
        data = self.head | {"object": self.chunk_kind, "choices": pieces}
        return event(data | {"usage": usage} if self.body.include_usage else data)


class Written(str):
    """Part of a response, already serialized as JSON."""


def to_json(value) -> str:
    """Return value as JSON. Its dicts and lists may hold Written parts, which are inserted as they are."""
    if isinstance(value, Written):
        return value
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: {to_json(member)}' for name, member in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(to_json, value))}]"
    return json.dumps(value)


def event(data: dict) -> str:
    """Return data as ASCII JSON: some clients take a raw U+2028 for the end of a line."""
    return to_json(data)
