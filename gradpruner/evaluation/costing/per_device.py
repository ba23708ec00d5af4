"""Bytes of weights, gradients and optimizer state on each device in training, computed from shapes alone.

No weights are loaded, and the counts are exact. Add the activations of a step, see `rehearsal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradpruner.common.printing import num_bytes
from gradpruner.evaluation.costing.workload import Workload
from gradpruner.models.layers import LayeredModel
from gradpruner.models.sizes import count_parameters, kv_bytes_per_token

STRATEGIES = ("one", "ddp", "fsdp", "zero1", "zero2", "zero3")
# Strategy -> what it shards over the processes.
_SPREAD: dict[str, tuple[str, ...]] = {
    "fsdp": ("weights", "gradients", "optimizer"),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
}
_FLOAT32 = 4
# bitsandbytes stores, for 4-bit weights, a one-byte scale per 64 weights and a float32 scale per 256 of those
# scales. PEFT casts weights that are not quantised to float32.
_ITEM_4BIT = 0.5 + 1 / 64 + _FLOAT32 / (64 * 256)
# 8-bit moments have a float32 scale per 256 entries. Moments of small tensors and embeddings stay in float32.
_BLOCK_8BIT, _SMALLEST_8BIT = 256, 4096
# Part of an optimizer's name -> numbers it keeps per weight; all other optimizers keep two, like AdamW.
_MOMENTS = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
# Bytes per trained weight in DeepSpeed's optimizer: a float32 copy and two moments.
_ZERO_OPTIMIZER = 12


@dataclass(frozen=True)
class Spread:
    """How a model is spread over processes with one device each.

    Attributes:
        strategy: One of `STRATEGIES`; "one" for a single process.
        size: Number of processes.
        offload: Parts kept in host memory; any of "weights", "gradients", "optimizer".
    """

    strategy: str = "one"
    size: int = 1
    offload: tuple[str, ...] = ()

    def share(self, part: str, shape: tuple[int, ...]) -> int:
        """Returns how many entries of a tensor are on the device that holds the most of them."""
        count = math.prod(shape)
        if part in self.offload:
            return 0
        if self.size == 1 or part not in _SPREAD.get(self.strategy, ()):
            return count
        if self.strategy == "fsdp" and shape:  # FSDP2 splits tensors by whole rows
            return math.ceil(shape[0] / self.size) * (count // shape[0])
        return math.ceil(count / self.size)


@dataclass(frozen=True)
class Training:
    """Everything except the model that determines the memory of a training step.

    Attributes:
        mode: "full", "lora", "dora" or "qlora"; "none" if nothing is trained.
        dtype: Dtype the weights are loaded in.
        precision: Autocast precision: "fp32", "bf16" or "fp16".
        optim: Name of the optimizer, as the Trainer takes it.
        rank: LoRA rank.
        batch_size: Samples per forward pass on each device.
        tokens: Tokens per sample.
        head_tokens: Positions of each sample at which logits are computed.
        accumulation: Forward passes per optimizer step.
        checkpointing: Whether activations are recomputed in the backward pass; "offload" also moves the
            saved ones to host memory.
        attn: Attention implementation; None lets transformers choose.
    """

    mode: str = "full"
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    optim: str = "adamw_torch_fused"
    rank: int = 8
    dropout: float = 0.05
    batch_size: int = 8
    tokens: int = 128
    head_tokens: int = 128
    accumulation: int = 1
    checkpointing: bool | str = False
    attn: str | None = None
    spread: Spread = Spread()

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.mode != "none"

    @property
    def refused(self) -> bool:
        """Whether a run refuses this combination: 4-bit weights are not sharded (`check_4bit`)."""
        return self.mode == "qlora" and self.spread.strategy in _SPREAD

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that autocast computes in; None without autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    @property
    def computing_dtype(self) -> torch.dtype:
        """Dtype of the weights during a pass: FSDP2 and DeepSpeed cast them, autocast makes copies."""
        casts = self.spread.strategy in _SPREAD
        return self.autocast_dtype or self.dtype if casts else self.dtype


@dataclass(frozen=True)
class Held:
    """Bytes held on a device; if devices differ, on the one that holds the most.

    Attributes:
        gradients: Gradients of all trained weights.
        optimizer: Moments, and master copies of the weights if the optimizer keeps them.
        exchange: DDP's buckets, or the layers that FSDP holds gathered at a time. DeepSpeed's buffers are not
            counted.
        teacher: Weights of the teacher in distillation.
        working: Activations, or in inference the intermediate tensors of a forward pass; None if unknown.
        cache: Keys and values in inference, or the matrices that a repair sums up.
        accumulates: Whether gradients of earlier passes are held during a forward pass.
        paged: Whether the optimizer state moves to the host if memory runs short.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    exchange: int = 0
    teacher: int = 0
    working: int | None = None
    cache: int = 0
    accumulates: bool = False
    paged: bool = False

    @property
    def certain(self) -> int:
        """Bytes held in any case: weights, gradients, optimizer state and teacher."""
        return self.weights + self.gradients + (0 if self.paged else self.optimizer) + self.teacher

    @property
    def peak(self) -> int:
        """The most bytes held at the same time.

        In a backward pass, gradients appear while activations are freed. With several forward passes per
        step, gradients of earlier passes are held as well.
        """
        working = self.working or 0
        moving = self.gradients + working if self.accumulates else max(self.gradients, working)
        return self.weights + self.optimizer + self.exchange + self.teacher + self.cache + moving

    def to_dict(self) -> dict[str, Any]:
        """Returns the bytes as JSON values."""
        return asdict(self) | {"certain": self.certain, "peak": self.peak}


def memory_table(title: str, rows: Mapping[str, Mapping[str, Any]], most: str = "") -> Table:
    """Returns a table of what a device holds.

    Args:
        title: Shown above the table.
        rows: Name -> values as in `Held.to_dict`, and whether it "fits" if that is known.
        most: Name of the row to stress.
    """
    known = any(held.get("fits") is not None for held in rows.values())
    head = ["memory", "weights", "gradients", "optimizer", "other", "activations", "at most"]
    table = Table(*head, *["fits"] * known, title=escape(title), title_justify="left")
    for name, held in rows.items():
        other = held["exchange"] + held["teacher"] + held["cache"]
        sizes = [held["weights"], held["gradients"], held["optimizer"], other, held["working"], held["peak"]]
        cells = ["?" if size is None else num_bytes(size) for size in sizes]
        fits = ["yes" if held["fits"] else "no"] if known else []
        table.add_row(name, *cells, *fits, style="bold" if name == most else "")
    return table


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor on a device; `itemsize` is the bytes per entry, a fraction if it is quantised."""

    shape: tuple[int, ...]
    itemsize: float
    trained: bool = False
    embedding: bool = False


def hold_training(model: nn.Module, training: Training) -> Held:
    """Returns the bytes that each device holds to train a model, without activations.

    Args:
        model: The whole model on the meta device, without adapters; not changed.
        training: How the model is trained.
    """
    spread, tensors = training.spread, device_tensors(model, training)
    trained = [tensor for tensor in tensors if tensor.trained]
    if spread.strategy.startswith("zero"):
        optimizer = sum(_ZERO_OPTIMIZER * spread.share("optimizer", tensor.shape) for tensor in trained)
    else:
        optimizer = sum(_optimizer_bytes(training.optim, tensor, spread) for tensor in trained)
    gradients = sum(round(spread.share("gradients", tensor.shape) * tensor.itemsize) for tensor in trained)
    return Held(
        weights=sum(round(spread.share("weights", tensor.shape) * tensor.itemsize) for tensor in tensors),
        gradients=gradients,
        optimizer=optimizer,
        exchange=gradients if spread.strategy == "ddp" else _gathered(model, training),
        accumulates=training.accumulation > 1,
        paged="paged" in training.optim,
    )


def device_tensors(model: nn.Module, training: Training) -> list[DeviceTensor]:
    """Returns all tensors of a model in training, including adapters; arguments as for `hold_training`."""
    low = training.precision != "fp32"
    itemsize = training.dtype.itemsize
    if training.spread.strategy.startswith("zero"):  # DeepSpeed casts the model itself
        itemsize = 2 if low else _FLOAT32
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    full = training.mode == "full"
    if full and training.spread.strategy == "fsdp" and low:
        itemsize = _FLOAT32  # accelerate keeps master weights
    quantised = _quantised(model) if training.mode == "qlora" else set()
    found = []
    for weight in model.parameters():
        size: float = itemsize
        if training.mode == "qlora":
            size = _ITEM_4BIT if id(weight) in quantised else _FLOAT32
        found.append(DeviceTensor(tuple(weight.shape), size, full, id(weight) in embeddings))
    return found if full or not training.trains else found + _adapters(model, training)


def adapter_shapes(model: nn.Module, rank: int) -> list[tuple[int, int]]:
    """Returns the shapes of LoRA's A and B for every linear of every decoder layer."""
    view = LayeredModel(model)
    widths = [weight.shape for layer in range(view.num_layers) for weight in view.weights(layer).values()]
    return [shape for out, into in widths for shape in ((rank, into), (out, rank))]


def adapter_parameters(model: nn.Module, rank: int) -> int:
    """Returns the number of parameters of LoRA adapters on every linear of every decoder layer."""
    return sum(map(math.prod, adapter_shapes(model, rank)))


def trace_bytes(model: nn.Module, rank: int, steps: int) -> int:
    """Returns the bytes of recorded gradients: those of A and B at every step, in float32."""
    return _FLOAT32 * steps * adapter_parameters(model, rank)


def held_bytes(model: Any, mode: str, workload: Workload, dtype: torch.dtype) -> int:
    """Returns the minimum bytes that a mode of `gradpruner cost` needs on one device, without activations.

    Args:
        model: The whole model on the meta device.
        mode: One of `workload.MODES`; inference includes the KV cache at its full length.
        workload: What is run.
        dtype: Dtype of the weights.
    """
    cached = 0
    if mode == "inference":
        tokens = workload.batch_size * (workload.tokens + workload.new_tokens - 1)
        cached = tokens * kv_bytes_per_token(model.config, dtype)
    training = Training({"inference": "none"}.get(mode, mode), dtype, rank=workload.rank)
    return hold_training(model, training).certain + cached


def _adapters(model: nn.Module, training: Training) -> list[DeviceTensor]:
    """Returns the adapters' tensors; PEFT keeps them in float32 for a model of any dtype."""
    shapes: list[tuple[int, ...]] = list(adapter_shapes(model, training.rank))
    if training.mode == "dora":
        shapes += [(shape[0],) for shape in shapes[1::2]]  # one magnitude per output
    return [DeviceTensor(shape, _FLOAT32, trained=True) for shape in shapes]


def _quantised(model: Any) -> set[int]:
    """Returns the ids of the weights that bitsandbytes quantises: those of all linears except the head."""
    head = model.get_output_embeddings()
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _gathered(model: Any, training: Training) -> int:
    """Returns the bytes that FSDP holds gathered: two layers (it prefetches one), embeddings and head."""
    if training.spread.strategy != "fsdp":
        return 0
    layers = [count_parameters(layer) for layer in LayeredModel(model).layers]
    outside_layers = count_parameters(model) - sum(layers)
    itemsize = 2 if training.precision != "fp32" else training.dtype.itemsize
    return (sum(sorted(layers)[-2:]) + outside_layers) * itemsize


def _optimizer_bytes(optim: str, tensor: DeviceTensor, spread: Spread) -> int:
    """Returns the bytes of optimizer state for one tensor."""
    name, count, shape = optim.lower(), spread.share("optimizer", tensor.shape), tensor.shape
    if not count:
        return 0
    if "adafactor" in name:
        if len(shape) < 2:
            return _FLOAT32 * (count + 1)
        rows, columns = math.prod(shape[:-1]), math.prod((*shape[:-2], shape[-1]))
        return _FLOAT32 * (math.ceil((rows + columns) * count / math.prod(shape)) + 1)
    moments = next((number for part, number in _MOMENTS.items() if part in name), 2)
    if "8bit" in name:
        if tensor.embedding or count < _SMALLEST_8BIT:
            return moments * _FLOAT32 * count
        return moments * (count + _FLOAT32 * math.ceil(count / _BLOCK_8BIT))
    if any(part in name for part in ("paged", "bnb")):
        return moments * _FLOAT32 * count
    # torch's optimizers keep moments in the weight's dtype, and a step count in float32.
    return moments * round(tensor.itemsize) * count + (_FLOAT32 if moments else 0)
