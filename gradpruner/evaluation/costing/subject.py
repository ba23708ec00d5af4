"""Subject: a model whose cost is measured, given as folder, hub id or shape, or as one with fewer layers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, ModelError, PlanError
from gradpruner.common.registry import suggest
from gradpruner.evaluation.costing.shapes import shape_folder, shape_names
from gradpruner.models.checking import check_config
from gradpruner.models.config_patch import check_keep, patch_config, text_config
from gradpruner.models.families import find_family, generic_family
from gradpruner.models.folder import locate_model
from gradpruner.models.loading import check_loadable, load_config, refuse_narrowed
from gradpruner.plans.layer_plan import PruningPlan, runs_of

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.safetensors.index.json")


@dataclass(frozen=True)
class Subject:
    """A model whose cost is measured.

    Attributes:
        name: What it is called in tables; holds no folder of this machine.
        config: The config of its decoder as transformers reads it.
        folder: Where its weights are; None when they are made at random.
    """

    name: str
    config: Any
    folder: Path | None = None

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)


def find_subject(model: str | Path, *, random: bool = False, fetch: bool = True) -> Subject:
    """The model that a folder, a hub id or the name of a shape means.

    A folder with nothing but a config.json, and a shape, get random weights. Of a model that also sees or
    hears, the decoder counts.

    Args:
        model: Folder, hub id, or a name in `shapes.shape_names()`.
        random: Ignore weights that are there; nothing but config.json is then read or fetched.
        fetch: Fetch the weights of a hub id; those of a folder are looked at in any case.

    Raises:
        ConfigError: If it is none of these but sounds like a shape.
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
    # Code that comes with a model is never run here; quantised weights cannot be trained or cast.
    check_config(folder, True)
    refuse_narrowed(folder)
    whole = load_config(folder, native=True, weights=False) if random else check_loadable(folder)
    config = text_config(whole)
    if not getattr(config, "num_hidden_layers", None):
        raise ModelError(
            f"{folder / 'config.json'} does not say how many layers its decoder has.",
            hint="Only decoder-only language models can be measured.",
        )
    shown = name if folder != Path(model).expanduser() else folder.resolve().name
    return Subject(shown, config, None if random else folder)


def shorten(subject: Subject, plan: PruningPlan) -> Subject:
    """The model that a plan leaves, with random weights: what it costs does not depend on them.

    Raises:
        PlanError: If the plan is for another depth, or leaves what no config of the family can express.
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
    """Which layers to leave out where only their number matters: the last ones before the very last.

    Raises:
        PlanError: If so many cannot go.
    """
    if not 0 <= num_prune <= depth - 2:
        raise PlanError(
            f"Cannot prune {num_prune} of {depth} layers; at least 2 must stay.",
            hint=f"Give 0 to {depth - 2}; with 0 the model is compared with itself, which shows the noise.",
        )
    return PruningPlan.from_keep(depth, [*range(depth - 1 - num_prune), depth - 1])


def _refuse_misspelt_shape(name: str) -> None:
    """Raises ConfigError for a name that is neither folder nor hub id, but close to a shape."""
    near = suggest(name.lower(), shape_names())
    if "/" not in name and near:
        raise ConfigError(
            f"'{name}' is neither a model folder nor a shape.{near}",
            hint=f"Shapes: {', '.join(shape_names())}. A hub id looks like org/name.",
        )
