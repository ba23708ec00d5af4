"""A model's outputs, one per example: kept on disk during an evaluation and compared afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, IntegrityError
from gradpruner.common.files import is_held, open_private, read_plain
from gradpruner.common.json_files import parse_json, typed
from gradpruner.evaluation.metrics import paired_difference, paper_score
from gradpruner.evaluation.questions import Questions

_FIELDS = {
    "final_number": "number_correct",
    "exact_match": "correct",
    "choice_accuracy": "choice_correct",
    "choice_accuracy_normalised": "normalised_correct",
    "bert_score": "bert_score",
    "rouge_l": "rouge_l",
}
"""Metric -> field of `Output` that holds it, the most important metric first."""


@dataclass(frozen=True)
class Output:
    """A model's output for one example; a field is None if its metric was not computed.

    Attributes:
        prompt_tail: The end of the prompt as the model saw it.
        answer: The right answer, as a model would write it (`Questions.reference`).
        generated: The greedy answer, up to the end-of-text token.
        finished: Whether the model ended the answer within the token budget.
        correct: Whether `generated` matches `answer`, see `metrics.exact_match`.
        rouge_l: ROUGE-L F1 of `generated` against `answer`, 0 to 1.
        bert_score: BERTScore F1 of `generated` against `answer`.
        number_correct: Whether both end with the same number, see `metrics.same_number`.
        choice_scores: Log-likelihood of each option in nats, with the end token unless `score_ends` is off.
        chosen: The option with the highest score; the first one if several tie.
        choice_correct: Whether `chosen` matches `answer`.
        normalised_correct: Whether the option with the highest score per character matches `answer`.
    """

    id: str
    prompt_tail: str
    answer: str
    generated: str | None = None
    finished: bool | None = None
    correct: bool | None = None
    rouge_l: float | None = None
    bert_score: float | None = None
    number_correct: bool | None = None
    choices: tuple[str, ...] | None = None
    choice_scores: tuple[float, ...] | None = None
    chosen: str | None = None
    choice_correct: bool | None = None
    normalised_correct: bool | None = None


class Journal:
    """The outputs so far, in memory and, if a path is given, on disk as one line each.

    Args:
        path: File to write to. Outputs of an interrupted evaluation in it are reused. None writes no file.
        questions: The questions of the evaluation.
        rank: Rank of this process; each process that shares the questions writes its own file.
    """

    def __init__(self, path: str | Path | None, questions: Questions, rank: int = 0) -> None:
        self._path = None if path is None else journals(Path(path), rank + 1)[rank]
        self._file: Any = None
        self._outputs = [
            Output(e.id, questions.prompt_tail(i), questions.reference(i))
            for i, e in enumerate(questions.examples)
        ]
        for journal in [] if path is None else journals(Path(path)):
            self._recall(journal)

    def _recall(self, path: Path) -> None:
        """Reads the complete lines of an interrupted evaluation; lines that do not match are ignored."""
        open_private(path).close()  # refuses links and anything but a plain file
        asked = dict(enumerate(self._outputs))
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                index, row = parse_json(line)
                known, found = asked[index], typed(row, Output, "")
            except (ValueError, TypeError, KeyError, IntegrityError):
                continue  # a line cut off, or from other examples
            if (found.id, found.prompt_tail, found.answer) == (known.id, known.prompt_tail, known.answer):
                self._outputs[index] = found

    def __enter__(self) -> Journal:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_private(self._path)
            if is_held(self._file.fileno()):
                self._file.close()
                raise ConfigError(
                    f"{self._path} is being written by another process.",
                    hint="Wait for that process to finish, or choose another --out.",
                )
            self._file.write("\n")  # ends the last line in case it was cut off
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __getitem__(self, index: int) -> Output:
        return self._outputs[index]

    def note(self, index: int, **found: Any) -> None:
        """Sets fields of the output of an example and appends the output to the file."""
        self._outputs[index] = replace(self._outputs[index], **found)
        if self._file is not None:
            self._file.write(f"[{index}, {output_line(self._outputs[index]).rstrip()}]\n")

    def flush(self) -> None:
        """Hands everything noted so far to the operating system."""
        if self._file is not None:
            self._file.flush()


def journals(path: Path, count: int | None = None) -> list[Path]:
    """Returns the journal paths of `count` processes; with None all journals that exist."""
    if count is not None:
        return [path, *(path.with_name(f"{path.name}-{rank}") for rank in range(1, count))]
    return sorted(one for one in (path, *path.parent.glob(f"{path.name}-*")) if one.exists())


def values_of(outputs: Sequence[Output]) -> dict[str, list[float]]:
    """Returns one number per example for each metric that all outputs have, the most important first."""
    found: dict[str, list[Any]] = {
        "similarity": [
            None if o.bert_score is None or o.rouge_l is None else paper_score(o.bert_score, o.rouge_l)
            for o in outputs
        ],
        **{name: [getattr(o, field) for o in outputs] for name, field in _FIELDS.items()},
    }
    return {name: [float(value) for value in values] for name, values in found.items() if None not in values}


def paired_intervals(
    dense: Sequence[Output], other: Sequence[Output], seed: int = 0
) -> dict[str, dict[str, float | int]]:
    """Returns the paired difference of two models in each metric that both have, with its 95 % interval.

    Args:
        dense: Outputs of the dense model.
        other: Outputs of the other model on the same examples, in the same order.
        seed: Seed of the bootstrap.

    Returns:
        Metric -> mean of `other - dense` as value, low, high and n; {} if the examples differ.
    """
    if [one.id for one in dense] != [one.id for one in other]:
        return {}
    first, second = values_of(dense), values_of(other)
    return {
        name: asdict(paired_difference(second[name], first[name], seed=seed))
        for name in first
        if name in second
    }


def read_examples(path: Path) -> list[Output]:
    """Reads a file that `Evaluation.write_examples` wrote.

    Raises:
        IntegrityError: If the file is missing, or a line is not an output; names the line.
    """
    found = []
    try:
        lines = read_plain(path).decode().split("\n")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, start=1):
        fault = f"{path}, line {number}: not an evaluated example"
        try:
            found += [typed(parse_json(line), Output, fault)] if line else []
        except ValueError as error:
            raise IntegrityError(f"{fault}: {error}.") from error
    return found


def output_line(output: Output) -> str:
    """Returns an output as one line of JSON, without the fields that were not measured."""
    row = {name: value for name, value in asdict(output).items() if value is not None}
    return json.dumps(row, ensure_ascii=False) + "\n"
