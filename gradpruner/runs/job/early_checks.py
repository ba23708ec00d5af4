"""Checks of what methods, packages and this machine can do, before a model is opened."""

from __future__ import annotations

from gradpruner.common.errors import ConfigError
from gradpruner.common.world import this_world
from gradpruner.methods import METHODS
from gradpruner.runs.folder.plan_names import method_of, takes_given_plan
from gradpruner.runs.recipe.recipe import Recipe
from gradpruner.training.checks import check_4bit, check_liger, check_optimizer, check_trackers
from gradpruner.training.finetuning import check_checkpointing
from gradpruner.training.options import FinetuneOptions
from gradpruner.training.sharding import check_sharding


def check_methods(recipe: Recipe) -> None:
    """Raises ConfigError if a method cannot do what the recipe asks of it."""
    pruned = [name for name in recipe.variants if name != "dense"]
    if recipe.plan.file is not None and pruned and not any(map(takes_given_plan, pruned)):
        raise ConfigError(
            f"plan.file is given, but {', '.join(pruned)} chooses layers by itself.",
            hint="Leave one of the two out; merged, dropped, gradpruner and either follow a given plan.",
        )
    for name in recipe.variants:
        method = METHODS.find(method_of(name)) if name != "dense" else None
        if method is None:
            continue
        if this_world().size > 1 and (method.alone or method.shrink or method.recover or method.callbacks):
            raise ConfigError(
                f"The method {name} trains by itself, in one process; this job has {this_world().size}.",
                hint="Start it without torchrun or accelerate launch, or choose another method.",
            )
        tunes = recipe.start == "base" or (recipe.start == "tuned" and method.training is not None)
        if method.callbacks and not tunes and not recipe.recover.trains:
            raise ConfigError(
                f"The method {name} changes the fine-tuning, and with start: {recipe.start} there is none.",
                hint="Let the model recover, --set recover.epochs=1, or tune it in a run: start: base.",
            )
        if recipe.finetune.mode == "qlora" and (method.alone or name == "sat"):
            raise ConfigError(
                f"The method {name} changes weights during fine-tuning; 4-bit weights do not allow that.",
                hint="Use finetune.mode: lora, or choose another method.",
            )
        if recipe.plan.max_loss is not None and not method.score:
            raise ConfigError(
                f"plan.max_loss needs a method that scores layers; {name} plans without scores.",
                hint="Give plan.num_prune instead, or choose another method: gate, gradpruner, shortgpt.",
            )


def check_changed_training(recipe: Recipe, tuning: FinetuneOptions, steps: int) -> None:
    """Raises ConfigError for a row whose method cannot train so, or change a training of `steps` steps."""
    for name in recipe.variants:
        method = METHODS.find(method_of(name)) if name != "dense" else None
        if method is not None and method.check is not None:
            method.check(tuning, steps)


def check_training(recipe: Recipe) -> None:
    """Raises ConfigError if recording or fine-tuning needs something that is not available here."""
    tuning, device = recipe.finetune, recipe.model.device
    check_trackers(tuning.report_to)
    check_optimizer(tuning.optim)
    check_checkpointing(tuning.gradient_checkpointing, device)
    check_sharding(tuning.fsdp, tuning.deepspeed, device)
    if tuning.mode == "qlora":
        check_4bit("finetune.mode", tuning.fsdp, tuning.deepspeed)
    if recipe.record.adapter == "qlora":  # recorded without DeepSpeed
        check_4bit("record.adapter", tuning.fsdp, None)
    if tuning.liger:
        check_liger(device)
