"""v06: attention reads the blocks in place. The kernels are interpreted; with --gpu, compiled."""
import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from shared.bench import attention as bench_attention
from shared.bench import kernels as bench_kernels
from shared.chapters import CHAPTERS, ROOT
from shared.checkpoints import TWO_LAYERS, checkpoint
from shared.commands.doctor import interpreter_fault
from shared.verify.pretend_gpu import pretend_gpu
from shared.workloads import random_ids

# Without --gpu, no GPU is visible.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAULT = interpreter_fault() if DEVICE.type == "cpu" or importlib.util.find_spec("triton") is None else None
needs_triton = pytest.mark.skipif(FAULT is not None, reason=str(FAULT))


# A program's most shared memory; CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90": 227}


@pytest.fixture
def kernels(module):
    module("backends").choose_backend("triton", DEVICE)
    return module("kernels.paged_attention")


def sources(chapter):
    """The text of each file with kernels, by name; empty for a chapter without kernels."""
    return {path.stem: path.read_text() for path in sorted((chapter.path / "kernels").glob("[!_]*.py"))}


def code_of(chapter):
    """The source of each kernel of a chapter, by the kernel's name."""
    from triton.runtime import KernelInterface

    modules = [importlib.import_module(f"milestones.{chapter.name}.kernels.{file}") for file in sources(chapter)]
    kernels = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, KernelInterface)}
    return {name: inspect.getsource(kernel.fn) for name, kernel in kernels.items()}


def names_of(chapter, exact=False):
    """The names of all kernels that a chapter's engine launches; some only if it is exact."""
    return set(code_of(chapter)) - (set() if exact else {"_product_kernel"})


def paged(lengths, num_heads, num_kv_heads, head_dim, block_size, dtype=torch.float32):
    """Random arguments of paged_attention, NaN wherever it must not read. lengths: (queries, context) per sequence."""
    generator = torch.Generator().manual_seed(1)
    needed = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(needed) + 3
    free = torch.randperm(num_blocks - 1, generator=generator).add(1).tolist()  # block 0 belongs to no sequence
    caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), math.nan)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for s, (_, context) in enumerate(lengths):
        for i in range(needed[s]):
            block_id, held = free.pop(), min(block_size, context - i * block_size)
            tables[s, i] = block_id
            caches[:, block_id, :held] = torch.randn(2, held, num_kv_heads, head_dim, generator=generator)
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), num_heads, head_dim, generator=generator)
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    k, v = caches.to(DEVICE, dtype)
    return [each.to(DEVICE) for each in (q.to(dtype), k, v, tables, starts, contexts)]


EDGES = [(1, 1), (1, 63), (1, 64), (1, 65), (1, 131)]
RAGGED = [(5, 5), (1, 9), (33, 70), (2, 130)]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_kv_heads", "head_dim", "block_size"),
    [
        (EDGES, 6, 2, 14, 4),
        (RAGGED, 6, 2, 14, 7),
        (EDGES, 4, 1, 32, 16),
        (RAGGED, 3, 3, 18, 100),
        ([(1, 7), (3, 3)], 9, 3, 20, 1),
        ([(9, 40), (1, 33)], 4, 1, 130, 16),  # too wide for 64 keys at a time
    ],
)
def test_the_kernel_gives_what_plain_torch_gives(kernels, lengths, num_heads, num_kv_heads, head_dim, block_size, num_splits):
    args = paged(lengths, num_heads, num_kv_heads, head_dim, block_size)
    want = kernels.paged_attention_ref(*args)
    most = [max(each) for each in zip(*lengths)]
    got = kernels.paged_attention(*args, *most, num_splits=num_splits)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@needs_triton
def test_no_key_is_loaded_that_no_query_of_the_tile_sees(kernels, monkeypatch):
    """A prompt of 33 tokens makes two tiles; a neighbor that feeds one token must not be read for both."""
    from triton.runtime.interpreter import InterpreterBuilder

    args = paged([(33, 70), (1, 9)], 6, 2, 14, 4)
    first, last = args[1].data_ptr(), args[1].data_ptr() + args[1].nbytes
    loaded, load = [], InterpreterBuilder.create_masked_load

    def counting(self, ptrs, mask, *rest):
        loaded.append((mask.data & (ptrs.data >= first) & (ptrs.data < last)).sum())
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)
    kernels.paged_attention(*args, 33, 70, num_splits=1)
    # 64 rows are 21 queries of 3 heads and a third of the next, which sees 70 - 33 + 22 keys.
    assert sum(loaded) == (59 + 70 + 9) * 2 * 14


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_in_16_bits_it_differs_by_their_rounding(kernels, dtype, atol):
    if DEVICE.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    args = paged(RAGGED, 6, 2, 14, 4, dtype)
    got = kernels.paged_attention(*args, 33, 130)
    torch.testing.assert_close(got, kernels.paged_attention_ref(*args), rtol=0, atol=atol)


@pytest.mark.gpu
@needs_triton
def test_nothing_is_written_past_the_last_query(kernels, monkeypatch):
    """A tile has more rows than there are queries; the rows past them belong to the next sequence."""
    args = paged([(3, 3), (1, 9), (2, 2)], 6, 2, 14, 4)
    frame = torch.full((10, 6, 14), 7.0, device=DEVICE)
    empty = torch.empty
    monkeypatch.setattr(kernels.torch, "empty", lambda *s, **o: frame[:6] if s == (6, 6, 14) else empty(*s, **o))
    got = kernels.paged_attention(*args, 3, 9)
    assert got.data_ptr() == frame.data_ptr()
    assert (frame[6:] == 7).all()


@pytest.mark.gpu
@pytest.mark.until("v14")
@needs_triton
def test_keys_and_values_go_to_their_slots_and_nowhere_else(kernels):
    k, v = torch.randn(2, 5, 3, 14, device=DEVICE)
    k_cache, v_cache, behind = torch.full((3, 4, 4, 3, 14), 7.0, device=DEVICE)
    slots = [9, 0, 15, 3, 8]
    kernels.write_slots(k, v, k_cache, v_cache, torch.tensor(slots, device=DEVICE))
    for cache, new in ((k_cache.flatten(0, 1), k), (v_cache.flatten(0, 1), v)):
        assert cache[slots].equal(new)
        assert (cache[[slot for slot in range(16) if slot not in slots]] == 7).all()
    assert (behind == 7).all()  # room for writes past the end: a write into other memory could hang the test


@pytest.mark.gpu
@pytest.mark.until("v14")
@needs_triton
@pytest.mark.parametrize("strided", ["neither", "k", "v", "both alike", "both otherwise"])
def test_keys_and_values_may_be_parts_of_wider_tensors(kernels, strided):
    """As they are when one product makes queries, keys and values."""
    wide = torch.randn(2, 5, 3, 14 * 2, device=DEVICE)[..., :14]
    wider = torch.randn(5, 3, 14 * 3, device=DEVICE)[..., :14]
    plain_k, plain_v = torch.randn(2, 5, 3, 14, device=DEVICE)
    k = wide[0] if strided in ("k", "both alike", "both otherwise") else plain_k
    v = {"v": wide[1], "both alike": wide[1], "both otherwise": wider}.get(strided, plain_v)
    k_cache, v_cache = torch.zeros(2, 4, 4, 3, 14, device=DEVICE)
    slots = torch.tensor([9, 0, 15, 3, 8], device=DEVICE)
    kernels.write_slots(k, v, k_cache, v_cache, slots)
    assert k_cache.flatten(0, 1)[slots].equal(k) and v_cache.flatten(0, 1)[slots].equal(v)


@pytest.mark.gpu
@needs_triton
def test_addresses_beyond_two_to_the_31_are_reached(kernels):
    """Only one block of the cache's memory is ever used; an offset of 32 bits would wrap around."""
    args = paged([(1, 3)], 2, 1, 64, 4)
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 9 * 2**30:
        pytest.skip("the two caches are 8 GiB, more than this GPU has free")
    num_blocks = 2**31 // (4 * 64) + 5
    k, v = (torch.empty(num_blocks, 4, 1, 64, dtype=torch.float16, device=DEVICE) for _ in range(2))
    block_id = int(args[3][0, 0])
    k[-1], v[-1] = args[1][block_id], args[2][block_id]
    want = kernels.paged_attention_ref(*args)
    args[1:3] = k, v
    args[0] = args[0].half()
    args[3] = torch.full_like(args[3], num_blocks - 1)
    torch.testing.assert_close(kernels.paged_attention(*args, 1, 3).float(), want, rtol=0, atol=1e-2)


def test_the_online_softmax_of_the_text_with_a_pencil(chapter):
    """The worked example of the chapter: scores 2, 3 then 5, 1, with values 10, 20, 30, 40."""
    largest, total, mixed = -math.inf, 0.0, 0.0
    steps = []
    for scores, values in (((2, 3), (10, 20)), ((5, 1), (30, 40))):
        new = max(largest, *scores)
        rescale = math.exp(largest - new)
        weights = [math.exp(score - new) for score in scores]
        total = total * rescale + sum(weights)
        mixed = mixed * rescale + sum(weight * value for weight, value in zip(weights, values))
        largest = new
        steps.append((largest, round(total, 3), round(mixed, 2)))
    assert steps == [(3, 1.368, 23.68), (5, 1.203, 33.94)]
    whole = [math.exp(score - 5) for score in (2, 3, 5, 1)]
    assert mixed / total == pytest.approx(sum(w * v for w, v in zip(whole, (10, 20, 30, 40))) / sum(whole))
    assert round(mixed / total, 2) == 28.2
    # The same in two splits, combined by the logarithm of each one's sum.
    (first, lse_first), (second, lse_second) = (
        (sum(math.exp(s) * v for s, v in split) / sum(math.exp(s) for s, _ in split), math.log(sum(math.exp(s) for s, _ in split)))
        for split in (((2, 10), (3, 20)), ((5, 30), (1, 40)))
    )
    assert [round(x, 2) for x in (first, lse_first, second, lse_second)] == [17.31, 3.31, 30.18, 5.02]
    weight = math.exp(lse_first - lse_second)
    assert (round(weight, 3), round((weight * first + second) / (1 + weight), 2)) == (0.182, 28.2)


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", TWO_LAYERS)
def test_the_same_tokens_with_the_kernels_in_the_loop(chapter, Params, rng, name):
    """Three sequences, one of which crosses a block's edge as it grows."""
    prompts = [random_ids(length, 401, rng) for length in (3, 5, 9)]
    said = []
    for attention in ("torch", "triton"):
        engine = chapter.load().Engine(
            checkpoint(name), dtype="float32", num_blocks=40, block_size=5, attention=attention
        )
        outs = engine.generate(prompts, Params(max_tokens=6, ignore_eos=True, logprobs=1))
        said.append([out.token_ids for out in outs])
    assert said[0] == said[1]


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is pretended")
def test_kernels_are_launched_where_the_tensors_are(chapter, module, monkeypatch, Params):
    """With tensors on the second GPU while the first is current, every launch selects the second."""
    from triton.runtime.interpreter import InterpretedFunction

    entered, launched = [], set()

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.remove(tensor)

    def launch(kernel, *args, **options):
        launched.add(kernel.__name__)
        [tensor] = entered
        assert tensor.device == args[0].device == torch.device("cuda", 0)
        args[0].zero_()

    with pretend_gpu(), mock.patch.object(torch.cuda, "device_of", device_of), mock.patch.object(InterpretedFunction, "run", launch):
        engine = chapter.load().Engine(checkpoint("llama"), device="cuda", dtype="float32", max_model_len=64)
        monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", 1)
        for work in (engine.warm_up, lambda: engine.generate([[5, 6, 7], [8]], Params(max_tokens=2, ignore_eos=True))):
            work()
            assert launched == names_of(chapter) and not entered
            launched.clear()


@pytest.mark.until("v15")
@needs_triton
def test_warming_up_compiles_no_splits_that_no_step_uses(kernels, monkeypatch):
    """A step has at least one program for each KV head."""
    splits, attend = set(), kernels.paged_attention
    monkeypatch.setattr(kernels, "count_sms", lambda device: 40)
    monkeypatch.setattr(kernels, "paged_attention", lambda *args: splits.add(args[-1]) or attend(*args))
    k_cache, v_cache = torch.zeros(2, 3, 4, 4, 16, device=DEVICE)
    kernels.warm_up(k_cache, v_cache, num_heads=8, max_context_len=100_000)
    assert max(splits) == kernels.choose_splits(4, 100_000, 40) < kernels.choose_splits(1, 100_000, 40)


@pytest.mark.gpu
@needs_triton
def test_warming_up_changes_nothing_in_the_cache(kernels):
    k_cache, v_cache = torch.randn(2, 3, 4, 2, 14, device=DEVICE)
    before = k_cache.clone(), v_cache.clone()
    kernels.warm_up(k_cache, v_cache, num_heads=6, max_context_len=1000)
    assert k_cache.equal(before[0]) and v_cache.equal(before[1])


# Scalars that the kernels exclude from specialization.
CHANGING = {"stride_t_s", "num_tokens", "num_splits", "num_rows"}


@pytest.mark.whole
@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is pretended")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("llama-two-layers", "float32"), ("qwen3-two-layers", "bfloat16")],
)
def test_no_step_launches_a_variant_that_warming_up_has_not_compiled(chapter, module, monkeypatch, Params, rng, name, dtype):
    """Triton specializes by constants, each tensor's dtype and 16-byte alignment, and each integer's class.

    In the checkpoints with two layers, queries, keys and values of a token together are a multiple of 16, and apart are not.
    """
    from triton.runtime.interpreter import InterpretedFunction

    launched = set()

    def variant_of(name, value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.held.data_ptr() % 16 == 0
        return None if name in CHANGING or isinstance(value, float) else (value == 1, value % 16 == 0)

    def launch(kernel, *args, grid, warmup, **constants):
        variant = tuple(variant_of(*each) for each in zip(kernel.arg_names, args))
        launched.add((kernel.__name__, variant, *constants.items()))
        args[0].zero_()

    with pretend_gpu(), mock.patch.object(InterpretedFunction, "run", launch):
        engine = chapter.load().Engine(checkpoint(name), device="cuda", dtype=dtype, max_model_len=300)
        monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", 8)
        engine.warm_up()
        compiled, _ = set(launched), launched.clear()
        assert engine.num_steps == 0 and not engine.has_unfinished_requests()
        for length, num_prompts in ((1, 1), (2, 3), (5, 20), (9, 1), (30, 3), (250, 20)):
            prompts = [random_ids(length, 401, rng) for _ in range(num_prompts)]
            engine.generate(prompts, Params(max_tokens=3, ignore_eos=True))
    assert {name for name, *_ in launched} == names_of(chapter)
    assert launched <= compiled


@pytest.mark.whole
@needs_triton
def test_no_scalar_that_changes_from_step_to_step_is_compiled_in(chapter):
    """Triton would compile one variant for 1, one for multiples of 16, and one for all other values."""
    program = f"""
import importlib
from triton.runtime import JITFunction

for file in {list(sources(chapter))}:
    for kernel in vars(importlib.import_module(f"milestones.{chapter.name}.kernels.{{file}}")).values():
        for param in kernel.params if isinstance(kernel, JITFunction) else ():
            if not param.is_constexpr and not param.do_not_specialize and not param.name.endswith("_ptr"):
                print(param.name)
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert not set(said.stdout.split()) & CHANGING
    # A model has only one value of each of these, or one for a single token and one for more.
    of_model = {"stride_q_n", "stride_q_h", "stride_k_n", "stride_v_n", "scale"}
    of_model |= {"stride_gate_n", "stride_up_n", "eps"} if "fused" in sources(chapter) else {"stride_k_kv", "stride_v_kv"}
    assert set(said.stdout.split()) <= of_model


def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu(module):
    backends = module("backends")
    assert backends.choose_backend("auto", torch.device("cpu")) is backends.TORCH
    assert backends.choose_backend("torch", torch.device("cuda")) is backends.TORCH
    if FAULT is None:
        with contextlib.nullcontext() if torch.cuda.is_available() else pretend_gpu():
            assert backends.choose_backend("auto", torch.device("cuda")) is module("kernels").TRITON


@pytest.mark.parametrize("attention", ["auto", "triton"])
def test_kernels_that_are_interpreted_are_not_for_a_gpu(module, monkeypatch, attention):
    """They would copy every tensor to the CPU and back, and their bfloat16 products are wrong."""
    for value in ("1", "true", "YES", "on", "y"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        with pytest.raises(ValueError, match=f"attention is '{attention}' on cuda:0, but with TRITON_INTERPRET set, .* unset it, or use torch"):
            module("backends").choose_backend(attention, torch.device("cuda", 0))
    assert module("backends").choose_backend("torch", torch.device("cuda", 0)).name == "torch"


def test_another_attention_is_refused(chapter):
    with pytest.raises(ValueError, match="attention must be auto, torch or triton, got 'flash'"):
        chapter.load().Engine(checkpoint("llama"), attention="flash")


def test_without_triton_it_says_so(module, monkeypatch):
    backends = module("backends")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'triton' on cpu, but Triton is missing; install it or use torch"):
        backends.choose_backend("triton", torch.device("cpu"))


def test_too_late_for_the_interpreter_it_says_so(module, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", sys)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 in the environment before Python starts"):
        module("backends").choose_backend("triton", torch.device("cpu"))


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", *(pytest.param(name, marks=pytest.mark.whole) for name in ("sm_75", "sm_86", "sm_90"))])
def test_the_kernels_compile_for_gpus_that_are_not_here(chapter, target):
    """Ahead of time, in a process without the interpreter; the same Triton gives the committed result."""
    if sources(chapter) == sources(chapter.previous):
        return  # byte for byte the last chapter's, and compiled there
    command = [sys.executable, "-m", "shared.bench.kernels", chapter.id, "--targets", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = {name: rows[target] for name, rows in json.loads(done.stdout).items()}
    kernel_of = {name: bench_kernels.KERNELS[name][1] for name in found}
    assert set(kernel_of.values()) == names_of(chapter, exact=True)
    # What is committed was compiled from the first chapter that has the kernel.
    first = {name: each for each in reversed(CHAPTERS) for name in bench_kernels.kernels_of(each)}
    same = [name for name, kernel in kernel_of.items() if code_of(first[name])[kernel] == code_of(chapter)[kernel]]
    assert len(same) >= 5
    committed = json.loads((ROOT / "docs" / "results" / "kernels.json").read_text())
    # Another version of the compiler may put a register or two on the stack.
    most_bytes = 16
    if importlib.metadata.version("triton") == committed["triton"]:
        most_bytes = 0
        assert {name: found[name] for name in same} == {name: committed[name][target] for name in same}
    for name, row in found.items():
        assert row["shared_bytes"] <= SHARED_KIB[target] * 2**10, f"{name} for {target} does not fit"
        # sm_75 does not multiply bfloat16 itself.
        if "prefill" not in name and (target in ("sm_80", "sm_90") or not ("decode" in name or "product" in name)):
            assert row["stack_bytes"] <= most_bytes, f"{name} for {target} spills"


@needs_triton
def test_the_benchmark_of_a_gpu_runs_dry_without_one(capsys):
    """Three ways to attend must agree before any is timed; a difference stops the benchmark."""
    assert bench_attention.main(["--dry-run"]) == 0
    assert capsys.readouterr().out.count("kernel, torch, contiguous agree") == 2
    one, other = torch.zeros(1), torch.ones(1)
    with pytest.raises(AssertionError, match="contiguous"):
        bench_attention.check({"kernel": lambda _: one, "torch": lambda _: one, "contiguous": lambda _: other}, atol=1e-5)
    assert bench_attention.kv_bytes(bench_attention.SHAPES["llama-3.2-1b"], 128, 4, 2) == 2 * 8 * 64 * 2 * 128 * 4
