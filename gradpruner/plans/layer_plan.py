"""PruningPlan: what happens to every layer, decided before any weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from gradpruner.common.errors import ConfigError, PlanError
from gradpruner.common.printing import print_table, runs_of, shown
from gradpruner.common.registry import suggest
from gradpruner.plans.base import FORMAT_VERSION, METHOD_LIMIT, BasePlan
from gradpruner.plans.merging import MAX_SOURCES, MERGE_RULES, check_density, needs_importance
from gradpruner.plans.options import DENSITY

if TYPE_CHECKING:
    from rich.console import Console

ACTIONS = ("keep", "drop", "merge")
MIN_KEPT = 2


@dataclass(frozen=True)
class LayerAction:
    """What happens to one layer.

    Attributes:
        action: "keep", "drop" (removed) or "merge" (added to another layer, then removed).
        into: The layer it is merged into, which is a kept one (`PruningPlan` describes an exception); None
            unless the action is "merge".
    """

    action: str
    into: int | None = None


@dataclass(frozen=True)
class PruningPlan(BasePlan):
    """Keep, drop or merge, for every decoder layer.

    A layer that others are merged into can itself be merged into an earlier layer, so that merges form a
    chain. Only rules that need no recorded gradients (LaCo's) allow this, because no gradients were recorded
    for a merged layer. A chain is merged from its last layer to its first.

    Attributes:
        actions: One per layer, in order.
        rule: How merged layers are combined; a name in `merging.MERGE_RULES`.
        density: Fraction of a merged layer's entries that sparsification keeps, in (0, 1].
        method: The method whose scores were used, or "explicit".
        evidence: What the scores are based on, as JSON values (copied from `LayerScores.evidence`).
    """

    actions: tuple[LayerAction, ...]
    rule: str = "sum"
    density: float = DENSITY
    method: str = "explicit"
    evidence: dict[str, Any] = field(default_factory=dict)
    title: ClassVar[str] = "pruning plan"
    json_fields: ClassVar = (
        "format_version",
        "num_layers",
        "actions",
        "rule",
        "density",
        "method",
        "evidence",
    )
    kind: ClassVar[Literal["layers"]] = "layers"
    uniform: ClassVar[bool] = True  # kept layers keep their widths

    def __post_init__(self) -> None:
        super().__post_init__()
        MERGE_RULES.find(self.rule)
        check_density(self.density)
        for layer, entry in enumerate(self.actions):
            self._check_action(layer, entry)
        if len(self.keep) < MIN_KEPT:
            raise PlanError(
                f"The plan leaves {len(self.keep)} of {self.num_layers} layers; at least {MIN_KEPT} "
                "must stay.",
                hint=f"Prune at most {max(0, self.num_layers - MIN_KEPT)} layers.",
            )
        for target, layers in self.merged.items():
            if len(layers) > MAX_SOURCES:
                raise PlanError(
                    f"{len(layers)} layers are to be merged into layer {target}; at most {MAX_SOURCES} can.",
                    hint="Drop some of them (action: drop).",
                )

    def _check_action(self, layer: int, entry: LayerAction) -> None:
        if entry.action not in ACTIONS:
            raise PlanError(
                f"Layer {layer}: unknown action {shown(entry.action)}.{suggest(entry.action, ACTIONS)}",
                hint=f"Allowed: {', '.join(ACTIONS)}.",
            )
        if (entry.action == "merge") != (entry.into is not None):
            raise PlanError(
                f"Layer {layer}: action is '{entry.action}' and into is {entry.into}.",
                hint="'merge' needs the kept layer to merge into; 'keep' and 'drop' must not have one.",
            )
        if entry.into is None:
            return
        exists = 0 <= entry.into < self.num_layers
        if not exists or not self._takes_in(entry.into):
            chain = exists and self.actions[entry.into].action == "merge"
            raise PlanError(
                f"Layer {layer} is to be merged into layer {entry.into}, which is not a kept layer.",
                hint=f"Kept layers: {', '.join(map(str, self.keep))}."
                + (" Only LaCo's rules can merge a merged layer, into an earlier one." if chain else ""),
            )

    def _takes_in(self, target: int) -> bool:
        """Returns whether others can be merged into a layer: it is kept, or part of a chain."""
        found = self.actions[target]
        if found.action == "keep":
            return True
        return found.into is not None and found.into < target and not needs_importance(self.rule)

    @property
    def num_layers(self) -> int:
        """Layers of the model before pruning."""
        return len(self.actions)

    @property
    def keep(self) -> tuple[int, ...]:
        """Kept layers, ascending."""
        return tuple(i for i, entry in enumerate(self.actions) if entry.action == "keep")

    @property
    def pruned(self) -> tuple[int, ...]:
        """Dropped and merged layers, ascending."""
        return tuple(i for i, entry in enumerate(self.actions) if entry.action != "keep")

    @property
    def merged(self) -> dict[int, tuple[int, ...]]:
        """Layer -> the layers merged into it, ascending. The layer itself may be merged too (a chain)."""
        out: dict[int, tuple[int, ...]] = {}
        for layer, entry in enumerate(self.actions):
            if entry.into is not None:
                out[entry.into] = (*out.get(entry.into, ()), layer)
        return out

    @property
    def needs_trace(self) -> bool:
        """Whether carrying out the plan needs the recorded gradients."""
        return bool(self.merged) and needs_importance(self.rule)

    def without_merging(self) -> PruningPlan:
        """Returns a plan that drops all pruned layers (the paper's "w/o merging")."""
        actions = tuple(LayerAction("keep" if a.action == "keep" else "drop") for a in self.actions)
        return PruningPlan(actions, self.rule, self.density, self.method, self.evidence)

    def check_model(self, num_layers: int, fingerprint: str = "") -> None:
        """Raises PlanError if the plan was made for another number of layers or another model."""
        if self.num_layers != num_layers:
            raise PlanError(
                f"The plan is for a model of {self.num_layers} layers; this one has {num_layers}.",
                hint="Make a plan from this model's own scores.",
            )
        self.check_origin(fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "num_layers": self.num_layers,
            "method": self.method,
            "rule": self.rule,
            "density": self.density,
            "actions": [
                {"layer": i, "action": a.action} | ({"into": a.into} if a.into is not None else {})
                for i, a in enumerate(self.actions)
            ],
            "evidence": self.evidence,
        }

    @classmethod
    def _read(cls, raw: dict[str, Any], where: str) -> Self:
        entries = raw.get("actions")
        if not isinstance(entries, list) or not entries:
            raise PlanError(f"{where}: 'actions' must list every layer, in order.")
        actions = tuple(_read_action(entry, layer, where) for layer, entry in enumerate(entries))
        if raw.get("num_layers", len(actions)) != len(actions):
            raise PlanError(
                f"{where}: num_layers is {shown(raw['num_layers'])} but {len(actions)} actions are listed."
            )
        density = raw.get("density", DENSITY)
        if not isinstance(density, int | float) or isinstance(density, bool) or not -1e9 < density < 1e9:
            raise PlanError(f"{where}: density is {shown(density)}; a number is needed.")
        rule, method = raw.get("rule", "sum"), raw.get("method", "explicit")
        if not isinstance(rule, str) or not rule.isprintable() or len(rule) > METHOD_LIMIT:
            raise PlanError(f"{where}: rule is {shown(rule)}; the name of a rule is needed.")
        try:
            return cls(actions, rule, float(density), method, raw.get("evidence", {}))
        except ConfigError as error:
            raise PlanError(f"{where}: {error.message}", error.hint) from error

    def facts(self) -> dict[str, Any]:
        """Returns what happens to every layer, in the form used in `run.json`."""
        return {
            "num_layers": self.num_layers,
            "actions": [{"layer": i, "action": a.action, "into": a.into} for i, a in enumerate(self.actions)],
            "num_kept": len(self.keep),
            "rule": self.rule,
            "density": self.density,
        }

    def show(self, console: Console) -> None:
        """Prints which layers are kept, dropped and merged."""
        dropped = [i for i, entry in enumerate(self.actions) if entry.action == "drop"]
        rows = [("kept", self.keep), ("dropped", dropped)]
        rows += [(f"merged into {target} ({self.rule})", layers) for target, layers in self.merged.items()]
        print_table(
            console,
            f"Plan ({self.method}): {len(self.keep)} of {self.num_layers} layers stay",
            ("", "layers", "how many"),
            [(what, runs_of(layers), len(layers)) for what, layers in rows if layers],
        )

    @classmethod
    def from_keep(cls, num_layers: int, keep: Sequence[int]) -> PruningPlan:
        """Returns a plan that keeps the given layers and drops all others."""
        pruned = set(range(num_layers)) - set(checked_layers(keep, num_layers, "keep"))
        return cls(tuple(LayerAction("drop" if i in pruned else "keep") for i in range(num_layers)))


def _read_action(entry: Any, layer: int, where: str) -> LayerAction:
    if not isinstance(entry, dict) or entry.get("layer", layer) != layer:
        raise PlanError(
            f"{where}: entry {layer} of 'actions' is {shown(entry)}; the entry of layer {layer} is needed.",
            hint="List every layer once, in order.",
        )
    for key in entry:
        if key not in ("layer", "action", "into"):
            raise PlanError(
                f"{where}: layer {layer}: unknown field {shown(key)}.{suggest(key, ('action', 'into'))}",
                hint="Allowed: layer, action, into.",
            )
    into = entry.get("into")
    if into is not None and (isinstance(into, bool) or not isinstance(into, int)):
        raise PlanError(f"{where}: layer {layer}: into is {shown(into)}; a layer number is needed.")
    action = entry.get("action")
    return LayerAction(action if isinstance(action, str) else shown(action), into)


def checked_layers(layers: Sequence[int], total: int, name: str) -> list[int]:
    """Returns the layers sorted.

    Args:
        layers: Layer numbers, as given by a user.
        total: Number of layers of the model.
        name: Name of the option, for messages.

    Raises:
        PlanError: If a layer does not exist or is listed twice.
    """
    outside = [layer for layer in layers if not 0 <= layer < total]
    repeated = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if outside or repeated:
        fault = f"{outside} do not exist" if outside else f"{repeated} are listed more than once"
        raise PlanError(f"{name}: layers {fault}; the model has layers 0 to {total - 1}.")
    return sorted(layers)
