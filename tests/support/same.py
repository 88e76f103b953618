"""Compare the results of an engine with those of another."""
import pytest


def assert_same(got, want):
    """Everything exact is equal; logprobs differ by no more than float32 rounding in another batch."""
    for mine, its in zip(got, want, strict=True):
        for name in ("prompt_ids", "token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(mine, name) == getattr(its, name), name
        assert_close(mine.logprobs or [], its.logprobs or [])
        assert (mine.prompt_logprobs is None) == (its.prompt_logprobs is None)
        if mine.prompt_logprobs is not None:
            assert mine.prompt_logprobs[0] is None
            assert_close(mine.prompt_logprobs[1:], its.prompt_logprobs[1:])


def assert_close(got, want):
    assert len(got) == len(want)
    for mine, its in zip(got, want):
        assert mine == pytest.approx(its, abs=2e-4)
