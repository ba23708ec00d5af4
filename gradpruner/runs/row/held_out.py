"""Decisions by the loss on held-out rows, on which nothing was trained."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from gradpruner.common.errors import NonFiniteError
from gradpruner.data.encoding import EncodedDataset
from gradpruner.evaluation.metrics import clearly_worse
from gradpruner.models.dtypes import cast_like, stored_dtype
from gradpruner.models.loading import resolve_device, resolve_dtype
from gradpruner.models.walking import sample_batches
from gradpruner.runs.job.job import Job
from gradpruner.training.answer_loss import nll_of_rows

_BATCH = 16


def loss_on(job: Job, model: Any, samples: EncodedDataset, which: str) -> float:
    """Returns the mean loss of a model on held-out samples, in nats per learned token; see `losses_on`."""
    losses, tokens = losses_on(job, model, samples, which)
    return math.fsum(losses) / tokens


def losses_on(job: Job, model: Any, samples: EncodedDataset, which: str) -> tuple[list[float], int]:
    """Returns the loss of a model on each held-out sample, in nats, and the number of all learned tokens.

    Raises:
        NonFiniteError: If a loss is NaN or infinite; `which` says in the message which model it was.
    """
    device = torch.device("cpu") if job.device == "cpu" else next(model.parameters()).device
    model.eval()
    batches = sample_batches(samples, job.collator, device, _BATCH)
    return nll_of_rows(model, batches, which, "held-out rows")


def _compared_in(job: Job) -> torch.dtype:
    """The dtype in which both models are measured: that of loading, or the stored one if that is finer."""
    wanted = resolve_dtype(job.recipe.model.dtype, resolve_device(job.recipe.model.device))
    return torch.promote_types(stored_dtype(job.folder), wanted)


def _loaded(job: Job, folder: Path) -> Any:
    return job.load(folder, dtype=str(_compared_in(job)).removeprefix("torch."))


def losses_before(job: Job, folder: Path) -> tuple[list[float], int]:
    """Returns what `losses_on` gives for the pruned model in `folder`, before its recovery."""
    model = _loaded(job, folder)
    found = losses_on(job, model, job.validation_samples, "before it is trained further")
    job.release(model)
    return found


def better_of(
    job: Job, folder: Path, trained: Any, before: tuple[list[float], int]
) -> tuple[Any, dict[str, Any]]:
    """Returns the trained model, or the pruned one in `folder` if training has made it `clearly_worse`.

    The second value is what run.json says about the choice, with mean losses in nats per learned token. A
    trained model that is not kept is released.
    """
    # As it is saved: an update below the resolution of the stored dtype is none.
    cast_like(trained, job.folder, stored_dtype(job.folder))
    for parameter in trained.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(_compared_in(job))
    losses, tokens = before
    kept: dict[str, Any] = {"model": "trained", "before": math.fsum(losses) / tokens, "rows": len(losses)}
    after: list[float] = []
    with contextlib.suppress(NonFiniteError):
        after, _ = losses_on(job, trained, job.validation_samples, "trained further")
    kept["after"] = math.fsum(after) / tokens if after else None
    if after and after != losses and not clearly_worse(losses, after):
        return trained, kept
    job.release(trained)
    return _loaded(job, folder), kept | {"model": "pruned"}
