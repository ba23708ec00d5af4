"""The figures of docs/quality.md: what a smaller model keeps, from the lines of `benchmarks/results/quality`."""

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
CHOICES = {
    "igia": "IGIA (GradPruner)",
    "gate": "gate, second order",
    "gate_pairwise": "gate, pairwise",
    "task_loss": "task loss after repair, greedy",
    "shortgpt": "ShortGPT",
    "last": "last layers",
    "random": "random layers",
    "paper": "GradPruner, merged",
}
REPAIRS = {"none": "none", "linear": "linear", "least_squares": "least squares", "layer_wise": "layer-wise"}
USUAL = 12
KINDS = ("layer_wise", "least_squares", "linear")
RECOVERED = ("tuned/igia/least_squares/distil", "tuned/igia/layer_wise/distil")
"""The later one counts where it is measured: it starts from the repair that is the default."""
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
    """Score of every row."""
    packed = entry[split]["rows"]
    return [float(score) for score in packed]


def pairs(name: str, tasks: Iterable[str] = TASKS) -> list[tuple[str, int, dict[str, Any], dict[str, Any]]]:
    """(task, seed, dense, cell) wherever the cell `name` and its dense model are measured."""
    found = []
    for entry in cells().values():
        dense = dense_of(entry["task"], entry["seed"])
        if entry["cell"] == name and dense is not None and entry["task"] in tasks:
            found.append((entry["task"], entry["seed"], dense, entry))
    return found


def trained(
    row: str, gone: int = USUAL, tasks: Iterable[str] = TASKS
) -> list[tuple[str, int, dict[str, Any], dict[str, Any]]]:
    """The same for a trained row, at the rate with the lowest loss on validation rows of seed 0.

    Other numbers of layers are trained at the rate that is best for the usual one.
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


def loss(found: Sequence[tuple[str, int, dict[str, Any], dict[str, Any]]]) -> tuple[float, float, float]:
    """Mean relative change against dense on test rows, and its 95 % interval.

    A hierarchical bootstrap: runs (task and seed) are drawn, then rows of each, dense and pruned together.
    """
    return _bootstrap(tuple((dense["key"], entry["key"]) for _, _, dense, entry in found))


@cache
def _bootstrap(keys: tuple[tuple[str, str], ...]) -> tuple[float, float, float]:
    """`loss` of the cells with these keys; several tables ask for the same ones."""
    runs = [[rows_of(cells()[key]) for key in pair] for pair in keys]
    change = statistics.mean(sum(small) / max(sum(whole), 1e-9) - 1 for whole, small in runs)
    draw = np.random.RandomState()
    words = random.Random(0).getstate()[1]  # the draws of the standard library, an array at a time
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


def _by_task(found: Sequence[tuple[str, int, dict[str, Any], dict[str, Any]]]) -> list[str]:
    """One entry per task: mean score in per cent and seeds; a dash where nothing is measured."""
    texts = []
    for task in measured_tasks():
        scores = [100 * entry["test"]["score"] for name, _, _, entry in found if name == task]
        texts.append(f"{statistics.mean(scores):.1f}" + f" ({len(scores)})" if scores else "–")
    return texts


def measured_tasks() -> list[str]:
    """Tasks whose dense model is measured, in order."""
    return [task for task in TASKS if dense_of(task, 0) is not None]


def _line(label: str, found: Sequence[tuple[str, int, dict[str, Any], dict[str, Any]]]) -> str:
    mean, low, high = loss(found)
    change = f"{100 * mean:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"| {label} | {' | '.join(_by_task(found))} | {change} |"


def _head(first: str) -> list[str]:
    names = [TASKS[task] for task in measured_tasks()]
    columns = f"| {first} | {' | '.join(names)} | against dense [95 %] |"
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
    """Layers removed from tuned models, nothing trained."""
    lines = [*_head(f"{USUAL} of 30 layers gone"), _dense_line()]
    for repair, how in (*((kind, REPAIRS[kind]) for kind in KINDS), ("none", "no repair")):
        for choice, label in CHOICES.items():
            found = pairs(f"shrink/{choice}/{USUAL}/{repair}")
            if found:
                lines.append(_line(f"{label}, {how}", found))
    return "\n".join([*lines, "", _note()])


def better() -> list[tuple[str, int, dict[str, Any], dict[str, Any]]]:
    """Of the layer-wise repaired model and the recovered one, what has the lower loss on validation rows."""
    as_it_was = {pair[:2]: pair for pair in pairs(f"shrink/igia/{USUAL}/layer_wise")}
    recovered = {pair[:2]: pair for row in RECOVERED for pair in trained(row)}
    both = [(as_it_was[run], recovered[run]) for run in as_it_was if run in recovered]
    return [min(pair, key=lambda found: found[3]["validation"]["nll"]) for pair in both]


DEPTHS = (3, 6, 9, 12, 15, 18)
WAYS_DOWN = {
    "layer-wise, nothing trained": lambda gone: pairs(f"shrink/igia/{gone}/layer_wise"),
    "before cuts, nothing trained": lambda gone: pairs(f"shrink/igia/{gone}/least_squares"),
    "fast": lambda gone: trained(ROW_FAST, gone),
    "best": lambda gone: trained("tuned/igia/least_squares/distil", gone),
}


def depths() -> str:
    """How many layers can go, IGIA's choice, repaired: not trained, and trained."""
    lines = [*_head("layers gone, IGIA, repaired"), _dense_line()]
    for way, found_at in WAYS_DOWN.items():
        lines += [_line(f"{gone} of 30, {way}", found) for gone in DEPTHS if (found := found_at(gone))]
    return "\n".join(lines)


def more_rows() -> str:
    """Seed 0 of TREC with the usual number of rows and with three times as many."""
    usual, many = ("trec",), ("trec-4800",)
    ways = {
        "repaired layer-wise, nothing trained": lambda tasks: pairs(f"shrink/igia/{USUAL}/layer_wise", tasks),
        "from base: repaired, tuned (fast)": lambda tasks: trained(ROW_FAST, tasks=tasks),
    }
    dense = [dense_of(task, 0) for (task,) in (usual, many)]
    lines = [
        f"| TREC, seed 0, {USUAL} of 30 layers gone | 1,600 rows | 4,800 rows |",
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
    """What is decided on validation rows: how a base model is pruned before it is tuned."""
    rows = {
        "layer-wise": "base/igia/layer_wise/labels",
        "repaired": "base/igia/least_squares/labels",
        "dropped": "base/igia/none/labels",
        "three merged": "base/paper/none/labels",
    }
    losses = {
        name: {(task, seed): entry["validation"]["nll"] for task, seed, _, entry in trained(row)}
        for name, row in rows.items()
    }
    losses["3/5 of the rows dense, then layer-wise"] = {
        (task, seed): entry["validation"]["nll"] for task, seed, _, entry in pairs(EARLY)
    }
    lines = [
        "| from base, 12 of 30 layers gone, tuned | " + " | ".join(losses) + " |",
        "|---" * (len(losses) + 1) + "|",
    ]
    for task, seed in losses["repaired"]:
        here = [found.get((task, seed)) for found in losses.values()]
        shown = " | ".join("–" if loss is None else f"{loss:.3f}" for loss in here)
        lines.append(f"| {TASKS[task]}, seed {seed} | {shown} |")
    return "\n".join([*lines, "", "Loss on validation rows, nats per answer token."])


ROWS = {
    "tuned/igia/least_squares/distil": "from tuned: IGIA, repaired, recovered with the teacher",
    "tuned/igia/layer_wise/distil": "from tuned: IGIA, repaired layer-wise, recovered with the teacher",
    "tuned/igia/least_squares/labels": "from tuned: IGIA, repaired, recovered",
    "tuned/igia/none/labels": "from tuned: IGIA, dropped, recovered",
    "base/igia/least_squares/distil": "from base: IGIA, repaired, tuned with the teacher",
    "base/igia/layer_wise/labels": "from base: IGIA, repaired layer-wise, tuned",
    "base/igia/least_squares/labels": "from base: IGIA, repaired, tuned (fast)",
    "base/gate/least_squares/labels": "from base: gate, repaired, tuned",
    "base/last/least_squares/labels": "from base: last layers, repaired, tuned",
    "base/igia/none/labels": "from base: IGIA, dropped, tuned",
    "base/paper/none/labels": "from base: GradPruner as in the paper (3 merged), tuned",
    "base/shortgpt/none/labels": "from base: ShortGPT, dropped, tuned",
    "base/last/none/labels": "from base: last layers, dropped, tuned",
    "base/random/none/labels": "from base: random layers, dropped, tuned",
}


def tuned() -> str:
    """Pruned models that are trained on the rows and for the steps of the dense model."""
    lines = [*_head(f"{USUAL} of 30 layers gone, then trained"), _dense_line()]
    twice = [pair for task in measured_tasks() for pair in _twice(task)]
    lines += [_line("dense, tuned for twice as long", twice)] if twice else []
    lines += (
        [_line("from tuned: repaired layer-wise, recovered where it helps (best)", found)]
        if (found := better())
        else []
    )
    lines += [_line(label, found) for row, label in ROWS.items() if (found := trained(row))]
    if found := pairs(EARLY):
        lines.append(_line("dense tuned on three fifths of the rows, then repaired layer-wise", found))
    return "\n".join(lines)


def _twice(task: str) -> list[tuple[str, int, dict[str, Any], dict[str, Any]]]:
    """The dense model tuned for twice the epochs, at the dense model's rate."""
    names = {entry["cell"] for entry in cells().values() if entry["cell"].startswith("dense-twice/")}
    return [pair for name in sorted(names) for pair in pairs(name) if pair[0] == task]


TRAINED_ROWS = (1600, 3200, 10_000, 30_000, 100_000)


def taken() -> str:
    """What fast takes beside tuning the dense model, by number of training rows.

    Seconds a row of the least disturbed cells, because other work ran on the machine. Recording and repair
    see a fixed number of rows, which is why they weigh much on short trainings.
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
        "| training rows | recording | repair | tuning what is left | fast, in all |",
        "|---|---|---|---|---|",
    ]
    for rows in TRAINED_ROWS:
        dense = whole * rows
        parts = [recorded, fitted, small * rows]
        shown = " | ".join(f"{part / dense:.2f}" for part in [*parts, sum(parts)])
        lines.append(f"| {rows:,} | {shown} |")
    return "\n".join([*lines, "", "In units of tuning the dense model on as many rows; SST-2, one core."])


def varied() -> str:
    """IGIA's layers removed from tuned models and repaired, by what the repair rests on."""
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
                        f"gone, {REPAIRS[how]}{' repair' if how == 'none' else ''}: "
                        f"{100 * small['test']['score']:.1f} %"
                    )
    said = f"\n\nTuned with LoRA, adapters merged. {'; '.join(adapted)}." if adapted else ""
    return "\n".join(lines) + said


def headline() -> str:
    """Two sentences for the README."""
    shrunk_, best = pairs(f"shrink/igia/{USUAL}/layer_wise"), better()
    names = ", ".join(TASKS[task] for task in dict.fromkeys(task for task, *_ in shrunk_))

    def said(found: Sequence[tuple[str, int, dict[str, Any], dict[str, Any]]]) -> str:
        mean, low, high = (100 * part for part in loss(found))
        return (
            f"{mean:+.1f} % of the dense score (95 % interval {low:+.1f} to {high:+.1f}, {len(found)} "
            f"run{'s'[: len(found) != 1]})"
        )

    return (
        f"SmolLM2-135M-Instruct tuned on {names}, {USUAL} of 30 layers removed and repaired on 1,200 rows: "
        f"{said(shrunk_)}. Trained once more with the tuned model as teacher, where validation rows say that it "
        f"helps: {said(best)}."
    )


def _note() -> str:
    machines = {entry["provenance"]["machine"]["cpu"] for entry in cells().values()}
    commits = {str(entry["provenance"]["commit"])[:7] for entry in cells().values()}
    return (
        "Test score in per cent, mean over seeds, their number in brackets. Intervals: bootstrap over runs and "
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
