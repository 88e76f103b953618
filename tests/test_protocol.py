"""The service's manners, which need no model: an engine that computes nothing is behind them."""
import importlib
import typing

import openai
import pydantic
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from transformers import AutoTokenizer

from shared.checkpoints import POCKET
from shared.verify.serving import serving
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP, assert_names, post

pytestmark = pytest.mark.needs("serve")

CHAT = [{"role": "user", "content": "What is a KV cache?"}]
PROMPT = "Once upon a time"


@pytest.fixture(scope="session")
def fake(chapter):
    return FakeEngine(chapter, AutoTokenizer.from_pretrained(POCKET), max_model_len=512)


@pytest.fixture(scope="session")
def server(chapter, fake):
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
        lambda: client.responses.create(model="gpt-4", input="x"),
    ):
        with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here") as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_with_a_key_nobody_without_it_gets_in(chapter, fake):
    with serving(chapter, fake, api_key="s3cret") as server:
        invitation = importlib.import_module(f"milestones.{chapter.name}.server").invitation(server.url, server.service)
        assert "Bearer $API_KEY" in invitation and "s3cret" not in invitation
        for key in ("wrong", "s3cret2", ""):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = HTTP.get(f"{server.url}/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert HTTP.get(f"{server.url}/health").status_code == 200
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


def test_half_a_character_is_refused_where_it_would_be_said_back_and_ignored_where_the_field_is(server):
    raw = b'{"model": "pocket", "input": "x", "max_output_tokens": 1, "%s": {"\\ud800": ""}}'
    response = post(server, "/v1/responses", raw % b"metadata")
    assert response.status_code == 400 and response.json()["error"]["param"] == "metadata"
    assert post(server, "/v1/responses", raw % b"nobodys").status_code == 200


def test_other_paths_and_methods_have_the_same_body(server):
    for response, status in (
        (HTTP.get(f"{server.url}/v1/nothing"), 404),
        (HTTP.get(f"{server.url}/nothing"), 404),
        (HTTP.get(f"{server.url}/v1/completions"), 405),
        (HTTP.delete(f"{server.url}/v1/models"), 405),
        (HTTP.get(f"{server.url}/v1/responses/resp_nobody"), 404),
        (HTTP.post(f"{server.url}/v1/responses/resp_nobody/cancel"), 404),
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
    schemas = HTTP.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    for path in ENDPOINTS:
        model = request_model(chapter, path)
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
    assert "swagger" in HTTP.get(f"{server.url}/docs").text
