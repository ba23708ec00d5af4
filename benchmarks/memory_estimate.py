"""Memory of fine-tuning as a dry run estimates it, compared with what torch's CPU allocator gave out.

    python benchmarks/memory_estimate.py            writes benchmarks/results/memory_estimate.json
    python benchmarks/memory_estimate.py --quick    a trial with a small model; writes nothing

Every case runs `finetune` for two optimizer steps under torch's memory profiler. The measured peak is the
weights at the start plus the largest sum of all allocations and releases since then. Estimates use shapes
only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from small_llama import config_of, random_samples
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from gradpruner.common.progress import set_mode
from gradpruner.common.provenance import provenance
from gradpruner.data.encoding import Collator
from gradpruner.evaluation.costing.per_device import Training, hold_training
from gradpruner.evaluation.costing.rehearsal import working_bytes
from gradpruner.models.loading import load_model
from gradpruner.models.sizes import build_on_meta, count_parameters
from gradpruner.training.finetuning import finetune

RESULT = Path(__file__).parent / "results" / "memory_estimate.json"
SEED = 0
# Hidden size, MLP channels, layers, query heads, KV heads, vocabulary.
MEDIUM, SMALL = (512, 1408, 6, 8, 4, 8192), (64, 128, 3, 4, 2, 256)
# Name, options of finetune, dtype of the weights.
CASES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("full", {}, "float32"),
    ("full, two passes a step", {"accumulation": 2}, "float32"),
    ("full, gradient checkpointing", {"gradient_checkpointing": True}, "float32"),
    ("full, Adafactor", {"optim": "adafactor"}, "float32"),
    ("full, 8-bit AdamW", {"optim": "adamw_8bit"}, "float32"),
    ("full, bf16 autocast", {"precision": "bf16"}, "float32"),
    ("LoRA", {"mode": "lora"}, "float32"),
    ("LoRA, gradient checkpointing", {"mode": "lora", "gradient_checkpointing": True}, "float32"),
    ("LoRA on bf16 weights, bf16 autocast", {"mode": "lora", "precision": "bf16"}, "bfloat16"),
    ("QLoRA", {"mode": "qlora"}, "float32"),
    ("QLoRA, gradient checkpointing", {"mode": "qlora", "gradient_checkpointing": True}, "float32"),
)


def measured_peak(config: LlamaConfig, options: dict[str, Any], dtype: str, batch: int, tokens: int) -> int:
    torch.manual_seed(SEED)
    model: Any = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if options.get("mode") == "qlora":
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = load_model(folder, dtype=dtype, device="cpu", quantise=True)
    weights = sum(p.nbytes + scales_of(p) for p in model.parameters())
    steps = 2
    samples = random_samples(steps * batch * options.get("accumulation", 1), tokens, config.vocab_size)
    given = {"accumulation": 1, "merge_adapter": False} | options
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        finetune(
            model, samples, collator=Collator(), batch_size=batch, max_steps=steps, batching="padded",
            device="cpu", seed=SEED, save_steps=None, **given,
        )  # fmt: skip
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return int(weights + most)


def scales_of(weight: Any) -> int:
    """Returns the bytes of the scales of a 4-bit weight; 0 for other weights."""
    state = getattr(weight, "quant_state", None)
    return 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes


def estimated(
    config: LlamaConfig, options: dict[str, Any], dtype: str, batch: int, tokens: int
) -> dict[str, Any]:
    training = Training(
        mode=options.get("mode", "full"),
        dtype=getattr(torch, dtype),
        precision=options.get("precision", "fp32"),
        optim=options.get("optim", "adamw_torch_fused"),
        batch_size=batch,
        tokens=tokens,
        head_tokens=tokens - tokens // 2 + 1,
        accumulation=options.get("accumulation", 1),
        checkpointing=options.get("gradient_checkpointing", False),
    )
    model = build_on_meta(config)
    working = working_bytes(model, training, config.num_hidden_layers)
    return replace(hold_training(model, training), working=working).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    set_mode("quiet")
    config = config_of(SMALL if args.quick else MEDIUM)
    batch, tokens = (2, 16) if args.quick else (4, 128)
    rows = []
    for name, options, dtype in CASES:
        row: dict[str, Any] = {"case": name, "options": options, "dtype": dtype}
        row["estimate"] = estimated(config, options, dtype, batch, tokens)
        try:
            row["measured_bytes"] = measured_peak(config, options, dtype, batch, tokens)
            row["ratio"] = round(row["estimate"]["peak"] / row["measured_bytes"], 4)
        except Exception as error:  # e.g. a kernel that this CPU lacks; the row records it
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        rows.append(row)
        print(
            name,
            row.get("ratio", row.get("error")),
            row["estimate"],
            row.get("measured_bytes"),
            file=sys.stderr,
        )
    result = {
        "what": "estimated peak over the peak torch's CPU allocator saw in two steps of fine-tuning",
        "config": {
            "parameters": count_parameters(build_on_meta(config)),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "batch_size": batch,
            "tokens": tokens,
        },
        "rows": rows,
        "provenance": provenance(SEED),
    }
    if not args.quick:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
