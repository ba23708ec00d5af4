"""How the samples of a batch become rows: end to end, or each in its own row with padding behind it.

Packing is only another layout of the same batch. Samples stand end to end, positions start at 0 in each, and
attention stays inside each, so losses and gradients are those of padded rows. transformers builds such masks
from the positions, if the model's code passes them on; `packing_fault` finds out whether it does.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from gradpruner.data.encoding import IGNORED, Collator

# A token's linears cost about 24 hidden^2 operations in a layer, attention over a row of W tokens 4 W hidden,
# so they are even at W = 6 hidden; but attention with a mask runs at a third of the speed, or less.
_LINEAR_TO_ATTENTION = 2
# The trial: one sample fills a row, three share one and leave two places of padding.
_TRIAL_LENGTHS = (19, 5, 9, 3)
_TRIAL_ROWS = ((0,), (1, 2, 3))
# Largest difference of a log-likelihood, in nats, that is rounding.
_ROUNDING = {"float32": 1e-4, "16 bits": 0.125}


def spread(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Samples spread over rows, for every row their indices: the next longest goes to the emptiest row.

    Args:
        lengths: Tokens of every sample; equal ones keep their order.
        num_rows: Between 1 and the number of samples.

    Source: Graham, Bounds on multiprocessing timing anomalies, 1969 (longest processing time first).
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    fill = [(0, row) for row in range(num_rows)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, row = fill[0]
        rows[row].append(index)
        heapq.heapreplace(fill, (tokens + lengths[index], row))
    return rows


def choose_rows(lengths: Sequence[int], attention_tokens: float = math.inf) -> list[list[int]]:
    """The cheapest rows for a batch: few long ones waste little on padding, short ones little on attention.

    Args:
        lengths: Tokens of every sample.
        attention_tokens: Length of a row at which attention costs as much as everything else, for kernels
            that work on masked places too; infinite for those that do not, which get one row.
    """
    best, least = [list(range(len(lengths)))], math.inf
    for num_rows in range(1, len(lengths) + 1):
        rows = spread(lengths, num_rows)
        width = max(sum(lengths[i] for i in row) for row in rows)
        cost = num_rows * width * (1 + width / attention_tokens)
        if cost < least:
            best, least = rows, cost
        if width == max(lengths) or math.isinf(attention_tokens):  # more rows would only be emptier
            break
    return best


def lay_out(
    samples: Sequence[dict[str, list[int]]], rows: Sequence[Sequence[int]], pad_token_id: int = 0
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Samples end to end in rows of equal length.

    Args:
        samples: `input_ids` and `labels`.
        rows: As `spread` gives them.
        pad_token_id: Fills the beginning of shorter rows, as a sample of its own, so that answers at the end
            of rows stand in the same columns and the window of logits is small.

    Returns:
        `input_ids`, `position_ids`, `labels`, each (rows, width), int64, and `padding`, the number of padded
        places; then row and first column of every sample. The first label of a sample is `IGNORED`: it
        would be predicted from the sample before.
    """
    width = max(sum(len(samples[i]["input_ids"]) for i in row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    positions = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    places, padding = [(0, 0)] * len(samples), 0
    for number, row in enumerate(rows):
        start = width - sum(len(samples[i]["input_ids"]) for i in row)
        positions[number, :start] = torch.arange(start)
        padding += start
        for index in row:
            tokens = torch.tensor(samples[index]["input_ids"])
            end = start + len(tokens)
            ids[number, start:end] = tokens
            positions[number, start:end] = torch.arange(len(tokens))
            labels[number, start + 1 : end] = torch.tensor(samples[index]["labels"])[1:]
            places[index] = (number, start)
            start = end
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "padding": torch.tensor(padding)}
    return batch, places


class PackedCollator:
    """Lays the samples of a batch end to end; for models without a `packing_fault`."""

    def __init__(self, attention_tokens: float, pad_token_id: int = 0) -> None:
        self.attention_tokens, self.pad_token_id = attention_tokens, pad_token_id

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """The batch of `lay_out`."""
        rows = choose_rows([len(feature["input_ids"]) for feature in features], self.attention_tokens)
        return lay_out(features, rows, self.pad_token_id)[0]


class LengthGroups(Sampler[int]):
    """Samples in groups of similar length, in an order that depends on seed and epoch alone.

    The Trainer's own sampler draws from the global generator, so that a resumed run would see other
    samples than the interrupted one would have.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths, self.group, self.seed, self.epoch = list(lengths), group, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


def attention_tokens(config: Any) -> float:
    """Length of a row at which attention costs as much as the linears, by the config of a loaded model."""
    # Flash attention does no work between samples, and takes one row only.
    if "flash" in str(getattr(config, "_attn_implementation", "")):
        return math.inf
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return float(_LINEAR_TO_ATTENTION * text.hidden_size)


def packing_fault(
    model: nn.Module,
    samples: Sequence[dict[str, list[int]]],
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> str:
    """Why samples must not be packed for this model, found by trying; "" if they may be.

    Packing changes the results of models with states that run along a row (Mamba, linear attention,
    convolutions), biases by distance in the row (ALiBi), positions counted from the mask, or code that does
    not pass positions on to the mask. Four pieces of the data, 36 tokens, go through the model padded,
    packed, and packed with one piece exchanged. The likelihoods of tokens must be the same packed as
    padded, up to rounding, and the exchange must not change those of the other pieces, up to what another
    layout changes anyway (nothing, or the last bits).

    The pieces are shorter than the attention windows of most models. For longer ones this relies on
    transformers, where one piece of code combines windows and samples at any length.

    Args:
        model: The causal LM, on the device it will train on.
        samples: Encoded samples; their first tokens are used.
        computing: Makes the context the model computes in (autocast).
    """
    stream = cycle(chain.from_iterable(sample["input_ids"] for sample in samples))
    trial = [list(islice(stream, length)) for length in _TRIAL_LENGTHS]
    exchanged = [trial[0], list(islice(stream, len(trial[1]))), *trial[2:]]
    rows = [range(len(trial))] if math.isinf(attention_tokens(model.config)) else _TRIAL_ROWS
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), computing():
            alone = _likelihoods(model, trial[:1])
            padded = _likelihoods(model, trial)
            packed = _likelihoods(model, trial, rows)
            other = _likelihoods(model, exchanged, rows)
            exact = not torch.is_autocast_enabled(padded[0].device.type)
    except Exception as error:  # models raise what they like on rows they were not written for
        return f"this model does not take packed rows: {type(error).__name__}"
    finally:
        model.train(training)
    exact = exact and all(p.dtype == torch.float32 for p in model.parameters())
    noise = _largest_difference(padded[:1], alone)
    rounding = max(4 * noise, _ROUNDING["float32" if exact else "16 bits"])
    same = _largest_difference(packed, padded) <= rounding
    independent = _largest_difference(packed[2:], other[2:]) <= max(4 * noise, 1e-5)
    return "" if same and independent else "packing changes what this model computes"


def _likelihoods(
    model: nn.Module, pieces: list[list[int]], rows: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """Log-likelihood of every token but the first of every piece, packed into rows; None: padded."""
    samples = [{"input_ids": piece, "labels": piece} for piece in pieces]
    if rows is None:
        batch, places, layout = Collator()(samples), [(i, 0) for i in range(len(pieces))], "attention_mask"
    else:
        (batch, places), layout = lay_out(samples, rows), "position_ids"
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", layout)}
    logits = model(**inputs, use_cache=False).logits
    likelihoods = []
    for piece, (row, start) in zip(pieces, places, strict=True):
        predicted = logits[row, start : start + len(piece) - 1].float().log_softmax(-1)
        targets = torch.tensor(piece[1:], device=logits.device)
        likelihoods.append(predicted.gather(1, targets[:, None])[:, 0])
    return likelihoods


def _largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return float((torch.cat(one) - torch.cat(other)).abs().max())
