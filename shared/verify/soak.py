"""Run thousands of requests, some of them aborted, on a small cache; check that no block leaks and no request is lost.

    make soak                                  # every chapter with a block pool
    make soak ARGS="v05 --requests 5000"
"""
import argparse
import contextlib
import io
import random
from collections import Counter

from shared.bench.timing import progress
from shared.chapters import CHAPTERS, find, first_with
from shared.checkpoints import checkpoint
from shared.programs import run
from shared.verify.findable import forget, watch
from shared.workloads import random_ids


def audit(engine) -> None:
    """AssertionError unless every block is free or has an owner, and owners hold only the blocks their tokens need.

    A block has exactly one owner or, if the chapter has a prefix cache, as many as it counts.
    """
    pool, running = engine.pool, engine.scheduler.running
    held = Counter(block_id for seq in running for block_id in seq.block_table)
    shares = hasattr(pool, "num_owners")
    held_or_free = (Counter(held.keys()) if shares else held) + Counter(list(pool.free_ids))
    twice = [block_id for block_id, count in held_or_free.items() if count > 1]
    assert not twice, f"blocks {twice} have several owners, or are both held and free"
    assert held_or_free.keys() == set(range(pool.num_blocks)), f"{pool.num_blocks - len(held_or_free)} blocks are lost"
    for seq in running:
        size = len(seq.block_table)
        needs = pool.blocks_for(seq.num_computed), pool.blocks_for(seq.num_tokens)
        assert needs[0] <= size <= needs[1], f"sequence {seq.seq_id} holds {size} blocks, and needs {needs[0]} to {needs[1]}"
    for seq in engine.scheduler.waiting:
        assert not seq.block_table, f"sequence {seq.seq_id} is waiting and holds blocks {seq.block_table}"
    if shares:
        audit_owners(pool, running, held)
        audit_findable(pool, running)
    if hasattr(engine, "swap"):
        audit_swap(engine)
    else:
        reserved = sum(engine.scheduler.reserved(seq) for seq in running)
        assert reserved <= pool.num_blocks, f"{reserved} of {pool.num_blocks} blocks are reserved"


def audit_owners(pool, running: list, held: Counter) -> None:
    """The pool counts for each block the tables that hold it; no table holds a block twice."""
    for seq in running:
        assert len(set(seq.block_table)) == len(seq.block_table), f"sequence {seq.seq_id} holds a block twice: {list(seq.block_table)}"
    wrong = {block_id: count for block_id, count in enumerate(pool.num_owners) if count != held[block_id]}
    assert not wrong, f"owners are miscounted: {wrong}, but the tables hold {dict(held)}"


def audit_findable(pool, running: list) -> None:
    """The pool's two dictionaries say the same, and of a running sequence only full blocks can be found, each by what it holds.

    What it holds is compared as tokens: two blocks must have the same key if they hold the same ones, from the same root
    on, and otherwise different keys.
    """
    pairs = [(block_id, key) for key, block_ids in pool.blocks_of.items() for block_id in block_ids]
    assert dict(pairs) == pool.key_of and len(pairs) == len(pool.key_of), "key_of and blocks_of differ"
    assert all(pool.blocks_of.values()), "a key is left without a block"
    contents = {}
    for seq in running:
        for i, block_id in enumerate(seq.block_table):
            end = (i + 1) * pool.block_size
            if end > seq.num_computed:
                assert block_id not in pool.key_of, f"block {block_id} of sequence {seq.seq_id} can be found, and is not yet full"
                continue
            content = seq.block_keys[0], seq.params.cache_salt, tuple(seq.token_ids[:end])
            assert contents.setdefault(block_id, content) == content, f"block {block_id} is shared by sequences that differ"
    by_key = {(pool.key_of[block_id], content) for block_id, content in contents.items() if block_id in pool.key_of}
    ones = len({key for key, _ in by_key}), len({content for _, content in by_key})
    assert ones == (len(by_key), len(by_key)), f"{len(by_key)} contents with their keys are {ones[0]} keys and {ones[1]} contents"


def audit_swap(engine) -> None:
    """Requests stand by rank, and every block of the swap space is free or holds what one preempted request has computed."""
    scheduler, pool = engine.scheduler, engine.swap.pool
    for seqs in (scheduler.running, scheduler.waiting):
        ranks = [seq.rank for seq in seqs]
        assert ranks == sorted(ranks), f"not by rank: {ranks}"
    assert not any(seq.swap_table or seq.preempted for seq in scheduler.running), "a running request is swapped out"
    held = Counter(block_id for seq in scheduler.waiting for block_id in seq.swap_table) + Counter(list(pool.free_ids))
    assert held == Counter(range(pool.num_blocks)), "swap blocks are lost, or have several owners"
    for seq in scheduler.waiting:
        computed = pool.blocks_for(seq.num_computed)
        assert len(seq.swap_table) == computed, f"{seq.seq_id} has computed {computed} blocks and holds {len(seq.swap_table)} swapped"


def soak(chapter, engine, num_requests: int, seed: int = 0, fault_share: float = 0.0) -> Counter:
    """Run random requests, several at a time, with an audit after every step; the number of each finish reason.

    Every hundredth request, unless aborted or failed, must generate the same tokens when it runs alone; AssertionError if not.

    fault_share: the share of steps whose forward pass raises. The requests in them fail; the others must not notice.
    """
    with watch(engine) as model:
        ended, tried = run_soak(chapter, engine, num_requests, random.Random(seed), fault_share, model)
    for prompt_ids, params, token_ids in tried:
        forget(engine)
        [alone] = engine.generate([prompt_ids], params)
        assert alone.token_ids == token_ids, f"{prompt_ids} generates other tokens when it runs alone"
    return ended


def run_soak(chapter, engine, num_requests: int, rng: random.Random, fault_share: float, model) -> tuple[Counter, list[tuple]]:
    """The finish reasons, and of every hundredth request its prompt, parameters and tokens."""
    package, ended, tokens, tried = chapter.load(), Counter(), {}, {}
    # Half of the prompts begin like one of these.
    beginnings = [random_ids(30, engine.config.vocab_size, rng) for _ in range(3)]
    added = 0
    bar = progress(range(num_requests), chapter.id)
    while added < num_requests or engine.has_unfinished_requests():
        while added < num_requests and rng.random() < 0.5:
            shared = rng.choice(beginnings)[: rng.randint(1, 30)] if rng.random() < 0.5 else []
            prompt_ids = shared + random_ids(rng.randint(0 if shared else 1, 40 - len(shared)), engine.config.vocab_size, rng)
            params = package.SamplingParams(
                max_tokens=rng.randint(1, 30),
                temperature=rng.choice((0.0, 1.0)),
                seed=added,
                stop_token_ids=tuple(range(100, 120)) if rng.random() < 0.3 else (),
                **({"priority": rng.randint(-1, 1)} if "preemption" in chapter.capabilities else {}),
                **({"cache_salt": rng.choice((None, None, "a", "b"))} if "prefix_cache" in chapter.capabilities else {}),
            )
            request_id = engine.add_request(prompt_ids, params)
            tokens[request_id] = []
            if added % 100 == 0:
                tried[request_id] = prompt_ids, params
            added += 1
            next(bar, None)
        if tokens and rng.random() < 0.1:
            request_id = rng.choice(list(tokens))
            if engine.abort_request(request_id):
                ended["abort"] += 1
                del tokens[request_id]
                tried.pop(request_id, None)
        for output in step(engine, fails=rng.random() < fault_share):
            tokens[output.request_id].append(output.token_id)
            if output.finish_reason:
                ended[output.finish_reason] += 1
                token_ids = tokens.pop(output.request_id)
                if output.request_id in tried:
                    tried[output.request_id] += (token_ids,)
        for request_id in [request_id for request_id in tokens if request_id not in engine.seqs]:
            ended["error"] += 1
            del tokens[request_id]
            tried.pop(request_id, None)
        audit(engine)
        if model is not None:
            model.check()
    assert not tokens, f"requests {list(tokens)} never finished"
    assert engine.pool.num_free == engine.pool.num_blocks
    return ended, list(tried.values())


class Fault(Exception):
    """What a forward pass that should fail raises."""


def step(engine, fails: bool) -> list:
    """One step's outputs; if it fails, none, and the engine has ended the requests that were in it."""
    if not fails:
        return engine.step()
    forward = engine.model.forward

    def failing(_batch):
        raise Fault

    engine.model.forward = failing
    try:
        return engine.step()
    except Fault:
        engine.fail_step()
        return []
    finally:
        engine.model.forward = forward


# Engines of a chapter that preempts: tiny caches, and each way in which a preempted request continues.
PREEMPTING = (
    {"num_blocks": 23, "reserve_tokens": 0},
    {"num_blocks": 23, "reserve_tokens": 3, "swap_bytes": 10**7},
    {"num_blocks": 13, "reserve_tokens": 0, "swap_bytes": 50_000},  # often full
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.verify.soak")
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="default: all with a block pool")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        chapters = [find(text) for text in args.chapters]
    except ValueError as error:
        parser.error(str(error))
    if unable := [chapter.id for chapter in chapters if "num_blocks" not in chapter.capabilities]:
        parser.error(f"this audits blocks, and {', '.join(unable)} has none; name {first_with('num_blocks').id} or later chapters")
    if args.requests < 1:
        parser.error(f"--requests must be at least 1, got {args.requests}")
    for chapter in chapters or [chapter for chapter in CHAPTERS if "num_blocks" in chapter.capabilities]:
        for options in PREEMPTING if "preemption" in chapter.capabilities else ({"num_blocks": 97},):
            with contextlib.redirect_stderr(io.StringIO()):
                # Little more than a token for each request, so that prompts are cut.
                budget = {"max_num_batched_tokens": 24} if "chunked_prefill" in chapter.capabilities else {}
                # Every machine has this form, and no measurement chooses another.
                form = {"linear": "joined"} if "linear" in chapter.capabilities else {}
                options = options | budget | form
                engine = chapter.load().Engine(checkpoint("llama"), device="cpu", max_num_seqs=20, block_size=7, **options)
            fault_share = 0.005 if hasattr(engine, "fail_step") else 0.0
            ended = soak(chapter, engine, args.requests, args.seed, fault_share)
            print(f"{chapter.name}: {sum(ended.values())} requests in {engine.num_steps} steps, every block is free again;", end=" ")
            print("finish reasons:", ", ".join(f"{reason} {count}" for reason, count in ended.items()), end="")
            print(f"; {engine.stats().preemptions} preemptions" if "preemption" in chapter.capabilities else "", end="")
            print(f"; {engine.stats().cached_tokens} prompt tokens found" if "prefix_cache" in chapter.capabilities else "")
    return 0


if __name__ == "__main__":
    run(main)
