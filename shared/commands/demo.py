"""Race the chapters through the same questions on the bundled model, then check every token against Hugging Face.

    make demo

Only the chapters that do this work differently from the one before race, and the last one; the others run afterward.
Then there is a second race, for those that differ only when the cache is too small: some of the questions, with a
system prompt, and max_tokens far above what is generated.

Each lane has its own clock, which runs only while its engine steps, and the lane whose clock is furthest behind takes
the next step. So every lane advances as it would if it had the machine to itself, although all share one process.

Reads: shared/models/pocket.
"""
import contextlib
import io
import os
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass, field
from types import ModuleType

from shared.chapters import CHAPTERS, Chapter
from shared.programs import run, take_no_arguments
from shared.workloads import CROWD, CROWD_BLOCKS, CROWD_MAX_TOKENS, RACE, SYSTEM_PROMPT, chat_ids

MAX_TOKENS = 160
SHOWN = 1  # answers printed in full
FRAMES_PER_S = 15
NAME_WIDTH = max(len(chapter.name) for chapter in CHAPTERS) + 2


@dataclass
class Lane:
    """One chapter working through the questions."""

    chapter: Chapter
    package: ModuleType
    engine: object
    max_tokens: int = MAX_TOKENS  # of each answer
    request_ids: list[int] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)  # of each answer
    texts: list[str] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)  # indices of complete answers
    latest: int = 0  # index of the answer whose text is shown
    clock_s: float = 0.0

    def start(self, prompts: list[list[int]]) -> None:
        """Queue every question, after generating one token so that nothing is timed cold."""
        self.engine.generate(prompts[:1], self.package.SamplingParams(max_tokens=1))
        if "prefix_cache" in self.chapter.capabilities:
            self.engine.reset_prefix_cache()
        params = self.package.SamplingParams(max_tokens=self.max_tokens)
        self.request_ids = [self.engine.add_request(prompt_ids, params) for prompt_ids in prompts]
        self.token_ids, self.texts = [[] for _ in prompts], ["" for _ in prompts]

    def step(self) -> None:
        """Take one step, timed on this lane's clock."""
        start = time.perf_counter()
        outputs = self.engine.step()
        self.clock_s += time.perf_counter() - start
        for output in outputs:
            number = self.request_ids.index(output.request_id)
            self.token_ids[number].append(output.token_id)
            self.texts[number] += output.text
            if output.finish_reason:
                self.finished.add(number)
        # Keep showing one answer until it is complete.
        if outputs and (self.latest in self.finished or not self.texts[self.latest]):
            self.latest = self.request_ids.index(outputs[0].request_id)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def done(self) -> bool:
        return len(self.finished) == len(self.request_ids)

    def line(self) -> str:
        """The lane's progress: complete answers, tokens, seconds on its clock."""
        answers = "\u25cf" * len(self.finished) + "\u25cb" * (len(self.request_ids) - len(self.finished))
        speed = f"{self.num_tokens / self.clock_s:7,.0f} tokens/s" if self.clock_s else ""
        return f"{self.chapter.name:{NAME_WIDTH}}{answers}  {self.num_tokens:4} tokens  {self.clock_s:6.2f} s {speed}"

    def tail(self, width: int) -> str:
        """The last width characters of the answer that is being generated."""
        if self.done:
            return ""
        text = self.texts[self.latest].replace("\n", " ")
        return "    " + (text if len(text) < width - 4 else "\u2026" + text[-(width - 6) :])


class Screen:
    """Redraws the lanes in place on a terminal; elsewhere a lane is printed once, when it is done."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.num_lines = 0
        self.next_frame = 0.0

    def show(self, lanes: list[Lane], now: bool = False) -> None:
        """Draw all lanes, unless the last frame was drawn less than 1 / FRAMES_PER_S ago."""
        if not self.live or (time.perf_counter() < self.next_frame and not now):
            return
        width = shutil.get_terminal_size().columns
        lines = [text[: width - 1] for lane in lanes for text in (lane.line(), lane.tail(width))]
        up = f"\x1b[{self.num_lines}A" if self.num_lines else ""
        sys.stdout.write(up + "".join(f"\x1b[2K{text}\n" for text in lines))
        sys.stdout.flush()
        self.num_lines = len(lines)
        self.next_frame = time.perf_counter() + 1 / FRAMES_PER_S


def main(argv: list[str]) -> int:
    """Run both races, then compare every answer with Hugging Face's; returns 1 if one differs."""
    take_no_arguments(argv, "shared.commands.demo", __doc__)
    print("loading PyTorch and the bundled model ...", file=sys.stderr)
    import torch

    from shared.checkpoints import POCKET

    # With a model this small a second thread gains little, and on a busy machine the two wait for each other.
    torch.set_num_threads(1)
    lanes = [open_lane(chapter) for chapter in CHAPTERS if chapter.races or chapter is CHAPTERS[-1]]
    prompts = [chat_ids(lanes[0].engine.tokenizer, question) for question in RACE]
    print(f"\n{len(RACE)} questions, all queued at once, through {count(len(lanes), 'engine')};")
    print("each lane is timed as if it had the machine to itself\n")
    race(lanes, prompts)
    print()
    for question, text in list(zip(RACE, lanes[-1].texts))[:SHOWN]:
        print(f"> {question}", textwrap.indent(textwrap.fill(text, 100), "  "), sep="\n")
    crowd, crowd_prompts = race_when_full()
    others = [open_lane(chapter) for chapter in CHAPTERS if chapter not in [lane.chapter for lane in lanes]]
    print("\nchecking every token against Hugging Face ...", flush=True)
    for lane in others:
        lane.start(prompts)
        while not lane.done:
            lane.step()
    from shared.verify.reference import reference

    hf = reference(POCKET)

    def is_same(lane: Lane, prompts: list[list[int]]) -> bool:
        return lane.token_ids == [hf.greedy(prompt_ids, lane.max_tokens).token_ids for prompt_ids in prompts]

    everyone = [*lanes, *others]
    wrong = {lane.chapter for lane in everyone if not is_same(lane, prompts)}
    wrong |= {lane.chapter for lane in crowd if not is_same(lane, crowd_prompts)}
    if wrong:
        differ = [chapter.id for chapter in CHAPTERS if chapter in wrong]
        where = f"`make test-{differ[0]}` shows where"
        print(f"\n{', '.join(differ)}: tokens differ from Hugging Face's; {where}", file=sys.stderr)
        return 1
    print(f"{count(len(everyone), 'chapter')}, {count(len(RACE), 'answer')} each, all identical to Hugging Face's; so are those of the second race.")
    if others:
        names = ", ".join(lane.chapter.id for lane in others)
        print(f"({names}: not in the first race; each does this as the one before.)")
    for what, first, last in (("", lanes[0], lanes[-1]), ("With little memory, ", crowd[0], crowd[-1])):
        print(f"{what}{last.chapter.name} took {last.clock_s:.2f} s for what took {first.chapter.name} {first.clock_s:.2f} s.")
    print(f"\nNext: open milestones/{CHAPTERS[0].name}/README.md, and ask your own question:")
    print(f'    make run-{CHAPTERS[0].id} PROMPT="What is a block table?"')
    return 0


def race_when_full() -> tuple[list[Lane], list[list[int]]]:
    """The second race: its lanes, when all are done, and its prompts."""
    able = [chapter for chapter in CHAPTERS if "num_blocks" in chapter.capabilities]
    chapters = [chapter for chapter in able if chapter.races or chapter.races_when_full or chapter is CHAPTERS[-1]]
    lanes = [open_lane(chapter, CROWD_MAX_TOKENS, num_blocks=CROWD_BLOCKS) for chapter in chapters]
    engine = lanes[0].engine
    prompts = [chat_ids(engine.tokenizer, question, SYSTEM_PROMPT) for question in CROWD]
    shared = len(os.path.commonprefix(prompts))
    print(f"\n{len(CROWD)} of the questions again, with a system prompt of {shared} tokens, max_tokens={CROWD_MAX_TOKENS},")
    print(f"and a cache of {CROWD_BLOCKS} blocks of {engine.cache.block_size} tokens\n")
    race(lanes, prompts)
    return lanes, prompts


def open_lane(chapter: Chapter, max_tokens: int = MAX_TOKENS, **limits) -> Lane:
    """The chapter's engine on the bundled model; what it prints about its choices is dropped."""
    from shared.checkpoints import POCKET

    package = chapter.load()
    with contextlib.redirect_stderr(io.StringIO()):
        # On the CPU, like the Hugging Face reference, even if there is a GPU: there, the race would time Triton's compiler.
        return Lane(chapter, package, package.Engine(POCKET, device="cpu", **limits), max_tokens)


def race(lanes: list[Lane], prompts: list[list[int]]) -> None:
    """Step the lane whose clock is furthest behind, until all are done."""
    for lane in lanes:
        lane.start(prompts)
    screen = Screen()
    while running := [lane for lane in lanes if not lane.done]:
        lane = min(running, key=lambda lane: lane.clock_s)
        lane.step()
        screen.show(lanes)
        if lane.done and not screen.live:
            print(lane.line(), flush=True)
    screen.show(lanes, now=True)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


if __name__ == "__main__":
    run(main)
