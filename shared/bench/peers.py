"""What a chapter is measured beside: transformers' `generate` in padded batches, and its continuous batching.

Both run greedily and never stop early; on the CPU in float32, unless they are told otherwise.
"""
import inspect
import logging
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from shared.workloads import Request

PLACES = 8  # requests in a padded batch
PAGE = 256  # tokens


class HuggingFace:
    """A checkpoint as transformers runs it."""

    def __init__(self, model_dir: Path, device: str = "cpu", dtype: str = "float32"):
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), local_files_only=True)
        self.model = model.eval().to(device)

    def settings(self, **more) -> GenerationConfig:
        # No token has the id -1; None would be filled in from the checkpoint's own settings.
        return GenerationConfig(do_sample=False, eos_token_id=[-1], pad_token_id=0, **more)

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Groups of PLACES in the order they came, padded on the left, each until its longest is done."""
        said = []
        for start in range(0, len(requests), PLACES):
            group = requests[start : start + PLACES]
            width = max(len(request.prompt_ids) for request in group)
            pads = [width - len(request.prompt_ids) for request in group]
            ids = torch.tensor([[0] * pad + request.prompt_ids for pad, request in zip(pads, group)])
            mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
            settings = self.settings(max_new_tokens=max(request.max_tokens for request in group))
            rows = self.model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
            said += [row[: request.max_tokens] for row, request in zip(rows, group)]
        return said

    def stop(self) -> None:
        """There is nothing to end."""


class ContinuousBatching(HuggingFace):
    """transformers' own continuous batching, with a paged cache; its loop has a thread of its own."""

    def __init__(
        self,
        model_dir: Path,
        num_positions: int,
        device: str = "cpu",
        dtype: str = "float32",
        places: int = 64,
    ):
        super().__init__(model_dir, device, dtype)
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        # Older releases call a page a block, and have no limit but memory to the number of requests.
        known = inspect.signature(ContinuousBatchingConfig).parameters
        limit = {"max_requests_per_batch": places} if "max_requests_per_batch" in known else {}
        settings = ContinuousBatchingConfig(
            **{"page_size" if "page_size" in known else "block_size": PAGE},
            num_blocks=-(-num_positions // PAGE),
            max_batch_tokens=1024,
            use_async_batching=False,
            use_cuda_graph=False,
            **limit,
        )
        self.manager = self.model.init_continuous_batching(
            generation_config=self.settings(max_new_tokens=1),
            continuous_batching_config=settings,
        )
        self.manager.start()

    def generate(self, requests: list[Request], seconds: float = 600.0) -> list[list[int]]:
        """The tokens of each; RuntimeError if they are not all there in time."""
        deadline = time.monotonic() + seconds
        ids = [self.manager.add_request(each.prompt_ids, max_new_tokens=each.max_tokens) for each in requests]
        said = {}
        while len(said) < len(ids):
            result = self.manager.get_result(timeout=max(deadline - time.monotonic(), 0.01))
            if result is None:
                raise RuntimeError(f"continuous batching was not done after {seconds:g} s: {len(said)} of {len(ids)} requests")
            if result.error:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            if result.is_finished():
                said[result.request_id] = result.generated_tokens
        return [said[each] for each in ids]

    def stop(self) -> None:
        self.manager.stop(block=True)
