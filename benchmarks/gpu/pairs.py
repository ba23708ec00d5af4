"""Parts measured in turns, as in `gradpruner cost`: two models, or one model in two ways."""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

from journal import Journal
from place import Place

from gradpruner.evaluation.costing.comparison import measure_cost
from gradpruner.evaluation.costing.figures import Figure
from gradpruner.evaluation.costing.subject import plan_by_count
from gradpruner.evaluation.costing.turns import Measurement, Order, measure_pair
from gradpruner.evaluation.costing.workload import RECORDING, Workload

BYTES = 2  # per weight in bfloat16
LLAMA = "llama-3.1-8b"


def table(place: Place, shape: str, mode: str) -> dict[str, Any]:
    """Measures dense and pruned side by side in one mode: a row of the paper's Tables 2 and 11."""
    subject = place.subject(shape)
    workload = place.workload(mode)
    found = measure_cost(subject, plan_by_count(subject.depth, place.num_prune), workload, modes=[mode])
    facts = found.to_dict()
    del facts["provenance"]
    rates = Journal(place.journal).lines().get("device", {})
    if "bytes_per_second" in rates:
        facts["device_floor_seconds"] = [device_floor(sizes, mode, workload, rates) for sizes in found.sizes]
    return facts | {"error": "; ".join(f"{what}: {why}" for what, why in found.errors.items())}


def device_floor(
    sizes: dict[str, Any], mode: str, workload: Workload, rates: dict[str, Any]
) -> dict[str, float]:
    """Returns the least seconds the device needs at its measured copy and matmul rates, for each time
    measured.

    The bound counts the operations of the linears, two per multiply-accumulate: once for the forward pass, in
    training once more for the gradients of the states, and in full training a third time for those of the
    weights. It also counts the bytes of weights and cache that must be read, and in full training the bytes
    AdamW moves: it reads weight, gradient and two moments and writes three of them. Attention, norms and
    activations are left out, so the bound cannot be reached.
    """
    weights = BYTES * (sizes["decoder_parameters"] + sizes["head_macs"])

    def least(macs: float, num_bytes: float) -> float:
        flops, num_bytes_a_second = rates["bfloat16_flops_per_second"], rates["bytes_per_second"]
        return float(max(2 * macs / flops, num_bytes / num_bytes_a_second))

    tokens = workload.batch_size * workload.tokens
    if mode == "inference":
        cached = workload.tokens + workload.new_tokens / 2
        cache = BYTES * workload.batch_size * cached * sizes["kv_entries_per_token"]
        macs = sizes["layer_macs"] + sizes["head_macs"]
        return {
            "prefill_seconds": least(
                tokens * sizes["layer_macs"] + workload.batch_size * sizes["head_macs"], weights
            ),
            "decode_seconds": least(workload.batch_size * macs, weights + cache),
        }
    forward = tokens * sizes["layer_macs"] + workload.batch_size * workload.head_tokens * sizes["head_macs"]
    if mode == "lora":
        return {"step_seconds": least(2 * forward, 2 * weights)}
    updating = 7 * BYTES * sizes["parameters"] / rates["bytes_per_second"]
    return {"step_seconds": least(3 * forward, 3 * weights) + updating}


def two_ways(place: Place, names: tuple[str, str], orders: tuple[Order, Order]) -> dict[str, Any]:
    """Measures one model in two ways: seconds per step, peak memory, and their ratios."""
    found = measure_pair(orders)
    error = "; ".join(f"{name}: {one.error}" for name, one in zip(names, found, strict=True) if one.error)
    return {
        "ways": names,
        "workload": asdict(orders[1].workload),
        "step_seconds": compared(found, [one.values.get("step_seconds", ()) for one in found]),
        "peak_bytes": compared(found, [one.values.get("peak_bytes", ()) for one in found]),
        "memory": found[0].kind,
        "error": error,
    }


def compared(found: tuple[Measurement, Measurement], values: list[tuple[float, ...]]) -> dict[str, Any]:
    """Returns medians, and the ratio second / first with its quartiles over steps run side by side."""
    figure = Figure("", "", "", "", values[0], values[1])
    pairs = figure.pairs if len(figure.pairs) > 1 else []
    return {
        "medians": figure.medians,
        "ratio": figure.ratio,
        "quartiles": statistics.quantiles(pairs, n=4, method="inclusive") if pairs else None,
        "values": values,
    }


def recording(place: Place) -> dict[str, Any]:
    """Measures a LoRA step with recorded gradients, compared with the same step without."""
    subject, workload = place.subject(LLAMA), place.workload("lora")
    orders = Order(subject, "lora", workload), Order(subject, RECORDING, workload)
    return two_ways(place, ("LoRA", "LoRA, recorded"), orders)


def batching(place: Place) -> dict[str, Any]:
    """Measures packed samples of many lengths, compared with the same samples padded, in the same order."""
    batch, shortest = (2, 3) if place.tiny else (16, 16)
    workload = place.workload("lora", batch_size=batch, shortest=shortest)
    padded = replace(workload, batching="padded")
    subject = place.subject(LLAMA)
    found = two_ways(
        place, ("padded", "packed"), (Order(subject, "lora", padded), Order(subject, "lora", workload))
    )
    sums = [sum(values) for values in found["step_seconds"]["values"]]
    return found | {"tokens_per_second_ratio": sums[0] / sums[1] if all(sums) else None}


def liger(place: Place) -> dict[str, Any]:
    """Measures Liger's fused kernels, compared with transformers' own."""
    subject, workload = place.subject(LLAMA), place.workload("lora")
    orders = Order(subject, "lora", workload), Order(subject, "lora", replace(workload, liger=True))
    return two_ways(place, ("plain", "Liger"), orders)


def flash_attention(place: Place) -> dict[str, Any]:
    """Measures FlashAttention 2, compared with torch's SDPA, on packed samples of many lengths."""
    batch, shortest = (2, 3) if place.tiny else (16, 16)
    workload = place.workload("lora", batch_size=batch, shortest=shortest)
    subject = place.subject(LLAMA)
    flash = replace(workload, attn="flash_attention_2")
    orders = Order(subject, "lora", replace(workload, attn="sdpa")), Order(subject, "lora", flash)
    return two_ways(place, ("sdpa", "FlashAttention 2"), orders)
