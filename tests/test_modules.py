"""module = Hugging Face: every module of a prefill, hooked by name on both sides."""
import math
import secrets

import pytest
import torch

from shared.checkpoints import RANDOM, checkpoint
from shared.verify.reference import Outputs, reference
from shared.workloads import random_ids

pytestmark = pytest.mark.needs("generate")

# Relative to the largest magnitude of the reference's tensor. The logits' is absolute.
TOLERANCE = {"module": 1e-5, "rope": 1e-6, "logits": 1e-4}


def kind_of(name):
    return "logits" if name == "lm_head" else "rope" if "rotary_emb" in name else "module"


def aligned(name, want, ours):
    """The part of the reference's output that ours corresponds to."""
    if "rotary_emb" in name:
        # transformers repeats the table for the second half of the head.
        first, second = want.chunk(2, dim=-1)
        assert torch.equal(first, second)
        return first[:, None]
    if name == "lm_head":
        return want[-1:]
    return want.reshape(ours.shape)


def prefill(engine, prompt_ids, Params):
    """The outputs of our modules for a prompt."""
    # Another test may have left the beginning of such a prompt in the prefix cache.
    alone = {"cache_salt": secrets.token_hex()} if hasattr(Params, "cache_salt") else {}
    with Outputs(engine.model) as outputs:
        engine.generate([prompt_ids], Params(max_tokens=1, **alone))
    return outputs


@pytest.mark.parametrize("length", [1, 53])
def test_every_module_gives_what_hugging_faces_gives(engine, hf, length, Params, measure, checkpoint_name, rng):
    prompt_ids = random_ids(length, engine.config.vocab_size, rng)
    want = hf.module_outputs(prompt_ids)
    ours = prefill(engine, prompt_ids, Params)
    # In transformers silu is a module, and attention also returns its weights; all else must be compared.
    assert set(ours) == {name for name in want if not name.endswith(("act_fn", "self_attn.1"))}
    for name, got in ours.items():
        kind = kind_of(name)
        other = aligned(name, want[name], got)
        distance = measure(f"{kind}_float32", name, got, other, checkpoint_name, relative=kind == "module")
        assert distance <= TOLERANCE[kind], f"{name} is {distance:.1e} away"


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_modules_in_bfloat16_differ_by_its_rounding(make_engine, name, Params, measure, rng):
    """bfloat16 keeps 8 bits, so one rounding is 2 ** -8. A norm or a softmax in bfloat16 would round many times.

    Eager attention rounds its weights before it averages the values, fused attention does not, and each
    layer passes the difference on. transformers has both; ours must match one of them.
    """
    engine = make_engine(name, dtype="bfloat16")
    prompt_ids = random_ids(53, engine.config.vocab_size, rng)
    ours = prefill(engine, prompt_ids, Params)
    distances = []
    for attention in ("eager", "sdpa"):
        want = reference(checkpoint(name), torch.bfloat16, attention).module_outputs(prompt_ids)
        found = {key: relative(got, aligned(key, want[key], got)) for key, got in ours.items()}
        assert all(map(math.isfinite, found.values()))
        worst = max(found, key=found.get)
        distances.append((found[worst], worst, attention))
    distance, worst, attention = min(distances)
    measure("module_bfloat16", f"{worst} ({attention})", [distance], [0.0], name)
    assert distance <= 2**-7, f"{worst} is {distance:.1e} away from {attention}"


def relative(got, want):
    """The distance, divided by the largest magnitude of the reference."""
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()


@pytest.mark.parametrize("name", [name for name, spec in RANDOM.items() if spec.llama3_rope])
def test_rope_scaling_changes_the_slow_pairs_and_leaves_the_fast_ones(make_engine, name, module):
    config = make_engine(name).config
    scaled = module("layers").rope_frequencies(config)
    plain = module("layers").rope_frequencies(type(config)(**(vars(config) | {"rope_scaling": {}})))
    assert scaled[0] == plain[0]
    assert torch.isclose(scaled[-1] * 8, plain[-1])
    assert ((scaled < plain) & (scaled * 8 > plain * 1.01)).any()  # some are blended
