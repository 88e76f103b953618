"""Run the last chapter's server with everything on, and compare its log, its metrics and its page with what its clients saw.

    python -m shared.verify.operate --minutes 60 [--write]      # also: make operate ARGS="--minutes 60"

The server is started again and again. While it runs, clients send requests of every kind: priorities, shared prefixes,
prompts of many pieces, several answers, grammars, tools, responses that others continue or cancel, mistakes; some clients
leave, some read slowly, and now and then a hundred come at once. Each run of the server ends in one of these ways, in turn:

    idle     clients stop asking. Server, log, metrics and page are read, and then it is told to end
    settled  the same, and no client left before: every count must be equal
    killed   its engine is killed under load (SIGKILL): each client gets its answer or an error
    told     it is told to end under load (SIGTERM): what runs is finished, what comes is refused

What does not agree is printed, and the exit status is 1.

Reads: the last chapter with tools, /proc (Linux). Writes: docs/results/operate.json with --write.
"""
import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from shared.bench.served import Served, processes_of
from shared.chapters import ROOT, Chapter, last_with
from shared.programs import run
from shared.results import write_row

ENDS = ("idle", "settled", "killed", "told")
MODEL = "pocket-tools"
# Small enough that requests are preempted, swapped, and refused when a hundred come at once.
FLAGS = [
    *("--model", str(ROOT / "shared" / "models" / MODEL), "--log-format", "json", "--allow-priority", "--dev-mode"),
    *("--num-blocks", "200", "--max-num-seqs", "16", "--max-waiting", "48", "--swap-bytes", "1000000", "--reserve-tokens", "0"),
    *("--max-num-batched-tokens", "128", "--slo-ttft-ms", "1000", "--slo-itl-ms", "200", "--drain-seconds", "10"),
]
STEADY, CROWD = 10, 100  # clients
CROWD_EVERY_S = 40.0
PATIENCE_S = 60.0
BEGINNINGS = [" ".join(f"{word} {i}" for i in range(40)) for word in ("hare", "fox", "owl")]
QUESTIONS = ("What is 17 plus 25?", "How is the weather in Oslo and in Lima?", "What time is it?", "What is 3 times 14, and 2 plus 2?")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
NESTS = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}, "required": ["kids"]}
GRAMMARS = (
    {"structured_outputs": {"regex": "[a-f ]{3,12}[.!]|(no )+"}},
    {"structured_outputs": {"choice": ["yes", "no", "yes, but éñ"]}},
    {"structured_outputs": {"grammar": 'start: "a" start "b" | "c"'}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "tree", "schema": NESTS}}},
)
# Functions that the model was trained to call: names, and the types of their arguments.
FUNCTIONS = {"add": {"a": "integer", "b": "integer"}, "multiply": {"a": "integer", "b": "integer"}, "weather": {"city": "string"}, "time": {}}
TOOLS = [
    {"type": "function", "function": {
        "name": name,
        "parameters": {"type": "object", "properties": {each: {"type": kind} for each, kind in kinds.items()}, "required": [*kinds]},
        "strict": True,
    }}
    for name, kinds in FUNCTIONS.items()
]
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
MISTAKES = (
    (COMPLETIONS, {"prompt": "x", "temperature": 3}, 400),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 100_000}, 400),
    (COMPLETIONS, {"prompt": "x", "model": "another"}, 404),
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "(["}}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, 400),
    (RESPONSES, {"input": "x", "previous_response_id": "resp_unknown"}, 400),
)
READS = ("/health", "/metrics", "/dashboard/data", "/trace?seconds=5", "/v1/models", "/version")
# A chat's finish reasons, and a response's, by what the engine calls them.
REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length", "completed": "stop", "max_output_tokens": "length", "cancelled": "abort"}


@dataclass
class Sent:
    """One request, and what its client saw of the answer."""

    request_id: str
    path: str  # the route's
    choices: int = 0  # how many answers it asks for
    status: int | None = None
    left: bool = False  # the client went before the end
    broken: str | None = None  # how the connection failed, or the error that was sent in a stream
    reasons: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_calls: int = 0


@dataclass
class Life:
    """One run of the server."""

    end: str
    number: int
    sent: list[Sent] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    metrics: dict[tuple[str, ...], float] = field(default_factory=dict)  # at the end, if it became idle: by name and labels
    page: dict = field(default_factory=dict)  # what the page showed then
    log: str = ""
    mib: list[float] = field(default_factory=list)  # memory of its processes: between two crowds, and at the end
    is_over: bool = False  # clients ask no more


class Clients:
    """All clients of one life."""

    def __init__(self, life: Life, url: str, rng: random.Random):
        self.life, self.url, self.rng = life, url, rng
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits)
        self.stored: list[str] = []  # ids of responses that can be continued
        self.probes: set[str] = set()  # what the same request was answered

    def sends(self, path: str, choices: int = 0) -> Sent:
        sent = Sent(f"{self.life.number}-{len(self.life.sent)}", path, choices)
        self.life.sent.append(sent)
        return sent

    async def steady(self) -> None:
        """One client that asks, waits for the answer, and asks again."""
        while not self.life.is_over:
            await self.one()
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    async def one(self) -> None:
        draw = self.rng.random()
        if draw < 0.06:
            await self.read(self.rng.choice(READS))
        elif draw < 0.12:
            path, body, status = self.rng.choice(MISTAKES)
            sent = self.sends(path)
            await self.post(sent, path, body)
            # An engine that is killed before it has looked at a request can say nothing of it.
            if sent.status not in (status, 429, 503, None) and (self.life.end, sent.status) != ("killed", 500):
                self.life.faults.append(f"a mistake at {path} got {sent.status}, not {status}: {body}")
        elif draw < 0.16:
            await self.background()
        elif draw < 0.20:
            await self.probe()
        else:
            await self.ask()

    def request(self) -> tuple[str, dict]:
        """A path, and a body that asks for something."""
        rng = self.rng
        common = {"temperature": rng.choice((0, 0.8, 1.2)), "priority": rng.choice((0, 0, 0, -1, 3)), "stream": rng.random() < 0.6}
        if rng.random() < 0.2:
            common["cache_salt"] = rng.choice("ab")
        kind = rng.choice(("completion", "completion", "chat", "tools", "tools", "grammar", "response"))
        words = rng.choice(BEGINNINGS)[: rng.randint(1, 400)] + f" {rng.randint(0, 99)}"
        if kind == "completion":
            common |= {"prompt": words, "max_tokens": rng.randint(1, 120), "n": rng.choice((1, 1, 1, 2, 3)), "seed": rng.randint(0, 99)}
            common |= {"ignore_eos": rng.random() < 0.5, "logprobs": rng.choice((None, None, 2)), "stop": rng.choice((None, None, ["e", "th"]))}
            return COMPLETIONS, common | {"stream_options": {"include_usage": True}} if common["stream"] else common
        if kind == "response":
            common |= {"input": words, "max_output_tokens": rng.randint(1, 60), "store": rng.random() < 0.5}
            if self.stored and rng.random() < 0.4:
                common["previous_response_id"] = rng.choice(self.stored)
            if rng.random() < 0.4:
                functions = [{"type": "function"} | tool["function"] for tool in TOOLS]
                common |= {"tools": functions, "input": rng.choice(QUESTIONS), "tool_choice": rng.choice(("auto", "required"))}
            return RESPONSES, common
        common |= {"max_tokens": rng.randint(1, 120), "messages": [{"role": "user", "content": words}]}
        if common["stream"]:
            common["stream_options"] = {"include_usage": True}
        if kind == "grammar":
            common |= rng.choice(GRAMMARS)
        if kind == "tools":
            named = {"type": "function", "function": {"name": rng.choice(TOOLS)["function"]["name"]}}
            common |= {"tools": TOOLS, "tool_choice": rng.choice(("auto", "required", "none", named)), "parallel_tool_calls": rng.random() < 0.7}
            common["messages"] = [{"role": "user", "content": rng.choice(QUESTIONS)}]
        return CHAT, common

    async def ask(self) -> None:
        path, body = self.request()
        leaves = self.life.end != "settled" and self.rng.random() < 0.15
        is_slow = body["stream"] and self.rng.random() < 0.1
        sent = self.sends(path, body.get("n", 1))
        asking = self.stream(sent, path, body, is_slow) if body["stream"] else self.post(sent, path, body)
        if not leaves:
            return await asking
        try:
            await asyncio.wait_for(asking, self.rng.uniform(0.001, 1.0))
        except TimeoutError:
            sent.left = True

    async def post(self, sent: Sent, path: str, body: dict) -> dict | None:
        """Send a body, and read its answer whole; None if the connection fails."""
        with self.noting(sent):
            answer = await self.http.post(path, json={"model": MODEL} | body, headers={"x-request-id": sent.request_id})
            sent.status = answer.status_code
            if answer.status_code == 200:
                self.note(sent, answer.json())
            elif "error" not in answer.json():
                self.life.faults.append(f"{path}: {answer.status_code} without an error: {answer.text[:200]}")
            return answer.json()

    async def stream(self, sent: Sent, path: str, body: dict, is_slow: bool) -> None:
        """Send a body, and read its events; slowly, if is_slow."""
        is_last = False
        with self.noting(sent):
            async with self.http.stream("POST", path, json={"model": MODEL} | body, headers={"x-request-id": sent.request_id}) as answer:
                sent.status = answer.status_code
                if answer.status_code != 200:
                    await answer.aread()
                    return
                calls = set()
                async for line in answer.aiter_lines():
                    if is_slow:
                        await asyncio.sleep(0.02)
                    if line == "data: [DONE]":
                        is_last = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        is_last |= event.get("type") in ("response.completed", "response.incomplete", "response.failed")
                        self.note_event(sent, event, calls)
                sent.num_calls += len(calls)
                if not is_last and sent.broken is None:
                    sent.broken = "the stream has no end"

    def note_event(self, sent: Sent, event: dict, calls: set) -> None:
        if event.get("error") or event.get("type") == "response.failed":
            sent.broken = str(event.get("error") or event["response"]["error"])[:200]
        if "response" in event and event["type"] in ("response.completed", "response.incomplete"):
            self.note(sent, event["response"])
        for choice in event.get("choices", ()):
            calls |= {(choice["index"], call["index"]) for call in (choice.get("delta") or {}).get("tool_calls") or ()}
            if choice["finish_reason"]:
                sent.reasons.append(choice["finish_reason"])
        if event.get("usage"):
            sent.num_tokens = event["usage"]["completion_tokens"]

    def note(self, sent: Sent, answer: dict) -> None:
        """Note what a whole answer says of itself."""
        if answer.get("object") == "response":
            if answer["status"] in ("queued", "in_progress"):
                return
            sent.reasons = [(answer["incomplete_details"] or {}).get("reason") or answer["status"]]
            sent.num_calls = sum(item["type"] == "function_call" for item in answer["output"])
            sent.num_tokens = answer["usage"]["output_tokens"] if answer["usage"] else 0
            if answer["store"] and answer["status"] in ("completed", "incomplete"):
                self.stored = [*self.stored[-20:], answer["id"]]
        elif "choices" in answer:
            sent.reasons = [choice["finish_reason"] for choice in answer["choices"]]
            sent.num_calls = sum(len(choice.get("message", {}).get("tool_calls") or ()) for choice in answer["choices"])
            sent.num_tokens = answer["usage"]["completion_tokens"]

    @contextlib.contextmanager
    def noting(self, sent: Sent):
        """Note a connection that fails. While nobody ends the server, it must not."""
        try:
            yield
        except httpx.HTTPError as error:
            sent.broken = repr(error)

    async def read(self, path: str, route: str | None = None) -> httpx.Response | None:
        sent = self.sends(route or path.partition("?")[0])
        with self.noting(sent):
            answer = await self.http.get(path, headers={"x-request-id": sent.request_id})
            sent.status = answer.status_code
            return answer

    async def background(self) -> None:
        """Ask for a response in the background, and get it until it has ended, or cancel it."""
        body = {"input": self.rng.choice(BEGINNINGS)[:60], "max_output_tokens": self.rng.randint(5, 120), "background": True}
        sent = self.sends(RESPONSES, 1)
        answer = await self.post(sent, RESPONSES, body)
        if sent.status != 200:
            return
        path = f"{RESPONSES}/{answer['id']}"
        if self.rng.random() < 0.3:
            await asyncio.sleep(self.rng.uniform(0, 0.2))
            cancels = self.sends(RESPONSES + "/{response_id}/cancel")
            with self.noting(cancels):
                cancels.status = (await self.http.post(path + "/cancel", headers={"x-request-id": cancels.request_id})).status_code
        while answer["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
            fetched = await self.read(path, RESPONSES + "/{response_id}")
            if fetched is None or fetched.status_code != 200:
                sent.broken = "its answer cannot be fetched"
                return
            answer = fetched.json()
        if answer["status"] == "failed":
            sent.broken = str(answer["error"])
        else:
            self.note(sent, answer)

    async def probe(self) -> None:
        """A request that must be answered the same each time."""
        sent = self.sends(CHAT, 1)
        body = {"messages": [{"role": "user", "content": QUESTIONS[1]}], "tools": TOOLS, "temperature": 0, "max_tokens": 100}
        answer = await self.post(sent, CHAT, body)
        if sent.status == 200:
            message = answer["choices"][0]["message"]
            calls = [call["function"] for call in message.get("tool_calls") or ()]
            self.probes.add(json.dumps([message["content"], calls]))


# ---- one life


def live(life: Life, chapter: Chapter, seconds: float, rng: random.Random) -> None:
    """Start the server, put it under load, end it as the life ends, and note in the life what does not agree."""
    # Every second round is exact, where the same request is answered the same whatever else runs.
    is_exact = life.number // len(ENDS) % 2 == 1
    with Served(chapter, *FLAGS, *(["--exact"] if is_exact else [])) as served:
        asyncio.run(load(life, served, seconds, rng, is_exact))
        life.log = served.said()
    if life.metrics:
        compare_counts(life)
    compare_log(life)


async def load(life: Life, served: Served, seconds: float, rng: random.Random, is_exact: bool) -> None:
    clients = Clients(life, served.url, rng)
    tasks = [asyncio.create_task(clients.steady()) for _ in range(STEADY)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tasks += [asyncio.create_task(clients.one()) for _ in range(CROWD)]
        await asyncio.sleep(min(CROWD_EVERY_S, max(0.0, end - time.monotonic())) * rng.uniform(0.5, 1))
        life.mib.append(memory_of(served))
    life.is_over = True
    began = time.monotonic()
    if life.end == "killed":
        os.kill(served.pids["engine"], signal.SIGKILL)
    elif life.end == "told":
        served.process.send_signal(signal.SIGTERM)
    _, pending = await asyncio.wait(tasks, timeout=PATIENCE_S)
    if pending:
        life.faults.append(f"{len(pending)} clients wait in vain")
    life.faults += [f"a client failed: {task.exception()!r}" for task in tasks if task.done() and task.exception()]
    answered_s = time.monotonic() - began
    if is_exact and len(clients.probes) > 1:
        life.faults.append(f"the same request was answered in {len(clients.probes)} ways: {clients.probes}")
    if life.end in ("idle", "settled"):
        await read_idle(life, served, clients)
        served.process.send_signal(signal.SIGTERM)
    await clients.http.aclose()
    await asyncio.to_thread(ended, life, served, answered_s)


def ended(life: Life, served: Served, answered_s: float) -> None:
    """Wait for the server's end, and check how it ends."""
    expected = 1 if life.end == "killed" else 0
    try:
        status = served.wait(20.0)
        if status != expected:
            life.faults.append(f"the server exited with {status}, not {expected}")
    except subprocess.TimeoutExpired:
        life.faults.append("the server has not ended")
    end = time.monotonic() + 5
    while processes_of(served) and time.monotonic() < end:
        time.sleep(0.05)
    if left := processes_of(served):
        life.faults.append(f"processes {left} are left")
    if answered_s > (5 if life.end == "killed" else PATIENCE_S):
        life.faults.append(f"the last client had its answer after {answered_s:.1f} s")


async def read_idle(life: Life, served: Served, clients: Clients) -> None:
    """Wait until the server is idle, and read its page and its metrics."""
    for _ in range(200):
        health = (await clients.read("/health")).json()
        if not health["running"] and not health["waiting"] and health["free_blocks"] == health["total_blocks"]:
            break
        await asyncio.sleep(0.1)
    else:
        life.faults.append(f"the server does not become idle: {health}")
    life.mib.append(memory_of(served))
    await asyncio.sleep(1.0)  # readers share what was made within half a second; the engine reports each second
    life.page = (await clients.read("/dashboard/data")).json()
    text = (await clients.http.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            life.metrics[sample.name.removeprefix("stepserve_"), *sample.labels.values()] = sample.value


def compare_counts(life: Life) -> None:
    """Metrics and page must say what clients saw, and what only those may have caused who left."""
    metrics, page = life.metrics, life.page

    def check(what: str, got: float, expected: float, more: float = 0) -> None:
        if not expected <= got <= expected + more:
            life.faults.append(f"{what}: {got:g}, but clients saw {expected:g}" + (f" and at most {more:g} more" if more else ""))

    known = [sent for sent in life.sent if sent.status is not None and not sent.left]
    left = [sent for sent in life.sent if sent.left]
    for (path, status), count in Counter((sent.path, str(sent.status)) for sent in known).items():
        check(f"responses of {path} with {status}", metrics.get(("http_responses_total", path, status), 0), count, len(left))
    responses = sum(value for name, value in metrics.items() if name[0] == "http_responses_total")
    check("responses", responses, len(known), len(left))
    choices = sum(sent.choices for sent in left)
    reasons = Counter(REASONS.get(reason, reason) for sent in known for reason in sent.reasons)
    # What a client cancelled may have ended just before, or never have reached the engine.
    cancelled = reasons.pop("abort", 0)
    for reason in ("stop", "length", "error"):
        check(f"requests that ended by {reason}", metrics["requests_finished_total", reason], reasons[reason], choices + cancelled)
    ended = sum(value for name, value in metrics.items() if name[0] == "requests_finished_total")
    check("requests that ended", ended, reasons.total(), choices + cancelled)
    # What was generated of a cancelled response, its client is not told.
    check("tokens", metrics["generation_tokens_total",], sum(sent.num_tokens for sent in known), 120 * (choices + cancelled))
    check("calls", metrics["tool_calls_total",], sum(sent.num_calls for sent in known), 120 * choices)
    finished = metrics["requests_finished_total", "stop"] + metrics["requests_finished_total", "length"]
    for name in ("request_seconds_count", "goal_requests_total", "request_output_tokens_count"):
        check(name, metrics[name,], finished)
    for name in ("requests_running", "requests_waiting", "requests_preempted", "swap_blocks_used", "tokens_unread", "kv_blocks used"):
        check(name, metrics[tuple(name.split())], 0)
    check("engine_up", metrics["engine_up",], 1)
    for reason, count in page["finished"].items():
        check(f"the page's requests that ended by {reason}", count, metrics["requests_finished_total", reason])
    for name, count in page["counters"].items():
        check(f"the page's {name}", count, metrics[f"{name}_total",])
    check("the page's responses", sum(page["answers"].values()), responses - 1)


def compare_log(life: Life) -> None:
    """Each request must have one line in the log, with the status that its client saw."""
    lines, others = {}, []
    for text in life.log.splitlines():
        if text.startswith("{"):
            line = json.loads(text)
            lines.setdefault(line["request_id"], []).append(line)
        elif life.end != "killed" and ("Traceback" in text or "Error" in text or "WARNING" in text or "missing here" in text):
            others.append(text)
    life.faults += [f"in the log: {text}" for text in others]
    for sent in life.sent:
        its = lines.get(sent.request_id, [])
        if sent.status is None and (sent.left or life.end in ("killed", "told")):
            if len(its) > 1:
                life.faults.append(f"request {sent.request_id} has {len(its)} lines in the log")
        elif len(its) != 1 or (its[0]["path"], its[0]["status"]) not in ((sent.path, sent.status), ("-", 503)):
            life.faults.append(f"{sent} has the lines {its}")
    for sent in life.sent:
        if sent.broken and life.end in ("idle", "settled"):
            life.faults.append(f"{sent.path}: {sent.broken}")
        if sent.status is not None and sent.status >= 500 and life.end in ("idle", "settled"):
            life.faults.append(f"{sent.path}: {sent.status}")
        if sent.status == 200 and not sent.left and not sent.broken and len(sent.reasons) != sent.choices:
            life.faults.append(f"{sent} asked for {sent.choices} answers")


def memory_of(served: Served) -> float:
    """Resident memory of the server's processes, in MiB; Linux only."""
    return round(sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in processes_of(served)) * 4096 / 2**20, 1)


def operate(chapter: Chapter, num_lives: int, seconds: float, seed: int) -> list[Life]:
    """Run the server again and again, so many seconds each time."""
    rng, lives = random.Random(seed), []
    for number in range(num_lives):
        life = Life(ENDS[number % len(ENDS)], number)
        lives.append(life)
        live(life, chapter, seconds, rng)
        print(f"{life.number} {life.end:8}{told(life)}", flush=True)
        for fault in life.faults[:20]:
            print(f"    {fault}", flush=True)
    return lives


def told(life: Life) -> str:
    statuses = Counter(str(sent.status) if sent.status else "none" for sent in life.sent)
    facts = [f"{len(life.sent):,} requests", ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))]
    facts += [f"{sum(sent.left for sent in life.sent)} left", f"{sum(bool(sent.broken) for sent in life.sent)} broken"]
    facts += [f"{life.metrics['preemptions_total',]:.0f} preemptions"] if life.metrics else []
    return " · ".join([*facts, f"{' '.join(f'{mib:.0f}' for mib in life.mib[::4])} MiB", f"{len(life.faults)} faults"])


def totals(lives: list[Life], seconds: float) -> dict:
    """What is written of a run: sums over all lives, and of their metrics over those that became idle."""
    sent = [sent for life in lives for sent in life.sent]

    def counted(name: str) -> int:
        return int(sum(life.metrics.get((name,), 0) for life in lives))

    return {
        "requests": len(sent),
        "runs": len(lives),
        "ends": dict(Counter(life.end for life in lives)),
        "statuses": dict(sorted(Counter(str(each.status) for each in sent).items())),
        "left": sum(each.left for each in sent),
        "tokens": sum(each.num_tokens for each in sent),
        "calls": sum(each.num_calls for each in sent),
        "preemptions": counted("preemptions_total"),
        "cached_tokens": counted("prefix_cache_hits_total"),
        "minutes_each": round(seconds / 60, 1),
        "most_mib": max(max(life.mib) for life in lives),
        "faults": sum(len(life.faults) for life in lives),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.verify.operate", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="record the totals in docs/results/operate.json")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes must be above 0 and finite, got {args.minutes}")
    chapter = last_with("tools")
    num_lives = len(ENDS) * max(1, round(args.minutes / 7.5 / len(ENDS)))
    seconds = 60 * args.minutes / num_lives
    everything = totals(operate(chapter, num_lives, seconds, args.seed), seconds)
    print(json.dumps(everything, indent=1))
    if args.write:
        write_row("operate", {"operate": everything}, f"python -m shared.verify.operate --minutes {args.minutes:g}", [chapter])
    return 1 if everything["faults"] else 0


if __name__ == "__main__":
    run(main)
