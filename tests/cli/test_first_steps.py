"""What a new user meets: flags, a first recipe, a learning rate that is found, and what to do next."""

import json
import shlex
from dataclasses import replace

import pytest
import typer
import yaml
from builders import make_project, make_rows, write_rows

from gradpruner.cli.executing import resolve
from gradpruner.cli.main import app
from gradpruner.cli.options import KEYS, Chosen
from gradpruner.cli.suggestions import NEXT
from gradpruner.runs.recipe.recipe import Recipe, key_names, load_recipe, recipe_yaml
from gradpruner.runs.row import rate_search

COMMANDS = typer.main.get_command(app).commands


# -- flags ------------------------------------------------------------------------------------------------


def test_every_option_sets_a_key_that_exists():
    assert set(KEYS.values()) <= set(key_names(Recipe))


def test_flags_reach_the_recipe_and_take_another_budget_and_other_rows_out(call, tmp_path):
    path, _ = make_project(
        tmp_path, data={"task": "sst2", "train": None, "eval": None}, plan={"num_merge": 0}
    )
    rows = ("--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "eval.jsonl", "--train-limit", "20")
    flags = ("--layer-fraction", "0.25", "--epochs", "4", "--learning-rate", "3e-4", "--lora")
    code, out, err = call("run", path, *rows, *flags, "--dry-run", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["num_prune"], facts["train_rows"], facts["mode"]) == (1, 20, "lora")
    assert (facts["learning_rate"], facts["finetune_steps"]) == (3e-4, 20)


@pytest.mark.parametrize(
    ("command", "arguments", "part"),
    [
        ("run", ("--epochs", "2", "--set", "finetune.epochs=3"), "both set 'finetune.epochs'"),
        ("run", ("--lora", "--set", "finetune.mode=full"), "--lora and --set finetune.mode=full both"),
        ("run", ("--num-prune", "1", "--layer-fraction", "0.5"), "are both budgets"),
        ("run", ("--learning-rate", "0"), "greater than 0"),
        ("evaluate", ("--epochs", "2", "--set", "finetune.epochs=2"), "both set 'finetune.epochs'"),
    ],
)
def test_flags_that_contradict_are_refused(call, tmp_path, command, arguments, part):
    path, _ = make_project(tmp_path)
    code, out, err = call(command, path, *arguments, "--dry-run")
    assert code == 2 and part in err and out == ""


def test_flags_of_training_are_refused_where_nothing_is_trained(call, tmp_path):
    make_project(tmp_path)
    rows = ("--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "eval.jsonl")
    code, _, err = call("shrink", tmp_path / "model", *rows, "--learning-rate", "1e-4", "--dry-run")
    assert code == 2 and "--recover STEPS" in err
    code, _, err = call("evaluate", tmp_path / "model", *rows[2:], "--lora", "--dry-run")
    assert code == 2 and "finetune.mode belong to a run" in err


def test_a_command_that_says_all_takes_nothing_from_an_earlier_one(tmp_path):
    make_project(tmp_path)
    whole = Chosen({"model.path": str(tmp_path / "model"), "data.train": str(tmp_path / "train.jsonl")})
    out = tmp_path / "run"
    out.mkdir()
    first = resolve(None, replace(whole, values=whole.values | {"plan.num_prune": 1}), str(out))
    (out / "recipe.yaml").write_text(recipe_yaml(first))
    assert resolve(None, Chosen({}), str(out)).plan.num_prune == 1
    assert resolve(None, whole, str(out)).plan.num_prune is None


# -- find-lr ----------------------------------------------------------------------------------------------


def test_a_rate_is_found_on_held_out_training_rows_kept_and_used(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path, variants=["dense"], evaluate={"before_finetuning": False})
    code, out, err = call("rate", path, "--json")
    assert code == 0, err
    record = json.loads(out)
    tried = {entry["rate"]: entry["loss"] for entry in record["learning_rate"]["tried"]}
    best = min(tried, key=tried.get)
    assert len(tried) >= 3 and 1e-3 in tried and record["learning_rate"]["value"] == best
    assert {entry["rows"] for entry in record["learning_rate"]["tried"]} == {4}  # a fifth of 24
    assert "held-out rows" in err and record["variants"] == {} and record["trace"] is None
    # The run uses it, and searches no second time.
    monkeypatch.setattr(rate_search, "_measured", lambda *a: pytest.fail("searched again"))
    code, out, err = call("finetune", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    found = json.loads(out)
    losses = found["variants"]["dense"]["finetune"]["losses"]
    assert max(entry["learning_rate"] for entry in losses) == best
    assert (
        found["recipe"]["finetune"]["learning_rate"] == best
        and "held-out" in found["learning_rate"]["source"]
    )
    # With a rate that is given, the rates that were tried before are not those of this start.
    code, out, err = call("plan", "--out", tmp_path / "run", "--set", "find_rate=false", "--json")
    assert code == 0 and "tried" not in json.loads(out)["learning_rate"], err


def test_a_search_looks_at_no_evaluation_row_and_needs_a_model_to_tune(tmp_path, call):
    from gradpruner.runs.job.job import Job

    path, _ = make_project(tmp_path)
    job = Job(load_recipe(path))
    learned, held_out = ({tuple(one.input_ids) for one in part.encoded} for part in rate_search._rows(job))
    of_training = {tuple(one.input_ids) for one in job.samples.encoded}
    assert learned | held_out <= of_training
    code, _, err = call("run", path, "--find-lr", "--set", "start=given", "--dry-run")
    assert code == 2 and "find_rate tunes the dense model" in err


# -- init -------------------------------------------------------------------------------------------------


def test_a_first_recipe_runs_as_it_is(call, tmp_path, monkeypatch):
    make_project(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    code, out, err = call("init")
    assert code == 0 and "gradpruner run recipe.yaml" in out, err
    text = (tmp_path / "recipe.yaml").read_text()
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.path == str(tmp_path / "model") and recipe.data.eval == str(tmp_path / "eval.jsonl")
    assert (recipe.plan.num_prune, recipe.effort, recipe.data.max_length) == (2, "best", 64)
    assert " 4 layers" in text and "23 training rows" in text
    assert "rows held out for validation" in text
    assert max(map(len, text.splitlines())) <= 120
    code, out, err = call("run", "recipe.yaml", "--epochs", "1", "--train-limit", "16", "--quiet")
    assert code == 0 and (tmp_path / "runs/recipe/report.html").exists(), err
    (tmp_path / "shards").mkdir()
    for number in range(2):
        shard = tmp_path / "shards" / f"train-0000{number}-of-00002.jsonl"
        shard.write_bytes((tmp_path / "train.jsonl").read_bytes())
    code, _, err = call("init", "shards", "--model", "model")
    assert code == 0, err
    assert load_recipe(str(tmp_path / "shards/recipe.yaml")).data.train == str(tmp_path / "shards")
    assert call("init")[0] == 2 and (tmp_path / "recipe.yaml").read_text() == text


def test_a_first_recipe_of_one_file_with_numbered_labels_runs(call, tmp_path):
    make_project(tmp_path)
    table = [f"what a film {i},{i % 2}" for i in range(40)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *table]), encoding="utf-8")
    for split in ("train", "eval"):
        (tmp_path / f"{split}.jsonl").unlink()
    made = tmp_path / "first.yaml"
    code, _, err = call("init", made, "--model", tmp_path / "model", "--data", tmp_path / "mine.csv")
    assert code == 0, err
    assert load_recipe(str(made)).data.labels == {"0": "0", "1": "1"}
    code, out, err = call("run", made, "--set", "plan.num_prune=1", "--dry-run", "--json")
    assert code == 0, err
    assert (json.loads(out)["train_rows"], json.loads(out)["eval_rows"]) == (
        33,
        4,
    )  # 3 to choose a recovery by


def test_rows_of_another_data_set_in_a_folder_beside_are_not_taken(call, tmp_path):
    make_project(tmp_path)
    (tmp_path / "mine").mkdir()
    for folder, name in (("mine/other", "test"), ("mine/third", "test"), ("mine", "rows")):
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [
            row | {"completion": f" the {i} {row['completion'] * 10}"} for i, row in enumerate(make_rows(24))
        ]
        write_rows(tmp_path / folder / f"{name}.jsonl", rows)
    recipe = tmp_path / "first.yaml"
    code, _, err = call("init", recipe, "--model", tmp_path / "model", "--data", tmp_path / "mine/rows.jsonl")
    assert code == 0, err
    written = yaml.safe_load(recipe.read_text())
    assert written["data"]["eval"] is None and written["evaluate"]["metrics"] == ["rouge_l"]


def test_a_recipe_elsewhere_finds_what_was_named_here(call, tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = ("--data", "train.jsonl#12", "--eval-data", "eval.jsonl")
    code, _, err = call("init", "jobs/one two.yaml", "--model", "model", *rows)
    assert code == 0, err
    recipe = load_recipe("jobs/one two.yaml")
    assert recipe.model.path == str(tmp_path / "model") and recipe.data.train == str(
        tmp_path / "train.jsonl#12"
    )


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (("--model", "empty", "--data", "train.jsonl", "--eval-data", "eval.jsonl"), 4, "no config.json"),
        (
            ("--model", "model", "--data", "odd.jsonl", "--eval-data", "eval.jsonl"),
            3,
            "columns not recognised",
        ),
        (("--data", "nowhere.jsonl", "--eval-data", "eval.jsonl"), 3, "No data at"),
        (("--data", "train.jsonl#abc"), 3, "after # a number is needed"),
        (("--model", "model", "--task", "sst3"), 2, "sst3"),
    ],
)
def test_what_no_recipe_can_be_made_of_is_refused_and_nothing_written(
    call, tmp_path, monkeypatch, options, code, part
):
    make_project(tmp_path)
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    found, out, err = call("init", "new.yaml", *options)
    assert found == code and part in err and out == "" and not (tmp_path / "new.yaml").exists()
    found, _, err = call("init", "new.txt")
    assert found == 2 and "Give new.yaml" in err and not (tmp_path / "new.txt").exists()


# -- what to do next --------------------------------------------------------------------------------------


def test_every_command_that_is_suggested_exists():
    for why, command in (line for lines in NEXT.values() for line in lines):
        program, name, *rest = shlex.split(command)
        assert program == "gradpruner" and why
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options


def test_a_run_says_what_to_do_next_to_people_only(call, tmp_path):
    path, _ = make_project(tmp_path, variants=["merged"])
    code, out, _ = call("plan", path, "--quiet")
    next_one = f"gradpruner run --out {tmp_path / 'run'} --plan {tmp_path / 'run/plans/merged.json'}"
    assert code == 0 and next_one in out.replace("\n", "")
    assert "next:" not in call("plan", path, "--quiet", "--json")[1]
