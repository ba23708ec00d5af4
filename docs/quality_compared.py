"""The quality study: ways of making a pruned model beside each other, run by run."""

from __future__ import annotations

from typing import Any

from quality_cells import (
    BOTH,
    RECOVER_RATE,
    RECOVERED,
    TASKS,
    USUAL,
    WRITTEN,
    both,
    cells,
    dense_of,
    loss,
    twice,
)


def _runs(one: str, other: str, heads: tuple[str, str]) -> str:
    """Returns the table of all runs in which both rows are measured at one rate and number of layers."""
    lines = [f"| run | {heads[0]} | {heads[1]} |", "|---|---|---|"]
    for key, entry in sorted(cells().items()):
        if f"/train/{one}/" not in key:
            continue
        beside = cells().get(key.replace(f"/train/{one}/", f"/train/{other}/"))
        if beside is None:
            continue
        rate = float(key.rpartition("/")[2])
        task = (TASKS | WRITTEN)[entry["task"]]
        lines.append(f"| {task}, seed {entry['seed']}, rate {rate:g} | {both(entry)} | {both(beside)} |")
    return "\n".join([*lines, "", BOTH])


def fast_rows() -> str:
    """Effort `fast` with a repair on the usual number of rows, and on three times as many."""
    row = "base/last/{}/labels"
    heads = ("repaired on 384 rows", "on 1,200 rows")
    return _runs(row.format("least_squares"), row.format("least_squares-1200"), heads)


def prompts() -> str:
    """Recovery with the teacher on answers alone, and on prompts too."""
    repaired = {
        "igia/layer_wise": "IGIA's layers, by position",
        "gate/layer_wise": "the gate's layers, by position",
        "gate/influence-512": "the gate's layers, by influence on 512 rows",
    }
    tables = []
    for row, label in repaired.items():
        heads = (f"{label}, teacher on answers", "on prompts too")
        tables.append(_runs(f"tuned/{row}/distil", f"tuned/{row}/distil-prompts-1", heads))
    return "\n\n".join(tables)


def brief() -> str:
    """Recoveries at the default rate on a part of the rows."""
    parts = {"-x0.125": "an eighth", "-x0.25": "a quarter", "-x0.5": "half", "": "all rows"}
    lines = ["| run | dense | repaired | " + " | ".join(parts.values()) + " |", "|---" * 7 + "|"]
    for task in TASKS:
        for seed in range(3):
            dense = dense_of(task, seed)
            rate = RECOVER_RATE * dense["training"]["rate"] if dense else 0.0
            row = f"{task}/{seed}/train/{RECOVERED['igia']}"
            found = [cells().get(f"{row}{part}/{USUAL}/{rate:g}") for part in parts]
            if any(found[:-1]):
                shown = [dense, cells().get(f"{task}/{seed}/shrink/igia/{USUAL}/influence"), *found]
                lines.append(f"| {TASKS[task]}, seed {seed} | {' | '.join(map(both, shown))} |")
    return "\n".join([*lines, "", BOTH])


def longer() -> str:
    """Dense models tuned for twice as long and pruned from there: repaired, and recovered at two rates."""
    heads = [
        "dense",
        "dense, tuned for twice as long",
        "IGIA's layers removed from that, repaired",
        "the gate's layers",
    ]
    heads += [f"the better of both, recovered at rate x {part}" for part in ("1/2", "1/4")]
    lines = [f"| run | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    runs = from_longer()
    lines += [f"| {TASKS[t]}, seed {seed} | {' | '.join(map(both, found))} |" for t, seed, found in runs]
    against = [[(task, seed, found[1], one) for one in found] for task, seed, found in runs]
    changes = [loss(found) for found in zip(*against, strict=True)]
    shown = [f"{100 * mean:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]" for mean, low, high in changes]
    shown[1] = ""
    return "\n".join([*lines, f"| score against twice as long [95 %] | {' | '.join(shown)} |", "", BOTH])


def from_longer() -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Task, seed and cells of every run that is measured from a dense model tuned for twice as long.

    Cells: that of the dense model; of the one tuned for longer; repaired, IGIA's and the gate's layers; and
    whichever of these has the lower validation loss, recovered at two rates.
    """
    found = []
    for task in TASKS:
        for _, seed, dense, more in twice(task):
            if pruned := _from_there(task, seed, dense):
                found.append((task, seed, [dense, more, *pruned]))
    return found


def _from_there(task: str, seed: int, dense: dict[str, Any]) -> list[dict[str, Any]]:
    """What was pruned from the dense model tuned for twice as long; [] unless everything is measured."""
    repaired = {c: cells().get(f"{task}/{seed}/shrink/twice/{c}/{USUAL}/influence") for c in ("igia", "gate")}
    losses = {choice: cell["validation"]["nll"] for choice, cell in repaired.items() if cell}
    if len(losses) < len(repaired):
        return []
    row = f"{task}/{seed}/train/twice/{min(losses, key=lambda c: losses[c])}/influence/distil/{USUAL}"
    recovered = [cells().get(f"{row}/{part * dense['training']['rate']:g}") for part in (RECOVER_RATE, 0.25)]
    return [cell for cell in (*repaired.values(), *recovered) if cell] if all(recovered) else []


def weighed() -> str:
    """Layer-wise repairs that weigh tokens by position, and by influence: the same tuned models and layers."""
    ways = {
        f"{name}, {how}": f"shrink/{choice}/{USUAL}/{repair}"
        for choice, name in (("igia", "IGIA"), ("gate", "gate"))
        for repair, how in (("layer_wise", "by position"), ("influence", "by influence"))
    }
    lines = [f"| run | dense | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    for task, label in (TASKS | WRITTEN).items():
        for seed in range(3):
            found = [cells().get(f"{task}/{seed}/{cell}") for cell in ways.values()]
            if any(found[1::2]):
                shown = " | ".join(map(both, [dense_of(task, seed), *found]))
                lines.append(f"| {label}, seed {seed} | {shown} |")
    return "\n".join([*lines, "", BOTH])


BLOCKS = {
    "quality_brief": brief,
    "quality_fast_rows": fast_rows,
    "quality_longer": longer,
    "quality_prompts": prompts,
    "quality_weighed": weighed,
}
