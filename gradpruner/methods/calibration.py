"""Calibration data, and running the model forward on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.common.errors import NonFiniteError
from gradpruner.methods.base import MethodContext
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import sample_batches

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


def check_finite(what: str, *values: Tensor) -> None:
    """Raises NonFiniteError if a value is NaN or infinite; `what` names the values, in the plural."""
    if not all(bool(torch.isfinite(one).all()) for one in values):
        raise NonFiniteError(
            f"{what} are NaN or infinite.", hint="The model's number format is too narrow: try float32."
        )


def run(model: Any, batch: dict[str, Tensor]) -> None:
    """Runs a padded batch forward, for the hooks that read its states."""
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
