"""WidthPlan: which heads, channels and hidden dimensions stay, decided before any weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from gradpruner.common.errors import PlanError
from gradpruner.common.printing import print_table, runs_of, shown
from gradpruner.plans.base import FORMAT_VERSION, BasePlan

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class WidthShape:
    """The widths of a dense decoder, the same in every layer.

    Attributes:
        num_layers: Number of decoder layers.
        hidden_size: Dimensions of the hidden state.
        num_heads: Query heads per layer.
        num_kv_heads: Key/value heads per layer. Query heads g*q to g*q+q-1 belong to KV head g, where q is
            `num_heads / num_kv_heads` (as in transformers' `repeat_kv`).
        head_dim: Dimensions of a head.
        intermediate_size: MLP channels per layer.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(
                    f"shape.{entry.name} is {shown(value)}; a whole number of 1 or more is needed."
                )
        if self.num_heads % self.num_kv_heads:
            raise PlanError(
                f"{self.num_heads} query heads cannot be divided evenly among {self.num_kv_heads} KV heads."
            )

    @property
    def group_size(self) -> int:
        """Number of query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def group(self, kv_head: int) -> tuple[int, ...]:
        """Returns the query heads of a KV head."""
        return tuple(range(kv_head * self.group_size, (kv_head + 1) * self.group_size))

    def heads_of(self, kv_heads: Sequence[int]) -> tuple[int, ...]:
        """Returns the query heads of several KV heads."""
        return tuple(head for kv_head in kv_heads for head in self.group(kv_head))


@dataclass(frozen=True)
class LayerWidths:
    """What stays of one layer.

    Attributes:
        heads: Kept query heads, ascending, numbered as in the dense model. A KV head stays if any of its
            query heads does. All KV heads that stay must keep the same number of query heads.
        channels: Kept MLP channels, ascending.
    """

    heads: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class WidthPlan(BasePlan):
    """What stays of every layer, and of the hidden state that all layers share.

    Attributes:
        shape: The widths of the dense model.
        layers: What stays of each decoder layer.
        hidden: Kept hidden dimensions, ascending; all of them if the hidden state is not pruned.
        method: The method that made the plan, or "explicit".
        evidence: What the choice is based on, as JSON values; "model" is the model's fingerprint, if known.
    """

    shape: WidthShape
    layers: tuple[LayerWidths, ...]
    hidden: tuple[int, ...]
    method: str = "explicit"
    evidence: dict[str, Any] = field(default_factory=dict)
    title: ClassVar[str] = "width plan"
    json_fields: ClassVar = ("format_version", "kind", "shape", "layers", "hidden", "method", "evidence")
    kind: ClassVar[Literal["width"]] = "width"

    def __post_init__(self) -> None:
        shape = self.shape
        super().__post_init__()
        if len(self.layers) != shape.num_layers:
            raise PlanError(f"The plan has {len(self.layers)} layers; its shape says {shape.num_layers}.")
        _check_kept(self.hidden, shape.hidden_size, "hidden")
        for layer, widths in enumerate(self.layers):
            _check_kept(widths.heads, shape.num_heads, f"layer {layer}: heads")
            _check_kept(widths.channels, shape.intermediate_size, f"layer {layer}: channels")
            sizes = {len(set(widths.heads) & set(shape.group(g))) for g in self.kv_heads(layer)}
            if len(sizes) > 1:
                raise PlanError(
                    f"Layer {layer}: the kept KV heads have {' and '.join(map(str, sorted(sizes)))} query "
                    "heads; attention needs the same number for each.",
                    hint="Remove whole KV heads, or the same number of query heads from each.",
                )

    def kv_heads(self, layer: int) -> tuple[int, ...]:
        """Returns the kept KV heads of a layer, ascending."""
        return tuple(sorted({head // self.shape.group_size for head in self.layers[layer].heads}))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, all of which stay."""
        return self.shape.num_layers

    @property
    def keep(self) -> tuple[int, ...]:
        """Kept layers: all of them."""
        return tuple(range(self.num_layers))

    @property
    def pruned(self) -> tuple[int, ...]:
        """Removed layers: none."""
        return ()

    @property
    def merged(self) -> dict[int, tuple[int, ...]]:
        """Merged layers: none."""
        return {}

    @cached_property
    def uniform(self) -> bool:
        """Whether all layers keep the same numbers of heads, KV heads and channels, as a config requires."""
        counts = {
            (len(widths.heads), len(self.kv_heads(i)), len(widths.channels))
            for i, widths in enumerate(self.layers)
        }
        return len(counts) == 1

    @property
    def widths(self) -> WidthShape:
        """The widths of the pruned model.

        Raises:
            PlanError: If they differ between layers.
        """
        if not self.uniform:
            raise PlanError(
                "The layers of this plan keep different widths, so no single shape describes them."
            )
        return WidthShape(
            num_layers=self.num_layers,
            hidden_size=len(self.hidden),
            num_heads=len(self.layers[0].heads),
            num_kv_heads=len(self.kv_heads(0)),
            head_dim=self.shape.head_dim,
            intermediate_size=len(self.layers[0].channels),
        )

    def check_model(self, shape: WidthShape, fingerprint: str = "") -> None:
        """Raises PlanError if the plan was made for other widths or another model."""
        if shape != self.shape:
            mine, found = asdict(self.shape), asdict(shape)
            differ = [name for name in mine if mine[name] != found[name]]
            planned, given = (", ".join(f"{n} {s[n]}" for n in differ) for s in (mine, found))
            raise PlanError(
                f"The plan is for a model with {planned}; this one has {given}.",
                hint="Make a plan for this model.",
            )
        self.check_origin(fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values; what is kept is text with ranges, "0-5, 7"."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "method": self.method,
            "shape": asdict(self.shape),
            "hidden": runs_of(self.hidden),
            "layers": [
                {"layer": i, "heads": runs_of(w.heads), "channels": runs_of(w.channels)}
                for i, w in enumerate(self.layers)
            ],
            "evidence": self.evidence,
        }

    @classmethod
    def _read(cls, raw: dict[str, Any], where: str) -> Self:
        entries = raw.get("layers")
        if not isinstance(entries, list):
            raise PlanError(f"{where}: 'layers' must list every layer, in order.")
        try:
            shape = WidthShape(**raw["shape"])
        except (TypeError, KeyError) as error:
            names = ", ".join(entry.name for entry in fields(WidthShape))
            raise PlanError(f"{where}: 'shape' needs exactly {names}.") from error
        layers = tuple(_read_layer(entry, layer, where) for layer, entry in enumerate(entries))
        hidden = _read_runs(raw.get("hidden"), f"{where}: hidden")
        return cls(shape, layers, hidden, raw.get("method", "explicit"), raw.get("evidence", {}))

    def facts(self) -> dict[str, Any]:
        """Returns what stays of every layer, in the form used in `run.json`."""
        widths = [
            {
                "layer": i,
                "heads": len(w.heads),
                "kv_heads": len(self.kv_heads(i)),
                "channels": len(w.channels),
            }
            for i, w in enumerate(self.layers)
        ]
        return {
            "num_layers": self.num_layers,
            "actions": [],
            "num_kept": self.num_layers,
            "uniform": self.uniform,
            "widths": widths,
            "hidden": len(self.hidden),
            "shape": asdict(self.shape),
        }

    def show(self, console: Console) -> None:
        """Prints every width before and after pruning."""
        shape, layers = self.shape, range(self.num_layers)
        rows = [
            ("query heads", [len(w.heads) for w in self.layers], shape.num_heads),
            ("key/value heads", [len(self.kv_heads(i)) for i in layers], shape.num_kv_heads),
            ("MLP channels", [len(w.channels) for w in self.layers], shape.intermediate_size),
            ("hidden dimensions", [len(self.hidden)], shape.hidden_size),
        ]
        print_table(
            console,
            f"Plan ({self.method}): all {self.num_layers} layers stay and become narrower",
            ("in a layer", "before", "after"),
            [(what, total, _from_to(kept)) for what, kept, total in rows],
        )


def _from_to(counts: Sequence[int]) -> int | str:
    low, high = min(counts), max(counts)
    return low if low == high else f"{low} to {high}"


def _check_kept(kept: Sequence[int], total: int, name: str) -> None:
    if not kept:
        raise PlanError(f"{name}: nothing is kept; at least one of {total} must stay.")
    if any(b <= a for a, b in pairwise(kept)):
        raise PlanError(f"{name}: the kept numbers must be in ascending order, each listed once.")
    if kept[0] < 0 or kept[-1] >= total:
        raise PlanError(f"{name}: {kept[0] if kept[0] < 0 else kept[-1]} is not in 0 to {total - 1}.")


def _read_layer(entry: Any, layer: int, where: str) -> LayerWidths:
    known = {"layer", "heads", "channels"}
    if not isinstance(entry, dict) or entry.get("layer", layer) != layer or not entry.keys() <= known:
        raise PlanError(
            f"{where}: entry {layer} of 'layers' is {shown(entry)}; it needs layer, heads and channels of "
            f"layer {layer}.",
            hint="List every layer once, in order.",
        )
    return LayerWidths(
        *(_read_runs(entry.get(name), f"{where}: layer {layer}: {name}") for name in ("heads", "channels"))
    )


def _read_runs(text: Any, where: str) -> tuple[int, ...]:
    """Parses numbers and ranges such as "0-5, 7"."""
    try:
        parts = [part.strip().partition("-") for part in str(text).split(",")]
        ranges = [range(int(low), int(high or low) + 1) for low, _, high in parts]
        total = sum(map(len, ranges))
    except (ValueError, OverflowError) as error:
        raise PlanError(
            f"{where} is {shown(text)}; numbers and ranges such as '0-5, 7' are needed."
        ) from error
    if total > 10_000_000:
        raise PlanError(f"{where}: {shown(text)} lists more numbers than any model has dimensions.")
    return tuple(number for one in ranges for number in one)
