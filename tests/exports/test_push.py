"""push, against a stand-in for the hub: what goes, what does not, and who may see it."""

import json
import shutil

import pytest
import torch
from builders import make_llama, make_tokenizer
from hub import TOKEN, running_hub
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from gradpruner.common.json_files import write_json
from gradpruner.exports.hub import PushOptions, files_to_push
from gradpruner.exports.shipped import open_model, whole_model
from gradpruner.models.loading import load_model
from gradpruner.models.saving import save_model
from gradpruner.plans.layer_plan import PruningPlan

PLAN = PruningPlan.from_keep(5, [0, 1, 3, 4])


def measured(value):
    return {"metrics": {"exact_match": {"value": value, "low": 0.8, "high": 0.95, "n": 480}}}


@pytest.fixture
def run(tmp_path):
    """A run directory with one tuned row, as a finished run leaves it."""
    folder = tmp_path / "mine"
    model = folder / "variants/merged/model"
    model.parent.mkdir(parents=True)
    save_model(
        make_llama(),
        make_tokenizer(),
        model,
        dtype=torch.float32,
        plan=PLAN,
        source=str(tmp_path / "base"),
        facts={
            "previous": {"source": "../a/b", "finetune": {"steps": 3}, "previous": {"source": "org/first"}},
            "repair": {"kind": "layer_wise", "rows": 7, "cuts": [{"layer": 1, "ridge": 0.1}]},
            "finetune": {"kept": {"model": "trained"}},
        },
    )
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / "training.py").write_text("print()")
    lines = [{"id": "t:1", "prompt_tail": "<s> red", "answer": "red", "generated": "red", "correct": True}]
    examples = folder / "variants/merged/examples.jsonl"
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.html").write_text("<html>")
    row = {"plan": "merged", "num_parameters": 9, "evaluation": measured(0.9), "error": None}
    row["evaluation"]["per_example"] = "variants/merged/examples.jsonl"
    row["finetune"] = {"output": "variants/merged/model"}
    record = {
        "title": "base on colours",
        "gradpruner_version": "0.2",
        "recipe": {"data": {"task": None}},
        "provenance": {"packages": {"torch": "2.13"}},
        "model": {"path": str(tmp_path / "base")},
        "data": {
            "train": {"source": "/home/me/train.jsonl"},
            "eval": {"source": "/home/me/test.jsonl", "rows": 480},
        },
        "rows": {"merged": "merged"},
        "variants": {"dense": {"evaluation": measured(0.95), "error": None}, "merged": row},
    }
    write_json(folder / "run.json", record)
    stage = {"state": "done", "inputs": "", "files": {}, "result": {}}
    write_json(
        folder / "manifest.json",
        {"format_version": 1, "created": "", "stages": {"finetune merged": stage, "evaluate merged": stage}},
    )
    return folder


def test_a_dry_run_lists_what_a_push_then_brings(call, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, err = call("push", run, "me/small", "--dry-run", "--json", "--license", "mit")
    assert code == 0, err
    listed = json.loads(out)
    assert listed["pushed"] is None and listed["private"]
    with running_hub(monkeypatch) as hub:
        code, out, err = call("push", run, "me/small", "--license", "mit", "--base-model", "org/base")
        assert code == 0, err
        assert hub.private == {"me/small": True} and "/me/small" in out
        files = hub.files["me/small"]
        assert set(files) == set(listed["files"]) >= {"model.safetensors", "tokenizer.json", "report.html"}
        assert not [name for name in files if name.endswith((".bin", ".py"))]
        assert any("/info/lfs/objects/batch" in asked for asked in hub.asked)
        weights = run / "variants/merged/model/model.safetensors"
        assert files["model.safetensors"] == weights.read_bytes() and load_file(weights)
        card = ModelCard(files["README.md"].decode())
        assert (card.data.base_model, card.data.license) == ("org/base", "mit")
        (figure,) = card.data.eval_results
        assert (figure.metric_type, figure.metric_value) == ("exact_match", 0.9)
        assert figure.dataset_args == {"rows": 480, "source": "test.jsonl"}
        for said in ("fine-tuned before it", "Repaired (layer wise, 7 rows", "Then it was fine-tuned."):
            assert said in card.text
        before = json.loads(files["pruning.json"])["previous"]
        assert (before["source"], before["previous"]["source"]) == ("b", "org/first")
        assert "from_pretrained('me/small')" in card.text and "prompt = 'red'" in card.text
        assert not [name for name, data in files.items() if str(run.parent).encode() in data]
        assert TOKEN not in out + err
        # Again, by name of a row and without the report: one more commit.
        assert call("push", run, "me/small", "--no-report", "--variant", "merged")[0] == 0
        hub.private["me/small"] = False
        code, _, err = call("push", run, "me/small")
        assert code == 2 and "exists and is public" in err
        hub.refuse = True
        code, out, err = call("push", run, "me/small", "--public")
        assert code == 2 and "may not push" in err and TOKEN not in out + err


def test_adapters_are_merged_into_the_pruned_model(run) -> None:
    torch.manual_seed(0)
    base = run / "variants/merged/pruned"
    save_model(make_llama(), make_tokenizer(), base, dtype=torch.float32, plan=PLAN, source="org/base")
    adapted = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapters = run / "variants/merged/model"
    shutil.rmtree(adapters)
    save_model(adapted, make_tokenizer(), adapters, dtype=torch.float32, plan=PLAN, source="org/base")
    ids = torch.tensor([[1, 3, 4]])
    with torch.no_grad():
        expected = adapted(ids).logits
    model = open_model(str(run))
    assert model.is_adapter and model.base == base
    with whole_model(model, run / "x") as folder:
        merged = load_model(folder, device="cpu")
        with torch.no_grad():
            assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    with files_to_push(model, "me/small", PushOptions()) as files:
        assert {"model.safetensors", "config.json", "README.md"} <= set(files)
        assert not [name for name in files if "adapter" in name]
        card = ModelCard(files["README.md"].decode())
        assert card.data.base_model == "org/base" and "AutoModelForCausalLM" in card.text
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_of_a_task_that_was_not_learned_it_is_said(call, run):
    code, _, err = call("push", run, "me/small", "--dry-run")
    assert code == 0 and "not learned" not in err
    record = json.loads((run / "run.json").read_text())
    for row in record["variants"].values():
        row["evaluation"]["metrics"]["exact_match"]["value"] = 0.0
    write_json(run / "run.json", record)
    code, _, err = call("push", run, "me/small", "--dry-run")
    assert code == 0 and "this run did not learn its task" in err and "No model gives a single" in err


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(call, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with running_hub(monkeypatch) as hub:
        for name, said in (("small", "no owner"), ("a/b/c", "no owner"), ("me/a b", "cannot be a name")):
            code, _, err = call("push", run, name)
            assert code == 2 and said in err
        code, _, err = call("push", run, "me/small")
        assert code == 2 and "no token" in err and "hf auth login" in err
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["stages"]["finetune merged"]["state"] = "interrupted"
        write_json(run / "manifest.json", manifest)
        code, _, err = call("push", run, "me/small", "--dry-run")
        assert code == 2 and "not finished: finetune merged (interrupted)" in err
        (run / "run.json").unlink()
        code, _, err = call("push", run, "me/small", "--dry-run")
        assert code == 2 and "no run.json yet" in err
        foreign = run.parent / "foreign"
        make_llama().save_pretrained(foreign)
        code, _, err = call("push", foreign, "me/small", "--dry-run")
        assert code == 2 and "not made by gradpruner" in err
        assert hub.asked == []
