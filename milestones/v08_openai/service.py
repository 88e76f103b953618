"""The engine, settings and checks that the endpoints share."""
from .async_engine import AsyncEngine
from .engine_thread import EngineThread
from .errors import ApiError
from .names import TokenNames
from .params import RequestError
from .protocol import now
from .text import drops_first_space, special_tokens, vocabulary_bytes


class Service:
    """An engine, and what its server offers. Call it from the event loop's thread, unless a method says otherwise."""

    def __init__(
        self,
        runner: EngineThread,
        model_name: str,
        api_keys: tuple[str, ...] = (),
        max_waiting: int = 256,
        default_max_tokens: int | None = None,
        drain_seconds: float = 30.0,
    ):
        self.async_engine = AsyncEngine(runner, max_waiting)
        self.models = [model_name]
        self.started = now()
        vocabulary, special = vocabulary_bytes(runner.tokenizer), set(special_tokens(runner.tokenizer))
        self.names = TokenNames(vocabulary, special, drops_first_space(runner.tokenizer, vocabulary))
        self.api_keys = api_keys
        self.default_max_tokens = default_max_tokens
        # A text with more bytes cannot fit, whatever its tokens: none is longer than the longest in the vocabulary.
        # The factor of 4 is for tokenizers that first normalize the text to fewer bytes.
        self.max_text_bytes = 4 * runner.max_model_len * max(map(len, self.names.vocabulary))
        self.drain_seconds = drain_seconds
        self.draining = False
        self.num_active = 0  # requests being answered

    def check_model(self, name: str) -> None:
        if name not in self.models:
            served = ", ".join(map(repr, self.models))
            raise ApiError(404, f"the model {name[:200]!r} is not served here; try {served}", "model", "model_not_found")

    def check_count(self, num_prompts: int, n: int) -> None:
        """Raise ApiError if a call has more requests than may wait at once. Called before any prompt is tokenized."""
        num_requests, limit = num_prompts * n, self.async_engine.max_waiting
        if num_requests > limit:
            param = "prompt" if n == 1 else "n"
            raise ApiError(400, f"n x prompts is {num_requests}, but a call has at most {limit} requests (--max-waiting); split it into several calls", param)

    def check_text(self, text: str) -> None:
        """Raise RequestError for a text that cannot fit, without tokenizing it. Any thread may call this."""
        num_bytes = len(text.encode())
        if num_bytes > self.max_text_bytes:
            message = f"prompt has {num_bytes} bytes, too many for max_model_len = {self.async_engine.max_model_len}; shorten it"
            raise RequestError(message, "prompt", "context_length_exceeded")

    def max_tokens(self, asked: int | None, default: int | None, num_prompt: int) -> int:
        """Return what the request asked for, or else the smallest of the defaults and the room left in context and cache."""
        if asked:
            return asked
        most = self.async_engine.max_request_len
        if num_prompt >= most:
            message = f"prompt has {num_prompt} tokens, which leave no room for another: together they have at most {most}; shorten it"
            raise RequestError(message, "prompt", "context_length_exceeded")
        # The engine generates at least one token per request; of those for which none was asked, Answer discards it.
        if asked == 0:
            return 1
        return min(limit for limit in (default, self.default_max_tokens, most - num_prompt) if limit is not None)
