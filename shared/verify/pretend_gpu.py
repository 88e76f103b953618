"""A simulated GPU: tensors that report cuda:0 as their device, cannot be mixed with the CPU's, and compute on the CPU.

A chapter that forgets a `device=` works on a CPU and fails on a GPU. Under `pretend_gpu` it fails on a CPU too; code that
does not fail computes the same numbers as on the CPU. Kernels run in Triton's interpreter. This says nothing about speed, or a real GPU's arithmetic.
It supports only the parts of PyTorch that an engine uses: no gradients, no second GPU, and streams only by name. Pinned memory is the CPU's own.
"""
import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MOVE = ("aten::to", "aten::_to_copy", "aten::copy_")
# Computed directly on the CPU tensors, because PyTorch would look for a real GPU before it dispatches any operation.
READ = (Tensor.tolist, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__)
DIRECT = (F.scaled_dot_product_attention, Tensor.__getitem__, Tensor.__setitem__, Tensor.__invert__, Tensor.copy_, *READ)
# These run nothing on a GPU.
ALLOCATE = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach", "aten::_unsafe_view")
# The only operations on GPU tensors for which PyTorch accepts indices on the CPU.
TAKE_CPU_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

crossings: list[str] = []
launches: list[str] = []
recording: list["Graph"] = []  # the one that is being recorded, if any


class OnGpu(Tensor):
    """A tensor on the simulated GPU; `held` is the CPU tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):
        return Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=GPU)

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self) -> str:
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def tensors_of(tree) -> list[Tensor]:
    """All tensors in a nested structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def held(tree):
    """The structure with each GPU tensor replaced by the CPU tensor it holds."""
    return tree_map_only(OnGpu, lambda tensor: tensor.held, tree)


def moved(tree):
    """The structure with all tensors moved to the GPU."""
    return tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, OnGpu) else OnGpu(tensor), tree)


def refuse_mixed(name: str, tensors: list[Tensor]) -> None:
    """Raise RuntimeError if some tensors are on the GPU and some on the CPU; 0-dimensional CPU tensors are allowed anywhere."""
    places = {isinstance(tensor, OnGpu) for tensor in tensors if tensor.dim() or isinstance(tensor, OnGpu)}
    if len(places) == 2:
        mixed = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{name} expects all tensors to be on the same device, got {mixed}")


def cross(names: Iterable[str]) -> None:
    """Report operations that move data between the devices; RuntimeError while a graph is recorded, as on a GPU."""
    names = list(names)
    if names and recording:
        raise RuntimeError(f"{names[0]} is not permitted while a graph is recorded")
    crossings.extend(names)


def compute(func, args: tuple, kwargs: dict):
    """Run one operation on the CPU, and return its result on the device where the real operation would leave it."""
    schema = func._schema
    tensors = tensors_of((args, kwargs))
    devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    on_gpu = GPU in devices if devices else any(isinstance(tensor, OnGpu) for tensor in tensors)
    if schema.name in TAKE_CPU_INDICES and isinstance(args[0], OnGpu):
        refuse_mixed(schema.name, [args[0], *tensors_of(args[2:])])
        cross(schema.name for index in tensors_of(args[1]) if not isinstance(index, OnGpu))
    elif schema.name in MOVE or schema.name in ("aten::item", "aten::_local_scalar_dense"):
        there = isinstance(args[0], OnGpu) if schema.name == "aten::copy_" else on_gpu and schema.name in MOVE
        cross(schema.name for tensor in tensors if isinstance(tensor, OnGpu) != there)
    else:
        refuse_mixed(schema.name, tensors)
    on_cpu, options = tree_map_only(torch.device, lambda device: CPU if device == GPU else device, held((args, kwargs)))
    writes = bool(schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write)
    if recording and writes and on_gpu:
        recording[0].add(func, on_cpu, options)
        return args[0]
    result = func(*on_cpu, **options)
    # A view runs nothing, nor does a conversion to the dtype that a tensor has.
    if on_gpu and schema.name not in ALLOCATE and (writes or not share_memory(result, on_cpu)):
        if recording:
            recording[0].add(func, on_cpu, options, result)
        else:
            launches.append(schema.name)
    if writes:
        return args[0]
    if schema.name in MOVE and isinstance(args[0], OnGpu) != on_gpu:
        result = result.clone()  # the devices share no memory
    return moved(result) if on_gpu else result


def share_memory(result, args: tuple) -> bool:
    """Whether a result is in the memory of an argument."""
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(args)}
    return any(tensor.untyped_storage().data_ptr() in places for tensor in tensors_of(result))


class Graph:
    """Stands in for torch.cuda.CUDAGraph: replays the recorded operations on the tensors that they were recorded on.

    As on a GPU, nothing runs while it is recorded: until the first replay, what an operation will compute is NaN, and
    nothing is written. A tensor that takes the place of a recorded one is not seen by a replay, and Python's numbers do not change.
    """

    def __init__(self):
        self.operations = []
        self.memory_of = (id(self), 0)  # the pool

    def add(self, run: Callable, args: tuple, kwargs: dict, result=()) -> None:
        """Record an operation; result are the tensors that each replay fills, unless it writes to its arguments."""
        for tensor in tensors_of(result):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        self.operations.append((run, args, kwargs, result))

    def replay(self) -> None:
        launches.append("replay")
        for run, args, kwargs, result in self.operations:
            new = run(*args, **kwargs)
            for tensor, value in zip(tensors_of(result), tensors_of(new)):
                tensor.copy_(value)

    def pool(self) -> tuple[int, int]:
        return self.memory_of


class Stream:
    """Stands in for torch.cuda.Stream. All work is done at once, so there is no order to keep."""

    def __init__(self, device: torch.device | None = None):
        self.device = device


@contextlib.contextmanager
def record(graph: Graph, pool: tuple[int, int] | None = None, stream: object = None) -> Iterator[None]:
    """Stands in for torch.cuda.graph."""
    assert not recording, "a graph is being recorded already"
    recording.append(graph)
    if pool is not None:
        graph.memory_of = pool
    try:
        yield
    finally:
        recording.clear()


class Operations(TorchDispatchMode):
    """Runs every operation with `compute`, including those that create tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Handles the calls that PyTorch would treat differently for a GPU, or for a subclass, before it dispatches operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = torch.device(kwargs["device"])
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], str):
            args = (args[0], torch.device(args[1]), *args[2:])
        args, kwargs = tree_map_only(torch.device, lambda device: GPU if device.type == "cuda" else device, (args, kwargs))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            cross([func.__name__])
            return OnGpu(func(*args, **kwargs | {"device": CPU}))
        kwargs.pop("pin_memory", None)
        if func is Tensor.pin_memory:
            assert not isinstance(args[0], OnGpu), "only the CPU's memory can be pinned"
            return args[0]
        tensors = tensors_of((args, kwargs))
        if func not in DIRECT or not any(isinstance(tensor, OnGpu) for tensor in tensors):
            return func(*args, **kwargs)
        if func in READ:
            cross([func.__name__])
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            # Assigning to a slice is a copy, which may cross devices; assigning by indices may not.
            # A list becomes a tensor of the CPU.
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            picked = [torch.tensor(index) if isinstance(index, list) else index for index in indices if isinstance(index, (list, Tensor))]
            refuse_mixed("aten::index", [args[0], *(() if isinstance(args[0], OnGpu) else picked)])
            cross("aten::index" for index in picked if not isinstance(index, OnGpu))
            if func is Tensor.__setitem__ and isinstance(args[2], Tensor):
                if picked:
                    refuse_mixed("aten::index_put_", [args[0], args[2]])
                elif isinstance(args[0], OnGpu) != isinstance(args[2], OnGpu):
                    cross(["aten::copy_"])
        elif func is Tensor.copy_:
            if isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
                cross(["aten::copy_"])
        else:
            refuse_mixed(func.__name__, tensors)
        runs = func not in READ and (func is not Tensor.__getitem__ or bool(picked))
        writes = func in (Tensor.copy_, Tensor.__setitem__)
        result = None if recording and writes else func(*held(args), **held(kwargs))
        if runs and recording:
            recording[0].add(func, held(args), held(kwargs), () if writes else result)
        elif runs:
            launches.append(func.__name__)
        if func is Tensor.copy_:
            return args[0]
        return moved(result) if isinstance(result, Tensor) and isinstance(tensors[0], OnGpu) else result


def launch_interpreted(run: Callable) -> Callable:
    """The launch of a kernel by Triton's interpreter, for tensors on the simulated GPU."""

    def launch(kernel, *args, grid, warmup=False, **constants):
        tensors = tensors_of(args)
        refuse_mixed(kernel.__name__, tensors)
        launch_held = partial(run, kernel, *held(args), grid=grid, warmup=warmup, **constants)
        if recording:
            recording[0].add(launch_held, (), {})
        else:
            launches.append(kernel.__name__)
            launch_held()

    return launch


def dot_in_order(builder, a, b, d, *precision):
    """Stands in for the interpreter's tl.dot: each element of the product is summed in the same order, as on a GPU.

    The interpreter's own is NumPy's, whose order depends on an element's place and on the shape.
    """
    product = (a.data[:, :, None].astype(d.data.dtype) * b.data[None].astype(d.data.dtype)).sum(1)
    return type(a)(product + d.data, d.dtype.scalar)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[list[str]]:
    """While entered, cuda:0 exists, has 8 GiB, and computes on the CPU, and Triton's interpreter runs kernels on it.

    Yields a list that collects the name of each operation that moved data between the devices. `launches` collects the
    name of each operation and kernel that a GPU would have run; it starts empty.
    """
    assert not torch.cuda.is_available(), "this machine has a GPU, and PyTorch could not use it any more after the simulation"
    torch._C._ensureCUDADeviceGuardSet()
    crossings.clear()
    launches.clear()
    there = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (2**33, 2**33),
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=16),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: cross(["synchronize"] if recording else []),
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": record,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        if importlib.util.find_spec("triton") is not None:
            from triton import knobs
            from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

            # An engine refuses to interpret kernels on a GPU, so only Triton is told.
            stack.enter_context(mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}))
            stack.enter_context(mock.patch.object(type(knobs.runtime), "interpret", True))
            stack.enter_context(mock.patch.object(InterpretedFunction, "run", launch_interpreted(InterpretedFunction.run)))
            stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", dot_in_order))
        stack.enter_context(Calls())
        stack.enter_context(Operations())
        yield crossings
