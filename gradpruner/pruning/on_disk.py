"""Pruning a checkpoint on disk: most bytes never leave the kernel, and a crash leaves nothing half done."""

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
) -> VerifyReport:
    """Prunes a checkpoint on disk; the model is never built.

    Kept tensors are copied byte for byte under their new names; only merge targets are computed, one linear
    at a time. Everything is written to a folder beside `dst`, checked, made durable and renamed: a kill at
    any moment leaves no `dst` or a complete one. Memory: that of the libraries plus what `verify_checkpoint`
    says and, when layers are merged, what `merge_linear` states for the largest linear and its sources.

    Args:
        src: A model folder with safetensors in any float dtype, or a hub id. Quantised checkpoints can be
            pruned too, but not merged.
        dst: The folder to make; one of ours is replaced, any other is refused.
        plan: What happens to every layer.
        trace: The recorded gradients; needed when the plan merges by them.
        max_shard_bytes: Largest size of a file of weights, in bytes of data.
        verify: "full" compares what source and result compute, "structure" checks all but that, "auto" is
            full where memory allows. A model type without a row must be proved in full.
        progress: Called with the number of bytes written since the last call.
        repair: What was fitted for this very plan (`fit_repair`); its weights, in the dtype of the source,
            replace those of the layers before the cuts.

    Returns:
        What was verified, see `verification.verify_checkpoint`.

    Raises:
        ConfigError: If `dst` is the source, lies inside it or around it, or holds something not ours; for a
            file size below 1 and an unknown level.
        PlanError: If the plan, or the repair, does not fit the model.
        ModelError: If the source cannot be pruned.
        IntegrityError: If a file of it is damaged or unsafe, holds NaN or Inf, or the result is not what the
            plan says.
        ResourceError: If the disk is too small or not writable. In all cases nothing is left behind.

    Source: GradPruner, section 3.2.
    """
    source = locate_model(src)
    _check_request(source, Path(dst).expanduser(), max_shard_bytes, verify)
    blueprint = Blueprint(source, plan, trace, repair=repair)
    return write_pruned(
        blueprint, dst, name=str(src), max_shard_bytes=max_shard_bytes, verify=verify, progress=progress
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
    """Makes the checkpoint of a blueprint, as `prune_checkpoint`; `name` is what the source is called."""
    source, target = blueprint.source, Path(dst).expanduser()
    _check_request(source, target, max_shard_bytes, verify)
    compares_fully(verify, blueprint)  # refuses now what could not be trusted later
    pieces, carried, previous = blueprint.pieces(), carried_files(source), read_pruning(source) or None
    needed = sum(piece.num_bytes for piece in pieces) + sum(path.stat().st_size for path in carried)
    check_free_space(target.parent, int(needed * 1.01) + (16 << 20), "The pruned checkpoint")
    metadata = next((h.metadata for h in blueprint.shards.headers if h.metadata), {})
    with staged_folder(target) as staged, reading() as reader:
        files = pack(pieces, max_shard_bytes)
        begun = write_shards(staged, files, {"format": "pt", **metadata}, reader, progress)
        # As transformers writes it: some configs hold Infinity, which strict JSON has not.
        write_text(staged / "config.json", json.dumps(blueprint.new_config(), indent=2) + "\n")
        carry(source, carried, staged)
        report = verify_written(staged, blueprint, verify)
        written = [shard.result() for shard in begun]  # a damaged source is the better reason to give
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


def _check_request(source: Path, target: Path, max_shard_bytes: int, verify: str) -> None:
    """Refuses what can be refused without looking into the model."""
    try:
        check_output(target, inputs=(source,), marker=PRUNING_FILE)
    except OSError as error:  # a parent that we may not even look into
        raise write_failure(target, error) from error
    if target.resolve() in source.resolve().parents:
        raise ConfigError(
            f"The source {source} lies inside the output {target}, which would be replaced.",
            hint="Choose another output folder.",
        )
    if max_shard_bytes < 1:
        raise ConfigError(f"Files of at most {max_shard_bytes} bytes hold nothing; 1 is the least.")
    check_known("level", verify, LEVELS)
