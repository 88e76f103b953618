"""The service's protocol, tested without a model: the engine behind it computes nothing."""
import gzip
import http.client
import importlib
import json
import socket
import time
import tomllib
import typing
from importlib.util import find_spec

import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from transformers import AutoTokenizer

from shared.chapters import ROOT
from shared.checkpoints import POCKET
from shared.verify.serving import serving
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP, assert_names, post

pytestmark = pytest.mark.needs("openai")

CHAT = [{"role": "user", "content": "What is a KV cache?"}]
PROMPT = "Once upon a time"


@pytest.fixture(scope="session")
def fake(chapter):
    return FakeEngine(chapter, AutoTokenizer.from_pretrained(POCKET), max_model_len=512)


@pytest.fixture(scope="session")
def server(chapter, fake, engine_way):
    with serving(chapter, fake) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ---- models, keys, refusals


def test_models_are_listed_and_an_unknown_one_is_404(client):
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").object == "model"
    for call in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt="x"),
        lambda: client.chat.completions.create(model="gpt-4", messages=CHAT),
    ):
        with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here") as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_with_keys_a_request_without_one_is_refused(chapter, fake):
    with serving(chapter, fake, api_keys=("s3cret", "an0ther")) as server:
        invitation = importlib.import_module(f"milestones.{chapter.name}.process").invitation(server.url, server.service)
        assert "Bearer $API_KEY" in invitation and "s3cret" not in invitation and "an0ther" not in invitation
        for key in ("wrong", "s3cret2", ""):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = HTTP.get(f"{server.url}/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        # Every path that costs something needs a key; no other does.
        assert post(server, "/tokenize", {"prompt": "x"}).status_code == 401
        assert post(server, "/detokenize", {"tokens": [20]}).status_code == 401
        for path in ("/health", "/version", "/docs", "/openapi.json"):
            assert HTTP.get(f"{server.url}{path}").status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        for key in ("s3cret", "an0ther"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
                assert client.models.list().data[0].id == "pocket"


ENDPOINTS = {
    "/v1/completions": ("CompletionRequest", {"prompt": PROMPT, "max_tokens": 1}, completion_create_params.CompletionCreateParamsBase),
    "/v1/chat/completions": ("ChatRequest", {"messages": CHAT, "max_tokens": 1}, chat_create_params.CompletionCreateParamsBase),
}


def request_model(chapter, path):
    return getattr(importlib.import_module(f"milestones.{chapter.name}.protocol"), ENDPOINTS[path][0])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_parameter_that_the_official_client_knows_works_or_is_refused(chapter, path):
    """None is ignored, as undocumented fields are."""
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
    ("/v1/completions", {"prompt": [3, 2**40], "echo": True}, "prompt"),
    ("/v1/completions", {"n": 128, "prompt": ["x", "y", "z"]}, "n"),
    ("/v1/completions", {"prompt": None}, "prompt"),
    ("/v1/completions", {"prompt": "x " * 600}, "prompt"),
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
    ("/v1/completions", {"stop": [3]}, "stop[0]"),
    ("/v1/completions", {"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ("/v1/completions", {"top_k": -2}, "top_k"),
    ("/v1/completions", {"seed": 2**63}, "seed"),
    ("/v1/completions", {"seed": "x"}, "seed"),
    ("/v1/completions", {"stream": "yes"}, "stream"),
    ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ("/v1/completions", {"echo": 1}, "echo"),
    ("/v1/completions", {"prompt": ["x"] * 300}, "prompt"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": "hi"}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [CHAT[0], {"role": "wizard", "content": "x"}]}, "messages[1].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 600}]}, "messages"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[1]",
    ),
    ("/v1/chat/completions", {"metadata": {"k": 1}}, "metadata.k"),
    ("/v1/chat/completions", {"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ("/v1/chat/completions", {"metadata": {str(i): 1 for i in range(20_000)}}, "metadata"),
    ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
    ("/v1/chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
]


@pytest.mark.parametrize(("path", "wrong", "param"), BAD)
def test_a_wrong_value_is_a_400_that_names_it(server, path, wrong, param):
    body = {"model": "pocket"} | ENDPOINTS[path][1] | wrong
    response = post(server, path, {name: value for name, value in body.items() if value is not None or name == "prompt"})
    assert_names(response, param)


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


def test_half_a_character_is_refused_where_it_would_be_used_and_ignored_where_the_field_is(server):
    raw = b'{"model": "pocket", "messages": [{"role": "user", "content": "x", "name": "\\ud800"}], "max_tokens": 1}'
    response = post(server, "/v1/chat/completions", raw)
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
    raw = b'{"model": "pocket", "prompt": "x", "max_tokens": 1, "nobodys": {"\\ud800": ""}}'
    assert post(server, "/v1/completions", raw).status_code == 200


def test_other_paths_and_methods_have_the_same_body(server):
    for response, status in (
        (HTTP.get(f"{server.url}/v1/nothing"), 404),
        (HTTP.post(f"{server.url}/v1/completions/", json={}), 404),
        (HTTP.get(f"{server.url}/nothing"), 404),
        (HTTP.get(f"{server.url}/v1/completions"), 405),
        (HTTP.delete(f"{server.url}/v1/models"), 405),
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
    messages = [{"role": "user", "content": "hello wor " * 300_000}]
    error = post(server, "/v1/chat/completions", {"model": "pocket", "messages": messages}).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "bytes, too many" in error["message"]
    response = post(server, "/v1/completions", {"model": "pocket", "prompt": [5] * 1_000_000})
    assert response.status_code == 400 and "prompt has 1000000 tokens, more than max_model_len = 512" in response.text


TURN = {"role": "user", "content": "x"}
PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [TURN] * 5_000}, "messages"),
        ("/v1/chat/completions", {"messages": [TURN | {"content": [PART] * 5_000}]}, "messages"),
        ("/v1/chat/completions", {"messages": [TURN | {"content": [PART] * 500}] * 10}, "messages"),
        ("/v1/completions", {"prompt": ["x"] * 5_000}, "prompt"),
        ("/tokenize", {"messages": [TURN] * 5_000}, "messages"),
    ],
)
def test_items_are_counted_before_they_are_validated(server, chapter, path, body, param, monkeypatch):
    protocol = importlib.import_module(f"milestones.{chapter.name}.protocol")
    monkeypatch.setattr(protocol.Strict, "refuse", None)  # of a message, or a part
    error = assert_names(post(server, path, {"model": "pocket"} | body), param)
    assert "but a body has at most 4096; send fewer" in error["message"]


def test_a_conversation_of_the_most_turns_allowed_is_read_quickly(chapter):
    """It runs on the event loop, so all streams wait for it."""
    protocol = importlib.import_module(f"milestones.{chapter.name}.protocol")
    raw = json.dumps({"model": "pocket", "messages": [TURN] * protocol.MAX_ITEMS})
    times = []
    for _ in range(5):
        begun = time.thread_time()
        protocol.ChatRequest.model_validate(json.loads(raw))
        times.append(time.thread_time() - begun)
    assert min(times) < 0.1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413(server, chunked):
    body = b'{"model": "pocket", "prompt": "' + b"x" * (5 * 2**20) + b'"}'
    content = (body[i : i + 2**20] for i in range(0, len(body), 2**20)) if chunked else body
    response = post(server, "/v1/completions", content)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_a_client_that_reads_once_it_has_sent_everything_is_told_that_its_body_is_too_large(server):
    """Python's own client does. If the server closed its connection at once, the rest of the body would reset it."""
    for num_bytes in (5 * 2**20, 20 * 2**20):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        connection.request("POST", "/v1/completions", b"x" * num_bytes, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()


def test_the_api_page_shows_what_works_and_nothing_that_is_refused(server, chapter):
    schemas = HTTP.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    for path in ENDPOINTS:
        model = request_model(chapter, path)
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
    assert {"TokenizeRequest", "DetokenizeRequest"} <= set(schemas)
    assert "swagger" in HTTP.get(f"{server.url}/docs").text


# ---- what vLLM has beyond OpenAI's API


def test_tokenize_and_detokenize_are_inverses(server, fake):
    tokenizer = fake.tokenizer
    ids = tokenizer("Once upon a time").input_ids
    said = post(server, "/tokenize", {"model": "pocket", "prompt": "Once upon a time"}).json()
    assert said == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    bare = post(server, "/tokenize", {"prompt": "Once upon a time", "add_special_tokens": False, "return_token_strs": True}).json()
    assert bare["tokens"] == ids[1:] and bare["token_strs"] == tokenizer.convert_ids_to_tokens(ids[1:])
    assert post(server, "/detokenize", {"tokens": bare["tokens"]}).json() == {"prompt": "Once upon a time"}
    assert post(server, "/detokenize", {"tokens": ids}).json() == {"prompt": tokenizer.decode(ids)}
    assert post(server, "/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert post(server, "/tokenize", {"prompt": ""}).json()["tokens"] == tokenizer("").input_ids


def test_a_conversation_is_tokenized_as_chat_does_it(server, fake, chapter):
    text = importlib.import_module(f"milestones.{chapter.name}.text")
    said = post(server, "/tokenize", {"messages": CHAT}).json()
    assert said["tokens"] == text.encode_chat(fake.tokenizer, CHAT)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": CHAT, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "hello wor " * 300_000}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [9] * 513}, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(server, path, body, param):
    assert_names(post(server, path, body), param)
    assert post(server, path, body | {"model": "gpt-4"}).status_code in (400, 404)


def test_the_version_is_the_projects(server):
    with open(ROOT / "pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["project"]["version"]
    assert HTTP.get(f"{server.url}/version").json() == {"version": wanted}


def test_what_a_template_reads_is_measured_before_it_is_tokenized(server):
    """In any field: here the template reads the whole message."""
    tokenizer = server.service.async_engine.tokenizer
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m }}{% endfor %}"
    try:
        for field in ("name", "reasoning_content", "nobodys"):
            begun = time.monotonic()
            messages = [{"role": "user", "content": "x", field: "hello wor " * 360_000}]
            assert_names(post(server, "/v1/chat/completions", {"model": "pocket", "messages": messages}), "messages")
            assert_names(post(server, "/tokenize", {"messages": messages}), "messages")
            assert time.monotonic() - begun < 2
    finally:
        tokenizer.chat_template = template


def test_no_prompt_is_tokenized_after_the_first_that_is_too_long(server, monkeypatch):
    tokenizer, calls = server.service.async_engine.tokenizer, []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, *args, **more: calls.append(1) or call(self, *args, **more))
    body = {"model": "pocket", "prompt": ["x", "x " * 900, *["x " * 900] * 90], "max_tokens": 1}
    assert_names(post(server, "/v1/completions", body), "prompt")
    assert len(calls) == 2


def test_a_prompt_of_ids_that_is_too_long_is_refused_before_it_is_decoded(server, monkeypatch):
    """A million ids fit into a body."""
    names, tokenizer, calls = server.service.names, server.service.async_engine.tokenizer, []
    monkeypatch.setattr(type(names), "offsets", lambda self, ids: calls.append(ids))
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **more: calls.append(ids))
    body = {"model": "pocket", "prompt": [20] * 9000, "max_tokens": 1, "echo": True, "logprobs": 1}
    assert_names(post(server, "/v1/completions", body), "prompt")
    assert not calls


def test_what_is_large_inside_has_an_effect_and_is_not_compared(module, monkeypatch):
    """Writing a million numbers to compare them would hold up the event loop."""
    protocol = module("protocol")
    for each in (each for name in ("protocol", "responses_protocol") if find_spec(f"{protocol.__package__}.{name}") for each in vars(module(name)).values()):
        for name, inert in getattr(each, "refused", {}).items() if isinstance(each, type) else ():
            assert all(protocol.is_inert(value, inert) for value in inert), name
    monkeypatch.setattr(protocol, "canonical", None)
    numbers = [1.5] * 1000
    for value in ({"type": numbers}, [numbers], {"a": {"b": {"c": {"d": numbers}}}}, {"type": "text" * 1000}, {str(number): 1 for number in numbers} | {"a": numbers}):
        assert not protocol.is_inert(value, [{"type": "text"}, {}, []])


def test_the_spelling_of_more_tokens_than_the_context_has_is_refused(server):
    assert len(post(server, "/tokenize", {"prompt": "x " * 600}).json()["tokens"]) > 512
    assert_names(post(server, "/tokenize", {"prompt": "x " * 600, "return_token_strs": True}), "return_token_strs")


def test_a_cache_option_that_would_change_something_is_refused(server):
    body = {"model": "pocket", "messages": [TURN], "max_tokens": 1}
    assert post(server, "/v1/chat/completions", body | {"prompt_cache_options": {"mode": "explicit", "prewarm": False, "comparison_response_id": None}}).status_code == 200
    error = post(server, "/v1/chat/completions", body | {"prompt_cache_options": {"prewarm": True}}).json()["error"]
    assert error["param"] == "prompt_cache_options.prewarm" and "prewarm is not supported here; leave it out" in error["message"]
    assert_names(post(server, "/v1/chat/completions", body | {"prompt_cache_options": {"mode": "bogus"}}), "prompt_cache_options.mode")
    assert_names(post(server, "/v1/chat/completions", body | {"best_of": 4}), "best_of")


def test_what_asks_nothing_of_an_answer_is_accepted(server):
    body = {"model": "pocket", "messages": [TURN], "max_tokens": 1, "store": True}
    body |= {"metadata": {"k": "v"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "p", "prompt_cache_retention": "24h"}
    assert post(server, "/v1/chat/completions", body).status_code == 200
    history = [TURN, {"role": "assistant", "content": "y", "tool_calls": [], "refusal": None, "audio": None, "annotations": []}, TURN]
    assert post(server, "/v1/chat/completions", body | {"messages": history}).status_code == 200


def test_a_template_sees_no_field_that_has_no_effect(server, monkeypatch):
    """Some templates ask whether a message has tool_calls, and expect one if it has."""
    template = "{% for m in messages %}{{ m.keys() | sort | join(' ') }}{% endfor %}"
    monkeypatch.setattr(server.service.async_engine.tokenizer, "chat_template", template)
    plain = [TURN, {"role": "assistant", "content": "y", "name": "x"}, TURN]
    history = [TURN, plain[1] | {"tool_calls": [], "refusal": "", "audio": None, "function_call": None}, TURN]
    counts = [post(server, "/tokenize", {"messages": messages}).json()["count"] for messages in (plain, history)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/v1/models/pocket", "/docs", "/openapi.json"])
def test_head_is_answered_as_get_is_and_without_a_body(server, path):
    got, head = HTTP.get(f"{server.url}{path}"), HTTP.head(f"{server.url}{path}")
    assert (head.status_code, head.content) == (200, b"") and head.headers["content-length"] == got.headers["content-length"]
    assert HTTP.head(f"{server.url}/v1/completions").status_code == 405


def test_a_body_in_another_encoding_than_json_has_is_refused(server):
    """Its parts would not be counted: these are 200,000 lists behind an escaped quote."""
    body = '{"model": "pocket", "x": "\\"", "y": [' + "[]," * 200_000 + '1], "prompt": "Hi", "max_tokens": 1}'
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        answer = HTTP.post(f"{server.url}/v1/completions", content=body.encode(encoding), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and "body" in answer.json()["error"]["message"], encoding
    marked = b'\xef\xbb\xbf{"model": "pocket", "prompt": "Hi", "max_tokens": 1}'
    assert HTTP.post(f"{server.url}/v1/completions", content=marked, headers={"Content-Type": "application/json"}).status_code == 200


def test_a_body_of_too_many_parts_is_refused_before_it_is_parsed(server):
    """In any field, known or not: the parser cannot be interrupted."""
    for body in (
        b'{"model": "pocket", "x": [' + b"[]," * 1_300_000 + b"1]}",
        b'{"model": "pocket", "x": [' + (b"[" * 900 + b"]" * 900 + b",") * 2_000 + b"1]}",
        b'{"model": "pocket", "x": {' + b",".join(b'"%x": 1' % i for i in range(300_000)) + b"}}",
        b'{"model": "pocket", "prompt": [' + b"1," * 1_900_000 + b"1]}",
        b'{"model": "pocket", "metadata": {' + b",".join(b'"%x": 1' % i for i in range(300_000)) + b"}}",
    ):
        begun = time.monotonic()
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = post(server, path, body)
            assert response.status_code == 400 and "the body has more than 50,000 lists, objects and strings" in response.text
        assert time.monotonic() - begun < 1


def test_the_parts_of_a_body_are_counted_outside_of_its_texts(chapter):
    bodies = importlib.import_module(f"milestones.{chapter.name}.bodies")
    texts = ['[{"', "\\", '\\"', '"[', "é, [", "", ",,", "a\nb", "\\\\", "🙂"]
    for indent in (None, 1):
        for ascii_only in (True, False):
            value = {"a": texts, "b": [[1, 2, 3], {"c": {}}], '"[,': "x"}
            body = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
            assert bodies.count_parts(body) == (3 + 1 + len(texts) + 1 + 6, 2 + 9 + 1 + 2), body


@pytest.mark.parametrize("target", ["http://anybody/health", "http://anybody:8000/v1/models", "http://[x/health", "http://a/v1/models/pocket?x=http://b"])
def test_a_target_may_be_a_whole_url(server, target):
    """As clients send it if they believe that they talk to a proxy."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_of_a_key_is_read_in_any_case(chapter, fake, scheme):
    with serving(chapter, fake, api_keys=("s3cret",)) as server:
        for sent, status in ((f"{scheme} s3cret", 200), (f"{scheme} S3cret", 401), ("Basic s3cret", 401), ("s3cret", 401)):
            assert HTTP.get(f"{server.url}/v1/models", headers={"Authorization": sent}).status_code == status


VLLMS = {
    "min_tokens": 2, "min_p": 0.1, "repetition_penalty": 1.1, "length_penalty": 2.0, "use_beam_search": True, "bad_words": ["x"],
    "allowed_token_ids": [1], "include_stop_str_in_output": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 5, "prompt_logprobs": 1, "structured_outputs": {"regex": "x"}, "guided_json": {}, "guided_regex": "x",
    "guided_choice": ["x"], "guided_grammar": "x", "regex": "x", "choice": ["x"], "grammar": "x", "logits_processors": ["x"],
    "return_token_ids": True, "return_tokens_as_token_ids": True, "cache_salt": "x", "priority": 1, "kv_transfer_params": {"x": 1},
    "vllm_xargs": {"x": 1}, "include_reasoning": False, "media_io_kwargs": {"x": {}}, "truncation_side": "left",
    "repetition_detection": {"x": 1}, "response_format": {"type": "json_object"},
}  # fmt: skip
# Of these, those that work where answers can follow grammars.
SHAPES = ("min_tokens", "min_p", "repetition_penalty", "bad_words", "structured_outputs", "regex", "choice", "grammar", "response_format")
VLLMS_CHATS = {
    "chat_template_kwargs": {"enable_thinking": False}, "continue_final_message": True, "add_generation_prompt": False,
    "chat_template": "x", "documents": [{"x": "y"}], "echo": True, "add_special_tokens": True,
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_vllm_would_do_and_this_engine_does_not_is_refused_by_name(chapter, server, path):
    """These used to be accepted and ignored."""
    asked = VLLMS | (VLLMS_CHATS if "chat" in path else {"add_special_tokens": False, "prompt_embeds": "x"})
    if "prefix_cache" in chapter.capabilities:
        del asked["cache_salt"]
    body = {"model": "pocket"} | ENDPOINTS[path][1]
    if "grammars" in chapter.capabilities:
        for name in SHAPES:
            assert post(server, path, body | {name: asked.pop(name), "max_tokens": 2}).status_code == 200, name
    if "tools" in chapter.capabilities and "chat" in path:
        assert post(server, path, body | {"chat_template_kwargs": asked.pop("chat_template_kwargs"), "max_tokens": 2}).status_code == 200
    for name, value in asked.items():
        assert_names(post(server, path, body | {name: value}), name)


LONG = 300_000
LONGS = ("x" * LONG, {"k" * LONG: True}, {"type": "x" * LONG}, {"type": "text", "k" * LONG: 1}, ["x" * LONG], [{"k" * LONG: 1}])


def strays(server, path, body, names):
    """The parameters with which an answer is nearly as long as the body: the server repeats what has no limit."""
    found = []
    for name in names:
        for value in LONGS:
            response = post(server, path, body | {name: value}, timeout=60)
            assert response.status_code < 500, (name, response.text[:200])
            if len(response.text) > 30_000:
                found.append((name, str(value)[:20], response.status_code, len(response.text)))
    return found


def test_no_answer_repeats_a_parameter_of_any_length(server, module):
    """Neither an error nor a stored response: the memory of a server that keeps a thousand has to be bounded."""
    protocol = module("protocol")
    names = {field.alias or name for name, field in protocol.ChatRequest.model_fields.items()} - {"model", "messages"}
    assert not strays(server, "/v1/chat/completions", {"model": "pocket", "messages": [TURN], "max_tokens": 1}, sorted(names | protocol.ChatRequest.refused.keys()))
    names = {field.alias or name for name, field in protocol.CompletionRequest.model_fields.items()} - {"model", "prompt"}
    assert not strays(server, "/v1/completions", {"model": "pocket", "prompt": "x", "max_tokens": 1}, sorted(names | protocol.CompletionRequest.refused.keys()))
    if find_spec(f"{protocol.__package__}.responses_protocol"):
        body = module("responses_protocol").ResponseRequest
        names = {field.alias or name for name, field in body.model_fields.items()} - {"model", "input"}
        assert not strays(server, "/v1/responses", {"model": "pocket", "input": "x", "max_output_tokens": 16}, sorted(names | body.refused.keys()))
    for path, extra in (("/v1/chat/completions", {"model": "x" * LONG}), ("/v1/chat/completions", {"messages": [{"role": "x" * LONG, "content": "y"}]})):
        assert len(post(server, path, {"model": "pocket", "messages": [TURN]} | extra).text) < 30_000


def test_of_two_wrong_fields_the_first_is_named(server):
    """Together they would name neither: a part with an image has a type that is not known and no text."""
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    error = assert_names(post(server, "/v1/chat/completions", {"model": "pocket", "messages": [{"role": "user", "content": [image]}]}), "messages[0].content[0].type")
    assert error["message"].startswith("messages[0].content[0].type: Input should be 'text'")
    assert_names(post(server, "/v1/chat/completions", {"model": "pocket", "messages": [{}]}), "messages[0].role")


@pytest.mark.parametrize("asked", [{}, {"max_tokens": None}, {"max_tokens": 0, "echo": True, "logprobs": 1}])
def test_a_prompt_that_leaves_no_room_is_refused_for_what_it_is(server, asked):
    """Nobody who asked for no number of tokens can lower it."""
    error = assert_names(post(server, "/v1/completions", {"model": "pocket", "prompt": [5] * 512} | asked), "prompt")
    assert error["message"] == "prompt has 512 tokens, which leave no room for another: together they have at most 512; shorten it"
    assert error["code"] == "context_length_exceeded"
    assert post(server, "/v1/completions", {"model": "pocket", "prompt": [5] * 511} | asked).status_code == 200


@pytest.mark.needs("grammars")
def test_min_tokens_is_compared_with_each_prompts_room(server):
    """Whichever of the prompts is the first one."""
    body = {"model": "pocket", "min_tokens": 12}
    for prompts in ([[5], [5] * 505], [[5] * 505, [5]]):
        error = assert_names(post(server, "/v1/completions", body | {"prompt": prompts}), "min_tokens")
        assert error["message"] == "min_tokens must be at most max_tokens = 7, got 12"
    error = assert_names(post(server, "/v1/chat/completions", body | {"messages": [TURN], "max_completion_tokens": 3}), "min_tokens")
    assert error["message"] == "min_tokens must be at most max_completion_tokens = 3, got 12"


@pytest.mark.needs("grammars")
def test_what_describes_a_form_is_bounded(server):
    """A stored response repeats it, and the model never sees it."""
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "description": "d" * 20_000}
    assert_names(post(server, "/v1/responses", {"model": "pocket", "input": "x", "text": {"format": form}}), "text.format.description")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "description": "d" * 20_000}}
    assert_names(post(server, "/v1/chat/completions", {"model": "pocket", "messages": [TURN], "response_format": form}), "response_format.json_schema.description")


def test_a_compressed_body_is_refused_as_such(server):
    body = gzip.compress(json.dumps({"model": "pocket", "prompt": "x"}).encode())
    response = post(server, "/v1/completions", body, headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert response.json()["error"]["message"] == "Content-Encoding is 'gzip', which is not supported; send the body uncompressed"
    assert post(server, "/v1/completions", {"model": "pocket", "prompt": "x", "max_tokens": 1}, headers={"content-encoding": "identity"}).status_code == 200
