"""Log-likelihoods of the answer options of examples.

All options of an example share its prompt. To compute the prompt only once, one row holds the prompt followed
by all options, and each option attends to the prompt and to itself:

    row         p0 p1 p2 | a0 a1 | b0 b1 b2
    position     0  1  2 |  3  4 |  3  4  5
    attends to  (causal) | p, a  | p, b

This works only if tokens influence each other through attention alone and the model accepts a custom mask.
`OptionScorer` does not look this up by model type: it tries it on two examples at the start of every
evaluation. A model that fails gets one row per option instead.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradpruner.common.errors import NonFiniteError
from gradpruner.models.restoring import modes_kept

log = logging.getLogger(__name__)

# Largest differences due to rounding, as (absolute in nats, relative), first for 32-bit weights, then for
# 16-bit ones. _LAYOUT_TOLERANCE: between one row per option and a shared row. _LEAK_TOLERANCE: between two
# shared rows that differ in another option's tokens alone.
_LAYOUT_TOLERANCE = ((2e-3, 1e-3), (0.1, 0.03))
_LEAK_TOLERANCE = ((1e-5, 1e-5), (0.02, 0.005))
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class OptionSet:
    """The tokenised options of one example.

    Attributes:
        prompt: Token ids of the prompt, at least one.
        targets: Token ids of each option, at least one each; with the end token if that is scored too.
    """

    prompt: list[int]
    targets: list[list[int]]


class OptionScorer:
    """Computes the log-likelihoods of options with one model.

    Args:
        model: A transformers causal language model, with or without PEFT adapters.
        pad_id: Padding token. Any token works, because padding is masked.
        batch_size: Options per forward pass, at least 1.

    Attributes:
        shares_prompts: Whether the options of an example share a row; None before the first examples.
    """

    def __init__(self, model: Any, pad_id: int, batch_size: int) -> None:
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size
        self.shares_prompts: bool | None = None
        self._accepted = inspect.signature(without_adapters(model).forward).parameters
        self._config = without_adapters(model).config.get_text_config(decoder=True)

    def score(self, sets: Sequence[OptionSet]) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Yields indices into `sets` with their scores, batch by batch, longest rows first.

        A score is the log-likelihood, in nats, of an option's tokens given the prompt.

        Raises:
            NonFiniteError: If a score is NaN or infinite.
        """
        if self.shares_prompts is None and sets:
            self.shares_prompts = self._can_share(sets)
        # Longest first, so that running out of memory happens in the first batch.
        order = sorted(range(len(sets)), key=lambda i: -_row_length(sets[i]))
        most_options = max((len(one.targets) for one in sets), default=1)
        step = max(1, self.batch_size // most_options)
        for start in range(0, len(order), step):
            batch = order[start : start + step]
            yield batch, self.log_likelihoods([sets[i] for i in batch])

    def log_likelihoods(self, sets: Sequence[OptionSet]) -> list[list[float]]:
        """Returns the score of every option of a few examples, by example and option."""
        shared = bool(self.shares_prompts) and all(self._in_window(one) for one in sets)
        if shared:
            return self._forward(sets, shared=True)
        singles = [OptionSet(one.prompt, [target]) for one in sets for target in one.targets]
        # A batch mostly holds options of one prompt, which begin at the same position.
        found = [
            row[0]
            for start in range(0, len(singles), self.batch_size)
            for row in self._forward(singles[start : start + self.batch_size], shared=False)
        ]
        values = iter(found)
        return [[next(values) for _ in one.targets] for one in sets]

    def _can_share(self, sets: Sequence[OptionSet]) -> bool:
        """Whether a shared row gives the same scores as one row per option, tried on two examples.

        One is short. The other is the longest: layers with a window of their own, as GPT-Neo's, may count it
        along the row, whatever the mask and the positions say.
        """
        several = [one for one in sets if len(one.targets) > 1 and self._in_window(one)]
        if not several or not {"position_ids", "attention_mask"} <= set(self._accepted):
            return False
        if self._config._attn_implementation not in ("sdpa", "eager"):
            return False
        # Prefer an option of three tokens or more: a leak between options shows at later tokens only.
        short = min(several, key=lambda one: (max(map(len, one.targets)) < 3, _row_length(one)))
        longest = max(several, key=_row_length)
        return all(self._same_in_a_row(one) for one in ([short] if short is longest else [short, longest]))

    def _same_in_a_row(self, one: OptionSet) -> bool:
        # Replace every token of the first option: this must not change the scores of the other options.
        changed = OptionSet(one.prompt, [[(token + 1) % 8 for token in one.targets[0]], *one.targets[1:]])
        separate = self.log_likelihoods([one])[0]
        try:
            shared, beside_changed = (self._forward([case], shared=True)[0] for case in (one, changed))
        except Exception as error:  # models raise all kinds of errors for a mask they do not support
            log.debug("Options cannot share a row: %s", error)
            return False
        halves = self.model.dtype not in (torch.float32, torch.float64)
        return _close(shared, separate, _LAYOUT_TOLERANCE[halves]) and _close(
            shared[1:], beside_changed[1:], _LEAK_TOLERANCE[halves]
        )

    def _in_window(self, one: OptionSet) -> bool:
        """Whether every layer's attention window covers the prompt with the longest option."""
        windows = [getattr(self._config, name, None) for name in _WINDOW_FIELDS]
        length = len(one.prompt) + max(map(len, one.targets))
        return all(length <= window for window in windows if isinstance(window, int))

    def _forward(self, sets: Sequence[OptionSet], *, shared: bool) -> list[list[float]]:
        rows = Rows(sets, self.pad_id)
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": rows.ids.to(device)}
        if shared:
            inputs["position_ids"] = rows.positions.to(device)
            inputs["attention_mask"] = self._mask(rows.visible().to(device))
        else:
            inputs["attention_mask"] = (rows.segments >= 0).long().to(device)
        width = rows.ids.shape[1]
        kept = width - min(len(one.prompt) for one in sets) + 1
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = kept
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        with inference(self.model):
            logits: Tensor = self.model(**inputs).logits
            scores = rows.sum_targets(logits)
        if not all(torch.isfinite(torch.tensor(row)).all() for row in scores):
            raise NonFiniteError(
                "The model's log-likelihoods are NaN or infinite.",
                hint="The weights may be damaged, or the dtype too narrow: try float32.",
            )
        return scores

    def _mask(self, visible: Tensor) -> Tensor:
        """The mask in the form the attention implementation takes, shape (rows, 1, tokens, tokens)."""
        if self._config._attn_implementation == "sdpa":
            return visible[:, None]
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[:, None]


class Rows:
    """Input of one forward pass: one row per example, its prompt followed by all its options.

    Rows are padded on the right, where a causal model does not see the padding and positions need no
    correction. The last token of an option is not an input, because no token after it is predicted.

    Args:
        sets: The examples.
        pad_id: Padding token.

    Attributes:
        ids: Token ids, shape (rows, tokens).
        positions: Position of each token in its own text (prompt plus option), shape (rows, tokens).
        segments: 0 in the prompt, k in the k-th option, -1 in the padding; shape (rows, tokens).
    """

    def __init__(self, sets: Sequence[OptionSet], pad_id: int) -> None:
        width = max(map(_row_length, sets))
        self.ids = torch.full((len(sets), width), pad_id, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.segments = torch.full_like(self.ids, -1)
        self._sets = sets
        # One entry per scored token: row, column of its logits, token id, number of its option in the batch.
        self._scored: list[tuple[int, int, int, int]] = []
        self._num_options = 0
        for row, one in enumerate(sets):
            prompt_length = len(one.prompt)
            column = self._write(row, 0, one.prompt, position=0, segment=0)
            for segment, target in enumerate(one.targets, start=1):
                logit_columns = [prompt_length - 1, *range(column, column + len(target) - 1)]
                scored = zip(logit_columns, target, strict=True)
                self._scored += [(row, at, token, self._num_options) for at, token in scored]
                self._num_options += 1
                column = self._write(row, column, target[:-1], position=prompt_length, segment=segment)

    def _write(self, row: int, column: int, tokens: list[int], position: int, segment: int) -> int:
        """Writes tokens into a row; returns the column after the last one."""
        end = column + len(tokens)
        self.ids[row, column:end] = torch.tensor(tokens, dtype=torch.long)
        self.positions[row, column:end] = torch.arange(position, position + len(tokens))
        self.segments[row, column:end] = segment
        return end

    def visible(self) -> Tensor:
        """Whether a token (second axis) attends to another (third axis); bool, (rows, tokens, tokens)."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        width = self.ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        # Padding attends to the prompt too, so that its softmax is not empty; its output is never used.
        return causal & ((key == 0) | (key == query))

    def sum_targets(self, logits: Tensor) -> list[list[float]]:
        """Sums the log-probabilities of each option's tokens.

        Args:
            logits: Logits of the last `kept` columns, shape (rows, kept, vocabulary).

        Returns:
            Log-likelihoods in nats, by example and option.
        """
        rows, columns, tokens, options = torch.tensor(self._scored, device=logits.device).T
        kept = logits[rows, columns - (self.ids.shape[1] - logits.shape[1])]
        losses = functional.cross_entropy(kept.float(), tokens, reduction="none")
        sums = torch.zeros(self._num_options, dtype=torch.float64)
        sums.index_add_(0, options.cpu(), -losses.double().cpu())
        values = iter(sums.tolist())
        return [[next(values) for _ in one.targets] for one in self._sets]


def _close(found: Sequence[float], expected: Sequence[float], limits: tuple[float, float]) -> bool:
    absolute, relative = limits
    return all(abs(a - b) <= absolute + relative * abs(b) for a, b in zip(found, expected, strict=True))


def _row_length(one: OptionSet) -> int:
    """Number of input tokens of an example whose options share a row."""
    return len(one.prompt) + sum(len(target) - 1 for target in one.targets)


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Runs the block in eval mode and without gradients, then restores the mode of every module."""
    with modes_kept(model), torch.inference_mode():
        model.eval()
        yield


def without_adapters(model: Any) -> Any:
    """Returns the transformers model itself, whether or not PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
