"""A checkpoint whose numbers overflow."""
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from shared.checkpoints import checkpoint

BAD = 7  # the token that overflows


def write_overflowing(path: Path) -> Path:
    """Write a valid float16 checkpoint, in which one token's values overflow float16, to a new directory; return it."""
    shutil.copytree(checkpoint("llama"), path)
    weights = load_file(path / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:, 0] = 0
    embeddings[BAD] = 0
    embeddings[BAD, 0] = 50
    weights["model.layers.0.self_attn.v_proj.weight"][:, 0] = 60000
    save_file({name: weight.half() for name, weight in weights.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path
