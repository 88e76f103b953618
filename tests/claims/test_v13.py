"""v13: a step feeds at most max_num_batched_tokens tokens, so a long prompt stops no stream; the output stays the same."""
import json
import random
import socket
import time
from urllib.parse import urlsplit

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.checkpoints import checkpoint
from shared.verify.findable import watch
from shared.verify.product import Result, compare
from shared.verify.serving import serving, wait_until
from shared.verify.soak import audit, soak
from shared.workloads import random_ids
from tests.support.http import HTTP
from tests.support.overflowing import BAD

BS = 4
UNLIMITED = 10**6
WAYS = {"recompute": 0, "swap": 400_000, "swap, often full": 20_000}


@pytest.fixture
def new_engine(chapter):
    """Engines of the test's own. `fed` of each has, by step, the number of tokens that each request was fed."""

    def new_engine(model_dir=None, *, budget=8, max_num_seqs=4, num_blocks=60, block_size=BS, **options):
        options |= {"max_num_batched_tokens": budget, "max_num_seqs": max_num_seqs, "num_blocks": num_blocks}
        engine = chapter.load().Engine(model_dir or checkpoint("llama"), block_size=block_size, **options)
        observe(engine)
        return engine

    return new_engine


def observe(engine):
    """Note what each step feeds. No step may feed more than the budget, or a running request nothing."""
    engine.fed, schedule = [], engine.scheduler.schedule

    def observed():
        seqs = schedule()
        engine.fed.append({seq.seq_id: len(seq.new_ids) for seq in seqs})
        assert seqs == engine.scheduler.running and all(engine.fed[-1].values()), "a running request is fed nothing"
        assert sum(engine.fed[-1].values()) <= engine.scheduler.max_num_batched_tokens, "more than the budget"
        return seqs

    engine.scheduler.schedule = observed


@pytest.fixture
def whole(new_engine, Params):
    """What requests generate one after another, with each prompt fed in one step, and nothing found."""
    engine = new_engine(budget=UNLIMITED, num_blocks=200, enable_prefix_caching=False)

    def whole(prompts, params):
        return [engine.generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]

    return whole


@pytest.fixture
def ids(rng):
    """Random token ids of the random checkpoints' vocabulary."""
    return lambda length: random_ids(length, 401, rng)


def finish(engine, results=None):
    """Step until all requests have finished; what the steps return, by request, added to results."""
    results = {request_id: Result() for request_id in engine.seqs} if results is None else results
    while engine.has_unfinished_requests():
        step(engine, results)
    return results


def step(engine, results):
    for output in engine.step():
        results.setdefault(output.request_id, Result()).add(output)
    audit(engine)


def assert_same(results, alone):
    """Everything exact is equal, logprobs within rounding. prompt_logprobs came once, with the first token."""
    for result, its in zip(results, alone, strict=True):
        compare(result, its)
        if its.prompt_logprobs is not None:
            assert [top is None for top in result.prompt_logprobs] == [True] + [False] * (len(its.prompt_ids) - 1)


def mid_prompt(seq):
    return 0 < seq.num_computed < seq.num_prompt


def sizes(engine, request_id, since=0):
    """What a request was fed in each step in which it ran."""
    return [fed[request_id] for fed in engine.fed[since:] if request_id in fed]


# ---- the output


def workload(seed, num_requests=9):
    """Prompts of 1 to 40 tokens, some with the same beginning, and sampling parameters that use every option."""
    rng = random.Random(seed)
    beginnings = [random_ids(length, 401, rng) for length in (4, 9, 21)]
    requests = []
    for index in range(num_requests):
        prompt = [*(rng.choice(beginnings) if index % 3 else []), *random_ids(rng.randint(1, 19), 401, rng)]
        options = dict(max_tokens=rng.randint(1, 16), temperature=rng.choice((0.0, 1.0)), seed=index, logprobs=2)
        options["prompt_logprobs"] = index % 4 == 1
        options["priority"] = rng.randint(-1, 1)
        options["stop_token_ids"] = tuple(rng.sample(range(8, 401), 20)) if rng.random() < 0.3 else ()
        options["stop"] = tuple(rng.sample("abcdefghijklmnopqrstuvwxyz", 9)) if rng.random() < 0.5 else ()
        requests.append((prompt, options))
    return requests


POOLS = (1, True), (BS, True), (7, False), (16, True)


@pytest.mark.whole
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.whole) for seed in (1, 2))])
def test_every_budget_gives_the_same_output(new_engine, whole, Params, way, seed):
    """One seed tries a third of all budgets from max_num_seqs on in each way, each with one of the block sizes."""
    requests = workload(seed)
    prompts, params = [prompt for prompt, _ in requests], [Params(**options) for _, options in requests]
    want = whole(prompts, params)
    most = max(len(prompt) + options["max_tokens"] for prompt, options in requests)
    engines = [
        new_engine(
            budget=3,
            max_num_seqs=3,
            num_blocks=-(-most // block_size) + number % 2,
            block_size=block_size,
            max_model_len=64,
            reserve_tokens=0,
            swap_bytes=WAYS[way],
            enable_prefix_caching=caching,
        )
        for number, (block_size, caching) in enumerate(POOLS)
    ]
    cut, tried = 0, [*range(3, 43), UNLIMITED][(list(WAYS).index(way) + seed) % 3 :: 3]
    for number, budget in enumerate(tried):
        engine = engines[number % 4]
        engine.scheduler.max_num_batched_tokens = budget
        with watch(engine) as model:
            waiting, results = list(zip(prompts, params)), {}
            while waiting or engine.has_unfinished_requests():
                if waiting and len(engine.fed) % 2:
                    results[engine.add_request(*waiting.pop(0))] = Result()
                step(engine, results)
                cut += any(map(mid_prompt, engine.seqs.values()))
                if model is not None:
                    model.check()
            assert_same(results.values(), want)
        assert engine.pool.num_free == engine.pool.num_blocks and engine.stats().swapped_blocks == 0
    assert cut > 50
    assert sum(engine.stats().preemptions for engine in engines) > 10
    assert sum(engine.stats().cached_tokens for engine in engines) > 50


def test_prompt_logprobs_come_once_however_many_pieces_there_are(new_engine, whole, Params, ids):
    prompt, params = ids(19), Params(max_tokens=2, logprobs=1, prompt_logprobs=True, ignore_eos=True)
    want = whole([prompt], [params])
    engine = new_engine(budget=1, max_num_seqs=1)
    for budget in range(1, 21):
        engine.scheduler.max_num_batched_tokens = budget
        request_id = engine.add_request(prompt, params)
        [seq] = engine.seqs.values()
        results = {request_id: Result()}
        while engine.has_unfinished_requests():
            step(engine, results)
            if mid_prompt(seq):
                # Known up to the token after the piece; the rest is still to come.
                known = [top is not None for top in seq.prompt_logprobs]
                assert known == [False] + [True] * seq.num_computed + [False] * (18 - seq.num_computed)
        assert_same(results.values(), want)


# ---- how many steps


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 9, 10, 18, 19, 20, UNLIMITED])
def test_alone_a_prompt_takes_as_many_steps_as_the_budget_goes_into_it(new_engine, Params, ids, budget):
    engine = new_engine(budget=budget, max_num_seqs=1)
    request_id = engine.add_request(ids(19), Params(max_tokens=2, ignore_eos=True))
    tokens = [len(engine.step()) for _ in range(-(-19 // budget))]
    # Its first token comes with the last piece, and no output before that.
    assert tokens == [0] * (len(tokens) - 1) + [1]
    assert sizes(engine, request_id) == [budget] * (19 // budget) + [19 % budget] * (19 % budget > 0)
    finish(engine)
    assert engine.num_positions == 19 + 1


@pytest.mark.parametrize("priority", [-1, 1], ids=["served first", "served last"])
@pytest.mark.parametrize(("budget", "num_streams"), [(4, 3), (5, 3), (8, 3), (8, 1), (20, 2), (100, 3)])
def test_every_stream_has_a_token_in_every_step(new_engine, Params, ids, budget, num_streams, priority):
    """Beside k streams, a prompt is fed budget - k tokens per step, whatever its rank."""
    engine = new_engine(budget=budget)
    streams = [engine.add_request(ids(1), Params(max_tokens=80, ignore_eos=True)) for _ in range(num_streams)]
    engine.step()
    long = engine.add_request(ids(40), Params(max_tokens=2, ignore_eos=True, priority=priority))
    since, share = len(engine.fed), budget - num_streams
    for _ in range(-(-40 // share) - 1):
        assert sorted(output.request_id for output in engine.step()) == streams
        audit(engine)
    assert sorted(output.request_id for output in engine.step()) == [*streams, long]
    assert sizes(engine, long, since) == [share] * (40 // share) + [40 % share] * (40 % share > 0)
    assert all(fed[request_id] == 1 for fed in engine.fed[since:] for request_id in streams)
    engine.close()


def test_a_last_piece_of_one_token_draws_the_next(new_engine, whole, Params, ids):
    prompt, params = ids(2 * 8 + 1), Params(max_tokens=5, logprobs=2, ignore_eos=True)
    engine = new_engine(budget=8)
    request_id = engine.add_request(prompt, params)
    results = finish(engine)
    assert sizes(engine, request_id) == [8, 8, 1] + [1] * 4
    assert_same(results.values(), whole([prompt], [params]))


def test_a_piece_has_blocks_for_its_own_tokens_and_its_full_ones_can_be_found(new_engine, Params, ids):
    """A piece of 6 ends within a block of 4, the second one at its end."""
    engine = new_engine(budget=6)
    engine.add_request(ids(30), Params(max_tokens=1))
    [seq] = engine.seqs.values()
    held, findable = [], []
    while engine.has_unfinished_requests():
        engine.step()
        held.append(len(seq.block_table))
        engine.scheduler.publish(seq)
        findable.append(len(engine.pool.key_of))
    assert held == [2, 3, 5, 6, 0] and findable == [1, 3, 4, 6, 7]


def test_two_long_prompts_are_fed_in_order_of_rank(new_engine, whole, Params, ids):
    prompts = [ids(20), ids(20)]
    for priorities in ((0, 0), (1, 0)):
        params = [Params(max_tokens=9, logprobs=2, ignore_eos=True, priority=priority) for priority in priorities]
        engine = new_engine()
        request_ids = [engine.add_request(*pair) for pair in zip(prompts, params)]
        results = finish(engine)
        first, second = request_ids if priorities == (0, 0) else request_ids[::-1]
        assert sizes(engine, first) == [8, 8, 4] + [1] * 8
        # In the step of the first one's last piece, four tokens are left.
        assert sizes(engine, second) == [4, 7, 7, 2] + [1] * 8
        assert list(engine.fed[2]) == [first, second]
        assert_same([results[request_id] for request_id in request_ids], whole(prompts, params))


def test_an_urgent_request_starts_once_the_budget_is_not_used_up(new_engine, Params, ids):
    """A known limit: what a running prompt of a later rank takes first is not taken back."""
    for length, sizes_of_low, sizes_of_urgent in ((38, [8, 8, 8, 8, 6], [2, 1]), (40, [8, 8, 8, 8, 8, 1], [3])):
        engine = new_engine()
        low = engine.add_request(ids(length), Params(max_tokens=9, ignore_eos=True, priority=5))
        engine.step()
        urgent = engine.add_request(ids(3), Params(max_tokens=1, priority=-5))
        while urgent in engine.seqs:
            engine.step()
            audit(engine)
        assert sizes(engine, urgent) == sizes_of_urgent
        assert sizes(engine, low)[: len(sizes_of_low)] == sizes_of_low
        engine.close()


def test_a_first_piece_is_admitted_only_if_the_whole_prompt_fits(new_engine, Params, ids):
    """In the fourth and fifth step, there are tokens and blocks for the second prompt's first piece, but not for all of it."""
    engine = new_engine(budget=6, num_blocks=9, reserve_tokens=0)
    first, second = (engine.add_request(ids(length), Params(max_tokens=2, ignore_eos=True)) for length in (19, 20))
    finish(engine)
    assert engine.fed == [{first: 6}] * 3 + [{first: 1}] + [{first: 1}] + [{second: 6}] * 3 + [{second: 2}, {second: 1}]
    assert engine.stats().preemptions == 0


def test_a_preempted_requests_tokens_go_to_the_others(new_engine, Params, ids):
    """In the step in which the long prompt needs the last block, the least important stream is preempted."""
    engine = new_engine(num_blocks=7, reserve_tokens=0)
    first, last = (engine.add_request(ids(3), Params(max_tokens=9, ignore_eos=True, priority=priority)) for priority in (0, 2))
    engine.step()
    long = engine.add_request(ids(6 + 6 + 7), Params(max_tokens=1, priority=1))
    for _ in range(3):
        engine.step()
        audit(engine)
    assert engine.fed[1:] == [{first: 1, long: 6, last: 1}, {first: 1, long: 6, last: 1}, {first: 1, long: 7}]
    assert long not in engine.seqs and engine.stats().preempted == 1
    engine.close()


# ---- preempted, aborted and failed in the middle of a prompt


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("way", ["recompute", "swap"])
def test_a_victim_at_any_step_and_of_any_rank_continues_where_it_was(new_engine, whole, Params, ids, way, caching):
    prompts = [ids(17), ids(2), ids(11)]
    params = [Params(max_tokens=3, logprobs=1, prompt_logprobs=index == 0, ignore_eos=True) for index in range(3)]
    want = whole(prompts, params)
    engine = new_engine(budget=5, swap_bytes=WAYS[way], enable_prefix_caching=caching)
    num_victims = 0
    for num_steps in range(1, 9):
        for position in range(3):
            engine.reset_prefix_cache()
            with watch(engine):
                request_ids, results = [engine.add_request(*pair) for pair in zip(prompts, params)], {}
                for _ in range(num_steps):
                    step(engine, results)
                if position < len(engine.scheduler.running):
                    victim = engine.scheduler.running[position]
                    num_victims += mid_prompt(victim)
                    engine.scheduler.preempt(victim)
                    audit(engine)
                finish(engine, results)
            assert_same([results[request_id] for request_id in request_ids], want)
    assert num_victims >= 6


@pytest.mark.parametrize("way", ["recompute", "swap"])
def test_a_prompt_may_be_preempted_in_the_step_of_its_last_piece(new_engine, whole, Params, ids, way):
    """A more important request takes its blocks and all of its tokens; its two computed blocks are kept, and no others."""
    prompts, params = [ids(14), ids(5)], [Params(max_tokens=2, logprobs=2, ignore_eos=True, priority=priority) for priority in (1, 0)]
    engine = new_engine(num_blocks=4, reserve_tokens=0, swap_bytes=WAYS[way], enable_prefix_caching=False)
    low = engine.add_request(prompts[0], params[0])
    engine.step()
    [seq] = engine.scheduler.running
    high = engine.add_request(prompts[1], params[1])
    results = {low: Result(), high: Result()}
    step(engine, results)
    # Low's last piece of 6 would have left 2.
    assert engine.fed == [{low: 8}, {high: 5}]
    assert (seq.num_computed, len(seq.swap_table)) == ((8, 2) if way == "swap" else (0, 0))
    finish(engine, results)
    assert sizes(engine, low) == ([8, 6, 1] if way == "swap" else [8, 8, 6, 1])
    assert_same(results.values(), whole(prompts, params))


@pytest.mark.parametrize("way", ["recompute", "swap"])
@pytest.mark.parametrize("length", [19, 20])
def test_an_aborted_prompts_full_blocks_are_found_and_are_right(new_engine, whole, Params, ids, way, length):
    """Aborted after each of its pieces, of which some end at the end of a block, and while it is preempted after it."""
    prompt, params = ids(length), Params(max_tokens=2, logprobs=2, ignore_eos=True)
    want = whole([prompt], [params])
    engine = new_engine(budget=6, swap_bytes=WAYS[way])
    for num_steps in range(5):
        for preempted in (False, True)[: 1 + (num_steps > 0)]:
            with watch(engine) as model:
                request_id = engine.add_request(prompt, params)
                for _ in range(num_steps):
                    engine.step()
                if preempted:
                    engine.scheduler.preempt(engine.scheduler.running[0])
                engine.abort_request(request_id)
                audit(engine)
                model.check()
                assert engine.stats().free_blocks == 60 and engine.stats().swapped_blocks == 0
                again = engine.add_request(prompt, params)
                results = finish(engine)
                num_cached = min(6 * num_steps, length - 1) // BS * BS
                assert results[again].num_cached == num_cached
                assert sum(sizes(engine, again)) == length + 1 - num_cached
                assert_same(results.values(), want)


@pytest.mark.parametrize("method", ["forward", "commit"])
def test_a_step_that_fails_in_the_middle_of_a_prompt_leaves_nothing_to_find(new_engine, whole, Params, ids, monkeypatch, method):
    prompt, params = ids(19), Params(max_tokens=3, logprobs=2, ignore_eos=True)
    want = whole([prompt], [params])
    engine = new_engine()
    stream = engine.add_request(ids(2), params)
    failing = engine.add_request(prompt, params)
    waiting = engine.add_request(prompt, params)
    engine.step()
    assert [seq.seq_id for seq in engine.scheduler.running if mid_prompt(seq)] == [failing]

    def fault(*args):
        for seq in engine.scheduler.running:
            engine.cache.k[:, seq.block_table] = 1e4
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(engine.model if method == "forward" else engine, method, fault)
        with pytest.raises(RuntimeError):
            engine.step()
    assert engine.fail_step() == [stream, failing]
    audit(engine)
    assert engine.pool.num_free == 60 and not engine.pool.key_of
    results = finish(engine)
    assert list(results) == [waiting] and results[waiting].num_cached == 0
    assert_same(results.values(), want)


@pytest.mark.parametrize("prompt_logprobs", [False, True])
@pytest.mark.parametrize("place", [0, 7, 13, 18])
def test_nothing_of_a_prompt_that_overflows_stays_to_be_found(new_engine, overflowing, Params, ids, place, prompt_logprobs):
    """It may be noticed only when its last piece draws. Its neighbors, one of them with the same beginning, do not notice."""
    engine = new_engine(overflowing, dtype="float16")
    params = Params(max_tokens=9, ignore_eos=True)
    prompt, other = ids(19), ids(3)
    bad = [*prompt[:place], BAD, *prompt[place + 1 :]]
    want = [new_engine(overflowing, budget=UNLIMITED, dtype="float16").generate([each], params)[0].token_ids for each in (other, prompt)]
    request_ids = [engine.add_request(each, params) for each in (other, prompt)]
    failing = engine.add_request(bad, Params(max_tokens=9, logprobs=1, prompt_logprobs=prompt_logprobs))
    tokens = {request_id: [] for request_id in request_ids}
    reasons = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
            if output.request_id != failing:
                tokens[output.request_id].append(output.token_id)
        audit(engine)
        if failing in reasons:
            found = list(engine.pool.key_of)
            assert torch.isfinite(engine.cache.k[:, found]).all() and torch.isfinite(engine.cache.v[:, found]).all()
    assert reasons == dict.fromkeys(request_ids, "length") | {failing: "error"}
    assert list(tokens.values()) == want
    # A new try computes at least the block in which the number is, and everything after it.
    [done] = engine.generate([bad], params)
    assert (done.finish_reason, done.token_ids) == ("error", []) and done.num_cached <= place // BS * BS
    audit(engine)


# ---- with the prefix cache


def test_a_prompt_that_another_request_computes_in_pieces_is_awaited(new_engine, whole, Params, ids):
    """Until the last piece; then only the tail is left to compute."""
    shared, params = ids(5 * BS), Params(max_tokens=3, logprobs=2, ignore_eos=True)
    prompts = [[*shared, 9], [*shared, 10, 11]]
    engine = new_engine()
    first, second = (engine.add_request(prompt, params) for prompt in prompts)
    results = finish(engine)
    # In the third step, three tokens of the budget are left.
    assert engine.fed == [{first: 8}, {first: 8}, {first: 5}, {first: 1, second: 2}, {first: 1, second: 1}, {second: 1}]
    assert [result.num_cached for result in results.values()] == [0, 5 * BS]
    assert_same(results.values(), whole(prompts, params=[params] * 2))


def test_what_is_left_after_found_blocks_is_computed_in_pieces(new_engine, whole, Params, ids):
    shared, params = ids(3 * BS), Params(max_tokens=2, logprobs=2, ignore_eos=True)
    prompts = [[*shared, 9], [*shared, *ids(18)]]
    engine = new_engine()
    results = [finish(engine, {engine.add_request(prompt, params): Result()}) for prompt in prompts]
    request_id, result = results[1].popitem()
    assert sizes(engine, request_id) == [8, 8, 2, 1] and result.num_cached == 3 * BS
    compare(result, whole(prompts[1:], [params])[0])
    # Nothing of a request for prompt logprobs is found, so all of it is.
    owing = engine.add_request(prompts[1], Params(max_tokens=1, logprobs=0, prompt_logprobs=True))
    assert len(finish(engine)[owing].prompt_logprobs) == 30 and sizes(engine, owing) == [8, 8, 8, 6]


def test_only_computed_pieces_can_be_found(new_engine, whole, Params, ids):
    """A more important request with the same prompt does not wait; it finds what the first piece has filled."""
    prompt, params = ids(19), [Params(max_tokens=3, logprobs=2, ignore_eos=True, priority=priority) for priority in (1, 0)]
    engine = new_engine(budget=10)
    low = engine.add_request(prompt, params[0])
    engine.step()
    high = engine.add_request(prompt, params[1])
    results = finish(engine)
    assert engine.fed[1] == {low: 9, high: 1}
    assert results[high].num_cached == 2 * BS and sum(sizes(engine, high)) == 19 + 2 - 2 * BS
    assert_same([results[low], results[high]], whole([prompt] * 2, params))


# ---- what a step takes


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made while it is entered, and the most rows of logits."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.num_elements, self.num_logits = vocab_size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        # A view, or what is written into, is not new.
        olds = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in olds:
                self.num_elements = max(self.num_elements, each.numel())
                if each.dim() == 2 and each.shape[1] == self.vocab_size:
                    self.num_logits = max(self.num_logits, each.shape[0])
        return made


@pytest.mark.parametrize("prompt_logprobs", [False, True])
def test_a_steps_largest_tensor_grows_with_the_budget_and_not_with_the_prompt(new_engine, Params, ids, prompt_logprobs):
    prompt, params = ids(240), Params(max_tokens=1, logprobs=0, prompt_logprobs=prompt_logprobs)

    def largest(budget):
        engine = new_engine(budget=budget, num_blocks=70)
        with Largest(engine.config.vocab_size) as seen:
            engine.generate([prompt], params)
        return engine.config, seen.num_elements, seen.num_logits

    config, num_elements, num_logits = largest(16)
    # Masks and scores have a number for each query and key; there are at most 240 keys.
    widest = max(config.num_heads * 240, 2 * config.intermediate_size, config.vocab_size)
    assert num_elements <= 16 * widest and num_logits == (16 if prompt_logprobs else 1)
    assert largest(UNLIMITED)[1] > 5 * num_elements
    assert [largest(UNLIMITED)[2], largest(32)[2]] == ([240, 32] if prompt_logprobs else [1, 1])


# ---- refusals, defaults, and the server


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8", [8]])
def test_the_budget_is_an_integer(new_engine, value):
    with pytest.raises(ValueError) as refused:
        new_engine(budget=value, max_num_seqs=1)
    assert str(refused.value) == f"max_num_batched_tokens must be an integer from 1 up or None, got {value!r}"


def test_the_budget_has_a_token_for_each_request(new_engine, module, monkeypatch):
    with pytest.raises(ValueError) as refused:
        new_engine(budget=7, max_num_seqs=8)
    assert str(refused.value) == (
        "max_num_batched_tokens is 7, but each of max_num_seqs = 8 requests needs a token in every step; "
        "raise max_num_batched_tokens or lower max_num_seqs"
    )
    assert new_engine(budget=8, max_num_seqs=8).scheduler.max_num_batched_tokens == 8
    # Two numbers are enough to know it, so no weights are read.
    monkeypatch.setattr(module("engine"), "load_model", None)
    with pytest.raises(ValueError, match="needs a token in every step"):
        new_engine(budget=7, max_num_seqs=8)


def test_by_default_it_depends_on_the_device_and_suffices_for_max_num_seqs(new_engine, module, capsys):
    assert new_engine(budget=None).scheduler.max_num_batched_tokens == 512
    assert ", at most 512 tokens per step, " in capsys.readouterr().err
    assert new_engine(budget=None, max_num_seqs=600).scheduler.max_num_batched_tokens == 600
    choose_budget = module("engine").choose_budget
    assert [choose_budget(None, max_num_seqs, torch.device("cuda")) for max_num_seqs in (64, 3000)] == [2048, 3000]


def test_the_flag_reaches_the_engine(module, capsys):
    main = module("__main__").main
    model = ("--model", str(checkpoint("llama")), "--max-num-seqs", "3", "--max-num-batched-tokens")
    assert main(["generate", "A long enough prompt", "--max-tokens", "2", *model, "5"]) == 0
    assert "at most 5 tokens per step" in capsys.readouterr().err
    for command in (["generate", "A"], ["serve", "--port", "0", "--engine", "thread"]):
        assert main([*command, *model, "2"]) == 2
        assert "max_num_batched_tokens is 2, but each of max_num_seqs = 3 requests" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_the_middle_of_a_prompt_frees_everything(chapter, new_engine, ids, monkeypatch, stream):
    engine = new_engine(checkpoint("pocket"), num_blocks=500)
    correct = engine.step
    # At least two seconds for the whole prompt.
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01) or correct())
    body = json.dumps({"model": "pocket", "prompt": ids(1600), "max_tokens": 5, "stream": stream}).encode()

    def health():
        return HTTP.get(f"{server.url}/health").json()

    with serving(chapter, engine) as server:
        url = urlsplit(server.url)
        with socket.create_connection((url.hostname, url.port)) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: engine.num_positions)
        # It may be asked in the middle of an abort.
        wait_until(lambda: not health()["running"] and health()["free_blocks"] == 500)
        assert health()["waiting"] == 0
        assert 0 < engine.num_positions < 1600
        short = {"model": "pocket", "prompt": "Once", "max_tokens": 2}
        assert HTTP.post(f"{server.url}/v1/completions", json=short).status_code == 200
    audit(engine)


@pytest.mark.whole
@pytest.mark.parametrize("way", ["recompute", pytest.param("swap, often full", marks=pytest.mark.whole)])
def test_a_hundred_requests_in_pieces_leave_nothing_behind(chapter, new_engine, way):
    """With aborts, faults and a budget that the running requests may need for one token each."""
    engine = new_engine(budget=6, max_num_seqs=6, num_blocks=24, reserve_tokens=0, swap_bytes=WAYS[way])
    ended = soak(chapter, engine, num_requests=100, seed=6, fault_share=0.01)
    assert sum(ended.values()) == 100 and ended["abort"] > 2 and ended["error"] > 0
    assert engine.stats().preemptions > 10 and engine.stats().cached_tokens > 0
