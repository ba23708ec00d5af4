"""A job: a recipe with its inputs opened and checked, before anything is recorded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.common.errors import DataError, PlanError
from gradpruner.common.provenance import sha256_json
from gradpruner.data.examples import ExampleSet
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, MethodContext, MethodOptions
from gradpruner.models.config_patch import check_keep, required_layers
from gradpruner.models.loading import resolve_device, resolve_dtype
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.options import RepairOptions
from gradpruner.pruning.repair.refitting import enough_rows
from gradpruner.runs.folder.plan_names import LABELS, method_of, takes_given_plan
from gradpruner.runs.job.budget import placeholder_scores, plan_for
from gradpruner.runs.job.data_warnings import warnings_of
from gradpruner.runs.job.early_checks import check_changed_training, check_methods, check_training
from gradpruner.runs.job.evaluation_data import check_evaluation, data_identity
from gradpruner.runs.job.inputs import Inputs, hash_model
from gradpruner.runs.recipe.effects import keys_of
from gradpruner.runs.recipe.recipe import FAST_ROWS
from gradpruner.training.adapters import is_4bit
from gradpruner.training.finetuning import chosen_accumulation, planned_steps
from gradpruner.training.options import FinetuneOptions
from gradpruner.training.rates import default_rate, default_rate_source

_TOKENS_BEFORE_TUNING, _SHARE_BEFORE_TUNING = 5, 8
"""A repair before tuning: tokens for each unknown at least, and one in so many training samples."""
REPAIR_PASSES = 2.5
"""About how many times a repair passes its samples forward through all layers."""


@dataclass
class Job(Inputs):
    """A recipe with its inputs opened and checked, which every stage uses. Making one loads no weights."""

    def __post_init__(self) -> None:
        recipe = self.recipe
        for name in (*recipe.variants, *recipe.methods):
            if name not in LABELS:
                self.method_options(name)
        check_methods(recipe)
        resolve_device(recipe.model.device)
        check_training(recipe)
        check_evaluation(recipe)
        self.open_model()
        self.origin = self.folder
        self._settle_repair()
        self._check_budget()
        self._choose_rate()
        self.open_rows()
        self._settle_rows()
        self._check_repair_rows()
        self._choose_accumulation()
        steps = self.finetune_steps if recipe.start == "base" else self.recover_steps
        check_changed_training(self.recipe, self.training, steps)
        self._note_repeated_samples()
        self.warnings += warnings_of(self)

    def _note_repeated_samples(self) -> None:
        size = self.recipe.record.batch_size
        if len(self.samples) < self.recorded_steps * size:
            self.warnings.append(
                f"{len(self.samples)} training samples for {self.recorded_steps} recording steps of {size}: "
                "samples are used more than once."
            )

    def _settle_repair(self) -> None:
        """Replaces `plan.repair: auto` by the repair that suits this model."""
        if self.recipe.plan.repair != "auto":
            return
        reasons = {
            "its layers hold experts": bool(self.family.no_merge),
            "its layers share keys and values": self.family.shared_kv,
            "it is quantised": bool(getattr(self.config, "quantization_config", None)),
        }
        found = next((reason for reason, holds in reasons.items() if holds), "")
        if found:
            self.warnings.append(
                f"The model is not repaired: {found}. Only training can make up for the layers removed."
            )
        kind = "least_squares" if self.recipe.start == "base" else "layer_wise"  # by docs/quality.md
        self.recipe = self.recipe.with_values(plan={"repair": "none" if found else kind})

    def _settle_rows(self) -> None:
        """Lets the gate choose the layers of effort `fast` where answers are long, by docs/quality.md."""
        chosen = not self.recipe.names_rows and self.recipe.variants == ["dense", FAST_ROWS[0]]
        if chosen and self.has_long_answers:
            self.recipe = self.recipe.model_copy(update={"variants": ["dense", FAST_ROWS[1]]})

    def _check_repair_rows(self) -> None:
        """Refuses to repair with a single sample: one more is needed to choose the ridge by."""
        if self.recipe.plan.repair != "none" and len(self.samples) < 2:
            raise DataError(
                "There is only one training sample, and a repair needs two at least.",
                hint="Give more rows, or repair nothing: plan.repair=none.",
            )

    @cached_property
    def repair_rows(self) -> int:
        """How many training samples a repair is fitted on."""
        samples, fit = list(self.samples), self._fit
        asked = self.recipe.plan.repair_rows or enough_rows(self.structure, samples, fit)
        if self.recipe.start == "base" and self.recipe.plan.repair_rows is None:  # the fewest; more if cheap
            well = enough_rows(self.structure, samples, RepairOptions(kind=fit.kind))
            asked = max(asked, min(well, len(samples) // _SHARE_BEFORE_TUNING))
        return min(asked, len(samples))

    @property
    def _fit(self) -> RepairOptions:
        """How a repair is fitted, without the number of samples.

        Before tuning, all positions count equally unless the recipe says more, and fewer samples will do, by
        docs/quality.md: the model is trained on all of them afterwards.
        """
        plan = self.recipe.plan
        found = RepairOptions(kind=plan.repair, seed=self.recipe.seed)  # type: ignore[arg-type]  # "auto" is settled
        if self.recipe.start == "base":
            found = found.model_copy(update={"answers": 0.0, "tokens_per_unknown": _TOKENS_BEFORE_TUNING})
        given = {} if plan.repair_answers is None else {"answers": plan.repair_answers}
        return found.model_copy(update=given)

    @property
    def repair(self) -> RepairOptions:
        """How a repair is fitted."""
        return self._fit.model_copy(update={"rows": max(self.repair_rows, 2)})

    @property
    def repair_inputs(self) -> list[Any]:
        """What a repair depends on, besides its plan, the model, the samples and the seed."""
        return [self.repair.kind, self.repair.rows, self.repair.answers]

    def _check_budget(self) -> None:
        """Refuses an impossible budget or plan before anything is recorded."""
        plan = plan_for(self, placeholder_scores(self.num_layers), merging=False)
        self.given_plan: PruningPlan | None = None
        if self.recipe.plan.file is not None:
            plan = self.given_plan = PruningPlan.load(self.recipe.plan.file)
            plan.check_model(self.num_layers)
            self.warnings += check_keep(self.text, self.family, plan)
        self.num_keep = len(plan.keep)
        self.expected_plan = plan
        removed = self.sizes.savings(plan.keep)["parameters"]
        self.num_remove = removed["before"] - removed["after"]
        merges = "merged" in self.recipe.variants and self.recipe.plan.num_merge and self.given_plan is None
        if merges and self.family.no_merge:
            raise PlanError(
                f"plan.num_merge is {self.recipe.plan.num_merge}, but layers of {self.text.model_type} "
                f"models can only be dropped: {self.family.no_merge}.",
                hint="Use --set plan.num_merge=0 and --set 'variants=[dense, dropped]'.",
            )

    def _choose_rate(self) -> None:
        """Sets the default learning rate if the recipe gives none."""
        tuning, size = self.recipe.finetune, self.sizes.decoder_parameters
        self.rate_source = "as given"
        if tuning.learning_rate is None:
            self.set_rate(default_rate(size, tuning.mode), default_rate_source(size, tuning.mode))
            if self.recipe.start == "given" and self.recipe.recover.trains:
                # Other processes, and fingerprints, see the resolved recipe, in which a default rate looks
                # like a given one.
                self.recipe = self.recipe.with_values(recover={"learning_rate": self.recover_rate})

    def _choose_accumulation(self) -> None:
        """Chooses the accumulation if the recipe leaves it open: with few rows, steps are smaller."""
        tuning, given = self.recipe.finetune, self.recipe.start == "given"
        if tuning.accumulation is None:
            # A model that is tuned already is trained in steps of the paper's size.
            passes = 8 if given else chosen_accumulation(len(self.samples), tuning)
            self.recipe = self.recipe.with_values(finetune={"accumulation": passes})

    def set_rate(self, rate: float, source: str) -> None:
        """Sets the peak learning rate of fine-tuning; `source` tells the user where it comes from."""
        self.recipe = self.recipe.with_values(finetune={"learning_rate": rate})
        self.rate_source = source

    def method_options(self, name: str) -> MethodOptions:
        """The options the recipe gives a method, checked."""
        return METHODS.find(name).read_options(name, self.recipe.methods.get(name, {}))

    def context(self, name: str, trace: Callable[[], GradientTrace], folder: Path) -> MethodContext:
        """What a method may look at; it may keep checkpoints in `folder` while it trains."""
        plan = self.recipe.plan
        protected = {*plan.protect, *required_layers(self.text, self.family), *range(plan.protect_first)}
        protected |= set(range(self.num_layers - plan.protect_last, self.num_layers))
        return MethodContext(
            num_layers=self.num_layers,
            seed=self.recipe.seed,
            trace=trace,
            model=lambda: self.load(self.origin),
            samples=self.samples,
            collator=self.collator,
            norm=self.recipe.score.norm,
            num_keep=self.num_keep,
            num_remove=self.num_remove,
            unit=plan.unit,
            pruned_work=self.pruned_work,
            repair=self.repair,
            trained=self.recipe.trains_pruned,
            protected=tuple(sorted(protected)),
            fits=self.slots(),
            validation=self.validation_samples if self._compared_on else None,
            make_plan=partial(plan_for, self, merging=False),
            options=self.method_options(name),
            options_of=self.method_options,
            # A method that sets keys of the training tunes the dense model.
            finetune=self.training if METHODS.find(name).training else self.pruned_training,
            folder=folder,
        )

    @property
    def training(self) -> FinetuneOptions:
        """The recipe's fine-tuning, with the run's seed and device."""
        return FinetuneOptions(
            **self.recipe.finetune.model_dump(),
            seed=self.recipe.seed,
            device="cpu" if self.device == "cpu" else "auto",
        )

    @property
    def pruned_training(self) -> FinetuneOptions:
        """How pruned models are trained: as the dense one or, if a tuned model was pruned, by `recover`."""
        recover = self.recipe.recover
        if self.recipe.start == "base" or not recover.trains:
            return self.training
        length = {"epochs": recover.epochs} if recover.steps is None else {"max_steps": recover.steps}
        return self.training.model_copy(update={"learning_rate": self.recover_rate, **length})

    @property
    def recover_rate(self) -> float | None:
        """Peak learning rate of recovery: the recipe's, or half of fine-tuning's."""
        recover, tuning = self.recipe.recover.learning_rate, self.recipe.finetune.learning_rate
        # With start: given, recovery is the only training, so a rate for fine-tuning is meant for it.
        meant = self.recipe.start == "given" and self.rate_source == "as given"
        if recover or meant or not tuning:
            return recover or tuning
        return tuning / 2

    @property
    def recover_steps(self) -> int:
        """Optimizer steps of recovery, after a tuned model was pruned; 0 for none."""
        recover = self.recipe.recover
        if recover.steps is not None or recover.epochs == 0:
            return recover.steps or 0
        tuning = self.recipe.finetune.model_copy(update={"epochs": recover.epochs})
        return planned_steps(len(self.samples), tuning)

    @property
    def pruned_work(self) -> float:
        """Estimated compute of one pruned row, recording included, in units of the dense fine-tuning.

        Training counts samples times layers. A forward pass costs a third of a training step: a repair passes
        its samples forward `REPAIR_PASSES` times, a teacher once.
        """
        recipe, options = self.recipe, self.training
        dense_samples = self.finetune_steps * options.batch_size * options.accumulation
        kept = self.num_keep / self.num_layers
        share = 1.0 if recipe.start == "base" else self.recover_steps / self.finetune_steps
        work = share * kept + self.recorded_steps * recipe.record.batch_size / dense_samples
        fits = max((self.repairs_of(name) for name in recipe.variants if name != "dense"), default=0)
        work += fits * self.repair_rows * REPAIR_PASSES / 3 / dense_samples
        if recipe.distils:
            work += share / 3
        return work + (1.0 if recipe.tunes_first else 0.0)

    def reads_trace(self, variant: str) -> bool:
        """Whether a pruned row reads recorded gradients, by its method or the plan given for it."""
        if self.given_plan is not None and takes_given_plan(variant):
            return self.given_plan.needs_trace
        return METHODS.find(method_of(variant)).needs_trace

    @property
    def recorded_steps(self) -> int:
        """Optimizer steps that a run records: none if no row reads gradients."""
        return self.record_steps * any(self.reads_trace(v) for v in self.recipe.variants if v != "dense")

    def repairs_of(self, variant: str) -> int:
        """How many repairs a pruned row fits: one, or one for each of two plans that it compares.

        In the second case, one more if the samples set aside are needed for the final one.
        """
        method = METHODS.find(method_of(variant))
        if self.recipe.plan.repair == "none":
            return 0
        if not (method.compares and method.score) or self.given_plan:
            return 1
        aside: int = self.method_options(variant).validation_samples  # type: ignore[attr-defined]
        rest = len(self.samples)
        rest -= min(aside, rest // 4) if self._compared_on is None else 0
        return 2 if self.repair_rows <= rest else 3

    @property
    def _compared_on(self) -> ExampleSet | None:
        """Rows to compare choices of layers by: validation rows, unless these certify a loss later."""
        return self.validation if self.recipe.plan.max_loss is None else None

    @property
    def record_inputs(self) -> dict[str, Any]:
        """What the recorded gradients depend on."""
        return {
            "model": self.origin_sha256,
            "record": self.recipe.record.model_dump(),
            "steps": self.record_steps,
            "loading": self.loading,
            "precision": self.recipe.finetune.precision,
            **self.learned,
            **self.spread,
        }

    def decision_inputs(self, name: str) -> dict[str, Any]:
        """What the scores of a method depend on, or its plan if it plans without scores."""
        options, method = self.recipe.plan, METHODS.find(name)
        found: dict[str, Any] = {}
        if method.compares:
            found["compared"] = [*self.repair_inputs, self.recipe.trains_pruned]
        if method.compares and method.score:  # it compares the run's plans; num_keep is part of the result
            counted = {"num_prune", "layer_fraction"}
            excluded = keys_of("plan", "choice", "depth", "repair") | counted
            found["validation"] = data_identity(self._compared_on) if self._compared_on else None
            found["plan"] = options.model_dump(exclude=excluded)
        elif method.compares and self.recipe.trains_pruned:  # it trains its candidates
            excluded = keys_of("finetune", "execution")
            found["training"] = self.pruned_training.model_dump(exclude=excluded | {"seed", "device"})
        asked = {other: self.method_options(other) for other in method.asks}
        if any(options != METHODS.find(other).options() for other, options in asked.items()):
            found["asked"] = {other: options.model_dump(mode="json") for other, options in asked.items()}
        return found | {
            "method": name,
            "options": self.method_options(name).model_dump(mode="json"),
            "score": self.recipe.score.model_dump(),
            "num_keep": self.num_keep,
            "protect": [options.protect_first, options.protect_last, options.protect],
            "budget": None if method.score else [self.num_remove, options.unit],
            "portable_to": list(options.portable_to),
            "loading": self.loading,
            "record": self.record_inputs if method.needs_trace else None,
            "model": self.origin_sha256,
            **self.learned,
        }

    def prune_from(self, folder: Path) -> None:
        """Sets the model that is recorded and pruned: with start: tuned, the dense model after its tuning."""
        self.origin = folder
        self.__dict__.pop("origin_sha256", None)

    @cached_property
    def origin_sha256(self) -> str:
        """Hash of the config, weights and tokenizer of the model that is pruned."""
        return self.model_sha256 if self.origin == self.folder else hash_model(self.origin)

    def input_hashes(self) -> dict[str, str]:
        """SHA-256 of every input of the run, by its name."""
        hashes = {"model": self.model_sha256, "train": self.train.sha256, "eval": self.eval.sha256}
        return hashes | ({"plan": sha256_json(self.given_plan.to_dict())} if self.given_plan else {})

    def load_origin(self, *, quantise: bool = False) -> nn.Module:
        """Returns the model that is pruned, not to be changed.

        A model given in memory is returned as it is if it has the dtype that loading would give it.
        """
        wanted = resolve_dtype(self.recipe.model.dtype, resolve_device(self.recipe.model.device))
        given = self.loaded if self.origin == self.folder and not quantise else None
        if given is not None and {p.dtype for p in given.parameters()} == {wanted}:
            return given
        return self.load(self.origin, quantise=quantise)

    def release(self, model: Any) -> None:
        """Frees the memory of a loaded model; a model given in memory is left alone."""
        if model is self.loaded:
            return
        if is_4bit(model):  # bitsandbytes refuses to be moved
            for module in model.modules():
                module._parameters.update(dict.fromkeys(module._parameters))
        else:
            model.to("meta")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
