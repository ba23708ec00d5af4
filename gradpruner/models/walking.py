"""Walks: run the decoder layer by layer on the hidden states of samples.

The other inputs of each layer (masks, rotary angles) are recorded once, from the model's own forward pass.
After that, any layer can run on any state: the layers of a dense and a pruned model side by side, or the last
layers without the first. No list says which models can be walked. Every walk is tried on a few samples, where
it must reach the same states as the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradpruner.common.errors import DataError, ModelError, NonFiniteError
from gradpruner.models.layers import LayeredModel
from gradpruner.models.restoring import forwards_set

BATCH_SIZE = 32
PROOF_ROWS = 4
"""How many samples of the first batch a walk is proved on; a batch starts with its longest samples."""
# Both do the same operations on the same values; only the order of sums may differ between kernels.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 3e-2

_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The inputs of a layer other than the hidden state: positional and keyword arguments."""


def sample_batches(
    samples: Sequence[Any], collator: Callable[[Any], dict[str, Tensor]], device: torch.device, size: int
) -> Iterator[dict[str, Tensor]]:
    """Yields padded batches of samples on a device, sorted by length, the longest first.

    Similar lengths need least padding. With the longest first, too little memory shows in the first batch.
    """
    ordered = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
    for start in range(0, len(ordered), size):
        batch = collator(ordered[start : start + size])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def drawn(samples: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Returns at most `count` samples, drawn without replacement.

    Raises:
        DataError: If there are no samples.
    """
    if len(samples) == 0:
        raise DataError("There are no training samples to look at.")
    return [samples[i] for i in random.Random(seed).sample(range(len(samples)), min(count, len(samples)))]


class Walk:
    """Batches of samples, ready to be run through the layers of a model.

    Memory: the hidden states of all tokens that are held, and one mask per batch.

    Args:
        view: The model, in evaluation mode.
        batches: `input_ids`, `attention_mask` (1 for real tokens) and `labels`, padded on the right.

    Attributes:
        start: Per batch, the states that enter layer 0, shape (samples, tokens, hidden).
        counted: Per batch, which tokens count, shape (samples, tokens), bool. Padding does not count, nor
            does the first token of a sample, which attention treats differently.
        tuples: Whether the model's layers return their state in a tuple.

    Raises:
        DataError: If there are no samples, or only samples of one token.
        ModelError: If the layers cannot run one by one because they depend on more than their arguments.
        NonFiniteError: If the states after the last layer are NaN or infinite.
    """

    def __init__(self, view: LayeredModel, batches: Sequence[dict[str, Tensor]]) -> None:
        self.view, self.batches = view, list(batches)
        if not self.batches:
            raise DataError("There are no training samples to look at.")
        self.start: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        self.counted = [_counted(batch) for batch in self.batches]
        if not any(bool(counted.any()) for counted in self.counted):
            raise DataError("Every sample is a single token; at least two are needed.")
        with torch.no_grad():
            self.tuples = self._prove({name: t[:PROOF_ROWS] for name, t in self.batches[0].items()})
            for batch in self.batches:
                self._catch(batch)

    @torch.no_grad()
    def layer(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        """Returns the states after one layer, batch by batch."""
        return [self.layer_on(index, number, state) for number, state in enumerate(states)]

    @torch.no_grad()
    def layer_on(self, index: int, batch: int, state: Tensor) -> Tensor:
        """Returns the states of one batch after one layer."""
        args, kwargs = self._calls[batch][index]
        output = self.view.layers[index](state, *args, **kwargs)
        return _state_of(output)

    def pulled(self, index: int, batch: int, state: Tensor, gradient: Tensor) -> Tensor:
        """Returns the gradient before a layer, given the state before it and the gradient behind it."""
        args, kwargs = self._calls[batch][index]
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            output = _state_of(self.view.layers[index](state, *args, **kwargs))
        return torch.autograd.grad(output, state, gradient)[0]

    def _run(self, batch: dict[str, Tensor]) -> None:
        """Runs the decoder's own forward pass, without the head if the model names its decoder."""
        model: Any = self.view.model
        decoder = getattr(model, model.base_model_prefix, model)
        decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def _catch(self, batch: dict[str, Tensor]) -> None:
        """Records the inputs of all layers for one batch, without running the layers."""
        calls: list[_Call] = []
        start: list[Tensor] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            state, rest, named = _split(args, kwargs)
            start.append(state)
            calls.append((rest, named))
            return (state,) if self.tuples else state

        with forwards_set(list(self.view.layers), [forward] * self.view.num_layers):
            self._run(batch)
        self.start.append(start[0])
        self._calls.append(calls)

    def _prove(self, batch: dict[str, Tensor]) -> bool:
        """Compares a walk with the model's own pass; returns whether the layers return tuples.

        Each layer also runs on other states. If it keeps something for a later layer (shared keys, say), that
        then belongs to the other states, and the walk reaches different states than the model.
        """
        calls, seen = self._watched(batch)
        start, reached = seen["start"], seen["last"]
        mask = batch["attention_mask"].bool()
        expected = reached[mask].float()
        if not bool(torch.isfinite(expected).all()):
            raise NonFiniteError(
                "The model computes NaN or Inf on these samples.",
                hint="The dtype of the model is too narrow: try float32.",
            )
        state, other = start, start.flip(-1)
        for module, (args, kwargs) in zip(self.view.layers, calls, strict=True):
            given = state[mask].clone()
            state, before = _state_of(module(state, *args, **kwargs)), state
            if not torch.equal(before[mask], given):  # the layer has overwritten its input
                raise _cannot_be_walked(self.view)
            other = _state_of(module(other, *args, **kwargs))
        lengths = expected.norm(dim=-1).clamp_min(1e-12)  # per token: some are a thousand times longer
        error = float(((state[mask].float() - expected).norm(dim=-1) / lengths).max())
        if not error <= _TOLERANCE.get(reached.dtype, _COARSE_TOLERANCE):
            raise _cannot_be_walked(self.view)
        return bool(seen["tuple"])

    def _watched(self, batch: dict[str, Tensor]) -> tuple[list[_Call], dict[str, Any]]:
        """Runs the model; returns its layers' other inputs, its first and last state, the kind of output."""
        calls: list[_Call] = []
        seen: dict[str, Any] = {}

        def watched(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                state, rest, named = _split(args, kwargs)
                seen.setdefault("start", state)
                calls.append((rest, named))
                output = original(*args, **kwargs)
                seen["tuple"], seen["last"] = isinstance(output, tuple), _state_of(output)
                return output

            return forward

        layers = list(self.view.layers)
        with forwards_set(layers, [watched(module.forward) for module in layers]):
            self._run(batch)
        if len(calls) != self.view.num_layers or seen["start"].ndim != 3:
            raise _cannot_be_walked(self.view)
        return calls, seen


def _cannot_be_walked(view: LayeredModel) -> ModelError:
    return ModelError(
        f"Layers of {view.config.model_type} models cannot be run one by one: what they compute depends on "
        "more than the hidden state.",
        hint="Repair nothing (plan.repair=none), and use a method that does not run layers one by one.",
    )


def _counted(batch: dict[str, Tensor]) -> Tensor:
    counted = batch["attention_mask"].bool().clone()
    counted[:, 0] = False
    return counted


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _state_of(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state
