"""Time of layer scores from Gram matrices, compared with forming the simulated gradients and squaring them.

    python benchmarks/scoring.py            writes benchmarks/results/scoring.json; about a minute
    python benchmarks/scoring.py --quick    two pairs; writes nothing

Scored are the seven linears of one Llama-3.1-8B layer at one step, with LoRA rank 8 and on one thread. Ours
is `gradpruner.gradients.importance.gram_energies`. It is so fast that one turn scores many layers and divides
the time by their number. Each layer has its own gradients, because in training they are not in the cache
either. The dense way comes in two forms: square and sum; and the Frobenius norm, as in the released code,
which needs no second matrix. All ways are timed in turns. Errors are relative to dense products in double
precision.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from merging import timed
from torch import Tensor

from gradpruner.common.provenance import provenance
from gradpruner.gradients.importance import gram_energies

RESULT = Path(__file__).parent / "results" / "scoring.json"
SEED, RANK, LAYERS = 0, 8, 32
SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
TIME_GOAL, ERROR_GOAL = 1000.0, 1e-6
Pairs = list[tuple[Tensor, Tensor]]


def make_layer(generator: torch.Generator) -> Pairs:
    """Returns LoRA gradients whose rows and columns vary in size, as in training."""

    def values(rows: int, columns: int) -> Tensor:
        size = torch.randn(rows, 1, generator=generator).exp() * 1e-6
        return torch.randn(rows, columns, generator=generator) * size

    return [(values(out, RANK), values(width, RANK).T.contiguous()) for out, width in SHAPES.values()]


def score_gram(layer: Pairs) -> float:
    return sum(float(gram_energies(grad_b[None], grad_a[None])) for grad_b, grad_a in layer)


def score_squares(layer: Pairs) -> float:
    return sum(float(((grad_b @ grad_a) ** 2).sum()) for grad_b, grad_a in layer)


def score_norm(layer: Pairs) -> float:
    return sum(float(torch.linalg.matrix_norm(grad_b @ grad_a)) ** 2 for grad_b, grad_a in layer)


def relative_errors(layer: Pairs) -> dict[str, float]:
    """Returns the relative error of each linear's energy."""
    errors = {}
    for name, (grad_b, grad_a) in zip(SHAPES, layer, strict=True):
        blocks = (rows @ grad_a.double() for rows in grad_b.double().split(1024))
        exact = sum(float((block**2).sum()) for block in blocks)
        errors[name] = abs(float(gram_energies(grad_b[None], grad_a[None])) / exact - 1)
    return errors


def measure(pairs: int) -> dict[str, Any]:
    load_before = os.getloadavg()
    generator = torch.Generator().manual_seed(SEED)
    layers = [make_layer(generator) for _ in range(LAYERS)]
    score_gram(layers[0])
    gram, squares, norm = [], [], []
    for pair in range(pairs):
        layer = layers[pair % LAYERS]
        wall, processor = timed(lambda: [score_gram(one) for one in layers])
        gram.append((wall / LAYERS, processor / LAYERS))
        squares.append(timed(lambda layer=layer: score_squares(layer)))  # type: ignore[misc]
        norm.append(timed(lambda layer=layer: score_norm(layer)))  # type: ignore[misc]
    errors = relative_errors(layers[0])
    ratios = {
        "squares_over_gram": ratio(squares, gram, 0),
        "squares_over_gram_processor_time": ratio(squares, gram, 1),
        "norm_over_gram": ratio(norm, gram, 0),
        "norm_over_gram_processor_time": ratio(norm, gram, 1),
        "largest_relative_error": max(errors.values()),
    }
    return {
        "what": "scores of one Llama-3.1-8B layer at one step: dense products against Gram matrices",
        "config": {
            "shapes": SHAPES,
            "rank": RANK,
            "layers_per_turn": LAYERS,
            "pairs": pairs,
            "threads": torch.get_num_threads(),
            "dtype": "fp32",
        },
        "goal": {"squares_over_gram_at_least": TIME_GOAL, "relative_error_at_most": ERROR_GOAL},
        "met": {
            "time": ratios["squares_over_gram"] >= TIME_GOAL,
            "agreement": ratios["largest_relative_error"] <= ERROR_GOAL,
        },
        "ratios": ratios,
        "raw": {
            "gram_seconds": spread(gram),
            "squares_seconds": spread(squares),
            "norm_seconds": spread(norm),
            "relative_errors": errors,
        },
        "provenance": provenance(SEED),
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }


def ratio(dense: list[tuple[float, float]], gram: list[tuple[float, float]], clock: int) -> float:
    return round(statistics.median(d[clock] / g[clock] for d, g in zip(dense, gram, strict=True)), 1)


def spread(times: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
        for name, values in zip(("wall", "processor"), zip(*times, strict=True), strict=True)
    }


def show(result: dict[str, Any]) -> None:
    for name, value in result["ratios"].items():
        print(f"{name:36} {value:10.3g}")
    print(f"goals {result['goal']}; met: {result['met']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two pairs; writes nothing")
    parser.add_argument("--pairs", type=int, default=9, help="paired measurements")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(2 if args.quick else args.pairs)
    show(result)
    if not args.quick:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
