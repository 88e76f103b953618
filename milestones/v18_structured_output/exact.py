"""The same bits for a request whatever else is in its steps: every sum is taken in an order that only the request decides.

N tokens of this step   S sequences   Q queries each   H query heads   KV key/value heads   G = H / KV   D head_dim
n keys   R rows of a sequence: Q * G, padded

Floating-point addition is not associative, and a library chooses the order of a sum by the shape of the whole operation.
The operations here get shapes that do not depend on the batch, or only in ways that `is_exact` finds to change nothing.
"""
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import TORCH
from .batch import Backend, Batch, Rectangle, build_rectangles, on_device, rectangles_of_rows
from .config import ModelConfig
from .model import CausalLM
from .storage import Blocks, Halves, Joined, check_form, groups_of, store, use
from .trial import is_exact

# The keys of a context that are attended to at a time, by their positions. The last tile is filled up.
TILE_KEYS = 128
# The rows that a product without packed weights multiplies at a time.
TILE_ROWS = 16
# In 16 bits, PyTorch's attention multiplies heads of another length in a way that can depend on the number of rows.
HEAD_MULTIPLE = 32
# What scaled_dot_product_attention runs on a CPU, but it returns the sums too. PyTorch does not promise to keep it.
flash_attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class PaddedBlocks(Blocks):
    """Blocks, multiplied with at least two rows: for a single row, oneDNN divides long sums in another way."""

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            return super().__call__(x)
        return super().__call__(F.pad(x, (0, 0, 0, 1)))[:1]


class RowTiles(Joined):
    """Weights as PyTorch stores them, multiplied with exactly TILE_ROWS rows at a time."""

    def __call__(self, x: Tensor) -> Tensor:
        tiles = F.pad(x, (0, 0, 0, -len(x) % TILE_ROWS)).split(TILE_ROWS)
        return torch.cat([super(RowTiles, self).__call__(tile) for tile in tiles])[: len(x)]


class Tiles(NamedTuple):
    """A rectangle, padded to whole tiles of keys."""

    tokens: Tensor  # [S * Q] as in Rectangle
    block_tables: Tensor  # [S, M] int32; what is past the end of a table is its first block
    context_len: int  # a multiple of TILE_KEYS
    positions: Tensor  # [S, 1, R, 1] of the query in each row; 0 in rows that pad
    mask: Tensor  # [S, 1, R, n] added to the scores: 0 where a row attends to a key, else -inf

    def to(self, device: torch.device) -> "Tiles":
        """The same tiles with their tensors on device."""
        return self._replace(**on_device(self._asdict(), device))


def fill_tiles(rectangle: Rectangle, group: int, block_size: int, multiple: int, dtype: torch.dtype) -> Tiles:
    """Pad a rectangle: its keys to whole tiles, and its rows, one for each query and head of a group, to a multiple."""
    num_seqs, num_blocks = rectangle.block_tables.shape
    context_len = -(-rectangle.context_len // TILE_KEYS) * TILE_KEYS
    columns = torch.arange(-(-context_len // block_size))
    # A query at position p attends to p + 1 keys.
    positions = rectangle.mask.view(num_seqs, -1, rectangle.context_len).sum(-1) - 1  # [S, Q]
    positions = positions.repeat_interleave(group, dim=1)  # [S, Q * G]
    positions = F.pad(positions, (0, -positions.shape[1] % multiple))[:, None, :, None]
    future = torch.arange(context_len) > positions  # [S, 1, R, n]
    return Tiles(
        tokens=rectangle.tokens,
        block_tables=rectangle.block_tables[:, columns.where(columns < num_blocks, 0)],
        context_len=context_len,
        positions=positions,
        mask=torch.zeros(future.shape, dtype=dtype).masked_fill_(future, -torch.inf),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
    """As `attention.attend`, a tile of keys at a time; the results are combined in the order of the positions.

    Args:
        q: [S * Q, H, D], as in a rectangle.
        k, v: [S, n, KV, D].
    Returns:
        [S * Q, H, D].
    Source: online softmax, https://arxiv.org/abs/1805.02867.
    """
    num_seqs, num_keys, num_kv_heads, head_dim = k.shape
    num_rows = tiles.mask.shape[2]
    q = q.view(num_seqs, -1, num_kv_heads, q.shape[1] // num_kv_heads, head_dim)  # [S, Q, KV, G, D]
    num_queries, group = q.shape[1], q.shape[3]
    rows = q.transpose(1, 2).flatten(2, 3)  # [S, KV, Q * G, D]
    extra = 0 if q.dtype == torch.float32 else -head_dim % HEAD_MULTIPLE
    rows = F.pad(rows, (0, extra, 0, num_rows - rows.shape[2]))  # [S, KV, R, D + extra]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [S, KV, n, D]
    if extra:
        k, v = F.pad(k, (0, extra)), F.pad(v, (0, extra))
    for start in range(0, num_keys, TILE_KEYS):
        keys = slice(start, start + TILE_KEYS)
        # [S, KV, R, D + extra], and the log of the sum of exponentials of the scores, [S, KV, R]
        part, lse = flash_attention(rows, k[:, :, keys], v[:, :, keys], attn_mask=tiles.mask[..., keys], scale=head_dim**-0.5)
        lse = lse[..., None]  # [S, KV, R, 1]
        if start == 0:  # each row attends to position 0
            out, top, total = part.float(), lse, torch.ones_like(lse)
            continue
        # A tile that a row does not attend to has no weight, and leaves all bits as they are.
        lse = lse.masked_fill(tiles.positions < start, -torch.inf)
        new_top = torch.maximum(top, lse)
        old_weight, weight = (top - new_top).exp(), (lse - new_top).exp()
        out = out * old_weight + part * weight
        total = total * old_weight + weight
        top = new_top
    out = (out / total).to(q.dtype)[:, :, : num_queries * group, :head_dim]
    return out.unflatten(2, (num_queries, group)).transpose(1, 2).reshape(-1, num_kv_heads * group, head_dim)


def attend_tiles(q: Tensor, layer_id: int, batch: Batch) -> Tensor:
    """Attend over the cache: q [N, H, D] to [N, H, D]."""
    out = torch.empty_like(q)
    for tiles in batch.view:
        keys, values = batch.cache.read(layer_id, tiles)
        out[tiles.tokens] = attend(q[tiles.tokens], keys, values, tiles)
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [N, I].

    F.silu takes another exponential for the elements after the last whole vector; which they are depends on N.
    """
    wide = gate.float()
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up


def torch_exactly(config: ModelConfig, block_size: int, multiple: int, dtype: torch.dtype) -> Backend:
    """The backend torch, with attention in tiles."""
    fill = partial(fill_tiles, group=config.num_heads // config.num_kv_heads, block_size=block_size, multiple=multiple, dtype=dtype)
    return TORCH._replace(
        build_view=lambda seqs: [fill(each) for each in build_rectangles(seqs)],
        view_rows=lambda *args: [fill(each) for each in rectangles_of_rows(*args)],
        attend=attend_tiles,
        gate=silu_times,
    )


class Candidate(NamedTuple):
    """What may be exact on this machine."""

    name: str
    form: Callable  # of the weights
    backend: Backend
    tried: Backend  # the backend, or one with shorter splits, so that the experiment has several


def candidates(model: CausalLM, config: ModelConfig, backend: Backend, block_size: int, max_model_len: int) -> Iterator[Candidate]:
    """What may be exact on this machine, the fastest first."""
    weight = model.lm_head.weight
    if backend.name == "triton":
        from .kernels import exact_backend
        from .kernels.paged_attention import MIN_SPLIT_KEYS, choose_split_keys
        from .kernels.product import FEW, FewRowsProduct, RowProduct

        for form, tile_rows in ((RowProduct, None), (RowProduct, FEW), (FewRowsProduct, FEW)):
            used, tried = (exact_backend(keys, tile_rows) for keys in (choose_split_keys(max_model_len), MIN_SPLIT_KEYS))
            yield Candidate("row tiles", form, used, tried)
    elif weight.device.type == "cpu" and flash_attention is not None:
        for multiple in (4, TILE_ROWS):
            tiles = torch_exactly(config, block_size, multiple, weight.dtype)
            for name, form in (("halves", Halves), ("blocks", PaddedBlocks)):
                with suppress(ValueError):
                    check_form(model, name)
                    yield Candidate(name, form, tiles, tiles)
        yield Candidate("row tiles", RowTiles, tiles, tiles)


@torch.inference_mode()
def make_exact(
    model: CausalLM,
    config: ModelConfig,
    backend: Backend,
    linear: str,
    block_size: int,
    max_model_len: int,
) -> tuple[str, Backend]:
    """Store the weights in a form whose products are exact; return its name, and a backend that is exact too.

    The parameters keep only names, shapes and dtypes, as in `store`.

    Raises:
        ValueError: if another form is requested, or no form is exact on this machine.
    """
    if linear != "auto":
        raise ValueError(f"exact is True, which chooses the form of the weights, but linear is {linear!r}; leave one of them out")
    groups = list(groups_of(model))
    tried = groups[:4] + groups[-1:]  # those of the first layer, and the head
    candidate = None
    for candidate in candidates(model, config, backend, block_size, max_model_len):
        for group in tried:
            use(candidate.form, group)
        if is_exact(model, config, candidate.tried, block_size):
            for group in groups:
                store(candidate.form, group)
            return candidate.name, candidate.backend
    weight = model.lm_head.weight
    if candidate is None:
        raise ValueError(f"exact is True, but attention {backend.name} on {weight.device} has no exact form with this PyTorch; use attention triton on a GPU, or leave exact out")
    raise ValueError(
        f"exact is True, but with {weight.dtype} on {weight.device}, attention {backend.name} and {torch.get_num_threads()} threads, "
        f"every form of the weights on this machine gives the same tokens other bits in another batch; leave exact out"
    )
