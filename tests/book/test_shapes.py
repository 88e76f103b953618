"""Shape comments: true ones pass; false ones and those never reached are reported."""
import importlib.util
import sys
from itertools import count

import pytest

from shared.book.shapes import check_shapes

NAMES = count()
HEAD = "import torch\nfrom dataclasses import dataclass\nfrom typing import NamedTuple\n\n"


@pytest.fixture
def shapes(tmp_path):
    """A function that runs `run()` of a module's source under the tracer."""

    def shapes(source, run="run"):
        name = f"traced_{next(NAMES)}"
        path = tmp_path / f"{name}.py"
        path.write_text(HEAD + source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        report = check_shapes(tmp_path, getattr(module, run, lambda: None))
        path.unlink()
        return report

    return shapes


def body(*lines):
    return "\n".join(["def run():", *(f"    {line}" for line in lines), ""])


def test_a_true_comment_passes(shapes):
    report = shapes(body("q = torch.zeros(5, 6, 16)  # [N, H, D]", "k = torch.zeros(5, 2, 16)  # [N, KV, D] keys"))
    assert report.ok and len(report.checked) == 2, report


def test_a_false_comment_is_reported_with_what_is_true(shapes):
    report = shapes(body("q = torch.zeros(5, 6, 16)  # [N, H, D]", "k = torch.zeros(5, 16, 2)  # [N, KV, D]"))
    [message] = report.false
    assert "::run line 7: `k = torch.zeros(5, 16, 2)  # [N, KV, D]` is [5, 16, 2] where N = 5, H = 6, D = 16" in message
    assert not report.ok and not report.unreached


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.zeros(3, 4)  # [N]",
        "x = torch.zeros(3)  # [N, D]",
        "x = torch.zeros(3, 4)  # [N, N]",
        "x = torch.zeros(3, 4)  # [3, 5]",
        "x = torch.zeros(3, 4)  # [..., 3]",
        "x = torch.zeros(3, 4)  # [A, B, ..., C]",
        "x = torch.zeros(3, 7)  # [N, 2 * N]",
        "x = torch.zeros(3, 7)  # [N + 1, 7] where N is bound below\n    y = torch.zeros(3)  # [N]",
        "x = 3  # [N]",
        "x = type('T', (), {'shape': ('a', 'b')})()  # [A, B]",
        "x = None  # [N]",
        "x = [1, 2]  # [3]",
        "x = [[1], [2, 3]]  # [2, M]",
        "q, k = torch.zeros(3), torch.zeros(4)  # [N]",
        "x = torch.zeros(3); x = torch.zeros(4, 1)  # [N]",
        "num_tokens = 4; x = torch.zeros(3)  # [num_tokens]",
        "num_heads = 4\n    x = torch.zeros(3, 6)  # [N, H]",
        "for row in torch.zeros(3, 4):  # [N, M]\n        pass",
        "return torch.zeros(3, 4)  # [N]",
        "return (\n        torch.zeros(3, 4)\n    )  # [N]",
        "with torch.no_grad():\n        return torch.zeros(3, 4)  # [N]",
        "x = torch.zeros(8)  # [D / 2]\n    y = torch.zeros(9)  # [D / 2]",
        "x = torch.zeros(8)  # [2 * D]\n    y = torch.zeros(10)  # [2 * D]",
        "x = torch.zeros(8)  # [L - 1]\n    y = torch.zeros(9)  # [1 + L]",
        "x = torch.zeros(7)  # [2 * D]",
        "x = torch.zeros(7)  # [D // 2]\n    D = torch.zeros(13)  # [D]\n    y = torch.zeros(13)  # [D]",
    ],
)
def test_each_way_of_being_false_is_reported(shapes, line):
    report = shapes(body(*line.split("\n    ")) if "\n" not in line else f"def run():\n    {line}\n")
    assert len(report.false) == 1, report


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.zeros(3, 4)  # [N, 4]",
        "x = torch.zeros(9, 3, 4)  # [..., N, D]",
        "x = torch.zeros(3, 9, 9, 4)  # [N, ..., D]",
        "x = torch.zeros(3, 8)  # [N, D / 2]\n    y = torch.zeros(16)  # [D]",
        "x = torch.zeros(7)  # [D // 2]\n    y = torch.zeros(15)  # [D]",
        "x = torch.zeros(12)  # [S * L]\n    y = torch.zeros(3, 4)  # [S, L]",
        "x = torch.zeros(4, 3)  # [S + 1, S]",
        "x = [1, 2]  # [2]\n    y = [(1, 2), (3, 4)]  # [2]\n    z = [[1, 2, 3], [4, 5, 6]]  # [2, M]",
        "q, (k, v) = torch.zeros(3), (torch.ones(3), torch.zeros(3))  # [N]",
        "x = 5\n    x = [\n        torch.zeros(n)\n        for n in (3, 4)\n    ]  # [2]",
        "return torch.cat([torch.zeros(7) for _ in range(2)])  # [14]",
        "with torch.no_grad():\n        return torch.zeros(3)  # [N]",
        "x = torch.cat([torch.zeros(n, 2) for n in (3, 4)])  # [7, 2]",
        "x = torch.zeros(  # [N, 4]\n        3, 4\n    )\n    y = torch.zeros(3)  # [N]",
        "for n in (3, 4):\n        f(n)\n\n\ndef f(n):\n    x = torch.zeros(n)  # [n]",
        "x = torch.zeros(3)  # [N]\n    x += 1  # [N]\n    x: list = x  # [N]",
        "x = 5\n    try:\n        x = torch.zeros(3)[4, 4]  # [N]\n    except IndexError:\n        x = 3",
        "x = torch.zeros(3)  # an ordinary comment\n    # [N, D] above is no claim",
        "x = '# [N]'",
        "t = type('T', (), {})()\n    t.x = torch.zeros(3)  # [3]\n    t.y = {}\n    t.y['a'] = t.x  # [3]",
    ],
)
def test_what_is_true_in_an_unusual_way_passes(shapes, line):
    report = shapes(f"def run():\n    {line}\n")
    assert not report.false, report


def test_a_comment_that_is_never_reached_is_reported(shapes):
    lines = ("if torch.zeros(1).sum() > 1:", "    x = torch.zeros(3)  # [N]", "for row in []:  # [N]", "    pass")
    report = shapes(body(*lines))
    assert [message.split("`")[1] for message in report.unreached] == [lines[1].strip(), lines[2]]
    assert not report.ok and "was never reached" in str(report)


@pytest.mark.parametrize(
    "line, why",
    [
        ("print(1)  # [N]", "assigns no value"),
        ("x = dict(\n        a=1,  # [N]\n        b=2,\n    )", "assigns no value"),
        ("x = 1  # [this is no shape]", "no shape in its brackets"),
        ("x = 1  # [f(x)]", "no shape in its brackets"),
        ("x = 1  # [n for n in x]", "no shape in its brackets"),
    ],
)
def test_a_comment_that_stands_on_nothing_is_reported(shapes, line, why):
    report = shapes(f"def run():\n    {line}\n")
    assert len(report.unreached) == 1 and why in report.unreached[0]


def test_letters_are_bound_once_a_frame_and_anew_in_the_next(shapes):
    source = "def f(n):\n    x = torch.zeros(n)  # [N]\n\n\ndef run():\n    f(3)\n    f(4)\n"
    assert shapes(source).ok
    loop = "def run():\n    for n in (3, 4):\n        x = torch.zeros(n)  # [N]\n"
    assert len(shapes(loop).false) == 1


def test_a_letter_means_what_the_vocabulary_says_wherever_it_is_known(shapes):
    source = """\
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = 16
        self.config = type("Config", (), {"num_heads": 6})()

    def forward(self, x):
        return x.transpose(1, 2)  # [N, D, H]


@torch.inference_mode()
def run():
    Layer()(torch.zeros(5, %d, %d))
"""
    assert shapes(source % (6, 16)).ok
    assert len(shapes(source % (16, 6)).false) == 1
    assert len(shapes(source % (7, 16)).false) == 1


def test_fields_are_checked_when_an_instance_has_been_made(shapes):
    source = """\
@dataclass(frozen=True)
class Batch:
    token_ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N] of each token
    rows: torch.Tensor | None = None  # [R]


class Draw(NamedTuple):
    logits: torch.Tensor  # [R, V]
    ids: list  # [R]


class Plain:
    slots: torch.Tensor  # [P]

    def __init__(self, num_blocks, n):
        self.num_blocks = num_blocks
        self.slots = torch.zeros(n)


def good():
    Batch(torch.zeros(3), torch.zeros(3)), Batch(torch.zeros(4), torch.zeros(4), torch.zeros(2))
    Draw(torch.zeros(2, 5), [1, 2])
    Plain(3, 3)


def bad():
    Batch(torch.zeros(3), torch.zeros(4), torch.zeros(2, 2))
    Draw(torch.zeros(2, 5), [1, 2, 3])
    Plain(3, 4)
"""
    assert shapes(source, "good").ok
    report = shapes(source, "bad")
    assert [message.split("`")[1].split(":")[0] for message in report.false] == ["positions", "rows", "ids", "slots"]
    assert "Batch line" in report.false[0]


def test_parameters_are_checked_when_a_function_is_entered(shapes):
    source = """\
def attend(
    q,  # [N, H]
    mask=None,  # [N]
    cache_ptr=0,  # [P, D]
):
    pass


def run():
    attend(torch.zeros(3, %d))
    attend(torch.zeros(3, 2), torch.zeros(%d))
"""
    assert shapes(source % (2, 3)).ok
    assert len(shapes(source % (2, 4)).false) == 1


def test_other_threads_are_followed_and_the_tracer_before_is_put_back(shapes):
    source = """\
import threading


def work():
    x = torch.zeros(3, 4)  # [N, N]


def run():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    before, mine = sys.gettrace(), lambda *_: None
    sys.settrace(mine)
    try:
        assert len(shapes(source).false) == 1
        assert sys.gettrace() is mine
    finally:
        sys.settrace(before)
