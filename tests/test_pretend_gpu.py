"""The double of CUDA graphs: each mistake that a recording makes possible is planted in a small program, and shows."""
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.verify.pretend_gpu import launches, pretend_gpu
from tests.claims.test_v06 import needs_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is pretended")


@pytest.fixture
def gpu():
    """The list of what has moved between the devices."""
    with pretend_gpu() as crossings, torch.inference_mode():
        yield crossings


def there(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cuda")


def record(work, *args):
    """The recording of a call, and the call's result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work(*args)
    return graph, result


# ---- what a replay sees


def test_a_replay_reads_what_is_at_the_recorded_addresses(gpu):
    x = there(1, 2, 3)
    graph, doubled = record(lambda: x * 2)
    for values in ((1.0, 2.0, 3.0), (7.0, 8.0, 9.0)):
        x.copy_(torch.tensor(values))
        graph.replay()
        assert doubled.tolist() == [2 * value for value in values]


def test_a_tensor_that_takes_the_place_of_a_recorded_one_is_not_seen(gpu):
    """The bug: the program assigns its input instead of copying it. Without a recording it is right."""
    program = SimpleNamespace(x=there(1, 2))

    def work():
        return program.x * 2

    graph, doubled = record(work)
    graph.replay()
    program.x = there(7, 8)
    assert work().tolist() == [14, 16]
    graph.replay()
    assert doubled.tolist() == [2, 4]


def test_a_weight_that_is_allocated_anew_is_not_seen(gpu):
    layer, x = torch.nn.Linear(2, 1, bias=False, device="cuda"), there(1, 1)
    layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    graph, product = record(layer, x)
    graph.replay()
    assert product.tolist() == [7]
    layer.weight.data.copy_(torch.tensor([[5.0, 6.0]]))
    graph.replay()
    assert product.tolist() == [11]
    layer.weight = torch.nn.Parameter(there(0, 0)[None], requires_grad=False)
    assert layer(x).tolist() == [0]
    graph.replay()
    assert product.tolist() == [11]


@pytest.mark.parametrize(
    "work",
    [
        lambda x, lens: x * max(lens),
        lambda x, lens: x[: max(lens)] * 1,
        lambda x, lens: x.split(lens)[0] + 0,
        lambda x, lens: torch.full((2,), float(max(lens)), device="cuda"),
        lambda x, lens: torch.arange(max(lens), device="cuda"),
        lambda x, lens: x + 1 if len(lens) > 2 else x - 1,
    ],
    ids=["factor", "slice", "split", "fill", "shape", "branch"],
)
def test_a_number_that_python_computed_stays_what_it_was(gpu, work):
    """The bug: the program takes something from the batch as a number, a size or a branch."""
    x, lens = there(1, 2, 3, 4), [1, 2, 1]
    graph, result = record(work, x, lens)
    graph.replay()
    before = work(x, lens).tolist()
    assert result.tolist() == before
    lens[:] = [3, 1]
    graph.replay()
    assert work(x, lens).tolist() != before
    assert result.tolist() == before


@needs_triton
def test_so_do_the_numbers_and_the_grid_of_a_kernel(gpu):
    import triton
    import triton.language as tl

    @triton.jit
    def scale(x_ptr, factor):
        i = tl.program_id(0)
        tl.store(x_ptr + i, tl.load(x_ptr + i) * factor)

    x, numbers = there(1, 1, 1, 1), {"rows": 2, "factor": 3.0}

    def work():
        scale[(numbers["rows"],)](x, numbers["factor"])

    launches.clear()
    graph, _ = record(work)
    assert x.tolist() == [1, 1, 1, 1] and not launches
    graph.replay()
    assert x.tolist() == [3, 3, 1, 1] and launches == ["replay"]
    numbers.update(rows=4, factor=100.0)
    graph.replay()
    assert x.tolist() == [9, 9, 1, 1]
    work()
    assert x.tolist() == [900, 900, 100, 100]


# ---- what a recording does


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + 1,
        lambda x: x @ x,
        lambda x: torch.ones(2, device="cuda"),
        lambda x: x.clone(),
        lambda x: x[torch.arange(2, device="cuda")],
        lambda x: F.linear(x, x[None]),
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        lambda x: F.rms_norm(x, (2,)),
        lambda x: x.view(1, 2).sum(),
    ],
    ids=["add", "matmul", "ones", "clone", "index", "linear", "attention", "norm", "sum of a view"],
)
def test_a_result_before_the_first_replay_is_nan(gpu, work):
    """The bug: the program uses the results of the recorded call. Nothing has been computed."""
    x = there(3, 4)
    launches.clear()
    graph, result = record(work, x)
    assert not launches
    assert result.cpu().isnan().all()
    graph.replay()
    assert launches[-1] == "replay" and result.cpu().equal(work(x).cpu())


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.copy_(torch.zeros(2, device="cuda")),
        lambda x: x.__setitem__(0, 9.0),
        lambda x: x.__setitem__(slice(1, None), torch.ones(1, device="cuda")),
        lambda x: x.index_copy_(0, torch.arange(1, device="cuda"), torch.ones(1, device="cuda")),
        lambda x: x.fill_(7),
        lambda x: x[1:].mul_(2),
    ],
    ids=["add", "copy", "number", "slice", "index", "fill", "view"],
)
def test_a_recording_writes_nothing_and_each_replay_does(gpu, write):
    x, y = there(3, 4), there(3, 4)
    graph, _ = record(write, x)
    assert x.tolist() == [3, 4]
    for _ in range(2):
        graph.replay()
        write(y)
        assert x.tolist() == y.tolist() != [3, 4]


def test_operations_are_replayed_in_order(gpu):
    x, y = there(1, 2), there(0, 0)

    def work():
        y.copy_(x)
        x.add_(1)
        return x * y

    graph, product = record(work)
    for n in range(3):
        graph.replay()
        assert product.tolist() == [(1 + n) * (2 + n), (2 + n) * (3 + n)]


def test_the_next_replay_overwrites_what_the_last_one_returned(gpu):
    """The bug: the program keeps a result for longer than a step."""
    x = there(1, 2)
    graph, doubled = record(lambda: x * 2)
    kept, copied = [], []
    for _ in range(2):
        graph.replay()
        kept.append(doubled)
        copied.append(doubled.clone())
        x.add_(10)
    assert [each.tolist() for each in kept] == [[22, 24]] * 2
    assert [each.tolist() for each in copied] == [[2, 4], [22, 24]]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: int(x[0]),
        lambda x: x * 2 if x.any() else x,
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: torch.arange(2.0).pin_memory().to(x.device, non_blocking=True),
        lambda x: x[torch.tensor([0])],
        lambda x: x.copy_(torch.arange(2.0)),
        lambda x: x.__setitem__(slice(None), torch.arange(2.0)),
    ],
    ids=["tolist", "item", "int", "if", "cpu", "tensor", "to", "index", "copy", "assign"],
)
def test_what_moves_data_is_refused_and_ends_the_recording(gpu, wait):
    """The bug: the program looks at a result, or brings a number along. Without a recording, it is only slow."""
    x = there(3, 4)
    wait(x)
    assert gpu
    x.copy_(there(3, 4))
    gpu.clear()
    with pytest.raises(RuntimeError, match="not permitted while a graph is recorded"):
        record(wait, x)
    assert not gpu and x.tolist() == [3, 4]
    graph, doubled = record(lambda: x * 2)
    graph.replay()
    assert doubled.tolist() == [6, 8]


def test_what_is_on_the_cpu_is_not_recorded(gpu):
    """Python does it once."""
    x, steps = there(1, 2), torch.zeros(1)

    def work():
        steps.add_(1)
        return x + 1

    graph, _ = record(work)
    graph.replay()
    graph.replay()
    assert steps.tolist() == [1]


def test_tensors_of_both_devices_are_refused_while_recording_too(gpu):
    x = there(1, 2)
    with pytest.raises(RuntimeError, match="same device"):
        record(lambda: x + torch.ones(2))


def test_views_are_recorded_as_what_they_are_views_of(gpu):
    x = there(1, 2, 3, 4)
    graph, sums = record(lambda: x.view(2, 2)[1:].T.reshape(1, 2) + 0)
    assert len(graph.operations) == 1
    x.copy_(there(5, 6, 7, 8))
    graph.replay()
    assert sums.tolist() == [[7, 8]]


def test_a_recording_within_a_recording_is_refused(gpu):
    with pytest.raises(AssertionError, match="a graph is being recorded already"):
        record(lambda: record(lambda: None))


@pytest.mark.parametrize("target", ["cuda", "cuda:0", torch.device("cuda")])
def test_the_devices_share_no_memory(gpu, target):
    here = torch.arange(3.0)
    x = here.to(target)
    back = x.cpu()
    here += 10
    assert x.tolist() == back.tolist() == [0, 1, 2]
    x += 20
    assert back.tolist() == [0, 1, 2]


def test_a_list_as_an_index_is_uploaded(gpu):
    """As a tensor on the CPU is."""
    x = there(3, 4)
    for use in (lambda: x[[1]], lambda: x[[1], None], lambda: x.__setitem__([1], 4.0)):
        gpu.clear()
        use()
        assert gpu == ["aten::index"]
        with pytest.raises(RuntimeError, match="not permitted while a graph is recorded"):
            record(use)


def test_waiting_for_the_gpu_is_refused_while_recording(gpu):
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="synchronize is not permitted while a graph is recorded"):
        record(torch.cuda.synchronize)


def test_a_recording_takes_its_memory_from_the_pool_that_it_is_given(gpu):
    first, second, third = (torch.cuda.CUDAGraph() for _ in range(3))
    for graph, pool in ((first, None), (second, first.pool()), (third, None)):
        with torch.cuda.graph(graph, pool=pool):
            pass
    assert first.pool() == second.pool() != third.pool()
