"""The figures of a cost comparison: what is known of both models, what was measured, and each one's floor."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from gradpruner.common import printing
from gradpruner.evaluation.costing.sizing import Sizes, time_floor
from gradpruner.evaluation.costing.turns import Measurement
from gradpruner.evaluation.costing.workload import Workload

# Mode -> what the tables call it.
LABELS = {"full": "full fine-tuning", "lora": "LoRA fine-tuning", "inference": "inference"}
# What is known without running anything: name, as in `Sizes` but for the MACs; label; unit.
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
# What running a model says: name, without the mode; label; unit.
_MEASURED = {
    "step_seconds": ("one step", "seconds"),
    "prefill_seconds": ("prompt", "seconds"),
    "decode_seconds": ("each new token", "seconds"),
    "generation_seconds": ("prompt and new tokens", "seconds"),
    "rate": ("new tokens a second", "tokens/s"),
    "peak_bytes": ("peak memory", "bytes"),
    "rise_bytes": ("peak above an empty process", "bytes"),
}
# Mode -> the memory it needs in any case (`per_device.held_bytes`).
_HELD = {
    "full": "weights, gradients, moments",
    "lora": "weights, adapters, moments",
    "inference": "weights and cache",
}


@dataclass(frozen=True)
class Figure:
    """One quantity of both models.

    Attributes:
        name: As in JSON: "full_step_seconds".
        group: Heading it stands under in tables: "full fine-tuning".
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
        first, second = (statistics.median(side) if side else None for side in (self.dense, self.pruned))
        return first, second

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
        """Ratio / floor: 1 where the model is as fast or as small as its depth allows."""
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
            **{key: getattr(self, key) for key in ("name", "group", "label", "unit")},
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
    """What is known without running anything; operations are counted for a prompt of so many tokens."""
    figures = []
    for name, label, unit in _SIZES:
        known = (asdict(one) | {"macs": tokens * one.layer_macs} for one in sizes)
        dense, pruned = (values[name] for values in known)
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
    """What was measured of both models in one mode; a model that failed has no values.

    `held` are the bytes each needs in any case. Floors are given where the models differ in depth alone.
    """
    kinds = {one.kind for one in found if one.kind}
    floors = time_floors(mode, sizes, workload)
    names = [*floors, *(["rate"] if mode == "inference" else []), "held_bytes"]
    names += (["peak_bytes"] if kinds else []) + (["rise_bytes"] if kinds == {"rss"} else [])
    floors["rise_bytes"] = held[1] / held[0]
    if kinds == {"cuda"}:  # elsewhere Python and the libraries count too
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


def shown(value: float | None, unit: str) -> str:
    """A value as people read it; durations below a second in milliseconds."""
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
