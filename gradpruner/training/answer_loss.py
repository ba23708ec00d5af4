"""The mean loss of the learned tokens, measured without training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradpruner.common.errors import DataError, NonFiniteError
from gradpruner.data.encoding import IGNORED
from gradpruner.models.kernels import with_fast_products
from gradpruner.training.trainer import answer_window


@torch.no_grad()
@with_fast_products
def mean_nll(model: Any, batches: Iterable[dict[str, Tensor]], which: str, rows: str = "samples") -> float:
    """Returns the mean negative log-likelihood of the learned tokens of all batches, in nats.

    Args:
        model: A causal LM without wrappers.
        batches: On the model's device.
        which: Says in an error which model it was, for example "without layers [3]".
        rows: Says in an error what the batches consist of, for example "validation rows".

    Raises:
        DataError: If no batch has a learned token.
        NonFiniteError: If the result is NaN or infinite.
    """
    windowed = "logits_to_keep" in inspect.signature(model.forward).parameters
    total, num_tokens = 0.0, 0
    for batch in batches:
        window = answer_window(batch["labels"]) if windowed else {"labels": batch["labels"]}
        targets = window.pop("labels")[:, 1:]
        learned = targets != IGNORED
        if not learned.any():
            continue
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **window
        ).logits
        nll = cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="none")
        total += float(nll.cpu().double().sum())
        num_tokens += len(nll)
    if num_tokens == 0:
        raise DataError(
            f"The likelihood of learned tokens is to be measured, and the {rows} have none.",
            hint="At least one label must differ from -100.",
        )
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The loss of the model {which} is NaN or infinite.",
            hint="The model's number format is too narrow: try float32.",
        )
    return total / num_tokens
