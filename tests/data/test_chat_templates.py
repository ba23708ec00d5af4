"""Templates by name, and markers of other models in rows."""

import json

import pytest
from builders import make_project
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.chat_templates import TEMPLATES, choose_template, foreign_markers, template_mark
from gradpruner.data.encoding import encode
from gradpruner.data.loading import load_examples
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe


def base_tokenizer():
    """Returns a byte-level tokenizer, as base models have: no marker is a single token."""
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    core = Tokenizer(BPE(letters, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


TURNS = [
    {"role": "system", "content": "why"},
    {"role": "user", "content": "what colour is it"},
    {"role": "assistant", "content": "red"},
]
READS = {
    "chatml": "<|im_start|>system\nwhy<|im_end|>\n<|im_start|>user\nwhat colour is it<|im_end|>\n"
    "<|im_start|>assistant\nred<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nwhy<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nwhat colour is it<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "red<|eot_id|>",
    "mistral": "<s>[INST] why\n\nwhat colour is it [/INST] red</s>",
    "gemma": "<s><start_of_turn>user\nwhy\n\nwhat colour is it<end_of_turn>\n<start_of_turn>model\n"
    "red<end_of_turn>\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_writes_turns_and_opens_the_reply(tmp_path, name):
    tokenizer = choose_template(base_tokenizer(), name)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == READS[name]
    opened = tokenizer.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert READS[name].startswith(opened) and READS[name][len(opened) :].strip().startswith("red")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}))
    sample = encode(tokenizer, load_examples(path).examples[0], 1000)
    learned = [token for token in sample.labels if token != -100]
    # No token closes a turn here, so the end token does, once.
    assert tokenizer.decode(learned) == READS[name][len(opened) :].removesuffix("</s>") + "</s>"


def test_a_jinja_file_is_a_template_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    assert choose_template(base_tokenizer(), str(path)).chat_template == path.read_text()
    assert choose_template(base_tokenizer(), None).chat_template is None
    with pytest.raises(
        ConfigError, match=r"'chatm', which is neither a known name nor a file. Did you mean 'chatml'"
    ):
        choose_template(base_tokenizer(), "chatm")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        choose_template(base_tokenizer(), str(path))
    assert template_mark(None) == "" and template_mark("chatml") != template_mark("llama3")


def test_markers_of_other_models_are_named_with_their_rows():
    texts = {"1": "what colour", "2": "it is red <|im_end|>", "3": "red<|im_end|> </s>"}
    said = foreign_markers(base_tokenizer(), texts)
    assert "<|im_end|> (2 rows, first 2)" in said
    assert "</s>" not in said  # a token of its own
    assert foreign_markers(base_tokenizer(), {"1": "what colour"}) == ""


def chats(tmp_path, **data):
    rows = "".join(
        json.dumps({"messages": [{"role": "user", "content": f"the cat is {c} ."}, turn]}) + "\n"
        for c in ("red", "blue", "green") * 8
        for turn in [{"role": "assistant", "content": c}]
    )
    for name in ("train", "eval"):
        (tmp_path / f"{name}.chats.jsonl").write_text(rows)
    given = {"train": "./train.chats.jsonl", "eval": "./eval.chats.jsonl"} | data
    return make_project(tmp_path, data=given, variants=["dense"])


def test_conversations_and_a_base_model_need_a_template_which_is_then_saved(tmp_path):
    path, _ = chats(tmp_path)
    with pytest.raises(DataError, match=r"data.chat_template to chatml, llama3, mistral, gemma"):
        Job(load_recipe(path))
    path, _ = chats(tmp_path, chat_template="chatml")
    job = Job(load_recipe(path))
    assert job.train.format.endswith(template_mark("chatml"))
    run(load_recipe(path))
    tuned = tmp_path / "run" / "variants" / "dense" / "model"
    saved = (
        "".join(file.read_text() for file in tuned.glob("*.jinja"))
        or (json.loads((tuned / "tokenizer_config.json").read_text())["chat_template"])
    )
    assert saved == TEMPLATES["chatml"]


def test_a_job_warns_of_markers_in_its_rows(tmp_path):
    path, _ = make_project(tmp_path)
    train = tmp_path / "train.jsonl"
    train.write_text(train.read_text().replace('"completion": " ', '"completion": " <|eot_id|>', 1))
    assert any("<|eot_id|> (1 rows" in warning for warning in Job(load_recipe(path)).warnings)
