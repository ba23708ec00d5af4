"""How the samples of a batch become rows: packed end to end, or one sample per row with padding behind it.

Packing changes the layout of a batch and nothing else. Samples stand end to end, positions start at 0 in each
sample, and attention stays inside each sample, so losses and gradients are the same as with padded rows.
transformers builds the masks for this from the positions, if the model's code passes them on; `packing_fault`
tests whether it does.
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
from gradpruner.models.restoring import modes_kept

# Per token and layer, the linears cost about 24 hidden^2 operations and attention over a row of W tokens 4 W
# hidden. They are equal at W = 6 hidden; but attention with a mask runs at a third of the speed, or less.
_LINEAR_TO_ATTENTION = 2
# The trial: one sample fills a row; three samples share a row and leave two positions of padding.
_TRIAL_LENGTHS = (19, 5, 9, 3)
_TRIAL_ROWS = ((0,), (1, 2, 3))
# Largest difference of a log-likelihood, in nats, that counts as rounding.
_ROUNDING = {"float32": 1e-4, "16 bits": 0.125}


def fill_rows(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Distributes samples among rows: the next longest sample goes to the row with the fewest tokens.

    Args:
        lengths: Tokens of every sample; samples of equal length keep their order.
        num_rows: Between 1 and the number of samples.

    Returns:
        The indices of the samples in every row.

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
    """Returns the cheapest rows for a batch, as `fill_rows` does.

    A few long rows waste little on padding, many short rows waste little on attention.

    Args:
        lengths: Tokens of every sample.
        attention_tokens: Length of a row at which attention costs as much as everything else, for kernels
            that also compute masked positions; infinite for kernels that skip them, which get a single row.
    """
    best, least = [list(range(len(lengths)))], math.inf
    for num_rows in range(1, len(lengths) + 1):
        rows = fill_rows(lengths, num_rows)
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
    """Lays samples end to end in rows of equal length.

    Args:
        samples: `input_ids` and `labels`.
        rows: The indices of the samples in every row.
        pad_token_id: Fills the beginning of shorter rows, as a sample of its own. Answers at the end of rows
            then stand in the same columns, and the window of logits is small.

    Returns:
        The batch: `input_ids`, `position_ids` and `labels`, each (rows, width), int64, and `padding`, the
        number of padded positions; then row and first column of every sample. The first label of a sample is
        `IGNORED`, because that token would be predicted from the sample before.
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
    """Makes packed batches, for models without a `packing_fault`."""

    def __init__(self, attention_tokens: float, pad_token_id: int = 0) -> None:
        self.attention_tokens, self.pad_token_id = attention_tokens, pad_token_id

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Returns the batch of `lay_out`."""
        rows = choose_rows([len(feature["input_ids"]) for feature in features], self.attention_tokens)
        return lay_out(features, rows, self.pad_token_id)[0]


class LengthGroups(Sampler[int]):
    """Samples in groups of similar length, in an order that depends only on seed and epoch.

    The Trainer's own sampler uses the global generator, so a resumed run would see other samples than an
    uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths, self.group, self.seed, self.epoch = list(lengths), group, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; the Trainer calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


def attention_tokens(config: Any) -> float:
    """Returns the row length at which attention costs as much as the linears, by a loaded model's config."""
    # Flash attention computes nothing between samples, and takes only one row.
    if "flash" in str(getattr(config, "_attn_implementation", "")):
        return math.inf
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return float(_LINEAR_TO_ATTENTION * text.hidden_size)


def packing_fault(
    model: nn.Module,
    samples: Sequence[dict[str, list[int]]],
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> str:
    """Tries whether samples can be packed for this model; returns why not, or "" if they can.

    Packing changes the results of models with states that run along a row (Mamba, linear attention,
    convolutions), biases by distance in the row (ALiBi), positions counted from the mask, or code that does
    not pass positions on to the mask. The trial runs four pieces of the data, 36 tokens in all, through the
    model: padded, packed, and packed with one piece replaced. The likelihoods of tokens must be the same
    packed and padded, up to rounding. And replacing a piece must change the likelihoods of the other pieces
    no more than another layout does (not at all, or in the last bits).

    The pieces are shorter than the attention windows of most models. For longer samples, this relies on
    transformers, where the same code combines windows and samples at any length.

    Args:
        model: The causal LM, on the device it will train on.
        samples: Encoded samples; their first tokens are used.
        computing: Returns the context that the model computes in (autocast).
    """
    stream = cycle(chain.from_iterable(sample["input_ids"] for sample in samples))
    trial = [list(islice(stream, length)) for length in _TRIAL_LENGTHS]
    exchanged = [trial[0], list(islice(stream, len(trial[1]))), *trial[2:]]
    rows = [range(len(trial))] if math.isinf(attention_tokens(model.config)) else _TRIAL_ROWS
    try:
        with modes_kept(model), torch.no_grad(), computing():
            model.eval()
            alone = _likelihoods(model, trial[:1])
            padded = _likelihoods(model, trial)
            packed = _likelihoods(model, trial, rows)
            other = _likelihoods(model, exchanged, rows)
            exact = not torch.is_autocast_enabled(padded[0].device.type)
    except Exception as error:  # a model may raise anything on rows it was not written for
        return f"this model does not take packed rows: {type(error).__name__}"
    exact = exact and all(p.dtype == torch.float32 for p in model.parameters())
    noise = _largest_difference(padded[:1], alone)
    rounding = max(4 * noise, _ROUNDING["float32" if exact else "16 bits"])
    same = _largest_difference(packed, padded) <= rounding
    independent = _largest_difference(packed[2:], other[2:]) <= max(4 * noise, 1e-5)
    return "" if same and independent else "packing changes what this model computes"


def _likelihoods(
    model: nn.Module, pieces: list[list[int]], rows: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """Returns the log-likelihoods of all tokens but the first of every piece; padded if `rows` is None."""
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
