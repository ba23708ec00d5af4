"""prune: a model and rows in, a smaller model out; the run of `gradpruner shrink` as one call."""

from __future__ import annotations

import json
import logging
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

from gradpruner.common.errors import ConfigError, DataError, GradPrunerError, ModelError
from gradpruner.common.files import check_free_space, folder_bytes, write_text
from gradpruner.common.printing import Printed, print_line
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import METHODS
from gradpruner.models.dtypes import refuse_non_finite, stored_dtype
from gradpruner.models.folder import PRUNING_FILE, check_output, staged_folder
from gradpruner.models.layers import refuse_adapters
from gradpruner.models.loading import load_tokenizer
from gradpruner.plans.reading import Plan, load_plan
from gradpruner.plans.repair import Repair
from gradpruner.plans.selection import plan_pruning
from gradpruner.runs.folder.directory import RunDirectory
from gradpruner.runs.folder.plan_names import method_of, own_plan, scores_file
from gradpruner.runs.job.budget import placeholder_scores
from gradpruner.runs.job.evaluation_data import load_split
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import Recipe, load_recipe, shrinking

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)
INPUTS = "inputs"
"""Folder of the run directory for a model and rows that were in memory."""


@dataclass(frozen=True, eq=False, repr=False)
class Pruned(Printed):
    """The result of `prune`; prints what the command `shrink` prints.

    Attributes:
        folder: The pruned model: a plain Hugging Face folder, in the run directory (see `save`).
        plan: Which layers were removed.
        scores: The scores behind the plan; None for methods that plan without scores.
        repair: The refitted linears; None if nothing was repaired.
        record: All results, as in `run.json`.
        recipe: What was done, as a recipe.
        dtype: Dtype the model is loaded in.
        temporary: Whether the folder is deleted together with this object.
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
        """The pruned model, on the device and in the dtype of the dense one; loaded on first use."""
        return self.recipe.model.load(self.folder, dtype=self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the pruned model."""
        return load_tokenizer(self.folder, self.recipe.model.trust_remote_code)

    def save(self, folder: str | Path) -> Path:
        """Copies the pruned model into a folder: the whole model or, after an error, nothing.

        Raises:
            ConfigError: If the folder is not empty and was not made by gradpruner.
            ResourceError: If the disk is full.
        """
        target = Path(folder).expanduser()
        check_output(target, inputs=(self.folder,), marker=PRUNING_FILE)
        check_free_space(target.absolute().parent, folder_bytes(self.folder), "The pruned model")
        if target.is_dir() and any(target.iterdir()):
            log.warning("Replacing the pruned model in %s.", target)
        with staged_folder(target) as staged:
            shutil.copytree(self.folder, staged, dirs_exist_ok=True)
        return target

    def show(self, console: Console) -> None:
        """Prints the results, or without an evaluation the scores, layers and savings, and the folder."""
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
    method: str = "either",
    repair: str = "auto",
    steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Pruned:
    """Removes layers from a model that is tuned on a task and repairs it without training.

    Records the first LoRA gradients on the rows, scores the layers, removes the least important ones, refits
    linears of the kept layers on the rows (`repair`), and verifies the result. This is the run of `gradpruner
    shrink`. The given model is not changed.

    Args:
        model: A model folder, a hub id, or a loaded causal LM without adapters, which is first copied to
            disk.
        task_data: Rows of the task: dictionaries (prompt and completion, messages, instruction and output,
            text and label ...), a `datasets.Dataset`, or a file, folder or hub dataset.
        tokenizer: The tokenizer of a loaded model; leave it out for a folder or hub id.
        eval_data: Rows to evaluate both models on, in the same forms; None evaluates nothing.
        num_prune: Layers to remove.
        layer_fraction: Share of the layers to remove; 0.4 if neither is given.
        method: How layers are chosen (`gradpruner ls methods`).
        repair: What is refitted: "layer_wise" the last linear before the first removed block and in every
            kept layer after it, "least_squares" and "linear" the last linear before each removed block,
            "none" nothing; "auto" is layer_wise, or none if the model cannot be repaired.
        steps: Optimizer steps to record; None takes 40 or, if that is more, 1 % of a fine-tuning.
        seed: Seed of all random choices.
        out: Run directory to keep; the same call resumes there. None takes a temporary folder, which is
            deleted with the result.
        settings: Any other keys of a recipe: {"record.learning_rate": 1e-3, "data.max_length": 512}.

    Returns:
        The pruned model with its plan, scores and repair; `print` shows a summary.

    Raises:
        ConfigError: If an option is unknown or not allowed, or a loaded model carries adapters.
        DataError: If rows cannot be used.
        ModelError: If the model cannot be pruned.
    """
    folder = Path(out).expanduser() if out is not None else Path(mkdtemp(prefix="gradpruner-"))
    inputs = _Inputs(folder / INPUTS)
    try:
        train = inputs.rows(task_data, "train")
        values = inputs.model(model, tokenizer, method, repair) | {
            "data.train": train,
            # Otherwise the recipe would hold evaluation rows out of the training rows.
            "data.eval": train if eval_data is None else inputs.rows(eval_data, "eval"),
            "plan.num_prune": num_prune,
            "plan.layer_fraction": layer_fraction,
            "record.steps": steps,
            "seed": seed,
            "out": str(folder),
        }
        given = {key: value for key, value in values.items() if value is not None}
        recipe = load_recipe(values=given | dict(settings or {}))
        METHODS.find(method_of(method))
        if recipe.keep_models == "none":
            raise ConfigError(
                "settings has keep_models=none, which would leave no model to return.",
                hint="Leave it out; without `out`, the run directory is deleted with the result.",
            )
        if inputs.writes or isinstance(model, nn.Module):
            with RunDirectory(folder):
                for write in inputs.writes:
                    write()
                if isinstance(model, nn.Module):
                    _check_early(recipe, model, tokenizer)
                    inputs.write_model()
        loaded = model if isinstance(model, nn.Module) else None
        job = Job(recipe, "gradpruner.prune", loaded=loaded, measures=eval_data is not None)
        record = run(recipe, until="report" if job.measures else "finetune", job=job)
        dtype = (
            str(stored_dtype(job.folder)).removeprefix("torch.") if loaded is not None else recipe.model.dtype
        )
        result = replace(_result(recipe, record, method, dtype), temporary=out is None)
    except BaseException as error:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, GradPrunerError):
            error.message, error.hint = inputs.named(error.message), error.hint and inputs.named(error.hint)
        raise
    if out is None:
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _check_early(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Refuses bad rows and an impossible number of layers before gigabytes are copied."""
    for split in ("train", "eval"):
        load_split(recipe, split, tokenizer)
    if recipe.plan.parameter_fraction is None:
        scores = placeholder_scores(int(model.config.get_text_config().num_hidden_layers))
        plan_pruning(scores, recipe.plan, num_merge=0)


def _result(recipe: Recipe, record: dict[str, Any], method: str, dtype: str) -> Pruned:
    folder, row = Path(recipe.out), record["rows"][method]
    plan, made = folder / own_plan(row), record["variants"][row]
    part = "model" if made["finetune"] else "recovered" if made["recovery"] else "pruned"
    scored = record["plans"][row]["scores"] if row in record["plans"] else None
    scores, repaired = folder / scores_file(scored or ""), plan.with_name("repair")
    return Pruned(
        folder=plan.with_name(part),
        plan=load_plan(plan),
        scores=LayerScores.load(scores) if scores.is_file() else None,
        repair=Repair.load(repaired) if repaired.is_dir() else None,
        record=record,
        recipe=recipe,
        dtype=dtype,
    )


class _Inputs:
    """Turns a model and rows that may be in memory into keys of a recipe.

    `writes` are the calls that write what is in memory into `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writes: list[Callable[[], object]] = []
        self.write_model: Callable[[], object] = lambda: None
        self.written: dict[str, Path] = {}
        """Argument whose rows are in memory -> where they are written."""

    def model(
        self, model: str | Path | nn.Module, tokenizer: Any, method: str, repair: str
    ) -> dict[str, Any]:
        """Returns the keys of a recipe that shrinks this model."""
        if not isinstance(model, nn.Module):
            if tokenizer is not None:
                raise ConfigError(
                    f"A tokenizer is given for {model}, which has its own.",
                    hint="Leave the tokenizer out, or give a loaded model.",
                )
            return shrinking(str(model), method, repair)
        loaded: Any = model
        _refuse_unusable(loaded, tokenizer)
        name = Path(str(getattr(loaded, "name_or_path", ""))).name or str(loaded.config.model_type)
        folder = self.folder / (re.sub(r"[^\w.-]", "_", name).strip(".") or "model")
        self.write_model = partial(_write_model, loaded, tokenizer, folder)
        return shrinking(str(folder), method, repair) | {"model.device": str(loaded.device)}

    def named(self, text: str) -> str:
        """Returns a message with arguments of `prune` in place of our own files and options of commands."""
        for argument, path in self.written.items():
            text = text.replace(str(path), argument).replace(path.name, argument)
        return text.replace("--skip-bad", 'settings={"data.skip_bad": True}').replace("--set ", "settings: ")

    def rows(self, rows: Any, name: str) -> str:
        """Returns where the rows are, or where they will be written."""
        if isinstance(rows, str | Path):
            return str(rows)
        argument = {"train": "task_data", "eval": "eval_data"}[name]
        if hasattr(rows, "save_to_disk"):  # a `datasets.Dataset`
            target = self.folder / name
            self.writes.append(partial(shutil.rmtree, target, ignore_errors=True))
            self.writes.append(partial(rows.save_to_disk, str(target)))
            return str(target)
        text = _as_lines(rows)
        target = self.written[argument] = self.folder / f"{name}.jsonl"
        self.writes.append(partial(write_text, target, text))
        return str(target)


def _refuse_unusable(model: Any, tokenizer: Any) -> None:
    """Refuses a loaded model that cannot be saved as a plain folder."""
    refuse_adapters(model, "pruning under them would silently misplace them")
    if not hasattr(model, "save_pretrained") or any(p.is_meta for p in model.parameters()):
        raise ModelError(
            f"This {type(model).__name__} has no weights of its own, or transformers cannot save it.",
            hint="Give a causal LM of transformers, a model folder or a hub id.",
        )
    if tokenizer is None:
        raise ConfigError(
            "A loaded model needs its tokenizer, and none is given.",
            hint="Call prune(model, rows, tokenizer=tokenizer), or give the model's folder.",
        )
    refuse_non_finite(model, "The given model")


def _write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # from an earlier call
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
            hint="For a pandas frame, give frame.to_dict('records').",
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
