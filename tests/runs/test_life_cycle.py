"""Methods of every kind through the whole run."""

import dataclasses
import json

import pytest
import torch
from builders import make_project
from transformers import AutoModelForCausalLM, TrainerCallback

from gradpruner import load_model, prune_checkpoint
from gradpruner.common.errors import ConfigError, ModelError, PlanError
from gradpruner.common.progress import set_mode
from gradpruner.evaluation.costing.subject import find_subject
from gradpruner.methods import METHODS, Method, MethodOptions
from gradpruner.models.narrowing import prune_width_
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.width_plan import LayerWidths
from gradpruner.reports import html
from gradpruner.reports.html import render_html
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.training.finetuning import finetune


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    set_mode("quiet")
    monkeypatch.setattr(Job, "release", lambda *a: None)
    monkeypatch.setattr(html, "render_html", lambda record, path: path)
    yield
    set_mode("auto")


@pytest.fixture
def register(monkeypatch):
    def file(name, method):
        monkeypatch.setitem(METHODS._entries, name, method)

    return file


def widths(model, channels):
    whole = WidthView(model).whole()
    layers = tuple(LayerWidths((0, 1), tuple(range(c))) for c in channels)
    return dataclasses.replace(whole, layers=layers, method="stand-in")


class Channels(MethodOptions):
    channels: tuple[int, int, int, int] = (8, 8, 8, 8)


def plan_widths(context):
    return widths(context.model(), context.options.channels)


def carry_out(tmp_path, variants, **recipe):
    path, _ = make_project(tmp_path, variants=variants, **recipe)
    return run(load_recipe(path)), tmp_path / "run"


def test_a_width_method_is_one_row_like_any_other(register, tmp_path):
    register(
        "narrow",
        Method(
            "a stand-in that keeps half of everything", plan=plan_widths, options=Channels, label="Narrow"
        ),
    )
    record, folder = carry_out(tmp_path, ["dense", "narrow"])
    row, plan = record["variants"]["narrow"], record["plans"]["narrow"]
    assert row["label"] == "Narrow" and row["error"] is None
    assert row["before"]["metrics"] and row["evaluation"]["metrics"] and row["finetune"]["steps"] == 6
    assert plan["uniform"] and plan["widths"][3] == {"layer": 3, "heads": 2, "kv_heads": 1, "channels": 8}
    assert row["pruning"]["verified"]["passed"] and row["pruning"]["verified"]["level"] == "full"
    model = AutoModelForCausalLM.from_pretrained(folder / "variants/narrow/model")
    assert count_parameters(model) == row["num_parameters"] == plan["savings"]["parameters"]["after"]
    assert model.config.intermediate_size == 8
    shown = render_html(record, tmp_path / "report.html").read_text()
    assert "Widths of a layer" in shown and "of 32" in shown
    assert "loads with `AutoModelForCausalLM" in (folder / "variants/narrow/model/README.md").read_text()


def test_options_reach_the_method_and_uneven_layers_load_through_the_package(register, tmp_path):
    register("narrow", Method("a stand-in with options of its own", plan=plan_widths, options=Channels))
    recipe = {"methods": {"narrow": {"channels": [4, 32, 8, 8]}}, "finetune": {"mode": "lora"}}
    record, folder = carry_out(tmp_path, ["narrow"], **recipe)
    row = record["variants"]["narrow"]
    assert [w["channels"] for w in record["plans"]["narrow"]["widths"]] == [4, 32, 8, 8]
    assert {v["status"] for v in record["plans"]["narrow"]["portability"]} == {"refused"}
    tuned = folder / "variants/narrow/model"
    model = load_model(str(tuned))
    assert count_parameters(model) == row["num_parameters"]
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [4, 32, 8, 8]
    assert model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2, do_sample=False).shape[1] <= 5
    assert "load_model" in (tuned / "README.md").read_text()
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tuned)
    # Where sizes come from the config, such a folder is refused before anything is written.
    elsewhere = ("out=" + str(tmp_path / "elsewhere"),)
    for refused in (
        lambda: run(load_recipe(tmp_path / "recipe.yaml", elsewhere, {"model.path": str(tuned)})),
        lambda: prune_checkpoint(tuned, tmp_path / "elsewhere", PruningPlan.from_keep(4, [0, 1])),
        lambda: find_subject(tuned),
    ):
        with pytest.raises(ModelError, match="different widths"):
            refused()
    assert not (tmp_path / "elsewhere").exists()
    # Nothing is done twice.
    path = tmp_path / "recipe.yaml"
    assert {stage["state"] for stage in run(load_recipe(path))["stages"]} == {"skipped"}


def test_a_method_that_prunes_while_it_trains(register, tmp_path):
    def shrink(context):
        model = context.model()
        plan = widths(model, (4, 8, 16, 32))
        prune_width_(model, plan)
        trained, _ = finetune(model, context.samples, collator=context.collator, epochs=1, batch_size=8)
        return trained, plan

    register("shrinking", Method("a stand-in that prunes and trains", shrink=shrink))
    record, folder = carry_out(tmp_path, ["dense", "shrinking"], keep_models="none")
    row = record["variants"]["shrinking"]
    assert row["error"] is None and row["plan"] == "shrinking"
    assert [w["channels"] for w in record["plans"]["shrinking"]["widths"]] == [4, 8, 16, 32]
    assert row["num_parameters"] == record["plans"]["shrinking"]["savings"]["parameters"]["after"]
    assert not (folder / "variants/shrinking/pruned").exists()
    again = run(load_recipe(tmp_path / "recipe.yaml"))
    assert {stage["state"] for stage in again["stages"]} == {"skipped"}
    assert again["variants"]["shrinking"]["num_parameters"] == row["num_parameters"]


def test_recovery_comes_between_pruning_and_fine_tuning(register, tmp_path):
    def recover(context, model):
        with torch.no_grad():
            model.model.norm.weight.fill_(3.0)
        return {"steps": 7}

    register(
        "recovering", Method("a stand-in that recovers", plan=plan_widths, options=Channels, recover=recover)
    )
    record, folder = carry_out(tmp_path, ["recovering"])
    assert record["variants"]["recovering"]["recovery"] == {"steps": 7}
    norms = {
        name: load_model(folder / "variants/recovering" / name).model.norm.weight
        for name in ("pruned", "recovered", "model")
    }
    assert not torch.equal(norms["pruned"], norms["recovered"]) and (norms["recovered"] == 3).all()
    assert (norms["model"] - 3).abs().max() < 0.1
    seconds = {stage["name"]: stage["seconds"] for stage in record["stages"]}
    of_method = [seconds[f"{verb} recovering"] for verb in ("plan", "prune", "recover")]
    assert record["variants"]["recovering"]["cost"]["method_seconds"] == pytest.approx(sum(of_method))
    # What is measured before fine-tuning is the recovered model: recovered anew, measured anew.
    again = run(load_recipe(tmp_path / "recipe.yaml", ("finetune.learning_rate=2e-3",)))
    states = {stage["name"]: stage["state"] for stage in again["stages"]}
    assert states["prune recovering"] == "skipped"
    assert states["recover recovering"] == states["evaluate recovering before"] == "done"


def test_callbacks_change_fine_tuning_only(register, tmp_path):
    steps = []

    class Counting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    register("watching", Method("a stand-in that only looks on", callbacks=lambda context: [Counting()]))
    record, _ = carry_out(tmp_path, ["dense", "watching"])
    dense, watching = record["variants"]["dense"], record["variants"]["watching"]
    assert steps == list(range(1, 7))
    assert watching["plan"] is None and watching["num_parameters"] == dense["num_parameters"]
    assert watching["finetune"]["losses"] == dense["finetune"]["losses"]


def test_a_method_that_fails_is_a_row_with_its_error(register, tmp_path):
    def refuse(context):
        raise PlanError("This cannot be.", hint="Do something else.")

    def stumble(context):
        return {}["nothing"]

    register("refusing", Method("a stand-in that refuses", plan=refuse))
    register("stumbling", Method("a stand-in with a fault", score=stumble))
    path, _ = make_project(tmp_path, variants=["refusing", "stumbling", "last"])
    with pytest.raises(PlanError, match="This cannot be"):
        run(load_recipe(path))
    record = json.loads((tmp_path / "run/run.json").read_text())
    rows = record["variants"]
    assert rows["refusing"]["error"] == "This cannot be. Do something else."
    assert "KeyError: 'nothing'" in rows["stumbling"]["error"]
    assert rows["last"]["error"] is None and rows["last"]["evaluation"]["metrics"]


def test_a_failed_recording_fails_only_the_rows_that_need_it(monkeypatch, tmp_path):
    tried = []

    def failing(*args, **kwargs):
        tried.append(1)
        raise ModelError("No gradients today.")

    monkeypatch.setattr("gradpruner.runs.pipeline.record_gradients", failing)
    path, _ = make_project(tmp_path, variants=["merged", "dropped", "last"])
    with pytest.raises(ModelError, match="No gradients today"):
        run(load_recipe(path))
    rows = json.loads((tmp_path / "run/run.json").read_text())["variants"]
    assert rows["merged"]["error"] == rows["dropped"]["error"] == "No gradients today."
    assert rows["last"]["error"] is None and len(tried) == 1


@pytest.mark.parametrize(
    ("methods", "fault"),
    [
        ({"lats": {}}, "Unknown method 'lats'. Did you mean 'last'"),
        ({"last": {"depth": 3}}, r"methods.last.depth: .*Options: none"),
        ({"narrow": {"channels": "many"}}, "methods.narrow.channels"),
    ],
)
def test_options_are_checked_before_anything_loads(register, methods, fault, tmp_path):
    register("narrow", Method("a stand-in with options of its own", plan=plan_widths, options=Channels))
    path, _ = make_project(tmp_path, methods=methods)
    with pytest.raises(ConfigError, match=fault):
        run(load_recipe(path))
    assert not (tmp_path / "run").exists()


def test_a_method_is_of_one_kind():
    with pytest.raises(
        ConfigError, match="exactly one of score, plan, shrink and callbacks; this one has none"
    ):
        Method("does nothing at all")
    with pytest.raises(ConfigError, match="this one has score, plan"):
        Method("does two things", score=plan_widths, plan=plan_widths)


def test_presets_set_keys_of_the_plan(register, tmp_path):
    score = METHODS.find("gradpruner").score
    preset = {"contiguous": True, "protect_last": 1}
    register("preset", Method("a preset", score=score, needs_trace=True, merges=True, plan_options=preset))
    _, folder = carry_out(tmp_path, ["preset"])
    plan = PruningPlan.load(folder / "plans/preset.json")
    assert plan.pruned[1] == plan.pruned[0] + 1 and 3 in plan.keep and len(plan.merged) == 1
