"""A pool of candidate plans that remove the same number of layers, chosen in different ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from gradpruner.common.errors import GradPrunerError, PlanError
from gradpruner.methods import angular
from gradpruner.methods.base import METHODS, MethodContext
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.repair import Repair

Proposer = Literal["gate", "gate_pairwise", "gradpruner", "shortgpt", "task_loss", "last", "random", "window"]
PROPOSERS: tuple[Proposer, ...] = get_args(Proposer)
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {"gate_pairwise": ("gate", {"pairwise": True})}
FAULTS = (GradPrunerError, RuntimeError)
"""Errors a candidate can fail with: our own, and torch's (out of memory, a singular system)."""


@dataclass
class Candidate:
    """One way to remove the layers, and what was measured.

    Attributes:
        names: What proposed the plan: families, or "window" and its first layer ("window 14").
        plan: Keeps and drops layers; merges none.
        losses: Losses on the held-out samples: after the repair, after the first round, and so on.
        steps: Training steps before each of these losses.
        seconds: Wall time spent on the candidate.
        repair: The fitted repair, kept as long as it may be needed again.
        error: Why the candidate failed; "" if it has not.
    """

    names: list[str]
    plan: PruningPlan
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: float = 0.0
    repair: Repair | None = None
    error: str = ""

    def facts(self) -> dict[str, Any]:
        """Returns the results, as JSON values."""
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
    families: Sequence[Proposer] = PROPOSERS,
    task_loss_samples: int = 32,
    report: Callable[[str], None] | None = None,
) -> tuple[list[Candidate], dict[str, str]]:
    """Returns plans of the families, in their order, without duplicates.

        gate, gate_pairwise    recorded gates: mean square, and all pairs together
        gradpruner             recorded LoRA gradients (IGIA)
        shortgpt, last, random as the methods of these names; random is drawn with the seed
        task_loss              greedy by the loss, with repair
        window                 neighbouring layers, those that turn the hidden state least (angular distance)
                               first; first layers at least a quarter of `num_prune` apart

    Every family adds one plan, but windows fill the rest of the pool; one place is reserved for them. No plan
    prunes a protected layer, and in every plan the kept layers fit at their positions.

    Args:
        context: Methods measure on its samples.
        num_prune: Layers to prune, >= 1.
        size: Largest number of candidates, >= 1.
        families: Families to use. If the pool is too small for all, the first ones are used.
        task_loss_samples: `TaskLossOptions.num_samples` of the greedy search.
        report: Called with a family's name when it is done.

    Returns:
        The candidates; and the errors of families that failed, by name.
    """
    singles = list(dict.fromkeys(name for name in families if name != "window"))
    windows = ["window"] if "window" in families else []
    found: dict[tuple[int, ...], Candidate] = {}
    failures: dict[str, str] = {}
    for name in [*singles[: max(1, size - len(windows))], *windows]:
        if len(found) == size:
            break
        try:
            for label, plan in _proposed(context, name, num_prune, task_loss_samples):
                found.setdefault(plan.pruned, Candidate([], plan)).names.append(label)
                if len(found) == size:
                    break
        except FAULTS as error:
            failures[name] = str(error)
        if report is not None:
            report(name)
    return list(found.values()), failures


def _proposed(
    context: MethodContext, family: str, num_prune: int, task_loss_samples: int
) -> Iterator[tuple[str, PruningPlan]]:
    """Yields the plans of a family, each with its name."""
    if family == "window":
        yield from _windows(context, num_prune)
        return
    name, raw = _SETTINGS.get(family, (family, {}))
    if family == "task_loss":
        raw = {"num_samples": task_loss_samples}
    method = METHODS.find(name)
    assert method.score is not None
    scores = method.score(replace(context, options=method.read_options(name, raw)))
    yield family, context.plan_by(scores, num_prune=num_prune)


def _windows(context: MethodContext, num_prune: int) -> Iterator[tuple[str, PruningPlan]]:
    """Yields name and plan of blocks that can be pruned, those that turn the state least first."""
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
            continue  # the block contains a protected layer, or kept layers would not fit
        taken.append(start)
        yield f"window {start}", plan
