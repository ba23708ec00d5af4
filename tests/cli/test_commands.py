import json
import os
import signal
import subprocess
import sys
import time

import pytest
from builders import make_project
from processes import COMMAND, begin

from gradpruner.cli.listing import KINDS
from gradpruner.common.errors import ConfigError, ResourceError
from gradpruner.reports import html
from gradpruner.runs import pipeline
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.runs.row import work


def rows_of(record):
    rows = {}
    for name, row in record["variants"].items():
        kept = json.loads(json.dumps(row))
        for part in ("before", "evaluation", "finetune"):
            for key in ("seconds", "peak_memory_bytes", "tokens_per_second", "resumed_from"):
                (kept[part] or {}).pop(key, None)
        kept["cost"] = kept["cost"]["tokens"]
        rows[name] = kept
    return rows


# -- small commands --------------------------------------------------------------------------------------


def test_help_is_quick_and_tells_the_exit_codes():
    started = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gradpruner", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - started < 5  # 0.3 s on a machine that is not busy
    assert "Exit codes: 0 done, 2 command line" in shown.stdout and "record" in shown.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "datasets", "matplotlib", "numpy", "pandas"}


def test_version_and_schema(call):
    assert call("--version") == (0, "0.1.0\n", "")
    code, out, _ = call("schema")
    assert code == 0 and json.loads(out)["title"] == "Recipe"


def test_ls_alone_lists_what_can_be_listed(call):
    code, out, _ = call("ls")
    assert code == 0
    kinds = [line.split()[0] for line in out.splitlines()]
    assert kinds == list(KINDS) and all(call("ls", kind)[0] == 0 for kind in kinds)


def test_shells_can_complete_the_commands(call):
    assert "--install-completion" in call("--help")[1]


@pytest.mark.parametrize("kind", ["methods", "tasks", "recipes", "rules"])
def test_ls(call, kind):
    code, out, _ = call("ls", kind, "--json")
    names = json.loads(out)
    assert code == 0 and all(isinstance(text, str) and text for text in names.values())
    code, out, _ = call("ls", kind)
    assert code == 0 and len(out.splitlines()) == len(names)
    expected = {"methods": "gradpruner", "tasks": "trec", "rules": "sum"}
    assert expected.get(kind) in names or kind == "recipes"


def test_doctor(call):
    code, out, _ = call("doctor", "--json")
    findings = json.loads(out)
    assert findings["versions"]["torch"] and code == (1 if findings["problems"] else 0)
    assert "torch" in call("doctor")[1]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["ls", "method"], "Did you mean 'methods'"),
        (["run"], "Nothing to run: give a recipe"),
        (["run", "nowhere.yaml"], "There is no recipe at nowhere.yaml"),
        (["run", "dmo"], "no recipe file or built-in recipe 'dmo'"),
        (["run", "--oot", "x"], "No such option"),
        (["plan", "--model", "m"], "data: missing; give --data, or --task"),
        (["fly"], "No such command"),
    ],
)
def test_a_wrong_command_line_exits_with_2(call, arguments, part):
    code, out, err = call(*arguments)
    assert code == 2 and part in err and out == "" and "Traceback" not in err


# -- runs --------------------------------------------------------------------------------------------------


def test_stage_by_stage_then_all_at_once(call, tmp_path):
    path, _ = make_project(tmp_path, variants=["merged"])
    code, out, err = call("plan", path, "--dry-run")
    assert code == 0 and "⟦" in out and "Dry run" in out and not (tmp_path / "run").exists()
    assert json.loads(call("run", path, "--dry-run", "--json")[1])["num_prune"] == 2

    code, out, err = call("plan", path, "--json")
    assert code == 0 and json.loads(out)["plans"]["merged"]["num_kept"] == 2
    assert "Warning" not in err and "record" in err
    code, out, err = call("prune", "--out", tmp_path / "run", "--quiet", "--set", "plan.num_prune=1")
    assert code == 0 and err == ""
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {s["name"]: s["state"] for s in record["stages"]}["record"] == "skipped"
    assert record["plans"]["merged"]["num_kept"] == 3
    assert record["command"].startswith("gradpruner prune --out")

    code, out, err = call("run", path)
    assert code == 0 and "report.html" in out and "Warning" not in err
    assert "{'loss'" not in out
    (tmp_path / "run" / "report.html").unlink()
    code, out, _ = call("report", tmp_path / "run", "--markdown")
    assert code == 0 and "|" in out and (tmp_path / "run" / "report.html").exists()
    assert call("report", tmp_path)[0] == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_marks_the_stage(call, tmp_path, monkeypatch, number, code):
    path, _ = make_project(tmp_path, variants=["dense"], evaluate={"before_finetuning": False})
    monkeypatch.setattr(work, "finetune", lambda *a, **k: os.kill(os.getpid(), number))
    found, _, err = call("run", path)
    assert found == code and "Run the same command again" in err and "Traceback" not in err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stages"]["finetune dense"]["state"] == "interrupted"
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_failed_row_is_shown_with_the_good_ones_and_decides_the_exit_code(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)

    record = {"variants": {"dense": {"error": None}, "merged": {"error": "full"}}}
    failure = ResourceError("The disk is full.")
    monkeypatch.setattr(pipeline, "run_rows", lambda *a, **k: (record, failure))
    code, out, err = call("run", path, "--json")
    assert code == 5 and json.loads(out)["variants"]["merged"]["error"] == "full"
    assert err.startswith("error: The disk is full.")

    def refuse(recipe, **options):
        raise ConfigError("Not today.")

    monkeypatch.setattr(pipeline, "run_rows", refuse)
    code, out, err = call("run", path, "--json")
    assert (code, out) == (2, "") and "Not today." in err


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_figures(call, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "render_html", lambda record, path: path)
    monkeypatch.setattr(Job, "release", lambda *a: None)
    options = {
        "variants": ["merged"],
        "finetune": {"epochs": 8, "save_steps": 3},
        "evaluate": {"before_finetuning": False},
    }
    path, _ = make_project(tmp_path, **options)
    said, errors = tmp_path / "said", tmp_path / "errors"
    process = begin(COMMAND, "run", path, "--quiet", outputs=(said, errors))
    try:
        deadline = time.monotonic() + 120
        checkpoints = tmp_path / "run" / "variants" / "merged" / "checkpoints"
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            assert process.is_alive() and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.01)
        refused = call("run", path)
        assert refused[0] == 2 and f"in use by process {process.pid}" in refused[2], refused
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    (line,) = errors.read_text().splitlines()  # no progress in a quiet run
    assert line.startswith("warning: ")

    code, _, err = call("run", path)
    assert code == 0 and "record: done before, skipped" in err
    resumed = json.loads((tmp_path / "run" / "run.json").read_text())
    assert resumed["variants"]["merged"]["finetune"]["resumed_from"] > 0
    straight = pipeline.run(load_recipe(path, (), {"out": str(tmp_path / "straight")}))
    assert rows_of(resumed) == json.loads(json.dumps(rows_of(straight)))
    assert resumed["scores"] == json.loads(json.dumps(straight["scores"]))
    weights = "variants/merged/model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
