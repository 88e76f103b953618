"""The server under stress: faults, clients that leave or do not read, signals."""
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import threading
import time

import openai
import pytest
import torch
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.verify.serving import serving, wait_until
from shared.verify.soak_server import is_idle, leave
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP
from tests.support.stressed import LONG, client_of, engine, hang_up, health, process, raw_request, start, tokenizer  # noqa: F401

pytestmark = pytest.mark.needs("serve")


# ---- clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_request(chapter, engine, stream):
    hang_up(chapter, engine, "/v1/completions", LONG | {"stream": stream})


def test_50_clients_that_leave_at_random_moments_leave_nothing_behind(chapter, engine):
    how = leave(chapter, engine, 50, seed=1)
    assert min(how.values()) > 0, how


@pytest.mark.parametrize("process", [("--keep-alive", "1")], indirect=True)
def test_a_connection_on_which_no_whole_request_comes_is_closed(chapter, process):
    """Nothing, a half head, a half body, and each of them again after an answer; a stream is longer, and goes on."""
    host, port = "127.0.0.1", int(process.url.split(":")[-1])
    whole = raw_request("/v1/completions", LONG | {"max_tokens": 1900, "stream": True})
    stream = socket.create_connection((host, port))
    stream.sendall(whole)
    connections = []
    for first in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        for sent in (b"", whole[:40], whole[:-5]):
            connections.append(socket.create_connection((host, port)))
            connections[-1].sendall(first + sent)
    began, left = time.monotonic(), list(connections)
    while left and time.monotonic() - began < 10:
        for connection in select.select(left, [], [], 0.5)[0]:
            try:
                is_open = connection.recv(4096)
            except ConnectionResetError:
                is_open = b""
            if not is_open:
                left.remove(connection)
    assert not left and 0.5 < time.monotonic() - began < 5
    said = b""
    while not said.endswith(b"0\r\n\r\n"):
        said += (piece := stream.recv(65536))
        assert piece, said[-200:]
    assert b"[DONE]" in said and time.monotonic() - began > 2
    for connection in (stream, *connections):
        connection.close()


def test_as_many_connections_are_allowed_as_the_system_allows(module):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        module("process").allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.needs("openai")
def test_clients_that_reset_their_connections_leave_no_warnings_in_the_log(chapter, process):
    """Many answers to one call are written at once, of which all but the first find the connection gone."""
    request = raw_request("/v1/completions", {"model": "pocket", "prompt": ["Once"] * 32, "max_tokens": 100, "stream": True})
    for number in range(40):
        with socket.create_connection(("127.0.0.1", int(process.url.split(":")[-1]))) as connection:
            connection.sendall(request)
            assert connection.recv(1000)
            time.sleep(0.03 * (number % 7))
            # What is not sent or read yet is thrown away, and the server gets a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: not HTTP.get(f"{process.url}/health").json()["running"])
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=20)[1]
    assert "POST" in told or "metrics" not in chapter.capabilities, told
    assert "socket.send() raised exception" not in told, told


def test_a_slow_reader_slows_no_other_client(chapter, engine):
    """One client sends a request and does not read; others are served while its stream is stuck."""
    with serving(chapter, engine) as server, client_of(server) as client:
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect(("127.0.0.1", int(server.url.split(":")[-1])))
            stuck.sendall(raw_request("/v1/completions", LONG | {"stream": True}))
            wait_until(lambda: health(server)["running"])
            text = client.completions.create(model="pocket", prompt="Once", max_tokens=5, temperature=0).choices[0].text
            assert len(text) > 5
            # Its tokens are generated and wait for it; its blocks are free for other requests.
            wait_until(lambda: is_idle(server))
        wait_until(lambda: not server.service.async_engine.active_generations)


def test_a_refused_request_leaves_no_memory_behind(chapter, process):
    """An error that its own frames refer to, through a future, is freed by a garbage collection only, which may be thousands of requests away."""

    def resident():
        with open(f"/proc/{process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Refused by the engine, and refused once they are tokenized.
    bodies = {"/v1/completions": {"prompt": "d", "max_tokens": 10**6, "note": "d" * 3_000_000}}
    if "openai" in chapter.capabilities:
        bodies["/v1/chat/completions"] = {"messages": [{"role": "user", "content": "d" * 3_000_000}]}
    for path, body in bodies.items():
        for number in range(30):
            if number == 8:
                before = resident()
            response = HTTP.post(f"{process.url}{path}", json={"model": "pocket"} | body)
            assert response.status_code == 400 and len(response.text) < 1000
        assert resident() - before < 50_000_000, path


def test_a_large_answer_is_sent_at_once_to_a_client_that_reads(module):
    """A small send buffer never fills a segment, so each time the sender would wait for an acknowledgment that the receiver delays."""
    with module("process").bind("127.0.0.1", 0) as bound, socket.socket() as client:
        bound.listen()
        client.connect(bound.getsockname())
        connection, _ = bound.accept()
        start, num_bytes = time.monotonic(), 20_000_000
        sender = threading.Thread(target=connection.sendall, args=(bytes(num_bytes),))
        sender.start()
        while num_bytes:
            num_bytes -= len(client.recv(2**16))
        sender.join()
        connection.close()
    assert time.monotonic() - start < 1


def test_chunks_of_one_byte_are_parsed_few_at_a_time(chapter, tokenizer, monkeypatch):
    """The parser takes milliseconds for a few hundred of them, and nobody else is served meanwhile."""
    parsed, data_received = [], H11Protocol.data_received
    monkeypatch.setattr(H11Protocol, "data_received", lambda self, data: parsed.append(len(data)) or data_received(self, data))
    body = json.dumps({"model": "pocket", "prompt": "Once", "max_tokens": 1}).encode().ljust(10_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(chapter, FakeEngine(chapter, tokenizer)) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.split(":")[-1])), timeout=20) as sender:
            sender.sendall(head + chunks)
            assert sender.recv(15) == b"HTTP/1.1 200 OK"
    assert sum(parsed) == len(head + chunks) and max(parsed) <= 4096


# ---- faults


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_in_a_step_fails_the_requests_in_it_and_no_others(chapter, engine, stream, monkeypatch):
    with serving(chapter, engine) as server, client_of(server) as client:
        want = client.completions.create(model="pocket", prompt="Once", max_tokens=6, temperature=0).choices[0].text
        real = engine.model.forward
        calls = []

        def fails_once(batch):
            calls.append(len(batch.draws))
            if len(calls) == 3:
                engine.cache.k[:] = torch.nan
                raise RuntimeError("injected")
            return real(batch)

        monkeypatch.setattr(engine.model, "forward", fails_once)
        with pytest.raises(openai.APIError, match="the step that computed this request failed.*injected") as caught:
            asked = dict(model="pocket", prompt="Once upon", max_tokens=9, stream=stream)
            done = client.completions.create(**asked)
            list(done)
        if stream:
            assert caught.value.body["type"] == "server_error" and caught.value.body["code"] == 500
        else:
            assert isinstance(caught.value, openai.InternalServerError)
        engine.cache.k[torch.isnan(engine.cache.k)] = 0
        wait_until(lambda: is_idle(server))
        assert client.completions.create(model="pocket", prompt="Once", max_tokens=6, temperature=0).choices[0].text == want


def test_requests_that_waited_outlive_a_fault(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer, places=1)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        found = {}

        def ask(name):
            try:
                found[name] = client.completions.create(model="pocket", prompt="Once upon", max_tokens=2).choices[0].finish_reason
            except openai.InternalServerError:
                found[name] = "failed"

        threads = []
        for name in ("first", "second"):
            threads.append(threading.Thread(target=ask, args=(name,)))
            threads[-1].start()
            wait_until(lambda: len(server.service.async_engine.active_generations) == len(threads))
        # Only an admitted request can be in the step that fails; the second one runs later.
        fake.fault = RuntimeError("injected")
        fake.gate.set()
        for thread in threads:
            thread.join(10)
        assert found == {"first": "failed", "second": "length"}


class Panic(BaseException):
    """As that of a library in Rust, which is no Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_when_the_engine_dies_every_client_gets_an_error_and_the_server_ends(chapter, tokenizer, monkeypatch, kind):
    fake = FakeEngine(chapter, tokenizer)
    monkeypatch.setattr(fake, "fail_step", lambda: [])
    with serving(chapter, fake) as server, client_of(server) as client:
        fake.fault = kind("the last one")
        with pytest.raises(openai.InternalServerError, match="the engine has stopped.*the last one") as caught:
            client.completions.create(model="pocket", prompt="Once upon")
        assert caught.value.status_code == 500
        with pytest.raises(openai.InternalServerError, match="the engine has stopped") as caught:
            client.completions.create(model="pocket", prompt="Once upon")
        assert caught.value.status_code == 503
        response = HTTP.get(f"{server.url}/health")
        assert response.status_code == 503 and response.json()["status"] == "dead"
        wait_until(lambda: server.should_exit, 4)


def test_a_fault_while_a_request_is_added_is_its_own(chapter, tokenizer, monkeypatch):
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server, client_of(server) as client:
        with monkeypatch.context() as patch:
            patch.setattr(fake, "add_request", lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="could not take this request: ZeroDivisionError") as caught:
                client.completions.create(model="pocket", prompt="Once upon")
            assert caught.value.status_code == 500
        assert client.completions.create(model="pocket", prompt="Once upon", max_tokens=1).choices[0].text


def test_a_request_that_finished_in_the_failed_step_gets_the_error_too(chapter, engine, monkeypatch):
    """Its last token is lost with the step, so its client would wait forever."""
    with serving(chapter, engine) as server:
        accept, found = engine.accept, []

        def fails_after_an_end(seq, *rest):
            if any(other.finished for other in engine.in_step):
                raise RuntimeError("injected")
            return accept(seq, *rest)

        def ask(max_tokens):
            body = {"model": "pocket", "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True}
            found.append(HTTP.post(f"{server.url}/v1/completions", json=body, timeout=20).status_code)

        monkeypatch.setattr(engine, "accept", fails_after_an_end)
        schedule = engine.scheduler.schedule
        # Both are admitted before the first step, and the first of them finishes in it.
        monkeypatch.setattr(engine.scheduler, "schedule", lambda: schedule() if len(engine.seqs) > 1 or engine.num_steps > steps else [])
        steps = engine.num_steps
        threads = []
        for max_tokens in (1, 5):
            threads.append(threading.Thread(target=ask, args=(max_tokens,)))
            threads[-1].start()
            wait_until(lambda: len(engine.seqs) >= len(threads) or not threads[0].is_alive())
        for thread in threads:
            thread.join(20)
        assert found == [500, 500]
        wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("what", ["encode", "step", "add_request"])
def test_nothing_slow_runs_on_the_event_loop(chapter, tokenizer, what, monkeypatch):
    """Each waits until /health has answered, which is possible only if the event loop is free."""
    answered = threading.Event()
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server, client_of(server) as client:
        waited = []

        def slow(real):
            def wait(*args, **options):
                waited.append(answered.wait(4))
                return real(*args, **options)

            return wait

        own = server.service.async_engine.tokenizer
        if what == "encode":
            monkeypatch.setattr(type(own), "__call__", slow(type(own).__call__))
        else:
            monkeypatch.setattr(fake, what, slow(getattr(fake, what)))
        done = []
        asked = dict(model="pocket", prompt="Once", max_tokens=1)
        thread = threading.Thread(target=lambda: done.append(client.completions.create(**asked)))
        thread.start()
        time.sleep(0.2)
        assert health(server)["status"] == "ok"
        answered.set()
        thread.join(15)
        assert done and waited and all(waited)


# ---- the process


def test_a_server_that_is_started_says_how_to_ask_and_sigterm_ends_it(process):
    body = json.loads(process.curl.split("-d '")[1].rstrip().rstrip("'"))
    # Its text is sampled, and could end early.
    answer = HTTP.post(f"{process.url}/v1/completions", json=body | {"ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 32
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and "Traceback" not in told, told


def test_a_stream_that_a_signal_ends_says_so(process):
    with HTTP.stream("POST", f"{process.url}/v1/completions", json=LONG | {"stream": True, "max_tokens": 2000}, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        said = [line for line in lines if line]
    # A later chapter lets it finish.
    assert "the server was shut down before this request was done" in said[-1] or said[-1] == "data: [DONE]"
    told = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and "Traceback" not in told, told


def test_a_port_that_is_in_use_is_reported_before_the_model_is_loaded(chapter, capsys):
    command_line = importlib.import_module(f"milestones.{chapter.name}.__main__")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert command_line.main(["serve", "--port", port, "--model", "nowhere"]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: [Errno 98]" in capsys.readouterr().err
    assert command_line.main(["serve", "--host", "a..b", "--model", "nowhere"]) == 2
    assert "cannot listen on a..b:8000" in capsys.readouterr().err


def test_of_two_servers_started_together_one_says_why_it_cannot_listen(chapter):
    process_module = importlib.import_module(f"milestones.{chapter.name}.process")
    with process_module.bind("127.0.0.1", 0) as other:
        port = str(other.getsockname()[1])
        process = start(chapter, "--port", port)
        # It has bound the port, and prints so once the model is loaded; the other listens before it does.
        assert process.stderr.readline().startswith("pocket: ")
        other.listen()
        told = process.communicate(timeout=60)[1]
    # Some versions of Triton print more when Python exits.
    assert process.returncode == 2 and f"\nerror: cannot listen on 127.0.0.1:{port}: " in f"\n{told}", told
    assert "Traceback" not in told, told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port must be an integer from 0 to 65535, got 70000"),
        (["--served-model-name", ""], "served_model_name must be printable and not empty, got ''"),
        (["--served-model-name", "p\udcff"], "served_model_name must be printable and not empty, got 'p\\udcff'"),
    ],
)
def test_wrong_flags_are_refused_by_name(chapter, capsys, flags, message):
    command_line = importlib.import_module(f"milestones.{chapter.name}.__main__")
    assert command_line.main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err
