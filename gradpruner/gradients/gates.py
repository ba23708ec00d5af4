"""Gates: what leaving a decoder layer out does to the loss, read off the backward passes of a training.

Imagine a gate a_l on what layer l adds to the hidden state,

    y_l = x_l + a_l (layer_l(x_l) - x_l),    a_l = 1,

and g_l = dLoss / da_l is kept for every example. Going from a_l = 1 to 0 leaves the layer out, so the loss is
expected to rise by `-g_l + 1/2 h_ll` for one layer, and for a set S by

    rise(S) = -sum_l mean(g_l) + 1/2 sum_{l,m} mean(g_l g_m),

with the mean over examples of `g_l g_m` in the place of the second derivative (empirical Fisher).

Shape suffixes: E examples, L decoder layers, S recorded steps, B bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn

from gradpruner.common.errors import ConfigError, ShapeError
from gradpruner.common.files import save_tensors

# An exchange must lower the rise by more than rounding can, or two equal sets would be exchanged for ever.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Gates:
    """Gate gradients of the recorded steps.

    Attributes:
        values_EL: dLoss / da_l of every example, shape (examples, layers), float64, in the order of the
            steps; the mean over the examples of one step is the gradient of that step's loss.
        per_step: Examples of every recorded step; their sum is E.

    Raises:
        ShapeError: If the two do not belong together.
    """

    values_EL: Tensor
    per_step: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.values_EL.ndim != 2 or self.values_EL.shape[0] != sum(self.per_step):
            raise ShapeError(
                f"Gates of shape {tuple(self.values_EL.shape)} for steps of {self.per_step} examples; "
                "(examples, layers) is needed."
            )


# --- scores -------------------------------------------------------------------------------------------------


def first_order(gates_EL: Tensor) -> Tensor:
    """`-mean_e g_el`: the rise of the loss when layer l is left out, by the first derivative alone.

    Args:
        gates_EL: Shape (examples, layers).

    Returns:
        Shape (layers,), float64, of either sign, in units of the loss.
    """
    return -_checked(gates_EL).mean(dim=0)


def second_order(gates_EL: Tensor) -> Tensor:
    """`mean_e g_el**2`: twice the second-order rise of the loss when layer l is left out.

    It is the diagonal of the empirical Fisher information of the gates.

    Args:
        gates_EL: Shape (examples, layers).

    Returns:
        Shape (layers,), float64, >= 0.

    Source: Importance Estimation for Neural Network Pruning (Molchanov et al., 2019), gates on whole layers.
    """
    return _checked(gates_EL).square().mean(dim=0)


def predicted_rise(gates_EL: Tensor, layers: Iterable[int]) -> float:
    """Rise of the loss when `layers` are left out together: `-sum mean(g_l) + 1/2 sum mean(g_l g_m)`.

    The pairs come to half the mean over examples of `(sum_l g_l)**2`.
    """
    together_E = _checked(gates_EL)[:, sorted(layers)].sum(dim=1)
    return float(-together_E.mean() + together_E.square().mean() / 2)


def choose_pairwise(gates_EL: Tensor, num_prune: int, candidates: Collection[int] | None = None) -> list[int]:
    """The layers that, left out together, are predicted to raise the loss least.

    The search starts once from every candidate. It adds the layer that raises the prediction least until
    there are enough; then it exchanges one chosen layer for another, always the pair that lowers the
    prediction most, until no exchange helps. The best result of all starts is returned. No single exchange
    improves it; it is likely, not certain, to be the best of all sets. Of equal choices the later layer goes.

    Args:
        gates_EL: Shape (examples, layers).
        num_prune: Layers to choose, 0 <= num_prune <= number of candidates.
        candidates: Layers that may be chosen; all when None.

    Returns:
        The chosen layers, ascending.

    Raises:
        ConfigError: If there are fewer candidates than layers to choose.
    """
    gates_EL = _checked(gates_EL)
    free = sorted(range(gates_EL.shape[1]) if candidates is None else set(candidates), reverse=True)
    if not 0 <= num_prune <= len(free):
        raise ConfigError(f"{num_prune} layers cannot be chosen from {len(free)} candidates.")
    mean_L = gates_EL.mean(dim=0)
    fisher_LL = gates_EL.T @ gates_EL / gates_EL.shape[0]
    best: list[int] = []
    lowest = math.inf
    tolerance = _ROUNDING * float(mean_L.abs().max() + fisher_LL.abs().max())
    for first in free if num_prune else ():
        chosen = _search(mean_L, fisher_LL, free, first, num_prune)
        rise = float(-mean_L[chosen].sum() + fisher_LL[chosen][:, chosen].sum() / 2)
        if rise < lowest - tolerance:
            best, lowest = chosen, rise
    return sorted(best)


def _search(mean_L: Tensor, fisher_LL: Tensor, free: list[int], first: int, num_prune: int) -> list[int]:
    """Grows a set from `first`, then exchanges layers until no exchange helps."""
    chosen = [first]
    while len(chosen) < num_prune:
        added_L = -mean_L + fisher_LL.diagonal() / 2 + fisher_LL[:, chosen].sum(dim=1)
        left = [layer for layer in free if layer not in chosen]
        chosen.append(left[int(added_L[left].argmin())])  # of equal ones the first, which is the latest
    while (swap := _best_swap(mean_L, fisher_LL, chosen, free)) is not None:
        chosen[chosen.index(swap[0])] = swap[1]
    return chosen


def _best_swap(
    mean_L: Tensor, fisher_LL: Tensor, chosen: list[int], free: list[int]
) -> tuple[int, int] | None:
    """The exchange (out of the set, into the set) that lowers the predicted rise most; None: none does."""
    inside, outside = sorted(chosen), [layer for layer in free if layer not in chosen]
    if not inside or not outside:
        return None
    slope_L = -mean_L + fisher_LL[:, inside].sum(dim=1)  # derivative of the rise, per layer left out
    half_L = fisher_LL.diagonal() / 2
    change = (slope_L + half_L)[outside] - (slope_L - half_L)[inside][:, None]
    change = change - fisher_LL[inside][:, outside]
    best = int(change.argmin())  # of equal ones the first: the earliest comes back, the latest goes
    scale = float(mean_L.abs().max() + fisher_LL.abs().max())
    if float(change.flatten()[best]) >= -_ROUNDING * scale:
        return None
    return inside[best // len(outside)], outside[best % len(outside)]


def bootstrap(
    values_EL: Tensor, divisor: int, resamples: int, seed: int, at_once: int = 64
) -> tuple[Tensor, Tensor]:
    """95 % percentile interval of a sum over rows drawn with replacement, divided by `divisor`.

    Args:
        values_EL: Shape (rows, layers), a row for an example or a step.
        divisor: The number of rows gives an interval of the mean.
        resamples: Number of resamples, >= 1.
        seed: Seeds the draws.
        at_once: Resamples held in memory at a time; with many rows, drawn indices are large.

    Returns:
        Lower and upper ends, each of shape (layers,), float64.
    """
    examples = values_EL.shape[0]
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn_BE = torch.randint(examples, (size, examples), generator=generator)
        counts_BE = torch.zeros(size, examples, dtype=torch.float64)
        counts_BE.scatter_add_(1, drawn_BE, torch.ones(size, examples, dtype=torch.float64))
        sums.append(counts_BE @ values_EL.double() / divisor)
    ends = torch.quantile(torch.cat(sums), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return ends[0], ends[1]


def _checked(gates_EL: Tensor) -> Tensor:
    if gates_EL.ndim != 2 or 0 in gates_EL.shape:
        raise ShapeError(f"Gates of shape {tuple(gates_EL.shape)}; (examples, layers) is needed.")
    return gates_EL.double()


# --- recording ----------------------------------------------------------------------------------------------


class GateHooks:
    """Measures the gates of every decoder layer during ordinary backward passes.

    A forward hook on a layer asks autograd for the gradient at the layer's output y. When it arrives,
    `sum (dL/dy) (y - x)` over the tokens and hidden dimensions of a row is that row's gate gradient. x and y
    are not copied: autograd holds them anyway. Products and their sums over the hidden dimension are formed
    in fp32 (fp64 for fp64 models), sums over tokens in fp64. Nothing is measured where no gradient flows,
    such as in an evaluation. With activations checkpointed, recomputing a layer measures nothing a second
    time, reentrant or not.

    A row of the batch counts as one example; where several samples share a row (packing, padding-free
    batches) they count as one together.

    With several processes (torch.distributed) every one must take part in every `step`. Data parallelism is
    assumed: each has rows of its own and the same layers, and gradients are averaged over processes
    (DDP, FSDP).

    Args:
        layers: The decoder layers, in order. Their first argument is hidden states of shape (rows, tokens,
            hidden size), which they return alone or first in a tuple.
        fault: Why nothing can be measured, when known beforehand.

    Attributes:
        fault: Why there are no gates, in words; "" as long as there are.
    """

    def __init__(self, layers: Iterable[nn.Module], fault: str = "") -> None:
        self.fault = fault
        modules = [] if fault else list(layers)
        self._rows: list[list[Tensor]] = [[] for _ in modules]
        self._handles = [
            module.register_forward_hook(partial(self._watch, layer), with_kwargs=True)
            for layer, module in enumerate(modules)
        ]

    def close(self) -> None:
        """Takes the hooks off the model; nothing the second time."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def step(self, loss_scale: float = 1.0) -> Tensor | None:
        """The gates of one optimizer step: of all backward passes since the last call.

        Args:
            loss_scale: What the loss was multiplied with before the backward pass (fp16 scaler).

        Returns:
            Shape (rows of all micro-batches and processes, layers), float64, on the CPU. A row's gradient is
            multiplied by the number of rows, so that the mean over rows is the gradient of the step's loss,
            however the batch was split. None once there is a `fault`.
        """
        rows_EL = self._take()
        parts: list[Tensor | None] = [rows_EL]
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            parts = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, rows_EL)
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            self.fault = self.fault or "another process has none"
            return None
        gates_EL = torch.cat(whole)
        return gates_EL * (len(gates_EL) / len(parts) / loss_scale)

    def _take(self) -> Tensor | None:
        """This process's rows since the last call, as autograd had them."""
        taken, self._rows = self._rows, [[] for _ in self._rows]
        if not self.fault and len({tuple(map(len, rows)) for rows in taken}) > 1:
            self.fault = "not every layer ran as often as the others"
        if self.fault or not taken:
            return None
        return torch.stack([_joined(rows) for rows in taken], dim=1)

    def _watch(self, layer: int, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if self.fault or not y.requires_grad:
            return
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.shape != y.shape or y.ndim != 3:
            self.fault = f"layer {layer} does not go from one (rows, tokens, hidden size) state to the next"
            return
        y.register_hook(self._measuring(layer, x, y))

    def _measuring(self, layer: int, x: Tensor, y: Tensor) -> Callable[[Tensor], None]:
        # Detached views share memory, and unlike y itself do not hold the graph that holds this function.
        states = [(x.detach(), y.detach())]
        versions = x._version, y._version

        @torch.no_grad()
        def measure(grad: Tensor) -> None:
            if self.fault:
                return
            if not states:
                self.fault = "one forward pass was gone through backwards twice"
                return
            before, after = states.pop()
            if versions != (before._version, after._version):
                self.fault = f"the states around layer {layer} were overwritten in place"
                return
            self._rows[layer].append(_gate_gradients(before, after, grad.detach()))

        return measure


def _gate_gradients(x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
    """`sum (dL/dy) (y - x)` of every row, shape (rows,)."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    change = y.to(dtype) - x.to(device=y.device, dtype=dtype)
    wide = torch.float32 if y.device.type == "mps" else torch.float64  # mps has no double precision
    # In two steps, because a sum in fp64 over everything would first make an fp64 copy of it.
    return change.mul_(grad.to(dtype)).sum(dim=2).sum(dim=1, dtype=wide)


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows).cpu().double() if rows else torch.zeros(0, dtype=torch.float64)


def save_gates(path: Path, gates: Gates | None) -> None:
    """Writes the gates of a trace; without any, none are left there."""
    if gates is None:
        path.unlink(missing_ok=True)
        return
    steps = torch.tensor(gates.per_step)
    save_tensors(path, {"gates": gates.values_EL, "examples": steps}, {})


def load_gates(path: Path) -> Gates | None:
    """The gates of a trace; None where none were recorded."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        values_EL, steps = file.get_tensor("gates"), file.get_tensor("examples")
    if values_EL.dtype != torch.float64:
        raise ValueError(f"gates of type {values_EL.dtype}")
    return Gates(values_EL, tuple(map(int, steps)))
