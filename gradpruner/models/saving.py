"""Saves models into folders that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gradpruner.common.errors import NonFiniteError
from gradpruner.models.config_patch import parts_of
from gradpruner.models.dtypes import cast_like, is_finite
from gradpruner.models.folder import (
    PRUNING_FILE,
    carried_files,
    carry,
    check_output,
    describe_model,
    staged_folder,
)
from gradpruner.plans.reading import Plan


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    plan: Plan | None,
    source: str,
    facts: dict[str, Any] | None = None,
    carried_from: Path | None = None,
    like: Path | None = None,
) -> Path:
    """Writes a model folder that plain transformers loads, completely or not at all.

    Weights, config, tokenizer, chat template, `pruning.json` and a model card are written to a staged
    folder beside the target, made durable, and renamed.

    Args:
        model: The causal LM; its weights are cast in place.
        tokenizer: Saved with the model. None if there is none or `carried_from` has it.
        folder: The target; replaced if gradpruner made it.
        dtype: The dtype to store, which is that of the source checkpoint.
        plan: None for a dense model.
        source: Where the model came from, for the card.
        facts: Further entries of `pruning.json`.
        carried_from: Model folder whose tokenizer, chat template, generation config and licence are copied
            byte for byte.
        like: Model folder whose tensors give the dtype of each parameter, for sources with several dtypes.

    Raises:
        ConfigError: If the target holds files that are not ours.
        NonFiniteError: If a weight is NaN or Inf in the stored dtype; the message names the tensor.
        ResourceError: If the disk is full. The staged folder is removed, the old folder stays as it was.
    """
    check_output(folder, marker=PRUNING_FILE)
    with staged_folder(folder) as staged:
        if like is None:
            model = model.to(dtype)
        else:
            cast_like(model, like, dtype)
        for part in parts_of(model.config):
            part.dtype = dtype
        model.config.use_cache = True  # gradient checkpointing turns it off
        model.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if carried_from is not None:
            carry(carried_from, carried_files(carried_from), staged)
        _refuse_non_finite(staged)
        kind = "adapter" if hasattr(model, "peft_config") else "model"
        describe_model(staged, plan=plan, source=source, kind=kind, facts=facts, origin=carried_from or like)
    return folder


def _refuse_non_finite(staged: Path) -> None:
    """Raises NonFiniteError if a tensor that was just written holds NaN or Inf.

    The loss does not show an embedding row that no example uses, or a value too large for the stored dtype.
    """
    for path in sorted(staged.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if not is_finite(tensor):
                    raise NonFiniteError(
                        f"The tensor '{name}' holds NaN or Inf; a model with such weights is not saved.",
                        hint="If the source holds them too, it is damaged: use another copy. Otherwise train "
                        "with a lower learning rate, or store in a wider dtype than "
                        f"{str(tensor.dtype).removeprefix('torch.')}.",
                    )
