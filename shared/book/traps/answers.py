"""What the bundled model answers with each seeded bug: shown beside the bug, because many bugs leave the answers unchanged.

    python -m shared.book.traps.answers         # new or edited bugs only; --all for all

Each bug is planted in a copy of its chapter, which runs in a fork of this process. Several questions are asked together:
more than run at once, some of them later, and one is aborted. For a bug in a kernel, Triton's interpreter runs, and the
answers have fewer tokens.

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
# Asked together with them: many bugs show only beside sequences of other lengths, or when requests join later.
OTHERS = ("Tell me a story about a bear.", "What is prefill?", "What is a slot mapping?", "Tell me a story about an owl.")
PLACES = 3
MAX_TOKENS = 32
KERNEL_TOKENS = 6  # the interpreter is slow
TIMEOUT_S = 60
FILE = "trap-answers.json"
COMMAND = "python -m shared.book.traps.answers --all"
MENDS = "run `make traps-answers`"


def key(trap: Trap) -> str:
    """A hash of the planted code, to recognize answers of an edited bug."""
    text = "\0".join((trap.file, trap.unit, trap.find, trap.replace))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def read_answers(book: Book) -> dict[str, dict]:
    path = book.results / FILE
    return json.loads(path.read_text())["answers"] if path.is_file() else {}


def stale(book: Book) -> list[str]:
    """The traps whose answer is missing or out of date, and the answers without a trap."""
    answers = read_answers(book)
    traps = {f"{chapter.id}/{trap.name}": trap for chapter in book.chapters for trap in read_traps(chapter.traps)}
    missing = [name for name, trap in traps.items() if answers.get(name, {}).get("key") != key(trap)]
    return missing + [name for name in answers if name not in traps]


def asking(chapter: Chapter, trap: Trap | None, kernels: bool) -> Work:
    """The work of asking a copy of the chapter with the trap planted; None for no trap."""
    return Work(partial(ask, chapter, trap, kernels), TIMEOUT_S)


def ask(chapter: Chapter, trap: Trap | None, kernels: bool, scratch: Path) -> None:
    """Answer the questions, in a fork, and write the answers to scratch."""
    with changed_copy(chapter, trap and partial(plant, trap), scratch):
        try:
            package, text = (importlib.import_module(f"milestones.{chapter.name}{part}") for part in ("", ".text"))
            answers = in_company(package, text, QUESTIONS, kernels)
        except Exception as error:
            answers = f"({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        (scratch / "answers.json").write_text(json.dumps(answers))


def answers_of(ended: Ended) -> list[str] | str:
    """The answers; or, as a single string, what went wrong."""
    if ended.exit_code is None:
        return f"(no answer after {TIMEOUT_S} s)"
    said = ended.scratch / "answers.json"
    return json.loads(said.read_text()) if said.exists() else f"(the process ends with {ended.exit_code})"


def in_company(package, text, questions: tuple[str, ...], kernels: bool) -> list[str]:
    """The answers to questions, then those to OTHERS, all asked together.

    OTHERS are added first, then the questions, one every other step; the first of OTHERS is aborted.
    """
    from shared.checkpoints import POCKET

    limits = {"device": "cpu", "dtype": "float32"}
    if kernels:
        os.environ["TRITON_INTERPRET"] = "1"
        limits["attention"] = "triton"
    if "max_num_seqs" in inspect.signature(package.Engine).parameters:
        limits["max_num_seqs"] = PLACES
    engine = package.Engine(POCKET, **limits)
    params = package.SamplingParams(max_tokens=KERNEL_TOKENS if kernels else MAX_TOKENS)
    # OTHERS first, so that the questions run in rows and blocks that others have used.
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
    """The first answer that differs from the one without the bug, with its question.

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
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps.answers", description="Record what the model answers with each seeded bug.")
    parser.add_argument("--all", action="store_true", help="also ask with bugs that have not changed")
    args = parser.parse_args(argv)
    known = {} if args.all else read_answers(BOOK)
    preload(SLOW)
    all_traps = {f"{chapter.id}/{trap.name}": (chapter, trap) for chapter in BOOK.chapters for trap in read_traps(chapter.traps)}
    wanted = list(all_traps) if args.all else [name for name in stale(BOOK) if name in all_traps]
    # First the answers without a bug, to compare with.
    sound = {(chapter, in_kernels(trap)): None for chapter, trap in (all_traps[name] for name in wanted)}
    cases = list(sound)
    for ended in in_forks([asking(chapter, None, kernels) for chapter, kernels in cases], "without a trap"):
        chapter, kernels = cases[ended.number]
        sound[chapter, kernels] = answers_of(ended)
        if isinstance(sound[chapter, kernels], str):
            raise SystemExit(f"{chapter.id} fails to answer without a bug: {sound[chapter, kernels]}")
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
    """Whether the bug is in a kernel, so that it shows only if the kernels run."""
    return trap.file.startswith("kernels/")


if __name__ == "__main__":
    run(main)
