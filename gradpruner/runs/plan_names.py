"""What the rows of a run directory are called, so that one folder holds the results of many plans.

A pruned model that is finished is never replaced. The first one of a variant has the variant's name; one that
other settings make is called after what differs, `merged@num_prune=4`, or as the user says (`plan.name`).
Everything of a row goes by its name: `plans/<row>.json`, `variants/<row>/`, stages, run.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradpruner.methods import METHODS

MARK = "@"
STAGES = ("rate", "record", "score", "plan", "prune", "finetune", "evaluate", "report")
# The rows every run can have; any other row is named after the scoring method it compares with.
LABELS = {"dense": "dense", "merged": "pruned + merged", "dropped": "pruned, no merging"}
# Stages that make something of a plan, or measure it.
MADE = ("repair", "prune", "recover", "finetune", "evaluate")
_LONGEST = 60
# Sections and keys that do not change a plan.
_INDIFFERENT = (
    "out", "title", "effort", "variants", "keep_models", "memory", "verify", "evaluate", "plan.name",
    "find_rate",
)  # fmt: skip


def variant_of(row: str) -> str:
    """The row of the recipe (`variants`) that a row of a run directory is one of."""
    return row.partition(MARK)[0]


def label_of(row: str, repaired: bool = False) -> str:
    """What reports call a row of the comparison, whose linears before cuts were refitted or not."""
    variant, _, name = row.partition(MARK)
    label = LABELS.get(variant) or METHODS.find(variant).label or variant.replace("_", " ")
    if repaired and variant == "dropped":
        label = "pruned + repaired"
    return f"{label} ({name})" if name else label


def method_of(row: str) -> str:
    """The method in `METHODS` that a pruned row of the comparison comes from."""
    variant = variant_of(row)
    return "gradpruner" if variant in LABELS else variant


def named_row(variant: str, name: str) -> str:
    """The row of a variant whose plan has a name."""
    return f"{variant}{MARK}{name}"


def rows_in(stages: Mapping[str, Any], verbs: Iterable[str]) -> list[str]:
    """The rows for which a stage with one of these verbs is done, in the order of the stages."""
    found = [name.split(" ")[:2] for name, entry in stages.items() if entry["state"] == "done"]
    return list(dict.fromkeys(words[1] for words in found if len(words) == 2 and words[0] in verbs))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys that differ between two recipes given as plain values -> both values."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**new, **old} if not key.startswith(_INDIFFERENT)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def derived_name(
    variant: str, before: Mapping[str, Any], now: Mapping[str, Any], taken: Iterable[str]
) -> str:
    """A name for a plan after the settings in which it differs from the first one of its variant.

    `before` and `now` are the two recipes, `taken` the rows that are something else. Returns the name without
    the variant: "num_prune=4", "repair=linear", "seed=1"; a number where too much differs.
    """
    changed = {key: value for key, (_, value) in differences(before, now).items()}
    of_plan = {key: value for key, value in changed.items() if key.startswith("plan.")} or changed
    said = {key: value for key, value in of_plan.items() if value is not None} or of_plan
    words = "+".join(f"{key.removeprefix('plan.')}={_shown(value)}" for key, value in said.items())
    if set(said) == {"plan.file"}:
        stem = Path(str(said["plan.file"])).stem
        words = "edited" if variant_of(stem) == variant else stem
    words = re.sub(r"[^A-Za-z0-9._=+-]+", "_", words).strip("._")
    words = words if 0 < len(words) <= _LONGEST else "2"
    number, name = 2, words
    while named_row(variant, name) in taken:
        name = f"{words}-{number}" if words != "2" else str(number)
        number += 1
    return name


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        elif value not in (None, {}, []):
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "_".join(map(str, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
