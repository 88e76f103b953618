"""OpenAI's responses: one more face of the same service, which remembers what it said.

Completions and chat know nothing of this file.
"""
import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from .async_engine import Generation, StepFailed
from .protocol import Answer, ApiError, Strict, Text, new_id, now, plain_turn
from .sampling import SamplingParams
from .server import ANSWERS, ERRORS, Events, Service, event, refusals, tokenize_chat, unless_gone

# So many responses are remembered; then the oldest are forgotten.
STORE_SIZE = 1000

Key, Note = Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]
PLAIN, MEDIUM = {"format": {"type": "text"}}, {"verbosity": "medium"}


class ContentPart(Strict):
    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Strict):
    """A turn: as a client writes it, or as a response had it in its output."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)]
    type: Literal["message"] = "message"

    def plain(self) -> dict[str, str]:
        """As templates know it."""
        return plain_turn(self.role, self.content)


class ResponseRequest(Strict):
    """POST /v1/responses"""

    refused: ClassVar = {
        "access_programs": [],
        "context_management": [[]],
        "conversation": [],
        "image": [],
        "max_tool_calls": [],
        "moderation": [],
        "parallel_tool_calls": [True, False],
        "prompt": [],
        "prompt_cache_options": [{}],
        "prompt_cache_retention": ["in_memory"],
        "reasoning": [{}, {"effort": "none"}],
        "service_tier": ["auto", "default"],
        "stream_options": [{}, {"include_obfuscation": False}],
        "text": [{}, PLAIN, MEDIUM, PLAIN | MEDIUM],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "truncation": ["disabled"],
    }

    model: str
    input: Text | Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    instructions: str | None = Field(None, description="a system message before the conversation; not remembered")
    previous_response_id: str | None = Field(None, description="go on from this response")
    store: bool = Field(True, description="remember the response, for GET and previous_response_id")
    background: bool = Field(False, description="answer at once; ask for the result with GET. Needs store, and no stream")
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1, description="default: what the context has room for")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True)] = []
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs message.output_text.logprobs in include")
    metadata: Annotated[dict[Key, Note], Field(max_length=16)] = {}
    user: Note | None = Field(None, description="accepted; nothing here depends on it")
    safety_identifier: Note | None = Field(None, description="accepted; nothing here depends on it")
    prompt_cache_key: Note | None = Field(None, description="accepted; nothing here depends on it")

    @model_validator(mode="after")
    def check_pairs(self):
        if self.background and (self.stream or not self.store):
            raise ApiError(400, "background needs store to be true and stream to be false", "background")
        if self.top_logprobs and not self.include:
            raise ApiError(400, "top_logprobs needs message.output_text.logprobs in include", "top_logprobs")
        return self


class Run:
    """A response under way, and all that is told of it later."""

    def __init__(self, service: Service, body: ResponseRequest, messages: list[dict], num_prompt: int):
        self.service = service
        self.body = body
        self.messages = messages  # the conversation without instructions
        self.num_prompt = num_prompt
        self.id = new_id("resp_")
        self.item_id = new_id("msg_")
        self.created_at = now()
        self.completed_at = None
        self.answer = Answer(0)
        self.tokens = []  # logprobs of the text, if they are wanted
        self.status = "queued" if body.background else "in_progress"
        self.error = None
        self.generation: Generation | None = None
        self.task: asyncio.Task | None = None
        self.num_events = 0

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "in_progress")

    def logprobs(self, tokens: list) -> list[dict]:
        count = self.body.top_logprobs or 0
        return [entry.model_dump() for entry in self.service.names.of_chat(tokens, count)]

    def part(self) -> dict:
        return {
            "type": "output_text",
            "text": self.answer.text,
            "annotations": [],
            "logprobs": self.logprobs(self.tokens),
        }

    def item(self) -> dict:
        status = self.status if self.status in ("in_progress", "completed") else "incomplete"
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self.part()],
        }

    def usage(self) -> dict:
        return {
            "input_tokens": self.num_prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self.answer.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_prompt + self.answer.num_tokens,
        }

    def describe(self) -> dict[str, Any]:
        """The response as it is now."""
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "status": self.status,
            "background": body.background,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": body.model,
            "output": [self.item()] if self.answer.num_tokens or self.status in ("completed", "incomplete") else [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "service_tier": "default",
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self.usage() if self.ended else None,
            "user": body.user,
        }

    async def events(self) -> AsyncIterator[dict]:
        """Run to the end, and say each thing that happens."""
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        try:
            yield self.event("created", response=self.describe())
            self.status = "in_progress"
            yield self.event("in_progress", response=self.describe())
            yield self.event("output_item.added", output_index=0, item=self.item() | {"content": []})
            yield self.event("content_part.added", **place, part=empty)
            async for _, output in self.generation:
                text, tokens = self.answer.push(output)
                self.tokens += tokens
                if text:
                    yield self.event("output_text.delta", **place, delta=text, logprobs=self.logprobs(tokens))
            self.status = "completed" if self.answer.finish_reason == "stop" else "incomplete"
            self.completed_at = now() if self.status == "completed" else None
            part = self.part()
            yield self.event("output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            yield self.event("content_part.done", **place, part=part)
            yield self.event("output_item.done", output_index=0, item=self.item())
            yield self.event(self.status, response=self.describe())
        except StepFailed as error:
            self.status = "failed"
            self.error = {"code": "server_error", "message": str(error)}
            yield self.event("error", **self.error, param=None) | {"type": "error"}
            yield self.event("failed", response=self.describe())
        finally:
            if not self.ended:
                self.status = "cancelled"

    def event(self, name: str, **more) -> dict:
        self.num_events += 1
        return {"type": f"response.{name}", "sequence_number": self.num_events - 1, **more}

    async def stream(self) -> AsyncIterator[dict]:
        async for each in self.events():
            yield {"event": each["type"], "data": event(each)}

    async def whole(self) -> dict:
        async for _ in self.events():
            pass
        if self.status == "failed":
            raise StepFailed(self.error["message"])
        return self.describe()

    async def in_background(self) -> None:
        """As `whole`, with nobody waiting; the server counts it as a request that it answers."""
        self.service.num_active += 1
        try:
            async for _ in self.events():
                pass
        finally:
            self.service.num_active -= 1

    def cancel(self) -> None:
        """End it now, if it has not ended."""
        if not self.ended:
            self.status = "cancelled"
            self.task.cancel()
            self.generation.abort()


class Store:
    """The last responses, by id."""

    def __init__(self, size: int):
        self.size = size
        self.runs: OrderedDict[str, Run] = OrderedDict()

    def add(self, run: Run) -> None:
        self.runs[run.id] = run
        if len(self.runs) > self.size:
            self.runs.popitem(last=False)

    def get(self, response_id: str) -> Run:
        if response_id not in self.runs:
            raise ApiError(404, f"there is no response {response_id!r}; it was not stored, or is forgotten", "response_id")
        return self.runs[response_id]


router = APIRouter()


def store_of(request: Request) -> Store:
    state = request.app.state
    if not hasattr(state, "responses"):
        state.responses = Store(STORE_SIZE)
    return state.responses


@router.post("/v1/responses", responses=ANSWERS)
async def create_response(request: Request, body: ResponseRequest):
    service, store = request.app.state.service, store_of(request)
    service.check_model(body.model)
    messages = earlier_turns(store, body.previous_response_id)
    turns = body.input if isinstance(body.input, list) else [InputMessage(role="user", content=body.input)]
    messages += [turn.plain() for turn in turns]
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    with refusals("input"):
        ids = await tokenize_chat(service, instructions + messages, "input")
        params = SamplingParams(
            max_tokens=service.max_tokens(body.max_output_tokens, None, len(ids)),
            temperature=body.temperature,
            top_p=max(body.top_p, 1e-12),
            logprobs=(body.top_logprobs or 0) if body.include else None,
        )
        run = Run(service, body, messages, len(ids))
        run.generation = await service.engine.generate([(ids, params)])
    if body.store:
        store.add(run)
    if body.background:
        run.task = asyncio.create_task(run.in_background())
        return run.describe()
    if body.stream:
        return Events(run.generation, run.stream())
    return await unless_gone(request, run.generation, run.whole())


def earlier_turns(store: Store, response_id: str | None) -> list[dict]:
    """The conversation that a response belongs to, its own words included."""
    if response_id is None:
        return []
    run = store.runs.get(response_id)
    if run is None or run.status not in ("completed", "incomplete"):
        why = "is not known here" if run is None else f"is {run.status}"
        raise ApiError(
            400,
            f"previous_response_id {response_id!r} {why}; send the whole conversation as input",
            "previous_response_id",
            "previous_response_not_found",
        )
    return [*run.messages, {"role": "assistant", "content": run.answer.text}]


@router.get("/v1/responses/{response_id}", responses=ERRORS)
async def retrieve_response(request: Request, response_id: str, stream: bool = False) -> dict:
    if stream:
        raise ApiError(400, "a stored response is not streamed again; leave stream out", "stream")
    return store_of(request).get(response_id).describe()


@router.post("/v1/responses/{response_id}/cancel", responses=ERRORS)
async def cancel_response(request: Request, response_id: str) -> dict:
    run = store_of(request).get(response_id)
    if not run.body.background:
        raise ApiError(400, "only a response that was made with background can be cancelled", "response_id")
    run.cancel()
    return run.describe()
