"""The service when things go wrong: full queues, faults, clients that leave or do not read, signals."""
import asyncio
import importlib
import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
import torch

from shared.chapters import ROOT
from shared.checkpoints import POCKET, checkpoint
from shared.verify.serving import serving, wait_until
from shared.verify.soak_server import is_idle, leave
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP
from tests.support.started import Started

pytestmark = pytest.mark.needs("serve")

CHAT = [{"role": "user", "content": "What is a KV cache?"}]
LONG = {"model": "pocket", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="session")
def engine(chapter):
    return chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=512, kv_bytes=20 * 2**20)


@pytest.fixture
def tokenizer(engine):
    return engine.tokenizer


def health(server):
    return HTTP.get(f"{server.url}/health", timeout=2).json()


def client_of(server, **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


# ---- the queue


def test_a_full_queue_answers_429_and_later_room_again(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer, places=1)
    fake.gate.clear()
    with serving(chapter, fake, max_waiting=2) as server, client_of(server) as client:
        streams = []
        for number in range(3):
            asked = dict(model="pocket", prompt=[20, 21, 22], max_tokens=3, stream=True)
            streams.append(threading.Thread(target=lambda: list(client.completions.create(**asked))))
            streams[-1].start()
            # The first goes into a step, which lasts; the others have to wait for their turn.
            wait_until(lambda: len(server.service.engine.active_generations) == number + 1, 3)
        wait_until(lambda: server.service.engine.num_waiting >= 2, 3)
        with pytest.raises(openai.RateLimitError, match="at most 2 may") as caught:
            client.completions.create(model="pocket", prompt=[20], max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.BadRequestError, match="n x prompts is 3, but a call has at most 2") as caught:
            client.completions.create(model="pocket", prompt=[20], n=3, max_tokens=1)
        assert caught.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="n x prompts is 3, but") as caught:
            client.chat.completions.create(model="pocket", messages=CHAT, n=3)
        assert caught.value.param == "n"
        fake.gate.set()
        for stream in streams:
            stream.join(10)
        assert client.completions.create(model="pocket", prompt=[20], max_tokens=1).choices[0].finish_reason == "length"


def test_too_many_prompts_are_refused_before_the_first_is_read(chapter, tokenizer, monkeypatch):
    with serving(chapter, FakeEngine(chapter, tokenizer)) as server, client_of(server) as client:
        monkeypatch.setattr(server.service.engine, "tokenize", None)
        for answers, blamed in ((1, "prompt"), (128, "n")):
            with pytest.raises(openai.BadRequestError, match=f"n x prompts is {2000 * answers}, but a call has at most 256") as caught:
                client.completions.create(model="pocket", prompt=["a"] * 2000, n=answers)
            assert caught.value.param == blamed
        # Of a chat all turns are one prompt.
        turns = CHAT + [{"role": "user", "content": "x" * 20_000}] * 60
        with pytest.raises(openai.BadRequestError, match="bytes, too many for max_model_len") as caught:
            client.chat.completions.create(model="pocket", messages=turns)
        assert caught.value.param == "messages"


def test_of_a_call_all_requests_are_queued_or_none(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="which this engine refuses") as caught:
            client.completions.create(model="pocket", prompt=[[20], [21], [13]])
        assert caught.value.param == "prompt"
        wait_until(lambda: is_idle(server))
        assert fake.aborted == [1, 2]


# ---- who leaves


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_request(chapter, engine, path, stream, monkeypatch):
    monkeypatch.setattr(engine, "config", replace(engine.config, end_ids=()))
    body = {
        "/v1/completions": LONG | {"n": 2},
        "/v1/chat/completions": {"model": "pocket", "messages": CHAT},
        "/v1/responses": {"model": "pocket", "input": "Hi"},
    }[path]
    with serving(chapter, engine) as server:
        raw = json.dumps(body | {"stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.split(":")[-1]))) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
            before = engine.num_steps
            connection.sendall(head.encode() + raw)
            wait_until(lambda: health(server)["running"])
        wait_until(lambda: is_idle(server), 10)
        # To the end it would have been 400 or more.
        assert engine.num_steps - before < 300
        assert not engine.has_unfinished_requests() and not server.service.engine.active_generations
        assert engine.pool.num_free == engine.pool.num_blocks


def test_50_clients_that_leave_at_random_moments_leave_nothing_behind(chapter, engine):
    how = leave(chapter, engine, 50, seed=1)
    assert min(how.values()) > 0, how


def test_a_slow_reader_slows_nobody(chapter, engine):
    """One client asks and does not read; others are served while its stream is stuck."""
    with serving(chapter, engine) as server, client_of(server) as client:
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect(("127.0.0.1", int(server.url.split(":")[-1])))
            raw = json.dumps(LONG | {"stream": True, "n": 8, "logprobs": 5, "max_tokens": 100}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
            stuck.sendall(head.encode() + raw)
            wait_until(lambda: health(server)["running"] == 8)
            text = client.completions.create(model="pocket", prompt="Once", max_tokens=5, temperature=0).choices[0].text
            assert len(text) > 5
            # Its tokens are computed and wait for it; its blocks are free for others.
            wait_until(lambda: is_idle(server))
        wait_until(lambda: not server.service.num_active)


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
            asked = dict(model="pocket", prompt="Once upon", max_tokens=9, n=2, stream=stream)
            done = client.completions.create(**asked)
            list(done)
        if stream:
            assert caught.value.body["type"] == "server_error" and caught.value.body["code"] == 500
        else:
            assert isinstance(caught.value, openai.InternalServerError)
        engine.cache.k[torch.isnan(engine.cache.k)] = 0
        wait_until(lambda: is_idle(server))
        assert client.completions.create(model="pocket", prompt="Once", max_tokens=6, temperature=0).choices[0].text == want


def test_a_fault_fails_a_response_with_its_own_events(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server, client_of(server) as client:
        fake.fault = RuntimeError("injected")
        events = list(client.responses.create(model="pocket", input="Hi there", stream=True))
        assert [event.type for event in events[-2:]] == ["error", "response.failed"]
        assert "injected" in events[-1].response.error.message
        fake.fault = RuntimeError("injected")
        with pytest.raises(openai.InternalServerError, match="injected"):
            client.responses.create(model="pocket", input="Hi there")
        assert client.responses.create(model="pocket", input="Hi there", max_output_tokens=2).output_text


def test_requests_that_waited_outlive_a_fault(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer, places=1)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        found = {}

        def ask(name):
            try:
                found[name] = client.completions.create(model="pocket", prompt=[20, 21], max_tokens=2).choices[0].finish_reason
            except openai.InternalServerError:
                found[name] = "failed"

        threads = []
        for name in ("first", "second"):
            threads.append(threading.Thread(target=ask, args=(name,)))
            threads[-1].start()
            wait_until(lambda: len(server.service.engine.active_generations) == len(threads))
        # Only a request that is in can be in the step that fails; the second one's turn comes later.
        fake.fault = RuntimeError("injected")
        fake.gate.set()
        for thread in threads:
            thread.join(10)
        assert found == {"first": "failed", "second": "length"}


def test_when_the_engine_has_stopped_everybody_hears_of_it(chapter, tokenizer, monkeypatch):
    fake = FakeEngine(chapter, tokenizer)
    monkeypatch.setattr(fake, "fail_step", lambda: [])
    with serving(chapter, fake) as server, client_of(server) as client:
        fake.fault = RuntimeError("the last one")
        with pytest.raises(openai.InternalServerError, match="the engine has stopped.*the last one"):
            client.completions.create(model="pocket", prompt=[20, 21])
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            client.completions.create(model="pocket", prompt=[20, 21])
        response = HTTP.get(f"{server.url}/health")
        assert response.status_code == 500 and response.json()["status"] == "dead"


@pytest.mark.parametrize("what", ["encode", "template", "step", "add_request", "decode"])
def test_nothing_slow_runs_on_the_event_loop(chapter, tokenizer, what, monkeypatch):
    """Each is made to wait until /health has answered, which it can only on a loop that is free."""
    answered = threading.Event()
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server, client_of(server) as client:
        waited = []

        def slow(real):
            def wait(*args, **options):
                waited.append(answered.wait(4))
                return real(*args, **options)

            return wait

        own = server.service.engine.tokenizer
        if what == "encode":
            monkeypatch.setattr(type(own), "__call__", slow(type(own).__call__))
        elif what == "template":
            monkeypatch.setattr(own, "apply_chat_template", slow(own.apply_chat_template))
        elif what == "decode":
            monkeypatch.setattr(own, "decode", slow(own.decode))
        else:
            monkeypatch.setattr(fake, what, slow(getattr(fake, what)))
        done = []
        ask = {
            "template": lambda: client.chat.completions.create(model="pocket", messages=CHAT, max_tokens=1),
            "decode": lambda: client.completions.create(model="pocket", prompt=[20, 21], echo=True, max_tokens=1),
        }.get(what, lambda: client.completions.create(model="pocket", prompt="Once", max_tokens=1))
        thread = threading.Thread(target=lambda: done.append(ask()))
        thread.start()
        time.sleep(0.2)
        assert health(server)["status"] == "ok"
        answered.set()
        thread.join(15)
        assert done and waited and all(waited)


# ---- the end


def test_a_response_in_the_background_is_cancelled(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        begun = client.responses.create(model="pocket", input="Hi", background=True)
        assert client.responses.cancel(begun.id).status == "cancelled"
        fake.gate.set()
        wait_until(lambda: is_idle(server) and not server.service.num_active)
        assert client.responses.cancel(begun.id).status == client.responses.retrieve(begun.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            client.responses.create(model="pocket", input="Hi", previous_response_id=begun.id)


def test_a_server_that_drains_ends_what_runs_and_takes_nothing_new(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server, timeout=3) as client:
        found = []
        asked = dict(model="pocket", prompt=[20, 21, 22], max_tokens=3)
        thread = threading.Thread(target=lambda: found.append(client.completions.create(**asked)))
        thread.start()
        wait_until(lambda: health(server)["running"])
        server.handle_exit(signal.SIGTERM, None)
        assert health(server)["status"] == "draining"
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            client.completions.create(**asked)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "5"
        # What was computed may still be fetched.
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            client.responses.retrieve("resp_1")
        fake.gate.set()
        thread.join(10)
        assert found[0].usage.completion_tokens == 3
        wait_until(lambda: server.should_exit)


def test_what_does_not_end_in_time_is_failed(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake, drain_seconds=1) as server, client_of(server) as client:
        found = []

        def ask():
            try:
                list(client.completions.create(model="pocket", prompt=[20, 21, 22], stream=True))
            except openai.APIError as error:
                found.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: health(server)["running"])
        server.handle_exit(signal.SIGTERM, None)
        thread.join(5)
        assert found == ["the server was shut down before this request was done"]
        fake.gate.set()


def test_who_waits_for_the_tokenizer_hears_of_the_end_too(chapter, tokenizer):
    begun, go_on = threading.Event(), threading.Event()
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server:
        own, real = server.service.engine.tokenizer, type(server.service.engine.tokenizer).__call__

        def slow(self, *args, **options):
            begun.set()
            go_on.wait(10)
            return real(self, *args, **options)

        found = []

        def ask():
            found.append(HTTP.post(f"{server.url}/v1/completions", json={"model": "pocket", "prompt": "Once"}, timeout=10))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(own), "__call__", slow)
            # The second's turn never comes.
            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()
            assert begun.wait(5)
            wait_until(lambda: len(server.service.engine.encoding) == 2)
            over = importlib.import_module(f"milestones.{chapter.name}.async_engine").StepFailed("it is over")
            server.service.engine.loop.call_soon_threadsafe(server.service.engine.fail_all, over)
            for thread in threads:
                thread.join(5)
            go_on.set()
        assert [(each.status_code, each.json()["error"]["message"]) for each in found] == [(500, "it is over")] * 2
        ask()
        assert found[-1].json()["error"]["message"] == "it is over"
        assert fake.num_requests == 0


def test_who_gives_up_while_the_tokenizer_works_is_not_told_of_an_end(chapter, tokenizer):
    engine = importlib.import_module(f"milestones.{chapter.name}.async_engine").AsyncEngine(FakeEngine(chapter, tokenizer), 8)

    async def give_up():
        engine.loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.tokenize(lambda tokenizer: time.sleep(0.2)), 0.05)
        assert not engine.encoding

    asyncio.run(give_up())


def start(chapter, *flags):
    """The server as a user starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return Started(f"milestones.{chapter.name}", "serve", "--model", str(POCKET), *flags, cwd=ROOT, env=environment)


@pytest.fixture
def process(chapter, request):
    """A server on a free port, with the line that it prints."""
    drain_seconds = getattr(request, "param", 10)
    process = start(chapter, "--port", "0", "--drain-seconds", str(drain_seconds))
    lines = []
    while not (lines and lines[-1].startswith("  curl ")):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    process.curl = lines[-1]
    process.url = lines[-1].split()[1].removesuffix("/v1/completions")
    yield process
    process.close()


def test_sigterm_lets_streams_end_and_the_process_exits_0(process):
    body = json.loads(process.curl.split("-d '")[1].rstrip().rstrip("'"))
    # What it says is drawn, and could end early.
    answer = HTTP.post(f"{process.url}/v1/completions", json=body | {"ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 32
    with HTTP.stream("POST", f"{process.url}/v1/completions", json=LONG | {"stream": True, "max_tokens": 200}, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: HTTP.get(f"{process.url}/health").json()["status"] == "draining")
        assert HTTP.post(f"{process.url}/v1/completions", json=body).status_code == 503
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
    assert process.wait(10) == 0


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(chapter, capsys):
    command_line = importlib.import_module(f"milestones.{chapter.name}.__main__")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert command_line.main(["serve", "--port", port, "--model", "nowhere"]) == 2
    assert f"127.0.0.1:{port} cannot be listened on: [Errno 98]" in capsys.readouterr().err
    assert command_line.main(["serve", "--host", "a..b", "--model", "nowhere"]) == 2
    assert "a..b:8000 cannot be listened on" in capsys.readouterr().err


def test_of_two_servers_that_begin_together_one_says_why_it_cannot(chapter):
    server_module = importlib.import_module(f"milestones.{chapter.name}.server")
    with server_module.bind("127.0.0.1", 0) as other:
        port = str(other.getsockname()[1])
        process = start(chapter, "--port", port)
        # It has the port, and says so once the model is loaded; before it listens, the other does.
        assert process.stderr.readline().startswith("pocket: ")
        other.listen()
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and told.splitlines()[-1].startswith(f"error: 127.0.0.1:{port} cannot be listened on: "), told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port must be an integer from 0 to 65535, got 70000"),
        (["--max-waiting", "0"], "max_waiting must be an integer from 1 up, got 0"),
        (["--default-max-tokens", "0"], "default_max_tokens must be an integer from 1 up or None, got 0"),
        (["--drain-seconds", "0"], "drain_seconds must be above 0, got 0.0"),
        (["--api-key", ""], "api_key must be ASCII without spaces, and not empty"),
        (["--api-key", "schlüssel"], "api_key must be ASCII without spaces, and not empty"),
        (["--api-key", " key"], "api_key must be ASCII without spaces, and not empty"),
        (["--served-model-name", ""], "served_model_name must be printable, and not empty, got ''"),
        (["--served-model-name", "p\udcff"], "served_model_name must be printable, and not empty, got 'p\\udcff'"),
    ],
)
def test_wrong_flags_are_refused_by_name(chapter, capsys, flags, message):
    command_line = importlib.import_module(f"milestones.{chapter.name}.__main__")
    assert command_line.main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("process", [60], indirect=True)
def test_a_request_that_was_never_sent_to_the_end_holds_nobody_up(process):
    with socket.create_connection(("127.0.0.1", int(process.url.split(":")[-1]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        wait_until(lambda: HTTP.get(f"{process.url}/health").json()["status"] == "ok")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize("process", [3], indirect=True)
def test_a_step_that_outlasts_the_time_to_drain_does_not_keep_the_process(process):
    with httpx.Client(base_url=process.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"model": "pocket", "prompt": [20] * 2000, "n": 32, "max_tokens": 1}, timeout=1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and "terminate called" not in told and "Traceback" not in told, told
    assert time.monotonic() - began < 9


def test_a_second_sigterm_ends_it_at_once(process):
    with HTTP.stream("POST", f"{process.url}/v1/completions", json=LONG | {"stream": True, "n": 16}, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: HTTP.get(f"{process.url}/health").json()["status"] == "draining")
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 1
