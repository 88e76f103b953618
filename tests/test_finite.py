"""Numbers that are not finite fail the request that computed them, and reach no other."""
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from shared.verify.findable import forget
from shared.verify.serving import serving
from shared.workloads import random_ids
from tests.support.http import post
from tests.support.overflowing import BAD

pytestmark = pytest.mark.needs("generate", "sample", "logprobs")

@pytest.fixture(scope="session")
def bad_text(overflowing):
    """A prompt that contains the token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(overflowing)
    return next(text for text in map(chr, range(33, 127)) if BAD in tokenizer(text).input_ids)


@pytest.fixture(scope="session")
def frail(chapter, overflowing):
    """Its engine, shared by all tests, so that each sees what the last one left behind."""
    return chapter.load().Engine(overflowing, dtype="float16")


SHORT, LONG = [9, 10, 11, 12, 13], list(range(20, 60))


@pytest.fixture(scope="session")
def wanted(chapter, overflowing):
    engine = chapter.load().Engine(overflowing, dtype="float16")
    params = chapter.load().SamplingParams(max_tokens=6, ignore_eos=True)
    return [engine.generate([prompt], params)[0].token_ids for prompt in (SHORT, LONG)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[BAD, 9], [BAD], [9, 10, BAD], [BAD, *range(20, 70)]])
def test_one_requests_nan_is_its_own(frail, wanted, Params, bad, temperature):
    params = Params(max_tokens=6, ignore_eos=True)
    failing = Params(max_tokens=6, ignore_eos=True, temperature=temperature, top_k=3, logprobs=2)
    # after it, and beside it: before, between and after the others
    [failed] = frail.generate([bad], failing)
    assert (failed.finish_reason, failed.token_ids, failed.text, failed.logprobs) == ("error", [], "", [])
    assert [done.token_ids for done in frail.generate([SHORT, LONG], params)] == wanted
    for place in range(3):
        prompts, all_params = [SHORT, LONG], [params, params]
        prompts.insert(place, bad)
        all_params.insert(place, failing)
        done = frail.generate(prompts, all_params)
        assert done.pop(place).finish_reason == "error"
        assert [each.token_ids for each in done] == wanted
        assert [each.finish_reason for each in done] == ["length", "length"]
    assert [done.token_ids for done in frail.generate([LONG, SHORT], params)] == wanted[::-1]


def test_a_text_that_overflows_later_keeps_what_it_had(frail, Params, monkeypatch):
    """Two tokens are right, and the third is the one that overflows when it is fed."""
    said = iter([20, 21, BAD])
    compute = frail.model.compute_logits

    def forced(hidden):
        logits = compute(hidden)
        token_id = next(said, None)
        if token_id is not None:
            logits[:, token_id] = 1e4
        return logits

    monkeypatch.setattr(frail.model, "compute_logits", forced)
    [done] = frail.generate([[9, 10]], Params(max_tokens=9, ignore_eos=True, logprobs=0))
    assert (done.token_ids, done.finish_reason, len(done.logprobs)) == ([20, 21, BAD], "error", 3)
    assert done.text == frail.tokenizer.decode([9, 10, 20, 21, BAD])[len(frail.tokenizer.decode([9, 10])) :]


@pytest.mark.needs("kv_cache")
def test_what_no_request_may_read_reaches_no_sum(make_engine, Params, rng):
    """The whole cache is filled with NaN, or with the largest number, whenever nothing runs and nothing can be found."""
    engine = make_engine("llama")
    prompts = [random_ids(n, engine.config.vocab_size, rng) for n in (1, 15, 16, 17, 40, 3)]
    params = [Params(max_tokens=n, ignore_eos=True) for n in (20, 1, 5, 2, 3, 30)]
    alone = [engine.generate([prompt], each)[0].token_ids for prompt, each in zip(prompts, params, strict=True)]
    engine.generate(prompts, params)
    for poison in (math.nan, math.inf, -math.inf, 3e38):
        forget(engine)
        for cached in (engine.cache.k, engine.cache.v):
            # A slab is never read past the longest text so far.
            cached[:, :, : getattr(engine.cache, "num_used", None)] = poison
        assert [done.token_ids for done in engine.generate(prompts, params)] == alone
    for cached in (engine.cache.k, engine.cache.v):
        cached.fill_(0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"temperature": 0.7, "top_p": 0.5}])
def test_a_row_that_is_not_finite_has_no_token(module, Params, value, params):
    sampling = module("sampling")
    logits = torch.tensor([[value, 5.0, 1.0], [0.0, -math.inf, 9.0], [1.0, 2.0, value], [-math.inf] * 3, [-math.inf, -math.inf, 0.0]])
    params = Params(logprobs=1, **params)
    draws = [(SimpleNamespace(params=params, seed=3, num_prompt=1, knows=lambda _at: False), 1) for _ in logits]
    draws = [module("batch").Draw(*draw) for draw in draws]
    before = logits.clone()
    token_ids = sampling.sample(logits, draws).tolist()
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
    assert [token_ids[row] for row in (0, 2, 3)] == [sampling.NO_TOKEN] * 3
    assert token_ids[1] in (0, 2) and token_ids[4] == 2
    tops = sampling.top_logprobs(logits, draws, token_ids)
    assert [top is None for top in tops] == [True, False, True, True, False]
    assert not any(math.isnan(logprob) for top in tops if top for logprob in top.values())


@pytest.mark.needs("command_line")
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_command_says_that_a_text_is_cut_off(module, overflowing, bad_text, capsys, stream):
    prompts = ["a fine day", bad_text]
    status = module("__main__").main(["generate", *prompts, "--model", str(overflowing), "--dtype", "float16", "--max-tokens", "3", *stream])
    out = capsys.readouterr()
    assert status == 1 and "1 of 2 texts are cut off: the model's logits were not finite numbers" in out.err
    assert "NaN" not in out.out


@pytest.mark.needs("serve")
def test_only_the_client_whose_request_overflows_gets_a_500(chapter, frail, bad_text, Params):
    [want] = frail.generate(["a fine day"], Params(max_tokens=6))
    with serving(chapter, frail) as server:
        body = {"model": "pocket", "prompt": bad_text, "max_tokens": 6, "temperature": 0}
        for _ in range(3):
            refused = post(server, "/v1/completions", body)
            assert refused.status_code == 500 and "not finite numbers" in refused.json()["error"]["message"]
            assert "NaN" not in refused.text
            fine = post(server, "/v1/completions", body | {"prompt": "a fine day"})
            assert fine.json()["choices"][0]["text"] == want.text
        streamed = post(server, "/v1/completions", body | {"stream": True}).text
        assert "not finite numbers" in streamed.split("data: ")[-1] and "NaN" not in streamed
    assert not frail.has_unfinished_requests()


@pytest.mark.needs("prompt_logprobs")
def test_logprobs_of_a_prompt_that_overflows_fail_the_call_and_all_of_its_answers(chapter, frail):
    with serving(chapter, frail) as server:
        body = {"model": "pocket", "prompt": [9, 10, BAD, 11], "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2}
        assert post(server, "/v1/completions", body).status_code == 500
        body = {"model": "pocket", "prompt": [[9, 10], [BAD]], "max_tokens": 2, "logprobs": 1}
        assert post(server, "/v1/completions", body).status_code == 500
        assert post(server, "/v1/completions", body | {"prompt": [9, 10]}).status_code == 200
    assert not frail.has_unfinished_requests()


def test_logits_that_overflow_when_they_are_divided_by_a_temperature_have_no_token(module, Params):
    """Both the logits and the temperature are finite."""
    sampling = module("sampling")
    for row, temperature in (([3e38, 2e38, -3e38], 0.5), ([1e10, 0.0, 0.0], 1e-30), ([1.0, -math.inf, 0.0], 1e30)):
        for more in ({}, {"top_k": 2}, {"top_p": 0.5}):
            others = Params(temperature=1.0)
            params = [others, Params(temperature=temperature, **more), others]
            draws = [SimpleNamespace(params=each, seed=3, num_prompt=1, knows=lambda _at: False) for each in params]
            draws = [module("batch").Draw(each, 1) for each in draws]
            logits = torch.tensor([[0.0, 9.0, -9.0], row, [9.0, 0.0, 0.0]])
            token_ids = sampling.sample(logits, draws).tolist()
            assert token_ids[1] in (sampling.NO_TOKEN, 0, 2) and (token_ids[0], token_ids[2]) == (1, 0)


@pytest.mark.needs("stop_strings")
def test_an_error_is_an_error_even_if_the_last_of_the_text_is_a_stop_string(frail, Params, monkeypatch):
    """Half a character at the end of a text becomes U+FFFD."""
    half = next(i for i in range(20, 256) if frail.tokenizer.decode([i]) == "\ufffd")
    said = iter([half, -1])
    monkeypatch.setattr(frail, "choose_tokens", lambda _hidden, _draws: ([next(said)], [None]))
    [done] = frail.generate([[9]], Params(max_tokens=9, stop=("\ufffd",), ignore_eos=True))
    assert done.finish_reason == "error"
