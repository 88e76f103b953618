"""Responses under stress: clients that leave, faults, cancels, the drain."""
import asyncio
import contextlib
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest

from shared.verify.serving import serving, wait_until
from shared.verify.soak_server import is_idle
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP
from tests.support.stressed import client_of, engine, hang_up, tokenizer  # noqa: F401

pytestmark = pytest.mark.needs("responses")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_response(chapter, engine, stream, monkeypatch):
    monkeypatch.setattr(engine, "config", replace(engine.config, end_ids=()))
    hang_up(chapter, engine, "/v1/responses", {"model": "pocket", "input": "Hi", "stream": stream})


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


def test_a_response_in_the_background_is_cancelled(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        begun = client.responses.create(model="pocket", input="Hi", background=True)
        assert client.responses.cancel(begun.id).status == "cancelled"
        wait_until(lambda: not server.service.async_engine.active_generations, 3)
        fake.gate.set()
        wait_until(lambda: is_idle(server) and not server.service.num_active)
        assert client.responses.cancel(begun.id).status == client.responses.retrieve(begun.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            client.responses.create(model="pocket", input="Hi", previous_response_id=begun.id)


def test_what_was_computed_may_be_fetched_from_a_server_that_drains(chapter, tokenizer):
    with serving(chapter, FakeEngine(chapter, tokenizer)) as server, client_of(server) as client:
        done = client.responses.create(model="pocket", input="Hi", max_output_tokens=1)
        # A background response keeps the server from exiting, as a request does.
        server.service.num_active += 1
        server.handle_exit(signal.SIGTERM, None)
        assert client.responses.retrieve(done.id).output_text == done.output_text
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.responses.create(model="pocket", input="Hi")
        server.service.num_active -= 1
        wait_until(lambda: server.should_exit)


def test_a_server_that_drains_waits_for_what_is_in_the_background(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        begun = client.responses.create(model="pocket", input="Hi", background=True, max_output_tokens=2)
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.5)
        assert not server.should_exit
        fake.gate.set()
        run = server.config.app.state.responses.runs[begun.id]
        wait_until(lambda: run.ended)
        time.sleep(0.5)
        assert HTTP.head(f"{server.url}/v1/responses/{begun.id}").status_code == 200
        time.sleep(0.3)
        assert not server.should_exit, "no client has retrieved the answer yet"
        assert client.responses.retrieve(begun.id).status == "incomplete"
        wait_until(lambda: server.should_exit)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_server_that_drains_lets_a_response_in_the_background_be_cancelled(chapter, tokenizer, has_ended):
    """It ends work, and exists nowhere else. If it has ended already, this is how its client learns it."""
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        begun = client.responses.create(model="pocket", input="Hi", background=True, max_output_tokens=2)
        server.handle_exit(signal.SIGTERM, None)
        if has_ended:
            fake.gate.set()
            run = server.config.app.state.responses.runs[begun.id]
            wait_until(lambda: run.ended)
        assert client.responses.cancel(begun.id).status == ("incomplete" if has_ended else "cancelled")
        fake.gate.set()
        wait_until(lambda: server.should_exit)


def test_a_response_whose_id_nobody_has_learned_is_not_kept(chapter, tokenizer):
    """A client with a short timeout would push out everybody else's."""
    fake = FakeEngine(chapter, tokenizer)
    with serving(chapter, fake) as server, client_of(server, timeout=0.5) as client:
        runs = server.config.app.state.responses.runs
        fake.gate.clear()
        with pytest.raises(openai.APITimeoutError):
            client.responses.create(model="pocket", input="Hi")
        wait_until(lambda: not server.service.async_engine.active_generations)
        fake.gate.set()
        wait_until(lambda: is_idle(server) and not server.service.num_active)
        assert not runs
        done = client.responses.create(model="pocket", input="Hi", max_output_tokens=2)
        assert [*runs] == [done.id]
        # Its turns are kept once, in the conversation.
        assert not runs[done.id].body.input


def test_what_a_response_was_created_with_is_repeated(chapter, tokenizer):
    sent = {"prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h", "reasoning": {"effort": "none"}}
    with serving(chapter, FakeEngine(chapter, tokenizer)) as server:
        answer = HTTP.post(f"{server.url}/v1/responses", json={"model": "pocket", "input": "Hi", "max_output_tokens": 1} | sent).json()
    assert answer["prompt_cache_options"] == {"mode": "explicit", "ttl": "30m"} and answer["prompt_cache_retention"] == "24h"
    assert answer["reasoning"]["effort"] == "none"
    openai.types.responses.Response.model_validate(answer, strict=True)


def test_a_response_that_runs_is_not_forgotten(module):
    """No client could retrieve or cancel it otherwise. Once it has finished, it can be deleted."""
    store = module("responses_store").Store(size=2)
    runs = [SimpleNamespace(id=str(i), ended=i == 1) for i in range(5)]
    for run in runs[:4]:
        store.add(run)
    assert list(store.runs) == ["0", "2", "3"]
    runs[0].ended = runs[2].ended = True
    store.add(runs[4])
    assert list(store.runs) == ["3", "4"]


def test_a_bug_in_the_server_is_a_failure_and_no_cancel(chapter, tokenizer, module):
    with serving(chapter, FakeEngine(chapter, tokenizer)) as server, client_of(server) as client:
        asked = dict(model="pocket", input="Hi", max_output_tokens=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module("answers").Answer, "push", lambda *_: 1 / 0)
            begun = client.responses.create(**asked, background=True)
            wait_until(lambda: server.config.app.state.responses.runs[begun.id].ended)
            with pytest.raises(openai.InternalServerError, match="the server has a bug"):
                client.responses.create(**asked)
        # On another connection: after such a fault the server closes the first one.
        with client_of(server) as another:
            failed = another.responses.retrieve(begun.id)
        assert (failed.status, failed.error.message) == ("failed", "the server has a bug; see its log")
        wait_until(lambda: is_idle(server) and not server.service.num_active)


def test_a_shutdown_is_a_503_as_for_every_other_endpoint(chapter, tokenizer, module):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        caught = []

        def ask():
            try:
                client.responses.create(model="pocket", input="Hi")
            except openai.InternalServerError as error:
                caught.append(error.status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        aside = server.service.async_engine
        wait_until(lambda: aside.active_generations)
        aside.loop.call_soon_threadsafe(aside.fail_all, module("async_engine").EngineStopped("over"))
        thread.join(5)
        fake.gate.set()
        assert caught == [503]


def test_a_response_that_runs_is_continued_later(chapter, tokenizer):
    fake = FakeEngine(chapter, tokenizer)
    fake.gate.clear()
    with serving(chapter, fake) as server, client_of(server) as client:
        begun = client.responses.create(model="pocket", input="Hi", background=True, max_output_tokens=1)
        with pytest.raises(openai.BadRequestError, match="wait until it has finished"):
            client.responses.create(model="pocket", input="Hi", previous_response_id=begun.id)
        fake.gate.set()


def test_a_response_whose_stream_never_began_is_cancelled(chapter, module):
    """A generator that never started does not run its `finally`."""
    aborted = []
    body = module("responses_protocol").ResponseRequest(model="pocket", input="Hi")
    service, parts = None, ()
    if "tools" in chapter.capabilities:
        service, parts = SimpleNamespace(family=SimpleNamespace(new_call_id=str)), (module("parts").Parts(),)
    run = module("responses_store").Run(service, None, body, [], 1, *parts)
    run.generation = SimpleNamespace(abort=lambda: aborted.append(1))
    events = module("streaming").Events(run, run.stream())

    async def begin():
        async def receive():
            return {"type": "http.disconnect"}

        async def send(_message):
            raise OSError("the client is gone")

        with contextlib.suppress(Exception):
            await events({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)

    asyncio.run(begin())
    assert run.status == "cancelled" and aborted
