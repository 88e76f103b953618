"""Shape comments and docstring examples in the source are true; both are run."""
from pathlib import Path

import pytest

from shared.book.doctests import check_package
from shared.book.shapes import check_shapes
from shared.checkpoints import checkpoint
from shared.commands.doctor import interpreter_fault

pytestmark = pytest.mark.needs("generate", "sample", "logprobs")


def exercise(chapter):
    """Runs that together reach every line with a shape comment: all families, all filters."""
    package = chapter.load()
    has_kernels = (chapter.path / "kernels").is_dir()
    if has_kernels and interpreter_fault():
        pytest.skip(interpreter_fault())
    engines = [(name, {"attention": "torch"} if has_kernels else {}) for name in ("llama3", "qwen2", "qwen3")]
    engines += [("qwen3", {"exact": True})] if "exact" in chapter.capabilities else []
    for name, options in engines:
        engine = package.Engine(checkpoint(name), **options)
        params = [
            package.SamplingParams(max_tokens=3, temperature=0.8, top_k=5, top_p=0.9, logprobs=2),
            package.SamplingParams(max_tokens=2),
        ]
        engine.generate([[9, 10, 11, 12, 13], [14, 15]], params)
        if "grammars" in chapter.capabilities:
            params[0] = package.SamplingParams(max_tokens=3, temperature=0.8, min_p=0.01, repetition_penalty=1.2, logit_bias={8: 1.0})
            params[1:] = [package.SamplingParams(max_tokens=3, temperature=0.8, regex=pattern) for pattern in ("[a-z]+", "[0-9]{9}")]
            engine.generate([[9, 10, 11, 12, 13], [14, 15], [16]], params)
    if has_kernels:  # traced, Triton's interpreter is slow
        engine = package.Engine(checkpoint("qwen3"), attention="triton")
        engine.generate([[9, 10], [14]], package.SamplingParams(max_tokens=2))


def test_every_shape_comment_is_reached_and_true(chapter):
    # The directory that it was imported from, which may be a copy with a planted bug.
    package_dir = Path(chapter.load().__file__).parent
    report = check_shapes(package_dir, lambda: exercise(chapter))
    assert report.ok, str(report)
    assert report.checked


def test_every_example_in_a_docstring_is_true(chapter):
    report = check_package(f"milestones.{chapter.name}")
    assert report.attempted and not report.failures, "\n".join(report.failures)
