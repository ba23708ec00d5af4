"""Decisions by the loss on held-out rows, on which nothing was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gradpruner.common.errors import NonFiniteError
from gradpruner.data.encoding import EncodedDataset
from gradpruner.models.dtypes import cast_like, stored_dtype
from gradpruner.models.loading import resolve_device, resolve_dtype
from gradpruner.models.walking import sample_batches
from gradpruner.runs.job.job import Job
from gradpruner.training.answer_loss import mean_nll

_BATCH = 16


def loss_on(job: Job, model: Any, samples: EncodedDataset, which: str) -> float:
    """Returns the mean loss of a model on held-out samples, in nats per learned token.

    Raises:
        NonFiniteError: If the loss is NaN or infinite; `which` says in the message which model it was.
    """
    device = torch.device("cpu") if job.device == "cpu" else next(model.parameters()).device
    model.eval()
    batches = sample_batches(samples, job.collator, device, _BATCH)  # type: ignore[arg-type]
    return mean_nll(model, batches, which, "held-out rows")


def _compared_in(job: Job) -> torch.dtype:
    """The dtype in which both models are measured: that of loading, or the stored one if that is finer."""
    wanted = resolve_dtype(job.recipe.model.dtype, resolve_device(job.recipe.model.device))
    return torch.promote_types(stored_dtype(job.folder), wanted)


def _loaded(job: Job, folder: Path) -> Any:
    return job.load(folder, dtype=str(_compared_in(job)).removeprefix("torch."))


def loss_before(job: Job, folder: Path) -> float:
    """Returns the validation loss of the pruned model in `folder`, before its recovery."""
    model = _loaded(job, folder)
    loss = loss_on(job, model, job.validation_samples, "before it is trained further")
    job.release(model)
    return loss


def better_of(job: Job, folder: Path, trained: Any, before: float) -> tuple[Any, dict[str, Any]]:
    """Returns the trained model if its validation loss is below `before`, else the pruned one in `folder`.

    The second value is what run.json says about the choice. A trained model that is not kept is released.
    """
    samples = job.validation_samples
    # As it is saved: an update below the resolution of the stored dtype is none.
    cast_like(trained, job.folder, stored_dtype(job.folder))
    for parameter in trained.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(_compared_in(job))
    try:
        after = loss_on(job, trained, samples, "trained further")
    except NonFiniteError:
        after = None
    kept = {"model": "trained", "before": before, "after": after, "rows": len(samples)}
    if after is not None and after < before:
        return trained, kept
    job.release(trained)
    return _loaded(job, folder), kept | {"model": "pruned"}
