"""v07: a server around v06's engine."""
import asyncio
import filecmp
from types import SimpleNamespace

import pytest

from shared.verify.serving import serving
from tests.support.http import HTTP

CHAT = [{"role": "user", "content": "Hello!"}]


@pytest.mark.until("v08")
def test_layers_attention_model_and_kernels_are_the_last_chapters(chapter):
    names = ["attention.py", "backends.py", "config.py", "layers.py", "loader.py", "model.py", "scheduler.py"]
    names += ["kernels/__init__.py", "kernels/paged_attention.py"]
    for name in names:
        assert filecmp.cmp(chapter.path / name, chapter.previous.path / name, shallow=False), name


def test_completions_and_chat_know_nothing_of_responses(chapter):
    found = [
        line.strip()
        for path in chapter.path.glob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("from", "import")) and ".responses" in line.replace("starlette.responses", "")
    ]
    assert found == ["from .responses import router as responses_router"]


@pytest.mark.until("v08")
def test_a_whole_answer_is_put_together_once(module):
    """And not once a token, which would hold up the event loop for longer with each."""
    server, protocol = module("server"), module("protocol")
    calls = []

    class Names(protocol.TokenNames):
        def of_completion(self, *args):
            calls.append(len(args[0]))
            return super().of_completion(*args)

    async def generation():
        for i in range(50):
            yield 0, module("engine").StepOutput(1, i % 3, "x", {i % 3: -1.0}, "length" if i == 49 else None, offset=i)

    service = SimpleNamespace(names=Names([b"x"] * 3, set()))
    body = protocol.CompletionRequest(model="m", prompt="p", logprobs=0)
    answers = [protocol.Answer(0)]
    writer = server.CompletionWriter(service, body, generation(), answers, 1, prompts=[([1], "p")])
    whole = asyncio.run(writer.whole())
    assert whole.choices[0].text == "x" * 50 and whole.choices[0].logprobs.text_offset == list(range(50))
    assert calls == [50]


def test_without_max_tokens_the_whole_context_is_reserved(chapter, make_engine):
    """64 say hello at once: 8 of 1,024 / 128 blocks run together; who is given 256 tokens at the most is one of 60."""
    engine = make_engine("pocket", num_blocks=1024, max_num_seqs=64)
    for default, together in ((None, 8), (256, 60)):
        with serving(chapter, engine, default_max_tokens=default) as server:
            most = []
            schedule = engine.scheduler.schedule

            def counted(schedule=schedule, most=most):
                seqs = schedule()
                most.append(len(seqs))
                return seqs

            engine.scheduler.schedule = counted
            # One call of 64 answers is in the queue as a whole before the next step.
            body = {"model": "pocket", "messages": CHAT, "n": 64, "temperature": 0}
            assert HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
            engine.scheduler.schedule = schedule
            assert max(most) == together
