"""Prunes a checkpoint on disk: the kernel copies most bytes, and a crash leaves nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gradpruner.common.errors import ConfigError
from gradpruner.common.files import check_free_space, write_failure, write_text
from gradpruner.common.registry import check_known
from gradpruner.gradients.trace import GradientTrace
from gradpruner.models.folder import (
    PRUNING_FILE,
    carried_files,
    carry,
    check_output,
    describe_model,
    locate_model,
    read_pruning,
    staged_folder,
)
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.repair import Repair
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.checked import reading
from gradpruner.pruning.pieces import pack
from gradpruner.pruning.verification import LEVELS, VerifyReport, compares_fully, verify_written
from gradpruner.pruning.writer import write_shards

MAX_SHARD_BYTES = 5_000_000_000


def prune_checkpoint(
    src: str | Path,
    dst: str | Path,
    plan: PruningPlan,
    trace: GradientTrace | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: str = "auto",
    progress: Callable[[int], None] | None = None,
    repair: Repair | None = None,
    name: str | None = None,
) -> VerifyReport:
    """Prunes a checkpoint on disk without building the model.

    Kept tensors are copied byte for byte under their new names; only merge targets are computed, one linear
    at a time. Everything is written to a folder beside `dst`, checked, flushed to disk and renamed: if the
    process is killed at any moment, `dst` is missing or complete. Memory: that of the libraries, plus what
    `verify_checkpoint` states and, if layers are merged, what `merge_linear` states for the largest linear
    and its sources.

    Args:
        src: A model folder with safetensors in any float dtype, or a hub id. In quantised checkpoints,
            layers can be dropped but not merged.
        dst: The folder to make; a model that this package wrote is replaced, anything else is refused.
        plan: What happens to every layer.
        trace: The recorded gradients; needed if the plan merges by them.
        max_shard_bytes: Largest size of a weight file, in bytes of tensors, >= 1.
        verify: "full" also compares the outputs of source and result, "structure" runs no model, "auto" is
            full if memory allows. A model type without a row in the table of families must be verified in
            full.
        progress: Called with the number of bytes written since the last call.
        repair: The repair fitted for this plan (`fit_repair`); its weights, in the dtype of the source,
            replace those of the refitted layers.
        name: What the records of the result call the source; None: `src`.

    Returns:
        What was verified, see `verification.verify_checkpoint`.

    Raises:
        ConfigError: If `dst` is the source, lies inside it or contains it, or holds something that this
            package did not write; if `max_shard_bytes` or the level is not allowed.
        PlanError: If the plan or the repair is for another model.
        ModelError: If the source cannot be pruned.
        IntegrityError: If a file of the source is damaged or unsafe, or holds NaN or Inf, or if the result
            fails verification.
        ResourceError: If the disk is too small or not writable. After any error nothing is left behind.

    Source: GradPruner, section 3.2.
    """
    source = locate_model(src)
    check_request(source, Path(dst).expanduser(), max_shard_bytes, verify)
    blueprint = Blueprint(source, plan, trace, repair=repair)
    return write_pruned(
        blueprint,
        dst,
        name=name or str(src),
        max_shard_bytes=max_shard_bytes,
        verify=verify,
        progress=progress,
    )


def write_pruned(
    blueprint: Blueprint,
    dst: str | Path,
    *,
    name: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Writes the checkpoint of a blueprint, see `prune_checkpoint`; `name` is the source in its records."""
    source, target = blueprint.source, Path(dst).expanduser()
    check_request(source, target, max_shard_bytes, verify)
    compares_fully(verify, blueprint)  # refuses before writing what could not be verified after
    pieces, carried, previous = blueprint.pieces(), carried_files(source), read_pruning(source) or None
    needed = sum(piece.num_bytes for piece in pieces) + sum(path.stat().st_size for path in carried)
    check_free_space(target.parent, int(needed * 1.01) + (16 << 20), "The pruned checkpoint")
    metadata = next((h.metadata for h in blueprint.shards.headers if h.metadata), {})
    with staged_folder(target) as staged, reading() as reader:
        files = pack(pieces, max_shard_bytes)
        begun = write_shards(staged, files, {"format": "pt", **metadata}, reader, progress)
        # In the JSON that transformers writes: some configs hold Infinity, which strict JSON lacks.
        write_text(staged / "config.json", json.dumps(blueprint.new_config(), indent=2) + "\n")
        carry(source, carried, staged)
        report = verify_written(staged, blueprint, verify)
        written = [shard.result() for shard in begun]  # a damaged source is the better reason to report
        report = replace(report, folder=str(target))
        report.raise_on_failure()
        facts = {
            **blueprint.summary(),
            "files": {shard.name: {"sha256": shard.sha256, "bytes": shard.num_bytes} for shard in written},
            "verified": report.to_dict(),
            "repair": blueprint.repair_facts(),
            "previous": previous,
        }
        describe_model(staged, plan=blueprint.plan, source=name, kind="model", facts=facts, origin=source)
    return report


def check_request(source: Path, target: Path, max_shard_bytes: int, verify: str) -> None:
    """Refuses requests that are wrong whatever the model is."""
    try:
        check_output(target, inputs=(source,), marker=PRUNING_FILE)
    except OSError as error:  # no permission to look into a parent folder
        raise write_failure(target, error) from error
    if target.resolve() in source.resolve().parents:
        raise ConfigError(
            f"The source {source} lies inside the output {target}, which would be replaced.",
            hint="Choose another output folder.",
        )
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}; at least 1 is needed.")
    check_known("level", verify, LEVELS)
