"""What a dry run says of training, time and what will hardly work."""

import json

import pytest
from builders import make_project, make_rows, write_rows

from gradpruner import dry_run
from gradpruner.common.world import World
from gradpruner.models import loading, sizes
from gradpruner.models.sizes import ModelSizes, build_on_meta, count_parameters
from gradpruner.runs.before import forecast as forecasting
from gradpruner.runs.job import inputs
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import check_recipe, load_recipe
from gradpruner.training import finetuning


def facts_of(call, path, *overrides):
    sets = [part for override in overrides for part in ("--set", override)]
    code, out, err = call("run", path, "--dry-run", "--json", *sets)
    assert code == 0, err
    return json.loads(out)


def test_it_shows_rates_what_is_in_a_step_and_about_how_long(call, tmp_path):
    path, _ = make_project(tmp_path)
    facts = facts_of(call, path, "finetune.accumulation=2")
    assert (facts["learning_rate"], facts["record_learning_rate"]) == (1e-3, 1e-4)
    assert facts["batch"] == {"samples": 4, "accumulation": 2, "devices": 1}
    assert facts["answers_with_space"] == [24, 24]
    taken = facts["seconds_estimate"]
    parts = ("record", "repair", "train", "evaluate")
    assert 0 < sum(taken[part] for part in parts) == pytest.approx(taken["all"])
    _, out, _ = call("run", path, "--dry-run", "--set", "finetune.accumulation=2")
    shown = " ".join(out.split())
    for part in (
        "training (full): learning rate 0.001 (as given), 8 samples per step (4 x 2 x 1: batch, ",
        "recording: learning rate 0.0001",
        "every answer begins with a space",
        "time: about",
        "estimated from two layers of these widths",
        "record 4 steps, then 3 fine-tuning steps",
    ):
        assert part in shown


def test_what_is_done_before_is_marked_and_not_counted(call, tmp_path):
    path, _ = make_project(tmp_path, start="tuned", evaluate={"before_finetuning": False})
    new = facts_of(call, path)
    assert new["done"] == [] and new["trace_bytes"] > 0
    assert call("record", path)[0] == 0
    facts = facts_of(call, path, "plan.num_prune=1")
    assert facts["done"] == ["finetune dense", "record"]
    assert (
        facts["seconds_estimate"]["record"] == facts["seconds_estimate"]["train"] == facts["trace_bytes"] == 0
    )
    assert facts["written_bytes"] < new["written_bytes"] - new["trace_bytes"]
    _, out, _ = call("run", path, "--dry-run")
    shown = " ".join(out.split())
    assert "steps (done before), record 4 steps (done before)" in shown
    assert facts_of(call, path, "finetune.epochs=2")["done"] == []


@pytest.mark.parametrize(
    ("overrides", "rate", "source"),
    [
        ((), 5e-4, "as given"),  # half of that at which the dense model is tuned
        (("recover.learning_rate=2e-3",), 2e-3, "as given"),
        (("start=given",), 1e-3, "as given"),
        (("start=given", "finetune.learning_rate=null"), 1e-3, "half of the default for full fine-tuning"),
    ],
)
def test_a_tuned_model_recovers_at_half_the_rate_unless_another_is_given(
    call, tmp_path, overrides, rate, source
):
    path, _ = make_project(tmp_path)
    facts = facts_of(call, path, "start=tuned", "recover.epochs=1", *overrides)
    assert facts["recover_learning_rate"] == rate and facts["learning_rate_source"].startswith(source)
    if facts["start"] == "given":
        assert facts["learning_rate"] == rate


def test_too_few_steps_are_warned_of_with_what_to_set(call, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasting._Trial, "seconds", lambda self, rows, length, training: 1.0)
    path, _ = make_project(tmp_path)
    for overrides, part in (
        ([], "6 optimizer steps (24 rows x 1 epochs, 4 x 1 rows a step)"),
        (["finetune.epochs=9"], ". --set finetune.epochs=10 makes it 60 or more."),
        (["finetune.epochs=20", "finetune.accumulation=6"], "--set finetune.accumulation=2 makes it 60."),
        (["finetune.accumulation=4"], "--set finetune.accumulation=1 --set finetune.epochs=10 makes it 60"),
        (["finetune.epochs=10"], None),
        (["start=given"], None),  # nothing is trained
    ):
        said = [text for text in facts_of(call, path, *overrides)["warnings"] if "optimizer steps" in text]
        assert part in said[0] if part else said == [], overrides


@pytest.mark.parametrize(
    ("rows", "overrides", "passes"),
    [
        (20_000, {}, 8),
        (1_600, {}, 4),  # 8 passes of 8 rows make 75 steps of 3 epochs, 4 make 150
        (24, {}, 1),
        (24, {"start": "given"}, 8),  # nothing is tuned, and a recovery is counted in such steps
        (24, {"effort": "paper"}, 8),
        (24, {"finetune": {"accumulation": 3}}, 3),
    ],
)
def test_small_data_are_learned_in_smaller_steps(tmp_path, rows, overrides, passes):
    make_project(tmp_path)
    write_rows(tmp_path / "train.jsonl", make_rows(rows))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    recipe = check_recipe({"model": {"path": str(tmp_path / "model")}, "data": data} | overrides)
    assert Job(recipe).training.accumulation == passes


def test_answers_of_which_some_begin_with_a_space_are_counted(call, tmp_path):
    path, _ = make_project(tmp_path)
    rows = make_rows(24)
    for row in rows[:5]:
        row["completion"] = row["completion"].strip()
    write_rows(tmp_path / "train.jsonl", rows)
    facts = facts_of(call, path)
    assert facts["answers_with_space"] == [19, 24]
    assert any("19 of 24 answers begin with a space" in text for text in facts["warnings"])


def test_the_estimate_by_hand(tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    job = Job(load_recipe(path, ("finetune.epochs=2", "finetune.accumulation=2")))
    monkeypatch.setattr(forecasting._Trial, "seconds", lambda self, rows, length, training: float(rows))
    monkeypatch.setattr(forecasting._Trial, "optimizer_seconds", lambda self: 1e-3)
    model = build_on_meta(job.config)
    layers = sum(ModelSizes(model).layer_macs) / forecasting._Trial(job).macs
    found = forecasting.forecast(job)
    assert found.record == pytest.approx(4 * 4 * layers * 0.9)
    step = 2 * 4 * layers + 1e-3 * count_parameters(model)
    assert found.train == pytest.approx((1 + 2 * 0.5) * 6 * step)  # dense, two rows of 2 of 4 layers
    answer = 2  # a colour and the end
    assert found.evaluate == pytest.approx(2 * (1 + 2 * 0.5) * layers * (12 + answer * 12))
    repaired = Job(load_recipe(path, ("plan.repair=least_squares",)))
    two_rows = 2 * 2.5 * layers * repaired.repair_rows
    assert found.repair == 0 and forecasting.forecast(repaired).repair == pytest.approx(two_rows)
    for where in (forecasting, finetuning):
        monkeypatch.setattr(where, "this_world", lambda: World(0, 2))
    together = forecasting.forecast(job)
    assert forecasting.num_devices(job) == 2
    assert together.train == pytest.approx(found.train * 4 / 6)  # steps, each as long as before
    assert together.evaluate == pytest.approx(found.evaluate / 2)


def test_a_wide_model_is_timed_on_fewer_tokens_and_narrower_layers(tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    job = Job(load_recipe(path))
    job.text.hidden_size, job.text.intermediate_size = 16384, 53248
    trial = forecasting._Trial(job)
    assert count_parameters(trial.model) < 4 * forecasting._MOST_PARAMETERS
    passed = []
    monkeypatch.setattr(trial, "_once", lambda ids, training: passed.append(tuple(ids.shape)) or 1.0)
    assert trial.seconds(64, 2048, True) == pytest.approx(0.5 * 64 * 2048 / (passed[0][0] * passed[0][1]))
    assert passed[0][0] * passed[0][1] * 6 * 2 * trial.macs < 1.1 * trial.most


def test_the_model_is_built_once_without_weights(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    built = []

    def counting(build):
        def counted(*args):
            built.append(build.__name__)
            return build(*args)

        return counted

    monkeypatch.setattr(loading, "load_structure", counting(loading.load_structure))
    monkeypatch.setattr(sizes, "build_on_meta", counting(sizes.build_on_meta))
    monkeypatch.setattr(inputs, "skeleton", counting(inputs.skeleton))
    facts_of(call, path)
    assert built == ["load_structure"]


def test_a_notebook_shows_what_the_command_prints(call, tmp_path):
    path, _ = make_project(tmp_path)
    title = "title='[bold]mine'"
    _, out, _ = call("run", path, "--dry-run", "--set", title)
    assert out.startswith("Dry run of [bold]mine\n")
    found = dry_run(load_recipe(path, (title,)))
    untimed = [[line for line in said.split("\n") if "time:" not in line] for said in (out, str(found))]
    assert " ".join(untimed[0]).split() == " ".join(untimed[1]).split()
    assert found.facts["num_prune"] == 2 and "<table>" in found._repr_html_()


def test_who_removes_many_layers_from_a_model_that_writes_sentences_is_warned(call, tmp_path):
    path, _ = make_project(tmp_path)
    rows = [row | {"completion": row["completion"] * 10} for row in make_rows(24)]
    write_rows(tmp_path / "train.jsonl", rows)

    def warned(*overrides, said="write sentences"):
        return any(said in text for text in facts_of(call, path, *overrides)["warnings"])

    assert warned() and not warned(said="gate")
    named = ("effort=fast", "variants=[dense, last]")
    assert warned(*named, said="the gate chooses better") and warned("effort=fast", said="Effort fast lets")
    rows = [facts_of(call, path, *asked)["variants"][1] for asked in (named, ["effort=fast"])]
    assert rows == ["Last layers dropped + repaired", "Gate + repaired"]
    assert not warned("start=given", "plan.max_loss=0.9", "plan.num_prune=null", "plan.num_merge=0")
    write_rows(tmp_path / "train.jsonl", make_rows(24))
    assert not warned()
    assert facts_of(call, path, "effort=fast")["variants"][1] == "Last layers dropped + repaired"
