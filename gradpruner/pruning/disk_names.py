"""Finds the decoder's layers, and any layers behind the last one, by the tensor names of a checkpoint."""

from __future__ import annotations

import re
from typing import Any

from gradpruner.common.errors import IntegrityError
from gradpruner.models.config_patch import layer_pattern
from gradpruner.models.layers import LayeredModel
from gradpruner.models.raw_config import BEYOND_SIGNS, beyond_fields
from gradpruner.models.shards import Shards


def find_prefix(view: LayeredModel, shards: Shards) -> str:
    """Returns the prefix of the layers' tensor names on disk, which may differ from their path in memory.

    Raises:
        IntegrityError: If no prefix has a tensor for every layer, or several match equally well.
    """
    path, base = view.family.layers_path, view.model.base_model_prefix
    candidates = [path, path.removeprefix(f"{base}."), f"{base}.{path}", *view.family.disk_paths]
    wanted = set(range(view.num_layers))
    for candidate in candidates:
        pattern = layer_pattern(candidate)
        numbers = {int(m[1]) for name in shards.tensors if (m := pattern.match(name))}
        if wanted <= numbers:
            return candidate
    found = _prefixes_by_content(view, shards)
    if len(found) == 1:
        return found[0]
    raise IntegrityError(
        f"{shards.folder} has no tensors for {view.num_layers} layers under "
        f"{' or '.join(dict.fromkeys(candidates))}"
        + (f"; they may be under any of {', '.join(found)}." if found else "."),
        hint="Is the download complete, and its config.json that of these weights?",
    )


def _prefixes_by_content(view: LayeredModel, shards: Shards) -> list[str]:
    """Returns prefixes with a number for every layer whose tensors match most of a decoder layer's.

    Multimodal models are stored under other names than they have in memory. Names and shapes inside a layer
    distinguish the decoder from a vision tower of the same depth.
    """
    layer: Any = view.layers[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    numbers: dict[str, set[int]] = {}
    matching: dict[str, int] = {}
    for name, ref in shards.tensors.items():
        for match in re.finditer(r"\.(\d+)\.", name):
            prefix, inside = name[: match.start()], name[match.end() :]
            numbers.setdefault(prefix, set()).add(int(match[1]))
            if int(match[1]) == 0 and shapes.get(inside) == ref.shape:
                matching[prefix] = matching.get(prefix, 0) + 1
    wanted = set(range(view.num_layers))
    whole = {prefix: count for prefix, count in matching.items() if wanted <= numbers[prefix]}
    return sorted(prefix for prefix, count in whole.items() if count == max(whole.values()))


def count_beyond(view: LayeredModel, shards: Shards, prefix: str) -> int:
    """Returns the number of layers behind the last one (multi-token prediction), of any model type.

    They are found by the config, or else by tensors that only such layers have.
    """
    counted = beyond_fields(view.config) or beyond_fields(view.model.config)
    if counted:
        return max(counted.values())
    pattern = layer_pattern(prefix)
    signs = (pattern.match(name) for name in shards.tensors if name.endswith(BEYOND_SIGNS))
    return len({int(match[1]) for match in signs if match and int(match[1]) >= view.num_layers})
