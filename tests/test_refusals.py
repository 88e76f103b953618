"""Refusals: each names the parameter, the range, the value and the remedy; the wording is tested here."""
import json
import os
import shutil
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shared.checkpoints import checkpoint

pytestmark = pytest.mark.needs("generate")


@pytest.fixture
def copy_of(tmp_path):
    """A checkpoint to break: copy_of(name, key=value) changes its config; ... removes a key."""

    def copy_of(name, **changes):
        path = tmp_path / name
        shutil.copytree(checkpoint(name), path)
        config = json.loads((path / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not ...}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return copy_of


@pytest.fixture
def refused(chapter):
    """The message with which Engine refuses a directory."""

    def refused(path, **options):
        with pytest.raises(ValueError) as error:
            chapter.load().Engine(path, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


def rewrite(path, change):
    """Change the tensors of a one-file checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# ---- directories and files


def test_a_directory_that_is_not_a_checkpoint(refused, tmp_path):
    assert refused(tmp_path) == f"{tmp_path} is not a checkpoint: it has no config.json"
    assert refused(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is not a checkpoint: it has no config.json"


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "\x00", "[" * 10**5])
def test_a_config_that_is_not_a_json_object(refused, copy_of, text):
    path = copy_of("llama")
    (path / "config.json").write_text(text)
    assert "config.json" in refused(path) and "JSON" in refused(path)


def test_weights_that_are_not_there(refused, copy_of):
    path = copy_of("llama")
    (path / "model.safetensors").unlink()
    assert refused(path) == (
        f"{path} is not a complete checkpoint: it has no model.safetensors and no model.safetensors.index.json"
    )
    (path / "model.safetensors").mkdir()
    assert refused(path).endswith("it has no model.safetensors and no model.safetensors.index.json")


def test_a_link_to_weights_that_are_gone(refused, copy_of):
    """As an interrupted download leaves it. To convert the checkpoint, as other files have to be, would be no help."""
    path = copy_of("llama")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "gone")
    assert refused(path) == f"{path} is not a complete checkpoint: model.safetensors is a broken link; download it again"


# The files of one checkpoint; each kind has a different norm, to tell which was read.
SINGLE, BIN = "model.safetensors", "pytorch_model.bin"
INDEX, SHARDS = "model.safetensors.index.json", "model-*.safetensors"


@pytest.fixture
def with_weights(copy_of):
    """A checkpoint with only these weight files; other names are empty files."""

    def with_weights(*kinds):
        path = copy_of("llama3-hub")
        tensors = {name: tensor for shard in path.glob(SHARDS) for name, tensor in load_file(shard).items()}
        for kind in {INDEX, SHARDS} - set(kinds):
            for file in path.glob(kind):
                file.unlink()
        for kind in set(kinds) - {INDEX, SHARDS}:
            (path / kind).touch()
        changed = {name: tensor + 1 for name, tensor in tensors.items()}
        if SINGLE in kinds:
            save_file(changed, path / SINGLE, metadata={"format": "pt"})
        if BIN in kinds:
            torch.save({name: tensor + 1 for name, tensor in changed.items()}, path / BIN)
        return path

    return with_weights


@pytest.mark.parametrize(
    "kinds",
    [
        (SINGLE,),
        (SINGLE, SHARDS),
        (SINGLE, INDEX),
        (SINGLE, INDEX, SHARDS),
        (SINGLE, INDEX, SHARDS, BIN),
        (INDEX, SHARDS),
        (INDEX, SHARDS, BIN),
        (INDEX, SHARDS, "consolidated.safetensors", "model.fp16.safetensors"),
    ],
)
def test_among_several_weight_files_hugging_faces_choice_is_read(with_weights, module, kinds):
    """An index and old shards beside a single file: the shards used to be read, without a message."""
    path = with_weights(*kinds)
    want = AutoModelForCausalLM.from_pretrained(path).state_dict()
    stored = module("loader").Checkpoint(path)
    assert set(stored.files) == set(want)
    for name in stored.files:
        assert torch.equal(stored.read(name), want[name]), name


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ((SHARDS,), "model-00001-of-00006.safetensors, model-00002-of-00006.safetensors"),
        ((BIN,), "pytorch_model.bin cannot be read: convert with save_pretrained"),
        (("consolidated.safetensors",), "consolidated.safetensors cannot be read"),
        (("consolidated.00.pth",), "consolidated.00.pth cannot be read"),
        (("model.fp16.safetensors",), "model.fp16.safetensors cannot be read"),
        (("model.gguf",), "model.gguf cannot be read"),
        ((INDEX,), "it has no model-00001-of-00006.safetensors"),
        ((INDEX, BIN), "it has no model-00001-of-00006.safetensors"),
    ],
)
def test_weights_in_other_files_are_refused_and_named(with_weights, refused, kinds, message):
    assert message in refused(with_weights(*kinds))


def test_a_weight_file_that_only_the_config_names(refused, copy_of):
    path = copy_of("llama", transformers_weights="other.safetensors")
    assert "transformers_weights is 'other.safetensors', which is not supported" in refused(path)


def test_a_shard_that_is_not_there(refused, copy_of):
    path = copy_of("llama3-hub")
    (path / "model-00002-of-00006.safetensors").unlink()
    assert "it has no model-00002-of-00006.safetensors" in refused(path)


@pytest.mark.parametrize("keep", [0, 4, 100, 60_000])
def test_a_truncated_file(refused, copy_of, keep):
    path = copy_of("llama")
    file = path / "model.safetensors"
    assert file.stat().st_size > 60_000
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is damaged or not a safetensors file" in refused(path)
    assert "download it again" in refused(path)


def test_an_index_that_names_a_tensor_no_shard_has(refused, copy_of):
    path = copy_of("llama3-hub")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = "model-00002-of-00006.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing: model.extra.weight" in refused(path)


def test_a_tensor_that_two_shards_have(refused, copy_of):
    path = copy_of("llama3-hub")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name, home = next(iter(index["weight_map"].items()))
    other = next(file for file in sorted(set(index["weight_map"].values()), reverse=True) if file != home)
    save_file(load_file(path / other) | {name: load_file(path / home)[name]}, path / other, metadata={"format": "pt"})
    first, second = sorted((home, other))
    assert refused(path) == f"tensor {name} is in two files, the second of which is {second}; keep only one"


def test_a_checkpoint_without_an_embedding_has_no_dtype(copy_of, module):
    """On a GPU, the default dtype is the checkpoint's."""
    path = copy_of("llama")
    rewrite(path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    loader = module("loader")
    with pytest.raises(ValueError, match="the checkpoint has no tensor model.embed_tokens.weight"):
        loader.choose_dtype(None, torch.device("cuda"), loader.Checkpoint(path))


def test_a_tokenizer_that_is_not_there_or_broken(refused, copy_of):
    path = copy_of("llama")
    (path / "tokenizer.json").write_text("{")
    assert f"the tokenizer of {path} cannot be read" in refused(path)
    assert "Field 'use_cache' expected bool" in refused(copy_of("qwen3", use_cache=None))
    (path / "tokenizer.json").unlink()
    assert f"{path} has no tokenizer" in refused(path)


def test_a_tokenizer_of_another_library_is_refused_with_a_remedy(module, copy_of, monkeypatch):
    """With mistral-common installed, transformers reads tekken.json with it, even if there is a tokenizer.json."""
    path = copy_of("mistral")
    (path / "tekken.json").write_text("{}")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: SimpleNamespace())
    with pytest.raises(ValueError, match="is a SimpleNamespace, which is not supported; remove tekken.json, or uninstall mistral-common"):
        module("text").load_tokenizer(path)


# ---- tensors


def test_a_missing_tensor(refused, copy_of):
    path = copy_of("llama")
    rewrite(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "missing: model.layers.1.mlp.up_proj.weight" in refused(path)


def test_a_surplus_tensor(refused, copy_of):
    path = copy_of("llama")
    rewrite(path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(84)}))
    assert "left over: model.layers.0.self_attn.q_proj.bias" in refused(path)


def test_many_missing_tensors_are_counted_not_listed(refused, copy_of):
    path = copy_of("llama", num_hidden_layers=5)
    assert "and 14 more" in refused(path)


def test_more_layers_than_there_are_tensors_are_refused_before_they_are_built(refused, copy_of):
    assert refused(copy_of("llama", num_hidden_layers=10**12)) == (
        "num_hidden_layers is 1000000000000; the checkpoint has 30 tensors"
    )


def test_a_tensor_of_the_wrong_shape(refused, copy_of):
    path = copy_of("llama", intermediate_size=90)
    assert "tensor model.layers.0.mlp.gate_proj.weight has shape [88, 60], expected [90, 60]" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_with_a_value_that_is_not_finite(refused, copy_of, value):
    path = copy_of("llama")
    rewrite(path, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].view(-1)[7:8].fill_(value))
    assert refused(path).startswith("tensor model.layers.2.mlp.up_proj.weight has values that are not finite numbers")


def test_the_largest_finite_numbers_of_float16_are_accepted(copy_of, chapter):
    """Their sum is beyond float16."""
    path = copy_of("mistral")
    for shard in sorted(path.glob("*.safetensors")):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"].fill_(65504.0)
            save_file(tensors, shard, metadata={"format": "pt"})
    chapter.load().Engine(path, dtype="float16")


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        (torch.bfloat16, 1e5, "float16"),
        (torch.bfloat16, -1e5, "float16"),
        (torch.bfloat16, 1e5, "bfloat16"),
        (torch.bfloat16, 3e38, "float32"),
        (torch.float32, 65519.0, "float16"),  # rounds down to the largest finite value
        (torch.float32, 65520.0, "float16"),  # and this to infinity
        (torch.float32, 1e-30, "float16"),
        (torch.float32, 3.4e38, "bfloat16"),
        (torch.float32, 3.3e38, "bfloat16"),
        (torch.float16, -65504.0, "bfloat16"),
    ],
)
def test_a_value_that_only_overflows_when_it_is_converted(refused, copy_of, chapter, stored, value, dtype):
    """It used to be loaded as infinity, and every text was empty."""
    path = copy_of("llama")

    def change(tensors):
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})
        tensors["model.layers.2.mlp.up_proj.weight"].view(-1)[7:8].fill_(value)

    rewrite(path, change)
    hugging_face = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    if all(weight.isfinite().all() for weight in hugging_face.parameters()):
        chapter.load().Engine(path, dtype=dtype)
    else:
        sentence = refused(path, dtype=dtype)
        assert sentence.startswith("tensor model.layers.2.mlp.up_proj.weight has values from ")
        assert f"{torch.tensor(value, dtype=stored).item():g}" in sentence
        assert sentence.endswith(f"too large for torch.{dtype}; choose a wider dtype")


@pytest.mark.parametrize("head_dim", [2**16 + 2, 10**12])
def test_a_head_that_cannot_be_turned_is_refused_before_it_is_built(refused, copy_of, head_dim):
    assert f"head_dim is {head_dim}; the rotary embedding needs an even one" in refused(copy_of("llama", head_dim=head_dim))


def test_a_tensor_stored_as_integers(refused, copy_of):
    path = copy_of("llama")
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(60, dtype=torch.int8)}))
    assert "tensor model.norm.weight is stored as torch.int8" in refused(path)


def test_a_tensor_of_a_type_that_pytorch_does_not_have(refused, copy_of, module):
    path = copy_of("llama")
    raw = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    begin, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"] |= {"dtype": "F6_E2M3", "shape": [(end - begin) * 8 // 6]}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight cannot be read \(.*F6_E2M3"):
        module("loader").Checkpoint(path).read("model.norm.weight")


def test_a_tied_head_that_differs_is_surplus_and_one_that_is_equal_is_accepted(refused, copy_of, chapter):
    path = copy_of("llama3")
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    chapter.load().Engine(path)
    rewrite(path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "left over: lm_head.weight" in refused(path)
    rewrite(path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "missing: model.embed_tokens.weight; left over: lm_head.weight" in refused(path)


def test_rotary_frequencies_in_the_file_are_accepted(copy_of, chapter):
    """Old exports contain them; they follow from the config."""
    path = copy_of("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(7) for i in range(3)}
    rewrite(path, lambda tensors: tensors.update(extra))
    chapter.load().Engine(path)


# ---- features, by name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gemma3"}, "model_type is 'gemma3'; supported are llama, mistral, qwen2, qwen3"),
        ("llama", {"model_type": ...}, "model_type is None"),
        ("mistral", {"sliding_window": 319}, "sliding_window is 319, below max_model_len = 320"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window is 64"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "has sliding_attention"),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "layer_types in config.json must be a list of 3 names"),
        ("qwen2", {"layer_types": []}, "layer_types in config.json must be a list of 3 names, got []"),
        ("mistral", {"sliding_window": "16"}, "sliding_window in config.json must be an integer >= 1, got '16'"),
        ("mistral", {"sliding_window": 0}, "sliding_window in config.json must be an integer >= 1, got 0"),
        ("qwen2", {"max_window_layers": "1"}, "max_window_layers in config.json must be an integer >= 0, got '1'"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window in config.json must be true or false, got 1"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings in config.json must be true or false, got"),
        ("qwen2", {"tie_word_embeddings": None}, "tie_word_embeddings in config.json is null, which model_type qwen2"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads in config.json is null, which model_type"),
        ("qwen2", {"head_dim": None}, "head_dim in config.json is null, which model_type qwen2 does not allow; leave"),
        ("llama", {"head_dim": 0}, "head_dim in config.json must be an integer >= 1, got 0"),
        ("llama", {"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size is 60, not a multiple of num_att"),
        ("llama", {"attention_bias": None}, "attention_bias is None, which is not supported; only False is"),
        ("llama", {"mlp_bias": None}, "mlp_bias is None, which is not supported; only False is"),
        ("mistral", {"hidden_act": None}, "hidden_act is None, which is not supported; only 'silu' is"),
        ("qwen3", {"is_causal": False}, "is_causal is False, which is not supported; only True is"),
        ("llama", {"attention_chunk_size": 16}, "attention_chunk_size is 16"),
        ("qwen2", {"per_layer_config": {"1": {"intermediate_size": 44}}}, "per_layer_config is {'1': "),
        ("llama", {"text_config": {"sliding_window": 16}}, "text_config is {'sliding_window': 16}"),
        ("llama", {"sliding_window": 64}, "sliding_window is 64, below max_model_len = 320"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported; only 'silu' is"),
        ("llama3-hub", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("llama3-hub", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type llama3 needs low_freq_factor"),
        (
            "llama3-hub",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 5.0, "high_freq_factor": 4.0}},
            "low_freq_factor is 5.0 in config.json, above high_freq_factor = 4.0",
        ),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one for all layers"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ("qwen3", {"num_experts": 8}, "num_experts is 8"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads is 5, not a multiple of num_key_value_heads, 2"),
        ("llama", {"head_dim": 15}, "head_dim is 15; the rotary embedding needs an even one"),
        ("llama", {"hidden_size": "60"}, "hidden_size in config.json must be an integer >= 1, got '60'"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps in config.json must be a finite number above 0, got 'small'"),
        ("llama3-hub", {"rope_theta": None}, "rope_theta in config.json must be a finite number above 0, got None"),
        ("llama3-hub", {"rope_theta": 10**400}, "rope_theta in config.json must be a finite number above 0, got 1000"),
        ("llama3-hub", {"rope_theta": float("inf")}, "rope_theta in config.json must be a finite number above 0, got inf"),
        ("llama3-hub", {"rope_scaling": "llama3"}, "must be objects, got 'llama3'"),
        ("qwen3", {"layer_types": [1] * 3}, "layer_types in config.json must be a list of 3 names, got [1, 1, 1]"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers in config.json must be an integer >= 1, got 0"),
        ("llama", {"intermediate_size": 10**18}, "config.json has sizes that PyTorch cannot allocate (Storage size"),
        ("llama", {"hidden_size": 6 * 10**30}, "config.json has sizes that PyTorch cannot allocate (empty()"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(refused, copy_of, name, changes, message):
    assert message in refused(copy_of(name, **changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 320}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": 4096}),
        ("mistral", {"attention_bias": True}),  # a key that its family does not have
        ("mistral", {"use_sliding_window": None, "max_window_layers": "x"}),  # likewise
        ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"] * 3}),
        ("llama", {"sliding_window": 320}),
        ("llama", {"hidden_act": "swish", "partial_rotary_factor": None, "num_experts": None}),
        ("llama", {"attention_bias": ..., "hidden_act": ..., "mlp_bias": ...}),
        ("llama", {"quantization_config": None, "num_experts": 0, "partial_rotary_factor": 1.0}),
        ("llama", {"a_key_of_a_later_release": [1, 2]}),
        ("llama3-hub", {"rope_theta": 10**22}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": None}}),
    ],
)
def test_what_is_inert_is_accepted(copy_of, chapter, name, changes):
    chapter.load().Engine(copy_of(name, **changes))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_missing_key_takes_transformers_default_for_its_family(module, family):
    """The table is compared with transformers' own config classes, so it stays up to date."""
    theirs = AutoConfig.for_model(family)
    for key, value in module("config").defaults_of(family).items():
        if key == "rope_theta":
            assert value == theirs.rope_parameters["rope_theta"]
        elif key in ("num_key_value_heads", "head_dim") and value is None:
            derived = {"num_key_value_heads": theirs.num_attention_heads, "head_dim": 4096 // 32}
            assert getattr(theirs, key, derived[key]) == derived[key]
        elif key == "sliding_window" and family.startswith("qwen"):
            assert AutoConfig.for_model(family, use_sliding_window=True).sliding_window == value
        elif hasattr(theirs, key):
            assert getattr(theirs, key) == value, key


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = [
    {},
    {"use_sliding_window": False},
    {"use_sliding_window": True},
    {"use_sliding_window": True, "max_window_layers": 0},
    {"use_sliding_window": True, "max_window_layers": 2},
    {"use_sliding_window": True, "max_window_layers": 3},
    {"use_sliding_window": False, "max_window_layers": 3},
    {"use_sliding_window": True, "layer_types": [FULL, FULL, FULL]},
    {"use_sliding_window": False, "layer_types": [FULL, FULL, FULL]},
    {"use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL]},
    {"use_sliding_window": False, "layer_types": [SLIDING, SLIDING, SLIDING]},
]


@lru_cache(maxsize=None)
def hugging_faces_tokens(family, config):
    """What transformers generates after 30 tokens, or the kind of its error; config is JSON."""
    path = checkpoint(family)
    folder = path.with_name(f"{path.name}-{os.getpid()}")
    shutil.copytree(path, folder)
    (folder / "config.json").write_text(config)
    prompt = torch.tensor([[(i * 37 + 5) % 390 + 8 for i in range(30)]])
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        return tuple(out[0, 30:].tolist())
    except Exception as error:
        return type(error)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", WINDOWS, ids=str)
def test_a_window_is_on_where_hugging_faces_tokens_show_one(copy_of, module, family, changes):
    """Mistral's class has no use_sliding_window; false used to switch its window off."""
    load = module("config").load_config
    path = copy_of(family, sliding_window=16, **({"layer_types": ...} | changes))
    tokens = hugging_faces_tokens(family, (path / "config.json").read_text())
    if isinstance(tokens, type):
        with pytest.raises(ValueError):
            load(path)
    else:
        plain = hugging_faces_tokens(family, (checkpoint(family) / "config.json").read_text())
        assert load(path).sliding_window == (None if tokens == plain else 16)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_key_may_be_null_where_it_may_be_in_its_class(copy_of, module, family):
    config = module("config")
    for key in [*config.defaults_of(family), *config.UNSUPPORTED]:
        families = config.UNSUPPORTED.get(key, [(family,)])[0]
        if family not in families or key in ("is_causal", "is_encoder_decoder"):  # refused, and null is false there
            continue
        path = copy_of(family, **{key: None})
        try:
            theirs = AutoConfig.from_pretrained(path)
            with torch.device("meta"):
                attention = AutoModelForCausalLM.from_config(theirs).model.layers[0].self_attn
        except Exception:
            with pytest.raises(ValueError, match=key):
                config.load_config(path)
        else:
            ours = config.load_config(path)
            assert ours.head_dim == attention.head_dim
            assert ours.num_kv_heads * ours.head_dim == attention.k_proj.out_features
        shutil.rmtree(path)


@pytest.mark.parametrize("inside", [..., 64])
@pytest.mark.parametrize("beside", [..., 32])
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_the_length_at_which_llama3_scaling_begins_may_be_in_several_places(copy_of, module, inside, beside, form):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5000.0}
    rope |= {} if inside is ... else {"original_max_position_embeddings": inside}
    path = copy_of("llama", rope_parameters=..., original_max_position_embeddings=beside)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {form: rope}))
    want = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).model.rotary_emb.inv_freq
    got = module("layers").rope_frequencies(module("config").load_config(path))
    assert torch.allclose(got, want, rtol=1e-6)  # two orders of the same float32 products


def test_a_window_that_is_left_out_is_the_familys(copy_of, module):
    config = module("config").load_config(copy_of("mistral", sliding_window=..., max_position_embeddings=5000))
    with pytest.raises(ValueError, match="sliding_window is 4096, below max_model_len = 5000"):
        config.check_length(config.max_positions)


def test_a_config_with_few_keys_loads_like_the_full_one(copy_of, chapter, Params):
    """What equals the family's default may be left out."""
    full = chapter.load().Engine(checkpoint("llama3-hub"))
    sparse = chapter.load().Engine(
        copy_of("llama3-hub", tie_word_embeddings=..., hidden_act=..., attention_bias=..., rope_theta=..., torch_dtype=...)
    )
    assert sparse.config == full.config


def test_end_tokens_are_generation_configs_else_configs(copy_of, module):
    load = module("config").load_config
    path = copy_of("llama", eos_token_id=[5, 6])
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 4], "temperature": 0.1, "top_k": 1}')
    assert load(path).end_ids == (3, 4)
    (path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert load(path).end_ids == (3,)
    (path / "generation_config.json").write_text("{}")
    assert load(path).end_ids == (5, 6)
    (path / "generation_config.json").unlink()
    assert load(path).end_ids == (5, 6)


@pytest.mark.parametrize("end", ["x", "", [401], -1, [[1]], 1.5, True, False])
def test_end_tokens_that_are_none_are_refused(refused, copy_of, end):
    path = copy_of("llama")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert f"eos_token_id must be a token id below 401, or a list of them, got {end!r}" in refused(path)


@pytest.mark.parametrize("listed", [None, [], {"a": 1}, {"a": "../model.safetensors"}])
def test_an_index_that_names_no_files(refused, copy_of, listed):
    path = copy_of("llama3-hub")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert "must map each tensor to the name of a file beside it" in refused(path)


def test_generation_config_does_not_choose_the_sampling(copy_of, chapter, Params):
    path = copy_of("llama")
    (path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.9, "top_k": 3, "eos_token_id": 1}')
    plain, other = chapter.load().Engine(checkpoint("llama")), chapter.load().Engine(path)
    params = Params(max_tokens=12, seed=0)
    assert plain.generate([[9]], params) == other.generate([[9]], params)


# ---- code and names


CODE = ["code.MyTokenizer", "code.MyTokenizer"]


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": CODE}),
        ("tokenizer_config.json", {"AutoTokenizer": [CODE[0], None]}),
        ("tokenizer_config.json", CODE),
        ("tokenizer_config.json", {"AutoTokenizer": ["owner/name--code.MyTokenizer", None]}),
        ("config.json", {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}),
    ],
)
def test_a_checkpoints_own_code_is_never_run(refused, copy_of, module, monkeypatch, capsys, tmp_path, file, auto_map):
    """transformers used to ask on stdout, wait for an answer, and run the file after a y."""
    path = copy_of("llama")
    (path / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    stored = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(stored | {"auto_map": auto_map, "tokenizer_class": "MyTokenizer"}))
    monkeypatch.setattr("builtins.input", lambda _="": "y")
    (path / "model.safetensors").unlink()  # reported before any weight is read
    assert refused(path).startswith(f"auto_map in {path / file} is {auto_map!r}: a checkpoint's own Python is never run")
    # Nor by code that reads only the tokenizer.
    try:
        module("text").load_tokenizer(path)
    except ValueError:
        pass
    assert not (tmp_path / "was_run").exists()
    assert capsys.readouterr().out == ""


def test_an_auto_map_that_names_nothing_is_accepted(copy_of, chapter):
    path = copy_of("llama", auto_map={})
    stored = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(stored | {"auto_map": {}}))
    chapter.load().Engine(path)


def test_a_checkpoint_is_called_what_the_user_calls_it(chapter, tmp_path, monkeypatch):
    """A link to a hub snapshot used to be served under the snapshot's hash."""
    commit = "c1899de289a04d12100db370d81485cdf75e47ca"

    def name_of(path):
        return chapter.load().Engine(path).name

    def snapshot(repo):
        path = tmp_path / "hub" / repo / "snapshots" / commit
        shutil.copytree(checkpoint("llama"), path)
        return path

    qwen, gpt2 = snapshot("models--Qwen--Qwen3-0.6B"), snapshot("models--gpt2")
    assert name_of(qwen) == name_of(f"{qwen}/") == "Qwen/Qwen3-0.6B"
    assert name_of(gpt2) == "gpt2"
    (tmp_path / "my-model").symlink_to(qwen)
    (tmp_path / "of-a-link").symlink_to(tmp_path / "my-model")
    assert name_of(tmp_path / "my-model") == name_of(f"{tmp_path}/my-model/") == "my-model"
    assert name_of(tmp_path / "of-a-link") == "of-a-link"
    (tmp_path / "cache").symlink_to(tmp_path / "hub")
    assert name_of(tmp_path / "cache" / qwen.relative_to(tmp_path / "hub")) == "Qwen/Qwen3-0.6B"
    monkeypatch.chdir(tmp_path)
    assert name_of("my-model") == name_of("./my-model") == "my-model"
    monkeypatch.chdir(qwen)
    assert name_of(".") == name_of("") == "Qwen/Qwen3-0.6B"
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint("llama"), plain)
    assert name_of(plain) == "plain"
    (plain / "sub").mkdir()
    monkeypatch.chdir(plain / "sub")
    assert name_of("..") == "plain"


# ---- device and dtype


def test_devices_and_dtypes_that_are_not_supported(refused):
    path = checkpoint("llama")
    assert refused(path, device="mps") == (
        "device mps is not supported: nothing here has been tested on it; use cpu or cuda"
    )
    assert "device must be cpu, cuda or cuda:N, got 'toaster'" in refused(path, device="toaster")
    assert "device must be cpu, cuda or cuda:N, got 1.5" in refused(path, device=1.5)
    assert "device is cpu:7, but PyTorch has one CPU; use cpu" in refused(path, device="cpu:7")
    assert "dtype must be one of float32, bfloat16, float16, got 'int8'" in refused(path, dtype="int8")
    assert "dtype must be one of" in refused(path, dtype=torch.int64)
    if not torch.cuda.is_available():
        assert "this PyTorch sees 0 CUDA devices; use cpu" in refused(path, device="cuda")


def test_the_default_dtype_is_float32_on_a_cpu_and_the_checkpoints_on_a_gpu(module, make_engine):
    assert make_engine("llama3", device="cpu").dtype == torch.float32
    choose = module("loader").choose_dtype
    stored = module("loader").Checkpoint(checkpoint("llama3"))
    assert choose(None, torch.device("cuda"), stored) == torch.bfloat16
    assert choose("float16", torch.device("cuda"), stored) == torch.float16


def test_what_was_chosen_is_said_in_one_line(chapter, capsys):
    chapter.load().Engine(checkpoint("llama3"), device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "float32 on cpu, max_model_len 320" in captured.err


# ---- prompts and parameters


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompts[0] must be a text or a list of at least one token id, got []"),
        ([401], "each token id of prompts[0] must be an integer from 0 to 400, got 401"),
        ([-1], "each token id of prompts[0] must be an integer from 0 to 400, got -1"),
        ([1.0], "each token id of prompts[0] must be an integer from 0 to 400, got 1.0"),
        ([True], "each token id of prompts[0] must be an integer from 0 to 400, got True"),
        (None, "prompts[0] must be a text or a list"),
        (7, "prompts[0] must be a text or a list"),
        ("\ud800", "prompt must be valid Unicode"),
        ([9] * 305, "prompts[0] has 305 tokens and max_tokens is 16, but prompt and output together have at most"),
    ],
)
def test_prompts_that_cannot_run(make_engine, Params, prompt, message):
    engine = make_engine("llama")
    with pytest.raises(ValueError) as error:
        engine.generate([prompt], Params())
    assert message in str(error.value)
    with pytest.raises(ValueError):
        engine.add_request(prompt, Params())
    assert not engine.has_unfinished_requests()


def test_an_empty_text_is_refused_where_the_tokenizer_adds_nothing(make_engine, Params, monkeypatch):
    engine = make_engine("llama")
    [out] = engine.generate([""], Params(max_tokens=1))
    assert out.prompt_ids == [engine.tokenizer.bos_token_id]
    monkeypatch.setattr(type(engine.tokenizer), "__call__", lambda *_: type("Encoding", (), {"input_ids": []}))
    with pytest.raises(ValueError, match="at least one token id, got ''"):
        engine.generate([""], Params(max_tokens=1))


def test_a_length_that_does_not_fit_names_both_numbers_and_the_remedy(make_engine, Params):
    engine = make_engine("llama")
    with pytest.raises(ValueError) as error:
        engine.add_request([9] * 20, Params(max_tokens=301))
    assert str(error.value) == (
        "prompt has 20 tokens and max_tokens is 301, but prompt and output together have at most "
        "max_model_len = 320 tokens; shorten the prompt or lower max_tokens"
    )
    engine.abort_request(engine.add_request([9] * 20, Params(max_tokens=300)))
    with pytest.raises(ValueError, match="max_tokens is None"):
        engine.add_request([9] * 320, Params(max_tokens=None))


def test_calls_that_are_not_a_list_of_prompts(make_engine, Params):
    engine = make_engine("llama")
    with pytest.raises(ValueError, match="prompts must be a list of prompts, got str"):
        engine.generate("hello", Params())
    with pytest.raises(ValueError, match="prompts must be a list of prompts, got NoneType"):
        engine.generate(None, Params())
    with pytest.raises(ValueError, match="params must be SamplingParams, got None"):
        engine.generate([[9]], None)
    with pytest.raises(ValueError, match="params has 1 items for 2 prompts; give one, or one per prompt"):
        engine.generate([[9], [9]], [Params()])
    with pytest.raises(ValueError, match="params must be SamplingParams"):
        engine.generate([[9]], [{"max_tokens": 3}])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer from 1 up or None, got 0"),
        ({"max_tokens": 2.0}, "max_tokens must be an integer from 1 up or None, got 2.0"),
        ({"max_tokens": True}, "max_tokens must be an integer from 1 up or None, got True"),
        ({"temperature": -0.1}, "temperature must be a number from 0 (greedy) to 1e30, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 (greedy) to 1e30, got nan"),
        ({"temperature": float("inf")}, "temperature must be a number from 0 (greedy) to 1e30, got inf"),
        ({"temperature": 10**400}, "temperature must be a number from 0 (greedy) to 1e30, got 1000"),
        ({"top_p": -(10**400)}, "top_p must be above 0 and at most 1 (off), got -1000"),
        ({"temperature": 1e31}, "temperature must be a number from 0 (greedy) to 1e30, got 1e+31"),
        ({"temperature": "hot"}, "temperature must be a number from 0 (greedy) to 1e30, got 'hot'"),
        ({"temperature": 1e-31}, "temperature 1e-31 is too small to divide by; use 0 for greedy"),
        ({"top_k": -1}, "top_k must be an integer from 0 up, got -1"),
        ({"top_k": None}, "top_k must be an integer from 0 up, got None"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1 (off), got 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1 (off), got 1.01"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1 (off), got nan"),
        ({"seed": 2**63}, "seed must be an integer from -9223372036854775808 to 9223372036854775807 or None"),
        ({"seed": -(2**63) - 1}, "seed must be an integer from -9223372036854775808 to 9223372036854775807 or None"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"stop_token_ids": (-1,)}, "each of stop_token_ids must be an integer from 0 up, got -1"),
        ({"stop_token_ids": None}, "stop_token_ids must be a tuple of token ids, got None"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a tuple of token ids, got 5"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"logprobs": -1}, "logprobs must be an integer from 0 up or None, got -1"),
    ],
)
def test_sampling_parameters_out_of_range(Params, keywords, message):
    with pytest.raises(ValueError) as error:
        Params(**keywords)
    assert message in str(error.value)


def test_sampling_parameters_beyond_the_vocabulary(make_engine, Params):
    engine = make_engine("llama")
    with pytest.raises(ValueError, match="each of stop_token_ids must be an integer from 0 to 400, got 401"):
        engine.add_request([9], Params(stop_token_ids=(401,)))
    with pytest.raises(ValueError, match="logprobs must be an integer from 0 to 401 or None, got 402"):
        engine.add_request([9], Params(logprobs=402))
    [out] = engine.generate([[9]], Params(max_tokens=2, temperature=1.0, top_k=10**6, logprobs=401))
    assert len(out.logprobs[0]) == 401
