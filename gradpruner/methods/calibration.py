"""Calibration data, and running the model forward on it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradpruner.common.errors import DataError, NonFiniteError
from gradpruner.data.encoding import IGNORED
from gradpruner.methods.base import MethodContext
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import sample_batches
from gradpruner.training.trainer import answer_window

MAX_SAMPLES = 256
BATCH_SIZE = 16


def calibration_batches(
    context: MethodContext, model: nn.Module, max_samples: int = MAX_SAMPLES
) -> Iterator[dict[str, Tensor]]:
    """Yields padded batches of the first training samples, on the model's device.

    Raises:
        DataError: If there are no samples.
    """
    available = context.checked_samples()
    samples = [available[i] for i in range(min(max_samples, len(available)))]
    device = next(model.parameters()).device
    yield from sample_batches(samples, context.collator, device, BATCH_SIZE)


@contextmanager
def watched(view: LayeredModel, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the block, calls `see` with the index, input state and output state of every layer that runs.

    States have shape (samples, tokens, size). They are read at the layers themselves, because the
    `hidden_states[-1]` of transformers comes after the final norm.
    """

    def hook(index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        see(index, _one_state(before), _one_state(after))

    with ExitStack() as hooks:
        for index, layer in enumerate(view.layers):
            hooks.enter_context(layer.register_forward_hook(partial(hook, index), with_kwargs=True))
        yield


def _one_state(x: Tensor) -> Tensor:
    """Joins the four streams of Gemma 3n, which are in an axis before the samples, into one state."""
    return x if x.ndim == 3 else x.movedim(0, -2).flatten(-2)


def run(model: Any, batch: dict[str, Tensor]) -> None:
    """Runs a padded batch forward, for the hooks that read its states."""
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


@torch.no_grad()
def mean_nll(model: Any, batches: Iterable[dict[str, Tensor]], which: str) -> float:
    """Returns the mean negative log-likelihood of the learned tokens of all batches, in nats.

    Args:
        model: A causal LM without wrappers.
        batches: On the model's device.
        which: Says in an error which model it was, for example "without layers [3]".

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
            "This method measures the likelihood of learned tokens, and the calibration samples have none.",
            hint="At least one label must differ from -100.",
        )
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The loss of the model {which} is NaN or infinite.",
            hint="The model's number format is too narrow: try float32.",
        )
    return total / num_tokens
