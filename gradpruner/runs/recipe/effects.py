"""What each key of a recipe changes: said once, for fingerprints, names of rows and comparisons of runs."""

from __future__ import annotations

# What changes -> the keys that change it. A section stands for its keys that are not listed themselves.
_KEYS = {
    # No figure.
    "bookkeeping": "title out keep_models memory",
    # What is done, or other keys; no result of a row. (find_rate sets finetune.learning_rate.)
    "choice": "effort variants verify find_rate plan.name",
    "measurement": "evaluate data.eval data.eval_limit",
    # Rows that decide between models. Nothing is trained on them.
    "decision": "data.validation data.validation_limit",
    "pruning": "plan record score methods",
    "depth": "plan.max_loss plan.confidence",
    "repair": "plan.repair plan.repair_rows plan.repair_answers",
    "training": "seed start model data finetune recover distil",
    # How training is carried out; the trained model stays the same.
    "execution": "finetune.report_to finetune.save_steps finetune.fsdp finetune.deepspeed",
}
_EFFECTS = {key: effect for effect, keys in _KEYS.items() for key in keys.split()}

SETTLED = (
    "finetune.learning_rate",
    "finetune.accumulation",
    "recover.learning_rate",
    "plan.repair",
    "evaluate.metrics",
)
"""Keys that a job sets if the recipe leaves them open (null or auto)."""


def effect_of(key: str) -> str | None:
    """Returns what a dotted key changes; None for a key that recipes do not have."""
    return _EFFECTS.get(key) or _EFFECTS.get(key.partition(".")[0])


def keys_of(section: str, *effects: str) -> set[str]:
    """Returns the keys of a section that have one of these effects, without the name of the section."""
    found = (key.partition(".") for key, effect in _EFFECTS.items() if effect in effects)
    return {key for head, _, key in found if head == section and key}
