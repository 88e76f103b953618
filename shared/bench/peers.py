"""What chapters are compared with: transformers' `generate` in padded batches, and its continuous batching.

Both decode greedily and ignore end-of-sequence tokens. By default they run on the CPU in float32.
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
        # No token has the id -1. With None, generate would use the checkpoint's own end-of-sequence tokens.
        return GenerationConfig(do_sample=False, eos_token_id=[-1], pad_token_id=0, **more)

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Run PLACES requests at a time, padded on the left, until the longest is done; return each one's tokens."""
        outputs = []
        for start in range(0, len(requests), PLACES):
            group = requests[start : start + PLACES]
            width = max(len(request.prompt_ids) for request in group)
            pads = [width - len(request.prompt_ids) for request in group]
            ids = torch.tensor([[0] * pad + request.prompt_ids for pad, request in zip(pads, group)])
            mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
            settings = self.settings(max_new_tokens=max(request.max_tokens for request in group))
            rows = self.model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
            outputs += [row[: request.max_tokens] for row, request in zip(rows, group)]
        return outputs

    def stop(self) -> None:
        """Do nothing: there is no thread to stop."""


class ContinuousBatching(HuggingFace):
    """transformers' own continuous batching, with a paged cache; it runs in its own thread until `stop`."""

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
        # Older releases say block instead of page, and only memory limits their number of requests.
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
        """Each request's tokens; RuntimeError if any fails, or if they are not done in time."""
        deadline = time.monotonic() + seconds
        ids = [self.manager.add_request(each.prompt_ids, max_new_tokens=each.max_tokens) for each in requests]
        outputs = {}
        while len(outputs) < len(ids):
            result = self.manager.get_result(timeout=max(deadline - time.monotonic(), 0.01))
            if result is None:
                raise RuntimeError(f"continuous batching was not done after {seconds:g} s: {len(outputs)} of {len(ids)} requests")
            if result.error:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            if result.is_finished():
                outputs[result.request_id] = result.generated_tokens
        return [outputs[request_id] for request_id in ids]

    def stop(self) -> None:
        self.manager.stop(block=True)
