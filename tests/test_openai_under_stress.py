"""The server under stress: full queues, calls of many requests, the drain."""
import asyncio
import importlib
import json
import signal
import socket
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest

from shared.verify.serving import serving, wait_until
from shared.verify.soak_server import is_idle
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP
from tests.support.stressed import CHAT, LONG, client_of, engine, hang_up, health, process, tokenizer  # noqa: F401

pytestmark = pytest.mark.needs("openai")


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
            # The first is in a long step; the others have to wait for their turn.
            wait_until(lambda: len(server.service.async_engine.active_generations) == number + 1, 3)
        wait_until(lambda: server.service.async_engine.num_waiting >= 2, 3)
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting, and this call has 1; at most 2 may wait") as caught:
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
        tokenize = server.service.async_engine.tokenize
        monkeypatch.setattr(server.service.async_engine, "tokenize", None)
        for answers, blamed in ((1, "prompt"), (128, "n")):
            with pytest.raises(openai.BadRequestError, match=f"n x prompts is {2000 * answers}, but a call has at most 256") as caught:
                client.completions.create(model="pocket", prompt=["a"] * 2000, n=answers)
            assert caught.value.param == blamed
        # All turns of a chat are one prompt.
        monkeypatch.setattr(server.service.async_engine, "tokenize", tokenize)
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


# ---- clients that leave


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", LONG | {"n": 2}), ("/v1/chat/completions", {"model": "pocket", "messages": CHAT})],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_all_its_requests(chapter, engine, path, body, stream, monkeypatch):
    monkeypatch.setattr(engine, "config", replace(engine.config, end_ids=()))
    hang_up(chapter, engine, path, body | {"stream": stream})


def test_a_slow_reader_of_many_answers_slows_no_other_client(chapter, engine):
    """One client sends a request and does not read; others are served while its stream is stuck."""
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
            # Its tokens are generated and wait for it; its blocks are free for other requests.
            wait_until(lambda: is_idle(server))
        wait_until(lambda: not server.service.num_active)


# ---- faults


def test_a_fault_fails_every_request_of_a_call(chapter, tokenizer):
    """The waiting ones too."""
    fake = FakeEngine(chapter, tokenizer, places=1)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        fake.fault = RuntimeError("injected")
        fake.gate.set()
        with pytest.raises(openai.InternalServerError, match="the step that computed this request failed.*injected"):
            client.completions.create(model="pocket", prompt=[20, 21], n=2)
        wait_until(lambda: is_idle(server))
        assert client.completions.create(model="pocket", prompt=[20], max_tokens=1).choices[0].finish_reason == "length"


@pytest.mark.parametrize("what", ["template", "decode"])
def test_no_template_and_no_decoding_runs_on_the_event_loop(chapter, tokenizer, what, monkeypatch):
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
        if what == "template":
            monkeypatch.setattr(own, "apply_chat_template", slow(own.apply_chat_template))
        else:
            monkeypatch.setattr(own, "decode", slow(own.decode))
        done = []
        ask = {
            "template": lambda: client.chat.completions.create(model="pocket", messages=CHAT, max_tokens=1),
            "decode": lambda: client.completions.create(model="pocket", prompt=[20, 21], echo=True, max_tokens=1),
        }[what]
        thread = threading.Thread(target=lambda: done.append(ask()))
        thread.start()
        time.sleep(0.2)
        assert health(server)["status"] == "ok"
        answered.set()
        thread.join(15)
        assert done and waited and all(waited)


# ---- shutdown


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
        assert [model.id for model in client.models.list()] == ["pocket"]
        fake.gate.set()
        thread.join(10)
        assert found[0].usage.completion_tokens == 3
        wait_until(lambda: server.should_exit)


class Slow:
    """A connection whose client reads slowly, and its transport."""

    def __init__(self):
        self.transport, self.num_unread = self, 70_000

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def shutdown(self) -> None:
        pass


def test_a_drain_waits_for_what_a_client_has_not_read_yet(chapter, tokenizer):
    """It used to end the server with the last tens of kilobytes of an answer in a connection's buffer."""
    with serving(chapter, FakeEngine(chapter, tokenizer)) as server:
        slow = Slow()
        server.handle_exit(signal.SIGTERM, None)
        server.server_state.connections.add(slow)
        time.sleep(0.5)
        assert not server.should_exit
        slow.num_unread = 0
        wait_until(lambda: server.should_exit)
        server.server_state.connections.discard(slow)


def test_a_call_that_cannot_be_sent_is_not_counted_as_waiting(chapter, tokenizer, monkeypatch):
    """A value that is nested too deep to be pickled, say; after enough of them the queue was full forever."""
    with serving(chapter, FakeEngine(chapter, tokenizer)) as server:
        async_engine = server.service.async_engine
        body = {"model": "pocket", "prompt": [20], "max_tokens": 1}

        def send(message):
            raise RecursionError("maximum recursion depth exceeded while pickling an object")

        with monkeypatch.context() as patch:
            patch.setattr(async_engine.runner, "send", send)
            assert HTTP.post(f"{server.url}/v1/completions", json=body).status_code >= 400
        assert not async_engine.unanswered and not async_engine.active_generations
        assert HTTP.post(f"{server.url}/v1/completions", json=body).status_code == 200


def test_what_does_not_end_in_time_is_failed(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake, drain_seconds=5) as server, client_of(server) as client:
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


def test_requests_that_wait_for_the_tokenizer_fail_when_the_server_stops(chapter, tokenizer):
    begun, go_on = threading.Event(), threading.Event()
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server:
        own, real = server.service.async_engine.tokenizer, type(server.service.async_engine.tokenizer).__call__

        def slow(self, *args, **options):
            begun.set()
            go_on.wait(10)
            return real(self, *args, **options)

        found = []

        def ask():
            found.append(HTTP.post(f"{server.url}/v1/completions", json={"model": "pocket", "prompt": "Once"}, timeout=10))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(own), "__call__", slow)
            # The second never gets its turn.
            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()
            assert begun.wait(5)
            wait_until(lambda: len(server.service.async_engine.encoding) == 2)
            over = importlib.import_module(f"milestones.{chapter.name}.async_engine").EngineStopped("it is over")
            server.service.async_engine.loop.call_soon_threadsafe(server.service.async_engine.fail_all, over)
            for thread in threads:
                thread.join(5)
            go_on.set()
        assert [(each.status_code, each.json()["error"]["message"]) for each in found] == [(503, "it is over")] * 2
        ask()
        assert found[-1].json()["error"]["message"] == "it is over"
        assert fake.num_requests == 0


def test_the_tokenizers_queue_has_a_limit_too(chapter, tokenizer):
    go_on = threading.Event()
    with serving(chapter, FakeEngine(chapter, tokenizer), max_waiting=2) as server, client_of(server) as client:
        real = type(tokenizer).__call__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(tokenizer), "__call__", lambda self, *args, **options: go_on.wait(10) and real(self, *args, **options))
            asked = dict(model="pocket", prompt="Once", max_tokens=1)
            threads = [threading.Thread(target=lambda: client.completions.create(**asked)) for _ in range(2)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(server.service.async_engine.encoding) == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests are waiting for the tokenizer; at most 2 may wait"):
                client.completions.create(**asked)
            go_on.set()
            for thread in threads:
                thread.join(5)
        assert client.completions.create(**asked).choices[0].finish_reason == "length"


def test_a_caller_that_gives_up_during_tokenizing_gets_no_shutdown_error(chapter, tokenizer):
    aside, thread = (importlib.import_module(f"milestones.{chapter.name}.{name}") for name in ("async_engine", "engine_thread"))
    engine = aside.AsyncEngine(thread.EngineThread(FakeEngine(chapter, tokenizer)), 8)

    async def give_up():
        engine.loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.tokenize(lambda tokenizer: time.sleep(0.2)), 0.05)
        assert not engine.encoding

    asyncio.run(give_up())


@pytest.mark.parametrize("process", [("--drain-seconds", "10")], indirect=True)
def test_sigterm_lets_streams_end_and_the_process_exits_0(process):
    body = json.loads(process.curl.split("-d '")[1].rstrip().rstrip("'"))
    # Its text is sampled, and could end early.
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-waiting", "0"], "max_waiting must be an integer from 1 up, got 0"),
        (["--default-max-tokens", "0"], "default_max_tokens must be an integer from 1 up or None, got 0"),
        (["--drain-seconds", "4"], "drain_seconds must be at least 5, got 4.0"),
        (["--api-key", ""], "api_key must be non-empty ASCII without spaces"),
        (["--api-key", "schlüssel"], "api_key must be non-empty ASCII without spaces"),
        (["--api-key", " key"], "api_key must be non-empty ASCII without spaces"),
    ],
)
def test_wrong_flags_of_the_api_are_refused_by_name(chapter, capsys, flags, message):
    command_line = importlib.import_module(f"milestones.{chapter.name}.__main__")
    assert command_line.main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("process", [("--drain-seconds", "60")], indirect=True)
def test_a_request_that_is_never_sent_completely_does_not_delay_the_shutdown(process):
    with socket.create_connection(("127.0.0.1", int(process.url.split(":")[-1]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        wait_until(lambda: HTTP.get(f"{process.url}/health").json()["status"] == "ok")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize("process", [("--drain-seconds", "5")], indirect=True)
def test_a_step_longer_than_the_drain_does_not_keep_the_process(process):
    with httpx.Client(base_url=process.url) as client, pytest.raises(httpx.ReadTimeout):
        # Different from the first token on, so that all of them are computed.
        prompts = [[20 + i] * 2000 for i in range(32)]
        client.post("/v1/completions", json={"model": "pocket", "prompt": prompts, "max_tokens": 1}, timeout=1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and "terminate called" not in told and "Traceback" not in told, told
    assert time.monotonic() - began < 11


@pytest.mark.parametrize("process", [("--drain-seconds", "10")], indirect=True)
def test_a_second_sigterm_ends_it_at_once(process):
    with HTTP.stream("POST", f"{process.url}/v1/completions", json=LONG | {"stream": True, "n": 16}, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: HTTP.get(f"{process.url}/health").json()["status"] == "draining")
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 1
