"""Responses as OpenAI's own client sees them, over a real socket."""
import math

import openai
import pytest

from tests.support.served import CHAT, alone, client, server  # noqa: F401

pytestmark = pytest.mark.needs("responses")


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
    # The client may also send the output back as it received it.
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


def test_top_p_of_zero_is_the_likeliest_token_and_logprobs_have_no_others_unless_asked_for(client):
    asked = dict(model="pocket", input="Once upon a time", max_output_tokens=40, include=["message.output_text.logprobs"])
    want = client.responses.create(**asked, temperature=0)
    for _ in range(3):
        assert client.responses.create(**asked, temperature=1.5, top_p=0).output_text == want.output_text
    logprobs = want.output[0].content[0].logprobs
    assert len(logprobs) > 6 and not any(entry.top_logprobs for entry in logprobs)


def test_a_response_in_the_background_is_polled(client):
    begun = client.responses.create(model="pocket", input="Hi", background=True, max_output_tokens=3)
    assert begun.status in ("queued", "in_progress")
    while (now := client.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
        pass
    assert now.status in ("completed", "incomplete") and now.output_text
    plain = client.responses.create(model="pocket", input="Hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(plain.id)
