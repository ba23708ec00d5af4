"""Stores a pruned checkpoint as its difference from the source: a fraction of the size, rebuilt to the bit.

A delta is a folder:

    delta.json            the plan; names, sizes and hashes of all files; where every tensor comes from
    tensors.safetensors   the tensors that the source does not have: merged linears, cut wide tensors
    headers/*.header      the first bytes of every weight file: the length of its header and the header
    files/*               every other file of the pruned folder, byte for byte

Rebuilding computes nothing. It joins headers, tensors of the source and tensors of the delta, and every file
must have the recorded SHA-256. So another revision of the source, a damaged source or a damaged delta is an
error that names the tensor or the file, never a slightly different model. Trust a delta as you would a
download of the model itself: the hashes find damage, but they are no signature.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, IntegrityError, PlanError
from gradpruner.common.files import check_free_space, folder_bytes
from gradpruner.common.json_files import write_json
from gradpruner.common.printing import readable_bytes
from gradpruner.common.provenance import sha256_file
from gradpruner.models.folder import (
    PRUNING_FILE,
    check_output,
    locate_model,
    read_pruning,
    recorded_plan,
    staged_folder,
)
from gradpruner.models.headers import ShardHeader, TensorRef, check_inside
from gradpruner.models.shards import Shards, open_shards
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.delta_record import (
    DELTA_FILE,
    FILE_NAME,
    FILES_FOLDER,
    HEADERS_FOLDER,
    SMALL_FILE_LIMIT,
    TEMPLATES_FOLDER,
    TENSORS_FILE,
    WEIGHTS_NAME,
    CopiedTensor,
    DeltaRecord,
    RecordedFile,
    header_file,
)
from gradpruner.pruning.pieces import Piece, pack
from gradpruner.pruning.writer import same_bytes, write_file

# A delta that stores more than this share of the checkpoint is not worth its own format.
STORED_LIMIT = 0.5
SPARE_BYTES = 16 << 20  # a generous allowance for what the file system itself needs


@dataclass(frozen=True)
class DeltaSummary:
    """The contents of a delta.

    Attributes:
        num_bytes: Size of all its files.
        checkpoint_bytes: Size of all files it rebuilds.
        copied: Number of tensors taken from the source.
        stored: Number of tensors stored in the delta.
    """

    folder: str
    num_bytes: int
    checkpoint_bytes: int
    copied: int
    stored: int


def diff_checkpoint(
    source: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> DeltaSummary:
    """Writes the difference between a pruned checkpoint and the model it was made from.

    The source is read once and the checkpoint twice, in blocks, so memory is that of the libraries. Hidden
    files of the pruned folder are left out.

    Args:
        source: The original, a model folder or a hub id.
        pruned: A folder whose `pruning.json` holds a plan.
        out: The folder to make; it must be missing or empty.
        progress: Called with the number of bytes of the pruned checkpoint compared or hashed since the
            last call; its tensors are compared, its weight files hashed.

    Returns:
        The contents of the delta.

    Raises:
        ConfigError: If `pruned` was not pruned, or not from `source`; if more than half of it would have to
            be stored; or if `out` exists and is not empty.
        ModelError: If one of the two is not a model folder.
        IntegrityError: If a file is damaged, unsafe, or not what `pruning.json` says was written.
        ResourceError: If the disk is too small or not writable. After any error nothing is left behind.
    """
    origin, folder, target = locate_model(source), existing_folder(pruned, "pruned checkpoint"), Path(out)
    _check_free(target, (origin, folder))
    facts = read_pruning(folder)
    plan = recorded_plan(folder, facts, "A delta is made of a folder that `gradpruner prune` wrote.")
    shards = open_shards(folder)
    others = _other_files(folder, {header.path.name for header in shards.headers})
    origins = _origins(_blueprint(origin, plan, folder, facts), shards)
    record = DeltaRecord(source=str(source), plan=plan.to_dict())
    for header in shards.headers:
        _compare_file(header, origins, record, progress)
    stored = [shards.tensors[name] for name in record.stored]
    _refuse_large(stored, shards, origins, source)
    _refuse_damaged(folder, facts, record)
    needed = sum(ref.num_bytes for ref in stored) + sum(path.stat().st_size for path in others.values())
    check_free_space(target.parent, needed + SPARE_BYTES, "The delta")
    with staged_folder(target) as staged:
        _write_delta(staged, record, stored, shards, others)
        size = folder_bytes(staged)
    return DeltaSummary(str(target), size, record.checkpoint_bytes, len(record.copied), len(stored))


def existing_folder(folder: str | Path, what: str) -> Path:
    """Returns the path of a folder, "~" expanded; raises ConfigError if the folder does not exist."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"There is no {what} at {path}.",
            hint="Give a folder; one on the hub can be fetched with: hf download <id> --local-dir <folder>",
        )
    return path


def _check_free(target: Path, inputs: tuple[Path, ...]) -> None:
    check_output(target, inputs=inputs, marker=DELTA_FILE)
    if (target / DELTA_FILE).exists():  # check_output accepts it, but staged_folder replaces models only
        raise ConfigError(
            f"{target} holds a delta.", hint="Remove it first, or choose another output folder."
        )


def _blueprint(origin: Path, plan: PruningPlan, folder: Path, facts: Mapping[str, Any]) -> Blueprint:
    try:
        # Names do not depend on merging, and merging would need the recorded gradients.
        return Blueprint(origin, plan.without_merging())
    except PlanError as error:
        raise ConfigError(
            f"{origin} is not the model that {folder} was made from: {error.message}",
            hint=f"Give the source that its {PRUNING_FILE} names: {facts.get('source', 'none')}.",
        ) from error


def _origins(blueprint: Blueprint, shards: Shards) -> dict[str, TensorRef | None]:
    """Returns tensor of the pruned checkpoint -> the same tensor of the source; None: to be stored.

    The checkpoint may lack planned tensors: a tied head is often saved only once.
    """
    wanted = {piece.name: piece for piece in blueprint.pieces()}
    found: dict[str, TensorRef | None] = {}
    for name, ref in shards.tensors.items():
        piece = wanted.get(name)
        if piece is None or piece.shape != ref.shape:
            expected = f"have the shape {piece.shape}" if piece else "not exist"
            raise ConfigError(
                f"{blueprint.source} is not the model that {shards.folder} was made from: '{name}' has the "
                f"shape {ref.shape}; by the plan it would {expected}.",
                hint="Give the exact model that was pruned. A model that was pruned in memory may have other "
                "tensor names: prune it with `gradpruner prune` instead.",
            )
        found[name] = piece.ref if piece.dtype == ref.dtype else None
    return found


def _other_files(folder: Path, weights: set[str]) -> dict[str, Path]:
    """Returns all files except weights, by their names in the delta; links are followed."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in weights:
            continue
        nested = path.is_dir() and path.name == TEMPLATES_FOLDER
        for file in sorted(path.glob("[!.]*")) if nested else [path]:
            name = file.relative_to(folder).as_posix()
            real = check_inside(folder, file)
            size = real.stat().st_size
            if not real.is_file() or not FILE_NAME.fullmatch(name) or size > SMALL_FILE_LIMIT:
                raise ConfigError(
                    f"{file} ({readable_bytes(size)}) is neither a weight file of the model nor a file that "
                    f"a delta can hold: a plain name, at most {readable_bytes(SMALL_FILE_LIMIT)}, in the "
                    f"folder itself or in {TEMPLATES_FOLDER}.",
                    hint="Move it out of the folder if the model does not need it.",
                )
            found[name] = real
    return found


def _compare_file(
    header: ShardHeader,
    origins: Mapping[str, TensorRef | None],
    record: DeltaRecord,
    progress: Callable[[int], None] | None,
) -> None:
    """Compares every tensor of one weight file with the source, and hashes the file."""
    name = header.path.name
    if not WEIGHTS_NAME.fullmatch(name):
        raise ConfigError(f"{header.path} has a name that a delta cannot hold.", hint="Rename the file.")
    for ref in header.tensors.values():
        origin, digest = origins[ref.name], hashlib.sha256()
        if origin is not None and same_bytes(ref, origin, digest):
            record.copied[ref.name] = CopiedTensor(origin.name, digest.hexdigest())
        else:
            record.stored.append(ref.name)
        if progress is not None:
            progress(ref.num_bytes)
    raw = _header_bytes(header)
    record.weights[name] = RecordedFile(sha256_file(header.path, progress), header.file_bytes)
    record.headers[name] = RecordedFile(hashlib.sha256(raw).hexdigest(), len(raw))


def _header_bytes(header: ShardHeader) -> bytes:
    with header.path.open("rb") as file:
        return file.read(header.data_start)


def _refuse_large(
    stored: Sequence[TensorRef],
    shards: Shards,
    origins: Mapping[str, TensorRef | None],
    source: str | Path,
) -> None:
    size, total = sum(ref.num_bytes for ref in stored), shards.total_bytes
    if size <= STORED_LIMIT * total:
        return
    recast = sum(1 for ref in stored if origins[ref.name] is None)
    dtypes = f" {recast} of them have another dtype than in the source." if recast else ""
    raise ConfigError(
        f"{len(stored)} of {len(shards.tensors)} tensors of {shards.folder} differ from those of {source}: a "
        f"delta would store {readable_bytes(size)} of {readable_bytes(total)}, and at most "
        f"{STORED_LIMIT:.0%} is allowed.{dtypes}",
        hint="If this model was fine-tuned after pruning, every tensor differs: publish the LoRA adapters "
        "with a delta of the pruned model they were trained on, or the full checkpoint.",
    )


def _refuse_damaged(folder: Path, facts: Mapping[str, Any], record: DeltaRecord) -> None:
    """Refuses weights that changed after pruning: a flipped bit would be stored as if it were intended."""
    written = facts.get("files")
    for name, entry in (written if isinstance(written, dict) else {}).items():
        said = entry.get("sha256") if isinstance(entry, dict) else None
        if name in record.weights and said != record.weights[name].sha256:
            raise IntegrityError(
                f"{folder / name} has changed since the model was pruned: its SHA-256 is not the one in "
                f"{PRUNING_FILE}.",
                hint=f"Prune again; if you changed it on purpose, remove 'files' from {PRUNING_FILE}.",
            )


def _write_delta(
    staged: Path,
    record: DeltaRecord,
    stored: Sequence[TensorRef],
    shards: Shards,
    others: Mapping[str, Path],
) -> None:
    if stored:
        pieces = [Piece.copied(ref.name, ref) for ref in stored]
        (file,) = pack(pieces, sum(piece.num_bytes for piece in pieces))
        digest = write_file(staged / TENSORS_FILE, file, {"format": "pt"})
        record.tensors = RecordedFile(digest, (staged / TENSORS_FILE).stat().st_size)
    (staged / HEADERS_FOLDER).mkdir()
    for header in shards.headers:
        (staged / header_file(header.path.name)).write_bytes(_header_bytes(header))
    for name, path in others.items():
        target = staged / FILES_FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        record.files[name] = RecordedFile(sha256_file(target), target.stat().st_size)
    write_json(staged / DELTA_FILE, record.to_dict())
