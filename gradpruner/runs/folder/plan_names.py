"""Names of rows in a run directory, and of their files, so that one folder holds the results of many plans.

A finished pruned model is never replaced. The first row of a variant has the variant's name. With other
settings, a new row is named after what differs, `merged@num_prune=4`, or as `plan.name` says. The name of a
row is used in `plans/<row>.json`, `variants/<row>/`, the names of its stages, and run.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradpruner.common.run_names import StageName, row_file
from gradpruner.methods import METHODS
from gradpruner.runs.recipe.effects import effect_of

MARK = "@"
STAGES = ("rate", "record", "score", "plan", "prune", "finetune", "evaluate", "report")
# The rows that are no methods, with their labels; any other row has the name of its method.
LABELS = {"dense": "dense", "merged": "pruned + merged", "dropped": "pruned, no merging"}
# Stages that make a model from a plan, or evaluate it.
MADE = ("repair", "prune", "recover", "finetune", "evaluate")
_LONGEST = 60


def variant_of(row: str) -> str:
    """Returns the variant (an entry of the recipe's `variants`) that a row belongs to."""
    return row.partition(MARK)[0]


def label_of(row: str, repaired: bool = False) -> str:
    """Returns what reports call a row; `repaired` says whether its linears were refitted."""
    variant, _, name = row.partition(MARK)
    label = LABELS.get(variant) or METHODS.find(variant).label or variant.replace("_", " ")
    if variant == "either":
        label = "pruned + repaired" if repaired else "pruned"
    elif repaired and variant == "dropped":
        label = "pruned by IGIA + repaired"
    elif repaired and variant not in LABELS and METHODS.find(variant).score:
        label += " + repaired"
    return f"{label} ({name})" if name else label


def method_of(row: str) -> str:
    """Returns the name in `METHODS` of the method behind a pruned row."""
    variant = variant_of(row)
    return "gradpruner" if variant in LABELS else variant


def takes_given_plan(row: str) -> bool:
    """Returns whether a pruned row follows a plan given by plan.file, instead of its method's choice."""
    return method_of(row) in ("gradpruner", "either")


def named_row(variant: str, name: str) -> str:
    """Returns the row of a variant whose plan has a name."""
    return f"{variant}{MARK}{name}"


def plan_file(row: str) -> str:
    """File of a row's plan, for users to read and edit, relative to the run directory."""
    return f"plans/{row}.json"


def scores_file(name: str) -> str:
    """File of layer scores; `name` is the method, or METHOD@N for the scores of another plan."""
    return f"scores/{name}.json"


def scores_folder(name: str) -> str:
    """Folder of what finding these scores left for later: the repair of the plan that won."""
    return f"scores/{name}"


def own_plan(row: str) -> str:
    """File of the plan that a row's models were made by; the one in plans/ may have been edited since."""
    return row_file(row, "plan.json")


def tuned_folder(row: str) -> str:
    """Folder of a row's fine-tuned model."""
    return row_file(row, "model")


def answers_file(row: str, what: str) -> str:
    """File of a row's answers in an evaluation: "" of its finished model, "before", "on TASK"."""
    return row_file(row, f"examples{what and '_' + what.removeprefix('on ')}.jsonl")


def journal(file: str) -> str:
    """File that keeps the answers of an evaluation until all are there."""
    return f"{file}.part"


def rows_in(stages: Mapping[str, Any], verbs: Iterable[str]) -> list[str]:
    """Returns the rows for which a stage with one of these verbs is done, in the order of the stages."""
    found = [StageName.of(name) for name, entry in stages.items() if entry["state"] == "done"]
    return list(dict.fromkeys(stage.row for stage in found if stage.row and stage.verb in verbs))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys that differ between two recipes, given as plain values, with both values.

    Keys that change no model are left out.
    """
    old, new = _flat(before), _flat(now)
    without = ("bookkeeping", "choice", "measurement")
    keys = [key for key in {**new, **old} if effect_of(key) not in without]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def derived_name(
    variant: str, before: Mapping[str, Any], now: Mapping[str, Any], taken: Iterable[str]
) -> str:
    """Returns a name for a plan, made of the settings that differ from the first plan of its variant.

    Args:
        variant: An entry of the recipe's `variants`.
        before: The recipe of the first plan, as plain values.
        now: The recipe of this plan.
        taken: Rows whose names cannot be used.

    Returns:
        The name without the variant: "num_prune=4", "repair=linear", "seed=1"; a number if too much differs.
    """
    changed = {key: value for key, (_, value) in differences(before, now).items()}
    of_plan = {key: value for key, value in changed.items() if key.startswith("plan.")} or changed
    telling = {key: value for key, value in of_plan.items() if value is not None} or of_plan
    words = "+".join(f"{key.removeprefix('plan.')}={_shown(value)}" for key, value in telling.items())
    if "plan.file" in telling:  # it says by itself which layers go
        stem = Path(str(telling["plan.file"])).stem
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
