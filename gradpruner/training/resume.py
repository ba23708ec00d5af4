"""Finds the Trainer checkpoint that an interrupted fine-tuning can resume from."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from gradpruner.common.errors import IntegrityError
from gradpruner.common.json_files import read_json, typed

log = logging.getLogger(__name__)

# The key of a `Tally` in trainer_state.json, among the states of callbacks.
TALLY = "GradPrunerTally"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Tally:
    """Time and tokens of a training up to a checkpoint, summed over all its starts."""

    seconds: float
    places: int
    """Token positions computed."""
    padding: int
    """Positions that were padding."""


def tally_of(checkpoint: Path) -> Tally | None:
    """Returns the tally of a checkpoint; None if it has none, because another program wrote it."""
    try:
        raw = read_json(checkpoint / "trainer_state.json", "checkpoint")
        found = typed(raw["stateful_callbacks"][TALLY]["attributes"], Tally, str(checkpoint))
    except (IntegrityError, KeyError, TypeError):
        return None
    return found if min(found.seconds, found.places, found.padding) >= 0 else None


def latest_complete_checkpoint(folder: Path, sharding: str = "") -> Path | None:
    """Returns the newest complete Trainer checkpoint; reports and removes incomplete ones.

    The Trainer writes checkpoints in place. If the process is killed, the newest may be cut short, and one
    without optimizer state would silently resume with a fresh optimizer. `sharding` is that of
    `CausalTrainer.sharding`; sharded weights are stored in other formats.
    """
    steps = [int(found[1]) for p in folder.glob("checkpoint-*") if (found := _CHECKPOINT.match(p.name))]
    for candidate in (folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True)):
        fault = _checkpoint_fault(candidate, sharding)
        if fault is None:
            return candidate
        log.warning("Checkpoint %s is not complete (%s); using an older one.", candidate, fault)
        shutil.rmtree(candidate)
    return None


def _checkpoint_fault(folder: Path, sharding: str) -> str | None:
    """Says what is wrong with a checkpoint; None if it is complete."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "trainer_state.json is missing or cut short"
    if not zipfile.is_zipfile(folder / "scheduler.pt"):  # the zip directory is written last
        return "scheduler.pt is missing or cut short"
    if sharding:
        return None if _has_shards(folder, sharding) else f"the states of {sharding} are missing or cut short"
    if not zipfile.is_zipfile(folder / "optimizer.pt"):
        return "optimizer.pt is missing or cut short"
    if not any(zipfile.is_zipfile(path) for path in folder.glob("rng_state*.pth")):
        return "rng_state.pth is missing or cut short"
    weights = [*folder.glob("*.safetensors")]
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception:  # safetensors raises its own type, unrelated to OSError
            return f"{path.name} is cut short"
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return f"{index.name} is cut short"
        missing = sorted(named - {path.name for path in weights})
        if missing:
            return f"{missing[0]} is missing"
    return None if weights else "weights are missing"


def _has_shards(folder: Path, sharding: str) -> bool:
    """Returns whether the weights and the optimizer state of a sharded training are there."""
    if sharding == "deepspeed":
        latest = folder / "latest"  # written last; names the folder with the states of all processes
        return latest.is_file() and any((folder / latest.read_text().strip()).glob("*optim_states.pt"))
    parts = {
        "optimizer": ("optimizer.bin", "optimizer_0/.metadata"),
        "weights": ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata"),
    }
    return all(any((folder / name).is_file() for name in names) for names in parts.values())
