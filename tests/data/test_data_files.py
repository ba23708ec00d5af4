"""Files as users have them: encodings, compression, shards, layouts of the hub, save_to_disk."""

import bz2
import codecs
import gzip
import json
import lzma
import os

import datasets
import pytest

from gradpruner.common.errors import DataError
from gradpruner.data.loading import load_examples
from gradpruner.data.rows import read_rows

ROWS = [{"prompt": f"Wie heißt {i}? ✓", "completion": f" ä{i}"} for i in range(7)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
TABLE = "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS)


def answers(source, split="train"):
    return [example.answer for example in load_examples(source, split=split).examples]


EXPECTED = [row["completion"] for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode("utf-16"),
        codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
        LINES.encode("utf-16-le"),
        LINES.encode("utf-16-be"),
        LINES.encode("utf-32"),
        LINES.encode("utf-8-sig"),
    ],
)
def test_unicode_in_every_encoding(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert answers(path) == EXPECTED


def test_utf_16_csv_and_a_cut_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(TABLE.encode("utf-16"))
    assert answers(path) == EXPECTED
    path.write_bytes(TABLE.encode("utf-16")[:-1])
    with pytest.raises(DataError, match="UTF-16"):
        load_examples(path)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack.compress(LINES.encode()))
    assert answers(path) == EXPECTED
    path.write_bytes(pack.compress(LINES.encode())[:-9])
    with pytest.raises(DataError, match="cannot be decompressed"):
        load_examples(path)


def test_a_compressed_file_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gradpruner.data.parsing._MOST_UNPACKED", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (1 << 21)))
    with pytest.raises(DataError, match="decompresses to more than"):
        load_examples(path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        load_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("place", ["", "data", "main"])
def test_shards_as_the_hub_lays_them_out(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(ROWS)
    for i in range(3):
        table.shard(3, i).to_parquet(folder / f"train-0000{i}-of-00003.parquet")
    table.select([0]).to_parquet(folder / "test-00000-of-00001.parquet")
    found = load_examples(tmp_path)
    assert [example.answer for example in found.examples] == EXPECTED
    assert len({example.id for example in found.examples}) == 7
    assert answers(tmp_path, "eval") == EXPECTED[:1]
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="2 of 3 shards of split 'train' are in the folder; missing: 00001"):
        load_examples(tmp_path)


def test_other_layouts(tmp_path):
    for i in range(2):
        (tmp_path / f"train_{i}.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert answers(tmp_path) == EXPECTED * 2
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "part.csv").write_text(TABLE)
    assert answers(tmp_path, "eval") == EXPECTED


def test_two_subsets_with_one_split_are_not_mixed(tmp_path):
    for name in ("easy", "hard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(TABLE)
    with pytest.raises(DataError, match="several folders hold split 'train': easy, hard"):
        load_examples(tmp_path)
    assert answers(tmp_path / "hard") == EXPECTED


def test_save_to_disk(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    assert answers(tmp_path / "one") == EXPECTED
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "both")
    assert answers(tmp_path / "both") == EXPECTED
    assert answers(tmp_path / "both", "eval") == EXPECTED[2:3]
    with pytest.raises(DataError, match=r"has no split 'validation'.*there: test, train"):
        load_examples(tmp_path / "both", split="validation")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="load_from_disk cannot read it"):
        load_examples(tmp_path / "one")


def test_names_of_classes_come_with_the_file(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "train.parquet", tmp_path / "saved"):
        assert dict(read_rows(source).label_names) == {"label": ("bad", "good")}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES + '{"prompt": "x", \n["a"]\n'),
        ("a.json", json.dumps([*ROWS, 3, "x"])),
        ("a.csv", TABLE + "one field\nthree,fields,here\n"),
    ],
)
def test_lines_that_cannot_be_read_are_skipped_with_skip_bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=name):
        load_examples(path)
    found = load_examples(path, skip_bad=True)
    assert [example.answer for example in found.examples] == EXPECTED
    assert found.num_dropped == 2
