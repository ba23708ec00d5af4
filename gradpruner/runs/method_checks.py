"""Rows of a recipe whose methods cannot do what it asks of them: found before model and data are opened."""

from __future__ import annotations

from gradpruner.errors import ConfigError
from gradpruner.methods import METHODS
from gradpruner.runs.plan_names import method_of
from gradpruner.runs.recipe import Recipe
from gradpruner.world import this_world


def check_methods(recipe: Recipe) -> None:
    """Raises ConfigError for a row whose method cannot do what the recipe asks of it."""
    for name in recipe.variants:
        method = METHODS.find(method_of(name)) if name != "dense" else None
        if method is None:
            continue
        if this_world().size > 1 and (method.alone or method.shrink or method.recover or method.callbacks):
            raise ConfigError(
                f"The method {name} trains by itself, in one process; this job has {this_world().size}.",
                hint="Start it without torchrun or accelerate launch, or take another method.",
            )
        tunes = recipe.start == "base" or (recipe.start == "tuned" and method.training is not None)
        if method.callbacks and not tunes and not recipe.recover.trains:
            raise ConfigError(
                f"The method {name} changes how a model is fine-tuned; with start: {recipe.start} none is.",
                hint="Use start: base, or let the model recover: --set recover.epochs=1.",
            )
        if recipe.finetune.mode == "qlora" and (method.alone or name == "sat"):
            raise ConfigError(
                f"The method {name} changes weights while it tunes; 4-bit weights do not allow that.",
                hint="Use finetune.mode: lora, or take another method.",
            )
        if recipe.plan.max_loss is not None and not method.score:
            raise ConfigError(
                f"plan.max_loss needs methods that score layers; {name} decides by itself what goes.",
                hint="Give plan.num_prune instead, or take another method: gate, gradpruner, shortgpt.",
            )
