"""The engine, settings and checks that the endpoints share."""
from .async_engine import AsyncEngine
from .engine_thread import EngineThread
from .errors import ApiError
from .protocol import now


class Service:
    """An engine, and what its server offers. Call it from the event loop's thread, unless a method says otherwise."""

    def __init__(
        self,
        runner: EngineThread,
        model_name: str,
    ):
        self.async_engine = AsyncEngine(runner)
        self.models = [model_name]
        self.started = now()

    def check_model(self, name: str) -> None:
        if name not in self.models:
            served = ", ".join(map(repr, self.models))
            raise ApiError(404, f"the model {name[:200]!r} is not served here; try {served}", "model", "model_not_found")
