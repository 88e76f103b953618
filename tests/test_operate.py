"""The operator's run: a server is put under load, and what it says of itself agrees with what its clients saw."""
import copy
import random
from functools import cache

import pytest

from shared.verify.operate import CHAT, COMPLETIONS, Life, compare_counts, compare_log, live

pytestmark = [pytest.mark.needs("tools"), pytest.mark.whole]


@cache
def lived(chapter):
    life = Life("settled", number=1)
    live(life, chapter, seconds=5, rng=random.Random(1))
    return life


@pytest.fixture
def life(chapter):
    return copy.deepcopy(lived(chapter))


def test_log_metrics_and_page_say_what_clients_saw(life):
    assert life.faults == []
    assert {200, 400, 404, 429} == {sent.status for sent in life.sent} and len(life.sent) > 150
    assert {COMPLETIONS, CHAT, "/v1/responses", "/v1/responses/{response_id}", "/health"} <= {sent.path for sent in life.sent}
    assert sum(sent.num_calls for sent in life.sent) > 5


@pytest.mark.parametrize("name", [
    ("http_responses_total", CHAT, "200"),
    ("requests_finished_total", "stop"),
    ("requests_finished_total", "abort"),
    ("generation_tokens_total",),
    ("tool_calls_total",),
    ("request_seconds_count",),
    ("kv_blocks", "used"),
    ("tokens_unread",),
])
def test_a_metric_that_is_off_is_found(life, name):
    cancelled = sum(sent.reasons == ["cancelled"] for sent in life.sent)
    life.metrics[name] += 1 + (121 if name[0].startswith("generation") else 1) * cancelled
    compare_counts(life)
    assert life.faults


def test_a_page_that_is_off_by_one_is_found(life):
    life.page["finished"]["length"] += 1
    life.page["answers"]["200"] -= 1
    compare_counts(life)
    assert len(life.faults) == 2


def test_a_line_that_the_log_lacks_has_twice_or_has_wrong_is_found(life):
    lines = life.log.splitlines()
    number = next(number for number, line in enumerate(lines) if line.startswith("{") and '"status": 200' in line)
    for changed in ([], [lines[number]] * 2, [lines[number].replace('"status": 200', '"status": 400')]):
        life.faults = []
        life.log = "\n".join([*lines[:number], *changed, *lines[number + 1 :]])
        compare_log(life)
        assert len(life.faults) == 1


def test_what_else_is_wrong_is_found(life):
    life.log += "\nTraceback (most recent call last):\n"
    answered = next(sent for sent in life.sent[1:] if sent.choices and sent.status == 200)
    answered.reasons.append("stop")
    life.sent[0].broken = "the stream has no end"
    compare_log(life)
    assert len(life.faults) == 3
