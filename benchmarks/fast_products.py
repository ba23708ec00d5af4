"""Time of training and of forward passes with `fast_products`, as ratios to plain fp32 in the same run.

    python benchmarks/fast_products.py     writes benchmarks/results/fast_products.json; about a minute

The model has the shape of SmolLM2-135M and random weights. A batch has 16 samples of 24 tokens. Both variants
run in turns on one thread. On a CPU where oneDNN's products are not exact, both are the same.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradpruner.common.provenance import provenance
from gradpruner.models.kernels import fast_products

RESULT = Path(__file__).parent / "results" / "fast_products.json"
SEED, ROUNDS, SAMPLES, TOKENS = 0, 5, 16, 24


def make_model() -> Any:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def timed(work: Callable[[], Any], context: Any) -> float:
    started = time.perf_counter()
    with context:
        work()
    return time.perf_counter() - started


def main() -> None:
    model = make_model()
    ids = torch.randint(3, 49152, (SAMPLES, TOKENS))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    plain = forward()
    with fast_products(model):
        difference = float((forward() - plain).norm() / plain.norm())
    ratios, raw = {}, {}
    for name, work in (("training step", step), ("forward pass", forward)):
        turns = ((nullcontext(), fast_products(model)) for _ in range(ROUNDS + 1))
        pairs = [(timed(work, plainly), timed(work, fast)) for plainly, fast in turns][1:]
        ratios[name] = statistics.median(fast / slow for slow, fast in pairs)
        raw[name] = pairs
    result = {
        "what": "seconds with fast_products, as ratios to plain fp32; medians of pairs",
        "config": {"samples": SAMPLES, "tokens": TOKENS, "rounds": ROUNDS, "threads": 1},
        "ratios": ratios,
        "relative_difference_of_logits": difference,
        "raw": raw,
        "load_average": os.getloadavg(),
        "provenance": provenance(SEED) | {"cpu_capability": torch.backends.cpu.get_cpu_capability()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(ratios, difference)


if __name__ == "__main__":
    main()
