"""Either: prunes IGIA's layers or the gate's, whichever leave the lower loss once the cuts are repaired."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import Field

from gradpruner.common.errors import GradPrunerError
from gradpruner.common.progress import Progress
from gradpruner.common.world import this_world
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.calibration import held_out_loss, put_aside
from gradpruner.methods.candidates import FAULTS
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.repair import Repair
from gradpruner.pruning.in_memory import as_pruned
from gradpruner.pruning.repair.refitting import fit_repair

COMPARED = ("gradpruner", "gate")
"""Of these methods, one was best on every task of docs/quality.md; on a tie, and in doubt, the first."""
NAMES = {"gradpruner": "IGIA", "gate": "the gate"}
_SAME = "both would remove the same layers"
_UNREPAIRED = "losses of unrepaired models would say little"

log = logging.getLogger(__name__)


class EitherOptions(MethodOptions):
    """Options of the comparison."""

    validation_samples: int = Field(default=256, ge=1)
    """Training samples set aside to compare on if there are no validation rows; at most a quarter of all."""


def score(context: MethodContext) -> LayerScores:
    """Returns the scores of the method in `COMPARED` whose plan loses least.

    1. Both methods score the layers, from the same recorded gradients, and the run's plan is made of each.
    2. Each plan is repaired as the run repairs its models (`context.repair`).
    3. The plan whose model has the lower loss on `context.validation` wins: the mean negative log-likelihood
       of the learned tokens, in nats. Without validation samples, `validation_samples` training samples are
       set aside before the repairs.

    Nothing is compared, and the first method is taken, if both plans prune the same layers, if the run
    repairs nothing (losses of unrepaired models say little), or if there are fewer than three samples. If
    only one method or model works, it is taken.

    To the winner's own evidence, `evidence["comparison"]` is added: `chosen`, its name; `losses` and `pruned`
    layers, by name; `held_out`, the number of samples compared on, and `rows`, which they are; `skipped`, why
    nothing was compared, or "".

    Cost: two repairs. If the winner's was fitted on as many samples as the run's repair is, it is saved as
    `context.folder`/repair, and the run need not fit it again. Memory: the model and two repairs. With
    several processes, each must call this function; they share the samples of the repairs, and every one
    returns the same scores.

    Raises:
        GradPrunerError: If neither method can score the layers.
    """
    options = context.options or EitherOptions()
    scores = _scored(context)
    plans = {name: _plan_of(context, found) for name, found in scores.items()}
    losses: dict[str, float] = {}
    held_out, rows = context.validation, "validation rows"
    skipped = _reason(context, plans)
    if not skipped:
        rest = context.samples
        if held_out is None:
            held_out, rest = put_aside(context.samples, options.validation_samples, context.seed)
            rows = "training rows set aside"
        losses, skipped = _compared(replace(context, samples=rest), plans, held_out)
    ahead = {name: losses.get(name, float("inf")) for name in scores}
    chosen = this_world().agreed(lambda: min(ahead, key=lambda name: ahead[name]))
    if skipped not in ("", _SAME, _UNREPAIRED):
        log.warning("warning: the layers are chosen by %s, without a comparison: %s", NAMES[chosen], skipped)
    found = scores[chosen]
    comparison = {
        "chosen": chosen,
        "losses": losses,
        "pruned": {name: list(plan.pruned) for name, plan in plans.items()},
        "held_out": len(held_out) if losses and held_out is not None else 0,
        "rows": rows,
        "skipped": skipped,
    }
    return replace(found, method="either", evidence=found.evidence | {"comparison": comparison})


def _reason(context: MethodContext, plans: Mapping[str, PruningPlan]) -> str:
    """Returns why nothing is to be compared, or ""."""
    if len(plans) < len(COMPARED):
        return "only one of them can score these layers"
    if len({plan.pruned for plan in plans.values()}) == 1:
        return _SAME
    if context.repair.kind == "none":
        return _UNREPAIRED
    return "" if len(context.samples) > 2 else "there are too few training samples"


def _scored(context: MethodContext) -> dict[str, LayerScores]:
    """Returns the scores of both methods, without one that cannot score."""
    scores: dict[str, LayerScores] = {}
    errors: list[GradPrunerError] = []
    for name in COMPARED:
        method = METHODS.find(name)
        assert method.score is not None
        try:
            options = context.options_of(name) if context.options_of else method.options()
            scores[name] = method.score(replace(context, options=options))
        except GradPrunerError as error:
            errors.append(error)
    if not scores:
        raise errors[0]
    return scores


def _plan_of(context: MethodContext, scores: LayerScores) -> PruningPlan:
    if context.make_plan is not None:
        return context.make_plan(scores)
    return context.plan_by(scores, num_prune=context.num_prune)


def _compared(
    context: MethodContext, plans: Mapping[str, PruningPlan], held_out: Sequence[Any]
) -> tuple[dict[str, float], str]:
    """Returns the losses of the repaired models on held-out samples by method, and what failed, or ""."""
    losses: dict[str, float] = {}
    failed: list[str] = []
    best: Repair | None = None
    model, world = context.model(), this_world()
    with Progress(len(plans), "compare IGIA and gate") as progress:
        for name, plan in plans.items():
            try:
                # An error on one process is one on all: each must go on to the next plan together.
                repair, loss = world.in_step(partial(_tried, context, model, plan, held_out))
                best = repair if loss < min(losses.values(), default=math.inf) else best
                losses[name] = loss
            except FAULTS as error:
                if world.broken:
                    raise
                failed.append(f"{NAMES[name]}'s choice fails: {error}")
            progress.advance()
    folder = context.folder if world.is_first else None
    if best is not None and folder is not None and best.rows == context.repair.rows:
        best.save(folder / "repair")
    return losses, "; ".join(failed)


def _tried(
    context: MethodContext, model: Any, plan: PruningPlan, held_out: Sequence[Any]
) -> tuple[Repair | None, float]:
    """Returns the repair of a plan, None if it removes nothing, and the loss of the repaired model."""
    repair = None
    if plan.pruned:
        samples, collator = context.samples, context.collator
        repair = fit_repair(model, plan, samples, collator, context.repair, world=this_world())
    with as_pruned(model, plan, repair):
        return repair, held_out_loss(model, plan, held_out, context)


METHODS.register("either")(
    Method(
        "either: the layers of gradpruner or of gate, whichever lose less once repaired, on held-out samples",
        score,
        options=EitherOptions,
        needs_trace=True,
        compares=True,
        asks=COMPARED,
        label="IGIA or gate",
    )
)
