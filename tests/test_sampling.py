"""Sampling: the filters match transformers', and random numbers are uniform, independent and each request's own."""
import itertools
import random

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shared.checkpoints import checkpoint
from shared.verify.reference import reference
from shared.workloads import random_ids

pytestmark = pytest.mark.needs("sample")

V = 401
# A random number this close to the border between two tokens may fall on either side.
BOUNDARY = 1e-6


def hugging_faces_filters(logits, params):
    """transformers' warpers in transformers' order, one row [V]."""
    scores = logits[None]
    warpers = [TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k:
        warpers.append(TopKLogitsWarper(min(params.top_k, len(logits))))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0]


def settings(Params):
    """All combinations, off and on, at the edges: k of 1, V and above; p tiny, common and almost 1."""
    choices = itertools.product([0.31, 1.0, 1.7], [0, 1, 7, V, V + 9], [1e-9, 1e-6, 0.4, 0.93, 1.0])
    return [Params(temperature=temperature, top_k=top_k, top_p=top_p) for temperature, top_k, top_p in choices]


def test_filters_are_hugging_faces_to_the_bit_in_a_mixed_batch(module, Params):
    params = settings(Params)
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(len(params), V, generator=generator)
    before = logits.clone()
    got = module("sampling").filter_logits(logits, params)
    for row, param in enumerate(params):
        assert torch.equal(got[row], hugging_faces_filters(logits[row], param)), param
    assert torch.equal(logits, before), "the logits are the caller's"


def test_equal_logits_are_kept_or_dropped_together(module, Params):
    """If transformers keeps some of them, depending on its sort, all are kept."""
    params = settings(Params)
    logits = 4 * torch.randn(len(params), V, generator=torch.Generator().manual_seed(0))
    logits[:, :40] = logits[:, 40:80]
    got = module("sampling").filter_logits(logits, params)
    for row, param in enumerate(params):
        kept = hugging_faces_filters(logits[row], param).isfinite()
        want = logits[row] >= logits[row][kept].min()
        assert torch.equal(got[row].isfinite(), want), param


def test_top_p_keeps_the_token_that_crosses_p(module, Params):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = module("sampling").filter_logits(logits, [Params(temperature=1.0, top_p=0.7)]).isfinite()
    assert kept.tolist() == [[True, True, False, False]]


def test_20000_draws_have_hugging_faces_frequencies(Params, module):
    """Chi-square over the likeliest tokens, the rest pooled; at 12 degrees of freedom it exceeds 45 once in 100,000."""
    hf = reference(checkpoint("llama"))
    prompt_ids = random_ids(11, V, random.Random(3))
    params = Params(temperature=1.3, top_k=30, top_p=0.9)
    logits = hf.logits(prompt_ids)[-1]
    probs = hugging_faces_filters(logits, params).softmax(-1)
    counts = torch.zeros(V)
    sampling = module("sampling")
    for first in range(0, 20_000, 500):
        seqs = [sequence(module, prompt_ids, params, seed) for seed in range(first, first + 500)]
        draws = [(seq, len(prompt_ids)) for seq in seqs]
        for token_id in sampling.sample(logits.expand(len(draws), V).clone(), draws).tolist():
            counts[token_id] += 1
    assert (counts[probs == 0] == 0).all(), "a token was drawn that the filters drop"
    likeliest = probs.topk(12).indices
    observed = torch.cat([counts[likeliest], (20_000 - counts[likeliest].sum())[None]])
    expected = 20_000 * torch.cat([probs[likeliest], (1 - probs[likeliest].sum())[None]])
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 45


def sequence(module, prompt_ids, params, seed):
    """A sequence as `sample` sees it: its parameters, its seed, and where its output begins."""
    seq = object.__new__(module("sequence").Sequence)
    seq.params, seq.seed, seq.num_prompt = params, seed, len(prompt_ids)
    seq.token_ids = list(prompt_ids)
    return seq


def test_a_sampled_token_is_where_its_random_number_falls_on_hugging_faces_probabilities(engine, hf, Params, module, checkpoint_name):
    """Decoding and sampling together: every token of a sampled text, from one prefill and one hash."""
    prompt_ids = random_ids(5, engine.config.vocab_size, random.Random(4))
    params = Params(max_tokens=40, temperature=1.2, top_k=100, top_p=0.97, seed=-77)
    [out] = engine.generate([prompt_ids], params)
    logits = hf.logits(prompt_ids + out.token_ids[:-1])[len(prompt_ids) - 1 :]
    for index, token_id in enumerate(out.token_ids):
        reached = hugging_faces_filters(logits[index], params).softmax(-1).double().cumsum(-1)
        number = module("sampling").uniform(-77, index) * reached[-1]
        below = reached[token_id - 1] if token_id else 0.0
        assert below - BOUNDARY <= number <= reached[token_id] + BOUNDARY, f"token {index}"


def test_random_numbers_are_uniform_and_neighbors_independent(module):
    """For (seed, index) on a grid: the mean, the spread, and the correlation with each neighbor.

    For 40,000 independent numbers a correlation has a standard deviation of 0.005: 0.025 is five of them.
    """
    uniform = module("sampling").uniform
    numbers = torch.tensor([[uniform(seed, index) for index in range(200)] for seed in range(200)], dtype=torch.float64)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 40_000) ** 0.5
    assert abs(numbers.var() - 1 / 12) < 0.002
    for a, b in [(numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers[1:, :-1], numbers[:-1, 1:])]:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.025


def test_seed_none_is_fresh_each_time_and_readable(make_engine, Params):
    engine = make_engine("llama")
    params = Params(temperature=1.0, max_tokens=20, ignore_eos=True)
    outs = engine.generate([[9, 8]] * 9, params)
    assert len({out.seed for out in outs}) == 9 and max(out.seed for out in outs) > 2**50
    first, second = outs[:2]
    assert first.token_ids != second.token_ids
    [again] = engine.generate([[9, 8]], Params(temperature=1.0, max_tokens=20, ignore_eos=True, seed=first.seed))
    assert again == first


def test_temperature_0_takes_the_likeliest_whatever_the_filters(make_engine, Params):
    engine = make_engine("llama")
    greedy, filtered = engine.generate([[9, 8], [9, 8]], [Params(), Params(top_k=3, top_p=0.5, seed=1)])
    assert greedy.token_ids == filtered.token_ids


def test_greedy_and_sampled_rows_share_a_batch(module, Params):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    params = [Params(temperature=1.0), Params(), Params(temperature=1.0, top_k=1)]
    draws = [(sequence(module, [1], param, seed=5), 1) for param in params]
    token_ids = module("sampling").sample(logits, draws).tolist()
    assert token_ids[1:] == logits[1:].argmax(-1).tolist()
    alone = module("sampling").sample(logits[:1], draws[:1]).tolist()
    assert token_ids[:1] == alone


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_least_and_the_greatest_random_number_choose_a_token_that_is_left(module, Params, monkeypatch, number):
    """At 0, the first tokens may have been dropped; at the other end, float32 probabilities may sum to less than 1."""
    sampling = module("sampling")
    monkeypatch.setattr(sampling, "uniform", lambda seed, index: number)
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(2))
    logits[:, [0, -1]] = -9.0  # never among the likeliest
    params = Params(temperature=1.0, top_k=100)
    token_ids = sampling.sample(logits, [(sequence(module, [1], params, seed=0), 1)] * 50)
    probs = sampling.filter_logits(logits, [params] * 50).softmax(-1)
    reached = probs.double().cumsum(-1)[:, -1]
    assert reached.min() < 1 - 2**-53, "no row here sums to less than 1"
    assert (probs.gather(1, token_ids[:, None]) > 0).all()


def test_each_row_of_a_batch_reports_as_many_logprobs_as_it_requests(module, Params):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(3))
    Draw = module("batch").Draw
    draws = [Draw(sequence(module, [1], Params(logprobs=count), seed=0), 1) for count in (1, None, 4)]
    found = module("sampling").top_logprobs(logits, draws, [7, 8, 9])
    for row, count in ((0, 1), (2, 4)):
        logprobs = logits[row].log_softmax(-1)
        best = logprobs.topk(count)
        want = {7 + row: logprobs[7 + row].item()} | dict(zip(best.indices.tolist(), best.values.tolist()))
        assert found[row] == want
    assert found[1] is None
