"""v02: keys and values of past tokens never change. Prefill once, then feed one token at a time."""
import json
import shutil

import pytest
import torch

from shared.checkpoints import checkpoint
from shared.workloads import random_ids


def test_the_prompt_is_fed_once_and_then_one_token_a_step(make_engine, tokens_per_pass, Params, rng):
    engine = make_engine("llama")
    prompt_ids = random_ids(5, engine.config.vocab_size, rng)
    counts = tokens_per_pass(engine, lambda: engine.generate([prompt_ids], Params(max_tokens=7, ignore_eos=True)))
    assert counts == [5, 1, 1, 1, 1, 1, 1]


@pytest.mark.until("v03")
def test_the_cache_takes_the_bytes_that_the_formula_says(chapter, module):
    engine = chapter.load().Engine(checkpoint("mistral"), dtype="bfloat16", max_model_len=77)
    per_token = module("cache").kv_bytes_per_token(engine.config, engine.dtype)
    assert per_token == 2 * 3 * 3 * 14 * 2  # keys and values, layers, KV heads, head_dim, bytes
    assert engine.cache.k.nbytes + engine.cache.v.nbytes == engine.cache.kv_bytes == 77 * per_token


def test_a_cache_that_no_memory_holds_is_refused_with_both_numbers(module):
    """Before it is allocated: an operating system grants memory that it lacks, and fails when it is used."""
    check = module("cache").check_memory
    check(2**20, torch.device("cpu"), "")
    with pytest.raises(ValueError, match=r"needs 1048576.0 GiB of memory, but cpu has \d+.\d GiB; lower max_x"):
        check(2**50, torch.device("cpu"), "lower max_x")


@pytest.mark.until("v03")
def test_a_length_that_no_memory_holds_is_refused(chapter, tmp_path):
    path = tmp_path / "llama"
    shutil.copytree(checkpoint("llama"), path)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 2**40}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the cache needs .* lower max_model_len"):
        chapter.load().Engine(path, max_model_len=2**40)


@pytest.mark.until("v03")
@pytest.mark.parametrize("length", [1, 2, 40])
def test_what_other_requests_left_in_the_cache_changes_nothing(make_engine, Params, rng, length):
    """The cache is filled with 1e30, because later chapters mask a key after reading it: a weight of 0 times NaN is NaN."""
    engine = make_engine("qwen3")
    prompt_ids = random_ids(length, engine.config.vocab_size, rng)
    [clean] = engine.generate([prompt_ids], Params(max_tokens=9, seed=0))
    engine.cache.k.fill_(1e30)
    engine.cache.v.fill_(1e30)
    [poisoned] = engine.generate([prompt_ids], Params(max_tokens=9, seed=0))
    assert poisoned == clean


def test_a_request_aborted_half_way_leaves_nothing_that_the_next_one_sees(make_engine, Params):
    engine = make_engine("llama")
    [clean] = engine.generate([[31, 32]], Params(max_tokens=9, seed=0))
    request_id = engine.add_request(list(range(10, 60)), Params(max_tokens=50, ignore_eos=True))
    for _ in range(20):
        engine.step()
    engine.abort_request(request_id)
    assert engine.generate([[31, 32]], Params(max_tokens=9, seed=0)) == [clean]


@pytest.mark.until("v05")
def test_the_default_length_is_the_models_but_at_most_2048(module):
    choose = module("engine").choose_length
    assert choose(None, 320) == 320
    assert choose(None, 131072) == 2048
    assert choose(131072, 131072) == 131072


def test_what_the_cache_costs_is_said(chapter, capsys):
    chapter.load().Engine(checkpoint("llama"), max_model_len=320, dtype=torch.float32)
    assert "of keys and values" in capsys.readouterr().err


@pytest.mark.until("v03")
def test_only_attention_learns_of_the_cache(chapter):
    """The change is small: layers that see one token at a time are unchanged, byte for byte."""
    for name in ("layers.py", "model.py", "loader.py", "config.py", "sampling.py", "text.py", "scheduler.py"):
        assert (chapter.path / name).read_bytes() == (chapter.previous.path / name).read_bytes(), name
