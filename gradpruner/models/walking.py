"""Walks: run the decoder layer by layer on the hidden states of samples.

The other inputs of each layer (masks, rotary angles) are recorded once, from the model's own forward pass.
After that, any layer can run on any state: the layers of a dense and a pruned model side by side, or the last
layers without the first. No list says which models can be walked. Every walk is tried on a few samples, where
it must reach the same states as the model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.common.errors import DataError, ModelError, NonFiniteError
from gradpruner.models.layers import LayeredModel

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

    @contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        modules = list(self.view.layers)
        own = [module.__dict__.get("forward") for module in modules]  # accelerate, for example, sets one
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        try:
            yield
        finally:
            for module, before in zip(modules, own, strict=True):
                if before is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = before

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

        with self._replaced([forward] * self.view.num_layers):
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

        with self._replaced([watched(module.forward) for module in self.view.layers]):
            self._run(batch)
        if len(calls) != self.view.num_layers or seen["start"].ndim != 3:
            raise _cannot_be_walked(self.view)
        return calls, seen


def _cannot_be_walked(view: LayeredModel) -> ModelError:
    return ModelError(
        f"Layers of {view.config.model_type} models cannot be run one by one: what they compute depends on "
        "more than the hidden state.",
        hint="Use repair: none, and a method that does not run layers one by one.",
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


@dataclass(frozen=True)
class Output:
    """The module whose output a layer adds to the residual stream last.

    Attributes:
        name: Its path inside the layer.
        module: A linear, or a norm that follows the last linear (Gemma 2 and 3, OLMo 2).
        weight: (out_features, in_features) for a linear, (hidden,) for a norm.
        factor: What the output is multiplied by before it is added (not 1 in Granite).
        offset: None for a linear. The output of a norm is x (weight + offset), where x is the normalised
            input; the offset is 0, or 1 if the weight is stored around 0 (Gemma).
    """

    name: str
    module: nn.Module
    weight: Tensor
    factor: float
    offset: float | None = None


@torch.no_grad()
def output_of(view: LayeredModel, walk: Walk, layer: int, state: Tensor) -> Output:
    """Returns the module whose output a layer adds to the residual stream last.

    It is found by trial on the first batch, whose hidden states before the layer are `state`. A change of the
    module's output must appear in the layer's output, times one factor. The last linear is tried first, then
    the last norm.

    Raises:
        ModelError: If there is no such module, or the layers are mixtures of experts.
    """
    linears, norms = _candidates(view, walk, layer, state)
    if not view.family.no_merge:
        plain = walk.layer_on(layer, 0, state)
        for name in (*linears[-1:], *norms[-1:]):
            module = view.layers[layer].get_submodule(name)
            weight = view.weight(layer, name)
            factor = _factor(walk, layer, state, plain, module)
            offset = _offset(walk, layer, state, module) if name in norms else None
            if weight is not None and factor is not None and (name in linears or offset is not None):
                return Output(name, module, weight, factor, offset)
    raise ModelError(
        f"Layer {layer} of a {view.config.model_type} model cannot be repaired: "
        + (
            "it is a mixture of experts."
            if view.family.no_merge
            else "what it adds to the residual stream is not the output of a single linear or norm."
        ),
        hint="Use plan.repair: none.",
    )


def _candidates(
    view: LayeredModel, walk: Walk, layer: int, state: Tensor
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the linears and norms that run once and output vectors of the hidden size, in running order."""
    order: list[str] = []
    width, linears = state.shape[-1], view.linears(layer)
    names = {name: view.weight(layer, name) for name, _ in view.layers[layer].named_modules()}
    found = {name: weight for name, weight in names.items() if weight is not None}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, output: order.append(name)

    with ExitStack() as hooks:
        for name, weight in found.items():
            if weight.shape[0] == width:
                module = view.layers[layer].get_submodule(name)
                hooks.enter_context(module.register_forward_hook(watch(name)))
        walk.layer_on(layer, 0, state)
    once = [name for name in order if order.count(name) == 1]
    return tuple(n for n in once if n in linears), tuple(n for n in once if n not in linears)


def _factor(walk: Walk, layer: int, state: Tensor, plain: Tensor, module: nn.Module) -> float | None:
    """Returns the factor by which a change of a module's output appears in the layer's; None if it does not.

    Only nine tenths of the entries must fit: in 16 bits, rounding in the few channels with massive
    activations is larger than the change.
    """
    generator = torch.Generator().manual_seed(0)
    counted = walk.counted[0]
    scale = float(plain[counted].float().abs().mean())
    noise = (torch.randn(plain.shape, generator=generator) * scale).to(plain)
    fits: list[bool] = []

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        fits.append(output.numel() == noise.numel())
        return output + noise.view_as(output) if fits[-1] else output

    with module.register_forward_hook(move):
        moved = walk.layer_on(layer, 0, state)
    if fits != [True]:
        return None
    given, shown = noise[counted].float().cpu(), (moved.float() - plain.float())[counted].cpu()
    factor = float((given.double() * shown.double()).sum() / given.double().square().sum())
    rest = (shown - factor * given).abs().flatten()
    typical = float(rest.kthvalue(math.ceil(0.9 * rest.numel())).values) / scale
    allowed = 1e-3 if plain.dtype in _TOLERANCE else 5e-2
    if abs(factor - 1) < 1e-3:
        factor = 1.0  # in 16 bits, the estimate is only exact to about four digits
    return factor if abs(factor) > 1e-6 and typical <= allowed * abs(factor) else None


def _offset(walk: Walk, layer: int, state: Tensor, module: nn.Module) -> float | None:
    """Returns what a norm adds to its weight before it multiplies: 0 or 1; None if it does neither."""
    caught: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, args: caught.append(args[0])):
        walk.layer_on(layer, 0, state)
    weight = module.weight
    assert isinstance(weight, Tensor)
    with weight_set(weight, torch.zeros_like(weight)):
        at_zero = module(caught[0])[walk.counted[0]].float()
    with weight_set(weight, torch.ones_like(weight)):
        at_one = module(caught[0])[walk.counted[0]].float()
    size = float(at_one.norm())
    for offset in (0.0, 1.0):
        if size > 0 and float((at_zero * (1 + offset) - at_one * offset).norm()) <= 1e-2 * size:
            return offset
    return None


@contextmanager
def weight_set(weight: Tensor, new: Tensor) -> Iterator[None]:
    """Inside the block, a weight has the values of `new`."""
    original = weight.detach().clone()
    weight.copy_(new)
    try:
        yield
    finally:
        weight.copy_(original)
