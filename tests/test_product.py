"""Every feature at once: each request generates what it generates alone."""
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from shared.verify import product

pytestmark = pytest.mark.needs(*product.NEEDS)

# Probabilities are rounded differently in another batch. So a sampled token may differ from the one that is generated
# alone, without a bug, if its random number is within about 5e-7 of the edge between two tokens, and a greedy one if
# the two largest logits are as close. These seeds have no such token.
SEEDS = 24, 1, 10, 13, 15  # few, which together exercise everything
MORE_SEEDS = range(30)
SHAPED_SEEDS = range(product.SHAPED + 1, product.SHAPED + 6)
TOOLED_SEEDS = 202, 203, 207  # one with each checkpoint


@pytest.mark.needs("grammars")
def test_each_request_with_penalties_or_a_grammar_generates_what_it_generates_alone(chapter):
    events = product.rounds(chapter, SHAPED_SEEDS)
    # A text that its grammar ends has neither a stop token nor a stop string.
    assert events["finished: stop"] > 10 and events["finished: stop token"] and events["finished: length"]
    assert all(events[state] for state in product.PREEMPTED) and events["steps failed"]


@pytest.mark.needs("tools")
def test_each_request_that_may_call_functions_generates_what_it_generates_alone(chapter):
    events = product.rounds(chapter, TOOLED_SEEDS)
    assert events["whole calls"] > 4 and events["finished: stop"] > 5 and events["finished: length"] and events["steps failed"]
    assert all(events[state] for state in product.PREEMPTED) and events["found the beginning of a prompt"]
    assert events[f"steps after which a request is {product.MID_PROMPT}"]


@pytest.mark.parametrize("seeds", [pytest.param(SEEDS, id="few"), pytest.param(MORE_SEEDS, id="many", marks=pytest.mark.whole)])
def test_each_request_generates_what_it_generates_alone(chapter, module, seeds):
    events = product.rounds(chapter, seeds)
    expected = {f"finished: {reason}" for reason in ("length", "stop string", "stop token", "abort", "error")}
    expected |= {"aborted while running", "aborted while waiting to start", "steps failed"}
    if "preemption" in chapter.capabilities:
        expected |= {*product.PREEMPTED, "steps failed while preempted requests waited"}
        expected |= {f"aborted while {state}" for state in product.PREEMPTED}
    if "prefix_cache" in chapter.capabilities:
        expected |= {"found the beginning of a prompt", "found tokens again after a preemption", "found what it had swapped out"}
        expected |= {"waited for a block that another request computed"}
    if "linear" in chapter.capabilities and module("storage").HAS_BLOCKS and module("storage").HAS_HALVES:
        expected |= {f"engines with linear layers {form}" for form in ("plain", *module("storage").FORMS)}
    assert expected <= {event for event, count in events.items() if count > 0}


# ---- it notices bugs


def one_random_generator(module, patch):
    patch.setattr(module("sampling"), "uniform", lambda seed, index: random.random())


def no_block_is_cleared(module, patch):
    write = module("cache").KVCache.write

    def bug(self, layer_id, k, v, batch):
        write(self, layer_id, k, v, SimpleNamespace(new_blocks=batch.new_blocks[:0], slot_mapping=batch.slot_mapping))

    patch.setattr(module("cache").KVCache, "write", bug)


def a_fault_ends_all_requests(module, patch):
    def bug(self):
        request_ids = list(self.seqs)
        self.close()
        return request_ids

    patch.setattr(module("engine").Engine, "fail_step", bug)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (one_random_generator, "tokens .*, alone"),
        (no_block_is_cleared, "the logits of token .* are not finite"),
        (a_fault_ends_all_requests, "have failed, but .* were in the step"),
    ],
)
def test_it_notices_a_bug(chapter, module, monkeypatch, bug, message):
    bug(module, monkeypatch)
    with pytest.raises(AssertionError, match=message) as caught:
        product.rounds(chapter, SEEDS)
    assert f"product {chapter.id} --seed" in caught.value.__notes__[-1]


def a_preempted_request_counts_as_computed(module, patch):
    """It has no blocks, and its next ones hold nothing of it."""
    preempt = module("scheduler").Scheduler.preempt

    def bug(self, seq):
        num_computed = seq.num_computed
        preempt(self, seq)
        seq.num_computed = num_computed

    patch.setattr(module("scheduler").Scheduler, "preempt", bug)


def a_preempted_request_starts_over(module, patch):
    preempt = module("scheduler").Scheduler.preempt

    def bug(self, seq):
        preempt(self, seq)
        if not seq.swap_table:
            del seq.token_ids[seq.num_prompt :]

    patch.setattr(module("scheduler").Scheduler, "preempt", bug)


def swapped_into_the_wrong_blocks(module, patch):
    load = module("cache").SwapSpace.load
    patch.setattr(module("cache").SwapSpace, "load", lambda self, swap_table, block_table, *rest: load(self, swap_table, block_table[::-1], *rest))


def copies_are_not_freed(module, patch):
    def bug(self, seq):
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.give_back(seq)

    patch.setattr(module("scheduler").Scheduler, "release", bug)


@pytest.mark.whole
@pytest.mark.needs("preemption")
@pytest.mark.parametrize(
    ("bug", "audited", "message"),
    [
        (a_preempted_request_counts_as_computed, True, "and holds 0 swapped"),
        (a_preempted_request_counts_as_computed, False, "tokens .*, alone|logprobs at|are not finite"),
        (a_preempted_request_starts_over, True, "tokens .*, alone"),
        (swapped_into_the_wrong_blocks, True, "tokens .*, alone|logprobs at|are not finite"),
        (copies_are_not_freed, True, "swap blocks are lost"),
    ],
)
def test_it_notices_a_bug_in_preemption(chapter, module, monkeypatch, bug, audited, message):
    bug(module, monkeypatch)
    if not audited:
        monkeypatch.setattr(product, "audit", lambda engine: None)
        monkeypatch.setattr(product, "watch", lambda engine: nullcontext())
    with pytest.raises(AssertionError, match=message):
        product.rounds(chapter, (*SEEDS, 7))


def a_key_without_the_blocks_before_it(module, patch):
    key = module("sequence").block_key
    patch.setattr(module("sequence"), "block_key", lambda parent, token_ids: key(b"", token_ids))


def a_key_without_the_salt(module, patch):
    key = module("engine").root_key
    patch.setattr(module("engine"), "root_key", lambda salt, *generation: key(None, *generation))


def found_before_it_is_computed(module, patch):
    grow = module("scheduler").Scheduler.grow

    def bug(self, seq):
        if not grow(self, seq):
            return False
        num_computed, seq.num_computed = seq.num_computed, seq.num_tokens
        self.publish(seq)
        seq.num_computed = num_computed
        return True

    patch.setattr(module("scheduler").Scheduler, "grow", bug)


def freed_although_others_hold_it(module, patch):
    def bug(self, block_ids):
        for block_id in reversed(block_ids):
            self.num_owners[block_id] = 0
            self.free_ids[block_id] = None

    patch.setattr(module("cache").BlockPool, "free", bug)


def found_and_still_in_the_free_list(module, patch):
    def bug(self, block_ids):
        for block_id in block_ids:
            self.num_owners[block_id] += 1

    patch.setattr(module("cache").BlockPool, "share", bug)


def no_token_is_left_to_feed(module, patch):
    def bug(self, seq):
        return 0 if seq.params.prompt_logprobs or not self.enable_prefix_caching else seq.num_tokens // self.pool.block_size

    patch.setattr(module("scheduler").Scheduler, "most_cached", bug)


def found_under_prompt_logprobs(module, patch):
    def bug(self, seq):
        return 0 if not self.enable_prefix_caching else (seq.num_tokens - 1) // self.pool.block_size

    patch.setattr(module("scheduler").Scheduler, "most_cached", bug)


def what_failed_can_be_found(module, patch):
    patch.setattr(module("engine").Engine, "reset_prefix_cache", lambda self: None)
    give_back = module("scheduler").Scheduler.give_back

    def bug(self, seq):
        reason, seq.finish_reason = seq.finish_reason, None
        give_back(self, seq)
        seq.finish_reason = reason

    patch.setattr(module("scheduler").Scheduler, "give_back", bug)


def an_aborted_requests_last_block_can_be_found(module, patch):
    give_back = module("scheduler").Scheduler.give_back

    def bug(self, seq):
        if seq.finish_reason == "abort":
            seq.num_computed = len(seq.block_table) * self.pool.block_size
        give_back(self, seq)

    patch.setattr(module("scheduler").Scheduler, "give_back", bug)


def counted_again_after_a_preemption(module, patch):
    share = module("scheduler").Scheduler.share

    def bug(self, seq, found):
        seq.num_cached = None
        share(self, seq, found)

    patch.setattr(module("scheduler").Scheduler, "share", bug)


def known_by_its_old_key(module, patch):
    allocate = module("cache").BlockPool.allocate

    def bug(self, num_blocks):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "forget", lambda block_ids: None)
            return allocate(self, num_blocks)

    patch.setattr(module("cache").BlockPool, "allocate", bug)


def nothing_waits_for_what_is_being_computed(module, patch):
    patch.setattr(module("scheduler").Scheduler, "awaits", lambda self, *args: False)


@pytest.mark.whole
@pytest.mark.needs("prefix_cache")
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (a_key_without_the_blocks_before_it, "the same key|contents with their keys|tokens; the longest beginning"),
        (a_key_without_the_salt, "the same key|contents with their keys|tokens; the longest beginning"),
        (found_before_it_is_computed, "hold nothing that may be|is not yet full|published blocks; the longest"),
        (freed_although_others_hold_it, "both held and free|owners are miscounted"),
        (found_and_still_in_the_free_list, "both held and free|which holds something else|owners are miscounted"),
        (no_token_is_left_to_feed, "tokens; the longest beginning in the cache has"),
        (found_under_prompt_logprobs, "tokens; the longest beginning in the cache has"),
        (what_failed_can_be_found, "hold nothing that may be"),
        (an_aborted_requests_last_block_can_be_found, "hold nothing that may be"),
        (counted_again_after_a_preemption, "cached tokens, earlier|cached tokens instead of"),
        (known_by_its_old_key, "hold nothing that may be|is not yet full"),
        (nothing_waits_for_what_is_being_computed, "that another request computes in the same step"),
    ],
)
def test_it_notices_a_bug_in_the_prefix_cache(chapter, module, monkeypatch, bug, message):
    bug(module, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        product.rounds(chapter, SEEDS)


def the_engine_feeds_all_again(module, patch):
    """Nothing is ever found. All results are right."""
    patch.setattr(module("scheduler").Scheduler, "find", lambda self, seq: [])


def the_outputs_disagree(module, patch):
    accept = module("engine").Engine.accept

    def bug(self, seq, *args):
        output = accept(self, seq, *args)
        return output._replace(num_cached=output.num_cached + (seq.num_output > 1))

    patch.setattr(module("engine").Engine, "accept", bug)


@pytest.mark.needs("prefix_cache")
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (the_engine_feeds_all_again, "tokens; the longest beginning in the cache has|computes in the same step"),
        (the_outputs_disagree, "cached tokens, earlier"),
    ],
)
def test_it_notices_what_changes_no_token(chapter, module, monkeypatch, bug, message):
    bug(module, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        product.rounds(chapter, SEEDS)


def keys_and_values_change_places(module, patch):
    """In each step alike. What an engine generates alone, with plain layers, is right."""
    groups_of = module("storage").groups_of

    def bug(model):
        for group in groups_of(model):
            yield [group[0], group[2], group[1]] if len(group) == 3 else group

    patch.setattr(module("storage"), "groups_of", bug)


def weights_lose_bits(module, patch):
    """All keep as many as bfloat16 has. One of the checkpoints of these rounds has more."""
    for form in module("storage").FORMS.values():
        init = form.__init__
        patch.setattr(form, "__init__", lambda self, weight, *bias, init=init: init(self, weight.bfloat16().float(), *bias))


@pytest.mark.whole
@pytest.mark.needs("linear")
@pytest.mark.parametrize("bug", [keys_and_values_change_places, weights_lose_bits])
def test_it_notices_a_bug_in_a_form(chapter, module, monkeypatch, bug):
    bug(module, monkeypatch)
    with pytest.raises(AssertionError, match="tokens .*, alone|logprobs at"):
        product.rounds(chapter, SEEDS)


# ---- the command line


@pytest.mark.whole
def test_it_prints_what_the_rounds_exercised(chapter, capsys):
    assert product.main([chapter.id, "--seed", "1", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{chapter.name}: in 1 rounds, every request generates what it generates alone" in printed
    assert "finished: length" in printed


def test_it_refuses_a_chapter_that_lacks_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        product.main(["v05"])
    assert "v05 lacks prompt_logprobs, stop_strings; the first chapter with all that is needed is v08" in capsys.readouterr().err
