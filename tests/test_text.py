"""Text: equal to Hugging Face's decode, in pieces that never split a character, with one BOS."""
import pytest

from shared.checkpoints import RANDOM, checkpoint, make_tokenizer
from shared.verify.reference import reference
from shared.workloads import random_ids

pytestmark = pytest.mark.needs("stream")

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


def pieces(module, tokenizer, token_ids):
    stream = module("text").TextStream(tokenizer)
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


def test_any_tokens_at_all_decode_as_hugging_face_does(chapter, module, rng):
    """Random bytes are mostly no characters. (A byte_level tokenizer: the other's decoder looks at whole runs of bytes.)"""
    tokenizer = make_tokenizer("byte_level")
    for length in (1, 2, 3, 57):
        for _ in range(20):
            token_ids = random_ids(length, len(tokenizer), rng)
            want = tokenizer.decode(token_ids, skip_special_tokens=True)
            assert "".join(pieces(module, tokenizer, token_ids)) == want


# A decoder with byte fallback calls a whole run of bytes broken for one bad byte, also those that made a character when
# they were streamed. A random model produces such runs; no text encodes to one.
@pytest.mark.parametrize("name", ["pocket", *(name for name, spec in RANDOM.items() if spec.tokenizer == "byte_level")])
def test_completion_text_is_hugging_faces_decode(make_engine, name, Params, rng):
    engine, hf = make_engine(name), reference(checkpoint(name))
    prompt_ids = random_ids(9, engine.config.vocab_size, rng)
    [out] = engine.generate([prompt_ids], Params(max_tokens=40))
    kept = out.token_ids[:-1] if out.finish_reason == "stop" else out.token_ids
    assert out.text == hf.tokenizer.decode(kept, skip_special_tokens=True)


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
    for token_id in tokenizer("the cache 🙂 " * 100, add_special_tokens=False).input_ids:
        stream.push([token_id], last=False)
    assert len(stream.token_ids) > 500
    assert longest <= 9


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 1 + '' }}"],
)
def test_a_template_that_raises_refuses_the_messages(module, template):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the checkpoint's chat template refuses these messages: "):
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
