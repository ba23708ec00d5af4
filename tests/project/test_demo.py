"""The embedded demo: deterministic text and task, and a model that was really pre-trained."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from pretrain import build_tokenizer, held_out_loss, unigram_loss
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import LABELS, NUM_TEST, NUM_TRAIN, NUM_VALIDATION, TRADES, corpus, make_rows, write_rows

from gradpruner.demo import DATA_DIR, DEMO_DIR, MODEL_DIR


def _documents(seed: int, count: int = 200) -> list[str]:
    return list(itertools.islice(corpus(seed), count))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def test_same_seed_same_text_and_task():
    assert _documents(1) == _documents(1)
    assert _documents(1) != _documents(2)
    assert make_rows(7) == make_rows(7)
    assert make_rows(7) != make_rows(8)


def test_documents_have_the_promised_form():
    for document in _documents(3):
        words = document.split(" ")
        assert 15 <= len(words) <= 90, document
        assert "" not in words
        assert document == document.lower()


def test_every_word_belongs_to_one_trade_and_half_of_them_are_new_in_the_test_notes():
    words = {name: {*trade.things, *trade.doings, *trade.qualities} for name, trade in TRADES.items()}
    shared = Counter(itertools.chain(*words.values()))
    assert sum(count > 1 for count in shared.values()) <= 2
    train, test, _ = make_rows()
    of_trades = set(itertools.chain(*words.values()))
    seen = {word for row in train for word in str(row["prompt"]).split()} & of_trades
    used = {word for row in test for word in str(row["prompt"]).split()} & of_trades
    assert 0.4 < len(seen) / len(used) < 0.6


def test_committed_rows_are_the_regenerated_ones(tmp_path: Path):
    write_rows(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA_DIR / name).read_bytes()


def test_rows():
    train, test, validation = make_rows()
    assert (len(train), len(test), len(validation)) == (NUM_TRAIN, NUM_TEST, NUM_VALIDATION)
    prompts = [row["prompt"] for row in (*train, *test, *validation)]
    assert len(prompts) == len(set(prompts))
    for row in (*train, *test, *validation):
        assert row["completion"] in row["choices"]
        assert row["choices"] == list(LABELS)
    shares = Counter(row["completion"] for row in test)
    assert max(shares.values()) / len(test) < 0.3


def test_checkpoint_on_disk():
    files = [path for path in MODEL_DIR.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] >= 16


def test_tokenizer(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert (tokenizer.pad_token, tokenizer.bos_token) == ("<pad>", "<s>")
    assert (tokenizer.eos_token, tokenizer.unk_token) == ("</s>", "<unk>")
    unknown = tokenizer.unk_token_id
    for row in itertools.chain(*make_rows()):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert unknown not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"]
        assert len(tokenizer(row["completion"], add_special_tokens=False)["input_ids"]) == 1


def test_model_is_really_pretrained(model, tokenizer):
    assert held_out_loss(model, tokenizer, sequences=16) < 0.4 * unigram_loss(tokenizer)


def test_records_belong_to_the_committed_model_and_text():
    pretrain = json.loads((DEMO_DIR / "pretrain.json").read_text())
    measure = json.loads((DEMO_DIR / "measure.json").read_text())
    assert pretrain["held_out_loss"] == pytest.approx(measure["held_out_loss"]["dense"], abs=1e-3)
    assert pretrain["curve"][0]["loss"] > 2 * pretrain["curve"][-1]["loss"]
    best = max(run["exact_match"] for run in measure["full_finetuning"])
    assert 0.85 <= best <= 0.97
    assert measure["zero_shot"]["exact_match"] < best - 0.4
