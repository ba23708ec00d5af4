"""Figures of docs/quality.md (what a smaller model keeps), from the lines of `benchmarks/results/quality`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from quality_cells import (
    BOTH,
    CLASSES,
    EARLY,
    RECOVERED,
    ROW_FAST,
    ROW_IGIA,
    TASKS,
    USUAL,
    WRITING,
    Pair,
    better,
    both,
    cells,
    classified,
    compared,
    dense_of,
    loss,
    measured_tasks,
    pairs,
    recovered_deeper,
    trained,
    twice,
)
from quality_compared import from_longer

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
    "influence": "layer-wise",
    "layer_wise": "layer-wise by position",
}
KINDS = ("influence", "layer_wise", "least_squares", "linear")
RECOVERING = RECOVERED["igia"]
LOSSES = "Loss on validation rows, in nats per answer token."
BEST = "from tuned: layer-wise, recovered unless clearly worse (best, default)"


def _by_task(found: Sequence[Pair], tasks: Sequence[str] = ()) -> list[str]:
    """One entry per task: mean score in per cent and seeds; a dash where nothing is measured."""
    texts = []
    for task in tasks or measured_tasks():
        scores = [100 * entry["test"]["score"] for name, _, _, entry in found if name == task]
        texts.append(f"{statistics.mean(scores):.1f}" + f" ({len(scores)})" if scores else "–")
    return texts


def _line(label: str, found: Sequence[Pair], tasks: Sequence[str] = ()) -> str:
    mean, low, high = loss(found)
    change = f"{100 * mean:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"| {label} | {' | '.join(_by_task(found, tasks))} | {change} |"


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
    first = [
        _line(f"IGIA's or the gate's, by loss on validation rows, {REPAIRS[repair]}{note}", found)
        for repair, note in (("influence", " (default)"), ("layer_wise", ""))
        if (found := compared(repair))
    ]
    lines[3:3] = first
    return "\n".join([*lines, "", _note()])


DEPTHS = (3, 6, 9, 12, 15, 18)
DEPTH_SEED = 1
"""The seed of every task with which all numbers of layers are measured, so that their rows are of the same runs."""
WAYS_DOWN = {
    "IGIA, nothing trained": lambda gone: pairs(f"shrink/igia/{gone}/influence"),
    "IGIA, recovered": recovered_deeper,
    "last layers, from base (fast)": lambda gone: trained(ROW_FAST, gone),
}


def at_depth(way: str, gone: int) -> list[Pair]:
    """The runs of a way without `gone` layers, with the seed that all numbers of layers have."""
    return [pair for pair in WAYS_DOWN[way](gone) if pair[1] == DEPTH_SEED]


def depths() -> str:
    """The table of numbers of layers removed and repaired, not trained and trained, for tasks with classes."""
    dense = [(task, DEPTH_SEED, one, one) for task in CLASSES if (one := dense_of(task, DEPTH_SEED))]
    lines = [
        f"| layers removed of 30 | {' | '.join(TASKS[task] for task in CLASSES)} | against dense [95 %] |",
        "|---" * (len(CLASSES) + 2) + "|",
        f"| dense, tuned | {' | '.join(_by_task(dense, CLASSES))} | |",
    ]
    for way in WAYS_DOWN:
        at = ((gone, at_depth(way, gone)) for gone in DEPTHS)
        lines += [_line(f"{gone}, {way}", found, CLASSES) for gone, found in at if found]
    return "\n".join(lines)


def more_rows() -> str:
    """The table of seed 0 of TREC with the usual number of rows and with three times as many."""
    usual, many = ("trec",), ("trec-4800",)
    ways = {
        "layer-wise by position, nothing trained": lambda tasks: pairs(
            f"shrink/igia/{USUAL}/layer_wise", tasks
        ),
        "from base: IGIA, least squares, tuned": lambda tasks: trained(ROW_IGIA, tasks=tasks),
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
        "tuned, then layer-wise": compared(),
        "from base: last layers (fast)": trained(ROW_FAST),
        "from base: IGIA": trained(ROW_IGIA),
        "from base: IGIA, layer-wise by position": trained("base/igia/layer_wise/labels"),
        "from base: gate": trained("base/gate/least_squares/labels"),
        "from base: IGIA, no repair": trained("base/igia/none/labels"),
        "from base: three merged": trained("base/paper/none/labels"),
        "tuned on 3/5 of the rows, then layer-wise by position": pairs(EARLY),
    }
    losses = {
        way: {(task, seed): entry["validation"]["nll"] for task, seed, _, entry in found}
        for way, found in ways.items()
    }
    lines = [
        f"| {USUAL} of 30 layers removed | " + " | ".join(losses) + " |",
        "|---" * (len(losses) + 1) + "|",
    ]
    for task, seed in losses["from base: IGIA"]:
        here = [found.get((task, seed)) for found in losses.values()]
        shown = " | ".join("–" if loss is None else f"{loss:.3f}" for loss in here)
        lines.append(f"| {TASKS[task]}, seed {seed} | {shown} |")
    return "\n".join([*lines, "", LOSSES])


ROWS = {
    "tuned/igia/least_squares/distil": "from tuned: IGIA, least squares, recovered with the teacher",
    "tuned/igia/influence/distil": "from tuned: IGIA, layer-wise, recovered with the teacher, at the rate best on seed 0",
    "tuned/gate/influence-512/distil": "from tuned: gate, layer-wise on 512 rows, recovered with the teacher",
    "tuned/igia/layer_wise/distil": "from tuned: IGIA, layer-wise by position, recovered with the teacher",
    "tuned/igia/least_squares/labels": "from tuned: IGIA, least squares, recovered on labels",
    "tuned/igia/none/labels": "from tuned: IGIA, no repair, recovered on labels",
    "base/igia/least_squares/distil": "from base: IGIA, least squares, tuned with the teacher",
    "base/igia/layer_wise/labels": "from base: IGIA, layer-wise by position, tuned",
    "base/igia/least_squares/labels": "from base: IGIA, least squares, tuned",
    "base/gate/least_squares/labels": "from base: gate, least squares, tuned",
    "base/last/least_squares/labels": "from base: last layers, least squares, tuned (fast)",
    "base/angular/least_squares/labels": "from base: neighbours by angular distance, least squares, tuned",
    "base/igia/none/labels": "from base: IGIA, no repair, tuned",
    "base/paper/none/labels": "from base: GradPruner as in the paper (3 merged), tuned",
    "base/shortgpt/none/labels": "from base: ShortGPT, no repair, tuned",
    "base/last/none/labels": "from base: last layers, no repair, tuned",
    "base/random/none/labels": "from base: random layers, no repair, tuned",
}


def tuned() -> str:
    """The table of pruned models that are trained on the rows, and for as many steps, as the dense model."""
    lines = [*_head(f"{USUAL} of 30 layers removed, then trained"), _dense_line()]
    longer = [pair for task in measured_tasks() for pair in twice(task)]
    lines += [_line("dense, tuned for twice as long", longer)] if longer else []
    lines += [_line(BEST, found)] if (found := better()) else []
    lines += [_line(label, found) for row, label in ROWS.items() if (found := trained(row))]
    if found := pairs(EARLY):
        lines.append(_line("dense tuned on three fifths of the rows, then layer-wise by position", found))
    return "\n".join(lines)


def base_rates() -> str:
    """The table of losses from base by learning rate, seed 0: the last layers and IGIA's choice."""
    rates = (1e-4, 2e-4, 4e-4)
    rows = {"last layers": ROW_FAST, "IGIA": ROW_IGIA}
    lines = [f"| seed 0 | removed | {' | '.join(f'rate {rate:g}' for rate in rates)} |", "|---" * 5 + "|"]
    for task in measured_tasks():
        for name, row in rows.items():
            found = [cells().get(f"{task}/0/train/{row}/{USUAL}/{rate:g}") for rate in rates]
            if any(found):
                shown = " | ".join(f"{one['validation']['nll']:.3f}" if one else "–" for one in found)
                lines.append(f"| {TASKS[task]} | {name} | {shown} |")
    return "\n".join([*lines, "", LOSSES])


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
        f"vary/igia/{USUAL}/influence-rows-600": "600 rows of the task, layer-wise",
        f"shrink/igia/{USUAL}/influence": "1,200 rows of the task, layer-wise",
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


def weights() -> str:
    """The table of validation losses by what the repair refits, its rows, and the weight of answers."""
    ways = {
        f"shrink/igia/{USUAL}/least_squares": "least squares, 384 rows",
        f"vary/igia/{USUAL}/rows-1200": "least squares",
        f"vary/igia/{USUAL}/rows-3200": "least squares, 3,200 rows",
        f"shrink/igia/{USUAL}/layer_wise": "layer-wise, answers 0.8",
    }
    varied_runs = {
        (entry["task"], entry["seed"])
        for entry in cells().values()
        if entry["cell"] == f"vary/igia/{USUAL}/rows-1200" or "-answers-" in entry["cell"]
    }
    runs = [(task, seed) for task in TASKS for seed in range(3) if (task, seed) in varied_runs]
    dense = {run: found for run in runs if (found := dense_of(*run)) is not None}
    names = " | ".join(f"{TASKS[task]}, seed {seed}" for task, seed in dense)
    lines = [f"| {USUAL} of 30 layers removed | {names} |", "|---" * (len(dense) + 1) + "|"]
    for cell, label in {**ways, "": "dense"}.items():
        shown = [dense[run] if not cell else cells().get(f"{run[0]}/{run[1]}/{cell}") for run in dense]
        if any(shown):
            lines.append(f"| {label} | {' | '.join(_nll(found) for found in shown)} |")
    return "\n".join([*lines, "", LOSSES])


def rates() -> str:
    """The table of recoveries by learning rate, relative to the dense model's rate."""
    shares = {32: "1/32", 16: "1/16", 8: "1/8", 4: "1/4", 2: "1/2", 1: "1"}
    lines = [
        "| run | dense | repaired | " + " | ".join(f"rate x {name}" for name in shares.values()) + " |",
        "|---" * (len(shares) + 3) + "|",
    ]
    for task, seed in ((task, seed) for task in measured_tasks() for seed in range(3)):
        dense = dense_of(task, seed)
        assert dense is not None
        rate = dense["training"]["rate"]
        row = f"{task}/{seed}/train/{RECOVERING}/{USUAL}"
        found = [cells().get(f"{row}/{rate / divisor:g}") for divisor in shares]
        if any(found):
            shown = [dense, cells().get(f"{task}/{seed}/shrink/igia/{USUAL}/influence"), *found]
            lines.append(f"| {TASKS[task]}, seed {seed} | {' | '.join(map(both, shown))} |")
    return "\n".join([*lines, "", BOTH])


def _nll(entry: dict[str, Any] | None) -> str:
    return "–" if entry is None else f"{entry['validation']['nll']:.3f}"


def headline() -> str:
    """A few sentences for the README: the default choice of layers, nothing trained, recovered, and fast."""
    shrunk_, best = classified(compared()), classified(better())
    written = pairs(f"shrink/gate/{USUAL}/influence", (WRITING,))
    recovered = trained("tuned/gate/influence-512/distil", tasks=(WRITING,))
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
        f"changes by {said(shrunk_)}, relative to the dense model. Trained once more with the tuned model as teacher, as "
        f"`run` does by default: {said(best)}. Its last layers removed and repaired before it is tuned, which "
        f"takes less time than tuning it whole: {said(classified(trained(ROW_FAST)))}. A task that writes sentences, {TASKS[WRITING]}, "
        f"loses more: {said(written)} without the gate's layers and nothing trained, {said(recovered)} trained "
        f"once more, from a repair on 512 rows.\n\n{_longer_first()}"
    )


def _longer_first() -> str:
    """One sentence on a task for which one pass over the rows is too short."""
    runs = from_longer()
    (task,) = {TASKS[task] for task, _, _ in runs}
    scores = [
        statistics.mean(100 * one["test"]["score"] for one in way)
        for way in zip(*(c for *_, c in runs), strict=True)
    ]
    dense, more, recovered = scores[0], scores[1], scores[-2]
    return (
        f"Tune well first: a second pass over the rows takes the dense model of {task} from {dense:.1f} to {more:.1f} %, and the "
        f"smaller model made from there, trained once more, to {recovered:.1f} % ({len(runs)} runs)."
    )


def _note() -> str:
    machines = {entry["provenance"]["machine"]["cpu"] for entry in cells().values()}
    commits = {entry["provenance"]["commit"] for entry in cells().values()}
    return (
        "Test score in %, mean over seeds, with the number of seeds in brackets. Intervals: bootstrap over runs and "
        f"rows. {len(cells())} cells of {len(commits)} commits, each named in its line; {', '.join(sorted(machines))}."
    )


BLOCKS = {
    "quality_shrunk": shrunk,
    "quality_depths": depths,
    "quality_more_rows": more_rows,
    "quality_decided": decided,
    "quality_tuned": tuned,
    "quality_varied": varied,
    "quality_headline": headline,
    "quality_weights": weights,
    "quality_rates": rates,
    "quality_base_rates": base_rates,
}
