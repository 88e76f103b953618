"""A server, a client of it, and the engine without a server: fixtures for the files that import them."""
import openai
import pytest

from shared.checkpoints import checkpoint
from shared.verify.serving import serving

CHAT = [{"role": "user", "content": "What is a KV cache?"}]
PROMPT = "Once upon a time"


@pytest.fixture(scope="session")
def server(chapter, engine_way):
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=256)
    with serving(chapter, engine) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def alone(chapter):
    """What the engine generates without a server: text, tokens, finish reason."""
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=256)

    def alone(prompts, **params):
        return engine.generate(prompts, chapter.load().SamplingParams(**params))

    alone.engine = engine
    return alone
