"""The service as OpenAI's own client sees it, over a real socket."""
import importlib
import json
import math
import typing

import httpx
import openai
import pydantic
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from shared.checkpoints import checkpoint
from shared.verify.serving import serving
from shared.verify.soak_server import crowd

pytestmark = pytest.mark.needs("serve")

CHAT = [{"role": "user", "content": "What is a KV cache?"}]
PROMPT = "Once upon a time"


@pytest.fixture(scope="session")
def server(chapter):
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=512)
    with serving(chapter, engine) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def alone(chapter):
    """What the engine says without a server: text, tokens, reason."""
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=512)

    def alone(prompts, **params):
        return engine.generate(prompts, chapter.load().SamplingParams(**params))

    alone.engine = engine
    return alone


def post(server, path, body, **options):
    content = {"json": body} if isinstance(body, (dict, list)) else {"content": body}
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{server.url}{path}", headers=headers, timeout=30, **content, **options)


def events_of(response):
    """The JSON of each event of a stream; its last one must be [DONE]."""
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


# ---- completions


def test_a_completion_is_what_the_engine_says(client, alone):
    [want] = alone([PROMPT], max_tokens=9)
    done = client.completions.create(model="pocket", prompt=PROMPT, max_tokens=9, temperature=0)
    [choice] = done.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (want.text, "length", 0, None)
    num_prompt = len(want.prompt_ids)
    assert done.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 9,
        "total_tokens": num_prompt + 9,
    }
    assert done.object == "text_completion" and done.model == "pocket" and done.id.startswith("cmpl-")


def test_who_names_no_max_tokens_gets_16(client):
    assert client.completions.create(model="pocket", prompt=PROMPT, temperature=0).usage.completion_tokens == 16


def test_a_prompt_is_a_text_its_tokens_or_a_list_of_either(client, alone):
    texts = [PROMPT, "Rosa was a hare"]
    wanted = alone(texts, max_tokens=6)
    ids = [want.prompt_ids for want in wanted]
    for prompt, count in ((texts[0], 1), (ids[0], 1), (texts, 2), (ids, 2)):
        done = client.completions.create(model="pocket", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in done.choices] == [want.text for want in wanted[:count]]
        assert [choice.index for choice in done.choices] == list(range(count))
        assert done.usage.prompt_tokens == sum(len(want.prompt_ids) for want in wanted[:count])


def test_n_answers_each_with_its_own_die_and_the_first_as_without_n(client, alone, chapter):
    texts = [PROMPT, "A story:"]
    done = client.completions.create(model="pocket", prompt=texts, max_tokens=8, n=3, seed=4, temperature=1.2)
    assert [choice.index for choice in done.choices] == list(range(6))
    params = chapter.load().SamplingParams(max_tokens=8, seed=4, temperature=1.2)
    choices = importlib.import_module(f"milestones.{chapter.name}.sampling").choices
    wanted = [alone.engine.generate([text], choice)[0] for text in texts for choice in choices(params, 3)]
    assert [choice.text for choice in done.choices] == [want.text for want in wanted]
    assert done.usage.completion_tokens == sum(len(want.token_ids) for want in wanted)
    plain = alone(texts, max_tokens=8, seed=4, temperature=1.2)
    assert [done.choices[0].text, done.choices[3].text] == [want.text for want in plain]
    assert len({choice.text for choice in done.choices}) > 3
    again = client.completions.create(model="pocket", prompt=texts, max_tokens=8, n=3, seed=4, temperature=1.2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in done.choices]


def test_top_p_of_zero_is_the_likeliest_token(client, alone):
    [want] = alone([PROMPT], max_tokens=6)
    done = client.completions.create(model="pocket", prompt=PROMPT, max_tokens=6, top_p=0)
    assert done.choices[0].text == want.text


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
    # The first token is the BOS, which is no part of the text.
    assert "".join(tokens[1:]) == text
    assert offsets == [0, *(len("".join(tokens[1:i])) for i in range(1, len(tokens)))]


# ---- streams


def test_a_stream_says_what_the_whole_says(client):
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
    """Tokens that are parts of characters, in an order that only a seed would bring about."""
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


# ---- chat


def test_a_chat_is_the_template_around_the_messages(client, alone, chapter):
    engine = alone.engine
    text_module = importlib.import_module(f"milestones.{chapter.name}.text")
    ids = text_module.encode_chat(engine.tokenizer, CHAT)
    [want] = alone([ids], max_tokens=40)
    done = client.chat.completions.create(model="pocket", messages=CHAT, max_tokens=40, temperature=0)
    [choice] = done.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", want.text, want.finish_reason)
    assert done.usage.prompt_tokens == len(ids)
    # The end token is counted, as it was computed.
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
    assert error["message"] == "the checkpoint's chat template refuses these messages: roles must alternate"


def test_parts_and_a_developer_are_what_templates_know_as_text_and_system(client):
    plain = [{"role": "system", "content": "Be brief."}, *CHAT]
    fancy = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " a KV cache?"}]},
    ]
    done = [client.chat.completions.create(model="pocket", messages=m, max_tokens=9, temperature=0) for m in (plain, fancy)]
    assert done[0].choices[0].message.content == done[1].choices[0].message.content
    assert done[0].usage == done[1].usage


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


def test_who_names_no_max_tokens_in_chat_gets_what_there_is_room_for(client):
    done = client.chat.completions.create(model="pocket", messages=CHAT, temperature=0, extra_body={"ignore_eos": True})
    assert done.usage.total_tokens == 512 and done.choices[0].finish_reason == "length"


# ---- models, keys, refusals


def test_models_are_listed_and_an_unknown_one_is_404(client):
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").object == "model"
    for call in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt="x"),
        lambda: client.chat.completions.create(model="gpt-4", messages=CHAT),
        lambda: client.responses.create(model="gpt-4", input="x"),
    ):
        with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here") as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_with_a_key_nobody_without_it_gets_in(chapter, alone):
    with serving(chapter, alone.engine, api_key="s3cret") as server:
        invitation = importlib.import_module(f"milestones.{chapter.name}.server").invitation(server.url, server.service)
        assert "Bearer $API_KEY" in invitation and "s3cret" not in invitation
        for key in ("wrong", "s3cret2", ""):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret") as client:
            assert client.models.list().data[0].id == "pocket"


ENDPOINTS = {
    "/v1/completions": ("CompletionRequest", {"prompt": PROMPT, "max_tokens": 1}, completion_create_params.CompletionCreateParamsBase),
    "/v1/chat/completions": ("ChatRequest", {"messages": CHAT, "max_tokens": 1}, chat_create_params.CompletionCreateParamsBase),
    "/v1/responses": ("ResponseRequest", {"input": "Hi", "max_output_tokens": 1}, response_create_params.ResponseCreateParamsBase),
}


def request_model(chapter, path):
    where = "responses" if path.endswith("responses") else "protocol"
    return getattr(importlib.import_module(f"milestones.{chapter.name}.{where}"), ENDPOINTS[path][0])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_parameter_that_the_official_client_knows_works_or_is_refused(chapter, path):
    """None falls through to the fields that nobody documents, which are ignored."""
    model = request_model(chapter, path)
    documented = set(typing.get_type_hints(ENDPOINTS[path][2])) | {"stream"}
    assert documented <= set(model.model_fields) | set(model.refused)
    assert not set(model.model_fields) & set(model.refused)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_refused_parameter_is_named_and_its_inert_values_are_let_through(server, chapter, path):
    base = {"model": "pocket"} | ENDPOINTS[path][1]
    inert = {}
    for name, values in request_model(chapter, path).refused.items():
        response = post(server, path, base | {name: ["something"]})
        assert response.status_code == 400 and response.json()["error"]["param"] == name, name
        inert |= {name: values[-1] if values else None}
    everything = base | inert | {"a_field_of_nobodys": {"x": 1}, "temperature": None, "user": None, "seed": None}
    assert post(server, path, everything).status_code == 200


BAD = [
    ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": ["x", ""]}, "prompt"),
    ("/v1/completions", {"prompt": [3, -1]}, "prompt"),
    ("/v1/completions", {"prompt": [3, 10**9]}, "prompt"),
    ("/v1/completions", {"prompt": [3, 2**40], "echo": True}, "prompt"),
    ("/v1/completions", {"n": 128, "prompt": ["x", "y", "z"]}, "n"),
    ("/v1/completions", {"prompt": None}, "prompt"),
    ("/v1/completions", {"prompt": "x " * 600}, "prompt"),
    ("/v1/completions", {"max_tokens": 600}, "prompt"),
    ("/v1/completions", {"max_tokens": -1}, "max_tokens"),
    ("/v1/completions", {"max_tokens": 1.5}, "max_tokens"),
    ("/v1/completions", {"max_tokens": "7"}, "max_tokens"),
    ("/v1/completions", {"temperature": 2.1}, "temperature"),
    ("/v1/completions", {"temperature": -0.1}, "temperature"),
    ("/v1/completions", {"temperature": 1e-35}, "temperature"),
    ("/v1/completions", {"temperature": "hot"}, "temperature"),
    ("/v1/completions", {"temperature": True}, "temperature"),
    ("/v1/completions", {"top_p": 1.1}, "top_p"),
    ("/v1/completions", {"n": 0}, "n"),
    ("/v1/completions", {"n": 129}, "n"),
    ("/v1/completions", {"n": True}, "n"),
    ("/v1/completions", {"best_of": 2}, "best_of"),
    ("/v1/completions", {"logprobs": 6}, "logprobs"),
    ("/v1/completions", {"logprobs": True}, "logprobs"),
    ("/v1/completions", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ("/v1/completions", {"stop": ""}, "stop"),
    ("/v1/completions", {"stop": [3]}, "stop"),
    ("/v1/completions", {"seed": 2**63}, "seed"),
    ("/v1/completions", {"seed": "x"}, "seed"),
    ("/v1/completions", {"stream": "yes"}, "stream"),
    ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", {"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
    ("/v1/completions", {"echo": 1}, "echo"),
    ("/v1/completions", {"prompt": ["x"] * 300}, "prompt"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": "hi"}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [CHAT[0], {"role": "wizard", "content": "x"}]}, "messages[1].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 600}]}, "messages"),
    ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
    ("/v1/chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ("/v1/responses", {"input": ""}, "input"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ("/v1/responses", {"max_output_tokens": 0}, "max_output_tokens"),
    ("/v1/responses", {"include": ["file_search_call.results"]}, "include[0]"),
    ("/v1/responses", {"top_logprobs": 3}, "top_logprobs"),
    ("/v1/responses", {"background": True, "stream": True}, "background"),
    ("/v1/responses", {"background": True, "store": False}, "background"),
    ("/v1/responses", {"previous_response_id": "resp_nobody"}, "previous_response_id"),
    ("/v1/responses", {"metadata": {"k": 3}}, "metadata"),
    ("/v1/responses", {"metadata": {"k" * 65: "v"}}, "metadata"),
    ("/v1/responses", {"metadata": {"k": "v" * 513}}, "metadata"),
]


@pytest.mark.parametrize(("path", "wrong", "param"), BAD)
def test_a_wrong_value_is_a_400_that_names_it(server, path, wrong, param):
    body = {"model": "pocket"} | ENDPOINTS[path][1] | wrong
    response = post(server, path, {name: value for name, value in body.items() if value is not None or name == "prompt"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param.split(".")[0] and error["param"].startswith(param)
    assert param.split("[")[0] in error["message"] or param == "messages"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"model": ', "not valid JSON"),
        (b"", "the body"),
        (b"[]", "the body"),
        (b"null", "the body"),
        (b'"text"', "the body"),
        (b'{"model": "pocket", "prompt": "\xff\xfe"}', "cannot be read"),
        (b'{"model": "pocket", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "pocket", "prompt": "x", "temperature": Infinity}', "temperature"),
        (b'{"model": "pocket", "prompt": "\\ud800"}', "prompt holds half a surrogate pair"),
        (b'{"model": "\\ud800", "prompt": "x"}', "model holds half a surrogate pair"),
        (b"[" * 100_000, ""),
        (b'{"model": "pocket", "prompt": "x", "seed": ' + b"1" * 5000 + b"}", "value has 5000 digits"),
        (b'{"prompt": "x"}', "model"),
    ],
)
def test_what_is_no_request_is_a_400_in_openais_body(server, content, says):
    for path in ENDPOINTS:
        response = post(server, path, content)
        assert response.status_code == 400, response.text
        assert says in response.json()["error"]["message"] or path != "/v1/completions"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("APPLICATION/JSON", 200),
        ("application/vnd.api+json", 200),
        ("application/jsonx", 400),
        ("text/plain", 400),
        ("", 400),
    ],
)
def test_a_body_that_is_not_called_json_is_refused_as_that(server, content_type, status):
    response = post(server, "/v1/completions", {"model": "pocket", "prompt": "Hi", "max_tokens": 1}, headers={"content-type": content_type})
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["message"] == "the body is not JSON; send Content-Type: application/json"


def test_half_a_character_is_refused_where_it_would_be_said_back_and_ignored_where_the_field_is(server):
    raw = b'{"model": "pocket", "input": "x", "max_output_tokens": 1, "%s": {"\\ud800": ""}}'
    response = post(server, "/v1/responses", raw % b"metadata")
    assert response.status_code == 400 and response.json()["error"]["param"] == "metadata"
    assert post(server, "/v1/responses", raw % b"nobodys").status_code == 200


def test_other_paths_and_methods_have_the_same_body(server):
    for response, status in (
        (httpx.get(f"{server.url}/v1/nothing"), 404),
        (httpx.get(f"{server.url}/nothing"), 404),
        (httpx.get(f"{server.url}/v1/completions"), 405),
        (httpx.delete(f"{server.url}/v1/models"), 405),
        (httpx.get(f"{server.url}/v1/responses/resp_nobody"), 404),
        (httpx.post(f"{server.url}/v1/responses/resp_nobody/cancel"), 404),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_nested_to_any_depth_is_a_400_or_an_answer(server):
    for depth in range(900, 1000, 3):
        raw = b'{"model": "pocket", "prompt": "a", "max_tokens": 1, "xx": ' + b"[" * depth + b"]" * depth + b"}"
        assert post(server, "/v1/completions", raw).status_code in (200, 400), depth


def test_a_million_wrong_items_are_one_complaint(server):
    """And a text that is too long is refused before it is tokenized."""
    many = b'{"model": "pocket", "prompt": [' + b"-1," * 1_000_000 + b"5]}"
    assert len(post(server, "/v1/completions", many).json()["error"]["message"]) < 500
    response = post(server, "/v1/completions", {"model": "pocket", "prompt": "hello wor " * 300_000})
    assert response.status_code == 400 and "3000000 bytes, too many for max_model_len = 512" in response.text
    turn = {"role": "user", "content": "hello wor " * 300_000}
    for path, name, value in (("/v1/chat/completions", "messages", [turn]), ("/v1/responses", "input", turn["content"])):
        error = post(server, path, {"model": "pocket", name: value}).json()["error"]
        assert (error["param"], error["code"]) == (name, "context_length_exceeded")
        assert "3000000 bytes, too many" in error["message"]
    response = post(server, "/v1/completions", {"model": "pocket", "prompt": [5] * 1_000_000})
    assert response.status_code == 400 and "prompt has 1000000 tokens, more than max_model_len = 512" in response.text


def test_a_list_of_wrong_items_is_one_complaint(chapter):
    with pytest.raises(pydantic.ValidationError) as caught:
        request_model(chapter, "/v1/responses").model_validate({"model": "pocket", "input": "a", "include": [1] * 1000})
    assert len(caught.value.errors()) == 1


def test_nulls_within_values_are_nulls(server):
    inert = {
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": {"type": "text"}, "verbosity": None},
        "stream_options": {"include_obfuscation": None},
    }
    assert post(server, "/v1/responses", {"model": "pocket", "input": "Hi", "max_output_tokens": 1} | inert).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413(server, chunked):
    body = b'{"model": "pocket", "prompt": "' + b"x" * (5 * 2**20) + b'"}'
    content = (body[i : i + 2**20] for i in range(0, len(body), 2**20)) if chunked else body
    response = post(server, "/v1/completions", content)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_the_api_page_shows_what_works_and_nothing_that_is_refused(server, chapter):
    schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    for path in ENDPOINTS:
        model = request_model(chapter, path)
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
    assert "swagger" in httpx.get(f"{server.url}/docs").text


# ---- many at once


def test_16_streams_at_once_say_what_each_says_alone(chapter, alone):
    assert crowd(chapter, alone.engine, 16) > 100


# ---- responses


def test_a_response_answers_and_is_remembered(client, alone):
    done = client.responses.create(model="pocket", input="What is a KV cache?", temperature=0, metadata={"k": "v"})
    chat = client.chat.completions.create(model="pocket", messages=CHAT, temperature=0)
    assert done.output_text == chat.choices[0].message.content
    assert (done.status, done.error, done.incomplete_details, done.metadata) == ("completed", None, None, {"k": "v"})
    assert done.usage.total_tokens == chat.usage.total_tokens and done.id.startswith("resp_")
    assert client.responses.retrieve(done.id).to_dict() == done.to_dict()
    with pytest.raises(openai.BadRequestError, match="a stored response is not streamed again; leave stream out"):
        client.responses.retrieve(done.id, extra_query={"stream": "true"})


def test_a_response_goes_on_from_another(client):
    first = client.responses.create(model="pocket", input="Hi", instructions="Be brief.", temperature=0, max_output_tokens=7)
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first.output_text}, *CHAT]
    chained = client.responses.create(
        model="pocket", input="What is a KV cache?", previous_response_id=first.id, temperature=0, max_output_tokens=9
    )
    # The client may as well send the output back as it got it.
    resent = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, *first.to_dict()["output"], *CHAT]
    resent[1] = {name: resent[1][name] for name in ("role", "content", "type")}
    whole = [client.responses.create(model="pocket", input=each, temperature=0, max_output_tokens=9) for each in (turns, resent)]
    assert [each.output_text for each in whole] == [chained.output_text] * 2
    assert [each.usage.input_tokens for each in whole] == [chained.usage.input_tokens] * 2
    assert chained.previous_response_id == first.id
    forgotten = client.responses.create(model="pocket", input="Hi", store=False, max_output_tokens=1)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(forgotten.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="pocket", input="Hi", previous_response_id=forgotten.id)


def test_a_response_streams_its_events_in_order(client):
    asked = dict(
        model="pocket", input=CHAT, temperature=0, max_output_tokens=6, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-1].response.output_text
    assert [entry.token for event in deltas for entry in event.logprobs] == [
        entry.token for entry in whole.output[0].content[0].logprobs
    ]
    assert all(math.isfinite(entry.logprob) and len(entry.top_logprobs) == 2 for entry in whole.output[0].content[0].logprobs)
    assert events[-1].response.usage == whole.usage


def test_a_response_in_the_background_is_polled(client):
    begun = client.responses.create(model="pocket", input="Hi", background=True, max_output_tokens=3)
    assert begun.status in ("queued", "in_progress")
    while (now := client.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
        pass
    assert now.status in ("completed", "incomplete") and now.output_text
    plain = client.responses.create(model="pocket", input="Hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(plain.id)
