"""A model that computes with some of its KV groups and MLP channels only, with others in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from gradpruner.common.errors import ModelError
from gradpruner.models.layers import LayeredModel, skeleton
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import ATTENTION, MLP, WidthView

COLUMNS = ("o_proj", "down_proj")


class Usage:
    """Running mean of the absolute input of a linear, one value per entry."""

    def __init__(self, entries: int, device: torch.device) -> None:
        self._sums = torch.zeros(entries, device=device)
        self._tokens = torch.zeros(entries, device=device)

    @torch.no_grad()
    def add(self, inputs: Tensor, kept: Tensor) -> None:
        """Adds the inputs of a forward pass, shape (..., len(kept)), padding included."""
        flat = inputs.detach().flatten(0, -2)
        seen = torch.linalg.vector_norm(flat, ord=1, dim=0, dtype=torch.float32)
        self._sums.index_add_(0, kept, seen)
        self._tokens.index_add_(0, kept, torch.full_like(seen, len(flat)))

    def means(self) -> Tensor:
        """Returns the means, float64, on the CPU; entries never seen get the others' mean, 1 at first."""
        sums, tokens = self._sums.cpu().double(), self._tokens.cpu().double()
        seen = tokens > 0
        found = sums[seen] / tokens[seen]
        means = torch.full_like(sums, float(found.mean()) if len(found) else 1.0)
        means[seen] = found
        return means


class SlicedLayer:
    """The linears of one layer; in training mode they multiply only the kept rows and columns.

    q, k, v, gate and up compute the kept outputs, and o and down read only these; gradients of the rest are
    zero. In LoRA adapters, B is sliced like the rows and A like the columns. In evaluation mode nothing is
    left out.
    """

    def __init__(self, linears: dict[str, Any], num_groups: int) -> None:
        self._kept: dict[str, Tensor] = {}
        self._num_groups = num_groups
        self._patched: list[tuple[nn.Module, Any]] = []
        self.bases = {role: getattr(module, "base_layer", module) for role, module in linears.items()}
        weight = self.bases["down_proj"].weight
        self.usage = {role: Usage(self.bases[role].weight.shape[1], weight.device) for role in COLUMNS}
        for role, module in linears.items():
            adapters = getattr(module, "lora_A" if role in COLUMNS else "lora_B", {})
            for part in (self.bases[role], *adapters.values()):
                self._patch(part, role, part is self.bases[role])

    def keep(self, groups: Tensor | None, channels: Tensor | None) -> None:
        """Sets the KV heads and MLP channels to compute with: ascending, on the CPU; None keeps all."""
        self._kept = {}
        for roles, units, total in (
            (ATTENTION, groups, self._num_groups),
            (MLP, channels, self.bases["down_proj"].in_features),
        ):
            if units is None or len(units) == total:
                continue
            for role in roles:
                weight = self.bases[role].weight
                width = weight.shape[1 if role in COLUMNS else 0] // total
                entries = units[:, None] * width + torch.arange(width)
                self._kept[role] = entries.flatten().to(weight.device)

    def column_norms(self, role: str) -> Tensor:
        """Returns the norm of every column of o_proj or down_proj, without adapters, float64, on the CPU."""
        weight = self.bases[role].weight.detach()
        norms: Tensor = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        return norms.cpu().double()

    def restore(self) -> None:
        """Restores the forward methods of the linears."""
        for module, before in self._patched:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.forward = before
        self._patched, self._kept = [], {}

    def _patch(self, module: Any, role: str, counted: bool) -> None:
        whole = module.forward
        self._patched.append((module, vars(module).get("forward")))

        def forward(inputs: Tensor) -> Any:
            kept = self._kept.get(role)
            if kept is None or not module.training:
                return whole(inputs)
            if role not in COLUMNS:
                bias = None if module.bias is None else module.bias.index_select(0, kept)
                return product(inputs, module.weight.index_select(0, kept), bias)
            if counted:
                self.usage[role].add(inputs, kept)
            return product(inputs, module.weight.index_select(1, kept), module.bias)

        module.forward = forward


class SlicedModel:
    """A causal LM, plain or with LoRA, that can leave out any KV groups and channels while it trains.

    The `forward` methods of its linears are replaced until `restore` is called.

    Attributes:
        units: KV groups and channels, each as (number in a layer, parameters of one).
        decoder_parameters: Parameters of all layers, without adapters.

    Raises:
        ModelError: If heads and channels cannot be told apart, or a linear is quantised or has an adapter
            other than LoRA.
    """

    def __init__(self, model: nn.Module) -> None:
        layered = LayeredModel(model)
        # A skeleton has the same widths and no adapters.
        view = WidthView(skeleton(type(layered.model), layered.model.config))
        self._num_groups, sizes = view.shape.num_kv_heads, view.unit_parameters()
        self.units = [
            (self._num_groups, sizes["group"]), (view.shape.intermediate_size, sizes["channel"])
        ]  # fmt: skip
        self.decoder_parameters = sum(map(count_parameters, view.layered.layers))
        linears = [
            {name.rpartition(".")[2]: module for name, module in layered.linears(i).items()}
            for i in range(layered.num_layers)
        ]
        for layer in linears:
            for module in layer.values():
                check_linear(module)
        self.layers = [SlicedLayer(layer, self._num_groups) for layer in linears]

    def keep(self, groups: Tensor | None, channels: Tensor | None) -> None:
        """Sets the units every layer computes with; shapes (layers, kept), or None for all units."""
        for index, layer in enumerate(self.layers):
            layer.keep(*(None if units is None else units[index] for units in (groups, channels)))

    def importance(self, norms: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns `||column|| * mean|input|` of every KV group (summed over its entries) and every channel.

        `norms` comes from `column_norms`. Shapes (layers, KV heads) and (layers, channels), float64, >= 0.
        """
        found = {
            role: norms[role] * torch.stack([layer.usage[role].means() for layer in self.layers])
            for role in COLUMNS
        }
        groups = found["o_proj"].unflatten(1, (self._num_groups, -1)).sum(-1)
        return groups, found["down_proj"]

    def column_norms(self) -> dict[str, Tensor]:
        """Returns the norms of the columns of o_proj and down_proj, shape (layers, inputs)."""
        return {role: torch.stack([layer.column_norms(role) for layer in self.layers]) for role in COLUMNS}

    def restore(self) -> None:
        """Restores the forward methods of all linears."""
        for layer in self.layers:
            layer.restore()


def check_linear(module: Any) -> None:
    """Raises ModelError for a quantised linear, or one with an adapter other than LoRA."""
    base = getattr(module, "base_layer", module)
    if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
        raise ModelError(
            f"This method leaves out parts of linears, and a quantised {type(base).__name__} cannot be cut.",
            hint="Load the model without quantisation.",
        )
    if base is not module and (not hasattr(module, "lora_A") or getattr(module, "lora_variant", None)):
        raise ModelError(
            f"This method leaves out parts of linears, and {type(module).__name__} adapters cannot be cut.",
            hint="Use plain LoRA or full fine-tuning.",
        )
