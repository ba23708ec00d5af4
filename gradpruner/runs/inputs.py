"""What a recipe reads: its model without weights, and its rows; opened, checked and counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from gradpruner.common.provenance import hash_folder
from gradpruner.common.world import this_world
from gradpruner.data.encoding import Collator, encode_all
from gradpruner.data.examples import ExampleSet, overlap
from gradpruner.evaluation.questions import Questions
from gradpruner.models.classes import model_class
from gradpruner.models.config_patch import family_slots, text_config
from gradpruner.models.engine_widths import portability_of
from gradpruner.models.engines import Portability, layer_facts, slots
from gradpruner.models.families import Family
from gradpruner.models.folder import locate_model
from gradpruner.models.layers import LayeredModel, skeleton
from gradpruner.models.loading import check_loadable, refuse_narrowed, resolve_device
from gradpruner.models.narrowing import width_savings
from gradpruner.models.sizes import ModelSizes
from gradpruner.plans.reading import Plan
from gradpruner.plans.selection import Fits
from gradpruner.runs.evaluation_data import (
    data_identity,
    load_also,
    load_rows,
    metrics_of,
    tokenizer_of,
    with_validation,
)
from gradpruner.runs.recipe import Recipe
from gradpruner.training.finetuning import planned_steps
from gradpruner.training.recording import default_steps
from gradpruner.training.sharding import check_world_size


@dataclass
class Inputs:
    """The model and the rows of a recipe; no weights are loaded. `runs.job.Job` is what is made of them.

    `loaded` is the recipe's model where it is in memory already, and is never changed. Without `measures`
    nothing is evaluated.
    """

    recipe: Recipe
    command: str = ""
    warnings: list[str] = field(default_factory=list)
    loaded: nn.Module | None = None
    measures: bool = True

    def open_model(self) -> None:
        """Finds the model and reads its config."""
        model = self.recipe.model
        self.folder = locate_model(model.path)
        refuse_narrowed(self.folder)
        self.config = check_loadable(self.folder, model.trust_remote_code)

    def open_rows(self) -> None:
        """Reads and encodes the rows of every set."""
        recipe = self.recipe
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
    def finetune_steps(self) -> int:
        """Optimizer steps of every fine-tuning."""
        return planned_steps(len(self.samples), self.recipe.finetune)

    @property
    def record_steps(self) -> int:
        """Optimizer steps that are recorded."""
        return self.recipe.record.steps or default_steps(self.finetune_steps)

    @cached_property
    def model_sha256(self) -> str:
        """Hash of config and weights."""
        return hash_model(self.folder)

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

    @property
    def device(self) -> str:
        """The torch device stages run on."""
        return str(resolve_device(self.recipe.model.device))

    def load(self, folder: Path, *, dtype: str | None = None, quantise: bool = False) -> nn.Module:
        """Loads a model folder as the recipe says."""
        return self.recipe.model.load(folder, dtype=dtype, quantise=quantise)


def hash_model(folder: Path) -> str:
    """Hash of a folder's config and weights."""
    return hash_folder([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
