"""Find or create checkpoints: the bundled models, random ones of every family, and real ones by path or hub id.

Random checkpoints test shapes and arithmetic; pocket, which is trained, tests serving. transformers itself writes
the random ones, so they are stored just like its users' checkpoints.

    python -m shared.checkpoints pocket             # prints the checkpoint's directory
    python -m shared.checkpoints qwen3              # creates a random checkpoint first
    python -m shared.checkpoints Qwen/Qwen3-0.6B    # downloads it first

Reads: shared/models, the hub. Writes: .cache/checkpoints.
"""
import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shared.chapters import ROOT
from shared.programs import run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POCKET = ROOT / "shared" / "models" / "pocket"
BUNDLED = ("pocket", "pocket-draft", "pocket-tools")
CACHE = ROOT / ".cache" / "checkpoints"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A random checkpoint: its family, how it is stored, and its shape, in which no two dimensions are equal."""

    family: str
    stored: str = "float32"
    tied: bool = False
    sharded: bool = False
    hub_form: bool = False  # rope_theta and rope_scaling, as most files on the hub have, instead of rope_parameters
    llama3_rope: bool = False
    tokenizer: str = "byte_level"
    hidden_size: int = 60
    intermediate_size: int = 88
    num_layers: int = 3
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 14
    vocab_size: int = 401
    max_positions: int = 320
    seed: int = 0

    def config(self) -> dict:
        """The keyword arguments for transformers' config."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied,
            "rope_parameters": LLAMA3_ROPE if self.llama3_rope else {"rope_type": "default", "rope_theta": 5000.0},
            "rms_norm_eps": 1e-3,  # large enough that a misplaced epsilon changes the output
            "sliding_window": None,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
        }


# Together they cover every family and every storage format that a chapter must load.
RANDOM = {
    "llama": Spec("llama"),
    "llama3": Spec("llama", stored="bfloat16", llama3_rope=True, tied=True, seed=1),
    "llama3-hub": Spec("llama", llama3_rope=True, hub_form=True, sharded=True, seed=2),
    "mistral": Spec("mistral", stored="float16", sharded=True, tokenizer="metaspace", num_kv_heads=3, seed=3),
    "qwen2": Spec("qwen2", tied=True, hub_form=True, hidden_size=84, seed=4),
    "qwen3": Spec("qwen3", stored="bfloat16", num_heads=4, num_kv_heads=1, seed=5),
}

# Small enough for Triton's interpreter, one per family.
TWO_LAYERS = {
    f"{name}-two-layers": dataclasses.replace(RANDOM[name], num_layers=2, num_heads=4, num_kv_heads=2)
    for name in ("llama", "mistral", "qwen2", "qwen3")
}

# Random weights in the shape of published models: as slow and as large as the real ones.
SHAPES = {
    "smollm2-135m-shape": Spec(
        family="llama",
        stored="bfloat16",
        tied=True,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_positions=8192,
    ),
    "qwen3-0.6b-shape": Spec(
        family="qwen3",
        stored="bfloat16",
        tied=True,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_positions=40960,
    ),
    "llama-3.2-1b-shape": Spec(
        family="llama",
        stored="bfloat16",
        tied=True,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_positions=131072,
    ),
}


def checkpoint(name: str) -> Path:
    """The directory of a checkpoint, given as pocket, pocket-draft, pocket-tools, a name in RANDOM, TWO_LAYERS or SHAPES, a path, or a hub id.

    Raises:
        ValueError: if there is no such checkpoint, or the hub does not provide it; the message says what to do.
    """
    if name in BUNDLED:
        return POCKET.with_name(name)
    specs = RANDOM | TWO_LAYERS | SHAPES
    if name in specs:
        return random_checkpoint(specs[name])
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return download(name)
    known = ", ".join([*BUNDLED, *RANDOM, *SHAPES])
    raise ValueError(f"there is no checkpoint {name!r}; give a directory, a hub id (owner/name), or one of {known}")


def download(hub_id: str) -> Path:
    """The directory of a hub repository's config, tokenizer and safetensors files, downloaded only once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except GatedRepoError:
        raise ValueError(
            f"{hub_id} is gated; accept its terms on its hub page, create a read token, and set HF_TOKEN to it"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"the hub has no {hub_id}, or it is private; check the name, or set HF_TOKEN") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{hub_id} could not be downloaded from the hub: {' '.join(str(error).split())}") from error


def random_checkpoint(spec: Spec) -> Path:
    """The checkpoint's directory in the cache, created if it is missing; the same spec gives the same bytes."""
    # This file is part of the key, so after an edit every checkpoint is created again.
    recipe = Path(__file__).read_bytes() + json.dumps(dataclasses.asdict(spec)).encode()
    path = CACHE / f"{spec.family}-{hashlib.sha256(recipe).hexdigest()[:16]}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=CACHE))
        write_checkpoint(spec, draft)
        try:
            draft.rename(path)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    return path


def write_checkpoint(spec: Spec, path: Path) -> None:
    """Write a random model, its config and a tokenizer to path."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(spec.family, **spec.config()))
    randomize(model, spec)
    model.to(getattr(torch, spec.stored)).save_pretrained(path, max_shard_size="100KB" if spec.sharded else "1GB")
    if spec.hub_form:
        to_hub_form(path / "config.json")
    make_tokenizer(spec.tokenizer).save_pretrained(path)


def randomize(model, spec: Spec) -> None:
    """Set weights with which every part affects the output: norms not 1, biases not 0, attention and logits not uniform."""
    import torch

    # Its own generator, to leave the global random state unchanged.
    generator = torch.Generator().manual_seed(spec.seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif name.endswith("bias"):
            noise = 0.5 * noise
        elif "embed_tokens" in name:
            noise = noise if not spec.tied else 0.5 * noise
        else:
            contrast = 4.0 if "lm_head" in name else 1.5
            noise = contrast * noise / weight.shape[1] ** 0.5
        weight.data.copy_(noise)


def to_hub_form(path: Path) -> None:
    """Rewrite a config.json from transformers 5 in the format that most files on the hub have."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2))


# Only English, so that characters of other scripts take one token per byte.
CORPUS = (
    "The cache keeps what the engine has seen. A request waits, runs and leaves; the blocks it held are free again.",
    "Once there was a queue, and nobody in it was forgotten. 1, 2, 3, 5, 8, 13, 21 tokens a second!",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(kind: str) -> "PreTrainedTokenizerFast":
    """A small tokenizer that adds a BOS token: byte_level like those of Llama 3 and Qwen, metaspace like Llama 2 and Mistral."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")],
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
        )
        # Only for training, so that a word's first token includes its space, as in Llama 2's vocabulary.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=391,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=256 if kind == "byte_level" else 50,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if kind != "byte_level":
        # The byte tokens are ordinary tokens; they are special only for the trainer, to get their ids.
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        state["pre_tokenizer"] = None
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.checkpoints", description="Find or create a checkpoint, and print its directory.")
    parser.add_argument("name", help=f"a directory, a hub id (owner/name), or one of {', '.join([*BUNDLED, *RANDOM, *SHAPES])}")
    args = parser.parse_args(argv)
    try:
        print(checkpoint(args.name))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run(main)
