"""A model of the prefix cache in a dictionary: what each block holds, and so what a request must find.

It is told nothing by the chapter's cache. It notes which blocks are handed out and which tokens are fed into them, and
compares contents, never keys.
"""
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


def forget(engine) -> None:
    """Let no later request find what an earlier one computed. An engine without a prefix cache stays as it is."""
    if hasattr(engine, "reset_prefix_cache"):
        engine.reset_prefix_cache()


def uncached(chapter) -> dict[str, bool]:
    """The options of an engine that never finds anything."""
    return {"enable_prefix_caching": False} if "prefix_cache" in chapter.capabilities else {}


def watch(engine):
    """A context in which an engine without requests is compared with a model of its prefix cache, if it has one.

    Gives the Findable, whose `check` is to be called after each step, or None. AssertionError, from a step too, where
    they differ.
    """
    return watching(engine) if hasattr(engine, "reset_prefix_cache") else nullcontext()


@contextmanager
def watching(engine) -> Iterator["Findable"]:
    forget(engine)
    model = Findable(engine)
    hook = engine.model.register_forward_hook(lambda *_: model.computed())
    observers = (
        (engine.pool, "allocate", model.allocate),
        (engine.scheduler, "admit", model.admit),
        (engine.scheduler, "release", model.release),
        (engine, "enqueue", model.enqueue),
        (engine, "reset_prefix_cache", model.reset),
        (engine, "fail_step", model.fail_step),
    )
    for owner, name, observer in observers:
        setattr(owner, name, observing(getattr(owner, name), observer))
    try:
        yield model
    finally:
        hook.remove()
        for owner, name, _ in observers:
            delattr(owner, name)


def observing(correct, observer):
    return lambda *args: observer(correct, *args)


class Findable:
    """By block that can be found, its content: the number of resets before its request, the salt, and all tokens up to its end."""

    def __init__(self, engine):
        self.engine = engine
        self.enabled = engine.scheduler.enable_prefix_caching
        self.contents: dict[int, tuple] = {}
        self.num_resets = 0
        self.resets_before: dict[int, int] = {}  # by request id
        self.unfilled: set[int] = set()  # blocks that were handed out and are not full yet
        self.events = Counter()
        stats = engine.stats()
        self.num_prompt, self.num_cached = stats.prompt_tokens, stats.cached_tokens

    # ---- what the chapter does

    def allocate(self, allocate, num_blocks: int) -> list[int] | None:
        """A block that is handed out holds nothing."""
        block_ids = allocate(num_blocks)
        for block_id in block_ids or ():
            self.contents.pop(block_id, None)
            self.unfilled.add(block_id)
        return block_ids

    def enqueue(self, enqueue, seq) -> None:
        self.resets_before[seq.seq_id] = self.num_resets
        enqueue(seq)

    def computed(self) -> None:
        """After a forward pass, the blocks that it filled hold their tokens."""
        for seq in self.engine.scheduler.running:
            num_full = (seq.num_computed + len(seq.new_ids)) // self.engine.pool.block_size
            for i, block_id in enumerate(seq.block_table[:num_full]):
                if block_id in self.unfilled and self.enabled:
                    self.unfilled.remove(block_id)
                    self.contents[block_id] = self.content(seq, i)

    def release(self, release, seq) -> None:
        """What a failed request held may be wrong. What an aborted one computed is right."""
        if seq.finish_reason == "error":
            for block_id in seq.block_table:
                self.contents.pop(block_id, None)
        release(seq)
        del self.resets_before[seq.seq_id]

    def reset(self, reset_prefix_cache) -> None:
        reset_prefix_cache()
        self.contents.clear()
        self.num_resets += 1

    def fail_step(self, fail_step) -> list[int]:
        failed_ids = fail_step()
        self.contents.clear()
        return failed_ids

    def admit(self, admit, seq) -> bool:
        """Before a request is admitted, search all blocks for its beginning; compare what it then gets with what is there."""
        self.compare_keys(may_lack=set())
        was_swapped, num_computed, num_cached = bool(seq.swap_table), seq.num_computed, seq.num_cached
        most = self.most(seq)
        found = self.longest_beginning(seq, most)
        awaits = not was_swapped and found < most and self.is_being_computed(seq, found)
        admitted = admit(seq)
        name = f"request {seq.seq_id}"
        if not admitted:
            assert not seq.block_table and seq.num_cached == num_cached, f"{name} was not admitted, and holds {list(seq.block_table)}"
            self.events["waited for a block that another request computed"] += awaits
            return False
        assert not awaits, f"{name} computes a block that another request computes in the same step"
        num_found = found * self.engine.pool.block_size
        # What was swapped out is found where it can be, and copied back where it cannot.
        had = f"; the longest beginning in the cache has {num_found}, and it had computed {num_computed}"
        assert seq.num_computed == max(num_found, num_computed), f"{name} begins with {seq.num_computed} tokens{had}"
        assert seq.num_published == found, f"{name} begins with {seq.num_published} published blocks{had}"
        for i, block_id in enumerate(seq.block_table[:found]):
            assert self.contents.get(block_id) == self.content(seq, i), f"{name} found block {block_id}, which holds something else"
        if was_swapped:
            self.events["found what it had swapped out"] += found > 0
        elif num_cached is None:
            self.num_prompt += seq.num_prompt
            self.num_cached += num_found
            self.events["found the beginning of a prompt"] += found > 0
        else:
            self.events["found tokens again after a preemption"] += found > 0
        counted = num_found if num_cached is None else num_cached
        assert seq.num_cached == counted, f"{name} reports {seq.num_cached} cached tokens instead of {counted}"
        return True

    # ---- what follows from it

    def content(self, seq, index: int) -> tuple:
        """What a sequence's block number index holds once it is full."""
        end = (index + 1) * self.engine.pool.block_size
        return self.resets_before[seq.seq_id], seq.params.cache_salt, tuple(seq.token_ids[:end])

    def most(self, seq) -> int:
        """The most blocks that a sequence may find: a token is left to feed, and so is what a prompt still owes logprobs for."""
        owes_prompt = seq.params.prompt_logprobs and seq.num_tokens == seq.num_prompt
        if not self.enabled:
            return 0
        return (seq.num_computed if owes_prompt else len(seq.token_ids) - 1) // self.engine.pool.block_size

    def longest_beginning(self, seq, most: int) -> int:
        held = set(self.contents.values())
        return next((i for i in range(most) if self.content(seq, i) not in held), most)

    def is_being_computed(self, seq, index: int) -> bool:
        """Whether a running sequence of a better rank fills a block with the same content in the next step, for its prompt."""
        wanted, end = self.content(seq, index), (index + 1) * self.engine.pool.block_size
        return any(
            other.rank < seq.rank
            and other.num_computed < end <= min(other.num_prompt, other.num_computed + len(other.new_ids))
            and self.content(other, index) == wanted
            for other in self.engine.scheduler.running
        )

    def check(self) -> None:
        """AssertionError unless the blocks that hold something can be found, and no others, and stats count what was found.

        What a running sequence has filled may still be unknown: it must be found when the next request is admitted.
        """
        self.compare_keys(may_lack={block_id for seq in self.engine.scheduler.running for block_id in seq.block_table})
        stats = self.engine.stats()
        counted, expected = (stats.prompt_tokens, stats.cached_tokens), (self.num_prompt, self.num_cached)
        assert counted == expected, f"stats count (prompt, cached) tokens {counted} instead of {expected}"

    def compare_keys(self, may_lack: set[int]) -> None:
        key_of, held = self.engine.pool.key_of, self.contents.keys()
        assert key_of.keys() <= held, f"blocks {sorted(key_of.keys() - held)} can be found, and hold nothing that may be"
        assert held - key_of.keys() <= may_lack, f"blocks {sorted(held - key_of.keys() - may_lack)} cannot be found"
        pairs = {(key, self.contents[block_id]) for block_id, key in key_of.items()}
        keys, contents = {key for key, _ in pairs}, {content for _, content in pairs}
        assert len(keys) == len(pairs) == len(contents), "different contents have the same key, or the same content different ones"
