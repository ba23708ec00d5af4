"""The model to export or push: a model folder, or the model of a run that is to be shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, ModelError
from gradpruner.common.files import staging
from gradpruner.common.json_files import read_json, read_object
from gradpruner.common.printing import shown
from gradpruner.common.run_names import StageName, row_file
from gradpruner.evaluation.outputs import read_examples
from gradpruner.models.checking import ADAPTER_FILE
from gradpruner.models.dtypes import stored_dtype
from gradpruner.models.folder import PRUNING_FILE, locate_model, read_pruning
from gradpruner.models.loading import load_adapter, load_model, load_tokenizer
from gradpruner.models.saving import save_model
from gradpruner.plans.reading import Plan, read_plan
from gradpruner.reports.record import Record, VariantRecord
from gradpruner.reports.shipping import lost_words, model_to_ship
from gradpruner.reports.verdict import NOT_LEARNED, judge
from gradpruner.reports.view import read
from gradpruner.runs.folder.directory import MANIFEST, stays_inside, unfinished_stages

_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class FinishedModel:
    """A model folder, and the run it comes from, if any.

    Attributes:
        folder: The model folder; after a run with LoRA it holds only the adapters.
        name: A name for files made from it.
        reason: Why this model of the run was chosen; empty without a run.
        run: The run directory; None without a run.
        row: The model's row of the run.
        record: The content of run.json; empty without a run.
        warning: That the run's task was not learned, or that the model is not good enough; else empty.
    """

    folder: Path
    name: str
    reason: str = ""
    run: Path | None = None
    row: str = ""
    record: Record = field(default_factory=Record)
    warning: str = ""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of `pruning.json`; {} if there is none."""
        return read_pruning(self.folder)

    @property
    def plan(self) -> Plan | None:
        """The plan of the model; None for a dense model."""
        raw = self.facts.get("plan")
        return read_plan(raw, str(self.folder / PRUNING_FILE)) if raw is not None else None

    @property
    def found(self) -> VariantRecord:
        """What the run recorded about the row."""
        return self.record.variants.get(self.row, VariantRecord())

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds adapters instead of a model."""
        return (self.folder / ADAPTER_FILE).is_file()

    @property
    def base(self) -> Path:
        """The model folder that the adapters belong to."""
        if self.run is not None and self.row != "dense":
            return self.run / row_file(self.row, "pruned")
        if self.run is not None:
            return locate_model(str(self.record.model.path))
        named = read_json(self.folder / ADAPTER_FILE, "adapter config").get("base_model_name_or_path")
        return locate_model(str(named))

    def asked(self) -> list[str]:
        """Returns ends of the prompts it was measured with, special tokens included; [] without a run."""
        file = self.found.evaluation.per_example
        if self.run is None or file is None or not stays_inside(file):
            return []
        path = self.run / file
        return [output.prompt_tail for output in read_examples(path)] if path.is_file() else []


def open_model(where: str, row: str | None = None) -> FinishedModel:
    """Finds the model of a run directory, model folder or hub id; from a run, the model of `row` if given.

    Raises:
        ConfigError: If the run has no such row or no run.json yet, or the model was removed.
        ModelError: If `where` is neither a run nor a model.
    """
    folder = Path(where).expanduser()
    if (folder / "study.json").is_file():
        raise ConfigError(
            f"{folder} holds a comparison of several runs.",
            hint="Name one of these runs, for example the folder seed-0 in it.",
        )
    if (folder / MANIFEST).is_file() or (folder / "run.json").is_file():
        return _of_run(folder, row)
    if row is not None:
        raise ConfigError(
            f"--variant names a variant of a run, but {where} is a model.", hint="Leave it out."
        )
    found = locate_model(where)
    if not any(found.glob(_WEIGHTS)) or not any((found / n).is_file() for n in ("config.json", ADAPTER_FILE)):
        raise ModelError(
            f"{found} is neither a run directory nor a model folder.",
            hint="A run has manifest.json and run.json, a model config.json and *.safetensors.",
        )
    return FinishedModel(found, found.resolve().name if folder.is_dir() else where.rpartition("/")[2])


def _of_run(run: Path, row: str | None) -> FinishedModel:
    if not (run / "run.json").is_file():
        raise unfinished(run, "it has no run.json yet")
    raw = read_object(run / "run.json", "run record", dict[str, Any])
    chosen, record = model_to_ship(raw, row), Record.model_validate(raw)
    given = chosen.row == "dense" and chosen.folder == record.model.path
    if not given and not stays_inside(chosen.folder):
        raise ConfigError(f"The model of {shown(chosen.row)} is in {shown(chosen.folder)}, outside the run.")
    folder = locate_model(chosen.folder) if given else run / chosen.folder
    if not any(folder.glob(_WEIGHTS)):
        again = f"Start the run again to make it: gradpruner run --out {run}"
        if record.recipe.get("keep_models") == "none":
            again = f"keep_models: none removed it. {again} --set keep_models=all"
        raise ConfigError(f"The model of '{chosen.row}' is not in {folder}.", hint=again)
    name = f"{run.resolve().name}-{chosen.row}"
    view = read(raw)
    verdict, its_row = judge(view), view.first.row(chosen.row)
    warning = ""
    if verdict.word == NOT_LEARNED:
        warning = f"this run did not learn its task. {verdict.sentence}"
    elif its_row is not None and (lost := lost_words(view, its_row)):
        warning = f"this model is not good enough to ship. {lost}"
    found = FinishedModel(folder, name, chosen.reason, run, chosen.row, record, warning)
    if left := unfinished_of(found):
        said = f"this run was stopped: {', '.join(left)}. Its score may be of an earlier model."
        found = replace(found, warning=said)
    return found


def unfinished(run: Path, why: str) -> ConfigError:
    """Returns the error for a run that is not finished."""
    return ConfigError(
        f"The run in {run} is not finished: {why}.",
        hint=f"Start it again, and it goes on where it stopped: gradpruner run --out {run}",
    )


def unfinished_of(model: FinishedModel) -> list[str]:
    """Returns the stages of the model's row, and those it depends on, that were begun and are not done."""
    left = unfinished_stages(model.run) if model.run is not None else {}
    ours = ("", model.row, "dense")
    return [f"{name} ({state})" for name, state in left.items() if StageName.of(name).row in ours]


@contextmanager
def whole_model(model: FinishedModel, beside: Path) -> Iterator[Path]:
    """Yields the model's folder; adapters are merged into a folder next to `beside` for the block.

    Raises:
        ModelError: If the adapters do not fit.
    """
    if not model.is_adapter:
        yield model.folder
        return
    base = model.base
    with staging(beside, folder=True) as staged:
        target = staged / model.folder.name
        merged = load_adapter(load_model(base, dtype=stored_dtype(base)), model.folder)
        save_model(
            merged,
            load_tokenizer(base),
            target,
            dtype=stored_dtype(base),
            plan=model.plan,
            source=str(model.facts.get("source") or base),
            facts={key: model.facts[key] for key in ("portability", "repair") if key in model.facts},
            like=base,
        )
        yield target
