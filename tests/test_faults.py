"""A step that raises: what an engine does with the requests in it."""
import queue

import pytest
import torch

from shared.workloads import random_ids

pytestmark = pytest.mark.needs("serve")


@pytest.mark.parametrize("where", ["model", "commit"])
def test_after_a_fault_its_requests_are_gone_its_blocks_clean_and_the_rest_goes_on(make_engine, Params, rng, monkeypatch, where):
    """The fault leaves NaN in the step's blocks, which must not reach their next owner."""
    engine = make_engine("llama", max_num_seqs=2, num_blocks=6, block_size=4)
    # The last two run together; the very last has to take used blocks, and has dirty slots past its end.
    prompts = [random_ids(n, engine.config.vocab_size, rng) for n in (6, 6, 7, 5)]
    params = Params(max_tokens=4, ignore_eos=True)
    wanted = engine.generate(prompts, params)
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    engine.step()

    def fault(*_args):
        for seq in engine.scheduler.running:
            engine.cache.k[:, seq.block_table] = torch.nan
            engine.cache.v[:, seq.block_table] = torch.nan
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model if where == "model" else engine, "forward" if where == "model" else "commit", fault)
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
    assert sorted(engine.fail_step()) == ids[:2]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks, stats.total_blocks) == (0, 2, 6, 6)
    tokens = {ids[2]: [], ids[3]: []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
    assert list(tokens.values()) == [done.token_ids for done in wanted[2:]]
    assert [done.token_ids for done in engine.generate(prompts, params)] == [done.token_ids for done in wanted]


def test_a_request_that_finished_in_the_failed_step_is_among_the_failed(make_engine, Params, monkeypatch):
    """Its last output is lost with the others."""
    engine = make_engine("llama", max_num_seqs=2, num_blocks=6, block_size=4)
    ids = [engine.add_request([9, 10, 11], Params(max_tokens=max_tokens, ignore_eos=True)) for max_tokens in (1, 4)]
    accept = engine.accept

    def fault(seq, *rest):
        if seq.seq_id == ids[1]:
            raise RuntimeError("injected")
        return accept(seq, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "accept", fault)
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
    assert engine.fail_step() == ids
    assert not engine.has_unfinished_requests() and engine.pool.num_free == 6
    # Requests that finished before take no part in a fault of the next step.
    engine.add_request([9], Params(max_tokens=1))
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "schedule", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.fail_step() == []
    engine.close()
    assert not engine.has_unfinished_requests()


def test_a_device_that_has_failed_for_good_ends_the_engine(make_engine, Params, monkeypatch, module):
    """Every later step would raise as well. A server that goes on would answer each request with an error, and report `ok`."""
    engine = make_engine("llama", max_num_seqs=2, num_blocks=6, block_size=4)
    posted = []
    inbox = queue.SimpleQueue()
    messages = module("engine_loop")

    def send(message, _stats):
        posted.append(message)
        if isinstance(message, messages.Failed):
            inbox.put(messages.Stop())

    inbox.put(messages.Add(1, [([9, 10, 11], Params(max_tokens=2, ignore_eos=True))]))
    monkeypatch.setattr(engine.model, "forward", lambda *_args: 1 / 0)
    monkeypatch.setattr(engine, "device", torch.device("meta"))  # what is on it cannot be read
    messages.EngineLoop(engine, inbox, send).run()
    assert [type(message) for message in posted] == [messages.Added, messages.Died] and "meta" in posted[-1].reason
    assert not engine.has_unfinished_requests() and engine.pool.num_free == 6
