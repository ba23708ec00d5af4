"""Two rows compared example by example, over all seeds.

Seeds repeat the same question: with the same examples in every seed, the difference of an example is its mean
over the seeds, and the interval is over examples. Where seeds drew other rows, the examples of all seeds are
pooled. Either way the interval tells the uncertainty from the choice of evaluation examples, given these
trainings; how much one training differs from the next is what the range over the seeds tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.evaluation.metrics import bootstrap_interval
from gradpruner.evaluation.outputs import read_examples, values_of


@dataclass(frozen=True)
class Answers:
    """What one row of one run got right.

    Attributes:
        ids: Of the examples, in order.
        values: Metric -> one number per example.
    """

    ids: tuple[str, ...]
    values: Mapping[str, Sequence[float]]


def read_answers(path: Path) -> Answers | None:
    """Reads a run's answers; None if they are not there."""
    if not path.is_file():
        return None
    outputs = read_examples(path)
    return Answers(tuple(output.id for output in outputs), values_of(outputs))


def paired_over_seeds(
    rows: Mapping[int, Answers], others: Mapping[int, Answers], metric: str
) -> dict[str, Any] | None:
    """Mean difference of a metric with its 95 % interval, of the answers by seed of a row and another one.

    Returns:
        "mean" of row minus other, "low", "high", "n" examples, "seeds" compared, "wins": seeds in which the
        row's own mean is higher; None if no seed has both.
    """
    differences: list[list[float]] = []
    ids: list[tuple[str, ...]] = []
    for seed, row in rows.items():
        other = others.get(seed)
        if other is None or other.ids != row.ids or metric not in row.values or metric not in other.values:
            continue
        pairs = zip(row.values[metric], other.values[metric], strict=True)
        differences.append([mine - theirs for mine, theirs in pairs])
        ids.append(row.ids)
    if not differences or not differences[0]:
        return None
    if len(set(ids)) == 1:
        sample = [sum(column) / len(column) for column in zip(*differences, strict=True)]
    else:
        sample = [value for column in differences for value in column]
    found = bootstrap_interval(sample)
    return {
        "mean": found.value,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "seeds": len(differences),
        "wins": sum(sum(column) > 0 for column in differences),
    }
