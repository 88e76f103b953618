"""Memory over many requests, in any order of calls."""
import random

import pytest
from hypothesis import Phase, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from shared.checkpoints import checkpoint
from shared.verify.soak import audit, soak
from shared.workloads import random_ids

pytestmark = pytest.mark.needs("num_blocks", "abort")


def test_a_hundred_and_fifty_requests_leave_nothing_behind(chapter, make_engine):
    form = {"linear": "joined"} if "linear" in chapter.capabilities else {}
    engine = make_engine("llama", max_num_seqs=9, num_blocks=31, block_size=7, **form)
    ended = soak(chapter, engine, num_requests=150)
    assert sum(ended.values()) == 150
    assert ended["abort"] > 5 and ended["length"] > 50 and ended["stop"] > 0


def test_no_order_of_calls_leaks_a_block(chapter, Params):
    class Calls(RuleBasedStateMachine):
        """add, step, abort and finish in every order; after each call every block has the owners that it counts, or one."""

        def __init__(self):
            super().__init__()
            self.engine = chapter.load().Engine(checkpoint("qwen2"), max_num_seqs=3, num_blocks=13, block_size=3)
            self.ids, self.got, self.expected = [], {}, {}

        @rule(length=strategies.integers(1, 12), max_tokens=strategies.integers(1, 14))
        def add(self, length, max_tokens):
            prompt_ids = random_ids(length, self.engine.config.vocab_size, random.Random(length))
            request_id = self.engine.add_request(prompt_ids, Params(max_tokens=max_tokens, ignore_eos=True))
            self.ids.append(request_id)
            self.got[request_id], self.expected[request_id] = 0, max_tokens
            audit(self.engine)

        @rule(steps=strategies.integers(1, 9))
        def step(self, steps):
            for _ in range(steps):
                for output in self.engine.step():
                    self.got[output.request_id] += 1
                    if output.finish_reason:
                        assert self.got[output.request_id] == self.expected.pop(output.request_id)
                audit(self.engine)

        @precondition(lambda self: self.ids)
        @rule(data=strategies.data())
        def abort(self, data):
            request_id = data.draw(strategies.sampled_from(self.ids))
            assert self.engine.abort_request(request_id) is (self.expected.pop(request_id, None) is not None)
            audit(self.engine)

        def teardown(self):
            while self.engine.has_unfinished_requests():
                self.step(1)
            assert not self.expected
            assert self.engine.pool.num_free == self.engine.pool.num_blocks

    # Without shrinking: a failing sequence of calls is short enough to read, and found at once.
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            phases=[Phase.generate],
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )


@pytest.mark.needs("prefix_cache")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool, one, two: pool.num_owners.__setitem__(one[0], 1), "owners are miscounted"),
        (lambda pool, one, two: pool.publish(one[-1], b"another key"), "is not yet full"),
        (lambda pool, one, two: pool.key_of.pop(one[0]), "key_of and blocks_of differ"),
        (lambda pool, one, two: pool.blocks_of.update({b"no block's": []}), "a key is left without a block"),
        (lambda pool, one, two: (pool.forget(two[1:2]), pool.publish(two[1], pool.key_of[one[1]])), "contents with their keys"),
    ],
)
def test_the_audit_sees_what_is_wrong_with_shared_blocks(chapter, damage, message):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=19, block_size=4)
    for tail in ([8] * 5, [9] * 5):
        engine.add_request([7] * 4 + tail, chapter.load().SamplingParams(max_tokens=9, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.scheduler.schedule()
    audit(engine)
    one, two = (list(seq.block_table) for seq in engine.scheduler.running)
    assert one[0] == two[0] and one[1] != two[1]
    damage(engine.pool, one, two)
    with pytest.raises(AssertionError, match=message):
        audit(engine)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda engine, seq: engine.pool.free_ids.update({seq.block_table[0]: None}), "have several owners"),
        (lambda engine, seq: engine.pool.free_ids.popitem(), "1 blocks are lost"),
        (lambda engine, seq: seq.block_table.append(engine.pool.free_ids.popitem()[0]), "holds 3"),
    ],
)
def test_the_audit_sees_what_it_is_there_for(chapter, damage, message):
    engine = chapter.load().Engine(checkpoint("llama"), num_blocks=9, block_size=4)
    engine.add_request([9] * 5, chapter.load().SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    audit(engine)
    damage(engine, engine.scheduler.running[0])
    with pytest.raises(AssertionError, match=message):
        audit(engine)
