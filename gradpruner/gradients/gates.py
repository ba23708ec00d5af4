"""Gates: how much the loss rises when decoder layers are left out, predicted from ordinary backward passes.

Imagine that a gate a_l scales what layer l adds to the hidden state:

    y_l = x_l + a_l (layer_l(x_l) - x_l),    a_l = 1.

The gate gradient g_l = dLoss / da_l is recorded for every example. Setting a_l to 0 leaves the layer out. By
a second-order Taylor expansion, the loss then rises by `-g_l + 1/2 h_ll`, where h_ll is the second derivative
of the loss by a_l. Leaving out a set S of layers raises the loss by

    rise(S) = -sum_l mean(g_l) + 1/2 sum_{l,m} mean(g_l g_m).

Here the second derivatives are replaced by the mean of `g_l g_m` over examples (the empirical Fisher
information).

Shape suffixes: E examples, L decoder layers, S recorded steps, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn

from gradpruner.common.errors import ShapeError
from gradpruner.common.files import save_tensors


@dataclass(frozen=True)
class Gates:
    """Gate gradients of the recorded steps.

    Attributes:
        values_EL: dLoss / da_l of every example, shape (examples, layers), float64, in the order of the
            steps. The mean over the examples of a step is the gradient of that step's loss.
        per_step: Number of examples in every recorded step; the numbers add up to E.

    Raises:
        ShapeError: If `values_EL` does not have one row per example.
    """

    values_EL: Tensor
    per_step: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.values_EL.ndim != 2 or self.values_EL.shape[0] != sum(self.per_step):
            raise ShapeError(
                f"The gates have shape {tuple(self.values_EL.shape)} for steps of {self.per_step} examples; "
                "(examples, layers) is needed."
            )


# --- scores -------------------------------------------------------------------------------------------------


def first_order(gates_EL: Tensor) -> Tensor:
    """Returns `-mean_e g_el`, the first-order rise of the loss when layer l is left out.

    Args:
        gates_EL: Shape (examples, layers).

    Returns:
        Shape (layers,), float64, positive or negative, in units of the loss.
    """
    return -_checked(gates_EL).mean(dim=0)


def second_order(gates_EL: Tensor) -> Tensor:
    """Returns `mean_e g_el**2`, twice the second-order term of the rise when layer l is left out.

    This is the diagonal of the empirical Fisher information of the gates.

    Args:
        gates_EL: Shape (examples, layers).

    Returns:
        Shape (layers,), float64, >= 0.

    Source: Importance Estimation for Neural Network Pruning (Molchanov et al., 2019), with gates on layers.
    """
    return _checked(gates_EL).square().mean(dim=0)


def predicted_rise(gates_EL: Tensor, layers: Iterable[int]) -> float:
    """Returns the rise of the loss when `layers` are left out together.

    The formula is at the top of this module. Its sum over pairs equals the mean of `(sum_l g_l)**2`.
    """
    together_E = _checked(gates_EL)[:, sorted(layers)].sum(dim=1)
    return float(-together_E.mean() + together_E.square().mean() / 2)


def bootstrap(
    values_EL: Tensor, divisor: int, resamples: int, seed: int, at_once: int = 64
) -> tuple[Tensor, Tensor]:
    """Returns the 95 % bootstrap percentile interval of the sum over rows, divided by `divisor`.

    Args:
        values_EL: Shape (rows, layers); a row is an example or a step.
        divisor: Divides the sums; the number of rows gives an interval of the mean.
        resamples: Number of resamples, >= 1.
        seed: Seed of the draws.
        at_once: Resamples drawn at a time. Fewer need less memory when there are many rows.

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
        raise ShapeError(f"The gates have shape {tuple(gates_EL.shape)}; (examples, layers) is needed.")
    return gates_EL.double()


# --- recording ----------------------------------------------------------------------------------------------


class GateHooks:
    """Records the gate gradients of all decoder layers during ordinary backward passes.

    A forward hook on each layer asks autograd for the gradient at the layer's output y. The gate gradient of
    a row is `sum (dL/dy) (y - x)` over its tokens and hidden dimensions, where x is the layer's input. x and
    y are not copied, because autograd keeps them anyway. Products and their sums over the hidden dimension
    are computed in fp32 (fp64 for fp64 models), sums over tokens in fp64. Nothing is recorded without a
    backward pass, for example during evaluation. With activation checkpointing, reentrant or not, a layer
    that is recomputed is recorded only once.

    A row of the batch counts as one example. Samples that share a row (packing, padding-free batches) count
    as one example together.

    With several processes (torch.distributed), all of them must call every `step`. They must be data
    parallel: each process has its own rows and the same layers, and gradients are averaged over processes
    (DDP, FSDP).

    Args:
        layers: The decoder layers, in order. Their first argument is the hidden states, shape (rows, tokens,
            hidden size). They return the new hidden states, alone or as the first entry of a tuple.
        fault: Why nothing can be recorded, if that is already known.

    Attributes:
        fault: Why there are no gates, in words; "" while there are.
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
        """Removes the hooks from the model. Further calls do nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def step(self, loss_scale: float = 1.0) -> Tensor | None:
        """Returns the gates of one optimizer step, from all backward passes since the last call.

        Args:
            loss_scale: Factor of the loss in the backward pass (the scale of an fp16 gradient scaler).

        Returns:
            Shape (rows of all micro-batches and processes, layers), float64, on the CPU. Each row's gradient
            is multiplied by the number of rows, so that the mean over rows is the gradient of the step's
            loss, however the batch was split. None once there is a `fault`.
        """
        rows_EL = self._take()
        parts: list[Tensor | None] = [rows_EL]
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            parts = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, rows_EL)
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            self.fault = self.fault or "another process recorded none"
            return None
        gates_EL = torch.cat(whole)
        return gates_EL * (len(gates_EL) / len(parts) / loss_scale)

    def _take(self) -> Tensor | None:
        """Returns this process's rows since the last call, not yet scaled, and forgets them."""
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
            self.fault = (
                f"layer {layer} does not map hidden states (rows, tokens, hidden size) to the same shape"
            )
            return
        y.register_hook(self._measuring(layer, x, y))

    def _measuring(self, layer: int, x: Tensor, y: Tensor) -> Callable[[Tensor], None]:
        """Returns the hook that records the gate gradients of a layer when the gradient at y arrives."""
        # Detached tensors share memory with x and y. Keeping y itself would create a reference cycle: its
        # graph refers to this hook.
        states = [(x.detach(), y.detach())]
        versions = x._version, y._version

        @torch.no_grad()
        def measure(grad: Tensor) -> None:
            if self.fault:
                return
            if not states:
                self.fault = "one forward pass had two backward passes"
                return
            before, after = states.pop()
            if versions != (before._version, after._version):
                self.fault = f"the hidden states around layer {layer} were changed in place"
                return
            self._rows[layer].append(_gate_gradients(before, after, grad.detach()))

        return measure


def _gate_gradients(x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
    """Returns `sum (dL/dy) (y - x)` of every row, shape (rows,)."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    change = y.to(dtype) - x.to(device=y.device, dtype=dtype)
    wide = torch.float32 if y.device.type == "mps" else torch.float64  # mps has no double precision
    # In two steps, because a single fp64 sum would first copy the whole product to fp64.
    return change.mul_(grad.to(dtype)).sum(dim=2).sum(dim=1, dtype=wide)


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows).cpu().double() if rows else torch.zeros(0, dtype=torch.float64)


def save_gates(path: Path, gates: Gates | None) -> None:
    """Writes the gates of a trace. If `gates` is None, deletes an existing file."""
    if gates is None:
        path.unlink(missing_ok=True)
        return
    steps = torch.tensor(gates.per_step)
    save_tensors(path, {"gates": gates.values_EL, "examples": steps}, {})


def load_gates(path: Path) -> Gates | None:
    """Reads the gates of a trace, or returns None if there is no file.

    Raises:
        ValueError: If the gates are not float64.
    """
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        values_EL, steps = file.get_tensor("gates"), file.get_tensor("examples")
    if values_EL.dtype != torch.float64:
        raise ValueError(f"gates of type {values_EL.dtype}")
    return Gates(values_EL, tuple(map(int, steps)))
