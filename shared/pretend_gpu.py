"""A GPU that is none: tensors that say they are on cuda:0, refuse to be mixed with the CPU's, and compute on the CPU.

A chapter that forgets `device=` somewhere runs on a CPU and fails on a GPU. Under `pretend_gpu` it fails on a CPU too, and
what does not fail gives the CPU's numbers. It says nothing about kernels, speed, or the arithmetic of a real GPU.
"""
import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MOVE = ("aten::to", "aten::_to_copy", "aten::copy_")
# PyTorch lets these alone take indices that are on the CPU.
TAKE_CPU_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class OnGpu(Tensor):
    """A tensor on the pretended GPU; `held` is what it holds, on the CPU."""

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


def held(tree):
    """The CPU's tensors in the place of the GPU's."""
    return tree_map_only(OnGpu, lambda tensor: tensor.held, tree)


def moved(tree):
    """All tensors on the GPU."""
    return tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, OnGpu) else OnGpu(tensor), tree)


def refuse_mixed(name: str, tensors: list[Tensor]) -> None:
    """Raise RuntimeError if some are on the GPU and some on the CPU; a single number may be anywhere."""
    places = [isinstance(tensor, OnGpu) for tensor in tensors if tensor.dim()]
    if any(places) and not all(places) and not (name in TAKE_CPU_INDICES and places[0]):
        found = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{name} expects all tensors to be on the same device, got {found}")


def compute(func, args: tuple, kwargs: dict):
    """One operation: on the CPU, whatever it is, and back to where its tensors came from."""
    schema = func._schema
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    on_gpu = GPU in devices if devices else any(isinstance(tensor, OnGpu) for tensor in tensors)
    if schema.name not in MOVE:
        refuse_mixed(schema.name, tensors)
    on_cpu, options = tree_map_only(torch.device, lambda device: CPU if device == GPU else device, held((args, kwargs)))
    result = func(*on_cpu, **options)
    if schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write:
        return args[0]
    return moved(result) if on_gpu else result


class Operations(TorchDispatchMode):
    """Every operation, those that make tensors out of nothing included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """What PyTorch does for a GPU, or for no subclass, before it comes to operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = torch.device(kwargs["device"])
        args, kwargs = tree_map_only(torch.device, lambda device: GPU if device.type == "cuda" else device, (args, kwargs))
        if func is torch.tensor and kwargs.get("device") == GPU:
            return OnGpu(func(*args, **kwargs | {"device": CPU}))
        direct = (F.scaled_dot_product_attention, Tensor.__getitem__, Tensor.__setitem__, Tensor.tolist)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func not in direct or not any(isinstance(tensor, OnGpu) for tensor in tensors):
            return func(*args, **kwargs)
        picks = func in (Tensor.__getitem__, Tensor.__setitem__)
        refuse_mixed("aten::index" if picks else func.__name__, [args[0], *tensors[1:]])
        if func is Tensor.__setitem__:
            refuse_mixed(func.__name__, [each for each in (args[0], args[2]) if isinstance(each, Tensor)])
        result = func(*held(args), **held(kwargs))
        return moved(result) if isinstance(result, Tensor) else result


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """While entered, cuda:0 is there, has 8 GiB, and computes on the CPU."""
    torch._C._ensureCUDADeviceGuardSet()
    there = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda device=None: (2**33, 2**33),
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(Calls())
        stack.enter_context(Operations())
        yield
