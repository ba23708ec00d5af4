"""lm-evaluation-harness on a loaded model, with a task and data of our own, offline."""

import json

import pytest
import torch
from builders import make_llama, make_tokenizer

from gradpruner.common.errors import ConfigError
from gradpruner.data.examples import Example
from gradpruner.evaluation.harness import check_harness, evaluate_harness
from gradpruner.evaluation.quality import evaluate

pytest.importorskip("lm_eval")

ROWS = [
    {"q": "the red cat", "options": ["sat", "ran away"], "gold": 0},
    {"q": "a dog in the big house", "options": ["sat", "ran away"], "gold": 1},
    {"q": "the dog", "options": ["ran", "sat on a house"], "gold": 1},
]


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = f"""
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 3
"""
    (tmp_path / "tiny.yaml").write_text(task)
    return tmp_path


def test_scores_agree_with_our_own_likelihoods(folder):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = make_llama(vocab_size=len(tokenizer)).eval()
    found = evaluate_harness(model, tokenizer, ["tiny_choice"], folder=str(folder), batch_size=2)
    scores = found["tasks"]["tiny_choice"]
    assert scores["n"] == 3 and scores["version"] == 3
    examples = [
        Example(str(i), row["q"], f" {row['options'][row['gold']]}", tuple(f" {o}" for o in row["options"]))
        for i, row in enumerate(ROWS)
    ]
    ours = evaluate(
        model, tokenizer, examples, metrics=["choice_likelihood"], score_ends=False, max_length=64
    )
    assert scores["metrics"]["acc"]["value"] == pytest.approx(ours.metrics["choice_accuracy"].value)
    norm = ours.metrics["choice_accuracy_normalised"].value
    assert scores["metrics"]["acc_norm"]["value"] == pytest.approx(norm)
    limited = evaluate_harness(model, tokenizer, ["tiny_choice"], folder=str(folder), limit=2)
    assert limited["tasks"]["tiny_choice"]["n"] == 2


def test_missing_installation_folder_or_task_is_found_before_a_model_loads(folder, monkeypatch):
    check_harness(["tiny_choice"], str(folder))
    with pytest.raises(ConfigError, match="does not exist"):
        check_harness(["tiny_choice"], str(folder / "none"))
    own = type("Manager", (), {"all_tasks": ["tiny_choice"]})()
    monkeypatch.setattr(
        "gradpruner.evaluation.harness._manager", lambda tasks, where: own
    )  # the real manager takes long to build
    with pytest.raises(ConfigError, match=r"knows no task 'tiny_choise'\. Did you mean 'tiny_choice'"):
        check_harness(["tiny_choise"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm-eval is not installed") as caught:
        check_harness(["tiny_choice"])
    assert "gradpruner[eval]" in caught.value.hint
