"""A pool of plans that remove the same number of layers, chosen in different ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from gradpruner.errors import GradPrunerError, PlanError
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, MethodContext
from gradpruner.plans.layer_plan import PruningPlan

Family = Literal["gate", "gate_pairwise", "gradpruner", "shortgpt", "task_loss", "last", "random", "window"]
FAMILIES: tuple[Family, ...] = get_args(Family)
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {"gate_pairwise": ("gate", {"pairwise": True})}
FAULTS = (GradPrunerError, RuntimeError)
"""What a candidate can fail with: errors of ours, and torch's (out of memory, a system that is singular)."""


@dataclass(frozen=True)
class Candidate:
    """One way to remove the layers.

    Attributes:
        names: Who proposed it: families, and "window" followed by its first layer ("window 14").
        plan: Keeps and drops; merges nothing.
    """

    names: tuple[str, ...]
    plan: PruningPlan


@dataclass(frozen=True)
class Failure:
    """A family or candidate that came to nothing.

    Attributes:
        names: Which.
        error: Why, in words.
    """

    names: tuple[str, ...]
    error: str


def make_pool(
    context: MethodContext,
    num_prune: int,
    size: int,
    families: Sequence[Family] = FAMILIES,
    task_loss_samples: int = 32,
    report: Callable[[str], None] | None = None,
) -> tuple[list[Candidate], list[Failure]]:
    """Plans of the families, in this order, each set of layers once.

        gate, gate_pairwise    recorded gates: mean square, and all pairs together
        gradpruner             recorded LoRA gradients (IGIA)
        shortgpt, last, random as the methods of these names; random is drawn with the seed
        task_loss              greedy by the loss, with repair
        window                 neighbouring layers, those that turn the hidden state least (angular distance)
                               first, and no first layer nearer than a quarter of `num_prune` to another's

    Every family gives one plan. Windows fill the pool up; one place is kept for them. No plan touches a
    protected layer, and in all of them kept layers fit where they stand.

    Args:
        context: What methods may look at; its samples are what they measure on.
        num_prune: Layers that go, >= 1.
        size: Candidates at most, >= 1.
        families: Which, the first of them first where the pool is too small for all.
        task_loss_samples: Samples the greedy search measures on, see `TaskLossOptions`.
        report: Called with a family's name when it is done.

    Returns:
        The candidates, and the families that failed.
    """
    kinds = list(dict.fromkeys(families))
    singles = [name for name in kinds if name != "window"]
    found: dict[tuple[int, ...], Candidate] = {}
    failures: list[Failure] = []

    def add(name: str, plan: PruningPlan) -> None:
        known = found.get(plan.pruned)
        names = (*known.names, name) if known else (name,)
        found[plan.pruned] = Candidate(names, known.plan if known else plan)

    planned = partial(context.plan_by, num_prune=num_prune)
    for name in singles[: size - 1 if "window" in kinds and size > 1 else size]:
        try:
            add(name, planned(_scores(context, name, task_loss_samples)))
        except FAULTS as error:
            failures.append(Failure((name,), str(error)))
        if report is not None:
            report(name)
    if "window" in kinds and len(found) < size:
        try:
            for start, plan in _windows(context, num_prune):
                add(f"window {start}", plan)
                if len(found) == size:
                    break
        except FAULTS as error:
            failures.append(Failure(("window",), str(error)))
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
    scores = METHODS.find("angular").score
    assert scores is not None
    measured = scores(replace(context, options=None))
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
