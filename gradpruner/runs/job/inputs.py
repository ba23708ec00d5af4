"""The inputs of a recipe, its model without weights and its rows: opened, checked and counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from gradpruner.common.provenance import hash_folder
from gradpruner.common.world import this_world
from gradpruner.data.encoding import Collator, EncodedDataset, encode_all
from gradpruner.data.examples import Example, ExampleSet, overlap
from gradpruner.evaluation.questions import Questions
from gradpruner.models.classes import model_class
from gradpruner.models.config_patch import family_slots, text_config
from gradpruner.models.engine_widths import portability_of
from gradpruner.models.engines import Portability, layer_facts, slots
from gradpruner.models.families import Family
from gradpruner.models.folder import locate_model
from gradpruner.models.layers import LayeredModel, skeleton
from gradpruner.models.loading import check_loadable, refuse_narrowed, resolve_device
from gradpruner.models.sizes import ModelSizes
from gradpruner.models.widths import WidthView
from gradpruner.plans.reading import Plan
from gradpruner.plans.selection import Placeable
from gradpruner.runs.job.evaluation_data import (
    LONG_ANSWER,
    data_identity,
    load_rows,
    load_split,
    metrics_of,
    tokenizer_of,
    with_metrics,
    with_validation,
)
from gradpruner.runs.recipe.recipe import Recipe
from gradpruner.runs.recipe.sections import EvaluateSection
from gradpruner.training.finetuning import planned_steps
from gradpruner.training.recording import default_steps
from gradpruner.training.sharding import check_world_size


@dataclass
class Inputs:
    """The model and the rows of a recipe; no weights are loaded. `runs.job.Job` builds on it.

    Attributes:
        command: How the user called it, for the report.
        warnings: What the user should know, in sentences.
        loaded: The recipe's model if it is in memory already; it is never changed.
        measures: Whether anything is evaluated.
    """

    recipe: Recipe
    command: str = ""
    warnings: list[str] = field(default_factory=list)
    loaded: nn.Module | None = None
    measures: bool = True

    def open_model(self) -> None:
        """Finds the model, reads its config and builds it without weights."""
        model = self.recipe.model
        self.folder = locate_model(model.path)
        refuse_narrowed(self.folder)
        self.config, built = check_loadable(self.folder, model.trust_remote_code)
        self.structure = LayeredModel(built or skeleton(model_class(self.config), self.config))

    def open_rows(self) -> None:
        """Reads and encodes the rows of every set."""
        recipe = self.recipe
        self.tokenizer = tokenizer_of(recipe, self.folder)
        positions = getattr(self.config, "max_position_embeddings", None) or 2**31
        self.max_length = longest = min(recipe.data.max_length, int(positions))
        self.train, self.eval = load_rows(recipe, self.tokenizer, longest)
        recipe = self.recipe = with_metrics(recipe, self.eval, self.tokenizer)
        self.validation: ExampleSet | None = None
        if recipe.plan.max_loss is not None or recipe.data.validation is not None or recipe.chooses_recovery:
            self.train, self.validation = with_validation(recipe, self.train, self.tokenizer, longest)
        self.also = {
            entry.task: load_split(recipe, entry.task, self.tokenizer, longest)
            for entry in recipe.evaluate.also
        }
        self.samples = self.encode(self.train.examples)
        sizes = {"record": recipe.record.batch_size, "finetune": recipe.finetune.batch_size}
        check_world_size(len(self.samples), {f"{name}.batch_size": size for name, size in sizes.items()})
        self.collator = Collator(self.tokenizer)
        self._questions: dict[str, Questions] = {}
        self.overlap = overlap(self.train.examples, self.eval.examples)
        checked = self.validation.examples if self.validation is not None else ()
        self.validation_overlap = overlap(self.train.examples, checked)

    def encode(self, examples: Sequence[Example]) -> EncodedDataset:
        """Tokenises examples as training samples."""
        return encode_all(self.tokenizer, examples, self.max_length)

    @cached_property
    def validation_samples(self) -> EncodedDataset:
        """The validation rows as training samples, for their loss."""
        assert self.validation is not None
        return self.encode(self.validation.examples)

    def savings_of(self, plan: Plan) -> dict[str, dict[str, int]]:
        """What a plan saves, in every unit."""
        if plan.kind == "layers":
            return self.sizes.savings(plan.keep)
        return WidthView(self.structure.model).savings(plan)

    def portability_of(self, plan: Plan) -> tuple[Portability, ...]:
        """Whether inference engines serve the model that a plan leaves correctly."""
        return portability_of(plan, layer_facts(self.config))

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured on the recipe's own evaluation rows."""
        return metrics_of(self.recipe)

    @property
    def text(self) -> Any:
        """The config of the decoder: the model's config, or the part of it about text."""
        return text_config(self.config)

    @cached_property
    def sizes(self) -> ModelSizes:
        """The sizes of the dense model; of one that also takes images or sound, those of its decoder."""
        return ModelSizes(self.structure.model if self.text is self.config else self.config)

    @property
    def family(self) -> Family:
        """What is known about the model's architecture."""
        return self.structure.family

    @cached_property
    def layer_kinds(self) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
        """Names and shapes of the linears of each layer; only layers with equal ones can be merged."""
        view = self.structure
        return [
            tuple((name, tuple(weight.shape)) for name, weight in view.weights(i).items())
            for i in range(view.num_layers)
        ]

    def slots(self) -> Placeable | None:
        """Where a layer may stand in the pruned model: transformers' rules and those of plan.portable_to."""
        rules = [
            family_slots(self.text, self.family),
            slots(layer_facts(self.config), self.recipe.plan.portable_to),
        ]
        given = [rule for rule in rules if rule is not None]
        return (lambda old, new, kept: all(fits(old, new, kept) for fits in given)) if given else None

    @property
    def answer_tokens(self) -> float:
        """Mean number of learned tokens of the training samples."""
        return self.samples.supervised_tokens / len(self.samples)

    @property
    def has_long_answers(self) -> bool:
        """Whether the model learns to write sentences rather than a class or a few words."""
        return self.answer_tokens >= LONG_ANSWER

    @property
    def num_layers(self) -> int:
        """Decoder layers of the dense model."""
        return int(self.text.num_hidden_layers)

    @property
    def finetune_steps(self) -> int:
        """Optimizer steps of each fine-tuning."""
        return planned_steps(len(self.samples), self.recipe.finetune)

    @property
    def record_steps(self) -> int:
        """Optimizer steps that are recorded."""
        return self.recipe.record.steps or default_steps(self.finetune_steps)

    @cached_property
    def model_sha256(self) -> str:
        """Hash of the model's config, weights and tokenizer."""
        return hash_model(self.folder)

    @property
    def learned(self) -> dict[str, Any]:
        """What everything computed from training rows depends on."""
        return {"train": data_identity(self.train), "max_length": self.max_length, "seed": self.recipe.seed}

    @property
    def loading(self) -> dict[str, Any]:
        """How models are loaded: the model section without the path."""
        return self.recipe.model.model_dump(exclude={"path"})

    @property
    def spread(self) -> dict[str, int]:
        """What training depends on besides the recipe: each process adds a batch to a step."""
        size = this_world().size
        return {"processes": size} if size > 1 else {}

    def rows(self, name: str) -> ExampleSet:
        """The rows to measure on: "eval", "validation", or the name of a further task."""
        return {"eval": self.eval, "validation": self.validation or self.eval, **self.also}[name]

    def questions(self, name: str) -> Questions:
        """The rows of that name (see `rows`) as prompts, tokenised once for all evaluations."""
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


_HASHED = ("config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "chat_template*",
           "special_tokens_map.json", "added_tokens.json", "*.model", "*.safetensors")  # fmt: skip


def hash_model(folder: Path) -> str:
    """Hash of what a model computes and how text becomes its tokens: config, weights and tokenizer."""
    found = {path for pattern in _HASHED for path in folder.glob(pattern) if path.is_file()}
    return hash_folder(sorted(found))


def encoder_content(options: EvaluateSection, metrics: Sequence[str]) -> dict[str, str]:
    """Hash of the folder of BERTScore's encoder, if that is asked for; an encoder of the hub has its id."""
    folder = Path(options.encoder).expanduser()
    return {"encoder_content": hash_model(folder)} if "bert_score" in metrics and folder.is_dir() else {}


def harness_identity(options: EvaluateSection) -> list[Any]:
    """What the scores of lm-eval depend on: the tasks, and the content of the folder with your own."""
    content = None
    if options.lm_eval_folder is not None:
        own = Path(options.lm_eval_folder)
        # The harness imports Python files of the folder, which leaves compiled ones there.
        hidden = re.compile(r"(^|/)(\.|__pycache__/)")
        found = (path for path in sorted(own.rglob("*")) if path.is_file())
        files = [path for path in found if not hidden.search(path.relative_to(own).as_posix())]
        content = hash_folder(files) if files else None
    return [options.lm_eval, content, options.lm_eval_limit, options.batch_size]
