"""The tasks of the quality study, with short prompts, and the split of their rows.

Validation rows come from the training split and are the same for all seeds; all choices (rates, layers,
repair) are made on them. Test rows are used only when a model is final.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradpruner.data.examples import Example

NUM_VALIDATION = 500
_SPLIT_SEED = 20261128


@dataclass(frozen=True)
class StudyTask:
    """One task.

    Attributes:
        train: File of the training split, relative to the data folder.
        test: File of the test split.
        row: Returns the prompt and the answer of a row.
        train_rows: Number of training rows, sampled by seed.
        test_rows: Number of test rows, always the same ones.
        epochs: Passes over the training rows, in steps of 16 rows.
        max_length: Most tokens of a sample; longer prompts lose their beginning.
        metric: "exact_match"; "rouge_l" for tasks whose answers are sentences, "final_number" for sums.
    """

    train: str
    test: str
    row: Callable[[dict[str, Any]], tuple[str, str]]
    train_rows: int = 1600
    test_rows: int = 1000
    epochs: float = 1.0
    max_length: int = 128
    metric: str = "exact_match"


_TREC = ("abbreviation", "entity", "description", "person", "place", "number")
_SST2 = ("negative", "positive")


def _scitldr(row: dict[str, Any]) -> tuple[str, str]:
    targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
    return "Abstract: " + " ".join(row["source"]) + "\nSummary:", " " + targets[0]


TASKS = {
    "trec": StudyTask(
        "trec/train.jsonl",
        "trec/test.jsonl",
        lambda r: (f"Question: {r['text']}\nAnswer type:", f" {_TREC[r['coarse_label']]}"),
        test_rows=500,
    ),
    "banking77": StudyTask(
        "banking77/train.jsonl",
        "banking77/test.jsonl",
        lambda r: (f"Customer message: {r['text'].strip()}\nIntent:", f" {r['label_text']}"),
        train_rows=3200,
    ),
    "sst2": StudyTask(
        "sst2/train.jsonl",
        "sst2/validation.jsonl",
        lambda r: (f"Review: {r['sentence'].strip()}\nSentiment:", f" {_SST2[r['label']]}"),
    ),
    "scitldr": StudyTask(
        "scitldr/train.jsonl",
        "scitldr/test.jsonl",
        _scitldr,
        train_rows=800,
        test_rows=200,
        max_length=160,
        metric="rouge_l",
    ),
    "gsm8k": StudyTask(
        "gsm8k/train.jsonl",
        "gsm8k/test.jsonl",
        lambda r: (f"Question: {r['question']}\nAnswer:", f" {r['answer']}"),
        train_rows=800,
        test_rows=200,
        max_length=512,
        metric="final_number",
    ),
}

TASKS["trec-4800"] = replace(TASKS["trec"], train_rows=4800)
"""Nearly all training rows, to see whether `effort: fast` loses as much when training is longer."""


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # `splitlines` would also split at U+2028 inside a string
        return [json.loads(line) for line in file]


def splits(data: Path, name: str, seed: int) -> dict[str, tuple[Example, ...]]:
    """Returns the training rows of a seed, and the validation and test rows of a task.

    Args:
        data: Folder with one folder per task.
        name: A name in `TASKS`.
        seed: Seed of the sample of training rows.
    """
    task = TASKS[name]
    pool, test = _read(data / task.train), _read(data / task.test)
    random.Random(_SPLIT_SEED).shuffle(pool)
    random.Random(_SPLIT_SEED).shuffle(test)
    validation, rest = pool[:NUM_VALIDATION], pool[NUM_VALIDATION:]
    random.Random(seed).shuffle(rest)
    chosen = {"train": rest[: task.train_rows], "validation": validation, "test": test[: task.test_rows]}
    return {
        split: tuple(Example(f"{split}[{i}]", *task.row(row)) for i, row in enumerate(rows))
        for split, rows in chosen.items()
    }
