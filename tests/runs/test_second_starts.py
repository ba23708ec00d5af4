"""A run directory started again with another recipe: nothing old passes for a result of the new one."""

import json
import shutil

import pytest
from builders import make_project, make_rows, write_rows
from typer.testing import CliRunner

from gradpruner.cli.main import app
from gradpruner.common.errors import ConfigError
from gradpruner.common.progress import set_mode
from gradpruner.exports.shipped import open_model
from gradpruner.gradients.trace import GradientTrace
from gradpruner.pruning.verification import verify_checkpoint
from gradpruner.reports import html
from gradpruner.reports.shipping import model_to_ship
from gradpruner.runs.evaluating import evaluate_folder
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.runs.row import depth_search
from gradpruner.runs.shrinking import prune

PLAN = {"num_prune": 2, "num_merge": 0}


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch):
    set_mode("quiet")
    monkeypatch.setattr(html, "render_html", lambda record, path: path)
    monkeypatch.setattr(Job, "release", lambda *a: None)
    yield
    set_mode("auto")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A recipe whose run is finished, and a copy of its folder."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    path, _ = make_project(folder, start="given", variants=["dense", "last"], plan=PLAN)
    set_mode("quiet")
    run(load_recipe(path))
    return path, shutil.copytree(folder, folder.with_name("copy"))


@pytest.fixture
def finished(saved):
    """The recipe of a run of a given model that is finished; its folder is as new for every test."""
    path, copy = saved
    shutil.rmtree(path.parent)
    shutil.copytree(copy, path.parent)
    return path


def states(record):
    return {stage["name"]: stage["state"] for stage in record["stages"]}


def test_without_its_recovery_a_plan_is_a_row_of_its_own(tmp_path):
    recovery = {"steps": 2, "keep_better": False}
    path, _ = make_project(tmp_path, start="given", variants=["dense", "last"], plan=PLAN, recover=recovery)
    first = run(load_recipe(path))
    assert model_to_ship(first).folder == "variants/last/model"
    without = ("recover.steps=0", "recover.epochs=0")
    again = run(load_recipe(path, without))
    name = again["rows"]["last"]
    row = again["variants"][name]
    assert name == "last@recover.steps=0" and row["finetune"] is None
    assert row["cost"]["seconds"]["training"] == 0 and again["variants"]["last"]["finetune"]
    assert run(load_recipe(path, without))["rows"]["last"] == name
    # In a study each variant has one row, and what is no longer asked for goes.
    record = run(load_recipe(path, without), one_plan=True)
    assert record["variants"]["last"]["finetune"] is None and model_to_ship(record, "last").folder.endswith(
        "pruned"
    )
    assert not (tmp_path / "run/variants/last/model").exists()


def test_a_dense_model_that_was_tuned_is_not_replaced_by_the_untuned_one(tmp_path):
    path, _ = make_project(tmp_path, variants=["dense", "last"], plan=PLAN)
    run(load_recipe(path))
    with pytest.raises(ConfigError, match="which an earlier start tuned"):
        run(load_recipe(path, ("start=given",)))
    assert (tmp_path / "run/variants/dense/model/model.safetensors").exists()


def test_scores_of_a_replaced_model_are_gone_with_it(tmp_path):
    write_rows(tmp_path / "held.jsonl", make_rows(6, seed=7))
    path, _ = make_project(tmp_path, variants=["dense", "last"], plan=PLAN)
    first = run(load_recipe(path, (f"data.validation={tmp_path / 'held.jsonl'}",)))
    assert set(first["variants"]["last"]["also"]) == {"validation"}
    same = run(load_recipe(path))  # the same model, so its scores are still true
    assert set(same["variants"]["last"]["also"]) == {"validation"}
    other = run(load_recipe(path, ("finetune.learning_rate=2e-3",)))
    assert [row["also"] for row in other["variants"].values()] == [{}, {}]


def test_the_tuned_model_stays_without_keep_models_and_is_not_tuned_again(tmp_path):
    path, _ = make_project(tmp_path, start="tuned", variants=["dense", "last"], plan=PLAN, keep_models="none")
    run(load_recipe(path))
    kept = [file.parent.parent.name for file in (tmp_path / "run/variants").rglob("model.safetensors")]
    assert kept == ["dense"]
    again = run(load_recipe(path))
    assert "done" not in states(again).values() and again["variants"]["last"]["error"] is None
    other = run(load_recipe(path, ("plan.num_prune=1",)), one_plan=True)
    assert states(other)["finetune dense"] == "skipped" and other["variants"]["last"]["num_layers"] == 3


def test_what_was_measured_on_other_rows_is_left_out(finished):
    write_rows(finished.parent / "eval.jsonl", make_rows(12, seed=5))
    record = run(load_recipe(finished, ("plan.num_prune=1",)))
    old, new = record["variants"]["last"], record["variants"]["last@num_prune=1"]
    assert old["evaluation"] is None and old["paired"] == {} and new["paired"]["task"]
    assert [w for w in record["warnings"] if w.startswith("The row last was evaluated on other")]
    shipped = model_to_ship(record)
    assert shipped.row == "last@num_prune=1" and "first plan that was measured" in shipped.reason
    again = run(load_recipe(finished))
    assert all(row["evaluation"] for row in again["variants"].values())
    assert not [w for w in again["warnings"] if "on other rows" in w]


def test_a_start_that_evaluates_nothing_leaves_the_figures(finished):
    record = run(load_recipe(finished, ("plan.num_prune=1", "evaluate.max_new_tokens=1")), until="plan")
    assert all(record["variants"][name]["evaluation"] for name in ("dense", "last"))


def test_results_of_an_older_version_count_once_they_are_checked(finished):
    file = finished.parent / "run/manifest.json"
    manifest = json.loads(file.read_text())
    for stage in manifest["stages"].values():
        stage.pop("conditions")
    file.write_text(json.dumps(manifest))
    beside = run(load_recipe(finished, ("plan.num_prune=1",)))
    assert beside["variants"]["last"]["evaluation"] is None and beside["variants"]["dense"]["evaluation"]
    run(load_recipe(finished))  # skips all, and knows now that it is like the others
    again = run(load_recipe(finished, ("plan.num_prune=1",)))
    assert all(row["evaluation"] for row in again["variants"].values())


def test_rows_made_from_a_dense_model_that_is_gone_are_left_out(tmp_path, caplog):
    path, _ = make_project(tmp_path, start="tuned", variants=["dense", "last"], plan=PLAN)
    run(load_recipe(path))
    record = run(load_recipe(path, ("finetune.learning_rate=2e-3",)))
    old, new = record["variants"]["last"], record["variants"][record["rows"]["last"]]
    assert old["evaluation"] is None and new["evaluation"] and "tuned again" in caplog.text
    assert [w for w in record["warnings"] if "no longer here" in w]
    assert model_to_ship(record).row == record["rows"]["last"]


def test_a_run_that_was_stopped_says_so_when_its_model_is_opened(finished):
    assert "stopped" not in open_model(str(finished.parent / "run")).warning
    file = finished.parent / "run/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["stages"]["evaluate last"]["state"] = "running"
    file.write_text(json.dumps(manifest))
    assert "evaluate last (running)" in open_model(str(finished.parent / "run")).warning
    said = CliRunner().invoke(app, ["report", str(finished.parent / "run")])
    assert "was stopped before it was finished: evaluate last (running)" in said.stderr


def test_other_settings_of_the_evaluation_are_other_conditions(finished):
    record = run(load_recipe(finished, ("plan.num_prune=1", "evaluate.max_new_tokens=1")))
    assert record["variants"]["last"]["evaluation"] is None


def test_a_search_counts_only_for_the_plan_it_led_to(tmp_path, monkeypatch):
    def scores(job, model):
        wrong = {4: 0, 3: 0, 2: 30}[model.config.num_hidden_layers]
        return {"exact_match": [float(i >= wrong) for i in range(80)]}

    monkeypatch.setattr(depth_search, "_scores_of", scores)
    write_rows(tmp_path / "held.jsonl", make_rows(80, seed=3))
    path, _ = make_project(tmp_path, start="given", variants=["dense", "last"], plan={"num_merge": 0})
    held = f"data.validation={tmp_path / 'held.jsonl'}"
    limited = run(load_recipe(path, ("plan.num_prune=null", "plan.max_loss=0.1", held)))
    assert limited["plans"]["last"]["search"]["best"] == 1
    assert limited["variants"]["last"]["cost"]["seconds"]["choosing"] > 0
    given = run(load_recipe(path, ("plan.num_prune=1",)))
    assert given["rows"]["last"] == "last" and given["plans"]["last"]["search"] is None
    back = run(load_recipe(path, ("plan.num_prune=null", "plan.max_loss=0.1", held)))
    assert states(back)["search last"] == "skipped" and back["plans"]["last"]["search"]["best"] == 1


def test_a_given_plan_is_merged_again_from_another_recording(tmp_path):
    path, _ = make_project(tmp_path, variants=["merged"])
    run(load_recipe(path, (), {"out": str(tmp_path / "first")}), until="plan")
    given = (f"plan.file={tmp_path / 'first/plans/merged.json'}", "plan.num_prune=null", "plan.num_merge=0")
    run(load_recipe(path, given), until="prune")
    record = run(load_recipe(path, (*given, "record.learning_rate=5e-3")), until="prune")
    row = record["rows"]["merged"]
    assert states(record)[f"prune {row}"] == "done"
    folder = tmp_path / "run/variants" / row / "pruned"
    assert verify_checkpoint(
        folder, source=tmp_path / "model", trace=GradientTrace.load(tmp_path / "run/trace")
    ).passed


def test_the_time_of_a_resumed_evaluation_is_not_known(tmp_path):
    path, _ = make_project(tmp_path, start="given", variants=["dense"], plan=PLAN)
    assert run(load_recipe(path))["variants"]["dense"]["evaluation"]["seconds"] > 0
    file = tmp_path / "run/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["stages"]["evaluate dense"]["resumed"] = True
    file.write_text(json.dumps(manifest))
    assert run(load_recipe(path))["variants"]["dense"]["evaluation"]["seconds"] is None


def test_options_of_the_methods_that_either_asks_count(tmp_path):
    path, _ = make_project(tmp_path, variants=["dense", "either"])
    plain, paired = (Job(load_recipe(path, more)) for more in ((), ("methods.gate.pairwise=true",)))
    assert paired.context("either", dict, tmp_path).options_of("gate").pairwise
    assert "asked" in paired.decision_inputs("either") and "asked" not in plain.decision_inputs("either")


def test_calls_that_could_not_give_what_is_asked_are_refused(tmp_path):
    path, _ = make_project(tmp_path)
    with pytest.raises(ConfigError, match="leave no model"):
        prune(tmp_path / "model", tmp_path / "train.jsonl", settings={"keep_models": "none"})
    with pytest.raises(ConfigError, match=r"evaluate\.also"):
        evaluate_folder(load_recipe(path, ("evaluate.also=[{task: sst2}]",)))
