"""Auto: many plans, each repaired; the best are trained a little, and the best of these a little longer."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import nn

from gradpruner.common.errors import DataError, PlanError
from gradpruner.common.progress import Progress
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.calibration import mean_nll
from gradpruner.methods.candidates import FAMILIES, FAULTS, Candidate, Family, make_pool
from gradpruner.models.layers import fingerprint
from gradpruner.models.walking import BATCH_SIZE, sample_batches
from gradpruner.plans.layer_plan import PruningPlan, runs_of
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.refitting import fit_repair
from gradpruner.training.finetuning import finetune, planned_steps

_GROWTH = 3  # of the steps, from round to round


class AutoOptions(MethodOptions):
    """What can be set about the search."""

    pool: int = Field(default=12, ge=1)
    """Plans to choose from, at most."""
    families: list[Family] = Field(default=list(FAMILIES), min_length=1)
    """Where plans come from; the first ones where the pool is too small for all."""
    validation_samples: int = Field(default=128, ge=1)
    """Training samples put aside to choose by, at most a quarter of all."""
    repair: Literal["none", "linear", "least_squares", "layer_wise"] = "least_squares"
    """How every candidate is repaired before it is judged and trained."""
    repair_rows: int | None = Field(default=None, ge=2)
    """Training samples a repair is fitted on, at most; null: as many as determine it well."""
    rounds: int = Field(default=2, ge=0, le=3)
    """Rounds of training; 0: the choice is made without any."""
    share: float = Field(default=0.05, gt=0, le=1)
    """Steps of the first round, as a share of those of the fine-tuning to come; three times as many in each
    further round."""
    task_loss_samples: int = Field(default=32, ge=1)
    """Samples on which the family task_loss searches."""


def plan(context: MethodContext) -> PruningPlan:
    """The plan whose repaired model has the lowest loss on samples put aside, after some training.

    1. `validation_samples` of the training samples, drawn with the seed, at most a quarter of all, are put
       aside. No family chooses by them, and nothing is fitted or trained on them. (The trace was recorded
       before, so it may have seen some of them.)
    2. A pool of plans is made, see `candidates.make_pool`.
    3. Every candidate is pruned and repaired and its loss on the samples put aside is measured: mean negative
       log-likelihood of the learned tokens, in nats.
    4. In round r = 1 ... `rounds` the best ceil(candidates / 2^r) are trained for `share` * 3^(r - 1) of the
       steps of the fine-tuning to come, each anew from its repaired state and with the options of that
       fine-tuning (its schedule runs to the end within these steps), and their losses measured again. A round
       with a single candidate is left out.

    The best of the last round is the plan, of equal ones the first in the pool. A candidate or family that
    fails is noted; it is an error only if no candidate is left. `evidence["candidates"]` is the whole table.
    docs/methods.md says what it costs. Memory: the model, a pruned copy in training (float32 where every
    weight is trained), and on the CPU the refitted weights of the best half of the pool.

    The plan holds no repair: set `plan.repair` to what candidates were judged with.

    Raises:
        PlanError: If no candidate is left, naming what each failed with.
        DataError: If there are fewer than two samples, or those put aside have no learned token.

    Source: successive halving (Jamieson and Talwalkar, 2016).
    """
    options: AutoOptions = context.options or AutoOptions()
    num_prune = context.num_layers - context.kept()
    validation, rest = put_aside(context.samples, options.validation_samples, context.seed)
    _check_learned(validation)
    search = _Search(replace(context, samples=rest), options, validation)
    if num_prune:
        search.fill(num_prune)
    else:
        whole = PruningPlan.from_keep(context.num_layers, range(context.num_layers))
        search.candidates = [Candidate(["whole"], whole)]
    search.judge()
    search.halve()
    best = search.best()
    return replace(best.plan, method="auto", evidence=search.evidence(best))


def put_aside(samples: Sequence[Any], count: int, seed: int) -> tuple[list[Any], list[Any]]:
    """`count` samples to choose by (at least one, at most a quarter of all), and all others.

    Raises:
        DataError: If there are fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(
            f"There are {len(samples)} training samples; one to train on and one to judge by are needed.",
            hint="Give more rows.",
        )
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    number = max(1, min(count, len(samples) // 4))
    chosen = set(order[:number])
    aside = [samples[i] for i in range(len(samples)) if i in chosen]
    return aside, [samples[i] for i in range(len(samples)) if i not in chosen]


def _check_learned(validation: Sequence[Any]) -> None:
    if not any(label != -100 for sample in validation for label in sample["labels"][1:]):
        raise DataError(
            f"None of the {len(validation)} samples put aside to choose by has a learned token.",
            hint="At least one label has to differ from -100.",
        )


class _Search:
    """The candidates and their way through the rounds; the context has no sample of `validation`."""

    def __init__(self, context: MethodContext, options: AutoOptions, validation: list[Any]) -> None:
        self.context, self.options, self.validation = context, options, validation
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

    def judge(self) -> None:
        """Repairs and measures every candidate; keeps the repairs of those that may be trained."""
        with Progress(len(self.candidates), "plan auto: repair") as progress:
            for candidate in self.candidates:
                self._try(candidate, 0)
                self._forget_repairs(self._number(1) if self.options.rounds else 0)
                progress.advance()
        self.dense = None if self.options.rounds == 0 else self.dense

    def halve(self) -> None:
        """Trains the best, then fewer for longer."""
        for number in range(1, self.options.rounds + 1):
            chosen = self._ranked()[: self._number(number)]
            if len(chosen) < 2:
                break
            share = self.options.share * _GROWTH ** (number - 1)
            steps = max(1, round(min(1.0, share) * self.steps))
            for candidate in chosen:
                self._try(candidate, steps)
            self.rounds.append({"candidates": len(chosen), "steps": steps})
            self._forget_repairs(self._number(number + 1))

    def best(self) -> Candidate:
        """The winner.

        Raises:
            PlanError: If every candidate failed.
        """
        ranked = self._ranked()
        if ranked:
            return ranked[0]
        reasons = self.failures | {", ".join(one.names): one.error for one in self.candidates}
        told = "; ".join(f"{name}: {error}" for name, error in reasons.items())
        raise PlanError(
            f"None of the plans can be used. {told}",
            hint="Take a method by name, or set methods.auto.repair to none.",
        )

    def evidence(self, best: Candidate) -> dict[str, Any]:
        """Everything that was found, as JSON values."""
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
        """Frees all repairs but those of the best."""
        for beaten in self._ranked()[kept:]:
            beaten.repair = None

    def _number(self, number: int) -> int:
        """Candidates trained in a round."""
        return -(-len(self.candidates) // (1 << number))

    def _ranked(self) -> list[Candidate]:
        """Those with the most rounds behind them, best first; of equal ones the first in the pool."""
        fit = [one for one in self.candidates if one.losses and not one.error]
        furthest = max((len(one.losses) for one in fit), default=0)
        return sorted((one for one in fit if len(one.losses) == furthest), key=lambda one: one.losses[-1])

    def _try(self, candidate: Candidate, steps: int) -> None:
        """Adds the loss after these steps of training, or the error."""
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
            candidate.repair = fit_repair(
                self.dense,
                plan,
                context.samples,
                context.collator,
                kind=self.options.repair,
                rows=self.options.repair_rows,
                seed=context.seed,
            )
        model: Any = prune_(copy.deepcopy(self.dense), plan, repair=candidate.repair)
        if steps:
            model = self._trained(model, steps, candidate.names[0])
        model.eval()
        device = next(model.parameters()).device
        batches = sample_batches(self.validation, context.collator, device, BATCH_SIZE)
        return mean_nll(model, batches, f"without layers {runs_of(plan.pruned)}")

    def _trained(self, model: nn.Module, steps: int, name: str) -> Any:
        tuning = self.context.finetune
        if tuning.mode == "full":
            model = model.float()  # updates of AdamW are below the resolution of 16 bits
        changes = {
            "max_steps": steps,
            # The Trainer rounds warm-up up: of a single step nothing would be left.
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
        "auto: plans of many methods, each repaired, the best trained on; validation loss decides",
        plan=plan,
        options=AutoOptions,
        needs_trace=True,
        alone=True,
        label="Auto",
    )
)
