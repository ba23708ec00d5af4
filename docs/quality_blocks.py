"""Figures of docs/quality.md (what a smaller model keeps), from the lines of `benchmarks/results/quality`."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "quality"
TASKS = {"trec": "TREC", "banking77": "Banking77", "sst2": "SST-2", "scitldr": "SciTLDR (ROUGE-L)"}
WRITING = "scitldr"
Pair = tuple[str, int, dict[str, Any], dict[str, Any]]
"""Task, seed, cell of the tuned dense model, cell."""
CHOICES = {
    "igia": "IGIA (GradPruner)",
    "gate": "gate, second order",
    "gate_pairwise": "gate, pairwise",
    "task_loss": "task loss after repair, greedy",
    "auto": "auto: twelve plans tried, repaired",
    "shortgpt": "ShortGPT",
    "last": "last layers",
    "random": "random layers",
    "paper": "GradPruner, merged",
}
REPAIRS = {
    "none": "no repair",
    "linear": "linear",
    "least_squares": "least squares",
    "layer_wise": "layer-wise",
}
USUAL = 12
"""Layers removed where a table does not say otherwise."""
KINDS = ("layer_wise", "least_squares", "linear")
RECOVERED = ("tuned/igia/least_squares/distil", "tuned/igia/layer_wise/distil")
"""Recovered models for the row "best". A later entry replaces an earlier one: it starts from the default repair."""
BEST = "from tuned: layer-wise, recovered where validation rows agree (best)"
ROW_FAST = "base/igia/least_squares/labels"
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
    return _bootstrap(tuple((dense["key"], entry["key"]) for _, _, dense, entry in found))


@cache
def _bootstrap(keys: tuple[tuple[str, str], ...]) -> tuple[float, float, float]:
    """`loss` of the cells with these keys; cached, because several tables show the same cells."""
    runs = [[rows_of(cells()[key]) for key in pair] for pair in keys]
    change = statistics.mean(sum(small) / max(sum(whole), 1e-9) - 1 for whole, small in runs)
    draw = np.random.RandomState()
    words = random.Random(0).getstate()[1]  # the same draws as the random module, many at a time
    draw.set_state(("MT19937", words[:-1], words[-1]))
    rows = np.concatenate([np.array(pair) for pair in runs], axis=1)
    counts = np.array([len(whole) for whole, _ in runs])
    starts = counts.cumsum() - counts
    means = []
    for _ in range(RESAMPLES):
        chosen = (draw.random_sample(len(runs)) * len(runs)).astype(int)
        many = counts[chosen]
        at = (draw.random_sample(many.sum()) * many.repeat(many)).astype(int) + starts[chosen].repeat(many)
        whole, small = np.add.reduceat(rows[:, at], many.cumsum() - many, axis=1)
        means.append(float((small / np.maximum(whole, 1e-9) - 1).mean()))
    means.sort()
    return change, means[int(0.025 * len(means))], means[int(0.975 * len(means))]


def _by_task(found: Sequence[Pair]) -> list[str]:
    """One entry per task: mean score in per cent and seeds; a dash where nothing is measured."""
    texts = []
    for task in measured_tasks():
        scores = [100 * entry["test"]["score"] for name, _, _, entry in found if name == task]
        texts.append(f"{statistics.mean(scores):.1f}" + f" ({len(scores)})" if scores else "–")
    return texts


def measured_tasks() -> list[str]:
    """Tasks whose dense model is measured, in the order of TASKS."""
    return [task for task in TASKS if dense_of(task, 0) is not None]


def classified(
    found: Sequence[Pair],
) -> list[Pair]:
    """Leaves out the task that writes sentences: it loses so much that a mean over all tasks hides both."""
    return [pair for pair in found if pair[0] != WRITING]


def _line(label: str, found: Sequence[Pair]) -> str:
    mean, low, high = loss(classified(found) or found)
    change = f"{100 * mean:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"| {label} | {' | '.join(_by_task(found))} | {change} |"


def _head(first: str) -> list[str]:
    names = [TASKS[task] for task in measured_tasks()]
    columns = f"| {first} | {' | '.join(names)} | first three against dense [95 %] |"
    return [columns, "|---" * (len(names) + 2) + "|"]


def _dense_line() -> str:
    found = [
        (task, seed, dense, dense)
        for task in measured_tasks()
        for seed in range(3)
        if (dense := dense_of(task, seed)) is not None
    ]
    return f"| dense, tuned | {' | '.join(_by_task(found))} | |"


def shrunk() -> str:
    """The table of tuned models with layers removed and nothing trained."""
    lines = [*_head(f"{USUAL} of 30 layers removed"), _dense_line()]
    for repair in (*KINDS, "none"):
        for choice, label in CHOICES.items():
            found = pairs(f"shrink/{choice}/{USUAL}/{repair}")
            if found:
                lines.append(_line(f"{label}, {REPAIRS[repair]}", found))
    return "\n".join([*lines, "", _note()])


def better() -> list[Pair]:
    """For every run the repaired or the recovered model, whichever has the lower loss on validation rows."""
    repaired = {pair[:2]: pair for pair in pairs(f"shrink/igia/{USUAL}/layer_wise")}
    recovered = {pair[:2]: pair for row in RECOVERED for pair in trained(row)}
    both = [(repaired[run], recovered[run]) for run in repaired if run in recovered]
    return [min(pair, key=lambda found: found[3]["validation"]["nll"]) for pair in both]


DEPTHS = (3, 6, 9, 12, 15, 18)
WAYS_DOWN = {
    "layer-wise, nothing trained": lambda gone: pairs(f"shrink/igia/{gone}/layer_wise"),
    "least squares, nothing trained": lambda gone: pairs(f"shrink/igia/{gone}/least_squares"),
    "from base, tuned (fast)": lambda gone: trained(ROW_FAST, gone),
    "recovered with the teacher": lambda gone: trained("tuned/igia/least_squares/distil", gone),
}


def depths() -> str:
    """The table of numbers of layers removed, chosen by IGIA and repaired, not trained and trained."""
    lines = [*_head("layers removed, chosen by IGIA"), _dense_line()]
    for way, found_at in WAYS_DOWN.items():
        lines += [_line(f"{gone} of 30, {way}", found) for gone in DEPTHS if (found := found_at(gone))]
    return "\n".join(lines)


def more_rows() -> str:
    """The table of seed 0 of TREC with the usual number of rows and with three times as many."""
    usual, many = ("trec",), ("trec-4800",)
    ways = {
        "layer-wise, nothing trained": lambda tasks: pairs(f"shrink/igia/{USUAL}/layer_wise", tasks),
        "from base: least squares, tuned (fast)": lambda tasks: trained(ROW_FAST, tasks=tasks),
    }
    dense = [dense_of(task, 0) for (task,) in (usual, many)]
    lines = [
        f"| TREC, seed 0, {USUAL} of 30 layers removed | 1,600 rows | 4,800 rows |",
        "|---|---|---|",
        "| dense, tuned | " + " | ".join(f"{100 * one['test']['score']:.1f}" for one in dense if one) + " |",
    ]
    for label, found_at in ways.items():
        shown = []
        for tasks in (usual, many):
            found = [pair for pair in found_at(tasks) if pair[1] == 0]
            mean, low, high = (100 * part for part in loss(found))
            score = 100 * found[0][3]["test"]["score"]
            shown.append(f"{score:.1f}, {mean:+.1f} % [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def decided() -> str:
    """The table of losses that decided what `run` does by default."""
    ways = {
        "best": better(),
        "tuned, then layer-wise": pairs(f"shrink/igia/{USUAL}/layer_wise"),
        "from base: least squares (fast)": trained(ROW_FAST),
        "from base: layer-wise": trained("base/igia/layer_wise/labels"),
        "from base: gate, least squares": trained("base/gate/least_squares/labels"),
        "from base: no repair": trained("base/igia/none/labels"),
        "from base: three merged": trained("base/paper/none/labels"),
        "tuned on 3/5 of the rows, then layer-wise": pairs(EARLY),
    }
    losses = {
        way: {(task, seed): entry["validation"]["nll"] for task, seed, _, entry in found}
        for way, found in ways.items()
    }
    lines = [
        f"| {USUAL} of 30 layers removed | " + " | ".join(losses) + " |",
        "|---" * (len(losses) + 1) + "|",
    ]
    for task, seed in losses["from base: least squares (fast)"]:
        here = [found.get((task, seed)) for found in losses.values()]
        shown = " | ".join("–" if loss is None else f"{loss:.3f}" for loss in here)
        lines.append(f"| {TASKS[task]}, seed {seed} | {shown} |")
    return "\n".join([*lines, "", "Loss on validation rows, in nats per answer token."])


ROWS = {
    "tuned/igia/least_squares/distil": "from tuned: IGIA, least squares, recovered with the teacher",
    "tuned/igia/layer_wise/distil": "from tuned: IGIA, layer-wise, recovered with the teacher",
    "tuned/igia/least_squares/labels": "from tuned: IGIA, least squares, recovered on labels",
    "tuned/igia/none/labels": "from tuned: IGIA, no repair, recovered on labels",
    "base/igia/least_squares/distil": "from base: IGIA, least squares, tuned with the teacher",
    "base/igia/layer_wise/labels": "from base: IGIA, layer-wise, tuned",
    "base/igia/least_squares/labels": "from base: IGIA, least squares, tuned (fast)",
    "base/gate/least_squares/labels": "from base: gate, least squares, tuned",
    "base/last/least_squares/labels": "from base: last layers, least squares, tuned",
    "base/igia/none/labels": "from base: IGIA, no repair, tuned",
    "base/paper/none/labels": "from base: GradPruner as in the paper (3 merged), tuned",
    "base/shortgpt/none/labels": "from base: ShortGPT, no repair, tuned",
    "base/last/none/labels": "from base: last layers, no repair, tuned",
    "base/random/none/labels": "from base: random layers, no repair, tuned",
}


def tuned() -> str:
    """The table of pruned models that are trained on the rows, and for as many steps, as the dense model."""
    lines = [*_head(f"{USUAL} of 30 layers removed, then trained"), _dense_line()]
    twice = [pair for task in measured_tasks() for pair in _twice(task)]
    lines += [_line("dense, tuned for twice as long", twice)] if twice else []
    lines += [_line(BEST, found)] if (found := better()) else []
    lines += [_line(label, found) for row, label in ROWS.items() if (found := trained(row))]
    if found := pairs(EARLY):
        lines.append(_line("dense tuned on three fifths of the rows, then layer-wise", found))
    return "\n".join(lines)


def _twice(task: str) -> list[Pair]:
    """`pairs` of the dense model tuned for twice the epochs, at the dense model's rate."""
    names = {entry["cell"] for entry in cells().values() if entry["cell"].startswith("dense-twice/")}
    return [pair for name in sorted(names) for pair in pairs(name) if pair[0] == task]


TRAINED_ROWS = (1600, 3200, 10_000, 30_000, 100_000)


def taken() -> str:
    """The table of what `fast` costs relative to tuning the dense model, by number of training rows.

    Uses the fastest cells, because other work ran on the machine. Recording and repair see a fixed number of
    rows, so they weigh more when training is short.
    """
    entries = [entry for entry in cells().values() if entry["task"] == "sst2"]

    def least(values: Iterable[float]) -> float:
        return min(value for value in values if value > 0)

    whole = least(e["training"]["seconds"] for e in entries if e["cell"].startswith("dense/0")) / 1600
    small = least(e["training"]["seconds"] for e in entries if f"/labels/{USUAL}/" in e["cell"]) / 1600
    recorded = least(
        e["evidence"]["seconds"] for e in entries if e["cell"].startswith("train/base/igia") and e["evidence"]
    )
    fitted = least(e.get("repair_seconds", 0.0) for e in entries)
    lines = [
        "| training rows | recording | repair | tuning the pruned model | fast, in all |",
        "|---|---|---|---|---|",
    ]
    for rows in TRAINED_ROWS:
        dense = whole * rows
        parts = [recorded, fitted, small * rows]
        shown = " | ".join(f"{part / dense:.2f}" for part in [*parts, sum(parts)])
        lines.append(f"| {rows:,} | {shown} |")
    return "\n".join(
        [*lines, "", "Relative to tuning the dense model on the same number of rows; SST-2, one core."]
    )


def varied() -> str:
    """The table of repairs by the rows they are fitted on; IGIA chose the layers of tuned models."""
    usual = "384 rows of the task"
    names = {
        f"shrink/igia/{USUAL}/least_squares": usual,
        f"vary/igia/{USUAL}/rows-64": "64 rows of the task",
        f"vary/igia/{USUAL}/rows-128": "128 rows of the task",
        f"vary/igia/{USUAL}/rows-1200": "1,200 rows of the task",
        f"vary/igia/{USUAL}/rows-3200": "3,200 rows of the task",
        f"vary/igia/{USUAL}/rows-of-sst2": "384 rows of SST-2",
        f"vary/igia/{USUAL}/rows-of-banking77": "384 rows of Banking77",
    }
    lines = [*_head("repair fitted on")]
    lines += [_line(label, found) for name, label in names.items() if (found := pairs(name))]
    adapted = []
    for task in measured_tasks():
        for seed in range(3):
            dense = cells().get(f"{task}/{seed}/dense/lora")
            for how in ("least_squares", "none"):
                small = cells().get(f"{task}/{seed}/shrink/lora/igia/{USUAL}/{how}")
                if dense and small:
                    adapted.append(
                        f"{TASKS[task]}, seed {seed}: dense {100 * dense['test']['score']:.1f} %, {USUAL} layers "
                        f"removed, {REPAIRS[how]}: "
                        f"{100 * small['test']['score']:.1f} %"
                    )
    note = f"\n\nTuned with LoRA, adapters merged. {'; '.join(adapted)}." if adapted else ""
    return "\n".join(lines) + note


def headline() -> str:
    """Two sentences for the README."""
    shrunk_, best = (classified(found) for found in (pairs(f"shrink/igia/{USUAL}/layer_wise"), better()))
    writing = [pair for pair in better() if pair[0] == WRITING]
    *most, last = (TASKS[task] for task in dict.fromkeys(task for task, *_ in shrunk_))
    names = f"{', '.join(most)} and {last}" if most else last

    def said(found: Sequence[Pair]) -> str:
        mean, low, high = (100 * part for part in loss(found))
        return (
            f"{mean:+.1f} % (95 % interval {low:+.1f} to {high:+.1f}, {len(found)} "
            f"run{'s'[: len(found) != 1]})"
        )

    return (
        f"SmolLM2-135M-Instruct tuned on {names}, {USUAL} of 30 layers removed, repaired on 1,200 rows: the test score "
        f"changes by {said(shrunk_)}, relative to the dense model. Trained once more with the tuned model as teacher, "
        f"where validation rows agree: {said(best)}. Writing summaries ({TASKS[WRITING]}) is another matter: "
        f"{said(writing)} after all of that."
    )


def _note() -> str:
    machines = {entry["provenance"]["machine"]["cpu"] for entry in cells().values()}
    commits = {str(entry["provenance"]["commit"])[:7] for entry in cells().values()}
    return (
        "Test score in %, mean over seeds, with the number of seeds in brackets. Intervals: bootstrap over runs and "
        f"rows. {len(cells())} cells so far, commits {', '.join(sorted(commits))}; {', '.join(sorted(machines))}."
    )


BLOCKS = {
    "quality_shrunk": shrunk,
    "quality_depths": depths,
    "quality_more_rows": more_rows,
    "quality_decided": decided,
    "quality_taken": taken,
    "quality_tuned": tuned,
    "quality_varied": varied,
    "quality_headline": headline,
}
