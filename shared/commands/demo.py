"""A race: chapters answer the same questions on the embedded model, side by side; then all others have to say the same.

    make demo

In the race are those that do this work in another way than the chapter before, and the last.

Each lane has a clock of its own, which runs only while its engine steps; the next step is always taken by
the lane whose clock is furthest behind. So all lanes are seen as they would be alone on this machine, in
one process and however few cores there are.

Reads: shared/models/pocket.
"""
import contextlib
import io
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass, field
from types import ModuleType

from shared.chapters import CHAPTERS, Chapter
from shared.programs import run
from shared.workloads import RACE

MAX_TOKENS = 160
SHOWN = 3  # answers printed in full
FRAMES_PER_S = 15
NAME_WIDTH = max(len(chapter.name) for chapter in CHAPTERS) + 2


@dataclass
class Lane:
    """One chapter on its way through the questions."""

    chapter: Chapter
    package: ModuleType
    engine: object
    request_ids: list[int] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)  # of each answer
    texts: list[str] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)  # answers that have ended
    latest: int = 0  # the answer that was written to last
    clock_s: float = 0.0

    def start(self, prompts: list[list[int]]) -> None:
        """Queue every question; a first token has been computed before, so that nothing is timed cold."""
        self.engine.generate(prompts[:1], self.package.SamplingParams(max_tokens=1))
        params = self.package.SamplingParams(max_tokens=MAX_TOKENS)
        self.request_ids = [self.engine.add_request(prompt_ids, params) for prompt_ids in prompts]
        self.token_ids, self.texts = [[] for _ in prompts], ["" for _ in prompts]

    def step(self) -> None:
        """One step, on this lane's clock."""
        start = time.perf_counter()
        outputs = self.engine.step()
        self.clock_s += time.perf_counter() - start
        for output in outputs:
            number = self.request_ids.index(output.request_id)
            self.token_ids[number].append(output.token_id)
            self.texts[number] += output.text
            if output.finish_reason:
                self.finished.add(number)
        # What is shown stays with one answer until it has ended.
        if outputs and (self.latest in self.finished or not self.texts[self.latest]):
            self.latest = self.request_ids.index(outputs[0].request_id)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def done(self) -> bool:
        return len(self.finished) == len(self.request_ids)

    def line(self) -> str:
        """Where the lane is: answers, tokens, its own time."""
        answers = "\u25cf" * len(self.finished) + "\u25cb" * (len(self.request_ids) - len(self.finished))
        speed = f"{self.num_tokens / self.clock_s:7,.0f} tokens/s" if self.clock_s else ""
        return f"{self.chapter.name:{NAME_WIDTH}}{answers}  {self.num_tokens:4} tokens  {self.clock_s:6.2f} s {speed}"

    def tail(self, width: int) -> str:
        """The end of the answer that is being written; what has gone by is cut off in front."""
        if self.done:
            return ""
        text = self.texts[self.latest].replace("\n", " ")
        return "    " + (text if len(text) < width - 4 else "\u2026" + text[-(width - 6) :])


class Screen:
    """Lines that are drawn over where there is a terminal; elsewhere nothing is shown before a lane is done."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.num_lines = 0
        self.next_frame = 0.0

    def show(self, lanes: list[Lane], now: bool = False) -> None:
        """Draw all lanes, unless the last frame is too fresh."""
        if not self.live or (time.perf_counter() < self.next_frame and not now):
            return
        width = shutil.get_terminal_size().columns
        lines = [text[: width - 1] for lane in lanes for text in (lane.line(), lane.tail(width))]
        up = f"\x1b[{self.num_lines}A" if self.num_lines else ""
        sys.stdout.write(up + "".join(f"\x1b[2K{text}\n" for text in lines))
        sys.stdout.flush()
        self.num_lines = len(lines)
        self.next_frame = time.perf_counter() + 1 / FRAMES_PER_S


def main() -> int:
    """Run the race, then hold every answer against Hugging Face's; 1 if one differs."""
    print("loading PyTorch and the embedded model ...", file=sys.stderr)
    import torch

    from shared.checkpoints import POCKET

    # For so small a model a second thread brings little, and on a busy machine the two wait for each other.
    torch.set_num_threads(1)
    lanes = [open_lane(chapter) for chapter in CHAPTERS if chapter.races or chapter is CHAPTERS[-1]]
    prompts = [chat_ids(lanes[0].engine.tokenizer, question) for question in RACE]
    print(f"\n{len(RACE)} questions at once to {count(len(lanes), 'engine')}, each in the model's chat template;")
    print("every lane is timed by itself, as if it had the machine alone\n")
    race(lanes, prompts)
    print()
    for question, text in list(zip(RACE, lanes[-1].texts))[:SHOWN]:
        print(f"> {question}", textwrap.indent(textwrap.fill(text, 100), "  "), sep="\n")
    others = [open_lane(chapter) for chapter in CHAPTERS if chapter not in [lane.chapter for lane in lanes]]
    print("\nchecking every token against Hugging Face ...", flush=True)
    for lane in others:
        lane.start(prompts)
        while not lane.done:
            lane.step()
    from shared.verify.reference import reference

    hf = reference(POCKET)
    expected = [hf.greedy(prompt_ids, MAX_TOKENS).token_ids for prompt_ids in prompts]
    everyone = sorted([*lanes, *others], key=lambda lane: lane.chapter.number)
    differ = [lane.chapter.id for lane in everyone if lane.token_ids != expected]
    if differ:
        where = f"`make test-{differ[0]}` says where"
        print(f"\n{', '.join(differ)}: other tokens than Hugging Face; {where}", file=sys.stderr)
        return 1
    first, last = lanes[0], lanes[-1]
    print(f"{count(len(everyone), 'chapter')}, {count(len(RACE), 'answer')} each, all identical to Hugging Face's.")
    if others:
        names = ", ".join(lane.chapter.id for lane in others)
        print(f"({names}: not in the race, since each does this work as the chapter before it does.)")
    print(f"{last.chapter.name} took {last.clock_s:.2f} s for what took {first.chapter.name} {first.clock_s:.2f} s.")
    print(f"\nNext: open milestones/{first.chapter.name}/README.md, and ask a question of your own:")
    print(f'    make run-{first.chapter.id} PROMPT="What is a block table?"')
    return 0


def open_lane(chapter: Chapter) -> Lane:
    """The chapter with the embedded model, without its line about what it chose."""
    from shared.checkpoints import POCKET

    package = chapter.load()
    with contextlib.redirect_stderr(io.StringIO()):
        # Where Hugging Face is asked, also if there is a GPU: there, Triton's compiler would be timed.
        return Lane(chapter, package, package.Engine(POCKET, device="cpu"))


def race(lanes: list[Lane], prompts: list[list[int]]) -> None:
    """Let the lane that is furthest behind take the next step, until all are done."""
    for lane in lanes:
        lane.start(prompts)
    screen = Screen()
    while running := [lane for lane in lanes if not lane.done]:
        lane = min(running, key=lambda each: each.clock_s)
        lane.step()
        screen.show(lanes)
        if lane.done and not screen.live:
            print(lane.line(), flush=True)
    screen.show(lanes, now=True)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def chat_ids(tokenizer, question: str) -> list[int]:
    """A question as one user turn in the checkpoint's template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids


if __name__ == "__main__":
    run(lambda _argv: main())
