"""v01: a decoder is a function from tokens to the next token's logits; call it in a loop."""
import json
import shutil

import pytest

from shared.checkpoints import checkpoint
from shared.workloads import random_ids


@pytest.mark.until("v02")
def test_every_token_recomputes_the_whole_sequence(make_engine, tokens_per_pass, Params, rng):
    engine = make_engine("llama")
    prompt_ids = random_ids(5, engine.config.vocab_size, rng)
    counts = tokens_per_pass(engine, lambda: engine.generate([prompt_ids], Params(max_tokens=7, ignore_eos=True)))
    assert counts == [5, 6, 7, 8, 9, 10, 11]


def test_the_engine_counts_its_steps_and_positions(make_engine, tokens_per_pass, Params):
    engine = make_engine("llama")
    before = engine.num_steps, engine.num_positions
    counts = tokens_per_pass(engine, lambda: engine.generate([[9, 10]], Params(max_tokens=6, ignore_eos=True)))
    assert (engine.num_steps - before[0], engine.num_positions - before[1]) == (len(counts), sum(counts))


@pytest.mark.until("v03")
def test_requests_run_one_after_the_other_in_the_order_they_came(make_engine, Params):
    engine = make_engine("llama")
    lengths = [3, 1, 2]
    ids = [engine.add_request([9], Params(max_tokens=n, ignore_eos=True)) for n in lengths]
    ran = []
    while engine.has_unfinished_requests():
        ran += [[output.request_id for output in engine.step()]]
    assert ran == [[ids[0]], [ids[0]], [ids[0]], [ids[1]], [ids[2]], [ids[2]]]


def test_one_row_of_logits_is_computed_per_token_wanted(make_engine, Params, rng):
    """The head is the largest matrix of a small model, so a prompt must not multiply it at every position."""
    engine = make_engine("llama")
    rows = []
    hook = engine.model.lm_head.register_forward_hook(lambda _module, _args, out: rows.append(len(out)))
    engine.generate([random_ids(40, engine.config.vocab_size, rng)], Params(max_tokens=3, ignore_eos=True))
    hook.remove()
    assert rows == [1, 1, 1]


def test_the_weights_are_loaded_once_and_untouched(make_engine, Params):
    """A run never writes into a parameter, and a tied head is the embedding itself, not a copy."""
    engine = make_engine("qwen2")
    assert engine.model.lm_head.weight.data_ptr() == engine.model.model.embed_tokens.weight.data_ptr()
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    engine.generate([[9, 10, 11]], Params(max_tokens=4, temperature=1.0, logprobs=1))
    for name, tensor in engine.model.state_dict().items():
        assert tensor.equal(before[name]), name
    assert not any(parameter.requires_grad for parameter in engine.model.parameters()), "no parameter is trained"


def test_max_model_len_limits_prompt_and_output_together(chapter, Params):
    engine = chapter.load().Engine(checkpoint("llama"), max_model_len=50)
    [out] = engine.generate([[9] * 41], Params(max_tokens=None, ignore_eos=True))
    assert len(out.token_ids) == 9
    with pytest.raises(ValueError, match="have at most max_model_len = 50 tokens"):
        engine.add_request([9] * 41, Params(max_tokens=10))


@pytest.mark.parametrize("length", [0, -1, 321, 1.5, "50"])
def test_max_model_len_out_of_range_is_refused(chapter, length):
    with pytest.raises(ValueError, match="max_model_len must be an integer from 1 to 320 or None, got"):
        chapter.load().Engine(checkpoint("llama"), max_model_len=length)


def test_a_window_that_max_model_len_stays_within_is_accepted(chapter, tmp_path):
    path = tmp_path / "mistral"
    shutil.copytree(checkpoint("mistral"), path)
    config = json.loads((path / "config.json").read_text()) | {"sliding_window": 100}
    (path / "config.json").write_text(json.dumps(config))
    chapter.load().Engine(path, max_model_len=100)
    with pytest.raises(ValueError, match="sliding_window is 100, below max_model_len = 101"):
        chapter.load().Engine(path, max_model_len=101)
