"""Reads which tensors a model folder holds and where: in one safetensors file, or in shards with an index.

The folder is not trusted: no file name and no link in it may lead out of it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gradpruner.common.errors import IntegrityError, ModelError
from gradpruner.common.files import read_plain
from gradpruner.common.json_files import parse_json
from gradpruner.common.printing import shown
from gradpruner.models.headers import AGAIN, PERMISSION, ShardHeader, TensorRef, check_inside, read_header

INDEX_LIMIT = 64_000_000  # bytes; several times the size of the largest public index

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
# Mistral's second copy of the same weights, adapters, and hidden files that editors and file servers leave.
_IGNORED = ("consolidated", "adapter_", ".")
_PART = re.compile(r"-\d+-of-0*(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class Shards:
    """All tensors of a model folder.

    Attributes:
        headers: One per file, in the order in which the index first names the files.
        tensors: By name, file after file, in the order of their data.
    """

    folder: Path
    headers: tuple[ShardHeader, ...]
    tensors: dict[str, TensorRef]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(ref.num_bytes for ref in self.tensors.values())


def open_shards(folder: Path) -> Shards:
    """Reads the headers of all weights of a model folder.

    If there are both model.safetensors and an index, model.safetensors is used, because transformers loads
    it. The shards must then hold the same tensors: if they do not, one of the two is stale, and the folder is
    refused. An index that names only model.safetensors belongs to it. Adapters and Mistral's consolidated
    files are ignored.

    Raises:
        ModelError: If there are no safetensors weights, or it is not clear which files are the model.
        IntegrityError: If a file is damaged, missing or outside the folder, or index and headers disagree.
            The `total_size` of an index is not compared, because many on the hub are wrong.
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
    """Returns the names of the single weight file and of the index; one of them may be None."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(
            f"{folder} is not a model folder: {error.strerror}.",
            hint="Give a folder with config.json and *.safetensors.",
        ) from error
    ours = [name for name in names if not name.startswith(_IGNORED)]
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
            hint="Is the download complete? Was saving interrupted? Fetch the index, or remove what does not "
            "belong to the model.",
        )
    return single or weights[0], None


def _no_weights(folder: Path, names: list[str]) -> ModelError:
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5"))]
    if others:
        return ModelError(
            f"{folder} holds its weights as {', '.join(others[:3])}; only safetensors are read, because "
            "pickled files can run code and gguf is a one-way format.",
            hint="If you trust the file, convert it once: AutoModelForCausalLM.from_pretrained(folder)"
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
    """Reads all shards of an index and checks that the index and the headers agree."""
    weight_map = _read_index(folder, index)
    headers = []
    for shard in dict.fromkeys(weight_map.values()):
        if not os.path.exists(folder / shard):
            raise IntegrityError(
                f"{index} names {shown(shard)}, which is missing.", hint="Is the download complete?"
            )
        headers.append(read_header(folder / shard, folder))
    shards = _join(folder, headers)
    found = {name: ref.file.name for name, ref in shards.tensors.items()}
    apart = [name for name in {**weight_map, **found} if weight_map.get(name) != found.get(name)]
    if apart:
        name = apart[0]
        raise IntegrityError(
            f"{index} and the shards disagree about {_examples(apart)}: {shown(name)} is in "
            f"{shown(weight_map[name]) if name in weight_map else 'no file'} by the index, in "
            f"{shown(found[name]) if name in found else 'none of its files'} by their headers.",
            hint="Index and shards are not from the same model: download or save all of them again.",
        )
    return shards


def _join(folder: Path, headers: list[ShardHeader]) -> Shards:
    tensors: dict[str, TensorRef] = {}
    for header in headers:
        for name, ref in header.tensors.items():
            if name in tensors:
                raise IntegrityError(
                    f"The tensor {shown(name)} is both in {tensors[name].file} and in {ref.file}.",
                    hint="The shards are not from the same model: download or save all of them again.",
                )
            tensors[name] = ref
    return Shards(folder, tuple(headers), tensors)


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    """Returns the weight map of an index, tensor name -> file name; every file name is a plain name."""
    real = check_inside(folder, index)
    try:
        found = parse_json(read_plain(real, INDEX_LIMIT))
        weight_map = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map, or an empty one")
        for shard in dict.fromkeys(map(str, weight_map.values())):
            _check_shard_name(index, shard)
    except OSError as error:
        raise ModelError(f"{index} cannot be read: {error.strerror}.", hint=PERMISSION) from error
    except ValueError as error:
        raise IntegrityError(
            f"{index} is not a weight index: {error}.",
            hint="It needs an object weight_map that maps tensor names to file names. " + AGAIN,
        ) from error
    return weight_map


def _check_shard_name(index: Path, shard: str) -> None:
    """Refuses a name that is a path on any system (`a/b`, `..`, `C:a`), or cannot be a file name."""
    if re.search(r"[/\\:\x00-\x1f]", shard) or not shard.endswith(_SUFFIX) or shard == _SUFFIX:
        raise IntegrityError(
            f"{index} names the shard {shown(shard)}; only plain *{_SUFFIX} names are allowed, because other "
            "names may lead out of the model folder.",
            hint="No genuine checkpoint has this: do not use this model.",
        )


def _examples(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
