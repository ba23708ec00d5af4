import csv
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.examples import Example, Message, overlap
from gradpruner.data.folders import has_split
from gradpruner.data.layouts import Layout
from gradpruner.data.loading import load_examples
from gradpruner.data.shapes import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, FORMATS

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "7"},
    ]
}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(source: object, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        load_examples(source, **options)
    assert caught.value.exit_code == 3
    assert caught.value.hint, "every data error says what to do"
    return caught.value


# Shapes


def test_prompt_completion_is_used_unchanged(tmp_path):
    row = {"prompt": " Say hi:\n", "completion": "  hi \n"}
    found = load_examples(jsonl(tmp_path / "train.jsonl", row))
    assert found.examples == (Example("train.jsonl:1", " Say hi:\n", "  hi \n"),)
    assert found.format == "prompt_completion"
    assert found.notes == ()
    assert len(found) == 1


def test_choices_are_kept_in_order(tmp_path):
    row = {**PAIR, "choices": [" 5", " 4"]}
    assert load_examples(jsonl(tmp_path / "a.jsonl", row)).examples[0].choices == (" 5", " 4")


def test_alpaca_uses_the_standard_prompts(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "2 {and} 2", "output": "4"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet.", "output": "Hello", "note": 1},
    )
    found = load_examples(path)
    assert found.format == "alpaca"
    assert found.examples[0].prompt == ALPACA_WITH_INPUT.format(instruction="Add.", input="2 {and} 2")
    assert "### Input:\n2 {and} 2\n\n### Response:\n" in found.examples[0].prompt
    assert found.examples[1].prompt == ALPACA_WITHOUT_INPUT.format(instruction="Greet.")
    assert found.examples[2].prompt == found.examples[1].prompt
    assert found.notes == ("columns not used: note (1 rows)",)


def test_messages_keep_every_turn(tmp_path):
    (example,) = load_examples(jsonl(tmp_path / "a.jsonl", CHAT)).examples
    assert example.prompt == ""
    assert example.answer == "7"
    assert [m.role for m in example.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert example.messages[-1] == Message("assistant", "7")


def test_sharegpt_roles_are_translated(tmp_path):
    row = {
        "conversations": [{"from": "Human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "system": "Be kind.",
    }
    found = load_examples(jsonl(tmp_path / "a.jsonl", row))
    assert found.format == "sharegpt"
    assert found.examples[0].messages == (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
    )


def test_conversational_prompt_completion_becomes_messages(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}],
    }
    (example,) = load_examples(jsonl(tmp_path / "a.jsonl", row)).examples
    assert example.messages == (Message("user", "Hi"), Message("assistant", "Hello"))
    path = jsonl(tmp_path / "b.jsonl", {**row, "choices": ["Hello", "Bye"]})
    assert "'choices' is allowed with a text prompt" in str(refusal(path))


def test_shape_is_detected_from_several_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x"}, PAIR)
    error = refusal(path)
    assert "1 of 2 rows cannot be used: a.jsonl:1: field 'completion' is missing" in str(error)


def test_format_can_be_forced_and_misspelled(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {**PAIR, **CHAT})
    assert load_examples(path).format == "messages"
    assert load_examples(path, format="prompt_completion").examples[0].answer == " 4"
    with pytest.raises(ConfigError, match="Did you mean 'alpaca'") as caught:
        load_examples(path, format="alpacca")
    assert all(name in str(caught.value) for name in FORMATS)
    error = refusal(path, format="alpaca")
    assert "No row can be read as alpaca, which has the columns instruction, output, [input]" in str(error)


# Files


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: {"data": r}, lambda r: {"train": r}])
def test_json_documents(tmp_path, wrap):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(wrap([PAIR, PAIR]), indent=1))
    found = load_examples(path)
    assert [example.id for example in found.examples] == ["set.json[0]", "set.json[1]"]


def test_json_split_key_comes_before_data(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"data": [PAIR], "test": [PAIR, PAIR]}))
    assert len(load_examples(path, split="test")) == 2
    assert len(load_examples(path)) == 1


def test_json_lines_named_json(tmp_path):
    assert len(load_examples(jsonl(tmp_path / "set.json", PAIR, PAIR))) == 2


def test_csv_with_quotes_line_breaks_and_long_fields(tmp_path):
    path = tmp_path / "set.csv"
    long = "word " * 40_000
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "choices"])
        writer.writerow(['Say "a, b"\nnow:', " yes", '[" yes", " no"]'])
        writer.writerow([long, " no", ""])
    limit = csv.field_size_limit()
    found = load_examples(path).examples
    assert csv.field_size_limit() == limit
    assert found[0] == Example("set.csv:2", 'Say "a, b"\nnow:', " yes", choices=(" yes", " no"))
    assert found[1] == Example("set.csv:4", long, " no")


def test_tsv(tmp_path):
    path = tmp_path / "set.tsv"
    path.write_text("prompt\tcompletion\na, b\tc\n")
    assert load_examples(path).examples[0].prompt == "a, b"


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "set.parquet"
    pq.write_table(pa.Table.from_pylist([CHAT, CHAT]), path)
    found = load_examples(path)
    assert found.examples[1].id == "set.parquet[1]"
    assert found.examples[1].answer == "7"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_folder_takes_the_file_of_the_split(tmp_path):
    jsonl(tmp_path / "train.jsonl", PAIR)
    jsonl(tmp_path / "test.jsonl", PAIR, PAIR)
    assert len(load_examples(tmp_path)) == 1
    assert len(load_examples(tmp_path, split="test")) == 2
    error = refusal(tmp_path, split="validation")
    assert "Tried: validation.jsonl" in str(error)
    assert "Data files there: test.jsonl, train.jsonl" in str(error)
    (tmp_path / "train.csv").write_text("prompt,completion\na,b\n")
    assert "several files for split 'train': train.jsonl, train.csv" in str(refusal(tmp_path))


def test_byte_order_mark_blank_lines_crlf_and_unusual_separators(tmp_path):
    path = tmp_path / "sæt.jsonl"
    line = json.dumps({"prompt": "a\u2028b", "completion": "ø"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{line}\r\n\r\n{line}".encode())
    found = load_examples(path)
    assert [example.id for example in found.examples] == ["sæt.jsonl:2", "sæt.jsonl:4"]
    assert found.examples[0].prompt == "a\u2028b"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_any_text_survives_json_lines(tmp_path_factory, pairs):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    found = load_examples(jsonl(path, *rows))
    assert [(e.prompt, e.answer) for e in found.examples] == pairs


# Sampling and overlap


def test_sampling_is_seeded_and_keeps_the_order(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({**PAIR, "prompt": f"{i:02d}"} for i in range(50)))
    first = load_examples(f"{path}#7", seed=1)
    assert len(first) == 7
    assert first.examples == load_examples(path, limit=7, seed=1).examples
    assert first.examples != load_examples(path, limit=7, seed=2).examples
    prompts = [example.prompt for example in first.examples]
    assert prompts == sorted(prompts)
    assert "sampled 7 of 50 rows with seed 1" in first.notes
    assert len(load_examples(f"{path}#7", limit=3)) == 3
    everything = load_examples(path, limit=99)
    assert len(everything) == 50
    assert "asked for 99 rows, there are 50: all are used" in everything.notes
    with pytest.raises(ConfigError, match="at least 1"):
        load_examples(f"{path}#0")


def test_a_file_with_a_hash_in_its_name_is_read(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIR).rename(tmp_path / "b#2")
    assert "cannot tell the file type" in str(refusal(path))
    path = path.rename(tmp_path / "b#2.jsonl")
    assert len(load_examples(f"{path}#1")) == 1


def test_overlap_counts_evaluation_prompts_seen_in_training():
    chat = (Message("user", "Hi"), Message("assistant", "Hello"))
    other = (Message("user", "Hi"), Message("assistant", "Good day"))
    train = [Example("t:1", "a", "x"), Example("t:2", "", "Hello", messages=chat)]
    evaluation = [
        Example("e:1", "a", "another answer"),
        Example("e:2", "a ", "x"),
        Example("e:3", "", "Good day", messages=other),
    ]
    assert overlap(train, evaluation) == 2
    assert overlap([], evaluation) == 0


# Errors


def test_missing_path_names_what_was_tried(tmp_path):
    error = refusal(tmp_path / "none.jsonl")
    assert f"file or folder {tmp_path / 'none.jsonl'}" in str(error)
    assert "No data at" in str(error)


def test_hub_id_out_of_reach_names_both_places(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_args, **_options):
        raise ConnectionError("Couldn't reach 'org/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = str(refusal("org/nothing:main", split="test"))
    assert f"file or folder {Path('org/nothing:main').absolute()}" in message
    assert "hub dataset org/nothing, configuration main, split test (offline" in message
    assert "Couldn't reach" in message
    assert "Unset HF_HUB_OFFLINE" in message


def test_hub_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load(hub_id, config, **options):
        asked.update(options, hub_id=hub_id, config=config)
        return datasets.Dataset.from_list([PAIR, {**PAIR, "prompt": "other"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_examples("org/sums:small#1", split="validation")
    assert (asked["hub_id"], asked["config"], asked["split"]) == ("org/sums", "small", "validation")
    assert found.examples[0].id.startswith("org/sums:small/validation[")
    assert len(found) == 1
    assert found.sha256 == load_examples("org/sums:small", split="validation").sha256


def test_quotes_that_would_join_two_rows_of_a_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\nfine\tpos\n"hello there\tpos\nand bye"\tneg\n')
    assert "a.tsv:3: a field goes on over a tab and the next line" in str(refusal(path))
    path.write_text('text\tlabel\n"def f():\n\treturn 1"\tpos\n"hello\nthere"\tneg\n')
    assert [one.answer for one in load_examples(path).examples] == [" pos", " neg"]


def test_a_single_conversation_in_a_json_file_is_a_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(CHAT))
    assert len(load_examples(path)) == 1


def test_scores_of_an_evaluation_are_not_its_rows(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        jsonl(tmp_path / name, PAIR)
    (tmp_path / "scores").mkdir()
    scores = tmp_path / "scores" / "evaluation.json"
    scores.write_text('{"metrics": {}, "provenance": {}}')
    assert load_examples(tmp_path, split="eval").source == str(tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").unlink()
    assert not has_split(tmp_path, "eval")
    scores.write_text(json.dumps([PAIR]))  # rows, then
    assert load_examples(tmp_path, split="eval").source == str(scores)


def test_hub_splits_may_have_the_same_other_names_as_files(monkeypatch):
    datasets = pytest.importorskip("datasets")
    there = {"train": PAIR, "validate": {**PAIR, "prompt": "other"}}

    def load(hub_id, config, *, split, **options):
        if split not in there:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(there)}.')
        return datasets.Dataset.from_list([there[split]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for asked in ("eval", "validation"):
        found = load_examples("org/sums", split=asked)
        assert [(one.id, one.prompt) for one in found.examples] == [("org/sums/validate[0]", "other")]
        assert found.source == f"org/sums (asked for {asked}, took validate)"
    assert load_examples("org/sums", split="train").source == "org/sums (train)"
    # The refusal is about the split that was asked for, and says which there are.
    assert "split test" in str(error := refusal("org/sums", split="test")) and "validate" in str(error)
    del there["validate"]
    assert 'Unknown split "eval"' in str(refusal("org/sums", split="eval"))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_empty_file(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    error = str(refusal(path))
    assert str(path) in error
    assert "Write" in error


def test_header_without_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n")
    assert "has no rows" in str(refusal(path))


def test_malformed_line_names_file_line_and_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + '\n\n{"prompt" "x"}\n')
    assert f"{path}:3:11: malformed JSON" in str(refusal(path))


def test_malformed_json_document_names_line_and_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"prompt": "x" "y"}\n]')
    assert f"{path}:2:17: malformed JSON" in str(refusal(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "expected an object, found a list"),
        ("3", "expected an object, found a number"),
        ('{"a": 1, "a": 2}', "field 'a' appears twice"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "a number too long"),
    ],
)
def test_lines_that_are_not_rows(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + line)
    error = str(refusal(path))
    assert f"{path}:2: " in error
    assert words in error


def test_json_without_a_list_of_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"rows": [PAIR], "version": 1}))
    assert "no list of rows under 'train' or 'data'. Keys: rows, version" in str(refusal(path))
    path.write_text(json.dumps([PAIR, 3]))
    assert f"{path}[1]: expected an object, found a number" in str(refusal(path))
    path.write_text('"text"')
    assert "expected a list of objects, found text" in str(refusal(path))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8_names_the_byte(tmp_path, mark):
    path = tmp_path / "a.jsonl"
    good = mark + json.dumps(PAIR).encode() + b"\n"
    path.write_bytes(good + '{"prompt": "Käse", "completion": "x"}'.encode("latin-1"))
    error = str(refusal(path))
    assert f"{path}:2: not UTF-8: byte 0xe4 at byte offset {len(good) + 13}." in error
    assert "iconv" in error


def test_unrecognised_columns_list_the_four_shapes(tmp_path):
    error = str(refusal(jsonl(tmp_path / "a.jsonl", {"question": "x", "answer": "y"})))
    assert "columns not recognised: question, answer" in error
    for columns in (
        "messages",
        "conversations, [system]",
        "prompt, completion, [choices]",
        "instruction, output, [input], [choices]",
    ):
        assert columns in error


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"question": "x", "reply": "y"}, "{prompt: question, completion: reply}"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "{prompt: prompt, completion: chosen}"),
        ({"chosen": CHAT["messages"], "rejected": CHAT["messages"]}, "{messages: chosen}"),
        ({"prompt": "x", "chosen": CHAT["messages"], "rejected": []}, "{messages: chosen}"),
        (
            {"prompt": CHAT["messages"][:2], "chosen": CHAT["messages"][2:], "rejected": []},
            "{prompt: prompt, completion: chosen}",
        ),
        ({"chosen": "Human: x Assistant: y", "rejected": "z"}, "split 'chosen' into two columns"),
        ({"dialog": CHAT["messages"], "id": 3}, "{messages: dialog}"),
        ({"text": "x y"}, "one column, 'text': split it into prompt"),
    ],
)
def test_what_to_do_about_columns_that_are_not_recognised(tmp_path, row, advice):
    path = jsonl(tmp_path / "a.jsonl", row)
    hint = refusal(path).hint
    assert advice in hint
    if set(row) >= {"chosen", "rejected"} and "columns=" in hint:  # what the advice says is read
        columns = dict(part.split(": ") for part in advice.strip("{}").split(", "))
        assert load_examples(path, layout=Layout(columns)).examples[0].answer in ("y", "7")


def test_a_table_without_a_header_line(tmp_path):
    (tmp_path / "a.csv").write_text("What is the sum of two and two ?,four\nAnd of one and one ?,two\n")
    assert "no header line?" in refusal(tmp_path / "a.csv").hint


def test_columns_of_a_named_task_are_recognised(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "Who ?", "coarse_label": 3})
    assert "the task 'trec'" in refusal(path).hint


def test_bad_rows_are_counted_named_and_can_be_dropped(tmp_path):
    bad = [{"prompt": "x", "completion": value} for value in (None, "", "  ", 4)]
    path = jsonl(tmp_path / "a.jsonl", PAIR, *bad, PAIR)
    error = refusal(path)
    assert "4 of 6 rows cannot be used" in str(error)
    assert "a.jsonl:2: field 'completion' is null" in str(error)
    assert "a.jsonl:3: field 'completion' is empty" in str(error)
    assert "a.jsonl:4" in str(error)
    assert "a.jsonl:5" not in str(error)
    assert "and 1 more" in str(error)
    assert "--skip-bad" in error.hint
    found = load_examples(path, skip_bad=True)
    assert (len(found), found.num_dropped) == (2, 4)
    assert f"{path}: dropped 4 of 6 rows as unusable" in found.notes


@pytest.mark.parametrize(
    ("roles", "advice"),
    [
        (("user", "assistant", "user"), "Remove the turns after the last answer"),
        (("assistant", "user", "assistant"), "Remove what comes before the first user turn"),
        (("user", "bing"), "Rename the roles: user or human asks"),
    ],
)
def test_faults_that_all_rows_share_say_what_to_do(tmp_path, roles, advice):
    bad = turns(*((role, "x") for role in roles))
    assert refusal(jsonl(tmp_path / "a.jsonl", bad, bad)).hint.startswith(advice)
    hint = refusal(jsonl(tmp_path / "a.jsonl", bad, CHAT)).hint
    assert hint.startswith(advice) and hint.endswith("drop these rows with --skip-bad.")


def test_a_file_with_rows_of_two_layouts_is_to_be_split(tmp_path):
    hint = refusal(jsonl(tmp_path / "a.jsonl", PAIR, CHAT, PAIR)).hint
    assert "2 rows have the columns prompt, completion" in hint and "one file per layout" in hint
    assert "--skip-bad" not in hint


def test_dropping_every_row_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x", "completion": None})
    assert "1 of 1 rows cannot be used" in str(refusal(path, skip_bad=True))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (4, "field 'completion' is a number (4), not text"),
        (True, "field 'completion' is true/false (true), not text"),
        (["a"], "field 'completion' is a list"),
        ({"a": 1}, "field 'completion' is an object"),
        ("\ud800", "half a surrogate pair"),
    ],
)
def test_mixed_types_are_not_converted(tmp_path, value, words):
    path = jsonl(tmp_path / "a.jsonl", PAIR, {"prompt": "x", "completion": value})
    assert words in str(refusal(path))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ([" 3", " 5"], "the answer ' 4' is not one of the choices"),
        ([" 4", " 4"], "contains a choice twice"),
        ([" 4", 5], "not text"),
        ("4|5", "not a list"),
        ("[4", "not a JSON list"),
    ],
)
def test_bad_choices(tmp_path, choices, words):
    path = jsonl(tmp_path / "a.jsonl", PAIR, {**PAIR, "choices": choices})
    assert words in str(refusal(path))


def turns(*pairs: tuple[object, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (turns(("user", "Hi")), "ends with a user turn"),
        (turns(("user", "a"), ("assistant", "b"), ("user", "c")), "ends with a user turn"),
        (turns(("user", "Hi"), ("robot", "x")), "unknown role 'robot' (known: system, user"),
        (turns(("user", "Hi"), (3, "x")), "unknown role 3"),
        (turns(("user", "Hi"), ("assistant", None)), "turn 2 (assistant): field 'content' is null"),
        (turns(("user", "Hi"), ("assistant", "")), "turn 2 (assistant): field 'content' is empty"),
        (turns(("user", [{"type": "image"}]), ("assistant", "x")), "images are not supported"),
        (turns(("assistant", "x")), "does not start with a user turn"),
        (turns(("user", "a"), ("system", "b"), ("assistant", "c")), "a system turn comes after"),
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": None}, "field 'messages' is null"),
        ({"messages": "Hi"}, "field 'messages' is text, not a list"),
        ({"messages": ["Hi"]}, "turn 1 is text, not an object"),
        ({"messages": [{"text": "Hi"}]}, "turn 1 has no 'role' (or 'from'); found: text"),
    ],
)
def test_bad_conversations(tmp_path, row, words):
    error = str(refusal(jsonl(tmp_path / "a.jsonl", CHAT, row)))
    assert "a.jsonl:2: " in error
    assert words in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,completion\na,b\nc\n", ":3: 1 fields, but the header has 2 (prompt, completion)"),
        ("prompt,completion\na,b,c\n", ":2: 3 fields, but the header has 2"),
        ('prompt,completion\n"a\nb",c\nd\n', ":4: 1 fields"),
        ('prompt,completion\na,"b\n', "malformed CSV"),
        ("prompt,prompt\na,b\n", "column 'prompt' appears twice"),
        ("prompt,\na,b\n", "a column has no name"),
        ("prompt;completion\na;b\n", "not separated by commas"),
    ],
)
def test_bad_csv(tmp_path, content, words):
    path = tmp_path / "a.csv"
    path.write_text(content)
    error = str(refusal(path))
    assert str(path) in error
    assert words in error


def test_bad_parquet_and_unknown_type(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    assert f"{path}: not a readable parquet file" in str(refusal(path))
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"x")
    assert "cannot tell the file type from '.gz'" in str(refusal(path))
