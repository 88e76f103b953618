"""What the embedded model says when a seeded bug is planted: shown beside the bug, since most of them keep the tests' secret.

    python -m shared.book.traps.answers         # those that are new, or whose bug was edited; all of them with --all

Each bug is planted in a copy of its chapter, which answers in a fork of this process, in company: there are more
questions than places, some come late, and one is taken back. A bug in a kernel is seen through Triton's interpreter,
in few tokens.

Reads: tests/traps/*.toml. Writes: docs/results/trap-answers.json.
"""
import argparse
import hashlib
import importlib
import inspect
import json
import os
from functools import partial
from pathlib import Path

from shared import results
from shared.book.changed_copy import changed_copy
from shared.book.forks import SLOW, Ended, Work, in_forks, preload
from shared.book.traps.seeded_bugs import Trap, plant, read_traps
from shared.chapters import BOOK, Book, Chapter
from shared.programs import run

QUESTIONS = ("Explain KV cache in one sentence.", "What is a block table?")
# Asked beside them: bugs need neighbours, of other lengths, and who comes when others leave.
OTHERS = ("Tell me a story about a bear.", "What is prefill?", "What is a slot mapping?", "Tell me a story about an owl.")
PLACES = 3
MAX_TOKENS = 32
KERNEL_TOKENS = 6  # the interpreter is slow
TIMEOUT_S = 60
FILE = "trap-answers.json"
COMMAND = "python -m shared.book.traps.answers --all"
MENDS = "run `make traps-answers`"


def key(trap: Trap) -> str:
    """A hash of what is planted: an answer belongs to exactly this bug."""
    text = "\0".join((trap.file, trap.unit, trap.find, trap.replace))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def read_answers(book: Book) -> dict[str, dict]:
    path = book.results / FILE
    return json.loads(path.read_text())["answers"] if path.is_file() else {}


def stale(book: Book) -> list[str]:
    """The traps whose answer is missing, or is another bug's; and answers without a trap."""
    answers = read_answers(book)
    traps = {f"{chapter.id}/{trap.name}": trap for chapter in book.chapters for trap in read_traps(chapter.traps)}
    missing = [name for name, trap in traps.items() if answers.get(name, {}).get("key") != key(trap)]
    return missing + [name for name in answers if name not in traps]


def asking(chapter: Chapter, trap: Trap | None, kernels: bool) -> Work:
    """Ask a copy of the chapter with the bug in it."""
    return Work(partial(ask, chapter, trap, kernels), TIMEOUT_S)


def ask(chapter: Chapter, trap: Trap | None, kernels: bool, scratch: Path) -> None:
    """In the fork: answer the questions, and leave what was said in scratch."""
    with changed_copy(chapter, trap and partial(plant, trap), scratch):
        try:
            package, text = (importlib.import_module(f"milestones.{chapter.name}{part}") for part in ("", ".text"))
            said = in_company(package, text, QUESTIONS, kernels)
        except Exception as error:
            said = f"({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        (scratch / "answers.json").write_text(json.dumps(said))


def answers_of(ended: Ended) -> list[str] | str:
    """The answers; or, as one text, what became of the process."""
    if ended.exit_code is None:
        return f"(no answer after {TIMEOUT_S} s)"
    said = ended.scratch / "answers.json"
    return json.loads(said.read_text()) if said.exists() else f"(the process ends with {ended.exit_code})"


def in_company(package, text, questions: tuple[str, ...], kernels: bool) -> list[str]:
    """The answers to questions, and then to OTHERS, of which one comes every other step; the first of them is taken back."""
    from shared.checkpoints import POCKET

    limits = {"device": "cpu", "dtype": "float32"}
    if kernels:
        os.environ["TRITON_INTERPRET"] = "1"
        limits["attention"] = "triton"
    if "max_num_seqs" in inspect.signature(package.Engine).parameters:
        limits["max_num_seqs"] = PLACES
    engine = package.Engine(POCKET, **limits)
    params = package.SamplingParams(max_tokens=KERNEL_TOKENS if kernels else MAX_TOKENS)
    # The others come first, so that a question finds the places as they left them.
    order = [*range(len(questions), len(questions) + len(OTHERS)), *range(len(questions))]
    texts, numbers = [""] * len(order), {}
    for step_id in range(2 * MAX_TOKENS * len(order)):
        if step_id % 2 == 0 and order:
            asked = (*questions, *OTHERS)[order[0]]
            ids = text.encode_chat(engine.tokenizer, [{"role": "user", "content": asked}])
            numbers[engine.add_request(ids, params)] = order.pop(0)
        if step_id == 5:
            engine.abort_request(min(numbers))
        for output in engine.step():
            texts[numbers[output.request_id]] += output.text
        if not order and not engine.has_unfinished_requests():
            return texts
    return [each + " ... (and never ends)" for each in texts]


def told(sound: list[str], found: list[str] | str) -> dict:
    """What of the answers is worth showing: the first that is another than without the bug.

    >>> told(["a", "b"], ["a", "c"])["answer"]
    'c'
    """
    if isinstance(found, str):
        return {"question": QUESTIONS[0], "answer": found}
    for question, right, said in zip((*QUESTIONS, *OTHERS), sound, found, strict=True):
        if said != right:
            return {"question": question, "answer": said.strip() or "(nothing)"}
    return {"same": True}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps.answers", description="What the model says with each seeded bug.")
    parser.add_argument("--all", action="store_true", help="ask again where nothing has changed, too")
    args = parser.parse_args(argv)
    known = {} if args.all else read_answers(BOOK)
    preload(SLOW)
    all_traps = {f"{chapter.id}/{trap.name}": (chapter, trap) for chapter in BOOK.chapters for trap in read_traps(chapter.traps)}
    wanted = list(all_traps) if args.all else [name for name in stale(BOOK) if name in all_traps]
    # What is said without any bug is asked first: what differs from it is worth showing.
    sound = {(chapter, in_kernels(trap)): None for chapter, trap in (all_traps[name] for name in wanted)}
    cases = list(sound)
    for ended in in_forks([asking(chapter, None, kernels) for chapter, kernels in cases], "without a trap"):
        chapter, kernels = cases[ended.number]
        sound[chapter, kernels] = answers_of(ended)
        if isinstance(sound[chapter, kernels], str):
            raise SystemExit(f"{chapter.id} does not answer without any bug: {sound[chapter, kernels]}")
    found = {name: known[name] for name in all_traps if name in known and name not in wanted}
    works = [asking(chapter, trap, in_kernels(trap)) for chapter, trap in (all_traps[name] for name in wanted)]
    for ended in in_forks(works, "traps"):
        name = wanted[ended.number]
        chapter, trap = all_traps[name]
        found[name] = {"key": key(trap)} | told(sound[chapter, in_kernels(trap)], answers_of(ended))
        print(f"{name:60} {found[name].get('answer', 'the same')[:60]}", flush=True)
    results.write(FILE.removesuffix(".json"), {"answers": {name: found[name] for name in all_traps}}, COMMAND)
    return 0


def in_kernels(trap: Trap) -> bool:
    """Whether only the kernels show the bug."""
    return trap.file.startswith("kernels/")


if __name__ == "__main__":
    run(main)
