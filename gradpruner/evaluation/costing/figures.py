"""The figures of a cost comparison: known sizes, measured times and memory, and their floors."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from gradpruner.common import printing
from gradpruner.evaluation.costing.sizing import time_floor
from gradpruner.evaluation.costing.turns import Measurement
from gradpruner.evaluation.costing.workload import Workload
from gradpruner.models.sizes import ModelSizes

# Mode -> its name in tables.
LABELS = {"full": "full fine-tuning", "lora": "LoRA fine-tuning", "inference": "inference"}
# Figures known without running a model: name (a key of `size_facts`, except "macs"), label, unit.
_SIZES = (
    ("layers", "layers", ""),
    ("parameters", "parameters", ""),
    ("parameters_without_head", "parameters without the head", ""),
    ("decoder_parameters", "parameters of layers", ""),
    ("kv_bytes_per_token", "KV cache per token", "bytes"),
    ("disk_bytes", "weights on disk", "bytes"),
    ("macs", "MACs of linears, no head", "MAC"),
    ("flops", "FLOPs torch counts, no head", "FLOP"),
)
# Figures measured by running a model: name without the mode -> label, unit.
_MEASURED = {
    "step_seconds": ("one step", "seconds"),
    "prefill_seconds": ("prompt", "seconds"),
    "decode_seconds": ("each new token", "seconds"),
    "generation_seconds": ("prompt and new tokens", "seconds"),
    "rate": ("new tokens a second", "tokens/s"),
    "peak_bytes": ("peak memory", "bytes"),
    "rise_bytes": ("peak above an empty process", "bytes"),
}
# Mode -> label of its minimum memory (`per_device.held_bytes`).
_HELD = {
    "full": "weights, gradients, moments",
    "lora": "weights, adapters, moments",
    "inference": "weights and cache",
}


@dataclass(frozen=True)
class Figure:
    """One quantity of both models.

    Attributes:
        name: Name in JSON: "full_step_seconds".
        group: Heading in tables: "full fine-tuning".
        unit: "seconds", "bytes", "tokens/s", "MAC", "FLOP" or "" for a count.
        dense: Values of the dense model in the order measured; a single one if known without measuring.
        pruned: Values of the pruned model; values of the same index were measured side by side.
        floor: Ratio pruned / dense that depth alone gives; None if the figure has no floor.
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
        """Medians of the dense and the pruned model; None without a value."""
        first, second = (statistics.median(side) if side else None for side in (self.dense, self.pruned))
        return first, second

    @property
    def ratio(self) -> float | None:
        """Ratio pruned / dense of the medians."""
        dense, pruned = self.medians
        return pruned / dense if dense and pruned is not None else None

    @property
    def pairs(self) -> list[float]:
        """Ratios pruned / dense of the pairs measured side by side, ascending."""
        return sorted(pruned / dense for dense, pruned in zip(self.dense, self.pruned, strict=False) if dense)

    @property
    def above_floor(self) -> float | None:
        """Ratio over floor; 1 if the model is as fast or as small as its depth allows."""
        return self.ratio / self.floor if self.ratio is not None and self.floor else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the figure as JSON values, including the range of the pairs."""
        pairs = self.pairs if len(self.pairs) > 1 else []
        between = pairs and {
            "lowest": pairs[0],
            "quartiles": statistics.quantiles(pairs, n=4, method="inclusive"),
            "highest": pairs[-1],
        }
        return {
            **{key: getattr(self, key) for key in ("name", "group", "label", "unit")},
            "dense": self.medians[0],
            "pruned": self.medians[1],
            "ratio": self.ratio,
            "floor": self.floor,
            "above_floor": self.above_floor,
            "pair_ratios": between or None,
            "dense_values": list(self.dense),
            "pruned_values": list(self.pruned),
        }


def size_figures(facts: tuple[dict[str, Any], dict[str, Any]], tokens: int) -> list[Figure]:
    """Returns the figures known without running a model, from `size_facts` for `tokens` tokens."""
    figures = []
    for name, label, unit in _SIZES:
        dense, pruned = ((one | {"macs": tokens * one["layer_macs"]})[name] for one in facts)
        if dense is not None and pruned is not None:
            group = f"{tokens} tokens" if unit in ("MAC", "FLOP") else "model"
            figures.append(Figure(name, group, label, unit, (float(dense),), (float(pruned),)))
    return figures


def measured_figures(
    found: tuple[Measurement, Measurement],
    mode: str,
    sizes: tuple[ModelSizes, ModelSizes],
    workload: Workload,
    held: tuple[int, int],
    *,
    with_floors: bool = True,
) -> list[Figure]:
    """Returns the figures measured for both models in one mode; a model that failed has no values.

    Args:
        found: What was measured of the dense and the pruned model.
        mode: One of `workload.MODES`.
        sizes: Sizes of both models.
        workload: What was run.
        held: Minimum bytes each model needs in this mode (`per_device.held_bytes`).
        with_floors: Whether to give floors; they hold only for models that differ in depth alone.
    """
    kinds = {one.kind for one in found if one.kind}
    floors = time_floors(mode, sizes, workload)
    names = [*floors, *(["rate"] if mode == "inference" else []), "held_bytes"]
    names += (["peak_bytes"] if kinds else []) + (["rise_bytes"] if kinds == {"rss"} else [])
    floors["rise_bytes"] = held[1] / held[0]
    if kinds == {"cuda"}:  # on other devices the peak includes Python and the libraries
        floors["peak_bytes"] = held[1] / held[0]
    dense, pruned = (
        one.values
        | {"rate": tuple(workload.batch_size / seconds for seconds in one.values.get("decode_seconds", ()))}
        | {"held_bytes": (float(certain),)}
        for one, certain in zip(found, held, strict=True)
    )
    labels = _MEASURED | {"held_bytes": (_HELD[mode], "bytes")}
    return [
        Figure(
            f"{mode}_{name}",
            LABELS[mode],
            *labels[name],
            dense.get(name, ()),
            pruned.get(name, ()),
            floors.get(name) if with_floors else None,
        )
        for name in names
    ]


def time_floors(mode: str, sizes: tuple[ModelSizes, ModelSizes], workload: Workload) -> dict[str, float]:
    """Returns the floors of the times measured in a mode: name -> ratio pruned / dense."""
    tokens, new = workload.tokens, workload.new_tokens
    if mode != "inference":
        return {"step_seconds": time_floor(*sizes, tokens=tokens, head_tokens=workload.head_tokens)}
    # `generate` projects the last position of the prompt only, then every new token but the last.
    return {
        "prefill_seconds": time_floor(*sizes, tokens=tokens, head_tokens=1),
        "decode_seconds": time_floor(*sizes, tokens=1, head_tokens=1),
        "generation_seconds": time_floor(*sizes, tokens=tokens + new - 1, head_tokens=new),
    }


def with_unit(value: float | None, unit: str) -> str:
    """Returns a value with its unit as text; durations below a second are in milliseconds."""
    if value is None:
        return printing.MISSING
    if unit == "seconds":
        return printing.duration(value) if value >= 0.9995 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        return printing.num_bytes(value)
    if unit in ("MAC", "FLOP"):
        return f"{value / 1e9:,.3f} G{unit}s"
    if unit == "tokens/s":
        return f"{value:.3g}/s"
    return printing.short(value)
