"""Subject: a model whose cost is measured, found by folder, hub id or shape, or made by pruning another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, ModelError, PlanError
from gradpruner.common.printing import runs_of
from gradpruner.common.registry import suggest
from gradpruner.evaluation.costing.shapes import shape_folder, shape_names
from gradpruner.models.checking import check_config
from gradpruner.models.config_patch import check_keep, patch_config, text_config
from gradpruner.models.families import find_family, generic_family
from gradpruner.models.folder import locate_model
from gradpruner.models.loading import check_loadable, load_config, refuse_narrowed
from gradpruner.plans.layer_plan import PruningPlan

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.safetensors.index.json")


@dataclass(frozen=True)
class Subject:
    """A model whose cost is measured.

    Attributes:
        name: Name in tables, without any path of this machine.
        config: Config of the decoder, as transformers reads it.
        folder: Folder with the weights; None for random weights.
    """

    name: str
    config: Any
    folder: Path | None = None

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)


def find_subject(model: str | Path, *, random: bool = False, fetch: bool = True) -> Subject:
    """Finds a model by its folder, hub id or shape name.

    A shape, and a folder with only a config.json, get random weights. Of a multimodal model, the subject is
    the decoder.

    Args:
        model: Folder, hub id, or a name in `shapes.shape_names()`.
        random: Use random weights even if weights are stored; only config.json is then read or fetched.
        fetch: Whether to fetch the weights of a hub id. Weights in a folder are checked in any case.

    Raises:
        ConfigError: If `model` is none of these but close to the name of a shape.
        ModelError: If the folder or config cannot be used.
        IntegrityError: If the weights are damaged or unsafe.
    """
    name = str(model)
    shape = None if Path(model).expanduser().exists() else shape_folder(name)
    if shape is not None:
        return Subject(shape.name, text_config(load_config(shape, weights=False)))
    if not Path(model).expanduser().is_dir():
        _refuse_misspelt_shape(name)
    folder = locate_model(model, weights=fetch and not random)
    random = random or not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)
    # Refuse models with code of their own, which is never run, and quantised ones, which cannot be trained.
    check_config(folder, True)
    refuse_narrowed(folder)
    whole = load_config(folder, native=True, weights=False) if random else check_loadable(folder)[0]
    config = text_config(whole)
    if not getattr(config, "num_hidden_layers", None):
        raise ModelError(
            f"{folder / 'config.json'} does not say how many layers its decoder has.",
            hint="Only decoder-only language models can be measured.",
        )
    shown = name if folder != Path(model).expanduser() else folder.resolve().name
    return Subject(shown, config, None if random else folder)


def shorten(subject: Subject, plan: PruningPlan) -> Subject:
    """Returns the model that a plan leaves, with random weights: its cost does not depend on them.

    Raises:
        PlanError: If the plan is for another depth, or no config of the family can express the result.
        ModelError: If the family cannot be pruned.
    """
    config = subject.config
    plan.check_model(subject.depth)
    family = find_family(config) or generic_family(config)
    check_keep(config, family, plan)
    raw = json.loads(config.to_json_string(use_diff=False))
    pruned = type(config).from_dict(patch_config(raw, config, family, plan.keep))
    return Subject(f"{subject.name} without {runs_of(plan.pruned)}", pruned)


def plan_by_count(depth: int, num_prune: int) -> PruningPlan:
    """Returns a plan for when only the number of pruned layers matters: the last ones before the final layer.

    Raises:
        PlanError: If fewer than 2 layers would be left.
    """
    if not 0 <= num_prune <= depth - 2:
        raise PlanError(
            f"Cannot prune {num_prune} of {depth} layers; at least 2 must stay.",
            hint=f"Give 0 to {depth - 2}; with 0 the model is compared with itself, which shows the noise.",
        )
    return PruningPlan.from_keep(depth, [*range(depth - 1 - num_prune), depth - 1])


def _refuse_misspelt_shape(name: str) -> None:
    """Raises ConfigError for a name that is neither a folder nor a hub id, but close to a shape's name."""
    near = suggest(name.lower(), shape_names())
    if "/" not in name and near:
        raise ConfigError(
            f"'{name}' is neither a model folder nor a shape.{near}",
            hint=f"Shapes: {', '.join(shape_names())}. A hub id looks like org/name.",
        )
