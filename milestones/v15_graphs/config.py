"""The model's configuration: what a checkpoint's config.json decides, under this book's names."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# transformers' defaults for keys that config.json leaves out: first those of all families, then those of each.
# None: derived from other keys.
COMMON_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
DEFAULTS = {
    "llama": {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "sliding_window": None,
        "eos_token_id": 2,
    },
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "eos_token_id": None,
    },
    "qwen3": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "eos_token_id": None,
    },
}

# The keys above that may be null, each with the families that allow it, as typed in transformers' config classes.
NULLABLE = {
    "head_dim": ("llama", "mistral"),
    "num_key_value_heads": ("llama", "qwen2", "qwen3"),
    "rope_theta": FAMILIES,  # if rope_parameters contains it
    "sliding_window": FAMILIES,
    "eos_token_id": FAMILIES,
}

# Features that would change the arithmetic or the files to read: for each key, the families in which it counts and the
# values that leave the feature off.
UNSUPPORTED = {
    "hidden_act": (FAMILIES, ("silu", "swish")),
    "attention_bias": (("llama", "qwen3"), (False,)),
    "mlp_bias": (("llama",), (False,)),
    "partial_rotary_factor": (FAMILIES, (1.0, None)),
    "quantization_config": (FAMILIES, (None,)),
    "num_experts": (FAMILIES, (0, None)),
    "num_local_experts": (FAMILIES, (0, None)),
    "is_causal": (FAMILIES, (True,)),
    "is_encoder_decoder": (FAMILIES, (False,)),
    "attention_chunk_size": (("llama", "mistral"), (None,)),
    "per_layer_config": (FAMILIES, (None,)),
    "text_config": (FAMILIES, (None,)),
    "transformers_weights": (FAMILIES, (None,)),
}

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder: sizes in elements, lengths in tokens."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    tied_head: bool
    max_positions: int
    sliding_window: int | None  # tokens that a query may attend to; None: all
    rope_theta: float
    rope_scaling: dict[str, float]  # the four llama3 factors, or empty
    end_ids: tuple[int, ...]

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def check_length(self, max_model_len: int) -> None:
        """Raise ValueError if a request of max_model_len tokens would outgrow the sliding window."""
        if self.sliding_window is not None and self.sliding_window < max_model_len:
            raise ValueError(
                f"sliding_window is {self.sliding_window}, below max_model_len = {max_model_len}, and sliding-window "
                f"attention is not supported; lower max_model_len to {self.sliding_window}, or use another checkpoint"
            )


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if the file is missing or does not contain one."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a checkpoint: it has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def load_config(model_dir: Path) -> ModelConfig:
    """Read config.json, and generation_config.json for the end tokens.

    Keys that are not read here are ignored, because every release of transformers adds some.

    Raises:
        ValueError: if a value is invalid, or names a family or feature that this engine does not support.
    """
    stored = read_json(model_dir / "config.json")
    family = stored.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; supported are {', '.join(FAMILIES)}")
    for key, (families, off) in UNSUPPORTED.items():
        if family in families and key in stored and stored[key] not in off:
            raise ValueError(f"{key} is {stored[key]!r}, which is not supported; only {off[0]!r} is")
    refuse_code(model_dir)
    raw = defaults_of(family) | stored
    for key in defaults_of(family):
        if key in stored and stored[key] is None and family not in NULLABLE.get(key, ()):
            raise ValueError(f"{key} in config.json is null, which model_type {family} does not allow; leave the key out")
    num_heads = positive(raw, "num_attention_heads")
    num_kv_heads = num_heads if raw["num_key_value_heads"] is None else positive(raw, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads is {num_heads}, not a multiple of num_key_value_heads, {num_kv_heads}")
    hidden_size = positive(raw, "hidden_size")
    if family == "llama" and hidden_size % num_heads:
        raise ValueError(f"hidden_size is {hidden_size}, not a multiple of num_attention_heads, {num_heads}")
    head_dim = hidden_size // num_heads if raw["head_dim"] is None else positive(raw, "head_dim")
    if head_dim % 2 or head_dim > 2**16:
        raise ValueError(f"head_dim is {head_dim}; the rotary embedding needs an even one of at most {2**16}")
    rope_theta, rope_scaling = load_rope(raw)
    return ModelConfig(
        family=family,
        hidden_size=hidden_size,
        intermediate_size=positive(raw, "intermediate_size"),
        num_layers=positive(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=positive(raw, "vocab_size"),
        norm_eps=number(raw, "rms_norm_eps"),
        tied_head=flag(raw, "tie_word_embeddings"),
        max_positions=positive(raw, "max_position_embeddings"),
        sliding_window=load_sliding_window(raw),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        end_ids=load_end_ids(model_dir, raw),
    )


def defaults_of(family: str) -> dict:
    """transformers' defaults for the keys that a config.json of this family may leave out."""
    return COMMON_DEFAULTS | DEFAULTS[family]


def refuse_code(model_dir: Path) -> None:
    """Raise ValueError if a checkpoint names its own Python code to run in place of transformers' classes."""
    for path in (model_dir / "config.json", model_dir / "tokenizer_config.json"):
        code = read_json(path).get("auto_map") if path.exists() else None
        if code:
            raise ValueError(
                f"auto_map in {path} is {code!r}: a checkpoint's own Python is never run; if transformers' classes for "
                "this model_type generate the same tokens, remove auto_map"
            )


def positive(raw: dict, key: str, least: int = 1) -> int:
    """raw[key], a size of the model; ValueError unless it is an integer >= least."""
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} in config.json must be an integer >= {least}, got {value!r}")
    return value


def flag(raw: dict, key: str) -> bool:
    """raw[key], a feature that is on or off; ValueError unless it is true or false."""
    value = raw[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} in config.json must be true or false, got {value!r}")
    return value


def number(raw: dict, key: str) -> float:
    """raw[key], a constant of the model; ValueError unless it is a finite number above 0."""
    value = raw[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key} in config.json must be a finite number above 0, got {value!r}")
    return float(value)


def load_rope(raw: dict) -> tuple[float, dict[str, float]]:
    """The base and the scaling factors of the rotary embedding, from either form of the config.

    transformers 5 writes rope_parameters; most files on the hub have rope_theta and rope_scaling.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling and rope_parameters in config.json must be objects, got {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_type is {rope_type!r} in {rope}; supported are default and llama3, one for all layers")
    share = rope.get("partial_rotary_factor", 1.0)
    if share not in (1.0, None):
        raise ValueError(f"partial_rotary_factor is {share}, which is not supported; only 1.0 is")
    theta = number(raw | rope, "rope_theta")
    if rope_type == "default":
        return theta, {}
    # transformers looks for this key at the top level before it looks in the object, and has a default for it.
    key = "original_max_position_embeddings"
    rope = rope | {key: raw.get(key, rope.get(key, raw["max_position_embeddings"]))}
    missing = [key for key in LLAMA3_KEYS if key not in rope]
    if missing:
        raise ValueError(f"rope_type llama3 needs {', '.join(missing)}; config.json has only {', '.join(rope)}")
    scaling = {key: number(rope, key) for key in LLAMA3_KEYS}
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if low > high:
        raise ValueError(f"low_freq_factor is {low} in config.json, above high_freq_factor = {high}; swap them")
    return theta, scaling


def load_sliding_window(raw: dict) -> int | None:
    """The sliding window of the layers that have one, in tokens; None if every layer attends to all tokens.

    Llama's class has no window, but transformers' cache applies one that config.json names, so it counts here too.
    """
    num_layers = positive(raw, "num_hidden_layers")
    window, first_layer = raw["sliding_window"], 0
    # Only Qwen's classes have these two keys; in other families they have no effect.
    if raw["model_type"].startswith("qwen"):
        first_layer = positive(raw, "max_window_layers", least=0)
        window = window if flag(raw, "use_sliding_window") else None
    names = raw.get("layer_types")
    if names is None:
        return positive(raw, "sliding_window") if window is not None and first_layer < num_layers else None
    if not isinstance(names, list) or len(names) != num_layers or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layer_types in config.json must be a list of {num_layers} names, got {names!r}")
    others = sorted(set(names) - {"full_attention", "sliding_attention"})
    if others:
        raise ValueError(f"layer_types has {', '.join(others)}, which is not supported; only full_attention is")
    if "sliding_attention" not in names:
        return None
    if window is None:
        raise ValueError("layer_types has sliding_attention, which is not supported; only full_attention is")
    return positive(raw, "sliding_window")


def load_end_ids(model_dir: Path, raw: dict) -> tuple[int, ...]:
    """The ids of the tokens that end a text, from generation_config.json if it names any, else from config.json."""
    generation = {}
    if (model_dir / "generation_config.json").exists():
        generation = read_json(model_dir / "generation_config.json")
    end = generation.get("eos_token_id")
    end = raw["eos_token_id"] if end is None else end
    end_ids = end if isinstance(end, list) else [] if end is None else [end]
    # isinstance would accept a bool, which is an int too.
    if not all(type(end_id) is int and 0 <= end_id < raw["vocab_size"] for end_id in end_ids):
        raise ValueError(f"eos_token_id must be a token id below {raw['vocab_size']}, or a list of them, got {end!r}")
    return tuple(end_ids)
