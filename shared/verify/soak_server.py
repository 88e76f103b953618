"""Test a server with many clients at once, with clients that disconnect, and with thousands of requests.

    python -m shared.verify.soak_server       # the last chapter with a server: minutes
"""
import asyncio
import gc
import random
import time

import httpx

from shared.chapters import last_with
from shared.checkpoints import checkpoint
from shared.programs import run, take_no_arguments
from shared.verify.serving import serving, wait_until

NAMES = ("Rosa", "Otto", "Mia", "Kim", "Ada", "Nino", "Lea", "Tom")
ANIMALS = ("hare", "fox", "owl", "cat", "frog", "bear", "swan", "mole")
CHAT = [{"role": "user", "content": "What is a KV cache?"}]


def is_idle(server) -> bool:
    """Whether /health reports that no request is running or waiting and that every block is free."""
    state = httpx.get(f"{server.url}/health", timeout=5).json()
    return not state["running"] and not state["waiting"] and state["free_blocks"] == state["total_blocks"]


def audit(server, engine) -> None:
    """Wait until the server is idle; AssertionError if it does not become idle, or if server or engine still hold a request."""
    service = server.service
    wait_until(lambda: is_idle(server) and not getattr(service, "num_active", 0))
    assert not engine.has_unfinished_requests()
    assert not service.async_engine.active_generations
    # With an engine process, the engine loop is not in this process.
    engine_loop = getattr(service.async_engine.runner, "engine_loop", None)
    assert engine_loop is None or not engine_loop.owners
    assert not getattr(service.async_engine, "unanswered", None)


def crowd(chapter, engine, count: int, max_tokens: int = 30) -> int:
    """Run `count` streams at once; the number of tokens.

    Raises:
        AssertionError: if a stream's text differs from what its prompt generates alone.
    """
    prompts = [f"{NAMES[i % 8]} was a {ANIMALS[i // 8 % 8]}" for i in range(count)]
    Params = chapter.load().SamplingParams
    all_params = [Params(max_tokens=max_tokens, seed=i, temperature=0.8) for i in range(count)]
    expected = [engine.generate([prompt], params)[0] for prompt, params in zip(prompts, all_params)]

    async def text_of(client, i):
        body = {"model": "pocket", "prompt": prompts[i], "max_tokens": max_tokens, "seed": i, "temperature": 0.8}
        stream = await client.completions.create(**body, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them(url):
        import openai

        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(text_of(client, i) for i in range(count)))

    with serving(chapter, engine) as server:
        for prompt, got, alone in zip(prompts, asyncio.run(all_of_them(server.url)), expected, strict=True):
            assert got == alone.text, f"{prompt!r} among {count} streams: {got!r}, alone: {alone.text!r}"
        audit(server, engine)
    return sum(len(alone.token_ids) for alone in expected)


def leave(chapter, engine, count: int, seed: int) -> dict[str, int]:
    """Run `count` clients with different kinds of requests, many of which disconnect at a random moment; how many left and stayed.

    Raises:
        AssertionError: if server or engine still hold any of their requests afterward.
    """
    rng, how, doors = random.Random(seed), {"left": 0, "stayed": 0}, asyncio.Semaphore(12)

    async def one(client, url):
        bodies = [("/v1/completions", {"prompt": "Once upon a time", "ignore_eos": True})]
        if "openai" in chapter.capabilities:
            bodies.append(("/v1/completions", {"prompt": "Once upon a time", "ignore_eos": True, "n": rng.randint(1, 3)}))
            bodies.append(("/v1/chat/completions", {"messages": CHAT, "ignore_eos": True}))
        if "responses" in chapter.capabilities:
            bodies.append(("/v1/responses", {"input": "Hi", "background": rng.random() < 0.2}))
        path, body = rng.choice(bodies)
        body |= {"model": "pocket", "stream": rng.random() < 0.6 and not body.get("background")}
        body |= {"max_output_tokens" if path.endswith("responses") else "max_tokens": rng.randint(1, 60)}
        async with doors:
            try:
                await asyncio.wait_for(client.post(f"{url}{path}", json=body), rng.uniform(0.005, 0.8))
                how["stayed"] += 1
            except (asyncio.TimeoutError, httpx.HTTPError):
                how["left"] += 1

    async def all_of_them(url):
        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(one(client, url) for _ in range(count)))

    with serving(chapter, engine) as server:
        asyncio.run(all_of_them(server.url))
        audit(server, engine)
        body = {"model": "pocket", "prompt": "Once", "max_tokens": 2, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).json()
        assert answer["usage"]["completion_tokens"] == 2
    return how


def resident_mib() -> float:
    """This process's resident memory, in MiB; Linux only."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def keep_coming(chapter, engine, count: int) -> list[float]:
    """Send `count` requests, a few at a time; the memory of the process after each tenth of them, in MiB."""
    memory = []

    more = {"logprobs": 2} if "openai" in chapter.capabilities else {}

    async def some(client, url, number):
        bodies = [{"model": "pocket", "prompt": f"{i} hares", "max_tokens": 4, "stream": i % 2 == 0} | more for i in range(number)]
        for start in range(0, number, 8):
            answers = await asyncio.gather(
                *(client.post(f"{url}/v1/completions", json=body) for body in bodies[start:start + 8])
            )
            assert all(answer.status_code == 200 for answer in answers)

    async def all_of_them(url):
        async with httpx.AsyncClient(timeout=60) as client:
            for _ in range(10):
                await some(client, url, count // 10)
                gc.collect()
                memory.append(round(resident_mib(), 1))

    with serving(chapter, engine) as server:
        asyncio.run(all_of_them(server.url))
        audit(server, engine)
    return memory


def main(argv: list[str]) -> int:
    take_no_arguments(argv, "shared.verify.soak_server", __doc__)
    chapter = last_with("serve")
    engine = chapter.load().Engine(checkpoint("pocket"), device="cpu", max_num_seqs=64, max_model_len=512)
    start = time.perf_counter()
    print(f"{chapter.id}: 64 streams at once generate the same text as alone: {crowd(chapter, engine, 64)} tokens")
    print(f"{chapter.id}: 500 clients, many of which disconnect, leave no request behind: {leave(chapter, engine, 500, seed=1)}")
    memory = keep_coming(chapter, engine, 2000)
    print(f"{chapter.id}: memory of the process in MiB over 2,000 requests: {memory}")
    # Pools and caches fill during the first tenth.
    grown = memory[-1] - memory[1]
    print(f"{chapter.id}: {grown:+.1f} MiB since the second tenth; {time.perf_counter() - start:.0f} s in total")
    return 0 if grown < 8 else 1


if __name__ == "__main__":
    run(main)
