"""A job: a recipe with its inputs opened and checked, before anything is recorded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.data.encoding import Collator, encode_all
from gradpruner.data.examples import ExampleSet, overlap
from gradpruner.errors import PlanError
from gradpruner.evaluation.questions import Questions
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, MethodContext, MethodOptions
from gradpruner.models.classes import model_class
from gradpruner.models.config_patch import check_keep, family_slots, required_layers, text_config
from gradpruner.models.engine_widths import portability_of
from gradpruner.models.engines import Portability, layer_facts, slots
from gradpruner.models.families import Family
from gradpruner.models.folder import locate_model
from gradpruner.models.layers import LayeredModel, skeleton
from gradpruner.models.loading import (
    check_loadable,
    refuse_narrowed,
    resolve_device,
    resolve_dtype,
)
from gradpruner.models.narrowing import width_savings
from gradpruner.models.sizes import ModelSizes
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import Plan
from gradpruner.plans.selection import Fits
from gradpruner.provenance import hash_folder, sha256_json
from gradpruner.pruning.refitting import ANSWERS, enough_rows
from gradpruner.runs.budget import placeholder_scores, plan_for
from gradpruner.runs.data_warnings import warnings_of
from gradpruner.runs.early_checks import check_methods, check_training
from gradpruner.runs.evaluation_data import (
    check_evaluation,
    data_identity,
    load_also,
    load_rows,
    metrics_of,
    tokenizer_of,
    with_validation,
)
from gradpruner.runs.plan_names import LABELS
from gradpruner.runs.recipe import Recipe
from gradpruner.training.adapters import is_4bit
from gradpruner.training.finetuning import planned_steps
from gradpruner.training.options import FinetuneOptions
from gradpruner.training.rates import default_rate, told
from gradpruner.training.recording import default_steps
from gradpruner.training.sharding import check_world_size
from gradpruner.world import this_world

REPAIR_PASSES = 2.5
"""How many times a repair passes its samples forward through all layers, about."""


@dataclass
class Job:
    """A recipe with its inputs opened: what every stage looks at.

    Making one checks the recipe against model and data, and loads no weights. `loaded` is the recipe's model
    where it is in memory already, and is never changed. Without `measures` nothing is evaluated.
    """

    recipe: Recipe
    command: str = ""
    warnings: list[str] = field(default_factory=list)
    loaded: nn.Module | None = None
    measures: bool = True

    def __post_init__(self) -> None:
        recipe = self.recipe
        for name in (*recipe.variants, *recipe.methods):
            if name not in LABELS:
                self.method_options(name)
        check_methods(recipe)
        resolve_device(recipe.model.device)
        check_training(recipe)
        check_evaluation(recipe)
        self.folder = locate_model(recipe.model.path)
        self.origin = self.folder
        refuse_narrowed(self.folder)
        self.config = check_loadable(self.folder, recipe.model.trust_remote_code)
        self._settle_repair()
        self._check_budget()
        self._choose_rate()
        self.tokenizer = tokenizer_of(recipe, self.folder)
        positions = getattr(self.config, "max_position_embeddings", None) or 2**31
        self.max_length = longest = min(recipe.data.max_length, int(positions))
        self.train, self.eval = load_rows(recipe, self.tokenizer, longest)
        self.validation: ExampleSet | None = None
        if recipe.plan.max_loss is not None or recipe.data.validation is not None or recipe.chooses_recovery:
            self.train, self.validation = with_validation(recipe, self.train, self.tokenizer, longest)
        self.also = load_also(recipe, self.tokenizer, longest)
        self.samples = encode_all(self.tokenizer, self.train.examples, longest)
        read = {"record": recipe.record.batch_size, "finetune": recipe.finetune.batch_size}
        check_world_size(len(self.samples), {f"{name}.batch_size": size for name, size in read.items()})
        self.collator = Collator(self.tokenizer)
        self._questions: dict[str, Questions] = {}
        self.overlap = overlap(self.train.examples, self.eval.examples)
        self.warnings += warnings_of(self)

    def _settle_repair(self) -> None:
        """Decides what `plan.repair: auto` means for this model."""
        if self.recipe.plan.repair != "auto":
            return
        reasons = {
            "its layers hold experts": bool(self.family.no_merge),
            "its layers hand keys and values to one another": self.family.shared_kv,
            "it is quantised": bool(getattr(self.config, "quantization_config", None)),
        }
        found = next((reason for reason, holds in reasons.items() if holds), "")
        if found:
            self.warnings.append(
                f"The model is not repaired: {found}. Only training makes up for what is cut."
            )
        kind = "least_squares" if self.recipe.start == "base" else "layer_wise"  # by docs/quality.md
        self.recipe = self.recipe.with_values(plan={"repair": "none" if found else kind})

    @cached_property
    def repair_rows(self) -> int:
        """Training samples a repair is fitted on."""
        options, samples = self.recipe.plan, self.samples
        asked = options.repair_rows or enough_rows(self.structure, list(samples), options.repair)
        return min(asked, len(samples))

    @property
    def how_repaired(self) -> tuple[str, int, float]:
        """What a repair depends on beside model and samples: kind, rows, and answers' share of the weight."""
        options, usual = self.recipe.plan, 0.0 if self.recipe.start == "base" else ANSWERS
        answers = usual if options.repair_answers is None else options.repair_answers
        return options.repair, self.repair_rows, answers

    def _check_budget(self) -> None:
        """Finds an impossible budget or plan before anything is recorded."""
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
        """Takes the default learning rate where the recipe gives none."""
        tuning, size = self.recipe.finetune, self.sizes.decoder_parameters
        self.rate_source = "as given"
        if tuning.learning_rate is None:
            self.set_rate(default_rate(size, tuning.mode), told(size, tuning.mode))

    def set_rate(self, rate: float, source: str) -> None:
        """Fine-tunes at this peak learning rate from now on; `source` says where it comes from."""
        self.recipe = self.recipe.with_values(finetune={"learning_rate": rate})
        self.rate_source = source

    def method_options(self, name: str) -> MethodOptions:
        """What the recipe sets about a method, checked."""
        return METHODS.find(name).read_options(name, self.recipe.methods.get(name, {}))

    def context(self, name: str, trace: Callable[[], GradientTrace], folder: Path) -> MethodContext:
        """What a method may look at; in `folder` it may keep checkpoints while it trains."""
        plan = self.recipe.plan
        protected = {*plan.protect, *required_layers(self.text, self.family), *range(plan.protect_first)}
        protected |= set(range(self.num_layers - plan.protect_last, self.num_layers))
        return MethodContext(
            num_layers=self.num_layers,
            seed=self.recipe.seed,
            trace=trace,
            model=lambda: self.load(self.origin),
            samples=self.samples,  # type: ignore[arg-type]
            collator=self.collator,
            norm=self.recipe.score.norm,
            num_keep=self.num_keep,
            num_remove=self.num_remove,
            unit=plan.unit,
            pruned_work=self.pruned_work,
            protected=tuple(sorted(protected)),
            fits=self.slots(),
            options=self.method_options(name),
            finetune=self.training,
            folder=folder,
        )

    def savings_of(self, plan: Plan) -> dict[str, dict[str, int]]:
        """What a plan saves, in every unit."""
        if plan.kind == "layers":
            return self.sizes.savings(plan.keep)
        return width_savings(self.skeleton(), plan)

    def skeleton(self) -> nn.Module:
        """The dense model without weights, made anew."""
        return skeleton(model_class(self.config), self.config)

    def portability_of(self, plan: Plan) -> tuple[Portability, ...]:
        """How engines serve what a plan leaves."""
        return portability_of(plan, layer_facts(self.config))

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured on the evaluation data."""
        return metrics_of(self.recipe)

    @property
    def text(self) -> Any:
        """The config of the decoder: the model's own, or a part of it."""
        return text_config(self.config)

    @cached_property
    def sizes(self) -> ModelSizes:
        """The sizes of the dense model."""
        return ModelSizes(self.config)

    @cached_property
    def structure(self) -> LayeredModel:
        """The dense model's layers, without weights."""
        counted = self.sizes.model
        # Of a model that also sees or hears, sizes are counted on the decoder alone.
        return LayeredModel(counted if type(counted) is model_class(self.config) else self.skeleton())

    @property
    def family(self) -> Family:
        """How the model keeps its layers."""
        return self.structure.family

    @cached_property
    def layer_kinds(self) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
        """Names and shapes of the linears of every layer: only equal ones can be merged."""
        view = self.structure
        return [
            tuple((name, tuple(weight.shape)) for name, weight in view.weights(i).items())
            for i in range(view.num_layers)
        ]

    def slots(self) -> Fits | None:
        """Where a layer may stand in the pruned model, for transformers and for the engines asked for."""
        rules = [
            family_slots(self.text, self.family),
            slots(layer_facts(self.config), self.recipe.plan.portable_to),
        ]
        given = [rule for rule in rules if rule is not None]
        return (lambda old, new, kept: all(fits(old, new, kept) for fits in given)) if given else None

    @property
    def num_layers(self) -> int:
        """Decoder layers of the dense model."""
        return int(self.text.num_hidden_layers)

    @property
    def training(self) -> FinetuneOptions:
        """The recipe's fine-tuning, with the run's seed and device."""
        return FinetuneOptions(
            **self.recipe.finetune.model_dump(),
            seed=self.recipe.seed,
            device="cpu" if self.device == "cpu" else "auto",
        )

    @property
    def finetune_steps(self) -> int:
        """Optimizer steps of every fine-tuning."""
        return planned_steps(len(self.samples), self.recipe.finetune)

    @property
    def recover_steps(self) -> int:
        """Optimizer steps after a tuned model was pruned; 0 for none."""
        recover = self.recipe.recover
        if recover.steps is not None or recover.epochs == 0:
            return recover.steps or 0
        tuning = self.recipe.finetune.model_copy(update={"epochs": recover.epochs})
        return planned_steps(len(self.samples), tuning)

    @property
    def pruned_work(self) -> float:
        """What a pruned row takes in all, in units of the dense model's fine-tuning; estimated.

        Steps count by their samples and layers. A repair passes its samples `REPAIR_PASSES` times forward, a
        teacher passes them once; a forward pass is a third of a training step.
        """
        recipe, options = self.recipe, self.recipe.finetune
        whole = self.finetune_steps * options.batch_size * options.accumulation
        kept = self.num_keep / self.num_layers
        share = 1.0 if recipe.start == "base" else self.recover_steps / self.finetune_steps
        work = share * kept + self.record_steps * recipe.record.batch_size / whole
        if recipe.plan.repair != "none":
            work += self.repair_rows * REPAIR_PASSES / 3 / whole
        if recipe.distils:
            work += share / 3
        return work + (1.0 if recipe.tunes_first else 0.0)

    @property
    def record_steps(self) -> int:
        """Optimizer steps that are recorded."""
        return self.recipe.record.steps or default_steps(self.finetune_steps)

    @cached_property
    def model_sha256(self) -> str:
        """Hash of config and weights."""
        return _hash_of(self.folder)

    @property
    def learned(self) -> dict[str, Any]:
        """What every training, and every choice by training rows, depends on."""
        return {"train": data_identity(self.train), "max_length": self.max_length, "seed": self.recipe.seed}

    @property
    def loading(self) -> dict[str, Any]:
        """How models are loaded, wherever they are."""
        return self.recipe.model.model_dump(exclude={"path"})

    @property
    def spread(self) -> dict[str, int]:
        """What training depends on beside the recipe: every process adds a batch to a step."""
        size = this_world().size
        return {"processes": size} if size > 1 else {}

    def rows(self, name: str) -> ExampleSet:
        """What is measured on: "eval", "validation", or the name of one of the further tasks."""
        return {"eval": self.eval, "validation": self.validation or self.eval, **self.also}[name]

    def questions(self, name: str) -> Questions:
        """Rows as for `rows`, tokenised once for all evaluations."""
        if name not in self._questions:
            self._questions[name] = Questions(self.tokenizer, self.rows(name).examples, self.max_length)
        return self._questions[name]

    def prune_from(self, folder: Path) -> None:
        """Makes the dense model tuned before (start: tuned) what is recorded on and pruned from now on."""
        self.origin = folder
        self.__dict__.pop("origin_sha256", None)

    @cached_property
    def origin_sha256(self) -> str:
        """Hash of config and weights of the model that is pruned."""
        return self.model_sha256 if self.origin == self.folder else _hash_of(self.origin)

    @property
    def device(self) -> str:
        """The torch device stages run on."""
        return str(resolve_device(self.recipe.model.device))

    def input_hashes(self) -> dict[str, str]:
        """SHA-256 of everything the run reads."""
        hashes = {"model": self.model_sha256, "train": self.train.sha256, "eval": self.eval.sha256}
        return hashes | ({"plan": sha256_json(self.given_plan.to_dict())} if self.given_plan else {})

    def load(self, folder: Path, *, dtype: str | None = None, quantise: bool = False) -> nn.Module:
        """Loads a model folder as the recipe says."""
        return self.recipe.model.load(folder, dtype=dtype, quantise=quantise)

    def load_origin(self, *, quantise: bool = False) -> nn.Module:
        """The model that is pruned, to be looked at: as it was handed in if it is as it would be loaded."""
        wanted = resolve_dtype(self.recipe.model.dtype, resolve_device(self.recipe.model.device))
        given = self.loaded if self.origin == self.folder and not quantise else None
        if given is not None and {p.dtype for p in given.parameters()} == {wanted}:
            return given
        return self.load(self.origin, quantise=quantise)

    def release(self, model: Any) -> None:
        """Gives a loaded model's memory back before the next one is loaded."""
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


def _hash_of(folder: Path) -> str:
    return hash_folder([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
