"""Calibration data, and running the model forward on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.common.errors import DataError, NonFiniteError
from gradpruner.common.printing import runs_of
from gradpruner.methods.base import MethodContext
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import BATCH_SIZE as WALK_SIZE
from gradpruner.models.walking import sample_batches
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.training.answer_loss import mean_nll

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


def put_aside(samples: Sequence[Any], count: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Returns `count` held-out samples (at least one, at most a quarter of all), and all others.

    Raises:
        DataError: If there are fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(
            f"The number of training samples is {len(samples)}; to compare candidates, at least two are "
            "needed, one of them to hold out.",
            hint="Give more rows.",
        )
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    number = max(1, min(count, len(samples) // 4))
    chosen = set(order[:number])
    aside = [samples[i] for i in range(len(samples)) if i in chosen]
    return aside, [samples[i] for i in range(len(samples)) if i not in chosen]


def held_out_loss(model: Any, plan: PruningPlan, samples: Sequence[Any], context: MethodContext) -> float:
    """Returns the mean negative log-likelihood of the learned tokens, in nats; `plan` names the model.

    Raises:
        DataError: If the samples have no learned token.
        NonFiniteError: If the loss is not a finite number.
    """
    model.eval()
    batches = sample_batches(samples, context.collator, next(model.parameters()).device, WALK_SIZE)
    return mean_nll(model, batches, f"without layers {runs_of(plan.pruned)}", "held-out samples")


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
