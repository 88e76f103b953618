"""Seeded workloads: prompts, lengths, arrivals. The same seed gives the same requests on every machine."""
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One request of a workload."""

    prompt_ids: list[int]
    max_tokens: int
    arrival_step: int = 0  # the engine step before which it is added
    abort_step: int | None = None  # the engine step before which it is aborted, unless it has finished


def random_ids(length: int, vocab_size: int, rng: random.Random) -> list[int]:
    """Uniformly random token ids, except the lowest eight, which are special tokens in every checkpoint used here."""
    return [rng.randrange(8, vocab_size) for _ in range(length)]


def ragged(
    num_requests: int,
    vocab_size: int,
    *,
    prompt_len: tuple[int, int],
    output_len: tuple[int, int],
    last_arrival: int = 0,
    seed: int = 0,
) -> list[Request]:
    """Requests with uniformly random lengths and arrivals.

    Args:
        prompt_len, output_len: tokens, both ends included.
        last_arrival: requests arrive at steps 0 to last_arrival.

    >>> [len(r.prompt_ids) for r in ragged(4, 100, prompt_len=(1, 9), output_len=(1, 5))]
    [7, 4, 9, 6]
    """
    rng = random.Random(seed)
    return [
        Request(
            prompt_ids=random_ids(rng.randint(*prompt_len), vocab_size, rng),
            max_tokens=rng.randint(*output_len),
            arrival_step=rng.randint(0, last_arrival),
        )
        for _ in range(num_requests)
    ]


def fixed(lengths: list[tuple[int, int]], vocab_size: int, seed: int = 0) -> list[Request]:
    """Requests of these lengths, prompt and output, that all arrive before the first step."""
    rng = random.Random(seed)
    return [Request(random_ids(prompt, vocab_size, rng), output) for prompt, output in lengths]


def staircase(vocab_size: int) -> list[Request]:
    """The workload on which all chapters are compared: 32 requests of different lengths, all added at the start.

    The lengths do not depend on the vocabulary.

    >>> sum(request.max_tokens for request in staircase(100))
    1734
    """
    rng = random.Random(16)
    # With these prompts the bundled model's two best logits are never a tie.
    return fixed([(rng.randint(4, 60), rng.randint(1, 120)) for _ in range(32)], vocab_size, seed=13)


# Small enough to draw with one column per forward pass: one long request among short ones, and more requests than run at once.
TIMELINE = [(7, 19), (3, 5), (5, 8), (2, 3), (4, 4), (9, 11), (3, 2), (6, 7), (2, 9), (4, 3)]
TIMELINE_PLACES = 4
# For the same requests, a cache small enough to draw block by block.
TIMELINE_BLOCKS, TIMELINE_BLOCK_SIZE = 16, 4
# A cache in which these requests do not fit together, for chapters that preempt.
TIGHT_BLOCKS = 9


def shared_beginnings(vocab_size: int) -> list[Request]:
    """Requests to draw block by block, some of which begin with the same two blocks of TIMELINE_BLOCK_SIZE tokens."""
    rng = random.Random(18)
    beginning = random_ids(2 * TIMELINE_BLOCK_SIZE, vocab_size, rng)
    # Whether the prompt has this beginning, further prompt tokens, output tokens, arrival.
    rows = [
        (True, 3, 7, 0),
        (True, 2, 9, 0),
        (False, 5, 4, 2),
        (True, 5, 4, 4),
        (False, 9, 7, 8),
        (True, 1, 5, 12),
        (False, 26, 5, 15),
        (True, 4, 4, 19),
    ]
    return [
        Request([*(beginning if shares else []), *random_ids(own, vocab_size, rng)], output, arrival_step=arrival)
        for shares, own, output, arrival in rows
    ]


# A cache for these in which blocks have to be reused.
SHARED_BLOCKS = 12

# Questions that the bundled model can answer.
QUESTIONS = (
    "Explain KV cache in one sentence.",
    "What is continuous batching?",
    "What is paged attention?",
    "What is time to first token?",
    "What is speculative decoding?",
    "Tell me a story about a fox.",
    "Give me a JSON record of a request.",
    "Who are you?",
)

# The demo's questions: short and long answers, more than run at once.
RACE = (
    *QUESTIONS,
    "Tell me a story about a hare.",
    "What is a block table?",
    "What is prefill?",
    "What is decode?",
    "Tell me a story about an owl.",
    "What is static batching?",
    "What is a slot mapping?",
    "What is internal fragmentation?",
    "Tell me a story about a turtle.",
    "What is external fragmentation?",
    "Tell me a story about a bear.",
    "Give me a JSON record of a model.",
    "What is a KV cache?",
    "Tell me a story about a crow.",
    "Who are you?",
    "Tell me a story about a hedgehog.",
)

# A system prompt for these questions: 200 tokens, with what the chat template puts before and after it.
# With it the bundled model's two best logits are never a tie.
SYSTEM_PROMPT = (
    "You explain how language models are served. You are a helpful assistant. "
    "The reader is a programmer, so name the part of the engine that you mean. Give an example only if it helps. "
    "A request is a prompt and its parameters, and a sequence is the state of one request. "
    "The scheduler decides before every step which sequences run. The cache holds keys and values in blocks of sixteen "
    "positions, and a block table lists the blocks of one sequence. A forward pass reads every weight once. "
    "If the question asks for a story, tell a short story with an animal in it. "
    "If the question asks for a record, answer with JSON and nothing else. "
    "Do not repeat the question. Do not explain what was not asked. If you do not know, say so. "
    "Answer in one sentence."
)
# Chats with this system prompt, in a cache that is too small for all: max_tokens is many times what they generate. In 96
# blocks of 16 positions, two of them fit at full length, and all at their actual length if the system prompt is there once.
CROWD = RACE[:16]
CROWD_MAX_TOKENS, CROWD_BLOCKS = 512, 96


def chat_ids(tokenizer, question: str, system: str | None = None) -> list[int]:
    """Token ids of a question as one user turn in the checkpoint's chat template, after a system prompt if one is given."""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids
