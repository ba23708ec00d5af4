"""Time of a training step with logits for answer tokens only, and with bf16 on a CPU that emulates it.

    python benchmarks/training_step.py     writes benchmarks/results/training_step.json; about 3 minutes

Both are ratios to the plain fp32 step of the same run. The model is a Llama of the size in the real-task
benchmark (16 layers, hidden size 192, vocabulary 8,192, random weights). A batch has 32 samples of 48 tokens,
of which the last 4 carry loss. The variants run in turns on one thread. Timed are forward, backward and the
fused AdamW step.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradpruner.common.provenance import provenance
from gradpruner.data.encoding import IGNORED
from gradpruner.training.trainer import answer_window

RESULT = Path(__file__).parent / "results" / "training_step.json"
SEED, ROUNDS, SAMPLES, TOKENS, LEARNED = 0, 5, 32, 48, 4


def build_step(*, dtype: torch.dtype, windowed: bool) -> Callable[[], float]:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(3, 8192, (SAMPLES, TOKENS))
    labels = ids.clone()
    labels[:, :-LEARNED] = IGNORED
    extra = answer_window(labels) if windowed else {"labels": labels}

    def step() -> float:
        started = time.perf_counter()
        loss = model(input_ids=ids, use_cache=False, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    plain = build_step(dtype=torch.float32, windowed=False)
    windowed = build_step(dtype=torch.float32, windowed=True)
    bf16 = build_step(dtype=torch.bfloat16, windowed=False)
    plain(), windowed()
    pairs = [(plain(), windowed()) for _ in range(ROUNDS)]
    slow = [bf16() / plain() for _ in range(2)]
    result = {
        "what": "seconds of one training step, as ratios to the plain fp32 step",
        "config": {"samples": SAMPLES, "tokens": TOKENS, "learned": LEARNED, "rounds": ROUNDS, "threads": 1},
        "ratios": {
            "answer_window": statistics.median(after / before for before, after in pairs),
            "bf16": statistics.median(slow),
        },
        "raw": {"plain_and_windowed_seconds": pairs, "bf16_ratios": slow},
        "load_average": os.getloadavg(),
        "provenance": provenance(SEED) | {"cpu_capability": torch.backends.cpu.get_cpu_capability()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result["ratios"])


if __name__ == "__main__":
    main()
