"""What every registered task must do; registering a task is enough to test it."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.examples import Example, overlap
from gradpruner.data.loading import load_examples
from gradpruner.data.tasks import TASKS, Task, load_task
from gradpruner.data.tasks.base import METRICS
from gradpruner.evaluation.quality import TASK_METRICS

ROWS = json.loads((Path(__file__).parents[1] / "task_rows.json").read_text(encoding="utf-8"))
SHARED = Path(__file__).parents[3] / "shared" / "data"
# Rows of the local copies of the datasets, as in their manifest: for training, and for evaluation.
LOCAL_ROWS = {
    "arc_challenge": (1119, 1172),
    "arc_easy": (2251, 2376),
    "banking77": (10003, 3080),
    "financial_phrasebank": (3846, 1000),
    "fingpt_sentiment": (6382, 1500),
    "gsm8k": (7473, 1319),
    "hellaswag": (8042, 2000),
    "medmcqa": (3182, 1000),  # of 3183: four equal options in one
    "mmlu_clinical_knowledge": (5, 265),
    "piqa": (16112, 1838),  # of 16113: two solutions that differ in a space
    "pubmedqa": (500, 500),
    "scitldr": (1992, 618),
    "sst2": (60614, 6735),
    "trec": (5452, 500),
    "winogrande": (10234, 1267),
}


@pytest.fixture(params=TASKS.names())
def task(request) -> Task:
    return TASKS.find(request.param)


def asked_column(task: Task) -> str:
    """Returns the column that the prompt asks about; FinGPT's first column has the choices."""
    return "input" if "input" in task.columns else task.columns[0]


def texts(value: object) -> list[str]:
    return [str(part) for part in value] if isinstance(value, list) else [str(value)]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return path


def test_it_describes_itself(task):
    assert TASKS.find(task.name) is task
    assert task.version >= 1
    assert task.description.endswith(".")
    assert task.metric in METRICS
    assert task.train_limit is None or task.train_limit > 0
    assert "/" in task.hub_id
    assert task.splits[:2] == (task.train_split, task.eval_split)
    assert not task.paper or task.paper.startswith("Table")


def test_its_sample_is_in_the_hub_schema_and_varied(task):
    assert 6 <= len(ROWS[task.name]) <= 20
    for row in ROWS[task.name]:
        assert set(task.columns) <= set(row)
    examples = task.examples(ROWS[task.name], "train")
    assert len({example.prompt for example in examples}) == len(examples)
    assert len({example.answer for example in examples}) >= 2


def test_its_examples_are_well_formed(task):
    examples = task.examples(ROWS[task.name], "train")
    for index, (row, example) in enumerate(zip(ROWS[task.name], examples, strict=True)):
        assert example.id == f"train[{index}]"
        assert example.messages == ()
        assert bool(example.choices) == bool(examples[0].choices)
        if example.choices:
            assert len(set(example.choices)) == len(example.choices) >= 2
            assert example.answer in example.choices
        else:
            assert task.metric != "accuracy", "accuracy also scores the choices"
        assert example.answer.strip() not in ("", "None")
        if "[" not in str(row[asked_column(task)]).removeprefix("["):  # WikiHow's marks are taken out
            assert all(text.strip() in example.prompt for text in texts(row[asked_column(task)]))
    assert examples == task.examples(ROWS[task.name], "train")


def test_its_spacing_follows_the_rule(task):
    for example in task.examples(ROWS[task.name], "train"):
        assert example.prompt == example.prompt.rstrip()
        for choice in (example.answer, *example.choices):
            assert choice == " " + choice.strip()


def test_it_loads_from_a_folder(task, tmp_path):
    write(tmp_path / "train.jsonl", ROWS[task.name])
    write(tmp_path / "test.jsonl", ROWS[task.name][:6])
    found = load_task(task.name, tmp_path)
    assert len(found) == len(ROWS[task.name])
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
        row = {name: value for name, value in ROWS[task.name][1].items() if name != column}
        with pytest.raises(DataError) as caught:
            task.examples([ROWS[task.name][0], row], "train")
        assert f"train[1]: task '{task.name}' needs '{column}'" in str(caught.value)
        assert ", ".join(task.columns) in caught.value.hint


@pytest.mark.parametrize("value", [-1, 99, 1.5, True, "great", "", [0]])
def test_a_wrong_answer_names_the_row(task, value):
    column = task.columns[-1]
    with pytest.raises(DataError) as caught:
        made = task.example({**ROWS[task.name][0], column: value}, "test.jsonl:5")
        if value == "great" and made == replace(made, answer=" great", choices=()):
            pytest.skip("the answer may be any text")
    assert "test.jsonl:5: " in str(caught.value)
    assert f"'{column}' is {value!r}" in str(caught.value)
    assert caught.value.hint


def test_an_empty_text_names_the_row(task):
    column = asked_column(task)
    with pytest.raises(DataError, match=rf"^train\[0\]: '{column}' is ' '"):
        task.examples([{**ROWS[task.name][0], column: " "}], "train")


def test_it_reads_the_hub(task, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [dict(row) for row in ROWS[task.name]]
    asked = []

    def load(hub_id, config, **options):
        asked.append((hub_id, config, options["split"], options["revision"], options["data_files"]))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    if task.hold_out:
        # A table large enough to hold rows out of, with each row written three times.
        column = asked_column(task)
        count = task.hold_out + 20
        rows = [{**rows[i % len(rows)], column: f"row {i}"} for i in range(count)] * 3
        random.Random(0).shuffle(rows)
    train = load_task(task.name, split=task.train_split)
    evaluation = load_task(task.name, split=task.eval_split, seed=5)
    places = {(hub_id, config, revision) for hub_id, config, _, revision, _ in asked}
    assert places == {(task.hub_id, task.hub_config, task.hub_revision)}
    read = [task.train_split, task.train_split if task.hold_out else task.eval_split]
    assert [split for _, _, split, _, _ in asked] == read
    files = [{split: task.hub_files[split]} if task.hub_files else None for split in read]
    assert [data_files for *_, data_files in asked] == files
    if not task.hold_out:
        return
    assert (len(train), len(evaluation)) == (20, task.hold_out)
    assert overlap(train.examples, evaluation.examples) == 0
    assert "held out" in evaluation.notes[0]
    again = load_task(task.name, split=task.eval_split, seed=6)
    assert again.examples == evaluation.examples, "the run's seed must not move the split"


def test_a_split_that_is_not_offered_is_refused_before_the_hub_is_asked(task, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    hidden = next(name for name in ("test", "validation", "train", "dev") if name not in task.splits)
    with pytest.raises(ConfigError, match=f"Task '{task.name}' has no split '{hidden}'") as caught:
        load_task(task.name, split=hidden)
    assert all(split in caught.value.hint for split in task.splits)


def test_real_rows_if_present(task):
    folder = SHARED / task.name
    if not folder.is_dir():
        pytest.skip("the dataset is not here")
    for split, count in zip((task.train_split, task.eval_split), LOCAL_ROWS[task.name], strict=True):
        found = load_task(task.name, folder, split)
        assert len(found) == count
        assert len({example.id for example in found.examples}) == len(found)
        for example in found.examples:
            assert len(example.choices) != 1
            assert not example.choices or example.answer in example.choices


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
    with pytest.raises(DataError, match="lists no choices"):
        task.examples([{**row, "instruction": "Pick."}], "train")


def example(name: str, row: dict) -> Example:
    (made,) = TASKS.find(name).examples([row], "train")
    return made


def test_arc_looks_the_key_up():
    choices = {"text": ["ice", "steam", "  fog\n bank "], "label": ["1", "2", "3"]}
    row = {"question": "What is hot?", "choices": choices, "answerKey": "2"}
    assert example("arc_easy", row) == Example(
        "train[0]",
        "Question: What is hot?\nOptions:\n- ice\n- steam\n- fog bank\nAnswer:",
        " steam",
        (" ice", " steam", " fog bank"),
    )
    lettered = {"text": ["a", "b", "c", "d", "e"], "label": ["A", "B", "C", "D", "E"]}
    assert example("arc_challenge", row | {"choices": lettered, "answerKey": "E"}).answer == " e"
    with pytest.raises(DataError, match="label 'answerKey' is '2'; allowed: A, B, C, D, E"):
        example("arc_easy", row | {"choices": lettered})
    with pytest.raises(DataError, match=r"'choices' has 3 texts and the labels \['A'\]"):
        example("arc_easy", row | {"choices": choices | {"label": ["A"]}})
    with pytest.raises(DataError, match="'choices' is None; a list of options is expected"):
        example("arc_easy", row | {"choices": ["ice", "steam"]})


def test_banking77_prompt_is_short_and_names_no_intent():
    made = example("banking77", {"text": " Where is my card? ", "label": 11})
    assert (made.prompt, made.answer) == ("Customer message: Where is my card?\nIntent:", " card arrival")
    assert len(made.choices) == 77
    assert list(made.choices) == sorted(made.choices), "the hub numbers them in alphabetical order"


def test_banking77_prefers_the_name_to_the_number():
    # Sorted by code point, as some copies are, 12 is "card_arrival" and 0 is "Refund_not_showing_up".
    row = {"text": "x", "label": 12}
    assert example("banking77", row).answer == " card delivery estimate"
    assert example("banking77", row | {"label_text": "card_arrival"}).answer == " card arrival"
    refund = {"text": "x", "label": 0, "label_text": "Refund not showing up"}
    assert example("banking77", refund).answer == " refund not showing up"
    reverted = {"text": "x", "label": 53, "label_text": "reverted_card_payment?"}
    assert example("banking77", reverted).answer == example("banking77", {"text": "x", "label": 53}).answer
    with pytest.raises(DataError, match="label 'label_text' is 'parking'; allowed: the names of the 77"):
        example("banking77", row | {"label_text": "parking"})


def test_banking77_names_fit_real_rows():
    folder = SHARED / "banking77"
    if not folder.is_dir():
        pytest.skip("the dataset is not here")
    names = set()
    for split in ("train", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        examples = load_task("banking77", folder, split).examples
        for row, made in zip(rows, examples, strict=True):
            assert made.answer == " " + row["label_text"].lower().removesuffix("?")
            names.add(made.answer)
    assert names == set(examples[0].choices)


def test_banking77_is_measured_without_scoring_77_options():
    assert TASK_METRICS[TASKS.find("banking77").metric] == ("exact_match",)
    assert "choice_likelihood" in TASK_METRICS[TASKS.find("trec").metric]


def test_billsum_asks_after_the_bill():
    assert example("billsum", {"text": " SEC. 1. Pay. ", "summary": "Pays.\n", "title": "T"}) == Example(
        "train[0]", "Bill:\nSEC. 1. Pay.\n\nSummarise this bill.\nSummary:", " Pays."
    )


def test_gsm8k_needs_the_mark_and_a_number():
    row = {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
    assert example("gsm8k", row) == Example(
        "train[0]",
        "Question: 1 + 1?\nWork it out step by step and end with #### and the number.\nAnswer:",
        " It is <<1+1=2>>2.\n#### 2",
    )
    for answer in ("It is 2.", "It is two. #### two"):
        with pytest.raises(DataError, match="allowed: the steps, then '#### ' and the number"):
            example("gsm8k", row | {"answer": answer})


def test_hellaswag_removes_the_marks_of_wikihow():
    row = {
        "activity_label": "Pets",
        "ctx": "[header] How to wash a dog [title] Fill a tub. [step] Use [lukewarm] water.",
        "endings": ["Go.", "[substeps] Wait. Dry it.", "[title] Stop. [step] Rest.", "Run..."],
        "label": "1",
    }
    assert example("hellaswag", row) == Example(
        "train[0]",
        "Pets: How to wash a dog. Fill a tub. Use [lukewarm] water.\nWhich of these goes on with it?\n"
        "Options:\n- Go.\n- Wait. Dry it.\n- Stop. Rest.\n- Run...\nAnswer:",
        " Wait. Dry it.",
        (" Go.", " Wait. Dry it.", " Stop. Rest.", " Run..."),
    )


MEDICAL = {"question": "Q?", "opa": "a", "opb": "b", "opc": "b ", "opd": "B", "cop": 2}


def test_medmcqa_counts_from_zero_and_merges_equal_options():
    assert example("medmcqa", MEDICAL) == Example(
        "train[0]", "Question: Q?\nOptions:\n- a\n- b\n- B\nAnswer:", " b", (" a", " b", " B")
    )
    assert example("medmcqa", MEDICAL | {"cop": 0}).answer == " a"
    with pytest.raises(DataError, match="label 'cop' is 4; allowed: 0 to 3, counted from 0 as on the hub"):
        example("medmcqa", MEDICAL | {"cop": 4})
    assert example("medmcqa", MEDICAL | {"opd": " "}).choices == (" a", " b")
    with pytest.raises(DataError, match="the right option, number 4, is blank"):
        example("medmcqa", MEDICAL | {"opd": " ", "cop": 3})


def test_questions_without_a_choice_are_left_out_and_counted(tmp_path):
    same = MEDICAL | dict.fromkeys(("opa", "opb", "opc", "opd"), "TIBC")
    found = load_task("medmcqa", write(tmp_path / "train.jsonl", [MEDICAL, same, MEDICAL]))
    assert [example.id for example in found.examples] == ["train.jsonl:1", "train.jsonl:3"]
    assert found.notes == ("left out 1 of 3 rows: all their options are equal",)
    with pytest.raises(DataError, match="All 2 rows have a single option"):
        load_task("medmcqa", write(tmp_path / "train.jsonl", [same, same]))


def test_mmlu_prompt():
    row = {"question": "Q?", "subject": "clinical_knowledge", "choices": ["w", "x", "y", "z"], "answer": 3}
    assert example("mmlu_clinical_knowledge", row) == Example(
        "train[0]",
        "Question: Q?\nOptions:\n- w\n- x\n- y\n- z\nAnswer:",
        " z",
        (" w", " x", " y", " z"),
    )


def test_piqa_prompt():
    row = {"goal": "To nap,", "sol1": "lie down.", "sol2": "stand up.", "label": 0}
    assert example("piqa", row) == Example(
        "train[0]",
        "Goal: To nap,\nWhich of these reaches it?\nOptions:\n- lie down.\n- stand up.\nAnswer:",
        " lie down.",
        (" lie down.", " stand up."),
    )


def test_pubmedqa_answers_with_decision_and_conclusion():
    row = {
        "question": "Does it?",
        "context": {"contexts": ["We looked.", "", "We found."], "labels": ["METHODS", "", "RESULTS"]},
        "long_answer": "It may.",
        "final_decision": "maybe",
    }
    assert example("pubmedqa", row) == Example(
        "train[0]",
        "Abstract: We looked. We found.\nQuestion: Does it?\n"
        "Answer yes, no or maybe, then give the conclusion.\nAnswer:",
        " maybe. It may.",
    )
    with pytest.raises(DataError, match="'context' has no list 'contexts'"):
        example("pubmedqa", row | {"context": "We looked."})


def test_scitldr_takes_the_first_summary():
    row = {"source": ["We sort.", " ", "It works. "], "target": ["Sorting.", "We sorted."]}
    assert example("scitldr", row) == Example(
        "train[0]",
        "Abstract: We sort. It works.\nSummarise it in one sentence.\nSummary:",
        " Sorting.",
    )
    with pytest.raises(DataError, match="'source' is 'We sort'; a list of texts is expected"):
        example("scitldr", row | {"source": "We sort"})


def test_sst2_numbers_mean_what_the_hub_says():
    assert example("sst2", {"sentence": "dull ", "label": 0}) == Example(
        "train[0]",
        "What is the sentiment of this sentence: negative, positive?\nSentence: dull\nAnswer:",
        " negative",
        (" negative", " positive"),
    )


def test_winogrande_counts_from_one():
    row = {"sentence": "Ann fed Eve as _ was hungry.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    assert example("winogrande", row) == Example(
        "train[0]",
        "Sentence: Ann fed Eve as _ was hungry.\nWhich of these stands in the blank _?\n"
        "Options:\n- Ann\n- Eve\nAnswer:",
        " Eve",
        (" Ann", " Eve"),
    )
    with pytest.raises(DataError, match="label 'answer' is '0'; allowed: 1 to 2"):
        example("winogrande", row | {"answer": "0"})


def test_metrics_are_those_of_the_paper():
    paper = {name: TASKS.find(name) for name in TASKS.names() if TASKS.find(name).paper}
    similarity = {name for name, task in paper.items() if task.metric == "similarity"}
    assert similarity == {"pubmedqa", "medmcqa", "billsum", "fingpt_sentiment"}
    first = {name for name, task in paper.items() if task.paper.startswith("Tables 1,")}
    assert first == similarity | {"hellaswag", "winogrande", "arc_easy", "piqa"}
    limits = {name: task.train_limit for name, task in paper.items()}
    assert {name for name, limit in limits.items() if limit} == {"medmcqa", "fingpt_sentiment"}
    assert limits["medmcqa"] == limits["fingpt_sentiment"] == 40_000


def test_unknown_task_and_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'trec'"):
        load_task("treck")
    with pytest.raises(DataError, match="no folder") as caught:
        load_task("trec", tmp_path / "none")
    assert "train.jsonl, with the columns text, coarse_label" in caught.value.hint


def test_too_few_rows_to_hold_out(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [dict(row) for row in ROWS["financial_phrasebank"]]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(DataError, match="too few to hold out 1000"):
        load_task("financial_phrasebank")


def test_task_files_are_also_ordinary_data(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS["fingpt_sentiment"])
    assert load_examples(path).format == "alpaca"


def test_rows_of_another_task_are_recognised(tmp_path):
    # MMLU's rows have the columns of GSM8K and two more; those of SST-2 could be PhraseBank's as well.
    path = write(tmp_path / "mmlu.jsonl", ROWS["mmlu_clinical_knowledge"])
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert caught.value.hint == (
        "These are the columns of the task 'mmlu_clinical_knowledge': give data.task instead."
    )
    with pytest.raises(DataError) as caught:
        load_examples(write(tmp_path / "sst2.jsonl", ROWS["sst2"]))
    assert "the task 'financial_phrasebank' or 'sst2'" in caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"metric": "acuracy"}, "Did you mean 'accuracy'"),
        ({"eval_split": "train"}, "names a split twice: train, train"),
        ({"hub_files": {"train": "*.parquet"}}, "but none for test"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        replace(TASKS.find("sst2"), **({"eval_split": "test"} | wrong))
