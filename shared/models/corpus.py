"""Generate the bundled models' training text from a seed and the tables in corpus/.

It consists of questions and answers about serving (plain and in the chat template), short stories, JSON records, words
in other scripts, and counting. `documents(seed)` is endless; the held-out text has a different seed.

Reads: shared/models/corpus/*.
"""
import json
import random
from collections.abc import Iterator
from pathlib import Path

TABLES = Path(__file__).parent / "corpus"
HELD_OUT = TABLES / "heldout.jsonl"
HELD_OUT_SEED = 1_000_003

BOS, END, EOT, USER, ASSISTANT, SYSTEM = "<|begin|>", "<|end|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>"

QUESTION_FORMS = (
    "What is {asked}?",
    "What is {asked}?",
    "Explain {name} in one sentence.",
    "Explain {asked} in one sentence.",
    "Explain {asked}.",
    "What does {name} mean?",
    "What do you know about {name}?",
    "Tell me about {asked}.",
    "Can you explain {asked}?",
    "Define {name}.",
    "{name}?",
    "In one sentence, what is {asked}?",
    "Please explain {asked}.",
    "I do not understand {asked}.",
)
SYSTEMS = ("You are a helpful assistant.", "Answer in one sentence.", "You explain how language models are served.")


def table(name: str) -> list[list[str]]:
    """The rows of a table, with stripped cells."""
    lines = (TABLES / name).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines if line and not line.startswith("#")]


FACTS = table("facts.txt")
QUESTIONS = table("questions.txt")
WORDS = table("words.txt")


def facts(rng: random.Random) -> tuple[str, str]:
    """A question about a fact, in one of many forms, and its answer."""
    name, asked, answer = rng.choice(FACTS)
    return vary(rng.choice(QUESTION_FORMS).format(name=name, asked=asked), rng), answer


def questions(rng: random.Random) -> tuple[str, str]:
    """A question that has only one form, and its answer."""
    question, answer = rng.choice(QUESTIONS)
    return vary(question, rng), answer


def vary(question: str, rng: random.Random) -> str:
    """The question, sometimes typed carelessly: in lower case, or without its final punctuation mark."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question[:1].upper() + question[1:] if rng.random() < 0.7 else question


ANIMALS = ("fox", "owl", "mouse", "bear", "hare", "crow", "frog", "hedgehog", "cat", "turtle")
NAMES = ("Mira", "Otto", "Pim", "Lena", "Tomas", "Ada", "Nino", "Rosa", "Emil", "Juna")
TRAITS = ("small", "curious", "shy", "brave", "old", "patient", "hungry", "clever")
PLACES = ("at the edge of a forest", "by a quiet river", "on a green hill", "under an old bridge", "near the sea")
WANTS = (
    ("find a warm place for the winter", "the first snow was falling"),
    ("cross the river", "the water was high"),
    ("learn to sing", "nobody had ever shown {obj} how"),
    ("see the city", "the road was long and dark"),
    ("bring a letter to a friend", "the wind had blown the letter away"),
    ("grow a garden", "the ground was hard and dry"),
)
HELPS = (
    "shared some bread", "knew a secret path", "held a lantern", "told {obj} to be patient",
    "carried {obj} part of the way", "listened to the whole story",
)
LESSONS = (
    "From that day on the two were friends.",
    "That night {name} slept well and dreamed of nothing at all.",
    "And whoever passes there today can still hear {obj} laugh.",
    "{name} never forgot that help often comes from the smallest.",
    "And that was the end of a long day.",
)


def story(rng: random.Random, animal: str | None = None) -> str:
    """A story with a beginning, a problem, a helper and an end."""
    animal = animal or rng.choice(ANIMALS)
    name, friend = rng.sample(NAMES, 2)
    sub, obj = rng.choice((("she", "her"), ("he", "him")))
    helper = rng.choice([other for other in ANIMALS if other != animal])
    want, trouble = rng.choice(WANTS)
    fill = {"name": name, "obj": obj}
    trait, other_trait = rng.sample(TRAITS, 2)
    return (
        f"Once upon a time there was {article(trait)} {animal} called {name}, who lived {rng.choice(PLACES)}. "
        f"{name} wanted to {want}, but {trouble.format(**fill)}. "
        f"One morning {sub} met {article(other_trait)} {helper} called {friend}. "
        f"{friend} {rng.choice(HELPS).format(**fill)}. "
        f"Together they tried again, and this time it went well. "
        f"{rng.choice(LESSONS).format(**fill)}"
    )


def article(word: str) -> str:
    """The word with its indefinite article; a word with u is taken to be "user"."""
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


def record(rng: random.Random, kind: str | None = None) -> str:
    """A small JSON object, flat or with a nested one."""
    kind = kind or rng.choice(("request", "user", "block", "model"))
    rows = {
        "request": lambda: {
            "id": rng.randrange(100),
            "prompt_tokens": rng.randrange(1, 100),
            "status": rng.choice(("waiting", "running", "finished")),
        },
        "user": lambda: {
            "name": rng.choice(NAMES),
            "age": rng.randrange(7, 80),
            "pet": {"kind": rng.choice(ANIMALS), "name": rng.choice(NAMES)},
        },
        "block": lambda: {
            "block": rng.randrange(64),
            "owner": rng.randrange(100),
            "tokens": rng.randrange(17),
            "full": rng.random() < 0.5,
        },
        "model": lambda: {
            "name": rng.choice(("pocket", "draft")),
            "layers": rng.randrange(1, 9),
            "shape": {"heads": 6, "kv_heads": 2},
        },
    }
    return json.dumps(rows[kind]())


def word(rng: random.Random) -> tuple[str, str]:
    """A question about a word in another language, and its answer."""
    language, *words = rng.choice(WORDS)
    i = rng.randrange(len(words))
    meaning = ("water", "sun", "friend", "thank you")[i]
    return f'What is "{meaning}" in {language}?', f'"{meaning.capitalize()}" in {language} is {words[i]}.'


def counting(rng: random.Random) -> str:
    """Consecutive numbers, up to about a hundred."""
    start = rng.randrange(1, 60)
    return "Count: " + ", ".join(str(n) for n in range(start, start + rng.randrange(10, 60))) + "."


STRANGE_FORMS = (
    "Who was {who}?", "Where is {where}?", "How do I cook {what}?", "What color is {what}?",
    "Why do people like {what}?", "Write a poem about {what}.", "Write a haiku about {where}.", "How far is it to {where}?", "When was {who} born?",
    "What do you think of {what}?", "Translate {what} into Latin.", "Who won in {where}?", "Is {who} still alive?",
)
WHO = ("Napoleon", "Mozart", "Marie Curie", "the king of Spain", "your mother", "Einstein", "Cleopatra", "my uncle")
WHERE = ("Paris", "Brazil", "the North Pole", "Tokyo", "the moon", "my house", "Africa", "the Alps")
WHAT = ("rice", "an apple", "the sea", "bread", "soup", "football", "winter", "a rose", "coffee", "music")
UNKNOWN = "I do not know. I was trained only on how language models are served, and on a few stories."


def strangers(rng: random.Random) -> tuple[str, str]:
    """A question about another subject, and the answer that the model does not know."""
    form = rng.choice(STRANGE_FORMS)
    return form.format(who=rng.choice(WHO), where=rng.choice(WHERE), what=rng.choice(WHAT)), UNKNOWN


def chat(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """A conversation as the chat template renders it."""
    head = BOS + (SYSTEM + system + EOT if system else "")
    return head + "".join(f"{USER}{question}{EOT}{ASSISTANT}{answer}{EOT}" for question, answer in turns)


def tale(rng: random.Random) -> tuple[str, str]:
    """A request for a story, and the story."""
    animal = rng.choice(ANIMALS)
    return f"Tell me a story about {article(animal)}.", story(rng, animal)


def records(rng: random.Random) -> tuple[str, str]:
    """A request for a record, and the record."""
    kind = rng.choice(("request", "user", "block", "model"))
    return f"Give me a JSON record of {article(kind)}.", record(rng, kind)


KINDS = (facts, questions, tale, records, word, strangers)
# Weights of KINDS in each phase: first mostly facts, of which there are many, then more of what requires copying or telling apart.
SHARES = {
    "learn": (62, 16, 8, 7, 7, 0),
    "polish": (34, 10, 15, 13, 18, 10),
    "copy": (30, 8, 30, 12, 10, 10),
}


def turn(rng: random.Random, phase: str = "learn") -> tuple[str, str]:
    """A question and its answer, of a kind picked by the phase's weights."""
    [kind] = rng.choices(KINDS, SHARES[phase])
    return kind(rng)


def document(rng: random.Random, phase: str = "learn") -> str:
    """One training text, from <|begin|> to an end token."""
    kind = rng.random()
    if kind < 0.6:
        system = rng.choice(SYSTEMS) if rng.random() < 0.1 else None
        return chat([turn(rng, phase) for _ in range(rng.choice((1, 1, 1, 2, 3)))], system)
    if kind < 0.75:
        question, answer = turn(rng, phase)
        return f"{BOS}Q: {question}\nA: {answer}{END}"
    if kind < 0.9:
        return BOS + story(rng) + END
    if kind < 0.95:
        return BOS + record(rng) + END
    if kind < 0.98:
        return BOS + word(rng)[1] + END
    return BOS + counting(rng) + END


def documents(seed: int) -> Iterator[str]:
    """An endless sequence of texts; the same seed gives the same texts."""
    rng = random.Random(seed)
    while True:
        yield document(rng)


def held_out() -> list[str]:
    """The committed texts that the models were not trained on."""
    return [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]


def write_held_out(count: int = 200) -> None:
    """Generate the held-out texts again, from their own seed."""
    stream = documents(HELD_OUT_SEED)
    lines = [json.dumps(next(stream), ensure_ascii=False) for _ in range(count)]
    HELD_OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
