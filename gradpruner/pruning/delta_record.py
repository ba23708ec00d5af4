"""The record of a delta: what delta.json says, and the distrust with which it is read."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradpruner._version import __version__
from gradpruner.errors import ConfigError, IntegrityError
from gradpruner.models.folder import PRUNING_FILE
from gradpruner.models.headers import HEADER_LIMIT, check_inside
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.provenance import sha256_json

DELTA_FILE = "delta.json"
TENSORS_FILE = "tensors.safetensors"
HEADERS_FOLDER, FILES_FOLDER = "headers", "files"
FORMAT_VERSION = 1
SMALL_FILE_LIMIT = 100_000_000  # bytes; the largest tokenizers have 40 million
RECORD_LIMIT = 200_000_000  # bytes of delta.json; half a million tensors
TEMPLATES_FOLDER = "additional_chat_templates"
AGAIN = "Download or copy the delta again."
_COUNT_LIMIT = 2**63
# No path on any system (`a/b`, `C:a`), nothing hidden (nor `..`), nothing that UTF-8 cannot say.
_PLAIN = r"(?!\.)[^/\\:\x00-\x1f\ud800-\udfff]+"
WEIGHTS_NAME = re.compile(rf"{_PLAIN}\.safetensors")
FILE_NAME = re.compile(rf"({TEMPLATES_FOLDER}/)?{_PLAIN}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RecordedFile:
    """A file as it must be: hash of its content, and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor of the checkpoint that is one of the source: its name there, and the hash of its bytes."""

    source: str
    sha256: str


@dataclass
class DeltaRecord:
    """The content of delta.json.

    Attributes:
        source: The source as it was given, for messages.
        plan: The plan as JSON values.
        weights: The files of weights, by name.
        headers: Their first bytes in `headers/`, by the same names.
        files: The other files, by name.
        tensors: The file of stored tensors; None when there are none.
        copied: By name in the pruned checkpoint, the tensors taken from the source.
        stored: Names of the others.
    """

    source: str
    plan: dict[str, Any]
    weights: dict[str, RecordedFile] = field(default_factory=dict)
    headers: dict[str, RecordedFile] = field(default_factory=dict)
    files: dict[str, RecordedFile] = field(default_factory=dict)
    tensors: RecordedFile | None = None
    copied: dict[str, CopiedTensor] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, sealed with a hash over themselves."""
        content = {"format_version": FORMAT_VERSION, "gradpruner_version": __version__, **asdict(self)}
        return {**content, "sha256": sha256_json(content)}

    def own_files(self) -> dict[str, RecordedFile]:
        """Everything in the delta but delta.json, by path."""
        return {
            **{header_file(name): facts for name, facts in self.headers.items()},
            **{f"{FILES_FOLDER}/{name}": facts for name, facts in self.files.items()},
            **({TENSORS_FILE: self.tensors} if self.tensors else {}),
        }

    @property
    def checkpoint_bytes(self) -> int:
        """Size of what is rebuilt."""
        return sum(facts.bytes for facts in (*self.weights.values(), *self.files.values()))


_FIELDS = {"format_version", "gradpruner_version", "sha256", *DeltaRecord.__dataclass_fields__}


def header_file(name: str) -> str:
    """Path in the delta of the first bytes of a file of weights."""
    return f"{HEADERS_FOLDER}/{name}.header"


def read_record(folder: Path) -> DeltaRecord:
    """Reads delta.json.

    Raises:
        IntegrityError: If it is missing, changed, or says what no delta can.
    """
    path = folder / DELTA_FILE
    if not path.exists():
        raise IntegrityError(
            f"{folder} has no {DELTA_FILE}.",
            hint="Give a folder that `gradpruner diff` made. Is the download complete?",
        )
    real = check_inside(folder, path)
    try:
        if real.stat().st_size > RECORD_LIMIT:
            raise ValueError(f"it has {real.stat().st_size} bytes; {RECORD_LIMIT} are allowed")
        return _parse_record(json.loads(real.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not the record of a delta: {error}.", hint=AGAIN) from error


def _parse_record(raw: Any) -> DeltaRecord:
    """The record, every value checked; ValueError says which is wrong."""
    if not isinstance(raw, dict):
        raise ValueError("it is not a JSON object")
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}; gradpruner {__version__} reads {FORMAT_VERSION}")
    if raw.keys() != _FIELDS:
        raise ValueError(f"the fields {sorted(raw.keys() ^ _FIELDS)} are missing or unknown")
    if raw["sha256"] != sha256_json({key: value for key, value in raw.items() if key != "sha256"}):
        raise ValueError("its content does not have the SHA-256 that it states")
    for name in ("source", "gradpruner_version"):
        if not isinstance(raw[name], str):
            raise ValueError(f"{name} is not a string")
    record = DeltaRecord(
        raw["source"],
        _parse_plan(raw["plan"]),
        _parse_files(raw["weights"], "weights", WEIGHTS_NAME),
        _parse_files(raw["headers"], "headers", WEIGHTS_NAME),
        _parse_files(raw["files"], "files", FILE_NAME),
        None if raw["tensors"] is None else _parse_file(raw["tensors"], "tensors"),
        _parse_copied(raw["copied"]),
        raw["stored"],
    )
    _check_consistent(record)
    return record


def _parse_plan(raw: Any) -> dict[str, Any]:
    try:
        return PruningPlan.from_dict(raw, "plan").to_dict()
    except (ConfigError, ArithmeticError) as error:
        raise ValueError(f"its plan is wrong: {error}") from error


def _parse_files(raw: Any, field_name: str, names: re.Pattern[str]) -> dict[str, RecordedFile]:
    if not isinstance(raw, dict):
        raise ValueError(f"{field_name} is not an object")
    for name in raw:
        if not names.fullmatch(name):
            raise ValueError(f"{field_name} names the file {name[:80]!r}, which is not a plain name")
    return {name: _parse_file(entry, f"{field_name}: {name}") for name, entry in raw.items()}


def _parse_file(raw: Any, where: str) -> RecordedFile:
    if not isinstance(raw, dict) or raw.keys() != {"sha256", "bytes"} or not _is_hash(raw["sha256"]):
        raise ValueError(f"{where} needs sha256 and bytes, once each and nothing else")
    if type(raw["bytes"]) is not int or not 0 <= raw["bytes"] < _COUNT_LIMIT:
        raise ValueError(f"{where}: bytes is not a count")
    return RecordedFile(raw["sha256"], raw["bytes"])


def _parse_copied(raw: Any) -> dict[str, CopiedTensor]:
    if not isinstance(raw, dict):
        raise ValueError("copied is not an object")
    for name, entry in raw.items():
        if not isinstance(entry, dict) or entry.keys() != {"source", "sha256"}:
            raise ValueError(f"copied: {name[:80]!r} needs source and sha256, once each and nothing else")
        if not isinstance(entry["source"], str) or not _is_hash(entry["sha256"]):
            raise ValueError(f"copied: {name[:80]!r} needs the name of a tensor and a SHA-256")
    return {name: CopiedTensor(**entry) for name, entry in raw.items()}


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _check_consistent(record: DeltaRecord) -> None:
    """Raises ValueError when the parts of a record contradict each other."""
    stored: Any = record.stored
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        raise ValueError("stored is not a list of names")
    if len({*stored, *record.copied}) != len(stored) + len(record.copied):
        raise ValueError("a tensor is there twice in stored and copied")
    if bool(stored) != (record.tensors is not None):
        raise ValueError(f"tensors are stored without {TENSORS_FILE}, or the other way round")
    if not record.weights or record.weights.keys() != record.headers.keys():
        raise ValueError("weights and headers do not name the same files")
    if any(facts.bytes > 8 + HEADER_LIMIT for facts in record.headers.values()):
        raise ValueError(f"a header has more than {HEADER_LIMIT} bytes")
    if record.weights.keys() & record.files.keys():
        raise ValueError("a file is there twice in weights and files")
    if PRUNING_FILE not in record.files:
        raise ValueError(f"files does not name {PRUNING_FILE}")
