import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.encoding import (
    IGNORED,
    Collator,
    Encoded,
    EncodedDataset,
    answer_ids,
    encode,
    encode_all,
    labelled_text,
    prompt_ids,
)
from gradpruner.data.examples import Example, Message
from gradpruner.data.loading import load_examples
from gradpruner.data.tasks import TASKS

CORPUS = [
    "What is the sentiment of this news? Answer: positive",
    "Answer: negative or neutral. 2 + 2 = 4. Hello, how are you?",
] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the reasoning mark only in the last turn, as some reasoning models do.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}(thought) {% endif %}"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens a thought in the generation prompt, but does not write it in the finished turn.
DIVERGING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>thought\n{% endif %}")
UNCLOSED = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{{ raise_exception('System role not supported') }}"
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(*, bos=True, eos=True, pad=True, template=None, closes=False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if closes else "<s> $A",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    return wrapped(tokenizer, bos=bos, eos=eos, pad=pad, template=template)


def sentence_piece_like(*, prepends: bool) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that puts a space before every text; with `prepends`, also before a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if prepends:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, bos=False)


def word_level() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["[UNK]", "yes", "no", "is", "it", "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def wrapped(tokenizer, *, bos=True, eos=True, pad=True, template=None) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    names["pad_token"] = "<pad>" if pad else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        **{name: token for name, token in names.items() if token},
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(template=CHATML)


def learned(tokenizer, encoded: Encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def chat(*contents: str, system: str | None = None) -> Example:
    messages = [Message("system", system)] if system else []
    for index, content in enumerate(contents):
        messages.append(Message("assistant" if index % 2 else "user", content))
    return Example("c:1", "", messages[-1].content, messages=tuple(messages))


SUM = Example("a:1", "2 + 2 =", " 4", (" 4", " 5"))

# Prompt and answer


def test_plain_example_is_start_prompt_answer_end(tokenizer):
    encoded = encode(tokenizer, SUM, 100)
    prompt, answer = prompt_ids(tokenizer, SUM), answer_ids(tokenizer, " 4")
    assert prompt[0] == tokenizer.bos_token_id
    assert encoded.input_ids == [*prompt, *answer, tokenizer.eos_token_id]
    assert encoded.labels == [IGNORED] * len(prompt) + [*answer, tokenizer.eos_token_id]
    assert encoded.num_supervised == len(answer) + 1
    assert (encoded.cut_prompt_tokens, encoded.cut_answer_tokens) == (0, 0)


def test_spacing_of_the_tasks_is_natural_for_byte_level_vocabularies(tokenizer):
    rows = json.loads(Path(__file__).parents[1].joinpath("task_rows.json").read_text(encoding="utf-8"))
    for name in TASKS.names():
        for example in TASKS.find(name).examples(rows[name], "train"):
            apart = prompt_ids(tokenizer, example) + answer_ids(tokenizer, example.answer)
            assert apart == tokenizer.encode(example.prompt + example.answer)


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(max_size=60), answer=st.text(min_size=1, max_size=60))
def test_what_is_learned_is_the_answer(tokenizer, prompt, answer):
    for special in SPECIAL:
        prompt, answer = prompt.replace(special, ""), answer.replace(special, "")
    encoded = encode(tokenizer, Example("x", prompt, answer), 10_000)
    assert learned(tokenizer, encoded) == answer + "</s>"
    assert len(encoded.input_ids) == len(encoded.labels)
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORED, token)


def test_tokenizer_without_end_token():
    tokenizer = byte_level(bos=False, eos=False)
    encoded = encode(tokenizer, SUM, 100)
    assert encoded.input_ids == tokenizer.encode("2 + 2 =") + tokenizer.encode(" 4")
    assert learned(tokenizer, encoded) == " 4"


def test_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    tokenizer = byte_level(closes=True)
    assert tokenizer.encode("2")[-1] == tokenizer.eos_token_id
    encoded = encode(tokenizer, SUM, 100)
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert prompt_ids(tokenizer, Example("x", "", "a")) == [tokenizer.bos_token_id]


@pytest.mark.parametrize("prepends", [True, False])
def test_sentence_piece_like_tokenizers_get_one_space(prepends):
    tokenizer = sentence_piece_like(prepends=prepends)
    natural = tokenizer.encode("positive")
    assert tokenizer.decode(natural) == " positive"
    assert (tokenizer.encode(" positive") != natural) is prepends
    assert answer_ids(tokenizer, " positive") == natural
    assert answer_ids(tokenizer, "positive") == natural
    joined = prompt_ids(tokenizer, Example("x", "Answer:", "")) + answer_ids(tokenizer, " positive")
    assert joined == tokenizer.encode("Answer: positive")
    two_spaces = tokenizer.decode(answer_ids(tokenizer, "  positive"))
    assert two_spaces == "  positive"


@pytest.mark.parametrize("prepends", [True, False])
def test_turns_of_a_chat_are_what_the_whole_template_becomes(prepends):
    tokenizer = sentence_piece_like(prepends=prepends)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Answer: {{ m['content'] }}"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    said = [("user", "Answer"), ("assistant", "positive"), ("user", "it is"), ("assistant", "positive")]
    turns = tuple(Message(role, text) for role, text in said)
    whole = tokenizer.apply_chat_template([m.as_turn() for m in turns], tokenize=True, return_dict=False)
    found = encode(tokenizer, Example("x", "", "positive", messages=turns), 200)
    assert found.input_ids == whole
    learned = [token for token, label in zip(found.input_ids, found.labels, strict=True) if label != IGNORED]
    answer = [*tokenizer.encode("positive"), tokenizer.eos_token_id]
    assert learned == answer * 2


def test_word_level_tokenizer_has_neither_start_end_nor_padding():
    tokenizer = word_level()
    encoded = encode(tokenizer, Example("x", "is it ?", " yes"), 10)
    assert encoded.input_ids == [3, 4, 5, 1]
    assert encoded.labels == [IGNORED] * 3 + [1]
    assert Collator(tokenizer).pad_token_id == 0


# Truncation


def test_prompt_is_cut_from_the_left_after_the_start_token(tokenizer):
    example = Example("x", "one two three four five six seven", " 4")
    whole = encode(tokenizer, example, 1000)
    size = len(whole.input_ids) - 5
    cut = encode(tokenizer, example, size)
    assert len(cut.input_ids) == len(cut.labels) == size
    assert cut.input_ids[0] == tokenizer.bos_token_id
    assert cut.input_ids[1:] == whole.input_ids[6:]
    assert cut.cut_prompt_tokens == 5
    assert learned(tokenizer, cut) == " 4</s>"


def test_prompt_without_start_token_is_cut_from_its_first_token():
    tokenizer = byte_level(bos=False)
    whole = encode(tokenizer, SUM, 1000)
    assert encode(tokenizer, SUM, len(whole.input_ids) - 1).input_ids == whole.input_ids[1:]


def test_answer_that_does_not_fit_is_cut_from_the_right(tokenizer):
    example = Example("x", "2", " 1 2 3 4 5 6 7 8 9")
    whole = encode(tokenizer, example, 1000)
    answer = len(answer_ids(tokenizer, example.answer)) + 1
    assert encode(tokenizer, example, answer + 1).cut_prompt_tokens > 0
    cut = encode(tokenizer, example, answer)
    assert cut.input_ids == whole.input_ids[:answer]
    assert cut.cut_answer_tokens == len(whole.input_ids) - answer
    assert tokenizer.eos_token_id not in cut.labels


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=30), answer=st.text(min_size=1, max_size=30), size=st.integers(2, 40))
def test_length_is_never_exceeded(tokenizer, prompt, answer, size):
    example = Example("x", prompt, answer)
    whole = encode(tokenizer, example, 10_000)
    cut = encode(tokenizer, example, size)
    assert len(cut.input_ids) == len(cut.labels) == min(size, len(whole.input_ids))
    assert len(whole.input_ids) - len(cut.input_ids) == (cut.cut_prompt_tokens + cut.cut_answer_tokens)
    if not cut.cut_answer_tokens:
        assert cut.num_supervised == whole.num_supervised


def test_samples_without_supervised_tokens_are_refused(tokenizer):
    long = [Example(f"f:{i}", "word " * 30, " answer " * 20) for i in range(5)]
    with pytest.raises(DataError) as caught:
        encode_all(tokenizer, [SUM, *long], 12)
    message = str(caught.value)
    assert "0 learned tokens in 5 of 6 samples (first: f:0, f:1, f:2)" in message
    assert "Raise data.max_length (now 12)" in message


def test_max_length_must_hold_a_prompt_and_an_answer_token(tokenizer):
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode(tokenizer, SUM, 1)


def test_a_supervised_first_token_does_not_count():
    tokenizer = byte_level(bos=False, eos=False)
    single = Example("x", "", "4")
    assert encode(tokenizer, single, 10).num_supervised == 0
    with pytest.raises(DataError, match="0 learned tokens in 1 of 1"):
        encode_all(tokenizer, [single], 10)


# Conversations


def test_every_assistant_turn_is_learned(chat_tokenizer):
    example = chat("Hi", "Hello", "2 + 2?", "4", system="Be brief.")
    encoded = encode(chat_tokenizer, example, 1000)
    assert learned(chat_tokenizer, encoded) == "Hello<|im_end|>4<|im_end|>"
    text = chat_tokenizer.decode(encoded.input_ids)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>"
    )
    prompt = prompt_ids(chat_tokenizer, example)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert chat_tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_template_that_rewrites_earlier_turns_leaves_the_last(chat_tokenizer):
    tokenizer = byte_level(template=REWRITING)
    encoded = encode(tokenizer, chat("Hi", "Hello", "2 + 2?", "4"), 1000)
    assert learned(tokenizer, encoded) == "(thought) 4<|im_end|>"
    assert "assistant\nHello<|im_end|>" in tokenizer.decode(encoded.input_ids)


def test_template_whose_generation_prompt_diverges_gets_the_bare_answer():
    tokenizer = byte_level(template=DIVERGING)
    encoded = encode(tokenizer, chat("Hi", "Hello"), 1000)
    assert learned(tokenizer, encoded) == "Hello</s>"
    assert tokenizer.decode(encoded.input_ids).endswith("<|im_start|>thought\nHello</s>")


def test_template_that_does_not_close_its_turns_gets_an_end_token():
    tokenizer = byte_level(template=UNCLOSED)
    encoded = encode(tokenizer, chat("Hi", "Hello", "Bye", "So long"), 1000)
    assert learned(tokenizer, encoded) == "Hello\nSo long\n</s>"
    assert learned(byte_level(template=UNCLOSED, eos=False), encoded).startswith("Hello")


def test_special_token_at_the_start_of_a_turn_does_not_close_it():
    template = UNCLOSED.replace("{{ m['content'] }}", "<|im_start|>{{ m['content'] }}")
    tokenizer = byte_level(template=template)
    encoded = encode(tokenizer, chat("Hi", "Hello"), 1000)
    assert learned(tokenizer, encoded) == "<|im_start|>Hello\n</s>"


def test_long_conversation_keeps_its_last_answer(chat_tokenizer):
    encoded = encode(chat_tokenizer, chat("Hi " * 50, "Hello", "2 + 2?", "4"), 24)
    assert len(encoded.input_ids) == 24
    assert learned(chat_tokenizer, encoded).endswith("4<|im_end|>")


def test_conversation_without_chat_template(tokenizer):
    with pytest.raises(DataError) as caught:
        encode(tokenizer, chat("Hi", "Hello"), 100)
    assert "c:1: the data are conversations, but the tokenizer has no chat template" in str(caught.value)
    assert "prompt/completion" in caught.value.hint


def test_template_that_refuses_names_the_example():
    with pytest.raises(DataError, match=r"c:1: .* System role not supported"):
        encode(byte_level(template=STRICT), chat("Hi", "Hello"), 100)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc \nøπ?", min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_what_is_learned_of_a_conversation_is_its_answers(chat_tokenizer, contents):
    contents = contents[: len(contents) // 2 * 2]
    encoded = encode(chat_tokenizer, chat(*contents), 10_000)
    answers = "".join(f"{content}<|im_end|>" for content in contents[1::2])
    assert learned(chat_tokenizer, encoded) == answers


# Batches and preview


def test_loaded_rows_are_a_sequence_of_examples_and_so_are_encoded_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": " yes"}) + "\n" for n in range(3)))
    found = load_examples(path)
    assert [one.prompt for one in found] == [one.prompt for one in found[:3]] == ["0:", "1:", "2:"]
    encoded = encode_all(byte_level(), found, 64)
    assert list(encoded) == [encoded[0], encoded[1], encoded[-1]]
    assert list(encoded[1:]) == list(encode_all(byte_level(), found[1:], 64))
    for rows in (found, encoded):
        with pytest.raises(IndexError):
            rows[3]


def test_collator_pads_on_the_right(tokenizer):
    rows = EncodedDataset([Encoded([1, 5], [IGNORED, 5]), Encoded([1, 5, 6], [IGNORED, 5, 6])])
    batch = Collator(tokenizer)(list(rows))
    assert batch["input_ids"].tolist() == [[1, 5, tokenizer.pad_token_id], [1, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 5, IGNORED], [IGNORED, 5, 6]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collator_without_padding_token_uses_the_end_token():
    tokenizer = byte_level(pad=False)
    assert Collator(tokenizer).pad_token_id == tokenizer.eos_token_id
    assert Collator().pad_token_id == 0


def test_dataset_counts_what_it_holds(tokenizer):
    examples = [SUM, Example("b", "word " * 30, " 4")]
    dataset = encode_all(tokenizer, examples, 16)
    assert len(dataset) == 2
    assert dataset.lengths == [len(encode(tokenizer, SUM, 16).input_ids), 16]
    assert dataset.supervised_tokens == 2 * (len(answer_ids(tokenizer, " 4")) + 1)
    assert dataset.notes() == ("1 of 2 prompts were cut from the left to fit",)
    assert [set(item) for item in dataset] == [{"input_ids", "labels"}] * 2
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=Collator(tokenizer))
    assert next(iter(loader))["input_ids"].shape == (2, 16)


def test_preview_shows_what_is_learned(tokenizer, chat_tokenizer):
    assert labelled_text(tokenizer, encode(tokenizer, SUM, 100)) == [
        ("<s>2 + 2 =", False),
        (" 4</s>", True),
    ]
    pieces = labelled_text(chat_tokenizer, encode(chat_tokenizer, chat("Hi", "Hello", "b", "c"), 100))
    assert [text for text, is_learned in pieces if is_learned] == [
        "Hello<|im_end|>",
        "c<|im_end|>",
    ]
    assert [is_learned for _, is_learned in pieces] == [False, True, False, True]
