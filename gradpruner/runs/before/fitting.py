"""Whether a run fits into memory: what each stage holds on each device, before any model is loaded.

Weights, gradients and optimizer state are known exactly (`costing.per_device`); a run that has no room for
them is refused. Activations are simulated for the dry run (`costing.rehearsal`) and only lead to a warning.
Methods that train by themselves are not counted.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from gradpruner.common.errors import ResourceError
from gradpruner.common.printing import num_bytes
from gradpruner.common.world import this_world
from gradpruner.data.encoding import IGNORED
from gradpruner.evaluation.costing.per_device import Held, Spread, Training, hold_training
from gradpruner.evaluation.costing.rehearsal import working_bytes
from gradpruner.models.layers import LayeredModel
from gradpruner.models.loading import resolve_dtype
from gradpruner.models.sizes import kv_bytes_per_token
from gradpruner.pruning.repair.refitting import num_regressors
from gradpruner.runs.folder.plan_names import STAGES
from gradpruner.runs.job.job import Job
from gradpruner.training.finetuning import resolve_precision
from gradpruner.training.sharding import accelerate_shards
from gradpruner.training.trainer import answer_window

# Generation stops at the length of the longest reference answer and this many more tokens.
_MORE_TOKENS = 2
# Overrides of the recipe that may make a stage fit, cheapest first.
_REMEDIES: tuple[dict[str, Any], ...] = (
    {"finetune.optim": "adamw_8bit"},
    {"finetune.optim": "adafactor"},
    {"finetune.mode": "lora"},
    {"distil.teacher": "none"},
    {"finetune.mode": "lora", "model.dtype": "bfloat16"},
    {"finetune.mode": "qlora", "model.dtype": "bfloat16", "record.adapter": "qlora"},
)


@dataclass(frozen=True)
class Phase:
    """A part of a run that holds a model in memory.

    Attributes:
        name: Shown to the user.
        step: One of `plan_names.STAGES`.
        model: "dense" or "pruned".
        training: How it trains, if it does, and the shape of a batch.
        taught: Whether a teacher is in memory too.
        cache: Further bytes: keys and values, or the sums of a repair.
    """

    name: str
    step: str
    model: str
    training: Training
    taught: bool = False
    cache: int = 0


@dataclass(frozen=True)
class MemoryNeed:
    """What each stage of a run holds in memory.

    Attributes:
        device: Name of the device.
        available: Bytes that one process has on the device.
        spread: How training is spread over processes.
        stages: Name -> what the stage holds.
    """

    device: str
    available: int
    spread: Spread
    stages: dict[str, Held]

    @property
    def peak_stage(self) -> str:
        """The stage that holds most."""
        return max(self.stages, key=lambda name: self.stages[name].peak)

    @property
    def impossible(self) -> list[str]:
        """Stages whose weights, gradients and optimizer state alone exceed the memory."""
        return [name for name, held in self.stages.items() if held.certain > self.available]

    @property
    def tight(self) -> list[str]:
        """Stages that exceed the memory only with their activations."""
        return [name for name, held in self.stages.items() if held.certain <= self.available < held.peak]

    @property
    def warnings(self) -> list[str]:
        """Stages that may not fit after all, as sentences."""
        have = num_bytes(self.available)
        found = [
            f"{name} may need {num_bytes(self.stages[name].peak)} of {have} with its activations: lower the "
            "batch size (and raise finetune.accumulation), or set finetune.gradient_checkpointing=true."
            for name in self.tight
        ]
        unknown = [name for name, held in self.stages.items() if held.working is None]
        if unknown:
            found.append(
                "Activations of this family cannot be estimated without data: add them to the figures above."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "device": self.device,
            "available_bytes": self.available,
            "strategy": self.spread.strategy,
            "processes": self.spread.size,
            "stages": {name: held.to_dict() for name, held in self.stages.items()},
            "peak_stage": self.peak_stage,
            "peak_bytes": self.stages[self.peak_stage].peak,
        }


def memory_need(job: Job, *, rehearse: bool = False, until: str = "report") -> MemoryNeed:
    """Computes what each stage of a run holds on a device.

    `rehearse` also simulates activations, which takes seconds; `until` is the last stage of the run.
    """
    name, available = device_memory(torch.device(job.device))
    # Which layers go is not known yet, but how many.
    pruned = LayeredModel(copy.deepcopy(job.sizes.model)).shorten(job.expected_plan.keep)
    models = {"dense": job.sizes.model, "pruned": pruned}
    held = {
        phase.name: _held(job, phase, models[phase.model], rehearse)
        for phase in _phases(job)
        if STAGES.index(phase.step) <= STAGES.index(until)
    }
    return MemoryNeed(name, available, spread_of(job), held)


def check_memory(job: Job, until: str) -> None:
    """Refuses a run that cannot fit into memory; with `memory: warn` in the recipe, adds a warning instead.

    Raises:
        ResourceError: Names the stage, what it needs, and settings that would fit.
    """
    found = memory_need(job, until=until)
    if not found.impossible:
        return
    fault = fault_of(job, found)
    if job.recipe.memory == "refuse":
        raise fault
    job.warnings.append(str(fault).splitlines()[0])


def fault_of(job: Job, found: MemoryNeed) -> ResourceError:
    """Returns the error for a run that cannot fit into memory."""
    name = max(found.impossible, key=lambda stage: found.stages[stage].certain)
    held = found.stages[name]
    size = found.spread.size
    shared = f" for each of {size} processes ({found.spread.strategy})" if size > 1 else ""
    remedies = [remedy for remedy in _REMEDIES if _helps(job, remedy)][:3]
    fits = [" ".join(f"--set {key}={value}" for key, value in remedy.items()) for remedy in remedies]
    return ResourceError(
        f"{name.capitalize()} needs {num_bytes(held.certain)} for weights, gradients and optimizer alone; "
        f"{found.device} has {num_bytes(found.available)}{shared}.",
        hint=(f"This would fit: {'; or '.join(fits)}. " if fits else "")
        + "Several GPUs share it with torchrun and --set finetune.fsdp=true (`gradpruner cost MODEL "
        "--world-size N --dry-run` shows what fits where). --set memory=warn runs anyway.",
    )


def _helps(job: Job, remedy: dict[str, Any]) -> bool:
    """Whether a run would fit with these keys of its recipe changed."""
    if "qlora" in remedy.values() and Training("qlora", spread=spread_of(job)).refused:
        return False
    changed = copy.copy(job)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in remedy.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed.recipe = job.recipe.with_values(**sections)
    return not memory_need(changed).impossible


def spread_of(job: Job) -> Spread:
    """How training is spread over processes, by the recipe or by accelerate's config."""
    options, size = job.recipe.finetune, this_world().size
    if size == 1:
        return Spread()
    if options.deepspeed:
        return deepspeed_spread(Path(options.deepspeed), size)
    if options.fsdp or accelerate_shards():
        given = options.fsdp if isinstance(options.fsdp, dict) else {}
        offload = given.get("cpu_offload") or given.get("fsdp_cpu_offload")
        return Spread("fsdp", size, ("weights", "gradients", "optimizer") if offload else ())
    return Spread("ddp", size)


def deepspeed_spread(file: Path, size: int) -> Spread:
    """Reads how a DeepSpeed config spreads a model; plain data parallelism if it does not say."""
    try:
        zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
    except (OSError, ValueError, AttributeError, TypeError):
        return Spread("ddp", size)  # the Trainer reports what is wrong with the file
    keys = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    offloaded = tuple(
        part
        for part, key in keys.items()
        if (zero.get(key) or {}).get("device", "none") not in ("none", None)
    )
    return Spread(f"zero{stage}" if 1 <= stage <= 3 else "ddp", size, offloaded)


def device_memory(device: torch.device) -> tuple[str, int]:
    """Returns the name of a device and the bytes of memory that one process has on it."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return facts.name, int(facts.total_memory)
    if device.type == "mps":
        return "this machine's GPU", int(torch.mps.recommended_max_memory())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0) or this_world().size
    return "this machine", host_memory() // max(1, local)


def host_memory() -> int:
    """Returns the bytes of memory of this machine, or of the container this process runs in."""
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return total


def _held(job: Job, phase: Phase, model: nn.Module, rehearse: bool) -> Held:
    """What a phase holds; `rehearse` includes its activations."""
    training = phase.training
    held = replace(hold_training(model, training), cache=phase.cache)
    if phase.taught:
        held = replace(held, teacher=job.sizes.parameters * _loaded(job).itemsize)
    if not rehearse:
        return held
    working = working_bytes(job.sizes.model, training, LayeredModel(model).num_layers)
    if working is not None and phase.taught:  # the teacher's logits, and the gradient of the student's logits
        places = training.batch_size * training.head_tokens
        working += 2 * places * int(job.text.vocab_size) * (2 if training.precision != "fp32" else 4)
    return replace(held, working=working)


def _loaded(job: Job) -> torch.dtype:
    """The dtype of loaded weights that are not trained."""
    return resolve_dtype(job.recipe.model.dtype, torch.device(job.device))


def _phases(job: Job) -> Iterator[Phase]:
    """The phases of a run that hold a model, in order."""
    recipe, dense = job.recipe, "dense" in job.recipe.variants
    pruned = [variant for variant in recipe.variants if variant != "dense"]
    if job.recorded_steps:
        yield Phase("recording", "record", "dense", _recording(job))
    if recipe.plan.repair != "none" and pruned:
        yield Phase("repair", "prune", "dense", _forward_pass(job), cache=_repair_bytes(job))
    tuning = _tuning(job)
    if dense and recipe.start != "given":
        # With start: tuned, the dense model is tuned before anything is recorded.
        yield Phase("fine-tuning dense", "record" if recipe.start == "tuned" else "finetune", "dense", tuning)
    if pruned and recipe.trains_pruned:
        if recipe.distils and recipe.distil.prompts:
            tuning = replace(tuning, head_tokens=tuning.tokens)
        what = "distillation" if recipe.distils else "fine-tuning" if recipe.start == "base" else "recovery"
        yield Phase(f"{what} pruned", "finetune", "pruned", tuning, taught=recipe.distils)
    forward = _forward_pass(job)
    longest = forward.tokens + (recipe.evaluate.max_new_tokens or forward.head_tokens + _MORE_TOKENS)
    cache = forward.batch_size * longest * kv_bytes_per_token(job.config, forward.dtype)
    forward = replace(forward, head_tokens=1)
    yield Phase("evaluation", "evaluate", "dense" if dense else "pruned", forward, cache=cache)


def _recording(job: Job) -> Training:
    """How `record_gradients` trains: padded batches, one per step."""
    options, shared = job.recipe.record, _shared(job)
    if shared["spread"].strategy.startswith("zero"):  # DeepSpeed steps before gradients can be read
        shared["spread"] = Spread("ddp", shared["spread"].size)
    return replace(
        _forward_pass(job, options.batch_size),
        mode=options.adapter.replace("rslora", "lora"),
        rank=options.rank,
        dropout=options.dropout,
        **shared,
    )


def _tuning(job: Job) -> Training:
    """How `finetune` trains."""
    options = job.training
    trains_in_float32 = job.recipe.model.trained_dtype(options.mode) is not None
    return replace(
        _forward_pass(job, options.batch_size, packed=options.batching == "packed"),
        mode=options.mode,
        dtype=torch.float32 if trains_in_float32 else _loaded(job),
        optim=options.optim,
        rank=options.rank,
        dropout=options.dropout,
        accumulation=options.accumulation,
        **_shared(job),
    )


def _shared(job: Job) -> dict[str, Any]:
    """The options that recording and fine-tuning have in common."""
    tuning = job.recipe.finetune
    return {
        "precision": resolve_precision(tuning.precision, job.training.device),
        "checkpointing": tuning.gradient_checkpointing,
        "spread": spread_of(job),
    }


def _forward_pass(job: Job, batch: int | None = None, packed: bool = False) -> Training:
    """A forward pass without training; every process holds the whole model."""
    batch = batch or job.recipe.evaluate.batch_size
    tokens, head = _largest_batch(job, batch, packed)
    attn = job.recipe.model.attn_implementation
    return Training("none", _loaded(job), batch_size=batch, tokens=tokens, head_tokens=head, attn=attn)


def _largest_batch(job: Job, batch_size: int, packed: bool) -> tuple[int, int]:
    """Returns tokens per sample and positions with logits per sample, for a batch of the longest samples."""
    lengths = job.samples.lengths
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:batch_size]
    labels = job.collator([job.samples[i] for i in longest])["labels"]
    if packed:
        learned = int((labels != IGNORED).sum()) + len(longest)
        return math.ceil(sum(lengths[i] for i in longest) / len(longest)), math.ceil(learned / len(longest))
    kept = answer_window(labels).get("logits_to_keep")
    return int(labels.shape[1]), int(labels.shape[1]) if kept is None else len(kept)


def _repair_bytes(job: Job) -> int:
    """Bytes of a repair: hidden states of both models, and four square float64 matrices for one cut."""
    rows = job.repair_rows
    hidden, tokens = int(job.text.hidden_size), sum(job.samples.lengths) / len(job.samples)
    width = num_regressors(job.structure, job.recipe.plan.repair)
    return round(2 * rows * tokens * hidden * _loaded(job).itemsize) + 4 * 8 * width**2
