"""The cells of the quality study: which belong together, and how far they are from the dense model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gradpruner.evaluation.metrics import clearly_worse

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "quality"
TASKS = {"trec": "TREC", "banking77": "Banking77", "sst2": "SST-2", "scitldr": "SciTLDR (ROUGE-L)"}
WRITING = "scitldr"
CLASSES = tuple(task for task in TASKS if task != WRITING)
"""Tasks whose answers are classes."""
WRITTEN = {WRITING: TASKS[WRITING], "gsm8k": "GSM8K (final number)"}
"""Tasks whose answers are sentences. Models of this size solve hardly any of GSM8K, so its loss says more."""
Pair = tuple[str, int, dict[str, Any], dict[str, Any]]
"""Task, seed, cell of the tuned dense model, cell."""
USUAL = 12
"""Layers removed where a table does not say otherwise."""
RECOVERED = {"igia": "tuned/igia/influence/distil", "gate": "tuned/gate/influence/distil"}
"""Recovered models, by choice of layers."""
RECOVER_RATE = 0.5
"""The learning rate of a recovery by default, relative to that of the dense model's tuning."""
ROW_FAST = "base/last/least_squares/labels"
ROW_IGIA = "base/igia/least_squares/labels"
EARLY = f"shrink/early/0.6/igia/{USUAL}/layer_wise"
RESAMPLES = 2000


@cache
def cells() -> dict[str, dict[str, Any]]:
    """Every measured cell, by key."""
    found = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found[entry["key"]] = entry
    return found


@cache
def dense_of(task: str, seed: int) -> dict[str, Any] | None:
    """The tuned dense model, at the rate with the lowest loss on validation rows of seed 0."""
    swept = {
        key.rpartition("/")[2]: entry["validation"]["nll"]
        for key, entry in cells().items()
        if key.startswith(f"{task}/0/dense/") and "untrained" not in key
    }
    if not swept:
        return None
    return cells().get(f"{task}/{seed}/dense/{min(swept, key=lambda rate: swept[rate])}")


def rows_of(entry: dict[str, Any], split: str = "test") -> list[float]:
    """Scores of all rows."""
    return [float(score) for score in entry[split]["rows"]]


def pairs(name: str, tasks: Iterable[str] = TASKS) -> list[Pair]:
    """(task, seed, dense, cell) for every run in which the cell `name` and its dense model are measured."""
    found = []
    for entry in cells().values():
        dense = dense_of(entry["task"], entry["seed"])
        if entry["cell"] == name and dense is not None and entry["task"] in tasks:
            found.append((entry["task"], entry["seed"], dense, entry))
    return found


def trained(row: str, gone: int = USUAL, tasks: Iterable[str] = TASKS) -> list[Pair]:
    """`pairs` of a trained row, at the learning rate with the lowest loss on validation rows of seed 0.

    Other numbers of layers use the rate that is best for the usual number.
    """
    found = []
    prefix = f"train/{row}/{USUAL}/"
    for task in tasks:
        rates = {
            entry["cell"].rpartition("/")[2]: entry["validation"]["nll"]
            for key, entry in cells().items()
            if key.startswith(f"{task}/0/{prefix}")
        }
        if rates:
            best = min(rates, key=lambda rate: rates[rate])
            found += pairs(f"train/{row}/{gone}/{best}", (task,))
    return found


def loss(found: Sequence[Pair]) -> tuple[float, float, float]:
    """Mean relative change against dense on test rows, and its 95 % interval.

    A hierarchical bootstrap draws runs (task and seed), then rows of each run, the same for dense and pruned.
    """
    counted = classified(found) or found
    return _bootstrap(tuple((dense["key"], entry["key"]) for _, _, dense, entry in counted))


@cache
def _bootstrap(keys: tuple[tuple[str, str], ...]) -> tuple[float, float, float]:
    """`loss` of the cells with these keys; cached, because several tables show the same cells."""
    runs = [np.array([rows_of(cells()[key]) for key in pair]) for pair in keys]
    change = statistics.mean(small.sum() / max(whole.sum(), 1e-9) - 1 for whole, small in runs)
    draws = np.random.default_rng(0)
    found = []
    for run in runs:  # rows with the same two scores are counted together: few kinds, few numbers to draw
        (whole, small), counts = np.unique(run, axis=1, return_counts=True)
        drawn = draws.multinomial(counts.sum(), counts / counts.sum(), size=(RESAMPLES, len(runs)))
        found.append(drawn @ small / np.maximum(drawn @ whole, 1e-9) - 1)
    chosen = draws.integers(len(runs), size=(RESAMPLES, len(runs)))
    # Whichever run is drawn at a place, its rows are drawn anew there.
    means = sorted(np.take_along_axis(np.stack(found), chosen[None], axis=0)[0].mean(axis=1))
    low, high = (float(means[int(share * len(means))]) for share in (0.025, 0.975))
    return float(change), low, high


def measured_tasks() -> list[str]:
    """Tasks whose dense model is measured, in the order of TASKS."""
    return [task for task in TASKS if dense_of(task, 0) is not None]


def classified(
    found: Sequence[Pair],
) -> list[Pair]:
    """Leaves out the task that writes sentences: it loses so much that a mean over all tasks hides both."""
    return [pair for pair in found if pair[0] != WRITING]


def better() -> list[Pair]:
    """For every run the recovered model, or the repaired one where training has made it clearly worse.

    That is what `gradpruner run` does by default: it decides on validation rows, and trains at half of the
    dense model's rate. The layers are those of `compared`.
    """
    found = []
    for task, seed, dense, before in compared():
        after = recovered_at(dense, before["cell"].split("/")[1])
        if after is not None:
            worse = clearly_worse(after["before"]["losses"], after["validation"]["losses"])
            found.append((task, seed, dense, before if worse else after))
    return found


def recovered_at(dense: dict[str, Any], choice: str, gone: int = USUAL) -> dict[str, Any] | None:
    """The cell of a model recovered at the default rate, of the run of a dense model."""
    rate = RECOVER_RATE * dense["training"]["rate"]
    name = f"{dense['task']}/{dense['seed']}/train/{RECOVERED[choice]}/{gone}/{rate:g}"
    return cells().get(name)


def recovered_deeper(gone: int) -> list[Pair]:
    """Every run in which the model without `gone` layers of IGIA's choice is recovered at the default rate."""
    found = []
    for task in measured_tasks():
        for seed in range(3):
            dense = dense_of(task, seed)
            if dense is not None and (cell := recovered_at(dense, "igia", gone)) is not None:
                found.append((task, seed, dense, cell))
    return found


def compared(repair: str = "influence") -> list[Pair]:
    """For every run the gate's or IGIA's choice, repaired, whichever has the lower validation loss."""
    found = [{pair[:2]: pair for pair in pairs(f"shrink/{c}/{USUAL}/{repair}")} for c in ("igia", "gate")]
    both = [(found[0][run], found[1][run]) for run in found[0] if run in found[1]]
    return [min(pair, key=lambda one: one[3]["validation"]["nll"]) for pair in both]


def twice(task: str) -> list[Pair]:
    """`pairs` of the dense model tuned for twice the epochs, at the dense model's rate."""
    names = {entry["cell"] for entry in cells().values() if entry["cell"].startswith("dense-twice/")}
    return [pair for name in sorted(names) for pair in pairs(name) if pair[0] == task]


BOTH = "Loss on validation rows, in nats per answer token / test score in %."


def both(entry: dict[str, Any] | None) -> str:
    """Validation loss and test score of a cell, as text; a dash if it is not measured."""
    return f"{entry['validation']['nll']:.3f} / {100 * entry['test']['score']:.1f}" if entry else "–"
