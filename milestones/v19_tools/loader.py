"""Loads safetensors files into parameters: every tensor is used once, every parameter is filled."""
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig, read_json
from .model import CausalLM

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def choose_name(model_dir: Path) -> str:
    """The name of a checkpoint: that of its directory or of the link to it; for a hub snapshot, that of its repository.

    >>> choose_name(Path("models--Qwen--Qwen3-0.6B/snapshots/c1899de289a04d12100db370d81485cdf75e47ca"))
    'Qwen/Qwen3-0.6B'
    """
    path = Path(os.path.abspath(model_dir))
    # A link has a name that the user chose.
    path = path if path.is_symlink() else path.resolve()
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return path.name


def choose_device(device: str | torch.device | None) -> torch.device:
    """The requested device; by default CUDA if available, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type == "cpu" and chosen.index:
        raise ValueError(f"device is {chosen}, but PyTorch has one CPU; use cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {chosen.type} is not supported: nothing here has been tested on it; use cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {chosen}, but this PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return chosen


class Checkpoint:
    """The tensors of a directory's safetensors files, by name; a tensor is read only when it is requested."""

    def __init__(self, model_dir: Path):
        self.files = {}
        single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
        # As in transformers, an index beside the single file is ignored.
        if single.is_file() or single.is_symlink():
            self.open(single)
            return
        if not index.is_file():
            unread = [path.name for end in ("safetensors", "bin", "pth", "gguf") for path in model_dir.glob(f"*.{end}") if path.is_file()]
            hint = f"; {', '.join(sorted(unread)[:4])} cannot be read: convert with save_pretrained" if unread else ""
            missing = f"it has no {single.name} and no {index.name}"
            raise ValueError(f"{model_dir} is not a complete checkpoint: {missing}{hint}")
        listed = read_json(index).get("weight_map")
        names = listed.values() if isinstance(listed, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"weight_map in {index} must map each tensor to the name of a file beside it")
        for file_name in sorted(set(listed.values())):
            self.open(model_dir / file_name)
        refuse_difference("the index and its shards", set(listed), set(self.files))

    def open(self, path: Path) -> None:
        """Open a file and register its tensors by name."""
        if not os.path.isfile(path):
            what = f"{path.name} is a broken link; download it again" if path.is_symlink() else f"it has no {path.name}"
            raise ValueError(f"{path.parent} is not a complete checkpoint: {what}")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}); download it again") from error
        for name in file.keys():
            if name in self.files:
                raise ValueError(f"tensor {name} is in two files, the second of which is {path.name}; keep only one")
            self.files[name] = file

    def stored(self, name: str) -> Tensor:
        """One tensor, whatever it is; ValueError if PyTorch has no such type."""
        try:
            return self.files[name].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"tensor {name} cannot be read ({error}); supported are {', '.join(DTYPES)}") from error

    def read(self, name: str, shape: torch.Size | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, as it is stored; ValueError if it has another shape (None: any is allowed) or is not finite.

        dtype: what the caller converts it to; ValueError too if a value would overflow there.
        """
        tensor = self.stored(name)
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name} is stored as {tensor.dtype}; supported are {', '.join(DTYPES)}")
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        # If any value is NaN, so are the minimum and the maximum.
        bounds = torch.aminmax(tensor) if tensor.numel() else ()
        if not all(bound.isfinite() for bound in bounds):
            raise ValueError(f"tensor {name} has values that are not finite numbers; download or convert it again")
        # Rounding preserves order: if the minimum and the maximum stay finite in dtype, so do all values in between.
        if not all(bound.to(dtype).isfinite() for bound in bounds):
            low, high = (bound.item() for bound in bounds)
            values = f"values from {low:g} to {high:g}"
            raise ValueError(f"tensor {name} has {values}, too large for {dtype}; choose a wider dtype")
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's dtype, taken from its embedding."""
        if EMBEDDING not in self.files:
            raise ValueError(f"the checkpoint has no tensor {EMBEDDING}")
        return self.stored(EMBEDDING).dtype


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The requested dtype; by default the checkpoint's own on a GPU, float32 on a CPU."""
    if dtype is None:
        return checkpoint.dtype if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def refuse_difference(what: str, wanted: set[str], stored: set[str]) -> None:
    """Raise ValueError naming what is missing and what is left over."""
    if wanted == stored:
        return
    parts = [f"{what} do not match"]
    for word, names in (("missing", sorted(wanted - stored)), ("left over", sorted(stored - wanted))):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            parts.append(f"{word}: {', '.join(names[:4])}{more}")
    raise ValueError("; ".join(parts))


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> CausalLM:
    """Build the decoder and load each parameter from the checkpoint.

    Raises:
        ValueError: if a tensor is missing, left over, not finite, or not of the shape that config.json implies.
    """
    # Each layer has tensors of its own. Reject too many layers here, because building them first could take minutes.
    if config.num_layers > len(checkpoint.files):
        raise ValueError(f"num_hidden_layers is {config.num_layers}; the checkpoint has {len(checkpoint.files)} tensors")
    # A parameter on the meta device has a shape but no memory, so each weight is allocated only once.
    try:
        with torch.device("meta"):
            model = CausalLM(config)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"config.json has sizes that PyTorch cannot allocate ({reason}); check them against the checkpoint's tensors") from error
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    stored = {name for name in checkpoint.files if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_head:
        del wanted[HEAD]
        if {HEAD, EMBEDDING} <= stored and torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDING)):
            stored.remove(HEAD)
    refuse_difference("the checkpoint and config.json", set(wanted), stored)
    weights = {name: checkpoint.read(name, shape, dtype).to(device, dtype) for name, shape in wanted.items()}
    if config.tied_head:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval().to(device)
