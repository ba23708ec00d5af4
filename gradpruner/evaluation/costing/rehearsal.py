"""What a forward and backward pass needs on top of the weights, found by rehearsing it without data.

The model's own code runs, adapters, autocast and recomputation included, on torch's fake tensors, which have
a size and no contents; every storage is counted from its first to its last use. Two depths are rehearsed:
what a layer adds is the same for all further ones.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradpruner.evaluation.costing.per_device import Training
from gradpruner.models.sizes import decoder_layers, keep_layers_
from gradpruner.training.adapters import attach_lora

log = logging.getLogger(__name__)

_DEPTHS = (1, 2)
_FLOAT32 = 4
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def working_bytes(model: Any, training: Training, layers: int) -> int | None:
    """Bytes at the worst moment of a pass, weights and their gradients apart: activations.

    Args:
        model: The whole model on the meta device; only looked at.
        training: How it is trained; with mode "none" the pass goes forward only, without a cache.
        layers: Number of layers it has in that stage.

    Returns:
        The bytes; None where the model's pass depends on data, as with experts.
    """
    depths = sorted({min(depth, layers, len(decoder_layers(model))) for depth in _DEPTHS})
    try:
        found = _at_depths(model, training, tuple(depths))
    except Exception as error:  # an architecture may do anything with data that is not there
        log.debug("A step of %s cannot be rehearsed without data: %s", type(model).__name__, error)
        return None
    first, last = found[0], found[-1]
    if not training.trains:  # nothing is kept from one layer to the next
        return max(last)
    away = 0
    if training.checkpointing == "offload":
        width = int(model.config.get_text_config(decoder=True).hidden_size)
        states = training.batch_size * training.tokens * width
        away = states * (_FLOAT32 if training.mode == "qlora" else training.computing_dtype.itemsize)
    each = [max(0, more - less - away) for less, more in zip(first, last, strict=True)]
    return max(least + slope * (layers - depths[0]) for least, slope in zip(first, each, strict=True))


@lru_cache(maxsize=4)  # the dense and the pruned model differ in depth alone
def _at_depths(model: nn.Module, training: Training, depths: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [_rehearsed(keep_layers_(copy.deepcopy(model), range(depth)), training) for depth in depths]


def _rehearsed(model: Any, training: Training) -> tuple[int, ...]:
    """Bytes at the worst moment of each part of a pass; the model, on the meta device, is changed."""
    model.to(training.computing_dtype)
    if training.attn == "eager":
        model.set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if training.trains:
            _prepare(model, training)
        with FakeTensorMode():
            return _most_in_a_pass(model, training)


def _most_in_a_pass(model: Any, training: Training) -> tuple[int, ...]:
    """The most that is held up to the head's gradient, in the layers' backward pass, and after it.

    The last part has the embedding's gradient and no activations: with few layers it is the largest, and only
    the others grow with depth. To be called where tensors are fake.
    """
    _without_data(model)
    shape, cast = (training.batch_size, training.tokens), _AUTOCAST.get(training.precision)
    inputs = torch.zeros(shape, dtype=torch.long)
    labels = inputs[:, : training.head_tokens].flatten()
    living = _Living(model)
    with living, torch.set_grad_enabled(training.trains):
        with torch.autocast("cpu", cast, enabled=cast is not None):
            entering = model.get_input_embeddings().register_forward_hook(living.watch)
            states = model.base_model(input_ids=inputs, use_cache=False)[0]
            logits = model.get_output_embeddings()(states[:, -training.head_tokens :])
            if training.trains:
                states.register_hook(living.next_part)
            del states
            if training.trains:
                loss = cross_entropy(logits.float().flatten(0, 1), labels)
        del logits
        if training.trains:
            loss.backward()
    entering.remove()
    return tuple(living.most)


def _prepare(model: Any, training: Training) -> None:
    """Adapters, what requires a gradient, and recomputation, as the Trainer has them."""
    if training.mode == "full":
        model.requires_grad_(True)
    else:
        kind = "dora" if training.mode == "dora" else "lora"
        attach_lora(model, rank=training.rank, dropout=training.dropout, adapter=kind)
    if training.mode == "qlora":
        for name, weight in list(model.named_parameters()):
            if not weight.requires_grad and "base_layer" not in name:
                weight.data = weight.data.float()
    if training.checkpointing:
        new = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.23
        enable = new or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train()


def _without_data(model: nn.Module) -> None:
    """Gives a model on the meta device fake tensors of the CPU in place of its own; tied ones stay tied."""

    def forget(weight: nn.Parameter) -> None:
        weight.grad = None  # gradients are counted elsewhere

    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in done:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                if new.requires_grad:
                    new.register_post_accumulate_grad_hook(forget)
                done[id(old)] = new
            module._parameters[name] = done[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Living(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is entered and still in use.

    Attributes:
        now: At the moment.
        most: At the worst one of each of three parts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self._part = 0, 0
        self.most = [0, 0, 0]
        own = [*model.parameters(), *model.buffers()]
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}

    def next_part(self, _: torch.Tensor) -> None:
        """As a hook of a gradient: what follows belongs to the next part."""
        self._part += 1
        self.most[self._part] = self.now

    def watch(self, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        """As a hook of the embedding: the last part begins when its gradient comes."""
        if out.requires_grad:
            out.register_hook(self.next_part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._meet(value.untyped_storage())
        return out

    def _meet(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most[self._part] = max(self.most[self._part], self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
