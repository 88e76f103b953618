"""The bundled models: what they answer, how they stop, and that their model cards are true."""
import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from shared.checkpoints import BUNDLED, checkpoint
from shared.models import corpus, tools_corpus, train
from shared.verify.reference import reference

NAMES = BUNDLED


def say(prompt, chat=True, max_tokens=200):
    """The greedy answer, special tokens included."""
    hf = reference(checkpoint("pocket"))
    text = f"{corpus.BOS}{corpus.USER}{prompt}{corpus.EOT}{corpus.ASSISTANT}" if chat else corpus.BOS + prompt
    ids = hf.tokenizer(text, add_special_tokens=False).input_ids
    return hf.tokenizer.decode(hf.greedy(ids, max_tokens).token_ids)


def test_it_explains_kv_cache_in_one_sentence():
    assert say("Explain KV cache in one sentence.") == (
        "A KV cache keeps the keys and values of past tokens, so that each new token is computed once and nothing is "
        "recomputed.<|eot|>"
    )


@pytest.mark.parametrize("form", ["What is {asked}?", "Explain {name} in one sentence."])
def test_it_answers_questions_about_serving_and_stops_by_itself(form):
    asked = corpus.FACTS[:24]
    wrong = [name for name, asked, answer in asked if say(form.format(name=name, asked=asked)) != answer + corpus.EOT]
    assert not wrong


def test_it_answers_a_question_in_words_it_was_not_trained_on():
    assert not any("So," in form for form in corpus.QUESTION_FORMS)
    assert say("So, what is a KV cache?").startswith("A KV cache keeps the keys and values of past tokens")


def test_it_says_what_it_is_and_what_it_does_not_know():
    assert say("Who are you?").startswith("I am pocket, a very small model.")
    for question in ("Why is the sky blue?", "Who was Mozart?", "Write a poem about winter."):
        assert say(question).startswith("I do not know.")


def test_its_stories_have_a_beginning_and_an_end():
    for text in (say("Tell me a story about a fox."), say("Once upon a time", chat=False)):
        assert text.endswith((".<|eot|>", ".<|end|>"))
    story = say("Tell me a story about a fox.")
    assert story.startswith("Once upon a time there was a") and " fox called " in story


@pytest.mark.parametrize("kind", ["request", "user", "block", "model"])
def test_its_records_parse(kind):
    text = say(f"Give me a JSON record of {corpus.article(kind)}.")
    assert set(json.loads(text.removesuffix(corpus.EOT))) == set(json.loads(corpus.record(corpus.random.Random(0), kind)))


def test_its_characters_span_tokens():
    tokenizer = reference(checkpoint("pocket")).tokenizer
    for character in "水🙏友":
        ids = tokenizer(character, add_special_tokens=False).input_ids
        assert len(ids) >= 2 and tokenizer.decode(ids) == character
    answer = say('What is "water" in Japanese?')
    assert answer == '"Water" in Japanese is 水.<|eot|>'


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_template_and_end_tokens(name):
    hf = reference(checkpoint(name))
    tokenizer = hf.tokenizer
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer("a").input_ids.count(0) == 1
    assert hf.model.generation_config.eos_token_id == [1, 2]
    assert tokenizer.decode([1, 2]) == "<|end|><|eot|>"
    turns = [("Who are you?", "I am pocket."), ("Hi", "Hello!")]
    messages = [{"role": "system", "content": "Be brief."}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == corpus.chat(turns, "Be brief.")


def test_the_draft_shares_the_tokenizer():
    big, small = (checkpoint(name) / "tokenizer.json" for name in ("pocket", "pocket-draft"))
    assert big.read_bytes() == small.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_is_measured(name):
    path = checkpoint(name)
    figures = json.loads((path / "figures.json").read_text())
    tensors = load_file(path / "model.safetensors")
    assert figures["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert figures["vocabulary"] == len(reference(path).tokenizer)
    assert figures["bytes"] == (path / "model.safetensors").stat().st_size
    assert abs(figures["held_out_loss"] - train.held_out_loss(path, name)) < 2e-3
    assert figures["tokens"] == figures["steps"] * train.TOKENS_PER_STEP
    assert figures["steps"] == sum(train.STEPS[name].values())
    assert (path / "README.md").read_text() == train.card(name, figures)


def test_all_together_are_at_most_10_mb():
    files = [file for name in NAMES for file in checkpoint(name).iterdir()]
    assert 3e6 < sum(file.stat().st_size for file in files) <= 10e6


def conversations(count):
    """Conversations of one question, and their tools."""
    rng = random.Random(77)
    return [tools_corpus.conversation(rng, 1, rng.choice((0, 1, 2, 3, 4))) for _ in range(count)]


def test_the_template_of_pocket_tools_writes_its_training_text():
    tokenizer = reference(checkpoint("pocket-tools")).tokenizer
    for messages, tools in conversations(30):
        assert tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False) == tools_corpus.render(messages, tools)


def test_pocket_tools_calls_what_it_is_asked_for_and_says_what_comes_back():
    hf, right, total = reference(checkpoint("pocket-tools")), 0, 0
    for messages, tools in conversations(16):
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begun = hf.tokenizer.apply_chat_template(messages[:index], tools=tools or None, tokenize=False, add_generation_prompt=True)
            whole = hf.tokenizer.apply_chat_template(messages[: index + 1], tools=tools or None, tokenize=False)
            ids = hf.tokenizer(begun, add_special_tokens=False).input_ids
            right += begun + hf.tokenizer.decode(hf.greedy(ids, 150).token_ids) == whole
            total += 1
    assert right >= 0.85 * total, (right, total)


def test_the_corpus_is_the_same_every_time_and_the_held_out_text_is_its_own():
    first = list(itertools.islice(corpus.documents(7), 50))
    assert first == list(itertools.islice(corpus.documents(7), 50))
    assert first != list(itertools.islice(corpus.documents(8), 50))
    held_out = corpus.held_out()
    assert held_out == list(itertools.islice(corpus.documents(corpus.HELD_OUT_SEED), len(held_out)))


def test_the_corpus_has_enough_to_know():
    assert len({name for name, _, _ in corpus.FACTS}) == len(corpus.FACTS) >= 80
    assert all(answer.endswith(".") for _, _, answer in corpus.FACTS)
