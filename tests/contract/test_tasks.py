"""What every registered task must do; a new task is tested by being registered."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from gradpruner.data import Example, load_examples, overlap
from gradpruner.errors import ConfigError, DataError
from gradpruner.tasks import TASKS, Task, load_task

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(params=TASKS.names())
def task(request) -> Task:
    return TASKS.find(request.param)


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return path


def test_it_describes_itself(task):
    assert TASKS.find(task.name) is task
    assert task.version >= 1
    assert task.description.endswith(".")
    assert task.metric == "accuracy"
    assert task.max_new_tokens >= 1
    assert "/" in task.hub_id
    assert task.train_split != task.eval_split
    if task.hub_files and not task.hold_out:
        assert {task.train_split, task.eval_split} <= set(task.hub_files)


def test_its_sample_is_in_the_hub_schema_and_varied(task):
    assert 6 <= len(task.rows) <= 10
    for row in task.rows:
        assert set(task.columns) <= set(row)
    examples = task.examples(task.rows, "train")
    assert len({example.prompt for example in examples}) == len(examples)
    assert len({example.answer for example in examples}) >= 3


def test_its_examples_are_well_formed(task):
    examples = task.examples(task.rows, "train")
    for index, (row, example) in enumerate(zip(task.rows, examples, strict=True)):
        assert example.id == f"train[{index}]"
        assert example.messages == ()
        assert len(set(example.choices)) == len(example.choices) >= 2
        assert example.answer in example.choices
        text = next(str(row[name]) for name in ("input", "sentence", "text") if name in row)
        assert text in example.prompt
    assert examples == task.examples(task.rows, "train")


def test_its_spacing_follows_the_one_rule(task):
    for example in task.examples(task.rows, "train"):
        assert example.prompt == example.prompt.rstrip()
        for choice in example.choices:
            assert choice == " " + choice.strip()


def test_every_choice_fits_in_the_tokens_it_may_generate(task):
    for example in task.examples(task.rows, "train"):
        # Two tokens a word, and one to stop, is generous for the vocabularies in use.
        assert max(2 * len(choice.split()) + 1 for choice in example.choices) <= task.max_new_tokens


def test_it_loads_from_a_folder(task, tmp_path):
    write(tmp_path / "train.jsonl", task.rows)
    write(tmp_path / "test.jsonl", task.rows[:6])
    found = load_task(task.name, tmp_path)
    assert len(found) == len(task.rows)
    assert found.format == f"task:{task.name}@{task.version}"
    assert found.examples[0].id == "train.jsonl:1"
    assert found.sha256 == sha256_of(tmp_path / "train.jsonl")
    assert len(load_task(task.name, tmp_path, "test")) == 6
    some = load_task(task.name, tmp_path, limit=4, seed=3)
    assert len(some) == 4
    assert set(some.examples) <= set(found.examples)
    assert some.examples == load_task(task.name, tmp_path, limit=4, seed=3).examples
    assert any("sampled 4 of" in note for note in some.notes)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_missing_column_names_row_and_schema(task):
    for column in task.columns:
        row = {name: value for name, value in task.rows[1].items() if name != column}
        with pytest.raises(DataError) as caught:
            task.examples([task.rows[0], row], "train")
        assert f"train[1]: task '{task.name}' needs '{column}'" in str(caught.value)
        assert ", ".join(task.columns) in caught.value.hint


@pytest.mark.parametrize("value", [-1, 99, 1.5, True, "great", [0]])
def test_a_label_out_of_range_names_the_row(task, value):
    column = next(name for name in ("label", "coarse_label", "output") if name in task.columns)
    with pytest.raises(DataError) as caught:
        task.examples([{**task.rows[0], column: value}], "test", ids=["test.jsonl:5"])
    assert "test.jsonl:5: " in str(caught.value)
    assert f"'{column}' is {value!r}" in str(caught.value)
    assert caught.value.hint


def test_an_empty_text_names_the_row(task):
    column = next(name for name in ("input", "sentence", "text") if name in task.columns)
    with pytest.raises(DataError, match=rf"^train\[0\]: '{column}' is ' '"):
        task.examples([{**task.rows[0], column: " "}], "train")


def test_it_reads_the_hub(task, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [dict(row) for row in task.rows]
    asked = []

    def load(hub_id, config, **options):
        asked.append((hub_id, options["split"], options["revision"], options["data_files"]))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    if task.hold_out:
        # A table large enough to hold rows out of, with each row written three times.
        column = next(name for name in ("input", "sentence", "text") if name in task.columns)
        count = task.hold_out + 20
        rows = [{**rows[i % len(rows)], column: f"row {i}"} for i in range(count)] * 3
        random.Random(0).shuffle(rows)
    train = load_task(task.name)
    evaluation = load_task(task.name, split=task.eval_split, seed=5)
    assert all(hub_id == task.hub_id for hub_id, *_ in asked)
    if not task.hold_out:
        assert [split for _, split, *_ in asked] == ["train", "test"]
        return
    assert [split for _, split, *_ in asked] == ["train", "train"]
    assert (len(train), len(evaluation)) == (20, task.hold_out)
    assert overlap(train.examples, evaluation.examples) == 0
    assert "held out" in evaluation.notes[0]
    again = load_task(task.name, split=task.eval_split, seed=6)
    assert again.examples == evaluation.examples, "the run's seed must not move the split"
    with pytest.raises(ConfigError, match="no split 'validation'"):
        load_task(task.name, split="validation")


def test_real_rows_if_present(task):
    folder = SHARED / task.name
    if not folder.is_dir():
        pytest.skip("the dataset is not here")
    for split in (task.train_split, task.eval_split):
        found = load_task(task.name, folder, split)
        assert len(found) >= 500
        assert len({example.id for example in found.examples}) == len(found)


# The tasks' own promises


def test_trec_numbers_mean_what_the_hub_says():
    task = TASKS.find("trec")
    rows = [{"text": f"q {label}", "coarse_label": label} for label in range(6)]
    answers = [example.answer.strip() for example in task.examples(rows, "train")]
    # ABBR, ENTY, DESC, HUM, LOC, NUM
    assert answers == ["abbreviation", "entity", "description", "human", "location", "numeric"]


def test_trec_mapping_fits_real_questions():
    folder = SHARED / "trec"
    if not folder.is_dir():
        pytest.skip("the dataset is not here")
    examples = load_task("trec", folder).examples

    def most_common(opening: str) -> str:
        answers = [e.answer.strip() for e in examples if f"Question: {opening}" in e.prompt]
        return max(set(answers), key=answers.count)

    assert most_common("Who ") == "human"
    assert most_common("Where ") == "location"
    assert most_common("How many ") == "numeric"
    assert most_common("Why ") == "description"
    assert most_common("What does the abbreviation ") == "abbreviation"


def test_financial_phrasebank_prompt():
    task = TASKS.find("financial_phrasebank")
    (example,) = task.examples([{"sentence": "Sales rose .", "label": "2"}], "train")
    assert example == Example(
        "train[0]",
        "What is the sentiment of this sentence for an investor: negative, neutral, positive?\n"
        "Sentence: Sales rose .\nAnswer:",
        " positive",
        (" negative", " neutral", " positive"),
    )


def test_fingpt_keeps_the_instruction_and_its_own_choices():
    task = TASKS.find("fingpt_sentiment")
    row = {"instruction": "Pick from {good/very bad}.", "input": "x", "output": "very bad"}
    (example,) = task.examples([row], "train")
    assert example.prompt == "Instruction: Pick from {good/very bad}.\nInput: x\nAnswer:"
    assert example.choices == (" good", " very bad")
    with pytest.raises(DataError, match="names no choices"):
        task.examples([{**row, "instruction": "Pick."}], "train")


def test_unknown_task_and_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'trec'"):
        load_task("treck")
    with pytest.raises(DataError, match="no folder") as caught:
        load_task("trec", tmp_path / "none")
    assert "train.jsonl with the columns text, coarse_label" in caught.value.hint


def test_too_few_rows_to_hold_out(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [dict(row) for row in TASKS.find("financial_phrasebank").rows]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(DataError, match="too few to hold 1000 out"):
        load_task("financial_phrasebank")


def test_task_files_are_also_ordinary_data(tmp_path):
    path = write(tmp_path / "train.jsonl", TASKS.find("fingpt_sentiment").rows)
    assert load_examples(path).format == "alpaca"
