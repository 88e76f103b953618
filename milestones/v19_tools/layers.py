"""Token-wise layers: each row of [N, E] is one token, computed independently of the others.

N tokens of this step   E hidden_size   I intermediate_size   D head_dim, elements
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import Batch
from .config import ModelConfig


class Linear(nn.Linear):
    """A matrix product, [N, in] to [N, out]."""

    form = None  # where the weights are if not in the parameters: computes the products of all layers that share it
    columns = slice(None)  # this layer's among those that form computes

    @property
    def nbytes(self) -> int:
        """The size of weight and bias in bytes; each product reads them once."""
        itemsize = self.weight.itemsize if self.form is None else self.form.itemsize
        return self.weight.numel() * itemsize + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.form is None else self.form(x)[:, self.columns]


class Projection(Linear):
    """One of the seven linear layers in each decoder layer, named as in the checkpoint."""


class Returning(Projection):
    """A projection whose result is added to the residual stream: `o_proj` and `down_proj`."""


def products(x: Tensor, *linears: Linear) -> list[Tensor]:
    """The product of x [N, in] with each of the layers, as a list of [N, out]; one product if they share a form."""
    if linears[0].form is not None:
        return linears[0].form(x).split([linear.out_features for linear in linears], dim=-1)
    return [linear(x) for linear in linears]


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then multiply it by a learned weight.

    Source: https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor, batch: Batch, result: Tensor | None = None) -> Tensor:
        """The norm of hidden or, with the result of a layer, of their sum, which replaces hidden."""
        return batch.backend.norm(hidden, self.weight, self.eps, result)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, result: Tensor | None = None) -> Tensor:
    """Scale each vector of hidden [..., E] to unit root mean square, then by weight [E]; first add result to hidden, in place."""
    if result is not None:
        hidden += result
    # Squaring in 16 bits loses too much precision: take the mean in float32, apply the weight in the model's dtype.
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(hidden.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of elements, [D / 2] float32, on the CPU.

    Pairs that rotate slowly never completed a turn in training. `llama3` scaling slows them down by
    `factor`, leaves the fast ones unchanged, and interpolates in between.

    Source: https://arxiv.org/abs/2104.09864; llama3 scaling as in transformers' modeling_rope_utils.
    """
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents  # [D / 2]
    if not config.rope_scaling:
        return freqs
    scaling = config.rope_scaling
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)  # [D / 2]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # [D / 2]
    return (1 - unscaled) * freqs / scaling["factor"] + unscaled * freqs


class RotaryEmbedding(nn.Module):
    """The rotation of each position, as cosines and sines."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # Not persistent, because checkpoints do not contain it.
        self.register_buffer("freqs", rope_frequencies(config), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, D / 2] for positions [N], computed in float32 and returned in dtype."""
        angles = positions[:, None, None].float() * self.freqs  # [N, 1, D / 2]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of x [N, heads, D] by the angles of its position.

    Element i pairs with element i + D / 2, as in transformers' checkpoints, not with its neighbor.

    >>> quarter_turn = torch.tensor([0.0]), torch.tensor([1.0])
    >>> rotate(torch.tensor([[[3.0, 4.0]]]), *quarter_turn).tolist()
    [[[-4.0, 3.0]]]
    """
    first, second = x.chunk(2, dim=-1)  # [N, heads, D / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    """SwiGLU: a gated two-layer network. Source: https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Returning(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        gate, up = products(hidden, self.gate_proj, self.up_proj)  # [N, I]
        return self.down_proj(batch.backend.gate(gate, up))


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]."""
    return F.silu(gate) * up
