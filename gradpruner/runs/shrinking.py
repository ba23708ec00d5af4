"""prune: a model and rows in, a smaller model out; the run that `gradpruner shrink` does, as one call."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from torch import nn

from gradpruner.common.errors import ConfigError, DataError, ModelError
from gradpruner.common.files import check_free_space, folder_bytes, write_text
from gradpruner.common.printing import Printed, print_line
from gradpruner.gradients.scores import LayerScores
from gradpruner.models.dtypes import stored_dtype
from gradpruner.models.folder import PRUNING_FILE, check_output, staged_folder
from gradpruner.models.loading import load_tokenizer
from gradpruner.plans.reading import Plan, load_plan
from gradpruner.plans.repair import Repair
from gradpruner.runs.directory import RunDirectory
from gradpruner.runs.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.plan_names import method_of
from gradpruner.runs.recipe import Recipe, load_recipe, shrinking
from gradpruner.runs.work import own_plan, tuned_folder

if TYPE_CHECKING:
    from rich.console import Console

INPUTS = "inputs"
"""Folder of the run directory for a model and rows that were in memory."""


@dataclass(frozen=True, eq=False, repr=False)
class Pruned(Printed):
    """What `prune` made; prints as the command `shrink` does.

    Attributes:
        folder: The pruned model: a plain Hugging Face folder, in the run directory (see `save`).
        plan: Which layers went.
        scores: What the plan rests on; None for methods that decide without scores.
        repair: The linears refitted before the cuts; None where there are none.
        record: Everything that was found, as in `run.json`.
        recipe: What was done, as a recipe.
        dtype: Dtype the model is loaded in.
        temporary: Whether the folder goes with this object.
    """

    folder: Path
    plan: Plan
    scores: LayerScores | None
    repair: Repair | None
    record: dict[str, Any]
    recipe: Recipe
    dtype: str
    temporary: bool = False

    @cached_property
    def model(self) -> nn.Module:
        """The pruned model, loaded when first asked for, where and in the dtype the dense one was."""
        return self.recipe.model.load(self.folder, dtype=self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.folder, self.recipe.model.trust_remote_code)

    def save(self, folder: str | Path) -> Path:
        """Copies the pruned model into a folder of its own: all of it, or nothing.

        Raises:
            ConfigError: If the folder holds something that is not ours.
            ResourceError: If the disk is full.
        """
        target = Path(folder).expanduser()
        check_output(target, inputs=(self.folder,), marker=PRUNING_FILE)
        check_free_space(target.absolute().parent, folder_bytes(self.folder), "The pruned model")
        with staged_folder(target) as staged:
            shutil.copytree(self.folder, staged, dirs_exist_ok=True)
        return target

    def show(self, console: Console) -> None:
        """Prints what was measured, or else scores, layers and savings, and where the model is."""
        from gradpruner.reports.terminal import print_summary

        print_summary(self.record, console, Path(self.recipe.out), advise=not self.temporary)
        where = "in a temporary folder until save(FOLDER)" if self.temporary else str(self.folder)
        print_line(console, f"The pruned model: {where}")


def prune(
    model: str | Path | nn.Module,
    task_data: Any,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    num_prune: int | None = None,
    layer_fraction: float | None = None,
    method: str = "gradpruner",
    repair: str = "auto",
    steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Pruned:
    """Takes layers out of a model that is tuned on a task, and makes up for them without training.

    Records the first LoRA gradients on the rows, scores the layers, removes those that matter least, refits
    the linear before every cut, and proves that the result computes what it should. It is the run of
    `gradpruner shrink`. The model that is given stays as it is.

    Args:
        model: A model folder, a hub id, or a loaded causal LM without adapters. Of a loaded one a copy is
            written to disk.
        task_data: Rows of the task: dictionaries (prompt and completion, messages, instruction and output,
            text and label ...), a `datasets.Dataset`, or a file, folder or hub dataset.
        tokenizer: Of a loaded model; a folder has its own.
        eval_data: Rows to measure both models on, likewise; None measures nothing.
        num_prune: Layers to remove.
        layer_fraction: Share of the layers to remove; 0.4 where neither is given.
        method: How layers are chosen (`gradpruner ls methods`).
        repair: "auto", "layer_wise", "least_squares", "linear" or "none".
        steps: Steps to record; None: 40, or 1 % of a fine-tuning.
        seed: Of everything random.
        out: Run directory to keep, in which the same call goes on where it was; None takes a temporary one,
            which is deleted with the result.
        settings: Any other keys of a recipe: {"record.learning_rate": 1e-3, "data.max_length": 512}.

    Returns:
        The pruned model with its plan, scores and repair; `print` shows a summary.

    Raises:
        ConfigError: If an option is unknown or not allowed.
        DataError: If rows cannot be used.
        ModelError: If the model cannot be pruned.
    """
    folder = Path(out).expanduser() if out is not None else Path(mkdtemp(prefix="gradpruner-"))
    inputs = _Inputs(folder / INPUTS)
    try:
        train = inputs.rows(task_data, "train")
        values = inputs.model(model, tokenizer, method, repair) | {
            "data.train": train,
            # A recipe names rows to measure on, also where nothing is measured.
            "data.eval": train if eval_data is None else inputs.rows(eval_data, "eval"),
            "plan.num_prune": num_prune,
            "plan.layer_fraction": layer_fraction,
            "record.steps": steps,
            "seed": seed,
            "out": str(folder),
        }
        given = {key: value for key, value in values.items() if value is not None}
        recipe = load_recipe(values=given | dict(settings or {}))
        if inputs.writes:
            with RunDirectory(folder):
                for write in inputs.writes:
                    write()
        loaded = model if isinstance(model, nn.Module) else None
        job = Job(recipe, "gradpruner.prune", loaded=loaded, measures=eval_data is not None)
        record = run(recipe, until="report" if job.measures else "finetune", job=job)
        dtype = (
            str(stored_dtype(job.folder)).removeprefix("torch.") if loaded is not None else recipe.model.dtype
        )
        result = replace(_result(recipe, record, method, dtype), temporary=out is None)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _result(recipe: Recipe, record: dict[str, Any], method: str, dtype: str) -> Pruned:
    folder, row = Path(recipe.out), record["rows"][method]
    base = folder / own_plan(row)
    made = (folder / tuned_folder(row), base.with_name("recovered"), base.with_name("pruned"))
    scores, repaired = folder / "scores" / f"{method_of(method)}.json", base.with_name("repair")
    return Pruned(
        folder=next(path for path in made if path.is_dir()),
        plan=load_plan(base),
        scores=LayerScores.load(scores) if scores.is_file() else None,
        repair=Repair.load(repaired) if repaired.is_dir() else None,
        record=record,
        recipe=recipe,
        dtype=dtype,
    )


class _Inputs:
    """What a recipe calls a model and rows that may be in memory, and what `folder` must hold for that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writes: list[Callable[[], object]] = []

    def model(
        self, model: str | Path | nn.Module, tokenizer: Any, method: str, repair: str
    ) -> dict[str, Any]:
        """The keys of a recipe that shrinks this model."""
        if not isinstance(model, nn.Module):
            if tokenizer is not None:
                raise ConfigError(
                    f"A tokenizer is given beside {model}, which has its own.",
                    hint="Leave it out, or give a loaded model.",
                )
            return shrinking(str(model), method, repair)
        loaded: Any = model
        _refuse_unusable(loaded, tokenizer)
        name = Path(str(getattr(loaded, "name_or_path", ""))).name or str(loaded.config.model_type)
        folder = self.folder / (re.sub(r"[^\w.-]", "_", name).strip(".") or "model")
        self.writes.append(partial(_write_model, loaded, tokenizer, folder))
        return shrinking(str(folder), method, repair) | {"model.device": str(loaded.device)}

    def rows(self, rows: Any, name: str) -> str:
        """Where the rows are, or will be."""
        if isinstance(rows, str | Path):
            return str(rows)
        if hasattr(rows, "save_to_disk"):  # of `datasets`
            target = self.folder / name
            self.writes.append(partial(shutil.rmtree, target, ignore_errors=True))
            self.writes.append(partial(rows.save_to_disk, str(target)))
            return str(target)
        text = _as_lines(rows)
        target = self.folder / f"{name}.jsonl"
        self.writes.append(partial(write_text, target, text))
        return str(target)


def _refuse_unusable(model: Any, tokenizer: Any) -> None:
    """Raises for a loaded model that cannot be written as a plain folder."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError(
            "The model carries adapters; pruning under them would silently misplace them.",
            hint="Call merge_and_unload() or unload() first.",
        )
    if not hasattr(model, "save_pretrained") or any(p.is_meta for p in model.parameters()):
        raise ModelError(
            f"This {type(model).__name__} has no weights of its own, or transformers cannot save it.",
            hint="Give a causal LM of transformers, a model folder or a hub id.",
        )
    if tokenizer is None:
        raise ConfigError(
            "A loaded model comes without its tokenizer.",
            hint="prune(model, rows, tokenizer=tokenizer), or give the model's folder instead.",
        )


def _write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    check_free_space(folder.parent, sum(p.nbytes for p in model.parameters()), "A copy of the model")
    with staged_folder(folder) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)


def _as_lines(rows: Any) -> str:
    """Rows in memory as JSON lines."""
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"The rows are a {type(rows).__name__}; a list of dictionaries, a datasets.Dataset or a path is "
            "needed.",
            hint="Of a pandas frame: frame.to_dict('records').",
        )
    lines = []
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise TypeError(f"it is a {type(row).__name__}")
            lines.append(json.dumps(dict(row), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"Row {number} is not a dictionary of plain values: {error}.",
                hint='A row looks like {"prompt": "...", "completion": "..."}.',
            ) from error
    return "\n".join([*lines, ""])
