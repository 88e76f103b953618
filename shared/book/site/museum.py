"""The page of the seeded bugs that somebody shipped: what users saw, in which project, and the test that catches it here.

Reads: tests/traps.
"""
import re
from collections import Counter

from shared.book.site import diff_pages
from shared.book.traps.seeded_bugs import Trap, read_traps
from shared.chapters import Book, Chapter

# A report, as a trap names it: a project, and the number of an issue or a pull request, or of an advisory.
REPORT = re.compile(r"(?P<project>[\w.\-/]+) (?P<number>(?:PR )?#\d+|CVE-[\d-]+)")
# The repositories of projects that traps name without an owner.
REPOSITORIES = {
    "FastDeploy": "PaddlePaddle/FastDeploy",
    "PaddleNLP": "PaddlePaddle/PaddleNLP",
    "TensorRT-LLM": "NVIDIA/TensorRT-LLM",
    "axolotl": "axolotl-ai-cloud/axolotl",
    "batch_invariant_ops": "thinking-machines-lab/batch_invariant_ops",
    "djl-serving": "deepjavalibrary/djl-serving",
    "ik_llama.cpp": "ikawrakow/ik_llama.cpp",
    "keras-hub": "keras-team/keras-hub",
    "llama.cpp": "ggml-org/llama.cpp",
    "llama_index": "run-llama/llama_index",
    "llm-d-inference-sim": "llm-d/llm-d-inference-sim",
    "llguidance": "guidance-ai/llguidance",
    "mlx-swift-lm": "ml-explore/mlx-swift-lm",
    "nano-vllm": "GeeeekExplorer/nano-vllm",
    "outlines": "dottxt-ai/outlines",
    "peft": "huggingface/peft",
    "pytorch": "pytorch/pytorch",
    "sgl-flash-attn": "sgl-project/sgl-flash-attn",
    "sglang": "sgl-project/sglang",
    "sglang-jax": "sgl-project/sglang-jax",
    "tabbyAPI": "theroyallab/tabbyAPI",
    "transformers": "huggingface/transformers",
    "vllm": "vllm-project/vllm",
    "worker-vllm": "runpod-workers/worker-vllm",
    "xgrammar": "mlc-ai/xgrammar",
}


def reports(trap: Trap) -> list[tuple[str, str]]:
    """The project and the number of each report that a trap names; ValueError if it names none that can be read.

    >>> reports(Trap("", "", "", "", (), "", seen="vllm #3251, djl-serving PR #2299"))
    [('vllm', '#3251'), ('djl-serving', 'PR #2299')]
    """
    if not trap.seen:
        return []
    named = [REPORT.fullmatch(part) for part in trap.seen.split(", ")]
    if None in named:
        raise ValueError(f"the trap {trap.name!r} was seen in {trap.seen!r}, which should be projects and numbers, as in 'vllm #43810, sglang PR #2403'")
    return [(match["project"], match["number"]) for match in named]


def link(project: str, number: str) -> str:
    """A report as a link, if it is known where the project is. GitHub leads from an issue's address to a pull request's."""
    repository = project if "/" in project else REPOSITORIES.get(project)
    if repository is None or "#" not in number:
        return f"{project} {number}"
    return f"[{project} {number}](https://github.com/{repository}/issues/{number.partition('#')[2]})"


def page(book: Book, cell) -> str:
    """The page. cell: a text as a cell of a table."""
    shipped = [(chapter, trap) for chapter in book.chapters for trap in read_traps(chapter.traps) if trap.seen]
    projects = Counter(project for _, trap in shipped for project in {project for project, _ in reports(trap)})
    total = sum(len(read_traps(chapter.traps)) for chapter in book.chapters)
    most = ", ".join(f"{project} ({count})" for project, count in projects.most_common() if count > 1)
    rows = [
        "---\nhide:\n  - toc\n---",
        "# Bugs that shipped",
        f"Of the {total} [seeded bugs](traps.md) of this book, {len(shipped)} are not invented: somebody shipped them, in one of {len(projects)} projects, "
        "and users saw what is told here. Careful people wrote that code, and careful people reviewed it. "
        "Each bug is planted in this book's own code, where the test beside it fails; `make traps` repeats this.",
        f"More than one each: {most}.",
    ]
    for chapter in book.chapters:
        of_chapter = [trap for owner, trap in shipped if owner is chapter]
        if of_chapter:
            rows += [f"## {chapter.id}", *table(chapter, of_chapter, cell)]
    return "\n\n".join(rows) + "\n"


def table(chapter: Chapter, traps: list[Trap], cell) -> list[str]:
    lines = ["| what users saw | reported as | planted in, and caught by |", "|---|---|---|"]
    for trap in traps:
        file = diff_pages.file_page(trap.file)
        where = f"[`{trap.address}`](../milestones/{chapter.name}/files/{file}.md)"
        told = f"**{cell(trap.name)}**: {cell(trap.sees)}"
        lines.append(f"| {told} | {', '.join(link(*report) for report in reports(trap))} | {where}<br>`{trap.test[0].split('::')[-1]}` |")
    return ['<div class="stack" markdown="1">', "\n".join(lines), "</div>"]
