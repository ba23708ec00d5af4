"""The quantities of a cost comparison: known ones, measured ones, and each one's floor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradpruner.evaluation.costing.pairing import Cell
from gradpruner.evaluation.costing.sizing import Sizes, held_bytes, time_floor
from gradpruner.evaluation.costing.workload import Workload

# Mode -> what the tables call it.
LABELS = {"full": "full fine-tuning", "lora": "LoRA fine-tuning", "inference": "inference"}
# Mode -> what memory it holds for sure (`sizing.held_bytes`).
HELD = {
    "full": "weights, gradients, moments",
    "lora": "weights, adapters, moments",
    "inference": "weights and cache",
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
            "pair_ratios": {
                "lowest": pairs[0],
                "quartiles": statistics.quantiles(pairs, n=4, method="inclusive"),
                "highest": pairs[-1],
            }
            if pairs
            else None,
            "dense_values": list(self.dense),
            "pruned_values": list(self.pruned),
        }


def size_figures(sizes: tuple[Sizes, Sizes], stored: tuple[int, int], workload: Workload) -> list[Figure]:
    """What is known without running anything.

    Args:
        sizes: Of the dense and the pruned model.
        stored: Bytes of the weights of both on disk.
        workload: Its `tokens` are the length operations are counted for.
    """
    tokens = workload.tokens
    macs = (tokens * sizes[0].layer_macs, tokens * sizes[1].layer_macs)
    flops = (sizes[0].flops, sizes[1].flops)
    rows: list[tuple[str, str, str, tuple[int | None, int | None]]] = [
        ("layers", "layers", "", (sizes[0].layers, sizes[1].layers)),
        ("parameters", "parameters", "", (sizes[0].parameters, sizes[1].parameters)),
        (
            "parameters_without_head",
            "parameters without the head",
            "",
            (sizes[0].parameters_without_head, sizes[1].parameters_without_head),
        ),
        (
            "decoder_parameters",
            "parameters of layers",
            "",
            (sizes[0].decoder_parameters, sizes[1].decoder_parameters),
        ),
        (
            "kv_bytes_per_token",
            "KV cache per token",
            "bytes",
            (sizes[0].kv_bytes_per_token, sizes[1].kv_bytes_per_token),
        ),
        ("disk_bytes", "weights on disk", "bytes", stored),
        ("macs", "MACs of linears, no head", "MAC", macs),
        ("flops", "FLOPs torch counts, no head", "FLOP", flops),
    ]
    per_prompt = f"{tokens} tokens"
    return [
        Figure(
            name,
            per_prompt if unit in ("MAC", "FLOP") else "model",
            label,
            unit,
            (float(dense),),
            (float(pruned),),
        )
        for name, label, unit, (dense, pruned) in rows
        if dense is not None and pruned is not None
    ]


def measured_figures(
    cells: tuple[Cell, Cell],
    mode: str,
    sizes: tuple[Sizes, Sizes],
    workload: Workload,
    dtype: torch.dtype,
    *,
    with_floors: bool = True,
) -> list[Figure]:
    """What was measured of both models in one mode.

    Args:
        cells: What was measured; a cell that failed has no values.
        mode: One of `workload.MODES`.
        sizes: Of the two models.
        workload: What was run.
        dtype: Type of the weights in this mode.
        with_floors: The models differ in depth alone.
    """
    figures = []
    floors = time_floors(mode, sizes, workload) if with_floors else {}
    what = LABELS[mode]
    for name, label, unit in _TIMES[mode]:
        dense, pruned = (cell.seconds.get(name, ()) for cell in cells)
        figures.append(Figure(f"{mode}_{name}", what, label, unit, dense, pruned, floors.get(name)))
    if mode == "inference":
        dense, pruned = (
            tuple(workload.batch_size / value for value in cell.seconds.get("decode_seconds", ()))
            for cell in cells
        )
        figures.append(Figure("inference_rate", what, "new tokens a second", "tokens/s", dense, pruned))
    held = [held_bytes(one, mode, workload, dtype) for one in sizes]
    figures.append(
        Figure(f"{mode}_held_bytes", what, HELD[mode], "bytes", (float(held[0]),), (float(held[1]),))
    )
    kinds = {cell.kind for cell in cells if cell.kind}
    floor = held[1] / held[0] if with_floors else None
    if kinds:
        dense, pruned = (cell.peak_bytes for cell in cells)
        peak_floor = floor if kinds == {"cuda"} else None  # else Python and the libraries count too
        figures.append(Figure(f"{mode}_peak_bytes", what, "peak memory", "bytes", dense, pruned, peak_floor))
    if kinds == {"rss"}:
        dense, pruned = (cell.rise_bytes for cell in cells)
        label = "peak above an empty process"
        figures.append(Figure(f"{mode}_rise_bytes", what, label, "bytes", dense, pruned, floor))
    return figures


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


_STEP = (("step_seconds", "one step", "seconds"),)
_TIMES = {
    "full": _STEP,
    "lora": _STEP,
    "inference": (
        ("prefill_seconds", "prompt", "seconds"),
        ("decode_seconds", "each new token", "seconds"),
        ("generation_seconds", "prompt and new tokens", "seconds"),
    ),
}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
