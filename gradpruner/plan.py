"""PruningPlan: what happens to every layer, decided before any weight is touched.

A plan is a small JSON file a person can read and edit; everything about it is checked on load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradpruner.errors import ConfigError, PlanError
from gradpruner.files import read_json, write_json
from gradpruner.merging import MAX_SOURCES, MERGE_RULES, check_density
from gradpruner.registry import suggest
from gradpruner.scores import LayerScores, default_num_prune
from gradpruner.trace import same_model

ACTIONS = ("keep", "drop", "merge")
TARGETS = ("preceding", "nearest")
MIN_KEPT = 2
FORMAT_VERSION = 1
_FIELDS = ("format_version", "num_layers", "actions", "rule", "density", "method", "evidence")


@dataclass(frozen=True)
class LayerAction:
    """What happens to one layer.

    Attributes:
        action: "keep", "drop" (removed outright) or "merge" (added into a retained layer, then removed).
        into: The retained layer it is merged into; None unless merged.
    """

    action: str
    into: int | None = None


@dataclass(frozen=True)
class PruningPlan:
    """Keep, drop or merge, for every decoder layer.

    Attributes:
        actions: One per layer, in order.
        rule: How merged layers are combined; a name in `merging.MERGE_RULES`.
        density: Fraction of a merged layer's entries that survive sparsification, in (0, 1].
        method: The method whose scores were used, or "explicit".
        evidence: Where the scores came from, JSON values only (copied from `LayerScores.evidence`).
    """

    actions: tuple[LayerAction, ...]
    rule: str = "sum"
    density: float = 0.2
    method: str = "explicit"
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
                f"Layer {layer}: unknown action '{entry.action}'.{suggest(entry.action, ACTIONS)}",
                hint=f"Allowed: {', '.join(ACTIONS)}.",
            )
        if (entry.action == "merge") != (entry.into is not None):
            raise PlanError(
                f"Layer {layer}: action '{entry.action}' with into = {entry.into}.",
                hint="'merge' needs the retained layer it goes into; 'keep' and 'drop' need none.",
            )
        if entry.into is None:
            return
        if not 0 <= entry.into < self.num_layers or self.actions[entry.into].action != "keep":
            raise PlanError(
                f"Layer {layer} is to be merged into layer {entry.into}, which is not a kept layer.",
                hint=f"Kept layers: {', '.join(map(str, self.keep))}.",
            )

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
        """Retained layer -> the layers merged into it, ascending."""
        out: dict[int, tuple[int, ...]] = {}
        for layer, entry in enumerate(self.actions):
            if entry.into is not None:
                out[entry.into] = (*out.get(entry.into, ()), layer)
        return out

    def without_merging(self) -> PruningPlan:
        """The same layers pruned, every one dropped (the paper's "w/o merging")."""
        actions = tuple(LayerAction("keep" if a.action == "keep" else "drop") for a in self.actions)
        return PruningPlan(actions, self.rule, self.density, self.method, self.evidence)

    def check_model(self, num_layers: int, fingerprint: str = "") -> None:
        """Raises PlanError when the plan was made for another depth or another model."""
        if self.num_layers != num_layers:
            raise PlanError(
                f"The plan is for a model of {self.num_layers} layers; this one has {num_layers}.",
                hint="Make a plan from this model's own scores.",
            )
        planned = self.evidence.get("model")
        if planned and fingerprint and not same_model(str(planned), fingerprint):
            raise PlanError(
                f"The plan was made from model {planned}; this is {fingerprint}.",
                hint="Record and plan on this model.",
            )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
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
    def from_dict(cls, raw: Any, where: str = "plan") -> PruningPlan:
        """Reads a plan, possibly edited by hand.

        Raises:
            PlanError: Naming the field that is wrong and what is allowed.
        """
        if not isinstance(raw, dict):
            raise PlanError(f"{where} is not a pruning plan: a JSON object is needed.")
        for key in raw:
            if key not in _FIELDS:
                raise PlanError(
                    f"{where}: unknown field '{key}'.{suggest(key, _FIELDS)}",
                    hint=f"Allowed: {', '.join(_FIELDS)}.",
                )
        if raw.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise PlanError(f"{where}: format_version {raw['format_version']!r} is not {FORMAT_VERSION}.")
        entries = raw.get("actions")
        if not isinstance(entries, list) or not entries:
            raise PlanError(f"{where}: 'actions' must list every layer, in order.")
        actions = tuple(_read_action(entry, layer, where) for layer, entry in enumerate(entries))
        if raw.get("num_layers", len(actions)) != len(actions):
            raise PlanError(
                f"{where}: num_layers is {raw['num_layers']} but {len(actions)} actions are listed."
            )
        density = raw.get("density", 0.2)
        if not isinstance(density, int | float) or isinstance(density, bool):
            raise PlanError(f"{where}: density is {density!r}; a number is needed.")
        evidence = raw.get("evidence", {})
        if not isinstance(evidence, dict):
            raise PlanError(f"{where}: evidence is {evidence!r}; a JSON object is needed.")
        rule, method = str(raw.get("rule", "sum")), str(raw.get("method", "explicit"))
        try:
            return cls(actions, rule, float(density), method, evidence)
        except ConfigError as error:
            raise PlanError(f"{where}: {error.message}", error.hint) from error

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Reads and validates a plan file.

        Raises:
            PlanError: If there is none, or it says what no plan can.
            IntegrityError: If it is not JSON.
        """
        if not Path(path).is_file():
            raise PlanError(
                f"There is no pruning plan at {path}.",
                hint="`gradpruner plan` writes plans/<variant>.json into the run directory.",
            )
        return cls.from_dict(read_json(Path(path), "pruning plan"), str(path))

    @classmethod
    def from_keep(cls, num_layers: int, keep: Sequence[int]) -> PruningPlan:
        """A plan for people who know which layers they want; the others are dropped."""
        pruned = set(range(num_layers)) - set(_checked_layers(keep, num_layers, "keep"))
        return cls(tuple(LayerAction("drop" if i in pruned else "keep") for i in range(num_layers)))


def _read_action(entry: Any, layer: int, where: str) -> LayerAction:
    if not isinstance(entry, dict) or entry.get("layer", layer) != layer:
        raise PlanError(
            f"{where}: entry {layer} of 'actions' is {entry!r}; the entry of layer {layer} is needed.",
            hint="List every layer once, in order.",
        )
    for key in entry:
        if key not in ("layer", "action", "into"):
            raise PlanError(
                f"{where}: layer {layer}: unknown field '{key}'.{suggest(key, ('action', 'into'))}",
                hint="Allowed: layer, action, into.",
            )
    into = entry.get("into")
    if into is not None and (isinstance(into, bool) or not isinstance(into, int)):
        raise PlanError(f"{where}: layer {layer}: into is {into!r}; a layer number is needed.")
    return LayerAction(str(entry.get("action")), into)


def plan_pruning(
    scores: LayerScores,
    *,
    num_prune: int | None = None,
    layer_fraction: float | None = None,
    parameter_fraction: float | None = None,
    num_merge: int = 3,
    protect_first: int = 0,
    protect_last: int = 0,
    contiguous: bool = False,
    layers: Sequence[int] | None = None,
    target: str = "preceding",
    rule: str = "sum",
    density: float = 0.2,
    layer_parameters: Sequence[int] | None = None,
    total_parameters: int | None = None,
) -> PruningPlan:
    """Chooses the least important layers, and which of them are merged instead of dropped.

    Give the budget in one unit; without any, 40 % of the layers go.

    Args:
        scores: One score per layer.
        num_prune: Layers to prune, 0 <= num_prune <= layers - 2.
        layer_fraction: Fraction of the layers to prune, in [0, 1).
        parameter_fraction: Fraction of all parameters to remove, in [0, 1); needs `layer_parameters`
            and `total_parameters`; the number of layers that comes nearest is pruned.
        num_merge: How many of the pruned layers, the best-scored ones, are merged; the rest is
            dropped. At most `num_prune` are.
        protect_first: This many layers at the input are never pruned.
        protect_last: This many layers at the output are never pruned.
        contiguous: Prune one block of neighbouring layers, that with the lowest total score (of equal ones
            the later block).
        layers: Prune exactly these (instead of a budget).
        target: "preceding" merges into the nearest kept layer before (the paper); "nearest" into the
            nearest kept layer on either side, the earlier one on a tie.
        rule: Combine rule, see `merging.MERGE_RULES`.
        density: Fraction of a merged layer's entries that survive, in (0, 1].
        layer_parameters: Parameters of every layer.
        total_parameters: Parameters of the model.

    Returns:
        The plan; no weight is touched.

    Raises:
        PlanError: If the budget cannot be met, options contradict each other, or a merged layer has
            no kept layer before it.

    Source: GradPruner, Algorithm 1 step 4, section 3.2, C.2.
    """
    total = scores.num_layers
    if target not in TARGETS:
        raise PlanError(
            f"Unknown target '{target}'.{suggest(target, TARGETS)}", hint=f"Allowed: {', '.join(TARGETS)}."
        )
    if num_merge < 0:
        raise PlanError(f"num_merge is {num_merge}; 0 or more is needed.")
    free = _free_layers(total, protect_first, protect_last)
    if layers is not None:
        if any(b is not None for b in (num_prune, layer_fraction, parameter_fraction)):
            raise PlanError("Give either the layers to prune or a budget, not both.")
        pruned = _listed(layers, free, total)
    else:
        count = _budget(
            total, num_prune, layer_fraction, parameter_fraction, layer_parameters, total_parameters
        )
        pruned = _choose(scores, free, count, contiguous)
    actions = [LayerAction("keep")] * total
    for layer in pruned:
        actions[layer] = LayerAction("drop")
    by_score = [layer for layer in scores.ascending() if layer in set(pruned)]
    for layer in by_score[max(0, len(by_score) - num_merge) :]:
        actions[layer] = LayerAction("merge", _target_of(layer, set(pruned), total, target))
    return PruningPlan(tuple(actions), rule, density, scores.method, dict(scores.evidence))


def _free_layers(total: int, protect_first: int, protect_last: int) -> list[int]:
    if protect_first < 0 or protect_last < 0 or protect_first + protect_last > total:
        raise PlanError(
            f"protect_first = {protect_first} and protect_last = {protect_last} in a model of {total} "
            f"layers; both must be >= 0 and together at most {total}."
        )
    return list(range(protect_first, total - protect_last))


def _listed(layers: Sequence[int], free: list[int], total: int) -> list[int]:
    """The layers given by hand, when they can all go."""
    pruned = _checked_layers(layers, total, "layers")
    _check_count(len(pruned), total)
    clash = sorted(set(pruned) - set(free))
    if clash:
        raise PlanError(f"Layers {', '.join(map(str, clash))} are both listed for pruning and protected.")
    return pruned


def _checked_layers(layers: Sequence[int], total: int, name: str) -> list[int]:
    outside = [layer for layer in layers if not 0 <= layer < total]
    repeated = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if outside or repeated:
        fault = f"{outside} do not exist" if outside else f"{repeated} are listed more than once"
        raise PlanError(f"{name}: layers {fault}; the model has layers 0 to {total - 1}.")
    return sorted(layers)


def _budget(
    total: int,
    num_prune: int | None,
    layer_fraction: float | None,
    parameter_fraction: float | None,
    layer_parameters: Sequence[int] | None,
    total_parameters: int | None,
) -> int:
    """Number of layers to prune, whatever the unit it was asked in."""
    given = [b for b in (num_prune, layer_fraction, parameter_fraction) if b is not None]
    if len(given) > 1:
        raise PlanError("Give the budget in one unit: num_prune, layer_fraction or parameter_fraction.")
    for name, fraction in (
        ("layer_fraction", layer_fraction),
        ("parameter_fraction", parameter_fraction),
    ):
        if fraction is not None and not 0 <= fraction < 1:
            raise PlanError(f"{name} is {fraction}; a fraction from 0 to below 1 is needed.")
    if parameter_fraction is not None:
        if layer_parameters is None or total_parameters is None:
            raise PlanError("A parameter fraction needs the model's parameter counts.")
        per_layer = sum(layer_parameters) / total
        count = math.floor(parameter_fraction * total_parameters / per_layer + 0.5)
    elif layer_fraction is not None:
        count = default_num_prune(total, layer_fraction)
    else:
        count = num_prune if num_prune is not None else default_num_prune(total)
    _check_count(count, total)
    return count


def _check_count(count: int, total: int) -> None:
    if not 0 <= count <= total - MIN_KEPT:
        raise PlanError(
            f"Pruning {count} of {total} layers is not possible; 0 to {max(0, total - MIN_KEPT)} are, since "
            f"at least {MIN_KEPT} layers must stay."
        )


def _choose(scores: LayerScores, free: list[int], count: int, contiguous: bool) -> list[int]:
    if count > len(free):
        raise PlanError(
            f"{count} layers are to be pruned but only {len(free)} of {scores.num_layers} are not protected.",
            hint="Protect fewer layers or prune fewer.",
        )
    if not contiguous:
        allowed = set(free)
        return sorted([layer for layer in scores.ascending() if layer in allowed][:count])
    starts = range(free[0], free[-1] - count + 2) if free and count else range(0)
    totals = {start: math.fsum(scores.values[start : start + count]) for start in starts}
    if not totals:
        return []
    best = min(totals, key=lambda start: (totals[start], -start))
    return list(range(best, best + count))


def _target_of(layer: int, pruned: set[int], total: int, target: str) -> int:
    before = [i for i in range(layer) if i not in pruned]
    after = [i for i in range(layer + 1, total) if i not in pruned]
    if target == "preceding":
        if not before:
            raise PlanError(
                f"Layer {layer} is to be merged but no kept layer precedes it.",
                hint="Use target: nearest, protect_first: 1, or a smaller num_merge.",
            )
        return before[-1]
    near = before[-1:] + after[:1]
    return min(near, key=lambda i: (abs(i - layer), i))


def runs_of(layers: Sequence[int]) -> str:
    """Layers as text with runs joined: '3, 7-9'."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "none"
