"""What a recipe asks models to be measured on: metrics by task, wording, further tasks, lm-eval."""

import json
import random
from pathlib import Path

import datasets
import pytest
from builders import make_project, make_rows, make_tokenizer, write_rows
from typer.testing import CliRunner

from gradpruner.cli.main import app
from gradpruner.common.errors import ConfigError, DataError, GradPrunerError
from gradpruner.common.progress import set_mode
from gradpruner.data.examples import Example, Message, as_conversation, overlap
from gradpruner.data.tasks import TASKS
from gradpruner.evaluation.quality import TASK_METRICS
from gradpruner.reports import html
from gradpruner.reports.notes import PROBE_TASKS
from gradpruner.runs.job.evaluation_data import (
    check_evaluation,
    load_rows,
    load_split,
    metrics_of,
    was_held_out,
)
from gradpruner.runs.job.inputs import encoder_content, harness_identity
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import check_recipe, load_recipe
from gradpruner.runs.recipe.sections import EvaluateSection

CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"

ROWS = json.loads(Path(__file__).parents[1].joinpath("task_rows.json").read_text(encoding="utf-8"))


def recipe(**data):
    return check_recipe({"model": {"path": "x"}, "data": data})


def test_every_metric_of_a_task_is_known_and_probes_are_the_reports():
    assert {TASKS.find(name).metric for name in TASKS.names()} <= set(TASK_METRICS)
    assert tuple(name for name in TASKS.names() if TASKS.find(name).probe) == PROBE_TASKS


def test_the_task_says_what_is_measured_unless_the_recipe_does():
    assert metrics_of(recipe(task="arc_easy")) == ("exact_match", "choice_likelihood")
    assert metrics_of(recipe(task="billsum")) == ("bert_score", "rouge_l", "exact_match", "choice_likelihood")
    assert metrics_of(recipe(task="gsm8k")) == ("final_number",)
    assert metrics_of(recipe(train="a", eval="b")) == ("exact_match", "choice_likelihood")
    own = check_recipe(
        {"model": {"path": "x"}, "data": {"task": "billsum"}, "evaluate": {"metrics": ["rouge_l"]}}
    )
    assert metrics_of(own) == ("rouge_l",)


@pytest.mark.parametrize(
    ("answer", "measured"),
    [
        (lambda i: f"the dog {i} " * 6, ["rouge_l"]),
        (lambda i: f"{i} and {i} makes so many, and so on and on #### {i}", ["final_number"]),
        (lambda i: "a long name of a class of customers in a bank" + " there" * (i % 2), None),
        (lambda i: f"yes {i}", None),
    ],
)
def test_sentences_are_not_measured_by_exact_match(tmp_path, answer, measured):
    path, _ = make_project(tmp_path)
    rows = [row | {"completion": f" {answer(i)}"} for i, row in enumerate(make_rows(12))]
    write_rows(tmp_path / "eval.jsonl", rows)
    job = Job(load_recipe(path))
    assert job.recipe.evaluate.metrics == measured
    assert job.metrics == tuple(measured or ("exact_match", "choice_likelihood"))
    assert Job(load_recipe(path, ("evaluate.metrics=[exact_match]",))).metrics == ("exact_match",)


def test_an_answer_without_room_for_a_prompt_is_refused_before_the_model_is_loaded(tmp_path):
    path, _ = make_project(tmp_path)
    rows = [row | {"completion": " dog" * 40} for row in make_rows(12)]
    write_rows(tmp_path / "eval.jsonl", rows)
    with pytest.raises(ConfigError, match=r"leaves no room.*Raise max_length \(data.max_length\)"):
        Job(load_recipe(path, ("data.max_length=32",)))
    Job(load_recipe(path, ("data.max_length=32", "evaluate.max_new_tokens=8")))


def test_a_task_has_the_papers_number_of_training_rows(tmp_path, monkeypatch):
    rows = ROWS["arc_easy"]
    write_rows(tmp_path / "train.jsonl", rows)
    object.__setattr__(TASKS.find("arc_easy"), "train_limit", 3)  # frozen, as tasks are
    try:
        found = load_split(recipe(task="arc_easy", folder=str(tmp_path)), "train", make_tokenizer())
        assert len(found) == 3
        more = recipe(task="arc_easy", folder=str(tmp_path), train_limit=5)
        assert len(load_split(more, "train", make_tokenizer())) == 5
    finally:
        object.__setattr__(TASKS.find("arc_easy"), "train_limit", None)


def test_evaluation_rows_are_held_out_if_none_are_given(tmp_path):
    tokenizer = make_tokenizer()
    write_rows(tmp_path / "mine.jsonl", make_rows(40))
    alone = recipe(train=f"{tmp_path}/mine.jsonl#30")
    train, held = load_rows(alone, tokenizer)
    ids = [{row.id for row in found.examples} for found in (train, held)]
    assert list(map(len, ids)) == [27, 3] and not ids[0] & ids[1]
    assert [row.id for row in load_rows(alone, tokenizer)[1].examples] == [row.id for row in held.examples]
    write_rows(tmp_path / "a#b.jsonl", make_rows(20))  # the mark is part of the name
    assert list(map(len, load_rows(recipe(train=f"{tmp_path}/a#b.jsonl"), tokenizer))) == [18, 2]
    limited = recipe(train=str(tmp_path / "mine.jsonl"), eval_limit=2)
    assert len(load_rows(limited, tokenizer)[1]) == 2
    (tmp_path / "few").mkdir()
    write_rows(tmp_path / "few" / "train.jsonl", make_rows(9))
    with pytest.raises(DataError, match="9 training rows are too few to hold evaluation rows"):
        load_rows(recipe(train=str(tmp_path / "few")), tokenizer)
    write_rows(tmp_path / "few" / "test.jsonl", make_rows(4))
    assert list(map(len, load_rows(recipe(train=str(tmp_path / "few")), tokenizer))) == [9, 4]


def test_rows_with_the_same_prompt_are_held_out_together(tmp_path):
    rows = [{"prompt": f"{i} :", "completion": " red"} for i in range(60)]
    held = recipe(train=str(tmp_path / "mine.jsonl"))

    def split():
        write_rows(tmp_path / "mine.jsonl", rows)
        return load_rows(held, make_tokenizer())

    expected = sorted(random.Random(held.seed).sample(range(60), 6))
    assert [row.id for row in split()[1].examples] == [f"mine.jsonl:{i + 1}" for i in expected]
    rows = [row for row in rows for _ in range(3)]
    train, apart = split()
    assert len(apart) == 18 and overlap(train.examples, apart.examples) == 0
    rows = rows[:3] * 20  # no other prompt
    train, apart = split()
    assert len(apart) == overlap(train.examples, apart.examples) == 6


def test_rows_of_a_hub_dataset_without_other_splits_are_held_out_too(monkeypatch):
    def load_dataset(hub_id, config, *, split, **_):
        if split != "train":
            raise ValueError(f'Unknown split "{split}". Should be one of [train].')
        return datasets.Dataset.from_list([{"prompt": f"{i} :", "completion": " red"} for i in range(30)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, held = load_rows(recipe(train="owner/instruct"), make_tokenizer())
    assert (len(train), len(held)) == (27, 3) and was_held_out(train, "evaluation")
    with pytest.raises(DataError, match="Unknown split"):
        load_rows(recipe(train="owner/instruct", eval="owner/instruct"), make_tokenizer())


def test_validation_rows_of_a_task_are_asked_as_its_other_rows(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS["sst2"])
    write_rows(tmp_path / "held.jsonl", ROWS["sst2"][::-1])
    asked = recipe(task="sst2", folder=str(tmp_path), validation=f"{tmp_path}/held.jsonl#1")
    train, held = (load_split(asked, split, make_tokenizer()) for split in ("train", "validation"))
    assert len(held) == 1 and held.examples[0].prompt in [one.prompt for one in train.examples]
    write_rows(tmp_path / "held.jsonl", make_rows(3))
    own = load_split(asked, "validation", make_tokenizer())
    assert len(own) == 1 and "not in the schema of the task 'sst2'" in own.notes[-1]


def test_a_template_that_no_row_uses_is_noted(tmp_path):
    write_rows(tmp_path / "train.jsonl", make_rows(4))
    asked = recipe(train=str(tmp_path / "train.jsonl"), chat_template="chatml")
    found = load_split(asked, "train", make_tokenizer())
    assert "template" not in found.format and "data.chat_template is not used" in found.notes[-1]


def test_chat_models_are_asked_in_conversations(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS["arc_easy"])
    plain, chat = make_tokenizer(), make_tokenizer()
    chat.chat_template = CHAT
    asked = recipe(task="arc_easy", folder=str(tmp_path))
    assert load_split(asked, "train", plain).examples[0].messages == ()
    found = load_split(asked, "train", chat)
    assert found.format == "task:arc_easy@1, chat template"
    one = found.examples[0]
    assert [turn.role for turn in one.messages] == ["user", "assistant"]
    assert one.messages[1].content == one.answer == one.answer.strip() and one.answer in one.choices
    never = recipe(task="arc_easy", folder=str(tmp_path), chat="never")
    assert load_split(never, "train", chat).examples[0].messages == ()
    with pytest.raises(ConfigError, match="no chat template"):
        load_split(recipe(task="arc_easy", folder=str(tmp_path), chat="always"), "train", plain)
    with pytest.raises(ConfigError, match="only named tasks"):
        check_evaluation(recipe(train="a", eval="b", chat="always"))


def test_a_conversation_says_what_the_prompt_said():
    example = Example("a", "Is it?\nAnswer:", " yes", (" yes", " no"))
    found = as_conversation(example)
    assert found == Example(
        "a", "", "yes", ("yes", "no"), (Message("user", "Is it?\nAnswer:"), Message("assistant", "yes"))
    )
    assert as_conversation(found) is found


def test_skip_bad_covers_validation_rows_and_further_tasks(tmp_path):
    """Rows that cannot be read, and rows that cannot be tokenised, of every set a run reads."""
    good, empty = make_rows(5), {"prompt": "", "completion": ""}
    path, _ = make_project(tmp_path, start="given")
    write_rows(tmp_path / "validation.jsonl", [*good, empty, {"prompt": "a"}])
    probe = tmp_path / "gsm8k"
    probe.mkdir()
    rows = ROWS["gsm8k"]
    write_rows(probe / "test.jsonl", [*rows, {"question": "no answer"}])
    overrides = (
        f"data.validation={tmp_path}/validation.jsonl",
        "plan.num_prune=null",
        "plan.max_loss=0.05",
        f"evaluate.also=[{{task: gsm8k, folder: {probe}}}]",
    )
    with pytest.raises(GradPrunerError, match="2 of 7 rows cannot be used"):
        Job(load_recipe(path, overrides))
    job = Job(load_recipe(path, (*overrides, "data.skip_bad=true")))
    assert (len(job.validation), job.validation.num_dropped) == (5, 2)
    assert (len(job.also["gsm8k"]), job.also["gsm8k"].num_dropped) == (len(rows), 1)
    said = [w for w in job.warnings if "dropped" in w]
    assert sum(w.startswith("validation data: ") and "dropped 2 of 7 rows" in w for w in said) == 1
    assert sum(w.startswith("gsm8k data: ") and "needs 'answer'" in w for w in said) == 1
    assert len(said) == 2  # each once


def test_a_missing_encoder_is_found_before_the_model_is_looked_for(tmp_path):
    asked = check_recipe(
        {
            "model": {"path": str(tmp_path / "none")},
            "data": {"train": "a", "eval": "b"},
            "evaluate": {"metrics": ["bert_score"], "encoder": str(tmp_path / "no encoder")},
        }
    )
    with pytest.raises(GradPrunerError, match="no encoder"):
        Job(asked)


@pytest.fixture
def project(tmp_path, monkeypatch):
    set_mode("quiet")
    monkeypatch.setattr(Job, "release", lambda *a: None)
    probe = tmp_path / "gsm8k"
    probe.mkdir()
    write_rows(probe / "test.jsonl", ROWS["gsm8k"])
    path, _ = make_project(
        tmp_path / "project",
        variants=["dense", "dropped"],
        evaluate={"batch_size": 12, "max_new_tokens": 4, "also": [{"task": "gsm8k", "folder": "../gsm8k"}]},
    )
    yield path
    set_mode("auto")


def test_further_tasks_of_a_run(project):
    record = run(load_recipe(project))
    for row in record["variants"].values():
        assert list(row["also"]["gsm8k"]["metrics"]) == ["final_number"]
        assert (project.parent / "run" / row["also"]["gsm8k"]["per_example"]).is_file()
        assert not list((project.parent / "run").rglob("*.part"))
    paired = record["variants"]["dropped"]["paired"]
    assert set(paired) == {"task", "gsm8k"} and "final_number" in paired["gsm8k"]
    assert record["variants"]["dense"].get("paired") is None
    page = (project.parent / "run" / "report.html").read_text()
    assert "Validation rows and other tasks" in page and "says nothing here" in page
    names = [stage["name"] for stage in record["stages"]]
    assert "evaluate dropped on gsm8k" in names
    again = run(load_recipe(project))
    assert {stage["state"] for stage in again["stages"]} == {"skipped"}
    assert again["variants"]["dropped"]["paired"] == paired


def test_tasks_of_the_harness_in_a_run(project, monkeypatch):
    found = {
        "version": "0",
        "tasks": {"t": {"version": 1, "n": 9, "metrics": {"acc": {"value": 0.5, "stderr": 0.1}}}},
    }
    asked = []
    monkeypatch.setattr("gradpruner.evaluation.harness.check_harness", lambda *a: asked.append(a))
    harness = "gradpruner.evaluation.harness"
    monkeypatch.setattr(f"{harness}.evaluate_harness", lambda *a, **k: asked.append(k) or found)
    record = run(
        load_recipe(project, ("evaluate.lm_eval=[t]", "evaluate.also=[]", "evaluate.lm_eval_limit=9"))
    )
    assert asked[0] == (["t"], None) and asked[1]["limit"] == 9 and len(asked) == 3
    assert record["variants"]["dropped"]["lm_eval"] == found
    page = (project.parent / "run" / "report.html").read_text()
    assert "lm-evaluation-harness" in page and "± 10.0" in page


def test_a_changed_folder_of_tasks_or_encoder_is_another_one(tmp_path):
    (tmp_path / "t.yaml").write_text("task: t")
    (tmp_path / "config.json").write_text("{}")
    options = EvaluateSection(lm_eval=["t"], lm_eval_folder=str(tmp_path), encoder=str(tmp_path))
    tasks, encoder = harness_identity(options), encoder_content(options, ["bert_score"])
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "utils.pyc").write_bytes(b"0")
    assert harness_identity(options) == tasks and encoder_content(options, ["exact_match"]) == {}
    (tmp_path / "t.yaml").write_text("task: u")
    assert harness_identity(options) != tasks and encoder_content(options, ["bert_score"]) == encoder
    (tmp_path / "config.json").write_text("[]")
    assert encoder_content(options, ["bert_score"]) != encoder


# -- the command ------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize("name", ["examples.jsonl", "evaluation.json"])
def test_files_of_others_are_not_replaced(folder, name):
    mine = folder / "mine"
    mine.mkdir()
    rows = (folder / "eval.jsonl").read_text() if name == "examples.jsonl" else "{}"
    (mine / name).write_text(rows)
    for given in ({mine / name} if name == "examples.jsonl" else set()) | {folder / "eval.jsonl"}:
        done = invoke(folder / "model", "--eval-data", given, "--out", mine, "--quiet")
        assert isinstance(done.exception, ConfigError) and "would be replaced" in str(done.exception)
    assert (mine / name).read_text() == rows and len(list(mine.iterdir())) == 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "render_html", lambda record, path: path)
    make_project(tmp_path)
    return tmp_path


def test_a_model_folder_is_measured(folder):
    done = invoke(
        folder / "model", "--eval-data", folder / "eval.jsonl", "--out", folder / "scores", "--quiet"
    )
    assert done.exit_code == 0, done.output
    assert "Exact match" in done.output and "12*" in done.output and "fewer than 100" in done.output
    found = json.loads((folder / "scores" / "evaluation.json").read_text())
    assert found["metrics"]["exact_match"]["n"] == 12
    assert found["provenance"]["seed"] == 0
    rows = (folder / "scores" / "examples.jsonl").read_text().splitlines()
    assert len(rows) == 12 and sorted(p.name for p in (folder / "scores").iterdir()) == [
        "evaluation.json",
        "examples.jsonl",
    ]
    again = invoke(folder / "model", "--eval-data", folder / "eval.jsonl", "--out", folder / "scores")
    assert again.exit_code == 0, again.output
    limited = invoke(
        folder / "model", "--eval-data", folder / "eval.jsonl", "--limit", 5, "--quiet", "--json",
        "--set", "evaluate.metrics=[rouge_l]",
    )  # fmt: skip
    shown = json.loads(limited.stdout)
    assert list(shown["metrics"]) == ["rouge_l"] and shown["metrics"]["rouge_l"]["n"] == 5


def test_an_interrupted_evaluation_resumes_for_the_same_model_only(folder, monkeypatch):
    def parts():
        return sorted((folder / "scores").glob("*.part"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    command = ("--eval-data", folder / "eval.jsonl", "--out", folder / "scores", "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr("gradpruner.evaluation.quality._grade", stop)
        assert invoke(folder / "model", *command).exit_code != 0
    (first,) = parts()
    lines = [json.loads(line) for line in first.read_text().splitlines() if line]
    assert len(lines) == 12
    marked = [[i, row | {"generated": "from the journal"}] for i, row in lines]
    first.write_text("".join(json.dumps(line) + "\n" for line in marked))
    (folder / "other").mkdir()
    for path in (folder / "model").iterdir():
        (folder / "other" / path.name).write_bytes(path.read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr("gradpruner.evaluation.quality._grade", stop)
        assert invoke(folder / "other", *command).exit_code != 0
    assert len(parts()) == 2
    assert invoke(folder / "model", *command).exit_code == 0
    rows = [json.loads(line) for line in (folder / "scores" / "examples.jsonl").read_text().splitlines()]
    assert {row["generated"] for row in rows} == {"from the journal"}
    assert invoke(folder / "other", *command).exit_code == 0
    rows = [json.loads(line) for line in (folder / "scores" / "examples.jsonl").read_text().splitlines()]
    assert "from the journal" not in {row["generated"] for row in rows} and parts() == []


def test_skip_bad_counts_rows_that_no_template_renders(folder):
    """Rows of conversations whose first turn the chat template refuses."""
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    refused = [{"role": "system", "content": "s"}, *good]
    rows = [{"messages": good}, {"messages": refused}, {"messages": good[:1]}]
    write_rows(folder / "chats.jsonl", rows)
    (folder / "model" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    command = (folder / "model", "--eval-data", folder / "chats.jsonl", "--quiet", "--dry-run", "--json")
    assert "1 of 3 rows cannot be used" in str(invoke(*command).exception)
    shown = json.loads(invoke(*command, "--skip-bad").stdout)
    assert (shown["rows"], shown["rows_dropped"]) == (1, 2)
    assert "no system turn" in shown["notes"][-1]
    assert "no system turn" in " ".join(invoke(*command[:-1], "--skip-bad").output.split())


def test_a_dry_run_measures_nothing(folder):
    done = invoke(folder / "model", "--eval-data", folder / "eval.jsonl", "--dry-run", "--quiet")
    assert done.exit_code == 0 and "12 rows of" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Nothing to evaluate"),
        (("--task", "arc_eazy"), "Did you mean 'arc_easy'"),
        (("--eval-data", "none.jsonl"), "none.jsonl"),
        (("--eval-data", "eval.jsonl", "--model", "x"), "belong to a run"),
        (("--eval-data", "eval.jsonl", "--set", "evaluate.metrics=[exact]"), "exact_match"),
        (("--eval-data", "eval.jsonl", "--endpoint", "nowhere"), "not the address"),
        (("--eval-data", "eval.jsonl", "--served-name", "x"), "no server is given"),
    ],
)
def test_evaluations_that_are_refused(folder, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    done = invoke(folder / "model", *arguments, "--quiet")
    assert isinstance(done.exception, GradPrunerError)
    assert message in f"{done.exception.message} {done.exception.hint}"


def test_a_server_needs_the_folder_of_its_model(folder):
    done = invoke("--endpoint", "http://127.0.0.1:9/v1", "--out", folder / "run")
    assert "need the folder" in str(done.exception)
