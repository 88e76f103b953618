"""Completions and chat as OpenAI's clients use them, over a real socket."""
import importlib
import itertools

import openai
import pytest

from shared.checkpoints import checkpoint
from shared.verify.serving import serving
from tests.support.http import assert_names, counts, events_of, post
from tests.support.served import CHAT, PROMPT, alone, client, server  # noqa: F401

pytestmark = pytest.mark.needs("openai")


def test_a_prompt_is_a_text_its_tokens_or_a_list_of_either(client, alone):
    texts = [PROMPT, "Rosa was a hare"]
    wanted = alone(texts, max_tokens=6)
    ids = [want.prompt_ids for want in wanted]
    for prompt, count in ((texts[0], 1), (ids[0], 1), (texts, 2), (ids, 2)):
        done = client.completions.create(model="pocket", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in done.choices] == [want.text for want in wanted[:count]]
        assert [choice.index for choice in done.choices] == list(range(count))
        assert done.usage.prompt_tokens == sum(len(want.prompt_ids) for want in wanted[:count])


def test_the_first_token_of_the_vocabulary_may_be_in_a_prompt(client, alone):
    [want] = alone([[0, 9, 0]], max_tokens=6)
    done = client.completions.create(model="pocket", prompt=[0, 9, 0], max_tokens=6, temperature=0)
    assert done.choices[0].text == want.text and done.usage.prompt_tokens == 3


def test_n_answers_have_seeds_of_their_own_and_the_first_is_as_without_n(client, alone, chapter):
    texts = [PROMPT, "A story:"]
    done = client.completions.create(model="pocket", prompt=texts, max_tokens=8, n=3, seed=4, temperature=1.2)
    assert [choice.index for choice in done.choices] == list(range(6))
    params = chapter.load().SamplingParams(max_tokens=8, seed=4, temperature=1.2)
    choices = importlib.import_module(f"milestones.{chapter.name}.params").choices
    wanted = [alone.engine.generate([text], choice)[0] for text in texts for choice in choices(params, 3)]
    assert [choice.text for choice in done.choices] == [want.text for want in wanted]
    assert done.usage.completion_tokens == sum(len(want.token_ids) for want in wanted)
    plain = alone(texts, max_tokens=8, seed=4, temperature=1.2)
    assert [done.choices[0].text, done.choices[3].text] == [want.text for want in plain]
    assert len({choice.text for choice in done.choices}) > 3
    again = client.completions.create(model="pocket", prompt=texts, max_tokens=8, n=3, seed=4, temperature=1.2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in done.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_is_not_in_it(server, alone, stream):
    [whole] = alone([PROMPT], max_tokens=20)
    stop = whole.text[12:19]
    body = {"model": "pocket", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 0, "stream": stream}
    for given in (stop, [stop], ["never said", stop]):
        response = post(server, "/v1/completions", body | {"stop": given})
        choices = [e["choices"][0] for e in events_of(response)] if stream else response.json()["choices"]
        text = "".join(choice["text"] for choice in choices)
        assert text == whole.text[: whole.text.index(stop)]
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        names = [name for choice in choices for name in choice["logprobs"]["tokens"]]
        assert offsets == [len("".join(names[:i])) for i in range(len(names))]
        assert choices[-1]["finish_reason"] == "stop"
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        assert "".join(tokens).startswith(text) and not "".join(tokens[:-1]).startswith(text + stop)


def test_echo_begins_with_the_prompt(client, alone):
    ids = alone([PROMPT], max_tokens=1)[0].prompt_ids
    [want] = alone([PROMPT], max_tokens=5)
    for prompt in (PROMPT, ids):
        done = client.completions.create(model="pocket", prompt=prompt, max_tokens=5, temperature=0, echo=True)
        assert done.choices[0].text == PROMPT + want.text
        assert done.usage.completion_tokens == 5
    for stream in client.completions.create(model="pocket", prompt=PROMPT, max_tokens=0, echo=True, n=2).choices:
        assert (stream.text, stream.finish_reason) == (PROMPT, "length")


def test_logprobs_are_the_engines_and_their_tokens_join_to_the_text(client, alone):
    [want] = alone([PROMPT], max_tokens=7, logprobs=2)
    done = client.completions.create(model="pocket", prompt=PROMPT, max_tokens=7, temperature=0, logprobs=2)
    [choice] = done.choices
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text == want.text
    assert found.token_logprobs == pytest.approx([top[i] for top, i in zip(want.logprobs, want.token_ids)], abs=1e-4)
    assert [len(top) for top in found.top_logprobs] == [len(top) for top in want.logprobs]
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(7)]


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(server, alone, max_tokens, stream):
    [want] = alone([PROMPT], max_tokens=3, logprobs=1, prompt_logprobs=True)
    body = {"model": "pocket", "prompt": PROMPT, "echo": True, "logprobs": 1, "temperature": 0}
    response = post(server, "/v1/completions", body | {"max_tokens": max_tokens, "stream": stream})
    choices = [e["choices"][0] for e in events_of(response)] if stream else response.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    assert text == PROMPT + (want.text if max_tokens else "")
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    tops = [value for choice in choices for value in choice["logprobs"]["top_logprobs"]]
    offsets = [value for choice in choices for value in choice["logprobs"]["text_offset"]]
    tokens = [value for choice in choices for value in choice["logprobs"]["tokens"]]
    assert len(logprobs) == len(want.prompt_ids) + max_tokens
    assert logprobs[0] is None and tops[0] is None
    scores = [top[i] for top, i in zip(want.prompt_logprobs[1:], want.prompt_ids[1:])]
    scores += [top[i] for top, i in zip(want.logprobs, want.token_ids)][:max_tokens]
    assert logprobs[1:] == pytest.approx(scores, abs=1e-4)
    # The first token is BOS, which is not part of the text.
    assert "".join(tokens[1:]) == text
    assert offsets == [0, *(len("".join(tokens[1:i])) for i in range(1, len(tokens)))]


def test_a_stream_adds_up_to_the_whole_answer(client):
    asked = dict(model="pocket", prompt=[PROMPT, "A:"], max_tokens=11, n=2, seed=1, logprobs=1)
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert [x for each in mine for x in each.logprobs.text_offset] == choice.logprobs.text_offset
        assert [x for each in mine for x in each.logprobs.tokens] == choice.logprobs.tokens


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason_and_DONE(server, client):
    body = {"model": "pocket", "messages": CHAT, "max_tokens": 6, "temperature": 0, "n": 2, "stream": True}
    response = post(server, "/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert all("usage" not in event for event in events)
    whole = client.chat.completions.create(model="pocket", messages=CHAT, max_tokens=6, temperature=0, n=2)
    for index in range(2):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(each["delta"]) <= {"content"} for each in mine[1:])
        assert "".join(each["delta"].get("content", "") for each in mine) == whole.choices[index].message.content
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + ["length"]


def test_characters_of_several_bytes_arrive_whole(server, client, alone):
    """Tokens that are parts of characters, in an order that only sampling would produce."""
    tokenizer = alone.engine.tokenizer
    ids = tokenizer("日本語 é 🙂", add_special_tokens=False).input_ids
    done = client.completions.create(model="pocket", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert done.choices[0].text == "日本語 é 🙂"
    assert any(token.startswith("bytes:\\x") for token in done.choices[0].logprobs.tokens)
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model="pocket", prompt="🙂", max_tokens=40, temperature=2, seed=8, stream=True)
    )
    whole = client.completions.create(model="pocket", prompt="🙂", max_tokens=40, temperature=2, seed=8)
    assert text == whole.choices[0].text


def test_a_chat_is_the_template_around_the_messages(client, alone, chapter):
    engine = alone.engine
    text_module = importlib.import_module(f"milestones.{chapter.name}.text")
    ids = text_module.encode_chat(engine.tokenizer, CHAT)
    [want] = alone([ids], max_tokens=40)
    done = client.chat.completions.create(model="pocket", messages=CHAT, max_tokens=40, temperature=0)
    [choice] = done.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", want.text, want.finish_reason)
    assert done.usage.prompt_tokens == len(ids)
    # The end token is counted, because it was generated.
    assert done.usage.completion_tokens == len(want.token_ids)
    begin = engine.tokenizer.bos_token_id
    assert ids.count(begin) == 1


def test_a_conversation_that_the_template_refuses_is_the_callers(chapter):
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=2, max_model_len=64)
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with serving(chapter, engine) as server:
        answer = post(server, "/v1/chat/completions", {"model": "pocket", "messages": CHAT})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "messages"
    assert error["message"] == "the checkpoint's chat template rejects these messages: roles must alternate"


def test_parts_and_a_developer_are_what_templates_know_as_text_and_system(client):
    plain = [{"role": "system", "content": "Be brief."}, *CHAT]
    fancy = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " a KV cache?"}]},
    ]
    done = [client.chat.completions.create(model="pocket", messages=m, max_tokens=9, temperature=0) for m in (plain, fancy)]
    assert done[0].choices[0].message.content == done[1].choices[0].message.content
    assert counts(done[0].usage) == counts(done[1].usage)


def test_chat_logprobs_have_bytes_and_the_likeliest_in_order(client):
    asked = dict(model="pocket", messages=CHAT, max_tokens=40, temperature=0.9, seed=3, logprobs=True, top_logprobs=3)
    [choice] = client.chat.completions.create(**asked).choices
    content = choice.logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert sorted(entry.top_logprobs, key=lambda top: -top.logprob) == entry.top_logprobs
        assert entry.logprob <= entry.top_logprobs[0].logprob
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    [bare] = client.chat.completions.create(model="pocket", messages=CHAT, max_tokens=2, logprobs=True).choices
    assert bare.logprobs.content[0].top_logprobs == []


def test_a_chat_without_max_tokens_may_use_the_rest_of_the_context(client):
    done = client.chat.completions.create(model="pocket", messages=CHAT, temperature=0, extra_body={"ignore_eos": True})
    assert done.usage.total_tokens == 256 and done.choices[0].finish_reason == "length"


def test_an_error_about_the_length_names_the_parameter_that_was_sent(chapter, server):
    chats = [("/v1/chat/completions", {"messages": CHAT}, name) for name in ("max_tokens", "max_completion_tokens")]
    others = [("/v1/completions", {"prompt": "x"}, "max_tokens")]
    if "responses" in chapter.capabilities:
        others.append(("/v1/responses", {"input": "x"}, "max_output_tokens"))
    for path, body, name in (*chats, *others):
        error = post(server, path, {"model": "pocket", name: 100_000} | body).json()["error"]
        assert f" {name} is 100000," in error["message"] and error["message"].endswith(f"shorten the prompt or lower {name}"), error


@pytest.mark.parametrize("wrong", [{"prompt": [3, 10**9]}, {"prompt": PROMPT, "max_tokens": 600}])
def test_what_the_engine_refuses_is_a_400_too(server, wrong):
    assert_names(post(server, "/v1/completions", {"model": "pocket", "max_tokens": 1} | wrong), "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_keeps_its_first_space_and_a_chats_answer_has_none(chapter, make_engine, module, stream):
    """Where the tokenizer drops the space of the first token that it decodes, as Llama 2's does."""
    engine, params = make_engine("mistral"), chapter.load().SamplingParams(max_tokens=2, ignore_eos=True)
    encode, tokenizer = module("text").encode_chat, engine.tokenizer
    prompts = [str(i) for i in range(60)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]

    def first_with_a_space(all_ids):
        """The first prompt that the model continues with a space and a word: its index and the tokens."""
        for i, done in enumerate(engine.generate(all_ids, params)):
            if tokenizer.convert_ids_to_tokens(done.token_ids)[0].startswith("▁") and "\ufffd" not in done.text:
                return i, done.token_ids

    i, completed = first_with_a_space([tokenizer(prompt).input_ids for prompt in prompts])
    j, answered = first_with_a_space([encode(tokenizer, chat) for chat in chats])
    # `serving` calls every model pocket.
    body = {"model": "pocket", "temperature": 0, "max_tokens": 2, "ignore_eos": True, "stream": stream}
    with serving(chapter, engine) as server:

        def choices_of(path, **asked):
            response = post(server, path, body | asked)
            return [e["choices"][0] for e in events_of(response)] if stream else response.json()["choices"]

        echoed = choices_of("/v1/completions", prompt=prompts[i], echo=True)
        said = choices_of("/v1/chat/completions", messages=chats[j])
    want = tokenizer.decode(tokenizer(prompts[i]).input_ids + completed, skip_special_tokens=True)
    assert "".join(choice["text"] for choice in echoed) == want and want[len(prompts[i])] == " "
    answer = "".join(choice["delta" if stream else "message"].get("content", "") for choice in said)
    assert answer == tokenizer.decode(answered, skip_special_tokens=True) and not answer.startswith(" ")


def llama_2s_normalizer(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def tokenizers_with_their_ways():
    """For each: a checkpoint with a vocabulary of that size, and a function that creates it."""
    from tokenizers import pre_tokenizers, processors

    from shared.checkpoints import make_tokenizer

    def trimming():
        tokenizer = make_tokenizer("byte_level")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return tokenizer

    yield "pocket", lambda: make_tokenizer("byte_level")
    yield pytest.param("pocket", trimming, marks=pytest.mark.whole)
    yield pytest.param("mistral", lambda: make_tokenizer("metaspace"), marks=pytest.mark.whole)
    yield "mistral", lambda: llama_2s_normalizer(make_tokenizer("metaspace"))


@pytest.mark.parametrize(("name", "make"), list(tokenizers_with_their_ways()))
def test_the_text_at_a_tokens_offset_begins_with_it(chapter, make_engine, monkeypatch, name, make):
    engine, tokenizer = make_engine(name), make()
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    said = tokenizer("\n\nThe 🙂 é cat the</s> cache\n", add_special_tokens=False).input_ids
    eos, specials = tokenizer.eos_token, {*tokenizer.all_special_tokens}
    prompts = ["The cache", f"a{eos}b", f"{eos} the 🙂", "é\n日", " two  spaces"]
    prompts += ["the cache\n\n", [9], tokenizer(f"a{eos}{eos}b").input_ids, tokenizer("é").input_ids[:-1], tokenizer(f"日 the{eos}").input_ids]
    words = iter([])

    def choose(_hidden, draws):
        ids = [seq.token_ids[at] if seq.knows(at) else next(words) for seq, at in draws]
        return ids, [{token_id: -0.5} for token_id in ids]

    monkeypatch.setattr(engine, "choose_tokens", choose)
    with serving(chapter, engine) as server:
        for prompt, echo, stop in itertools.product(prompts, [False, True], [[], ["he c"]]):
            body = {"model": "pocket", "max_tokens": len(said), "ignore_eos": True, "prompt": prompt, "echo": echo, "stop": stop, "logprobs": 0}
            found = []
            for stream in (False, True):
                words = iter(said)
                response = post(server, "/v1/completions", body | {"stream": stream})
                choices = [e["choices"][0] for e in events_of(response)] if stream else response.json()["choices"]
                text = "".join(choice["text"] for choice in choices)
                places = [pair for c in choices for pair in zip(c["logprobs"]["tokens"], c["logprobs"]["text_offset"])]
                found.append((text, places))
            assert found[0] == found[1]
            assert [at for _, at in places] == sorted(at for _, at in places) and places
            for token, at in places:
                if token.startswith("bytes:") or (token in specials and not text[at:].startswith(token)):
                    continue
                # Tokenizers like Llama 2's add a space before a text and after special tokens, and drop the first again.
                is_added = name == "mistral" and (at == 0 or text[:at].endswith(eos))
                spelled = token.removeprefix(" ") if is_added and not text[at:].startswith(" ") else token
                is_cut = stop and spelled.startswith(text[at:])
                assert is_cut or text[at:].startswith(spelled), (prompt, echo, stop, token, at, text)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_the_answer_and_is_not_in_it(client, alone, ignore_eos):
    [whole] = alone([PROMPT], max_tokens=12)
    at = next(i for i in range(3, 12) if whole.token_ids[i] not in whole.token_ids[:i])
    more = {"stop_token_ids": [whole.token_ids[at]], "ignore_eos": ignore_eos, "top_k": -1}
    done = client.completions.create(model="pocket", prompt=PROMPT, max_tokens=12, temperature=0, extra_body=more)
    want = alone.engine.tokenizer.decode(whole.prompt_ids + whole.token_ids[:at], skip_special_tokens=True)
    assert PROMPT + done.choices[0].text == want and done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens == at + 1
    with pytest.raises(openai.BadRequestError, match="stop_token_ids"):
        client.completions.create(model="pocket", prompt=PROMPT, extra_body={"stop_token_ids": [10**6]})
