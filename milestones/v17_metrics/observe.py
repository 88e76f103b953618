"""What a server shows of itself: metrics for a scraper, a page, and a trace of its last minutes."""
import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import accumulate, islice, pairwise
from math import inf
from pathlib import Path

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from .async_engine import paced
from .errors import ERRORS, ApiError
from .metrics import KEEP_S
from .records import PARTS, Ended, Step
from .service import Service

PAGE = Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")
# What a scraper may ask for, besides plain text.
OPEN_METRICS = "application/openmetrics-text"
FORMATS = {200: {"content": {OPEN_METRICS: {}}, "description": "All metrics"}}
# The events that are written in one go, which takes less than a millisecond.
EVENTS = 50
# How long readers share what was made for one of them.
SHARE_S = 0.5

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS | FORMATS)
async def metrics(request: Request) -> Response:
    """Return all metrics in the format that the scraper asks for."""
    service = request.app.state.service
    check_metrics_key(request, service.metrics_key)
    # The library fails on versions that are not numbers, and repeats others. There is one of each format, so none is asked of it.
    encode, content_type = choose_encoder(OPEN_METRICS if OPEN_METRICS in request.headers.get("accept", "") else None)

    async def scrape() -> Response:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(service.async_engine.metrics)
        return Response(encode(registry), media_type=content_type)

    return await shared(service, content_type, scrape)


async def shared(service: Service, name: str, make: Callable[[], Awaitable[Response]]) -> Response:
    """Return what make() returns, the same for all who ask within SHARE_S or meanwhile: many readers must not take the streams' time."""
    begun, making = service.shared.get(name, (-inf, None))
    if time.monotonic() - begun >= SHARE_S and (making is None or making.done()):
        making = asyncio.ensure_future(make())
        service.shared[name] = time.monotonic(), making
    return await making


def check_metrics_key(request: Request, metrics_key: str | None) -> None:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if metrics_key is not None and not (scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), metrics_key.encode())):
        message = "no valid metrics key; send Authorization: Bearer KEY (--metrics-key)"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def check_data_key(request: Request, service: Service) -> None:
    """The page's data and traces tell more than the metrics. The gate has checked the API key, if there is one."""
    if not service.api_keys:
        check_metrics_key(request, service.metrics_key)


@router.get("/dashboard", response_class=HTMLResponse)
async def dashboard() -> HTMLResponse:
    """Return the page. It holds no data: it asks for `/dashboard/data`, with a key if there is one."""
    return HTMLResponse(PAGE, headers={"Cache-Control": "no-store"})


@router.get("/dashboard/data", responses=ERRORS)
async def dashboard_data(request: Request) -> JSONResponse:
    """Return what the page draws: numbers, percentiles of the last minute, the cache, the last requests."""
    service = request.app.state.service
    check_data_key(request, service)

    async def picture() -> Response:
        async_engine = service.async_engine
        await async_engine.show_blocks()
        # A minute may have tens of thousands of steps. Counting them here would stop all streams meanwhile.
        picture = await asyncio.to_thread(async_engine.metrics.picture, async_engine.metrics.num_unread, async_engine.runner.silent_s)
        return JSONResponse(picture | {"model": service.models[0], "draining": service.draining})

    return await shared(service, "picture", picture)


@router.get("/trace", responses=ERRORS)
async def trace(request: Request, seconds: float = KEEP_S) -> Response:
    """Return the last seconds as a file that Perfetto and chrome://tracing open."""
    check_data_key(request, request.app.state.service)
    if not 0 < seconds <= KEEP_S:
        raise ApiError(400, f"seconds must be more than 0 and at most {KEEP_S:.0f}, got {seconds}", "seconds")
    kept = request.app.state.service.async_engine.metrics
    since = time.monotonic() - seconds
    steps = [step for step in kept.steps if step.began >= since]
    requests = [ended for ended in kept.requests if ended.ended >= since]
    headers = {"Content-Disposition": 'attachment; filename="stepserve-trace.json"'}
    # Five minutes may be twenty megabytes, and other requests do not wait for them.
    return StreamingResponse(paced(document(steps, requests)), media_type="application/json", headers=headers)


def document(steps: list[Step], requests: list[Ended]) -> Iterator[str]:
    """A trace as JSON, in pieces."""
    found, separator = events(steps, requests), ""
    yield '{"displayTimeUnit": "ms", "traceEvents": ['
    while piece := list(islice(found, EVENTS)):
        yield separator + ", ".join(map(json.dumps, piece))
        separator = ", "
    yield "]}"


def events(steps: list[Step], requests: list[Ended]) -> Iterator[dict]:
    """Steps and their parts on one track, and each request on a track of its own, in Chrome's trace format."""
    yield from (name(1, "engine"), name(2, "requests"))
    for step in steps:
        facts = {"tokens": step.num_fed, "prompt": step.num_prompt, "generated": step.num_output, "waiting": step.num_waiting}
        times = [*accumulate(step.seconds, initial=step.began)]
        yield span(1, 1, f"step of {step.num_seqs}", times[0], times[-1], facts)
        for part, (began, until) in zip(PARTS, pairwise(times), strict=True):
            yield span(1, 1, part, began, until, {})
    for ended in requests:
        facts = {"reason": ended.reason, "prompt": ended.num_prompt, "cached": ended.num_cached, "output": ended.num_output}
        marks = [("waits", ended.arrived), ("prompt", ended.began), ("answer", ended.first), ("", ended.ended)]
        marks = [mark for mark in marks if mark[1] is not None]
        for (what, began), (_, until) in pairwise(marks):
            yield span(2, ended.request_id, what, began, until, facts | {"preemptions": ended.num_preemptions})


def span(process: int, track: int, what: str, began: float, until: float, facts: dict) -> dict:
    """A complete event. Both ends are rounded to whole microseconds: Perfetto drops an event that crosses another's end."""
    start = round(1e6 * began)
    return {"ph": "X", "pid": process, "tid": track, "name": what, "ts": start, "dur": round(1e6 * until) - start, "args": facts}


def name(process: int, what: str) -> dict:
    return {"ph": "M", "pid": process, "name": "process_name", "args": {"name": what}}
