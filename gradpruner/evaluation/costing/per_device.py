"""What each device holds in training: weights, gradients and optimizer exactly, from shapes alone.

Nothing is loaded. What a step needs on top for its activations is in `rehearsal`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradpruner.evaluation.costing.workload import Workload
from gradpruner.models.layers import LayeredModel
from gradpruner.models.sizes import count_parameters, decoder_layers, kv_bytes_per_token

STRATEGIES = ("one", "ddp", "fsdp", "zero1", "zero2", "zero3")
# What each strategy spreads over the processes.
_SPREAD: dict[str, tuple[str, ...]] = {
    "fsdp": ("weights", "gradients", "optimizer"),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
}
_FLOAT32 = 4
# bitsandbytes: 4-bit weights have a scale of one byte for 64 of them, and one in float32 for 256 such scales;
# what is not quantised becomes float32 (PEFT's preparation).
_ITEM_4BIT = 0.5 + 1 / 64 + _FLOAT32 / (64 * 256)
# 8-bit moments have a float32 scale for 256; those of small tensors and of embeddings stay in float32.
_BLOCK_8BIT, _SMALLEST_8BIT = 256, 4096
# Numbers an optimizer keeps for each weight, by what its name contains; AdamW's otherwise.
_MOMENTS = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
# DeepSpeed: a float32 copy of every trained weight and two moments.
_ZERO_OPTIMIZER = 12


@dataclass(frozen=True)
class Spread:
    """How a model is spread over processes, each of which has a device.

    Attributes:
        strategy: One of `STRATEGIES`; "one" for a single process.
        size: Number of processes.
        offload: Parts that wait in the memory of the host: of "weights", "gradients", "optimizer".
    """

    strategy: str = "one"
    size: int = 1
    offload: tuple[str, ...] = ()

    def share(self, part: str, shape: tuple[int, ...]) -> int:
        """Entries of a tensor on the device that has most of them."""
        count = math.prod(shape)
        if part in self.offload:
            return 0
        if self.size == 1 or part not in _SPREAD.get(self.strategy, ()):
            return count
        if self.strategy == "fsdp" and shape:  # FSDP2 gives whole rows
            return math.ceil(shape[0] / self.size) * (count // shape[0])
        return math.ceil(count / self.size)


@dataclass(frozen=True)
class Training:
    """Everything but the model that decides how much memory a training step takes.

    Attributes:
        mode: "full", "lora", "dora" or "qlora"; "none" where nothing is trained.
        dtype: Type of the weights as they are loaded.
        precision: Of autocast: "fp32", "bf16" or "fp16".
        optim: The Trainer's name of the optimizer.
        rank: LoRA r.
        batch_size: Samples of a forward pass, on each device.
        tokens: Of each sample.
        head_tokens: Positions of each sample at which logits are computed.
        accumulation: Forward passes of an optimizer step.
        checkpointing: Whether activations are recomputed; "offload" if what is kept waits on the host.
        attn: Attention implementation; None leaves it to transformers.
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
        """Whether a run refuses it, as `training.checks.check_4bit` does: 4-bit weights are not spread."""
        return self.mode == "qlora" and self.spread.strategy in _SPREAD

    @property
    def computing_dtype(self) -> torch.dtype:
        """Type of the weights a pass meets: FSDP2 and DeepSpeed cast them, where autocast keeps copies."""
        casts = self.spread.strategy in _SPREAD
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return low.get(self.precision, self.dtype) if casts else self.dtype


@dataclass(frozen=True)
class Held:
    """Bytes on each device; with several, on the one that holds most.

    Attributes:
        gradients: Of what is trained.
        optimizer: Moments, and master copies where there are some.
        exchange: DDP's buckets, or the layers FSDP has put together at a time. DeepSpeed's are not counted.
        working: Activations, or in inference what a forward pass needs; None where it cannot be told.
        cache: Keys and values in inference, or the sums of a repair.
        accumulates: Whether gradients are there while a forward pass runs.
        paged: Whether the optimizer's part moves to the host where memory runs short.
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
        """Weights, gradients and optimizer: without this nothing runs."""
        return self.weights + self.gradients + (0 if self.paged else self.optimizer) + self.teacher

    @property
    def peak(self) -> int:
        """The most that is held at a time.

        Gradients appear as activations go; with several forward passes a step, those of the passes before
        are there as well.
        """
        working = self.working or 0
        moving = self.gradients + working if self.accumulates else max(self.gradients, working)
        return self.weights + self.optimizer + self.exchange + self.teacher + self.cache + moving

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"certain": self.certain, "peak": self.peak}


@dataclass(frozen=True)
class Piece:
    """A tensor that is held; `itemsize` are the bytes of an entry, a fraction where it is quantised."""

    shape: tuple[int, ...]
    itemsize: float
    trained: bool = False
    embedding: bool = False


def hold_training(model: nn.Module, training: Training) -> Held:
    """What a device holds to train a model, activations apart.

    Args:
        model: The whole model on the meta device, without adapters; only looked at.
        training: How it is trained.
    """
    spread, pieces = training.spread, pieces_of(model, training)
    trained = [piece for piece in pieces if piece.trained]
    if spread.strategy.startswith("zero"):
        optimizer = sum(_ZERO_OPTIMIZER * spread.share("optimizer", piece.shape) for piece in trained)
    else:
        optimizer = sum(_optimizer_bytes(training.optim, piece, spread) for piece in trained)
    gradients = sum(round(spread.share("gradients", piece.shape) * piece.itemsize) for piece in trained)
    return Held(
        weights=sum(round(spread.share("weights", piece.shape) * piece.itemsize) for piece in pieces),
        gradients=gradients,
        optimizer=optimizer,
        exchange=gradients if spread.strategy == "ddp" else _gathered(model, training),
        accumulates=training.accumulation > 1,
        paged="paged" in training.optim,
    )


def pieces_of(model: nn.Module, training: Training) -> list[Piece]:
    """Every tensor of a model as it is trained, adapters included; for arguments see `hold_training`."""
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
        found.append(Piece(tuple(weight.shape), size, full, id(weight) in embeddings))
    return found if full or not training.trains else found + _adapters(model, training)


def adapter_shapes(model: nn.Module, rank: int) -> list[tuple[int, int]]:
    """Shapes of LoRA's A and B on every linear of every decoder layer."""
    view = LayeredModel(model)
    widths = [weight.shape for layer in range(view.num_layers) for weight in view.weights(layer).values()]
    return [shape for out, into in widths for shape in ((rank, into), (out, rank))]


def adapter_parameters(model: nn.Module, rank: int) -> int:
    """Number of parameters of these adapters."""
    return sum(map(math.prod, adapter_shapes(model, rank)))


def trace_bytes(model: nn.Module, rank: int, steps: int) -> int:
    """Bytes of recorded gradients: A's and B's of every step in float32."""
    return _FLOAT32 * steps * adapter_parameters(model, rank)


def held_bytes(model: Any, mode: str, workload: Workload, dtype: torch.dtype) -> int:
    """Bytes one device needs in any case in a mode of `gradpruner cost`; activations come on top.

    The model is a whole one on the meta device. Inference has the cache at its longest.
    """
    cached = 0
    if mode == "inference":
        tokens = workload.batch_size * (workload.tokens + workload.new_tokens - 1)
        cached = tokens * kv_bytes_per_token(model.config, dtype)
    training = Training({"inference": "none"}.get(mode, mode), dtype, rank=workload.rank)
    return hold_training(model, training).certain + cached


def _adapters(model: nn.Module, training: Training) -> list[Piece]:
    """PEFT keeps adapters in float32 whatever the model's type is."""
    shapes: list[tuple[int, ...]] = list(adapter_shapes(model, training.rank))
    if training.mode == "dora":
        shapes += [(shape[0],) for shape in shapes[1::2]]  # a magnitude for every output
    return [Piece(shape, _FLOAT32, trained=True) for shape in shapes]


def _quantised(model: Any) -> set[int]:
    """The weights bitsandbytes quantises: of every linear but the head."""
    head = model.get_output_embeddings()
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _gathered(model: Any, training: Training) -> int:
    """What FSDP has put together at a time: two layers, since the next one is fetched ahead, and the ends."""
    if training.spread.strategy != "fsdp":
        return 0
    layers = [count_parameters(layer) for layer in decoder_layers(model)]
    ends = count_parameters(model) - sum(layers)
    itemsize = 2 if training.precision != "fp32" else training.dtype.itemsize
    return (sum(sorted(layers)[-2:]) + ends) * itemsize


def _optimizer_bytes(optim: str, piece: Piece, spread: Spread) -> int:
    """What an optimizer keeps for one tensor."""
    name, count, shape = optim.lower(), spread.share("optimizer", piece.shape), piece.shape
    if not count:
        return 0
    if "adafactor" in name:
        if len(shape) < 2:
            return _FLOAT32 * (count + 1)
        rows, columns = math.prod(shape[:-1]), math.prod((*shape[:-2], shape[-1]))
        return _FLOAT32 * (math.ceil((rows + columns) * count / math.prod(shape)) + 1)
    moments = next((number for part, number in _MOMENTS.items() if part in name), 2)
    if "8bit" in name:
        if piece.embedding or count < _SMALLEST_8BIT:
            return moments * _FLOAT32 * count
        return moments * (count + _FLOAT32 * math.ceil(count / _BLOCK_8BIT))
    if any(part in name for part in ("paged", "bnb")):
        return moments * _FLOAT32 * count
    # torch's own keep moments in the weight's type, and a float32 step.
    return moments * round(piece.itemsize) * count + (_FLOAT32 if moments else 0)
