"""Tasks of EleutherAI's lm-evaluation-harness, run on a loaded model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.common.registry import suggest


def check_harness(tasks: Sequence[str], folder: str | None = None) -> None:
    """Checks that lm-eval is installed and knows the tasks; called before a model is loaded.

    Args:
        tasks: Names of tasks, groups or tags.
        folder: Folder with your own task files.

    Raises:
        ConfigError: If lm-eval is not installed, the folder does not exist, or a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-eval is not installed.", hint="pip install 'gradpruner[eval]', or leave --lm-eval out."
        )
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"The folder of lm-eval task files, {folder}, does not exist.",
            hint="Give an existing folder with --lm-eval-folder.",
        )
    known = _manager(tuple(tasks), folder).all_tasks
    for task in tasks:
        if task not in known:
            raise ConfigError(f"lm-eval knows no task '{task}'.{suggest(task, known)}")


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs tasks of the harness on a model.

    Args:
        model: A transformers causal language model.
        tokenizer: The model's tokenizer.
        tasks: As for `check_harness`.
        folder: As for `check_harness`.
        batch_size: Requests per forward pass.
        limit: Examples per task; None takes all.
        seed: Seed of everything random in the harness (few-shot examples, bootstrap).

    Returns:
        `{"version", "tasks": {task: {"version", "n", "metrics": {name: {"value", "stderr"}}}}}`.

    Raises:
        DataError: If a task's data cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    served = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    seeds = {f"{name}_seed": seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    try:
        found = simple_evaluate(
            model=served,
            tasks=list(tasks),
            task_manager=_manager(tuple(tasks), folder),
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
            **seeds,
        )
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # raised by `datasets`
        raise DataError(
            f"lm-eval could not load the data of {', '.join(tasks)}: {str(error).splitlines()[0]}",
            hint="Most lm-eval tasks download their data from the hub. Offline, give --lm-eval-folder with "
            "task files that name local data.",
        ) from error
    counts = found.get("n-samples", {})
    return {
        "version": metadata.version("lm_eval"),
        "tasks": {
            name: {
                "version": found["versions"].get(name),
                "n": counts.get(name, {}).get("effective"),
                "metrics": _metrics(scores),
            }
            for name, scores in found["results"].items()
        },
    }


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Joins "acc,none" and "acc_stderr,none" into one entry."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in scores.items():
        name, separator, variant = key.partition(",")
        if not separator or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = scores.get(f"{name}_stderr,{variant}")
        label = name if variant == "none" else f"{name} ({variant})"
        found[label] = {"value": float(value), "stderr": stderr if isinstance(stderr, float) else None}
    return found


@cache
def _manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """Returns the harness's index of tasks, cached: reading thousands of task files takes half a minute."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=folder)
