"""What a server costs over its engine alone on the same requests: tokens per second, and CPU time per token.

    python -m shared.bench.serving                      # the last chapter with a server: 1, 16 and 64 streams
    python -m shared.bench.serving v07 --streams 16     # another chapter, with 16 streams only
    python -m shared.bench.serving --write              # ten minutes

This compares the chapter's engine without a server, its server with the engine in a thread, and, in chapters that
support it, its server with the engine in its own process. This process is the client. It runs on the same machine and
takes CPU time from the server, so its own CPU time is reported too. It reads raw sockets, because httpx would take more
CPU time per token than the server. The model is pocket, on the CPU, with OMP_NUM_THREADS=1 and --max-num-seqs 64. The
requests are those of `load` in a closed loop: each stream sends its next request when its last one is answered. The
engine alone gets the same requests, already tokenized, and runs the same number at once.

In chapters whose engine can run in its own process, that process and the engine alone are pinned to one core, and the
client and the server's other process to a second one. A server with the engine in a thread may use both cores.

These alternatives take turns of a few seconds, because the speed of a shared machine changes within minutes. Every turn
generates the same tokens; it includes its start and its end, when fewer streams run. Each figure is the median over the
turns, with the lowest and the highest:

    tokens_per_s    new tokens per second of wall time
    share           a server's tokens_per_s, divided by that of the engine alone in the same turn
    engine_us       CPU microseconds per token of the engine's thread, or of its process
    front_us        CPU microseconds per token of the rest of the server: the event loop and the tokenizer's thread
    client_us       CPU microseconds per token of the client's process
    wall_us         wall microseconds per token
    engine_busy     CPU time of the engine's thread or process, divided by wall time
    others          CPU time of all other processes on the machine, divided by wall time

Each round has one turn of each alternative. Rounds in which other processes took more than QUIET of a core are noisy.
Measuring continues until there are --turns quiet rounds, or three times --turns in all; the quietest --turns rounds
count, and if a noisy one is among them, the report says so.

Then 16 streams run for PROFILE_S seconds while the event loop's thread is sampled (`serving_child` explains how), which
splits the CPU time of the event loop's side into groups. The tokenizer's thread is its own group, measured by its clock.

Reads: the chapters. Writes: docs/results/serving.json.
"""
import argparse
import importlib.util
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from urllib.parse import urlsplit

from shared.bench.load import url_of, workload
from shared.bench.serving_child import GROUPS
from shared.bench.timing import progress
from shared.chapters import ROOT, Chapter, find, first_with, last_with
from shared.programs import run
from shared.results import write_row

STREAMS = (1, 16, 64)
TURNS = 9
PROFILE_STREAMS, PROFILE_S = 16, 40.0
SEED = 1
# The share of a core that other processes may take.
QUIET = 0.1
# The end of a chunked body. It cannot occur earlier: a chunk of events ends with two line feeds before its CR and LF.
END = b"\r\n0\r\n\r\n"
SILENCE_S = 60.0  # how long the client waits for data from any stream


class Child:
    """A `serving_child` process, which answers each line of JSON with another."""

    def __init__(self, what: str, chapter: Chapter, *flags: str, module: str = "shared.bench.serving_child", **options):
        command = [sys.executable, "-m", module, what, chapter.name, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} | options
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    def ask(self, message: dict) -> dict:
        """Send a message, and return the answer; RuntimeError if the process has exited."""
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"`{' '.join(self.process.args)}` has exited")
        return json.loads(line)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.communicate()


class Server(Child):
    """A chapter's server, with its engine in a thread or in its own process."""

    def __init__(self, chapter: Chapter, way: str):
        flags = ["--engine", way] if "engine_process" in chapter.capabilities else []
        super().__init__("serve", chapter, *flags, stderr=subprocess.PIPE)
        self.way = way

    def wait_until_it_serves(self) -> None:
        url = urlsplit(url_of(self.process))
        self.address = url.hostname, url.port


def measure(chapter: Chapter, sizes: list[int], turns: int) -> dict:
    """A chapter's row: figures for each number of streams, and the profiles."""
    has_process = "engine_process" in chapter.capabilities
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        servers = [stack.enter_context(Server(chapter, way)) for way in (["thread", "process"] if has_process else ["thread"])]
        alone = stack.enter_context(Child("alone", chapter))
        for server in servers:
            server.wait_until_it_serves()
        alone.read()
        row = {
            "http": "httptools" if has("httptools") else "h11",
            "event_loop": "uvloop" if has("uvloop") else "asyncio",
            "pinned": has_process and pin(servers, alone),
        }
        for size in sizes:
            row[str(size)] = measure_size(servers, alone, size, turns)
        row["profile"] = {server.way: measure_profile(server) for server in servers}
    return row


def pin(servers: list[Server], alone: Child | None) -> bool:
    """Pin the processes to two cores, as the module's docstring says; False if there is only one core."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return False
    os.sched_setaffinity(0, cores[1:])
    if alone:
        alone.ask({"pin": {"engine": cores[:1], "front": cores[:1]}})
    for server in servers:
        server.ask({"pin": {"engine": cores[:1], "front": cores[1:] if server.way == "process" else cores}})
    return True


def has(module: str) -> bool:
    """Whether a module is installed; uvicorn uses httptools and uvloop if they are."""
    return importlib.util.find_spec(module) is not None


def measure_size(servers: list[Server], alone: Child, streams: int, turns: int) -> dict:
    """Figures of all alternatives, which take turns, after one warm-up turn of each."""
    bodies = workload(16 + 4 * streams, SEED, "pocket")
    ways: dict[str, Callable[[], dict[str, float]]] = {"alone": lambda: alone_turn(alone, bodies, streams)}
    ways |= {server.way: partial(server_turn, server, bodies, streams) for server in servers}
    for turn in ways.values():
        turn()
    rounds = []
    for turn_id in progress(range(3 * turns), f"{streams} streams"):
        turns_by_way = {}
        # The order alternates, so that a machine that slows down favors none.
        for way in list(ways)[:: -1 if turn_id % 2 else 1]:
            before, start = others_s(*servers, alone), time.perf_counter()
            turns_by_way[way] = ways[way]()
            turns_by_way[way]["others"] = (others_s(*servers, alone) - before) / (time.perf_counter() - start)
        rounds.append(turns_by_way)
        rounds.sort(key=disturbance)
        if len(rounds) >= turns and disturbance(rounds[turns - 1]) < QUIET:
            break
    rounds = rounds[:turns]
    row = {"requests": len(bodies), "tokens": sum(body["max_tokens"] for body in bodies), "turns": turns}
    for way in ways:
        row[way] = {name: spread([each[way][name] for each in rounds]) for name in rounds[0][way]}
    row["share"] = {
        server.way: spread([each[server.way]["tokens_per_s"] / each["alone"]["tokens_per_s"] for each in rounds])
        for server in servers
    }
    return row


def disturbance(turns_by_way: dict[str, dict[str, float]]) -> float:
    """The largest share of a core that other processes took in any of a round's turns."""
    return max(figures["others"] for figures in turns_by_way.values())


def others_s(*children: Child) -> float:
    """CPU seconds so far of all processes except this one and its children, including time stolen by the host.

    Only the difference between two calls is meaningful.
    """
    own_s = time.process_time() + sum(child.ask({})["process"] for child in children)
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own_s


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, to four significant digits; above 1000, to integers.

    >>> spread([304.56, 1.0, 0.98765])
    {'median': 1.0, 'low': 0.9877, 'high': 304.6}
    """
    figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value) if value >= 1000 else float(f"{value:.4g}") for name, value in figures.items()}


def alone_turn(alone: Child, bodies: list[dict], streams: int) -> dict[str, float]:
    """One turn of the engine alone; its figures by name, as listed in the module's docstring."""
    run = alone.ask({"bodies": bodies, "streams": streams})
    return figures_of(bodies, run["tokens"], run["wall_s"], {"engine": run["cpu_s"]})


def server_turn(server: Server, bodies: list[dict], streams: int) -> dict[str, float]:
    """One turn of the server; its figures by name."""
    before, client_s, start = server.ask({}), time.process_time(), time.perf_counter()
    num_tokens = closed_loop(server.address, bodies, streams)
    wall_s, client_s, after = time.perf_counter() - start, time.process_time() - client_s, server.ask({})
    return figures_of(bodies, num_tokens, wall_s, spent(before, after) | {"client": client_s})


def spent(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """CPU seconds between two answers of a server: the engine's, and the rest."""
    engine_s, process_s = (after[name] - before[name] for name in ("engine", "process"))
    assert engine_s > 0, "the server has no thread or process named engine, or it took no CPU time"
    return {"engine": engine_s, "front": process_s - engine_s}


def figures_of(bodies: list[dict], num_tokens: int, wall_s: float, cpu_s: dict[str, float]) -> dict[str, float]:
    """A turn's figures by name.

    Args:
        bodies: the turn's requests; all of their tokens must have arrived.
        wall_s: seconds that the turn took.
        cpu_s: CPU seconds of the engine, and of the front (the event loop's side) and the client in a server's turn.
    """
    expected = sum(body["max_tokens"] for body in bodies)
    assert num_tokens == expected, f"{num_tokens} tokens arrived, {expected} were requested"
    times = {f"{name}_us": 1e6 * seconds / num_tokens for name, seconds in (cpu_s | {"wall": wall_s}).items()}
    return {"tokens_per_s": num_tokens / wall_s, "engine_busy": cpu_s["engine"] / wall_s} | times


# ---- the client


def closed_loop(address: tuple[str, int], bodies: list[dict], streams: int) -> int:
    """Send all requests, at most `streams` at a time, and read their event streams; the number of tokens.

    Only the usage at the end of an answer is parsed: parsing every event would cost as much as writing it.

    Raises:
        RuntimeError: if an answer is not a stream or ends early, or if nothing arrives for SILENCE_S seconds.
    """
    waiting, num_tokens = map(http_request, bodies), 0
    with selectors.DefaultSelector() as selector:
        for request in islice(waiting, streams):
            connection = socket.create_connection(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, [])
        try:
            while selector.get_map():
                ready = selector.select(SILENCE_S)
                if not ready:
                    raise RuntimeError(f"the server sent nothing for {SILENCE_S:.0f} s")
                for key, _ in ready:
                    connection, parts = key.fileobj, key.data
                    if not read_part(connection, parts):
                        continue
                    num_tokens += tokens_of(b"".join(parts))
                    parts.clear()
                    request = next(waiting, None)
                    if request is None:
                        selector.unregister(connection)
                        connection.close()
                    else:
                        connection.sendall(request)
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()
    return num_tokens


def http_request(body: dict) -> bytes:
    content = json.dumps(body).encode()
    headers = ["host: bench", "content-type: application/json", f"content-length: {len(content)}"]
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *headers, "", ""]).encode() + content


def read_part(connection: socket.socket, parts: list[bytes]) -> bool:
    """Read what has arrived of an answer and append it to `parts`; True if the answer is complete."""
    part = connection.recv(2**16)
    parts.append(part)
    if not parts[0].startswith(b"HTTP/1.1 200") or not part:
        raise RuntimeError(f"expected a stream, got {b''.join(parts)[:1000].decode(errors='replace')!r}")
    return (part if len(part) >= len(END) else b"".join(parts[-len(END) :])).endswith(END)


def tokens_of(answer: bytes) -> int:
    """The number of new tokens, from a stream's usage.

    >>> tokens_of(b'data: {"usage": {"completion_tokens": 12, "total_tokens": 15}}' + END)
    12
    """
    _, key, rest = answer.rpartition(b'"completion_tokens":')
    if not key:
        raise RuntimeError(f"a stream ended without usage: {answer[-300:].decode(errors='replace')!r}")
    return int(rest.partition(b",")[0])


# ---- where the event loop's time goes


def measure_profile(server: Server) -> dict:
    """CPU microseconds per token of the event loop's side, and each group's share."""
    bodies = workload(8 * PROFILE_STREAMS, SEED, "pocket")
    num_tokens, before, end = 0, server.ask({"sample": True}), time.monotonic() + PROFILE_S
    while time.monotonic() < end:
        num_tokens += closed_loop(server.address, bodies, PROFILE_STREAMS)
    after = server.ask({"sample": False})
    front_s, tokenizer_s = spent(before, after)["front"], after["tokenizer"] - before["tokenizer"]
    front_us = 1e6 * front_s / num_tokens
    shares = shares_of(after["samples"], tokenizer_s / front_s)
    return {
        "streams": PROFILE_STREAMS,
        "samples": sum(after["samples"].values()),
        "front_us": round(front_us, 1),
        "groups": {group: {"share": round(share, 3), "us": round(share * front_us, 1)} for group, share in shares.items()},
    }


def shares_of(samples: dict[str, int], tokenizer_share: float) -> dict[str, float]:
    """Each group's share of the CPU time of the event loop's side, largest first.

    Args:
        samples: each group's number of samples on the event loop's thread.
        tokenizer_share: the tokenizer thread's share of that CPU time.

    >>> shares_of({"json": 10, "loop": 30}, tokenizer_share=0.2)
    {'loop': 0.6, 'json': 0.2, 'tokenizer': 0.2}
    """
    loop_share, num_samples = 1 - tokenizer_share, max(sum(samples.values()), 1)
    shares = {group: loop_share * number / num_samples for group, number in samples.items()}
    return dict(sorted((shares | {"tokenizer": tokenizer_share}).items(), key=lambda item: -item[1]))


def show(chapter: Chapter, row: dict) -> None:
    columns = ("tokens/s alone", "served", "share", "engine alone", "engine", "event loop", "client", "wall")
    pinned = ", pinned to two cores" if row["pinned"] else ""
    print(f"{chapter.id}, {row['http']}, {row['event_loop']}{pinned}; CPU and wall time in microseconds per token; medians (range)")
    print(f"{'streams':16}" + "".join(f"{column:>20}" for column in columns))
    sizes = [name for name in row if name.isdigit()]
    for streams in sizes:
        for way, share in row[streams]["share"].items():
            alone, server = row[streams]["alone"], row[streams][way]
            cells = [told(alone["tokens_per_s"]), told(server["tokens_per_s"]), told(share, ".0%"), told(alone["engine_us"])]
            cells += [told(server[name]) for name in ("engine_us", "front_us", "client_us", "wall_us")]
            print(f"{f'{streams}, {way}':16}" + "".join(f"{cell:>20}" for cell in cells))
    for streams in sizes:
        others = max(row[streams][way]["others"]["high"] for way in ("alone", *row[streams]["share"]))
        if others > QUIET:
            print(f"noisy: with {streams} streams, other processes took up to {others:.0%} of a core")
    for way, profile in row["profile"].items():
        print(f"\n{way}: the event loop takes {profile['front_us']:,.0f} us per token with {profile['streams']} streams; {profile['samples']:,} samples:")
        for group, part in profile["groups"].items():
            print(f"  {GROUPS[group]:30}{part['share']:6.1%}{part['us']:8,.1f} us")


def told(figure: dict[str, float], form: str = ",.0f") -> str:
    """A median and its range.

    >>> told({"median": 0.63, "low": 0.56, "high": 0.71}, ".0%")
    '63% (56%-71%)'
    """
    return f"{figure['median']:{form}} ({figure['low']:{form}}-{figure['high']:{form}})"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.serving", description="Measure what a server costs over its engine alone.")
    parser.add_argument("chapter", nargs="?", metavar="vNN", help="(default: the last chapter with a server)")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), metavar="N", help="(default: 1 16 64)")
    parser.add_argument("--turns", type=int, default=TURNS, metavar="N", help=f"measured turns of each alternative (default: {TURNS})")
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if sys.platform != "linux":
        parser.error("this runs on Linux only, where a thread can read the CPU clocks of others")
    if min(*args.streams, args.turns, 1) < 1:
        parser.error("--streams and --turns must be at least 1")
    if args.write and args.streams != list(STREAMS):
        parser.error(f"--write requires {' '.join(map(str, STREAMS))} streams, since the texts show them together; leave out --streams")
    try:
        chapter = find(args.chapter) if args.chapter else last_with("serve")
    except ValueError as error:
        parser.error(str(error))
    if "serve" not in chapter.capabilities:
        parser.error(f"{chapter.id} has no server; the first chapter with one is {first_with('serve').id}")
    row = measure(chapter, args.streams, args.turns)
    show(chapter, row)
    if args.write:
        path = write_row("serving", {chapter.id: row}, " ".join(["python -m shared.bench.serving", *argv]), [chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
