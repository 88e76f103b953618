"""A simulated GPU: tensors that report cuda:0 as their device, cannot be mixed with the CPU's, and compute on the CPU.

A chapter that forgets a `device=` works on a CPU and fails on a GPU. Under `pretend_gpu` it fails on a CPU too; code that
does not fail computes the same numbers as on the CPU. This says nothing about kernels, speed, or a real GPU's arithmetic.
It supports only the parts of PyTorch that an engine uses: no gradients, streams or second GPU. Pinned memory is the CPU's own.
"""
import contextlib
from collections.abc import Iterator
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
# The only operations on GPU tensors for which PyTorch accepts indices on the CPU.
TAKE_CPU_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

crossings: list[str] = []


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


def compute(func, args: tuple, kwargs: dict):
    """Run one operation on the CPU, and return its result on the device where the real operation would leave it."""
    schema = func._schema
    tensors = tensors_of((args, kwargs))
    devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    on_gpu = GPU in devices if devices else any(isinstance(tensor, OnGpu) for tensor in tensors)
    if schema.name in TAKE_CPU_INDICES and isinstance(args[0], OnGpu):
        refuse_mixed(schema.name, [args[0], *tensors_of(args[2:])])
        crossings.extend(schema.name for index in tensors_of(args[1]) if not isinstance(index, OnGpu))
    elif schema.name in MOVE or schema.name in ("aten::item", "aten::_local_scalar_dense"):
        there = isinstance(args[0], OnGpu) if schema.name == "aten::copy_" else on_gpu and schema.name in MOVE
        crossings.extend(schema.name for tensor in tensors if isinstance(tensor, OnGpu) != there)
    else:
        refuse_mixed(schema.name, tensors)
    on_cpu, options = tree_map_only(torch.device, lambda device: CPU if device == GPU else device, held((args, kwargs)))
    result = func(*on_cpu, **options)
    if schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write:
        return args[0]
    return moved(result) if on_gpu else result


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
        args, kwargs = tree_map_only(torch.device, lambda device: GPU if device.type == "cuda" else device, (args, kwargs))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            crossings.append(func.__name__)
            return OnGpu(func(*args, **kwargs | {"device": CPU}))
        if func is Tensor.pin_memory:
            assert not isinstance(args[0], OnGpu), "only the CPU's memory can be pinned"
            return args[0]
        tensors = tensors_of((args, kwargs))
        if func not in DIRECT or not any(isinstance(tensor, OnGpu) for tensor in tensors):
            return func(*args, **kwargs)
        if func in READ:
            crossings.append(func.__name__)
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            # Assigning to a slice is a copy, which may cross devices; assigning by indices may not.
            picked = tensors_of(args[1])
            refuse_mixed("aten::index", [args[0], *(() if isinstance(args[0], OnGpu) else picked)])
            crossings.extend("aten::index" for index in picked if not isinstance(index, OnGpu))
            if func is Tensor.__setitem__ and isinstance(args[2], Tensor):
                if picked:
                    refuse_mixed("aten::index_put_", [args[0], args[2]])
                elif isinstance(args[0], OnGpu) != isinstance(args[2], OnGpu):
                    crossings.append("aten::copy_")
        elif func is Tensor.copy_:
            if isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
                crossings.append("aten::copy_")
        else:
            refuse_mixed(func.__name__, tensors)
        result = func(*held(args), **held(kwargs))
        if func is Tensor.copy_:
            return args[0]
        return moved(result) if isinstance(result, Tensor) and isinstance(tensors[0], OnGpu) else result


@contextlib.contextmanager
def pretend_gpu() -> Iterator[list[str]]:
    """While entered, cuda:0 exists, has 8 GiB, and computes on the CPU.

    Yields a list that collects the name of each operation that moved data between the devices.
    """
    assert not torch.cuda.is_available(), "this machine has a GPU, and PyTorch could not use it any more after the simulation"
    torch._C._ensureCUDADeviceGuardSet()
    crossings.clear()
    there = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda device=None: (2**33, 2**33),
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=16),
        "device_of": lambda tensor: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(Calls())
        stack.enter_context(Operations())
        yield crossings
