"""Model folders: finding them, copying files from them, and writing ours completely or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, ModelError
from gradpruner.common.files import (
    LOCK_FILE,
    held,
    is_write_failure,
    make_durable,
    path_fault,
    remove,
    staging,
    staging_name,
    sweep,
    sync_folder,
    write_failure,
    write_text,
)
from gradpruner.common.json_files import read_object, write_json
from gradpruner.common.printing import shown
from gradpruner.common.version import __version__
from gradpruner.models.card import CARD_FILE, base_of, model_card, untuned
from gradpruner.models.headers import check_inside
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import Plan

PRUNING_FILE = "pruning.json"
# Everything of a model that is fetched from the hub.
_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]
# Files beside the weights that readers of the pruned model need too. They do not include code (*.py), other
# formats of the same weights, or the source's own card. The licence must stay with the weights.
_CARRIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".vocab")
_CARRIED_NAMES = ("license", "licence", "notice", "use_policy", "copying")
_CARRIED_FOLDERS = ("additional_chat_templates",)
_LEFT_BEHIND = ("config.json", "params.json", "readme.md", PRUNING_FILE)


def locate_model(model: str | Path, *, weights: bool = True) -> Path:
    """Returns the local folder of a model given as a folder or a hub id.

    From the hub, all files are fetched, or only config.json if `weights` is False.

    Raises:
        ModelError: If it is neither a folder nor a model on the hub; the message lists what was tried.
    """
    folder = Path(model).expanduser()
    fault = path_fault(folder)
    if fault:
        raise ModelError(f"The model {shown(str(model))} cannot be used: {fault}.", hint="Give another path.")
    if folder.is_dir():
        return folder
    name = str(model)
    if folder.suffix.lower() == ".gguf":
        raise ModelError(
            f"{folder} is a GGUF file: give the model it was made from.",
            hint="That is a folder with config.json and *.safetensors. `gradpruner export` makes a GGUF file "
            "from it.",
        )
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"There is no model folder at {folder}.",
            hint="Give a folder with config.json and *.safetensors, or a hub id such as org/name.",
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = _HUB_FILES if weights else ["config.json"]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["consolidated*"]))
    except Exception as error:  # offline, unknown, gated: errors of many types
        raise ModelError(
            f"'{name}' is neither a folder ({folder.resolve()}) nor a model that the hub could give: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="Check the name, the network, HF_HUB_OFFLINE and, for gated models, your token.",
        ) from error


def check_output(folder: Path, *, inputs: tuple[Path, ...] = (), marker: str) -> None:
    """Refuses an output folder that holds files gradpruner did not write.

    Args:
        folder: The output folder.
        inputs: Folders that must not be written to, nor the folders inside them.
        marker: Name of the file that only folders made by gradpruner have.

    Raises:
        ConfigError: If the folder is not empty and not ours, or is an input or lies inside one.
    """
    fault = path_fault(folder)
    if fault:
        raise ConfigError(
            f"The output {shown(str(folder))} cannot be used: {fault}.",
            hint="Choose another output folder; each part of its path may have at most 255 bytes.",
        )
    resolved = folder.resolve()
    for source in inputs:
        if resolved == source.resolve() or source.resolve() in resolved.parents:
            raise ConfigError(
                f"The output {folder} is the input {source} or lies inside it.",
                hint="Choose another output folder.",
            )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"The output {folder} is a file.", hint="Choose another output folder.")
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    # A run directory may hold only its lock, if the run was killed before it wrote its first file.
    if not all(name.startswith(LOCK_FILE) for name in entries) and marker not in entries:
        raise ConfigError(
            f"The output folder {folder} is not empty and was not made by gradpruner.",
            hint="gradpruner replaces only its own folders: choose another output folder, or empty this one.",
        )


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder that replaces `folder`, durably, when the block ends without an error.

    A reader, or a run after a crash at any moment, finds the old folder, no folder, or a complete new one.
    After an error it is the old one. Staged folders that a killed process left behind are removed; those that
    a running process still holds are left alone.

    Raises:
        ConfigError: If another process wrote to the target meanwhile.
        ResourceError: If the disk is full or not writable.
    """
    folder = folder.resolve()  # so that a link stays a link, and "." has a name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, folder.name)
        with staging(folder, folder=True) as staged:
            yield staged
            for path in (staged, *staged.rglob("*")):
                (sync_folder if path.is_dir() else make_durable)(path)
            _take_place(staged, folder)
    except BaseException as error:
        if is_write_failure(error):
            raise write_failure(folder, error) from error
        raise


def _take_place(staged: Path, folder: Path) -> None:
    """Renames the staged folder; an old folder of ours is moved aside first, and back if that fails."""
    aside = folder.with_name(staging_name(folder.name, ".old"))
    placed = False  # if it is, the old folder is removed, even if another process has moved ours away again
    with ExitStack() as holding:
        try:
            if (folder / PRUNING_FILE).exists():
                with suppress(FileNotFoundError):  # another process was faster
                    holding.enter_context(held(folder))
                    os.replace(folder, aside)
            os.replace(staged, folder)  # also over an empty folder
            placed = True
            sync_folder(folder.parent)
        except BaseException as error:
            with suppress(OSError):
                os.replace(aside, folder)
            if getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ConfigError(
                    f"{folder} was written by another process meanwhile.",
                    hint="Choose another output folder.",
                ) from error
            raise
        finally:
            if placed or folder.exists():
                remove(aside)


def describe_model(
    folder: Path,
    *,
    plan: Plan | None,
    source: str,
    kind: str,
    facts: dict[str, Any] | None = None,
    origin: Path | None = None,
) -> None:
    """Writes the model card and then `pruning.json`, which marks the folder as ours and complete.

    `origin` is the local folder of `source`; licence and languages come from its card. A folder is recorded
    by its whole path, so that `verify` and `push` find it wherever they are started.
    """
    facts = facts or {}
    source = str(Path(source).resolve()) if Path(source).is_dir() else source
    base = untuned({"source": source, **facts}) or source
    write_text(folder / CARD_FILE, model_card(base_of(base, origin), plan, facts))
    write_json(
        folder / PRUNING_FILE,
        {
            "gradpruner_version": __version__,
            "source": source,
            "kind": kind,
            "plan": plan.to_dict() if plan else None,
            **facts,
        },
    )


def read_pruning(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's `pruning.json`; {} if it has none.

    Raises:
        IntegrityError: If the file is a link out of the folder, or is not a JSON object.
    """
    path = folder / PRUNING_FILE
    return read_object(check_inside(folder, path), "pruning record", dict[str, Any]) if path.is_file() else {}


def recorded_plan(folder: Path, facts: dict[str, Any], hint: str) -> PruningPlan:
    """Returns the layer plan in `facts`, the result of `read_pruning`.

    Raises:
        ConfigError: If there is no plan; `hint` says what to do.
        PlanError: If the plan cannot be read.
    """
    if not facts:
        raise ConfigError(f"{folder} has no {PRUNING_FILE}, so what was pruned is not known.", hint=hint)
    if not facts.get("plan"):
        raise ConfigError(f"{folder} was not pruned: its {PRUNING_FILE} holds no plan.", hint=hint)
    if isinstance(facts["plan"], dict) and facts["plan"].get("kind") == "width":
        raise ConfigError(
            f"{folder} was pruned by a plan of widths, which was checked when it was written; only plans of "
            "whole layers can be checked or compared again.",
            hint="gradpruner evaluate measures it.",
        )
    return PruningPlan.from_dict(facts["plan"], str(folder / PRUNING_FILE))


def carried_files(source: Path) -> list[Path]:
    """Returns the files of a model's tokenizer, generation config, chat template and licence.

    Raises:
        IntegrityError: If one of them is a link out of the folder.
    """
    found = []
    for path in sorted(source.iterdir()):
        name = path.name.lower()
        if path.is_dir() and path.name in _CARRIED_FOLDERS:
            found += sorted(path.glob("[!.]*.jinja"))
        elif (
            not (path.is_file() or path.is_symlink())  # a broken link is refused below
            or name.startswith((".", "consolidated"))
            or name in _LEFT_BEHIND
            or name.endswith((".index.json", ".py"))
        ):
            continue
        elif name.startswith(_CARRIED_NAMES) or name.endswith(_CARRIED_SUFFIXES):
            found.append(path)
    for path in found:
        check_inside(source, path)
    return found


def carry(source: Path, files: Sequence[Path], staged: Path) -> None:
    """Copies files of a model folder into the staged folder, byte for byte."""
    for path in files:
        target = staged / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(check_inside(source, path), target)
