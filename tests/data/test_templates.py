"""Users' chat templates and tokenizers: rows are learned correctly, refused, or noted."""

import json

import pytest
from builders import VOCABULARY, make_llama, make_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gradpruner.common.errors import DataError, ModelError
from gradpruner.data.chat import template_notes
from gradpruner.data.encoding import encode, labelled_text
from gradpruner.data.examples import Example
from gradpruner.data.loading import load_examples
from gradpruner.data.vocabulary import check_vocabulary, vocabulary_notes
from gradpruner.evaluation.questions import Questions

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[open]", "[shut]", "user", "assistant", "system", "think", "call"]
WORDS += ["red", "blue", "what", "colour", "is", "it", "why", "because"]
PLAIN = "{% for m in messages %}[open] {{ m.role }} {{ m.content }} [shut] {% endfor %}"
OPENS = PLAIN + "{% if add_generation_prompt %}[open] assistant {% endif %}"
THINKS = OPENS.replace("{{ m.content }}", "{% if m.think %}think {{ m.think }} {% endif %}{{ m.content }}")


def make_chat_tokenizer(template):
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="[shut]", pad_token="<pad>",
        additional_special_tokens=["[open]"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def conversations(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(path)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED = [turn("user", "what colour is it"), turn("assistant", "red")]


def test_a_template_without_generation_prompt_is_refused_with_its_header(tmp_path):
    found = conversations(tmp_path, {"messages": ASKED})
    with pytest.raises(DataError, match=r"ignores add_generation_prompt.*\[open\] assistant"):
        encode(make_chat_tokenizer(PLAIN), found.examples[0], 64)
    tokenizer = make_chat_tokenizer(OPENS)
    learned = [
        text for text, kept in labelled_text(tokenizer, encode(tokenizer, found.examples[0], 64)) if kept
    ]
    assert [" ".join(text.split()) for text in learned] == ["red [shut]"]


def test_a_turn_of_weight_zero_is_not_learned(tmp_path):
    rows = [*ASKED, turn("user", "why is it"), turn("assistant", "because")]
    rows[1] = rows[1] | {"weight": 0}
    found = conversations(tmp_path, {"messages": rows})
    tokenizer = make_chat_tokenizer(OPENS)
    encoded = encode(tokenizer, found.examples[0], 64)
    learned = [token for token in encoded.labels if token != -100]
    assert tokenizer.decode(learned) == "because [shut]" and "red" in tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("weight", [0.5, 2, "no"])
def test_other_weights_than_0_and_1_are_refused(tmp_path, weight):
    with pytest.raises(DataError, match="weight"):
        conversations(tmp_path, {"messages": [ASKED[0], ASKED[1] | {"weight": weight}]})


def test_fields_of_a_turn_reach_the_template_or_are_named(tmp_path):
    row = {"messages": [ASKED[0], ASKED[1] | {"think": "because"}]}
    found = conversations(tmp_path, row, {"messages": ASKED})
    shows, hides = make_chat_tokenizer(THINKS), make_chat_tokenizer(OPENS)
    assert "think because" in shows.decode(encode(shows, found.examples[0], 64).input_ids)
    assert template_notes(shows, found.examples) == ()
    (note,) = template_notes(hides, found.examples)
    assert "does not show" in note and "think (1 rows)" in note


def test_a_doubled_start_token_is_noted(tmp_path):
    found = conversations(tmp_path, {"messages": ASKED})
    (note,) = template_notes(make_chat_tokenizer("<s> <s> " + OPENS), found.examples)
    assert "twice" in note
    assert template_notes(make_chat_tokenizer("<s> " + OPENS), found.examples) == ()


def test_replies_that_the_template_changes_are_noted(tmp_path):
    found = conversations(tmp_path, {"messages": ASKED})
    template = OPENS.replace("{{ m.content }}", "{{ m.content | replace('red', 'blue') }}")
    (note,) = template_notes(make_chat_tokenizer(template), found.examples)
    assert "changes 1 of" in note and "blue" in note


@pytest.mark.parametrize("answer", ["red", "red </s>", "red </s></s>"])
def test_a_completion_with_its_own_end_token_gets_no_second_one(answer):
    tokenizer = make_tokenizer()
    example = Example("one", "the cat is red . what colour is the cat :", f" {answer}")
    questions = Questions(tokenizer, [example], 64)
    assert questions.reference(0).strip() == "red"
    ids = encode(tokenizer, example, 64).input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 + answer.count("</s></s>")


# -- tokenizer and model ---------------------------------------------------------------------------------


def test_ids_beyond_the_embedding_are_refused():
    tokenizer = make_tokenizer()
    size = len(VOCABULARY)
    check_vocabulary(tokenizer, size, [[0, size - 1]])
    with pytest.raises(ModelError, match=f"embedding of {size - 2} rows"):
        check_vocabulary(tokenizer, size - 2, [[0, size - 1]])
    tokenizer.add_special_tokens({"pad_token": "[far]"})
    with pytest.raises(ModelError, match=r"padding token '\[far\]'"):
        check_vocabulary(tokenizer, size, [[0]])


def test_a_tokenizer_of_another_model_is_named():
    config = make_llama().config
    assert vocabulary_notes(make_tokenizer(), config, [2]) == ()
    assert "other software would not stop" in " ".join(vocabulary_notes(make_tokenizer(), config, [5]))
    config.vocab_size = 10 * len(VOCABULARY)
    assert "is it this model's tokenizer?" in " ".join(vocabulary_notes(make_tokenizer(), config, [2]))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert "no end token" in " ".join(vocabulary_notes(tokenizer, make_llama().config, []))
