"""chapter = last chapter: the same tokens, texts, finish reasons and logprobs on the same seeded workload."""
import pytest

from shared.checkpoints import checkpoint
from shared.workloads import ragged

pytestmark = pytest.mark.needs("generate", "sample", "logprobs", "previous")


def run(chapter, engine):
    """Greedy and sampled requests, with and without logprobs, some of them with a stop token."""
    Params = chapter.load().SamplingParams
    requests = ragged(6, engine.config.vocab_size, prompt_len=(1, 40), output_len=(1, 30), seed=11)
    params = [
        Params(
            max_tokens=request.max_tokens,
            temperature=0.9 * (i % 2),
            top_k=20 * (i % 3),
            top_p=1 - 0.1 * (i % 2),
            seed=i,
            logprobs=None if i == 3 else i,
            ignore_eos=i == 4,
            stop_token_ids=tuple(range(100, 110)) if i == 5 else (),
        )
        for i, request in enumerate(requests)
    ]
    return engine.generate([request.prompt_ids for request in requests], params)


def test_a_chapter_generates_what_the_previous_one_generates(chapter, checkpoint_name, make_engine, measure):
    ours = run(chapter, make_engine(checkpoint_name))
    theirs = run(chapter.previous, chapter.previous.load().Engine(checkpoint(checkpoint_name)))
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for field in ("prompt_ids", "token_ids", "text", "finish_reason", "seed"):
            assert getattr(mine, field) == getattr(other, field), (i, field)
        assert (mine.logprobs is None) == (other.logprobs is None)
        for step, (found, wanted) in enumerate(zip(mine.logprobs or (), other.logprobs or (), strict=True)):
            assert list(found) == list(wanted), (i, step)
            got, want = list(found.values()), list(wanted.values())
            assert measure("logprobs_previous", f"token {step}", got, want, checkpoint_name) <= 1e-4
