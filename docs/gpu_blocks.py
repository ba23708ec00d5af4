"""Figures measured on a GPU, from the lines of `benchmarks/results/gpu`; "not measured" where there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from drawing import BENCHMARKS

from gradpruner.common.printing import counted, readable_bytes

RESULTS = BENCHMARKS / "results" / "gpu"
NOT_MEASURED = "not measured"
SHAPES = {"llama-3.1-8b": "Llama-3.1-8B", "mistral-7b-v0.3": "Mistral-7B-v0.3"}
FIGURES = (
    ("full", "step_seconds", "full fine-tuning, a step"),
    ("full", "peak_bytes", "full fine-tuning, peak memory"),
    ("lora", "step_seconds", "LoRA, a step"),
    ("lora", "peak_bytes", "LoRA, peak memory"),
    ("inference", "prefill_seconds", "prompt"),
    ("inference", "decode_seconds", "a new token"),
    ("inference", "peak_bytes", "inference, peak memory"),
)
Lines = dict[str, dict[str, Any]]


def gpu(folder: Path = RESULTS) -> str:
    """Two tables per device; without results, two tables that say "not measured"."""
    sys.path.insert(0, str(BENCHMARKS / "gpu"))
    try:
        from journal import Journal
    finally:
        sys.path.pop(0)
    journals = [Journal(path) for path in sorted(folder.glob("*.jsonl"))]
    if not journals:
        return "\n\n".join(_tables({}, {}))
    texts = []
    for journal in journals:
        lines = journal.lines()
        name = next((line["device"] for line in lines.values() if "device" in line), journal.path.stem)
        texts += [f"**{name}**", *_tables(lines, _cells(journal.path.with_suffix("")))]
    return "\n\n".join(texts)


def _cells(folder: Path) -> Lines:
    """Cells of the quality study measured on the device."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl"))]
    return {(cell := json.loads(line))["key"]: cell for text in texts for line in text.splitlines()}


def _tables(lines: Lines, cells: Lines) -> list[str]:
    rows = [
        "| 32 -> 19 layers, bfloat16 | figure | dense | pruned | ratio | floor of depth "
        "| times the device's floor |",
        "|---" * 7 + "|",
    ]
    for shape, name in SHAPES.items():
        for mode, figure, label in FIGURES:
            cells_ = _figure(lines.get(f"table/{shape}/{mode}", {}), f"{mode}_{figure}", figure)
            rows.append(f"| {name} | {label} | {' | '.join(cells_)} |")
    others = ["| what | measured |", "|---|---|"]
    for part, label, say in OTHERS:
        line = lines.get(part, {})
        others.append(f"| {label} | {say(line) if _is_measured(line) else _why(line)} |")
    others.append(f"| SmolLM2-135M, 12 of 30 layers removed, repaired, not trained | {_quality(cells)} |")
    return ["\n".join(rows), "\n".join(others)]


def _is_measured(line: dict[str, Any]) -> bool:
    return line.get("outcome") == "measured"


def _why(line: dict[str, Any]) -> str:
    """Why there is no figure."""
    if line.get("outcome") == "skipped":
        return f"{NOT_MEASURED} ({line['error']})"
    return str(line.get("outcome") or NOT_MEASURED)


def _figure(line: dict[str, Any], name: str, figure: str) -> list[str]:
    found = next((one for one in line.get("figures", ()) if one["name"] == name), None)
    if found is None or (found["dense"] is None and found["pruned"] is None):
        return [_why(line), "", "", "", ""]
    floors = [side.get(figure) for side in line.get("device_floor_seconds", ())]
    over = [
        f"{found[side] / floor:.1f}"
        for side, floor in zip(("dense", "pruned"), floors, strict=False)
        if floor and found[side]
    ]
    pairs = found["pair_ratios"]
    spread = f" ({pairs['lowest']:.3f} to {pairs['highest']:.3f})" if pairs else ""
    return [
        *(
            "does not fit" if found[side] is None else amount(found[side], found["unit"])
            for side in ("dense", "pruned")
        ),
        "" if found["ratio"] is None else f"{found['ratio']:.3f}{spread}",
        "" if found["floor"] is None else f"{found['floor']:.3f}",
        " / ".join(over),
    ]


def amount(value: float, unit: str) -> str:
    """Seconds or bytes with a readable unit."""
    if unit == "bytes":
        return readable_bytes(value)
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.2f} ms"


def _times(compared: dict[str, Any]) -> str:
    quartiles = compared["quartiles"]
    spread = f" (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})" if quartiles else ""
    return f"{compared['ratio']:.3f}x{spread}"


def _device(line: dict[str, Any]) -> str:
    return (
        f"{line['bytes_per_second'] / 1e12:.2f} TB/s copied, {line['bfloat16_flops_per_second'] / 1e12:.0f} "
        f"TFLOP/s in bfloat16, {line['float64_flops_per_second'] / 1e12:.0f} in float64"
    )


def _two_ways(line: dict[str, Any]) -> str:
    first, second = line["ways"]
    return f"{second} over {first}: time {_times(line['step_seconds'])}, memory {line['peak_bytes']['ratio']:.3f}x"


def _job(line: dict[str, Any]) -> str:
    stages = line["stages"].items()
    return ", ".join(
        f"{name} {stage['seconds']:.1f} s ({amount(stage['peak_bytes'], 'bytes')})" for name, stage in stages
    )


def _scoring(line: dict[str, Any]) -> str:
    found = line["scoring"]
    gram, dense = (found[key]["median"] for key in ("gram_seconds", "dense_seconds"))
    return (
        f"{found['steps']} steps in {amount(gram, 'seconds')}, {dense / gram:.0f}x faster than products, "
        f"relative error {found['largest_relative_error']:.0e}"
    )


def _merging(line: dict[str, Any]) -> str:
    found = line["merging"]
    ours, processor = found["seconds"]["median"], found["processor_seconds"]["median"]
    return (
        f"{amount(ours, 'seconds')}, {processor / ours:.0f}x faster than on the processor; "
        f"{found['entries_that_differ']:,} of {found['entries']:,} entries differ"
    )


def _repair(line: dict[str, Any]) -> str:
    found = line["repair"]
    rate = found["tokens_per_add"] / found["add_seconds"]["median"]
    return (
        f"{rate:,.0f} tokens/s summed, {amount(found['choose_seconds']['median'], 'seconds')} for the ridge, "
        f"{amount(found['rise_bytes'], 'bytes')}"
    )


def _batching(line: dict[str, Any]) -> str:
    return f"{line['tokens_per_second_ratio']:.2f}x the tokens/s of padded ones; {_two_ways(line)}"


def _serving(line: dict[str, Any]) -> str:
    return (
        f"{line['same_answers']} of {line['answers']} answers of {line['new_tokens']} tokens are those of "
        f"transformers ({line['model']}, {line['layers'][0]} -> {line['layers'][1]} layers)"
    )


def _quality(cells: Lines) -> str:
    """Score relative to dense, the mean over tasks and seeds."""
    shares = []
    for cell in cells.values():
        if cell["cell"] != "shrink/igia/12/influence":
            continue
        swept = {
            key.rpartition("/")[2]: one["validation"]["nll"]
            for key, one in cells.items()
            if key.startswith(f"{cell['task']}/0/dense/") and "untrained" not in key
        }
        dense = swept and cells.get(
            f"{cell['task']}/{cell['seed']}/dense/{min(swept, key=lambda r: swept[r])}"
        )
        if dense and dense["test"]["score"]:
            shares.append(cell["test"]["score"] / dense["test"]["score"])
    return (
        f"{100 * mean(shares):.1f} % of the dense score, {counted(len(shares), 'run')}"
        if shares
        else NOT_MEASURED
    )


OTHERS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("device", "the device's floor: a copy, a product of matrices", _device),
    ("recording", "a LoRA step recorded, Llama-3.1-8B", _two_ways),
    ("job", "an 8 B shape, from recording to text: seconds (peak memory)", _job),
    ("linears", "scores of one linear, 4096 x 14336", _scoring),
    ("linears", "merging three such linears into one", _merging),
    ("linears", "repairing one such linear", _repair),
    ("batching", "packed samples, LoRA on Llama-3.1-8B", _batching),
    ("liger", "Liger's kernels", _two_ways),
    ("flash_attention", "FlashAttention 2", _two_ways),
    ("serving", "vLLM serves a pruned model", _serving),
)
"""Part of the journal, its label in the table, and the function that formats a measured line."""

BLOCKS: dict[str, Callable[[], str]] = {"gpu": gpu}
