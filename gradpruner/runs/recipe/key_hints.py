"""Suggestions for keys that the recipe does not have: which key did the user mean?

Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# Names of other tools, and other spellings -> key of the recipe; below, the same for sections.
ALIASES = {
    "adapter_merge": "finetune.merge_adapter",
    "base_model": "model.path",
    "batch": "finetune.batch_size",
    "bs": "finetune.batch_size",
    "checkpointing": "finetune.gradient_checkpointing",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "drop_layer": "plan.layers",
    "drop_layers": "plan.layers",
    "epoch": "finetune.epochs",
    "eval_data": "data.eval",
    "fraction": "plan.layer_fraction",
    "grad_accum": "finetune.accumulation",
    "gradient_accumulation_steps": "finetune.accumulation",
    "limit": "data.eval_limit",
    "lora_alpha": "finetune.alpha",
    "lora_dropout": "finetune.dropout",
    "lora_r": "finetune.rank",
    "lora_rank": "finetune.rank",
    "lr": "finetune.learning_rate",
    "lr_scheduler_type": "finetune.schedule",
    "max_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.path",
    "num_epochs": "finetune.epochs",
    "num_layers": "plan.num_prune",
    "num_train_epochs": "finetune.epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "finetune.batch_size",
    "prune_layers": "plan.layers",
    "pruning_ratio": "plan.layer_fraction",
    "r": "finetune.rank",
    "random_seed": "seed",
    "ratio": "plan.layer_fraction",
    "remove_layers": "plan.layers",
    "scheduler": "finetune.schedule",
    "seq_len": "data.max_length",
    "sparsity": "plan.layer_fraction",
    "test_data": "data.eval",
    "torch_dtype": "model.dtype",
    "train_data": "data.train",
    "train_file": "data.train",
    "warmup": "finetune.warmup_ratio",
}
SECTION_ALIASES = {
    "dataset": "data",
    "distill": "distil",
    "eval": "evaluate",
    "evaluation": "evaluate",
    "finetuning": "finetune",
    "lora": "finetune",
    "prune": "plan",
    "pruning": "plan",
    "recording": "record",
    "scoring": "score",
    "sft": "finetune",
    "train": "finetune",
    "trainer": "finetune",
    "training": "finetune",
}
# If several sections have a key of that name, the first of these sections wins; "" is the top level.
_FIRST = ("finetune", "")
_CLOSE = 0.6


def meant_key(path: str, known: Sequence[str]) -> str | None:
    """Returns the key that an unknown one most likely stands for; None if none is close.

    Tries, in this order: the same last name, in the same section or in another, fine-tuning first; a name in
    `ALIASES`; the closest name, in the same section first; the closest whole path. `known` are all dotted
    keys, sections included.
    """
    parent, _, name = path.lower().replace("-", "_").rpartition(".")
    parent = SECTION_ALIASES.get(parent, parent)
    keys = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]
    names = [_last(key) for key in keys]
    alias = ALIASES.get(name)
    for wanted in (name, _last(alias) if alias in keys else None):
        if wanted in names:
            same = [key for key in keys if _last(key) == wanted]
            return f"{parent}.{wanted}" if f"{parent}.{wanted}" in same else _first(same)
    siblings = [key for key in (keys if parent else known) if key.rpartition(".")[0] == parent]
    for candidates in (siblings, keys):
        holding = [key for key in candidates if name in _last(key).split("_")]
        if holding:
            return _first(holding)
        near = _near(name, map(_last, candidates), 0.5 if parent and candidates is siblings else _CLOSE)
        if near:
            return _first([key for key in candidates if _last(key) == near])
    return _near(path, known, _CLOSE)


def _near(word: str, words: Iterable[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)), None)


def _last(key: str | None) -> str:
    return (key or "").rpartition(".")[2]


def _first(keys: Sequence[str]) -> str:
    """The key of fine-tuning among several, else the one at the top level, else the first in the recipe."""
    for section in _FIRST:
        for key in keys:
            if key.rpartition(".")[0] == section:
                return key
    return keys[0]
