"""How likely a model finds given answers: the log-likelihood of the options of examples.

The options of one example share its prompt. They are laid behind it in one row, each seeing the prompt and
itself, so that the prompt is computed once:

    row         p0 p1 p2 | a0 a1 | b0 b1 b2
    position     0  1  2 |  3  4 |  3  4  5
    attends to  (causal) | p, a  | p, b

That needs a model whose only memory is attention with a mask of ours. Whether it is one is not looked up but
tried, on the first examples of every evaluation; any other model gets a row for every option.
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

log = logging.getLogger(__name__)

# Largest differences that rounding makes, in nats (absolute, relative), in 32 bits and in 16: between the two
# layouts, and between the same tokens in the same layout beside others.
_ROUNDING = ((2e-3, 1e-3), (0.1, 0.03))
_REPEATED = ((1e-5, 1e-5), (0.02, 0.005))
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class OptionSet:
    """The options of one example, ready for scoring.

    Attributes:
        prompt: Token ids of the prompt; at least one.
        targets: Token ids of every option, its end included if that is to be scored; none is empty.
    """

    prompt: list[int]
    targets: list[list[int]]


class OptionScorer:
    """Scores options with one model.

    Args:
        model: A transformers causal language model, with or without PEFT adapters.
        pad_id: Token that fills rows up; any will do, for it is masked.
        batch_size: Options per forward pass, at least 1.

    Attributes:
        shares_prompts: Whether the options of an example share a row; None until tried.
    """

    def __init__(self, model: Any, pad_id: int, batch_size: int) -> None:
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size
        self.shares_prompts: bool | None = None
        self._accepted = inspect.signature(without_adapters(model).forward).parameters
        self._config = without_adapters(model).config.get_text_config(decoder=True)

    def score(self, sets: Sequence[OptionSet]) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Yields positions in `sets` and their scores, batch by batch, the longest first.

        A score is the log-likelihood, in nats, of an option's tokens given the prompt.

        Raises:
            NonFiniteError: If one is NaN or infinite.
        """
        if self.shares_prompts is None and sets:
            self.shares_prompts = self._sharing_is_right(sets)
        # Longest first: if the memory does not suffice, that shows in the first batch.
        order = sorted(range(len(sets)), key=lambda i: -_row_length(sets[i]))
        most = max((len(one.targets) for one in sets), default=1)
        step = max(1, self.batch_size // most)
        for start in range(0, len(order), step):
            batch = order[start : start + step]
            yield batch, self.log_likelihoods([sets[i] for i in batch])

    def log_likelihoods(self, sets: Sequence[OptionSet]) -> list[list[float]]:
        """The score of every option of a few examples."""
        shared = bool(self.shares_prompts) and all(self._in_window(one) for one in sets)
        if shared:
            return self._forward(sets, shared=True)
        singles = [OptionSet(one.prompt, [target]) for one in sets for target in one.targets]
        # Side by side are the options of one prompt, which begin at the same position.
        found = [
            row[0]
            for start in range(0, len(singles), self.batch_size)
            for row in self._forward(singles[start : start + self.batch_size], shared=False)
        ]
        values = iter(found)
        return [[next(values) for _ in one.targets] for one in sets]

    def _sharing_is_right(self, sets: Sequence[OptionSet]) -> bool:
        """Whether sharing rows gives what one row an option gives, on the shortest example."""
        several = [one for one in sets if len(one.targets) > 1 and self._in_window(one)]
        if not several or not {"position_ids", "attention_mask"} <= set(self._accepted):
            return False
        if self._config._attn_implementation not in ("sdpa", "eager"):
            return False
        # One with options of several tokens, if there is one: what leaks is seen at later tokens.
        one = min(several, key=lambda one: (max(map(len, one.targets)) < 3, _row_length(one)))
        # What stands in the first option must not reach the others: every token of it is replaced.
        other = OptionSet(one.prompt, [[(token + 1) % 8 for token in one.targets[0]], *one.targets[1:]])
        expected = self.log_likelihoods([one])[0]
        try:
            found, undisturbed = (self._forward([sets], shared=True)[0] for sets in (one, other))
        except Exception as error:  # whatever a model raises when it meets a mask it does not know
            log.debug("Options cannot share a row: %s", error)
            return False
        halves = self.model.dtype not in (torch.float32, torch.float64)
        return _close(found, expected, _ROUNDING[halves]) and _close(
            found[1:], undisturbed[1:], _REPEATED[halves]
        )

    def _in_window(self, one: OptionSet) -> bool:
        """Whether every token is near enough to the first to see it in every layer."""
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
                hint="Its weights are damaged, or its number format is too narrow: try float32.",
            )
        return scores

    def _mask(self, visible: Tensor) -> Tensor:
        """The (rows, 1, tokens, tokens) mask as the attention implementation takes it."""
        if self._config._attn_implementation == "sdpa":
            return visible[:, None]
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[:, None]


class Rows:
    """Examples laid out for one forward pass: every option behind the one prompt.

    Padded on the right: a causal model cannot see it, and positions need no correction. The last token of
    an option is not fed, for nothing follows it.

    Args:
        sets: The examples, a row each.
        pad_id: Fills rows up.

    Attributes:
        ids: Shape (rows, tokens).
        positions: Shape (rows, tokens): of each token in its own text.
        segments: Shape (rows, tokens): 0 in the prompt, k in the k-th option, -1 in the padding.
    """

    def __init__(self, sets: Sequence[OptionSet], pad_id: int) -> None:
        width = max(map(_row_length, sets))
        self.ids = torch.full((len(sets), width), pad_id, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.segments = torch.full_like(self.ids, -1)
        self._sets = sets
        # Of every scored token: its row, where its logits stand, itself, the number of its option.
        self._scored: list[tuple[int, int, int, int]] = []
        self._num_options = 0
        for row, one in enumerate(sets):
            behind = len(one.prompt)
            place = self._lay(row, 0, one.prompt, position=0, segment=0)
            for segment, target in enumerate(one.targets, start=1):
                places = [behind - 1, *range(place, place + len(target) - 1)]
                scored = zip(places, target, strict=True)
                self._scored += [(row, at, token, self._num_options) for at, token in scored]
                self._num_options += 1
                place = self._lay(row, place, target[:-1], position=behind, segment=segment)

    def _lay(self, row: int, place: int, tokens: list[int], position: int, segment: int) -> int:
        """Writes tokens into a row; returns the place behind them."""
        end = place + len(tokens)
        self.ids[row, place:end] = torch.tensor(tokens, dtype=torch.long)
        self.positions[row, place:end] = torch.arange(position, position + len(tokens))
        self.segments[row, place:end] = segment
        return end

    def visible(self) -> Tensor:
        """Which token (third axis) a token (second axis) sees; bool, shape (rows, tokens, tokens)."""
        asking, asked = self.segments[:, :, None], self.segments[:, None, :]
        width = self.ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        # Padding sees the prompt, so that its softmax has something to sum; nobody looks at it.
        return causal & ((asked == 0) | (asked == asking))

    def sum_targets(self, logits: Tensor) -> list[list[float]]:
        """Sums the log-probabilities of every option's tokens.

        Args:
            logits: Of the last positions of every row, shape (rows, kept, vocabulary).

        Returns:
            Nats, by example and option.
        """
        rows, places, tokens, options = torch.tensor(self._scored, device=logits.device).T
        kept = logits[rows, places - (self.ids.shape[1] - logits.shape[1])]
        losses = functional.cross_entropy(kept.float(), tokens, reduction="none")
        sums = torch.zeros(self._num_options, dtype=torch.float64)
        sums.index_add_(0, options.cpu(), -losses.double().cpu())
        values = iter(sums.tolist())
        return [[next(values) for _ in one.targets] for one in self._sets]


def _close(found: Sequence[float], expected: Sequence[float], limits: tuple[float, float]) -> bool:
    absolute, relative = limits
    return all(abs(a - b) <= absolute + relative * abs(b) for a, b in zip(found, expected, strict=True))


def _row_length(one: OptionSet) -> int:
    """Tokens fed for an example whose options share a row."""
    return len(one.prompt) + sum(len(target) - 1 for target in one.targets)


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
