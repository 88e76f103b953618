"""v08: OpenAI's API, complete or refused by name."""
import asyncio
import filecmp
import json
import time
from types import SimpleNamespace

import pytest

from shared.checkpoints import checkpoint
from shared.verify.serving import serving
from tests.support.http import HTTP

CHAT = [{"role": "user", "content": "Hello!"}]


@pytest.mark.until("v09")
def test_the_model_and_its_cache_are_the_last_chapters(chapter):
    names = ["attention.py", "backends.py", "cache.py", "config.py", "layers.py", "loader.py", "model.py", "scheduler.py"]
    names += ["kernels/__init__.py", "kernels/paged_attention.py"]
    for name in names:
        assert filecmp.cmp(chapter.path / name, chapter.previous.path / name, shallow=False), name


def test_a_whole_answer_is_written_as_it_arrives_and_in_turns(chapter, module, monkeypatch):
    """Written all at once at its end, a large one blocked the event loop for seconds."""
    written, pauses = [], []

    class Names(module("names").TokenNames):
        def of_chat(self, *args):
            written.append(1)
            return super().of_chat(*args)

    async def generation():
        for i in range(50):
            yield 0, module("outputs").StepOutput(1, i % 3, "x", {i % 3: -1.0}, "length" if i == 49 else None, offset=i)
            assert len(written) == i + 1

    async def pause(_seconds):
        pauses.append(len(written))

    metrics = SimpleNamespace(add_parts=lambda *_numbers: None)
    service = SimpleNamespace(names=Names([b"x"] * 3, set()), async_engine=SimpleNamespace(metrics=metrics))
    body = module("protocol").ChatRequest(model="m", messages=CHAT, logprobs=True)
    answers = module("answers")
    answer = answers.PartedAnswer(0, module("parts").Parts(), str) if "tools" in chapter.capabilities else answers.Answer(0)
    writer = module("chat").ChatWriter(service, body, generation(), [answer], 1)

    async def whole():
        response = await writer.whole()
        return response, "".join([part async for part in response.body_iterator])

    response, text = asyncio.run(whole())
    assert len(text) == int(response.headers["content-length"])
    [choice] = json.loads(text)["choices"]
    assert choice["message"]["content"] == "x" * 50 and len(choice["logprobs"]["content"]) == 50
    assert written == [1] * 50
    # Work that takes longer than a turn lets other tasks run.
    async_engine = module("async_engine")
    monkeypatch.setattr(async_engine, "LONGEST_TURN_S", -1.0)
    monkeypatch.setattr(asyncio, "sleep", pause)

    async def read():
        async for _ in async_engine.paced(range(7)):
            pass
        reader = async_engine.Generation(None, 1, 1)
        for item in (*((0, i) for i in range(5)), None):
            reader.outputs.put_nowait(item)
        return [item async for item in reader]

    assert len(asyncio.run(read())) == 5 and len(pauses) == 12


@pytest.mark.until("v11")
def test_without_max_tokens_the_whole_context_is_reserved(chapter, make_engine):
    """Of 64 requests at once, 8 (1,024 / 128 blocks) run together; with at most 256 tokens each, 60 do."""
    engine = make_engine("pocket", num_blocks=1024, max_num_seqs=64)
    for default, together in ((None, 8), (256, 60)):
        with serving(chapter, engine, default_max_tokens=default) as server:
            most = []
            schedule = engine.scheduler.schedule

            def counted(schedule=schedule, most=most):
                seqs = schedule()
                most.append(len(seqs))
                return seqs

            engine.scheduler.schedule = counted
            # All 64 answers of one call are queued before the next step.
            body = {"model": "pocket", "messages": CHAT, "n": 64, "temperature": 0}
            assert HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
            engine.scheduler.schedule = schedule
            assert max(most) == together


@pytest.mark.parametrize("default", [None, 500])
def test_without_max_tokens_an_answer_takes_what_the_cache_has_for_it(chapter, default):
    """A max_model_len beyond the cache used to refuse each call that names no length."""
    engine = chapter.load().Engine(checkpoint("pocket"), num_blocks=8, block_size=16, max_model_len=1000)
    with serving(chapter, engine, default_max_tokens=default) as server:
        body = {"model": "pocket", "messages": CHAT, "temperature": 0, "ignore_eos": True}
        answer = HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 8 * 16 + 1


def test_offsets_are_found_in_one_pass(module, make_engine):
    """Decoding everything before each token would take minutes for a long prompt, on the event loop."""
    tokenizer = make_engine("pocket").tokenizer
    names = module("names").TokenNames(module("text").vocabulary_bytes(tokenizer), set(tokenizer.all_special_ids))
    text = "日本語 é 🙂 Once"
    ids = tokenizer(text).input_ids
    first = [len(b"".join(names.bytes_of(each) for each in ids[1:i]).decode(errors="ignore")) for i in range(1, len(ids))]
    assert names.offsets(ids) == [0, *first]
    begun = time.thread_time()
    names.offsets(ids * 2000)
    assert time.thread_time() - begun < 1


def decoders_and_words():
    """A vocabulary for each decoder that `tokenizers` has for language models."""
    from tokenizers import decoders

    llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    yield decoders.ByteLevel(), ["日本", "Ġ日", "Ġthe", "ÃŃ", "Ã", "aé", "ï¿½", "Ġâ", "<0xE2>", "▁a"]
    yield decoders.Sequence([*llama, decoders.Strip(" ", 1, 0)]), ["▁two", "▁", "▁▁x", "日", "\ufffd", "<0x77>", "<0xE2>", "<0xe2>", "Ġ"]
    yield decoders.Sequence(llama), ["▁two", "▁", "日", "<0xFF>"]
    yield decoders.Metaspace(), ["▁two", "▁", "日", "<0xE2>"]
    yield decoders.WordPiece(), ["two", "##ing", "日", "▁"]
    yield decoders.BPEDecoder(), ["two</w>", "tw", "日</w>"]
    yield None, ["two", "日", "▁"]


@pytest.mark.parametrize(("decoder", "words"), list(decoders_and_words()))
def test_a_tokens_bytes_are_what_hugging_face_decodes_for_it(module, decoder, words):
    """A byte-level vocabulary with a plain-text token used to crash the server with a KeyError."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "a", "b", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens(["語", AddedToken(" added", normalized=False)])
    tokenizer.add_special_tokens(["<s>", "<｜end▁of▁text｜>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)
    found = module("text").vocabulary_bytes(tokenizer)
    assert len(found) == len(tokenizer)
    for token_id, raw in enumerate(found):
        assert raw.decode(errors="replace") == tokenizer.decode([1, token_id])[len(tokenizer.decode([1])) :]
    # Tokens that decode to U+FFFD are told apart by their bytes.
    spelled = {word: found[token_id] for word, token_id in vocabulary.items()}
    if "Ã" in words:
        assert [spelled[word] for word in ("Ã", "Ġâ", "aé", "ï¿½", "日本")] == [b"\xc3", b" \xe2", b"a\xe9", b"\xef\xbf\xbd", "日本".encode()]
    if "<0x77>" in words:
        assert [spelled[word] for word in ("<0x77>", "<0xE2>", "\ufffd")] == [b"w", b"\xe2", b"\xef\xbf\xbd"]


@pytest.mark.parametrize("name", ["pocket", "llama", "mistral"])
@pytest.mark.parametrize("text", ["The cache keeps what was there", " leading", "  two", "é 🙂 日本", "a", ""])
def test_offsets_are_lengths_of_what_hugging_face_decodes(module, make_engine, name, text):
    """With a tokenizer like Llama 2's, all but the first used to be one too high."""
    tokenizer = make_engine(name).tokenizer
    vocabulary = module("text").vocabulary_bytes(tokenizer)
    drops_space = module("text").drops_first_space(tokenizer, vocabulary)
    assert drops_space == (name == "mistral")
    names = module("names").TokenNames(vocabulary, set(tokenizer.all_special_ids), drops_space)
    token_ids = tokenizer(text).input_ids
    for i, offset in enumerate(names.offsets(token_ids)):
        before = tokenizer.decode(token_ids[:i], skip_special_tokens=True)
        assert offset == len(before) or before.endswith("\ufffd")


def test_tokens_with_one_text_keep_their_logprobs(module):
    """The lower one used to overwrite the chosen token's."""
    names = module("names").TokenNames([b"w", b"w", b"x", b"w", b"", b"\xe2", b"\xe2"], set())
    logprobs = {0: -0.08, 1: -3.08, 2: -4.0, 3: -5.0, 4: -6.0, 5: -7.0, 6: float("-inf"), 9: -8.0}
    for chosen in logprobs:
        for order in (list(logprobs), list(logprobs)[::-1]):
            tops = names.by_text(chosen, {token_id: logprobs[token_id] for token_id in order})
            assert len(tops) == len(logprobs)
            assert tops[names.text_of(chosen)] == max(logprobs[chosen], -9999.0)
            if chosen == 0:
                assert tops == {
                    "w": -0.08, "token_id:1": -3.08, "x": -4.0, "token_id:3": -5.0,
                    "": -6.0, "token_id:9": -8.0, "bytes:\\xe2": -7.0, "token_id:6": -9999.0,
                }  # fmt: skip
            if chosen == 3:
                assert (tops["w"], tops["token_id:0"], tops["token_id:1"]) == (-5.0, -0.08, -3.08)


def test_a_vocabulary_may_have_holes_in_its_numbers(module):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from shared.checkpoints import make_tokenizer

    state = json.loads(make_tokenizer("byte_level").backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    moved = next(name for name in vocabulary if name.startswith("Ġ") and len(name) > 3 and vocabulary[name] == max(vocabulary.values()))
    vocabulary[moved] += 40
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    found = module("text").vocabulary_bytes(tokenizer)
    assert found[vocabulary[moved]] == moved.replace("Ġ", " ").encode() and found[vocabulary[moved] - 1] == b""
