"""Walking: hidden states of samples carried through the decoder one layer at a time.

What goes into a layer beside the hidden state (masks, angles of the positions) is caught once, from the
model's own forward pass. After that any layer can be run on any state: the layers of a dense and a pruned
model side by side, or a suffix without its prefix. Whether a model can be walked is tried, not listed: the
walk must arrive where the model does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.errors import DataError, ModelError
from gradpruner.layered import LayeredModel

BATCH_SIZE = 32
# The same operations on the same numbers: what differs is the order of sums in other kernels.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 3e-2


def sample_batches(
    samples: Sequence[Any], collator: Callable[[Any], dict[str, Tensor]], device: torch.device, size: int
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of samples on a device, alike lengths together, the longest first.

    Alike lengths pad least; with the longest first, too little memory shows in the first batch.
    """
    ordered = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
    for start in range(0, len(ordered), size):
        batch = collator(ordered[start : start + size])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def drawn(samples: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` samples, drawn without repetition.

    Raises:
        DataError: If there are none.
    """
    if len(samples) == 0:
        raise DataError("There are no training samples to look at.")
    return [samples[i] for i in random.Random(seed).sample(range(len(samples)), min(count, len(samples)))]


class Walk:
    """Batches of samples, ready to be taken through a model's layers.

    Memory: the hidden states of all tokens wherever they are held, and one mask per batch.

    Args:
        view: The model, in evaluation mode.
        batches: `input_ids`, `attention_mask` (1 for real tokens) and `labels`, padded on the right.

    Attributes:
        start: Per batch, the states that enter layer 0, shape (samples, tokens, hidden).
        counted: Per batch, which tokens count: real, and not the first of their sample (which attention
            treats apart). Shape (samples, tokens), bool.

    Raises:
        ModelError: If the layers cannot be run one by one: what they compute rests on more than their
            arguments.
    """

    def __init__(self, view: LayeredModel, batches: Sequence[dict[str, Tensor]]) -> None:
        self.view, self.batches = view, list(batches)
        if not self.batches:
            raise DataError("There are no training samples to look at.")
        self.start: list[Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.counted = [_counted(batch) for batch in self.batches]
        with torch.no_grad():
            reached, is_tuple = self._catch_first()
            for batch in self.batches[1:]:
                self._catch(batch, is_tuple)
            self._prove(reached)

    @torch.no_grad()
    def layer(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        """The states after one layer, batch by batch."""
        return [self.layer_on(index, number, state) for number, state in enumerate(states)]

    @torch.no_grad()
    def layer_on(self, index: int, batch: int, state: Tensor) -> Tensor:
        """The states of one batch after one layer."""
        args, kwargs = self._calls[batch][index]
        output = self.view.layers[index](state, *args, **kwargs)
        return _state_of(output)

    @contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        modules = list(self.view.layers)
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        try:
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)

    def _run(self, batch: dict[str, Tensor]) -> None:
        """The model's own forward pass; the head on one position only, for nobody looks at it."""
        model: Any = self.view.model
        decoder = getattr(model, model.base_model_prefix, model)
        decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def _catch_first(self) -> tuple[Tensor, bool]:
        """Calls and states of the first batch, whose layers really run; whether layers return tuples."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
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
            self._run(self.batches[0])
        if len(calls) != self.view.num_layers or seen["start"].ndim != 3:
            raise _cannot(self.view)
        self.start.append(seen["start"])
        self._calls.append(calls)
        return seen["last"], seen["tuple"]

    def _catch(self, batch: dict[str, Tensor], is_tuple: bool) -> None:
        """Calls and first states of a further batch, whose layers need not run for that."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        start: list[Tensor] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            state, rest, named = _split(args, kwargs)
            start.append(state)
            calls.append((rest, named))
            return (state,) if is_tuple else state

        with self._replaced([forward] * self.view.num_layers):
            self._run(batch)
        self.start.append(start[0])
        self._calls.append(calls)

    def _prove(self, reached: Tensor) -> None:
        """The first batch, walked, must come to what the model came to."""
        state = self.start[0]
        for index in range(self.view.num_layers):
            state = self.layer_on(index, 0, state)
        mask = self.batches[0]["attention_mask"].bool()
        found, expected = state[mask].float(), reached[mask].float()
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not error <= _TOLERANCE.get(reached.dtype, _COARSE_TOLERANCE):
            raise _cannot(self.view)


def _cannot(view: LayeredModel) -> ModelError:
    return ModelError(
        f"Layers of {view.config.model_type} models cannot be run one by one: what they compute depends on "
        "more than the hidden state.",
        hint="Use repair: none, and a method that does not need it.",
    )


def _counted(batch: dict[str, Tensor]) -> Tensor:
    counted = batch["attention_mask"].bool().clone()
    counted[:, 0] = False
    if not bool(counted.any()):
        raise DataError("Every sample is a single token; at least two are needed.")
    return counted


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _state_of(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


def output_linear(view: LayeredModel, walk: Walk, layer: int, state: Tensor) -> tuple[str, float]:
    """The linear whose output is added to the residual stream last, and the factor it is added with.

    Found by trial on the first batch: what is added to its output must appear in the layer's output, times
    one factor.

    Args:
        view: The model.
        walk: Samples.
        layer: Which layer.
        state: What enters it, of the first batch.

    Raises:
        ModelError: If there is none: a norm follows it (Gemma 2 and 3, OLMo 2), or it is one of many experts.
    """
    order: list[str] = []
    linears = view.linears(layer)
    width = state.shape[-1]

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, output: order.append(name)

    hooks = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    try:
        plain = walk.layer_on(layer, 0, state)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {name: weight.shape[0] for name, weight in view.weights(layer).items()}
    last = next((name for name in reversed(order) if sizes[name] == width), None)
    if last is not None and not view.family.no_merge:
        factor = _factor(walk, layer, state, plain, linears[last])
        if factor is not None:
            return last, factor
    raise ModelError(
        f"Layer {layer} of a {view.config.model_type} model adds nothing to the residual stream that is the "
        "plain output of one linear (a norm follows it, or it is a mixture of experts).",
        hint="Use plan.repair: none.",
    )


@torch.no_grad()
def _factor(walk: Walk, layer: int, state: Tensor, plain: Tensor, linear: nn.Module) -> float | None:
    """How a change of the linear's output shows in the layer's: its factor; None if not just as one."""
    generator = torch.Generator().manual_seed(0)
    scale = float(plain.float().abs().mean())
    noise = (torch.randn(plain.shape, generator=generator) * scale).to(plain)
    hook = linear.register_forward_hook(lambda module, args, output: output + noise.view_as(output))
    try:
        moved = walk.layer_on(layer, 0, state)
    finally:
        hook.remove()
    mask = walk.batches[0]["attention_mask"].bool()
    given, shown = noise[mask].double(), (moved.double() - plain.double())[mask]
    factor = float((given * shown).sum() / (given * given).sum())
    rest = float((shown - factor * given).norm() / given.norm())
    precise = plain.dtype in _TOLERANCE
    return factor if factor != 0 and rest <= (1e-3 if precise else 5e-2) * abs(factor) else None
