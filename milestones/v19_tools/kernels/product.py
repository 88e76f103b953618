"""The product of a linear layer as a Triton kernel: each sum goes over the inputs in one order, for any number of rows.

N rows   K in_features   O out_features
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..storage import Joined
from .paged_attention import TILE_DTYPES

# The rows that a program computes: few, or for more than MAX_FEW rows many.
FEW, MAX_FEW, MANY = 16, 64, 64
# The outputs that a program computes, and the bytes of a row or a weight that it reads at a time.
TILE_OUT, TILE_BYTES = 64, 128


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    # tensors, contiguous
    out_ptr,     # [N, O]
    x_ptr,       # [N, K]
    weight_ptr,  # [O, K]
    bias_ptr,    # [O]; not read unless BIAS
    # scalars
    num_rows,    # N
    # compile-time
    BIAS: tl.constexpr,
    SIZE_IN: tl.constexpr,   # K
    SIZE_OUT: tl.constexpr,  # O
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_DTYPE: tl.constexpr,  # the dtype in which tiles are multiplied; sums are float32
):
    """Program (j, i) computes tile j of the outputs for tile i of the rows."""
    offs_n = (tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    offs_o = (tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)).to(tl.int64)
    offs_k = tl.arange(0, TILE_IN)
    # hide what is past the last row and the last output
    row_mask = offs_n < num_rows
    out_mask = offs_o < SIZE_OUT
    acc = tl.zeros([TILE_ROWS, TILE_OUT], tl.float32)
    for start in range(0, SIZE_IN, TILE_IN):
        k = start + offs_k
        x_mask = row_mask[:, None] & (k < SIZE_IN)[None, :]
        x = tl.load(x_ptr + offs_n[:, None] * SIZE_IN + k[None, :], mask=x_mask, other=0.0).to(TILE_DTYPE)
        w_mask = out_mask[:, None] & (k < SIZE_IN)[None, :]
        w = tl.load(weight_ptr + offs_o[:, None] * SIZE_IN + k[None, :], mask=w_mask, other=0.0).to(TILE_DTYPE)
        acc += tl.dot(x, tl.trans(w), input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + offs_o, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & out_mask[None, :]
    tl.store(out_ptr + offs_n[:, None] * SIZE_OUT + offs_o[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def choose_rows(num_rows: int, itemsize: int) -> int:
    """The rows of a tile; of float32 half as many, so that the sums fit into a thread's registers.

    >>> choose_rows(64, itemsize=2), choose_rows(65, 2), choose_rows(65, 4)
    (16, 64, 32)
    """
    return FEW if num_rows <= MAX_FEW else MANY * 2 // itemsize


def product(x: Tensor, weight: Tensor, bias: Tensor | None, tile_rows: int | None = None) -> Tensor:
    """x [N, K] times weight [O, K] transposed, plus bias [O]: [N, O] in x's dtype, summed in float32.

    tile_rows: the rows that a program computes; by default as `choose_rows` says.

    Products are computed in full precision (ieee), never in TF32.
    """
    num_rows, size_in = x.shape
    size_out = len(weight)
    assert x.is_contiguous() and weight.is_contiguous()
    out = torch.empty(num_rows, size_out, device=x.device, dtype=x.dtype)
    tile_rows = tile_rows or choose_rows(num_rows, x.element_size())
    # The interpreter cannot multiply bfloat16, so 16-bit tiles are multiplied only on a GPU.
    tile_dtype = TILE_DTYPES[x.dtype] if x.is_cuda else tl.float32
    _product_kernel[(triton.cdiv(size_out, TILE_OUT), triton.cdiv(num_rows, tile_rows))](
        out, x, weight, weight if bias is None else bias, num_rows,
        BIAS=bias is not None, SIZE_IN=size_in, SIZE_OUT=size_out,
        TILE_ROWS=tile_rows, TILE_OUT=TILE_OUT, TILE_IN=TILE_BYTES // x.element_size(), TILE_DTYPE=tile_dtype,
    )
    return out


class RowProduct(Joined):
    """Weights as PyTorch stores them, multiplied by this kernel."""

    tile_rows: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        with torch.cuda.device_of(x):
            return product(x, self.weight, self.bias, self.tile_rows)


class FewRowsProduct(RowProduct):
    """The same in small tiles only, where larger ones would give other bits."""

    tile_rows = FEW
