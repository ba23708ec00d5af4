"""The quality study: ways of making a pruned model beside each other, run by run."""

from __future__ import annotations

from quality_cells import BOTH, RECOVER_RATE, RECOVERED, TASKS, USUAL, WRITTEN, both, cells, dense_of


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
    """Models pruned after the dense model was tuned for twice as long: the gate's layers, repaired, recovered."""
    lines = [
        "| run | dense | dense, tuned for twice as long | pruned from that, repaired | recovered |",
        "|---" * 5 + "|",
    ]
    for key in sorted(cells()):
        if "/shrink/twice/" not in key:
            continue
        task, seed = key.split("/")[:2]
        dense = dense_of(task, int(seed))
        assert dense is not None
        rate, start = dense["training"]["rate"], f"{task}/{seed}"
        names = (
            f"{start}/dense-twice/{rate:g}",
            key,
            f"{start}/train/twice/gate/influence/distil/{USUAL}/{RECOVER_RATE * rate:g}",
        )
        shown = [dense, *(cells().get(name) for name in names)]
        lines.append(f"| {TASKS[task]}, seed {seed} | {' | '.join(map(both, shown))} |")
    return "\n".join([*lines, "", BOTH])


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
