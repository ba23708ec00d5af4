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


def mean_nll(model: Any, batches: Iterable[dict[str, Tensor]], which: str, rows: str = "samples") -> float:
    """Returns the mean negative log-likelihood of the learned tokens of all batches, in nats.

    Args and errors are those of `nll_of_rows`.
    """
    found, num_tokens = nll_of_rows(model, batches, which, rows)
    return math.fsum(found) / num_tokens


@torch.no_grad()
@with_fast_products
def nll_of_rows(
    model: Any, batches: Iterable[dict[str, Tensor]], which: str, rows: str = "samples"
) -> tuple[list[float], int]:
    """Returns the negative log-likelihood of each row's learned tokens, and the number of all of them.

    Args:
        model: A causal LM without wrappers.
        batches: On the model's device.
        which: Says in an error which model it was, for example "without layers [3]".
        rows: Says in an error what the batches consist of, for example "validation rows".

    Returns:
        A sum for each row, in nats (0 for a row without learned tokens), and the number of learned tokens.

    Raises:
        DataError: If no batch has a learned token.
        NonFiniteError: If a sum is NaN or infinite.
    """
    windowed = "logits_to_keep" in inspect.signature(model.forward).parameters
    found: list[float] = []
    num_tokens = 0
    for batch in batches:
        window = answer_window(batch["labels"]) if windowed else {"labels": batch["labels"]}
        targets = window.pop("labels")[:, 1:]
        learned = targets != IGNORED
        sums = torch.zeros(len(targets), dtype=torch.float64)
        if learned.any():
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                **window,
            ).logits
            nll = cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="none")
            sums.index_add_(0, learned.nonzero()[:, 0].cpu(), nll.cpu().double())
            num_tokens += len(nll)
        found += sums.tolist()
    if num_tokens == 0:
        raise DataError(
            f"The likelihood of learned tokens is to be measured, and the {rows} have none.",
            hint="At least one label must differ from -100.",
        )
    if not all(map(math.isfinite, found)):
        raise NonFiniteError(
            f"The loss of the model {which} is NaN or infinite.",
            hint="The model's number format is too narrow: try float32.",
        )
    return found, num_tokens
