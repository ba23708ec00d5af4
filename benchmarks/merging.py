"""Time and memory of merging a 14336 x 4096 linear of three pruned layers, compared with the released code.

    python benchmarks/merging.py            writes benchmarks/results/merging.json; about six minutes
    python benchmarks/merging.py --quick    a smaller matrix; takes seconds and writes nothing

"ours" is `gradpruner.plans.merging.merge_linear`. "released" sums the squared products of all steps, sorts
all entries, marks the top fifth by index, multiplies weights to compare signs, and adds. It is timed with one
source and that time is multiplied by three, because its sources share no work. The two are timed in turns
(ours, released, ours, ...) on one thread. Memory is the rise of the resident set size (RSS) in a fresh
process that already holds the inputs, so it includes the result but not the inputs. The memory of "released"
does not depend on the number of steps or sources, so it is measured with two steps and one source.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from torch import Tensor

from gradpruner.common.memory import PeakMemory
from gradpruner.common.provenance import provenance
from gradpruner.plans.merging import Factors, Source, merge_linear

RESULT = Path(__file__).parent / "results" / "merging.json"
SEED = 0
STEPS, RANK, SOURCES, DENSITY = 40, 8, 3, 0.2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIME_GOAL, MEMORY_GOAL = 4.0, 1.5


def make_inputs(
    shape: tuple[int, int], dtype: torch.dtype, steps: int = STEPS, sources: int = SOURCES
) -> tuple[Tensor, list[Source]]:
    """Returns a target and pruned linears; their gradients vary in size by row and column, as in training."""
    generator = torch.Generator().manual_seed(SEED)
    rows, columns = shape

    def weight() -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    def factors() -> Factors:
        row_size = torch.randn(rows, 1, generator=generator).exp() * 1e-6
        column_size = torch.randn(columns, generator=generator).exp() * 1e-6
        return Factors(
            torch.randn(steps, rows, RANK, generator=generator) * row_size,
            torch.randn(steps, RANK, columns, generator=generator) * column_size,
        )

    return weight(), [Source(weight(), factors()) for _ in range(sources)]


def merge_released(target: Tensor, sources: list[Source]) -> Tensor:
    """Merges as the released `process_important.py` does, with products scaled into the range of fp32."""
    total = target.clone()
    for source in sources:
        importance = torch.zeros(target.shape)
        for grad_b, grad_a in zip(source.factors.grad_b_SOR, source.factors.grad_a_SRI, strict=True):
            importance += ((grad_b * 1e6) @ (grad_a * 1e6)) ** 2
        flat = importance.flatten()
        top = torch.argsort(flat, descending=True)[: int(DENSITY * flat.numel())]
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[top] = True
        mask = mask.view(target.shape) & (target * source.weight > 0)
        total = total + mask * source.weight
    return total


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Returns wall and processor seconds of some work."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def measure_time(shape: tuple[int, int], dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    target, sources = make_inputs(shape, dtype)
    ours, released = [], []
    for pair in range(pairs):
        ours.append(timed(lambda: merge_linear(target, sources, density=DENSITY)))
        one = [sources[pair % len(sources)]]
        released.append(timed(lambda one=one: merge_released(target, one)))  # type: ignore[misc]
    pairs_of_times = list(zip(ours, released, strict=True))
    return {
        "ours_seconds": [round(wall, 3) for wall, _ in ours],
        "ours_processor_seconds": [round(cpu, 3) for _, cpu in ours],
        "released_one_source_seconds": [round(wall, 3) for wall, _ in released],
        "released_one_source_processor_seconds": [round(cpu, 3) for _, cpu in released],
        "time_ratios": [round(SOURCES * r[0] / o[0], 3) for o, r in pairs_of_times],
        "processor_time_ratios": [round(SOURCES * r[1] / o[1], 3) for o, r in pairs_of_times],
    }


def measure_memory(way: str, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Returns the rise of the RSS in bytes; must be called in a fresh process."""
    if way == "ours":
        target, sources = make_inputs(shape, dtype)
        merge_linear(*make_inputs((64, 64), dtype), density=DENSITY)  # lets libraries set up their buffers
        with PeakMemory() as memory:
            merge_linear(target, sources, density=DENSITY)
    else:
        target, sources = make_inputs(shape, dtype, steps=2, sources=1)
        merge_released(*make_inputs((64, 64), dtype))
        with PeakMemory() as memory:
            merge_released(target, sources)
    return memory.rise_bytes


def memory_in_fresh_process(way: str, shape: tuple[int, int], dtype: str) -> int:
    command = [sys.executable, __file__, "--memory", way, dtype, *map(str, shape)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def agreement(shape: tuple[int, int]) -> dict[str, Any]:
    """Counts entries in which the two results differ: rounding may move an entry across the threshold."""
    target, sources = make_inputs(shape, torch.float32)
    difference = (merge_linear(target, sources, density=DENSITY) - merge_released(target, sources)).abs()
    apart = int((difference > 1e-6).sum())
    return {"shape": shape, "entries": difference.numel(), "entries_that_differ": apart}


def measure(shape: tuple[int, int], pairs: int) -> dict[str, Any]:
    weight_bytes = 4 * shape[0] * shape[1]
    load_before = os.getloadavg()
    rows = {}
    for name, dtype in DTYPES.items():
        row = measure_time(shape, dtype, pairs)
        row["time_ratio"] = statistics.median(row["time_ratios"])
        row["processor_time_ratio"] = statistics.median(row["processor_time_ratios"])
        for way in ("ours", "released"):
            rise = memory_in_fresh_process(way, shape, name)
            row[f"{way}_extra_memory_bytes"] = rise
            row[f"{way}_extra_memory_over_fp32_weight"] = round(rise / weight_bytes, 3)
        row["met"] = {
            "time": row["time_ratio"] >= TIME_GOAL,
            "memory": row["ours_extra_memory_over_fp32_weight"] <= MEMORY_GOAL,
        }
        rows[name] = row
    return {
        "what": "merging one linear of three pruned layers: merge_linear against the released code's way",
        "config": {
            "shape": shape,
            "steps": STEPS,
            "rank": RANK,
            "sources": SOURCES,
            "density": DENSITY,
            "pairs": pairs,
            "threads": torch.get_num_threads(),
        },
        "goal": {"time_ratio_at_least": TIME_GOAL, "extra_memory_over_fp32_weight_at_most": MEMORY_GOAL},
        "ratios": {
            name: {
                "time": row["time_ratio"],
                "processor_time": row["processor_time_ratio"],
                "extra_memory": row["ours_extra_memory_over_fp32_weight"],
                "extra_memory_released": row["released_extra_memory_over_fp32_weight"],
            }
            for name, row in rows.items()
        },
        "met": {name: row["met"] for name, row in rows.items()},
        "raw": rows,
        "agreement": agreement((min(shape[0], 1024), min(shape[1], 1024))),
        "provenance": provenance(SEED),
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }


def show(result: dict[str, Any]) -> None:
    columns = ("times faster", "processor time", "extra memory", "released")
    print("dtype  " + " ".join(f"{column:>15}" for column in columns) + "  met")
    for name, row in result["ratios"].items():
        values = " ".join(f"{value:14.2f}x" for value in row.values())
        print(f"{name:6} {values}  {result['met'][name]}")
    print(f"agreement: {result['agreement']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller matrix; writes nothing")
    parser.add_argument("--pairs", type=int, default=2, help="paired measurements per dtype")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # way, dtype, rows, columns
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        way, dtype, rows, columns = args.memory
        print(measure_memory(way, (int(rows), int(columns)), DTYPES[dtype]))
        return
    result = measure((2048, 1024) if args.quick else (14336, 4096), args.pairs)
    show(result)
    if not args.quick:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
