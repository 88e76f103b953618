"""v08: an API that keeps its promises."""
import asyncio
import filecmp
import time
from types import SimpleNamespace

import pytest

from shared.verify.serving import serving
from tests.support.http import HTTP

CHAT = [{"role": "user", "content": "Hello!"}]


@pytest.mark.until("v09")
def test_the_model_and_its_cache_are_the_last_chapters(chapter):
    names = ["attention.py", "backends.py", "cache.py", "config.py", "layers.py", "loader.py", "model.py", "scheduler.py"]
    names += ["kernels/__init__.py", "kernels/paged_attention.py"]
    for name in names:
        assert filecmp.cmp(chapter.path / name, chapter.previous.path / name, shallow=False), name


def test_a_whole_answer_is_put_together_once(module):
    """And not once a token, which would hold up the event loop for longer with each."""
    calls = []

    class Names(module("names").TokenNames):
        def of_completion(self, *args):
            calls.append(len(args[0]))
            return super().of_completion(*args)

    async def generation():
        for i in range(50):
            yield 0, module("outputs").StepOutput(1, i % 3, "x", {i % 3: -1.0}, "length" if i == 49 else None, offset=i)

    completions = module("completions")
    service = SimpleNamespace(names=Names([b"x"] * 3, set()))
    body = module("protocol").CompletionRequest(model="m", prompt="p", logprobs=0)
    answers = [module("answers").Answer(0)]
    prompts = [completions.Prompt([1], "p")]
    writer = completions.CompletionWriter(service, body, generation(), answers, 1, prompts=prompts)
    whole = asyncio.run(writer.whole())
    assert whole.choices[0].text == "x" * 50 and whole.choices[0].logprobs.text_offset == list(range(50))
    assert calls == [50]


def test_without_max_tokens_the_whole_context_is_reserved(chapter, make_engine):
    """64 say hello at once: 8 of 1,024 / 128 blocks run together; those that are given 256 tokens at most are 60."""
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


def test_offsets_are_found_in_one_pass(module, make_engine):
    """To decode all before each token would take minutes for a long prompt, on the event loop."""
    tokenizer = make_engine("pocket").tokenizer
    names = module("names").TokenNames(module("text").vocabulary_bytes(tokenizer), set(tokenizer.all_special_ids))
    text = "日本語 é 🙂 Once"
    ids = tokenizer(text).input_ids
    first = [len(b"".join(names.bytes_of(each) for each in ids[1:i]).decode(errors="ignore")) for i in range(1, len(ids))]
    assert names.offsets(ids) == [0, *first]
    begun = time.thread_time()
    names.offsets(ids * 2000)
    assert time.thread_time() - begun < 1
