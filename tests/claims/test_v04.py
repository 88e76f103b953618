"""v04: schedule every step anew; a row freed now is taken in the next step."""
import pytest

from shared.bench.recorder import record
from shared.checkpoints import checkpoint
from shared.workloads import Request, fixed, random_ids, staircase

# Five requests for two rows: prompt length, output length.
LENGTHS = [(3, 4), (5, 2), (2, 3), (1, 1), (4, 2)]


def trace_of(chapter, engine, requests):
    trace, _ = record(chapter, engine, requests)
    return trace


def test_a_row_freed_now_is_taken_in_the_next_step(chapter, make_engine):
    """The requests in each step, and its positions: prompts and single tokens share it, without padding."""
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=2), fixed(LENGTHS, 401))
    assert trace.ledger() == [
        {0: 3, 1: 5},
        {0: 1, 1: 1},
        {0: 1, 2: 2},
        {0: 1, 2: 1},
        {2: 1, 3: 1},
        {4: 4},
        {4: 1},
    ]
    assert trace.num_positions == trace.num_needed == 3 + 3 + 5 + 1 + 2 + 2 + 1 + 0 + 4 + 1


def test_a_new_request_joins_the_next_step_if_there_is_room(chapter, make_engine):
    requests = [Request([9, 10], 6), Request([11], 1, arrival_step=1), Request([12], 1, arrival_step=2)]
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=3), requests)
    assert trace.ledger() == [{0: 2}, {0: 1, 1: 1}, {0: 1, 2: 1}, {0: 1}, {0: 1}, {0: 1}]


def test_a_short_request_ends_before_a_long_one_that_came_first(chapter, make_engine):
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=3), fixed([(4, 30), (6, 20), (5, 3), (2, 4)], 401))
    assert trace.ends() == [30, 20, 3, 7]


def test_an_aborted_request_leaves_at_once_and_the_next_takes_its_row(chapter, make_engine):
    requests = [Request([9, 10], 5), Request([11], 5, abort_step=2), Request([12], 2), Request([13], 1, abort_step=1)]
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=2), requests)
    assert trace.ledger() == [{0: 2, 1: 1}, {0: 1, 1: 1}, {0: 1, 2: 1}, {0: 1, 2: 1}, {0: 1}]


@pytest.mark.until("v05")
def test_rows_are_handed_out_again_the_longest_free_first(chapter):
    fresh = chapter.load().Engine(checkpoint("qwen2"), max_num_seqs=3)
    trace = trace_of(chapter, fresh, fixed([(1, 4), (1, 2), (1, 1), (1, 3), (1, 1)], 401))
    assert [[(part.request, *part.rows) for part in each.parts] for each in trace.passes] == [
        [(0, 0), (1, 1), (2, 2)],
        [(0, 0), (1, 1), (3, 2)],
        [(0, 0), (3, 2), (4, 1)],
        [(0, 0), (3, 2)],
    ]


@pytest.mark.until("v05")
def test_every_row_has_one_owner_and_all_come_back(make_engine, Params, rng):
    """Whether a request finishes, or is aborted while it waits, at once, or halfway."""
    engine = make_engine("qwen2", max_num_seqs=3)
    ids = []
    for step_id in range(60):
        if step_id < 40:
            prompt_ids = random_ids(rng.randint(1, 9), 401, rng)
            ids.append(engine.add_request(prompt_ids, Params(max_tokens=rng.randint(1, 9), ignore_eos=True)))
        engine.step()
        if rng.random() < 0.3:
            engine.abort_request(rng.choice(ids))
        held = [seq.row for seq in engine.scheduler.running]
        assert sorted([*held, *engine.scheduler.free_rows]) == [0, 1, 2]
    for request_id in ids:
        engine.abort_request(request_id)
    assert sorted(engine.scheduler.free_rows) == [0, 1, 2]


def test_nothing_starves(chapter, make_engine):
    """First come, first served: a later request starts later, however short it is."""
    requests = [Request([9] * (1 + i % 5), 1 + 7 * (i % 3), arrival_step=i // 2) for i in range(20)]
    trace = trace_of(chapter, make_engine("llama", max_num_seqs=3), requests)
    first = {}
    for number, each in enumerate(trace.passes):
        for part in each.parts:
            first.setdefault(part.request, number)
    assert list(first) == sorted(first) == list(range(20))


@pytest.mark.whole
@pytest.mark.until("v05")
def test_while_any_request_waits_every_row_gets_a_token(chapter, make_engine):
    """32 ragged requests, 8 rows. On the same workload, v03 wastes half of them."""
    engine = make_engine("llama", max_num_seqs=8)
    trace = trace_of(chapter, engine, staircase(401))
    assert trace.useful_share() >= 0.95
    assert trace.num_needed / trace.num_positions == 1.0


@pytest.mark.until("v05")
def test_no_more_of_a_row_is_copied_than_is_read(make_engine, Params):
    engine = make_engine("llama", max_num_seqs=3)
    read, found = engine.cache.read, []
    engine.cache.read = lambda layer_id, rectangle: found.append(read(layer_id, rectangle)) or found[-1]
    try:
        engine.generate([[9] * 5, [10] * 7], Params(max_tokens=2, ignore_eos=True))
    finally:
        del engine.cache.read
    assert all(kv.untyped_storage().nbytes() == kv.nbytes for pair in found for kv in pair)
    assert [k.shape[:2] for k, _ in found[::3]] == [(1, 5), (1, 7), (2, 8)]


def test_every_prompt_is_computed_once_beside_other_requests_single_tokens(make_engine, tokens_per_pass, Params):
    """No step computes a prompt alone or is padded: 5 + 1 + 1, then two of one token each."""
    engine = make_engine("llama", max_num_seqs=4)
    for prompt_ids in ([9, 10, 11], [12]):
        engine.add_request(prompt_ids, Params(max_tokens=3, ignore_eos=True))

    def run():
        engine.step()
        engine.add_request([13, 14, 15, 16, 17], Params(max_tokens=2, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()

    assert tokens_per_pass(engine, run) == [4, 7, 3]


@pytest.mark.until("v05")
def test_what_sees_one_token_at_a_time_is_byte_for_byte_what_it_was(chapter):
    """Static and continuous batching differ in the schedule and in the batch; the loop is the same."""
    same = ("layers.py", "model.py", "loader.py", "config.py", "sampling.py", "text.py", "engine.py", "__main__.py")
    for name in same:
        assert (chapter.path / name).read_bytes() == (chapter.previous.path / name).read_bytes(), name
