"""Text: equal to Hugging Face's decode, in pieces that never split a character, with one BOS."""
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shared.checkpoints import RANDOM, checkpoint, make_tokenizer
from shared.verify.reference import reference
from shared.workloads import random_ids

pytestmark = pytest.mark.needs("stream")

BYTES = bytes_to_unicode()
TEXTS = (
    "The cache, and then  two spaces; a café.",
    "日本語 και русский",
    "👩‍🚀 and 🙂🙂",
    "\n\ttabs\n",
    " leading",
    "!",
)


@pytest.fixture(params=["byte_level", "metaspace"])
def tokenizer(request):
    return make_tokenizer(request.param)


def pieces(module, tokenizer, token_ids, prompt_ids=None):
    stream = module("text").TextStream(tokenizer, prompt_ids)
    out = [stream.push([token_id], last=i == len(token_ids) - 1) for i, token_id in enumerate(token_ids)]
    assert "".join(out) == stream.text
    return out


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(chapter, module, tokenizer, text):
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    out = pieces(module, tokenizer, token_ids)
    assert "".join(out) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in out), "a character was split"


def test_a_character_of_four_bytes_arrives_with_its_last_token(chapter, module, tokenizer):
    token_ids = tokenizer("a🙂", add_special_tokens=False).input_ids
    out = pieces(module, tokenizer, token_ids)
    assert out[-1] == "🙂" and out[-4:-1] == ["", "", ""]


def test_a_text_that_ends_inside_a_character_shows_so_at_the_end(chapter, module, tokenizer):
    token_ids = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    out = pieces(module, tokenizer, token_ids)
    assert "".join(out) == tokenizer.decode(token_ids)
    assert out[-1].startswith("\ufffd") and not any(out[-3:-1])


def some_ids(tokenizer, rng, length):
    """Tokens of every kind, in runs: words, bytes, whole characters in bytes, special tokens and unknown ids."""
    kinds = {
        "bytes": lambda: rng.choices([*byte_ids(tokenizer, bytes(range(256)))], k=rng.randrange(1, 6)),
        "characters": lambda: byte_ids(tokenizer, rng.choice(["é", "日", "🙂", "\n", " a", "\ufffd", "日本語"]).encode()),
        "words": lambda: tokenizer(rng.choice([" The cache", "  two", "é 🙂", "a", "the queue, and"]), add_special_tokens=False).input_ids,
        "special": lambda: [rng.choice(tokenizer.all_special_ids)],
        "absent": lambda: [len(tokenizer) + rng.randrange(9)],
        "any": lambda: random_ids(3, len(tokenizer), rng),
    }
    ids = []
    while len(ids) < length:
        ids += kinds[rng.choice(list(kinds))]()
    return ids[:length]


def every_tokenizer():
    """One for each decoder that `tokenizers` has for language models."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    yield "byte_level", make_tokenizer("byte_level")
    yield "metaspace", make_tokenizer("metaspace")
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    for name, decoder, words in (
        ("fallback that keeps the first space", decoders.Sequence(fallback), ["▁two", "▁", "▁▁x", "日", "\ufffd", *byte_names]),
        ("Metaspace", decoders.Metaspace(), ["▁two", "▁", "日", "<0xE2>", "<0xFF>", "<0x41>"]),
        ("WordPiece", decoders.WordPiece(), ["two", "##ing", "日", ".", "'s"]),
        ("BPEDecoder", decoders.BPEDecoder(), ["two</w>", "tw", "日</w>"]),
        ("none", None, ["two", "日", "▁", "<0xFF>", "<0x80>"]),
        ("byte_level with words", decoders.ByteLevel(), ["Ġtwo", "日", "<0xFF>", "ï¿½", "â", "Ĥ"]),
    ):
        vocabulary = {word: i for i, word in enumerate(["<unk>", "a", "b", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        if decoder is not None:
            tokenizer.decoder = decoder
        tokenizer.add_tokens(["語", AddedToken(" added", normalized=False)])
        tokenizer.add_special_tokens(["<s>", "<｜end▁of▁text｜>"])
        yield name, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(("name", "tokenizer"), [pytest.param(*each, id=each[0]) for each in every_tokenizer()])
def test_any_tokens_in_any_steps_after_any_prompt_add_what_hugging_face_adds(chapter, module, rng, name, tokenizer):
    has_bytes = name in ("byte_level", "metaspace")
    compared = 0
    for trial in range(150):
        make = some_ids if has_bytes else lambda tokenizer, rng, length: random_ids(length, len(tokenizer) + 2, rng)
        prompt_ids = make(tokenizer, rng, rng.choice([0, 1, 2, 5, 30]))
        token_ids = make(tokenizer, rng, rng.choice([1, 2, 3, 9, 57]))
        prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        whole = tokenizer.decode(prompt_ids + token_ids, skip_special_tokens=True)
        stream = module("text").TextStream(tokenizer, prompt_ids)
        out, rest = [], list(token_ids)
        while rest:
            size = rng.choice([1, 1, 1, 2, 5])
            step, rest = rest[:size], rest[size:]
            out.append(stream.push(step, last=not rest))
        # If the output completes a character of the prompt, the prompt's text does not begin the whole text.
        if whole.startswith(prompt):
            compared += 1
            assert "".join(out) == stream.text == whole[len(prompt) :], (prompt_ids, token_ids)
    assert compared > 100


def byte_ids(tokenizer, data):
    """One token per byte."""
    ids = tokenizer.convert_tokens_to_ids
    has_fallback = ids("<0x00>") not in (None, tokenizer.unk_token_id)
    return ids([f"<0x{byte:02X}>" if has_fallback else BYTES[byte] for byte in data])


def decoded_lengths(monkeypatch, module):
    """The number of tokens passed to each call of `decode` from now on."""
    lengths = []
    decode = module("text").TextStream.decode
    monkeypatch.setattr(module("text").TextStream, "decode", lambda stream, ids: lengths.append(len(ids)) or decode(stream, ids))
    return lengths


@pytest.mark.parametrize("head", [b"", b"a", b"\x80"])
@pytest.mark.parametrize("lone", [b"\x80", b"\xc3", b"\xe2", b"\xe2\x82", b"\xf0\x9f", b"\xf0\x9f\x99", b"\xff", "\ufffd".encode()])
@pytest.mark.parametrize("tail", [b"", b"z", b"\xe2", "€".encode(), "🙂".encode() * 9])
def test_a_run_of_broken_bytes_arrives_in_pieces_and_costs_the_same_per_token(
    chapter, module, tokenizer, monkeypatch, head, lone, tail
):
    """It used to be decoded as a whole for each token, and shown only at its end."""
    lengths = decoded_lengths(monkeypatch, module)
    before, run, after = (byte_ids(tokenizer, data) for data in (head, lone * 60, tail))
    out = pieces(module, tokenizer, before + run + after)
    shown, want = "".join(out), tokenizer.decode(before + run + after, skip_special_tokens=True)
    # A byte-fallback decoder retracts the characters of a run before a broken byte; text that was sent stays.
    if not (lone == "\ufffd".encode() and "<0x00>" in tokenizer.get_vocab()):
        assert shown == want
    in_run = out[len(before) : len(before) + len(run)]
    waits = 40 if lone == "\ufffd".encode() else 6
    assert all(any(in_run[i : i + waits]) for i in range(len(run) - waits))
    assert sum(lengths) <= 40 * len(out)


def test_a_long_run_of_whole_characters_arrives_in_pieces(chapter, module, tokenizer, monkeypatch):
    """A language without tokens in the vocabulary is written in bytes."""
    lengths = decoded_lengths(monkeypatch, module)
    token_ids = byte_ids(tokenizer, "ภาษาไทยไม่มีช่องว่าง\n🙂é".encode() * 20)
    for behind in ([], tokenizer(" the").input_ids):
        out = pieces(module, tokenizer, behind + token_ids)
        assert "".join(out) == tokenizer.decode(behind + token_ids, skip_special_tokens=True)
        assert all(any(out[i : i + 40]) for i in range(len(out) - 40)) and sum(lengths) <= 80 * len(out)


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize(("character", "count"), [("\u00e9", 16), ("\u1230", 11), ("\u1230", 22), ("\U0001f642", 8), ("\U0001f642", 16)])
def test_what_is_broken_after_a_long_run_is_all_that_is_replaced(chapter, module, tokenizer, character, count, size):
    """The last characters of the run used to be decoded again with what followed, and counted twice."""
    words, broken = tokenizer(" the", add_special_tokens=False).input_ids, byte_ids(tokenizer, character.encode()[:-1])
    for before in ([], words):
        whole = before + byte_ids(tokenizer, (character * count).encode())
        for after in ([], words, words * 9):
            text, ids = tokenizer.decode(whole), whole + broken + after
            stream = module("text").TextStream(tokenizer)
            out = [stream.push(ids[i : i + size], last=i + size >= len(ids)) for i in range(0, len(ids), size)]
            assert "".join(out) == stream.text == text + tokenizer.decode(broken) + tokenizer.decode(whole + after)[len(text) :]


def test_what_looks_broken_for_a_while_may_still_become_a_character(chapter, module, tokenizer):
    """Whichever byte of a character ends the run before it."""
    for bytes_before in range(4, 40):
        token_ids = byte_ids(tokenizer, b"\x80" * bytes_before + "🙂 €é".encode())
        out = pieces(module, tokenizer, token_ids)
        assert "".join(out) == tokenizer.decode(token_ids, skip_special_tokens=True)
        assert all(piece == "" or piece == "\ufffd" * len(piece) for piece in out[:bytes_before])


def test_special_tokens_and_unknown_ids_are_skipped_wherever_they_are(chapter, module, tokenizer, rng):
    """After one, the space used to be lost with tokenizers that drop the first."""
    words = tokenizer(" The cache, the queue; a token 🙂 was there").input_ids
    textless = [*tokenizer.all_special_ids, len(tokenizer), len(tokenizer) + 7]
    for count in (1, 2, 9):
        for _ in range(20):
            token_ids = list(words)
            for token_id in rng.choices(textless, k=count):
                token_ids.insert(rng.randrange(len(token_ids) + 1), token_id)
            assert "".join(pieces(module, tokenizer, token_ids)) == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_all_special_tokens_are_looked_at_once(module, tokenizer, monkeypatch):
    """A checkpoint may have a thousand, and each request a stream of its own."""
    looked_at, added = [], type(tokenizer).added_tokens_decoder
    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", property(lambda self: looked_at.append(self) or added.fget(self)))
    streams = [module("text").TextStream(tokenizer) for _ in range(4)]
    assert len(looked_at) == 1 and all(stream.special_ids >= set(tokenizer.all_special_ids) for stream in streams)


def test_a_run_of_special_tokens_within_a_character_costs_the_same_per_token(chapter, module, tokenizer, monkeypatch):
    lengths = decoded_lengths(monkeypatch, module)
    first, *others = byte_ids(tokenizer, "🙂".encode())
    out = pieces(module, tokenizer, [first, *[tokenizer.eos_token_id] * 50, *others])
    assert "".join(out) == "🙂" and max(lengths) <= 4


@pytest.mark.parametrize("text", [*TEXTS, "The cache keeps what the engine has seen", "日 日 🙂 🙂 é é", "  a   b", "a \ufffd b"])
def test_a_completion_continues_its_prompt(chapter, module, tokenizer, text):
    """Wherever it begins, its text is what Hugging Face decodes of the whole after the text of the prompt."""
    token_ids = tokenizer(text).input_ids
    for split in range(1, len(token_ids)):
        prompt_ids, output_ids = token_ids[:split], token_ids[split:]
        prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        if prompt.endswith("\ufffd"):
            continue
        for textless in ([], [tokenizer.eos_token_id], [tokenizer.eos_token_id, len(tokenizer)] * 3):
            out = pieces(module, tokenizer, output_ids, prompt_ids + textless)
            assert prompt + "".join(out) == tokenizer.decode(token_ids, skip_special_tokens=True)
        alone = pieces(module, tokenizer, output_ids)
        assert "".join(alone) == tokenizer.decode(output_ids, skip_special_tokens=True)


def test_of_a_long_prompt_only_the_end_is_decoded(chapter, module, tokenizer, monkeypatch):
    lengths = decoded_lengths(monkeypatch, module)
    prompt_ids = tokenizer("The cache, the queue " * 1000).input_ids + [tokenizer.eos_token_id] * 1000
    for end in ([], byte_ids(tokenizer, "é".encode()), byte_ids(tokenizer, b"\x80" * 1000)):
        module("text").TextStream(tokenizer, prompt_ids + end)
    assert len(lengths) <= 3 and max(lengths) <= 64


@pytest.mark.parametrize("name", ["pocket", "mistral"])
def test_the_engine_continues_a_prompt_and_begins_a_new_text(make_engine, name, Params, monkeypatch):
    """Llama 2's and Mistral's completions used to lose their first space."""
    engine = make_engine(name)
    token_ids = engine.tokenizer("The cache keeps what the engine has seen").input_ids
    decode = engine.tokenizer.decode
    for split in range(1, len(token_ids)):
        prompt_ids, output_ids = token_ids[:split], token_ids[split:]
        ids = iter([*output_ids, *output_ids])
        monkeypatch.setattr(engine.model, "compute_logits", lambda hidden: one_hot(hidden, next(ids), engine.config.vocab_size))
        [continued] = engine.generate([prompt_ids], Params(max_tokens=len(output_ids), ignore_eos=True))
        [new] = engine.generate([prompt_ids], Params(max_tokens=len(output_ids), ignore_eos=True, new_text=True))
        assert continued.token_ids == new.token_ids == output_ids
        assert decode(prompt_ids, skip_special_tokens=True) + continued.text == decode(token_ids, skip_special_tokens=True)
        assert new.text == decode(output_ids, skip_special_tokens=True)


def one_hot(hidden, token_id, vocab_size):
    import torch

    logits = torch.zeros(len(hidden), vocab_size)
    logits[:, token_id] = 1.0
    return logits


def test_the_small_tokenizer_with_spaces_in_its_words_resembles_llama_2s():
    """With only four such tokens of 391, it used to hide every lost space."""
    words = [name for name in make_tokenizer("metaspace").get_vocab() if not name.startswith("<") and len(name) > 1]
    assert len([name for name in words if name.startswith("▁")]) >= len(words) / 3
    assert make_tokenizer("metaspace").tokenize("the cache, and 2 of it")[0] == "▁the"


@pytest.mark.parametrize("name", ["pocket", *RANDOM])
def test_completion_text_is_hugging_faces_decode(make_engine, name, Params, rng):
    engine, hf = make_engine(name), reference(checkpoint(name))
    for prompt_ids in (hf.tokenizer("The cache").input_ids, random_ids(9, engine.config.vocab_size, rng)):
        [out] = engine.generate([prompt_ids], Params(max_tokens=40))
        kept = out.token_ids[:-1] if out.finish_reason == "stop" else out.token_ids
        prompt = hf.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        whole = hf.tokenizer.decode(prompt_ids + kept, skip_special_tokens=True)
        # Random ids may end within a character.
        if whole.startswith(prompt) or prompt_ids[0] == hf.tokenizer.bos_token_id:
            assert out.text == whole[len(prompt) :]
        [new] = engine.generate([prompt_ids], Params(max_tokens=40, new_text=True))
        assert new.text == hf.tokenizer.decode(kept, skip_special_tokens=True)


def test_decoding_looks_at_a_window_however_long_the_text(chapter, module):
    tokenizer = make_tokenizer("byte_level")
    stream = module("text").TextStream(tokenizer)
    longest = 0
    decode = stream.decode

    def watched(token_ids):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids)

    stream.decode = watched
    token_ids = tokenizer("the cache 🙂 " * 100, add_special_tokens=False).input_ids
    for token_id in token_ids:
        stream.push([token_id], last=False)
    assert len(token_ids) > 500
    assert longest <= 24


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 1 + '' }}"],
)
def test_a_template_that_raises_refuses_the_messages(module, template):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the checkpoint's chat template rejects these messages: "):
        module("text").encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])


def test_a_chat_without_a_template_is_refused(module):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="this checkpoint has no chat template; send the prompt as plain text"):
        module("text").encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("name", ["pocket", *RANDOM])
def test_there_is_one_bos_raw_and_in_a_chat(chapter, make_engine, module, Params, name):
    engine = make_engine(name)
    tokenizer = reference(checkpoint(name)).tokenizer
    [out] = engine.generate(["The cache"], Params(max_tokens=1))
    chat = module("text").encode_chat(tokenizer, [{"role": "user", "content": "The cache"}])
    for prompt_ids in (out.prompt_ids, chat):
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert prompt_ids.count(tokenizer.bos_token_id) == 1
    assert chat == tokenizer.apply_chat_template(
        [{"role": "user", "content": "The cache"}], add_generation_prompt=True, return_dict=False
    )
