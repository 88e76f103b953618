"""v14: weights in the form that this processor multiplies fastest, and one kernel for what is between two products."""
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from shared.bench.kernels import ROTATE_LLAMA
from shared.chapters import ROOT, find
from shared.checkpoints import RANDOM, TWO_LAYERS, checkpoint
from shared.verify.pretend_gpu import launches, pretend_gpu
from shared.verify.soak import audit
from shared.workloads import random_ids
from tests.claims.test_v06 import DEVICE, names_of, needs_triton
from tests.support.same import assert_same
from tests.test_modules import TOLERANCE, aligned, kind_of, prefill, relative

FORMS = "joined", "blocks", "halves"
IN_16_BITS = [name for name, spec in RANDOM.items() if spec.stored != "float32"]
pretended = pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is pretended")


@pytest.fixture
def storage(module):
    return module("storage")


@pytest.fixture
def form(storage, request):
    """A form, if this machine has it."""
    if not {"blocks": storage.HAS_BLOCKS, "halves": storage.HAS_HALVES}.get(request.param, True):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def in_forms(*forms):
    return pytest.mark.parametrize("form", forms or FORMS, indirect=True)


@pytest.fixture
def load(module):
    """A checkpoint's model as it is loaded, before its weights are stored in a form."""

    def load(name, dtype=torch.float32):
        config = module("config").load_config(checkpoint(name))
        return module("loader").load_model(module("loader").Checkpoint(checkpoint(name)), config, torch.device("cpu"), dtype)

    return load


def linears_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}


# ---- the forms


ROWS = 0, 1, 2, 3, 7, 16, 33, 129
SIZES = {1: (401,), 2: (88, 88), 3: (84, 28, 14)}


@in_forms("plain", *FORMS)
@pytest.mark.parametrize("biases", ["-", "b", "--", "bb", "---", "bbb", "b--", "-b-", "--b", "bb-"])
def test_each_form_multiplies_as_plain_torch_does(module, storage, form, biases):
    """Sizes and numbers of rows are odd, some layers of a group have a bias, and x may be a part of a wider tensor."""
    generator = torch.Generator().manual_seed(len(biases))
    for in_features in (1, 37, 64):
        layers = []
        for size, bias in zip(SIZES[len(biases)], biases, strict=True):
            layers.append(module("layers").Linear(in_features, size, bias=bias == "b").requires_grad_(False))
            for parameter in layers[-1].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
        weights = [(layer.weight, layer.bias) for layer in layers]
        if form != "plain":
            storage.store(storage.FORMS[form], layers)
        for num_rows in ROWS:
            wide = torch.randn(num_rows, in_features + 5, generator=generator)
            for x in (wide[:, :in_features].contiguous(), wide[:, 5:]):
                together = module("layers").products(x, *layers)
                for layer, (weight, bias), product in zip(layers, weights, together, strict=True):
                    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
                    scale = F.linear(x.abs(), weight.abs()) + (0 if bias is None else bias.abs())
                    for got in (product, layer(x)):
                        assert got.dtype == torch.float32 and got.shape == want.shape
                        assert ((got - want).abs() <= 1e-6 * scale).all()


@in_forms("halves")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_hold_every_weight_of_16_bits_that_is_not_tiny(storage, form, dtype):
    """All of them, each multiplied by 1: float16's stay as they are, and so do bfloat16's from 2**-17 up."""
    values = torch.arange(2**16).to(torch.int16).view(dtype).float()
    values = values[values.abs() <= 65504]
    weight = values[: len(values) // 64 * 64].view(-1, 64)
    moved = (storage.Halves(weight, None)(torch.eye(64)).T - weight).abs()
    assert moved.max() <= storage.MAX_LOSS == 2**-25
    assert not moved[weight.abs() >= 2**-17].any()
    assert moved.any() == (dtype == torch.bfloat16)
    assert storage.loss(weight) == moved.max()


@in_forms("halves")
def test_halves_refuse_a_single_weight_that_float16_cannot_hold(storage, load, form, tmp_path):
    """It is too large, or it has more than 11 bits. One that moves by 2**-25 is still allowed."""
    name = "model.layers.1.mlp.down_proj.weight"
    for file in checkpoint("qwen3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {each: weight.float() for each, weight in load_file(checkpoint("qwen3") / "model.safetensors").items()}
    for value in (1e5, -1e5, 1 + 2**-11, 2**-18 + 2**-25):
        weights[name][3, 5] = value
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if abs(value) < 1:
            assert storage.store_weights(load(tmp_path), form) == form
            continue
        with pytest.raises(ValueError) as refused:
            storage.store_weights(load(tmp_path), form)
        assert str(refused.value) == f"linear is 'halves', but float16 cannot hold all values of {name}; use auto"


@in_forms()
@pytest.mark.parametrize("length", [1, 53])
def test_in_every_form_every_module_gives_what_hugging_faces_gives(
    module, make_engine, monkeypatch, Params, hf, form, checkpoint_name, length, rng
):
    """By the checkpoint's names. Layers that are joined are not called, so what they compute is taken from `products`."""
    if form == "halves" and checkpoint_name not in ("pocket", *IN_16_BITS):
        with pytest.raises(ValueError, match="float16 cannot hold all values of model.layers.0.self_attn.q_proj.weight"):
            make_engine(checkpoint_name, linear=form)
        return
    engine, joined = make_engine(checkpoint_name, linear=form), {}
    names, products = {layer: name for name, layer in linears_of(engine.model).items()}, module("layers").products

    def noting(x, *linears):
        results = products(x, *linears)
        joined.update({names[layer]: result.clone() for layer, result in zip(linears, results, strict=True)})
        return results

    for file in ("layers", "attention"):
        monkeypatch.setattr(module(file), "products", noting)
    prompt_ids = random_ids(length, engine.config.vocab_size, rng)
    want = hf.module_outputs(prompt_ids)
    ours = prefill(engine, prompt_ids, Params)
    assert len(joined) == 5 * engine.config.num_layers and not joined.keys() & ours.keys()
    ours |= joined
    assert set(ours) == {name for name in want if not name.endswith(("act_fn", "self_attn.1"))}
    for name, got in ours.items():
        kind, other = kind_of(name), aligned(name, want[name], got)
        distance = relative(got, other) if kind == "module" else (got - other).abs().max().item()
        assert distance <= TOLERANCE[kind], f"{name} is {distance:.1e} away"


@in_forms()
@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_parameters_keep_their_names_shapes_and_dtypes_and_hold_nothing(storage, load, form, name):
    model = load(name)
    before = {key: (parameter.shape, parameter.dtype) for key, parameter in model.named_parameters(remove_duplicate=False)}
    loaded = {key: weakref.ref(layer.weight) for key, layer in linears_of(model).items()}
    storage.store_weights(model, form)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert {key: (parameter.shape, parameter.dtype) for key, parameter in parameters.items()} == before
    linears = linears_of(model)
    assert {key for key, parameter in parameters.items() if parameter.is_meta} == {f"{key}.weight" for key in linears}
    assert not any(parameter.requires_grad for parameter in parameters.values())
    # What was loaded is freed, unless it need not be copied.
    kept = {key for key, ref in loaded.items() if ref() is not None}
    assert kept == ({key for key in linears if key.endswith(("o_proj", "down_proj", "lm_head"))} if form == "joined" else set())


@in_forms("plain", *FORMS)
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_nbytes_is_what_a_product_reads(storage, load, form, name):
    """A tied head is the embedding's memory; the bytes that the forms need are those of their layers and no more."""
    if (form, name) == ("halves", "qwen2"):
        return  # refused, which another test sees
    model = load(name)
    sizes = {key: (layer.weight.numel(), layer.out_features * (layer.bias is not None)) for key, layer in linears_of(model).items()}
    assert any(num_biases for _, num_biases in sizes.values()) == (name == "qwen2")
    storage.store_weights(model, form)
    itemsize = 2 if form == "halves" else 4
    assert {key: layer.nbytes for key, layer in linears_of(model).items()} == {
        key: num_weights * itemsize + num_biases * 4 for key, (num_weights, num_biases) in sizes.items()
    }
    if form in ("plain", "joined"):
        norms = sum(parameter.nbytes for key, parameter in model.named_parameters() if "norm" in key)
        linears = sum(layer.nbytes for key, layer in linears_of(model).items() if key != "lm_head")
        assert memory_of(model) == model.model.embed_tokens.weight.nbytes + norms + linears


def memory_of(model):
    """The bytes of all tensors in which the model and its forms hold weights, those that share memory counted once."""
    tensors = list(model.parameters())
    for layer in linears_of(model).values():
        tensors += [value for value in vars(layer.form or layer).values() if torch.is_tensor(value)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# ---- the output


def workload(seed, num_requests=10):
    """Prompts of 1 to 30 tokens, some with the same beginning, and sampling parameters that use every option."""
    rng, requests = random.Random(seed), []
    beginning = random_ids(11, 401, rng)
    for index in range(num_requests):
        options = dict(max_tokens=rng.randint(1, 16), temperature=rng.choice((0.0, 0.9)), top_k=20, seed=index, logprobs=2)
        options["prompt_logprobs"] = index % 3 == 1
        options["priority"] = rng.randint(-1, 1)
        options["stop_token_ids"] = tuple(rng.sample(range(8, 401), 20)) if rng.random() < 0.3 else ()
        requests.append(([*beginning[: rng.choice((0, 9, 11))], *random_ids(rng.randint(1, 19), 401, rng)], options))
    return requests


@in_forms("plain", *FORMS)
@pytest.mark.parametrize("name", ["mistral", "llama3", *(pytest.param(name, marks=pytest.mark.whole) for name in ("qwen2", "qwen3"))])
def test_every_form_generates_what_v13_generates(chapter, storage, make_engine, form, name):
    """Greedy and sampled, with logprobs of prompts, in pieces, preempted, and found in the prefix cache."""
    if form == "halves" and name not in IN_16_BITS:
        return  # refused, which another test sees
    before, requests = find("v13").load(), workload(seed=3)
    prompts = [prompt for prompt, _ in requests]
    theirs = before.Engine(checkpoint(name), enable_prefix_caching=False)
    want = [theirs.generate([prompt], before.SamplingParams(**options))[0] for prompt, options in requests]
    limits = {"block_size": 4, "num_blocks": 13, "max_num_seqs": 5, "max_model_len": 48, "reserve_tokens": 0, "max_num_batched_tokens": 9}
    engine = chapter.load().Engine(checkpoint(name), linear=form, **limits)
    for _ in range(2):
        assert_same(engine.generate(prompts, [chapter.load().SamplingParams(**options) for _, options in requests]), want)
        audit(engine)
    assert engine.linear == form and engine.stats().preemptions > 2 and engine.stats().cached_tokens > 0


def assert_unchanged(engine, loaded):
    """Every weight is what the checkpoint has, as its layer multiplies it."""
    loaded = dict(loaded.named_parameters(remove_duplicate=False))
    for key, parameter in engine.model.named_parameters(remove_duplicate=False):
        assert parameter.is_meta or parameter.equal(loaded[key]), key
    for key, layer in linears_of(engine.model).items():
        weight = layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else loaded[f"{key}.bias"])
        assert (weight.T - loaded[f"{key}.weight"]).abs().max() <= 1e-6, key


@in_forms("plain", *FORMS)
@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_no_step_changes_a_weight(chapter, Params, load, form, name):
    """The residual stream, which begins as a row of the embedding, is added to in place."""
    engine = chapter.load().Engine(checkpoint(name), linear=form)
    for prompts in ([[9]], [[9], [9, 8, 7, 9, 9]]):
        engine.generate(prompts, Params(max_tokens=3, prompt_logprobs=True, logprobs=0, ignore_eos=True))
    assert_unchanged(engine, load(name))


# ---- rectangles


def fake_seqs(module, shapes):
    """Sequences that feed some tokens at the end of a context, in blocks of 4 that are theirs alone: (tokens, context)."""
    blocks = itertools.count(100)
    return [
        SimpleNamespace(new_ids=[0] * width, num_computed=end - width, block_table=[next(blocks) for _ in range(-(-end // 4))])
        for width, end in shapes
    ]


def test_a_rectangle_holds_sequences_of_similar_length(module, rng):
    batch = module("batch")
    assert batch.MIN_LEN == 64
    for _ in range(300):
        ends = [rng.choice((1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, rng.randint(1, 2000))) for _ in range(rng.randint(1, 30))]
        seqs = fake_seqs(module, [(min(rng.choice((1, 1, 1, 2, 7, 40)), end), end) for end in ends])
        starts = [0, *itertools.accumulate(len(seq.new_ids) for seq in seqs)]
        rectangles, at = batch.build_rectangles(seqs), dict(zip(starts, seqs))
        assert sorted(torch.cat([rectangle.tokens for rectangle in rectangles]).tolist()) == list(range(starts[-1]))
        kinds = set()
        for rectangle in rectangles:
            rows = rectangle.tokens.view(len(rectangle.block_tables), -1)  # [S, Q]
            members, width = [at[row[0].item()] for row in rows], rows.shape[1]
            assert all(len(seq.new_ids) == width for seq in members)
            assert rows.equal(rows[:, :1] + torch.arange(width))
            lengths = [seq.num_computed + width for seq in members]
            assert rectangle.context_len == max(lengths) < max(65, 2 * min(lengths))
            for seq, table, mask in zip(members, rectangle.block_tables.tolist(), rectangle.mask.view(len(members), width, -1)):
                assert table[: len(seq.block_table)] == seq.block_table
                assert set(table[len(seq.block_table) :]) <= {seq.block_table[0]}
                assert mask.sum(1).tolist() == list(range(seq.num_computed + 1, seq.num_computed + width + 1))
                assert mask.sort(1, descending=True).values.equal(mask)
            kinds.add((width, next(2**i for i in range(6, 12) if max(lengths) <= 2**i)))
        assert len(kinds) == len(rectangles), "sequences of the same number of tokens and similar length are apart"


@pytest.mark.parametrize("budget", [512, 40])
def test_lengths_on_both_sides_of_every_edge_generate_what_they_generate_alone(chapter, make_engine, Params, rng, budget):
    """Blocks that no sequence has taken hold NaN: whoever reads one generates nothing."""
    prompts = [random_ids(length, 401, rng) for length in (1, 2, 62, 63, 64, 65, 100, 127, 128, 129, 250, 256, 257)]
    params = Params(max_tokens=4, logprobs=2, ignore_eos=True)
    alone = make_engine("llama", enable_prefix_caching=False)
    want = [alone.generate([prompt], params)[0] for prompt in prompts]
    engine = chapter.load().Engine(checkpoint("llama"), block_size=4, max_num_batched_tokens=budget, max_num_seqs=20)
    engine.cache.k.fill_(math.nan)
    engine.cache.v.fill_(math.nan)
    assert_same(engine.generate(prompts, params), want)


# ---- the choice


def seconds_in_favor_of(form):
    """What `measure` returns where this form is twice as fast as the others."""
    return lambda model, names: {name: [0.5 if name == form else 1.0] * 4 for name in names}


@pytest.fixture
def kept(storage, monkeypatch, tmp_path):
    """The file in which choices are kept. `measured` of it has the forms that were compared, by comparison."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = SimpleNamespace(path=tmp_path / "stepserve" / "linear.json", measured=[])

    def measure(model, names):
        kept.measured.append(names)
        return seconds_in_favor_of("joined")(model, names)

    monkeypatch.setattr(storage, "measure", measure)
    return kept


@pytest.mark.parametrize(
    ("seconds", "form"),
    [
        ({"plain": [1, 9]}, "plain"),
        ({"plain": [1, 9], "joined": [0.97, 8.7]}, "plain"),  # no more than noise
        ({"plain": [1, 9], "joined": [0.9, 8]}, "joined"),
        ({"plain": [1, 9], "joined": [1.04, 5]}, "joined"),
        ({"plain": [1, 9], "joined": [0.9, 8], "blocks": [0.6, 6], "halves": [0.8, 8.5]}, "blocks"),
        ({"plain": [1, 9], "blocks": [0.9, 8], "halves": [0.1, 10]}, "blocks"),  # not for one stream alone
        ({"plain": [1, 9], "halves": [0.1, 10]}, "plain"),
        ({"plain": [1, 9], "halves": [1.1, 1]}, "plain"),
        ({"plain": [1, 100], "blocks": [0.5, 95], "halves": [0.9, 60]}, "halves" if 0.5 * 0.95 > 0.9 * 0.6 else "blocks"),
    ],
)
def test_the_fastest_form_is_nowhere_slower_than_plain(storage, seconds, form):
    """The seconds are of one token and of many. The mean is of speeds, so long products count no more than short ones."""
    assert storage.fastest(seconds) == form


def test_whatever_is_measured_the_choice_is_never_slower_than_plain_by_more_than_noise(storage, rng):
    chosen = set()
    for _ in range(3000):
        seconds = {name: [rng.uniform(0.8, 1.2) for _ in range(rng.choice((2, 4)))] for name in ("plain", *FORMS)}
        seconds = {name: (times + times)[:4] for name, times in seconds.items()}
        form = storage.fastest(seconds)
        chosen.add(form)
        ratios = [plain / its for plain, its in zip(seconds["plain"], seconds[form])]
        assert form == "plain" or min(ratios) > 1 / 1.05 and math.prod(ratios) ** 0.25 > 1.05
    assert chosen == {"plain", *FORMS}


@pytest.mark.chooses_form
def test_the_choice_is_measured_once_and_kept(chapter, storage, kept):
    """For a model of the same shapes too; in a file that says what it was measured for."""
    for name in ("llama", "llama", "llama3-hub"):
        assert chapter.load().Engine(checkpoint(name)).linear == "joined"
    assert len(kept.measured) == 1
    [(key, form)] = json.loads(kept.path.read_text()).items()
    assert form == "joined"
    parts = storage.processor(), torch.__version__, f"{torch.get_num_threads()} threads", "torch.float32", "(88, 60)", "'plain', 'joined'"
    assert all(part in key for part in parts)
    # What the file says is believed.
    kept.path.write_text(json.dumps({key: "plain", "of another machine": "blocks"}))
    assert chapter.load().Engine(checkpoint("llama")).linear == "plain"
    assert chapter.load().Engine(checkpoint("qwen2")).linear == "joined" and len(kept.measured) == 2
    known = json.loads(kept.path.read_text())
    assert len(known) == 3 and known[key] == "plain" and known["of another machine"] == "blocks"


@pytest.mark.chooses_form
@pytest.mark.parametrize("other", ["threads", "version", "processor", "instructions", "dtype", "shapes", "layers", "no blocks", "halves"])
def test_a_choice_holds_only_for_what_it_was_measured_for(storage, kept, load, monkeypatch, other):
    monkeypatch.setattr(storage, "HAS_BLOCKS", other != "dtype")
    monkeypatch.setattr(storage, "HAS_HALVES", other == "halves")
    model = load("llama3")
    storage.choose_form(model)
    storage.choose_form(model)
    assert len(kept.measured) == 1
    match other:
        case "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
        case "version":
            monkeypatch.setattr(torch, "__version__", "3.0")
        case "processor":
            monkeypatch.setattr(storage, "processor", lambda: "another, AVX2")
        case "instructions":
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE")
        case "dtype":
            model = load("llama3", torch.bfloat16)
        case "shapes":
            model = load("mistral")
        case "layers":
            del model.model.layers[1:]  # it fits into caches that the whole model does not
        case "no blocks":
            monkeypatch.setattr(storage, "HAS_BLOCKS", False)
        case "halves":
            model = load("llama")  # of the same shapes, and stored in float32
    storage.choose_form(model)
    storage.choose_form(model)
    assert len(kept.measured) == 2 and len(json.loads(kept.path.read_text())) == 2


@pytest.mark.chooses_form
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", "no form", 3, None, ["plain"], {"plain": 1}])
def test_a_damaged_file_is_measured_again_and_replaced(storage, kept, load, damage):
    model = load("llama")
    storage.choose_form(model)
    [key] = json.loads(kept.path.read_text())
    kept.path.write_bytes(damage if isinstance(damage, bytes) else json.dumps({key: damage}).encode())
    for _ in range(2):
        assert storage.choose_form(model) == "joined"
    assert len(kept.measured) == 2 and json.loads(kept.path.read_text()) == {key: "joined"}


@pytest.mark.chooses_form
@pytest.mark.parametrize("obstacle", ["a file for the folder", "a folder for the file", "the disk is full"])
def test_where_nothing_can_be_written_each_engine_measures(chapter, storage, kept, monkeypatch, obstacle):
    if obstacle == "a file for the folder":
        kept.path.parent.write_text("")
    elif obstacle == "a folder for the file":
        kept.path.mkdir(parents=True)
    else:
        monkeypatch.setattr(storage.Path, "write_text", mock.Mock(side_effect=OSError(28, "No space left on device")))
    for number in (1, 2):
        assert chapter.load().Engine(checkpoint("llama")).linear == "joined"
        assert len(kept.measured) == number


@pytest.mark.chooses_form
def test_the_file_is_in_the_users_cache_folder(storage, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if folder == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        assert storage.choices_path() == tmp_path / ".cache" / "stepserve" / "linear.json"


def write_many(storage, name):
    for number in range(60):
        storage.write_choices(storage.read_choices() | {f"{name} {number % 7} {'x' * 2000 * (number % 3)}": "plain"})


def test_engines_that_start_at_once_never_leave_half_a_file(storage, kept):
    """One may lose the other's choice, which is then measured again."""
    kept.path.parent.mkdir()
    kept.path.write_text("{}")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(storage, name)) for name in "ab"]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, len(json.loads(kept.path.read_text())))
    assert [process.exitcode for process in processes] == [0, 0] and most > 7
    assert [path.name for path in kept.path.parent.iterdir()] == ["linear.json"]


@pytest.fixture
def timed(storage, monkeypatch):
    """Runs `measure` where each look at the clock takes some seconds; the numbers of tokens, by form, of all products."""

    def timed(model, seconds_a_look):
        looks, rows = itertools.count(), {"joined": [], "blocks": []}

        class Noting:
            def __init__(self, name, weight, bias):
                self.rows = rows[name]

            def __call__(self, x):
                self.rows.append(len(x))

        monkeypatch.setattr(storage, "time", SimpleNamespace(perf_counter=lambda: seconds_a_look * next(looks)))
        monkeypatch.setattr(storage, "FORMS", {name: lambda *args, name=name: Noting(name, *args) for name in rows})
        return storage.measure(model, ["plain", *rows]), rows, next(looks)

    return timed


def test_a_comparison_takes_less_than_a_second_or_two_rounds(storage, timed, load):
    """Forms take turns, for one stream, for some, for many, and for a piece of a prompt."""
    model = load("llama")
    num_products = len(list(storage.groups_of(model)))
    assert min(storage.NUM_TOKENS) == 1 and max(storage.NUM_TOKENS) >= 64 and len(storage.NUM_TOKENS) >= 4
    for seconds_a_look, num_rounds in ((1e-6, 20), (0.01, None), (1.0, 2)):
        seconds, rows, num_looks = timed(model, seconds_a_look)
        assert all(its == pytest.approx([seconds_a_look] * len(storage.NUM_TOKENS)) for its in seconds.values())
        one_round = [num_tokens for num_tokens in storage.NUM_TOKENS for _ in range(num_products)]
        assert rows["joined"] == rows["blocks"] == one_round * (len(rows["joined"]) // len(one_round))
        if num_rounds is None:
            assert 2 < len(rows["joined"]) // len(one_round) < 20
            assert storage.SECONDS < seconds_a_look * num_looks < 1.2
        else:
            assert len(rows["joined"]) == num_rounds * len(one_round)


def test_a_comparison_multiplies_few_weights_of_a_large_model(storage, timed, load, monkeypatch):
    """But always the first layer's queries, keys and values."""
    model = load("llama")
    sizes = [sum(layer.nbytes for layer in group) for group in storage.groups_of(model)]
    for most, num_groups in ((1, 1), (sizes[0], 1), (sum(sizes[:5]), 5), (sum(sizes[:6]) - 1, 5)):
        monkeypatch.setattr(storage, "SAMPLE_BYTES", most)
        _, rows, _ = timed(model, 1.0)
        assert len(rows["joined"]) == 2 * len(storage.NUM_TOKENS) * num_groups


@pytest.mark.chooses_form
def test_auto_is_what_was_measured_as_fastest(chapter, storage, kept, monkeypatch, capsys):
    for form in ("plain", *FORMS):
        if not getattr(storage, f"HAS_{form.upper()}", True):
            continue
        monkeypatch.setattr(storage, "measure", seconds_in_favor_of(form))
        kept.path.unlink(missing_ok=True)
        engine = chapter.load().Engine(checkpoint("mistral"))
        assert engine.linear == form and f", linear layers {form}, " in engine.describe()
        assert f", linear layers {form}, " in capsys.readouterr().err
        for layer in linears_of(engine.model).values():
            assert layer.form is None if form == "plain" else isinstance(layer.form, storage.FORMS[form])


@pytest.mark.chooses_form
@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_a_users_engine_measures_and_generates_the_same(chapter, storage, monkeypatch, tmp_path, make_engine, Params, rng, name):
    """Whatever it chooses on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompts, params = [random_ids(length, 401, rng) for length in (1, 9, 30)], Params(max_tokens=6, logprobs=2, ignore_eos=True)
    first = chapter.load().Engine(checkpoint(name))
    monkeypatch.setattr(storage, "measure", mock.Mock(side_effect=AssertionError("measured again")))
    assert chapter.load().Engine(checkpoint(name)).linear == first.linear in ("plain", *FORMS[: 3 if name == "mistral" else 2])
    assert_same(first.generate(prompts, params), make_engine(name, linear="plain").generate(prompts, params))


def test_other_tests_engines_measure_nothing(chapter, storage, monkeypatch):
    """Or timing noise would decide about bits."""
    monkeypatch.setattr(storage, "measure", mock.Mock(side_effect=AssertionError("measured")))
    assert chapter.load().Engine(checkpoint("llama")).linear == "plain"


# ---- refusals, and the command line


@pytest.mark.parametrize("value", ["fast", "", "Plain", None, 3, True, ["plain"]])
def test_another_form_is_refused(chapter, value):
    with pytest.raises(ValueError) as refused:
        chapter.load().Engine(checkpoint("llama"), linear=value)
    assert str(refused.value) == f"linear must be auto, plain, joined, blocks, halves, got {value!r}"


@pytest.mark.parametrize("form", ["blocks", "halves"])
def test_what_is_for_float32_on_a_cpu_is_refused_elsewhere(chapter, form):
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(ValueError) as refused:
            chapter.load().Engine(checkpoint("llama3"), dtype=dtype, linear=form)
        assert str(refused.value) == f"linear is {form!r}, which is for float32 on a CPU, not for torch.{dtype} on cpu; use auto"


@pretended
def test_a_gpu_joins_and_refuses_the_cpus_forms(chapter, Params, make_engine):
    with pretend_gpu():
        engines = []
        for linear in ("auto", "joined", "plain", "blocks", "halves"):
            try:
                engines.append(chapter.load().Engine(checkpoint("llama"), device="cuda", attention="torch", linear=linear))
            except ValueError as refused:
                assert linear in ("blocks", "halves")
                assert str(refused) == f"linear is {linear!r}, which is for float32 on a CPU, not for torch.float32 on cuda:0; use auto"
        said = [engine.generate([[5, 6, 7]], Params(max_tokens=3))[0].token_ids for engine in engines]
    assert [engine.linear for engine in engines] == ["joined", "joined", "plain"]
    assert said == [make_engine("llama").generate([[5, 6, 7]], Params(max_tokens=3))[0].token_ids] * 3


@pytest.mark.chooses_form
@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("blocks", "linear is 'blocks', but this PyTorch has no oneDNN product for them; use auto"),
        ("halves", "linear is 'halves', but this PyTorch has no product with float16 weights for this processor; use auto"),
    ],
)
def test_without_the_operation_a_form_is_refused_and_not_compared(chapter, storage, kept, monkeypatch, form, message):
    monkeypatch.setattr(storage, "HAS_BLOCKS", True)
    monkeypatch.setattr(storage, "HAS_HALVES", True)
    monkeypatch.setattr(storage, f"HAS_{form.upper()}", False)
    with pytest.raises(ValueError) as refused:
        chapter.load().Engine(checkpoint("mistral"), linear=form)
    assert str(refused.value) == message
    chapter.load().Engine(checkpoint("mistral"))
    assert kept.measured == [["plain", *(each for each in FORMS if each != form)]]


@pytest.mark.chooses_form
def test_in_16_bits_and_for_float32_weights_fewer_forms_are_compared(chapter, storage, kept, monkeypatch):
    monkeypatch.setattr(storage, "HAS_BLOCKS", True)
    monkeypatch.setattr(storage, "HAS_HALVES", True)
    chapter.load().Engine(checkpoint("llama"))
    chapter.load().Engine(checkpoint("llama"), dtype="bfloat16")
    assert kept.measured == [["plain", "joined", "blocks"], ["plain", "joined"]]


def test_the_flag_reaches_the_engine(module, capsys):
    main = module("__main__").main
    command = ["generate", "A", "--max-tokens", "1", "--model", str(checkpoint("llama")), "--linear"]
    for form in ("plain", "joined"):
        assert main([*command, form]) == 0
        assert f", linear layers {form}, " in capsys.readouterr().err
    assert main([*command, "halves"]) == 2
    assert "error: linear is 'halves', but" in capsys.readouterr().err
    for command in (["generate", "A"], ["serve"]):
        with pytest.raises(SystemExit):
            main([*command, "--linear", "fast"])
        assert "argument --linear: invalid choice: 'fast'" in capsys.readouterr().err


# ---- the kernels


@pytest.fixture
def fused(module):
    module("backends").choose_backend("triton", DEVICE)
    return module("kernels.fused")


AROUND = 2048  # elements; a program handles no more at a time in these tests


def enclosed(tensor, filling=math.nan):
    """A copy of a tensor on the device, with other values before and after it in memory."""
    memory = torch.full((tensor.numel() + 2 * AROUND,), filling, dtype=tensor.dtype, device=DEVICE)
    inside = memory[AROUND:-AROUND].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def assert_enclosed(tensor, filling=math.nan):
    """Nothing was written around a tensor."""
    memory = tensor._base
    for part in (memory[:AROUND], memory[-AROUND:]):
        assert (part.isnan() if math.isnan(filling) else part == filling).all()


@pytest.fixture
def allocated(fused, monkeypatch):
    """The tensors that a kernel's function has allocated, each enclosed in NaN."""
    tensors = []

    def empty(*shape, device, dtype):
        tensors.append(enclosed(torch.full(shape, 7.0, dtype=dtype)))
        return tensors[-1]

    stand_in = SimpleNamespace(empty=empty, empty_like=lambda like: empty(*like.shape, device=like.device, dtype=like.dtype))
    monkeypatch.setattr(fused, "torch", stand_in)
    return tensors


# Triton's interpreter truncates to bfloat16, where a GPU rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def assert_rounds_alike(got, want):
    """Equal in float32 up to its rounding; in 16 bits one number in fifty may be the neighbor.

    float32 differs in the last bit, since sums have another order and exponentials another last bit. This
    decides how a number is rounded to 16 bits only if it is close to the middle between two.
    """
    assert got.dtype == want.dtype and got.shape == want.shape and got.isfinite().all()
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
        return
    step = torch.finfo(got.dtype).eps * want.float().abs() + torch.finfo(got.dtype).smallest_normal
    assert ((got.float() - want.float()).abs() <= step).all()
    assert (got != want).float().mean() <= 0.02, f"{(got != want).float().mean():.1%} of the numbers are rounded in another way"


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 60), (40, 84), (2, 1024), (5, 1025)])
def test_the_norm_rounds_where_plain_torch_rounds(module, fused, allocated, num_tokens, size, dtype, adds):
    hidden = enclosed(randn(num_tokens, size, dtype=dtype) * 3)
    result = enclosed(randn(num_tokens, size, dtype=dtype, seed=1)) if adds else None
    weight = enclosed(1 + 0.3 * randn(size, dtype=dtype, seed=2))
    theirs = hidden.clone()
    want = module("layers").rms_norm(theirs, weight, 1e-3, result)
    got = fused.rms_norm(hidden, weight, 1e-3, result)
    assert_rounds_alike(got, want)
    assert hidden.equal(theirs), "the sum is stored, and without a result nothing is"
    for tensor in (hidden, weight, got):
        assert_enclosed(tensor)
    assert [each is got for each in allocated] == [True]


@needs_triton
def test_the_norm_refuses_rows_that_are_apart(fused):
    wide, weight = torch.randn(3, 8, device=DEVICE), torch.ones(4, device=DEVICE)
    for hidden, result in ((wide[:, :4], None), (wide[:, :4].clone(), wide[:, 4:])):
        with pytest.raises(AssertionError):
            fused.rms_norm(hidden, weight, 1e-3, result)


def places(which, num_tokens, sizes, dtype):
    """Queries, keys and values [N, heads * D], as parts of the tensors in which products leave them."""
    parts = [randn(num_tokens, size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]
    if which == "each in its own":
        return [enclosed(part) for part in parts]
    if which == "all in one":
        return enclosed(torch.cat(parts, dim=1)).split(list(sizes), dim=1)
    # Each has NaN behind every row, values more of it than keys.
    return [enclosed(F.pad(part, (0, 3 + 5 * i), value=math.nan))[:, : sizes[i]] for i, part in enumerate(parts)]


ROTATION = """
from shared.bench import kernels
from shared.chapters import find
binary = kernels.binary_of(find("{id}"), 90, *kernels.KERNELS["llama_rotate"], dtype="fp32")
print(binary.asm["ptx"])
"""


@pytest.mark.whole
@needs_triton
def test_compiled_for_a_gpu_the_rotation_rounds_each_product(chapter):
    """A fused multiply-add would not. Triton's interpreter, in which the other tests run, never fuses."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ROTATION.format(id=chapter.id)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"mul(\.rn)?\.f32", done.stdout) and "fma" not in done.stdout


@needs_triton
def test_the_rotation_is_launched_as_it_was_compiled_there(module, monkeypatch):
    fused, options = module("kernels.fused"), {}

    class Launch:
        def __getitem__(self, grid):
            return lambda *_args, **names: options.update(names)

    monkeypatch.setattr(fused, "_rotate_kernel", Launch())
    q, kv, cache, angles = torch.zeros(1, 2, 4), torch.zeros(1, 1, 4), torch.zeros(1, 4, 1, 4), torch.zeros(1, 2)
    fused.rotate_and_write(q, kv, kv, angles, angles, None, 1e-5, cache, cache, torch.zeros(1, dtype=torch.int64))
    assert {name: options[name] for name in ("num_warps", "enable_fp_fusion")} == {"num_warps": 1, "enable_fp_fusion": False}
    assert options.items() >= {name: ROTATE_LLAMA[name] for name in ("num_warps", "enable_fp_fusion")}.items()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("which", ["each in its own", "all in one", "rows of other lengths"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 14), (3, 1, 64), (2, 2, 2), (4, 1, 130)])
def test_queries_and_keys_are_rotated_and_keys_and_values_written(
    module, fused, allocated, num_heads, num_kv_heads, head_dim, dtype, normed, which
):
    num_tokens, slots = 5, [9, 0, 15, 3, 8]
    q, k, v = (
        part.view(num_tokens, -1, head_dim)
        for part in places(which, num_tokens, [heads * head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)], dtype)
    )
    cos, sin = (enclosed(randn(num_tokens, 1, head_dim // 2, dtype=dtype, seed=seed).clamp(-1, 1)) for seed in (3, 4))
    weights = tuple(enclosed(1 + 0.3 * randn(head_dim, dtype=dtype, seed=seed)) for seed in (5, 6)) if normed else None
    k_cache, v_cache = (enclosed(torch.full((4, 4, num_kv_heads, head_dim), 7.0, dtype=dtype)) for _ in range(2))
    rms_norm, rotate = module("layers").rms_norm, module("layers").rotate
    want_q, want_k = (rms_norm(x, weight, 1e-3) for x, weight in zip((q, k), weights)) if normed else (q, k)
    got = fused.rotate_and_write(q, k, v, cos, sin, weights, 1e-3, k_cache, v_cache, torch.tensor(slots, device=DEVICE))
    assert_rounds_alike(got, rotate(want_q, cos, sin))
    assert_rounds_alike(k_cache.flatten(0, 1)[slots], rotate(want_k, cos, sin))
    assert v_cache.flatten(0, 1)[slots].equal(v)
    for cache in (k_cache, v_cache):
        assert (cache.flatten(0, 1)[[slot for slot in range(16) if slot not in slots]] == 7).all()
        assert_enclosed(cache)
    assert_enclosed(got)
    assert [each is got for each in allocated] == [True]


@pytest.mark.gpu
@needs_triton
def test_slots_beyond_two_to_the_31_elements_are_reached(fused):
    """Only one block of the cache's memory is ever used; an offset of 32 bits would wrap around."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 9 * 2**30:
        pytest.skip("the two caches are 8 GiB, more than this GPU has free")
    num_blocks = 2**31 // (4 * 64) + 5
    k_cache, v_cache = (torch.empty(num_blocks, 4, 1, 64, dtype=torch.float16, device=DEVICE) for _ in range(2))
    k_cache[-1], v_cache[-1] = 7, 7
    q, k, v = (randn(1, heads, 64, dtype=torch.float16).to(DEVICE) for heads in (2, 1, 1))
    cos, sin = torch.ones(1, 1, 32, dtype=torch.float16, device=DEVICE), torch.zeros(1, 1, 32, dtype=torch.float16, device=DEVICE)
    slot = num_blocks * 4 - 2
    fused.rotate_and_write(q, k, v, cos, sin, None, 0.0, k_cache, v_cache, torch.tensor([slot], device=DEVICE))
    for cache, new in ((k_cache, k), (v_cache, v)):
        assert cache[-1, 2].equal(new[0])
        assert (cache[-1, [0, 1, 3]] == 7).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@needs_triton
@pytest.mark.parametrize("which", ["each in its own", "all in one", "rows of other lengths"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 88), (2, 1024), (5, 1025), (1, 3001)])
def test_the_gate_rounds_where_plain_torch_rounds(module, fused, allocated, num_tokens, size, dtype, which):
    gate, up = places(which, num_tokens, [size, size], dtype)
    gate.mul_(4)
    gate[:, ::7] *= 8  # silu of numbers from about -100 to 100, and of 0
    gate[0, 0] = 0
    got = fused.silu_times(gate, up)
    assert_rounds_alike(got, module("layers").silu_times(gate, up))
    assert_enclosed(got)
    assert [each is got for each in allocated] == [True]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@needs_triton
def test_silu_of_large_numbers_does_not_overflow(module, fused):
    gate = torch.tensor([[-1e30, -300.0, -89.0, -88.0, 0.0, 88.0, 300.0, 1e30]], device=DEVICE)
    got = fused.silu_times(gate, torch.ones_like(gate))
    torch.testing.assert_close(got, F.silu(gate), rtol=2e-6, atol=1e-30)


@pytest.mark.whole
@needs_triton
@pytest.mark.parametrize("name", ["llama-two-layers", "qwen3-two-layers", "qwen2-two-layers"])
def test_kernels_and_forms_generate_what_plain_torch_generates(chapter, Params, load, rng, name):
    """On a CPU too, if someone asks for the kernels there."""
    prompts = [random_ids(length, 401, rng) for length in (1, 7)]
    said = []
    for attention, linear in (("torch", "plain"), ("triton", "joined")):
        engine = chapter.load().Engine(checkpoint(name), device="cpu", attention=attention, linear=linear, max_num_batched_tokens=64)
        said.append(engine.generate(prompts, Params(max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=True)))
    assert_same(*said)
    assert_unchanged(engine, load(name))


# ---- launches


def zero(kernel, *args, grid, warmup=False, **constants):
    """Stands in for the interpreter, which is slow: a launch whose result is 0."""
    launches.append(kernel.__name__)
    args[0].held.zero_()


@pytest.fixture
def zeros():
    """No kernel computes anything on the simulated GPU."""
    from triton.runtime.interpreter import InterpretedFunction

    return lambda: mock.patch.object(InterpretedFunction, "run", zero)


@pretended
@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TWO_LAYERS)
def test_a_layer_launches_ten_kernels_or_eleven(chapter, module, monkeypatch, zeros, Params, name, dtype):
    """Two norms, four products, rotation, attention, the gate and a sum; and one that combines the splits of a context."""
    counts = []
    eager = {"graphs": False} if "graphs" in chapter.capabilities else {}
    with pretend_gpu(), zeros():
        engine = chapter.load().Engine(checkpoint(name), device="cuda", dtype=dtype, max_model_len=64, **eager)
        for layer in engine.model.model.layers:
            layer.register_forward_pre_hook(lambda *_: counts.append(-len(launches)))
            layer.register_forward_hook(lambda *_: counts.append(len(launches)))
        for min_split_keys, most in ((10**6, 10), (1, 11)):
            monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", min_split_keys)
            engine.generate([[5, 6, 7], [5]], Params(max_tokens=3, ignore_eos=True))
            assert {before + after for before, after in zip(counts[::2], counts[1::2], strict=True)} == {most}
            assert len(counts) == 2 * 2 * 3
            counts.clear()
    assert names_of(chapter) <= set(launches)


@pretended
@needs_triton
def test_a_step_copies_no_more_to_the_gpu_than_v13s(chapter, zeros, Params):
    copied = []
    for package in (chapter.load(), find("v13").load()):
        with pretend_gpu() as crossings, zeros():
            engine = package.Engine(checkpoint("qwen3-two-layers"), device="cuda", dtype="float32", max_model_len=64)
            for prompt in ([5, 6, 7], [5]):
                engine.add_request(prompt, package.SamplingParams(max_tokens=4, ignore_eos=True))
            steps = []
            while engine.has_unfinished_requests():
                crossings.clear()
                engine.step()
                steps.append(len(crossings))
            copied.append(steps)
    assert len(copied[0]) == len(copied[1]) == 4
    assert all(ours <= theirs for ours, theirs in zip(*copied))


# ---- warming up


def state_of(engine):
    """All that a step could notice, but for the cache's contents."""
    pool, scheduler = engine.pool, engine.scheduler
    counts = engine.num_requests, engine.num_steps, engine.num_positions, engine.num_resets, engine.stats()
    blocks = list(pool.free_ids), list(pool.num_owners), dict(pool.key_of)
    requests = {key: (list(seq.token_ids), seq.num_computed, list(seq.block_table)) for key, seq in engine.seqs.items()}
    return counts, blocks, requests, list(scheduler.running), list(scheduler.waiting), list(engine.in_step)


@pytest.mark.parametrize("attention", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("block_size", [1, 4])
def test_warming_up_changes_nothing_even_while_requests_have_every_block(chapter, make_engine, Params, rng, attention, block_size):
    prompts, params = [random_ids(length, 401, rng) for length in (7, 11)], Params(max_tokens=5, logprobs=1, ignore_eos=True)
    want = make_engine("llama-two-layers", linear="plain").generate(prompts, params)
    # Full after the first step, and after the last but one.
    num_blocks = {4: 5, 1: 24}[block_size]
    options = dict(num_blocks=num_blocks, block_size=block_size, max_model_len=20, reserve_tokens=0, attention=attention)
    engine = chapter.load().Engine(checkpoint("llama-two-layers"), device="cpu", **options)
    request_ids = [engine.add_request(prompt, params) for prompt in prompts]
    token_ids, num_warm_ups = {request_id: [] for request_id in request_ids}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            token_ids[output.request_id].append(output.token_id)
        if engine.pool.num_free == 0 and not num_warm_ups:
            before, k, v = state_of(engine), engine.cache.k.clone(), engine.cache.v.clone()
            engine.warm_up()
            assert state_of(engine) == before and engine.cache.k.equal(k) and engine.cache.v.equal(v)
            num_warm_ups += 1
    assert list(token_ids.values()) == [each.token_ids for each in want]
    assert num_warm_ups == 1
    assert engine.add_request([9], params) == request_ids[-1] + 1
    engine.close()
