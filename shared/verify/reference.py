"""Hugging Face as the reference: the outputs a chapter must match, computed by transformers from the same checkpoint.

N tokens of the prompt   V vocabulary   T tokens generated

Reads: a checkpoint.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

# If two logits differ by less than this, rounding decides which is larger.
TIE = 1e-4


@dataclass(frozen=True)
class Greedy:
    """The result of greedy decoding."""

    token_ids: list[int]
    margins: list[float]  # [T] the largest logit minus the second largest


class Reference:
    """A checkpoint as transformers runs it: one prompt at a time, no batching.

    Results are cached, because all chapters are compared with the same ones; callers must not modify a returned tensor.
    attention: eager, with every operation written out, or sdpa, PyTorch's fused implementation.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float32, attention: str = "eager"):
        transformers_logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self.results = {}

    def once(self, compute: Callable, *arguments):
        """The result of compute for these arguments, computed only the first time."""
        key = repr((compute.__name__, arguments))
        if key not in self.results:
            self.results[key] = compute(*arguments)
        return self.results[key]

    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits [N, V] of one prefill, in float32."""
        return self.once(self.compute_logits, token_ids)

    @torch.inference_mode()
    def compute_logits(self, token_ids: list[int]) -> Tensor:
        return self.model(torch.tensor([token_ids]), use_cache=False).logits[0].float()

    def logprobs(self, token_ids: list[int]) -> Tensor:
        """Log-probabilities [N, V] of the token after each of token_ids."""
        return self.logits(token_ids).log_softmax(-1)

    def greedy(self, prompt_ids: list[int], max_tokens: int, ignore_eos: bool = False) -> Greedy:
        """The output of transformers' generate without sampling."""
        return self.once(self.compute_greedy, prompt_ids, max_tokens, ignore_eos)

    @torch.inference_mode()
    def compute_greedy(self, prompt_ids: list[int], max_tokens: int, ignore_eos: bool) -> Greedy:
        settings = self.model.generation_config
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            # No token has the id -1. With None, generate would use the checkpoint's own end-of-sequence tokens.
            eos_token_id=[-1] if ignore_eos else settings.eos_token_id,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        out = self.model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
            generation_config=config,
        )
        best = torch.cat(out.logits).float().topk(2).values  # [T, 2]
        return Greedy(out.sequences[0, len(prompt_ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist())

    def module_outputs(self, token_ids: list[int]) -> dict[str, Tensor]:
        """Every module's output during one prefill, by the module's name."""
        return self.once(self.compute_module_outputs, token_ids)

    def compute_module_outputs(self, token_ids: list[int]) -> dict[str, Tensor]:
        with Outputs(self.model) as outputs:
            self.compute_logits(token_ids)
        return {name: value[0] for name, value in outputs.items()}


class Outputs(dict):
    """While entered, collects each submodule's output by name; a tuple's other elements are name.1, name.2, ..."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def __enter__(self) -> "Outputs":
        self.handles = [
            module.register_forward_hook(lambda _module, _args, out, name=name: self.keep(name, out))
            for name, module in self.model.named_modules()
            if name
        ]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()

    def keep(self, name: str, out: object) -> None:
        if hasattr(out, "last_hidden_state"):
            out = out.last_hidden_state
        for i, value in enumerate(out if isinstance(out, tuple) else (out,)):
            if isinstance(value, Tensor):
                self[f"{name}.{i}" if i else name] = value.detach().clone()


@lru_cache(maxsize=None)
def reference(model_dir: Path, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Reference:
    """The reference of a checkpoint, loaded once per process."""
    return Reference(model_dir, dtype, attention)


def settled(ours: list[int], theirs: Greedy) -> tuple[list[int], list[int], bool]:
    """Both token lists up to the first tie at which they differ, and whether there was one.

    A tie is a step at which the reference's two best logits are less than TIE apart.
    """
    for i, (mine, other) in enumerate(zip(ours, theirs.token_ids)):
        if mine != other:
            if theirs.margins[i] < TIE:
                return ours[:i], theirs.token_ids[:i], True
            break
    return ours, theirs.token_ids, False
