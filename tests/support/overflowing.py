"""A checkpoint whose numbers overflow."""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared.checkpoints import checkpoint

BAD = 7  # the token that overflows
# On a processor with AMX, oneDNN multiplies what follows a row by zeros if the row's length is not a multiple of this, and so
# lets one token's NaN into the token before it (oneDNN #5717). Checkpoints that people publish have multiples of it.
MULTIPLE = 32


def write_overflowing(path: Path) -> Path:
    """Write a valid float16 checkpoint, in which one token's values overflow float16, to a new directory; return it."""
    shutil.copytree(checkpoint("llama"), path)
    weights = load_file(path / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:, 0] = 0
    embeddings[BAD] = 0
    embeddings[BAD, 0] = 50
    weights["model.layers.0.self_attn.v_proj.weight"][:, 0] = 60000
    # More neurons, of zeros, change no number.
    size = weights["model.layers.0.mlp.down_proj.weight"].shape[1]
    more = -size % MULTIPLE
    for name, weight in weights.items():
        if ".mlp." in name:
            weights[name] = torch.nn.functional.pad(weight, (0, more) if "down_proj" in name else (0, 0, 0, more))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": size + more}))
    save_file({name: weight.half() for name, weight in weights.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path
