"""Auto: makes many plans, repairs each, trains the best for a few steps and the best of these for longer."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import nn

from gradpruner.common.errors import DataError, PlanError
from gradpruner.common.progress import Progress
from gradpruner.data.encoding import any_learned
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.calibration import held_out_loss, put_aside
from gradpruner.methods.candidates import FAULTS, PROPOSERS, Candidate, Proposer, make_pool
from gradpruner.models.layers import fingerprint
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.options import RepairKind
from gradpruner.pruning.in_memory import as_pruned, prune_
from gradpruner.pruning.repair.refitting import fit_repair
from gradpruner.training.finetuning import finetune, planned_steps

_GROWTH = 3  # factor by which the steps grow from round to round


class AutoOptions(MethodOptions):
    """Options of the search."""

    pool: int = Field(default=12, ge=1)
    """Largest number of plans to choose from."""
    families: list[Proposer] = Field(default=list(PROPOSERS), min_length=1)
    """Where the plans come from. If the pool is too small for all families, the first ones are used."""
    validation_samples: int = Field(default=128, ge=1)
    """Training samples held out to compare candidates on; at most a quarter of all samples."""
    repair: RepairKind | None = None
    """How every candidate is repaired before it is measured and trained. null: as the run repairs its models
    (plan.repair)."""
    repair_rows: int | None = Field(default=None, ge=2)
    """Largest number of training samples a repair is fitted on; null: as many as the run's repair."""
    rounds: int | None = Field(default=None, ge=0, le=3)
    """Rounds of training; 0 chooses without training. null: 2, but 0 if the pruned model is not trained."""
    share: float = Field(default=0.05, gt=0, le=1)
    """Steps of the first round, as a share of the steps of the later fine-tuning; every further round takes
    three times as many."""
    task_loss_samples: int = Field(default=32, ge=1)
    """Samples the family task_loss searches on."""


def plan(context: MethodContext) -> PruningPlan:
    """Returns the plan whose repaired and briefly trained model has the lowest loss on held-out samples.

    1. `validation_samples` training samples (at most a quarter of all), drawn with the seed, are held out.
       No family uses them to choose layers, and nothing is fitted or trained on them. (The trace was recorded
       earlier, so it may contain some of them.)
    2. A pool of plans is made, see `candidates.make_pool`.
    3. Every candidate is pruned and repaired, and its loss on the held-out samples is measured: the mean
       negative log-likelihood of the learned tokens, in nats.
    4. In round r = 1 ... `rounds` the best ceil(candidates / 2^r) are trained for `share` * 3^(r - 1) of the
       steps of the later fine-tuning, and their losses are measured again. Each candidate starts from its
       repaired state and is trained with the options of that fine-tuning, whose learning rate schedule ends
       with these steps. A round with a single candidate is skipped.

    The best candidate of the last round is the plan; ties go to the one that comes first in the pool. A
    candidate or family that fails is noted; it is an error only if no candidate is left.
    `evidence["candidates"]` holds the whole table. docs/methods.md states the cost. Memory: the model, a
    pruned copy in training (in float32 if all weights are trained), and on the CPU the refitted weights of
    the best half of the pool.

    The plan holds no repair: the run fits it again, on all samples.

    Raises:
        PlanError: If no candidate is left; the message says why each one failed.
        DataError: If there are fewer than two samples, or the held-out ones have no learned token.

    Source: successive halving (Jamieson and Talwalkar, 2016).
    """
    options = settled(context.options or AutoOptions(), context)
    num_prune = context.checked_num_prune()
    validation, rest = put_aside(context.samples, options.validation_samples, context.seed)
    _check_learned(validation)
    search = _Search(replace(context, samples=rest), options, validation)
    if num_prune:
        search.fill(num_prune)
    else:
        whole = PruningPlan.from_keep(context.num_layers, range(context.num_layers))
        search.candidates = [Candidate(["whole"], whole)]
    search.measure_all()
    search.halve()
    best = search.best()
    return replace(best.plan, method="auto", evidence=search.evidence(best))


def settled(options: AutoOptions, context: MethodContext) -> AutoOptions:
    """Returns the options without a null, except `repair_rows`: what they leave open follows from the run."""
    run = context.repair
    rounds = (2 if context.trained else 0) if options.rounds is None else options.rounds
    return options.model_copy(
        update={
            "rounds": rounds,
            "repair": options.repair or run.kind,
            "repair_rows": options.repair_rows or run.rows,
        }
    )


def _check_learned(validation: Sequence[Any]) -> None:
    if not any_learned(validation):
        raise DataError(
            f"None of the {len(validation)} samples held out to compare candidates on has a learned token.",
            hint="At least one label must differ from -100.",
        )


class _Search:
    """The candidates and the rounds they go through; the context has no sample of `validation`."""

    def __init__(self, context: MethodContext, options: AutoOptions, validation: list[Any]) -> None:
        self.context, self.options, self.validation = context, options, validation
        self.num_rounds = options.rounds or 0
        self.candidates: list[Candidate] = []
        self.failures: dict[str, str] = {}
        self.rounds: list[dict[str, int]] = []
        self.dense: Any = context.model()
        self.model = fingerprint(self.dense)
        self.steps = planned_steps(len(context.samples) + len(validation), context.finetune)

    def fill(self, num_prune: int) -> None:
        """Makes the pool."""
        options = self.options
        with Progress(len(set(options.families)), "plan auto: pool") as progress:
            self.candidates, self.failures = make_pool(
                self.context,
                num_prune,
                options.pool,
                options.families,
                options.task_loss_samples,
                report=lambda name: progress.advance(),
            )

    def measure_all(self) -> None:
        """Repairs and measures every candidate; keeps the repairs of those that can reach the first round."""
        with Progress(len(self.candidates), "plan auto: repair") as progress:
            for candidate in self.candidates:
                self._try(candidate, 0)
                self._forget_repairs(self._number(1) if self.num_rounds else 0)
                progress.advance()
        self.dense = self.dense if self.num_rounds else None

    def halve(self) -> None:
        """Trains the best candidates, round by round: fewer of them, for longer."""
        for number in range(1, self.num_rounds + 1):
            chosen = self._ranked()[: self._number(number)]
            if len(chosen) < 2:
                break
            share = self.options.share * _GROWTH ** (number - 1)
            steps = max(1, round(min(1.0, share) * self.steps))
            for candidate in chosen:
                self._try(candidate, steps)
            if not any(len(one.losses) > 1 and not one.error for one in self.candidates):
                # Those that are left were worse, and training would fail for them too.
                raise PlanError(
                    f"Training failed for all {len(chosen)} candidates of round {number}: {chosen[0].error}",
                    hint="Lower finetune.learning_rate, or train no candidate: methods.auto.rounds: 0.",
                )
            self.rounds.append({"candidates": len(chosen), "steps": steps})
            self._forget_repairs(self._number(number + 1))

    def best(self) -> Candidate:
        """Returns the winner.

        Raises:
            PlanError: If every candidate failed.
        """
        ranked = self._ranked()
        if ranked:
            return ranked[0]
        reasons = self.failures | {", ".join(one.names): one.error for one in self.candidates}
        listed = "; ".join(f"{name}: {error}" for name, error in reasons.items())
        raise PlanError(
            f"No candidate can be used. {listed}",
            hint="Choose another method than auto, or set methods.auto.repair to none.",
        )

    def evidence(self, best: Candidate) -> dict[str, Any]:
        """Returns all results, as JSON values."""
        return {
            "num_layers": self.context.num_layers,
            "model": self.model,
            "repair": self.options.repair,
            "training_samples": len(self.context.samples),
            "validation_samples": len(self.validation),
            "finetune_steps": self.steps,
            "rounds": self.rounds,
            "winner": best.names,
            "candidates": [candidate.facts() for candidate in self.candidates],
            "failed": [{"names": [name], "error": error} for name, error in self.failures.items()],
        }

    def _forget_repairs(self, kept: int) -> None:
        """Frees the repairs of all but the best `kept` candidates."""
        for beaten in self._ranked()[kept:]:
            beaten.repair = None

    def _number(self, round_number: int) -> int:
        """Number of candidates that are trained in a round, counted from 1."""
        return -(-len(self.candidates) // (1 << round_number))

    def _ranked(self) -> list[Candidate]:
        """The candidates that were measured most often, best first; ties in the order of the pool."""
        working = [one for one in self.candidates if one.losses and not one.error]
        most = max((len(one.losses) for one in working), default=0)
        return sorted((one for one in working if len(one.losses) == most), key=lambda one: one.losses[-1])

    def _try(self, candidate: Candidate, steps: int) -> None:
        """Records the candidate's loss after so many steps of training, or its error."""
        started = time.perf_counter()
        try:
            candidate.losses.append(self._loss(candidate, steps))
            candidate.steps.append(steps)
        except FAULTS as error:
            candidate.error, candidate.repair = str(error), None
        candidate.seconds += time.perf_counter() - started

    def _loss(self, candidate: Candidate, steps: int) -> float:
        plan, context = candidate.plan, self.context
        if steps == 0 and self.options.repair != "none" and plan.pruned:
            changes = {"kind": self.options.repair, "rows": self.options.repair_rows, "seed": context.seed}
            repair = context.repair.model_copy(update=changes)
            candidate.repair = fit_repair(self.dense, plan, context.samples, context.collator, repair)
        if steps == 0:
            with as_pruned(self.dense, plan, candidate.repair):
                return held_out_loss(self.dense, plan, self.validation, context)
        model = prune_(copy.deepcopy(self.dense), plan, repair=candidate.repair)
        return held_out_loss(self._trained(model, steps, candidate.names[0]), plan, self.validation, context)

    def _trained(self, model: nn.Module, steps: int, name: str) -> Any:
        tuning = self.context.finetune
        if tuning.mode == "full":
            model = model.float()  # AdamW's updates are too small for 16-bit weights
        changes = {
            "max_steps": steps,
            # The Trainer rounds warm-up up: a single step would be all warm-up.
            "warmup": int(steps * tuning.warmup_ratio),
            "seed": self.context.seed,
            "merge_adapter": True,
            "report_to": "none",
        }
        return finetune(
            model,
            self.context.samples,
            tuning.model_copy(update=changes),
            collator=self.context.collator,
            description=f"auto {name}",
        )[0]


METHODS.register("auto")(
    Method(
        "auto: repairs plans of many methods and trains the best; validation loss decides",
        plan=plan,
        options=AutoOptions,
        needs_trace=True,
        compares=True,
        alone=True,
        label="Auto",
    )
)
