"""What an API needs from an engine: stop strings, logprobs of the prompt, several answers to one prompt."""
import pytest

from shared.workloads import random_ids

pytestmark = pytest.mark.needs("stop_strings", "prompt_logprobs")


def pieces_of(engine, prompt, params):
    engine.add_request(prompt, params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def test_the_text_ends_before_the_first_stop_string_and_the_stream_never_shows_it(make_engine, Params):
    """Wherever it begins and ends within tokens: every substring of two to nine characters is tried."""
    engine = make_engine("pocket")
    prompt = "Once upon a time"
    [whole] = engine.generate([prompt], Params(max_tokens=24))
    for start in range(0, len(whole.text) - 9, 5):
        for size in (2, 5, 9):
            stop = whole.text[start : start + size]
            cut = whole.text[: whole.text.index(stop)]
            outputs = pieces_of(engine, prompt, Params(max_tokens=24, stop=("never said", stop)))
            assert "".join(output.text for output in outputs) == cut
            assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
            ids = [output.token_id for output in outputs]
            assert ids == whole.token_ids[: len(ids)]
            # It finishes with the token that completes the stop string, not later.
            assert len(engine.tokenizer.decode(ids[:-1], skip_special_tokens=True)) < len(cut) + size


def test_of_two_stop_strings_the_first_in_the_text_ends_it(make_engine, Params):
    engine = make_engine("pocket")
    [whole] = engine.generate(["Once upon a time"], Params(max_tokens=16))
    early, late = whole.text[7:9], whole.text[8:12]
    [done] = engine.generate(["Once upon a time"], Params(max_tokens=16, stop=(late, early)))
    assert done.text == whole.text[: whole.text.index(early)]


def test_what_only_began_like_a_stop_string_is_text_after_all(make_engine, Params):
    engine = make_engine("pocket")
    [whole] = engine.generate(["Once upon a time"], Params(max_tokens=16))
    stop = whole.text[-3:] + "?!"
    outputs = pieces_of(engine, "Once upon a time", Params(max_tokens=16, stop=(stop,)))
    assert "".join(output.text for output in outputs) == whole.text
    assert outputs[-1].finish_reason == whole.finish_reason


@pytest.mark.parametrize(
    "said, text",
    [("aEEND", "aE"), ("EEEND", "EE"), ("END", ""), ("a😀EEN", "a😀EEN"), ("é😀ENéEND", "é😀ENé"), ("ENEN", "ENEN")],
)
def test_the_tokens_with_logprobs_are_those_that_begin_in_the_text(make_engine, Params, module, monkeypatch, said, text):
    """One byte per token, which spreads characters and the stop string END over as many tokens as possible."""
    engine = make_engine("pocket")
    names = module("text").vocabulary_bytes(engine.tokenizer)
    forced = [names.index(bytes([byte])) for byte in said.encode()]
    ids = iter(forced)
    monkeypatch.setattr(engine, "choose_tokens", lambda _hidden, _draws: ([chosen := next(ids)], [{chosen: 0.0}]))
    answer, found = module("answers").Answer(0), []
    for output in pieces_of(engine, [9], Params(max_tokens=len(forced), stop=("END",), logprobs=0, ignore_eos=True)):
        found += [token_id for _, token_id, _ in answer.push(output)[1]]
    assert answer.text == text
    assert b"".join(names[token_id] for token_id in found) == text.encode()


def test_an_end_token_is_named_as_what_ended_the_text(make_engine, Params):
    engine = make_engine("pocket")
    [plain] = engine.generate([[20, 21, 22]], Params(max_tokens=4, ignore_eos=True))
    [done] = engine.generate([[20, 21, 22]], Params(max_tokens=4, stop_token_ids=(plain.token_ids[1],)))
    assert (done.finish_reason, done.stop_reason) == ("stop", plain.token_ids[1])
    assert plain.stop_reason is None


def test_the_prompts_logprobs_are_hugging_faces(engine, hf, Params, rng, checkpoint_name):
    prompts = [random_ids(n, engine.config.vocab_size, rng) for n in (1, 7, 40)]
    others = [random_ids(5, engine.config.vocab_size, rng)]
    params = Params(max_tokens=3, logprobs=2, prompt_logprobs=True, temperature=0.7, seed=3)
    plain = engine.generate(prompts + others, Params(max_tokens=3, logprobs=2, temperature=0.7, seed=3))
    asked = engine.generate(prompts + others, [params] * 3 + [Params(max_tokens=3, logprobs=2, temperature=0.7, seed=3)])
    for prompt, done, before in zip(prompts, asked, plain):
        assert done.token_ids == before.token_ids
        first, *rest = done.prompt_logprobs
        assert first is None and len(rest) == len(prompt) - 1
        want = hf.logits(prompt).log_softmax(-1)
        for position, found in enumerate(rest):
            assert prompt[position + 1] in found and len(found) in (2, 3)
            for token_id, logprob in found.items():
                assert logprob == pytest.approx(want[position, token_id].item(), abs=1e-4)
            assert set(want[position].topk(2).indices.tolist()) <= set(found)
    assert asked[3].prompt_logprobs is None


def test_the_head_runs_over_slices_of_at_most_256_rows(make_engine, Params, rng):
    """Prompt and logprobs span several slices; only the memory differs."""
    engine = make_engine("pocket")
    prompt = random_ids(600, engine.config.vocab_size, rng)
    rows = []
    hook = engine.model.lm_head.register_forward_hook(lambda _module, _args, out: rows.append(len(out)))
    try:
        [done] = engine.generate([prompt], Params(max_tokens=2, logprobs=0, prompt_logprobs=True))
    finally:
        hook.remove()
    assert rows == [256, 256, 88, 1]
    assert [list(found) for found in done.prompt_logprobs[1:]] == [[token_id] for token_id in prompt[1:]]
    [short] = engine.generate([prompt[:300]], Params(max_tokens=1, logprobs=0, prompt_logprobs=True))
    for found, want in zip(short.prompt_logprobs[1:], done.prompt_logprobs[1:300], strict=True):
        assert list(found.values()) == pytest.approx(list(want.values()), abs=1e-4)


def test_several_answers_draw_with_seeds_of_their_own_and_the_first_is_the_plain_one(make_engine, module, Params):
    engine = make_engine("pocket")
    choices = module("params").choices
    params = Params(max_tokens=12, temperature=1.3, seed=5)
    several = engine.generate(["Once upon a time"] * 4, choices(params, 4))
    [plain] = engine.generate(["Once upon a time"], params)
    assert several[0].token_ids == plain.token_ids
    assert len({tuple(each.token_ids) for each in several}) == 4
    again = engine.generate(["Once upon a time"] * 4, choices(params, 4))
    assert [each.token_ids for each in again] == [each.token_ids for each in several]
    assert [each.seed for each in choices(Params(), 3)] == [None] * 3
    seeds = {each.seed for seed in range(50) for each in choices(Params(seed=seed), 20)}
    assert len(seeds) == 50 * 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ("",)}, "stop must be a tuple of non-empty strings"),
        ({"stop": "x"}, "stop must be a tuple of non-empty strings"),
        ({"stop": (3,)}, "stop must be a tuple of non-empty strings"),
        ({"prompt_logprobs": 1, "logprobs": 1}, "prompt_logprobs must be True or False, got 1"),
        ({"prompt_logprobs": True}, "prompt_logprobs needs logprobs, which is None; set it to 0 or more"),
    ],
)
def test_bad_values_are_refused_by_name(Params, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Params(**options)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_string_that_is_a_special_token_ends_the_text(make_engine, Params, monkeypatch, ignore_eos):
    """It is not in the text, so it used never to be found."""
    engine = make_engine("pocket")
    for name in engine.tokenizer.all_special_tokens:
        special = engine.tokenizer.convert_tokens_to_ids(name)
        words = engine.tokenizer("the cat", add_special_tokens=False).input_ids
        for stop in ((name,), ("never said", name)):
            ids = iter([*words, special, *words])
            monkeypatch.setattr(engine, "choose_tokens", lambda _hidden, _draws: ([next(ids)], [None]))
            [done] = engine.generate([[9]], Params(max_tokens=9, stop=stop, ignore_eos=ignore_eos))
            assert (done.text, done.finish_reason, done.stop_reason) == ("the cat", "stop", special)
            assert done.token_ids == [*words, special]


def test_a_stop_string_is_found_before_its_bytes_are_certain(make_engine, Params, monkeypatch):
    """A newline is a byte token for Llama 2, and the next byte could make it invalid; but there is no next one."""
    engine = make_engine("mistral")
    ids = engine.tokenizer("the cat\n", add_special_tokens=False).input_ids
    assert engine.tokenizer.convert_ids_to_tokens(ids[-1]) == "<0x0A>"
    said = iter([*ids, *ids])
    monkeypatch.setattr(engine, "choose_tokens", lambda _hidden, _draws: ([next(said)], [None]))
    [done] = engine.generate([[9]], Params(max_tokens=len(ids) + 4, stop=("\n",), ignore_eos=True, new_text=True))
    assert (done.text, done.token_ids, done.stop_reason) == ("the cat", ids, "\n")
