"""Which tensors a safetensors checkpoint holds and where, from its headers and its index alone.

A pruned checkpoint is made by copying byte ranges of its source, so a wrong offset would become a wrong model
without anybody noticing. Every number here comes from a stranger's file; none is used before it is proved
against the size of that file, and nothing is allocated because a header says so. What is accepted here,
safetensors accepts too and reads the same; we refuse more (duplicate keys, unknown fields, empty names).
Values are not looked at.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from gradpruner.errors import IntegrityError, ModelError

# All of safetensors 0.8; the small floats share bytes, so only some shapes fill whole ones.
DTYPE_BYTES: dict[str, int | Fraction] = {
    "F4": Fraction(1, 2),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), Fraction(3, 4)),
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
HEADER_LIMIT = 100_000_000  # bytes; the format's own
INDEX_LIMIT = 64_000_000  # bytes
# Bounds on memory, several times what the largest public models need (100 000 tensors in 150 files).
INDEXED_LIMIT = 1_000_000
TENSOR_LIMIT = 250_000
METADATA_LIMIT = 10_000
STRING_LIMIT = 10_000_000  # bytes
ENTRY_LIMIT = 4096  # bytes; ample for 64 extents, one per line
PASSED_LIMIT = 100_000  # bytes of a member of an index that is not read
MEMBER_LIMIT = 100  # members of an index
RANK_LIMIT = 64
COUNT_LIMIT = 2**63

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
# Mistral's second copy of the same weights, adapters, and what editors and file servers leave behind.
_NOT_OURS = ("consolidated", "adapter_", ".")
_PART = re.compile(r"-\d+-of-0*(\d+)\.safetensors")
_FIELDS = {"dtype", "shape", "data_offsets"}
_AGAIN = "Download or copy the file again."
_WRONG = "safetensors never writes this: the file is damaged or forged. Get it from where you trust it."


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor on disk.

    Attributes:
        name: Its name in the checkpoint.
        file: The file that holds it.
        dtype: safetensors' name of its dtype, a key of `DTYPE_BYTES`.
        shape: Its extents.
        start: Absolute offset in the file of its first byte.
        stop: Absolute offset behind its last byte.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of data; 0 if an extent is 0."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What one safetensors file says about itself, proved against its size.

    Attributes:
        path: The file.
        tensors: By name, in the order of their data; they cover the file from `data_start` to its end.
        metadata: The free strings of `__metadata__`.
        data_start: Offset of the first byte of data.
        file_bytes: Size of the file.
    """

    path: Path
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Shards:
    """All tensors of a model folder.

    Attributes:
        folder: The folder.
        headers: One per file, in the order in which the index first names them.
        tensors: By name, file after file, each in the order of its data.
    """

    folder: Path
    headers: tuple[ShardHeader, ...]
    tensors: dict[str, TensorRef]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(ref.num_bytes for ref in self.tensors.values())


# -- files -----------------------------------------------------------------------------------------------


def check_inside(folder: Path, path: Path) -> Path:
    """Follows the links of a path and makes sure that they do not leave the model folder.

    A snapshot in the Hugging Face cache is made of links into `blobs` of the same repository, and since
    huggingface_hub 2 from there into the cache's shared `blobs`; these two are the only way out.

    Args:
        folder: The model folder.
        path: A file in it.

    Returns:
        The file with all links followed.

    Raises:
        IntegrityError: If the file is missing, or is or passes a link to elsewhere.
    """
    try:
        base, real = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing.", hint="Is the download complete?") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise IntegrityError(f"{path} cannot be followed: {error}.", hint=_AGAIN) from error
    if base in real.parents or _in_same_cache(base, real):
        return real
    raise IntegrityError(
        f"{path} leads to {real}, which is outside the model folder {folder}.",
        hint="Copy the file into the folder; only links within it, or into the blobs of its own Hugging Face "
        "cache, are followed.",
    )


def _in_same_cache(base: Path, real: Path) -> bool:
    """Whether `real` is a blob of the cached repository that `base` is a snapshot of."""
    for place in (base, *base.parents):
        repository = place.parent.parent
        if place.parent.name != "snapshots" or not repository.name.startswith("models--"):
            continue
        if real.parent == repository / "blobs":
            return True
        shared = repository.parent / "blobs" / real.name[:2] / real.name
        return real == shared and re.fullmatch("[0-9a-f]{64}", real.name) is not None
    return False


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file and yields it with its size; our own errors instead of OSError."""

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # opening a pipe would wait for a writer

    try:
        with open(path, "rb", opener=without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError
            yield file, status.st_size
    except IsADirectoryError:
        raise IntegrityError(
            f"{path} is not a regular file.", hint="Weights and index must be ordinary files."
        ) from None
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing.", hint="Is the download complete?") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}.", hint="Who may read it?") from error


# -- one header ------------------------------------------------------------------------------------------


def read_header(path: Path, root: Path | None = None) -> ShardHeader:
    """Reads the header of a safetensors file and proves every offset in it.

    Memory and time are bounded by the header, which is bounded by the file and by `HEADER_LIMIT`.

    Args:
        path: The file.
        root: The folder that its links must not leave; None follows them anywhere.

    Raises:
        IntegrityError: If it is missing, is not safetensors, is cut off, or says anything that does not add
            up; the message says what was found where.
        ModelError: If the operating system will not let us read it.
    """
    real = path if root is None else check_inside(root, path)
    with _open_regular(real) as (file, file_bytes):
        text = _header_text(path, file, file_bytes)
    data_start = 8 + len(text)
    try:
        tensors, metadata = _parse_header(text, path, data_start)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} has a damaged header: {error}.", hint=_WRONG) from error
    tensors.sort(key=lambda ref: (ref.start, ref.stop))
    _check_coverage(path, tensors, data_start, file_bytes)
    return ShardHeader(path, {ref.name: ref for ref in tensors}, metadata, data_start, file_bytes)


def _header_text(path: Path, file: BinaryIO, file_bytes: int) -> bytes:
    """The bytes of the header, read once; its claimed length is checked before it is believed."""
    start = file.read(8)
    if start == b"version ":  # both a wrong length and the commonest cause of one
        raise IntegrityError(f"{path} is a Git LFS pointer, not the weights.", hint="Run: git lfs pull")
    if len(start) < 8:
        raise IntegrityError(
            f"{path} has {file_bytes} bytes; a safetensors file has 8 at least.", hint=_AGAIN
        )
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        raise IntegrityError(
            f"{path} claims a header of {length} bytes; {HEADER_LIMIT} are allowed.",
            hint="It is not a safetensors file, or damaged: download or copy it again.",
        )
    text = file.read(length) if length <= file_bytes - 8 else b""
    if len(text) != length:  # or it shrank while we read
        raise IntegrityError(
            f"{path} is cut off: its header alone needs {8 + length} bytes, the file has {file_bytes}.",
            hint=_AGAIN,
        )
    return text


_SPACE = rb"[ \t\n\r]*+"
_TEXT = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_STRING = re.compile(_SPACE + b"(" + _TEXT + b")")
_ENTRY = re.compile(_SPACE + rb'(\{(?:[^{}"]++|' + _TEXT + rb")*+\})")
_OPEN, _CLOSE, _COLON, _NEXT, _END, _GAP = (
    re.compile(_SPACE + part) for part in (rb"(\{)", rb"(\})", rb"(:)", rb"([,}])", rb"(\Z)", b"()")
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError(f"a key is there twice among {_examples([key for key, _ in pairs])}")
    return unique


# Pairs keep duplicates visible; what is not read is refused for them all the same.
_PAIRS_DECODER = json.JSONDecoder(object_pairs_hook=list)
_UNIQUE_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


class _Scanner:
    """Takes JSON apart piece by piece, so that a hostile header or index fails at its first wrong byte.

    A JSON parser would build all of it before we could look: tens of bytes of memory for every byte, and
    a recursion for every bracket.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.position = 0

    def take(self, piece: re.Pattern[bytes], what: str) -> bytes:
        found = piece.match(self.text, self.position)
        if found is None:
            raise ValueError(f"byte {self.position} does not begin {what}")
        self.position = found.end()
        return found[1]

    def string(self, what: str) -> str:
        raw = self.take(_STRING, what)
        if len(raw) > STRING_LIMIT:
            raise ValueError(f"{what} has {len(raw)} bytes; {STRING_LIMIT} are allowed")
        try:
            if b"\\" not in raw:
                return raw[1:-1].decode()
            value: str = json.loads(raw.decode())
            value.encode()  # half of a surrogate pair is no text
        except ValueError as error:
            raise ValueError(f"the string before byte {self.position} is not valid ({error})") from error
        return value

    def members(self, limit: int, what: str) -> Iterator[str]:
        """Yields the keys of the object that begins here; the caller takes each value."""
        self.take(_OPEN, "a JSON object")
        if _CLOSE.match(self.text, self.position):
            self.take(_CLOSE, "its end")
            return
        seen: set[str] = set()
        whose = f"the name of a {what}"
        while True:
            key = self.string(whose)
            if key in seen:
                raise ValueError(f"{_shown(key)} is there twice")
            if len(seen) == limit:
                raise ValueError(f"it has more than {limit} {what}s")
            seen.add(key)
            self.take(_COLON, "':'")
            yield key
            if self.take(_NEXT, "',' or '}'") == b"}":
                return

    def pass_over(self) -> None:
        """Passes a small value that nobody needs; it must be JSON without duplicate keys all the same."""
        self.take(_GAP, "a value")
        piece = self.text[self.position : self.position + PASSED_LIMIT]
        # In Latin-1 a character is a byte, which tells where the value ends; its text is UTF-8.
        _, length = _PAIRS_DECODER.raw_decode(piece.decode("latin-1"))
        _UNIQUE_DECODER.decode(piece[:length].decode())
        self.position += length


def _parse_header(text: bytes, path: Path, data_start: int) -> tuple[list[TensorRef], dict[str, str]]:
    """Tensors in the order of the header, and metadata; ValueError or RecursionError if it is damaged."""
    tensors: list[TensorRef] = []
    metadata: dict[str, str] = {}
    header = _Scanner(text)
    for name in header.members(TENSOR_LIMIT, "tensor"):
        if name == "__metadata__":
            for key in header.members(METADATA_LIMIT, "metadata string"):
                metadata[key] = header.string("the text of a metadata string")
            continue
        try:
            raw = header.take(_ENTRY, "its dtype, shape and data_offsets")
            if len(raw) > ENTRY_LIMIT:
                raise ValueError(f"its entry has {len(raw)} bytes; {ENTRY_LIMIT} are allowed")
            if b"-0" in raw:  # 0 for Python, no count for safetensors
                raise ValueError("its entry has a -0")
            tensors.append(_parse_tensor(name, _PAIRS_DECODER.decode(raw.decode()), path, data_start))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tensor {_shown(name)}: {error}") from error
    header.take(_END, "the end of the header")
    return tensors, metadata


def _parse_tensor(name: str, pairs: list[tuple[str, Any]], path: Path, data_start: int) -> TensorRef:
    entry = dict(pairs)
    if len(pairs) != len(_FIELDS) or entry.keys() != _FIELDS:
        keys = ", ".join(_shown(key) for key, _ in pairs[:5]) or "nothing"
        raise ValueError(f"needs dtype, shape and data_offsets, once each and nothing else, but has {keys}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not name:
        raise ValueError("the name is empty")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"the dtype {_shown(dtype)} is not one of {', '.join(DTYPE_BYTES)}")
    if not _are_counts(shape) or len(shape) > RANK_LIMIT:
        raise ValueError(f"the shape {_shown(shape)} is not a list of at most {RANK_LIMIT} counts")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the data_offsets {_shown(offsets)} are not a start and an end")
    elements = 1
    for extent in shape:
        elements *= extent
        if elements >= COUNT_LIMIT:  # even if a 0 follows: other readers overflow here
            raise ValueError(f"the shape {_shown(shape)} has more elements than can be counted")
    needed, (start, stop) = elements * DTYPE_BYTES[dtype], offsets
    if stop - start != needed:
        raise ValueError(
            f"{dtype} of shape {_shown(shape)} takes {needed} bytes, its data_offsets [{start}, {stop}] "
            f"span {stop - start}"
        )
    return TensorRef(name, path, dtype, tuple(shape), data_start + start, data_start + stop)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < COUNT_LIMIT for x in value)


def _shown(value: Any) -> str:
    """A stranger's value for a message: quoted, with escapes, and short."""
    text = ascii(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_coverage(path: Path, tensors: list[TensorRef], data_start: int, file_bytes: int) -> None:
    """Refuses data that is missing, in two tensors, or in none."""
    end = max((ref.stop for ref in tensors), default=data_start)
    if end > file_bytes:
        raise IntegrityError(
            f"{path} is cut off: its tensors end at byte {end}, the file has {file_bytes} bytes.", hint=_AGAIN
        )
    covered, before = data_start, ""
    for ref in tensors:
        if ref.start < covered:
            both = f"{_shown(before)} and {_shown(ref.name)}"
            last = min(covered, ref.stop)
            raise IntegrityError(
                f"{path}: the tensors {both} overlap in bytes {ref.start} to {last}.", hint=_WRONG
            )
        if ref.start > covered:
            raise _hole(path, covered, ref.start)
        covered, before = ref.stop, ref.name
    if covered < file_bytes:
        raise _hole(path, covered, file_bytes)


def _hole(path: Path, start: int, stop: int) -> IntegrityError:
    return IntegrityError(f"{path}: bytes {start} to {stop} belong to no tensor.", hint=_WRONG)


# -- a model folder --------------------------------------------------------------------------------------


def open_shards(folder: Path) -> Shards:
    """Reads the headers of all weights of a model folder.

    Where there are both model.safetensors and an index, the former is taken, because transformers loads it
    and the two must be the same model; if the shards hold other tensors, one of the two is stale, and we
    refuse rather than guess. A model.safetensors beside an index that names only it is one set, not two.
    Adapters and Mistral's consolidated files are left alone.

    Args:
        folder: The model folder.

    Raises:
        ModelError: If it holds no safetensors weights, or it is not clear which of them are the model.
        IntegrityError: If a file is damaged or missing, lies outside the folder, or index and headers
            disagree. The `total_size` of an index is not compared: many on the hub are wrong.
    """
    single, index = _choose_files(folder)
    if index is None:
        assert single is not None
        return _join(folder, [read_header(folder / single, folder)])
    shards = _open_indexed(folder, folder / index)
    if single is None or [header.path.name for header in shards.headers] == [single]:
        return shards
    alone = _join(folder, [read_header(folder / single, folder)])
    kinds = [{r.name: (r.dtype, r.shape) for r in which.tensors.values()} for which in (alone, shards)]
    if kinds[0] != kinds[1]:
        names = sorted(dict(kinds[0].items() ^ kinds[1].items()))
        raise IntegrityError(
            f"{folder} holds two models: {single} and the shards of {index} differ in {_examples(names)}.",
            hint=f"Remove the stale one. transformers loads {single} and ignores the shards.",
        )
    return alone


def _choose_files(folder: Path) -> tuple[str | None, str | None]:
    """The names of the single weight file and of the index; one of them may be None."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(
            f"{folder} is not a model folder: {error.strerror}.",
            hint="Give a folder with config.json and *.safetensors.",
        ) from error
    ours = [name for name in names if not name.startswith(_NOT_OURS)]
    weights = [name for name in ours if name.endswith(_SUFFIX)]
    indexes = [name for name in ours if name.endswith(_INDEX_SUFFIX)]
    single = SINGLE_FILE if SINGLE_FILE in weights else None
    if INDEX_FILE in indexes:
        return single, INDEX_FILE
    if len(indexes) == 1 and single is None:
        return None, indexes[0]
    if indexes and single is None:
        raise ModelError(
            f"{folder} holds {len(indexes)} weight indexes: {_examples(indexes)}.",
            hint=f"Keep one, or name the one to use {INDEX_FILE}.",
        )
    if not weights:
        raise _no_weights(folder, names)
    parts = [name for name in weights if (part := _PART.search(name)) and part[1] != "1"]
    if parts or (single is None and len(weights) > 1):
        raise ModelError(
            f"{folder} holds {_examples(parts or weights)} but no index that says which of them make the "
            f"model; one *{_SUFFIX} or an {INDEX_FILE} is needed.",
            hint="Is the download complete, was saving interrupted? Fetch the index, or remove what does not "
            "belong to the model.",
        )
    return single or weights[0], None


def _no_weights(folder: Path, names: list[str]) -> ModelError:
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5"))]
    if others:
        return ModelError(
            f"{folder} holds its weights as {', '.join(others[:3])}; only safetensors are read, because "
            "pickled files can run code and gguf is a one-way format.",
            hint="Convert once, where you trust the file: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder).",
        )
    apart = [name for name in names if name.endswith(_SUFFIX)]
    if apart:
        return ModelError(
            f"{folder} holds only {_examples(apart)}: adapters, or weights in Mistral's own format.",
            hint=f"A {SINGLE_FILE}, or shards with an {INDEX_FILE}, is needed.",
        )
    return ModelError(f"{folder} has no *{_SUFFIX} weights.", hint="Is the download complete?")


def _open_indexed(folder: Path, index: Path) -> Shards:
    """All shards of an index, after proving that index and headers say the same."""
    weight_map = _read_index(folder, index)
    headers = []
    for shard in dict.fromkeys(weight_map.values()):
        if not os.path.exists(folder / shard):
            raise IntegrityError(
                f"{index} names {_shown(shard)}, which is missing.", hint="Is the download complete?"
            )
        headers.append(read_header(folder / shard, folder))
    shards = _join(folder, headers)
    found = {name: ref.file.name for name, ref in shards.tensors.items()}
    apart = [name for name in {**weight_map, **found} if weight_map.get(name) != found.get(name)]
    if apart:
        name = apart[0]
        raise IntegrityError(
            f"{index} and the shards disagree about {_examples(apart)}: {_shown(name)} is in "
            f"{_shown(weight_map[name]) if name in weight_map else 'no file'} by the index, in "
            f"{_shown(found[name]) if name in found else 'none of its files'} by their headers.",
            hint="Index and shards are not from the same model: download or save all of them again.",
        )
    return shards


def _join(folder: Path, headers: list[ShardHeader]) -> Shards:
    tensors: dict[str, TensorRef] = {}
    for header in headers:
        for name, ref in header.tensors.items():
            if name in tensors:
                raise IntegrityError(
                    f"The tensor {_shown(name)} is both in {tensors[name].file} and in {ref.file}.",
                    hint="The shards are not from the same model: download or save all of them again.",
                )
            tensors[name] = ref
    return Shards(folder, tuple(headers), tensors)


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    """The weight map of an index, tensor name -> file name; all files are plain names."""
    with _open_regular(check_inside(folder, index)) as (file, size):
        if size > INDEX_LIMIT:
            raise IntegrityError(
                f"{index} has {size} bytes; {INDEX_LIMIT} are allowed.", hint="It is not a weight index."
            )
        text = _Scanner(file.read(size))
    weight_map: dict[str, str] = {}
    shards: dict[str, str] = {}  # each name once in memory
    try:
        for key in text.members(MEMBER_LIMIT, "member"):
            if key != "weight_map":
                text.pass_over()
                continue
            for name in text.members(INDEXED_LIMIT, "tensor"):
                shard = text.string("the name of a file")
                if shard not in shards:
                    _check_shard_name(index, shard)
                weight_map[name] = shards.setdefault(shard, shard)
        text.take(_END, "the end of the index")
        if not weight_map:
            raise ValueError("it has no weight_map, or an empty one")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{index} is not a weight index: {error}.",
            hint="It needs an object weight_map, from the names of tensors to those of files. " + _AGAIN,
        ) from error
    return weight_map


def _check_shard_name(index: Path, shard: str) -> None:
    """Refuses what would be a path on any system (`a/b`, `..`, `C:a`), or no name on this one."""
    if re.search(r"[/\\:\x00-\x1f]", shard) or not shard.endswith(_SUFFIX) or shard == _SUFFIX:
        raise IntegrityError(
            f"{index} names the shard {_shown(shard)}; only plain *{_SUFFIX} names are allowed, others may "
            "be outside the model folder.",
            hint="No genuine checkpoint has this: do not use this model.",
        )


def _examples(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(_shown, names[:3])) + more
