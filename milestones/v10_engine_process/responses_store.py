"""Responses, active and finished, and the store that keeps the most recent ones."""
import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from .answers import Answer
from .async_engine import Generation, GenerationFailed, paced
from .errors import ApiError
from .protocol import new_id, now
from .responses_protocol import ResponseRequest
from .service import Service
from .writer import Written, event, to_json

logger = logging.getLogger(__name__)

# The number of responses to store. When there are more, the oldest finished ones are deleted.
STORE_SIZE = 1000


class Run:
    """One response, from its request until it is deleted from the store."""

    def __init__(
        self,
        service: Service,
        api_key: str | None,
        body: ResponseRequest,
        messages: list[dict],
        num_prompt: int,
    ):
        self.service = service
        self.api_key = api_key  # only requests with this key may see the response
        self.body = body.model_copy(update={"input": ""})  # the conversation is in messages
        self.messages = messages  # the conversation without instructions
        self.num_prompt = num_prompt
        self.id = new_id("resp_")
        self.item_id = new_id("msg_")
        self.created_at = now()
        self.completed_at = None
        self.answer = Answer(0)
        self.logprobs: list[Written] = []  # those of each token of the text, if requested
        self.status = "queued" if body.background else "in_progress"
        self.error = None
        self.failure: Exception | None = None
        self.fetched = asyncio.Event()  # set once a client has retrieved the finished response
        self.generation: Generation | None = None
        self.task: asyncio.Task | None = None
        self.num_events = 0

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "in_progress")

    def part(self) -> dict:
        return {
            "type": "output_text",
            "text": self.answer.text,
            "annotations": [],
            "logprobs": self.logprobs,
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
        """Return the response in its current state, as OpenAI's API shows it."""
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
            "output": [self.item()] if self.answer.num_tokens else [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary or body.reasoning.generate_summary},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "prompt_cache_options": body.prompt_cache_options and body.prompt_cache_options.model_dump(),
            "prompt_cache_retention": body.prompt_cache_retention,
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
        """Run the response to its end, and yield each of its events."""
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
                names, count = self.service.names, self.body.top_logprobs or 0
                logprobs = [Written(json.dumps(names.of_chat(token, count))) async for token in paced(tokens)]
                self.logprobs += logprobs
                if text or logprobs:
                    yield self.event("output_text.delta", **place, delta=text, logprobs=logprobs)
            self.status = "completed" if self.answer.finish_reason == "stop" else "incomplete"
            self.completed_at = now() if self.status == "completed" else None
            part = self.part()
            yield self.event("output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            yield self.event("content_part.done", **place, part=part)
            yield self.event("output_item.done", output_index=0, item=self.item())
            yield self.event(self.status, response=self.describe())
        except GenerationFailed as error:
            self.fail(error, str(error))
            yield self.event("error", **self.error, param=None) | {"type": "error"}
            yield self.event("failed", response=self.describe())
        except Exception as error:
            self.fail(error, "the server has a bug; see its log")
            raise
        finally:
            if not self.ended:
                self.status = "cancelled"

    def fail(self, error: Exception, message: str) -> None:
        self.failure = error
        self.status = "failed"
        self.error = {"code": "server_error", "message": message}

    def event(self, name: str, **more) -> dict:
        self.num_events += 1
        return {"type": f"response.{name}", "sequence_number": self.num_events - 1, **more}

    async def stream(self) -> AsyncIterator[dict]:
        async for fields in self.events():
            yield {"event": fields["type"], "data": event(fields)}

    async def whole(self) -> Response:
        async for _ in self.events():
            pass
        if self.failure:
            raise self.failure
        return self.answer_now()

    def answer_now(self) -> Response:
        """Return an HTTP response with this response's current state."""
        return Response(to_json(self.describe()), media_type="application/json")

    async def in_background(self) -> None:
        """Run to the end while no client waits. If the server is draining by then, wait until a client has the result."""
        try:
            async for _ in self.events():
                pass
            if self.service.draining:
                await self.fetched.wait()
        except Exception:
            logger.exception("a background response failed")
        finally:
            self.service.num_active -= 1

    def abort(self) -> None:
        """Abort the generation. A response that has not finished is then cancelled."""
        if not self.ended:
            self.status = "cancelled"
        self.generation.abort()

    def cancel(self) -> None:
        """Cancel a background response that has not finished."""
        if not self.ended:
            self.abort()
            self.task.cancel()


class Store:
    """The most recent responses, by id."""

    def __init__(self, size: int = STORE_SIZE):
        self.size = size
        self.runs: OrderedDict[str, Run] = OrderedDict()

    def add(self, run: Run) -> None:
        self.runs[run.id] = run
        # Only finished ones are deleted: an active one could no longer be cancelled.
        ended_ids = [old.id for old in self.runs.values() if old.ended] if len(self.runs) > self.size else []
        for response_id in ended_ids[: len(self.runs) - self.size]:
            del self.runs[response_id]

    def find(self, response_id: str, api_key: str | None) -> Run | None:
        """Return a response that was stored under this key; None if there is none, or it has been deleted."""
        run = self.runs.get(response_id)
        return run if run and run.api_key == api_key else None

    def get(self, response_id: str, api_key: str | None) -> Run:
        """Return what `find` returns, or raise a 404 for None."""
        run = self.find(response_id, api_key)
        if run is None:
            raise ApiError(404, f"there is no response {response_id[:200]!r}; it was not stored or has been deleted", "response_id")
        return run
