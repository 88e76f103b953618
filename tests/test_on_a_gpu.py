"""Every chapter on a GPU: with --gpu on a real one, otherwise on a simulated one."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from shared.checkpoints import checkpoint
from shared.verify.pretend_gpu import launches, pretend_gpu
from shared.verify.reference import reference, settled
from shared.workloads import QUESTIONS, ragged
from tests.claims.test_v06 import names_of, needs_triton

# The simulated one computes on the CPU, which other tests compare for all checkpoints.
FAMILIES = ["llama3", "mistral", "qwen2", "qwen3"] if torch.cuda.is_available() else ["llama3", "qwen3"]


@pytest.fixture
def gpu():
    """A context manager around code that runs on the GPU."""
    return contextlib.nullcontext() if torch.cuda.is_available() else pretend_gpu()


@pytest.fixture
def limits(chapter):
    """On a simulated GPU, Triton's interpreter runs kernels, which takes too long for most tests."""
    return {} if torch.cuda.is_available() or "attention" not in chapter.capabilities else {"attention": "torch"}


@pytest.mark.gpu
@pytest.mark.needs("generate")
@pytest.mark.parametrize("name", FAMILIES)
def test_in_float32_it_generates_what_hugging_face_generates(chapter, gpu, limits, Params, name):
    """transformers runs on the CPU; if its two likeliest tokens tie, either is accepted."""
    with gpu:
        engine = chapter.load().Engine(checkpoint(name), device="cuda", dtype="float32", **limits)
        requests = ragged(4, engine.config.vocab_size, prompt_len=(1, 40), output_len=(3, 9), seed=0)
        params = [Params(max_tokens=each.max_tokens) for each in requests]
        outs = engine.generate([each.prompt_ids for each in requests], params)
    for request, out in zip(requests, outs, strict=True):
        got, want, _ = settled(out.token_ids, reference(checkpoint(name)).greedy(request.prompt_ids, request.max_tokens))
        assert got == want


@pytest.mark.gpu
@pytest.mark.needs("generate", "sample", "logprobs")
def test_drawn_tokens_and_logprobs_are_the_cpus(chapter, gpu, limits, make_engine, Params):
    """Random numbers do not depend on the device."""
    params = [Params(max_tokens=8, temperature=0.8, top_k=50, top_p=0.9, seed=seed, logprobs=seed) for seed in range(3)]
    with gpu:
        engine = chapter.load().Engine(checkpoint("pocket"), device="cuda", dtype="float32", **limits)
        ours = engine.generate(list(QUESTIONS[:3]), params)
    theirs = make_engine("pocket", device="cpu").generate(list(QUESTIONS[:3]), params)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.token_ids == other.token_ids
        for got, want in zip(mine.logprobs, other.logprobs, strict=True):
            assert got == pytest.approx(want, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.needs("generate")
def test_a_forward_pass_finds_all_it_needs_on_the_gpu(chapter, gpu, limits, module, monkeypatch, Params):
    """Anything copied within a forward pass would be copied, and waited for, in every one, or in every layer."""
    batches, counts, logits_on, sample = [], [], set(), module("engine").sample

    def sample_there(logits, *args):
        logits_on.add(logits.device.type)
        return sample(logits, *args)

    monkeypatch.setattr(module("engine"), "sample", sample_there)
    with gpu as crossings:
        engine = chapter.load().Engine(checkpoint("llama"), device="cuda", **limits)
        engine.model.register_forward_pre_hook(lambda _model, args: batches.append(args[0]))
        engine.model.register_forward_pre_hook(lambda *_: counts.append(len(crossings or ())))
        engine.model.register_forward_hook(lambda *_: counts.append(len(crossings or ())))
        engine.generate([[5, 6, 7], [8]], Params(max_tokens=2))
        cache = vars(getattr(engine, "cache", None) or SimpleNamespace())
        placed = [leaf for leaf in tree_leaves([cache, *map(vars, batches)]) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in placed} == logits_on == {"cuda"}
    assert len(placed) >= 3 * len(batches) + 2 * bool(cache)
    for before, after in zip(counts[::2], counts[1::2], strict=True):
        assert not (crossings or ())[before:after]


@pytest.mark.whole
@pytest.mark.needs("attention")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is pretended")
@needs_triton
def test_kernels_are_given_what_is_on_the_gpu(chapter, module, monkeypatch, make_engine, Params):
    """Triton's interpreter runs them, and the simulated GPU refuses a launch with tensors that are elsewhere."""
    prompts, params = [[5, 6, 7], [8]], [Params(max_tokens=3, temperature=0.8, seed=seed, logprobs=2, ignore_eos=True) for seed in range(2)]
    counts = []
    with pretend_gpu() as crossings:
        engine = chapter.load().Engine(checkpoint("llama"), device="cuda", max_model_len=300)
        monkeypatch.setattr(module("kernels.paged_attention"), "MIN_SPLIT_KEYS", 1)
        engine.model.register_forward_pre_hook(lambda *_: counts.append(len(crossings)))
        engine.model.register_forward_hook(lambda *_: counts.append(len(crossings)))
        ours = engine.generate(prompts, params)
        if "exact" in chapter.capabilities:
            # The interpreter is slow, so the experiment at start is a short one.
            monkeypatch.setattr(module("trial"), "PIECES", (1, 1))
            monkeypatch.setattr(module("trial"), "COMPANY", ((), (2,)))
            monkeypatch.setattr(module("trial"), "HEAD_ROWS", ((0, 1),))
            chapter.load().Engine(checkpoint("llama"), device="cuda", max_model_len=300, exact=True, graphs=False).generate([[8]], params[0])
        assert names_of(chapter, exact="exact" in chapter.capabilities) <= set(launches)
        with pytest.raises(RuntimeError, match="same device"):
            module("kernels.paged_attention")._combine_kernel[(1,)](engine.cache.k, torch.zeros(1))
    assert counts[::2] == counts[1::2] and len(counts) == 6
    for mine, other in zip(ours, make_engine("llama", device="cpu").generate(prompts, params), strict=True):
        assert mine.token_ids == other.token_ids
        for got, want in zip(mine.logprobs, other.logprobs, strict=True):
            assert got == pytest.approx(want, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.needs("generate")
def test_by_default_it_takes_the_gpu_and_the_checkpoints_precision(chapter, gpu, limits, Params):
    """In 16 bits, rounding depends on the neighbors; the trained model's text does not."""
    with gpu:
        engine = chapter.load().Engine(checkpoint("pocket"), **limits)
        assert engine.device.type == "cuda" and engine.dtype.itemsize == 2
        params = Params(max_tokens=12)
        together = engine.generate(list(QUESTIONS[:2]), params)
        alone = [engine.generate([question], params)[0] for question in QUESTIONS[:2]]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]


@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: here + there,
        lambda here, there: there.index_copy_(0, here.long(), there),
        lambda here, there: there.index_select(0, here.long()),
        lambda here, there: here[there.long()],
        lambda here, there: there.__setitem__(there.long(), here),
        lambda here, there: there.index_put_((here.long(),), here),
        lambda here, there: here * there[0],
        lambda here, there: torch.nn.functional.linear(there, here[None]),
    ],
)
def test_the_pretended_gpu_refuses_what_is_on_the_cpu(mixed):
    with pretend_gpu():
        with pytest.raises(RuntimeError, match="same device"):
            mixed(torch.arange(3.0), torch.arange(3.0, device="cuda"))


def test_the_pretended_gpu_allows_what_a_real_one_allows():
    with pretend_gpu():
        there = torch.arange(3.0, device="cuda")
        assert there.device.type == "cuda"
        assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3]
        assert torch.arange(3.0).pin_memory().to(torch.device("cuda"), non_blocking=True).device.type == "cuda"
        assert there[torch.tensor([2, 0])].tolist() == [2, 0]
        there[torch.tensor([1])] = torch.tensor(7.0)
        there[:1] = torch.tensor([3.0])
        assert there.cpu().equal(torch.tensor([3.0, 7.0, 2.0]))
        assert int(there.copy_(torch.arange(3.0))[2]) == 2
        assert there.device.type == "cuda"
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("inference", [False, True])
def test_copies_between_devices_are_reported(inference):
    """In inference mode, PyTorch dispatches operations whole that it otherwise splits into parts."""
    with pretend_gpu() as crossings, torch.inference_mode(inference):
        there = torch.arange(3.0, device="cuda")
        assert not crossings
        for cross in (
            lambda: there.cpu(),
            lambda: torch.arange(3.0).to("cuda:0"),
            lambda: there.tolist(),
            lambda: there.max().item(),
            lambda: there[torch.tensor([0])],
            lambda: there.index_put_((torch.tensor([0]),), there[:1].clone()),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: there.copy_(torch.arange(3.0)),
        ):
            before = len(crossings)
            cross()
            assert len(crossings) == before + 1


def test_what_a_gpu_would_run_is_counted():
    with pretend_gpu(), torch.inference_mode():
        there, weight, index = torch.ones(2, 4, device="cuda"), torch.ones(3, 4, device="cuda"), torch.arange(1, device="cuda")
        launches.clear()
        for nothing in (
            lambda: there.view(4, 2).transpose(0, 1)[1:],
            lambda: there.split([1, 3], dim=-1),
            lambda: torch.empty_like(there),
            lambda: torch.empty(3, device="cuda"),
            lambda: torch.ones(3) + 1,
        ):
            nothing()
            assert not launches
        for run in (
            lambda: there + 1,
            lambda: there.add_(1),
            lambda: torch.zeros(3, device="cuda"),
            lambda: there[index],
            lambda: torch.nn.functional.linear(there, weight),
            lambda: there[:, 1:].clone(),
        ):
            launches.clear()
            run()
            assert len(launches) == 1, launches
