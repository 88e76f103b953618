"""Sends an answer, whole or as a stream, and aborts its generation if the client disconnects."""
import asyncio
from collections.abc import AsyncIterator, Coroutine

from fastapi import Request
from sse_starlette.sse import EventSourceResponse
from starlette.responses import Response

from .async_engine import Generation, GenerationFailed
from .errors import ERRORS, ClientGone, failure
from .writer import event

ANSWERS = ERRORS | {200: {"content": {"text/event-stream": {}}, "description": "A body, or a stream of events"}}


class Events(EventSourceResponse):
    """A stream of server-sent events. Aborts its generation when it ends, however it ends."""

    def __init__(self, generation: Generation, events: AsyncIterator):
        super().__init__(with_faults(events), sep="\n")
        self.generation = generation

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.abort()


async def with_faults(events: AsyncIterator) -> AsyncIterator:
    """Yield the events. If the engine fails, the last event reports it, since status 200 has already been sent."""
    try:
        async for item in events:
            yield item
    except GenerationFailed as error:
        failed = failure(error)
        yield event({"error": failed.body["error"] | {"code": failed.status}})


async def while_connected(request: Request, work: Coroutine):
    """Return the result of work, such as a generation whose grammar has to be compiled first. Raises ClientGone."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def unless_gone(request: Request, generation: Generation, work: Coroutine):
    """Return the result of work. If the client disconnects first, cancel the work and abort its generation."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        generation.abort()


async def disconnect(request: Request) -> None:
    """Return once the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
