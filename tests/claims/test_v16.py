"""v16: with exact=True, a request's numbers have the same bits whatever else is in its steps."""
import contextlib
import importlib
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shared.checkpoints import RANDOM, SHAPES, checkpoint, random_checkpoint
from shared.verify import product
from shared.verify.pretend_gpu import dot_in_order, launches, pretend_gpu
from shared.workloads import random_ids
from tests.claims.test_v06 import CHANGING, DEVICE, needs_triton, paged
from tests.support.stand_ins import quick_gpu, run_stand_in

only_pretended = pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is pretended")
# Two of the prompts have more keys than a tile, and one more than two tiles.
LENGTHS, MAX_NEW, MAX_LEN = (3, 140, 150, 290), 24, 320


@pytest.fixture
def num_threads():
    """Let PyTorch compute with another number of threads during the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def new_engine(chapter):
    """Engines of the test's own."""

    def new_engine(name="llama", *, num_tokens=4 * MAX_LEN, block_size=16, **options):
        limits = {"num_blocks": -(-num_tokens // block_size), "block_size": block_size, "max_num_seqs": 8, "max_model_len": MAX_LEN}
        return chapter.load().Engine(checkpoint(name), **{"dtype": "float32", "exact": True} | limits | options)

    return new_engine


@pytest.fixture
def new_requests(Params, rng):
    """Prompts of these lengths, and how to continue each: the likeliest tokens, and sampled ones."""

    def new_requests(engine, lengths=LENGTHS, max_new=MAX_NEW, prompt_logprobs=True):
        options = {"max_tokens": max_new, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": prompt_logprobs}
        prompts = [random_ids(length, engine.config.vocab_size, rng) for length in lengths]
        return prompts, [Params(**options, temperature=0.8 * (number % 2), seed=number) for number in range(len(lengths))]

    return new_requests


def said(outputs):
    """All that the engine computed of each request. Floats are compared with ==."""
    return [(output.token_ids, output.logprobs, output.prompt_logprobs) for output in outputs]


def alone(engine, prompts, params):
    """Each request in an engine that has no other."""
    return [engine.generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]


def counted(got, want):
    """How many requests differ in any bit."""
    return sum(mine != its for mine, its in zip(said(got), said(want), strict=True))


@contextlib.contextmanager
def noted(owner, name):
    """A list that gets the result of each call of the owner's method."""
    correct, results = getattr(owner, name), []

    def noting(*args):
        results.append(correct(*args))
        return results[-1]

    with mock.patch.object(owner, name, noting):
        yield results


def tight(block_size):
    """The number of tokens in a cache in which the first three requests begin together and do not end together."""
    longest, *begun = (-(-length // block_size) for length in (LENGTHS[-1] + MAX_NEW - 1, *LENGTHS[:3]))
    return max(longest, sum(begun)) * block_size


def differences(new_engine, new_requests, name, lengths=LENGTHS, max_new=MAX_NEW, **options):
    """For each way to run requests, the number of those that differ from themselves alone in an engine with the same options."""
    uncached = options | {"enable_prefix_caching": False}
    roomy = new_engine(name, **uncached)
    prompts, params = new_requests(roomy, lengths, max_new)
    want = alone(roomy, prompts, params)
    found = {}

    again = [prompt + output.token_ids for prompt, output in zip(prompts, want, strict=True)]
    fed = alone(roomy, again, [replace(each, max_tokens=1) for each in params])
    # The first position of a prompt has no logprobs.
    pairs = zip(fed, want, strict=True)
    found["decoded, and fed as a prompt"] = sum(each.prompt_logprobs != output.prompt_logprobs + output.logprobs for each, output in pairs)

    found["together"] = counted(new_engine(name, **uncached).generate(prompts, params), want)
    for budget in (8, 37, 200):
        engine = new_engine(name, max_num_batched_tokens=budget, **uncached)
        found[f"in pieces of {budget}"] = counted(engine.generate(prompts, params), want)

    for way, swap_bytes in (("computed again", 0), ("swapped", 10**8)):
        engine = new_engine(name, num_tokens=tight(roomy.pool.block_size), reserve_tokens=0, swap_bytes=swap_bytes, **uncached)
        with noted(engine.swap.pool, "allocate") as swapped:
            found[way] = counted(engine.generate(prompts, params), want)
        assert engine.stats().preemptions and any(swapped) is bool(swap_bytes), way

    engine = new_engine(name, **options)
    params = [replace(each, prompt_logprobs=False) for each in params]
    want = [replace(output, prompt_logprobs=None) for output in want]
    engine.generate([prompt[: 3 * len(prompt) // 4] for prompt in prompts], params)
    got = engine.generate(prompts, params)
    assert min(output.num_cached for output in got[1:]) > 90
    found["found in the cache"] = counted(got, want)
    return found


# ---- the same bits


CASES = [("pocket", 16), ("llama", 1), ("llama3", 48), ("mistral", 3), ("qwen2", 16), ("qwen3", 1)]


@pytest.mark.whole
@pytest.mark.parametrize(("name", "block_size"), CASES)
def test_a_request_has_the_same_bits_in_company_in_pieces_preempted_and_cached(new_engine, new_requests, name, block_size):
    found = differences(new_engine, new_requests, name, block_size=block_size, device="cpu")
    assert len(found) == 8 and not any(found.values()), found


@pytest.mark.whole
@pytest.mark.parametrize(("name", "block_size", "dtype"), [("qwen2", 48, "bfloat16"), ("mistral", 3, "float16")])
def test_in_16_bits_too(new_engine, new_requests, name, block_size, dtype):
    found = differences(new_engine, new_requests, name, block_size=block_size, device="cpu", dtype=dtype)
    assert len(found) == 8 and not any(found.values()), found


@pytest.mark.whole
def test_on_two_threads_too(new_engine, new_requests, num_threads):
    num_threads(2)
    engine = new_engine("pocket", device="cpu", max_num_batched_tokens=90, enable_prefix_caching=False)
    prompts, params = new_requests(engine, (140, 30), 2)
    assert counted(engine.generate(prompts, params), alone(engine, prompts, params)) == 0


def test_a_long_context_has_the_same_bits(new_engine, new_requests):
    """More than seven tiles of keys, beside contexts of one to four."""
    engine = new_engine("pocket", num_tokens=3000, max_model_len=1000, max_num_batched_tokens=300, device="cpu", enable_prefix_caching=False)
    prompts, params = new_requests(engine, (250, 930, 20, 127, 400), 6)
    assert counted(engine.generate(prompts, params), alone(engine, prompts, params)) == 0


@pytest.mark.whole
def test_without_exact_the_same_comparison_finds_differences(new_engine, new_requests):
    """In every way, for some request."""
    for name in ("pocket", "qwen2"):
        found = differences(new_engine, new_requests, name, device="cpu", exact=False, linear="plain")
        assert len(found) == 8 and all(found.values()), found


# Plans that preempt in both ways and find the beginnings of prompts, for each of the checkpoints.
SEEDS, NAMES = (105, 106, 110, 111), ("llama3", "qwen2", "qwen3")


@pytest.mark.whole
def test_with_every_feature_at_once_too(chapter):
    events = product.rounds(chapter, SEEDS, NAMES)
    assert events["exact engines"] == len(SEEDS)
    expected = {*product.PREEMPTED, "found the beginning of a prompt", f"steps after which a request is {product.MID_PROMPT}"}
    assert expected <= {event for event, count in events.items() if count > 0}


@pytest.mark.whole
def test_the_product_test_notices_an_engine_that_is_not_exact(chapter, module, monkeypatch):
    monkeypatch.setattr(module("engine"), "make_exact", lambda model, config, backend, *_: ("plain", backend))
    with pytest.raises(AssertionError, match="logprobs at") as caught:
        product.rounds(chapter, SEEDS, NAMES)
    assert any("'exact': True" in note for note in caught.value.__notes__)


# ---- the experiment


def in_company(batch):
    """Whether a pass feeds other sequences, too."""
    return len(batch.view) > 1 or len(batch.view[0].block_tables) > 1


def begun(batch):
    """Whether some sequence has been fed before this pass."""
    return any(int(tiles.positions[:, 0, 0].min()) > 0 for tiles in batch.view)


def next_float(x, wrong):
    """x or, if it is wrong, numbers that differ in the last bit."""
    return torch.nextafter(x, torch.full_like(x, torch.inf)) if wrong else x


def planted(module, kind):
    """A form of the weights and a backend, in one of which a row's bits depend on something else."""
    exact = module("exact")

    class Product(exact.RowTiles):
        def __call__(self, x):
            if len(x) > 1 or kind != "product":
                return super().__call__(x)
            return F.linear(x.flip(1), self.weight.flip(1), self.bias)

    class Head(exact.RowTiles):
        def __call__(self, x):
            return next_float(super().__call__(x), len(self.weight) == 401 and len(x) < 5)

    def build(config, backend):
        good = exact.torch_exactly(config, 16, exact.TILE_ROWS, torch.float32)
        attend, gate, norm = good.attend, good.gate, good.norm
        return {
            "attention": backend,
            "attention in company": good._replace(attend=lambda q, i, batch: next_float(attend(q, i, batch), in_company(batch))),
            "attention of a later piece": good._replace(attend=lambda q, i, batch: next_float(attend(q, i, batch), begun(batch))),
            "gate": good._replace(gate=lambda gate_, up: next_float(gate(gate_, up), len(up) > 200)),
            "norm": good._replace(norm=lambda hidden, *rest: next_float(norm(hidden, *rest), len(hidden) % 2)),
        }.get(kind, good)

    return (Head if kind == "head" else Product), build


def candidate_of(module, form, backend):
    return module("exact").Candidate("planted", form, backend, backend)


KINDS = ("product", "head", "attention", "attention in company", "attention of a later piece", "gate", "norm")


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_an_engine_that_computes_other_bits_in_another_batch_does_not_start(new_engine, module, monkeypatch, kind):
    form, build = planted(module, kind)
    monkeypatch.setattr(module("exact"), "candidates", lambda model, config, backend, *_: [candidate_of(module, form, build(config, backend))])
    if not kind:
        assert new_engine(device="cpu").linear == "planted"
        return
    with pytest.raises(ValueError, match="^exact is True, but .*; leave exact out$"):
        new_engine(device="cpu")


def test_the_next_candidate_is_tried_and_leaves_nothing_of_the_one_before(new_engine, module, monkeypatch, new_requests):
    exact, (form, build) = module("exact"), planted(module, "product")
    engine = new_engine(device="cpu")
    prompts, params = new_requests(engine, (40, 9), 5)
    correct = exact.candidates

    def candidates(model, config, backend, *limits):
        yield candidate_of(module, form, build(config, backend))
        yield from correct(model, config, backend, *limits)

    monkeypatch.setattr(exact, "candidates", candidates)
    second = new_engine(device="cpu")
    assert second.linear == engine.linear != "planted"
    assert said(second.generate(prompts, params)) == said(engine.generate(prompts, params))
    assert not any(isinstance(layer.form, form) for group in module("storage").groups_of(second.model) for layer in group)


@pytest.mark.parametrize(("change", "is_noticed"), [("none", False), ("one bit", True), ("the sign of a zero", True), ("NaN", True)])
def test_tensors_are_the_same_only_if_all_bits_are(module, change, is_noticed):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        before = torch.randn(7, 5).to(dtype)
        before[3, 2], before[1, 1] = 0, torch.nan
        after = before.clone()
        if change == "one bit":
            after[6, 4] = torch.nextafter(after[6, 4], torch.tensor(9.0, dtype=dtype))
        elif change == "the sign of a zero":
            after[3, 2] = -0.0
        elif change == "NaN":
            after[0, 0] = torch.nan
        assert module("trial").is_same(before, after.T.contiguous().T) is not is_noticed


@pytest.mark.whole
def test_the_experiment_takes_less_than_a_second(new_engine, module):
    """Of the trained checkpoint, and of a layer and a head of the shape of a published one."""
    exact, seconds = module("exact"), []
    correct = exact.is_exact

    def clocked(*args):
        start = time.process_time()
        result = correct(*args)
        seconds.append(time.process_time() - start)
        return result

    with mock.patch.object(exact, "is_exact", clocked):
        engine = new_engine("pocket", device="cpu")
        spec = SHAPES["smollm2-135m-shape"]
        sizes = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        config = replace(engine.config, num_layers=1, **{name: getattr(spec, name) for name in sizes})
        model = module("model").CausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        exact.make_exact(model, config, module("backends").TORCH, "auto", 16, 512)
    assert len(seconds) >= 2 and max(seconds) < 1


@pytest.mark.parametrize("group", [group for group in range(1, 21) if group % 8])
def test_some_piece_of_the_experiment_ends_in_four_rows(module, group):
    """Of a large head, the CPU's attention multiplies the last four rows in another way. Of six heads per KV head, no piece had four."""
    assert any(-(-num_tokens * group // 4) * 4 % 32 == 4 for num_tokens in module("trial").PIECES)


@pytest.mark.whole
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a CPU's attention")
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "dtype"),
    [*((each, 128, "float32") for each in (12, 18, 20)), *((num_heads, each, "bfloat16") for num_heads in (8, 12) for each in (72, 80, 100, 104, 120))],
)
def test_it_is_exact_for_every_number_of_query_heads_and_each_of_their_lengths(chapter, Params, rng, num_heads, head_dim, dtype):
    shape = dict(num_heads=num_heads, num_kv_heads=2, head_dim=head_dim, hidden_size=192, num_layers=1)
    path = random_checkpoint(replace(RANDOM["qwen2"], **shape))
    try:
        engine = chapter.load().Engine(path, dtype=dtype, device="cpu", exact=True, num_blocks=40, block_size=16)
    except ValueError as error:
        pytest.skip(f"this processor has no exact form: {error}")

    def ids(length):
        return random_ids(length, 401, rng)

    begin, params = ids(64), Params(max_tokens=1, logprobs=2)
    for length in (6, 11, 13, 22, 27, 43, 54):
        prompt = begin + ids(length)
        engine.reset_prefix_cache()
        [whole] = engine.generate([prompt], params)
        engine.reset_prefix_cache()
        engine.generate([begin + ids(1)], Params(max_tokens=1))
        [found] = engine.generate([prompt], params)
        assert found.num_cached == len(begin) and found.logprobs == whole.logprobs, length


def small_trial(module, monkeypatch):
    """Make the experiment short enough for Triton's interpreter."""
    trial = module("trial")
    monkeypatch.setattr(trial, "PIECES", (1, 2, 17))
    monkeypatch.setattr(trial, "COMPANY", ((), (1,), (2, 1)))
    monkeypatch.setattr(trial, "HEAD_ROWS", ((0, 1), (3, 5), (2, 16)))


@pytest.mark.whole
@needs_triton
@only_pretended
def test_in_tritons_interpreter_it_is_exact_or_refused(new_engine, module, monkeypatch, new_requests):
    """The interpreter multiplies with NumPy, whose order of a sum may depend on the shape."""
    small_trial(module, monkeypatch)
    try:
        engine = new_engine("llama-two-layers", device="cpu", attention="triton", enable_prefix_caching=False)
    except ValueError as error:
        assert str(error).startswith("exact is True, but ") and "attention triton" in str(error)
    else:
        prompts, params = new_requests(engine, (3, 5), 2)
        assert counted(engine.generate(prompts, params), alone(engine, prompts, params)) == 0


# ---- the option


@pytest.mark.parametrize("linear", ["plain", "joined", "blocks", "halves"])
def test_a_form_is_refused_by_name(new_engine, linear):
    with pytest.raises(ValueError, match=f"^exact is True, .* linear is '{linear}'"):
        new_engine(linear=linear, device="cpu")


def test_exact_is_true_or_false_and_described(new_engine):
    for exact in ("yes", 1, 0, None):
        with pytest.raises(ValueError, match=f"^exact must be True or False, got {exact!r}$"):
            new_engine(exact=exact, device="cpu")
    for exact, word in ((True, "on"), (False, "off")):
        assert f", exact {word}," in new_engine(exact=exact, device="cpu").describe()


def test_the_flag_reaches_the_engine(chapter, capsys):
    main = importlib.import_module(f"milestones.{chapter.name}.__main__")
    for command in (["generate", "A"], ["serve"]):
        for flags, exact in (([], False), (["--exact"], True)):
            assert main.chosen(main.build_parser().parse_args([*command, *flags]), main.ENGINE_FLAGS)["exact"] is exact
    arguments = ["generate", "A", "--model", str(checkpoint("llama")), "--device", "cpu", "--max-tokens", "1", "--exact"]
    assert main.main([*arguments, "--linear", "plain"]) == 2
    assert "error: exact is True, " in capsys.readouterr().err
    assert main.main(arguments) == 0
    assert ", exact on," in capsys.readouterr().err


# ---- the forms


@pytest.fixture(params=["PaddedBlocks", "RowTiles"])
def form(request, module):
    """Each form whose products are exact, where this machine has it."""
    if request.param == "PaddedBlocks" and not module("storage").HAS_BLOCKS:
        pytest.skip("this PyTorch has no such product for this processor")
    return getattr(module("exact"), request.param)


SIZES = [(60, 88), (93, 401), (576, 49), (1536, 576), (2048, 2048), (2048, 130)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_form_gives_a_row_the_same_bits_beside_any_others(form, sizes):
    size_in, size_out = sizes
    generator = torch.Generator().manual_seed(size_in)
    weight = torch.randn(size_out, size_in, generator=generator) * size_in**-0.5
    x, bias = torch.randn(70, size_in, generator=generator), torch.randn(size_out, generator=generator)
    for b in (None, bias):
        multiply = form(weight, b)
        whole = multiply(x)
        torch.testing.assert_close(whole, F.linear(x, weight, b), atol=2e-5, rtol=2e-5)
        for num_rows in range(1, 71):
            first = num_rows * 37 % (71 - num_rows)
            assert multiply(x[first : first + num_rows]).equal(whole[first : first + num_rows]), num_rows


def test_padded_blocks_never_multiply_a_single_row(module, monkeypatch):
    """oneDNN sums long single rows in another order on some processors. Here it does so on each, and a stand-in multiplies."""
    blocks = module("storage").Blocks
    monkeypatch.setattr(blocks, "__init__", lambda form, weight, bias: setattr(form, "weight", weight))
    monkeypatch.setattr(blocks, "__call__", lambda form, x: next_float((x[:, None] * form.weight).sum(-1), len(x) == 1))
    form, x = module("exact").PaddedBlocks(torch.randn(9, 8), None), torch.randn(5, 8)
    whole = form(x)
    assert [form(x[i : i + 1]).equal(whole[i : i + 1]) for i in range(5)] == [True] * 5


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 70])
def test_row_tiles_have_as_many_rows_each_time(module, monkeypatch, num_rows):
    exact, multiplied = module("exact"), []
    form, x = exact.RowTiles(torch.randn(9, 8), None), torch.randn(num_rows, 8)
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: (multiplied.append(x.clone()), linear(x, *rest))[1])
    assert form(x).shape == (num_rows, 9)
    assert [len(tile) for tile in multiplied] == [exact.TILE_ROWS] * -(-num_rows // exact.TILE_ROWS)
    assert torch.cat(multiplied)[:num_rows].equal(x) and torch.cat(multiplied).isfinite().all()


@pytest.mark.parametrize("width", [88, 93, 1000])
def test_the_gate_gives_a_row_the_same_bits_beside_any_others(module, num_threads, width):
    """F.silu would not: the parts of a joined product at one of these widths, a tensor of its own at each."""
    joined = torch.randn(131, 2 * width, generator=torch.Generator().manual_seed(1))
    parts = joined.split(width, dim=-1)
    apart = tuple(part.contiguous() for part in parts)

    def differ(gate):
        """How many numbers of rows have other bits than all rows on one thread."""
        num_threads(1)
        whole, found = gate(*parts), 0
        for threads in (1, 2):
            num_threads(threads)
            for pair in (parts, apart):
                found += sum(not gate(*(each[n // 2 :][:n] for each in pair)).equal(whole[n // 2 :][:n]) for n in range(1, 131, 4))
        return found

    silu_times = module("exact").silu_times
    torch.testing.assert_close(silu_times(*parts), F.silu(parts[0]) * parts[1], atol=1e-6, rtol=1e-6)
    assert differ(silu_times) == 0
    assert differ(lambda gate, up: F.silu(gate) * up) > 0


# ---- attention


def sequences(lengths, block_size, num_heads, num_kv_heads, head_dim=14):
    """Sequences as a batch reads them, of (fed now, fed before); queries, and a cache that is NaN in every block but theirs."""
    generator = torch.Generator().manual_seed(sum(map(sum, lengths)))
    needed = [-(-sum(each) // block_size) for each in lengths]
    free = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    cache = torch.full((2, sum(needed) + 3, block_size, num_kv_heads, head_dim), torch.nan)
    seqs = []
    for (fed, before), count in zip(lengths, needed, strict=True):
        table = [free.pop() for _ in range(count)]
        cache[:, table] = torch.randn(2, count, block_size, num_kv_heads, head_dim, generator=generator)
        seqs.append(SimpleNamespace(new_ids=[0] * fed, num_computed=before, block_table=table))
    q = torch.randn(sum(fed for fed, _ in lengths), num_heads, head_dim, generator=generator)
    return seqs, q, cache


def attend_both(module, seqs, q, cache, block_size, multiple=4):
    """What the exact attention gives, and the other one."""
    exact, num_kv_heads = module("exact"), cache.shape[3]
    config = SimpleNamespace(num_heads=q.shape[1], num_kv_heads=num_kv_heads)
    good, plain = exact.torch_exactly(config, block_size, multiple, q.dtype), module("backends").TORCH

    def read(layer_id, part):
        tokens = cache[:, part.block_tables.long()].flatten(2, 3)  # [2, S, M * BS, KV, D]
        return tuple(tokens[:, :, : part.context_len])

    results = []
    for backend in (good, plain):
        batch = SimpleNamespace(view=backend.build_view(seqs), cache=SimpleNamespace(read=read))
        results.append(backend.attend(q, 0, batch))
    return results


RAGGED = [(1, 0), (1, 127), (1, 128), (1, 300), (1, 470), (1, 260), (5, 0), (5, 126), (130, 0), (131, 250), (300, 0), (1, 40)]


@pytest.mark.parametrize("block_size", [1, 3, 16, 48])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_attention_in_tiles_is_attention_and_a_sequence_has_its_bits(module, group, block_size):
    seqs, q, cache = sequences(RAGGED, block_size, 2 * group, 2)
    got, want = attend_both(module, seqs, q, cache, block_size, multiple=(4, 16)[block_size % 2])
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    first = 0
    for seq in seqs:
        rows = slice(first, first + len(seq.new_ids))
        apart, _ = attend_both(module, [seq], q[rows], cache, block_size, multiple=(4, 16)[block_size % 2])
        assert apart.equal(got[rows])
        first = rows.stop


def test_a_tile_that_a_row_does_not_attend_to_leaves_all_bits_as_they_are(module):
    """A sequence fed whole and in pieces. Whole, each of its rows is computed for all tiles."""
    [whole], q, cache = sequences([(400, 0)], 16, 6, 2)
    want, _ = attend_both(module, [whole], q, cache, 16)
    first = 0
    for fed in (1, 1, 2, 3, 60, 61, 1, 127, 140, 4):
        piece = SimpleNamespace(new_ids=[0] * fed, num_computed=first, block_table=whole.block_table[: -(-(first + fed) // 16)])
        got, _ = attend_both(module, [piece], q[first : first + fed], cache, 16)
        assert got.equal(want[first : first + fed]), (first, fed)
        first += fed
    assert first == 400


# ---- kernels


@pytest.fixture
def gpu():
    """cuda:0 is pretended, and stand-ins compute what the kernels do."""
    with quick_gpu():
        yield


def weights(size_in, size_out, dtype, bias):
    generator = torch.Generator().manual_seed(size_in)
    weight = torch.randn(size_out, size_in, generator=generator) * size_in**-0.5
    b = torch.randn(size_out, generator=generator).to(dtype) if bias else None
    return torch.randn(130, size_in, generator=generator).to(dtype), weight.to(dtype), b


@needs_triton
@only_pretended
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size_in", "size_out", "bias"), [(60, 88, True), (93, 70, False), (417, 1, True)])
def test_the_product_kernel_multiplies_and_gives_a_row_the_same_bits(module, dtype, size_in, size_out, bias):
    x, weight, b = weights(size_in, size_out, dtype, bias)
    # The interpreter cannot multiply bfloat16. On the CPU, the kernel converts it.
    device = "cpu" if dtype == torch.bfloat16 else "cuda"
    with pretend_gpu():
        form = module("kernels.product").RowProduct(weight.to(device), b if b is None else b.to(device))
        x_there = x.to(device)
        got = {num_rows: form(x_there[:num_rows]).cpu() for num_rows in (1, 16, 17, 64, 65, 130)}
        last = form(x_there[129:]).cpu()
    want = F.linear(x.float(), weight.float(), None if b is None else b.float())
    # no further from it than rounding the result
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[130].float(), want, atol=4e-6 if dtype == torch.float32 else eps / 4, rtol=eps)
    assert all(each.dtype == dtype and each.equal(got[130][:num_rows]) for num_rows, each in got.items())
    assert last.equal(got[130][129:])


@needs_triton
@only_pretended
def test_the_product_kernel_never_multiplies_in_tf32(module, monkeypatch):
    """Its tl.dot is told not to. What is told nothing rounds to 10 bits after the point here, as on a GPU."""
    from triton.runtime.interpreter import InterpreterBuilder

    def rounded(handle):
        return type(handle)((handle.data.view("int32") & ~0x1FFF).view("float32"), handle.dtype.scalar)

    def dot(builder, a, b, d, precision, most_imprecise):
        a, b = (a, b) if precision.name == "IEEE" else (rounded(a), rounded(b))
        return dot_in_order(builder, a, b, d)

    x, weight, _ = weights(93, 70, torch.float32, False)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    torch.testing.assert_close(module("kernels.product").product(x, weight, None), F.linear(x, weight), atol=4e-6, rtol=1e-6)


@pytest.mark.whole
@needs_triton
@only_pretended
def test_split_every_so_many_keys_a_sequence_has_the_same_bits_beside_longer_ones(module):
    paged_attention = module("kernels.paged_attention")
    lengths = [(1, 40), (1, 200), (3, 130), (1, 300), (70, 140)]
    q, *caches, tables, starts, lens = paged(lengths, 4, 2, 14, 16)
    want = paged_attention.paged_attention_ref(q, *caches, tables, starts, lens)

    def attend(members):
        """The sequences with these numbers, in a call of their own."""
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])
        fed, contexts = zip(*(lengths[i] for i in members))
        begins = torch.tensor([0, *fed]).cumsum(0).int()
        there = [each.to("cuda") for each in (q[rows], *caches, tables[members], begins, lens[members])]
        return paged_attention.paged_attention(*there, max(fed), max(contexts), split_keys=64).cpu().split(fed)

    with pretend_gpu():
        together = attend([0, 1, 2, 3, 4])
        torch.testing.assert_close(torch.cat(together), want, atol=1e-5, rtol=1e-5)
        for members in ([0], [1], [2], [1, 0], [4, 1], [3]):
            for number, each in zip(members, attend(members), strict=True):
                assert each.equal(together[number]), members


@pytest.mark.whole
@needs_triton
@only_pretended
def test_as_many_splits_combine_to_the_same_bits(module):
    """Splits without keys change nothing, and so do those of longer contexts."""
    combine = module("kernels.paged_attention")._combine_kernel
    generator = torch.Generator().manual_seed(2)
    parts, lse = torch.randn(13, 3, 2, 14, generator=generator), torch.randn(13, 3, 2, generator=generator)
    with pretend_gpu():
        for num_keys in (1, 2, 3, 5, 6):
            results = []
            for num_splits in range(max(2, num_keys), 14):
                lse_now = lse[:num_splits].clone()
                lse_now[num_keys:] = -torch.inf
                out = torch.empty(3, 2, 14, device="cuda")
                sizes = {"HEAD_DIM": 14, "PADDED_DIM": 16}
                combine[(6,)](out, parts[:num_splits].to("cuda"), lse_now.to("cuda"), 6, num_splits, **sizes)
                results.append(out.cpu())
            shares = lse[:num_keys].softmax(0)[..., None]
            torch.testing.assert_close(results[0], (parts[:num_keys] * shares).sum(0), atol=1e-6, rtol=1e-5)
            assert all(each.equal(results[0]) for each in results)


@pytest.mark.whole
@needs_triton
@only_pretended
def test_in_the_interpreter_recorded_eager_alone_and_in_company(new_engine, module, monkeypatch, new_requests):
    """The kernels themselves."""
    small_trial(module, monkeypatch)
    with pretend_gpu():
        results, prompts = [], [[9, 8, 7], [5, 6, 7, 8, 9]]
        for graphs in (None, False):
            engine = new_engine("llama-two-layers", max_model_len=32, max_num_seqs=2, graphs=graphs, enable_prefix_caching=False)
            _, params = new_requests(engine, (3, 5), 3)
            assert engine.linear == "row tiles"
            results.append(said(engine.generate(prompts, params)))
            if graphs is None:
                assert launches.count("replay") == 2
                results.append(said(alone(engine, prompts, params)))
    assert results == [results[0]] * 3


@pytest.mark.whole
@needs_triton
@only_pretended
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_on_a_gpu_recorded_eager_in_pieces_alone_and_in_company(new_engine, gpu, new_requests, name):
    options = {"enable_prefix_caching": False, "max_num_seqs": 5}
    engine = new_engine(name, **options)
    prompts, params = new_requests(engine, (3, 40, 70, 5, 20), 6)
    want = alone(engine, prompts, params)
    assert counted(engine.generate(prompts, params), want) == 0 and len(engine.runner.recorded) > 1
    for others in ({"graphs": False}, {"max_num_batched_tokens": 33}, {"block_size": 3, "num_tokens": 84, "reserve_tokens": 0}):
        engine = new_engine(name, **options | others)
        assert counted(engine.generate(prompts, params), want) == 0, others
    assert engine.stats().preemptions


@pytest.mark.whole
@needs_triton
@only_pretended
def test_on_a_gpu_a_split_context_has_the_same_bits_beside_many_others(new_engine, module, gpu, monkeypatch, new_requests):
    """Eager and recorded, in splits of 64 keys. Beside 16 others, the engine that is not exact does not split it."""
    monkeypatch.setattr(module("kernels.paged_attention"), "choose_split_keys", lambda _: 64)
    options = {"max_num_seqs": 17, "num_tokens": 900, "enable_prefix_caching": False}
    engine, eager = (new_engine("llama-two-layers", graphs=graphs, **options) for graphs in (None, False))
    monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", 64)
    prompts, params = new_requests(engine, (290, *range(1, 17)), 3)
    [want] = said(engine.generate(prompts[:1], params[0]))
    assert said(engine.generate(prompts, params))[0] == want
    assert [said(eager.generate(prompts[:count], params[:count]))[0] for count in (1, 17)] == [want] * 2


@pytest.mark.whole
@needs_triton
@only_pretended
def test_a_layer_launches_ten_kernels_or_eleven(new_engine, new_requests):
    """One combines the splits of a context of more than 512 keys."""

    def zero(kernel, *args, **_):
        args[0].zero_()

    counts, found = [], {}
    with quick_gpu(zero):
        engine = new_engine("pocket", max_model_len=600, graphs=False)
        for layer in engine.model.model.layers:
            layer.register_forward_pre_hook(lambda *_: counts.append(-len(launches)))
            layer.register_forward_hook(lambda *_: counts.append(len(launches)))
        for length in (5, 520):
            engine.generate(*new_requests(engine, (length,), 3))
            found[length] = {before + after for before, after in zip(counts[::2], counts[1::2], strict=True)}
            counts.clear()
    assert found == {5: {10}, 520: {11}}


@pytest.mark.whole
@needs_triton
@only_pretended
@pytest.mark.parametrize("graphs", [None, False])
def test_after_warming_up_an_exact_engine_nothing_is_compiled(new_engine, monkeypatch, new_requests, graphs):
    """Whatever the traffic: steps of more than 64 rows too, whose products have larger tiles, and as many rows of the head."""
    launched = set()

    def variant_of(name, value):
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        changes = CHANGING | {"split_keys"}
        return None if name in changes or isinstance(value, float) else (value == 1, value % 16 == 0)

    def launch(kernel, *args, grid, warmup, **constants):
        launched.add((kernel.__name__, *(variant_of(*each) for each in zip(kernel.arg_names, args)), *constants.items()))
        args[0].zero_()

    with quick_gpu(launch):
        engine = new_engine("pocket", max_num_seqs=5, max_model_len=700, num_tokens=4000, graphs=graphs)
        engine.warm_up()
        compiled = set(launched)
        monkeypatch.setattr(torch.cuda, "graph", None)
        for lengths in ((1,), (2,), (9, 1), (64,), (65,), (30, 250, 16), (600, 1, 5, 120, 3)):
            for prompt_logprobs in (False, True):
                engine.generate(*new_requests(engine, lengths, 3, prompt_logprobs))
    assert "_product_kernel" in {name for name, *_ in compiled}
    assert not launched - compiled, str(launched - compiled)


@needs_triton
@only_pretended
def test_the_stand_in_computes_what_the_product_kernel_computes(module):
    from triton.runtime.interpreter import InterpretedFunction

    interpret, results = InterpretedFunction.run, []

    def launch(kernel, out, *args, **options):
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            copy = torch.empty_like(out)
            interpret(kernel, copy, *args, **options)
        run_stand_in(kernel, out, *args, **options)
        results.append((out, copy))

    with quick_gpu(launch):
        for size_in, size_out, bias in ((60, 88, True), (93, 70, False)):
            x, weight, b = weights(size_in, size_out, torch.float32, bias)
            module("kernels.product").product(x.to("cuda"), weight.to("cuda"), b if b is None else b.to("cuda"))
    assert len(results) == 2
    for mine, its in results:
        torch.testing.assert_close(mine, its, atol=4e-6, rtol=1e-6)


# ---- where a batch could show in other ways


@pytest.mark.parametrize("values", [[0.0] * 40, [-1.0, -3.0, -2.0] * 13, [-0.5] + [-2.0] * 20 + [-1.0] * 5, [float(-i) for i in range(40)]])
def test_of_equal_logprobs_the_smallest_ids_are_the_likeliest_for_any_count(module, values):
    row = torch.tensor(values)
    rows = torch.stack([row, torch.arange(len(values)).float(), row])
    want = sorted(range(len(values)), key=lambda token_id: (-values[token_id], token_id))
    for count in (0, 1, 2, 5, len(values)):
        found, ids = module("sampling").likeliest(rows, count)
        assert ids[0].tolist() == ids[2].tolist() == want[:count]
        assert found[0].tolist() == [values[token_id] for token_id in want[:count]]


@pytest.mark.whole
def test_reported_tokens_do_not_depend_on_how_many_others_ask_for(new_engine, Params, rng):
    """In 16 bits, many logits are equal."""
    engine = new_engine("pocket", dtype="bfloat16", enable_prefix_caching=False)
    prompts = [rng.choices(range(8, engine.config.vocab_size), k=9) for _ in range(3)]
    params = [Params(max_tokens=20, ignore_eos=True, logprobs=count, prompt_logprobs=True) for count in (1, 50, 4)]
    assert said(engine.generate(prompts, params)) == said(alone(engine, prompts, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_gate_rounds_where_pytorchs_does(module, dtype):
    gate = torch.linspace(-20, 20, 4001).to(dtype)[None]
    up = torch.ones_like(gate)
    ours, theirs = module("exact").silu_times(gate, up).float(), (torch.nn.functional.silu(gate) * up).float()
    assert (ours != theirs).float().mean() < 0.01
    assert torch.allclose(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("max_len", [300, 2048, 5000, 131_072])
def test_fixed_splits_are_whole_tiles_and_few(module, max_len):
    kernels = module("kernels.paged_attention")
    keys = kernels.choose_split_keys(max_len)
    assert keys % kernels.TILE_KEYS == 0 and keys >= kernels.MIN_SPLIT_KEYS
    assert -(-max_len // keys) <= kernels.MAX_FIXED_SPLITS


@needs_triton
@only_pretended
def test_where_large_tiles_have_other_bits_small_ones_are_tried(new_engine, module, gpu, monkeypatch, new_requests):
    """As on a GPU on which a tile of many rows adds in another order: attention's first, then the products' too."""
    exact, attempts = module("exact"), []

    def is_exact(model, config, backend, block_size):
        attempts.append((type(model.lm_head.form).__name__, backend.attend.keywords["tile_rows"]))
        return len(attempts) == 3

    monkeypatch.setattr(exact, "is_exact", is_exact)
    engine = new_engine("llama-two-layers", max_model_len=64, graphs=False)
    assert attempts == [("RowProduct", None), ("RowProduct", 16), ("FewRowsProduct", 16)]
    prompts, params = new_requests(engine, (40, 3), 2)
    rows = []
    monkeypatch.setattr(module("kernels.product"), "choose_rows", lambda *_: rows.append("chosen"))
    engine.generate(prompts, params)
    assert not rows


def test_the_experiment_feeds_the_same_tokens_whatever_the_size_of_a_block(new_engine, module, monkeypatch):
    """Otherwise two engines might find other forms exact, and have other bits."""
    trial = module("trial")
    feed, seen = trial.feed, []

    def noted(model, cache, backend, fed):
        seen[-1].append([(seq.token_ids[:], count) for seq, count in fed])
        return feed(model, cache, backend, fed)

    monkeypatch.setattr(trial, "feed", noted)
    for block_size in (16, 8, 32):
        seen.append([])
        new_engine("pocket", block_size=block_size)
    assert seen[0] and seen[0] == seen[1] == seen[2]


def test_where_nothing_can_be_tried_it_says_so(new_engine, module, monkeypatch):
    monkeypatch.setattr(module("exact"), "flash_attention", None)
    with pytest.raises(ValueError, match="exact is True, but attention torch on cpu has no exact form with this PyTorch; use attention triton on a GPU"):
        new_engine("pocket")
