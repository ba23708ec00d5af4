"""Rebuilds a pruned checkpoint from its source and its delta: the same files, to the bit."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gradpruner.common.errors import IntegrityError
from gradpruner.common.files import check_free_space
from gradpruner.common.provenance import sha256_file
from gradpruner.models.folder import PRUNING_FILE, check_output, locate_model, staged_folder
from gradpruner.models.headers import ShardHeader, TensorRef, check_inside, read_header
from gradpruner.models.shards import Shards, open_shards
from gradpruner.pruning.delta import SPARE_BYTES, existing_folder
from gradpruner.pruning.delta_record import (
    AGAIN,
    DELTA_FILE,
    FILES_FOLDER,
    TENSORS_FILE,
    DeltaRecord,
    RecordedFile,
    header_file,
    read_record,
)
from gradpruner.pruning.pieces import Piece
from gradpruner.pruning.writer import same_bytes, write_file


def rebuild_checkpoint(
    source: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Rebuilds a pruned checkpoint, to the last bit, from a delta and the model it was made from.

    The source may be sharded differently than when the delta was made, but its tensors must be the same. The
    kernel copies most bytes; every file is hashed as it is written.

    Args:
        source: The original, a model folder or a hub id.
        delta: A folder that `diff_checkpoint` made.
        out: The folder to make; a model that this package wrote is replaced, anything else is refused.
        progress: Called with the number of bytes of weights written since the last call.

    Returns:
        `out`.

    Raises:
        ConfigError: If `delta` does not exist, or `out` holds something that this package did not write.
        ModelError: If the source is not a model folder.
        IntegrityError: If delta.json is not valid; if a file of the delta is damaged, missing or outside it;
            or if the source is not the model the delta was made from.
        ResourceError: If the disk is too small or not writable. After any error nothing is left behind.
    """
    origin, folder, target = locate_model(source), existing_folder(delta, "delta"), Path(out)
    check_output(target, inputs=(origin, folder), marker=PRUNING_FILE)
    record = read_record(folder)
    for name, facts in record.own_files().items():
        _check_file(folder, name, facts, AGAIN)
    refs = _tensor_refs(folder, record, open_shards(origin))
    check_free_space(target.parent, record.checkpoint_bytes + SPARE_BYTES, "The rebuilt checkpoint")
    with staged_folder(target) as staged:
        layout = _lay_out(folder, staged, record, refs)
        for name, pieces in layout.items():
            raw = (folder / header_file(name)).read_bytes()
            digest = write_file(staged / name, pieces, {}, progress, header=raw)
            if digest != record.weights[name].sha256:
                raise _wrong_weights(name, pieces, record)
        # pruning.json last: it marks the folder as complete.
        for name in sorted(record.files, key=lambda name: name == PRUNING_FILE):
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(check_inside(folder, folder / FILES_FOLDER / name), staged / name)
            _check_file(staged, name, record.files[name], "It changed while it was copied: try again.")
    return target


def _check_file(folder: Path, name: str, facts: RecordedFile, hint: str) -> None:
    """Refuses a file that is missing, outside the folder, or not the recorded one."""
    path = folder / name
    real = check_inside(folder, path)
    size = real.stat().st_size if real.is_file() else None
    if size != facts.bytes:
        found = "is not a regular file" if size is None else f"has {size} bytes"
        raise IntegrityError(f"{path} {found}; {DELTA_FILE} says {facts.bytes} bytes.", hint=hint)
    if sha256_file(real) != facts.sha256:
        raise IntegrityError(f"{path} is damaged: its SHA-256 is not the one in {DELTA_FILE}.", hint=hint)


def _tensor_refs(folder: Path, record: DeltaRecord, source: Shards) -> dict[str, TensorRef]:
    """Returns where the bytes of every tensor of the checkpoint are."""
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
                hint=_right_source(record),
            )
        found[name] = source.tensors[copied.source]
    return found


def _right_source(record: DeltaRecord) -> str:
    return f"Give the model and revision the delta was made from ('{record.source}'), complete and unchanged."


def _lay_out(
    folder: Path, staged: Path, record: DeltaRecord, refs: Mapping[str, TensorRef]
) -> dict[str, list[Piece]]:
    """Returns the pieces of every weight file; checks all headers before any weights are written."""
    layout: dict[str, list[Piece]] = {}
    seen: set[str] = set()
    for name in record.weights:
        raw = folder / header_file(name)
        header = _outline(raw, staged / name, record.weights[name].bytes)
        for ref in header.tensors.values():
            if ref.name not in refs or ref.name in seen:
                raise IntegrityError(
                    f"{raw} names the tensor {ref.name[:80]!r}, which {DELTA_FILE} does not name or another "
                    "header names too.",
                    hint=AGAIN,
                )
            seen.add(ref.name)
        layout[name] = [_piece(ref, refs[ref.name], record) for ref in header.tensors.values()]
    if seen != refs.keys():
        raise IntegrityError(
            f"No header names the tensor {min(refs.keys() - seen)[:80]!r} of {DELTA_FILE}.", hint=AGAIN
        )
    return layout


def _outline(raw: Path, path: Path, size: int) -> ShardHeader:
    """Reads a header alone: as that of a sparse file of full size, which takes no space on the disk."""
    text = raw.read_bytes()
    with path.open("wb") as file:
        file.write(text)
        file.truncate(size)
    try:
        header = read_header(path)
    except IntegrityError as error:
        raise IntegrityError(f"{raw} is not the header of weights: {error.message}", hint=AGAIN) from error
    if header.data_start != len(text):
        raise IntegrityError(
            f"{raw} has {len(text)} bytes; the header in it has {header.data_start}.", hint=AGAIN
        )
    return header


def _piece(ref: TensorRef, origin: TensorRef, record: DeltaRecord) -> Piece:
    if (ref.dtype, ref.shape) != (origin.dtype, origin.shape):
        stored = ref.name not in record.copied
        raise IntegrityError(
            f"The tensor '{origin.name}' in {origin.file} is {origin.dtype} {origin.shape}; the delta needs "
            f"{ref.dtype} {ref.shape}.",
            hint=AGAIN if stored else _right_source(record),
        )
    # As bytes, not numbers: the hash says whether they are right, and a recorded NaN is right too.
    return Piece(ref.name, "U8", (ref.num_bytes,), ref.num_bytes, ref=origin)


def _wrong_weights(name: str, pieces: Sequence[Piece], record: DeltaRecord) -> IntegrityError:
    """Explains a wrong hash: looks for tensors of the source that differ from the recorded ones."""
    copied = [piece for piece in pieces if piece.name in record.copied]
    wrong = [piece for piece in copied if _digest(piece.ref) != record.copied[piece.name].sha256]
    if not wrong:
        return IntegrityError(
            f"{name} does not have the SHA-256 in {DELTA_FILE} after rebuilding, although every tensor of "
            "the source is the right one.",
            hint=f"{AGAIN} If that does not help, the disk or the memory of this machine is at fault.",
        )
    first = wrong[0].ref
    assert first is not None
    return IntegrityError(
        f"{len(wrong)} of {len(copied)} tensors of the source that go into {name} differ from those the "
        f"delta was made from; the first is '{first.name}' in {first.file}.",
        hint="The source is another revision, was fine-tuned, or is damaged. " + _right_source(record),
    )


def _digest(ref: TensorRef | None) -> str:
    """Returns the SHA-256 of a tensor's bytes."""
    assert ref is not None
    digest = hashlib.sha256()
    same_bytes(ref, ref, digest)
    return digest.hexdigest()
