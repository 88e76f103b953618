"""v18: between the logits and the draw, a request adds, takes away and forbids, and its text follows its grammar."""

import inspect
import json
import math
import os
import pickle
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import httpx
import jsonschema
import numpy as np
import openai
import psutil
import pytest
import torch
from pydantic import BaseModel, Field
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shared.chapters import ROOT
from shared.checkpoints import RANDOM, checkpoint, write_checkpoint
from shared.verify import json_suite
from shared.verify.reference import reference
from shared.verify.serving import serving, wait_until
from shared.workloads import random_ids
from tests.support.grammars import SCHEMAS
from tests.support.http import HTTP, events_of, post
from tests.support.same import assert_same

V, EOS = 401, 1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tag": {"enum": ["é", "big"]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def new_engine(chapter):
    """Engines of the test's own, of random weights, with a tokenizer that has fewer tokens than the model."""

    def new_engine(name="llama-two-layers", **options):
        limits = {"num_blocks": 100, "block_size": 4, "max_num_seqs": 9, "max_model_len": 256}
        return chapter.load().Engine(checkpoint(name), **{"dtype": "float32"} | limits | options)

    return new_engine


@pytest.fixture
def pocket(make_engine):
    return make_engine("pocket", max_num_seqs=16, max_model_len=256)


@pytest.fixture
def RequestError(chapter):
    return chapter.load().RequestError


@pytest.fixture
def ids(rng):
    return lambda length: random_ids(length, 380, rng)


@pytest.fixture
def new_seq(module, make_engine, Params):
    """Sequences without an engine, that have their output already."""
    tokenizer = make_engine("pocket", max_num_seqs=16, max_model_len=256).tokenizer

    def new_seq(prompt, output=(), words=(), matcher=None, **params):
        seq = module("sequence").Sequence(
            seq_id=1,
            prompt_ids=prompt,
            params=Params(**{"max_tokens": 999} | params),
            max_tokens=999,
            end_ids=(EOS,),
            stream=module("text").TextStream(tokenizer),
            root_key=b"",
            matcher=matcher,
            bad_words=words,
        )
        for token_id in output:
            seq.token_ids.append(token_id)
        return seq

    return new_seq


def next_draw(module, seq):
    return module("batch").Draw(seq, seq.num_tokens)


def some_logits(rows, seed=0):
    """Of both signs, with zeros and a few that are -inf already."""
    logits = 4 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))
    logits[:, 7::31] = 0.0
    logits[:, 11::61] = -math.inf
    return logits


# ---- the logits, to the bit


def test_repetition_penalty_is_hugging_faces_to_the_bit(module, new_seq, ids):
    """Of the prompt's tokens and the output's, in a mixed batch; rows without it are as they were."""
    penalties = [1.3, 1.0, 0.7, 100.0, 1, 0.01, 2]
    seqs = [new_seq(ids(9) * 2, ids(number), repetition_penalty=penalty) for number, penalty in enumerate(penalties)]
    logits = some_logits(len(seqs))
    before = logits.clone()
    got = module("logits").adjust(logits, [next_draw(module, seq) for seq in seqs])
    assert torch.equal(logits, before), "the logits are the caller's: logprobs are reported from them"
    for row, seq in enumerate(seqs):
        want = logits[row]
        if penalties[row] != 1:
            want = RepetitionPenaltyLogitsProcessor(float(penalties[row]))(torch.tensor([seq.token_ids]), logits[row : row + 1])[0]
        assert torch.equal(got[row], want), penalties[row]


def by_openais_formula(logits, output, frequency, presence):
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, a token at a time, in float32."""
    out = logits.clone().numpy()
    for token_id, count in Counter(output).items():
        out[token_id] = np.float32(np.float32(out[token_id]) - np.float32(frequency) * np.float32(count)) - np.float32(presence)
    return torch.from_numpy(out)


def test_frequency_and_presence_are_openais_formula_of_the_output_alone(module, new_seq, ids):
    cases = [(2.0, 0.0), (0.0, 1.7), (-1.3, 0.6), (0.3, -2), (0.0, 0.0), (1e-3, 1e-3)]
    seqs = []
    for number, (frequency, presence) in enumerate(cases):
        prompt, output = ids(20), ids(6)
        # Some tokens several times, some of the prompt's too.
        seqs.append(new_seq(prompt, output * number + prompt[:3] + output[:2], frequency_penalty=frequency, presence_penalty=presence))
    logits = some_logits(len(cases), seed=1)
    got = module("logits").adjust(logits, [next_draw(module, seq) for seq in seqs])
    for row, (seq, case) in enumerate(zip(seqs, cases)):
        assert torch.equal(got[row], by_openais_formula(logits[row], seq.output_ids, *case)), case


class Allows:
    """A matcher that allows some tokens."""

    def __init__(self, token_ids):
        self.token_ids = token_ids

    def mask(self):
        bits = np.zeros(-(-V // 8) * 8, np.uint8)
        bits[self.token_ids] = 1
        return np.packbits(bits, bitorder="little")


def hugging_faces(seq, logits, bias, penalty, words, min_tokens, allowed):
    """transformers' processors in its order; frequency and presence, which it lacks, after its repetition penalty."""
    shape = torch.tensor([seq.token_ids])
    logits = logits[None]
    if bias:
        logits = SequenceBiasLogitsProcessor({(token_id,): float(value) for token_id, value in bias.items()})(shape, logits)
    if penalty != 1:
        logits = RepetitionPenaltyLogitsProcessor(penalty)(shape, logits)
    logits = by_openais_formula(logits[0], seq.output_ids, seq.params.frequency_penalty, seq.params.presence_penalty)[None]
    rest = LogitsProcessorList()
    if words:
        rest.append(NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=EOS))
    if min_tokens:
        rest.append(MinNewTokensLengthLogitsProcessor(seq.num_prompt, min_tokens, EOS))
    if allowed is not None:
        rest.append(PrefixConstrainedLogitsProcessor(lambda _batch, _ids: allowed, 1))
    return rest(shape, logits)[0]


def test_all_of_them_in_hugging_faces_order_to_the_bit(module, new_seq, rng, ids):
    """Random combinations, side by side in one batch: also of few rows among many that use none."""
    seqs, wants = [], []
    logits = some_logits(60, seed=2)
    for row in range(len(logits)):
        on = [rng.random() < (0.5 if row % 3 else 0.0) for _ in range(6)]
        prompt, output = ids(rng.randrange(1, 15)), ids(rng.randrange(7))
        bias = {token_id: rng.uniform(-100, 100) for token_id in {*ids(9), EOS}} if on[0] else None
        penalty = rng.choice((0.5, 1.2, 1.9)) if on[1] else 1.0
        words = ([[5], [9, 8], [*output[-2:], 77], [prompt[-1], 3], [EOS, 4], [400]]) if on[2] else ()
        min_tokens = rng.randrange(1, 8) if on[3] else 0
        allowed = sorted(set(ids(40)) | {EOS, 5, 400}) if on[4] and not words and not min_tokens else None
        options = {"frequency_penalty": 0.7, "presence_penalty": -0.4} if on[5] else {}
        grammar = {"regex": "a"} if allowed else {"min_tokens": min_tokens, "bad_words": ("x",) if words else ()}
        matcher = Allows(allowed) if allowed else None
        seq = new_seq(prompt, output, words, matcher, logit_bias=bias, repetition_penalty=penalty, **options, **grammar)
        seqs.append(seq)
        wants.append(hugging_faces(seq, logits[row], bias, penalty, words, min_tokens, allowed))
    got = module("logits").adjust(logits, [next_draw(module, seq) for seq in seqs])
    for row, want in enumerate(wants):
        assert torch.equal(got[row], want), row
    assert module("logits").adjust(logits, [next_draw(module, seqs[row]) for row in range(0, 60, 3)]) is logits


def test_min_tokens_forbids_whatever_ends_a_text_for_that_many_tokens(module, new_seq, ids):
    """The checkpoint's end tokens, the request's own and special tokens that are stop strings; not ids that the model lacks."""
    for num_output in range(5):
        seq = new_seq(ids(3), ids(num_output), min_tokens=3, stop_token_ids=(50, 60, 9_999), stop=("</s>",))
        [row] = module("logits").adjust(some_logits(1), [next_draw(module, seq)])
        assert [bool(row[token_id].isinf()) for token_id in (EOS, 50, 60)] == [num_output < 3] * 3
        assert row.isfinite().sum() == some_logits(1).isfinite().sum() - (3 if num_output < 3 else 0)


def test_a_token_that_is_known_is_not_adjusted(module, new_seq, ids):
    """Rows of prompt_logprobs, whose tokens are the prompt's."""
    seq = new_seq(ids(5), ids(2), repetition_penalty=1.5, logit_bias={3: 9})
    Draw = module("batch").Draw
    logits = some_logits(3)
    got = module("logits").adjust(logits, [Draw(seq, 3), Draw(seq, 4), Draw(seq, 7)])
    assert torch.equal(got[:2], logits[:2]) and not torch.equal(got[2], logits[2])


def test_min_p_is_hugging_faces_and_comes_last(module, Params):
    """After temperature, top-k and top-p, which change what the likeliest token's probability is."""
    params = [
        Params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.4, 1.0, 2.5)
        for top_k in (0, 2, 9)
        for top_p in (1.0, 0.6)
        for min_p in (0.0, 0.05, 0.45, 1.0)
    ]
    logits = 3 * torch.randn(len(params), V, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    got = module("sampling").filter_logits(logits, params)
    for row, each in enumerate(params):
        want = TemperatureLogitsWarper(float(each.temperature))(None, logits[row : row + 1])
        if each.top_k:
            want = TopKLogitsWarper(each.top_k)(None, want)
        if each.top_p < 1:
            want = TopPLogitsWarper(each.top_p)(None, want)
        if each.min_p:
            want = MinPLogitsWarper(each.min_p)(None, want)
        assert torch.equal(got[row], want[0]), each
    assert torch.equal(logits, before)


def test_min_p_is_of_the_tokens_that_top_p_left(module, Params):
    """Of 0.3, 0.25, 0.25 and 0.2, top_p 0.5 leaves 0.3 and 0.25: 0.55 and 0.45 of what is left. And mask before all of it."""
    logits = torch.tensor([[0.3, 0.25, 0.2501, 0.1999]]).log()
    for min_p, kept in ((0.8, [True, False, True, False]), (0.84, [True, False, False, False])):
        got = module("sampling").filter_logits(logits, [Params(temperature=1.0, top_p=0.5, min_p=min_p)])
        assert got.isfinite().tolist() == [kept], min_p


# ---- whole runs


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.4}, {"min_tokens": 25}, {"bad_words": ("little", "the", " girl named")}, {"logit_bias": {300: 4.5, 20: -50}}], ids=str
)
def test_greedy_runs_are_hugging_faces(make_engine, Params, options):
    """For a prompt after which the model goes on, and one after which it soon ends."""
    hf, pocket = reference(checkpoint("pocket")), make_engine("pocket", dtype="float32", max_num_seqs=16, max_model_len=256)
    prompts = ["Once upon a time", "The end. The end."]
    got = pocket.generate(prompts, Params(max_tokens=30, **options))
    for prompt, output in zip(prompts, got):
        prompt_ids = pocket.tokenizer(prompt).input_ids
        words = [
            ids
            for word in options.get("bad_words", ())
            for text in (word, f" {word.lstrip()}")
            for ids in hf.tokenizer([text], add_special_tokens=False).input_ids
        ]
        [want] = hf.model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=30,
            repetition_penalty=options.get("repetition_penalty"),
            min_new_tokens=options.get("min_tokens"),
            bad_words_ids=words or None,
            sequence_bias={(token_id,): float(bias) for token_id, bias in options["logit_bias"].items()} if "logit_bias" in options else None,
            pad_token_id=0,
        )
        assert output.token_ids == want[len(prompt_ids) :].tolist(), prompt


def test_all_answers_of_a_call_have_their_words_spelled_once(new_engine, module, Params, ids, monkeypatch):
    """The engine's thread does it, while all streams wait."""
    spelled, spell_words = [], module("text").spell_words
    monkeypatch.setattr(module("engine"), "spell_words", lambda tokenizer, words: (spelled.append(words), spell_words(tokenizer, words))[1])
    engine, prompt = new_engine(), ids(4)
    for words in (("ab", " cd"), ["ab", " cd"], ("ef",)):
        for params in module("params").choices(Params(bad_words=words, seed=1), 3):
            engine.add_request(prompt, params)
    assert spelled == [("ab", " cd"), ("ef",)]
    want = [engine.tokenizer(text, add_special_tokens=False).input_ids for text in ("ab", " ab", " cd", " cd")]
    assert [seq.bad_words for seq in engine.seqs.values()][:6] == [tuple(want)] * 6


def shaped(Params, number, **others):
    """A request that uses some of everything."""
    kinds = (
        {"repetition_penalty": 1.3, "frequency_penalty": 0.6, "min_tokens": 5},
        {"regex": "[a-z]{3,9}( [a-zé]{1,7}){2}\\.", "presence_penalty": 0.5},
        {},
        {"json_schema": SCHEMA, "temperature": 1.5, "min_p": 0.01},
        {"logit_bias": {number: -100, 250: 2.5}, "bad_words": ("the",), "temperature": 0.7},
        {"choice": ("left and right", "left", "é!"), "temperature": 1.2},
        {"grammar": 'start: "<" WORD ">" start?\nWORD: /[a-z]{1,3}/', "temperature": 1.0, "max_tokens": 8},
    )
    return Params(**{"max_tokens": 24, "seed": number, "logprobs": 2} | kinds[number % len(kinds)] | others)


TIGHT = {"num_blocks": 20, "reserve_tokens": 0}
WAYS = {"together": {}, "in pieces": {"max_num_batched_tokens": 7, "max_num_seqs": 7}, "computed again": TIGHT, "swapped": TIGHT | {"swap_bytes": 10**7}}


@pytest.mark.whole
@pytest.mark.parametrize(("name", "ways"), [("llama-two-layers", ("together", "in pieces", "computed again")), ("mistral-two-layers", ("together", "swapped"))])
def test_a_request_has_the_same_text_in_company(new_engine, Params, ids, name, ways):
    """Nothing that it counts or follows is another request's, or counted or followed twice, or lost."""
    prompts = [ids(5 + 3 * (number % 3)) for number in range(14)]
    params = [shaped(Params, number) for number in range(14)]
    want = alone(new_engine, name, prompts, params)
    assert all(re.fullmatch("[a-z]{3,9}( [a-zé]{1,7}){2}\\.", output.text) for output in want[1::7] if output.finish_reason == "stop")
    for way in ways:
        engine = new_engine(name, enable_prefix_caching=False, **WAYS[way])
        assert_same(engine.generate(prompts, params), want)
        assert bool(engine.stats().preemptions) == ("num_blocks" in WAYS[way]), way


def alone(new_engine, name, prompts, params):
    engine = new_engine(name, enable_prefix_caching=False)
    return [engine.generate([prompt], each)[0] for prompt, each in zip(prompts, params)]


@pytest.mark.parametrize("swap_bytes", [0, 10**7])
def test_a_preempted_request_has_counted_its_tokens_once(new_engine, Params, ids, monkeypatch, swap_bytes):
    engine = new_engine(num_blocks=20, reserve_tokens=0, swap_bytes=swap_bytes)
    seen, release = [], engine.release
    monkeypatch.setattr(engine, "release", lambda seq: (seen.append(seq), release(seq)))
    engine.generate([ids(6) for _ in range(7)], Params(max_tokens=20, frequency_penalty=0.1, ignore_eos=True))
    assert engine.stats().preemptions and sum(seq.num_preemptions for seq in seen) > 2
    for seq in seen:
        # The last token is chosen, and then not counted any more.
        counts = Counter(dict.fromkeys(seq.token_ids[: seq.num_prompt], 0)) + Counter()
        counts = {token_id: seq.output_ids[:-1].count(token_id) for token_id in dict.fromkeys(seq.token_ids[:-1])} | counts
        assert dict(zip(seq.history.token_ids, seq.history.counts)) == counts


def test_choices_share_a_grammar_and_not_its_state(new_engine, module, Params, ids):
    """Each with its own seed and text, as alone."""
    engine, prompt = new_engine(), ids(4)
    params = module("params").choices(Params(regex="[a-z]{4,9}!", temperature=2.0, seed=5, max_tokens=30), 6)
    got = engine.generate([prompt] * 6, params)
    assert len(engine.take_report().compiled) == 1
    assert len({output.text for output in got}) > 3 and all(re.fullmatch("[a-z]{4,9}!", output.text) for output in got)
    assert [output.text for output in got] == [engine.generate([prompt], each)[0].text for each in params]


def test_logprobs_are_of_the_raw_logits(new_engine, Params, ids):
    """Whatever was added, taken and forbidden: a token may be reported as unlikely as it was."""
    hf, prompt = reference(checkpoint("llama-two-layers")), ids(6)
    for options in ({"logit_bias": {77: 100}, "repetition_penalty": 3.0}, {"regex": "[xyz]{4,5}"}, {"min_tokens": 4, "bad_words": ("a", "e")}):
        [output] = new_engine().generate([prompt], Params(max_tokens=4, logprobs=3, **options))
        raw = hf.logits(prompt + output.token_ids)[len(prompt) - 1 : -1].log_softmax(-1)
        for token_id, its, reported in zip(output.token_ids, raw, output.logprobs, strict=True):
            assert reported[token_id] == pytest.approx(its[token_id].item(), abs=2e-4)
            assert set(its.topk(3).indices.tolist()) <= set(reported)
        assert min(reported[token_id] for token_id, reported in zip(output.token_ids, output.logprobs)) < -1


# ---- texts that follow a grammar

GRAMMARS = {
    "regex": {"regex": " ?[A-Z][a-z]{1,8}( é🙂)?\\."},
    "choice": {"choice": (" left", "left", "lefty", "日本")},
    "schema": {"json_schema": SCHEMA},
    "schema as text": {"json_schema": json.dumps(SCHEMAS["tuple"])},
    "Lark": {"grammar": 'start: "a" B+ "c"\nB: /[xyz]/'},
    "recursive": {"json_schema": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
}


def follows(kind, text):
    """Whether a whole text is in the language."""
    if kind == "regex":
        return re.fullmatch(" ?[A-Z][a-z]{1,8}( é🙂)?\\.", text)
    if kind == "choice":
        return text in GRAMMARS[kind]["choice"]
    if kind == "Lark":
        return re.fullmatch("a[xyz]+c", text)
    source = GRAMMARS[kind]["json_schema"]
    jsonschema.validate(json.loads(text), json.loads(source) if isinstance(source, str) else source)
    return True


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("name", ["llama-two-layers", "mistral-two-layers"])
def test_a_finished_text_is_one_of_its_grammar(make_engine, Params, name, kind):
    """Of random weights, greedy and at temperature 2, as a text of its own and after a prompt; with its last character."""
    engine = make_engine(name, dtype="float32", num_blocks=400, max_model_len=256, max_num_seqs=24)
    params = [Params(max_tokens=150, temperature=2.0 * (seed > 0), seed=seed, new_text=bool(seed % 2), **GRAMMARS[kind]) for seed in range(14)]
    # Of whole characters: after half a one, what a byte is depends on the prompt.
    outputs = engine.generate(["The queue", "é", "A request waits, "] * 4 + ["1", "."], params)
    for output in outputs:
        if kind == "recursive" and output.finish_reason == "length":
            assert output.text.startswith("[[")
            continue
        assert output.finish_reason == "stop" and follows(kind, output.text), output.text
        assert (output.stop_reason == EOS) == (output.token_ids[-1] == EOS) and output.stop_reason in (None, EOS)
    assert len({output.text for output in outputs}) > 2


def test_a_text_ends_where_the_model_ends_it_or_nothing_may_follow(new_engine, Params, ids):
    """EOS exactly where the text is whole; where more may follow, the model decides."""
    engine, prompt = new_engine(), ids(4)
    for bias, regex, text, ended_by in (
        (100, "ab?c*", "a", EOS),
        (-100, "ab", "ab", None),
        (100, "a{3}b{2,5}", "aaabb", EOS),
        (100, "(é|日){2}x*", None, EOS),
    ):
        [output] = engine.generate([prompt], Params(regex=regex, logit_bias={EOS: bias}, max_tokens=40))
        assert (output.finish_reason, output.stop_reason) == ("stop", ended_by) and re.fullmatch(regex, output.text)
        assert text in (None, output.text)
    [output] = engine.generate([prompt], Params(regex="a*", logit_bias={EOS: -100}, max_tokens=7))
    assert output.finish_reason == "length" and set(output.text) == {"a"}


def test_json_objects_of_the_bundled_model(pocket, Params):
    """Whole objects, or the beginning of one."""
    texts = pocket.generate(["An object:"] * 4, [Params(json_object=True, max_tokens=80, temperature=2.0 * (seed > 0), seed=seed) for seed in range(4)])
    for output in texts:
        if output.finish_reason == "stop":
            assert isinstance(json.loads(output.text), dict)
        else:
            assert output.text.startswith("{") and output.finish_reason == "length"
        assert not re.search("[ \n\t]{2}", re.sub('"([^"\\\\]|\\\\.)*"?', "", output.text))


def test_a_text_that_is_cut_is_the_beginning_of_the_whole(make_engine, Params, ids):
    """Never repaired, and its reason is length; only its last token decides that."""
    engine = make_engine("llama-two-layers", dtype="float32", num_blocks=400, max_model_len=256, max_num_seqs=24)
    prompt = ids(5)
    [whole] = engine.generate([prompt], Params(json_schema=SCHEMA, max_tokens=150, temperature=1.4, seed=3))
    assert whole.finish_reason == "stop" and whole.stop_reason is None
    for count in (1, 2, 7, len(whole.token_ids) - 1, len(whole.token_ids)):
        [cut] = engine.generate([prompt], Params(json_schema=SCHEMA, max_tokens=count, temperature=1.4, seed=3))
        assert cut.token_ids == whole.token_ids[:count]
        assert cut.finish_reason == ("stop" if count == len(whole.token_ids) else "length")
        assert whole.text.startswith(cut.text.rstrip("\ufffd"))


def test_a_stop_string_inside_a_json_string_ends_the_text_before_it(make_engine, Params, ids):
    engine = make_engine("llama-two-layers", dtype="float32", num_blocks=400, max_model_len=256, max_num_seqs=24)
    prompt, schema = ids(5), {"type": "string", "minLength": 30, "pattern": "^[a-z ]*$"}
    [whole] = engine.generate([prompt], Params(json_schema=schema, max_tokens=60, temperature=1.0, seed=2))
    stop = whole.text[9:12]
    [cut] = engine.generate([prompt], Params(json_schema=schema, max_tokens=60, temperature=1.0, seed=2, stop=(stop,)))
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop) and cut.text == whole.text[: whole.text.index(stop)]
    # The one that closes the string, too, although nothing may follow it.
    whole, cut = (engine.generate([prompt], Params(choice=("ab", "ac"), max_tokens=9, **stop))[0] for stop in ({}, {"stop": ("b", "c")}))
    assert whole.text in ("ab", "ac") and cut.text == "a" and cut.finish_reason == "stop" and cut.stop_reason in ("b", "c")


def test_a_masked_request_leaves_those_beside_it_alone(new_engine, Params, ids):
    """Two grammars and two requests without one in each step, in every order: logprobs too."""
    engine = new_engine()
    prompts = [ids(6) for _ in range(4)]
    params = [Params(max_tokens=12, logprobs=4, ignore_eos=True), Params(max_tokens=12, regex="[a-f]{20}", logprobs=4)]
    params += [
        Params(max_tokens=12, logprobs=4, ignore_eos=True, temperature=1.0, seed=1),
        Params(max_tokens=12, regex="[u-z]{20}", logprobs=4, temperature=1.0, seed=1),
    ]
    want = alone(new_engine, "llama-two-layers", prompts, params)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        got = engine.generate([prompts[i] for i in order], [params[i] for i in order])
        assert_same(got, [want[i] for i in order])
    assert re.fullmatch("[a-f]+", want[1].text) and re.fullmatch("[u-z]+", want[3].text)
    # Both grammars have states of the same numbers, and their masks are kept side by side.
    assert engine.generate([prompts[1]], Params(regex="[0-9]{3}", max_tokens=9))[0].text.isdigit()


def test_a_grammar_that_this_vocabulary_cannot_spell_fails_its_request_alone(new_engine, Params, ids):
    engine = new_engine()
    engine.grammars.__dict__["spellings"] = [b"" if b"Q" in raw else raw for raw in engine.grammars.spellings]
    prompts = [ids(5) for _ in range(3)]
    params = [Params(max_tokens=8, ignore_eos=True), Params(regex="a{2}Q|a{2}Qb", max_tokens=8), Params(regex="a{2}b", max_tokens=8)]
    free, stuck, other = engine.generate(prompts, params)
    assert stuck.finish_reason == "error" and stuck.text == "aa"
    assert free.finish_reason == "length" and len(free.token_ids) == 8 and other.text == "aab"
    assert free == new_engine().generate(prompts[:1], params[0])[0] or free.token_ids == new_engine().generate(prompts[:1], params[0])[0].token_ids


def test_a_grammar_that_ends_nowhere_takes_nobodys_prefix(new_engine, Params, ids):
    """The keys and values of its request are sound, and its beginning may be everybody's."""
    engine = new_engine()
    shared = ids(4 * engine.pool.block_size)
    engine.grammars.__dict__["spellings"] = [b"" if b"Q" in raw else raw for raw in engine.grammars.spellings]
    engine.generate([shared + ids(1)], Params(max_tokens=1))
    [stuck] = engine.generate([shared + ids(2)], Params(regex="a{2}Q|a{2}Qb", max_tokens=8))
    [after] = engine.generate([shared + ids(3)], Params(max_tokens=1))
    assert stuck.finish_reason == "error" and stuck.num_cached == after.num_cached == len(shared)


# ---- grammars are compiled once


@pytest.fixture
def new_grammars(module, pocket):
    def new_grammars(backend="auto", record=lambda compilation: None):
        return module("grammars").Grammars(pocket.tokenizer, 2048, (EOS,), backend, record)

    return new_grammars


def test_a_grammar_is_compiled_once_and_so_is_a_refusal(module, new_grammars, RequestError):
    recorded = []
    grammars = new_grammars(record=recorded.append)
    first = grammars.get(("regex", "a+b"))
    assert grammars.get(("regex", "a+b")) is first and grammars.get(("choice", ("a+b",))) is not first
    for _ in range(3):
        with pytest.raises(RequestError, match="this \\( is not closed"):
            grammars.get(("regex", "("))
    grammars.get(("grammar", 'start: "a"'))
    assert [each.backend for each in recorded] == ["own", "own", "none", "llguidance"] and all(0 <= each.seconds < 5 for each in recorded)
    numbers = {grammars.get(("regex", pattern)).number for pattern in ("a", "b", "c")}
    assert len(numbers) == 3


def test_a_schema_is_written_once_for_all_answers_of_a_call(module, new_engine, Params, ids, monkeypatch):
    """It takes a millisecond if it is large, and the engine asks for it several times. Only once does it cross to its process."""
    written, params, json_text = [], module("params"), module("params").json_text
    monkeypatch.setattr(params, "json_text", lambda schema: (written.append(schema), json_text(schema))[1])
    one = Params(json_schema={"type": "null", "description": "x" * 10_000}, seed=3)
    requests = params.choices(one, 5)
    assert len({each.seed for each in requests}) == 5 and requests[0] == one and one.seed == 3
    crossed = pickle.dumps(requests)
    assert len(crossed) < 30_000
    engine = new_engine()
    for each in pickle.loads(crossed):
        engine.compile_grammars([each], lambda: None, lambda: True)
        engine.add_request(ids(4), each)
    assert len(written) == 1


def test_a_schema_is_written_once_for_all_prompts_of_a_call(chapter, module, new_engine, monkeypatch):
    params = module("params")
    written, json_text = [], params.json_text
    monkeypatch.setattr(params, "json_text", lambda schema, *param: (written.append(schema), json_text(schema, *param))[1])
    with serving(chapter, new_engine(), log_format="none") as server:
        body = {"model": "pocket", "prompt": [[20] * count for count in (3, 5, 40)], "n": 2, "json_schema": {"type": "null"}}
        answer = HTTP.post(f"{server.url}/v1/completions", json=body | {"max_tokens": 4})
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 6
    assert len(written) == 1
    one = params.SamplingParams(max_tokens=3, seed=5)
    other = params.with_length(one, 7)
    assert (one.max_tokens, other.max_tokens, other.seed) == (3, 7, 5)


def test_an_interrupt_while_a_grammar_is_compiled_stays_one(module, new_grammars, monkeypatch):
    """And the grammar can be compiled at once again."""
    grammars = new_grammars()

    def interrupted(kind, source):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module("grammars"), "compile_here", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grammars.get(("regex", "a+"))
    assert grammars.get(("regex", "a+")).nbytes


def test_schemas_with_members_in_another_order_are_others(pocket, Params):
    one, other = (
        {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": ["a", "b"], "additionalProperties": False}
        for names in ("ab", "ba")
    )
    texts = [pocket.generate([""], Params(json_schema=schema, max_tokens=60))[0].text for schema in (one, other, one)]
    assert texts == ['{"a": 1, "b": 1}', '{"b": 1, "a": 1}', '{"a": 1, "b": 1}']


def test_kept_grammars_are_bounded_and_those_in_use_stay_usable(module, new_grammars, monkeypatch):
    grammars = new_grammars()
    assert (module("grammars").MOST_GRAMMARS, module("grammars").MOST_BYTES) == (256, 64 * 2**20)
    monkeypatch.setattr(module("grammars"), "MOST_GRAMMARS", 3)
    matcher = grammars.get(("regex", "ab")).start(False)
    for pattern in ("b", "c", "d", "b", "e"):
        grammars.get(("regex", pattern))
        assert len(grammars.kept) <= 3
    assert [source for _, source in grammars.kept] == ["d", "b", "e"]
    assert matcher.advance(pocket_id(grammars, "a")) and not matcher.advance(pocket_id(grammars, "b"))
    monkeypatch.setattr(module("grammars"), "MOST_GRAMMARS", 256)
    monkeypatch.setattr(module("grammars"), "MOST_BYTES", 20_000)
    for size in (300, 310, 320):
        grammars.get(("regex", f"[a-z]{{{size}}}"))
        assert sum(future.result().nbytes for future in grammars.kept.values()) <= 20_000
    assert ("regex", "[a-z]{320}") in grammars.kept


def pocket_id(grammars, text):
    return grammars.tokenizer(text, add_special_tokens=False).input_ids[0]


def test_calls_that_need_the_same_grammar_wait_for_one_compilation(module, new_grammars, monkeypatch):
    """Each is told once, when all of its own are ready; one with nothing to wait for is not told at all."""
    gates, started, told = {"a": threading.Event(), "b": threading.Event()}, [], queue.SimpleQueue()
    compile_here = module("compiler").compile_here

    def slowly(kind, source):
        started.append(source)
        assert gates[source].wait(20)
        return compile_here(kind, source)

    monkeypatch.setattr(module("grammars"), "compile_apart", slowly)
    grammars = new_grammars()
    a, b = ("regex", "a"), ("regex", "b")
    assert not grammars.prepare([a, a], lambda: told.put(1))
    assert not grammars.prepare([b, a], lambda: told.put(2))
    assert grammars.prepare([], lambda: told.put(3))
    wait_until(lambda: sorted(started) == ["a", "b"])
    gates["a"].set()
    assert told.get(timeout=20) == 1 and told.empty()
    assert grammars.prepare([a], lambda: told.put(4))
    gates["b"].set()
    assert told.get(timeout=20) == 2 and told.empty() and len(started) == 2


# ---- what is refused

REFUSED = (
    ({"min_tokens": -1}, "min_tokens", "min_tokens must be an integer from 0 up"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens must be at most max_tokens = 8, got 9"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "frequency_penalty must be a number from -2 to 2, got 2.1"),
    ({"presence_penalty": "1"}, "presence_penalty", "presence_penalty must be a number from -2 to 2, got '1'"),
    ({"presence_penalty": float("nan")}, "presence_penalty", "must be a number from -2 to 2, got nan"),
    ({"min_p": 1.01}, "min_p", "min_p must be a number from 0 to 1, got 1.01"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty must be a number from 0.01 to 100, 1 being off, got 0"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty", "from 0.01 to 100"),
    ({"logit_bias": [1]}, "logit_bias", "logit_bias must be a mapping of token ids to numbers, got [1]"),
    ({"logit_bias": {-1: 2}}, "logit_bias", "each token id of logit_bias must be an integer from 0 up, got -1"),
    ({"logit_bias": {"5": 2}}, "logit_bias", "each token id of logit_bias must be an integer"),
    ({"logit_bias": {5: 101}}, "logit_bias", "logit_bias of token 5 must be a number from -100 to 100, got 101"),
    ({"bad_words": "the"}, "bad_words", "bad_words must be a tuple of non-empty strings, got 'the'"),
    ({"bad_words": ("a", "")}, "bad_words", "bad_words must be a tuple of non-empty strings"),
    ({"bad_words": ("a", "\ud800")}, "bad_words", "bad_words hold half a surrogate pair, which is no character; remove it"),
    ({"bad_words": ("a",) * 129}, "bad_words", "bad_words has 129 words, but at most 128 are allowed; leave some out"),
    ({"bad_words": ("é" * 2_500,) * 2 + ("b",)}, "bad_words", "bad_words has 10001 bytes, but at most 10000 are allowed; shorten it"),
    ({"json_object": 1}, "json_object", "json_object must be True or False, got 1"),
    ({"regex": "a", "choice": ("b",)}, "choice", "regex and choice are both given, but a text follows only one grammar; leave one out"),
    ({"json_object": True, "grammar": "x"}, "grammar", "json_object and grammar are both given"),
    ({"regex": 5}, "regex", "regex must be a string or None, got 5"),
    ({"grammar": b"x"}, "grammar", "grammar must be a string or None"),
    ({"regex": False}, "regex", "regex must be a string or None, got False"),
    ({"grammar": 0}, "grammar", "grammar must be a string or None, got 0"),
    ({"choice": False}, "choice", "choice must be a tuple of at least one string, got False"),
    ({"json_schema": False}, "json_schema", "json_schema must be a dict or a string of JSON, got False"),
    ({"choice": "abc"}, "choice", "choice must be a tuple of at least one string, got 'abc'"),
    ({"choice": ()}, "choice", "choice must be a tuple of at least one string, got ()"),
    ({"choice": ("a", 1)}, "choice", "choice must be a tuple of at least one string"),
    ({"json_schema": True}, "json_schema", "json_schema must be a dict or a string of JSON, got True"),
    ({"json_schema": "{"}, "json_schema", "json_schema is not valid JSON"),
    ({"json_schema": {"minimum": float("nan")}}, "json_schema", "json_schema is not valid JSON"),
    ({"json_schema": {"enum": [{1, 2}]}}, "json_schema", "json_schema is not valid JSON"),
    ({"regex": "\ud800"}, "regex", "regex holds half a surrogate pair, which is no character; remove it"),
    ({"regex": "a" * 100_001}, "regex", "regex has 100001 bytes, but at most 100000 are allowed; shorten it"),
    ({"choice": ("é" * 25_000,) * 2 + ("b",)}, "choice", "choice has 100001 bytes"),
    ({"regex": "a", "min_tokens": 1}, "min_tokens", "min_tokens cannot be combined with regex, which decides"),
    ({"json_object": True, "bad_words": ("a",)}, "bad_words", "bad_words cannot be combined with json_object"),
    ({"choice": ("a",), "ignore_eos": True}, "ignore_eos", "ignore_eos cannot be combined with choice"),
)


@pytest.mark.parametrize(("options", "param", "said"), REFUSED, ids=[f"{param}-{number}" for number, (_, param, _) in enumerate(REFUSED)])
def test_parameters_are_refused_by_name_and_range(Params, RequestError, options, param, said):
    with pytest.raises(RequestError) as caught:
        Params(**options)
    assert said in str(caught.value) and caught.value.param == param


def test_the_largest_and_the_inert_are_accepted(pocket, Params):
    Params(regex="a" * 100_000), Params(choice=("é" * 50_000,)), Params(bad_words=("a",) * 128), Params(bad_words=("é" * 5_000,))
    Params(regex="a", bad_words=[], min_tokens=0, logit_bias={}), Params(logit_bias={2047: -100}, frequency_penalty=-2, min_p=1, repetition_penalty=0.01)
    inert = Params(logit_bias={}, bad_words=(), repetition_penalty=1, frequency_penalty=0)
    assert not inert.adjusts_logits and inert.constraint is None
    assert pocket.generate(["The"], inert)[0].token_ids == pocket.generate(["The"], Params())[0].token_ids


def test_what_only_the_engine_can_know_is_refused_there(make_engine, new_grammars, Params, RequestError, chapter):
    engine = make_engine("pocket", max_num_seqs=16, max_model_len=256)
    with pytest.raises(RequestError, match="each token id of logit_bias must be below .*2048|each token id of logit_bias must be") as caught:
        engine.generate(["a"], Params(logit_bias={2048: 1}))
    assert caught.value.param == "logit_bias" and not engine.has_unfinished_requests()
    for options, param, said in (
        ({"regex": "("}, "regex", "this ( is not closed at character 0"),
        ({"regex": "a^"}, "regex", "regex matches no text, or only the empty one"),
        ({"grammar": "start: (("}, "grammar", "grammar is refused: "),
        ({"json_schema": {"foo": 1}}, "json_schema", "the keyword 'foo' is not supported"),
        ({"json_schema": {"type": "object", "propertyNames": {"type": "null"}}}, "json_schema", "By llguidance: "),
        (
            {"json_schema": {"type": "array", "items": {"minimum": 2**53 + 1}}},
            "json_schema",
            "minimum has a number beyond 9007199254740992, which is not supported here",
        ),
        (
            {"json_schema": {"type": "array", "items": {"$ref": "#"}, "description": "x", "prefixItems": [{"type": "string", "format": "iri"}]}},
            "json_schema",
            "the format 'iri' is not supported; date, ",
        ),
        ({"json_schema": {"items": {"format": "date", "pattern": "a"}}}, "json_schema", "format beside pattern is not supported"),
    ):
        with pytest.raises(RequestError) as caught:
            engine.generate(["a"], Params(**options))
        assert said in str(caught.value) and caught.value.param == param, options
    own = new_grammars("own")
    for constraint in (("json_object", ""), ("grammar", 'start: "a"')):
        with pytest.raises(RequestError, match=f"{constraint[0]}: no automaton can follow it, because it may nest to any depth"):
            own.get(constraint)
    with pytest.raises(ValueError, match="grammar_backend must be one of auto, own, llguidance, got 'outlines'"):
        new_grammars("outlines")


def test_names_in_pattern_properties_are_patterns_as_any_other(new_grammars, RequestError):
    """Written character by character for the library, which has other ideas of white space and line ends."""
    grammars = new_grammars()
    for name, valid, invalid in (
        ("^\\S$", ["b", "é"], ["\x1c", "\ufeff", " ", "bb"]),
        ("^.$", ["b", "\x01", '"'], ["\u2028", "\n"]),
        ("b|^c$", ["abc", "c"], ["cc", "a"]),
    ):
        grammar = grammars.get(("json_schema", json.dumps({"patternProperties": {name: {"const": 1}}, "type": "object", "additionalProperties": False})))
        for each in valid + invalid:
            text = json.dumps({each: 1}, ensure_ascii=False)
            assert json_suite.can_generate(grammar, grammars.tokenizer, text) == (each in valid), (name, each)
            assert not json_suite.can_generate(grammar, grammars.tokenizer, text.replace("1}", "2}"))
    inner = {"type": "object", "properties": {"x": {"patternProperties": {"a": {"patternProperties": {"(": {}}}}}}}
    for schema, said in (
        ({"patternProperties": {"(?i)^a$": {}}}, "look-around, flags and conditions are not supported: (? at character 0 of '(?i)^a$'"),
        ({"patternProperties": {"a": {}, "[a]": {"type": "null"}}}, "the schema: two names in patternProperties are the same pattern; leave one out"),
        (inner, "this ( is not closed at character 0 of '('"),
        ({"patternProperties": {"a": {"minProperties": 2}}}, "/patternProperties/a: minProperties above 1"),
    ):
        with pytest.raises(RequestError) as caught:
            grammars.get(("json_schema", json.dumps(schema)))
        assert said in str(caught.value) and caught.value.param == "json_schema"


@pytest.mark.parametrize("others", [True, False])
def test_hundreds_of_optional_properties_are_followed_to_the_end(new_grammars, RequestError, others):
    """The library's own limit would end the text in the middle of a name."""
    grammars = new_grammars("llguidance")

    def schema(count):
        names = {f"p{i}": {"type": "integer"} for i in range(count)}
        return "json_schema", json.dumps({"type": "object", "properties": {"in": {"type": "object", "properties": names, "additionalProperties": others}}})

    grammar = grammars.get(schema(2000))
    text = '{"in": {"p1": 2, "p20": 3, "p1999": 4}}'
    assert json_suite.can_generate(grammar, grammars.tokenizer, text)
    assert not json_suite.can_generate(grammar, grammars.tokenizer, text.replace("4", '"4"'))
    with pytest.raises(RequestError, match="/properties/in: properties has 2001 entries, but at most 2000 are supported; make some"):
        grammars.get(schema(2001))


@pytest.mark.parametrize("schema", ["true", "{}"])
def test_any_json_has_one_spelling(new_grammars, schema):
    grammars = new_grammars()
    grammar = grammars.get(("json_schema", schema))
    for text, is_spelling in (('[1, {"a": 2}]', True), ("[1,2]", False), ("[1,  2]", False), ('{"a":1}', False), ("[\n1]", False)):
        assert json_suite.can_generate(grammar, grammars.tokenizer, text) == is_spelling, text


def test_without_the_library_only_what_needs_it_is_refused(module, new_grammars, monkeypatch, RequestError):
    for name in [name for name in sys.modules if name.split(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    grammars = new_grammars()
    assert grammars.get(("regex", "a+")).nbytes
    with pytest.raises(RequestError, match="no automaton can follow it.*pip install llguidance") as caught:
        grammars.get(("json_object", ""))
    assert caught.value.param == "json_object"
    with pytest.raises(ValueError, match="this needs the package llguidance, which is not installed; pip install llguidance"):
        new_grammars("llguidance")


# ---- the engine loop, and a process that compiles


def test_a_call_waits_for_its_grammar_and_nobody_waits_for_it(module, new_engine, Params, ids, monkeypatch):
    """It is added when its grammar is ready; aborted meanwhile, it never is; a refused one is refused then."""
    loop, gate = module("engine_loop"), threading.Event()
    compile_here = module("compiler").compile_here
    monkeypatch.setattr(module("grammars"), "compile_apart", lambda kind, source: (gate.wait(20), compile_here(kind, source))[1])
    engine, inbox, sent = new_engine(), queue.SimpleQueue(), []
    engine_loop = loop.EngineLoop(engine, inbox, lambda message, stats: sent.append((type(message).__name__, message[0])))
    inbox.put(loop.Add(1, [(ids(4), Params(regex="ab"))] * 2, None))
    inbox.put(loop.Add(2, [(ids(4), Params(max_tokens=2, ignore_eos=True))], None))
    inbox.put(loop.Add(3, [(ids(4), Params(regex="ab"))], None))
    inbox.put(loop.Add(4, [(ids(4), Params(regex="(", max_tokens=3))], None))
    inbox.put(loop.Abort(3))
    assert engine_loop.read_messages()
    assert sent == [("Added", 2), ("Failed", [3]), ("Aborted", 3)] and sorted(engine_loop.compiling) == [1, 4]
    engine_loop.step(), engine_loop.step()
    assert not engine.has_unfinished_requests()
    gate.set()
    while engine_loop.compiling:
        assert engine_loop.read_messages()
    assert ("Added", 1) in sent and ("Refused", 4) in sent and ("Added", 3) not in sent and not engine_loop.compiling
    assert len(engine.seqs) == 2
    inbox.put(loop.Add(5, [(ids(4), Params(regex="ab"))], None))
    engine_loop.read_messages()
    assert ("Added", 5) in sent
    engine.close()


class Panic(BaseException):
    """What a library that is not Python's may raise."""


def test_a_compilation_that_fails_at_this_moment_is_answered_and_tried_again(module, new_engine, Params, RequestError, ids, monkeypatch):
    """No thread can be started; the library panics; the machine is too busy. Whoever waits is told, and the next one is not refused for it."""
    loop, engine, inbox, sent = module("engine_loop"), new_engine(), queue.SimpleQueue(), []
    engine_loop = loop.EngineLoop(engine, inbox, lambda message, stats: sent.append(message))
    grammars, compile_here = engine.grammars, module("compiler").compile_here
    monkeypatch.setattr(module("grammars"), "compile_apart", compile_here)
    monkeypatch.setattr(module("grammars"), "RETRY_S", 0.3)

    def call(**grammar):
        sent.clear()
        inbox.put(loop.Add(1, [(ids(4), Params(**grammar))], None))
        while not sent:
            assert engine_loop.read_messages()
        return sent[0]

    def busy(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(grammars.compilers, "submit", busy)
        assert isinstance(call(regex="a+"), loop.Failed) and "can't start new thread" in sent[0].reason
    time.sleep(0.4)
    assert isinstance(call(regex="a+"), loop.Added)

    def panic(*_):
        raise Panic

    with monkeypatch.context() as patched:
        patched.setattr(module("guidance").Guidance, "compile", panic)
        assert isinstance(call(grammar='start: "a"'), loop.Failed) and "Panic" in sent[0].reason
    time.sleep(0.4)
    assert isinstance(call(grammar='start: "a"'), loop.Added)

    def slow(kind, source):
        raise module("compiler").NotNow("regex takes too long", "regex")

    with monkeypatch.context() as patched:
        patched.setattr(module("grammars"), "compile_apart", slow)
        assert isinstance(call(regex="b+"), loop.Refused) and sent[0].param == "regex"
    time.sleep(0.4)
    assert isinstance(call(regex="b+"), loop.Added)
    # An engine that was closed can be used again, as before.
    engine.close()
    assert isinstance(call(regex="c+"), loop.Added)
    engine.close()
    assert engine.generate([ids(4)], Params(regex="dd"))[0].text == "dd"


def test_a_grammar_that_exceeds_the_limits_is_compiled_once_for_all_who_wait_for_it(module, new_engine, Params, ids, monkeypatch):
    loop, engine, inbox, sent, compiled = module("engine_loop"), new_engine(), queue.SimpleQueue(), [], []
    engine_loop = loop.EngineLoop(engine, inbox, lambda message, stats: sent.append(message))

    def slow(kind, source):
        compiled.append(source)
        time.sleep(0.2)
        raise module("compiler").NotNow("regex takes too long", "regex")

    monkeypatch.setattr(module("grammars"), "compile_apart", slow)
    for call_id in range(1, 6):
        inbox.put(loop.Add(call_id, [(ids(4), Params(regex="a+"))], None))
    while len(sent) < 5:
        assert engine_loop.read_messages()
    assert {type(message) for message in sent} == {loop.Refused} and compiled == ["a+"]
    engine.close()


def test_a_grammar_that_exceeded_the_limits_is_never_compiled_without_them(module, new_engine, Params, RequestError, ids, monkeypatch):
    """Also if it expires just after the engine loop has asked for it: in the engine's thread nothing would end it."""
    engine, told = new_engine(), threading.Event()
    constraint = Params(regex="a+").constraint

    def slow(kind, source):
        raise module("compiler").NotNow("regex takes too long", "regex")

    monkeypatch.setattr(module("grammars"), "compile_apart", slow)
    assert not engine.compile_grammars([Params(regex="a+")], told.set, lambda: True) and told.wait(20)
    assert engine.compile_grammars([Params(regex="a+")], told.set, lambda: True)
    engine.grammars.kept[constraint].until = 0.0
    for _ in range(2):
        with pytest.raises(RequestError, match="regex takes too long"):
            engine.add_request(ids(4), Params(regex="a+"))
    monkeypatch.setattr(module("grammars"), "compile_apart", module("compiler").compile_here)
    told.clear()
    assert not engine.compile_grammars([Params(regex="a+")], told.set, lambda: True) and told.wait(20)
    engine.add_request(ids(4), Params(regex="a+"))
    engine.close()


def test_a_refusal_is_kept_until_the_step_is_over_whose_end_its_call_waits_for(module, new_engine, Params, ids, monkeypatch):
    """A call asks again only after the step; if its refusal were forgotten by then, it would be compiled again, in each long step."""
    loop, engine, inbox, sent, compiled = module("engine_loop"), new_engine(), queue.SimpleQueue(), [], []

    def slow(kind, source):
        compiled.append(source)
        raise module("compiler").NotNow("regex takes too long", "regex")

    monkeypatch.setattr(module("grammars"), "compile_apart", slow)
    monkeypatch.setattr(module("grammars"), "RETRY_S", 0.01)
    engine_loop = loop.EngineLoop(engine, inbox, lambda message, stats: sent.append(message))
    for number in (1, 2):
        inbox.put(loop.Add(number, [(ids(4), Params(regex="a+"))], None))
        assert engine_loop.read_messages() and not sent
        time.sleep(0.3)  # a step
        assert engine_loop.read_messages()
        assert isinstance(sent.pop(), loop.Refused) and len(compiled) == number
        # From now on, others may try it again.
        time.sleep(0.1)
    engine.close()


def test_tokens_for_which_the_model_has_no_logits_are_never_allowed(chapter, tmp_path, Params):
    """Tokens were added for a fine-tuning, and the embedding was left as it is: the library refused such a tokenizer."""
    write_checkpoint(replace(RANDOM["llama"], num_layers=1, vocab_size=365), tmp_path)
    engine = chapter.load().Engine(tmp_path)
    assert len(engine.tokenizer) > 365
    for grammar in ({"json_object": True}, {"grammar": "start: /[^x]*/"}, {"regex": "[^x]{5,9}"}):
        params = Params(max_tokens=6, temperature=1.0, **grammar)
        mask = engine.grammars.get(params.constraint).start(False).mask()
        assert len(mask) == 46 and mask.any() and not mask[-1] >> 5, grammar
        [output] = engine.generate([[3, 4, 5]], params)
        assert output.token_ids and output.finish_reason in ("stop", "length")


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(module, new_engine, Params, ids, monkeypatch):
    loop, engine, inbox, sent, compiled, gate = module("engine_loop"), new_engine(), queue.SimpleQueue(), [], [], threading.Event()
    engine_loop = loop.EngineLoop(engine, inbox, lambda message, stats: sent.append(message))

    def wait(kind, source):
        compiled.append(source)
        gate.wait(20)
        return module("compiler").compile_here(kind, source)

    monkeypatch.setattr(module("grammars"), "compile_apart", wait)
    for call_id, regex in enumerate(("a", "b", "c", "d")):
        inbox.put(loop.Add(call_id, [(ids(4), Params(regex=regex))], None))
    for call_id in (2, 3):
        inbox.put(loop.Abort(call_id))
    while len(sent) < 4:  # each abort is answered twice: the call has failed, and nothing of it is left
        assert engine_loop.read_messages()
    gate.set()
    while len(sent) < 6:
        assert engine_loop.read_messages()
    inbox.put(loop.Add(9, [(ids(4), Params(regex="d"))], None))
    while len(sent) < 7:
        assert engine_loop.read_messages()
    assert isinstance(sent[-1], loop.Added) and sorted(compiled) == ["a", "b", "d"]
    engine.close()


def test_calls_that_asked_for_a_grammar_are_forgotten_when_it_is_compiled(module, new_engine, Params):
    """However many use it later: it is kept as long as it is used."""
    engine, told, params = new_engine(), threading.Event(), [Params(regex="[0-9]+")]
    assert not engine.compile_grammars(params, told.set, lambda: True) and told.wait(20)
    assert all(engine.compile_grammars(params, told.set, lambda: True) for _ in range(100))
    future = engine.grammars.kept[params[0].constraint]
    wait_until(lambda: not future.wanted)
    engine.close()


def test_a_flood_of_new_grammars_is_refused_with_try_again_later(module, new_engine, Params, RequestError, ids, monkeypatch):
    engine, gate = new_engine(), threading.Event()
    limit = module("grammars").MOST_PENDING
    monkeypatch.setattr(module("grammars"), "compile_apart", lambda kind, source: gate.wait(20) and module("compiler").compile_here(kind, source))
    prepared = [engine.compile_grammars([Params(regex=f"a{number}")], lambda: None, lambda: True) for number in range(limit)]
    assert not any(prepared)
    # It is refused at once: a call that had to ask again would be refused again, and again.
    assert engine.compile_grammars([Params(regex="b")], lambda: pytest.fail("it asks again"), lambda: True)
    with pytest.raises(RequestError, match=f"would wait for {limit} other grammars.*try again later") as caught:
        engine.add_request(ids(4), Params(regex="b"))
    assert caught.value.code == "queue_full"
    # Those that are refused are not kept without end, although nothing is compiled meanwhile.
    monkeypatch.setattr(module("grammars"), "MOST_GRAMMARS", 5)
    assert all(engine.compile_grammars([Params(regex=f"c{number}")], lambda: None, lambda: True) for number in range(20))
    assert len(engine.grammars.kept) <= limit + 1 + 5
    gate.set()
    # Retry-After is shorter than the time for which other failures are kept.
    told = threading.Event()
    wait_until(lambda: all(future.done() for future in engine.grammars.kept.values()))
    assert not engine.compile_grammars([Params(regex="b")], told.set, lambda: True) and told.wait(20)
    assert engine.compile_grammars([Params(regex="b")], told.set, lambda: True)
    engine.add_request(ids(4), Params(regex="b"))
    engine.close()


def test_a_schema_is_read_once_and_a_long_one_not_at_all(module, monkeypatch):
    """On the event loop, four megabytes of it would take half a minute."""
    protocol, calls = module("protocol"), []
    close = protocol.close
    monkeypatch.setattr(protocol, "close", lambda schema: calls.append(1) or close(schema))
    body = protocol.CompletionRequest(model="pocket", prompt="a", json_schema={"type": "object"})
    assert body.grammars == body.grammars and body.grammar_param == "json_schema" and body.shape() and len(calls) == 1
    for given in ({"json_schema": {"enum": ["a"] * 40_000}}, {"structured_outputs": {"json": json.dumps({"enum": ["a"] * 40_000})}}):
        with pytest.raises(module("errors").ApiError, match="at most 100000 bytes"):
            protocol.CompletionRequest(model="pocket", prompt="a", **given)
    assert len(calls) == 1


def test_a_process_that_compiles_ends_with_its_parent(module):
    name = module("compiler").__name__
    code = f"import os, subprocess, sys, pickle; from {name} import *; compile_apart('regex', '(.*a){{60}}.{{600}}zz')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    children = []
    while not children and parent.poll() is None:
        time.sleep(0.05)
        children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert children
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def child(module, limits, constraint):
    """How the process that compiles ends under other limits."""
    name = module("compiler").__name__
    memory = "int(open('/proc/self/statm').read().split()[0]) * 4096"
    code = (
        f"from {name} import *; import {name} as compiler; memory = {memory}; "
        + "".join(f"compiler.{key} = {value}; " for key, value in limits.items())
        + "main()"
    )
    return subprocess.run([sys.executable, "-c", code], input=pickle.dumps((os.getpid(), *constraint)), capture_output=True, timeout=60, check=False).returncode


def test_a_process_that_compiles_is_limited_and_says_what_it_makes(module, RequestError, monkeypatch):
    compiler = module("compiler")
    assert (compiler.MOST_SECONDS, compiler.MOST_MEMORY) == (10, 4 * 2**30)
    for constraint in (("regex", "a(b|é)*"), ("json_schema", json.dumps(SCHEMA))):
        apart, here = compiler.compile_apart(*constraint), compiler.compile_here(*constraint)
        assert all(np.array_equal(mine, its) for mine, its in zip(apart, here, strict=True))
    with pytest.raises(RequestError, match="not closed at character 1") as caught:
        compiler.compile_apart("regex", "a(")
    assert caught.value.param == "regex" and type(caught.value) is RequestError
    with pytest.raises(module("json_schema").Unsupported, match="json_schema: the schema: any JSON value is allowed"):
        compiler.compile_apart("json_schema", "{}")
    # A process that dies, and one that takes too long.
    monkeypatch.setattr(compiler, "pickle", Shouting())
    with pytest.raises(RequestError, match="regex could not be compiled: .*; use a simpler one"):
        compiler.compile_apart("regex", "ab")
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "MOST_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(RequestError, match="regex takes more than 0.3 s to compile; use a simpler one") as caught:
        compiler.compile_apart(*LARGE)
    assert time.monotonic() - began < 3 and caught.value.param == "regex"


def test_a_grammar_that_names_a_token_is_read_with_the_models_tokenizer(make_engine, Params, monkeypatch):
    engine = make_engine("pocket")
    for grammar, said in (('start: "a" <[300]>', None), ('start: "a" <|user|>', None), ('start: "a" <|nobody|>', "grammar is refused")):
        told = threading.Event()
        assert not engine.compile_grammars([Params(grammar=grammar)], told.set, lambda: True) and told.wait(30)
        if said is None:
            engine.add_request("Once", Params(grammar=grammar, max_tokens=2))
        else:
            with pytest.raises(ValueError, match=said):
                engine.add_request("Once", Params(grammar=grammar))
    engine.close()


def test_an_error_that_is_raised_again_and_again_keeps_nothing(make_engine, Params, ids):
    """Each raise used to add its frames to the kept error, and with them the prompt."""
    engine, params = make_engine("pocket"), Params(json_schema={"type": "object", "weird": 1})
    for _ in range(5):
        with pytest.raises(ValueError, match="the keyword 'weird' is not supported"):
            engine.add_request(ids(4), params)
    trace, num_frames = engine.grammars.kept[params.constraint].exception().__traceback__, 0
    while trace is not None:
        trace, num_frames = trace.tb_next, num_frames + 1
    assert num_frames < 12


# Nothing ends a thread in which the library reads this.
ENDLESS = "start: X\nX: /(.*a.{100})*/ & ~/(.*c.{50}.*)/"


@pytest.mark.parametrize("beside", ["", " | <[300]>", " | <|user|>"])
def test_a_grammar_without_end_is_tried_in_a_process_first(make_engine, module, Params, monkeypatch, beside):
    """Also if it names a token, which a tokenizer of bytes does not have."""
    engine = make_engine("pocket")
    monkeypatch.setattr(module("compiler"), "MOST_SECONDS", 2 if beside else 0.5)
    told, params = threading.Event(), Params(grammar=ENDLESS.replace("X\n", f"X{beside}\n"), max_tokens=2)
    before = psutil.Process().children()
    assert not engine.compile_grammars([params], told.set, lambda: True) and told.wait(20)
    with pytest.raises(module("compiler").NotNow, match=r"grammar takes more than (0.5|2) s to compile; use a simpler one"):
        engine.add_request("Once", params)
    assert psutil.Process().children() == before
    # What it can read is compiled as before, and what it refuses is refused.
    monkeypatch.undo()
    for source, error in ((f'start: "a" start "b" | "x{beside}"', None), (f"start: missing{beside}", "grammar is refused: .*missing")):
        told.clear()
        params = Params(grammar=source, max_tokens=2)
        assert not engine.compile_grammars([params], told.set, lambda: True) and told.wait(20)
        with pytest.raises(module("params").RequestError, match=error) if error else nullcontext():
            engine.abort_request(engine.add_request("Once", params))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")
@pytest.mark.whole
def test_the_system_ends_a_compilation_that_takes_too_much(module):
    """Processor time, also where its parent is gone, and memory: 20 MB beyond what the process has before."""
    strings = {f"p{i}": {"type": "string", "pattern": "^(a|b)*a(a|b){11}$"} for i in range(20)}
    slow = "json_schema", json.dumps({"type": "object", "properties": strings, "additionalProperties": False})
    assert child(module, {"MOST_SECONDS": 1}, slow) < 0
    limit = {"MOST_MEMORY": "memory + 20 * 2**20"}
    assert child(module, limit, ("regex", "((a{100}){100}){3}")) != 0 and child(module, limit, ("regex", "ab")) == 0


LARGE = ("regex", "(((a{100}){100}){9})")


class Shouting:
    """Writes what no process can read."""

    dumps = staticmethod(lambda value: b"nonsense")
    loads = staticmethod(pickle.loads)


# ---- over HTTP

SLOW = "(a|b)*a(a|b){12}"


def bodies():
    """For each endpoint, a body without a grammar, and how a grammar is asked for in OpenAI's way."""
    shape = {"name": "it", "schema": SCHEMA, "strict": True}
    yield "/v1/completions", {"prompt": "Once", "max_tokens": 150}, {"response_format": {"type": "json_schema", "json_schema": shape}}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, {"response_format": {"type": "json_schema", "json_schema": shape}}
    yield "/v1/responses", {"input": "Hi", "temperature": 0}, {"text": {"format": {"type": "json_schema", **shape}}}


def text_of(answer):
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.fixture(scope="module")
def served(chapter):
    """An engine, and a server of it."""
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=256)
    with serving(chapter, engine, log_format="none") as server:
        yield engine, server


@pytest.fixture
def server(served):
    return served[1]


def ask(server, path, body, **options):
    return post(server, path, {"model": "pocket"} | body, **options)


def test_each_way_to_ask_for_a_grammar_gives_a_text_that_follows_it(server):
    for path, body, asked in bodies():
        for grammar in (asked, {"json_schema": SCHEMA}, {"structured_outputs": {"json": json.dumps(SCHEMA)}})[: 3 if "chat" in path else 1]:
            answer = ask(server, path, body | grammar)
            assert answer.status_code == 200, answer.text
            jsonschema.validate(json.loads(text_of(answer.json())), SCHEMA)
            if path == "/v1/responses":
                assert answer.json()["status"] == "completed"
                assert answer.json()["text"]["format"] == (asked["text"]["format"] if "text" in grammar else {"type": "text"})
            else:
                assert answer.json()["choices"][0]["finish_reason"] == "stop"
        for grammar in ({"choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}, {"regex": "yes|no"}, {"grammar": 'start: "yes" | "no"'}):
            assert text_of(ask(server, path, body | grammar).json()) in ("yes", "no")


def test_a_stream_and_its_usage_count_the_tokens_of_the_text(server, pocket):
    """The last token belongs to the text if nothing may follow it, and does not if it is EOS."""
    body = {"prompt": "Once", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 50, "logprobs": 0}
    for grammar, eos in (({"choice": ["left and right", "up"]}, 0), ({"regex": "(ab){1,3}", "logit_bias": {"1": 100}}, 1)):
        *events, last = events_of(ask(server, "/v1/completions", body | grammar))
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text in ("left and right", "up", "ab") and events[-1]["choices"][0]["finish_reason"] == "stop"
        tokens = sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in events if event["choices"][0].get("logprobs"))
        assert last["usage"]["completion_tokens"] in (tokens, tokens + eos)
        assert len(pocket.tokenizer(text, add_special_tokens=False).input_ids) <= last["usage"]["completion_tokens"]


ERRORS = (
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "if, and only if, its type is json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "a"}}}, "response_format.json_schema", "if, and only if"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "text", "strict": True}}, "response_format.strict", ""),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format.json_schema.name", ""),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"foo": 1}}}}, "response_format", "the keyword 'foo' is not supported"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "this ( is not closed at character 0"),
    ({"structured_outputs": {"json": {"type": "nul"}}}, "structured_outputs.json", "type must be one of"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not valid JSON"),
    ({"structured_outputs": {"json": "false"}}, "structured_outputs.json", "no value is allowed"),
    ({"structured_outputs": {"json": " null"}}, "structured_outputs.json", "must be a JSON Schema, which is an object, true or false, got NoneType"),
    ({"structured_outputs": {"json": "0"}}, "structured_outputs.json", "which is an object, true or false, got int"),
    ({"structured_outputs": {"json": '{"anyOf": [' + "{}, " * 60_000 + "{}]}"}}, "structured_outputs.json", "has 240015 characters, but at most 100000 bytes"),
    ({"json_schema": {"enum": [0] * 60_000}}, "json_schema", "characters, but at most 100000 bytes are allowed; shorten it"),
    ({"structured_outputs": {"grammar": "start: (("}}, "structured_outputs.grammar", "is refused"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "matches no text"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
    ({"structured_outputs": {"whitespace_pattern": " *"}}, "structured_outputs.whitespace_pattern", "not supported"),
    ({"structured_outputs": {"foo": 1}}, "structured_outputs.foo", ""),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "an answer follows only one grammar; leave the others out"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "response_format and regex are given"),
    ({"regex": "["}, "regex", "this [ is not closed"),
    ({"regex": "a", "min_tokens": 2}, "min_tokens", "cannot be combined with regex"),
    ({"json_schema": {"type": "object", "patternProperties": 3}}, "json_schema", "patternProperties must be an object of schemas"),
    ({"choice": ["a"] * 1025}, "choice", ""),
    ({"logit_bias": {"x": 1}}, "logit_bias", "is not a token id; use ids, as POST /tokenize returns them"),
    ({"logit_bias": {"2048": 1}}, "logit_bias", "each token id of logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias", ""),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "has 1025 entries, but at most 1024 are allowed; send fewer"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", ""),
    ({"presence_penalty": -3}, "presence_penalty", ""),
    ({"repetition_penalty": 0}, "repetition_penalty", ""),
    ({"min_p": 1.5}, "min_p", ""),
    ({"min_tokens": -1}, "min_tokens", ""),
    ({"bad_words": [""]}, "bad_words", ""),
    ({"bad_words": ["a"] * 129}, "bad_words", "128"),
    ({"bad_words": ["a" * 10_001]}, "bad_words", "bad_words has 10001 bytes, but at most 10000 are allowed; shorten it"),
    ({"guided_json": {}}, "guided_json", "not supported"),
)


@pytest.mark.parametrize(("body", "param", "said"), ERRORS, ids=[f"{param}-{number}" for number, (_, param, _) in enumerate(ERRORS)])
def test_an_error_names_the_clients_own_parameter(server, body, param, said):
    error = refused(ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3} | body))
    assert error["param"].startswith(param) and said in error["message"], error


def refused(response):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    return error


def test_an_error_of_a_responses_format_names_it(server):
    for shape, param, said in (
        ({"type": "json_schema", "name": "a", "schema": {"foo": 1}}, "text.format", "the keyword 'foo' is not supported"),
        ({"type": "json_schema", "schema": {}}, "text.format.name", "needs a name"),
        ({"type": "json_schema", "name": "a"}, "text.format.schema", "needs schema if, and only if"),
        ({"type": "json_object", "schema": {}}, "text.format.schema", "needs schema if, and only if"),
        ({"type": "grammar"}, "text.format", ""),
    ):
        error = refused(ask(server, "/v1/responses", {"input": "Hi", "text": {"format": shape}}))
        assert error["param"].startswith(param) and said in error["message"], error
    error = refused(ask(server, "/v1/responses", {"input": "Hi", "response_format": {"type": "json_object"}}))
    assert error["param"] == "response_format" and "not supported" in error["message"]
    # The format was forgotten around it, and the answer would not follow it.
    error = refused(ask(server, "/v1/responses", {"input": "Hi", "text": {"type": "json_object"}}))
    assert error["param"] == "text.type"
    assert ask(server, "/v1/responses", {"input": "Hi", "max_output_tokens": 1, "text": {"verbosity": "medium"}}).status_code == 200
    asked = {"messages": [{"role": "user", "content": "Hi"}], "structured_outputs": {"choice": ["a"], "disable_fallback": False, "backend": None}}
    assert ask(server, "/v1/chat/completions", asked).status_code == 200


def test_a_schema_that_says_nothing_of_other_members_gets_none(server):
    """As OpenAI's strict schemas, which must say so; a value that is nested too deep is a 400, not a fault."""
    open_schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    for grammar in (
        {"json_schema": open_schema},
        {"structured_outputs": {"json": open_schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": open_schema}}},
    ):
        answer = ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 2, "seed": 3} | grammar)
        assert text_of(answer.json()) in ('{"a": true}', '{"a": false}'), answer.text
    for depth in (40, 300, 700, 2_000):
        nested = '{"items": ' * depth + "{}" + "}" * depth
        for body in ('{"model": "pocket", "prompt": "a", "json_schema": %s}', '{"model": "pocket", "prompt": "a", "structured_outputs": {"json": %s}}'):
            assert post(server, "/v1/completions", (body % nested).encode()).status_code == 400, depth
        response = '{"model": "pocket", "input": "a", "stream": true, "text": {"format": {"type": "json_schema", "name": "a", "schema": {"default": %s}}}}'
        answer = post(server, "/v1/responses", (response % nested).encode())
        assert answer.status_code == 400 or answer.status_code == 200 and answer.text, depth
    body = {"messages": [{"role": "user", "content": "Hi"}], "structured_outputs": {"json": "[" * 100_000}}
    error = refused(ask(server, "/v1/chat/completions", body))
    assert error["param"] == "structured_outputs.json"


KEYWORDS = ("contains", "if", "not", "allOf", "oneOf", "$ref", "dependentSchemas", "unevaluatedProperties", "const", "properties", "items")


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_member_that_is_named_as_a_keyword_is_a_member(module, name):
    """And what is only a value, or a note, is no schema: all objects are closed, and nothing else is changed."""
    inner, no_more = {"type": "object", "properties": {"x": {"type": "null"}}}, {"additionalProperties": False}
    for schema in (
        lambda inner: {"type": "object", "properties": {name: {"type": "string"}, "a": inner}},
        lambda inner: {"type": "object", "properties": {"b": {"enum": [{name: [1, 2], "c": 3}], "default": {name: 1}}, "a": inner}, "examples": [{name: [{}, {}]}]},
        lambda inner: {"type": "object", "properties": {"a": {"items": {"$ref": f"#/$defs/{name}"}}, "b": inner}, "$defs": {name: inner, "d": inner}},
    ):
        assert module("json_schema").close(schema(inner)) == schema(inner | no_more) | no_more


def test_a_schema_that_puts_objects_together_at_any_depth_stays_as_it_is(module):
    close, inner = module("json_schema").close, {"type": "object", "properties": {"x": {"type": "null"}}}
    together = {"allOf": [inner, {"properties": {"y": {}}}]}
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        for schema in ({keyword: {"not": together}, "items": inner}, {"anyOf": [{"items": {keyword: {"a": together}}}, inner]}):
            assert close(schema) == schema
    assert close({"items": {"allOf": [inner]}}) == {"items": {"allOf": [inner | {"additionalProperties": False}]}}
    for schema in ({"items": together}, {"properties": {"a": {"properties": {"b": {"not": inner}}}}}, {"properties": [together]}, {"prefixItems": [inner, together]}):
        assert close(schema) == schema


def test_choices_over_http_share_one_compilation_and_metrics_recount_it(server):
    """By what follows a grammar; none: those refused."""
    before = compilations(server)
    body = {"prompt": "Once", "n": 4, "temperature": 1.5, "seed": 3, "max_tokens": 40}
    answers = [
        ask(server, "/v1/completions", body | grammar)
        for grammar in ({"regex": "[a-z]{3,6}\\."}, {"regex": "[a-z]{3,6}\\."}, {"regex": "(counted"}, {"grammar": 'start: "counted"'})
    ]
    texts = [choice["text"] for choice in answers[0].json()["choices"]]
    assert all(re.fullmatch("[a-z]{3,6}\\.", text) for text in texts) and len(set(texts)) > 1
    assert texts == [choice["text"] for choice in answers[1].json()["choices"]]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 200]
    # A refusal's record comes with the next report.
    ask(server, "/v1/completions", {"prompt": "Once", "max_tokens": 1})
    after = compilations(server)
    assert {name: after[name] - before[name] for name in after} == {"own": 1, "llguidance": 1, "none": 1, "seconds": 3}


def compilations(server):
    """Counts by backend, and of the histogram."""
    # Those who ask within a moment get the same.
    server.service.shared.clear()
    scraped = HTTP.get(f"{server.url}/metrics").text
    counts = {name: float(count) for name, count in re.findall('stepserve_grammars_compiled_total{backend="(.*)"} (.*)', scraped)}
    return counts | {"seconds": float(re.search("stepserve_grammar_compile_seconds_count (.*)", scraped)[1])}


class Answer(BaseModel):
    color: Literal["red", "blue"]
    count: int = Field(ge=0, le=99)
    inner: "Inner"


class Inner(BaseModel):
    words: list[Literal["a", "é"]] = Field(max_length=3)
    maybe: bool | None


def test_openais_client_parses_answers_into_its_models(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "Which?"}]
        chat = client.chat.completions.parse(model="pocket", messages=messages, response_format=Answer, temperature=1.0, seed=2)
        assert isinstance(chat.choices[0].message.parsed, Answer)
        response = client.responses.parse(model="pocket", input="Which?", text_format=Answer)
        assert isinstance(response.output_parsed, Answer)
        with client.chat.completions.stream(model="pocket", messages=messages, response_format=Answer) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, Answer)


def gaps_of_a_stream(server, during):
    """The longest gap between the chunks of a stream while `during` runs, and what that returned."""
    longest, done = [0.0], threading.Event()
    body = {"model": "pocket", "prompt": "Once", "max_tokens": 240, "ignore_eos": True, "stream": True}

    def read():
        while not done.is_set():
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as stream:
                last = None
                for _ in stream.iter_lines():
                    now = time.monotonic()
                    longest[0] = max(longest[0], now - last if last else 0.0)
                    last = now
                    if done.is_set():
                        break

    reader = threading.Thread(target=read)
    reader.start()
    try:
        time.sleep(0.2)
        longest[0] = 0.0
        return during(), longest[0]
    finally:
        done.set()
        reader.join()


def test_a_grammar_of_a_second_delays_nobody_else(server, module):
    """Its compilation is Python, in a process of its own: neither /health nor another stream waits for it."""
    tried = []
    # On a busy machine something else may delay all of them once.
    for attempt in range(3):
        slowest = []

        def during():
            with ThreadPoolExecutor(1) as pool:
                began = time.monotonic()
                answer = pool.submit(ask, server, "/v1/completions", {"prompt": "Once", "regex": f"{SLOW}c{{0,{attempt}}}", "max_tokens": 3}, timeout=60)
                while not answer.done():
                    begun = time.monotonic()
                    assert HTTP.get(f"{server.url}/health").status_code == 200
                    slowest.append(time.monotonic() - begun)
                    time.sleep(0.01)
                return answer.result(), time.monotonic() - began

        (answer, seconds), gap = gaps_of_a_stream(server, during)
        assert answer.status_code == 200 and re.fullmatch("[ab]{1,9}.*", text_of(answer.json()))
        assert seconds > 0.2
        tried.append((seconds, gap, max(slowest)))
        if gap < seconds / 2 and max(slowest) < seconds / 2:
            return
    raise AssertionError(tried)


def test_a_grammar_that_takes_too_long_is_the_clients_error(server, module, monkeypatch):
    monkeypatch.setattr(module("compiler"), "MOST_SECONDS", 0.4)
    for body in ({"regex": LARGE[1]}, {"structured_outputs": {"regex": LARGE[1]}}):
        error = refused(ask(server, "/v1/completions", {"prompt": "Once"} | body))
        assert error["param"].split(".")[-1] == "regex" and "takes more than 0.4 s to compile; use a simpler one" in error["message"]
    assert ask(server, "/v1/completions", {"prompt": "Once", "max_tokens": 1}).status_code == 200


def test_a_schema_that_takes_too_long_for_an_automaton_is_the_librarys(module, new_engine, Params, ids, monkeypatch):
    """Twelve strings of at most 255 characters take an automaton more than ten seconds, and the library a moment."""
    engine, told = new_engine(), threading.Event()

    def slow(kind, source):
        raise module("compiler").NotNow(f"{kind} takes too long", kind)

    monkeypatch.setattr(module("grammars"), "compile_apart", slow)
    monkeypatch.setattr(module("grammars"), "try_library", lambda *_: None)
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"], "additionalProperties": False}
    params = Params(json_schema=schema, max_tokens=60)
    assert not engine.compile_grammars([params], told.set, lambda: True) and told.wait(20)
    assert type(engine.grammars.get(params.constraint)).__name__ == "GuidanceGrammar"
    assert len(json.loads(engine.generate([ids(4)], params)[0].text)["a"]) <= 5


def test_a_client_that_leaves_while_its_grammar_is_compiled_leaves_nothing(served, module, monkeypatch):
    gate, compile_here = threading.Event(), module("compiler").compile_here
    monkeypatch.setattr(module("grammars"), "compile_apart", lambda kind, source: (gate.wait(20), compile_here(kind, source))[1])
    engine, server = served
    async_engine = server.service.async_engine
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"model": "pocket", "prompt": "Once", "regex": "abc[0-9]+", "max_tokens": 200}, timeout=0.3)
    # Nobody waits for it meanwhile.
    assert ask(server, "/v1/completions", {"prompt": "Once", "max_tokens": 2}).status_code == 200
    gate.set()
    wait_until(lambda: not async_engine.active_generations and not async_engine.unanswered)
    assert ask(server, "/v1/completions", {"prompt": "Once", "regex": "abc[0-9]+", "max_tokens": 5}).status_code == 200
    wait_until(lambda: not engine.has_unfinished_requests())


def test_a_server_that_drains_answers_what_it_compiles(chapter, module, monkeypatch):
    gate, compile_here = threading.Event(), module("compiler").compile_here
    monkeypatch.setattr(module("grammars"), "compile_apart", lambda kind, source: (gate.wait(20), compile_here(kind, source))[1])
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=256)
    with serving(chapter, engine, log_format="none", drain_seconds=30) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, "/v1/completions", {"prompt": "Once", "regex": "drained!", "max_tokens": 9})
        wait_until(lambda: server.service.async_engine.unanswered)
        server.handle_exit(15, None)
        refused = ask(server, "/v1/completions", {"prompt": "Once", "max_tokens": 2})
        gate.set()
        assert refused.status_code == 503 and text_of(answer.result().json()) == "drained!"


def test_a_grammar_that_cannot_be_spelled_is_an_error_and_others_go_on(served, monkeypatch):
    engine, server = served
    grammars = engine.grammars
    grammars.warm_up()
    monkeypatch.setitem(grammars.__dict__, "vocabulary", pocket_without(grammars, b"Q"))
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, server, "/v1/completions", {"prompt": "Once", "max_tokens": 60, "ignore_eos": True})
        answer = ask(server, "/v1/completions", {"prompt": "Once", "regex": "a{3}Q"})
        assert other.result().status_code == 200
    assert answer.status_code == 500 and "its grammar allows none of the vocabulary's tokens" in answer.json()["error"]["message"]


def pocket_without(grammars, raw):
    kept = [b"" if raw in each else each for each in grammars.spellings]
    left_out = (set(),) if "left_out" in inspect.signature(type(grammars.vocabulary)).parameters else ()
    return type(grammars.vocabulary)(kept, *left_out, grammars.vocab_size)


def test_flags_and_the_command_generate(module, capsys, tmp_path):
    main = module("__main__").main
    base = ["generate", "Once", "--model", str(checkpoint("pocket")), "--max-tokens", "20"]
    for flags, pattern in (
        (["--choice", "yes", "--choice", "no", "--min-p", "0.1", "--repetition-penalty", "1.2", "--grammar-backend", "own"], "yes|no"),
        (["--json-schema", '{"type": "boolean"}', "--grammar-backend", "llguidance"], "true|false"),
    ):
        assert main([*base, *flags]) == 0
        assert re.search(f"(^|\\W)({pattern})(\\W|$)", capsys.readouterr().out), flags
    with pytest.raises(SystemExit):
        main([*base, "--grammar", "x", "--grammar-backend", "outlines"])
    assert main([*base, "--regex", "("]) == 2 and "this ( is not closed at character 0" in capsys.readouterr().err
