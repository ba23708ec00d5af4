"""The fine-tuning users run, one optimizer step at a time.

Apart from `cost_worker`, which needs none of a Trainer's imports for inference: they take memory and seconds.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.evaluation.costing.gate import Gate, random_ids
from gradpruner.evaluation.costing.workload import Workload
from gradpruner.training.finetuning import finetune


class GatedSteps(TrainerCallback):
    """Lets a Trainer do one optimizer step at a time; fetching the batch and logging are not timed."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits; then the step runs: forward, backward, clipping, optimizer."""
        self.gate.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replies with the step's time."""
        self.gate.say(step_seconds=self.gate.seconds())


def measure_training(model: nn.Module, workload: Workload, gate: Gate, *, mode: str) -> tuple[int, str]:
    """Fine-tunes on random samples, a step at every go; returns the peak memory and its kind."""
    learned = workload.learned_tokens or workload.tokens
    samples = []
    for ids in random_ids(model, workload, rows=workload.batch_size * workload.steps):
        samples.append({"input_ids": ids, "labels": [IGNORED] * (workload.tokens - learned) + ids[-learned:]})
    _, result = finetune(
        model,
        samples,
        collator=Collator(),
        mode=mode,
        batch_size=workload.batch_size,
        accumulation=1,
        max_steps=workload.steps,
        seed=workload.seed,
        rank=workload.rank,
        merge_adapter=False,
        callbacks=[GatedSteps(gate)],
        gradient_checkpointing=workload.gradient_checkpointing,
        device="cpu" if gate.device.type == "cpu" else "auto",
    )
    return result.peak_memory_bytes, "cuda" if gate.device.type == "cuda" else "rss"
