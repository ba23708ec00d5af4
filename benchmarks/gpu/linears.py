"""Parts that need only torch: the device's copy and matmul rates, and single linears of an 8 B model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from place import SEED, Place
from torch import Tensor

from gradpruner.common.memory import PeakMemory
from gradpruner.gradients.importance import Factors, gram_energies
from gradpruner.plans.merging import Source, merge_linear
from gradpruner.plans.options import RepairOptions
from gradpruner.pruning.repair.ridge import Sums, choose_update

DENSITY = 0.2


def device_rates(place: Place) -> dict[str, Any]:
    """Measures bytes per second of a plain copy and FLOPs per second of a matrix product: upper bounds.

    The copy reads and writes every byte. Matrices are random, because products of zeros are faster on a GPU.
    """
    device, sizes = place.torch_device, (2**10, 64) if place.tiny else (2**30, 8192)
    both = torch.zeros(2, sizes[0], dtype=torch.float32, device=device)
    copied = place.times(lambda: both[0].copy_(both[1]), repeats=10, warmup=3)
    rates: dict[str, Any] = {"bytes_per_second": 2 * 4 * sizes[0] / copied["median"]}
    for name, dtype, side in (
        ("bfloat16", torch.bfloat16, sizes[1]),
        ("float64", torch.float64, sizes[1] // 2),
    ):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        multiplied = place.times(lambda left=left, right=right: left @ right, repeats=10, warmup=3)  # type: ignore[misc]
        rates[f"{name}_flops_per_second"] = 2 * side**3 / multiplied["median"]
        rates[f"{name}_seconds"] = multiplied
    return {**rates, "copy_seconds": copied, "memory_bytes": memory_of(device)}


def memory_of(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def linears(place: Place) -> dict[str, Any]:
    """Measures scoring, merging and repair of one linear of Llama-3.1-8B with the package's own functions."""
    return {
        "shape": place.linear,
        "scoring": scoring(place),
        "merging": merging(place),
        "repair": repair(place),
    }


def inputs(place: Place) -> tuple[Tensor, list[Source]]:
    """Returns a linear, and three to merge into it with their gradients, as in `benchmarks/merging.py`."""
    sys.path.append(str(Path(__file__).parents[1]))
    from merging import make_inputs

    return make_inputs(place.linear, torch.bfloat16, steps=3 if place.tiny else 40)


def moved(target: Tensor, sources: list[Source], device: torch.device) -> tuple[Tensor, list[Source]]:
    there = []
    for source in sources:
        assert source.factors is not None
        factors = Factors(source.factors.grad_b_SOR.to(device), source.factors.grad_a_SRI.to(device))
        there.append(Source(source.weight.to(device), factors))
    return target.to(device), there


def scoring(place: Place) -> dict[str, Any]:
    """Measures the energies of all steps from Gram matrices, compared with squares of full products."""
    _, sources = moved(*inputs(place), place.torch_device)
    factors = sources[0].factors
    assert factors is not None
    b_SOR, a_SRI = factors.grad_b_SOR, factors.grad_a_SRI

    def dense() -> list[float]:
        steps = zip(b_SOR, a_SRI, strict=True)
        return [float(((b_OR.double() @ a_RI.double()) ** 2).sum()) for b_OR, a_RI in steps]

    gram, exact = gram_energies(b_SOR, a_SRI).tolist(), dense()
    errors = [abs(one / other - 1) for one, other in zip(gram, exact, strict=True)]
    return {
        "steps": len(gram),
        "gram_seconds": place.times(lambda: gram_energies(b_SOR, a_SRI), repeats=5),
        "dense_seconds": place.times(dense, repeats=2, warmup=0),
        "largest_relative_error": max(errors),
    }


def merging(place: Place) -> dict[str, Any]:
    """Measures merging three linears into one, on the device and on the CPU."""
    at_home = inputs(place)
    target, sources = moved(*at_home, place.torch_device)

    def work() -> Tensor:
        return merge_linear(target, sources, density=DENSITY)

    seconds = place.times(work, repeats=3)
    with PeakMemory(place.torch_device) as memory:
        merged = work().cpu()
    on_cpu = Place("cpu", place.tiny, place.journal)
    kept: list[Tensor] = []
    processor = on_cpu.times(
        lambda: kept.append(merge_linear(*at_home, density=DENSITY)), repeats=1, warmup=0
    )
    return {
        "sources": len(sources),
        "seconds": seconds,
        "processor_seconds": processor,
        "rise_bytes": memory.rise_bytes,
        # Rounding may move entries across the threshold of importance.
        "entries_that_differ": int((merged != kept[0]).sum()),
        "entries": merged.numel(),
    }


def repair(place: Place) -> dict[str, Any]:
    """Measures the regression at one cut: sums over tokens, then a ridge chosen by solving four systems."""
    device, (outputs, regressors) = place.torch_device, place.linear
    tokens, batches = (64, 3) if place.tiny else (2048, 8)
    generator = torch.Generator(device).manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)

    with PeakMemory(device) as memory:
        truth_DP = random(outputs, regressors) / regressors**0.5
        fitted, held_out = (Sums.empty(regressors, outputs, device) for _ in range(2))
        even_T = torch.ones(tokens, device=device, dtype=torch.float64)

        def add(sums: Sums) -> None:
            x_TP = random(tokens, regressors)
            sums.add(x_TP, x_TP @ truth_DP.T + random(tokens, outputs), even_T)

        adding = place.times(lambda: add(fitted), repeats=batches)
        add(held_out)
        found: list[tuple[float | None, float]] = []
        choosing = place.times(
            lambda: found.append(choose_update(fitted, held_out, RepairOptions().ridges)),
            repeats=2,
            warmup=0 if place.tiny else 1,
        )
    return {
        "tokens": fitted.tokens,
        "tokens_per_add": tokens,
        "add_seconds": adding,
        "choose_seconds": choosing,
        "ridge": found[-1][0],
        "error_before": held_out.error(None),
        "error_after": found[-1][1],
        "rise_bytes": memory.rise_bytes,
    }
