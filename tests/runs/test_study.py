import json
import os
import shutil

import pytest
from builders import make_llama, make_project, make_tokenizer

from gradpruner.common.errors import ConfigError, ModelError, PlanError
from gradpruner.common.progress import set_mode
from gradpruner.methods import METHODS, Method
from gradpruner.reports import html
from gradpruner.runs import pipeline
from gradpruner.runs.before.forecast import Forecast
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import check_recipe, load_recipe
from gradpruner.runs.row import work
from gradpruner.runs.study import preview
from gradpruner.runs.study.carrying_out import MARKER, adopt, is_of, run_study, state_of, stored_record
from gradpruner.runs.study.design import make_study
from gradpruner.runs.study.file import NamedPoint, Sweep, read_study
from gradpruner.runs.study.pairing import Answers, paired_over_seeds
from gradpruner.runs.study.preview import preview_study


@pytest.fixture(scope="module", autouse=True)
def quick_and_quiet():
    """Reports, and the clearing of memory, seconds each, are left out."""
    set_mode("quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "render_html", lambda found, out: out.write_text(found["title"]))
        patch.setattr(html, "markdown_table", lambda found, folder: found["kind"])
        patch.setattr(Job, "release", lambda *a: None)
        yield
    set_mode("auto")


def recipe_of(path, *overrides, **values):
    return load_recipe(path, ("evaluate.before_finetuning=false", "keep_models=none", *overrides), values)


def make_smaller(folder):
    make_llama(1, num_hidden_layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison with a method that fails, two seeds, and a smaller model."""
    folder = tmp_path_factory.mktemp("compared")
    path, _ = make_project(folder)
    smaller = make_smaller(folder / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS._entries, "broken", Method("Always fails.", score=refuse))
        plan = make_study(
            load_recipe(path, ("keep_models=none",)),
            out=folder / "study",
            methods=["gradpruner", "last", "broken"],
            smaller=[smaller],
            seeds=[0, 1],
        )
        outcome = run_study(plan, command="gradpruner compare")
    return folder, plan, outcome


def refuse(context):
    raise ModelError("This method cannot work here.", hint="Take another.")


def rows_of(found, point=0):
    return {row["name"]: row for row in found["points"][point]["rows"]}


def record_of(folder, run):
    return json.loads((folder / run / "run.json").read_text())


# -- what is run -----------------------------------------------------------------------------------------


def test_rows_are_methods_and_the_dense_model_is_always_the_first(tmp_path):
    recipe = load_recipe(make_project(tmp_path)[0])
    names = lambda **given: [row.name for row in make_study(recipe, out=tmp_path / "s", **given).rows]  # noqa: E731
    assert names(methods=["gradpruner", "last"]) == ["dense", "merged", "dropped", "last"]
    assert names(methods=["last", "dropped", "gradpruner"]) == ["dense", "last", "dropped", "merged"]
    assert names() == ["dense", "merged", "dropped"]
    every = names(methods=["all"])
    assert every[:3] == ["dense", "merged", "dropped"] and len(every) == len(METHODS.names()) + 2
    smaller = make_study(recipe, out=tmp_path / "s", methods=["last"], smaller=["org/Tiny"]).rows[-1]
    assert (smaller.name, smaller.label) == ("smaller:Tiny", "Tiny, fine-tuned")


def test_runs_are_points_times_seeds_and_a_shared_dense_row_is_run_once(tmp_path):
    recipe = load_recipe(make_project(tmp_path)[0])
    sweep = Sweep(key="plan.num_merge", values=[0, 1])
    shared = make_study(recipe, out="s", methods=["gradpruner"], seeds=[3, 4], sweep=sweep)
    assert [run.folder for run in shared.runs()] == [
        "dense/seed-3", "plan.num_merge=0/seed-3", "plan.num_merge=1/seed-3",
        "dense/seed-4", "plan.num_merge=0/seed-4", "plan.num_merge=1/seed-4",
    ]  # fmt: skip
    assert [run.recipe.variants for run in shared.runs()[:2]] == [["dense"], ["merged", "dropped"]]
    assert [run.recipe.plan.num_merge for run in shared.runs()[:3]] == [1, 0, 1]
    assert {(run.recipe.seed, run.recipe.out) for run in shared.runs()[:1]} == {(3, "s/dense/seed-3")}
    tuned = make_study(recipe.model_copy(update={"start": "tuned"}), out="s", methods=["last"], sweep=sweep)
    assert {tuple(run.recipe.variants) for run in tuned.runs()} == {("dense", "last")}  # pruned from it
    sweep = Sweep(key="finetune.epochs", values=[1, 2])
    each = make_study(recipe, out="s", methods=["last"], seeds=[0], sweep=sweep)
    assert [run.folder for run in each.runs()] == ["finetune.epochs=1/seed-0", "finetune.epochs=2/seed-0"]
    assert each.runs()[0].recipe.variants == ["dense", "last"]
    points = [
        NamedPoint(label="a third", set={"plan.layer_fraction": 0.34}),
        NamedPoint(label="half", set={"plan.num_prune": 2, "plan.num_merge": 0}),
    ]
    named = make_study(recipe, out="s", methods=["last"], seeds=[0], points=points)
    third = named.runs()[1].recipe.plan  # one budget takes the other's place
    assert (third.layer_fraction, third.num_prune) == (0.34, None)
    assert [point.label for point in named.points] == ["a third", "half"]


def test_a_smaller_model_is_a_run_of_its_own_in_which_nothing_is_pruned(tmp_path):
    path, _ = make_project(tmp_path)
    smaller = make_smaller(tmp_path / "small")
    plan = make_study(load_recipe(path), out="s", methods=["last"], smaller=[smaller], seeds=[0])
    run = plan.runs()[1]
    assert (run.folder, run.recipe.variants) == ("smaller-small/seed-0", ["dense"])
    assert (run.recipe.model.path, run.recipe.plan.num_prune) == (smaller, 0)


def test_bad_studies_are_refused_with_what_to_do(tmp_path):
    recipe = load_recipe(make_project(tmp_path)[0])
    for given, part in (
        ({"methods": ["lst"]}, "Did you mean 'last'"),
        ({"seeds": []}, "needs seeds.*--seeds 0,1,2"),
        ({"seeds": [0, 1, 0]}, "Seed 0 is given more than once"),
        ({"sweep": Sweep(key="plan.num_merg", values=[1])}, "Did you mean 'plan.num_merge'"),
        ({"sweep": Sweep(key="plan.num_merge", values=[-1])}, r"num_merge -1(.|\n)*given: -1"),
        ({"sweep": Sweep(key="seed", values=[1])}, "cannot sweep over seed"),
        ({"sweep": Sweep(key="plan.num_merge", values=[1, 1])}, "more than once"),
        ({"smaller": ["a/x", "b/x"]}, "Two smaller models are called x"),
    ):
        with pytest.raises(ConfigError, match=part):
            make_study(recipe, out="s", **{"methods": ["last"], **given})


def test_study_files_name_every_fault(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("base: demo\nsweeps: {}\nseeds: [-1]\n")
    with pytest.raises(ConfigError, match=r"2 faults(.|\n)*seeds.0(.|\n)*Did you mean 'sweep'"):
        read_study(path)
    for text, part in (
        ("title: x", "give base"),
        ("base: demo\nrecipe: {}", "give base"),
        ("base: demo\nsweep: {key: a, values: [1]}\npoints: [{label: a, set: {}}]", "exclude each other"),
        ("base: demo\nseeds: []", "at least 1 item"),
        ("base: demo\nsweep: {key: a, values: []}", "at least 1 item"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=part):
            read_study(path)


def test_a_study_can_be_written_down_and_read_again(tmp_path):
    recipe = load_recipe(make_project(tmp_path)[0])
    sweep = Sweep(key="plan.num_merge", values=[0, 1], label="merged layers")
    plan = make_study(recipe, out="s", methods=["gradpruner"], seeds=[2], sweep=sweep, figure="Table 3")
    (tmp_path / "study.yaml").write_text(plan.to_yaml())
    file = read_study(tmp_path / "study.yaml")
    again = make_study(
        recipe, out="s", methods=file.methods, seeds=file.seeds, sweep=file.sweep, figure=file.figure
    )
    assert again.runs() == plan.runs() and file.recipe == recipe.model_dump(mode="json")


# -- a comparison ----------------------------------------------------------------------------------------


def test_a_comparison_says_of_every_row_what_its_runs_say(compared):
    folder, _, outcome = compared
    found = json.loads((folder / "study/study.json").read_text())
    assert found == json.loads(json.dumps(outcome.study))
    assert (found["kind"], found["seeds"], found["runs"]["planned"]) == ("compare", [0, 1], 4)
    assert found["metrics"][0] in ("exact_match", "choice_accuracy") and found["sweep"] is None
    rows = rows_of(found)
    assert list(rows) == ["dense", "merged", "dropped", "last", "broken", "smaller:small"]
    records = [record_of(folder / "study", f"seed-{seed}") for seed in (0, 1)]
    for name in ("dense", "merged", "dropped", "last"):
        for metric, shown in rows[name]["metrics"].items():
            after = [r["variants"][name]["evaluation"]["metrics"][metric]["value"] for r in records]
            before = [r["variants"][name]["before"]["metrics"][metric]["value"] for r in records]
            assert shown["per_seed"] == after and shown["mean"] == pytest.approx(sum(after) / 2)
            assert (shown["low"], shown["high"]) == (min(after), max(after))
            assert shown["before"] == pytest.approx(sum(before) / 2)
        seconds = [r["variants"][name]["finetune"]["seconds"] for r in records]
        assert rows[name]["costs"]["training_seconds"] == pytest.approx(sum(seconds) / 2)
        dense_seconds = [r["variants"]["dense"]["finetune"]["seconds"] for r in records]
        ratio = [mine / dense for mine, dense in zip(seconds, dense_seconds, strict=True)]
        assert rows[name]["costs"]["training_ratio"] == pytest.approx(sum(ratio) / 2)
        assert rows[name]["num_parameters"] == records[0]["variants"][name]["num_parameters"]
        assert [plan["seed"] for plan in rows[name]["plans"]] == ([] if name == "dense" else [0, 1])
    dense = records[0]["model"]["num_parameters"]
    assert (
        found["budget"]["removed"]
        == rows["last"]["removed_parameters"]
        == dense - rows["last"]["num_parameters"]
    )
    assert found["budget"] == found["points"][0]["budget"] and found["budget"]["layers"] == 2
    assert rows["last"]["removed_share"] == pytest.approx(found["budget"]["share"])
    assert rows["dense"]["metrics"]["exact_match"]["paired"] is None
    assert rows["merged"]["metrics"]["exact_match"]["paired_gradpruner"] is None
    assert rows["last"]["metrics"]["exact_match"]["paired_gradpruner"]["seeds"] == 2
    assert rows["dense"]["costs"]["method_seconds"] is None
    assert (folder / "study/report.html").read_text() == found["title"]
    assert (folder / "study/table.md").read_text() == "compare"


def test_method_costs_are_those_of_the_stages_it_needs(compared):
    folder, _, outcome = compared
    rows = rows_of(outcome.study)
    manifest = json.loads((folder / "study/seed-0/manifest.json").read_text())["stages"]
    second = json.loads((folder / "study/seed-1/manifest.json").read_text())["stages"]
    for name, needed in (
        ("merged", ("record", "score gradpruner", "plan merged", "prune merged")),
        ("last", ("score last", "plan last", "prune last")),
    ):
        seconds = [sum(stages[stage]["seconds"] for stage in needed) for stages in (manifest, second)]
        peaks = [max(stages[s]["peak_memory_bytes"] for s in needed) for stages in (manifest, second)]
        assert rows[name]["costs"]["method_seconds"] == pytest.approx(sum(seconds) / 2)
        assert rows[name]["costs"]["method_peak_memory_bytes"] == round(sum(peaks) / 2)


def test_a_method_that_fails_is_a_row_with_its_error(compared):
    _, _, outcome = compared
    row = rows_of(outcome.study)["broken"]
    assert "cannot work here" in row["error"] and row["metrics"] == {} and row["num_parameters"] is None
    assert [seed["seed"] for seed in row["per_seed"]] == [0, 1]
    assert isinstance(outcome.error, ModelError)
    assert rows_of(outcome.study)["last"]["error"] is None


def test_a_smaller_model_is_a_row_with_its_own_size(compared):
    folder, _, outcome = compared
    found = outcome.study
    row, dense = rows_of(found)["smaller:small"], rows_of(found)["dense"]
    record = record_of(folder / "study", "smaller-small/seed-0")
    assert row["num_parameters"] == record["model"]["num_parameters"] < dense["num_parameters"]
    assert row["removed_parameters"] == dense["num_parameters"] - row["num_parameters"]
    assert row["metrics"]["exact_match"]["paired"]["n"] == 12 and row["label"] == "small, fine-tuned"
    assert found["model"]["num_layers"] == 4


def test_a_second_start_skips_all_runs_and_has_the_same_results(compared, monkeypatch):
    _, plan, outcome = compared
    monkeypatch.setitem(METHODS._entries, "broken", Method("Always fails.", score=refuse))
    monkeypatch.setattr(Job, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    assert [state_of(plan.out, run) for run in plan.runs()] == ["begun", "done", "begun", "done"]
    again = run_study(plan)
    assert again.study["points"] == outcome.study["points"]
    assert again.study["created"] == outcome.study["created"]


def test_a_finished_run_is_recognised_by_its_recipe_even_if_keys_are_left_open():
    recipe = check_recipe({"model": {"path": "m"}, "data": {"train": "t.jsonl"}})
    settled = {
        "finetune": {"learning_rate": 1e-5, "accumulation": 4},
        "recover": {"learning_rate": 5e-6},
        "plan": {"repair": "none"},
    }
    made = recipe.with_values(**settled)
    assert is_of({"recipe": made.model_dump(mode="json")}, recipe)
    for other in ({"finetune": {"learning_rate": 1e-4}}, {"plan": {"num_prune": 3}}):
        assert not is_of({"recipe": made.model_dump(mode="json")}, recipe.with_values(**other))


def test_a_failed_seed_leaves_the_mean_of_the_others(compared, monkeypatch):
    _, plan, outcome = compared
    monkeypatch.setitem(METHODS._entries, "broken", Method("Always fails.", score=refuse))
    run = pipeline.run_rows

    def failing(recipe, **options):
        if recipe.seed == 1 and "smaller" not in recipe.out:
            raise ModelError("The weights are gone.")
        return run(recipe, **options)

    monkeypatch.setattr(pipeline, "run_rows", failing)
    found = run_study(plan)
    row, before = (rows_of(s)["last"]["metrics"]["exact_match"] for s in (found.study, outcome.study))
    assert row["per_seed"] == [before["per_seed"][0], None] and row["mean"] == before["per_seed"][0]
    assert row["paired"]["seeds"] == 1
    seeds = rows_of(found.study)["last"]["per_seed"]
    assert seeds[0]["error"] is None and "weights are gone" in seeds[1]["error"]
    assert rows_of(found.study)["last"]["error"] is None


def test_impossible_studies_are_refused_before_anything_is_written(tmp_path):
    path, _ = make_project(tmp_path)
    sweep = Sweep(key="plan.num_prune", values=[2, 9])
    plan = make_study(load_recipe(path), out=tmp_path / "s", methods=["last"], seeds=[0], sweep=sweep)
    with pytest.raises(PlanError, match=r"plan.num_prune 9, seed 0: .*0 to 2"):
        run_study(plan)
    plan = make_study(load_recipe(path), out=tmp_path, methods=["last"], seeds=[0])
    with pytest.raises(ConfigError, match="not made by gradpruner"):
        run_study(plan)
    assert not (tmp_path / "s").exists()


def test_a_dry_run_loads_nothing_and_writes_nothing(compared, tmp_path, monkeypatch):
    folder, plan, _ = compared
    monkeypatch.setattr(Job, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setitem(METHODS._entries, "broken", Method("Always fails.", score=refuse))
    monkeypatch.setattr(preview, "forecast", lambda job: Forecast(0.25, 0.25, 0.25, 0.25, ""))
    before = {path: path.stat().st_mtime_ns for path in (folder / "study").rglob("*")}
    facts = preview_study(plan)
    assert {path: path.stat().st_mtime_ns for path in (folder / "study").rglob("*")} == before
    assert facts["finetunings"] == 12 and facts["finetunings_left"] == 10
    assert facts["budgets"][""]["removed"] > 0 and facts["disk_bytes"] > 0
    assert facts["seconds_left"] == 2.0  # one second for each run that is not done
    assert [run["state"] for run in facts["runs"]] == ["begun", "done", "begun", "done"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", {"variants": {"last": {"evaluation": {"metrics": {"exact_match": {"value": "high"}}}}}}),
        ("run.json", {"variants": []}),
        ("run.json", {"variants": {"last": {"evaluation": {"metrics": {}, "per_example": "../../other"}}}}),
        ("run.json", {"model": None}),
        ("run.json", {"warnings": [{}]}),
        ("run.json", {"recipe": 3}),
        ("manifest.json", {"stages": {"a": {"state": "failed", "inputs": "", "files": {"../x": {}}}}}),
        ("manifest.json", {"stages": []}),
    ],
)  # fmt: skip
def test_a_run_with_a_damaged_record_does_not_count_as_finished(compared, tmp_path, name, change):
    folder, plan, _ = compared
    shutil.copytree(folder / "study/seed-1", tmp_path / "seed-1")
    assert stored_record(tmp_path / "seed-1") is not None
    value = json.loads((tmp_path / "seed-1" / name).read_text())
    (tmp_path / "seed-1" / name).write_text(json.dumps(value | change))
    assert stored_record(tmp_path / "seed-1") is None
    assert state_of(tmp_path, plan.runs()[2]) == "begun"


# -- a sweep ---------------------------------------------------------------------------------------------


def test_a_sweep_shows_the_dense_row_everywhere_and_records_once(tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    recorded, trained = [], []
    record, finetune = pipeline.record_gradients, work.tune
    monkeypatch.setattr(pipeline, "record_gradients", lambda *a, **k: recorded.append(1) or record(*a, **k))
    monkeypatch.setattr(work, "tune", lambda variant: trained.append(variant.name) or finetune(variant))
    sweep = Sweep(key="plan.num_merge", values=[0, 1], label="merged layers")
    plan = make_study(recipe_of(path), out=tmp_path / "s", methods=["gradpruner"], seeds=[0], sweep=sweep)
    found = run_study(plan).study
    assert recorded == [1] and sorted(trained) == ["dense", "dropped", "merged", "merged"]
    assert found["sweep"] == {
        "key": "plan.num_merge",
        "label": "merged layers",
        "values": [0, 1],
        "log": False,
    }
    assert [point["value"] for point in found["points"]] == [0, 1]
    assert [point["label"] for point in found["points"]] == ["merged layers 0", "merged layers 1"]
    first, second = (rows_of(found, point) for point in (0, 1))
    assert first["dense"] == second["dense"] and first["dense"]["per_seed"][0]["run"] == "dense/seed-0"
    assert first["dropped"]["metrics"] == second["dropped"]["metrics"]
    same = [row["dropped"]["costs"]["training_seconds"] for row in (first, second)]
    assert same[0] == same[1]  # the same training, not another one
    actions = [[a["action"] for a in row["merged"]["plans"][0]["actions"]] for row in (first, second)]
    assert [found.count("merge") for found in actions] == [0, 1]
    assert second["merged"]["scores"][0]["values"] and "One seed" in found["warnings"][0]


def test_two_processes_may_share_a_folder_and_the_last_one_summarises(compared, tmp_path, monkeypatch):
    folder, plan, outcome = compared
    monkeypatch.setitem(METHODS._entries, "broken", Method("Always fails.", score=refuse))
    shutil.copytree(folder, tmp_path / "copy")
    recipe = plan.recipe
    given = {"methods": ["gradpruner", "last", "broken"], "out": tmp_path / "copy" / "study"}
    alone = run_study(make_study(recipe, seeds=[1], **given)).study
    assert alone["seeds"] == [1] and len(rows_of(alone)["last"]["metrics"]["exact_match"]["per_seed"]) == 1
    both = run_study(make_study(recipe, seeds=[0, 1], **given)).study
    rows = rows_of(outcome.study)
    assert rows_of(both)["last"]["metrics"] == rows["last"]["metrics"]


def test_adopted_stages_are_links_and_stages_that_differ_are_done_again(compared, tmp_path):
    folder, _, _ = compared
    source = folder / "study/seed-0"
    adopt(source, folder / "adopted")
    trace = next((source / "trace").rglob("*.safetensors"))
    assert os.stat(trace).st_ino == os.stat(folder / "adopted" / trace.relative_to(source)).st_ino
    stages = json.loads((folder / "adopted/manifest.json").read_text())["stages"]
    assert "record" in stages and all(stage["state"] == "done" for stage in stages.values())
    recipe = load_recipe(
        folder / "recipe.yaml", ("seed=5", "variants=[last]"), {"out": str(folder / "adopted")}
    )
    states = {s["name"]: s["state"] for s in pipeline.run(recipe, until="plan")["stages"]}
    assert states["score last"] == "done"  # of another seed
    assert (source / "scores/last.json").exists() and (folder / "study" / MARKER).exists()


# -- pairing ---------------------------------------------------------------------------------------------


def answers(values, ids="abcd"):
    return Answers(tuple(ids), {"exact_match": values})


def test_with_the_same_examples_a_difference_is_the_mean_over_the_seeds():
    mine = {0: answers([1, 1, 0, 1]), 1: answers([1, 0, 0, 1])}
    dense = {0: answers([0, 1, 0, 1]), 1: answers([0, 1, 0, 1])}
    found = paired_over_seeds(mine, dense, "exact_match")
    # Example by example: (1 + 1) / 2, (0 - 1) / 2, 0, 0.
    assert found["mean"] == pytest.approx((1 - 0.5) / 4)
    assert (found["n"], found["seeds"], found["wins"]) == (4, 2, 1)
    assert -0.5 <= found["low"] <= found["mean"] <= found["high"] <= 1
    certain = {0: answers([1, 1, 1, 1]), 1: answers([1, 1, 1, 1])}
    none = {0: answers([0, 0, 0, 0]), 1: answers([0, 0, 0, 0])}
    found = paired_over_seeds(certain, none, "exact_match")
    assert (found["mean"], found["low"], found["high"], found["wins"]) == (1, 1, 1, 2)


def test_with_other_examples_in_every_seed_all_are_pooled():
    mine = {0: answers([1, 1]), 1: answers([1, 0], "ef")}
    mine[0] = answers([1, 1], "ab")
    dense = {0: answers([0, 1], "ab"), 1: answers([0, 0], "ef"), 2: answers([0, 0], "gh")}
    found = paired_over_seeds(mine, dense, "exact_match")
    assert (found["n"], found["seeds"], found["wins"]) == (4, 2, 2)
    assert found["mean"] == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_rows_without_a_common_seed_or_metric_are_not_compared():
    assert paired_over_seeds({0: answers([1], "a")}, {1: answers([1], "a")}, "exact_match") is None
    assert paired_over_seeds({0: answers([1], "a")}, {0: answers([1], "b")}, "exact_match") is None
    assert paired_over_seeds({0: answers([1], "a")}, {0: answers([1], "a")}, "rouge_l") is None
