"""What clients are told of the prefix cache, and who finds whose prompts, over a real socket."""
import openai
import pytest

from shared.checkpoints import checkpoint
from shared.verify.serving import serving
from tests.support.http import HTTP, events_of, post
from tests.support.served import CHAT

pytestmark = pytest.mark.needs("prefix_cache")

# Of 50 tokens, with blocks of 16: 48 are in full blocks.
PROMPT = list(range(20, 70))
BODY = {"model": "pocket", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
LONG_CHAT = [{"role": "system", "content": "You answer with a story about hares, foxes and the sea, in few words. " * 3}, *CHAT]


@pytest.fixture(scope="module")
def engine(chapter):
    return chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=512)


@pytest.fixture
def server(chapter, engine):
    """Its cache is empty."""
    engine.reset_prefix_cache()
    with serving(chapter, engine, dev_mode=True) as server:
        yield server


def client_of(server, api_key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0)


def cached(server, body=BODY, api_key=None, **more):
    """The cached tokens that a completion's usage reports."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    response = post(server, "/v1/completions", body | more, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_usage_reports_the_cached_tokens(server):
    """The last token of a prompt is always computed, and only full blocks are found."""
    assert [cached(server, prompt=PROMPT[:length]) for length in (48, 48, 49, 50, 33, 32, 16)] == [0, 32, 48, 48, 32, 16, 0]


def test_a_stream_reports_the_same(server):
    assert cached(server) == 0
    events = events_of(post(server, "/v1/completions", BODY | {"stream": True, "stream_options": {"include_usage": True}}))
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}
    assert all(not event.get("usage") for event in events[:-1])


def test_a_prompt_is_counted_once_for_all_its_choices(server):
    """The first of them computes it, and the others find it."""
    assert cached(server, n=4, temperature=1) == 0
    assert cached(server, n=4, temperature=1) == 48


def test_several_prompts_are_added_up(server):
    assert cached(server, prompt=PROMPT[:33]) == 0
    other = [9, *PROMPT]
    assert cached(server, prompt=[PROMPT, other], n=2) == 32
    assert cached(server, prompt=[PROMPT, other], n=2) == 96


def test_echoed_logprobs_of_a_prompt_are_computed(server):
    assert cached(server) == 0
    body = BODY | {"echo": True, "logprobs": 1}
    logprobs = [post(server, "/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"] for _ in range(2)]
    assert logprobs[0] == logprobs[1] and len(logprobs[0]) == 52 and None not in logprobs[0][1:]
    assert cached(server, body) == 0


def test_chats_and_responses_find_their_earlier_turns(server, engine):
    with client_of(server) as client:
        ask = dict(model="pocket", temperature=0, max_tokens=20)
        usages = [client.chat.completions.create(messages=LONG_CHAT, **ask).usage for _ in range(2)]
        num_found = (usages[0].prompt_tokens - 1) // 16 * 16
        assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, num_found] and num_found > 48
        stream = client.chat.completions.create(messages=LONG_CHAT, stream=True, stream_options={"include_usage": True}, **ask)
        assert list(stream)[-1].usage.prompt_tokens_details.cached_tokens == num_found

        engine.reset_prefix_cache()
        ask = dict(model="pocket", temperature=0, max_output_tokens=20)
        first = client.responses.create(input=LONG_CHAT, **ask)
        second = client.responses.create(input="And then?", previous_response_id=first.id, **ask)
        assert first.usage.input_tokens_details.cached_tokens == 0
        # The second turn's prompt begins with all of the first one's except what opens the answer.
        assert second.usage.input_tokens_details.cached_tokens >= num_found - 16
        events = list(client.responses.create(input="And then?", previous_response_id=first.id, stream=True, **ask))
        assert events[-1].response.usage.input_tokens_details.cached_tokens == (second.usage.input_tokens - 1) // 16 * 16


# ---- who finds whose prompts


def test_equal_salts_share_and_different_ones_do_not(server):
    assert [cached(server, cache_salt=salt) for salt in ("a", "b", "a", "b")] == [0, 0, 48, 48]
    assert [cached(server), cached(server), cached(server, cache_salt=None)] == [0, 48, 48]


def test_clients_with_different_keys_cannot_find_each_others_prompts(chapter, engine):
    """Not even with the same salt, or with one that looks like another client's."""
    engine.reset_prefix_cache()
    with serving(chapter, engine, api_keys=("hers", "his")) as server:
        assert [cached(server, api_key=key) for key in ("hers", "his", "hers", "his")] == [0, 0, 48, 48]
        assert [cached(server, api_key=key, cache_salt="x") for key in ("hers", "his", "hers", "his")] == [0, 0, 48, 48]
        salt = server.service.cache_salt("hers", None)
        assert "hers" not in salt and cached(server, api_key="his", cache_salt=salt) == 0
        with client_of(server, "hers") as hers, client_of(server, "his") as his:
            found = [
                client.responses.create(model="pocket", input=LONG_CHAT, max_output_tokens=1).usage.input_tokens_details.cached_tokens
                for client in (hers, his, hers)
            ]
        assert found[:2] == [0, 0] and found[2] > 48


@pytest.mark.parametrize("salt", ["", 5, ["x"], "x" * 513])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_salt_that_is_none_is_refused_by_name(server, path, salt):
    body = {"/v1/completions": BODY, "/v1/chat/completions": {"model": "pocket", "messages": CHAT}}
    response = post(server, path, body.get(path, {"model": "pocket", "input": "Hi"}) | {"cache_salt": salt})
    assert response.status_code == 400 and response.json()["error"]["param"] == "cache_salt"


# ---- resetting and counting


def test_a_reset_lets_nothing_be_found(server):
    assert [cached(server), cached(server)] == [0, 48]
    assert HTTP.post(f"{server.url}/reset_prefix_cache").status_code == 200
    assert [cached(server), cached(server)] == [0, 48]


def test_the_route_exists_only_in_dev_mode_and_needs_the_key(chapter, engine):
    with serving(chapter, engine) as server:
        assert HTTP.post(f"{server.url}/reset_prefix_cache").status_code == 404
    with serving(chapter, engine, api_keys=("s3cret",), dev_mode=True) as server:
        for headers, status in (({}, 401), ({"Authorization": "Bearer s3cret"}, 200)):
            assert HTTP.post(f"{server.url}/reset_prefix_cache", headers=headers).status_code == status


def test_health_counts_cached_tokens(server):
    before = HTTP.get(f"{server.url}/health").json()
    assert [cached(server), cached(server)] == [0, 48]
    after = HTTP.get(f"{server.url}/health").json()
    assert after["prompt_tokens"] - before["prompt_tokens"] == 100
    assert after["cached_tokens"] - before["cached_tokens"] == 48
