"""v03: a forward pass reads every weight, whether it serves one request or sixteen."""
import pytest
import torch

from shared.bench.recorder import record
from shared.checkpoints import checkpoint
from shared.workloads import Request, fixed, ragged, random_ids, staircase

# Five requests for two rows: prompt length, output length.
LENGTHS = [(3, 4), (5, 2), (2, 3), (1, 1), (4, 2)]


def trace_of(chapter, engine, requests):
    trace, _ = record(chapter, engine, requests)
    return trace


def test_requests_that_run_together_take_as_many_steps_as_the_longest(chapter, make_engine):
    engine = make_engine("llama", max_num_seqs=8)
    before = engine.num_steps
    trace = trace_of(chapter, engine, fixed([(9, 7), (2, 11), (5, 3)], 401))
    assert len(trace.passes) == engine.num_steps - before == 11  # the largest of 7, 11 and 3, not their sum


@pytest.mark.until("v04")
def test_a_group_is_one_rectangle_until_the_last_of_it_ends(chapter, make_engine):
    """The requests in each step, and its positions: pads and finished rows are computed too."""
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=2), fixed(LENGTHS, 401))
    assert trace.ledger() == [
        {0: 5, 1: 5},
        {0: 1, 1: 1},
        {0: 1, 1: 1},
        {0: 1, 1: 1},
        {2: 2, 3: 2},
        {2: 1, 3: 1},
        {2: 1, 3: 1},
        {4: 4},
        {4: 1},
    ]
    assert [[part.useful for part in each.parts] for each in trace.passes[:5]] == [[3, 5], [1, 1], [1, 0], [1, 0], [2, 1]]


def test_as_many_run_together_as_max_num_seqs_says(chapter, make_engine):
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=12), fixed([(3, 2)] * 13, 401))
    assert [len(each.parts) for each in trace.passes] == [12, 12, 1, 1]


@pytest.mark.until("v04")
def test_what_is_read_is_a_view_of_the_slab(make_engine, Params):
    engine = make_engine("llama", max_num_seqs=3)
    read, found = engine.cache.read, []
    engine.cache.read = lambda layer_id, batch: found.append((layer_id, *read(layer_id, batch))) or found[-1][1:]
    try:
        engine.generate([[9] * 5, [10] * 7], Params(max_tokens=2, ignore_eos=True))
    finally:
        del engine.cache.read
    for layer_id, k, v in found:
        assert k.data_ptr() == engine.cache.k[layer_id].data_ptr()
        assert v.data_ptr() == engine.cache.v[layer_id].data_ptr()
    assert [k.shape[:2] for _, k, _ in found[::3]] == [(2, 7), (2, 8)]


@pytest.mark.until("v04")
def test_a_request_that_arrives_while_a_group_runs_waits_for_all_of_it(chapter, make_engine):
    """Head-of-line blocking: a row is free from the start, but the new request does not get it."""
    requests = [Request([9, 10], 6), Request([11], 1, arrival_step=1), Request([12], 1, arrival_step=2)]
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=3), requests)
    assert trace.ledger() == [{0: 2}, *[{0: 1}] * 5, {1: 1, 2: 1}]
    assert trace.waits(1) == 5 and trace.waits(2) == 4


@pytest.mark.until("v04")
def test_an_aborted_row_rides_along_and_generates_nothing(chapter, make_engine):
    requests = [Request([9, 10], 5), Request([11], 5, abort_step=2), Request([12], 2)]
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=2), requests)
    assert trace.ledger() == [{0: 2, 1: 2}, *[{0: 1, 1: 1}] * 4, {2: 1}, {2: 1}]
    assert trace.lengths == [(2, 5), (1, 2), (1, 2)]


@pytest.mark.until("v04")
def test_a_group_of_which_all_are_aborted_is_over(chapter, make_engine):
    requests = [Request([9], 9, abort_step=2), Request([10], 9, abort_step=2), Request([11], 1)]
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=2), requests)
    assert trace.ledger() == [{0: 1, 1: 1}, {0: 1, 1: 1}, {2: 1}]


@pytest.mark.whole
@pytest.mark.until("v04")
def test_the_share_of_useful_rows_follows_from_the_lengths(chapter, make_engine):
    """Computed by hand: in each group of eight, every row is held until the longest output has finished."""
    requests = staircase(401)
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=8), requests)
    outputs = [request.max_tokens for request in requests]
    groups = [outputs[first : first + 8] for first in range(0, 32, 8)]
    # While the last group runs, no request waits.
    held = sum(8 * max(group) for group in groups[:3])
    useful = sum(sum(group) for group in groups[:3])
    # In a group's own first step, the next groups wait as well; in the last group's first step, so does that group.
    assert trace.useful_share() == (useful + 8) / (held + 8)
    assert trace.useful_share() < 0.65


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_how_many_run_together_changes_nothing_in_what_they_say(make_engine, Params, limit):
    requests = ragged(7, 401, prompt_len=(1, 30), output_len=(1, 25), seed=3)
    prompts = [request.prompt_ids for request in requests]
    params = [Params(max_tokens=r.max_tokens, temperature=0.8 * (i % 2), seed=i) for i, r in enumerate(requests)]
    assert make_engine("qwen3", max_num_seqs=limit).generate(prompts, params) == make_engine("qwen3").generate(prompts, params)


@pytest.mark.until("v05")
def test_a_slab_takes_the_bytes_that_the_formula_says(chapter, module):
    engine = chapter.load().Engine(checkpoint("mistral"), dtype="bfloat16", max_model_len=77, max_num_seqs=5)
    per_token = module("cache").kv_bytes_per_token(engine.config, engine.dtype)
    assert per_token == 2 * 3 * 3 * 14 * 2  # keys and values, layers, KV heads, head_dim, bytes
    assert engine.cache.k.nbytes + engine.cache.v.nbytes == engine.cache.kv_bytes == 5 * 77 * per_token


@pytest.mark.until("v05")
def test_a_slab_that_no_memory_holds_is_refused(chapter):
    with pytest.raises(ValueError, match="needs .* GiB; lower max_num_seqs or max_model_len"):
        chapter.load().Engine(checkpoint("llama"), max_num_seqs=2**40)


@pytest.mark.until("v05")
@pytest.mark.parametrize("length", [1, 2, 40])
def test_what_other_requests_left_in_the_slab_changes_nothing(make_engine, Params, rng, length):
    """Nor what neighbors have at later positions: 1e30 wherever no request of the batch has written."""
    engine = make_engine("qwen3")
    prompts = [random_ids(n, engine.config.vocab_size, rng) for n in (length, 7, 23)]
    clean = engine.generate(prompts, Params(max_tokens=9, seed=0))
    engine.cache.k.fill_(1e30)
    engine.cache.v.fill_(1e30)
    # The slab then clears nothing, so only the mask keeps the values out.
    engine.cache.num_used = 0
    assert engine.generate(prompts, Params(max_tokens=9, seed=0)) == clean
    engine.cache.k.zero_()
    engine.cache.v.zero_()


@pytest.mark.parametrize("limit", [0, -1, 1.5, "8", None])
def test_max_num_seqs_out_of_range_is_refused(chapter, limit):
    with pytest.raises(ValueError, match="max_num_seqs must be an integer from 1 up, got"):
        chapter.load().Engine(checkpoint("llama"), max_num_seqs=limit)


def test_how_many_run_together_is_said(chapter, capsys):
    chapter.load().Engine(checkpoint("llama"), max_num_seqs=3, dtype=torch.float32)
    assert "max_num_seqs 3" in capsys.readouterr().err


@pytest.mark.until("v04")
def test_what_sees_one_token_at_a_time_is_byte_for_byte_what_it_was(chapter):
    for name in ("layers.py", "model.py", "loader.py", "config.py", "sampling.py", "text.py", "sequence.py"):
        assert (chapter.path / name).read_bytes() == (chapter.previous.path / name).read_bytes(), name
