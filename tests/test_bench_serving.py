"""The server's benchmark: the client and the bare engine do all the work, and time is attributed correctly."""
import inspect
import json
import re
import socketserver
import subprocess
import sys
import threading
from asyncio import selector_events
from types import SimpleNamespace

import pytest

from shared.bench import serving as bench
from shared.bench import serving_child as child
from shared.bench.load import workload
from shared.chapters import ROOT, first_with, last_with
from shared.checkpoints import POCKET

linux = pytest.mark.skipif(sys.platform != "linux", reason="the CPU clock of another thread is read on Linux only")
STREAM = [
    'data: {"choices": [{"text": "a"}]}\n\n',
    'data: {"usage": {"completion_tokens": %d, "total_tokens": 99}}\n\n',
    "data: [DONE]\n\n",
]


@pytest.fixture
def listen():
    """A function that starts a server; `answer(request)` returns the parts to send, each in its own packet."""
    servers = []

    def listen(answer):
        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self):
                while self.rfile.readline():
                    head = b"".join(iter(self.rfile.readline, b"\r\n"))
                    body = json.loads(self.rfile.read(int(re.search(rb"content-length: (\d+)", head)[1])))
                    for part in answer(body):
                        self.wfile.write(part)
                        self.wfile.flush()

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                """A client that gives up closes its sockets."""

        servers.append(Server(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1].server_address

    yield listen
    for server in servers:
        server.shutdown()
        server.server_close()


def chunked(events):
    return b"".join(b"%x\r\n%s\r\n" % (len(event), event.encode()) for event in [*events, ""])


def stream(body):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + chunked([STREAM[0], STREAM[1] % body["max_tokens"], STREAM[2]])


@pytest.mark.parametrize("size", [13, 7, 10_000])
def test_the_client_reads_every_stream_to_its_end_however_it_is_cut(listen, size):
    prompts = []

    def answer(body):
        prompts.append(body["prompt"])
        whole = stream(body)
        return [whole[:20], *(whole[i : i + size] for i in range(20, len(whole), size))]

    bodies = workload(9, 1, "pocket")
    assert bench.closed_loop(listen(answer), bodies, 4) == sum(body["max_tokens"] for body in bodies)
    assert sorted(prompts) == sorted(body["prompt"] for body in bodies)


def test_the_client_sends_its_next_request_when_one_is_answered(listen):
    """Requests are answered in threes: with fewer at once the barrier breaks, and there are never more."""
    barrier, running, most = threading.Barrier(3), [], []

    def answer(body):
        running.append(body)
        most.append(len(running))
        barrier.wait(20)
        running.remove(body)
        return [stream(body)]

    bench.closed_loop(listen(answer), workload(9, 1, "pocket"), 3)
    assert max(most) == 3 and len(most) == 9


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\nno", "expected a stream, got 'HTTP/1.1 400"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(STREAM[:1]), "ended without usage"),
    ],
)
def test_an_answer_that_is_no_whole_stream_ends_the_measurement(listen, answer, message):
    with pytest.raises(RuntimeError, match=message):
        bench.closed_loop(listen(lambda body: [answer]), workload(3, 1, "pocket"), 2)


def test_a_server_that_falls_silent_ends_the_measurement(listen, monkeypatch):
    monkeypatch.setattr(bench, "SILENCE_S", 0.05)
    with pytest.raises(RuntimeError, match="the server sent nothing for"):
        bench.closed_loop(listen(lambda body: [stream(body)[:-9]]), workload(3, 1, "pocket"), 2)


def test_the_engine_alone_runs_all_requests_a_given_number_at_a_time():
    package = last_with("serve").load()
    engine = package.Engine(POCKET, device="cpu")
    step, at_once = engine.step, []
    engine.step = lambda: at_once.append(len(engine.seqs)) or step()
    requests = [([9, 10, 11], package.SamplingParams(max_tokens=n, ignore_eos=True)) for n in (2, 5, 3, 4, 1)]
    run = child.run_alone(engine, requests, 2)
    assert run["tokens"] == 15 and 0 < run["cpu_s"] and 0 < run["wall_s"]
    # 3 tokens follow 2; they and the 5 finish in the fifth step, and 4 and 1 take their places.
    assert at_once == [2] * 6 + [1] * 3
    assert sum(at_once) == 15, "a step gives each running request one token"


@linux
def test_only_time_that_the_main_thread_computes_is_sampled():
    code = """
import json, threading, time
from shared.bench import serving_child
def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        json.dumps([1.5] * 20_000, indent=1)
sampler = serving_child.Sampler()
thread = threading.Thread(target=burn, args=(0.2,))
thread.start()
sampler.set_interval(serving_child.SAMPLE_NS)
thread.join()
waited = sum(sampler.groups().values())
burn(0.4)
sampler.set_interval(0)
time.sleep(0.01)
sampled = sampler.groups()
burn(0.1)
print(json.dumps([waited, sampled, sampler.groups()]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    waited, sampled, later = json.loads(done.stdout)
    # 250 ticks per second, or fewer on some systems.
    assert waited <= 2 and 10 <= sampled["json"] <= 500 and later == sampled
    assert sampled["json"] > 0.8 * sum(sampled.values())


def test_what_a_socket_sends_is_distinguished_from_the_rest_of_the_event_loop():
    lines = inspect.getsource(selector_events).splitlines()
    [send, *_] = [i + 1 for i, line in enumerate(lines) if "self._sock.send(" in line]
    file = selector_events.__file__
    assert child.group_of(((file, send),)) == "send" and child.group_of(((file, send + 1),)) == "loop"
    assert set(child.FILES.values()) <= set(child.GROUPS)


@linux
def test_the_server_and_the_engine_are_measured_in_processes_of_their_own(monkeypatch, capsys):
    short = [body | {"max_tokens": 5} for body in workload(6, 1, "pocket")]
    monkeypatch.setattr(bench, "workload", lambda count, seed, model: short)
    monkeypatch.setattr(bench, "PROFILE_S", 1.0)
    rows = {}
    monkeypatch.setattr(bench, "show", lambda chapter, row, show=bench.show: rows.update({chapter.id: row}) or show(chapter, row))
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)  # this process continues after the measurement
    assert bench.main(["--streams", "2", "--turns", "1"]) == 0
    row = rows[last_with("serve").id]
    assert row["2"]["tokens"] == 30 and row["2"]["requests"] == 6
    assert set(row["2"]["alone"]) == {"tokens_per_s", "engine_busy", "engine_us", "wall_us", "others"}
    assert list(row["2"]["share"]) == ["thread", "process"]
    for way in row["2"]["share"]:
        assert set(row["2"][way]) == {*row["2"]["alone"], "front_us", "client_us"}
    for way in ("alone", *row["2"]["share"]):
        figures = {name: figure["median"] for name, figure in row["2"][way].items() if name != "others"}
        assert all(value > 0 for value in figures.values())
        assert figures["tokens_per_s"] * figures["wall_us"] == pytest.approx(1e6, rel=1e-2)
        assert figures["engine_busy"] == pytest.approx(figures["engine_us"] / figures["wall_us"], rel=1e-2)
    for profile in row["profile"].values():
        groups = profile["groups"]
        assert profile["samples"] > 0 and groups["tokenizer"]["us"] > 0
        assert sum(group["share"] for group in groups.values()) == pytest.approx(1, abs=0.01)
    assert "the tokenizer's thread" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("others", "turns", "kept"),
    [
        ([0.0, 0.5, 0.05], 3, [0.0, 0.05]),
        ([0.9, 0.3, 0.8, 0.4, 0.7, 0.6], 6, [0.3, 0.4]),
    ],
)
def test_a_turn_that_other_processes_disturbed_is_measured_again(monkeypatch, others, turns, kept):
    """Two quiet turns are needed; at most six are tried."""
    order, clock, taken = [], iter(range(10_000)), []

    def took(way):
        order.append(way)
        return {"tokens_per_s": 1.0}

    def others_s(*children):
        """Called before and after each run; on this clock a run lasts a second."""
        taken.append(others[(len(taken) // 4)] * (len(taken) % 2))
        return taken[-1]

    monkeypatch.setattr(bench, "alone_turn", lambda *_: took("alone"))
    monkeypatch.setattr(bench, "server_turn", lambda *_: took("server"))
    monkeypatch.setattr(bench, "others_s", others_s)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    row = bench.measure_size([SimpleNamespace(way="server")], None, 2, 2)
    # The first of each does not count; then each goes first in turn.
    assert order[2:] == (["alone", "server", "server", "alone"] * 3)[: 2 * turns]
    assert row["server"]["others"] == {"median": sum(kept) / 2, "low": kept[0], "high": kept[1]}


@linux
def test_what_other_processes_take_is_neither_this_ones_nor_its_childrens():
    before = bench.others_s()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"], check=True)
    child_of_its_own = SimpleNamespace(ask=lambda message: {"process": 0.4})
    others, without_it = bench.others_s() - before, bench.others_s(child_of_its_own) - before
    # Counted in ticks of 10 ms; a busy machine adds to both.
    assert others > 0.3 and without_it == pytest.approx(others - 0.4, abs=0.1)


def test_tokens_that_did_not_come_are_noticed():
    with pytest.raises(AssertionError, match="3 tokens arrived, 4 were requested"):
        bench.figures_of([{"max_tokens": 4}], 3, 1.0, {"engine": 1.0})


def test_the_front_is_all_of_the_process_but_the_engine():
    before, after = {"process": 10.0, "engine": 4.0}, {"process": 15.0, "engine": 7.0}
    assert bench.spent(before, after) == {"engine": 3.0, "front": 2.0}
    with pytest.raises(AssertionError, match="no thread or process named engine"):
        bench.spent(before, after | {"engine": 4.0})


@linux
def test_what_is_written_is_whole(monkeypatch, capsys):
    written = []
    monkeypatch.setattr(bench, "measure", lambda chapter, sizes, turns: {"sizes": sizes})
    monkeypatch.setattr(bench, "show", lambda chapter, row: None)
    monkeypatch.setattr(bench, "write_row", lambda *args: written.append(args) or SimpleNamespace(name="serving.json"))
    for argv in (["--write", "--streams", "16"], ["v01"], ["v00"], ["--streams", "0"], ["--turns", "0"]):
        with pytest.raises(SystemExit):
            bench.main(argv)
    said = capsys.readouterr().err
    first = first_with("serve")
    assert f"v01 has no server; the first chapter with one is {first.id}" in said and "--write requires 1 16 64 streams" in said
    assert bench.main([first.id, "--write"]) == 0
    [(name, results, command, chapters)] = written
    assert (name, results, chapters) == ("serving", {first.id: {"sizes": [1, 16, 64]}}, [first])
    assert command == f"python -m shared.bench.serving {first.id} --write"
