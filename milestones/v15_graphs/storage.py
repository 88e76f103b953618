"""The forms in which the weights of linear layers can be stored, and the choice among them.

N tokens of this step

A step of few tokens takes as long as reading the weights takes. A form that is smaller, or laid out in the order in
which the product reads it, is faster. Which form is fastest depends on the processor, so it is found by measurement.
"""
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .layers import MLP, Linear
from .model import CausalLM

# Stored in float16, a weight may move by half of float16's smallest step. Of 16-bit weights, only those below 2**-17 move.
MAX_LOSS = 2**-25
# The numbers of tokens for which forms are compared: one stream, some, many, a piece of a prompt.
NUM_TOKENS = (1, 8, 32, 128)
# The comparison lasts about this long, and multiplies at most this many bytes of weights: more than caches hold.
SECONDS, SAMPLE_BYTES = 0.8, 2**27
# A form is chosen only if it is faster than plain by this factor on average, and nowhere slower by it.
TOLERANCE = 1.05


class Joined:
    """Weights as PyTorch stores them. Layers with the same input are joined in this form and in those below."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.itemsize = weight.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Blocks:
    """Weights in blocks, in the order in which oneDNN's product reads them."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        # The blocks that suit 16 tokens suit fewer and more of them too.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        self.bias = bias
        self.itemsize = weight.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Halves:
    """Weights in float16: half the bytes to read. The product converts them to float32 and computes in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch announces that this will move to another package
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.itemsize = 2

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


FORMS = {"joined": Joined, "blocks": Blocks, "halves": Halves}


def is_supported(form: Callable) -> bool:
    """Whether this PyTorch has the form's operations for this processor; it does not promise to keep those of Blocks and Halves."""
    try:
        form(torch.zeros(2, 2), None)(torch.zeros(1, 2))
    except (RuntimeError, AttributeError):
        return False
    return True


HAS_BLOCKS, HAS_HALVES = is_supported(Blocks), is_supported(Halves)


def groups_of(model: CausalLM) -> Iterator[list[Linear]]:
    """All linear layers, those with the same input together."""
    for module in model.modules():
        if isinstance(module, Attention):
            yield [module.q_proj, module.k_proj, module.v_proj]
            yield [module.o_proj]
        elif isinstance(module, MLP):
            yield [module.gate_proj, module.up_proj]
            yield [module.down_proj]
    yield [model.lm_head]


def store_weights(model: CausalLM, linear: str) -> str:
    """Store the weights of all linear layers in a form, plain to leave them, auto for the fastest; return the form.

    Raises:
        ValueError: if this machine, device or dtype does not have the form, or it cannot hold a weight.
    """
    if linear not in ("auto", "plain", *FORMS):
        raise ValueError(f"linear must be auto, plain, {', '.join(FORMS)}, got {linear!r}")
    if linear == "auto":
        linear = choose_form(model)
    else:
        check_form(model, linear)
    if linear != "plain":
        for group in groups_of(model):
            store(FORMS[linear], group)
    return linear


def store(form: Callable, group: list[Linear]) -> None:
    """Store the weights of layers with the same input in one object. Their parameters keep only names, shapes and dtypes."""
    shared = form(*join(group))
    end = 0
    for layer in group:
        layer.form, layer.columns = shared, slice(end, end + layer.out_features)
        end += layer.out_features
        for name, parameter in layer.named_parameters():
            setattr(layer, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def join(group: list[Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights of layers with the same input, one below another, and their biases; 0 for a layer that has none."""
    weight = torch.cat([layer.weight for layer in group]) if len(group) > 1 else group[0].weight
    if all(layer.bias is None for layer in group):
        return weight, None
    biases = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in group]
    return weight, torch.cat(biases)


def check_form(model: CausalLM, linear: str) -> None:
    """Raise ValueError if the form is not for this machine, or for the model's device, dtype or weights."""
    weight = model.lm_head.weight
    if linear in ("blocks", "halves") and (weight.device.type != "cpu" or weight.dtype != torch.float32):
        raise ValueError(f"linear is {linear!r}, which is for float32 on a CPU, not for {weight.dtype} on {weight.device}; use auto")
    if linear == "blocks" and not HAS_BLOCKS:
        raise ValueError("linear is 'blocks', but this PyTorch has no oneDNN product for them; use auto")
    if linear == "halves":
        if not HAS_HALVES:
            raise ValueError("linear is 'halves', but this PyTorch has no product with float16 weights for this processor; use auto")
        for name, module in model.named_modules():
            if isinstance(module, Linear) and loss(module.weight) > MAX_LOSS:
                raise ValueError(f"linear is 'halves', but float16 cannot hold all values of {name}.weight; use auto")


def loss(weight: Tensor) -> float:
    """The most that any weight moves when it is stored in float16; infinite if one overflows."""
    low, high = weight.half().float().sub_(weight).aminmax()
    return max(-low, high).item()


def choose_form(model: CausalLM) -> str:
    """The form that is fastest for this model on this machine, as measured now or for an earlier engine; joined on a GPU."""
    if model.lm_head.weight.device.type != "cpu":
        return "joined"
    names = ["plain"]
    for name in FORMS:
        try:
            check_form(model, name)
        except ValueError:
            continue
        names.append(name)
    shapes = sorted({tuple(layer.weight.shape) for group in groups_of(model) for layer in group})
    dtype, threads = model.lm_head.weight.dtype, torch.get_num_threads()
    # A model that fits into the processor's caches may have another fastest form than one with more layers of the same shapes.
    nbytes = min(sum(layer.nbytes for group in groups_of(model) for layer in group), SAMPLE_BYTES)
    key = f"{processor()}; torch {torch.__version__}; {threads} threads; {dtype}; {shapes}; {nbytes} bytes; {names}"
    form = read_choices().get(key)
    if form not in names:
        form = fastest(measure(model, names))
        write_choices(read_choices() | {key: form})
    return form


@torch.inference_mode()
def measure(model: CausalLM, names: list[str]) -> dict[str, list[float]]:
    """The least seconds that the products of some layers take in each form, for each of NUM_TOKENS; all take turns."""
    sample, nbytes = [], 0
    for group in groups_of(model):
        nbytes += sum(layer.nbytes for layer in group)
        if sample and nbytes > SAMPLE_BYTES:
            break
        sample.append(group)
    # Each product with the size of its input.
    products = {name: [(FORMS[name](*join(group)), group[0].in_features) for group in sample] for name in names if name != "plain"}
    products["plain"] = [(layer, layer.in_features) for group in sample for layer in group]
    seconds = {name: [math.inf] * len(NUM_TOKENS) for name in names}
    end = time.perf_counter() + SECONDS
    num_rounds = 0
    while num_rounds < 2 or time.perf_counter() < end and num_rounds < 20:
        num_rounds += 1
        for i, num_tokens in enumerate(NUM_TOKENS):
            inputs = {size: torch.randn(num_tokens, size, dtype=model.lm_head.weight.dtype) for _, size in products["plain"]}
            for name in names:
                start = time.perf_counter()
                for product, size in products[name]:
                    product(inputs[size])
                seconds[name][i] = min(seconds[name][i], time.perf_counter() - start)
    return seconds


def fastest(seconds: dict[str, list[float]]) -> str:
    """The form with the highest mean speed, relative to plain, among those that are nowhere slower than plain.

    >>> fastest({"plain": [2.0, 4.0], "blocks": [1.5, 3.0], "halves": [0.5, 5.0]})
    'blocks'
    """
    speeds = {name: [plain / each for plain, each in zip(seconds["plain"], times, strict=True)] for name, times in seconds.items()}
    means = {name: statistics.geometric_mean(each) for name, each in speeds.items() if min(each) > 1 / TOLERANCE}
    name = max(means, key=means.get)
    return name if means[name] > TOLERANCE else "plain"


def processor() -> str:
    """The processor's name and the vector instructions that PyTorch uses."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def choices_path() -> Path:
    """The file of earlier choices, in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return Path(folder or os.path.expanduser("~/.cache")) / "stepserve" / "linear.json"


def read_choices() -> dict[str, str]:
    """The form by processor, version and shapes; nothing if the file is missing or damaged."""
    try:
        known = json.loads(choices_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def write_choices(known: dict[str, str]) -> None:
    """Keep the choices for later engines; where that is not possible, each engine measures."""
    path = choices_path()
    if not path.is_absolute():  # there is no home directory
        return
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(known, indent=1), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
