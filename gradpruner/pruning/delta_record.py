"""The record of a delta: the content of delta.json, which is checked when it is read."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gradpruner.common.errors import ConfigError, IntegrityError
from gradpruner.common.files import read_plain
from gradpruner.common.json_files import check_version, parse_json, typed
from gradpruner.common.provenance import sha256_json
from gradpruner.common.version import __version__
from gradpruner.models.folder import PRUNING_FILE
from gradpruner.models.headers import HEADER_LIMIT, check_inside
from gradpruner.plans.layer_plan import PruningPlan

DELTA_FILE = "delta.json"
TENSORS_FILE = "tensors.safetensors"
HEADERS_FOLDER, FILES_FOLDER = "headers", "files"
FORMAT_VERSION = 1
SMALL_FILE_LIMIT = 100_000_000  # bytes; the largest tokenizers have 40 million
RECORD_LIMIT = 200_000_000  # bytes of delta.json; half a million tensors
TEMPLATES_FOLDER = "additional_chat_templates"
AGAIN = "Download or copy the delta again."
# No path on any system (`a/b`, `C:a`), no hidden file (nor `..`), nothing that UTF-8 cannot encode.
_PLAIN = r"(?!\.)[^/\\:\x00-\x1f\ud800-\udfff]+"
WEIGHTS_NAME = re.compile(rf"{_PLAIN}\.safetensors")
FILE_NAME = re.compile(rf"({TEMPLATES_FOLDER}/)?{_PLAIN}")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class RecordedFile:
    """The hash and the size in bytes that a file must have."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor that is copied from the source: its name there, and the hash of its bytes."""

    source: str
    sha256: Sha256


@dataclass(kw_only=True)
class DeltaRecord:
    """The content of delta.json.

    Attributes:
        source: The source folder or hub id that was given; used in messages.
        plan: The plan as JSON values.
        weights: The weight files, by name.
        headers: The first bytes of the weight files, stored in `headers/`, by the same names.
        files: All other files, by name.
        tensors: The file of stored tensors; None if none are stored.
        copied: The tensors copied from the source, by name in the pruned checkpoint.
        stored: Names of the tensors stored in the delta.
    """

    format_version: int = FORMAT_VERSION
    gradpruner_version: str = __version__
    source: str
    plan: dict[str, Any]
    weights: dict[str, RecordedFile] = field(default_factory=dict)
    headers: dict[str, RecordedFile] = field(default_factory=dict)
    files: dict[str, RecordedFile] = field(default_factory=dict)
    tensors: RecordedFile | None = None
    copied: dict[str, CopiedTensor] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON values, with a hash over them."""
        content = asdict(self)
        return {**content, "sha256": sha256_json(content)}

    def own_files(self) -> dict[str, RecordedFile]:
        """Returns all files of the delta except delta.json, by path."""
        return {
            **{header_file(name): facts for name, facts in self.headers.items()},
            **{f"{FILES_FOLDER}/{name}": facts for name, facts in self.files.items()},
            **({TENSORS_FILE: self.tensors} if self.tensors else {}),
        }

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors of the checkpoint."""
        return sum(file.bytes - self.headers[name].bytes for name, file in self.weights.items())

    @property
    def checkpoint_bytes(self) -> int:
        """Size of all files of the checkpoint."""
        return sum(facts.bytes for facts in (*self.weights.values(), *self.files.values()))


def header_file(name: str) -> str:
    """Returns the path, inside the delta, of the header of a weight file."""
    return f"{HEADERS_FOLDER}/{name}.header"


def read_record(folder: Path) -> DeltaRecord:
    """Reads delta.json.

    Raises:
        IntegrityError: If it is missing, was changed, or is not a valid record.
    """
    path = folder / DELTA_FILE
    if not path.exists():
        raise IntegrityError(
            f"{folder} has no {DELTA_FILE}.",
            hint="Give a folder that `gradpruner diff` made. Is the download complete?",
        )
    fault = f"{path} is not the record of a delta"
    real = check_inside(folder, path)
    try:
        raw = parse_json(read_plain(real, RECORD_LIMIT))
        check_version(raw, FORMAT_VERSION)
        record = typed({key: raw[key] for key in raw if key != "sha256"}, DeltaRecord, fault)
        if record.to_dict() != raw:
            raise ValueError("fields are missing or unknown, or its SHA-256 is not the one it states")
        _check_consistent(record)
    except IntegrityError as error:
        raise IntegrityError(error.message, hint=AGAIN) from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{fault}: {error}.", hint=AGAIN) from error
    return record


def _check_consistent(record: DeltaRecord) -> None:
    """Raises ValueError for unsafe file names, and for parts that contradict each other."""
    for where, names in (("weights", WEIGHTS_NAME), ("headers", WEIGHTS_NAME), ("files", FILE_NAME)):
        odd = [name for name in getattr(record, where) if not names.fullmatch(name)]
        if odd:
            raise ValueError(f"{where} names the file {odd[0][:80]!r}, which is not a plain name")
    try:
        PruningPlan.from_dict(record.plan, "plan")
    except (ConfigError, ArithmeticError) as error:
        raise ValueError(f"its plan is wrong: {error}") from error
    if len({*record.stored, *record.copied}) != len(record.stored) + len(record.copied):
        raise ValueError("stored and copied name a tensor twice")
    if bool(record.stored) != (record.tensors is not None):
        raise ValueError(f"tensors are stored without {TENSORS_FILE}, or the other way round")
    if not record.weights or record.weights.keys() != record.headers.keys():
        raise ValueError("weights and headers do not name the same files")
    if any(facts.bytes > 8 + HEADER_LIMIT for facts in record.headers.values()):
        raise ValueError(f"a header has more than {HEADER_LIMIT} bytes")
    if record.weights.keys() & record.files.keys():
        raise ValueError("weights and files name the same file")
    if PRUNING_FILE not in record.files:
        raise ValueError(f"files does not name {PRUNING_FILE}")
