"""A pruned checkpoint as the difference to its source: a fraction of the size, rebuilt to the last bit.

A delta is a folder:

    delta.json            the record: plan, names, sizes and hashes of everything, the source of every tensor
    tensors.safetensors   the tensors the source does not have, stored whole: merged linears, cut wide tensors
    headers/*.header      the first bytes of every file of weights, as they are: length and header
    files/*               every other file of the pruned folder, byte for byte

Nothing is computed when it is rebuilt: headers, tensors of the source and tensors of the delta are put
together, and every file must have the SHA-256 that was recorded. So a source of another revision, a damaged
one or a damaged delta is an error that names the tensor or the file, never a slightly different model. A
delta is trusted as a download of the model itself would be: hashes find damage, they do not sign.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gradpruner.errors import ConfigError, IntegrityError, PlanError
from gradpruner.files import check_free_space, readable_bytes
from gradpruner.json_files import read_json, write_json
from gradpruner.models.folder import PRUNING_FILE, check_output, locate_model, staged_folder
from gradpruner.models.shards import (
    ShardHeader,
    Shards,
    TensorRef,
    check_inside,
    open_shards,
    read_header,
)
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.provenance import sha256_file
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.delta_record import (
    AGAIN,
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
    read_record,
)
from gradpruner.pruning.writer import Piece, pack, write_file

# A delta of which more than this share of the checkpoint had to be stored is not worth its own format.
STORED_LIMIT = 0.5
_BLOCK_BYTES = 4 << 20
_SPARE_BYTES = 16 << 20  # what a file system takes for itself, generously


@dataclass(frozen=True)
class DeltaSummary:
    """What a delta holds.

    Attributes:
        folder: Where it is.
        num_bytes: Size of all its files.
        checkpoint_bytes: Size of all files it rebuilds.
        copied: Tensors that are taken from the source.
        stored: Tensors that are in the delta.
    """

    folder: str
    num_bytes: int
    checkpoint_bytes: int
    copied: int
    stored: int


# -- making one ------------------------------------------------------------------------------------------


def diff_checkpoint(
    source: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> DeltaSummary:
    """Writes the difference between a pruned checkpoint and the model it was made from.

    Both are read once, in blocks; memory is that of the libraries. Hidden files of the pruned folder are left
    out.

    Args:
        source: The original, a model folder or a hub id.
        pruned: A folder with a `pruning.json` that holds a plan.
        out: The folder to make; it must not exist or be empty.
        progress: Called with the number of bytes of the pruned checkpoint compared since the last call.

    Returns:
        What the delta holds.

    Raises:
        ConfigError: If `pruned` was not pruned or not from `source`, more than half of it would have to be
            stored, or `out` is not free.
        ModelError: If one of the two is not a model folder.
        IntegrityError: If a file is damaged, unsafe, or not what `pruning.json` says was written.
        ResourceError: If the disk is too small or not writable. In all cases nothing is left behind.
    """
    origin, folder, target = locate_model(source), _existing(pruned, "pruned checkpoint"), Path(out)
    _check_free(target, (origin, folder))
    facts, plan = _pruning_of(folder)
    shards = open_shards(folder)
    others = _other_files(folder, {header.path.name for header in shards.headers})
    origins = _origins(_blueprint(origin, plan, folder, facts), shards)
    record = DeltaRecord(str(source), plan.to_dict())
    for header in shards.headers:
        _compare_file(header, origins, record, progress)
    stored = [shards.tensors[name] for name in record.stored]
    _refuse_large(stored, shards, origins, source)
    _refuse_damaged(folder, facts, record)
    needed = sum(ref.num_bytes for ref in stored) + sum(path.stat().st_size for path in others.values())
    check_free_space(target.parent, needed + _SPARE_BYTES, "The delta")
    with staged_folder(target) as staged:
        _write_delta(staged, record, stored, shards, others)
        size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    return DeltaSummary(str(target), size, record.checkpoint_bytes, len(record.copied), len(stored))


def _existing(folder: str | Path, what: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"There is no {what} at {path}.",
            hint="Give a folder; one on the hub can be fetched with: hf download <id> --local-dir <folder>",
        )
    return path


def _check_free(target: Path, inputs: tuple[Path, ...]) -> None:
    check_output(target, inputs=inputs, marker=DELTA_FILE)
    if (target / DELTA_FILE).exists():  # ours, but staged_folder replaces models only
        raise ConfigError(f"{target} holds a delta.", hint="Remove it first, or choose another --out.")


def _pruning_of(folder: Path) -> tuple[dict[str, Any], PruningPlan]:
    """What pruning.json says, and the plan in it."""
    path = folder / PRUNING_FILE
    hint = "A delta is made of a folder that `gradpruner prune` wrote."
    if not path.is_file():
        raise ConfigError(f"{folder} has no {PRUNING_FILE}, so what was pruned is not known.", hint=hint)
    facts = read_json(check_inside(folder, path), "pruning record")
    if not isinstance(facts, dict) or not facts.get("plan"):
        raise ConfigError(f"{folder} was not pruned: its {PRUNING_FILE} holds no plan.", hint=hint)
    return facts, PruningPlan.from_dict(facts["plan"], str(path))


def _blueprint(origin: Path, plan: PruningPlan, folder: Path, facts: Mapping[str, Any]) -> Blueprint:
    try:
        # Names do not depend on merging, and merging would need the recorded gradients.
        return Blueprint(origin, plan.without_merging())
    except PlanError as error:
        raise ConfigError(
            f"{origin} is not the model that {folder} was made from: {error.message}", hint=_made_from(facts)
        ) from error


def _made_from(facts: Mapping[str, Any]) -> str:
    return f"Give the source that its {PRUNING_FILE} names: {facts.get('source', 'none')}."


def _origins(blueprint: Blueprint, shards: Shards) -> dict[str, TensorRef | None]:
    """Tensor of the pruned checkpoint -> the same tensor of the source; None when it cannot be the same.

    Tensors of the source that the checkpoint lacks are no concern: a tied head is often saved only once.
    """
    wanted = {piece.name: piece for piece in blueprint.pieces()}
    found: dict[str, TensorRef | None] = {}
    for name, ref in shards.tensors.items():
        piece = wanted.get(name)
        if piece is None or piece.shape != ref.shape:
            expected = f"has the shape {piece.shape} there" if piece else "does not exist there"
            raise ConfigError(
                f"{blueprint.source} is not the model that {shards.folder} was made from: '{name}', of shape "
                f"{ref.shape}, {expected} by the plan.",
                hint="Give the very model that was pruned. One pruned in memory may name its tensors "
                "otherwise: make it with `gradpruner prune`.",
            )
        found[name] = piece.ref if piece.dtype == ref.dtype else None
    return found


def _other_files(folder: Path, weights: set[str]) -> dict[str, Path]:
    """Every file but the weights by its name in the delta, links followed."""
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
                    f"{file} ({readable_bytes(size)}) is neither weights of the model nor a file that a "
                    "delta can hold: those have plain names, at most "
                    f"{readable_bytes(SMALL_FILE_LIMIT)}, and are in the folder itself or in "
                    f"{TEMPLATES_FOLDER}.",
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
    """Hashes one file of weights from its first byte to its last, and compares every tensor on the way."""
    name = header.path.name
    if not WEIGHTS_NAME.fullmatch(name):
        raise ConfigError(f"{header.path} has a name that a delta cannot hold.", hint="Rename the file.")
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        raw = file.read(header.data_start)
        digest.update(raw)
        for ref in header.tensors.values():
            origin = origins[ref.name]
            same = _compare_tensor(file, ref, origin, digest, progress)
            if origin is not None and same is not None:
                record.copied[ref.name] = CopiedTensor(origin.name, same)
            else:
                record.stored.append(ref.name)
    record.weights[name] = RecordedFile(digest.hexdigest(), header.file_bytes)
    record.headers[name] = RecordedFile(hashlib.sha256(raw).hexdigest(), len(raw))


def _compare_tensor(
    file: BinaryIO,
    ref: TensorRef,
    origin: TensorRef | None,
    whole: Any,
    progress: Callable[[int], None] | None,
) -> str | None:
    """Reads one tensor on from where the file stands; its SHA-256 if the source has the same bytes."""
    digest = hashlib.sha256()
    other = origin.file.open("rb", buffering=0) if origin else None
    try:
        if other and origin:
            other.seek(origin.start)
        for start in range(0, ref.num_bytes, _BLOCK_BYTES):
            want = min(_BLOCK_BYTES, ref.num_bytes - start)
            block = file.read(want)
            if len(block) != want:
                raise IntegrityError(f"{ref.file} ended while it was read; it became shorter.")
            whole.update(block)
            if other and other.read(want) == block:
                digest.update(block)
            elif other:  # one difference is enough; the rest is read for the hash of the file
                other.close()
                other = None
            if progress is not None:
                progress(want)
        return digest.hexdigest() if other else None
    finally:
        if other:
            other.close()


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
    dtypes = f" {recast} of them are stored in another dtype than there." if recast else ""
    raise ConfigError(
        f"{len(stored)} of {len(shards.tensors)} tensors of {shards.folder} are not those of {source}; a "
        f"delta would be {readable_bytes(size)} of {readable_bytes(total)}, at most {STORED_LIMIT:.0%} "
        f"is allowed.{dtypes}",
        hint="If this model was fine-tuned after pruning, every tensor differs: publish the LoRA adapters "
        "with a delta of the pruned model they were trained on, or the full checkpoint.",
    )


def _refuse_damaged(folder: Path, facts: Mapping[str, Any], record: DeltaRecord) -> None:
    """Refuses weights that changed since they were written: a flipped bit would be stored as if meant."""
    written = facts.get("files")
    for name, entry in (written if isinstance(written, dict) else {}).items():
        said = entry.get("sha256") if isinstance(entry, dict) else None
        if name in record.weights and said != record.weights[name].sha256:
            raise IntegrityError(
                f"{folder / name} is not the file that was written when the model was pruned: its SHA-256 is "
                f"not that in {PRUNING_FILE}.",
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
        with header.path.open("rb") as source:
            (staged / header_file(header.path.name)).write_bytes(source.read(header.data_start))
    for name, path in others.items():
        target = staged / FILES_FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        record.files[name] = RecordedFile(sha256_file(target), target.stat().st_size)
    write_json(staged / DELTA_FILE, record.to_dict())


# -- rebuilding ------------------------------------------------------------------------------------------


def rebuild_checkpoint(
    source: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Rebuilds a pruned checkpoint from the model it was made from and a delta, to the last bit.

    The source may be sharded in another way than when the delta was made; its tensors must be the same. Most
    bytes are copied by the kernel; every file is hashed as it is written.

    Args:
        source: The original, a model folder or a hub id.
        delta: A folder that `diff_checkpoint` made.
        out: The folder to make; a model of ours is replaced, anything else is refused.
        progress: Called with the number of bytes of weights written since the last call.

    Returns:
        `out`.

    Raises:
        ConfigError: If there is no `delta`, or `out` holds something that is not ours.
        ModelError: If the source is not a model folder.
        IntegrityError: If delta.json says what no delta can, a file of the delta is damaged, missing or
            outside it, or the source is not the model the delta was made from.
        ResourceError: If the disk is too small or not writable. In all cases nothing is left behind.
    """
    origin, folder, target = locate_model(source), _existing(delta, "delta"), Path(out)
    check_output(target, inputs=(origin, folder), marker=PRUNING_FILE)
    record = read_record(folder)
    for name, facts in record.own_files().items():
        _check_file(folder, name, facts, AGAIN)
    refs = _tensor_refs(folder, record, open_shards(origin))
    check_free_space(target.parent, record.checkpoint_bytes + _SPARE_BYTES, "The rebuilt checkpoint")
    with staged_folder(target) as staged:
        layout = _lay_out(folder, staged, record, refs)
        for name, pieces in layout.items():
            raw = (folder / header_file(name)).read_bytes()
            digest = write_file(staged / name, pieces, {}, progress, header=raw)
            if digest != record.weights[name].sha256:
                raise _wrong_weights(name, pieces, record)
        # The mark of a whole one last.
        for name in sorted(record.files, key=lambda name: name == PRUNING_FILE):
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(check_inside(folder, folder / FILES_FOLDER / name), staged / name)
            _check_file(staged, name, record.files[name], "It changed while it was copied: try again.")
    return target


def _check_file(folder: Path, name: str, facts: RecordedFile, hint: str) -> None:
    """Refuses a file that is missing, outside the folder, or not the one that was recorded."""
    path = folder / name
    real = check_inside(folder, path)
    size = real.stat().st_size if real.is_file() else None
    if size != facts.bytes:
        found = "is no regular file" if size is None else f"has {size} bytes"
        raise IntegrityError(f"{path} {found}; {facts.bytes} bytes by {DELTA_FILE}.", hint=hint)
    if sha256_file(real) != facts.sha256:
        raise IntegrityError(f"{path} is damaged: its SHA-256 is not that in {DELTA_FILE}.", hint=hint)


def _tensor_refs(folder: Path, record: DeltaRecord, source: Shards) -> dict[str, TensorRef]:
    """Where the bytes of every tensor of the checkpoint are."""
    held = read_header(folder / TENSORS_FILE, folder).tensors if record.tensors else {}
    if held.keys() != set(record.stored):
        raise IntegrityError(
            f"{folder / TENSORS_FILE} does not hold the tensors that {DELTA_FILE} names.", hint=AGAIN
        )
    found = dict(held)
    for name, copied in record.copied.items():
        if copied.source not in source.tensors:
            raise IntegrityError(
                f"{source.folder} has no tensor {copied.source[:80]!r}, which the delta needs.",
                hint=_other_source(record),
            )
        found[name] = source.tensors[copied.source]
    return found


def _other_source(record: DeltaRecord) -> str:
    return f"Give the model and revision the delta was made from ('{record.source}'), complete and unchanged."


def _lay_out(
    folder: Path, staged: Path, record: DeltaRecord, refs: Mapping[str, TensorRef]
) -> dict[str, list[Piece]]:
    """The pieces of every file of weights, each header proved before anything is written."""
    layout: dict[str, list[Piece]] = {}
    seen: set[str] = set()
    for name in record.weights:
        raw = folder / header_file(name)
        header = _outline(raw, staged / name, record.weights[name].bytes)
        for ref in header.tensors.values():
            if ref.name not in refs or ref.name in seen:
                raise IntegrityError(
                    f"{raw} holds the tensor {ref.name[:80]!r}, which {DELTA_FILE} does not know or another "
                    "file holds too.",
                    hint=AGAIN,
                )
            seen.add(ref.name)
        layout[name] = [_piece(ref, refs[ref.name], record) for ref in header.tensors.values()]
    if seen != refs.keys():
        raise IntegrityError(
            f"No header has the tensor {min(refs.keys() - seen)[:80]!r} of {DELTA_FILE}.", hint=AGAIN
        )
    return layout


def _outline(raw: Path, path: Path, size: int) -> ShardHeader:
    """Reads a header alone as that of a file of full size: one of holes, which takes no space."""
    text = raw.read_bytes()
    with path.open("wb") as file:
        file.write(text)
        file.truncate(size)
    try:
        header = read_header(path)
    except IntegrityError as error:
        raise IntegrityError(f"{raw} is not the header of the file: {error.message}", hint=AGAIN) from error
    if header.data_start != len(text):
        raise IntegrityError(
            f"{raw} has {len(text)} bytes, the header in it {header.data_start}.", hint=AGAIN
        )
    return header


def _piece(ref: TensorRef, origin: TensorRef, record: DeltaRecord) -> Piece:
    if (ref.dtype, ref.shape) != (origin.dtype, origin.shape):
        stored = ref.name not in record.copied
        raise IntegrityError(
            f"The tensor '{origin.name}' in {origin.file} is {origin.dtype} {origin.shape}; the delta needs "
            f"{ref.dtype} {ref.shape}.",
            hint=AGAIN if stored else _other_source(record),
        )
    # As bytes, not numbers: the hash decides whether they are right, and NaN would be if it was there.
    return Piece(ref.name, "U8", (ref.num_bytes,), ref.num_bytes, ref=origin)


def _wrong_weights(name: str, pieces: Sequence[Piece], record: DeltaRecord) -> IntegrityError:
    """Why a file has another hash than recorded: looks for tensors of the source that are not the same."""
    copied = [piece for piece in pieces if piece.name in record.copied]
    wrong = [piece for piece in copied if _digest(piece) != record.copied[piece.name].sha256]
    if not wrong:
        return IntegrityError(
            f"{name} came out with another SHA-256 than {DELTA_FILE} says, though every tensor of the source "
            "is the right one.",
            hint=f"{AGAIN} If that does not help, the disk or the memory of this machine is at fault.",
        )
    first = wrong[0].ref
    assert first is not None
    return IntegrityError(
        f"{len(wrong)} of {len(copied)} tensors of the source that go into {name} are not those the delta "
        f"was made from, such as '{first.name}' in {first.file}.",
        hint="The source is another revision, was fine-tuned, or is damaged. " + _other_source(record),
    )


def _digest(piece: Piece) -> str:
    ref, digest = piece.ref, hashlib.sha256()
    assert ref is not None
    with ref.file.open("rb", buffering=0) as file:
        file.seek(ref.start)
        for start in range(0, ref.num_bytes, _BLOCK_BYTES):
            digest.update(file.read(min(_BLOCK_BYTES, ref.num_bytes - start)))
    return digest.hexdigest()
