"""Every chapter on a GPU: with --gpu on a real one, otherwise on a pretended one, where kernels are left out."""
import contextlib

import pytest
import torch
from torch.utils._pytree import tree_leaves

from shared.checkpoints import checkpoint
from shared.pretend_gpu import pretend_gpu
from shared.reference import reference, settled
from shared.workloads import QUESTIONS, ragged


@pytest.fixture
def gpu():
    """Entered around whatever is to run there."""
    return contextlib.nullcontext() if torch.cuda.is_available() else pretend_gpu()


@pytest.fixture
def limits(chapter):
    """Kernels cannot run on what only says that it is a GPU."""
    return {} if torch.cuda.is_available() or "attention" not in chapter.capabilities else {"attention": "torch"}


@pytest.mark.gpu
@pytest.mark.needs("generate")
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3"])
def test_in_float32_it_says_what_hugging_face_says(chapter, gpu, limits, Params, name):
    """transformers computes on the CPU; where its two likeliest tokens are a tie, either will do."""
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
    """The dice do not depend on the device."""
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
def test_all_that_a_pass_is_given_is_on_the_gpu(chapter, gpu, limits, Params):
    """An index on the CPU would be copied, and waited for, in every layer."""
    batches = []
    with gpu:
        engine = chapter.load().Engine(checkpoint("llama"), device="cuda", **limits)
        engine.model.register_forward_pre_hook(lambda _model, args: batches.append(args[0]))
        engine.generate([[5, 6, 7], [8]], Params(max_tokens=2))
        placed = [leaf for leaf in tree_leaves([vars(batch) for batch in batches]) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in placed} == {"cuda"}
    assert len(placed) >= 3 * len(batches)


@pytest.mark.gpu
@pytest.mark.needs("generate")
def test_by_default_it_takes_the_gpu_and_the_checkpoints_precision(chapter, gpu, limits, Params):
    """In 16 bits rounding depends on the neighbours; what the trained model says does not."""
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
        lambda here, there: there.__setitem__(slice(None), here),
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
        assert there[torch.tensor([2, 0])].tolist() == [2, 0]
        there[torch.tensor([1])] = torch.tensor(7.0)
        assert there.cpu().equal(torch.tensor([0.0, 7.0, 2.0]))
        assert there.device.type == "cuda"
    assert not torch.cuda.is_available() or torch.cuda.get_device_name()
