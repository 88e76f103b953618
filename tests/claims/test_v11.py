"""v11: memory is taken back in order of rank, and a preempted request continues where it was."""
import os
import random
import signal

import pytest
import torch

from shared.bench.recorder import run
from shared.chapters import ROOT, find
from shared.checkpoints import checkpoint
from shared.verify import decisions
from shared.verify.findable import uncached
from shared.verify.serving import serving, wait_until
from shared.verify.soak import audit, soak
from shared.workloads import fixed, random_ids
from tests.support.http import HTTP, events_of
from tests.support.same import assert_close, assert_same

BS = 4
WAYS = {"recompute": 0, "swap": 10**7, "swap, often full": 20_000}


def workload(vocab_size, seed, num_requests=14):
    """Prompts and sampling parameters of requests that use every option."""
    rng = random.Random(seed)
    requests = []
    for index in range(num_requests):
        options = dict(max_tokens=rng.randint(1, 24), temperature=rng.choice((0.0, 1.0)), seed=index, logprobs=2)
        options["prompt_logprobs"] = rng.random() < 0.4
        options["priority"] = rng.randint(-1, 1)
        options["stop_token_ids"] = tuple(rng.sample(range(8, vocab_size), 20)) if rng.random() < 0.3 else ()
        requests.append((random_ids(rng.randint(1, 20), vocab_size, rng), options))
    return requests


def largest(engine, requests, Params):
    """The number of blocks that the largest of these requests needs when it runs alone."""
    return max(engine.pool.blocks_for(len(prompt) + options["max_tokens"] - 1) for prompt, options in requests)


@pytest.mark.whole
@pytest.mark.parametrize("way", WAYS)
# With seed 0, a token is drawn within rounding of the edge between two tokens.
@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.whole) for seed in (1, 2))])
def test_every_pool_that_holds_the_largest_request_gives_the_same_output(chapter, make_engine, Params, seed, way):
    roomy = make_engine("llama", block_size=BS)
    requests = workload(roomy.config.vocab_size, seed)
    prompts, params = [prompt for prompt, _ in requests], [Params(**options) for _, options in requests]
    want = roomy.generate(prompts, params)
    smallest, num_preempted = largest(roomy, requests, Params), []
    for num_blocks in (smallest, smallest + 1, smallest + 3, 2 * smallest):
        for reserve_tokens in (0, 3):
            engine = chapter.load().Engine(
                checkpoint("llama"),
                num_blocks=num_blocks,
                block_size=BS,
                max_num_seqs=6,
                max_model_len=64,
                reserve_tokens=reserve_tokens,
                swap_bytes=WAYS[way],
            )
            assert_same(engine.generate(prompts, params), want)
            audit(engine)
            assert engine.pool.num_free == num_blocks and engine.swap.pool.num_free == engine.swap.pool.num_blocks
            num_preempted.append(engine.stats().preemptions)
    assert sum(num_preempted) > 10


@pytest.mark.whole
@pytest.mark.parametrize("way", ["recompute", "swap"])
def test_a_victim_at_any_step_and_of_any_rank_continues_where_it_was(chapter, make_engine, Params, way):
    engine = chapter.load().Engine(checkpoint("llama"), block_size=BS, num_blocks=40, swap_bytes=WAYS[way])
    requests = workload(engine.config.vocab_size, seed=5, num_requests=4)
    requests = [(prompt, options | {"max_tokens": 9, "stop_token_ids": ()}) for prompt, options in requests]
    want = engine.generate([prompt for prompt, _ in requests], [Params(**options) for _, options in requests])
    for step in range(1, 8):
        for position in range(4):
            ids = [engine.add_request(prompt, Params(**options)) for prompt, options in requests]
            got = {request_id: [] for request_id in ids}
            while engine.has_unfinished_requests():
                if engine.num_steps and len(got[ids[0]]) == step and not engine.stats().preempted and position is not None:
                    engine.scheduler.preempt(engine.scheduler.running[position])
                    audit(engine)
                    position = None
                for output in engine.step():
                    got[output.request_id].append(output)
                audit(engine)
            for request_id, its in zip(ids, want, strict=True):
                outputs = got[request_id]
                assert [output.token_id for output in outputs] == its.token_ids
                assert "".join(output.text for output in outputs) == its.text
                assert_close([output.logprobs for output in outputs], its.logprobs)
                assert [output.prompt_logprobs is None for output in outputs] == [its.prompt_logprobs is None, *[True] * 8]


def test_positions_are_computed_again_or_copied(chapter, Params):
    """A request is preempted after its third token: 5 + 3 - 1 = 7 positions are computed by then, and 10 in all."""
    for swap_bytes, positions in ((0, 10 + 7), (10**7, 10)):
        engine = chapter.load().Engine(checkpoint("qwen2"), num_blocks=9, block_size=BS, swap_bytes=swap_bytes, **uncached(chapter))
        engine.add_request([9] * 5, Params(max_tokens=6, ignore_eos=True))
        for _ in range(3):
            engine.step()
        [seq] = engine.scheduler.running
        engine.scheduler.preempt(seq)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.preempted, stats.preemptions) == (0, 0, 1, 1)
        assert (stats.free_blocks, stats.swapped_blocks) == (9, 2 if swap_bytes else 0)
        while engine.has_unfinished_requests():
            engine.step()
        assert engine.num_positions == positions
        assert engine.stats()[:3] == (0, 0, 9) and engine.stats().swapped_blocks == 0


def test_a_full_swap_space_falls_back_to_computing_again(chapter, Params):
    engine = chapter.load().Engine(checkpoint("qwen2"), num_blocks=20, block_size=BS)
    block_bytes = engine.cache.kv_bytes // 20
    engine = chapter.load().Engine(checkpoint("qwen2"), num_blocks=20, block_size=BS, swap_bytes=3 * block_bytes + 1)
    assert engine.swap.pool.num_blocks == 3
    for token_id in (8, 9):
        engine.add_request([token_id] * 6, Params(max_tokens=6, ignore_eos=True))
    engine.step()
    for seq in reversed(list(engine.scheduler.running)):
        engine.scheduler.preempt(seq)
    first, second = engine.scheduler.waiting
    # Each has 6 positions, two blocks, and there is room for one of them.
    assert (len(second.swap_table), second.num_computed) == (2, 6)
    assert (len(first.swap_table), first.num_computed) == (0, 0)
    audit(engine)
    engine.abort_request(second.seq_id)
    assert engine.swap.pool.num_free == 3
    engine.close()
    audit(engine)


# ---- which requests wait, and which are preempted


def test_a_smaller_number_is_served_first_and_equals_in_the_order_of_arrival(chapter, Params):
    engine = chapter.load().Engine(checkpoint("qwen2"), max_num_seqs=1, num_blocks=9, block_size=BS)
    ids = [engine.add_request([9], Params(max_tokens=2, ignore_eos=True, priority=priority)) for priority in (0, 5, -1, 0, -1)]
    ended = []
    while engine.has_unfinished_requests():
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert ended == [ids[2], ids[4], ids[0], ids[3], ids[1]]


def test_when_blocks_run_out_the_last_in_rank_is_preempted(chapter, Params):
    engine = chapter.load().Engine(checkpoint("qwen2"), num_blocks=6, block_size=BS, reserve_tokens=0)
    low = engine.add_request([7] * 7, Params(max_tokens=9, ignore_eos=True, priority=1))
    first = engine.add_request([8] * 7, Params(max_tokens=9, ignore_eos=True))
    second = engine.add_request([9] * 7, Params(max_tokens=9, ignore_eos=True))
    engine.step()
    assert [seq.seq_id for seq in engine.scheduler.running] == [first, second, low]
    engine.step()
    assert [seq.seq_id for seq in engine.scheduler.running] == [first, second, low]
    # Eight positions each; the ninth needs a block.
    engine.step()
    assert [seq.seq_id for seq in engine.scheduler.running] == [first, second]
    assert [seq.seq_id for seq in engine.scheduler.waiting] == [low]
    engine.close()


def test_an_urgent_request_starts_in_the_next_step(chapter, Params):
    """Although eight long requests use all rows."""
    engine = chapter.load().Engine(checkpoint("qwen2"), max_num_seqs=8)
    for _ in range(8):
        engine.add_request([9] * 4, Params(max_tokens=30, ignore_eos=True))
    engine.step()
    urgent = engine.add_request([9] * 4, Params(max_tokens=2, ignore_eos=True, priority=-1))
    assert urgent in [output.request_id for output in engine.step()]
    assert engine.stats().preempted == 1
    engine.close()


def test_nothing_is_preempted_for_a_request_that_then_does_not_fit(chapter, Params):
    """It would fit only without the request that ranks before it."""
    engine = chapter.load().Engine(checkpoint("qwen2"), num_blocks=8, block_size=BS, reserve_tokens=0)
    engine.add_request([7] * 12, Params(max_tokens=9, ignore_eos=True, priority=-5))  # 3 blocks, later 5
    engine.add_request([8] * 8, Params(max_tokens=9, ignore_eos=True, priority=5))  # 2 blocks
    engine.step()
    engine.add_request([9] * 21, Params(max_tokens=2, ignore_eos=True))  # 6 blocks
    engine.step()
    assert engine.stats().preemptions == 0 and len(engine.scheduler.running) == 2
    engine.close()


@pytest.mark.whole
@pytest.mark.parametrize("way", ["recompute", "swap"])
@pytest.mark.parametrize("reserve_tokens", [0, 2, 10**6])
def test_the_first_in_rank_is_never_preempted_and_requests_keep_finishing(chapter, Params, way, reserve_tokens):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=9, block_size=BS, reserve_tokens=reserve_tokens, swap_bytes=WAYS[way])
    rng = random.Random(4)
    for _ in range(40):
        prompt = random_ids(rng.randint(1, 20), engine.config.vocab_size, rng)
        engine.add_request(prompt, Params(max_tokens=rng.randint(1, 16), ignore_eos=True, priority=rng.randint(0, 2)))
    since = 0
    while engine.has_unfinished_requests():
        first = min(engine.seqs.values(), key=lambda seq: seq.rank)
        outputs = engine.step()
        # The first in rank gets a token in every step.
        assert first.seq_id in [output.request_id for output in outputs]
        since = 0 if any(output.finish_reason for output in outputs) else since + 1
        assert since <= 16
        audit(engine)


def test_with_everything_reserved_it_decides_as_v10(chapter):
    """The same requests run in the same steps if every request reserves blocks up to its end."""
    requests = fixed([(random.Random(seed).randint(1, 20), random.Random(-seed).randint(1, 20)) for seed in range(30)], 401)

    def ledger(package, **options):
        engine = package.Engine(checkpoint("llama"), num_blocks=19, block_size=BS, max_num_seqs=5, **options)
        steps, schedule = [], engine.scheduler.schedule
        engine.scheduler.schedule = lambda: steps.append([seq.seq_id for seq in schedule()]) or engine.scheduler.running[:]
        run(engine, package, requests)
        return steps

    assert ledger(chapter.load(), reserve_tokens=10**6, **uncached(chapter)) == ledger(find("v10").load())


def test_it_reserves_what_is_needed_next_and_never_past_the_end(chapter, Params):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=40, block_size=BS, reserve_tokens=6)
    engine.add_request([9] * 5, Params(max_tokens=30, ignore_eos=True))
    engine.add_request([9] * 5, Params(max_tokens=4, ignore_eos=True))
    long, short = engine.scheduler.waiting
    assert engine.scheduler.reserved(long) == 3  # 5 + 6 positions
    assert engine.scheduler.reserved(short) == 2  # 5 + 4 - 1
    engine.close()


def test_every_difference_from_vllms_decisions_has_a_name(chapter, capsys):
    """Step by step, on the recorded workloads for which the chapter has everything it needs."""
    assert decisions.main([str(ROOT / "tests" / "golden" / "scheduler"), chapter.id]) == 0
    printed = capsys.readouterr().out
    assert "equal" in printed and "preempts for a more important request at once" in printed
    assert ("finds a block only once it is computed" in printed) == ("prefix_cache" in chapter.capabilities)


# ---- the other ways out


@pytest.mark.whole
@pytest.mark.parametrize("way", WAYS)
def test_three_hundred_requests_with_aborts_and_faults_leave_nothing_behind(chapter, way):
    engine = chapter.load().Engine(checkpoint("llama"), max_num_seqs=9, num_blocks=13, block_size=7, reserve_tokens=2, swap_bytes=WAYS[way])
    ended = soak(chapter, engine, num_requests=300, seed=3, fault_share=0.01)
    assert sum(ended.values()) == 300 and ended["abort"] > 5 and ended["error"] > 0
    assert engine.stats().preemptions > 20


@pytest.mark.parametrize("way", ["recompute", "swap"])
def test_a_preempted_request_survives_a_failed_step(chapter, Params, way, monkeypatch):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=30, block_size=BS, swap_bytes=WAYS[way])
    params = Params(max_tokens=8, ignore_eos=True)
    [want] = engine.generate([[9, 10, 11]], params)
    ids = [engine.add_request(prompt, params) for prompt in ([20] * 5, [9, 10, 11])]
    got = [output.token_id for output in engine.step() if output.request_id == ids[1]]
    engine.scheduler.preempt(engine.scheduler.running[-1])
    engine.scheduler.max_num_seqs = 1
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(engine.model, "forward", forward)
    assert engine.fail_step() == [ids[0]]
    audit(engine)
    while engine.has_unfinished_requests():
        got += [output.token_id for output in engine.step()]
    assert got == want.token_ids


@pytest.mark.parametrize("copy", ["save", "load"])
def test_a_copy_that_fails_ends_its_request_and_leaves_nothing(chapter, Params, monkeypatch, copy):
    """On a GPU a copy may run out of memory."""
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=6, block_size=BS, reserve_tokens=0, swap_bytes=WAYS["swap"])
    for token_id, prompt_len in ((7, 7), (8, 6), (9, 6)):
        engine.add_request([token_id] * prompt_len, Params(max_tokens=6, ignore_eos=True))
    to = torch.Tensor.to
    raised = []

    def failing(self, *args, **options):
        raised.append(1)
        raise RuntimeError("out of memory")

    original = getattr(engine.swap, copy)

    def with_a_fault(*args):
        if not args[0]:
            return original(*args)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", failing)
            return original(*args)

    monkeypatch.setattr(engine.swap, copy, with_a_fault)
    failed = []
    while engine.has_unfinished_requests():
        try:
            engine.step()
        except RuntimeError:
            failed += engine.fail_step()
        audit(engine)
    assert raised and failed and torch.Tensor.to is to
    assert engine.pool.num_free == 6 and engine.swap.pool.num_free == engine.swap.pool.num_blocks


# ---- refusals, and the server

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserve_tokens": -1}, "reserve_tokens must be an integer from 0 up, got -1"),
        ({"swap_bytes": -1}, "swap_bytes must be an integer from 0 up, got -1"),
        ({"swap_bytes": 5}, r"swap_bytes is 5, but a block takes \d+; raise swap_bytes, or set it to 0"),
        ({"swap_bytes": 10**15}, r"needs .* GiB of memory.*; lower swap_bytes"),
        # Each fits, and both together do not.
        ({"swap_bytes": MEMORY - 2**20}, r"the cache with its swap space needs .* GiB of memory.*; lower swap_bytes"),
    ],
)
def test_options_out_of_range_are_refused(chapter, options, message):
    with pytest.raises(ValueError, match=message):
        chapter.load().Engine(checkpoint("llama"), **options)


@pytest.mark.parametrize("priority", [True, 0.5, "high", None, 2**31])
def test_a_priority_is_an_integer(Params, priority):
    with pytest.raises(ValueError, match="priority must be an integer from -2147483648 to 2147483647"):
        Params(priority=priority)


CHAT = [{"role": "user", "content": "Hello!"}]
BODIES = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 3},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 3},
    "/v1/responses": {"input": "Hello!", "max_output_tokens": 3},
}


@pytest.mark.parametrize("path", BODIES)
def test_clients_set_a_priority_only_if_the_server_allows_it(chapter, make_engine, path):
    body = {"model": "pocket"} | BODIES[path]
    engine = make_engine("pocket")
    seen, add = [], engine.add_request
    with serving(chapter, engine) as server:
        assert HTTP.post(server.url + path, json=body | {"priority": 0}).status_code == 200
        answer = HTTP.post(server.url + path, json=body | {"priority": -3})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"
        assert "--allow-priority" in answer.json()["error"]["message"]
    try:
        engine.add_request = lambda prompt, params, *when: seen.append(params.priority) or add(prompt, params, *when)
        with serving(chapter, engine, allow_priority=True) as server:
            assert HTTP.post(server.url + path, json=body | {"priority": -3}).status_code == 200
            answer = HTTP.post(server.url + path, json=body | {"priority": 2**31})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"
    finally:
        del engine.add_request
    assert seen == [-3]


@pytest.mark.whole
def test_preempted_requests_do_not_count_as_waiting(chapter):
    """The queue has room for three calls while preempted requests wait; /health counts them separately."""
    engine = chapter.load().Engine(checkpoint("pocket"), num_blocks=60, block_size=16, reserve_tokens=0, max_num_seqs=8)
    body = {"model": "pocket", "prompt": [20] * 40, "max_tokens": 500, "ignore_eos": True, "n": 3, "stream": True}
    with serving(chapter, engine, max_waiting=3, allow_priority=True) as server:
        with HTTP.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)

            def preempted():
                next(lines)
                return HTTP.get(f"{server.url}/health").json()["preempted"]

            wait_until(preempted, 30)
            health = HTTP.get(f"{server.url}/health").json()
            assert health["waiting"] == 0 and health["preemptions"] >= 1 and health["running"] in (1, 2)
            short = {"model": "pocket", "prompt": "Hello", "max_tokens": 2, "n": 3, "priority": -1}
            assert HTTP.post(f"{server.url}/v1/completions", json=short).status_code == 200


def test_a_preempted_stream_continues_where_it_was(chapter, make_engine, Params):
    engine = chapter.load().Engine(checkpoint("pocket"), num_blocks=24, block_size=4, reserve_tokens=0)
    prompt = "Once upon a time"
    [want] = make_engine("pocket").generate([prompt], Params(max_tokens=60))
    body = {"model": "pocket", "prompt": prompt, "max_tokens": 60, "temperature": 0, "n": 3, "stream": True}
    with serving(chapter, engine) as server:
        texts = {0: "", 1: "", 2: ""}
        for event in events_of(HTTP.post(f"{server.url}/v1/completions", json=body)):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert HTTP.get(f"{server.url}/health").json()["preemptions"] > 0
    assert list(texts.values()) == [want.text] * 3


@pytest.mark.whole
@pytest.mark.parametrize("way", ["recompute", "swap"])
def test_a_drain_finishes_preempted_requests_too(chapter, way):
    engine = chapter.load().Engine(checkpoint("pocket"), num_blocks=60, block_size=16, reserve_tokens=0, swap_bytes=WAYS[way])
    body = {"model": "pocket", "prompt": [20] * 40, "max_tokens": 400, "ignore_eos": True, "n": 3, "stream": True}
    with serving(chapter, engine) as server:
        with HTTP.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            wait_until(lambda: next(lines) is not None and HTTP.get(f"{server.url}/health").json()["preempted"], 30)
            server.handle_exit(signal.SIGTERM, None)
            assert HTTP.get(f"{server.url}/health").json()["status"] == "draining"
            rest = "".join(lines)
        assert rest.endswith("data: [DONE]") and rest.count('"finish_reason": "length"') == 3
        wait_until(lambda: server.should_exit)
    assert engine.pool.num_free == 60 and engine.swap.pool.num_free == engine.swap.pool.num_blocks


@pytest.mark.whole
def test_a_client_that_hangs_up_while_it_is_swapped_out_leaves_nothing(chapter):
    engine = chapter.load().Engine(checkpoint("pocket"), num_blocks=60, block_size=16, reserve_tokens=0, swap_bytes=WAYS["swap"])
    body = {"model": "pocket", "prompt": [20] * 40, "max_tokens": 400, "ignore_eos": True, "n": 3, "stream": True}
    with serving(chapter, engine) as server:
        with HTTP.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            wait_until(lambda: next(lines) is not None and HTTP.get(f"{server.url}/health").json()["swapped_blocks"], 30)

        def health():
            return HTTP.get(f"{server.url}/health").json()

        wait_until(lambda: not health()["running"] and not health()["preempted"])
        assert health()["swapped_blocks"] == 0 and health()["free_blocks"] == 60
