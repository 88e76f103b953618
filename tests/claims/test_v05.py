"""v05: memory in blocks, and a table for each sequence."""
import pytest
import torch

from shared.bench.recorder import record
from shared.checkpoints import checkpoint
from shared.verify.findable import forget
from shared.workloads import Request, fixed, ragged, random_ids

# Five requests, two at once: prompt length, output length.
LENGTHS = [(3, 4), (5, 2), (2, 3), (1, 1), (4, 2)]
BS = 4


def trace_of(chapter, engine, requests):
    trace, _ = record(chapter, engine, requests)
    return trace


@pytest.mark.until("v12")
def test_blocks_are_taken_as_tokens_arrive_and_the_longest_free_is_reused_first(chapter):
    """The exact blocks of each request in each step. A table's last block is the first to be reused."""
    engine = chapter.load().Engine(checkpoint("qwen2"), max_num_seqs=2, num_blocks=6, block_size=BS)
    trace = trace_of(chapter, engine, fixed(LENGTHS, 401))
    assert [{part.request: part.rows for part in each.parts} for each in trace.passes] == [
        {0: [0], 1: [1, 2]},
        {0: [0], 1: [1, 2]},
        {0: [0, 3], 2: [4]},
        {0: [0, 3], 2: [4]},
        {2: [4], 3: [5]},
        {4: [2]},
        {4: [2, 1]},
    ]
    assert list(engine.pool.free_ids) == [3, 0, 4, 5, 1, 2]


def test_the_pool_gives_all_or_nothing(module):
    pool = module("cache").BlockPool(num_blocks=5, block_size=3)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(3) is None and pool.num_free == 2
    assert pool.allocate(0) == []
    pool.free([0, 1, 2])
    assert sorted(pool.allocate(5)) == [0, 1, 2, 3, 4] and pool.num_free == 0
    pool.free([3, 4, 2, 1, 0])
    with pytest.raises(AssertionError, match="block 2 is free already"):
        pool.free([2])


@pytest.mark.until("v12")
def test_the_block_that_was_freed_first_is_allocated_first(module):
    pool = module("cache").BlockPool(num_blocks=5, block_size=3)
    pool.free(pool.allocate(3))
    assert pool.allocate(5) == [3, 4, 2, 1, 0]


@pytest.mark.parametrize("block_size", [1, 3, 16, 400])
def test_any_block_size_gives_the_same_tokens(make_engine, Params, block_size):
    requests = ragged(7, 401, prompt_len=(1, 50), output_len=(1, 40), seed=3)
    prompts, params = [r.prompt_ids for r in requests], [Params(max_tokens=r.max_tokens, seed=0) for r in requests]
    engine = make_engine("qwen3", block_size=block_size, kv_bytes=2**20)
    assert engine.generate(prompts, params) == make_engine("qwen3").generate(prompts, params)


@pytest.mark.parametrize("length", [1, BS - 1, BS, BS + 1, 2 * BS, 23])
def test_what_other_requests_left_in_a_block_changes_nothing(chapter, make_engine, Params, rng, length):
    """In the last block past the sequence's end, past a shorter table's end, or from a block's last owner."""
    engine = make_engine("qwen3", num_blocks=40, block_size=BS)
    prompts = [random_ids(n, engine.config.vocab_size, rng) for n in (length, 7, 18)]
    clean = make_engine("qwen3").generate(prompts, Params(max_tokens=9, seed=0))
    forget(engine)
    engine.cache.k.fill_(1e30)
    engine.cache.v.fill_(1e30)
    assert engine.generate(prompts, Params(max_tokens=9, seed=0)) == clean


def test_a_sequence_holds_less_than_a_block_that_is_empty(chapter):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=60, block_size=BS)
    requests = ragged(12, 401, prompt_len=(1, 30), output_len=(1, 30), seed=8)
    trace = trace_of(chapter, engine, requests)
    reached = [0] * len(requests)
    for each in trace.passes:
        for part in each.parts:
            reached[part.request] += part.useful
            assert 0 <= BS * len(part.rows) - reached[part.request] < BS


@pytest.mark.whole
@pytest.mark.until("v11")
def test_at_equal_bytes_more_requests_run_because_they_reserve_less(chapter):
    """v04 reserves max_model_len for each; v05 reserves prompt + max_tokens - 1, rounded up to blocks.

    Longer requests run in more steps, so the mean reservation is taken over steps, not over requests.
    """
    max_model_len, places, block_size = 512, 8, 16
    requests = ragged(240, 401, prompt_len=(4, 60), output_len=(1, 120), seed=6)
    reserved = [-(-(len(r.prompt_ids) + r.max_tokens - 1) // block_size) * block_size for r in requests]
    passes = [request.max_tokens for request in requests]
    mean_reserved = sum(each * lasts for each, lasts in zip(reserved, passes)) / sum(passes)
    derived = max_model_len / mean_reserved
    engine = chapter.load().Engine(
        checkpoint("qwen3"),
        max_num_seqs=100,
        num_blocks=places * max_model_len // block_size,
        block_size=block_size,
    )
    trace = trace_of(chapter, engine, requests)
    busy = [len(each.parts) for each in trace.passes if each.waiting]
    met = sum(busy) / len(busy) / places
    assert abs(met / derived - 1) < 0.1, f"{met:.2f} times as many, derived {derived:.2f}"


def test_when_blocks_are_short_requests_wait_in_order(chapter):
    """The third would fit at once, but it arrived after the second, which does not."""
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=6, block_size=BS)
    requests = [Request([9] * 6, 12), Request([10] * 5, 4), Request([11], 2)]  # 5, 2 and 1 blocks of 6
    trace = trace_of(chapter, engine, requests)
    assert trace.ledger()[:13] == [{0: 6}, *[{0: 1}] * 11, {1: 5, 2: 1}]
    assert trace.lengths == [(6, 12), (5, 4), (1, 2)]


def test_a_request_that_can_never_fit_is_refused_at_once_with_both_numbers(chapter, Params):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=6, block_size=BS, max_model_len=100)
    # 24 positions: the last token is not cached.
    assert len(engine.generate([[9] * 15], Params(max_tokens=10, ignore_eos=True))[0].token_ids) == 10
    with pytest.raises(ValueError, match=r"prompt and its output may need 7 blocks of 4 tokens, but num_blocks is 6; shorten"):
        engine.add_request([9] * 16, Params(max_tokens=10))
    assert not engine.has_unfinished_requests()


def test_without_a_limit_asked_for_a_request_may_fill_the_pool(chapter, Params, capsys):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=6, block_size=BS)
    assert engine.max_model_len == 24
    assert "max_model_len 24" in capsys.readouterr().err
    assert len(engine.generate([[9] * 14], Params(max_tokens=None, ignore_eos=True))[0].token_ids) == 10


def test_without_max_tokens_a_request_takes_what_the_cache_has_for_it(chapter, Params):
    """It used to ask for the rest of max_model_len, and was refused."""
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=6, block_size=BS, max_model_len=100)
    # The last token is not cached.
    for num_prompt, num_tokens in ((14, 11), (24, 1)):
        [out] = engine.generate([[9] * num_prompt], Params(max_tokens=None, ignore_eos=True))
        assert len(out.token_ids) == num_tokens and out.finish_reason == "length"
    with pytest.raises(ValueError, match="prompt and its output may need 7 blocks of 4 tokens, but num_blocks is 6"):
        engine.add_request([9] * 25, Params(max_tokens=None))
    with pytest.raises(ValueError, match="has 100 tokens and max_tokens is None, but prompt and output together have at most max_model_len = 100"):
        engine.add_request([9] * 100, Params(max_tokens=None))


def test_the_cache_takes_the_bytes_that_were_asked_for(chapter, module):
    per_block = 5 * 2 * 3 * 3 * 14 * 2  # tokens, keys and values, layers, KV heads, head_dim, bytes
    options = {"dtype": "bfloat16", "max_model_len": 77, "block_size": 5}
    engine = chapter.load().Engine(checkpoint("mistral"), kv_bytes=41 * per_block + 7, **options)
    assert engine.pool.num_blocks == 41
    assert engine.cache.k.nbytes + engine.cache.v.nbytes == engine.cache.kv_bytes == 41 * per_block
    with pytest.raises(ValueError, match=f"kv_bytes is {per_block - 1}, but a block takes {per_block}; raise kv_bytes"):
        chapter.load().Engine(checkpoint("mistral"), kv_bytes=per_block - 1, **options)
    choose = module("engine").choose_blocks
    assert choose(None, None, per_block, 10**9, torch.device("cpu")) == 2**30 // per_block
    assert choose(None, None, per_block, 12, torch.device("cpu")) == 12
    assert choose(None, 99 * per_block, per_block, 12, torch.device("cpu")) == 99


def test_the_default_length_is_the_models(module):
    choose = module("engine").choose_length
    assert choose(None, 131072) == 131072
    assert choose(50, 131072) == 50


@pytest.mark.parametrize("option", ["num_blocks", "block_size", "kv_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8"])
def test_sizes_out_of_range_are_refused(chapter, option, value):
    with pytest.raises(ValueError, match=f"{option} must be an integer from 1 up"):
        chapter.load().Engine(checkpoint("llama"), **{option: value})


def test_two_sizes_at_once_are_refused(chapter):
    with pytest.raises(ValueError, match="num_blocks is 5 and kv_bytes 9; both size the cache, so give only one"):
        chapter.load().Engine(checkpoint("llama"), num_blocks=5, kv_bytes=9)


def test_a_pool_that_no_memory_holds_is_refused(chapter):
    """Before the pool is built: the list of its free blocks alone would fill the memory."""
    with pytest.raises(ValueError, match="needs .* GiB; lower kv_bytes, num_blocks or block_size"):
        chapter.load().Engine(checkpoint("llama"), kv_bytes=10**15)
    with pytest.raises(ValueError, match="needs .* GiB; lower kv_bytes, num_blocks or block_size"):
        chapter.load().Engine(checkpoint("llama"), num_blocks=10, block_size=2**50)


def test_what_is_read_is_looked_up_once_a_step_and_not_once_a_layer(make_engine, Params):
    engine = make_engine("llama", device="cpu", num_blocks=40, block_size=BS)
    read, tables = engine.cache.read, []
    engine.cache.read = lambda layer_id, where: tables.append((layer_id, where.block_tables)) or read(layer_id, where)
    try:
        engine.generate([[9] * 5, [10] * 5], Params(max_tokens=2, ignore_eos=True))
    finally:
        del engine.cache.read
    assert [layer_id for layer_id, _ in tables] == [0, 1, 2, 0, 1, 2]
    assert len({id(table) for _, table in tables}) == 2


@pytest.mark.until("v06")
def test_attention_does_not_know_where_keys_and_values_live(chapter):
    same = ("attention.py", "layers.py", "model.py", "loader.py", "config.py", "sampling.py", "text.py")
    for name in same:
        assert (chapter.path / name).read_bytes() == (chapter.previous.path / name).read_bytes(), name


@pytest.mark.until("v11")
def test_blocks_and_reservations_come_back(make_engine, Params):
    engine = make_engine("llama", num_blocks=40, block_size=BS)
    engine.generate([[9] * 5, [10] * 7], Params(max_tokens=4, ignore_eos=True))
    request_id = engine.add_request([9] * 6, Params(max_tokens=20, ignore_eos=True))
    engine.step()
    [seq] = engine.scheduler.running
    assert (engine.pool.num_free, engine.scheduler.reserved(seq)) == (38, 7)
    engine.abort_request(request_id)
    assert (engine.pool.num_free, engine.scheduler.running) == (40, [])


def test_grow_returns_false_and_takes_nothing_if_blocks_are_short(chapter, module, Params):
    """Admission prevents this, but `grow` does not rely on it."""
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=5, block_size=4)
    seq = engine.make_sequence([9] * 11, Params(max_tokens=1), name="prompt")
    if "chunked_prefill" in chapter.capabilities:
        engine.scheduler.budget = 11
    others = engine.pool.allocate(3)
    assert engine.scheduler.grow(seq) is False
    assert not seq.block_table and engine.pool.num_free == 2
    engine.pool.free(others[:1])
    assert engine.scheduler.grow(seq) is True
    assert len(seq.block_table) == 3 and engine.pool.num_free == 0
