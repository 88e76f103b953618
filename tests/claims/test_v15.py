"""v15: the tensors of decode steps live across steps, and a GPU replays their recorded passes; the output stays the same."""
import contextlib
import copy
import gc
import importlib
import random
import threading
import weakref
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from shared.checkpoints import TWO_LAYERS, checkpoint
from shared.verify import product
from shared.verify.findable import uncached
from shared.verify.pretend_gpu import READ, launches, pretend_gpu, recording
from shared.verify.soak import audit
from shared.workloads import random_ids
from tests.claims.test_v06 import CHANGING, DEVICE, needs_triton
from tests.support.stand_ins import STAND_INS, quick_gpu, run_stand_in
from tests.test_text import every_tokenizer, some_ids

BS = 4
only_pretended = pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is pretended")


@pytest.fixture
def gpu():
    """cuda:0, the real one with --gpu. Otherwise it is pretended, and stand-ins compute what the kernels do."""
    with contextlib.nullcontext() if DEVICE.type == "cuda" else quick_gpu():
        yield


@pytest.fixture
def new_engine(chapter):
    """Engines of the test's own."""

    def new_engine(name="llama-two-layers", *, num_blocks=60, block_size=BS, max_num_seqs=7, max_model_len=64, **options):
        limits = {"num_blocks": num_blocks, "block_size": block_size, "max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
        return chapter.load().Engine(checkpoint(name), **{"dtype": "float32"} | limits | options)

    return new_engine


@pytest.fixture
def ids(rng):
    """Random token ids of the random checkpoints' vocabulary."""
    return lambda length: random_ids(length, 401, rng)


def traffic(seed, num_requests=12):
    """Requests as (prompt, options, the step before which it arrives, the step before which it is aborted or None)."""
    rng = random.Random(seed)
    requests = []
    for number in range(num_requests):
        options = {"max_tokens": rng.randint(2, 14), "seed": number, "ignore_eos": True, "logprobs": 2}
        options |= rng.choice(({}, {"temperature": 0.9}, {"temperature": 0.7, "top_k": 30, "top_p": 0.9}))
        arrival = rng.choice((0, 0, rng.randint(1, 12)))
        abort = arrival + rng.randint(1, 9) if rng.random() < 0.25 else None
        requests.append((random_ids(rng.choice((1, 2, 3, 4, 5, 9, 17, 30)), 401, rng), options, arrival, abort))
    return requests


def run(engine, Params, requests, before_step=lambda step: None):
    """All that the steps return, by request's number. before_step is called with each step's number."""
    outputs, numbers = {number: [] for number in range(len(requests))}, {}
    last = max(arrival for _, _, arrival, _ in requests)
    step = 0
    while step <= last or engine.has_unfinished_requests():
        for number, (prompt, options, arrival, _) in enumerate(requests):
            if arrival == step:
                numbers[engine.add_request(prompt, Params(**options))] = number
        for request_id, number in numbers.items():
            if requests[number][3] == step:
                engine.abort_request(request_id)
        before_step(step)
        for output in engine.step():
            outputs[numbers[output.request_id]].append(output._replace(request_id=numbers[output.request_id]))
        audit(engine)
        step += 1
    return outputs


def assert_same(got, want):
    """Everything exact is equal. A padded batch may round logprobs otherwise."""
    assert got.keys() == want.keys()
    for number in got:
        for mine, its in zip(got[number], want[number], strict=True):
            assert mine._replace(logprobs=None) == its._replace(logprobs=None)
            assert mine.logprobs == pytest.approx(its.logprobs, abs=2e-4)


def observe(owner, name, observer):
    """Let observer be called in place of the owner's method, with the method and its arguments."""
    correct = getattr(owner, name)
    setattr(owner, name, lambda *args: observer(correct, *args))


def note(owner, name, convert=lambda result: result):
    """A list to which each call of the owner's method adds its result, converted."""
    results = []

    def noting(correct, *args):
        result = correct(*args)
        results.append(convert(result))
        return result

    observe(owner, name, noting)
    return results


# ---- the same batches


def assert_same_batch(got, want):
    """Field by field: values, dtypes and devices. Rectangles may come in another order, and tables may be wider."""
    for name in ("token_ids", "positions", "logit_rows", "slot_mapping", "new_blocks"):
        mine, its = getattr(got, name), getattr(want, name)
        assert (mine.dtype, mine.device, mine.tolist()) == (its.dtype, its.device, its.tolist()), name
    assert got.draws == want.draws
    assert got.cache is want.cache and got.backend is want.backend
    assert contents(got) == contents(want)


def contents(batch):
    """A view's parts, in order."""
    parts = []
    for part in batch.view:
        fields = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in part._asdict().items()}
        fields["dtypes"] = [value.dtype for value in part if isinstance(value, Tensor)]
        if "context_lens" in fields:
            # What is past a sequence's context is not read.
            pairs = zip(fields["block_tables"], fields["context_lens"], strict=True)
            fields["block_tables"] = [table[: -(-context_len // batch.cache.block_size)] for table, context_len in pairs]
        parts.append(fields)
    return sorted(parts, key=lambda fields: fields.get("tokens", []))


def check_batches(module, engine):
    """Compare each batch that the runner builds with build_batch's. Gives the number of steps by the way their batch is built."""
    kinds = Counter()

    def accepts(correct, seqs):
        kinds["rows" if correct(seqs) else "build_batch"] += 1
        return correct(seqs)

    def build(correct, seqs):
        want = module("batch").build_batch(seqs, engine.cache, engine.backend).to(engine.device)
        got = correct(seqs)
        assert_same_batch(got, want)
        return got

    observe(engine.runner, "accepts", accepts)
    observe(engine.runner, "build", build)
    return kinds


def run_both_ways(chapter, module, seed):
    """Run a plan of shared/verify/product.py with the runner's batches and without; the events, if every output is the same."""
    name = product.MODELS[seed % len(product.MODELS)]
    roomy = product.make_engine(chapter, name, num_blocks=64, **uncached(chapter))
    plan, runs = product.make_plan(seed, chapter, roomy), []
    for uses_rows in (True, False):
        engine = product.make_engine(chapter, name, **plan.options)
        if uses_rows:
            kinds = check_batches(module, engine)
        else:
            engine.runner.accepts = lambda seqs: False
        outputs = note(engine, "step")
        results, events = product.run_plan(engine, plan)
        runs.append((outputs, [vars(result) for result in results], engine.stats()))
    assert runs[0] == runs[1], f"product {chapter.id} --seed {seed}"
    assert kinds["rows"] and kinds["build_batch"]
    events["block_size 1"] += plan.options["block_size"] == 1
    return events


@pytest.mark.whole
@pytest.mark.parametrize("seeds", [(24, 1, 10, 2), pytest.param(range(30, 48), marks=pytest.mark.whole)], ids=["few", "many"])
def test_every_field_of_every_output_is_what_it_is_without_them(chapter, module, seeds):
    """Bit for bit, with every feature at once: the batches are equal, field by field."""
    events = sum((run_both_ways(chapter, module, seed) for seed in seeds), Counter())
    expected = {f"finished: {reason}" for reason in ("length", "stop string", "stop token", "abort", "error")}
    expected |= {*product.PREEMPTED, "aborted while running", "steps failed", "block_size 1"}
    expected |= {"found the beginning of a prompt", f"steps after which a request is {product.MID_PROMPT}"}
    assert expected <= {event for event, count in events.items() if count > 0}


@needs_triton
@only_pretended
@pytest.mark.parametrize("block_size", [3, *(pytest.param(size, marks=pytest.mark.whole) for size in (1, 16))])
@pytest.mark.parametrize("attention", ["triton", pytest.param("torch", marks=pytest.mark.whole)])
def test_on_a_gpu_too_the_batches_are_equal(new_engine, gpu, module, Params, attention, block_size):
    engine = new_engine(attention=attention, block_size=block_size, num_blocks=64, reserve_tokens=0)
    kinds = check_batches(module, engine)
    run(engine, Params, traffic(1))
    assert kinds["rows"] > 9 and kinds["build_batch"] > 2


def test_a_piece_of_one_token_is_like_a_decode_step_only_if_it_is_the_last(new_engine, module, Params, ids):
    requests = [(ids(length), {"max_tokens": 9, "ignore_eos": True, "logprobs": 2}, 0, None) for length in (1, 4)]
    want = run(new_engine(device="cpu"), Params, requests)
    engine = new_engine(device="cpu", max_num_seqs=2, max_num_batched_tokens=2)
    kinds = check_batches(module, engine)
    assert_same(run(engine, Params, requests), want)
    # The second prompt is fed in four pieces of one token, beside the first request's nine tokens.
    assert kinds == {"build_batch": 3, "rows": 9}


def test_swapped_out_and_in_again_as_many_blocks_but_others_are_read(new_engine, module, Params, ids):
    requests = [(ids(length), {"max_tokens": 9, "ignore_eos": True, "logprobs": 2}, 0, None) for length in (5, 7, 2)]
    want = run(new_engine(device="cpu"), Params, requests)
    engine, victims = new_engine(device="cpu", swap_bytes=10**6), []
    kinds = check_batches(module, engine)

    def preempt(step):
        if step in (3, 5, 7):
            victim = engine.scheduler.running[step % 3]
            victims.append((victim, list(victim.block_table)))
            engine.scheduler.preempt(victim)
            engine.pool.forget(victims[-1][1])
            for block_id in victims[-1][1]:
                engine.pool.free_ids.move_to_end(block_id)
        if step in (4, 6, 8):
            victim, before = victims[-1]
            assert len(victim.block_table) == len(before) and not set(victim.block_table) & set(before)

    assert run(engine, Params, requests, preempt) == want
    assert kinds == {"build_batch": 1, "rows": 8} and engine.stats().preemptions == 3


def test_preempted_and_readmitted_by_one_call_the_blocks_that_it_finds_are_read(new_engine, module, Params, ids):
    """Two requests that say the same each compute a block of it. When there is no block for the second, it gets the first one's."""
    prompt, options = ids(5), {"max_tokens": 6, "ignore_eos": True, "logprobs": 2}
    [alone] = new_engine(device="cpu").generate([prompt], Params(**options))
    engine = new_engine(device="cpu", num_blocks=4, reserve_tokens=0)
    kinds = check_batches(module, engine)
    tables = note(engine.scheduler, "schedule", lambda seqs: [list(seq.block_table) for seq in seqs])
    outputs = run(engine, Params, [(prompt, options, 0, None)] * 2)
    assert [[0, 1, 3], [0, 2]] in tables and engine.stats().preemptions == 1
    assert tables[tables.index([[0, 1, 3], [0, 2]]) + 1] == [[0, 1, 3], [0, 1, 2]]
    assert [[output.token_id for output in each] for each in outputs.values()] == [alone.token_ids] * 2
    assert kinds["build_batch"] == 1, "the step after the preemption feeds one token of each"


# ---- recorded


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("seed", "name"), list(enumerate((*TWO_LAYERS, "llama3"))))
def test_recorded_steps_give_what_launched_ones_give(new_engine, gpu, Params, seed, name):
    """With requests that arrive and are aborted at any time, every number of sequences, and all ways to choose a token."""
    requests = traffic(seed)
    for number, (prompt, options, *_) in enumerate(traffic(9, num_requests=7)):
        requests.append((prompt, options | {"max_tokens": 2 + number}, 40, None))
    want = run(new_engine(name, graphs=False), Params, requests)
    for is_warm in (False, True):
        engine = new_engine(name)
        if is_warm:
            engine.warm_up()
        sizes = note(engine.runner, "run", len)
        assert_same(run(engine, Params, requests), want)
        assert set(sizes) == {1, 2, 3, 4, 5, 6, 7} and set(engine.runner.recorded) == {1, 2, 4, 7}


@pytest.mark.whole
@only_pretended
@needs_triton
def test_recorded_in_the_interpreter(new_engine, Params, ids):
    """The kernels themselves, on a batch that is padded."""
    requests = [(ids(length), {"max_tokens": 3, "ignore_eos": True, "logprobs": 2}, 0, None) for length in (5, 3, 2)]
    want = run(new_engine(device="cpu"), Params, requests)
    with pretend_gpu():
        engine = new_engine(max_num_seqs=4)
        got = run(engine, Params, requests)
        assert launches.count("replay") == 2 and set(engine.runner.recorded) == {4}
    assert_same(got, want)


def on_cpu(tensor):
    return tensor.cpu().clone()


def bits(engine):
    """The cache on the CPU, bit for bit, so NaN equals itself: [2, L, P * BS, KV * D]."""
    return torch.stack([on_cpu(engine.cache.k), on_cpu(engine.cache.v)]).flatten(2, 3).flatten(3).view(torch.int32)


def fill(engine, value=None):
    """Overwrite the cache with a value, or with random numbers."""
    for cache in (engine.cache.k, engine.cache.v):
        cache.copy_(torch.randn(cache.shape) if value is None else torch.full(cache.shape, value))


@pytest.mark.gpu
@needs_triton
def test_a_replay_reads_every_field_of_the_rows(new_engine, gpu, Params, ids):
    """The rows that it was recorded on held short contexts of other sequences. Change one field at a time, then all."""
    with torch.inference_mode():
        engine = new_engine(num_blocks=70)
        runner, generator = engine.runner, torch.Generator().manual_seed(3)
        run(engine, Params, [(ids(2), {"max_tokens": 2}, 0, None)] * 4)
        [size] = runner.recorded
        fill(engine)
        values = {
            "token_ids": torch.randint(8, 401, (size,), generator=generator),
            "positions": torch.tensor([63, 1, 30, 0]),
            "slots": torch.randperm(70 * BS, generator=generator)[:size],
            "context_lens": torch.tensor([64, 2, 31, 1]),
            "block_tables": torch.randint(0, 70, (size, 16), generator=generator),
        }
        before = None
        for name, value in [(None, None), *values.items()]:
            if name:
                getattr(runner.read, name)[:size].copy_(value)
            k_cache, v_cache = on_cpu(engine.cache.k), on_cpu(engine.cache.v)
            wanted = on_cpu(engine.model(runner.batch_of(size, [], None, 64))), bits(engine)
            engine.cache.k.copy_(k_cache)
            engine.cache.v.copy_(v_cache)
            graph, hidden = runner.recorded[size]
            graph.replay()
            found = on_cpu(hidden), bits(engine)
            torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[1].view(torch.float32), wanted[1].view(torch.float32), atol=1e-4, rtol=1e-4)
            if before:
                assert not found[0].equal(before[0]) or not found[1].equal(before[1]), f"a replay does not read {name}"
            before = found


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("max_num_seqs", "min_split_keys"), [(7, 256), (12, 256), (7, 8)], ids=["7", "12", "splits"])
def test_rows_that_pad_a_batch_read_and_write_nothing(new_engine, gpu, module, monkeypatch, Params, ids, max_num_seqs, min_split_keys):
    """All blocks that no request holds are NaN, the first and the last too; what is not used of the tables says the first."""
    monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", min_split_keys)
    engine = new_engine(max_num_seqs=max_num_seqs, enable_prefix_caching=False)
    engine.pool.free_ids.move_to_end(0)
    options = {"ignore_eos": True, "logprobs": 2}
    requests = [(ids(3 + number), options | {"max_tokens": 3 if number in (0, 6) else 12}, 0, None) for number in range(7)]
    want = run(engine, Params, requests)
    num_padded = 0

    def check(correct, batch):
        nonlocal num_padded
        if len(batch.draws) == 5:
            free = list(engine.pool.free_ids)
            assert {0, 59} <= set(free)
            engine.cache.k[:, free] = engine.cache.v[:, free] = torch.nan
            engine.runner.read.block_tables[5:] = 0
            for row, seq in enumerate(engine.scheduler.running):
                engine.runner.read.block_tables[row, len(seq.block_table) :] = 0
        for cache in (engine.cache.k, engine.cache.v):
            cache.flatten(1, 2)[:, batch.slot_mapping] = torch.nan
        before = bits(engine)
        hidden = correct(batch)
        changed = (bits(engine) != before).any(-1).nonzero().tolist()
        places = {(part, layer, slot) for part in range(2) for layer in range(2) for slot in batch.slot_mapping.tolist()}
        assert {tuple(place) for place in changed} == places
        if len(batch.draws) == 5:
            size = min(size for size in engine.runner.recorded if size > 5)
            assert on_cpu(engine.runner.recorded[size][1]).isfinite().all()
            num_padded += 1
        return hidden

    observe(engine.runner, "run", check)
    assert_same(run(engine, Params, requests), want)
    assert num_padded == 9


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("norm", [False, True])
def test_a_row_without_a_slot_is_stored_nowhere(module, norm):
    """Slot -1 would be the last one of the layer before, or what is in memory before the cache."""
    module("backends").choose_backend("triton", DEVICE)
    num_blocks, num_kv_heads, head_dim = 3, 2, 14
    memory = torch.randn(2, num_blocks * BS + 2, num_kv_heads, head_dim, device=DEVICE)
    k_cache, v_cache = (each[1:-1].view(num_blocks, BS, num_kv_heads, head_dim) for each in memory)
    before = memory.clone()
    q, k, v = (torch.randn(4, heads, head_dim, device=DEVICE) for heads in (6, num_kv_heads, num_kv_heads))
    cos, sin = torch.randn(2, 4, 1, head_dim // 2, device=DEVICE)
    weights = tuple(torch.randn(2, head_dim, device=DEVICE)) if norm else None
    slots = torch.tensor([-1, 5, -1, 0], device=DEVICE)
    rotate_and_write = module("kernels.fused").rotate_and_write
    out = rotate_and_write(q, k, v, cos, sin, weights, 1e-3, k_cache, v_cache, slots)
    changed = (memory != before).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [0, 6], [1, 1], [1, 6]]
    assert memory[1, 6].equal(v[1])
    # Its queries are like any other's.
    assert out.equal(rotate_and_write(q, k, v, cos, sin, weights, 1e-3, k_cache, v_cache, slots.abs()))


def test_the_sizes_are_at_most_max_num_seqs_and_waste_little(module):
    choose_sizes = module("runner").choose_sizes
    for most in range(1, 600):
        sizes = choose_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        for size in range(1, most + 1):
            padded = min(each for each in sizes if each >= size)
            assert padded < size + (8 if size <= 256 else 32) and (size > 2 or padded == size)
    assert choose_sizes(1) == [1] and choose_sizes(5) == [1, 2, 4, 5] and len(choose_sizes(256)) == 35


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 9])
def test_a_pass_is_recorded_for_each_size_with_as_many_rows(new_engine, gpu, module, max_num_seqs):
    engine = new_engine(max_num_seqs=max_num_seqs)
    engine.warm_up()
    sizes = module("runner").choose_sizes(max_num_seqs)
    # The largest first: what it needs of the pool suffices for the others.
    assert [(size, len(hidden)) for size, (_, hidden) in engine.runner.recorded.items()] == [(size, size) for size in sizes[::-1]]


@needs_triton
@only_pretended
def test_a_pass_runs_once_before_it_is_recorded_and_is_recorded_once(new_engine, gpu):
    """What compiles or allocates when it first runs must not be recorded."""
    engine, passes = new_engine(), []
    engine.model.register_forward_pre_hook(lambda _model, args: passes.append((len(args[0].token_ids), bool(recording))))
    engine.warm_up()
    assert passes[-8:] == [(size, is_recorded) for size in (7, 4, 2, 1) for is_recorded in (False, True)]
    engine.warm_up()
    assert [is_recorded for _, is_recorded in passes].count(True) == 4


# ---- warming up


@pytest.mark.whole
@needs_triton
@only_pretended
@pytest.mark.parametrize("graphs", [None, False])
@pytest.mark.parametrize("max_num_seqs", [5, 8])
def test_after_warming_up_nothing_is_recorded_or_compiled(new_engine, module, monkeypatch, Params, ids, graphs, max_num_seqs):
    """Whatever the traffic. A variant is compiled for each set of constants, dtypes, alignments, and classes of integers."""
    launched = set()

    def variant_of(name, value):
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return None if name in CHANGING or isinstance(value, float) else (value == 1, value % 16 == 0)

    def launch(kernel, *args, grid, warmup, **constants):
        launched.add((kernel.__name__, *(variant_of(*each) for each in zip(kernel.arg_names, args)), *constants.items()))
        args[0].zero_()

    monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", 8)
    with quick_gpu(launch):
        engine = new_engine("llama", max_num_seqs=max_num_seqs, max_model_len=300, num_blocks=600, graphs=graphs)
        engine.warm_up()
        compiled, sizes = set(launched), set(engine.runner.recorded)
        monkeypatch.setattr(torch.cuda, "graph", None)
        assert sizes == (set() if graphs is False else set(module("runner").choose_sizes(max_num_seqs)))
        for number in range(1, max_num_seqs + 1):
            prompts = [ids(length) for length in (1, 9, 30, 250, 2, 16, 5, 120)[:number]]
            for options in ({}, {"temperature": 0.8, "top_p": 0.9, "top_k": 7}, {"logprobs": 1, "prompt_logprobs": True}):
                run(engine, Params, [(prompt, options | {"max_tokens": 4, "ignore_eos": True}, 0, None) for prompt in prompts])
        run(engine, Params, traffic(2))
    assert launched <= compiled
    assert set(engine.runner.recorded) == sizes


@pytest.mark.whole
@needs_triton
@only_pretended
def test_a_recorded_step_splits_a_long_context_as_a_launched_one_does(new_engine, module, monkeypatch, Params, ids):
    """How many splits there are is computed by Python. When it is recorded, no context is long, or there is none at all."""
    splits = []

    def launch(kernel, *args, **options):
        if kernel.__name__ == "_attend_kernel":
            splits.append(args[kernel.arg_names.index("num_splits")])
        run_stand_in(kernel, *args, **options)

    monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", 8)
    with quick_gpu(launch):
        prompt, counts = ids(60), []
        for graphs in (False, None):
            engine = new_engine(graphs=graphs)
            engine.warm_up()
            engine.add_request(prompt, Params(max_tokens=3, ignore_eos=True))
            for _ in range(3):
                splits.clear()
                engine.step()
            counts.append(set(splits))
    # 60 to 62 positions launched, and room for 64 recorded
    assert counts == [{7}, {8}]


def state_of(value):
    """A copy that is equal to a later one if nothing has changed in between."""
    if type(value).__eq__ is object.__eq__ and hasattr(value, "__dict__"):
        return {name: state_of(each) for name, each in vars(value).items()}
    return copy.copy(value)


def seen(engine):
    """Everything that anybody can see of an engine."""
    pool, scheduler = engine.pool, engine.scheduler
    seqs = [{name: state_of(value) for name, value in vars(seq).items() if name != "stream"} for seq in engine.seqs.values()]
    queues = [[seq.seq_id for seq in queue] for queue in (scheduler.running, scheduler.waiting)]
    keys = dict(pool.key_of), {key: list(blocks) for key, blocks in pool.blocks_of.items()}
    counters = engine.num_requests, engine.num_steps, engine.num_resets, engine.num_positions
    owners = list(pool.free_ids), list(pool.num_owners)
    generators = random.getstate(), torch.get_rng_state().tolist()
    return bits(engine).tolist(), owners, keys, seqs, queues, counters, engine.stats(), generators


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("attention", ["triton", "torch"])
def test_warming_up_at_any_time_changes_nothing_that_anybody_sees(new_engine, gpu, Params, ids, attention):
    """Before the first request, while some run and others wait, and with every block in use; twice, too."""
    options = {"max_tokens": 12, "logprobs": 2, "ignore_eos": True}
    requests = [(ids(length), options | {"temperature": 0.5 * (length % 2), "seed": length}, 0, None) for length in (9, 2, 6, 3)]
    outputs, full = [], []
    for warms_up in (False, True):
        engine = new_engine(attention=attention, max_num_seqs=3, num_blocks=9, reserve_tokens=0)

        def warm_up(step, engine=engine):
            before = seen(engine)
            engine.warm_up()
            assert seen(engine) == before
            full.append(engine.pool.num_free == 0)

        outputs.append(run(engine, Params, requests, warm_up if warms_up else lambda step: None))
    assert any(full) and not all(full) and engine.stats().preemptions
    assert_same(*outputs)


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
def test_warming_up_says_what_it_costs_and_how_far_it_is(new_engine, gpu, capsys, monkeypatch):
    new_engine(max_num_seqs=5).warm_up()
    assert "recorded 4 batch sizes in " in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    new_engine(max_num_seqs=5).warm_up()
    said = capsys.readouterr().err
    assert all(f"recorded {number} of 4 batch sizes\r" in said for number in (1, 2, 3, 4)) and said.endswith(" MiB\n")
    new_engine(max_num_seqs=5, graphs=False).warm_up()
    assert "recorded" not in capsys.readouterr().err


def test_the_engines_process_is_ready_once_it_is_warm(chapter, module, monkeypatch):
    """The server says that it is well when it has this message."""
    happened, process = [], module("engine_process")
    monkeypatch.setattr(module("engine").Engine, "warm_up", lambda engine: happened.append("warm"))
    monkeypatch.setattr(process.Channel, "send", lambda channel, message, stats: happened.append(type(message).__name__))
    monkeypatch.setattr(process.EngineLoop, "run", lambda loop: happened.append("runs"))
    monkeypatch.setattr(process, "leave", lambda exit_code: happened.append(exit_code))
    monkeypatch.setattr(process, "threading", SimpleNamespace(Thread=mock.Mock(), Lock=threading.Lock))
    process.run_engine(mock.Mock(), lambda: process.load_engine(checkpoint("llama")))
    assert happened == ["warm", "Ready", "runs", 0]


def test_the_engines_thread_is_served_once_it_is_warm(chapter, module, monkeypatch):
    main, happened = importlib.import_module(f"milestones.{chapter.name}.__main__"), []
    monkeypatch.setattr(module("engine").Engine, "warm_up", lambda engine: happened.append("warm"))
    monkeypatch.setattr(module("process"), "bind", lambda *_: None)
    monkeypatch.setattr(module("process"), "serve", lambda *_: happened.append("serve"))
    arguments = ["serve", "--engine", "thread", "--device", "cpu", "--model", str(checkpoint("llama"))]
    main.run_serve(main.build_parser().parse_args(arguments))
    assert happened == ["warm", "serve"]


# ---- what a step launches, uploads and waits for


def is_on_gpu(value):
    return isinstance(value, Tensor) and value.device.type == "cuda"


def is_elsewhere(index):
    """Whether it is a list, or a tensor of the CPU."""
    return isinstance(index, (list, Tensor)) and not is_on_gpu(index)


def indices(index):
    return index if isinstance(index, tuple) else (index,)


class Copies(TorchFunctionMode):
    """Notes, in order, each upload to the GPU that moves anything, and each wait for one of its results.

    A list or a tensor of the CPU as an index is uploaded, and Python waits for it.
    """

    def __init__(self):
        self.events = []
        self.pinned = []  # what is in pinned memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.pin_memory or kwargs.get("pin_memory"):
            self.pinned.append(result.untyped_storage())
        elif func in (Tensor.to, Tensor.copy_):
            source, target = (args[0], result) if func is Tensor.to else (args[1], args[0])
            if not is_on_gpu(source) and is_on_gpu(target) and source.numel():
                self.events.append(("upload", self.is_pinned(source), kwargs.get("non_blocking", False)))
        elif func in READ and is_on_gpu(args[0]):
            self.events.append(("wait",))
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and is_on_gpu(args[0]) and any(map(is_elsewhere, indices(args[1]))):
            self.events.append(("upload", False, False))
        return result

    def is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in [storage.data_ptr() for storage in self.pinned]


# The options of a request, the most that a step launches, and how many uploads choosing takes.
WAYS = {
    "greedy": ({}, 6, 0),
    "sampled": ({"temperature": 1.0}, 19, 3),
    "filtered": ({"temperature": 0.7, "top_k": 9, "top_p": 0.9}, 31, 5),
}


@pytest.mark.whole
@needs_triton
@only_pretended
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_one_replay_one_upload_and_one_wait(new_engine, gpu, Params, ids, way):
    """And the head and the choice, a row for each changed block table, and the ids of blocks that begin. No upload makes Python wait."""
    options, most_launches, num_others = WAYS[way]
    with Copies() as copies:
        engine = new_engine(max_num_seqs=5, num_blocks=60, block_size=8)
        engine.warm_up()
        for length in (3, 5, 7):
            engine.add_request(ids(length), Params(max_tokens=20, seed=length, ignore_eos=True, **options))
        engine.step()
        for number in range(12):
            launches.clear()
            copies.events.clear()
            engine.step()
            lengths = [seq.num_computed for seq in engine.scheduler.running]
            # In the first of these steps, all rows are new to the runner.
            num_begun = sum(length % 8 == 1 for length in lengths)
            num_tables = 3 if number == 0 else num_begun
            uploads = [event for event in copies.events if event[0] == "upload"]
            assert len(uploads) == 1 + num_tables + (num_begun > 0) + num_others
            assert set(uploads) == {("upload", True, True)}
            assert copies.events == [*uploads, ("wait",)]
            computed = [name for name in launches if name != "copy_"]
            assert computed.count("replay") == 1 and len(computed) <= most_launches


@pytest.mark.whole
@needs_triton
@only_pretended
@pytest.mark.parametrize("graphs", [None, False])
def test_what_is_uploaded_is_not_overwritten_before_the_gpu_has_it(new_engine, gpu, Params, graphs):
    """A copy from pinned memory may be late. It is over once Python has waited for something that was computed after it."""
    with Copies() as copies:
        engine = new_engine(graphs=graphs)
        rewritten = []

        def build(correct, seqs):
            rows = [number for number, event in enumerate(copies.events) if event == "rows"]
            if rows:
                assert ("wait",) in copies.events[rows[-1] :]
                rewritten.append(len(rows))
            batch = correct(seqs)
            copies.events.append("rows")
            return batch

        observe(engine.runner, "build", build)
        run(engine, Params, traffic(4))
    assert len(rewritten) > 9


def addresses(*owners):
    """Where each tensor of the owners is in memory."""
    pairs = [((number, name), value) for number, owner in enumerate(owners) for name, value in vars(owner).items()]
    return {name: getattr(value, "held", value).data_ptr() for name, value in pairs if isinstance(value, Tensor)}


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_tensor_of_the_rows_or_the_cache_is_ever_another(new_engine, gpu, Params, device):
    engine = new_engine(device=device, swap_bytes=10**5, num_blocks=14, reserve_tokens=0)
    owners = engine.runner, engine.runner.written, engine.runner.read, engine.cache
    before = addresses(*owners)
    assert len(before) == 1 + 2 * 7 + 2

    def check(step):
        assert addresses(*owners) == before
        if step == 9:
            engine.fail_step()
        if step == 11:
            engine.warm_up()

    run(engine, Params, traffic(5), check)
    assert engine.stats().preemptions and addresses(*owners) == before


@needs_triton
@only_pretended
def test_a_recording_that_fails_fails_its_step_and_no_other(new_engine, gpu, monkeypatch, Params, ids):
    prompt, params = ids(5), Params(max_tokens=4, ignore_eos=True)
    engine = new_engine()
    [want] = new_engine(graphs=False).generate([prompt], params)

    @contextlib.contextmanager
    def full(graph, pool=None, stream=None):
        raise torch.OutOfMemoryError("no memory for the recording")
        yield

    request_id = engine.add_request(prompt, params)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", full)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert engine.fail_step() == [request_id] and not engine.runner.recorded
    assert engine.generate([prompt], params)[0].token_ids == want.token_ids
    assert set(engine.runner.recorded) == {1}


# ---- two engines


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
def test_two_engines_have_a_pool_each_and_one_may_be_collected(new_engine, gpu, monkeypatch, Params):
    """All recordings of an engine share its pool, since one runs at a time. Two engines may run at the same time."""
    graph, pools, streams = torch.cuda.graph, [], []

    def noted(recording, pool=None, stream=None):
        pools.append(pool)
        streams.append(stream)
        return graph(recording, pool=pool, stream=stream)

    monkeypatch.setattr(torch.cuda, "graph", noted)
    requests = traffic(6)
    engines, given = [new_engine(enable_prefix_caching=False) for _ in range(3)], []
    want = run(engines.pop(), Params, requests)
    pools.clear()
    for engine in engines:
        engine.warm_up()
        given.append(list(pools))
        pools.clear()
    for first, *others in given:
        assert first is None and len(others) == 3 and None not in others
    assert not set(given[0][1:]) & set(given[1][1:])
    # A stream of PyTorch's own would be on the GPU of the first engine that records.
    assert {id(stream) for stream in streams[-8:]} == {id(engine.runner.stream) for engine in engines} and None not in streams
    # They take turns, and then one of them is gone.
    for prompt, options, *_ in requests:
        engines[1].add_request(prompt, Params(**options))
    assert_same(run(engines[0], Params, requests, lambda step: engines[1].step() if step < 9 else None), want)
    assert engines[1].num_steps == 9 and engines[1].has_unfinished_requests()
    gone = weakref.ref(engines[1]), weakref.ref(engines[1].runner), weakref.ref(engines[1].model)
    del engines[1], engine
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert_same(run(engines[0], Params, requests), want)


# ---- the option


@pytest.mark.whole
@needs_triton
def test_graphs_are_refused_where_they_are_impossible_and_on_where_they_are_possible(new_engine, gpu, monkeypatch):
    impossible = {
        "torch on cpu": {"device": "cpu"},
        "torch on cuda": {"attention": "torch"},
        "triton on cpu": {"device": "cpu", "attention": "triton"},
    }
    for place, options in impossible.items():
        monkeypatch.setenv("TRITON_INTERPRET", "1" if place == "triton on cpu" else "0")
        with pytest.raises(ValueError, match=f"graphs is True, but steps are recorded only on a GPU with attention triton, not {place}"):
            new_engine(graphs=True, **options)
        assert "graphs off" in new_engine(**options).describe()
    monkeypatch.undo()
    for graphs in (None, True):
        assert "graphs on" in new_engine(graphs=graphs).describe()
    assert "graphs off" in new_engine(graphs=False).describe()
    for graphs in (1, 0, "on"):
        with pytest.raises(ValueError, match=f"graphs must be True, False or None, got {graphs!r}"):
            new_engine(graphs=graphs)


def test_the_flags_reach_the_engine(chapter, capsys):
    main = importlib.import_module(f"milestones.{chapter.name}.__main__")
    for command in (["generate", "A"], ["serve"]):
        for flags, graphs in (([], None), (["--graphs"], True), (["--no-graphs"], False)):
            assert main.chosen(main.build_parser().parse_args([*command, *flags]), main.ENGINE_FLAGS)["graphs"] is graphs
    arguments = ["generate", "A", "--model", str(checkpoint("llama")), "--device", "cpu", "--max-tokens", "1"]
    assert main.main([*arguments, "--graphs"]) == 2
    assert "error: graphs is True, but" in capsys.readouterr().err
    assert main.main([*arguments, "--no-graphs"]) == 0


# ---- what else takes less time now


@pytest.mark.parametrize("num_values", [1, 7, 401, 2048])
def test_the_largest_logit_is_the_one_that_pytorch_finds(module, num_values):
    """The first of equals, and the first NaN, wherever they are."""
    generator = torch.Generator().manual_seed(num_values)
    for special in ([], [torch.nan], [torch.inf], [-torch.inf], [torch.nan, torch.inf], [0.0, -0.0]):
        logits = torch.randn(64, num_values, generator=generator).round(decimals=1)
        logits[0], logits[1], logits[2] = 0, -torch.inf, torch.nan
        for row in range(3, 64 if special else 3):
            places = torch.randint(0, num_values, (len(special) + row % 3,), generator=generator)
            logits[row, places] = torch.tensor((special * 3)[: len(places)])
        first = [int((row.isnan() if row.isnan().any() else row == row.max()).nonzero()[0]) for row in logits]
        assert module("sampling").argmax(logits).tolist() == first == logits.argmax(-1).tolist()
    assert module("sampling").argmax(torch.zeros(0, 5)).tolist() == []


@pytest.mark.parametrize(("name", "tokenizer"), [pytest.param(*each, id=each[0]) for each in every_tokenizer()])
def test_text_is_what_it_was(chapter, module, rng, name, tokenizer):
    """Piece by piece, with stop strings and without, for byte-level, Metaspace and byte-fallback vocabularies and the rest."""
    before = importlib.import_module(f"milestones.{chapter.previous.name}.text")
    any_ids = range(len(tokenizer) + 2)
    make = some_ids if name in ("byte_level", "metaspace") else lambda tokenizer, rng, length: rng.choices(any_ids, k=length)
    stopped = 0
    for _ in range(60):
        prompt_ids = rng.choice((None, make(tokenizer, rng, rng.choice((1, 2, 30)))))
        stop = tuple(rng.sample(["a", "b", "two", "日", "\ufffd", "<s>", " "], rng.choice((0, 0, 1, 2))))
        streams = [text.TextStream(tokenizer, prompt_ids, stop) for text in (module("text"), before)]
        token_ids = make(tokenizer, rng, rng.choice((1, 3, 57)))
        for number, token_id in enumerate(token_ids, 1):
            pieces = [stream.push([token_id], last=number == len(token_ids)) for stream in streams]
            assert pieces[0] == pieces[1] and {name: getattr(streams[0], name) for name in vars(streams[1])} == vars(streams[1])
            stopped += streams[0].stopped_by is not None
            if streams[0].stopped_by is not None:
                break
    assert stopped


# ---- the stand-ins


def copied(args):
    """The arguments of a launch with copies of the tensors. Those that shared their memory do so again."""
    memory = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in args if isinstance(value, Tensor)}
    memory = {address: storage.clone() for address, storage in memory.items()}
    copies = []
    for value in args:
        if isinstance(value, Tensor):
            place = memory[value.untyped_storage().data_ptr()], value.storage_offset(), value.shape, value.stride()
            value = value.new_empty(0).set_(*place)
        copies.append(value)
    return copies


@pytest.mark.whole
@needs_triton
@only_pretended
@pytest.mark.parametrize("name", ["llama-two-layers", "qwen3-two-layers"])
def test_the_stand_ins_compute_what_the_kernels_compute(new_engine, module, monkeypatch, Params, ids, name):
    """Each launch of a few steps, of prompts and of single tokens, with split contexts, padding and NaN where no one reads."""
    from triton.runtime.interpreter import InterpretedFunction

    interpret, compared = InterpretedFunction.run, Counter()

    def launch(kernel, *args, **options):
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            copies = copied(args)
            interpret(kernel, *copies, **options)
        run_stand_in(kernel, *args, **options)
        for mine, its in zip(args, copies, strict=True):
            if isinstance(mine, Tensor):
                torch.testing.assert_close(mine, its, atol=2e-5, rtol=2e-5, equal_nan=True)
        compared[kernel.__name__] += 1

    monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", 8)
    with quick_gpu(launch):
        engine = new_engine(name, max_num_seqs=4, max_model_len=16)
        fill(engine, torch.nan)
        engine.generate([ids(length) for length in (9, 3, 1)], Params(max_tokens=2, ignore_eos=True))
    assert compared.keys() == STAND_INS.keys() and min(compared.values()) >= 4
