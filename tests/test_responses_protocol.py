"""The protocol of responses: what is refused and by which name, and which key may see them."""
import importlib
import typing

import openai
import pydantic
import pytest
from openai.types.responses import FunctionToolParam, response_create_params
from openai.types.shared_params import Reasoning
from transformers import AutoTokenizer

from shared.checkpoints import POCKET
from shared.verify.serving import serving
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP, assert_names, post

pytestmark = pytest.mark.needs("responses")

BODY = {"model": "pocket", "input": "Hi", "max_output_tokens": 1}


@pytest.fixture(scope="session")
def fake(chapter):
    return FakeEngine(chapter, AutoTokenizer.from_pretrained(POCKET), max_model_len=512)


@pytest.fixture(scope="session")
def server(chapter, fake, engine_way):
    with serving(chapter, fake) as server:
        yield server


@pytest.fixture
def model(chapter):
    return importlib.import_module(f"milestones.{chapter.name}.responses_protocol").ResponseRequest


def test_every_parameter_that_the_official_client_knows_works_or_is_refused(model):
    documented = set(typing.get_type_hints(response_create_params.ResponseCreateParamsBase)) | {"stream"}
    assert documented <= set(model.model_fields) | set(model.refused)
    assert not set(model.model_fields) & set(model.refused)


def test_so_does_every_field_of_a_parameter(chapter):
    protocol = importlib.import_module(f"milestones.{chapter.name}.responses_protocol")
    parts = [(protocol.Reasoning, Reasoning), (protocol.ResponseRequest.model_fields["prompt_cache_options"].annotation, response_create_params.PromptCacheOptions)]
    if "tools" in chapter.capabilities:
        parts.append((protocol.ResponseTool, FunctionToolParam))
    for part, documented in parts:
        fields, [part] = set(typing.get_type_hints(documented)), [each for each in (part, *typing.get_args(part)) if hasattr(each, "model_fields")]
        assert fields <= set(part.model_fields) | set(part.refused), part


def test_a_refused_parameter_is_named_and_its_inert_values_are_let_through(server, model):
    inert = {}
    for name, values in model.refused.items():
        response = post(server, "/v1/responses", BODY | {name: ["something"]})
        assert response.status_code == 400 and response.json()["error"]["param"] == name, name
        inert |= {name: values[-1] if values else None}
    everything = BODY | inert | {"a_field_of_nobodys": {"x": 1}, "temperature": None, "user": None}
    assert post(server, "/v1/responses", everything).status_code == 200


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["reasoning.encrypted_content", "everything"]}, "include[1]"),
        ({"include": ["reasoning.encrypted_content"], "top_logprobs": 1}, "top_logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
        ({"prompt_cache_options": {"ttl": "1h"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_retention": "long"}, "prompt_cache_retention"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "resp_nobody"}, "previous_response_id"),
        ({"metadata": {"k": 3}}, "metadata.k"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(i): 3 for i in range(20_000)}}, "metadata"),
    ],
)
def test_a_wrong_value_is_a_400_that_names_it(server, wrong, param):
    assert_names(post(server, "/v1/responses", BODY | wrong), param)


@pytest.mark.parametrize("content", [b'{"model": ', b"", b"[]", b"null", b'{"model": "\\ud800", "input": "x"}', b"[" * 100_000, b'{"input": "x"}'])
def test_what_is_no_request_is_a_400_in_openais_body(server, content):
    response = post(server, "/v1/responses", content)
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", ["include", "include[]", "starting_after", "include_obfuscation"])
def test_what_a_fetched_response_cannot_have_is_refused(server, name):
    done = post(server, "/v1/responses", BODY).json()["id"]
    response = HTTP.get(f"{server.url}/v1/responses/{done}", params={name: "1"})
    assert response.status_code == 400 and response.json()["error"]["param"] == name
    error = HTTP.get(f"{server.url}/v1/responses/{done}", params={"stream": "abc"}).json()["error"]
    assert error["param"] == "stream"


def test_an_unknown_model_and_an_unknown_response_are_404(server):
    for response in (
        post(server, "/v1/responses", BODY | {"model": "gpt-4"}),
        HTTP.get(f"{server.url}/v1/responses/resp_nobody"),
        HTTP.post(f"{server.url}/v1/responses/resp_nobody/cancel"),
    ):
        assert response.status_code == 404 and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_half_a_character_is_refused_where_it_would_be_said_back_and_ignored_where_the_field_is(server):
    raw = b'{"model": "pocket", "input": "x", "max_output_tokens": 1, "%s": {"\\ud800": ""}}'
    response = post(server, "/v1/responses", raw % b"metadata")
    assert response.status_code == 400 and response.json()["error"]["param"] == "metadata"
    assert post(server, "/v1/responses", raw % b"nobodys").status_code == 200


def test_items_are_counted_before_they_are_validated(server, chapter, monkeypatch):
    protocol = importlib.import_module(f"milestones.{chapter.name}.protocol")
    monkeypatch.setattr(protocol.Strict, "refuse", None)
    turn = {"role": "user", "content": "x"}
    for turns in ([turn] * 5_000, [turn | {"content": [{"type": "input_text", "text": "x"}] * 5_000}]):
        error = assert_names(post(server, "/v1/responses", BODY | {"input": turns}), "input")
        assert "but a body has at most 4096; send fewer" in error["message"]


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(server):
    error = assert_names(post(server, "/v1/responses", BODY | {"input": "hello wor " * 300_000}), "input")
    assert error["code"] == "context_length_exceeded" and "bytes, too many" in error["message"]


def test_a_list_of_wrong_items_is_one_complaint(model):
    with pytest.raises(pydantic.ValidationError) as caught:
        model.model_validate({"model": "pocket", "input": "a", "include": [1] * 1000})
    assert len(caught.value.errors()) == 1


def test_nulls_within_values_are_nulls(server):
    inert = {
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": {"type": "text"}, "verbosity": None},
        "stream_options": {"include_obfuscation": None},
    }
    assert post(server, "/v1/responses", {"model": "pocket", "input": "Hi", "max_output_tokens": 1} | inert).status_code == 200


def test_the_api_page_shows_what_works_and_nothing_that_is_refused(server, model):
    schemas = HTTP.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)


def test_a_response_is_shown_to_the_key_that_asked_for_it_and_to_no_other(chapter, fake):
    with serving(chapter, fake, api_keys=("hers", "his")) as server:
        hers, his = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in ("hers", "his"))
        with hers, his:
            done = hers.responses.create(model="pocket", input="Hi", background=True, max_output_tokens=1)
            assert hers.responses.retrieve(done.id).id == done.id
            for call in (
                lambda: his.responses.retrieve(done.id),
                lambda: his.responses.cancel(done.id),
            ):
                with pytest.raises(openai.NotFoundError, match="there is no response"):
                    call()
            with pytest.raises(openai.BadRequestError, match="is not known here"):
                his.responses.create(model="pocket", input="Hi", previous_response_id=done.id)


def test_the_oldest_response_is_forgotten_when_there_are_too_many(chapter, fake):
    with serving(chapter, fake) as server:
        server.config.app.state.responses.size = 2
        ids = [post(server, "/v1/responses", BODY).json()["id"] for _ in range(3)]
        assert [HTTP.get(f"{server.url}/v1/responses/{each}").status_code for each in ids] == [404, 200, 200]


def test_what_every_agents_client_sends_is_accepted(server):
    body = BODY | {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content", "web_search_call.results"], "store": False}
    answer = post(server, "/v1/responses", body).json()
    assert answer["reasoning"] == {"effort": None, "summary": "auto"} and answer["output"][0]["content"][0]["logprobs"] == []
    body |= {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "top_logprobs": 1, "reasoning": None}
    assert post(server, "/v1/responses", body).status_code == 200
