"""Completions as OpenAI's own client sees them, over a real socket."""
import pytest

from shared.verify.serving import serving
from shared.verify.soak_server import crowd
from tests.support.http import HTTP, assert_names, events_of, post
from tests.support.served import PROMPT, alone, client, server  # noqa: F401

pytestmark = pytest.mark.needs("serve")


def test_a_completion_is_what_the_engine_generates(chapter, client, alone):
    [want] = alone([PROMPT], max_tokens=9)
    done = client.completions.create(model="pocket", prompt=PROMPT, max_tokens=9, temperature=0)
    [choice] = done.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (want.text, "length", 0, None)
    num_prompt = len(want.prompt_ids)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": 9, "total_tokens": num_prompt + 9}
    if "prefix_cache" in chapter.capabilities:
        usage["prompt_tokens_details"] = {"cached_tokens": 0}  # the prompt is shorter than a block
    assert done.usage.model_dump(exclude_none=True) == usage
    assert done.object == "text_completion" and done.model == "pocket" and done.id.startswith("cmpl-")


def test_a_completion_without_max_tokens_gets_16(client):
    assert client.completions.create(model="pocket", prompt=PROMPT, temperature=0).usage.completion_tokens == 16


def test_top_p_of_zero_is_the_likeliest_token_even_of_equals(chapter, make_engine, monkeypatch):
    engine = make_engine("pocket")
    compute = engine.model.compute_logits

    def with_a_twin(hidden):
        logits = compute(hidden)
        logits[:, [50, 60, 70]] = logits.max() + 1
        return logits

    monkeypatch.setattr(engine.model, "compute_logits", with_a_twin)
    with serving(chapter, engine) as server:
        body = {"model": "pocket", "prompt": PROMPT, "max_tokens": 4, "top_p": 0}
        texts = {post(server, "/v1/completions", body | {"seed": seed}).json()["choices"][0]["text"] for seed in range(12)}
        assert texts == {engine.tokenizer.decode([50]) * 4}


def test_top_p_of_zero_is_the_likeliest_token(client, alone):
    [want] = alone([PROMPT], max_tokens=6)
    done = client.completions.create(model="pocket", prompt=PROMPT, max_tokens=6, top_p=0)
    assert done.choices[0].text == want.text


def test_a_stream_adds_up_to_the_whole_answer(client):
    asked = dict(model="pocket", prompt=PROMPT, max_tokens=11, seed=1)
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    pieces = [piece for chunk in chunks for piece in chunk.choices]
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_stream_has_usage_only_on_request_and_ends_with_DONE(server):
    body = {"model": "pocket", "prompt": PROMPT, "max_tokens": 3, "stream": True}
    response = post(server, "/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all("usage" not in event for event in events_of(response))


def test_a_stream_gives_characters_of_several_bytes_whole(client):
    asked = dict(model="pocket", prompt="🙂", max_tokens=40, temperature=2, seed=8, extra_body={"ignore_eos": True})
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    whole = client.completions.create(**asked)
    assert text == whole.choices[0].text
    # Tokens whose text had to wait for the next one are counted too.
    assert whole.usage.completion_tokens == 40


def test_what_the_engine_refuses_names_the_parameter(server):
    assert_names(post(server, "/v1/completions", {"model": "pocket", "prompt": PROMPT, "max_tokens": 600}), "prompt")
    assert_names(post(server, "/v1/completions", {"model": "pocket", "prompt": PROMPT, "temperature": 1e-35}), "temperature")


def test_16_streams_at_once_give_what_each_gives_alone(chapter, alone):
    assert crowd(chapter, alone.engine, 16, max_tokens=12) > 100


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/pocket"])
def test_head_is_answered_as_get_is_and_without_a_body(server, path):
    """As uptime monitors and `wget --spider` send it."""
    got, head = HTTP.get(f"{server.url}{path}"), HTTP.head(f"{server.url}{path}")
    assert (head.status_code, head.content) == (200, b"") and head.headers["content-length"] == got.headers["content-length"]
    assert HTTP.head(f"{server.url}/v1/completions").status_code == 405
