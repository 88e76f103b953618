"""The engine: feed tokens, choose the next ones, append them."""
import sys
from pathlib import Path

import torch
from torch import Tensor

from .backends import choose_backend
from .batch import Batch, Draw, build_batch
from .cache import BlockPool, KVCache, SwapSpace, check_memory, kv_bytes_per_token, memory_bytes
from .config import load_config
from .loader import Checkpoint, choose_device, choose_dtype, choose_name, load_model
from .outputs import RequestOutput, Stats, StepOutput
from .params import RequestError, SamplingParams, check_ids, check_integer
from .prefix import root_key
from .sampling import NO_TOKEN, sample, top_logprobs
from .scheduler import Scheduler
from .sequence import Sequence
from .storage import store_weights
from .text import TextStream, encode, load_tokenizer

# The head runs on at most this many rows at a time: a long prompt has thousands, each with vocab_size logits.
HEAD_ROWS = 256


def choose_length(max_model_len: int | None, max_positions: int) -> int:
    """The requested length; by default the model's."""
    check_integer("max_model_len", max_model_len, 1, max_positions, optional=True)
    return max_positions if max_model_len is None else max_model_len


def choose_blocks(
    num_blocks: int | None,
    kv_bytes: int | None,
    block_bytes: int,
    most_blocks: int,
    device: torch.device,
) -> int:
    """The number of blocks, as requested by number or by bytes; ValueError if kv_bytes is less than one block.

    By default 60 % of a GPU's free memory or 1 GiB of a CPU's, but at most most_blocks, which is what
    max_num_seqs requests of max_model_len tokens would fill.
    """
    if num_blocks is not None:
        return num_blocks
    if kv_bytes is None:
        kv_bytes = int(0.6 * memory_bytes(device)) if device.type == "cuda" else 2**30
        kv_bytes = min(kv_bytes, most_blocks * block_bytes)
    if kv_bytes < block_bytes:
        raise ValueError(f"kv_bytes is {kv_bytes}, but a block takes {block_bytes}; raise kv_bytes or lower block_size")
    return kv_bytes // block_bytes


def choose_swap_blocks(swap_bytes: int, block_bytes: int, kv_bytes: int) -> int:
    """The number of blocks of the swap space; ValueError if swap_bytes is less than one block, or more than the memory.

    kv_bytes: what the cache takes of the CPU's memory, too.
    """
    if 0 < swap_bytes < block_bytes:
        raise ValueError(f"swap_bytes is {swap_bytes}, but a block takes {block_bytes}; raise swap_bytes, or set it to 0 for no swap space")
    what = "the cache with its swap space" if kv_bytes else "the swap space"
    check_memory(swap_bytes + kv_bytes, torch.device("cpu"), "lower swap_bytes", what)
    return swap_bytes // block_bytes


def choose_budget(max_num_batched_tokens: int | None, max_num_seqs: int, device: torch.device) -> int:
    """The most tokens in a step, by default 2048 on a GPU and 512 on a CPU, or max_num_seqs if that is more; ValueError if it is less than max_num_seqs."""
    if max_num_batched_tokens is None:
        return max(max_num_seqs, 2048 if device.type == "cuda" else 512)
    if max_num_batched_tokens < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens is {max_num_batched_tokens}, but each of max_num_seqs = {max_num_seqs} requests needs a token "
            f"in every step; raise max_num_batched_tokens or lower max_num_seqs"
        )
    return max_num_batched_tokens


class Engine:
    """A model and the loop that runs it. Call it from only one thread at a time."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        num_blocks: int | None = None,
        block_size: int = 16,
        kv_bytes: int | None = None,
        attention: str = "auto",
        reserve_tokens: int = 16,
        swap_bytes: int = 0,
        enable_prefix_caching: bool = True,
        max_num_batched_tokens: int | None = None,
        linear: str = "auto",
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
        check_integer("block_size", block_size, 1)
        check_integer("num_blocks", num_blocks, 1, optional=True)
        check_integer("kv_bytes", kv_bytes, 1, optional=True)
        if num_blocks is not None and kv_bytes is not None:
            raise ValueError(f"num_blocks is {num_blocks} and kv_bytes {kv_bytes}; both size the cache, so give only one")
        check_integer("reserve_tokens", reserve_tokens, 0)
        check_integer("swap_bytes", swap_bytes, 0)
        check_integer("max_num_batched_tokens", max_num_batched_tokens, 1, optional=True)
        if not isinstance(enable_prefix_caching, bool):
            raise ValueError(f"enable_prefix_caching must be True or False, got {enable_prefix_caching!r}")

        # the model
        checkpoint = Checkpoint(model_dir)
        self.device = choose_device(device)
        budget = choose_budget(max_num_batched_tokens, max_num_seqs, self.device)
        self.dtype = choose_dtype(dtype, self.device, checkpoint)
        self.backend = choose_backend(attention, self.device)
        self.model = load_model(
            checkpoint,
            self.config,
            self.device,
            self.dtype,
        )
        self.linear = store_weights(self.model, linear)
        self.tokenizer = load_tokenizer(model_dir)

        # its cache
        block_bytes = block_size * kv_bytes_per_token(self.config, self.dtype)
        most_blocks = max_num_seqs * -(-self.max_model_len // block_size)
        num_blocks = choose_blocks(num_blocks, kv_bytes, block_bytes, most_blocks, self.device)
        self.cache = KVCache(self.config, num_blocks, block_size, self.device, self.dtype)
        self.pool = BlockPool(num_blocks, block_size)
        if max_model_len is None:
            self.max_model_len = min(self.max_model_len, num_blocks * block_size)
        self.max_request_len = min(self.max_model_len, num_blocks * block_size + 1)  # what also fits into the cache
        beside = self.cache.kv_bytes if self.device.type == "cpu" else 0
        self.swap = SwapSpace(self.cache, choose_swap_blocks(swap_bytes, block_bytes, beside))

        # its requests
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            pool=self.pool,
            reserve_tokens=reserve_tokens,
            swap=self.swap,
            enable_prefix_caching=enable_prefix_caching,
            max_num_batched_tokens=budget,
        )
        self.seqs: dict[int, Sequence] = {}
        self.in_step: list[Sequence] = []
        self.num_requests = 0
        self.num_steps = 0
        self.num_resets = 0
        self.num_positions = 0

        print(f"{self.name}: {self.describe()}", file=sys.stderr)

    def describe(self) -> str:
        """The settings in use, chosen by the caller or by default, in one line."""
        chosen = [
            self.config.family,
            f"{self.dtype} on {self.device}",
            f"max_model_len {self.max_model_len}",
            f"max_num_seqs {self.max_num_seqs}",
            f"{self.pool.num_blocks} blocks of {self.pool.block_size} tokens",
            f"attention by {self.backend.name}",
            f"linear layers {self.linear}",
            f"{self.cache.kv_bytes / 2**20:.1f} MiB of keys and values",
            f"{self.scheduler.reserve_tokens} tokens reserved per request",
            f"{self.swap.pool.num_blocks} blocks of swap space",
            f"at most {self.scheduler.max_num_batched_tokens} tokens per step",
            f"prefix cache {'on' if self.scheduler.enable_prefix_caching else 'off'}",
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
        except BaseException:
            # What an unfinished step has written is unknown.
            self.reset_prefix_cache()
            raise
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
        max_tokens = max(1, self.max_request_len - num_prompt) if params.max_tokens is None else params.max_tokens
        if num_prompt + max_tokens > limit:
            raise RequestError(
                f"{name} has {num_prompt} tokens and max_tokens is {params.max_tokens}, but prompt and output together "
                f"have at most max_model_len = {limit} tokens; shorten the prompt or lower max_tokens",
                param=name,
                code="context_length_exceeded",
            )
        # The last token is never fed, so it needs no slot.
        need = self.pool.blocks_for(num_prompt + max_tokens - 1)
        if need > self.pool.num_blocks:
            raise RequestError(
                f"{name} and its output may need {need} blocks of {self.pool.block_size} tokens, but num_blocks is "
                f"{self.pool.num_blocks}; shorten the prompt, lower max_tokens, or raise num_blocks or kv_bytes",
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
            stream=TextStream(self.tokenizer, None if params.new_text else prompt_ids, tuple(params.stop)),
            root_key=root_key(params.cache_salt, self.num_resets),
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

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels that steps may launch, so no request waits for the compiler; changes nothing else.

        Takes seconds on a GPU, less if Triton has them in its disk cache, and no more than a small step if PyTorch computes attention.
        """
        self.backend.warm_up(self.cache, self.config.num_heads, self.max_model_len)
        # The strides of a single row differ.
        for num_tokens in (1, 2):
            self.model.compute_logits(self.model(self.dummy_batch(num_tokens).to(self.device)))

    def dummy_batch(self, num_tokens: int) -> Batch:
        """A batch of one sequence with this many tokens, on a cache of its own."""
        seq = Sequence(
            seq_id=0,
            prompt_ids=[0] * num_tokens,
            params=SamplingParams(seed=0),
            max_tokens=1,
            end_ids=(),
            stream=TextStream(self.tokenizer, None, ()),
            root_key=b"",
        )
        num_blocks = self.pool.blocks_for(num_tokens)
        seq.num_scheduled = num_tokens
        seq.block_table.extend(range(num_blocks))
        cache = KVCache(self.config, num_blocks, self.pool.block_size, self.device, self.dtype)
        return build_batch([seq], cache, self.backend)

    def release(self, seq: Sequence) -> None:
        """Remove a finished request and free what it holds; every request leaves the engine this way."""
        del self.seqs[seq.seq_id]
        self.scheduler.release(seq)

    def fail_step(self) -> list[int]:
        """After `step` has raised: finish every request in it with reason error, and return their ids.

        How far the step got is unknown. The ids include requests that it finished, because their last output is lost.

        Raises:
            Exception: what PyTorch raises if the device no longer works. After some errors of a GPU, every later step fails.
        """
        torch.zeros(1, device=self.device).cpu()
        took_part = {seq.seq_id: seq for seq in self.in_step + self.scheduler.running}
        for seq in took_part.values():
            if seq.seq_id in self.seqs:
                seq.finish("error")
                self.release(seq)
        # What the step has written is unknown too, so no later request may find it.
        self.reset_prefix_cache()
        self.in_step = []
        return list(took_part)

    def reset_prefix_cache(self) -> None:
        """Let no later request find what was computed before this call, or is computed for a request of before; those go on."""
        self.num_resets += 1
        self.pool.forget(range(self.pool.num_blocks))

    def close(self) -> None:
        """Abort every request and free what it holds."""
        for request_id in list(self.seqs):
            self.abort_request(request_id)

    def stats(self) -> Stats:
        """The current numbers of requests and blocks."""
        preempted = sum(seq.preempted for seq in self.scheduler.waiting)
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) - preempted,
            free_blocks=self.pool.num_free,
            total_blocks=self.pool.num_blocks,
            preempted=preempted,
            preemptions=self.scheduler.num_preemptions,
            swapped_blocks=self.swap.pool.num_blocks - self.swap.pool.num_free,
            prompt_tokens=self.scheduler.num_prompt_tokens,
            cached_tokens=self.scheduler.num_cached_tokens,
        )

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance every scheduled sequence by one forward pass and return the new tokens, possibly none."""
        self.in_step = []
        self.in_step = seqs = self.scheduler.schedule()
        if not seqs:
            return []
        batch = build_batch(seqs, self.cache, self.backend)
        hidden = self.model(batch.to(self.device))  # [R, E]
        token_ids, logprobs = [], []
        for start in range(0, len(batch.draws), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            chosen, tops = self.choose_tokens(hidden[rows], batch.draws[rows])
            token_ids += chosen
            logprobs += tops
        self.num_steps += 1
        self.num_positions += len(batch.token_ids)
        return self.commit(batch, token_ids, logprobs)

    def choose_tokens(self, hidden: Tensor, draws: list[Draw]) -> tuple[list[int], list]:
        """The token and the logprobs of each draw; a token that is already known stays as it is."""
        logits = self.model.compute_logits(hidden)  # [R, V]
        token_ids = sample(logits, draws).tolist()  # [R]
        for row, (seq, position) in enumerate(draws):
            if seq.knows(position) and token_ids[row] != NO_TOKEN:
                token_ids[row] = seq.token_ids[position]
        return token_ids, top_logprobs(logits, draws, token_ids)

    def commit(self, batch: Batch, token_ids: list[int], logprobs: list) -> list[StepOutput]:
        """Append each draw's token to its sequence, release finished sequences, and return the outputs."""
        outputs = []
        # A piece of a prompt, unless it is the last, has no draw.
        for seq in self.in_step:
            seq.num_computed += len(seq.new_ids)
        for draw, token_id, top in zip(batch.draws, token_ids, logprobs, strict=True):
            seq = draw.seq
            if seq.finished:  # by an error at an earlier position
                continue
            if seq.knows(draw.position) and token_id != NO_TOKEN:
                seq.prompt_logprobs[draw.position] = top
                continue
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
        if seq.stream.stopped_by is not None and seq.finish_reason != "error":
            seq.finish("stop", by=seq.stream.stopped_by)
        return StepOutput(
            request_id=seq.seq_id,
            token_id=token_id,
            text=text,
            logprobs=top,
            finish_reason=seq.finish_reason,
            prompt_logprobs=seq.prompt_logprobs if seq.num_output == 1 else None,
            stop_reason=seq.stop_reason,
            offset=seq.stream.offset,
            num_cached=seq.num_cached,
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
            prompt_logprobs=seq.prompt_logprobs,
            stop_reason=seq.stop_reason,
            num_cached=seq.num_cached or 0,
        )
