"""tokens = Hugging Face, batched = alone, decode = one prefill over prompt + output."""
import pytest
import torch

from shared.checkpoints import checkpoint
from shared.verify.reference import TIE, Greedy, reference, settled
from shared.workloads import QUESTIONS, ragged, random_ids

pytestmark = pytest.mark.needs("generate")


def workload(engine, num_requests=5, seed=0):
    """Ragged prompts; the longest together fill most of a small model's positions."""
    return ragged(num_requests, engine.config.vocab_size, prompt_len=(1, 60), output_len=(1, 33), seed=seed)


def assert_same(ours, theirs):
    got, want, tie = settled(ours, theirs)
    assert got == want
    assert not tie, "this workload is committed as one without ties"


def test_greedy_tokens_are_hugging_faces(engine, hf, Params):
    requests = workload(engine)
    outs = engine.generate([r.prompt_ids for r in requests], [Params(max_tokens=r.max_tokens) for r in requests])
    for request, out in zip(requests, outs, strict=True):
        assert_same(out.token_ids, hf.greedy(request.prompt_ids, request.max_tokens))


def test_tokens_after_the_end_token_are_hugging_faces_too(engine, hf, Params, rng):
    prompt_ids = random_ids(7, engine.config.vocab_size, rng)
    [out] = engine.generate([prompt_ids], Params(max_tokens=61, ignore_eos=True))
    assert len(out.token_ids) == 61
    assert_same(out.token_ids, hf.greedy(prompt_ids, 61, ignore_eos=True))


def test_the_trained_model_answers_as_in_hugging_face_and_stops_by_itself(make_engine, module, Params):
    engine, hf = make_engine("pocket"), reference(checkpoint("pocket"))
    for question in QUESTIONS:
        prompt_ids = module("text").encode_chat(engine.tokenizer, [{"role": "user", "content": question}])
        [out] = engine.generate([prompt_ids], Params(max_tokens=160))
        assert out.finish_reason == "stop", question
        assert_same(out.token_ids, hf.greedy(prompt_ids, 160))


def test_a_prompt_may_fill_all_positions_but_one(make_engine, Params, rng):
    engine, hf = make_engine("llama3"), reference(checkpoint("llama3"))
    prompt_ids = random_ids(engine.max_model_len - 1, engine.config.vocab_size, rng)
    [out] = engine.generate([prompt_ids], Params(max_tokens=None))
    assert out.finish_reason == "length"
    assert_same(out.token_ids, hf.greedy(prompt_ids, 1))


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.whole), 0.9])
def test_a_request_does_not_depend_on_its_neighbors(engine, Params, temperature, measure, checkpoint_name):
    sampling = {"temperature": temperature, "top_p": 0.95, "seed": 5, "logprobs": 2}
    requests = workload(engine, seed=1)
    params = [Params(max_tokens=r.max_tokens, **sampling) for r in requests]
    together = engine.generate([r.prompt_ids for r in requests], params)
    for request, param, out in zip(requests, params, together, strict=True):
        [alone] = engine.generate([request.prompt_ids], param)
        for field in ("prompt_ids", "token_ids", "text", "finish_reason", "seed"):
            assert getattr(out, field) == getattr(alone, field), field
        # Sums over other shapes round differently.
        for i, (got, want) in enumerate(zip(out.logprobs, alone.logprobs, strict=True)):
            assert list(got) == list(want), i
            got, want = list(got.values()), list(want.values())
            assert measure("logprobs_alone", f"token {i}", got, want, checkpoint_name) <= 1e-4


def test_logprobs_while_decoding_are_those_of_one_prefill(engine, hf, Params, measure, checkpoint_name):
    for request in workload(engine, num_requests=3, seed=2):
        params = Params(max_tokens=request.max_tokens, logprobs=4, temperature=1.1, top_k=50, seed=9)
        [out] = engine.generate([request.prompt_ids], params)
        logprobs = hf.logprobs(request.prompt_ids + out.token_ids[:-1])[len(request.prompt_ids) - 1 :]  # [T, V]
        assert len(out.logprobs) == len(out.token_ids) == len(logprobs)
        for i, (token_id, found) in enumerate(zip(out.token_ids, out.logprobs, strict=True)):
            assert list(found)[0] == token_id
            # The likeliest four, and the chosen one if it is not among them.
            best = logprobs[i].topk(4).values
            others = sorted(found.values(), reverse=True)[:4]
            got, want = [found[token_id], *others], [logprobs[i, token_id], *best]
            distance = measure("logprobs_float32", f"token {i}", got, torch.tensor(want), checkpoint_name)
            assert distance <= 1e-4
            assert len(found) == 4 + (token_id not in logprobs[i].topk(4).indices)


def test_logprobs_0_reports_the_chosen_token_alone(make_engine, Params):
    [out] = make_engine("llama").generate([[9]], Params(max_tokens=3, logprobs=0))
    assert [list(found) for found in out.logprobs] == [[token_id] for token_id in out.token_ids]


def test_a_tie_is_a_difference_where_the_references_margin_is_small():
    clear, close = 1.0, TIE / 2
    assert settled([5, 6], Greedy([5, 6], [clear, close])) == ([5, 6], [5, 6], False)
    assert settled([5, 7, 8], Greedy([5, 6, 9], [clear, close, clear])) == ([5], [5], True)
    assert settled([5, 7], Greedy([5, 6], [close, clear])) == ([5, 7], [5, 6], False)
