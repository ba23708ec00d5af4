"""How likely a model finds given answers: the log-likelihood of the options of examples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradpruner.errors import NonFiniteError


@dataclass(frozen=True)
class OptionRow:
    """One option of one example, ready for scoring.

    Attributes:
        example: Position of the example.
        prompt_length: Tokens of the prompt; what follows them is scored.
        ids: Prompt, option and end.
    """

    example: int
    prompt_length: int
    ids: list[int]


def score_rows(
    model: Any,
    rows: Sequence[OptionRow],
    pad_id: int,
    batch_size: int,
    advance: Callable[[int], object],
) -> list[float]:
    """The log-likelihood of every row's option and its end-of-text token, given the prompt.

    Args:
        model: A transformers causal language model, with or without PEFT adapters.
        rows: What to score.
        pad_id: Token that fills rows up; any will do, for it is masked.
        batch_size: Rows per forward pass.
        advance: Called with the number of rows after every forward pass.

    Returns:
        Nats, in the order of the rows.
    """
    # Longest prompt first, and the options of one prompt side by side: then the answers of a
    # batch start at nearly the same position and few logits before them are computed.
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].prompt_length, rows[i].example))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        values = log_likelihoods(model, [rows[i] for i in batch], pad_id)
        for i, value in zip(batch, values, strict=True):
            scores[i] = value
        advance(len(batch))
    return scores


def log_likelihoods(model: Any, rows: Sequence[OptionRow], pad_id: int) -> list[float]:
    """The log-probability, in nats, of the tokens after each row's prompt, from one forward pass.

    Raises:
        NonFiniteError: If one is NaN or infinite.
    """
    # Padded on the right: a causal model cannot see it, and positions need no correction.
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    device = model.device
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    accepted = inspect.signature(without_adapters(model).forward).parameters
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = width - min(row.prompt_length for row in rows) + 1
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    with inference(model):
        logits: Tensor = model(**inputs).logits
        scores = sum_targets(logits, rows, width)
    if not torch.isfinite(scores).all():
        raise NonFiniteError(
            "The model's log-likelihoods are NaN or infinite.",
            hint="Its weights are damaged, or its number format is too narrow: try float32.",
        )
    values: list[float] = scores.tolist()
    return values


def sum_targets(logits: Tensor, rows: Sequence[OptionRow], width: int) -> Tensor:
    """Sums the log-probabilities of each row's tokens after its prompt.

    Args:
        logits: Logits of the last positions, shape (rows, kept, vocabulary).
        rows: What was fed, padded on the right to `width` tokens.
        width: Number of tokens fed per row; the first `width - kept` have no logits.

    Returns:
        Log-likelihoods in nats, shape (rows,), float64.
    """
    skipped = width - logits.shape[1]
    index, position, target = [], [], []
    for i, row in enumerate(rows):
        for place in range(row.prompt_length, len(row.ids)):
            index.append(i)
            # The logits for a token stand one place before it.
            position.append(place - 1 - skipped)
            target.append(row.ids[place])
    device = logits.device
    picked = logits[torch.tensor(index, device=device), torch.tensor(position, device=device)]
    losses = functional.cross_entropy(picked.float(), torch.tensor(target, device=device), reduction="none")
    sums = torch.zeros(len(rows), dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(index), -losses.double().cpu())


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Runs the block in eval mode and without gradients; every module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def without_adapters(model: Any) -> Any:
    """The transformers model itself, whether or not PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
