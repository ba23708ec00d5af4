"""Choices by the loss on rows that nothing was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gradpruner.common.errors import NonFiniteError
from gradpruner.data.encoding import EncodedDataset, encode_all
from gradpruner.methods.calibration import mean_nll
from gradpruner.models.walking import sample_batches
from gradpruner.runs.job import Job

_BATCH = 16


def loss_on(job: Job, model: Any, samples: EncodedDataset, which: str) -> float:
    """Mean loss of a model on samples that it was not tuned on, in nats per learned token.

    Raises:
        NonFiniteError: If it is NaN or infinite; names `which`.
    """
    device = torch.device("cpu") if job.device == "cpu" else next(model.parameters()).device
    model.eval()
    batches = sample_batches(samples, job.collator, device, _BATCH)  # type: ignore[arg-type]
    return mean_nll(model, batches, which)


def validation_samples(job: Job) -> EncodedDataset:
    """The validation rows, encoded as training rows are."""
    assert job.validation is not None
    return encode_all(job.tokenizer, job.validation.examples, job.max_length)


def loss_before(job: Job, source: Path) -> float:
    """The loss on validation rows of a pruned model that is about to be trained further."""
    model = job.load(source)
    loss = loss_on(job, model, validation_samples(job), "before it is trained further")
    job.release(model)
    return loss


def better_of(job: Job, source: Path, trained: Any, before: float) -> tuple[Any, dict[str, Any]]:
    """Of the pruned model in `source` and the same `trained` further, the one with the lower validation loss.

    Returns it with what run.json says of the choice; a trained model that is not kept is released.
    """
    samples = validation_samples(job)
    try:
        after = loss_on(job, trained, samples, "trained further")
    except NonFiniteError:
        after = None
    kept = {"model": "trained", "before": before, "after": after, "rows": len(samples)}
    if after is not None and after < before:
        return trained, kept
    job.release(trained)
    return job.load(source), kept | {"model": "pruned"}
