"""A user's own columns: labelled texts, other names for columns, templates."""

from pathlib import Path

import pytest
from builders import make_project, write_rows
from datasets import ClassLabel, Dataset, Features, Value

from gradpruner.common.errors import ConfigError, DataError, GradPrunerError
from gradpruner.data.examples import Message
from gradpruner.data.layouts import Layout
from gradpruner.data.loading import load_examples
from gradpruner.runs.before.preview import preview_run
from gradpruner.runs.job.evaluation_data import load_split
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import check_recipe, load_recipe

TEXTS = [("good film", "positive"), ("bad film", "negative"), ("a film", "neutral")]
NAMES = ["negative", "neutral", "positive"]
CHOICES = (" negative", " neutral", " positive")


def csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def expected(found, ids):
    assert [(e.prompt, e.answer, e.choices) for e in found.examples] == [
        (f"{text}\nLabel:", f" {label}", CHOICES) for text, label in TEXTS
    ]
    assert [e.id for e in found.examples] == ids


# -- labelled text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["text", "sentence", "review", "question", "content", "body"])
@pytest.mark.parametrize("label", ["label", "label_text", "category", "intent", "class"])
def test_a_text_and_its_label(tmp_path, text, label):
    path = csv(tmp_path / "a.csv", f"{text},{label}", *(",".join(row) for row in TEXTS))
    found = load_examples(path)
    assert found.format == "labelled_text"
    expected(found, ["a.csv:2", "a.csv:3", "a.csv:4"])


def test_names_of_classes_come_from_the_file(tmp_path):
    """ClassLabel features, in parquet, in save_to_disk and on the hub; the order of the names is kept."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=NAMES))
    columns = {"text": [t for t, _ in TEXTS], "label": [NAMES.index(name) for _, name in TEXTS]}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    expected(load_examples(tmp_path / "a.parquet"), ["a.parquet[0]", "a.parquet[1]", "a.parquet[2]"])
    table.save_to_disk(tmp_path / "saved")
    expected(load_examples(tmp_path / "saved"), ["saved[0]", "saved[1]", "saved[2]"])


def test_names_of_classes_come_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=NAMES))
    columns = {"text": [t for t, _ in TEXTS], "label": [NAMES.index(name) for _, name in TEXTS]}
    table = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    found = load_examples("org/films")
    expected(found, [f"org/films/train[{i}]" for i in range(3)])
    # Test splits without answers hold -1.
    table = datasets.Dataset.from_dict({**columns, "label": [0, 1, -1]}, features=features)
    with pytest.raises(DataError, match="label '-1' in 'label' has no name; known: 0 negative, 1 neutral"):
        load_examples("org/films")


def test_shards_must_have_the_same_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    for index, names in enumerate((NAMES, NAMES[::-1])):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        table = datasets.Dataset.from_dict({"text": ["a"], "label": [0]}, features=features)
        table.to_parquet(tmp_path / f"train-0000{index}-of-00002.parquet")
    with pytest.raises(
        DataError, match=r"train-00001-of-00002[.]parquet have different names for class numbers"
    ):
        load_examples(tmp_path)


@pytest.mark.parametrize("labels", [NAMES, {0: "negative", 1: "neutral", 2: "positive"}])
@pytest.mark.parametrize("numbers", ["csv", "jsonl", "floats"])
def test_numbers_are_named_by_the_recipe(tmp_path, labels, numbers):
    rows = [(text, NAMES.index(name)) for text, name in TEXTS]
    if numbers == "csv":
        path = csv(tmp_path / "a.csv", "text,label", *(f"{t},{n}" for t, n in rows))
    else:
        path = tmp_path / "a.jsonl"
        kind = float if numbers == "floats" else int
        write_rows(path, [{"text": text, "label": kind(number)} for text, number in rows])
    with pytest.raises(
        DataError, match=r"'label' are numbers \(0, 1, 2\) without names\. Name them in data.la"
    ):
        load_examples(path)
    found = load_examples(path, layout=Layout(labels=labels))
    expected(found, [one.id for one in found.examples])
    with pytest.raises(DataError, match="label '2' in 'label' has no name; known: 0 negative, 1 neutral"):
        load_examples(path, layout=Layout(labels=["negative", "neutral"]))


@pytest.mark.parametrize(
    "labels, message",
    [
        (["1", "2", "3"], "a list, counted from 0, so it calls the label 0 '1'"),
        (["bad", "good", "bad"], "the name 'bad' twice"),
        (["", "bad", "good"], "a name without text"),
        ({1: "a", 2: " "}, "a name without text"),
    ],
)
def test_names_that_would_mix_up_labels(tmp_path, labels, message):
    path = csv(tmp_path / "a.csv", "text,label", "good,1", "bad,2")
    with pytest.raises(ConfigError, match=message):
        load_examples(path, layout=Layout(labels=labels))
    kept = load_examples(path, layout=Layout(labels={1: "1", 2: "2"}))
    assert [one.answer for one in kept.examples] == [" 1", " 2"]
    joined = load_examples(path, layout=Layout(labels={1: "some", 2: "some", 3: "more"}))
    assert [one.answer for one in joined.examples] == [" some", " some"]


def test_a_files_own_names_may_be_numbers(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "2"])})
    Dataset.from_dict({"text": ["bad", "good"], "label": [0, 1]}, features).to_parquet(tmp_path / "a.parquet")
    assert [one.answer for one in load_examples(tmp_path / "a.parquet").examples] == [" 1", " 2"]


def test_names_of_labels_are_for_a_text_and_its_label(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"prompt": "a", "completion": "0"}])
    (note,) = load_examples(path, layout=Layout(labels=["bad", "good"])).notes
    assert note.startswith("data.labels is not used") and note.endswith("these rows are prompt_completion")


def test_a_column_of_names_takes_precedence_over_numbers(tmp_path):
    path = csv(tmp_path / "a.csv", "text,label,label_text", "good,1,positive", "bad,0,negative")
    found = load_examples(path)
    assert [e.answer for e in found.examples] == [" positive", " negative"]
    assert not any("not used" in note for note in found.notes)
    assert "labels: negative, positive" in found.notes[0] and "'banking77'" in found.notes[0]


def test_columns_that_are_not_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"text": "a", "label": label} for label in ("x", "y", None, 0.5, " ", ["x"])])
    found = load_examples(path, skip_bad=True)
    assert (len(found), found.num_dropped) == (2, 4)
    write_rows(path, [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])
    with pytest.raises(
        DataError, match=r"every row has the label 'x'\. List all possible labels in data\.labels"
    ):
        load_examples(path)
    assert load_examples(path, layout=Layout(labels=["x", "y"])).examples[0].choices == (" x", " y")
    write_rows(path, [{"text": "", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(DataError, match="no text in 'text'"):
        load_examples(path)
    write_rows(path, [{"text": "b", "label": f"a title {i}"} for i in range(300)])
    assert load_examples(path).examples[7].choices == ()


def test_rows_of_a_task_that_needs_more_columns_are_not_labelled_text(tmp_path):
    rows = [{"question": "a", "answer": "b", "choices": ["c", "b"], "subject": "s", "class": "x"}] * 2
    write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="columns of the task 'mmlu_clinical_knowledge'"):
        load_examples(tmp_path / "a.jsonl")


# -- other names for columns --------------------------------------------------------------------------------


def test_columns_are_renamed_by_the_recipe(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"q": "Is it?", "a": " yes", "s": "Be brief.", "more": 1}])
    two = load_examples(tmp_path / "a.jsonl", layout=Layout({"prompt": "q", "completion": "a"}))
    assert (two.examples[0].prompt, two.examples[0].answer) == ("Is it?", " yes")
    assert two.format.startswith("prompt_completion, layout ") and "s (1 rows), more (1 rows)" in two.notes[0]
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    three = load_examples(tmp_path / "a.jsonl", layout=Layout(columns))
    assert three.examples[0].messages == (
        Message("system", "Be brief."), Message("user", "Is it?"), Message("assistant", " yes"),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"data.columns names the column 'z'.* Columns: q, a, s, more"):
        load_examples(tmp_path / "a.jsonl", layout=Layout({"prompt": "z"}))
    tweets = csv(tmp_path / "b.csv", "tweet,mood", "good film,positive", "bad film,negative")
    found = load_examples(tweets, layout=Layout({"text": "tweet", "label": "mood"}))
    assert [e.answer for e in found.examples] == [" positive", " negative"]


# -- templates ----------------------------------------------------------------------------------------------


def test_templates_over_any_columns(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"question": "2 + {x}?", "n": 4, "hint": ""}])
    asked = Layout(prompt="Q{{}}: {question} ({n}{hint})\nA:", completion=" {n}")
    found = load_examples(tmp_path / "a.jsonl", layout=asked)
    assert (found.examples[0].prompt, found.examples[0].answer) == ("Q{}: 2 + {x}? (4)\nA:", " 4")
    assert found.format.startswith("templates, layout ")
    other = load_examples(tmp_path / "a.jsonl", layout=Layout(prompt="{question}", completion=" {n}"))
    assert other.format != found.format, "other prompts are other data"


def test_a_template_for_the_prompt_alone_keeps_the_labels(tmp_path):
    path = csv(tmp_path / "a.csv", "text,label", *(",".join(row) for row in TEXTS))
    found = load_examples(path, layout=Layout(prompt="Review: {text}\nMood:"))
    assert next((e.prompt, e.answer, e.choices) for e in found.examples) == (
        "Review: good film\nMood:", " positive", CHOICES,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(prompt="{a}"), "data.completion is not given, and the rows have no column 'completion'"),
        (Layout(prompt="{c}", completion="{b}"), "data.prompt names the column 'c', which does not exist"),
        (Layout(prompt="{a.__class__}", completion="{b}"), "names the column 'a.__class__'"),
        (Layout(prompt="{a!r}", completion="{b}"), "at least one column in braces, by its name alone"),
        (Layout(prompt="{a", completion="{b}"), "expected '}' before end of string"),
        (Layout(prompt="a", completion="{b}"), "at least one column in braces"),
        (Layout(prompt="{a}", completion="{d}"), "field 'd' is null"),
        (Layout(prompt="{a}", completion="{e}"), "field 'e' is a list"),
    ],
)
def test_templates_that_cannot_be_filled(tmp_path, layout, words):
    write_rows(tmp_path / "a.jsonl", [{"a": "x", "b": "y", "d": None, "e": ["z"]}])
    with pytest.raises((ConfigError, DataError)) as caught:
        load_examples(tmp_path / "a.jsonl", layout=layout)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"task": "sst2", "prompt": "{a}"}, "data.prompt is for rows of your own"),
        ({"train": "a", "eval": "b", "format": "alpaca", "prompt": "{a}"}, "exclude each other"),
        ({"train": "a", "eval": "b", "labels": ["one"]}, "labels"),
    ],
)
def test_contradicting_settings_are_refused(data, words):
    with pytest.raises(GradPrunerError, match=words):
        check_recipe({"model": {"path": "x"}, "data": data})


# -- in a run ----------------------------------------------------------------------------------------------


def test_a_recipe_lays_out_every_set_and_the_dry_run_shows_it(tmp_path):
    path, _ = make_project(tmp_path, start="given")
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(30)]
    for name in ("train", "eval", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    overrides = (
        r"data.prompt=Review: {text}\nMood:",
        "data.labels={0: negative, 1: positive}",
        f"data.validation={tmp_path}/validation.jsonl",
        "plan.num_prune=null",
        "plan.max_loss=0.2",
    )
    job = Job(load_recipe(path, overrides))
    for found in (job.train, job.eval, job.validation):
        first = found.examples[0]
        assert (first.prompt, first.answer) == ("Review: text 0\nMood:", " negative")
        assert first.choices == (" negative", " positive")
    shown = preview_run(load_recipe(path, overrides))
    assert shown["format"].startswith("templates")
    # The first row in the miniature vocabulary: its prompt is not learned, its answer is.
    assert [learned for _, learned in shown["samples"][0]] == [False, True]


@pytest.mark.parametrize(
    ("typed", "prompt"),
    [
        (r"Question: {text}\nAnswer:", "Question: {text}\nAnswer:"),
        ("{text}", "{text}"),
        (" {text}", " {text}"),
        (r'"Q: {text}\nA:"', "Q: {text}\nA:"),
        ("null", None),
    ],
)
def test_a_template_on_the_command_line_is_not_changed(tmp_path, typed, prompt):
    path, _ = make_project(tmp_path)
    assert load_recipe(path, (f"data.prompt={typed}",)).data.prompt == prompt


def test_templates_and_columns_in_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {path: m}\n"
        "data:\n"
        "  train: a\n"
        "  eval: b\n"
        '  prompt: "Q: {text}\\nA:"\n'
        "  columns: {text: tweet, label: mood}\n"
        "  labels: {0: negative, 1: positive}\n"
    )
    data = load_recipe(path).data
    assert (data.prompt, data.columns) == ("Q: {text}\nA:", {"text": "tweet", "label": "mood"})
    assert data.labels == {0: "negative", 1: "positive"}


def test_different_labels_in_evaluation_rows_are_warned_of(tmp_path):
    path, _ = make_project(tmp_path)
    labels = {"train": ["x", "y", "z"], "eval": ["x", "y"]}
    for name, own in labels.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "a", "label": own[i % len(own)]} for i in range(30)])
    recipe = load_recipe(path)
    warning = next(one for one in Job(recipe).warnings if "labels, evaluation rows" in one)
    assert "3 labels, evaluation rows 2 (not in both: z)" in warning
    assert warning.endswith("""--set 'data.labels=["x", "y", "z"]'.""")
    held = [{"text": "a", "label": label} for label in "xyw" * 10]
    write_rows(tmp_path / "held.jsonl", held)
    both = Job(load_recipe(path, (f"data.validation={tmp_path / 'held.jsonl'}",))).warnings
    said = [one for one in both if "so they offer different choices" in one]
    assert "3 labels, validation rows 3 (not in both: w, z)" in said[1] and len(said) == 2
    assert all(one.endswith("""--set 'data.labels=["w", "x", "y", "z"]'.""") for one in said)
    filled = load_recipe(path, ("data.completion=It is {label}",))
    assert any(one.endswith("List all labels in data.labels.") for one in Job(filled).warnings)
    named = load_recipe(path, ("data.labels={x: x, y: y, z: z}",))
    assert not any("labels, evaluation rows" in warning for warning in Job(named).warnings)
    assert load_split(named, "eval", None, 64).examples[0].choices == (" x", " y", " z")
