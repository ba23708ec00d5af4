"""Tables of what `gradpruner cost` measured, and of sizes by shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drawing import RESULTS, machine, read

from gradpruner.common.printing import readable_bytes


def shapes() -> str:
    """The table of sizes and floors of public models, from their configs."""
    head = ("shape", "layers", "B parameters", "B parameters without the head", "GMACs of 128 tokens, no head",
            "floor of a training step", "floor of memory: full / LoRA / inference")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path in sorted((RESULTS / "cost").glob("*_sizes.json")):
        found = {figure["name"]: figure for figure in read(path)["figures"]}

        def change(name: str, unit: float, digits: int, found: dict[str, Any] = found) -> str:
            figure = found[name]
            before, after = (f"{figure[side] / unit:.{digits}f}" for side in ("dense", "pruned"))
            return f"{before} -> {after} ({figure['ratio']:.3f})"

        held = (found[f"{mode}_held_bytes"]["ratio"] for mode in ("full", "lora", "inference"))
        cells = (
            path.stem.removesuffix("_sizes"), change("layers", 1, 0), change("parameters", 1e9, 3),
            change("parameters_without_head", 1e9, 2), change("macs", 1e9, 3),
            f"{found['full_step_seconds']['floor']:.3f}", " / ".join(f"{value:.3f}" for value in held),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost() -> str:
    """The table of what was measured, beside the floors."""
    lines = [
        "| model | figure | dense | pruned | ratio | floor | ratio/floor |",
        "|---|---|---|---|---|---|---|",
    ]
    conditions = []
    for path in sorted((RESULTS / "cost").glob("*.json")):
        if path.stem.endswith("_sizes"):
            continue
        result = read(path)
        name = (
            f"{result['dense']['name']}, {result['dense']['layers']} -> {result['pruned']['layers']} layers"
        )
        for figure in result["figures"]:
            if figure["ratio"] is None or figure["group"] not in MODES:
                continue
            values = [amount(figure[side], figure["unit"]) for side in ("dense", "pruned")]
            floor, above = figure["floor"], figure["above_floor"]
            cells = (
                name, f"{figure['group']}: {figure['label']}", *values, f"{figure['ratio']:.3f}",
                "" if floor is None else f"{floor:.3f}", "" if above is None else f"{above:.3f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        work = result["workload"]
        conditions.append(
            f"{result['dense']['name']}: batches of {work['batch_size']} x {work['tokens']} tokens, "
            f"{work['new_tokens']} new ones, {work['repeats']} repeats, {result['device']}, {machine(result)}."
        )
    return "\n".join([*lines, "", *conditions])


def amount(value: float, unit: str) -> str:
    """A value with a readable unit."""
    if unit == "bytes":
        return readable_bytes(value)
    if unit == "seconds":
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3f} {letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


MODES = ("full fine-tuning", "LoRA fine-tuning", "inference")
"""Groups of the figures that `gradpruner cost` measures."""

BLOCKS: dict[str, Callable[[], str]] = {"cost": cost, "shapes": shapes}
