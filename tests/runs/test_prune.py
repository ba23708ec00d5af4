"""gradpruner.prune: one call from a model and rows to the model that `gradpruner shrink` makes."""

import json

import datasets
import pytest
import torch
from builders import make_llama, make_rows, make_tokenizer, write_rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import gradpruner
from gradpruner.cli.main import app
from gradpruner.common.errors import ConfigError, DataError, IntegrityError, ModelError, PlanError
from gradpruner.common.progress import set_mode
from gradpruner.demo import DATA_DIR, MODEL_DIR
from gradpruner.runs import shrinking

SETTINGS = {"record.batch_size": 2, "data.max_length": 128, "plan.repair_rows": 16}


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def demo_rows():
    lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def found(demo_rows):
    """What a notebook makes of a loaded model and rows in memory."""
    set_mode("quiet")
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = gradpruner.prune(
        model,
        demo_rows,
        tokenizer=AutoTokenizer.from_pretrained(MODEL_DIR),
        num_prune=5,
        steps=4,
        settings=SETTINGS,
    )
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return result


def test_it_is_the_run_of_the_command(found, demo_rows, tmp_path):
    data, out = write_rows(tmp_path / "train.jsonl", demo_rows), tmp_path / "out"
    arguments = ["shrink", MODEL_DIR, "--data", data, "--eval-data", f"{data}#2", "--out", out, "--quiet"]
    arguments += ["--num-prune", 5, "--set", "record.steps=4"]
    for key, value in SETTINGS.items():
        arguments += ["--set", f"{key}={value}"]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    there = out / "variants" / "either"
    plan = gradpruner.PruningPlan.load(there / "plan.json")
    assert (found.plan.actions, found.plan.evidence["trace"]) == (plan.actions, plan.evidence["trace"])
    assert found.scores == gradpruner.LayerScores.load(out / "scores" / "either.json")
    assert same(load_file(found.folder / "model.safetensors"), load_file(there / "pruned/model.safetensors"))


def test_the_single_functions_make_the_same_model_in_memory(found):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    gradpruner.prune_(model, found.plan, repair=found.repair)
    assert same(model.state_dict(), found.model.state_dict())
    assert len(found.plan.pruned) == 5 and found.repair.kind == "layer_wise"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_prints_what_was_found_and_saves_a_model(found, tmp_path):
    shown = str(found)
    assert "11 of 16 kept" in shown and "<table>" in found._repr_html_()
    # A command would name a folder that goes with the object.
    assert str(found.folder) not in shown and "save(FOLDER)" in shown and "vllm" not in shown
    assert "evaluation" not in " ".join(found.record["warnings"])
    folder = found.save(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert same(again.state_dict(), found.model.state_dict())
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids == found.tokenizer("a").input_ids
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        found.save(tmp_path / "mine")


def test_a_dataset_and_a_run_directory_to_keep(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = datasets.Dataset.from_list(make_rows(12))

    def pruned():
        return gradpruner.prune(
            tmp_path / "model", rows, eval_data=make_rows(4, seed=1), layer_fraction=0.5, method="last",
            repair="none", out=tmp_path / "out",
        )  # fmt: skip

    first, again = pruned(), pruned()
    assert first.plan.pruned == (1, 2) == again.plan.pruned and first.scores is not None
    assert {stage["state"] for stage in again.record["stages"]} == {"skipped"}
    assert first.record["variants"]["dense"]["evaluation"]["metrics"]["exact_match"]["n"] == 4
    assert (tmp_path / "out" / "report.html").is_file() and first.repair is None
    assert "exact match" in str(again).lower()


def with_nan(model):
    torch.nn.init.constant_(model.model.embed_tokens.weight[3], float("nan"))
    return model


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"tokenizer": None}, ConfigError, "tokenizer=tokenizer"),
        ({"task_data": {"prompt": ["a"]}}, DataError, "list of dictionaries"),
        ({"task_data": [{"prompt": "a"}, {"prompt": object()}]}, DataError, "Row 1"),
        (
            {"task_data": [{"a": "b", "c": "d"}]},
            DataError,
            "^task_data: columns not recognised.*settings: 'data.columns",
        ),
        ({"num_prune": 2, "layer_fraction": 0.5}, ConfigError, "give one"),
        ({"num_prune": 99}, PlanError, "99.*0 to"),
        ({"method": "gradpruned"}, ConfigError, "Did you mean 'gradpruner'"),
        ({"settings": {"record.stepz": 3}}, ConfigError, "record.stepz"),
        (
            {"model": get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))},
            PlanError,  # as `prune_` and `fit_repair` say it
            "carries adapters.*merge_",
        ),
        ({"model": "nowhere/at/all", "tokenizer": None}, ModelError, "no model folder"),
        ({"model": with_nan(make_llama())}, IntegrityError, "The given model: .*embed_tokens.* holds NaN"),
    ],
)
def test_bad_arguments_are_refused_and_leave_no_files(changes, error, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    given = {"model": make_llama(), "task_data": make_rows(8), "tokenizer": make_tokenizer()} | changes
    monkeypatch.setattr(shrinking, "_write_model", lambda *a: pytest.fail("bad rows are told first"))
    with pytest.raises(error, match=said):
        gradpruner.prune(given.pop("model"), given.pop("task_data"), **given)
    assert not list(tmp_path.iterdir())
