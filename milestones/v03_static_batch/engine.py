"""The engine: feed tokens, choose the next ones, append them."""
import sys
from pathlib import Path

import torch

from .batch import Batch, build_batch
from .cache import KVCache
from .config import load_config
from .loader import Checkpoint, choose_device, choose_dtype, choose_name, load_model
from .outputs import RequestOutput, StepOutput
from .params import RequestError, SamplingParams, check_ids, check_integer
from .sampling import NO_TOKEN, sample, top_logprobs
from .scheduler import Scheduler
from .sequence import Sequence
from .text import TextStream, encode, load_tokenizer


def choose_length(max_model_len: int | None, max_positions: int) -> int:
    """The requested length; by default the model's, but at most 2048, so the cache fits a laptop's memory."""
    check_integer("max_model_len", max_model_len, 1, max_positions, optional=True)
    return min(max_positions, 2048) if max_model_len is None else max_model_len


class Engine:
    """A model and the loop that runs it. Call it from only one thread at a time."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
    ):
        """Load a checkpoint directory in the format of transformers and the Hugging Face hub.

        Raises:
            ValueError: if it is incomplete or needs a feature that is not supported, or if an argument is out of range.
        """
        # the configuration
        model_dir = Path(model_dir)
        self.name = choose_name(model_dir)
        self.config = load_config(model_dir)
        self.max_model_len = choose_length(max_model_len, self.config.max_positions)
        self.config.check_length(self.max_model_len)
        check_integer("max_num_seqs", max_num_seqs, 1)
        self.max_num_seqs = max_num_seqs

        # the model
        checkpoint = Checkpoint(model_dir)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device, checkpoint)
        self.model = load_model(
            checkpoint,
            self.config,
            self.device,
            self.dtype,
        )
        self.tokenizer = load_tokenizer(model_dir)

        # its cache
        self.cache = KVCache(self.config, max_num_seqs, self.max_model_len, self.device, self.dtype)

        # its requests
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
        )
        self.seqs: dict[int, Sequence] = {}
        self.num_requests = 0
        self.num_steps = 0
        self.num_positions = 0

        print(f"{self.name}: {self.describe()}", file=sys.stderr)

    def describe(self) -> str:
        """The settings in use, chosen by the caller or by default, in one line."""
        chosen = [
            self.config.family,
            f"{self.dtype} on {self.device}",
            f"max_model_len {self.max_model_len}",
            f"max_num_seqs {self.max_num_seqs}",
            f"{self.cache.kv_bytes / 2**20:.1f} MiB of keys and values",
        ]
        return ", ".join(chosen)

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] = SamplingParams(),
    ) -> list[RequestOutput]:
        """Complete every prompt and return the results in the order of the prompts.

        Args:
            prompts: texts or lists of token ids, which may be mixed.
            params: one for all, or one per prompt.
        Raises:
            RequestError: if one of them can never run, or the engine has unfinished requests; then none is queued.
        """
        if self.has_unfinished_requests():
            raise RequestError(f"prompts cannot run while {len(self.seqs)} requests are unfinished; step until all finish", "prompts")
        if not isinstance(prompts, (list, tuple)):
            raise RequestError(f"prompts must be a list of prompts, got {type(prompts).__name__}", "prompts")
        all_params = params if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(all_params) != len(prompts):
            message = f"params has {len(all_params)} items for {len(prompts)} prompts; give one, or one per prompt"
            raise RequestError(message, "params")
        seqs = [self.make_sequence(*pair, name=f"prompts[{i}]") for i, pair in enumerate(zip(prompts, all_params))]
        try:
            for seq in seqs:
                self.enqueue(seq)
            while self.has_unfinished_requests():
                self.step()
        finally:
            for seq in seqs:
                self.abort_request(seq.seq_id)
        return [self.request_output(seq) for seq in seqs]

    def make_sequence(self, prompt: str | list[int], params: SamplingParams, name: str) -> Sequence:
        """Tokenize and check a request, and assign its id; RequestError if it can never run."""
        prompt_ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        vocab_size, limit = self.config.vocab_size, self.max_model_len
        if not isinstance(prompt_ids, list) or not prompt_ids:
            raise RequestError(f"{name} must be a text or a list of at least one token id, got {prompt!r}", name)
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {params!r}", "params")
        check_ids(f"each token id of {name}", prompt_ids, vocab_size, param=name)
        check_ids("each of stop_token_ids", params.stop_token_ids, vocab_size, param="stop_token_ids")
        check_integer("logprobs", params.logprobs, 0, vocab_size, optional=True)
        num_prompt = len(prompt_ids)
        max_tokens = max(1, limit - num_prompt) if params.max_tokens is None else params.max_tokens
        if num_prompt + max_tokens > limit:
            raise RequestError(
                f"{name} has {num_prompt} tokens and max_tokens is {params.max_tokens}, but prompt and output together "
                f"have at most max_model_len = {limit} tokens; shorten the prompt or lower max_tokens",
                param=name,
                code="context_length_exceeded",
            )
        self.num_requests += 1
        return Sequence(
            seq_id=self.num_requests,
            prompt_ids=prompt_ids,
            params=params,
            max_tokens=max_tokens,
            end_ids=self.config.end_ids,
            stream=TextStream(self.tokenizer, None if params.new_text else prompt_ids),
        )

    def add_request(self, prompt: str | list[int], params: SamplingParams = SamplingParams()) -> int:
        """Queue a request and return its id, which is never reused; it starts in the next step that has room for it."""
        seq = self.make_sequence(prompt, params, name="prompt")
        self.enqueue(seq)
        return seq.seq_id

    def enqueue(self, seq: Sequence) -> None:
        self.seqs[seq.seq_id] = seq
        self.scheduler.add(seq)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self.seqs)

    def abort_request(self, request_id: int) -> bool:
        """Abort a request, running or waiting; return False if it has already finished or never existed.

        `step` returns no more outputs for it.
        """
        if request_id not in self.seqs:
            return False
        seq = self.seqs[request_id]
        seq.finish("abort")
        self.release(seq)
        return True

    def release(self, seq: Sequence) -> None:
        """Remove a finished request and free what it holds; every request leaves the engine this way."""
        del self.seqs[seq.seq_id]
        self.scheduler.release(seq)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance every scheduled sequence by one forward pass and return the new tokens, possibly none."""
        seqs = self.scheduler.schedule()
        if not seqs:
            return []
        batch = build_batch(seqs, self.cache)
        hidden = self.model(batch.to(self.device))  # [R, E]
        logits = self.model.compute_logits(hidden)  # [R, V]
        token_ids = sample(logits, batch.draws).tolist()  # [R]
        self.num_steps += 1
        self.num_positions += len(batch.token_ids)
        return self.commit(batch, token_ids, top_logprobs(logits, batch.draws, token_ids))

    def commit(self, batch: Batch, token_ids: list[int], logprobs: list) -> list[StepOutput]:
        """Append each draw's token to its sequence, release finished sequences, and return the outputs."""
        outputs = []
        for draw, token_id, top in zip(batch.draws, token_ids, logprobs, strict=True):
            seq = draw.seq
            seq.num_computed = draw.position  # every earlier position has been fed
            outputs.append(self.accept(seq, token_id, top))
            if seq.finished:
                self.release(seq)
        return outputs

    def accept(self, seq: Sequence, token_id: int, top: dict[int, float] | None) -> StepOutput:
        """Append a token to a sequence and return its output, with the text that became final."""
        if token_id == NO_TOKEN:
            seq.finish("error")
        else:
            seq.append(token_id)
            seq.logprobs.append(top)
        # The token that ends a text is not part of it.
        text = seq.stream.push([] if seq.finish_reason in ("stop", "error") else [token_id], last=seq.finished)
        return StepOutput(
            request_id=seq.seq_id,
            token_id=token_id,
            text=text,
            logprobs=top,
            finish_reason=seq.finish_reason,
        )

    def request_output(self, seq: Sequence) -> RequestOutput:
        """The result of a finished sequence, for the caller."""
        return RequestOutput(
            prompt_ids=seq.token_ids[: seq.num_prompt],
            token_ids=seq.output_ids,
            text=seq.stream.text,
            finish_reason=seq.finish_reason,
            logprobs=None if seq.params.logprobs is None else seq.logprobs,
            seed=seq.seed,
        )
