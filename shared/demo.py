"""Every chapter on the embedded model: what it answers, that all say the same, and how fast.

    make demo
"""
import contextlib
import io
import sys
import time

from .chapters import CHAPTERS, Chapter
from .checkpoints import POCKET
from .workloads import QUESTIONS

MAX_TOKENS = 160


def main() -> int:
    """Run the chapters one after the other; 1 if one of them differs from Hugging Face."""
    print("loading PyTorch and the embedded model ...", file=sys.stderr)
    from .reference import reference

    hf = reference(POCKET)
    prompts = [chat_ids(hf.tokenizer, question) for question in QUESTIONS]
    print(f"{len(QUESTIONS)} questions, each sent as a user's turn in the model's chat template\n")
    expected = None
    differ = []
    for chapter in CHAPTERS:
        answers, seconds = answer(chapter, prompts, show=chapter is CHAPTERS[0])
        if expected is None:
            expected = [hf.greedy(prompt_ids, MAX_TOKENS).token_ids for prompt_ids in prompts]
        if answers != expected:
            differ.append(chapter.id)
        num_tokens = sum(len(token_ids) for token_ids in answers)
        same = "as Hugging Face" if answers == expected else "NOT as Hugging Face"
        speed = f"{num_tokens:5} tokens in {seconds:6.2f} s {num_tokens / seconds:8.1f} tokens/s"
        print(f"{chapter.name:24}{speed}   {same}")
    if differ:
        where = f"`make test-{differ[0]}` says where"
        print(f"\n{', '.join(differ)}: other tokens than Hugging Face; {where}", file=sys.stderr)
        return 1
    chapters, answers = count(len(CHAPTERS), "chapter"), count(len(QUESTIONS), "answer")
    print(f"\n{chapters}, {answers} each, all identical to Hugging Face's.")
    print(f"Next: open milestones/{CHAPTERS[0].name}/README.md, and ask a question of your own:")
    print(f'    make run-{CHAPTERS[0].id} PROMPT="What is a block table?"')
    return 0


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def chat_ids(tokenizer, question: str) -> list[int]:
    """A question as one user turn in the checkpoint's template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def answer(chapter: Chapter, prompts: list[list[int]], show: bool) -> tuple[list[list[int]], float]:
    """The tokens of each answer and the seconds they took; with show, the texts as they come."""
    package = chapter.load()
    with contextlib.redirect_stderr(io.StringIO()):
        engine = package.Engine(POCKET)
    params = package.SamplingParams(max_tokens=MAX_TOKENS)
    engine.generate([prompts[0]], package.SamplingParams(max_tokens=1))  # warm-up
    start = time.perf_counter()
    request_ids = [engine.add_request(prompt_ids, params) for prompt_ids in prompts]
    tokens = {request_id: [] for request_id in request_ids}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if show and not tokens[output.request_id]:
                print(f"> {QUESTIONS[request_ids.index(output.request_id)]}\n  ", end="")
            tokens[output.request_id].append(output.token_id)
            if show:
                print(output.text, end="\n\n" if output.finish_reason else "", flush=True)
    return list(tokens.values()), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
