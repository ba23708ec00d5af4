"""Two rows compared example by example, over all seeds.

If all seeds have the same examples, the difference of an example is its mean over the seeds, and the
interval is over examples. If the seeds drew different examples, those of all seeds are pooled. Either way,
the interval shows the uncertainty from the choice of evaluation examples for these trained models; the range
over the seeds shows how much one training differs from the next.
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
    """The scores of one row of one run, example by example.

    Attributes:
        ids: Ids of the examples, in order.
        values: Metric -> one number per example.
    """

    ids: tuple[str, ...]
    values: Mapping[str, Sequence[float]]


def read_answers(path: Path) -> Answers | None:
    """Reads the answers of a row; None if there are none."""
    if not path.is_file():
        return None
    outputs = read_examples(path)
    return Answers(tuple(output.id for output in outputs), values_of(outputs))


def paired_over_seeds(
    rows: Mapping[int, Answers], others: Mapping[int, Answers], metric: str
) -> dict[str, Any] | None:
    """Returns the mean difference of a metric between two rows, with its 95 % interval.

    Args:
        rows: Seed -> answers of the first row.
        others: Seed -> answers of the second row.
        metric: Which metric.

    Returns:
        "mean" of first minus second, "low", "high", "n" examples, "seeds" compared, "wins": seeds in which
        the first row's mean is higher. None if no seed has both rows.
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
