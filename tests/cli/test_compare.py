import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from builders import make_project
from processes import COMMAND, begin

import gradpruner
from gradpruner.cli import bundled
from gradpruner.cli import studies as cli_compare
from gradpruner.common.errors import ModelError
from gradpruner.methods import METHODS, Method
from gradpruner.reports import html, terminal
from gradpruner.runs import pipeline
from gradpruner.runs.before.forecast import Forecast
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.runs.study import comparing, preview


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(html, "render_html", lambda found, out: out.write_text(found["title"]))
    monkeypatch.setattr(html, "markdown_table", lambda found, folder: found["kind"])
    monkeypatch.setattr(
        terminal,
        "print_summary",
        lambda found, console, folder: console.print(f"table of {len(found['points'])} points"),
    )
    monkeypatch.setattr(Job, "release", lambda *a: None)


QUICK = ("--set", "evaluate.before_finetuning=false", "--set", "evaluate.metrics=[exact_match]")


def write_study(folder, **values):
    path = folder / "study.yaml"
    sweep = {"key": "plan.num_merge", "label": "merged layers", "values": [0, 1]}
    given = {"base": "./recipe.yaml", "methods": ["gradpruner"], "seeds": [0], "sweep": sweep, **values}
    path.write_text("# A study\n" + yaml.safe_dump(given))
    return path


def test_a_comparison_is_one_command_and_starts_again_where_it_was(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    out = tmp_path / "study"
    command = ("compare", path, "--methods", "last", "--seeds", "0,1", "--out", out, *QUICK)
    code, shown, err = call(*command)
    assert code == 0 and "table of 1 points" in shown and "study done" in shown
    assert "run 1 of 2: seed 0" in err and "last: exact_match" in err
    found = json.loads((out / "study.json").read_text())
    assert found["seeds"] == [0, 1] and found["command"].startswith("gradpruner compare")
    assert not list(out.rglob("variants/*/model")) and (out / "report.html").exists()
    written = {name: (out / name).read_bytes() for name in ("report.html", "table.md")}
    for name in written:
        (out / name).unlink()
    code, shown, _ = call("report", out)
    assert code == 0 and "table of 1 points" in shown
    assert {name: (out / name).read_bytes() for name in written} == written
    (tmp_path / "begun").mkdir()
    write_study(tmp_path / "begun")
    code, _, err = call("report", tmp_path / "begun")
    assert code == 6 and "study.json" in err
    monkeypatch.setattr(Job, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    code, shown, _ = call(*command, "--json", "--quiet")
    assert code == 0 and json.loads(shown)["points"] == found["points"]
    assert yaml.safe_load((out / "study.yaml").read_text())["methods"] == ["dense", "last"]


def test_options_reach_the_recipe(call, tmp_path):
    path, _ = make_project(tmp_path)
    options = ("--unit", "decoder_parameters", "--lora", "--num-prune", "1")
    code, shown, _ = call("compare", path, "--methods", "last", *options, "--dry-run", "--json")
    facts = json.loads(shown)
    assert code == 0 and facts["budgets"][""]["unit"] == "decoder_parameters"
    assert facts["budgets"][""]["layers"] == 1 and facts["budgets"][""]["share"] == pytest.approx(0.25)
    assert facts["seeds"] == [0, 1, 2] and facts["out"] == "runs/compare"
    project = ("--model", tmp_path / "model", "--data", tmp_path / "train.jsonl")
    code, shown, _ = call("compare", *project, "--eval-data", tmp_path / "eval.jsonl", "--dry-run", "--json")
    assert code == 0 and [row["name"] for row in json.loads(shown)["rows"]] == [
        "dense", "merged", "dropped", "last", "random",
    ]  # fmt: skip
    told = [comparing.METHODS, map(str, comparing.SEEDS)]
    assert [",".join(words) for words in told] == [cli_compare.DEFAULT_METHODS, cli_compare.DEFAULT_SEEDS]


def test_a_dry_run_says_what_would_run_and_writes_nothing(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    monkeypatch.setattr(Job, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(preview, "forecast", lambda job: Forecast(1.0, 2.0, 3.0, 4.0, ""))
    before = sorted(tmp_path.rglob("*"))
    code, shown, _ = call("compare", path, "--methods", "all", "--out", tmp_path / "s", "--dry-run")
    assert code == 0 and sorted(tmp_path.rglob("*")) == before
    for part in ("3 runs", "seed-2", "new", "GradPruner, no merging", "decoder parameters", "disk: about"):
        assert part in shown
    assert "time: at most about 30.0 s" in shown.replace("\xa0", " ")
    found = gradpruner.compare(load_recipe(path), methods="all", out=tmp_path / "s", dry_run=True)
    assert str(found).split() == shown.split() and not found.measured
    one = gradpruner.compare(load_recipe(path), methods="last", seeds=[0], out=tmp_path / "[s]", dry_run=True)
    assert "1 run (1 seed, 1 point), " in str(one) and "/[s]\n" in str(one)
    code, shown, _ = call("ablate", write_study(tmp_path), "--out", tmp_path / "s", "--dry-run")
    assert code == 0 and "dense/seed-0" in shown and "budget of merged layers 1" in shown


def test_a_failed_method_decides_the_exit_code_after_everything_is_written(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)

    def refuse(context):
        raise ModelError("This method cannot work here.")

    monkeypatch.setitem(METHODS._entries, "broken", Method("Always fails.", score=refuse))
    command = ("compare", path, "--methods", "broken,last", "--seeds", "0", "--out", tmp_path / "s", *QUICK)
    code, shown, err = call(*command)
    assert code == ModelError.exit_code and "study done" in shown
    assert err.rstrip().endswith("error: broken, seed 0: This method cannot work here.")
    rows = {
        row["name"]: row for row in json.loads((tmp_path / "s/study.json").read_text())["points"][0]["rows"]
    }
    assert "cannot work" in rows["broken"]["error"] and rows["last"]["error"] is None


def test_an_ablation_is_a_file_whose_model_and_data_can_be_exchanged(call, tmp_path):
    _, values = make_project(tmp_path)
    sweep = {"key": "plan.num_prune", "values": [1, 2]}
    named = {"title": "Pruned layers", "figure": "Table 6", "plot": {"kind": "line"}}
    study = write_study(tmp_path, methods=["last"], sweep=sweep, **named)
    code, shown, _ = call("ablate", study, "--out", tmp_path / "s", "--json", "--quiet", *QUICK)
    found = json.loads(shown)
    assert code == 0 and (found["kind"], found["title"], found["figure"]) == (
        "ablation", "Pruned layers", "Table 6",
    )  # fmt: skip
    assert found["plot"] == {"kind": "line"} and [point["value"] for point in found["points"]] == [1, 2]
    elsewhere = ("--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "eval.jsonl")
    with_task = write_study(tmp_path, base=None, recipe={**values, "data": {"task": "sst2", "folder": "x"}})
    code, shown, _ = call(
        "ablate", with_task, *elsewhere, "--seeds", "4", "--methods", "last", "--dry-run", "--json"
    )
    facts = json.loads(shown)
    assert code == 0 and facts["seeds"] == [4] and facts["eval_rows"] == 12
    assert [row["name"] for row in facts["rows"]] == ["dense", "last"]


def test_studies_that_come_along_are_listed(call, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "ABLATIONS", tmp_path)
    make_project(tmp_path / "project")
    write_study(tmp_path, base=str(tmp_path / "project/recipe.yaml"))
    assert json.loads(call("ls", "ablations", "--json")[1]) == {"study": "A study"}
    assert call("ablate", "study", "--dry-run")[0] == 0
    code, _, err = call("ablate", "studi")
    assert code == 2 and "Did you mean 'study'?" in err
    assert not [name for name in json.loads(call("ls", "recipes", "--json")[1]) if "ablations" in name]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--methods", "lst"), "Did you mean 'last'"),
        (("--methods", ","), "--methods is empty"),
        (("--seeds", ""), "A study needs seeds"),
        (("--seeds", "0,1,1"), "Seed 1 is given more than once"),
        (("--seeds", "0,x"), "'x' is not a seed"),
        (("--unit", "layers"), "'parameters' or 'decoder_parameters'"),
        (("--epochs", "2", "--set", "finetune.epochs=3"), "--epochs and --set finetune.epochs=3 both set"),
        (("--set", "plan.num_merg=1"), "Did you mean 'plan.num_merge'"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(call, tmp_path, monkeypatch, options, part):
    path, _ = make_project(tmp_path)
    monkeypatch.setattr(pipeline, "run_rows", lambda *a, **k: pytest.fail("something ran"))
    code, _, err = call("compare", path, "--out", tmp_path / "s", *options)
    assert code == 2 and part in err and not (tmp_path / "s").exists()


def test_bad_studies_are_refused_with_what_to_do(call, tmp_path):
    make_project(tmp_path)
    for values, part in (
        ({"sweep": {"key": "plan.num_merg", "values": [1]}}, "Did you mean 'plan.num_merge'"),
        ({"sweeps": {}}, "Did you mean 'sweep'"),
        ({"methods": ["lst"]}, "Did you mean 'last'"),
        ({"base": "demoo"}, "Did you mean 'demo'"),
        ({"seeds": []}, "seeds"),
    ):
        code, _, err = call("ablate", write_study(tmp_path, **values), "--out", tmp_path / "s")
        assert code == 2 and part in err, err


def test_an_interrupted_study_goes_on_where_it_was(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    out = tmp_path / "s"
    command = ("compare", path, "--methods", "last", "--seeds", "0,1", "--out", out, *QUICK)
    run = pipeline.run_rows

    def interrupted(recipe, **options):
        if recipe.seed == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return run(recipe, **options)

    monkeypatch.setattr(pipeline, "run_rows", interrupted)
    code, _, err = call(*command)
    assert code == 130 and "Run the same command again" in err
    half = json.loads((out / "study.json").read_text())
    assert half["runs"] == {"planned": 2, "finished": 1, "failed": 0}
    ran = []
    monkeypatch.setattr(pipeline, "run_rows", lambda recipe, **o: ran.append(recipe.seed) or run(recipe, **o))
    code, _, err = call(*command)
    assert code == 0 and ran == [0, 1] and "evaluate last: done before, skipped" in err
    assert json.loads((out / "study.json").read_text())["runs"]["finished"] == 2


@pytest.mark.slow
def test_a_killed_process_leaves_a_study_that_can_be_finished(call, tmp_path):
    path, _ = make_project(tmp_path, finetune={"epochs": 6})
    out = tmp_path / "s"
    options = ("--methods", "last", "--seeds", "0", "--out", str(out), "--quiet", *QUICK)
    process = begin(COMMAND, "compare", path, *options, outputs=(tmp_path / "said", tmp_path / "errors"))
    try:
        deadline = time.monotonic() + 120
        manifest = out / "seed-0" / "manifest.json"
        while not (manifest.exists() and "finetune dense" in manifest.read_text()):
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Path(out / "study.yaml").exists()
    code, _, _ = call("compare", path, *options)
    assert code == 0 and json.loads((out / "study.json").read_text())["runs"]["finished"] == 1
