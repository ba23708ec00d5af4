"""Rewrites a config for fewer layers: every field that numbers or counts layers.

`num_hidden_layers` is not the only field that depends on depth. When transformers loads a config, it derives
lists from layer positions: sliding or full attention, rotary or not, experts or not. Pruning shifts the
positions, so the lists derived for the whole model are written out, with the entries of the kept layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.common.printing import runs_of
from gradpruner.models.families import Family
from gradpruner.models.raw_config import beyond_fields
from gradpruner.plans.layer_plan import PruningPlan

# Fields that make transformers run code that came with the source; the pruned model does not need it.
_CODE_FIELDS = ("auto_map", "custom_pipelines")


def text_config(config: Any) -> Any:
    """Returns the part of a config that describes the decoder; for text models, the config itself."""
    return config.get_text_config(decoder=True)


def parts_of(config: Any) -> list[Any]:
    """Returns a config and all configs nested in it (decoder, vision and audio towers), each once."""
    found = [config]
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found += parts_of(value)
    return found


def depth_fields(config: Any, family: Family, keep: Sequence[int]) -> dict[str, Any]:
    """Returns the fields of the decoder's config that change when only the layers `keep` stay.

    `config` must hold the lists that transformers derives when it reads a config.
    """
    fields: dict[str, Any] = {"num_hidden_layers": len(keep)}
    depth = config.num_hidden_layers
    for name in family.lists:
        values = getattr(config, name, None)
        if isinstance(getattr(type(config), name, None), property):
            continue  # computed on every read (jamba), so it cannot be set
        if isinstance(values, Sequence) and not isinstance(values, str):
            fields[name] = [values[i] for i in keep]
    for name in family.indices:
        numbers = getattr(config, name, None)
        if numbers is not None:
            fields[name] = [new for new, old in enumerate(keep) if old in numbers]
    for name in family.leading:
        count = getattr(config, name, None)
        if count is not None:
            fields[name] = sum(1 for i in keep if i < count)
    for name in family.trailing:
        count = getattr(config, name, None)
        if count is not None:
            fields[name] = sum(1 for i in keep if i >= depth - count)
    if family.dense_layers is not None:
        dense = set(family.dense_layers(config))
        fields["mlp_only_layers"] = [new for new, old in enumerate(keep) if old in dense]
    fields |= dict.fromkeys(beyond_fields(config), 0)
    return fields | family.fixed


def patch_config(raw: dict[str, Any], config: Any, family: Family, keep: Sequence[int]) -> dict[str, Any]:
    """Returns the content of config.json for the kept layers; unknown fields stay as they are.

    Args:
        raw: The content of the source's config.json, or `config.to_dict()`.
        config: The same config as transformers reads it.
        family: The row of its model type.
        keep: Kept layers, ascending.

    Returns:
        A new dictionary. Fields keep their spelling. References to remote code are left out. `rope_theta` and
        `rope_scaling` are added beside a flat `rope_parameters`, for older readers that do not know it and
        silently assume a theta of 10000.
    """
    patched = {key: value for key, value in raw.items() if key not in _CODE_FIELDS}
    if not patched.get("quantization_config", True):  # null means that nothing is quantised
        del patched["quantization_config"]
    part = patched
    text = text_config(config)
    if family.nested:
        part = patched[family.nested] = dict(patched.get(family.nested) or {})
        for name in _CODE_FIELDS:
            part.pop(name, None)
    for name, value in depth_fields(text, family, keep).items():
        spelled = (text.attribute_map or {}).get(name, name)
        names = [n for n in (name, spelled) if n in part]
        part.update(dict.fromkeys(names or [spelled], value))
    for where in (patched, part):
        where.update(dict.fromkeys(beyond_fields(where), 0))
    for name in family.keyed:
        if isinstance(part.get(name), dict):
            part[name] = _renumber_keys(part[name], keep)
    _spell_rope_twice(part)
    return patched


def _renumber_keys(values: dict[Any, Any], keep: Sequence[int]) -> dict[Any, Any]:
    """Returns a dictionary with its layer numbers as keys ("05" or 5) renumbered; other keys stay."""
    place = {old: new for new, old in enumerate(keep)}
    width = len(str(len(keep) - 1))
    out: dict[Any, Any] = {}
    for key, value in values.items():
        if not str(key).isdigit():
            out[key] = value
        elif int(key) in place:
            new = place[int(key)]
            out[f"{new:0{width}d}" if isinstance(key, str) else new] = value
    return out


def _spell_rope_twice(part: dict[str, Any]) -> None:
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    if part.get("rope_theta") is None:  # null means the same as a missing key
        part["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default" and part.get("rope_scaling") is None:
        part["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}


def rename_modules(section: Any, rename: Callable[[str], str | None]) -> Any:
    """Returns a config section (quantization_config) with the module names in it renumbered.

    `rename` gives the new name of a tensor or module, or None if its layer was removed.
    """
    if isinstance(section, dict):
        renamed_keys = {rename(key): value for key, value in section.items()}
        return {key: rename_modules(value, rename) for key, value in renamed_keys.items() if key is not None}
    if isinstance(section, list):
        # Names of removed layers are left out; entries that were null before stay.
        pairs = [(value, rename_modules(value, rename)) for value in section]
        return [new for old, new in pairs if new is not None or old is None]
    return rename(section) if isinstance(section, str) else section


def layer_pattern(path: str) -> re.Pattern[str]:
    """Returns a pattern for names inside a numbered layer: group 1 is the number, group 2 what follows."""
    return re.compile(rf"{re.escape(path)}\.(\d+)(\..*)?$", re.DOTALL)


def required_layers(config: Any, family: Family) -> tuple[int, ...]:
    """Returns the layers that must stay because later layers reuse their keys and values."""
    count = getattr(config, family.trailing[0], 0) or 0 if family.shared_kv else 0
    first = config.num_hidden_layers - count
    if not count:
        return ()
    types = config.layer_types
    return tuple(sorted({max(i for i in range(first) if types[i] == kind) for kind in set(types[first:])}))


def family_slots(config: Any, family: Family) -> Callable[[int, int, int], bool] | None:
    """Returns a function that says at which positions of the pruned model transformers allows a layer.

    Returns:
        `fits(old, new, kept)`: whether layer `old` may become layer `new` of `kept`; None if every layer may
        stand anywhere.
    """
    rules = [
        (getattr(config, period), getattr(config, offset))
        for period, offset in family.periodic
        if getattr(config, period, None)
    ]
    if not rules and not family.last_type:
        return None

    def fits(old: int, new: int, kept: int) -> bool:
        if family.last_type and new == kept - 1 and config.layer_types[old] != family.last_type:
            return False
        return all((old % period == offset) == (new % period == offset) for period, offset in rules)

    return fits


def check_keep(config: Any, family: Family, plan: PruningPlan) -> list[str]:
    """Checks that transformers can express the model that a plan leaves.

    Returns:
        Warnings, as sentences.

    Raises:
        ModelError: If models with this config cannot be pruned at all.
        PlanError: If this plan cannot be carried out on them; the hint says what to change.
    """
    kind, keep = config.model_type, plan.keep
    for flag, reason in family.refused.items():
        if getattr(config, flag, False):
            raise ModelError(f"A {kind} model with {flag} cannot be pruned: {reason}.")
    if plan.merged and family.no_merge:
        merged = sorted(layer for layers in plan.merged.values() for layer in layers)
        raise PlanError(
            f"The plan merges layers {runs_of(merged)}, but layers of {kind} models can only be dropped: "
            f"{family.no_merge}.",
            hint="Plan with num_merge: 0.",
        )
    missing = sorted(set(required_layers(config, family)) - set(keep))
    last_shared = max(keep) >= config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    if missing and last_shared:
        raise PlanError(
            f"Layers {runs_of(missing)} must stay: later layers of this {kind} model reuse their keys and "
            "values.",
            hint="Keep them: name them in plan.protect, or edit the plan.",
        )
    fits = family_slots(config, family)
    wrong = [old for new, old in enumerate(keep) if fits is not None and not fits(old, new, len(keep))]
    if wrong and family.last_type and wrong == [keep[-1]]:
        raise PlanError(
            f"Layer {wrong[0]} would be the last, but {kind} models must end with a layer of "
            f"{family.last_type}.",
            hint="Keep a later layer of that type as the last.",
        )
    if wrong:
        raise PlanError(
            f"Layer {wrong[0]} would become layer {keep.index(wrong[0])}, where {kind} models have another "
            "kind of layer: their config has a fixed period instead of a list.",
            hint="Prune whole periods: "
            + ", ".join(f"{p} = {getattr(config, p)}" for p, _ in family.periodic)
            + ".",
        )
    return _vanishing_types(config, keep)


def _vanishing_types(config: Any, keep: Sequence[int]) -> list[str]:
    types = getattr(config, "layer_types", None) or []
    gone = sorted(set(types) - {types[i] for i in keep}) if types else []
    return [
        f"No layer of type '{kind}' is left (there were {types.count(kind)}): the model loses what only "
        "these layers do."
        for kind in gone
    ]
