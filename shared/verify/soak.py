"""Thousands of requests, some of them aborted, on a cache that is too small for all: nothing leaks, nothing is lost.

    make soak                                  # every chapter that hands memory out
    make soak ARGS="v05 --requests 5000"
"""
import argparse
import contextlib
import io
import random
from collections import Counter

from shared.bench.timing import progress
from shared.chapters import CHAPTERS, find
from shared.checkpoints import checkpoint
from shared.programs import run
from shared.workloads import random_ids


def audit(engine) -> None:
    """Every block is free or has one owner, and owners hold what their tokens need, no more; AssertionError if not."""
    pool, running = engine.pool, engine.scheduler.running
    held = Counter(block_id for seq in running for block_id in seq.block_table)
    everyone = held + Counter(list(pool.free_ids))
    twice = [block_id for block_id, count in everyone.items() if count > 1]
    assert not twice, f"blocks {twice} have several owners, or are held and free"
    assert everyone.keys() == set(range(pool.num_blocks)), f"{pool.num_blocks - len(everyone)} blocks are lost"
    for seq in running:
        size = len(seq.block_table)
        assert pool.blocks_for(seq.num_computed) <= size <= pool.blocks_for(seq.num_tokens), f"{seq.seq_id} holds {size}"
    reserved = sum(engine.scheduler.reserved(seq) for seq in running)
    assert reserved <= pool.num_blocks, f"{reserved} of {pool.num_blocks} blocks are reserved"
    for seq in engine.scheduler.waiting:
        assert not seq.block_table, f"{seq.seq_id} waits and holds {seq.block_table}"


def soak(chapter, engine, num_requests: int, seed: int = 0) -> Counter:
    """Run random requests to their ends, several at a time, with an audit at every step; how they ended.

    Whatever was not aborted must be what the request says alone; every hundredth is tried.
    """
    rng, package = random.Random(seed), chapter.load()
    ended, tokens, tried = Counter(), {}, {}
    added = 0
    bar = progress(range(num_requests), chapter.id)
    while added < num_requests or engine.has_unfinished_requests():
        while added < num_requests and rng.random() < 0.5:
            prompt_ids = random_ids(rng.randint(1, 40), engine.config.vocab_size, rng)
            params = package.SamplingParams(
                max_tokens=rng.randint(1, 30),
                temperature=rng.choice((0.0, 1.0)),
                seed=added,
                stop_token_ids=tuple(range(100, 120)) if rng.random() < 0.3 else (),
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
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
            if output.finish_reason:
                ended[output.finish_reason] += 1
                found = tokens.pop(output.request_id)
                if output.request_id in tried:
                    tried[output.request_id] += (found,)
        audit(engine)
    assert not tokens, f"requests {list(tokens)} never ended"
    assert engine.pool.num_free == engine.pool.num_blocks
    for prompt_ids, params, found in tried.values():
        [alone] = engine.generate([prompt_ids], params)
        assert alone.token_ids == found, f"{prompt_ids} says something else alone"
    return ended


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.verify.soak")
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="default: all that hand memory out")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        chapters = [find(text) for text in args.chapters]
    except ValueError as error:
        parser.error(str(error))
    for chapter in chapters or [chapter for chapter in CHAPTERS if "num_blocks" in chapter.capabilities]:
        with contextlib.redirect_stderr(io.StringIO()):
            engine = chapter.load().Engine(checkpoint("llama"), device="cpu", max_num_seqs=20, num_blocks=97, block_size=7)
        ended = soak(chapter, engine, args.requests, args.seed)
        print(f"{chapter.name}: {sum(ended.values())} requests in {engine.num_steps} passes, every block is back;", end=" ")
        print(", ".join(f"{count} ended by {reason}" for reason, count in ended.items()))
    return 0


if __name__ == "__main__":
    run(main)
