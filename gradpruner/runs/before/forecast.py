"""An estimate of how long a run takes, before anything is loaded: two layers of the model's widths are timed.

The two layers are Llama layers with random weights, because time depends on shapes and hardly on the family.
The estimate scales with multiply-accumulates per layer, number of layers, and tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradpruner.common.world import this_world
from gradpruner.models.sizes import ModelSizes
from gradpruner.models.walking import BATCH_SIZE
from gradpruner.runs.job.job import REPAIR_PASSES, Job
from gradpruner.training.finetuning import resolve_precision

# Most FLOPs of one trial pass, about a second on one CPU core; larger batches are cut.
_MOST_FLOPS = {"cpu": 3e10}
_MOST_FLOPS_GPU = 3e13
_MOST_PARAMETERS = 50_000_000  # of a trial layer; the widths of larger layers are halved
_LAYERS, _VOCABULARY = 2, 64
_ENOUGH_SECONDS = 0.15  # passes are repeated this long; the fastest counts, as others may use the machine
# Time of a step with adapters against a full step: no gradients of frozen weights, but more small operations.
_LORA = 0.9


@dataclass(frozen=True)
class Forecast:
    """The estimated seconds of a run, by part.

    Attributes:
        record: Recording the first LoRA steps.
        repair: Fitting the repairs of all pruned rows.
        train: Fine-tuning or recovery of all rows.
        evaluate: Evaluations of all rows, before and after fine-tuning.
        basis: How the time was estimated, shown to the user.
    """

    record: float
    repair: float
    train: float
    evaluate: float
    basis: str

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return self.record + self.repair + self.train + self.evaluate


class _Trial:
    """Two layers of the model's widths, to be timed."""

    def __init__(self, job: Job) -> None:
        text, self.device = job.text, torch.device(job.device)
        hidden = int(text.hidden_size)
        heads = max(1, int(getattr(text, "num_attention_heads", None) or hidden // 64))
        inner = _first(getattr(text, "intermediate_size", None)) or 4 * hidden
        while (4 * hidden + 3 * inner) * hidden > _MOST_PARAMETERS:
            hidden, inner = hidden // 2, inner // 2
        hidden -= hidden % (2 * heads) if hidden > 2 * heads else 0
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads if hidden % (2 * heads) == 0 else 1,
            num_hidden_layers=_LAYERS,
            vocab_size=_VOCABULARY,
        )
        with self.device:
            self.model = LlamaForCausalLM(config)
        self.macs = sum(ModelSizes(self.model).layer_macs) / _LAYERS
        kind = resolve_precision(job.recipe.finetune.precision, job.device)
        self.cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
        self.most = _MOST_FLOPS.get(self.device.type, _MOST_FLOPS_GPU)

    def seconds(self, rows: int, length: int, training: bool) -> float:
        """Times a pass of `rows` samples of `length` tokens through one layer; in training, backward too."""
        tokens = rows * length
        allowed = max(16, int(self.most / (6 * _LAYERS * self.macs)))
        length = min(length, allowed)
        rows = max(1, min(rows, allowed // length))
        ids = torch.ones((rows, length), dtype=torch.long, device=self.device)
        spent = [self._once(ids, training) for _ in range(2)]  # the first pass warms up
        while sum(spent) < _ENOUGH_SECONDS and len(spent) < 10:
            spent.append(self._once(ids, training))
        return min(spent) / _LAYERS * tokens / (rows * length)

    def _once(self, ids: torch.Tensor, training: bool) -> float:
        self._wait()
        start = time.perf_counter()
        with (
            torch.set_grad_enabled(training),
            torch.autocast(self.device.type, self.cast, enabled=self.cast is not None),
        ):
            out = self.model(input_ids=ids, labels=ids if training else None, use_cache=False)
        if training:
            out.loss.backward()
        self._wait()
        return time.perf_counter() - start

    def optimizer_seconds(self) -> float:
        """Times one AdamW step; returns seconds per parameter."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates the moments
        self._wait()
        start = time.perf_counter()
        optimizer.step()
        self._wait()
        return (time.perf_counter() - start) / ModelSizes(self.model).parameters

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def forecast(job: Job, done: Collection[str] = ()) -> Forecast:
    """Estimates how long a recipe takes, without the searches of methods and the stages `done` before."""
    recipe, options = job.recipe, job.training
    trial = _Trial(job)
    macs_per_layer = sum(job.sizes.layer_macs) / job.num_layers
    layers = job.num_layers * macs_per_layer / trial.macs  # the model's depth in layers of the trial
    length = max(1, round(sum(job.samples.lengths) / len(job.samples)))
    record = layers * trial.seconds(recipe.record.batch_size, length, True) * job.recorded_steps * _LORA
    one_pass = layers * trial.seconds(options.batch_size, length, True)
    update = trial.optimizer_seconds() * job.sizes.parameters if options.mode == "full" else 0.0
    step = options.accumulation * one_pass * (1.0 if options.mode == "full" else _LORA) + update
    kept = job.num_keep / job.num_layers
    pruned = [name for name in recipe.variants if name != "dense"]
    tuned = recipe.start == "given" or "finetune dense" in done
    dense = 0.0 if tuned else job.finetune_steps * step * ("dense" in recipe.variants)
    steps = job.finetune_steps if recipe.start == "base" else job.recover_steps
    taught = 4 / 3 if recipe.distils else 1.0
    train = dense + len(pruned) * kept * taught * steps * step
    train /= _gpus_of_one_process(job)  # `planned_steps` divides by processes only
    fits = sum(map(job.repairs_of, pruned))
    repair = trial.seconds(BATCH_SIZE, length, False) * job.repair_rows / BATCH_SIZE * REPAIR_PASSES
    answer = max(1, math.ceil(job.samples.supervised_tokens / len(job.samples)))
    batch = min(recipe.evaluate.batch_size, len(job.eval))
    passes = math.ceil(len(job.eval) / batch)
    per_batch = trial.seconds(batch, length, False) + answer * trial.seconds(batch, 1, False)
    times = 2 if recipe.evaluate.before_finetuning and (recipe.start == "base" or steps) else 1
    rows = ("dense" in recipe.variants and "evaluate dense" not in done) + kept * len(pruned)
    return Forecast(
        record=0.0 if not pruned or "record" in done else record,
        repair=layers * repair * fits / this_world().size,
        train=train,
        evaluate=layers * per_batch * passes * times * rows / this_world().size,
        basis=f"two layers of these widths, timed here on {trial.device.type}",
    )


def num_devices(job: Job) -> int:
    """Returns the number of devices that share an optimizer step, each with a batch of its own."""
    return this_world().size * _gpus_of_one_process(job)


def _gpus_of_one_process(job: Job) -> int:
    """How many GPUs the Trainer of one process uses: all of them, or one if there are several processes."""
    if this_world().size > 1 or not job.device.startswith("cuda") or ":" in job.device:
        return 1
    return max(1, torch.cuda.device_count())


def _first(value: Any) -> int | None:
    """The number, or the first of a list of numbers: some families give one for each layer."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return int(value) if isinstance(value, int) else None
