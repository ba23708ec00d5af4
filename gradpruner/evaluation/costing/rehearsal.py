"""Memory that a forward and backward pass needs on top of the weights, found by rehearsing it without data.

A rehearsal runs the model's own code, with adapters, autocast and recomputation, on torch's fake tensors,
which have a shape but no contents, and counts each storage from its first to its last use. It runs with one
layer and with two: every further layer adds as much as the second.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradpruner.evaluation.costing.per_device import Training
from gradpruner.models.layers import LayeredModel
from gradpruner.training.adapters import attach_lora

log = logging.getLogger(__name__)

_DEPTHS = (1, 2)
_FLOAT32 = 4
# Model -> (training, depths) -> bytes at each depth: a dense and a pruned model, which differ in depth alone,
# are rehearsed once. The weak key lets a model be freed when nothing else holds it.
_REHEARSED: weakref.WeakKeyDictionary[
    nn.Module, dict[tuple[Training, tuple[int, ...]], list[tuple[int, ...]]]
] = weakref.WeakKeyDictionary()


def working_bytes(model: Any, training: Training, layers: int) -> int | None:
    """Returns the peak bytes of a pass on top of the weights and their gradients: the activations.

    Args:
        model: The whole model on the meta device; not changed.
        training: How the model is trained; with mode "none" only a forward pass runs, without a cache.
        layers: Number of layers the model has in the stage in question.

    Returns:
        The bytes; None if the model's pass depends on data, as in mixtures of experts.
    """
    depths = tuple(sorted({min(depth, layers, LayeredModel(model).num_layers) for depth in _DEPTHS}))
    try:
        found = _at_depths(model, training, depths)
    except Exception as error:  # model code raises all kinds of errors on tensors without data
        log.debug("A step of %s cannot be rehearsed without data: %s", type(model).__name__, error)
        return None
    first, last = found[0], found[-1]
    if not training.trains:  # a forward pass keeps nothing from one layer to the next
        return max(last)
    offloaded = 0  # bytes per layer that wait in host memory
    if training.checkpointing == "offload":
        width = int(model.config.get_text_config(decoder=True).hidden_size)
        states = training.batch_size * training.tokens * width
        offloaded = states * (_FLOAT32 if training.mode == "qlora" else training.computing_dtype.itemsize)
    per_layer = [max(0, more - less - offloaded) for less, more in zip(first, last, strict=True)]
    return max(least + slope * (layers - depths[0]) for least, slope in zip(first, per_layer, strict=True))


def _at_depths(model: nn.Module, training: Training, depths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the bytes of `_rehearsed` for the model with only its first layers, at each depth."""
    known = _REHEARSED.setdefault(model, {})
    if (training, depths) not in known:
        known[training, depths] = [
            _rehearsed(LayeredModel(copy.deepcopy(model)).shorten(range(depth)), training) for depth in depths
        ]
    return known[training, depths]


def _rehearsed(model: Any, training: Training) -> tuple[int, ...]:
    """Returns the peak bytes of each part of a pass; changes the model, which is on the meta device."""
    model.to(training.computing_dtype).train(training.trains)
    if training.attn == "eager":
        model.set_attn_implementation("eager")
    torch_log = logging.getLogger(FakeTensorMode.__module__)
    disabled, torch_log.disabled = torch_log.disabled, True  # it prints a traceback for errors that we handle
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if training.trains:
                _prepare(model, training)
            with FakeTensorMode():
                return _peaks_of_a_pass(model, training)
    finally:
        torch_log.disabled = disabled


def _peaks_of_a_pass(model: Any, training: Training) -> tuple[int, ...]:
    """Returns the peak bytes up to the head's gradient, in the layers' backward pass, and after it.

    The last part holds the embedding's gradient and no activations. With few layers it is the largest part,
    but only the other two grow with depth. Must be called inside a FakeTensorMode.
    """
    _replace_with_fakes(model)
    shape, cast = (training.batch_size, training.tokens), training.autocast_dtype
    inputs = torch.zeros(shape, dtype=torch.long)
    labels = inputs[:, : training.head_tokens].flatten()
    live = _LiveBytes(model)
    with live, torch.set_grad_enabled(training.trains):
        with torch.autocast("cpu", cast, enabled=cast is not None):
            hook = model.get_input_embeddings().register_forward_hook(live.watch)
            states = model.base_model(input_ids=inputs, use_cache=False)[0]
            logits = model.get_output_embeddings()(states[:, -training.head_tokens :])
            if training.trains:
                states.register_hook(live.next_part)
            del states
            if training.trains:
                loss = cross_entropy(logits.float().flatten(0, 1), labels)
        del logits
        if training.trains:
            loss.backward()
    hook.remove()
    return tuple(live.peaks)


def _prepare(model: Any, training: Training) -> None:
    """Sets up adapters, trainable weights and recomputation as the Trainer does."""
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


def _replace_with_fakes(model: nn.Module) -> None:
    """Replaces the meta tensors of a model by fake CPU tensors; tied weights stay tied."""

    def forget(weight: nn.Parameter) -> None:
        weight.grad = None  # `per_device` counts gradients of weights

    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in fakes:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                if new.requires_grad:
                    new.register_post_accumulate_grad_hook(forget)
                fakes[id(old)] = new
            module._parameters[name] = fakes[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that were created inside the block and are still in use.

    Attributes:
        now: Bytes at the moment.
        peaks: Peak bytes of each of the three parts of a pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self._part = 0, 0
        self.peaks = [0, 0, 0]
        own = [*model.parameters(), *model.buffers()]
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}

    def next_part(self, _: torch.Tensor) -> None:
        """Begins the next part of the pass; a hook on a gradient."""
        self._part += 1
        self.peaks[self._part] = self.now

    def watch(self, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        """Begins the last part when the embedding's gradient arrives; a forward hook of the embedding."""
        if out.requires_grad:
            out.register_hook(self.next_part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peaks[self._part] = max(self.peaks[self._part], self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
