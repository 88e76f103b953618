"""What the embedded model says when a seeded bug is planted: shown beside the bug, since most of them keep the tests' secret.

    python -m shared.book.answers         # those that are new, or whose bug was edited; all of them with --all

Each bug is planted in a copy of its chapter, which answers in a fork of this process, in company: there are more
questions than places, some come late, and one is taken back. A bug in a kernel is seen through Triton's interpreter,
in few tokens.
"""
import argparse
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from shared.book.forks import SLOW, preload, wait
from shared.book.traps import Trap, plant, read_traps
from shared.book.tree import Tree, short, this_repository

QUESTIONS = ("Explain KV cache in one sentence.", "What is a block table?")
# Asked beside them: bugs need neighbours, of other lengths, and who comes when others leave.
OTHERS = ("Tell me a story about a bear.", "What is prefill?", "What is a slot mapping?", "Tell me a story about an owl.")
PLACES = 3
MAX_TOKENS = 32
KERNEL_TOKENS = 6  # the interpreter is slow
TIMEOUT_S = 60
FILE = "trap-answers.json"
MENDS = "run `make traps-answers`"


def key(trap: Trap) -> str:
    """A hash of what is planted: an answer belongs to exactly this bug."""
    text = "\0".join((trap.file, trap.unit, trap.find, trap.replace))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def read_answers(tree: Tree) -> dict[str, dict]:
    path = tree.results / FILE
    return json.loads(path.read_text())["answers"] if path.is_file() else {}


def stale(tree: Tree) -> list[str]:
    """The traps whose answer is missing, or is another bug's; and answers without a trap."""
    answers = read_answers(tree)
    traps = {f"{short(chapter)}/{trap.name}": trap for chapter in tree.chapters for trap in read_traps(tree.traps(chapter))}
    missing = [name for name, trap in traps.items() if answers.get(name, {}).get("key") != key(trap)]
    return missing + [name for name in answers if name not in traps]


def answer(tree: Tree, chapter: Path, trap: Trap | None, kernels: bool) -> list[str] | str:
    """The answers of a copy of the chapter with the bug in it; or, as one text, what became of it."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        copy = scratch / "milestones" / chapter.name
        shutil.copytree(chapter, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if trap is not None:
            plant(trap, copy)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            be_child(chapter.name, scratch, kernels)
        exit_code = wait(child, TIMEOUT_S)
        if exit_code is None:
            return f"(no answer after {TIMEOUT_S} s)"
        said = scratch / "answers.json"
        return json.loads(said.read_text()) if said.exists() else f"(the process ends with {exit_code})"


def be_child(name: str, scratch: Path, kernels: bool) -> None:
    """In the fork: answer the questions, leave what was said in scratch, and end without returning."""
    try:
        os.setsid()
        sys.stderr = open(os.devnull, "w")
        import milestones

        milestones.__path__ = [str(scratch / "milestones"), *milestones.__path__]
        package, text = (importlib.import_module(f"milestones.{name}{part}") for part in ("", ".text"))
        said = in_company(package, text, QUESTIONS, kernels)
    except Exception as error:
        said = f"({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    with contextlib.suppress(OSError):
        (scratch / "answers.json").write_text(json.dumps(said))
    os._exit(0)


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
    parser = argparse.ArgumentParser(prog="python -m shared.book.answers", description="What the model says with each seeded bug.")
    parser.add_argument("--all", action="store_true", help="ask again where nothing has changed, too")
    args = parser.parse_args(argv)
    tree = this_repository()
    answers = {} if args.all else read_answers(tree)
    preload(SLOW)
    wanted, sound, found = set(stale(tree)), {}, {}
    for chapter in tree.chapters:
        for trap in read_traps(tree.traps(chapter)):
            name = f"{short(chapter)}/{trap.name}"
            if not args.all and name not in wanted:
                found[name] = answers[name]
                continue
            kernels = trap.file.startswith("kernels/")
            if (chapter, kernels) not in sound:
                sound[chapter, kernels] = answer(tree, chapter, None, kernels)
                if isinstance(sound[chapter, kernels], str):
                    raise SystemExit(f"{short(chapter)} does not answer without any bug: {sound[chapter, kernels]}")
            found[name] = {"key": key(trap)} | told(sound[chapter, kernels], answer(tree, chapter, trap, kernels))
            print(f"{name:60} {found[name].get('answer', 'the same')[:60]}", flush=True)
    write(tree, found)
    return 0


def write(tree: Tree, answers: dict[str, dict]) -> None:
    from shared.machine import machine, today

    about = {"command": "python -m shared.book.answers --all", "machine": machine(), "date": today()}
    (tree.results / FILE).write_text(json.dumps(about | {"answers": answers}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
