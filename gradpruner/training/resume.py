"""Which Trainer checkpoint an interrupted fine-tuning can go on from."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import safe_open

log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def latest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest Trainer checkpoint that is whole.

    The Trainer writes checkpoints in place: after a kill the newest may be cut short, and one without
    optimizer state would resume silently with a fresh optimizer. Broken ones are reported and removed.
    """
    steps = [int(found[1]) for p in folder.glob("checkpoint-*") if (found := _CHECKPOINT.match(p.name))]
    for candidate in (folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True)):
        fault = _checkpoint_fault(candidate)
        if fault is None:
            return candidate
        log.warning("Checkpoint %s is not complete (%s); using an older one.", candidate, fault)
        shutil.rmtree(candidate)
    return None


def _checkpoint_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut short"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(folder / name):  # the zip directory is written last
            return f"{name} is missing or cut short"
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
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(named - {path.name for path in weights})
        if missing:
            return f"{missing[0]} is missing"
    return None if weights else "weights are missing"
