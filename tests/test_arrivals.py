"""Batched = alone, in any order of arrival, and with requests aborted at any step."""
import random
from collections import deque

import pytest

from shared.bench.recorder import run
from shared.checkpoints import checkpoint
from shared.workloads import Request, ragged

pytestmark = pytest.mark.needs("generate", "abort")


def random_workload(vocab_size, seed):
    """Requests that arrive at random steps, some of them aborted later; several prompts of equal length."""
    rng = random.Random(seed)
    plain = ragged(9, vocab_size, prompt_len=(1, 12), output_len=(1, 20), last_arrival=25, seed=seed)
    aborts = [request.arrival_step + rng.randint(0, 20) if rng.random() < 0.4 else None for request in plain]
    return [
        Request(request.prompt_ids, request.max_tokens, request.arrival_step, abort_step)
        for request, abort_step in zip(plain, aborts, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.whole) for seed in (1, 2, 3))])
def test_arrivals_and_aborts_change_nothing_for_other_requests(engine, chapter, Params, seed):
    requests = random_workload(engine.config.vocab_size, seed)
    tokens = run(engine, chapter.load(), requests)
    assert any(request.abort_step is not None for request in requests)
    for request, found in zip(requests, tokens, strict=True):
        [alone] = engine.generate([request.prompt_ids], Params(max_tokens=request.max_tokens, ignore_eos=True))
        assert found == alone.token_ids[: len(found)]
        if request.abort_step is None:
            assert len(found) == request.max_tokens
    assert not engine.scheduler.running and not engine.scheduler.waiting


@pytest.mark.whole
@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.needs("max_num_seqs")
def test_arrivals_and_aborts_change_nothing_at_any_limit(make_engine, chapter, Params, limit):
    engine = make_engine("llama", max_num_seqs=limit)
    requests = random_workload(engine.config.vocab_size, seed=10 + limit)
    for request, found in zip(requests, run(engine, chapter.load(), requests), strict=True):
        [alone] = engine.generate([request.prompt_ids], Params(max_tokens=request.max_tokens, ignore_eos=True))
        assert found == alone.token_ids[: len(found)]
        assert request.abort_step is not None or len(found) == request.max_tokens


class Queue(deque):
    """A queue that only shows its head, and counts how often."""

    looks = 0

    def __getitem__(self, index):
        assert index == 0, "the scheduler looks past the head of the queue"
        self.looks += 1
        return super().__getitem__(0)

    def popleft(self):
        self.looks += 1
        return super().popleft()

    def __iter__(self):
        raise AssertionError("somebody goes through the whole queue")

    __contains__ = __iter__


def test_a_step_looks_at_running_requests_and_at_the_head_of_the_queue(chapter, Params):
    """With ten thousand waiting, a step must not cost more than with ten."""
    engine = chapter.load().Engine(checkpoint("llama"))
    for _ in range(10_000):
        engine.add_request([9], Params(max_tokens=2, ignore_eos=True))
    waiting = engine.scheduler.waiting = Queue(engine.scheduler.waiting)
    for _ in range(4):
        before, looks = len(waiting), waiting.looks
        engine.step()
        admitted = before - len(waiting)
        assert waiting.looks - looks <= 2 * admitted + 1
    assert len(waiting) < 10_000
