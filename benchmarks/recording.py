"""Time and memory that recording gradients adds to a LoRA training step.

    python benchmarks/recording.py            writes benchmarks/results/recording.json; about four minutes
    python benchmarks/recording.py --quick    a small model; writes nothing

Four variants of the same step (forward, backward, clipping, AdamW) of a Llama with random weights and LoRA on
all its linears:

    plain      records nothing
    recorder   gradpruner.training.recording.GradientRecorder with a folder
    dense      an (out, in) fp32 accumulator of the squared product for every linear
    saved      torch.save of every LoRA gradient at every step, two files per step, as the released code does

Time is reported in two ways. *Inside* is (step + recording) / step, from the seconds spent recording within
one step. For `recorder`, the step waits until its file is on disk, so the background write counts in full,
although training would normally continue meanwhile. *Paired* is the whole step over the plain step of the
same round, as a median over rounds; it contains everything, but is exact only on a quiet machine. The goal is
checked with *inside*.

Memory is measured with each variant in its own process: the rise of the resident set size (RSS) over a few
steps, and the bytes of the tensors kept from one step to the next, computed from their shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradpruner.common.memory import PeakMemory
from gradpruner.common.provenance import provenance
from gradpruner.gradients.trace import LinearRef, factor_file
from gradpruner.training.recording import GradientRecorder, attach_lora, find_lora_linears

RESULT = Path(__file__).parent / "results" / "recording.json"
SEED, RANK = 0, 8
GOAL = 1.01
VARIANTS = ("plain", "recorder", "dense", "saved")
FULL = {"hidden": 1024, "ffn": 2816, "layers": 2, "vocabulary": 2048, "batch": 2, "length": 640}
SMALL = {"hidden": 256, "ffn": 704, "layers": 2, "vocabulary": 512, "batch": 2, "length": 128}
Hook = Callable[[], None]


class Training:
    """A LoRA training that calls a hook before each optimizer step, when gradients are available."""

    def __init__(self, shape: dict[str, int]) -> None:
        torch.manual_seed(SEED)
        config = LlamaConfig(
            hidden_size=shape["hidden"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["hidden"] // 64,
            num_key_value_heads=shape["hidden"] // 256,
            vocab_size=shape["vocabulary"],
        )
        self.model = attach_lora(LlamaForCausalLM(config), rank=RANK)
        self.model.train()
        self.pairs, self.linears = find_lora_linears(self.model)
        self.weights = [weight for pair in self.pairs for weight in pair]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=0.1)
        self.batch = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]))

    def step(self, hook: Hook) -> tuple[float, float]:
        """Runs one step and returns the seconds of the whole step and of the hook."""
        begin = time.perf_counter()
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        before = time.perf_counter()
        hook()
        hook_seconds = time.perf_counter() - before
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin, hook_seconds


def make_hook(variant: str, training: Training, folder: Path, steps: int) -> Hook:
    if variant == "recorder":
        return recorder_hook(training, folder / "trace", steps)
    if variant == "dense":
        return dense_hook(training)
    return saved_hook(training, folder / "saved") if variant == "saved" else lambda: None


def recorder_hook(training: Training, folder: Path, steps: int) -> Hook:
    recorder = GradientRecorder(steps + 1, folder)  # one more step, so that the recording never finishes
    args = SimpleNamespace(max_grad_norm=1.0, seed=SEED)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    recorder.on_train_begin(args, state, None, model=training.model)

    def hook() -> None:
        recorder.on_pre_optimizer_step(args, state, None, optimizer=training.optimizer)
        while not factor_file(folder, state.global_step).exists():
            time.sleep(0.0002)
        state.global_step += 1

    return hook


def dense_hook(training: Training) -> Hook:
    totals = [torch.zeros(ref.out_features, ref.in_features) for ref in training.linears]

    def hook() -> None:
        for total, (weight_a, weight_b) in zip(totals, training.pairs, strict=True):
            total += (weight_b.grad @ weight_a.grad) ** 2

    return hook


def saved_hook(training: Training, folder: Path) -> Hook:
    folder.mkdir(parents=True)
    count = 0

    def hook() -> None:
        nonlocal count
        for which in (0, 1):
            grads = {str(k): pair[which].grad for k, pair in enumerate(training.pairs)}
            torch.save(grads, folder / f"{'AB'[which]}-{count}.pt")
        count += 1

    return hook


def kept_bytes(variant: str, linears: list[LinearRef]) -> int:
    """Returns the most bytes of tensors that a variant holds between steps."""
    if variant == "recorder":  # factors of two steps, and 8 bytes of energy per linear
        sizes = sum(ref.rank * (ref.in_features + ref.out_features) for ref in linears)
        return 2 * 4 * sizes + 8 * len(linears)
    return 4 * sum(ref.out_features * ref.in_features for ref in linears) if variant == "dense" else 0


def measure_time(shape: dict[str, int], rounds: int) -> dict[str, Any]:
    training = Training(shape)
    steps: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        hooks = {variant: make_hook(variant, training, Path(folder), rounds + 1) for variant in VARIANTS}
        for round_ in range(rounds + 1):
            # Rotate the order, so that no variant always follows the same one. Round 0 is warm-up.
            order = VARIANTS[round_ % 4 :] + VARIANTS[: round_ % 4]
            for variant in order:
                seconds = training.step(hooks[variant])
                if round_:
                    steps[variant].append(seconds)
    plain = [total for total, _ in steps["plain"]]
    rows = {}
    for variant, times in steps.items():
        inside = [1 + hook / (total - hook) for total, hook in times]
        paired = [total / base for (total, _), base in zip(times, plain, strict=True)]
        rows[variant] = {
            "inside": summary(inside),
            "paired": summary(paired),
            "step_seconds": summary([total for total, _ in times]),
            "recording_seconds": summary([hook for _, hook in times]),
        }
    return rows


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 5),
        "low": round(min(values), 5),
        "high": round(max(values), 5),
        "values": [round(value, 5) for value in values],
    }


def measure_memory(variant: str, shape: dict[str, int], steps: int) -> dict[str, int]:
    """Returns the memory figures of a variant; must be called in a fresh process."""
    training = Training(shape)
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        hook = make_hook(variant, training, Path(folder), steps)
        for _ in range(steps):
            training.step(hook)
    return {"rise_bytes": memory.rise_bytes, "kept_tensor_bytes": kept_bytes(variant, training.linears)}


def memory_in_fresh_process(variant: str, quick: bool, steps: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory", variant, str(steps)] + ["--quick"] * quick
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    shape = SMALL if quick else FULL
    load_before = os.getloadavg()
    rows = measure_time(shape, rounds)
    for variant in VARIANTS:
        rows[variant]["memory"] = memory_in_fresh_process(variant, quick, steps=4)
    base = rows["plain"]["memory"]["rise_bytes"]
    ratios = {
        variant: {
            "step_time_inside": row["inside"]["median"],
            "step_time_paired": row["paired"]["median"],
            "training_memory": round(row["memory"]["rise_bytes"] / base, 4),
            "kept_tensor_bytes": row["memory"]["kept_tensor_bytes"],
        }
        for variant, row in rows.items()
    }
    return {
        "what": "a LoRA training step with gradients recorded, over the same step without",
        "config": {
            **shape,
            "tokens_per_step": shape["batch"] * shape["length"],
            "rank": RANK,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "dtype": "fp32",
        },
        "goal": {"recorder_step_time_inside_at_most": GOAL},
        "met": ratios["recorder"]["step_time_inside"] <= GOAL,
        "ratios": ratios,
        "raw": rows,
        "provenance": provenance(SEED),
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }


def show(result: dict[str, Any]) -> None:
    print("variant   step time: inside   paired   memory rise   tensors kept")
    for variant, row in result["ratios"].items():
        print(
            f"{variant:9} {row['step_time_inside']:17.4f}x {row['step_time_paired']:7.3f}x"
            f" {row['training_memory']:12.3f}x {row['kept_tensor_bytes'] / 1e6:11.2f} MB"
        )
    print(f"goal: recorder <= {GOAL}x inside; met: {result['met']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model; writes nothing")
    parser.add_argument("--rounds", type=int, default=8, help="steps of every variant")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # variant, steps
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        variant, steps = args.memory
        print(json.dumps(measure_memory(variant, SMALL if args.quick else FULL, int(steps))))
        return
    result = measure(args.quick, args.rounds)
    show(result)
    if not args.quick:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
