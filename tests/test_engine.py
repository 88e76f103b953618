"""What a caller may rely on: the queue, the ids, how a request finishes, and that nothing is left behind."""
import pytest

from shared.checkpoints import checkpoint
from shared.workloads import random_ids

pytestmark = pytest.mark.needs("generate", "stream", "abort")


def drain(engine, limit=2000):
    outputs = []
    for _ in range(limit):
        if not engine.has_unfinished_requests():
            return outputs
        outputs += engine.step()
    raise AssertionError(f"requests {list(engine.seqs)} have not ended after {limit} steps")


def test_step_reports_what_generate_returns(engine, Params, rng):
    prompt_ids = random_ids(6, engine.config.vocab_size, rng)
    params = Params(max_tokens=17, logprobs=2)
    [whole] = engine.generate([prompt_ids], params)
    request_id = engine.add_request(prompt_ids, params)
    outputs = drain(engine)
    assert {output.request_id for output in outputs} == {request_id}
    assert [output.token_id for output in outputs] == whole.token_ids
    assert [output.logprobs for output in outputs] == whole.logprobs
    assert "".join(output.text for output in outputs) == whole.text
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + [whole.finish_reason]


def test_an_idle_engine_steps_to_nothing(make_engine):
    engine = make_engine("llama")
    assert not engine.has_unfinished_requests()
    assert engine.step() == []


def test_request_ids_are_never_used_again(make_engine, Params):
    engine = make_engine("llama")
    first = engine.add_request([9], Params(max_tokens=1))
    drain(engine)
    second = engine.add_request([9], Params(max_tokens=1))
    engine.abort_request(second)
    third = engine.add_request([9], Params(max_tokens=1))
    drain(engine)
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_abort_ends_a_request_in_any_state_and_only_that_one(make_engine, Params, num_steps):
    engine = make_engine("llama")
    params = Params(max_tokens=9, ignore_eos=True)
    [undisturbed] = engine.generate([[11, 12]], params)
    gone, stays = engine.add_request([9, 10], params), engine.add_request([11, 12], params)
    outputs = [output for _ in range(num_steps) for output in engine.step()]
    assert engine.abort_request(gone) is True
    assert engine.abort_request(gone) is False
    later = drain(engine)
    assert gone not in {output.request_id for output in later}
    tokens = [output.token_id for output in outputs + later if output.request_id == stays]
    assert tokens == undisturbed.token_ids


def test_abort_knows_neither_strangers_nor_the_finished(make_engine, Params):
    engine = make_engine("llama")
    request_id = engine.add_request([9], Params(max_tokens=1))
    drain(engine)
    assert engine.abort_request(request_id) is False
    assert engine.abort_request(10**9) is False


def test_generate_while_other_requests_are_queued_is_refused_and_loses_none_of_their_tokens(make_engine, Params):
    engine = make_engine("llama")
    params = Params(max_tokens=6, ignore_eos=True, seed=1)
    [expected] = engine.generate([[21, 22]], params)
    queued = engine.add_request([21, 22], params)
    outputs = engine.step()
    with pytest.raises(ValueError, match="prompts cannot run while 1 requests are unfinished; step until all finish") as caught:
        engine.generate([[31, 32, 33]], params)
    assert caught.value.param == "prompts"
    outputs += drain(engine)
    assert [output.token_id for output in outputs] == expected.token_ids
    assert {output.request_id for output in outputs} == {queued}
    assert outputs[-1].finish_reason == "length"


def test_a_refused_generate_queues_nothing(make_engine, Params):
    engine = make_engine("llama")
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        engine.generate([[9], []], Params())
    assert not engine.has_unfinished_requests()
    assert engine.step() == []


def test_generate_that_fails_half_way_leaves_nothing_behind(make_engine, Params, monkeypatch):
    engine = make_engine("llama")
    engine.generate([[9]], Params(max_tokens=1))
    calls = iter(range(100))
    forward = engine.model.forward

    def fail_on_the_third_pass(batch):
        if next(calls) == 2:
            raise RuntimeError("the machine is full")
        return forward(batch)

    monkeypatch.setattr(engine.model, "forward", fail_on_the_third_pass)
    with pytest.raises(RuntimeError, match="the machine is full"):
        engine.generate([[9, 10], [11]], Params(max_tokens=8, ignore_eos=True))
    monkeypatch.undo()
    assert not engine.has_unfinished_requests()
    assert engine.scheduler.running == [] and not engine.scheduler.waiting
    assert len(engine.generate([[9]], Params(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def fail_once(engine, monkeypatch):
    """Make the next forward pass raise."""
    forward = engine.model.forward

    def fail(batch):
        monkeypatch.setattr(engine.model, "forward", forward)
        raise RuntimeError("the machine is full")

    monkeypatch.setattr(engine.model, "forward", fail)


def test_a_failed_first_step_costs_other_requests_nothing(make_engine, Params, monkeypatch):
    """Aborting a request that did not fit used to leave its neighbors padded to its width, up to the cache's end."""
    engine = make_engine("llama")
    params = Params(max_tokens=200, ignore_eos=True)
    [alone] = engine.generate([[9] * 5], params)
    stays = engine.add_request([9] * 5, params)
    wide = engine.add_request([10] * 150, Params(max_tokens=1))
    fail_once(engine, monkeypatch)
    with pytest.raises(RuntimeError, match="the machine is full"):
        engine.step()
    assert engine.abort_request(wide)
    later = engine.add_request([11], Params(max_tokens=1, ignore_eos=True))
    tokens = [output.token_id for output in drain(engine) if output.request_id == stays]
    assert tokens == alone.token_ids
    assert later not in engine.seqs


def test_the_end_token_is_in_the_ids_and_not_in_the_text(make_engine, Params):
    engine = make_engine("llama")
    free = Params(max_tokens=30, ignore_eos=True)
    [whole] = engine.generate([[9, 30]], free)
    stop = whole.token_ids[10]
    where = whole.token_ids.index(stop)
    [stopped] = engine.generate([[9, 30]], Params(max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: where + 1]
    [before] = engine.generate([[9, 30]], Params(max_tokens=where, ignore_eos=True)) if where else [None]
    assert stopped.text == (before.text if before else "")


def test_an_end_token_as_the_last_one_allowed_is_a_stop(make_engine, Params):
    engine = make_engine("llama")
    [whole] = engine.generate([[9, 30]], Params(max_tokens=4, ignore_eos=True))
    last = whole.token_ids[3]
    assert last not in whole.token_ids[:3]
    [out] = engine.generate([[9, 30]], Params(max_tokens=4, ignore_eos=True, stop_token_ids=(last,)))
    assert (out.token_ids, out.finish_reason) == (whole.token_ids, "stop")


def test_every_one_of_the_checkpoints_end_tokens_ends_a_text(make_engine, Params):
    engine = make_engine("pocket")
    assert len(engine.config.end_ids) == 2
    ends = set()
    for prompt in (engine.tokenizer("Once upon a time").input_ids, chat_ids(engine)):
        [out] = engine.generate([prompt], Params(max_tokens=400))
        ends.add(out.token_ids[-1])
        assert out.finish_reason == "stop"
    assert ends == set(engine.config.end_ids)


def chat_ids(engine):
    text = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a KV cache?"}], tokenize=False, add_generation_prompt=True
    )
    return engine.tokenizer(text, add_special_tokens=False).input_ids


def test_generate_takes_parameters_for_each(make_engine, Params):
    outs = make_engine("llama").generate([[9], [9]], [Params(max_tokens=2, ignore_eos=True), Params(max_tokens=5, ignore_eos=True)])
    assert [len(out.token_ids) for out in outs] == [2, 5]


def test_max_tokens_none_runs_up_to_the_models_length(make_engine, Params, rng):
    engine = make_engine("qwen2")
    prompt_ids = random_ids(engine.max_model_len - 9, engine.config.vocab_size, rng)
    [out] = engine.generate([prompt_ids], Params(max_tokens=None, ignore_eos=True))
    assert len(out.token_ids) == 9 and out.finish_reason == "length"


def test_the_callers_prompt_is_left_as_it_was(make_engine, Params):
    prompt_ids = [9, 10]
    [out] = make_engine("llama").generate([prompt_ids], Params(max_tokens=3, ignore_eos=True))
    assert prompt_ids == [9, 10] == out.prompt_ids


@pytest.mark.needs("generate")
def test_a_new_engine_has_done_nothing_and_then_counts_its_steps(chapter, Params):
    engine = chapter.load().Engine(checkpoint("llama"))
    assert (engine.num_steps, engine.num_positions) == (0, 0)
    engine.generate([[9, 8, 7]], Params(max_tokens=1))
    assert (engine.num_steps, engine.num_positions) == (1, 3)


@pytest.mark.parametrize(
    ("param", "wrong"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 1e-31}),
        ("top_k", {"top_k": 1.5}),
        ("top_p", {"top_p": 0}),
        ("seed", {"seed": 2**63}),
        ("stop_token_ids", {"stop_token_ids": 7}),
        ("stop_token_ids", {"stop_token_ids": (7, -1)}),
        ("ignore_eos", {"ignore_eos": 1}),
        ("logprobs", {"logprobs": -1}),
    ],
)
def test_an_error_names_the_parameter_for_programs_too(chapter, Params, param, wrong):
    with pytest.raises(chapter.load().RequestError) as caught:
        Params(**wrong)
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")
    assert param in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("param", "code", "prompt", "params"),
    [
        ("prompt", "invalid_value", [], {}),
        ("prompt", "invalid_value", [9, 401], {}),
        ("prompt", "invalid_value", [9, -1], {}),
        ("prompt", "invalid_value", [9, True], {}),
        ("prompt", "invalid_value", [9, 10.0], {}),
        ("prompt", "invalid_value", "\ud800", {}),
        ("prompt", "context_length_exceeded", [9] * 10, {"max_tokens": 10**6}),
        ("stop_token_ids", "invalid_value", [9], {"stop_token_ids": (401,)}),
        ("logprobs", "invalid_value", [9], {"logprobs": 402}),
    ],
)
def test_the_error_of_a_request_that_can_never_run_says_what_is_wrong(make_engine, chapter, Params, param, code, prompt, params):
    engine = make_engine("llama")
    with pytest.raises(chapter.load().RequestError) as caught:
        engine.add_request(prompt, Params(**params))
    assert (caught.value.param, caught.value.code) == (param, code)
    if param == "prompt" and code == "invalid_value" and isinstance(prompt, list):
        with pytest.raises(chapter.load().RequestError) as caught:
            engine.generate([[9], prompt], Params(**params))
        assert caught.value.param == "prompts[1]"
    assert not engine.has_unfinished_requests()
