"""v07: a server around v06's engine."""
import asyncio
import filecmp
import pickle
import queue
import threading

import pytest

from shared.verify.serving import serving, wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP


@pytest.mark.until("v08")
def test_model_and_batch_and_text_are_the_last_chapters(chapter):
    names = ["attention.py", "backends.py", "batch.py", "config.py", "layers.py", "loader.py", "model.py", "params.py"]
    names += ["sampling.py", "scheduler.py", "sequence.py", "text.py", "kernels/__init__.py", "kernels/paged_attention.py"]
    for name in names:
        assert filecmp.cmp(chapter.path / name, chapter.previous.path / name, shallow=False), name


class Recorded:
    """An engine loop in a thread, with every message that it sends and receives."""

    def __init__(self, module, engine):
        self.messages, self.stats, self.threads = [], [], []
        self.inbox = queue.SimpleQueue()
        self.loop = module("engine_loop").EngineLoop(engine, self.inbox, self.receive)
        self.thread = threading.Thread(target=self.loop.run, name="engine", daemon=True)

    def receive(self, message, stats):
        self.messages.append(message)
        self.stats.append(stats)
        self.threads.append(threading.current_thread().name)

    def names(self):
        return [type(message).__name__ for message in self.messages]


@pytest.fixture
def fake(chapter, make_engine):
    return FakeEngine(chapter, make_engine("pocket").tokenizer, places=3)


@pytest.fixture
def recorded(module, fake):
    recorded = Recorded(module, fake)
    yield recorded
    recorded.inbox.put(module("engine_loop").Stop())
    recorded.thread.join(5)
    assert not recorded.thread.is_alive()


def test_a_step_is_one_message_for_all_that_run_and_messages_are_plain_data(module, Params, fake, recorded):
    messages = module("engine_loop")
    for call_id in (1, 2, 3):
        recorded.inbox.put(messages.Add(call_id, [([20, 21, 22], Params(max_tokens=2))]))
    recorded.thread.start()
    wait_until(lambda: len(recorded.messages) == 5, 3)
    assert recorded.names() == ["Added"] * 3 + ["Stepped"] * 2
    assert [[call_id for call_id, _, _ in message.outputs] for message in recorded.messages[3:]] == [[1, 2, 3]] * 2
    assert set(recorded.threads) == {"engine"}
    for message, stats in zip(recorded.messages, recorded.stats):
        assert pickle.loads(pickle.dumps((message, stats))) == (message, stats)


def test_a_call_is_added_as_a_whole_or_refused_with_the_engines_own_words(module, Params, fake, recorded):
    messages = module("engine_loop")
    recorded.inbox.put(messages.Add(7, [([20], Params()), ([13], Params())]))
    recorded.thread.start()
    wait_until(lambda: recorded.messages)
    assert recorded.messages == [messages.Refused(7, "prompt has the token 13, which this engine refuses", "prompt", "invalid_value")]
    assert fake.aborted == [1] and not recorded.loop.owners


def test_an_abort_is_answered_and_nothing_of_the_call_follows(module, Params, fake, recorded):
    messages = module("engine_loop")
    fake.gate.clear()
    recorded.inbox.put(messages.Add(1, [([20] * 9, Params(max_tokens=9))]))
    recorded.thread.start()
    wait_until(lambda: recorded.names() == ["Added"])
    recorded.inbox.put(messages.Abort(1))
    recorded.inbox.put(messages.Abort(1))
    fake.gate.set()
    wait_until(lambda: recorded.names().count("Aborted") == 2, 3)
    # The step in progress may still report it.
    assert recorded.names() == ["Added", "Stepped", "Aborted", "Aborted"]
    assert not fake.requests and recorded.stats[-1].running == 0


def test_a_late_token_of_an_aborted_call_reaches_nobody(module, fake):
    """It was computed while the abort was still in the queue."""
    aside, messages = module("async_engine"), module("engine_loop")

    async def run():
        engine = aside.AsyncEngine(module("engine_thread").EngineThread(fake), **({"max_waiting": 8} if hasattr(aside, "QueueFull") else {}))
        engine.loop = asyncio.get_running_loop()
        first = asyncio.create_task(engine.generate([([20], None)]))
        second = asyncio.create_task(engine.generate([([20], None)]))
        await asyncio.sleep(0)
        for call_id in (1, 2):
            engine.receive(messages.Added(call_id), fake.stats())
        generations = [await first, await second]
        generations[0].abort()
        output = fake.StepOutput(1, 20, "x", None, "length")
        engine.receive(messages.Stepped([(1, 0, output), (2, 0, output)]), fake.stats())
        assert [item async for item in generations[1]] == [(0, output)]
        assert generations[0].outputs.empty() and not engine.active_generations
        # The call's id is not reused.
        third = asyncio.create_task(engine.generate([([20], None)]))
        await asyncio.sleep(0)
        assert list(engine.active_generations) == [3]
        third.cancel()

    asyncio.run(run())


def test_a_caller_that_is_cancelled_when_its_call_is_added_leaves_nothing(module, fake):
    aside, messages, told = module("async_engine"), module("engine_loop"), []

    async def run():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: told.append(context))
        engine = aside.AsyncEngine(module("engine_thread").EngineThread(fake), **({"max_waiting": 8} if hasattr(aside, "QueueFull") else {}))
        engine.loop = loop
        caller = asyncio.create_task(engine.generate([([20], None)]))
        await asyncio.sleep(0)
        loop.call_soon(caller.cancel)
        loop.call_soon(engine.receive, messages.Added(1), fake.stats())
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not engine.active_generations
        assert [engine.runner.inbox.get_nowait() for _ in range(2)][1] == messages.Abort(1)

    asyncio.run(run())
    assert not told


@pytest.mark.until("v08")
@pytest.mark.parametrize("name", ["n", "logprobs", "stop", "echo", "messages", "nobodys"])
def test_what_is_not_known_is_refused_by_name(chapter, fake, name):
    with serving(chapter, fake) as server:
        body = {"model": "pocket", "prompt": "Once", "max_tokens": 1}
        assert HTTP.post(f"{server.url}/v1/completions", json=body).status_code == 200
        error = HTTP.post(f"{server.url}/v1/completions", json=body | {name: 1}).json()["error"]
    assert error["param"] == name and error["type"] == "invalid_request_error"
