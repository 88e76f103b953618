"""What a server shows of itself: metrics for a scraper, a page, and a trace of its last minutes."""
import asyncio
import hmac
import json
import time
from collections.abc import Iterator
from itertools import accumulate, islice, pairwise
from pathlib import Path

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from .async_engine import paced
from .errors import ERRORS, ApiError
from .metrics import KEEP_S
from .records import PARTS, Ended, Step

PAGE = Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")
# What a scraper may ask for, besides plain text.
FORMATS = {200: {"content": {"application/openmetrics-text": {}}, "description": "All metrics"}}
# The events that are written in one go, which takes less than a millisecond.
EVENTS = 50

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS | FORMATS)
async def metrics(request: Request) -> Response:
    """Return all metrics in the format that the scraper asks for."""
    service = request.app.state.service
    check_metrics_key(request, service.metrics_key)
    encode, content_type = choose_encoder(request.headers.get("accept"))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(service.async_engine.metrics)
    return Response(encode(registry), media_type=content_type)


def check_metrics_key(request: Request, metrics_key: str | None) -> None:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if metrics_key is not None and not (scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), metrics_key.encode())):
        raise ApiError(401, "no valid metrics key; send Authorization: Bearer KEY (--metrics-key)", code="invalid_api_key")


@router.get("/dashboard", response_class=HTMLResponse)
async def dashboard() -> HTMLResponse:
    """Return the page. It holds no data: it asks for `/dashboard/data`, with a key if there is one."""
    return HTMLResponse(PAGE, headers={"Cache-Control": "no-store"})


@router.get("/dashboard/data", responses=ERRORS)
async def dashboard_data(request: Request) -> JSONResponse:
    """Return what the page draws: numbers, percentiles of the last minute, the cache, the last requests."""
    service = request.app.state.service
    await service.async_engine.show_blocks()
    # A minute may have tens of thousands of steps. Sorting their times would stop all streams meanwhile.
    picture = await asyncio.to_thread(service.async_engine.metrics.picture, service.async_engine.num_unread)
    return JSONResponse(picture | {"model": service.models[0], "draining": service.draining})


@router.get("/trace", responses=ERRORS)
async def trace(request: Request, seconds: float = KEEP_S) -> Response:
    """Return the last seconds as a file that Perfetto and chrome://tracing open."""
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
