"""A pool of plans that remove the same number of layers, chosen in different ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from gradpruner.common.errors import GradPrunerError, PlanError
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import angular
from gradpruner.methods.base import METHODS, MethodContext
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.repair import Repair

Family = Literal["gate", "gate_pairwise", "gradpruner", "shortgpt", "task_loss", "last", "random", "window"]
FAMILIES: tuple[Family, ...] = get_args(Family)
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {"gate_pairwise": ("gate", {"pairwise": True})}
FAULTS = (GradPrunerError, RuntimeError)
"""What a candidate can fail with: our own errors, and torch's (out of memory, a singular system)."""


@dataclass
class Candidate:
    """One way to remove the layers, and what has been found out about it.

    Attributes:
        names: Who proposed it: families, and "window" followed by its first layer ("window 14").
        plan: Keeps and drops; merges nothing.
        losses: On the samples put aside: repaired, after the first round ...
        steps: Training steps before each of these losses.
        seconds: Wall time spent on it.
        repair: Kept for as long as it may be needed again.
        error: Why it is out of the race; "" while it is in.
    """

    names: list[str]
    plan: PruningPlan
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: float = 0.0
    repair: Repair | None = None
    error: str = ""

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = {
            "names": self.names,
            "pruned": list(self.plan.pruned),
            "losses": self.losses,
            "steps": self.steps,
            "seconds": round(self.seconds, 2),
        }
        return found | ({"error": self.error} if self.error else {})


def make_pool(
    context: MethodContext,
    num_prune: int,
    size: int,
    families: Sequence[Family] = FAMILIES,
    task_loss_samples: int = 32,
    report: Callable[[str], None] | None = None,
) -> tuple[list[Candidate], dict[str, str]]:
    """Plans of the families, in this order, each set of layers once.

        gate, gate_pairwise    recorded gates: mean square, and all pairs together
        gradpruner             recorded LoRA gradients (IGIA)
        shortgpt, last, random as the methods of these names; random is drawn with the seed
        task_loss              greedy by the loss, with repair
        window                 neighbouring layers, those that turn the hidden state least (angular distance)
                               first; first layers at least a quarter of `num_prune` apart

    Every family gives one plan. Windows fill the pool up; one place is kept for them. No plan touches a
    protected layer, and in all of them kept layers fit where they stand.

    Args:
        context: Methods measure on its samples.
        num_prune: Layers that go, >= 1.
        size: Candidates at most, >= 1.
        families: Which; where the pool is too small for all, the first ones.
        task_loss_samples: `TaskLossOptions.num_samples` of the greedy search.
        report: Called with a family's name when it is done.

    Returns:
        The candidates; and of the families that failed, the error by name.
    """
    kinds = list(dict.fromkeys(families))
    singles = [name for name in kinds if name != "window"]
    found: dict[tuple[int, ...], Candidate] = {}
    failures: dict[str, str] = {}

    def add(name: str, plan: PruningPlan) -> None:
        found.setdefault(plan.pruned, Candidate([], plan)).names.append(name)

    planned = partial(context.plan_by, num_prune=num_prune)
    for name in singles[: size - 1 if "window" in kinds and size > 1 else size]:
        try:
            add(name, planned(_scores(context, name, task_loss_samples)))
        except FAULTS as error:
            failures[name] = str(error)
        if report is not None:
            report(name)
    if "window" in kinds and len(found) < size:
        try:
            for start, plan in _windows(context, num_prune):
                add(f"window {start}", plan)
                if len(found) == size:
                    break
        except FAULTS as error:
            failures["window"] = str(error)
        if report is not None:
            report("window")
    return list(found.values()), failures


def _scores(context: MethodContext, family: str, task_loss_samples: int) -> LayerScores:
    name, raw = _SETTINGS.get(family, (family, {}))
    if family == "task_loss":
        raw = {"num_samples": task_loss_samples}
    method = METHODS.find(name)
    assert method.score is not None
    return method.score(replace(context, options=method.read_options(name, raw)))


def _windows(context: MethodContext, num_prune: int) -> Iterator[tuple[int, PruningPlan]]:
    """First layer and plan of neighbours that can go, those that turn the state least first."""
    measured = angular.score(context)
    distances = measured.evidence["distances"]
    apart = max(1, num_prune // 4)
    taken: list[int] = []
    for start in sorted(range(len(distances)), key=lambda start: (distances[start], -start)):
        if any(abs(start - other) < apart for other in taken):
            continue
        layers = range(start, start + num_prune)
        try:
            plan = context.plan_by(replace(measured, method="window"), layers=layers)
        except PlanError:
            continue  # it touches a protected layer, or others would not fit
        taken.append(start)
        yield start, plan
