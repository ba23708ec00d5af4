"""Salience of heads and channels: the change of the loss without them, by a Taylor expansion in the weights.

The gradients of all weights are never in memory at once: the backward pass reduces each to one number per row
or column and frees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gradpruner.common.progress import Progress
from gradpruner.gradients.importance import row_blocks
from gradpruner.methods.width_choice import BY_ROW, UnitScores, unit_scores
from gradpruner.models.widths import WidthView

Batch = dict[str, Tensor]


class TaylorSalience:
    """Salience of the heads and channels of some layers.

    The salience of a weight w is |w g| (`param_first`), |w a w| (`param_second`), or |w g - 0.5 w a w|
    (`param_mix`), where g is the gradient of the mean loss of all samples and a the mean over samples of the
    squared gradient of one sample's loss. The salience of a unit is the sum over its rows and columns; biases
    of a unit count as another column.

    `param_first` takes one pass over all samples. `param_second` takes one pass per sample: w a w is the mean
    of (w g)**2, so `a` is not stored. Beyond the model and the activations of a pass, both hold the gradient
    of one linear only, at any depth. In `param_mix` the absolute value is taken after the sum over samples,
    so all of `a` is needed, in fp32. It is computed for `layers_at_once` layers at a time, with a pass per
    sample and one over all samples.
    """

    def __init__(self, view: WidthView, taylor: str, layers_at_once: int = 1) -> None:
        self.view, self.taylor, self.layers_at_once = view, taylor, layers_at_once
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._squares: dict[int, Tensor] = {}

    def measure(self, layers: Sequence[int], batch: Batch, singles: Sequence[Batch]) -> list[UnitScores]:
        """Returns the salience of the units of each layer, in the order of `layers`.

        Args:
            layers: Layers to measure.
            batch: All samples, with labels.
            singles: Each sample as a batch of its own.

        Raises:
            NonFiniteError: If a gradient is NaN or infinite.
        """
        self._sums.clear()
        size = self.layers_at_once if self.taylor == "param_mix" else max(1, len(layers))
        slices = [layers[start : start + size] for start in range(0, len(layers), size)]
        passes = {"param_first": 1, "param_second": len(singles), "param_mix": len(singles) + 1}
        with Progress(passes[self.taylor] * len(slices), "measure gradients") as progress:
            for some in slices:
                if self.taylor != "param_first":
                    add = self._add_squares if self.taylor == "param_mix" else self._add_second
                    hook = partial(add, share=1 / len(singles))
                    for single in singles:
                        self._backward(some, hook, single)
                        progress.advance()
                if self.taylor != "param_second":
                    self._backward(some, self._add_mixed, batch)
                    progress.advance()
                self._squares.clear()
        shape = self.view.shape
        found = [unit_scores(shape, {n: v for (i, n), v in self._sums.items() if i == k}) for k in layers]
        self._sums.clear()
        return found

    def _backward(self, layers: Sequence[int], hook: Callable[..., None], batch: Batch) -> None:
        """Runs one forward and backward pass; the gradient of every weight of the layers goes to the hook."""
        with gradients_through(self.view, layers, hook):
            self.view.model(**batch, use_cache=False).loss.backward()

    def _add_mixed(self, weight: nn.Parameter, layer: int, name: str) -> None:
        squares = self._squares.pop(id(weight), None)
        self._add(weight, layer, name, _mixed, squares)

    def _add_second(self, weight: nn.Parameter, layer: int, name: str, share: float) -> None:
        self._add(weight, layer, name, lambda w, g, _: (w * g).square() * share)

    def _add_squares(self, weight: nn.Parameter, layer: int, name: str, share: float) -> None:
        assert weight.grad is not None
        if id(weight) not in self._squares:
            self._squares[id(weight)] = torch.zeros_like(weight, dtype=torch.float32)
        squares, grad = _matrix(self._squares[id(weight)]), _matrix(weight.grad)
        for start, stop in row_blocks(*grad.shape):
            part = grad[start:stop].float()
            squares[start:stop].addcmul_(part, part, value=share)

    def _add(
        self,
        weight: nn.Parameter,
        layer: int,
        name: str,
        salience: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        squares: Tensor | None = None,
    ) -> None:
        """Adds the sums of |salience| over a weight's other axis; in fp32, in blocks of rows."""
        assert weight.grad is not None
        values, grad = _matrix(weight.detach()), _matrix(weight.grad)
        by_row = name in BY_ROW
        total = self._sums.get((layer, name))
        if total is None:
            total = values.new_zeros(values.shape[0 if by_row else 1], dtype=torch.float32)
            self._sums[layer, name] = total
        for start, stop in row_blocks(*values.shape):
            extra = None if squares is None else _matrix(squares)[start:stop]
            found = salience(values[start:stop].float(), grad[start:stop].float(), extra).abs()
            if by_row:
                total[start:stop] += found.sum(dim=1)
            else:
                total += found.sum(dim=0)


def _mixed(w: Tensor, g: Tensor, a: Tensor | None) -> Tensor:
    """Returns the expansion to first order, or to second order if `a` is given."""
    return w * g if a is None else w * g - 0.5 * w * a * w


def _matrix(values: Tensor) -> Tensor:
    """Returns a bias as a matrix of one column."""
    return values if values.ndim == 2 else values[:, None]


@contextmanager
def gradients_through(view: WidthView, layers: Sequence[int], hook: Callable[..., None]) -> Iterator[None]:
    """Inside the block, backward passes give the gradients of some layers' linears to a hook and free them.

    No other parameter requires gradients in the block, so a backward pass ends at the first of the layers.
    Afterwards `requires_grad` and `grad` of all parameters are as before. The hook is called with a parameter
    that has a gradient, its layer and the role of its linear; with a bias only if it belongs to heads or
    channels.
    """
    before = [(p, p.requires_grad, p.grad) for p in view.model.parameters()]
    handles = []

    def receive(parameter: Tensor, layer: int, name: str) -> None:
        with torch.no_grad():
            hook(parameter, layer, name)
        parameter.grad = None

    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in layers:
            for name, linear in vars(view.parts(layer)).items():
                for parameter in linear.parameters():
                    if parameter.ndim == 2 or name in BY_ROW:
                        parameter.requires_grad_(True)
                        receiver = partial(receive, layer=layer, name=name)
                        handles.append(parameter.register_post_accumulate_grad_hook(receiver))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed, grad in before:
            parameter.requires_grad_(needed)
            parameter.grad = grad
