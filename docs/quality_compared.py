"""The quality study: two ways of making a pruned model, run by run, at the same learning rate."""

from __future__ import annotations

from quality_cells import TASKS, USUAL, WRITTEN, both, cells, dense_of


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
    return "\n".join([*lines, "", "Loss on validation rows, in nats per answer token / test score in %."])


def fast_rows() -> str:
    """Effort `fast` with a repair on the usual number of rows, and on three times as many."""
    row = "base/last/{}/labels"
    heads = ("repaired on 384 rows", "on 1,200 rows")
    return _runs(row.format("least_squares"), row.format("least_squares-1200"), heads)


def prompts() -> str:
    """Recovery with the teacher on answers alone, and on prompts too."""
    found = [
        _runs(f"tuned/{choice}/layer_wise/distil", f"tuned/{choice}/layer_wise/distil-prompts-1", heads)
        for choice, heads in (
            ("igia", ("IGIA's layers, teacher on answers", "on prompts too")),
            ("gate", ("the gate's layers, teacher on answers", "on prompts too")),
        )
    ]
    return "\n\n".join(table for table in found if table.count("\n") > 3)


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
    return "\n".join([*lines, "", "Loss on validation rows, in nats per answer token / test score in %."])


BLOCKS = {"quality_fast_rows": fast_rows, "quality_prompts": prompts, "quality_weighed": weighed}
