"""Cheaper ways to send a token's event: what each saves of the event loop's CPU time.

    pip install --target build/levers orjson httptools uvloop
    python -m shared.bench.levers [--write]        # three minutes

    template    a token's event from a template made once per stream, instead of dicts encoded as JSON
    raw         events sent with ASGI's `send`, without sse-starlette: no pings, no check for shutdown
    orjson      orjson instead of json; non-ASCII text is not escaped
    httptools   uvicorn's HTTP parser in C instead of h11
    uvloop      an event loop in C instead of asyncio's
    all         all of these except orjson, which has nothing left to encode with the template

Each is patched into its own server. With STREAMS streams, as in `shared.bench.serving`, all servers take turns. A
figure is the median over the rounds of the change against the unchanged server in the same round, in CPU time per token
of the server without its engine, and in tokens per second. No chapter contains any of this; the measurement shows
what it would be worth.

Reads: the chapters. Writes: docs/results/levers.json.
"""
import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

from shared.bench import serving, serving_child
from shared.bench.load import workload
from shared.bench.timing import progress
from shared.chapters import ROOT, last_with
from shared.programs import run
from shared.results import write_row

STREAMS, ROUNDS = 16, 9
LEVERS = ("none", "template", "raw", "orjson", "httptools", "uvloop", "all")
PACKAGES = ROOT / "build" / "levers"


# ---- in the server's process


def serve(chapter_name: str, lever: str) -> int:
    """Run the chapter's server with a lever applied."""
    pulled = {"template", "raw", "httptools", "uvloop"} if lever == "all" else {lever}
    sys.path.append(str(PACKAGES))
    modules = {name: importlib.import_module(f"milestones.{chapter_name}.{name}") for name in ("writer", "completions", "process")}
    if "orjson" in pulled:
        import orjson

        modules["writer"].event = lambda data: orjson.dumps(data).decode()
    if "template" in pulled:
        use_template(modules["completions"], modules["writer"])
    if "raw" in pulled:
        send_raw(modules["completions"])
    if "httptools" in pulled:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        modules["process"].Connection = HttpToolsProtocol
    uvicorn = modules["process"].uvicorn
    config = uvicorn.Config

    def config_with_choices(*args, **options):
        options |= {"loop": "uvloop" if "uvloop" in pulled else "asyncio"}
        return config(*args, **options)

    uvicorn.Config = config_with_choices
    return serving_child.serve(chapter_name)


def use_template(completions, writer) -> None:
    """Write events from a template; this handles only what the benchmark requests, streams of one answer without logprobs."""

    async def stream(self):
        usage = ', "usage": null' if self.body.include_usage else ""
        head = json.dumps({"id": self.head["id"], "object": "text_completion", "created": self.head["created"], "model": self.head["model"]})
        head = head[:-1] + ', "choices": [{"index": 0, "text": '
        async for index, output in self.generation:
            answer = self.answers[index]
            text, _ = answer.push(output)
            if text or answer.finish_reason:
                yield f'{head}{json.dumps(text)}, "logprobs": null, "finish_reason": {json.dumps(answer.finish_reason)}}}]{usage}}}'
        if self.body.include_usage:
            yield self.chunk([], self.usage())
        yield "[DONE]"

    completions.CompletionWriter.stream = stream


def send_raw(completions) -> None:
    """Send events with ASGI's `send` instead of sse-starlette's response."""
    import asyncio

    from starlette.responses import Response

    class Events(Response):
        def __init__(self, generation, events):
            self.generation, self.events, self.background = generation, events, None

        async def __call__(self, scope, receive, send):
            response_task = asyncio.current_task()

            async def watch():
                while (await receive())["type"] != "http.disconnect":
                    pass
                response_task.cancel()

            watch_task = asyncio.ensure_future(watch())
            try:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for data in self.events:
                    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            finally:
                watch_task.cancel()
                self.generation.abort()

    completions.Events = Events


# ---- in the client's


class Pulled(serving.Server):
    """A chapter's server with a lever applied and its engine in its own process."""

    def __init__(self, chapter, lever: str):
        serving.Child.__init__(self, "serve", chapter, lever, module="shared.bench.levers", stderr=subprocess.PIPE)
        self.way = "process"


def measure(chapter) -> dict:
    bodies = workload(16 + 4 * STREAMS, serving.SEED, "pocket")
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        servers = {}
        # One after the other: seven servers loading a model at once would take minutes.
        for lever in LEVERS:
            servers[lever] = stack.enter_context(Pulled(chapter, lever))
            servers[lever].wait_until_it_serves()
        serving.pin(list(servers.values()), None)
        rounds = []
        for number in progress(range(ROUNDS + 1), "rounds"):
            order = list(servers.items())[:: -1 if number % 2 else 1]
            rounds.append({lever: serving.server_turn(server, bodies, STREAMS) for lever, server in order})
    # The first round is the warm-up.
    rounds = rounds[1:]
    results = {"streams": STREAMS, "rounds": ROUNDS, "front_us": round(statistics.median(each["none"]["front_us"] for each in rounds), 1)}
    for lever in LEVERS[1:]:
        results[lever] = {
            name: serving.spread([each[lever][name] / each["none"][name] - 1 for each in rounds]) for name in ("front_us", "tokens_per_s")
        }
    return results


def main(argv: list[str]) -> int:
    if argv[:1] == ["serve"]:
        return serve(*argv[1:])
    parser = argparse.ArgumentParser(prog="python -m shared.bench.levers", description="Measure cheaper ways to send a token's event.")
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if not PACKAGES.is_dir():
        parser.error(f"packages are missing; run `pip install --target {PACKAGES.relative_to(ROOT)} orjson httptools uvloop`")
    chapter = last_with("engine_process")
    results = measure(chapter)
    print(f"{chapter.id}, {STREAMS} streams: the event loop takes {results['front_us']} us per token")
    for lever in LEVERS[1:]:
        loop, rate = results[lever]["front_us"], results[lever]["tokens_per_s"]
        print(f"  {lever:10} event loop {serving.told(loop, '+.0%'):>24}   tokens/s {serving.told(rate, '+.0%'):>24}")
    if args.write:
        path = write_row("levers", results | {"chapter": chapter.id}, " ".join(["python -m shared.bench.levers", *argv]), [chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
