"""Models pruned after tuning: start, repair, recovery, certified depth, effort, and what it all took."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import make_project, make_rows, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gradpruner.cli.main import app
from gradpruner.common.errors import ConfigError, DataError, PlanError
from gradpruner.common.progress import set_mode
from gradpruner.evaluation.metrics import clearly_worse
from gradpruner.gradients.scores import LayerScores
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, either
from gradpruner.methods.calibration import put_aside
from gradpruner.models.folder import PRUNING_FILE
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.options import RepairOptions
from gradpruner.plans.repair import Repair
from gradpruner.pruning.repair import refitting
from gradpruner.pruning.repair.refitting import fit_repair
from gradpruner.pruning.verification import verify_checkpoint
from gradpruner.reports import html
from gradpruner.reports.html import render_html
from gradpruner.runs.before.preview import dry_run
from gradpruner.runs.folder.directory import RunDirectory, inputs_hash
from gradpruner.runs.folder.run_record import title_of
from gradpruner.runs.job.early_checks import check_changed_training, check_methods
from gradpruner.runs.job.evaluation_data import with_validation
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import check_recipe, load_recipe
from gradpruner.runs.row import work
from gradpruner.runs.row.depth_search import possible_plans, refuse_uncertified
from gradpruner.training.options import FinetuneOptions


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    set_mode("quiet")
    monkeypatch.setattr(Job, "release", lambda *a: None)
    yield
    set_mode("auto")


def carry_out(tmp_path, **recipe):
    path, _ = make_project(tmp_path, **recipe)
    return run(load_recipe(path)), tmp_path / "run"


REPAIRED = {"num_prune": 2, "num_merge": 0, "repair": "least_squares", "repair_rows": 12}
WHATEVER = {"steps": 3, "keep_better": False}


def test_a_tuned_model_is_pruned_and_repaired_without_training(tmp_path):
    record, folder = carry_out(tmp_path, start="tuned", variants=["gate", "dense"], plan=REPAIRED)
    dense, row = record["variants"]["dense"], record["variants"]["gate"]
    assert dense["finetune"]["steps"] == 6 and row["finetune"] is None and row["before"] is None
    assert row["error"] is None and row["evaluation"]["metrics"]["exact_match"]["n"] == 12
    assert not (folder / "variants/gate/model").exists()
    # What was pruned is the tuned model, not the one that was given.
    tuned = load_file(folder / "variants/dense/model/model.safetensors")
    pruned = load_file(folder / "variants/gate/pruned/model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(tuned[name], pruned[name])
    assert not torch.equal(tuned[name], load_file(tmp_path / "model/model.safetensors")[name])
    facts = json.loads((folder / "variants/gate/pruned" / PRUNING_FILE).read_text())
    assert facts["repair"]["kind"] == "least_squares" and row["repair"]["rows"] == 12
    assert verify_checkpoint(folder / "variants/gate/pruned", level="full").passed
    # The refitted weights of the folder are those of the repair that is kept beside it.
    repair = Repair.load(folder / "variants/gate/repair")
    for tensor in facts["repair"]["tensors"]:
        assert any(torch.equal(pruned[tensor], weight) for weight in repair.weights.values())
    assert "Repair (least squares)" in render_html(record, tmp_path / "r.html").read_text()


def test_a_second_start_skips_all_stages_and_another_repair_keeps_recording_and_plan(tmp_path):
    path, _ = make_project(tmp_path, start="tuned", variants=["dense", "gate"], plan=REPAIRED)
    first = run(load_recipe(path))
    again = run(load_recipe(path))
    assert {stage["state"] for stage in again["stages"]} == {"skipped"}
    assert again["variants"]["gate"]["cost"] == first["variants"]["gate"]["cost"]
    other = run(load_recipe(path, ("plan.repair=linear",)))
    states = {stage["name"]: stage["state"] for stage in other["stages"]}
    assert states["record"] == states["finetune dense"] == "skipped"
    assert states["repair gate@repair=linear"] == states["prune gate@repair=linear"] == "done"
    # The first repair's model and figures are there beside the other's.
    rows = {name: row["repair"]["kind"] for name, row in other["variants"].items() if row["repair"]}
    assert rows == {"gate": "least_squares", "gate@repair=linear": "linear"}
    assert other["variants"]["gate"]["evaluation"] == first["variants"]["gate"]["evaluation"]


def test_recovery_trains_the_pruned_model_from_its_teacher(tmp_path):
    record, folder = carry_out(
        tmp_path,
        start="tuned",
        variants=["dense", "dropped"],
        plan=REPAIRED,
        recover={"steps": 2, "learning_rate": 5e-4},
        distil={"teacher": "tuned", "prompts": 0.0},
    )
    tuning, recovery = (record["variants"][name]["finetune"] for name in ("dense", "dropped"))
    assert (tuning["steps"], recovery["steps"]) == (6, 2)  # a row of 24 is held out
    assert max(entry["learning_rate"] for entry in recovery["losses"]) <= 5e-4
    assert "ce" in recovery["losses"][0] and "ce" not in tuning["losses"][0]
    model = AutoModelForCausalLM.from_pretrained(folder / "variants/dropped/model")
    assert model.config.num_hidden_layers == 2
    # What counts as done is the rate: 5e-4 is half of the dense model's, which is the default too.
    for rate, state in (("null", "skipped"), ("1e-3", "done")):
        again = run(load_recipe(tmp_path / "recipe.yaml", (f"recover.learning_rate={rate}",)))
        states = {stage["name"]: stage["state"] for stage in again["stages"]}
        assert states["finetune dropped"] == state


def _check_records(row: Path, trained: bool) -> None:
    """Checks that the trained model's folder says what the pruned one says, and that it verifies."""
    facts = [json.loads((row / name / PRUNING_FILE).read_text()) for name in ("pruned", "model")]
    for key in ("source", "previous", "repair", "plan"):
        assert facts[0][key] == facts[1][key]
    assert facts[1]["previous"]["finetune"]["steps"] and facts[1]["source"].endswith("/variants/dense/model")
    card = (row / "model/README.md").read_text()
    for said in ("# model, depth", "fine-tuned before it was pruned", "Repaired (least squares, 12 rows"):
        assert said in card
    assert ("Then it was fine-tuned" in card) == trained
    report = verify_checkpoint(row / "model", level="full")
    (source,) = [check.detail for check in report.checks if check.name == "source"]
    assert report.passed and ("fine-tuned after pruning" in source) == trained
    with pytest.raises(PlanError, match="was made from model") as caught:
        verify_checkpoint(row / "model", row.parents[2] / "model")
    assert "--source" in caught.value.hint


@pytest.mark.parametrize(("rate", "kept"), [(1e-3, "trained"), (30.0, "pruned")])
def test_a_recovery_is_kept_unless_it_clearly_raises_the_validation_loss(tmp_path, rate, kept):
    record, folder = carry_out(
        tmp_path,
        start="tuned",
        variants=["dense", "dropped"],
        plan=REPAIRED,
        recover={"steps": 4, "learning_rate": rate},
    )
    row = record["variants"]["dropped"]
    found = row["finetune"]["kept"]
    assert (found["model"], found["rows"]) == (kept, 1)  # two of 24 rows, but few have a prompt of their own
    assert (found["after"] < found["before"]) == (kept == "trained")
    both = [load_file(folder / f"variants/dropped/{name}/model.safetensors") for name in ("pruned", "model")]
    same = all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert same == (kept == "pruned")
    _check_records(folder / "variants/dropped", trained=kept == "trained")
    page = render_html(record, tmp_path / "r.html").read_text()
    assert ("the model from before that training was kept" in page) == same


def test_a_loss_is_clearly_higher_if_its_paired_interval_is():
    before = [float(i % 7) for i in range(200)]
    noise = [((i * 37) % 101 - 50) / 100 for i in range(200)]  # mean about 0, standard error about 0.02
    assert not clearly_worse(before, [one + other + 0.01 for one, other in zip(before, noise, strict=True)])
    assert clearly_worse(before, [one + other + 0.1 for one, other in zip(before, noise, strict=True)])
    assert not clearly_worse(before, [one - 0.1 for one in before]) and not clearly_worse(before, before)


def test_a_recovery_is_judged_as_it_is_saved(tmp_path):
    path, _ = make_project(tmp_path, start="given", variants=["dense", "dropped"], plan=REPAIRED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    rate = ("recover.steps=2", "recover.learning_rate=1e-9")  # far below the resolution of bfloat16
    found = run(load_recipe(path, rate))["variants"]["dropped"]["finetune"]["kept"]
    assert found["model"] == "pruned" and found["after"] == found["before"]
    kept = run(load_recipe(path, ("recover.steps=4", "recover.learning_rate=3e-3")))["variants"]
    row = next(
        row for row in kept.values() if row["finetune"] and row["finetune"]["kept"]["model"] == "trained"
    )
    assert row["finetune"]["kept"]["after"] < row["finetune"]["kept"]["before"]


def test_auto_trains_its_candidates_as_the_run_trains_the_pruned_model(tmp_path):
    recover = {"epochs": 0.5, "learning_rate": 5e-4}
    path, _ = make_project(
        tmp_path, start="tuned", variants=["dense", "auto"], plan=REPAIRED, recover=recover
    )
    job = Job(load_recipe(path, ("finetune.epochs=3",)))
    training = job.context("auto", lambda: None, tmp_path).finetune
    assert (training.epochs, training.learning_rate, job.training.epochs) == (0.5, 5e-4, 3)
    assert job.context("longer", lambda: None, tmp_path).finetune == job.training  # of the dense model
    inputs = [Job(load_recipe(path, asked)).decision_inputs("auto") for asked in ((), ("recover.epochs=1",))]
    assert inputs[0] != inputs[1]


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("shortgpt", "model.dtype=bfloat16"),
        ("task_loss", "plan.portable_to=[vllm]"),
        ("auto", "finetune.learning_rate=0.1"),
    ],
)
def test_scores_depend_on(tmp_path, method, changed):
    path, _ = make_project(tmp_path, variants=["dense", method], plan=REPAIRED)
    assert inputs_hash(Job(load_recipe(path)).decision_inputs(method)) != inputs_hash(
        Job(load_recipe(path, (changed,))).decision_inputs(method)
    )


def test_the_tokenizer_is_part_of_the_model(tmp_path):
    path, _ = make_project(tmp_path)
    before = Job(load_recipe(path)).model_sha256
    settings = tmp_path / "model/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": False}))
    assert Job(load_recipe(path)).model_sha256 != before


def test_answers_of_every_process_go_when_the_model_changes(tmp_path):
    path, _ = make_project(tmp_path, start="given", variants=["dense", "last"], plan=REPAIRED)
    run(load_recipe(path))
    left = tmp_path / "run/variants/dense/examples.jsonl.part-1"
    rows = (tmp_path / "run/variants/dense/examples.jsonl").read_text().splitlines()
    left.write_text(
        "".join(f"[{i}, {json.dumps(json.loads(r) | {'generated': 'old'})}]\n" for i, r in enumerate(rows))
    )
    run(load_recipe(path, ("evaluate.max_new_tokens=3",)))
    assert not left.exists()
    assert '"old"' not in (tmp_path / "run/variants/dense/examples.jsonl").read_text()


def test_other_validation_rows_decide_about_a_recovery_again(tmp_path):
    write_rows(tmp_path / "held.jsonl", make_rows(6, seed=7))
    path, _ = make_project(
        tmp_path, start="tuned", variants=["dense", "dropped"], plan=REPAIRED, recover={"steps": 1}
    )
    given = (f"data.validation={tmp_path / 'held.jsonl'}",)
    run(load_recipe(path, given))
    write_rows(tmp_path / "held.jsonl", make_rows(5, seed=8))
    record = run(load_recipe(path, given))
    row = next(row for name, row in record["variants"].items() if name != "dense" and row["finetune"])
    states = {stage["name"]: stage["state"] for stage in record["stages"]}
    assert states["finetune dense"] == states["repair dropped"] == "skipped"
    assert states["finetune dropped"] == "done" and row["finetune"]["kept"]["rows"] == 5


def test_other_processes_recover_at_the_rate_of_the_first(tmp_path):
    path, _ = make_project(tmp_path, start="given", recover={"steps": 1}, finetune={"learning_rate": None})
    first = Job(load_recipe(path))
    other = Job(check_recipe(first.recipe.model_dump(mode="json")))  # as `together` makes it
    assert first.recover_rate == other.recover_rate == first.recipe.finetune.learning_rate / 2


def test_a_given_model_is_measured_as_it_is(tmp_path):
    record, folder = carry_out(tmp_path, start="given", variants=["dense", "dropped"], plan=REPAIRED)
    dense = record["variants"]["dense"]
    assert dense["finetune"] is None and dense["evaluation"]["metrics"]
    assert not (folder / "variants/dense/model").exists()
    stages = [stage["name"] for stage in record["stages"]]
    assert "repair dropped" in stages and not any(name.startswith("finetune") for name in stages)


def test_costs_count_everything_a_row_needed(tmp_path):
    record, _ = carry_out(
        tmp_path, start="tuned", variants=["dense", "gate", "last"], plan=REPAIRED, recover={"steps": 1}
    )
    stages = {stage["name"]: stage["seconds"] for stage in record["stages"]}
    gate, last = (record["variants"][name]["cost"] for name in ("gate", "last"))
    expected = ["finetune dense", "record", "score gate", "plan gate", "repair gate", "prune gate"]
    assert gate["seconds"]["total"] == pytest.approx(sum(stages[n] for n in [*expected, "finetune gate"]))
    assert last["seconds"]["recording"] == 0 and last["seconds"]["tuning"] == stages["finetune dense"]
    dense = record["variants"]["dense"]["cost"]
    assert dense["seconds"]["total"] == pytest.approx(stages["finetune dense"])
    assert gate["tokens"] > last["tokens"] > dense["tokens"] > 0
    assert "Total time" in render_html(record, tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # 6 steps of 4 samples; 4 steps of 4 are recorded; 2 of 4 layers stay.
        ({"plan": REPAIRED | {"repair": "none"}}, 0.5 + 16 / 24),
        ({"plan": REPAIRED}, 0.5 + 16 / 24 + 12 * 2.5 / 3 / 24),
        ({"plan": REPAIRED | {"repair": "none"}, "start": "tuned", "recover": WHATEVER}, 1.25 + 16 / 24),
        ({"plan": REPAIRED | {"repair": "none"}, "distil": {"teacher": "tuned"}}, 1.5 + 1 / 3 + 16 / 24),
    ],
)
def test_the_work_of_a_pruned_row_is_counted_in_dense_fine_tunings(tmp_path, recipe, expected):
    path, _ = make_project(tmp_path, **recipe)
    assert Job(load_recipe(path)).pruned_work == pytest.approx(expected)


def test_the_dense_model_is_shown_tuned_for_the_same_work(tmp_path):
    record, _ = carry_out(
        tmp_path,
        start="tuned",
        variants=["dense", "longer", "dropped"],
        plan=REPAIRED | {"repair": "none"},
        recover=WHATEVER,
        evaluate={"before_finetuning": False},
    )
    steps = {name: row["finetune"]["steps"] for name, row in record["variants"].items()}
    assert steps == {"dense": 6, "longer": 12, "dropped": 3}  # ceil(1.92 * 6)
    longer = record["variants"]["longer"]
    assert longer["label"] == "dense, same work" and longer["num_layers"] == 4
    seconds = longer["cost"]["seconds"]
    assert seconds["total"] == seconds["training"] > 0


# -- how many layers -------------------------------------------------------------------------------------


def fake_scores(monkeypatch, lost):
    """Every row right but for `lost(layers)` of them: what a model of so many layers scores."""
    from gradpruner.runs.row import depth_search

    def scores(job, model):
        wrong = lost(model.config.num_hidden_layers)
        return {"exact_match": [float(i >= wrong) for i in range(len(job.validation))]}

    monkeypatch.setattr(depth_search, "_scores_of", scores)


def certifying(path):
    """The recipe with a search for the number of layers, on 80 validation rows."""
    rows = path.parent / "validation.jsonl"
    write_rows(rows, make_rows(80, seed=3))
    changes = ("plan.num_prune=null", "plan.num_merge=0", "plan.max_loss=0.1", "plan.repair=linear")
    return load_recipe(path, changes, {"data.validation": str(rows)})


def test_the_largest_certified_number_of_layers_is_pruned(tmp_path, monkeypatch):
    fake_scores(monkeypatch, lambda layers: {4: 0, 3: 0, 2: 30}[layers])
    path, _ = make_project(tmp_path, start="given", variants=["dense", "gate"])
    recipe = certifying(path)
    record = run(recipe)
    search = record["plans"]["gate"]["search"]
    assert search["best"] == 1 and record["variants"]["gate"]["num_layers"] == 3
    assert {p["num_prune"]: p["verdict"] for p in search["curve"]} == {1: "certified", 2: "not certified"}
    assert search["rows"] == 80 and search["metric"] == "exact_match"
    validated = [row["also"]["validation"]["metrics"] for row in record["variants"].values()]
    assert [found["exact_match"]["n"] for found in validated] == [80, 80]
    sizes = {p["num_prune"]: p["parameters"] for p in search["curve"]}
    assert sizes[1] > sizes[2] and sizes[1] == record["variants"]["gate"]["num_parameters"]
    shown = render_html(record, tmp_path / "r.html").read_text()
    assert "How many layers can be removed" in shown and "1 layer certified" in shown
    again = run(recipe)
    assert {s["state"] for s in again["stages"] if s["name"].startswith("search")} == {"skipped"}


def test_two_choices_are_compared_and_the_search_goes_on_with_the_better_one(tmp_path, monkeypatch):
    fake_scores(monkeypatch, lambda layers: {4: 0, 3: 0, 2: 30}[layers])
    losses = {"gradpruner": 2.0, "gate": 1.0}
    monkeypatch.setattr(either, "_compared", lambda context, plans, aside: (losses, ""))
    path, _ = make_project(tmp_path, start="given", variants=["dense", "either"])
    recipe = certifying(path)
    record = run(recipe)
    plan = record["plans"]["either"]
    assert plan["search"]["best"] == 1 and plan["comparison"]["losses"] == losses
    gate = METHODS.find("gate").score(Job(recipe).context("gate", lambda: _trace(tmp_path), tmp_path))
    assert [a["layer"] for a in plan["actions"] if a["action"] == "drop"] == [gate.ascending()[0]]
    assert "were chosen by the gate" in (tmp_path / "run/report.html").read_text()


def test_rows_that_could_certify_nothing_are_refused_once_the_dense_model_is_measured(tmp_path, monkeypatch):
    fake_scores(monkeypatch, lambda layers: {4: 70, 3: 70, 2: 70}[layers])
    path, _ = make_project(tmp_path, start="given", variants=["dense", "gate"])
    with pytest.raises(PlanError, match=r"scores 12.5% on 80 .*cannot certify.*are needed"):
        run(certifying(path))


def test_what_is_certified_is_what_is_kept(tmp_path, monkeypatch):
    """The repair fitted for the choice saw fewer rows than the one that was certified."""
    fake_scores(monkeypatch, lambda layers: {4: 0, 3: 30, 2: 0}[layers])
    monkeypatch.setattr(either, "_reason", lambda *_: "")
    fitted, real = [], work.fit
    monkeypatch.setattr(work, "fit", lambda variant: fitted.append(1) or real(variant))
    path, _ = make_project(tmp_path, start="given", variants=["dense", "either"])
    recipe = certifying(path).with_values(plan={"repair_rows": 12})
    run(recipe)
    assert fitted == [1]


def _trace(tmp_path):
    return GradientTrace.load(tmp_path / "run/trace")


def test_scores_that_depend_on_the_budget_are_kept_for_every_plan(tmp_path, monkeypatch):
    compared = []

    def compare(context, plans, aside):
        compared.append({name: plan.pruned for name, plan in plans.items()})
        return {"gradpruner": 2.0, "gate": 1.0}, ""

    monkeypatch.setattr(either, "_compared", compare)
    monkeypatch.setattr(either, "_reason", lambda *_: "")
    path, _ = make_project(tmp_path, start="given", variants=["dense", "either"], plan=REPAIRED)
    first = run(load_recipe(path))
    assert first["variants"]["either"]["label"] == "pruned + repaired" and len(compared) == 1
    one = run(load_recipe(path, ("plan.num_prune=1",)))
    again = run(load_recipe(path))
    half = run(load_recipe(path, ("plan.num_prune=null", "plan.layer_fraction=0.5")))  # the same two layers
    assert len(compared) == 2
    for record in (one, again):
        assert {name: plan["scores"] for name, plan in record["plans"].items()} == {
            "either": "either", "either@num_prune=1": "either@2",
        }  # fmt: skip
        assert set(record["scores"]) == {"either", "either@2"}
        assert record["variants"]["either"]["cost"] == first["variants"]["either"]["cost"]
    assert {plan["scores"] for plan in half["plans"].values()} == {"either", "either@2"}
    run(load_recipe(path, ("plan.repair=linear",)))
    assert len(compared) == 3


@pytest.mark.parametrize(("rows", "fits"), [(12, 0), (24, 1)])
def test_the_winners_repair_is_not_fitted_again_if_it_saw_as_many_samples(tmp_path, monkeypatch, rows, fits):
    fitted, real = [], work.fit
    monkeypatch.setattr(work, "fit", lambda variant: fitted.append(1) or real(variant))
    monkeypatch.setattr(either, "_reason", lambda *_: "")
    plan = REPAIRED | {"repair_rows": rows}
    path, _ = make_project(tmp_path, start="given", variants=["dense", "either"], plan=plan)
    recipe = load_recipe(path)
    run(recipe, until="plan")
    chosen = tmp_path / "run/scores/either/repair"
    assert chosen.is_dir() is not bool(fits)
    kept = Repair.load(chosen) if chosen.is_dir() else None
    record = run(recipe)
    found = Repair.load(tmp_path / "run/variants/either/repair")
    assert len(fitted) == fits and not chosen.exists() and found.rows == rows
    assert record["variants"]["either"]["repair"]["rows"] == rows
    if kept is not None:
        assert all(torch.equal(found.weights[layer], weight) for layer, weight in kept.weights.items())
        _, rest = put_aside(Job(recipe).samples, 256, 0)
        model = Job(recipe).load(tmp_path / "model")
        again = fit_repair(model, stored_plan(tmp_path), rest, Job(recipe).collator, Job(recipe).repair)
        assert all(torch.equal(found.weights[layer], weight) for layer, weight in again.weights.items())


def stored_plan(tmp_path):
    return PruningPlan.load(tmp_path / "run/plans/either.json")


def test_choices_are_compared_on_validation_rows_unless_these_certify_a_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(either, "_reason", lambda *_: "")
    changes = {"start": "tuned", "variants": ["dense", "either"], "plan": REPAIRED, "recover": {"steps": 1}}
    record, folder = carry_out(tmp_path / "best", **changes)
    found, rows = (
        record["plans"]["either"]["comparison"],
        record["variants"]["either"]["finetune"]["kept"]["rows"],
    )
    assert (found["rows"], found["held_out"]) == ("validation rows", rows)
    assert f"on {rows} validation rows" in (folder / "report.html").read_text()
    fake_scores(monkeypatch, lambda layers: 0)
    (tmp_path / "certified").mkdir()
    path, _ = make_project(tmp_path / "certified", start="given", variants=["dense", "either"])
    write_rows(tmp_path / "validation.jsonl", make_rows(80, seed=3))
    given = {"data.validation": str(tmp_path / "validation.jsonl"), "plan.repair": "linear"}
    found = run(load_recipe(path, ("plan.max_loss=0.1", "plan.num_merge=0"), given))["plans"]["either"][
        "comparison"
    ]
    assert (found["rows"], found["held_out"]) == ("training rows set aside", 6)


def test_a_given_plan_needs_no_scores_and_no_recording(tmp_path, caplog):
    path, _ = make_project(tmp_path, start="given", variants=["dense", "either"])
    PruningPlan.from_keep(4, (0, 3)).save(tmp_path / "own.json")
    given = {"plan.file": str(tmp_path / "own.json"), "plan.repair": "linear"}
    record = run(load_recipe(path, ("plan.num_prune=null", "plan.num_merge=0"), given))
    actions = record["plans"]["either"]["actions"]
    assert [a["layer"] for a in actions if a["action"] == "keep"] == [0, 3]
    states = {stage["name"] for stage in record["stages"]}
    assert not states & {"record", "score either"} and record["plans"]["either"]["comparison"] == {}
    assert record["variants"]["either"]["cost"]["seconds"]["recording"] == 0
    for key in ("plan.num_prune=2", "plan.max_loss=0.1"):
        with pytest.raises(ConfigError, match=f"{key.split('=')[0].partition('.')[2]} how many"):
            load_recipe(path, ("plan.num_prune=null", key), given)
    other = load_recipe(path, ("plan.num_prune=null", "variants=[dense,gate,last]"), given)
    with pytest.raises(ConfigError, match="gate, last chooses layers by itself"):
        run(other)


def test_effort_fast_removes_the_last_layers_and_records_nothing(tmp_path):
    path, _ = make_project(tmp_path, effort="fast", plan={"num_prune": 2, "repair_rows": 12})
    record = run(load_recipe(path))
    assert [a["layer"] for a in record["plans"]["last"]["actions"] if a["action"] == "drop"] == [1, 2]
    assert record["variants"]["last"]["repair"]["kind"] == "least_squares"
    assert record["variants"]["last"]["finetune"]["steps"] == record["variants"]["dense"]["finetune"]["steps"]
    assert "record" not in {stage["name"] for stage in record["stages"]}
    facts = dry_run(load_recipe(path, (f"out={tmp_path / 'new'}",))).facts
    assert facts["record_steps"] == facts["seconds_estimate"]["record"] == 0
    # A plan that the user edited is followed by a row of its own.
    again = load_recipe(tmp_path / "run/recipe.yaml", (), {"plan.file": str(tmp_path / "run/plans/last.json"),
                                                           "plan.num_prune": None})  # fmt: skip
    assert again.variants == ["dense", "dropped"] and not Job(again).recorded_steps


@pytest.mark.parametrize(("count", "taken"), [(10, "all"), (24, "few"), (200, "share"), (900, "well")])
def test_before_tuning_a_repair_takes_few_rows_unless_there_are_many(tmp_path, monkeypatch, count, taken):
    monkeypatch.setattr(refitting, "FEWEST_ROWS", 2)
    path, _ = make_project(tmp_path, effort="fast", plan={"num_prune": 2, "repair": "least_squares"})
    write_rows(tmp_path / "train.jsonl", make_rows(count))
    job = Job(load_recipe(path))
    few, well = (
        refitting.enough_rows(job.structure, list(job.samples), RepairOptions(tokens_per_unknown=tokens))
        for tokens in (5, 20)
    )
    expected = {"all": count, "few": few, "share": count // 8, "well": well}
    assert job.repair_rows == expected[taken]
    assert Job(load_recipe(path, ("start=given", "variants=[dense, gate]"))).repair_rows == well


def test_effort_fast_lets_the_gate_choose_where_answers_are_long(tmp_path):
    path, _ = make_project(tmp_path, effort="fast", plan={"num_prune": 2})
    rows = [row | {"completion": f" the {i} {row['completion'] * 10}"} for i, row in enumerate(make_rows(24))]
    write_rows(tmp_path / "train.jsonl", rows)
    record = run(load_recipe(path), until="plan")
    assert list(record["plans"]) == ["gate"]
    again = run(load_recipe(tmp_path / "run/recipe.yaml"), until="plan")
    assert {stage["state"] for stage in again["stages"]} == {"skipped"} and list(again["plans"]) == ["gate"]


def test_an_edited_plan_is_not_called_the_choice_of_either(tmp_path, monkeypatch):
    monkeypatch.setattr(either, "_compared", lambda *_: ({"gradpruner": 2.0, "gate": 1.0}, ""))
    monkeypatch.setattr(either, "_reason", lambda *_: "")
    path, _ = make_project(tmp_path, start="given", variants=["dense", "either"], plan=REPAIRED)
    record = run(load_recipe(path))
    assert record["plans"]["either"]["comparison"]["same"] is True
    assert "Method: either: gate." in (tmp_path / "run/variants/either/pruned/README.md").read_text()
    edited = json.loads((tmp_path / "run/plans/either.json").read_text())
    for action, name in zip(edited["actions"], ("keep", "keep", "drop", "keep"), strict=True):
        action["action"] = name
    (tmp_path / "own.json").write_text(json.dumps(edited))
    given = {"plan.file": str(tmp_path / "own.json"), "plan.num_prune": None}
    facts = run(load_recipe(path, (), given))["plans"]["either@own"]["comparison"]
    assert facts["same"] is False


def test_pairwise_gates_have_evidence_of_their_own(tmp_path):
    path, _ = make_project(tmp_path, start="given", variants=["dense", "gate"], plan=REPAIRED)
    record = run(load_recipe(path, ("methods.gate.pairwise=true",)))
    assert record["variants"]["gate"]["error"] is None and record["plans"]["gate"]["comparison"] == {}
    assert "Method: gate." in (tmp_path / "run/variants/gate/pruned/README.md").read_text()
    scores = LayerScores.load(tmp_path / "run/scores/gate.json")
    assert isinstance(scores.evidence["chosen"], list) and "Scores (gate)" in str(scores)


def test_a_repair_needs_two_samples(tmp_path):
    path, _ = make_project(tmp_path, start="given", variants=["dense", "either"], plan=REPAIRED)
    write_rows(tmp_path / "train.jsonl", make_rows(1))
    with pytest.raises(DataError, match="a repair needs two"):
        Job(load_recipe(path))


def test_too_few_validation_rows_are_an_error_before_anything_is_done(tmp_path):
    path, _ = make_project(tmp_path, start="given", variants=["dense", "gate"])
    overrides = ("plan.num_prune=null", "plan.num_merge=0", "plan.max_loss=0.01")
    recipe = load_recipe(path, overrides)
    for start in (run, dry_run):
        with pytest.raises(
            PlanError, match=r"at most 1\.00%, 300 validation rows are needed at least.* are 4:"
        ):
            start(recipe)
    assert not (tmp_path / "run").exists()
    assert any("held out of the training rows" in warning for warning in Job(recipe).warnings)


def test_validation_rows_are_no_training_rows(tmp_path):
    path, _ = make_project(tmp_path, start="given")
    job = Job(load_recipe(path, ("plan.num_prune=null", "plan.max_loss=0.05")))
    train = {example.id for example in job.train.examples}
    held_out = {example.id for example in job.validation.examples}
    assert (len(train), len(held_out)) == (20, 4) and not train & held_out
    assert len(job.samples) == 20
    assert list(possible_plans(job)) == [1, 2]
    again = Job(load_recipe(path, ("plan.num_prune=null", "plan.max_loss=0.05")))
    assert {example.id for example in again.validation.examples} == held_out


def test_rows_too_few_to_hold_any_out_are_refused(tmp_path):
    path, _ = make_project(tmp_path, start="given")
    write_rows(tmp_path / "train.jsonl", make_rows(4))
    recipe = load_recipe(path, ("plan.num_prune=null", "plan.max_loss=0.05"))
    with pytest.raises(DataError, match="too few to hold validation rows out"):
        Job(recipe)
    with pytest.raises(DataError, match="too few"):
        job = Job(load_recipe(path))
        with_validation(recipe, job.train, job.tokenizer)


def test_a_search_without_a_result_names_rows_and_limit():
    point = {"num_prune": 1, "loss": 0.0, "upper": 0.02, "verdict": "too few rows", "rows_needed": 300}
    found = {"best": None, "limit": 0.01, "metric": "exact_match", "rows": 150, "curve": [point]}
    with pytest.raises(PlanError, match=r"150 validation rows.*300 rows are needed"):
        refuse_uncertified(found)
    assert refuse_uncertified(found | {"best": 3}) == 3


# -- recipes ---------------------------------------------------------------------------------------------

PLAIN = {"model": {"path": "m"}, "data": {"train": "a.jsonl", "eval": "b.jsonl"}}


def test_an_effort_sets_what_the_recipe_leaves_open():
    best = check_recipe(PLAIN | {"effort": "best", "plan": {"num_prune": 3}, "recover": {"steps": 7}})
    assert (best.start, best.plan.repair, best.plan.num_prune) == ("tuned", "auto", 3)
    assert best.recover.steps == 7 and best.distils and best.variants == ["dense", "either"]
    fast = check_recipe(PLAIN | {"effort": "fast", "variants": ["dense", "gate"]})
    assert (fast.start, fast.plan.repair, fast.variants) == ("base", "auto", ["dense", "gate"])
    assert not fast.distils and check_recipe(fast.model_dump(mode="json")) == fast
    assert check_recipe(PLAIN) == check_recipe(PLAIN | {"effort": "best"})


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"start": "tuned", "variants": ["gate"]}, "start: tuned needs dense among the variants"),
        (
            {"distil": {"teacher": "tuned"}, "variants": ["gate"]},
            "teacher: tuned needs dense among the variants",
        ),
        ({"start": "base", "plan": {"max_loss": 0.01}}, "needs start: tuned or given"),
        ({"start": "given", "plan": {"max_loss": 0.01, "num_prune": 3}}, "are both budgets"),
        ({"start": "given", "plan": {"max_loss": 1.5}}, "less than 1"),
        ({"plan": {"repair": "magic"}}, "least_squares"),
        ({"effort": "most"}, "'fast' or 'best'"),
        (
            {"start": "tuned", "finetune": {"mode": "lora", "merge_adapter": False}},
            "merge_adapter: true",
        ),
    ],
)
def test_contradictory_recipes_are_refused(recipe, said):
    with pytest.raises(ConfigError, match=said):
        check_recipe(PLAIN | recipe)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"start": "given", "variants": ["dense", "sat"]}, "sat changes the fine-tuning"),
        ({"start": "given", "variants": ["auto"], "plan": {"max_loss": 0.1}}, "auto plans without scores"),
    ],
)
def test_methods_are_refused_if_they_cannot_do_what_the_recipe_asks(recipe, said):
    with pytest.raises(ConfigError, match=said):
        check_methods(check_recipe(PLAIN | recipe))
    check_methods(check_recipe(PLAIN | recipe | {"start": "tuned", "variants": ["dense", "gate"]}))


def test_a_training_that_a_method_cannot_change_is_refused_before_a_model_is_loaded():
    recipe = check_recipe(PLAIN | {"variants": ["dense", "sat"]})
    check_changed_training(recipe, FinetuneOptions(), 2)
    with pytest.raises(ConfigError, match="at least two optimizer steps; this training has 1"):
        check_changed_training(recipe, FinetuneOptions(), 1)
    with pytest.raises(ConfigError, match=r"torch\.compile"):
        check_changed_training(recipe, FinetuneOptions(compile=True), 9)
    apt = check_recipe(PLAIN | {"variants": ["dense", "apt"]})
    with pytest.raises(ConfigError, match="fp16 training scales gradients"):
        check_changed_training(apt, FinetuneOptions(precision="fp16"), 9)


# -- the command -----------------------------------------------------------------------------------------


def test_shrink_is_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "render_html", lambda record, path: path)
    make_project(tmp_path)
    arguments = ["shrink", tmp_path / "model", "--data", tmp_path / "train.jsonl"]
    arguments += ["--eval-data", tmp_path / "eval.jsonl", "--out", tmp_path / "out", "--num-prune", 2]
    arguments += ["--set", "record.steps=4", "--set", "evaluate.metrics=[exact_match]", "--json", "--quiet"]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["title"] == f"model on {tmp_path.name}"  # where the file is called train
    row = record["variants"]["either"]
    assert row["num_layers"] == 2 and row["repair"]["kind"] == "layer_wise" and row["finetune"] is None
    assert (tmp_path / "out/variants/either/pruned/model.safetensors").is_file()


def test_a_shrunk_model_of_a_run_is_called_after_that_run():
    recipe = check_recipe({"model": {"path": "m"}, "data": {"train": "/rows/sst2.jsonl#50"}})
    job = SimpleNamespace(folder=Path("/my/runs/banking/variants/dense/model"), recipe=recipe)
    assert title_of(job) == "banking on sst2"
    recipe.data.train, job.folder = "/my/reviews/data/train.jsonl", Path("/models/smollm2")
    assert title_of(job) == "smollm2 on reviews"


def test_the_warning_about_an_untuned_model_comes_before_the_repair(tmp_path, caplog):
    make_project(tmp_path)
    with caplog.at_level("INFO", logger="gradpruner"):
        carry_out(tmp_path, start="given", variants=["dense", "dropped"], plan=REPAIRED)
    said = [record.getMessage() for record in caplog.records]
    doubt = next(i for i, line in enumerate(said) if "was it tuned on this task?" in line)
    assert said.index("evaluate dense") < doubt < said.index("repair dropped")


def test_shrink_dry_run_loads_nothing(tmp_path):
    make_project(tmp_path)
    arguments = ["shrink", tmp_path / "model", "--data", tmp_path / "train.jsonl", "--dry-run", "--quiet"]
    arguments += ["--eval-data", tmp_path / "eval.jsonl", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    assert "repair" in result.stdout and "nothing is trained after that" in result.stdout


def test_another_start_records_again(tmp_path):
    path, _ = make_project(tmp_path, variants=["dense", "gate"], plan=REPAIRED)
    run(load_recipe(path))
    record = run(load_recipe(path, ("start=tuned",)))
    states = {stage["name"]: stage["state"] for stage in record["stages"]}
    assert states["finetune dense"] == "skipped"
    assert states["record"] == states["prune gate@start=tuned"] == "done"
    with RunDirectory(tmp_path / "run") as directory:
        assert directory.stages["record"]["state"] == "done"
