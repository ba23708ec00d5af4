"""The figures of a cost comparison: what is known of both models, what was measured, and each one's floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradpruner.evaluation.costing.sizing import Sizes, time_floor
from gradpruner.evaluation.costing.turns import Measurement
from gradpruner.evaluation.costing.workload import Workload

# Mode -> what the tables call it.
LABELS = {"full": "full fine-tuning", "lora": "LoRA fine-tuning", "inference": "inference"}
# Mode -> what memory it holds for sure (`per_device.held_bytes`).
_HELD = {
    "full": "weights, gradients, moments",
    "lora": "weights, adapters, moments",
    "inference": "weights and cache",
}
# What is known without running anything: name, label, unit, value of one model for a prompt of some tokens.
_SIZES: tuple[tuple[str, str, str, Callable[[Sizes, int], int | None]], ...] = (
    ("layers", "layers", "", lambda one, _: one.layers),
    ("parameters", "parameters", "", lambda one, _: one.parameters),
    (
        "parameters_without_head",
        "parameters without the head",
        "",
        lambda one, _: one.parameters_without_head,
    ),
    ("decoder_parameters", "parameters of layers", "", lambda one, _: one.decoder_parameters),
    ("kv_bytes_per_token", "KV cache per token", "bytes", lambda one, _: one.kv_bytes_per_token),
    ("disk_bytes", "weights on disk", "bytes", lambda one, _: one.disk_bytes),
    ("macs", "MACs of linears, no head", "MAC", lambda one, tokens: tokens * one.layer_macs),
    ("flops", "FLOPs torch counts, no head", "FLOP", lambda one, _: one.flops),
)
# Mode -> the times that are measured: name, label.
_STEP = (("step_seconds", "one step"),)
_TIMES = {
    "full": _STEP,
    "lora": _STEP,
    "inference": (
        ("prefill_seconds", "prompt"),
        ("decode_seconds", "each new token"),
        ("generation_seconds", "prompt and new tokens"),
    ),
}


@dataclass(frozen=True)
class Figure:
    """One quantity of both models.

    Attributes:
        name: As in JSON: "full_step_seconds".
        group: What it belongs to in tables: "full fine-tuning".
        label: As in tables.
        unit: "seconds", "bytes", "tokens/s", "MAC", "FLOP" or "" for a count.
        dense: Values of the dense model in the order measured; one if it is known without measuring.
        pruned: Those of the pruned one; value i of both was measured side by side.
        floor: What depth alone leaves of it, as a ratio; None where that has no meaning.
    """

    name: str
    group: str
    label: str
    unit: str
    dense: tuple[float, ...]
    pruned: tuple[float, ...]
    floor: float | None = None

    @property
    def medians(self) -> tuple[float | None, float | None]:
        """The median of each; None where there is no value."""
        return _median(self.dense), _median(self.pruned)

    @property
    def ratio(self) -> float | None:
        """Pruned / dense, of the medians."""
        dense, pruned = self.medians
        return pruned / dense if dense and pruned is not None else None

    @property
    def pairs(self) -> list[float]:
        """Pruned / dense of every pair measured side by side, ascending."""
        return sorted(pruned / dense for dense, pruned in zip(self.dense, self.pruned, strict=False) if dense)

    @property
    def above_floor(self) -> float | None:
        """Ratio / floor: 1 where all that depth promises is had."""
        return self.ratio / self.floor if self.ratio is not None and self.floor else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, spread included."""
        pairs = self.pairs if len(self.pairs) > 1 else []
        spread = pairs and {
            "lowest": pairs[0],
            "quartiles": statistics.quantiles(pairs, n=4, method="inclusive"),
            "highest": pairs[-1],
        }
        return {
            "name": self.name,
            "group": self.group,
            "label": self.label,
            "unit": self.unit,
            "dense": self.medians[0],
            "pruned": self.medians[1],
            "ratio": self.ratio,
            "floor": self.floor,
            "above_floor": self.above_floor,
            "pair_ratios": spread or None,
            "dense_values": list(self.dense),
            "pruned_values": list(self.pruned),
        }


def size_figures(sizes: tuple[Sizes, Sizes], tokens: int) -> list[Figure]:
    """What is known without running anything.

    Args:
        sizes: Of the dense and the pruned model.
        tokens: Length of the prompt that operations are counted for.
    """
    figures = []
    for name, label, unit, value in _SIZES:
        dense, pruned = (value(one, tokens) for one in sizes)
        if dense is not None and pruned is not None:
            group = f"{tokens} tokens" if unit in ("MAC", "FLOP") else "model"
            figures.append(Figure(name, group, label, unit, (float(dense),), (float(pruned),)))
    return figures


def measured_figures(
    found: tuple[Measurement, Measurement],
    mode: str,
    sizes: tuple[Sizes, Sizes],
    workload: Workload,
    held: tuple[int, int],
    *,
    with_floors: bool = True,
) -> list[Figure]:
    """What was measured of both models in one mode.

    Args:
        found: What was measured; of a model that failed there are no values.
        mode: One of `workload.MODES`.
        sizes: Of the two models.
        workload: What was run.
        held: Bytes each of the two holds for sure.
        with_floors: The models differ in depth alone.
    """
    floors = time_floors(mode, sizes, workload) if with_floors else {}
    memory_floor = held[1] / held[0] if with_floors else None
    kinds = {one.kind for one in found if one.kind}

    # Name, label, unit, values of both, floor.
    rows: list[tuple[str, str, str, list[tuple[float, ...]], float | None]] = [
        (name, label, "seconds", [one.seconds.get(name, ()) for one in found], floors.get(name))
        for name, label in _TIMES[mode]
    ]
    if mode == "inference":
        rates = [
            tuple(workload.batch_size / t for t in one.seconds.get("decode_seconds", ())) for one in found
        ]
        rows.append(("rate", "new tokens a second", "tokens/s", rates, None))
    rows.append(("held_bytes", _HELD[mode], "bytes", [(float(held[0]),), (float(held[1]),)], None))
    if kinds:
        # Of a whole process, Python and the libraries count too.
        floor = memory_floor if kinds == {"cuda"} else None
        rows.append(("peak_bytes", "peak memory", "bytes", [one.peak_bytes for one in found], floor))
    if kinds == {"rss"}:
        rise = [one.rise_bytes for one in found]
        rows.append(("rise_bytes", "peak above an empty process", "bytes", rise, memory_floor))
    return [
        Figure(f"{mode}_{name}", LABELS[mode], label, unit, dense, pruned, floor)
        for name, label, unit, (dense, pruned), floor in rows
    ]


def time_floors(mode: str, sizes: tuple[Sizes, Sizes], workload: Workload) -> dict[str, float]:
    """What depth alone leaves of each time measured in a mode, as ratios by name."""
    tokens, new = workload.tokens, workload.new_tokens
    if mode != "inference":
        return {"step_seconds": time_floor(*sizes, tokens=tokens, head_tokens=workload.head_tokens)}
    # `generate` projects the last position of the prompt only, then every new token but the last.
    return {
        "prefill_seconds": time_floor(*sizes, tokens=tokens, head_tokens=1),
        "decode_seconds": time_floor(*sizes, tokens=1, head_tokens=1),
        "generation_seconds": time_floor(*sizes, tokens=tokens + new - 1, head_tokens=new),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
