"""Cheaper ways from a token to the bytes of its event, one at a time: what each takes off the front's CPU time.

    pip install --target build/levers orjson httptools uvloop
    python -m shared.bench.levers [--write]        # three minutes

    template    a token's event from a template that is made once per stream, instead of dicts and their JSON
    raw         events by ASGI's `send`, without sse-starlette: no pings, no watch on the shutdown
    orjson      orjson instead of json; text beyond ASCII goes out as it is
    httptools   uvicorn's other parser, in C
    uvloop      another event loop, in C
    all         all of these but orjson, which the template leaves nothing to do

Each is put over the chapter's server in a process of its own. With STREAMS streams, as in `shared.bench.serving`, all of
them take turns; a figure is the median over the rounds of the front's CPU time per token divided by that of the
unchanged server in the same round. None of this is in a chapter: the measurement says what it would be worth.

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
    """The chapter's server with a lever pulled."""
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
    uvicorn = modules["process"].uvicorn
    config = uvicorn.Config

    def chosen(*args, **options):
        options |= {"http": "httptools" if "httptools" in pulled else "h11", "loop": "uvloop" if "uvloop" in pulled else "asyncio"}
        return config(*args, **options)

    uvicorn.Config = chosen
    return serving_child.serve(chapter_name)


def use_template(completions, writer) -> None:
    """Streams of one answer without logprobs, as the benchmark asks for them."""

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
    """In place of sse-starlette's response."""
    import asyncio

    from starlette.responses import Response

    class Events(Response):
        def __init__(self, generation, events):
            self.generation, self.events, self.background = generation, events, None

        async def __call__(self, scope, receive, send):
            working = asyncio.current_task()

            async def watch():
                while (await receive())["type"] != "http.disconnect":
                    pass
                working.cancel()

            watching = asyncio.ensure_future(watch())
            try:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for data in self.events:
                    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            finally:
                watching.cancel()
                self.generation.abort()

    completions.Events = Events


# ---- in the client's


class Pulled(serving.Server):
    """A chapter's server with a lever pulled, whose engine has a process of its own."""

    def __init__(self, chapter, lever: str):
        serving.Child.__init__(self, "serve", chapter, lever, module="shared.bench.levers", stderr=subprocess.PIPE)
        self.way = "process"


def measure(chapter) -> dict:
    bodies = workload(16 + 4 * STREAMS, serving.SEED, "pocket")
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        servers = {}
        # One after the other: seven that load a model at once would take minutes.
        for lever in LEVERS:
            servers[lever] = stack.enter_context(Pulled(chapter, lever))
            servers[lever].wait_until_it_serves()
        serving.pin(list(servers.values()), None)
        rounds = []
        for number in progress(range(ROUNDS + 1), "rounds"):
            order = list(servers.items())[:: -1 if number % 2 else 1]
            rounds.append({lever: serving.server_turn(server, bodies, STREAMS) for lever, server in order})
    # The first does not count.
    rounds = rounds[1:]
    found = {"streams": STREAMS, "rounds": ROUNDS, "front_us": round(statistics.median(each["none"]["front_us"] for each in rounds), 1)}
    for lever in LEVERS[1:]:
        found[lever] = {
            name: serving.spread([each[lever][name] / each["none"][name] - 1 for each in rounds]) for name in ("front_us", "tokens_per_s")
        }
    return found


def main(argv: list[str]) -> int:
    if argv[:1] == ["serve"]:
        return serve(*argv[1:])
    parser = argparse.ArgumentParser(prog="python -m shared.bench.levers", description="Cheaper ways from a token to its event.")
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if not PACKAGES.is_dir():
        parser.error(f"first: pip install --target {PACKAGES.relative_to(ROOT)} orjson httptools uvloop")
    chapter = last_with("engine_process")
    found = measure(chapter)
    print(f"{chapter.id}, {STREAMS} streams: the front takes {found['front_us']} us per token")
    for lever in LEVERS[1:]:
        front, rate = found[lever]["front_us"], found[lever]["tokens_per_s"]
        print(f"  {lever:10} front {serving.told(front, '+.0%'):>24}   tokens/s {serving.told(rate, '+.0%'):>24}")
    if args.write:
        path = write_row("levers", found | {"chapter": chapter.id}, " ".join(["python -m shared.bench.levers", *argv]), [chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
