"""v12: a block that is computed once is found by every request that begins with the same tokens, and by no other."""
import random
import time

import pytest
import torch

from shared.checkpoints import checkpoint
from shared.verify.findable import watch
from shared.verify.soak import audit, soak
from shared.workloads import random_ids
from tests.support.overflowing import BAD
from tests.support.same import assert_close, assert_same

BS = 4
WAYS = {"recompute": 0, "swap": 10**7, "swap, often full": 20_000}


@pytest.fixture
def new_engine(chapter):
    """Engines of the test's own, whose caches hold nothing yet."""

    def new_engine(model_dir=None, *, num_blocks=60, block_size=BS, **options):
        return chapter.load().Engine(model_dir or checkpoint("llama"), num_blocks=num_blocks, block_size=block_size, **options)

    return new_engine


@pytest.fixture
def ids(rng):
    """Random token ids of the random checkpoints' vocabulary."""
    return lambda length: random_ids(length, 401, rng)


def added(engine, what):
    """The number of positions that are computed while what() runs, and its result."""
    before = engine.num_positions
    result = what()
    return engine.num_positions - before, result


def finish(engine):
    """Step until all requests have finished; each request's tokens."""
    tokens = {request_id: [] for request_id in engine.seqs}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
        audit(engine)
    return tokens


def running(engine):
    return [seq.seq_id for seq in engine.scheduler.running]


# ---- how much is computed


def chats(ids, num_chats):
    """A system prompt of five blocks, and prompts that begin with it and have different next tokens."""
    system = ids(5 * BS)
    return [[*system, 100 + number, *ids(number % 9)] for number in range(num_chats)]


def test_chats_that_come_one_after_another_compute_their_system_prompt_once(new_engine, Params, ids):
    engine, prompts = new_engine(), chats(ids, 12)
    for number, prompt in enumerate(prompts):
        num_positions, [done] = added(engine, lambda: engine.generate([prompt], Params(max_tokens=3, ignore_eos=True)))
        cached = 5 * BS if number else 0
        assert (num_positions, done.num_cached) == (len(prompt) + 2 - cached, cached)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (sum(map(len, prompts)), 11 * 5 * BS)


def test_chats_that_come_at_once_wait_one_step_for_the_first(new_engine, Params, ids):
    engine, prompts = new_engine(num_blocks=300), chats(ids, 24)
    for prompt in prompts:
        engine.add_request(prompt, Params(max_tokens=3, ignore_eos=True))
    num_positions, outputs = added(engine, engine.step)
    assert (num_positions, [output.request_id for output in outputs]) == (len(prompts[0]), running(engine)[:1])
    num_positions, outputs = added(engine, engine.step)
    assert num_positions == 1 + sum(len(prompt) - 5 * BS for prompt in prompts[1:])
    assert [output.num_cached for output in outputs] == [0] + [5 * BS] * 23
    audit(engine)
    finish(engine)


def test_who_waits_for_a_block_holds_nobody_up(new_engine, Params, ids):
    """With two answers to each question, one question used to begin per step."""
    engine = new_engine(num_blocks=300, max_num_seqs=12)
    for prompt in [ids(3 * BS + 1) for _ in range(10)]:
        for seed in range(2):
            engine.add_request(prompt, Params(max_tokens=9, ignore_eos=True, seed=seed))
    # A place is kept for each second answer, and nobody is preempted for it.
    num_positions, outputs = added(engine, engine.step)
    assert [output.request_id for output in outputs] == [1, 3, 5, 7, 9, 11]
    num_positions, outputs = added(engine, engine.step)
    assert [output.request_id for output in outputs] == list(range(1, 13)) and num_positions == 6 + 6
    finish(engine)
    assert engine.num_steps <= 20 and engine.stats().preemptions == 0
    audit(engine)


def test_who_waits_for_a_block_keeps_the_blocks_that_it_will_need(new_engine, Params, ids):
    """Of 12 blocks, two requests with one beginning need 3 + 3; another takes 4 of the rest, and a fourth has to wait."""
    engine = new_engine(num_blocks=12, reserve_tokens=0)
    shared, params = ids(2 * BS), Params(max_tokens=2, ignore_eos=True)
    for prompt in (shared + ids(1), shared + ids(1), ids(4 * BS), ids(4 * BS)):
        engine.add_request(prompt, params)
    assert [output.request_id for output in engine.step()] == [1, 3]
    assert 2 in [output.request_id for output in engine.step()]
    finish(engine)
    assert engine.stats().preemptions == 0


def test_no_more_wait_for_a_block_than_there_are_places(new_engine, Params, ids):
    """Each one that waits is looked at in every step."""
    engine, prompt = new_engine(max_num_seqs=3), ids(9)
    for _ in range(40):
        engine.add_request(prompt, Params(max_tokens=2, ignore_eos=True))
    looked_at = []
    find = engine.scheduler.find
    engine.scheduler.find = lambda seq: looked_at.append(seq.seq_id) or find(seq)
    assert [output.request_id for output in engine.step()] == [1] and looked_at == [1, 2, 3]
    assert [output.request_id for output in engine.step()] == [1, 2, 3]
    finish(engine)


def test_nor_do_more_wait_if_one_that_waits_is_more_important_than_one_that_runs(new_engine, Params, ids):
    """The one that runs is ahead of all that come later, and is counted beside those that wait."""
    engine, prompt = new_engine(max_num_seqs=2), ids(9)
    engine.add_request(ids(5), Params(max_tokens=20, ignore_eos=True, priority=5))
    engine.step()
    for priority in (0, 1, *[9] * 20):
        engine.add_request(prompt, Params(max_tokens=2, ignore_eos=True, priority=priority))
    engine.step()
    assert [seq.seq_id for seq in engine.scheduler.passed] == [3]
    finish(engine)


def test_a_place_for_one_that_waits_is_taken_from_a_later_one(new_engine, Params, ids):
    engine, prompt = new_engine(max_num_seqs=3), ids(9)
    for _ in range(2):
        engine.add_request(ids(5), Params(max_tokens=9, ignore_eos=True, priority=1))
    engine.step()
    for each in (prompt, prompt, ids(5)):
        engine.add_request(each, Params(max_tokens=9, ignore_eos=True))
    assert [output.request_id for output in engine.step()] == [3, 5] and engine.stats().preemptions == 2
    assert [output.request_id for output in engine.step()] == [3, 4, 5]
    finish(engine)


def test_blocks_that_are_found_take_room_beside_those_ahead(new_engine, Params, ids):
    """Of 12 blocks, 5 belong to a request ahead; one that needs 8 waits, although it would find 3, and nobody goes for it."""
    engine, prompt = new_engine(num_blocks=12, reserve_tokens=0), ids(30)
    engine.generate([prompt[:12]], Params(max_tokens=1))
    ahead = engine.add_request(ids(18), Params(max_tokens=3, ignore_eos=True))
    later = engine.add_request(ids(6), Params(max_tokens=3, ignore_eos=True, priority=2))
    engine.step()
    engine.add_request(prompt, Params(max_tokens=1, priority=1))
    assert [output.request_id for output in engine.step()] == [ahead, later] and engine.stats().preemptions == 0
    finish(engine)


def test_a_conversation_computes_each_turn_once(new_engine, Params, ids):
    """The answers too: they are part of the next prompt."""
    engine, history, computed = new_engine(), [], 0
    for turn in range(8):
        history += ids(3 + turn)
        num_positions, [done] = added(engine, lambda: engine.generate([history], Params(max_tokens=5, ignore_eos=True)))
        cached = computed // BS * BS
        assert (num_positions, done.num_cached) == (len(history) + 4 - cached, cached)
        history += done.token_ids
        computed = len(history) - 1  # the last token of an answer is not fed


def test_n_answers_share_their_prompt(new_engine, Params, ids):
    engine, prompt = new_engine(), ids(5 * BS + 1)
    for seed in range(6):
        engine.add_request(prompt, Params(max_tokens=4, temperature=1.0, seed=seed, ignore_eos=True))
    assert [added(engine, engine.step)[0] for _ in range(2)] == [5 * BS + 1, 1 + 5]
    # five blocks that all hold, and one for each
    assert engine.stats().free_blocks == 60 - 5 - 6
    assert len({tuple(tokens) for tokens in finish(engine).values()}) > 1


def test_random_prompts_compute_everything(new_engine, Params, ids):
    engine, prompts = new_engine(num_blocks=100), [ids(length) for length in (1, 3, 4, 5, 9, 16, 33)]
    for _ in range(2):
        num_positions, done = added(engine, lambda: engine.generate(prompts, Params(max_tokens=3, ignore_eos=True)))
        assert num_positions == sum(len(prompt) + 2 for prompt in prompts)
        assert [each.num_cached for each in done] == [0] * 7
        prompts = [ids(len(prompt)) for prompt in prompts]


@pytest.mark.parametrize("num_full", [1, 2, 5])
def test_a_prompt_that_is_cached_whole_computes_its_last_block(new_engine, Params, ids, num_full):
    """At least one token must be fed, or there is nothing to draw the next one from."""
    engine, prompt = new_engine(), ids(num_full * BS)
    params = Params(max_tokens=1, logprobs=2)
    [first] = engine.generate([prompt], params)
    for _ in range(2):
        num_positions, [again] = added(engine, lambda: engine.generate([prompt], params))
        assert (num_positions, again.num_cached) == (BS, (num_full - 1) * BS)
        assert again.token_ids == first.token_ids
        assert again.logprobs[0] == pytest.approx(first.logprobs[0], abs=2e-4)
    # One token more, and all of its blocks are found.
    assert added(engine, lambda: engine.generate([[*prompt, 9]], params))[0] == 1


def test_only_what_is_computed_is_found(new_engine, Params, ids):
    """A block that is full of tokens of which the last one has not been fed cannot be found."""
    engine, prompt = new_engine(), ids(2)
    [first] = engine.generate([prompt], Params(max_tokens=2, ignore_eos=True))
    # Four tokens are known, three of them computed.
    [second] = engine.generate([[*prompt, *first.token_ids, 9]], Params(max_tokens=1))
    assert second.num_cached == 0


def test_each_block_is_hashed_once_per_request(new_engine, Params, module, monkeypatch, ids):
    """However long it waits: here, one request runs at a time, and is preempted twice."""
    calls = []
    monkeypatch.setattr(module("sequence"), "block_key", lambda *args: calls.append(1) or module("prefix").block_key(*args))
    engine = new_engine(max_num_seqs=1)
    prompts = [*chats(ids, 6), ids(3), ids(17)]
    for prompt in prompts:
        engine.add_request(prompt, Params(max_tokens=9, ignore_eos=True))
    for _ in range(4):
        engine.step()
        if engine.num_steps % 2:
            engine.scheduler.preempt(engine.scheduler.running[-1])
    finish(engine)
    assert len(calls) == sum((len(prompt) + 8) // BS for prompt in prompts)
    new_engine(enable_prefix_caching=False).generate(prompts, Params(max_tokens=9, ignore_eos=True))
    assert len(calls) == sum((len(prompt) + 8) // BS for prompt in prompts)


def test_many_long_prompts_that_share_nothing_are_not_compared_block_by_block(new_engine, Params, module, monkeypatch):
    """A key fixes its block's number, so one block of each request ahead can be the same."""
    engine, rng = new_engine(num_blocks=500, max_num_seqs=20), random.Random(0)
    for _ in range(20):
        engine.add_request(random_ids(20 * BS, 401, rng), Params(max_tokens=1))
    calls, block_key = [], module("sequence").Sequence.block_key
    monkeypatch.setattr(module("sequence").Sequence, "block_key", lambda *args: calls.append(1) or block_key(*args))
    engine.scheduler.schedule()
    assert len(engine.scheduler.running) >= 2 and len(calls) <= 20 * 20


# ---- with and without it, the output is the same


def workload(seed, num_requests=16):
    """Prompts with shared beginnings, and sampling parameters that use every option."""
    rng = random.Random(seed)
    beginnings = [random_ids(length, 401, rng) for length in (4, 9, 16, 21)]
    requests = []
    for index in range(num_requests):
        prompt = [*rng.choice(beginnings), *random_ids(rng.randint(0, 7), 401, rng)]
        options = dict(max_tokens=rng.randint(1, 20), temperature=rng.choice((0.0, 1.0)), seed=index, logprobs=2)
        options["prompt_logprobs"] = rng.random() < 0.3
        options["priority"] = rng.randint(-1, 1)
        options["stop_token_ids"] = tuple(rng.sample(range(8, 401), 20)) if rng.random() < 0.3 else ()
        options["stop"] = tuple(rng.sample("abcdefghijklmnopqrstuvwxyz", 9)) if rng.random() < 0.5 else ()
        options["cache_salt"] = rng.choice((None, None, "salt"))
        requests.append((prompt, options))
    return requests


@pytest.mark.whole
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.whole)])
def test_every_field_is_the_same_with_and_without_it(new_engine, make_engine, Params, seed, way):
    requests = workload(seed)
    prompts, params = [prompt for prompt, _ in requests], [Params(**options) for _, options in requests]
    want = make_engine("llama", enable_prefix_caching=False).generate(prompts, params)
    assert {type(done.stop_reason) for done in want} == {type(None), int, str}
    cached = preempted = 0
    for block_size, num_positions in ((1, 52), (BS, 52), (7, 140), (16, 320)):
        engine = new_engine(
            num_blocks=-(-num_positions // block_size), block_size=block_size, max_num_seqs=6, reserve_tokens=0, swap_bytes=WAYS[way]
        )
        # Whatever a request takes is compared with a search through all blocks. Cold, then warm and in another order.
        with watch(engine):
            assert_same(engine.generate(prompts, params), want)
            audit(engine)
            assert_same(engine.generate(prompts[::-1], params[::-1]), want[::-1])
            audit(engine)
        assert engine.pool.num_free == engine.pool.num_blocks and engine.stats().swapped_blocks == 0
        cached += engine.stats().cached_tokens
        preempted += engine.stats().preemptions
    assert cached > 200 and preempted > 10


def test_switched_off_nothing_is_found_and_nothing_waits(new_engine, Params, ids):
    engine, prompts = new_engine(enable_prefix_caching=False), [ids(9)] * 3
    for prompt in prompts:
        engine.add_request(prompt, Params(max_tokens=3, ignore_eos=True))
    assert added(engine, engine.step)[0] == 27
    assert not engine.pool.key_of
    finish(engine)
    num_positions, [done] = added(engine, lambda: engine.generate(prompts[:1], Params(max_tokens=1)))
    assert (num_positions, done.num_cached, engine.stats().cached_tokens) == (9, 0, 0)


# ---- prompt_logprobs


def test_a_request_for_prompt_logprobs_takes_nothing_and_gives_everything(new_engine, Params, ids):
    engine, prompt = new_engine(), ids(17)
    engine.generate([prompt], Params(max_tokens=1))
    params = Params(max_tokens=2, logprobs=1, prompt_logprobs=True, ignore_eos=True)
    num_positions, got = added(engine, lambda: engine.generate([prompt], params))
    assert (num_positions, got[0].num_cached) == (18, 0)
    assert_same(got, new_engine(enable_prefix_caching=False).generate([prompt], params))
    fresh = new_engine()
    fresh.generate([prompt], params)
    assert added(fresh, lambda: fresh.generate([prompt], Params(max_tokens=1)))[0] == 1


def test_once_they_are_reported_a_preempted_request_may_use_its_blocks(new_engine, Params, ids):
    engine, prompt = new_engine(), ids(17)
    params = Params(max_tokens=6, logprobs=1, prompt_logprobs=True, ignore_eos=True)
    [want] = engine.generate([prompt], params)
    engine.reset_prefix_cache()
    engine.add_request(prompt, params)
    first = engine.step()
    assert_close(first[0].prompt_logprobs[1:], want.prompt_logprobs[1:])
    engine.scheduler.preempt(engine.scheduler.running[0])
    num_positions, second = added(engine, engine.step)
    assert num_positions == 18 - 4 * BS and second[0].prompt_logprobs is None
    [tokens] = finish(engine).values()
    assert [first[0].token_id, second[0].token_id, *tokens] == want.token_ids


# ---- with preemption


def test_a_preempted_request_finds_its_own_blocks_and_counts_none_of_them(new_engine, Params, ids):
    engine, system = new_engine(), ids(2 * BS)
    engine.generate([[*system, 9]], Params(max_tokens=1))
    stats = engine.stats()
    prompt = [*system, *ids(6)]
    [want] = new_engine(enable_prefix_caching=False).generate([prompt], Params(max_tokens=9, ignore_eos=True))
    engine.add_request(prompt, Params(max_tokens=9, ignore_eos=True))
    outputs = [output for _ in range(3) for output in engine.step()]
    # 16 positions are computed. The seventeenth token is the one that it feeds next.
    engine.scheduler.preempt(engine.scheduler.running[0])
    num_positions, again = added(engine, engine.step)
    assert num_positions == 1
    while engine.has_unfinished_requests():
        again += engine.step()
    assert [output.token_id for output in outputs + again] == want.token_ids
    assert {output.num_cached for output in outputs + again} == {2 * BS}
    assert (engine.stats().prompt_tokens, engine.stats().cached_tokens) == (stats.prompt_tokens + 14, stats.cached_tokens + 2 * BS)


@pytest.mark.parametrize("way", ["recompute", "swap"])
def test_shared_blocks_survive_the_preemption_of_one_owner(new_engine, Params, ids, way):
    engine, prompt = new_engine(swap_bytes=WAYS[way]), ids(2 * BS + 1)
    params = [Params(max_tokens=6, temperature=1.0, seed=seed, ignore_eos=True) for seed in (3, 4)]
    want = [new_engine(enable_prefix_caching=False).generate([prompt], each)[0].token_ids for each in params]
    first, second = (engine.add_request(prompt, each) for each in params)
    tokens = {first: [], second: []}

    def step():
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
        audit(engine)

    step()
    step()
    assert engine.scheduler.running[0].block_table[:2] == engine.scheduler.running[1].block_table[:2]
    engine.scheduler.preempt(engine.scheduler.running[1])
    assert engine.stats().free_blocks == 60 - 3 and engine.stats().swapped_blocks == (3 if way == "swap" else 0)
    audit(engine)
    engine.scheduler.max_num_seqs = 1
    while first in engine.seqs:
        step()
    # Whatever can be overwritten is overwritten before it continues.
    poison = [block_id for block_id in range(60) if block_id not in engine.pool.key_of]
    engine.cache.k[:, poison] = 1e4
    num_positions, _ = added(engine, lambda: [step() for _ in range(5)])
    assert num_positions == (5 if way == "swap" else 5 + 9 - 2 * BS)
    assert [tokens[first], tokens[second]] == want


def test_what_was_swapped_out_and_can_be_found_is_shared_again_and_not_copied(new_engine, Params, ids):
    engine, prompt = new_engine(swap_bytes=WAYS["swap"]), ids(2 * BS + 1)
    params = [Params(max_tokens=8, temperature=1.0, seed=seed, ignore_eos=True) for seed in (3, 4)]
    want = [new_engine(enable_prefix_caching=False).generate([prompt], each)[0].token_ids for each in params]
    tokens = {engine.add_request(prompt, each): [] for each in params}

    def step():
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
        audit(engine)

    step()
    step()
    one, other = engine.scheduler.running
    num_free = engine.pool.num_free
    engine.scheduler.preempt(other)
    # The copies of what both hold are of no use, so they may as well be wrong; the third block's copy is what is left of it.
    engine.swap.k[:, list(other.swap_table[:2])] = float("nan")
    unused = [block_id for block_id in range(60) if block_id not in one.block_table]
    engine.cache.k[:, unused] = engine.cache.v[:, unused] = 1e4
    step()
    assert other.block_table[:2] == one.block_table[:2] and other.block_table[2] != one.block_table[2]
    assert engine.pool.num_free == num_free and engine.stats().swapped_blocks == 0
    while engine.seqs:
        step()
    assert list(tokens.values()) == want


def test_what_was_swapped_out_does_not_wait_for_another_request_to_compute_it(new_engine, Params, ids):
    engine, prompt = new_engine(swap_bytes=WAYS["swap"]), ids(2 * BS + 1)
    swapped_id = engine.add_request(prompt, Params(max_tokens=8, ignore_eos=True, priority=1))
    engine.step()
    [seq] = engine.scheduler.running
    engine.scheduler.preempt(seq)
    engine.pool.forget(range(60))
    engine.add_request(prompt, Params(max_tokens=8, ignore_eos=True))
    assert swapped_id in [output.request_id for output in engine.step()]


# ---- owners, and the order in which blocks are overwritten


@pytest.fixture
def pool(module):
    return module("cache").BlockPool(num_blocks=8, block_size=BS)


def test_what_was_freed_first_is_overwritten_first_and_a_tail_before_its_head(pool):
    early, late = pool.allocate(3), pool.allocate(3)
    for block_id in (*early, *late):
        pool.publish(block_id, b"%d" % block_id)
    pool.free(early)
    pool.free(late)
    # Blocks 6 and 7 were never used.
    assert pool.allocate(8) == [6, 7, *early[::-1], *late[::-1]]
    assert not pool.key_of and not pool.blocks_of


def test_blocks_that_cannot_be_found_are_overwritten_first(pool):
    full, rest = pool.allocate(2), pool.allocate(6)
    for block_id in full:
        pool.publish(block_id, b"%d" % block_id)
    pool.free(full)
    pool.free(rest)
    assert sorted(pool.allocate(6)) == rest
    assert pool.find([b"0", b"1"]) == full


def test_a_block_is_free_when_its_last_owner_has_freed_it(pool):
    table = pool.allocate(2)
    pool.publish(table[0], b"key")
    pool.share(table[:1])
    pool.free(table)
    assert table[0] not in pool.free_ids and table[1] in pool.free_ids
    pool.free(table[:1])
    assert pool.num_free == 8
    # A free block has no owner until it is shared again.
    pool.share(pool.find([b"key"]))
    assert pool.num_free == 7 and pool.num_owners[table[0]] == 1


def test_a_second_block_with_the_same_key_is_found_once_the_first_is_overwritten(pool):
    table = pool.allocate(2)
    for block_id in table:
        pool.publish(block_id, b"key")
    pool.free(table[:1])
    assert pool.find([b"key"]) == table[:1]
    assert table[0] in pool.allocate(7)
    assert pool.find([b"key"]) == table[1:]
    pool.forget(table)
    assert pool.find([b"key"]) == [] and not pool.blocks_of


def test_forgetting_many_copies_takes_a_moment(module):
    """It used to take the square of their number: 15 s for these."""
    pool = module("cache").BlockPool(40_000, BS)
    for block_id in reversed(pool.allocate(40_000)):
        pool.publish(block_id, b"key")
    begun = time.monotonic()
    pool.forget(range(40_000))
    assert time.monotonic() - begun < 2 and not pool.key_of and not pool.blocks_of


def test_the_conversation_that_was_used_last_is_kept(new_engine, Params, ids):
    """And of the one that must go, the end goes first."""
    engine, params = new_engine(num_blocks=12), Params(max_tokens=1)
    old, recent = ids(4 * BS + 1), ids(4 * BS + 1)
    for prompt in (old, recent):
        engine.generate([prompt], params)
    # Four blocks of each can be found, and four others are free. Six are needed.
    engine.generate([ids(5 * BS + 1)], params)
    assert [engine.generate([prompt], params)[0].num_cached for prompt in (recent, old)] == [4 * BS, 2 * BS]


def test_a_block_that_is_found_is_not_overwritten_in_the_same_step(new_engine, Params, ids):
    """Six blocks: two hold the beginning of the new prompt, and are the next to be overwritten but two."""
    engine, params = new_engine(num_blocks=6), Params(max_tokens=1, logprobs=2)
    first = ids(2 * BS + 1)
    for prompt in (first, ids(2 * BS + 1)):
        engine.generate([prompt], params)
    assert list(engine.pool.free_ids)[2:4] == [1, 0]
    prompt = [*first, *ids(11)]
    [done] = got = engine.generate([prompt], params)
    assert done.num_cached == 2 * BS
    assert_same(got, new_engine(enable_prefix_caching=False).generate([prompt], params))


def test_a_block_with_two_owners_outlives_the_first(new_engine, Params, ids):
    engine, prompt = new_engine(num_blocks=12), ids(2 * BS + 1)
    long, short = (engine.add_request(prompt, Params(max_tokens=n, ignore_eos=True)) for n in (9, 2))
    outputs = [output for _ in range(2) for output in engine.step()]
    table = engine.scheduler.running[0].block_table
    assert [engine.pool.num_owners[block_id] for block_id in table] == [2, 2, 1]
    outputs += engine.step()
    assert running(engine) == [long]
    assert [engine.pool.num_owners[block_id] for block_id in table] == [1, 1, 1]
    # Another request fills everything that is free.
    engine.add_request(ids(7 * BS), Params(max_tokens=1))
    tokens = finish(engine)[long]
    [want] = new_engine(enable_prefix_caching=False).generate([prompt], Params(max_tokens=9, ignore_eos=True))
    assert [output.token_id for output in outputs if output.request_id == long] + tokens == want.token_ids


def test_shared_blocks_count_once_when_requests_are_admitted(new_engine, Params, ids):
    """32 chats in 74 blocks of which they need 12 each."""
    system = ids(10 * BS)
    prompts = [[*system, 100 + number, *ids(3)] for number in range(32)]
    params = Params(max_tokens=5, ignore_eos=True)
    engine = new_engine(num_blocks=10 + 32 * 2)
    request_ids = [engine.add_request(prompt, params) for prompt in prompts]
    engine.step()
    engine.step()
    assert running(engine) == request_ids
    audit(engine)
    finish(engine)
    assert engine.stats().preemptions == 0
    want = new_engine(num_blocks=400, enable_prefix_caching=False).generate(prompts, params)
    assert_same(engine.generate(prompts, params), want)


# ---- waiting for a block


def test_a_request_that_waits_holds_up_no_other(new_engine, Params, ids):
    engine, prompt = new_engine(), ids(9)
    params = Params(max_tokens=30, ignore_eos=True)
    before = engine.add_request(ids(5), params)
    engine.step()
    first, same, other = (engine.add_request(each, params) for each in (prompt, prompt, ids(5)))
    assert [output.request_id for output in engine.step()] == [before, first, other]
    assert [output.request_id for output in engine.step()] == [before, first, same, other]
    engine.close()


def test_the_less_important_of_two_requests_waits(new_engine, Params, ids):
    engine, prompt = new_engine(), ids(9)
    low = engine.add_request(prompt, Params(max_tokens=9, priority=1))
    high = engine.add_request(prompt, Params(max_tokens=9))
    assert [output.request_id for output in engine.step()] == [high]
    assert [output.request_id for output in engine.step()] == [high, low]
    engine.close()


def test_none_waits_for_what_another_request_generates(new_engine, Params, ids):
    """Its prompt continues a running request's, which fills a block in every step."""
    engine, prompt = new_engine(block_size=1), ids(5)
    [done] = new_engine().generate([prompt], Params(max_tokens=20, ignore_eos=True))
    engine.add_request(prompt, Params(max_tokens=20, ignore_eos=True))
    engine.step()
    late = engine.add_request([*prompt, *done.token_ids], Params(max_tokens=1))
    assert late in [output.request_id for output in engine.step()]
    engine.close()


@pytest.mark.parametrize("way", ["abort", "fail"])
def test_a_request_that_waited_in_vain_computes_it_itself(new_engine, Params, ids, way, monkeypatch):
    engine, prompt = new_engine(), ids(9)
    params = Params(max_tokens=3, ignore_eos=True)
    [want] = new_engine(enable_prefix_caching=False).generate([prompt], params)
    first, second = engine.add_request(prompt, params), engine.add_request(prompt, params)
    if way == "abort":
        engine.scheduler.schedule()
        engine.abort_request(first)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", lambda batch: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        assert engine.fail_step() == [first]
    num_positions, tokens = added(engine, lambda: finish(engine))
    assert (num_positions, tokens) == (9 + 2, {second: want.token_ids})


# ---- what can no longer be found


def test_a_call_that_fails_leaves_nothing_to_find(new_engine, Params, ids, monkeypatch):
    """`generate` has nobody who would call fail_step: not for a step that wrote, and not for one that was about to swap in."""
    prompts, params = [ids(13) for _ in range(3)], Params(max_tokens=14, ignore_eos=True)
    want = new_engine(num_blocks=60, enable_prefix_caching=False).generate(prompts, params)
    for num_blocks, name in ((60, "forward"), (12, "load")):
        engine = new_engine(num_blocks=num_blocks, swap_bytes=10**6, reserve_tokens=0)
        engine.generate(prompts[:1], Params(max_tokens=1))
        owner = engine.model if name == "forward" else engine.swap
        work = getattr(owner, name)

        def fails(*args, engine=engine, name=name, work=work):
            if name == "forward":
                engine.cache.k.fill_(1e4)
            if name == "forward" or args[0]:
                raise RuntimeError("interrupted")
            return work(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(RuntimeError, match="interrupted"):
                engine.generate(prompts, params)
        audit(engine)
        for prompt, out in zip(prompts, want):
            [got] = engine.generate([prompt], params)
            assert (got.num_cached, got.token_ids) == (0, out.token_ids)
            engine.reset_prefix_cache()


def test_a_failed_step_leaves_nothing_to_find(new_engine, Params, ids, monkeypatch):
    """Neither what it wrote nor what its requests had computed before."""
    engine, prompt = new_engine(), ids(13)
    params = Params(max_tokens=3, logprobs=2, ignore_eos=True)
    want = new_engine(enable_prefix_caching=False).generate([prompt], params)
    engine.add_request(prompt, params)
    engine.step()

    def forward(batch):
        engine.cache.k.fill_(1e4)
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", forward)
        with pytest.raises(RuntimeError):
            engine.step()
    engine.fail_step()
    audit(engine)
    got = engine.generate([prompt], params)
    assert got[0].num_cached == 0
    assert_same(got, want)


def test_nor_does_a_request_that_had_finished_in_it(new_engine, Params, ids, monkeypatch):
    """Not even for a request that was waiting at that time, with the same prompt."""
    engine, prompt, other = new_engine(max_num_seqs=2), ids(9), ids(9)
    for each in (prompt, other, prompt):
        engine.add_request(each, Params(max_tokens=1))
    calls, accept = [], engine.accept

    def failing(*args):
        if calls:
            raise RuntimeError
        calls.append(1)
        return accept(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "accept", failing)
        with pytest.raises(RuntimeError):
            engine.step()
    engine.fail_step()
    audit(engine)
    assert added(engine, engine.step)[0] == 9


def test_a_request_that_overflows_leaves_nothing_to_find_and_its_neighbor_everything(new_engine, overflowing, Params, ids):
    engine, system = new_engine(overflowing, dtype="float16"), ids(2 * BS)
    params = Params(max_tokens=4, ignore_eos=True)
    good, bad = [*system, 100, 101, 102, 103, 104], [*system, BAD, 100, 101, 102, 103]
    [want] = new_engine(overflowing, dtype="float16", enable_prefix_caching=False).generate([good], params)
    for prompts in ([good, bad], [bad, good], [bad, bad]):
        done = engine.generate(prompts, params)
        assert [each.finish_reason for each in done] == ["error" if prompt is bad else "length" for prompt in prompts]
        assert all(each.token_ids == want.token_ids for each, prompt in zip(done, prompts) if prompt is good)
        found = list(engine.pool.key_of)
        for cached in (engine.cache.k, engine.cache.v):
            assert torch.isfinite(cached[:, found]).all()
        audit(engine)


@pytest.mark.parametrize("way", ["recompute", "swap"])
def test_an_aborted_requests_full_blocks_are_found_and_are_right(new_engine, Params, ids, way):
    """Aborted in the queue, after each of its steps, and while it is preempted."""
    engine, prompt = new_engine(swap_bytes=WAYS[way]), ids(6)
    params = Params(max_tokens=10, ignore_eos=True)
    [whole] = new_engine(enable_prefix_caching=False).generate([prompt], params)
    later = [*prompt, *whole.token_ids, 9, 10]
    want = new_engine(enable_prefix_caching=False).generate([later], Params(max_tokens=3, logprobs=2))
    for num_steps in range(10):
        for preempted in (False, True)[: 1 + (num_steps > 0)]:
            engine.reset_prefix_cache()
            request_id = engine.add_request(prompt, params)
            for _ in range(num_steps):
                engine.step()
            if preempted:
                engine.scheduler.preempt(engine.scheduler.running[0])
            engine.abort_request(request_id)
            audit(engine)
            got = engine.generate([later], Params(max_tokens=3, logprobs=2))
            computed = num_steps and 6 + num_steps - 1
            assert got[0].num_cached == computed // BS * BS
            assert_same(got, want)


def test_after_a_reset_running_requests_go_on_and_new_ones_find_nothing(new_engine, Params, ids):
    engine, prompt = new_engine(), ids(9)
    params = Params(max_tokens=6, ignore_eos=True)
    [want] = new_engine(enable_prefix_caching=False).generate([prompt], params)
    first = engine.add_request(prompt, params)
    outputs = engine.step()
    engine.reset_prefix_cache()
    second = engine.add_request(prompt, params)
    num_positions, more = added(engine, engine.step)
    assert num_positions == 1 + 9
    tokens = finish(engine)
    assert [outputs[0].token_id, more[0].token_id, *tokens[first]] == want.token_ids
    assert [more[1].token_id, *tokens[second]] == want.token_ids
    # What the second one has computed is found again.
    assert engine.generate([prompt], params)[0].num_cached == 2 * BS


@pytest.mark.parametrize("way", ["recompute", "swap"])
@pytest.mark.parametrize("moment", ["running", "preempted", "waiting"])
def test_nothing_of_a_request_from_before_a_reset_is_found_after_it(new_engine, Params, ids, way, moment):
    """Neither what it had computed, nor what it computes later, nor what it copies back from the swap space."""
    engine, prompt = new_engine(swap_bytes=WAYS[way]), ids(9)
    params = Params(max_tokens=12, ignore_eos=True)
    [want] = new_engine(enable_prefix_caching=False).generate([prompt], params)
    engine.add_request(prompt, params)
    outputs = engine.step() if moment != "waiting" else []
    if moment == "preempted":
        engine.scheduler.preempt(engine.scheduler.running[0])
    engine.reset_prefix_cache()
    outputs += engine.step()
    later = [*prompt, *want.token_ids]
    for _ in range(2):
        num_positions, (mine, its) = added(engine, lambda: step_beside(engine, later[:13], Params))
        outputs.append(mine)
        assert (num_positions, its.num_cached) == (1 + 13, 0)
        engine.reset_prefix_cache()
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.token_id for output in outputs] == want.token_ids
    assert engine.generate([later], Params(max_tokens=1))[0].num_cached == 0


def step_beside(engine, prompt, Params):
    """Add a request for one token and make a step; the outputs."""
    engine.add_request(prompt, Params(max_tokens=1))
    return engine.step()


# ---- salts, and who may see what


@pytest.mark.parametrize(
    ("salt", "other", "shared"),
    [(None, None, True), ("a", "a", True), ("a", "b", False), (None, "a", False), ("a", None, False), ("\ud800", "\udfff", False)],
)
def test_only_requests_with_the_same_salt_share_blocks(new_engine, Params, ids, salt, other, shared):
    prompt = ids(13)
    mine, its = (Params(max_tokens=1, cache_salt=each) for each in (salt, other))
    engine = new_engine()
    engine.generate([prompt], mine)
    num_positions, [done] = added(engine, lambda: engine.generate([prompt], its))
    assert (num_positions, done.num_cached) == ((1, 3 * BS) if shared else (13, 0))
    # At once, they do not wait for each other either.
    engine = new_engine()
    for params in (mine, its):
        engine.add_request(prompt, params)
    assert len(engine.step()) == (1 if shared else 2)
    finish(engine)


def test_another_tenants_prompts_cannot_be_guessed(new_engine, Params, ids):
    """Neither the reported number nor the work done nor the step in which it starts differs from those of a prompt that nobody has sent."""
    engine, secret = new_engine(num_blocks=300), ids(40)
    victim = Params(max_tokens=30, ignore_eos=True, cache_salt="victim")
    seen = []
    for beginnings in ((secret, [*secret, 9], secret[:20], secret[:4]), [ids(n) for n in (40, 41, 20, 4)]):
        engine.add_request(secret, victim)
        # One in the step that computes the secret, the others in the steps after it.
        for number, prompt in enumerate(beginnings):
            # Each with a salt of its own, so that they do not find one another's.
            engine.add_request(prompt, Params(max_tokens=1, cache_salt=f"curious {len(seen)}"))
            num_positions, outputs = added(engine, engine.step)
            seen.append((num_positions, [output.num_cached for output in outputs]))
        engine.close()
        engine.reset_prefix_cache()
    assert seen[:4] == seen[4:]


def test_no_salt_is_a_blocks_key(module):
    """With one hash for both, a salt could be chosen whose root is a block's key: here, both are made of the same bytes."""
    prefix, token_ids = module("prefix"), [9, 10, 11, 12]
    # What a root is made of begins with a number and a space.
    parent = b"0 ".ljust(32, b"p")
    crafted = (parent + b"".join(token_id.to_bytes(8, "little") for token_id in token_ids)).decode()
    assert prefix.root_key(crafted[2:]) != prefix.block_key(parent, token_ids)


def test_a_key_depends_on_all_tokens_before_and_on_their_places(module, ids):
    """The same four tokens in other places, after other tokens, or cut in other places, have another key."""
    prefix, a, b = module("prefix"), ids(4), ids(4)
    root = prefix.root_key(None)

    def chain(*blocks, key=root):
        for token_ids in blocks:
            key = prefix.block_key(key, token_ids)
        return key

    keys = [chain(a), chain(b), chain(a, b), chain(b, a), chain(b, b), chain(a[:2], a[2:]), chain(a + b), chain(a[::-1])]
    keys.append(chain(a, key=prefix.root_key("a")))
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {32}
    # What differs only above the lowest byte or bytes differs.
    assert len({chain([token_id]) for token_id in (1, 257, 65537, 2**31 - 1)}) == 4


def test_tokens_with_the_same_hash_of_pythons_have_different_keys(module):
    """A client could construct such prompts: hash() is no cryptographic hash."""
    block_key, root = module("prefix").block_key, module("prefix").root_key(None)
    for one, other in ((-1, -2), (0, 2**61 - 1)):
        assert hash((root, one)) == hash((root, other))
        assert block_key(root, [one]) != block_key(root, [other])


def test_a_clients_salt_is_hashed_with_its_key(module):
    """So a client that sends another's salt, or what the engine gets for another, shares nothing with it."""

    def salt_of(api_key, salt):
        return module("service").Service.cache_salt(None, api_key, salt)

    assert salt_of(None, None) is None and salt_of(None, "mine") == "mine"
    pairs = [(key, salt) for key in ("key", "other", "keym", "k" * 200, "\xe9") for salt in (None, "mine", "ine", "yours", salt_of("key", None))]
    salts = [salt_of(*pair) for pair in pairs]
    assert len(set(salts)) == len(pairs) and salts == [salt_of(*pair) for pair in pairs]
    assert not any(key in salt or str(own) == salt for (key, own), salt in zip(pairs, salts))


# ---- refusals, and everything together


@pytest.mark.parametrize("value", [None, 1, 0, "yes", "False"])
def test_it_is_on_or_off(new_engine, value):
    with pytest.raises(ValueError, match=f"enable_prefix_caching must be True or False, got {value!r}"):
        new_engine(enable_prefix_caching=value)


@pytest.mark.parametrize("salt", ["", 0, 5, True, b"salt", ["salt"]])
def test_a_salt_is_a_text_that_is_not_empty(chapter, Params, salt):
    with pytest.raises(ValueError, match="cache_salt must be a non-empty string or None, got ") as refused:
        Params(cache_salt=salt)
    assert refused.value.param == "cache_salt"


@pytest.mark.whole
def test_three_hundred_requests_with_shared_beginnings_leave_nothing_behind(chapter, new_engine):
    """After every step, what can be found is compared with what the blocks hold."""
    engine = new_engine(max_num_seqs=9, num_blocks=26, reserve_tokens=2, swap_bytes=WAYS["swap, often full"])
    ended = soak(chapter, engine, num_requests=300, seed=4, fault_share=0.01)
    assert sum(ended.values()) == 300 and ended["abort"] > 5 and ended["error"] > 0
    stats = engine.stats()
    assert stats.preemptions > 20 and stats.cached_tokens > 0
    audit(engine)
