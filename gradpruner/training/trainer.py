"""A `transformers.Trainer` that computes logits only where something is learned."""

from __future__ import annotations

import inspect
import logging
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from gradpruner.data.encoding import IGNORED
from gradpruner.models.layers import unwrap
from gradpruner.training.batching import LengthGroups, PackedCollator, attention_tokens, packing_fault
from gradpruner.training.callbacks import ClosingCallback, ProgressCallback
from gradpruner.training.resume import TALLY, Tally

log = logging.getLogger(__name__)


class CausalTrainer(Trainer):
    """A Trainer that saves work with the same loss: logits of learned tokens only, and packed rows.

    With the loss on answer tokens alone, most of the (tokens, vocabulary) logits are not needed, and they
    are the largest activation of a small-batch step. The base model runs on all positions, the head on those
    that predict a label in any row of the batch. Packed, the samples of a batch share rows (`batching`).

    Args:
        samples: Encoded samples with `input_ids` and `labels`.
        collator: Makes a padded batch of them.
        batching: "packed", "grouped" or "padded"; see `FinetuneSection`.
        **kwargs: As for `transformers.Trainer`.

    Attributes:
        batching: What is done: "grouped" instead of "packed" where the model does not allow packing.
        packing_fault: Why it does not; "" otherwise.
    """

    def __init__(self, *, samples: Any, collator: Any, batching: str = "padded", **kwargs: Any) -> None:
        super().__init__(train_dataset=samples, data_collator=collator, **kwargs)
        self.remove_callback(PrinterCallback)  # would print every loss on standard output
        model = kwargs["model"]
        forward = inspect.signature(unwrap(model).forward).parameters
        # DataParallel (several GPUs, no launcher) would split the window's labels unevenly.
        self._windowed = "logits_to_keep" in forward and self.args.n_gpu <= 1
        self._places, self._padding = 0, torch.zeros((), dtype=torch.int64)
        self._earlier_seconds, self._started = 0.0, time.perf_counter()
        self.batching, self.packing_fault = batching, ""
        if batching == "packed":
            self.packing_fault = self._packing_fault(model)
            if self.packing_fault:
                self.batching = "grouped"
                log.info("Samples are not packed: %s.", self.packing_fault)
            else:
                self.data_collator = PackedCollator(attention_tokens(model.config), collator.pad_token_id)

    def _packing_fault(self, model: nn.Module) -> str:
        if self.args.n_gpu > 1:
            return "several GPUs without a launcher split a batch by rows"
        return packing_fault(model, self.train_dataset, self.accelerator.autocast)

    @property
    def sharding(self) -> str:
        """What spreads the model over processes: "fsdp" or "deepspeed"; "" if nothing does."""
        return "deepspeed" if self.is_deepspeed_enabled else "fsdp" if self.is_fsdp_enabled else ""

    @property
    def padding_fraction(self) -> float:
        """Share of the token positions computed so far that were padding, in [0, 1]."""
        return int(self._padding) / max(1, self._places)

    @property
    def seconds(self) -> float:
        """Wall time of training so far, with that of interrupted starts up to their checkpoints."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def start_counting(self, earlier: Tally | None) -> None:
        """Begins to measure; `earlier` was counted up to the checkpoint that training resumes from."""
        if earlier is not None:
            self._places, self._padding = earlier.places, torch.tensor(earlier.padding)
            self._earlier_seconds = earlier.seconds
        self._started = time.perf_counter()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; closes callbacks also when it fails, of which it tells none."""
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, ClosingCallback)]
        for callback in callbacks:
            if isinstance(callback, ProgressCallback):
                callback.rate = self._rate
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in callbacks:
                callback.close()

    def _rate(self) -> float:
        """Token positions a second so far, over all processes."""
        return self._places * int(self.args.world_size) / max(self.seconds, 1e-9)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with what was counted so far in trainer_state.json."""
        counted = Tally(self.seconds, self._places, int(self._padding))
        self.state.stateful_callbacks[TALLY] = {"args": {}, "attributes": asdict(counted)}
        super()._save_checkpoint(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's loss, with logits restricted to the positions that have labels."""
        inputs = dict(inputs)
        self._count(inputs)
        if self._windowed:
            inputs = {**inputs, **answer_window(inputs["labels"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _count(self, inputs: dict[str, Any]) -> None:
        """Counts places and padding; on the device, because reading the number would wait for it."""
        self._places += inputs["input_ids"].numel()
        if "padding" in inputs:
            padding = inputs.pop("padding")
            inputs["use_cache"] = False  # with a cache no model looks for packed samples
        elif "attention_mask" in inputs:
            padding = (inputs["attention_mask"] == 0).sum()
        else:
            return
        self._padding = self._padding.to(padding.device) + padding

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's sampler; the one that groups by length made repeatable."""
        samples = self.train_dataset if train_dataset is None else train_dataset
        if self.batching != "grouped":
            return super()._get_train_sampler(samples)
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups([len(sample["input_ids"]) for sample in samples], group, self.args.seed)


def answer_window(labels: Tensor) -> dict[str, Tensor]:
    """Positions whose logits are needed for a batch's labels (rows, tokens), and the labels to go with them.

    Returns:
        `logits_to_keep`, the positions just before those learned in any row and, last, the last learned
        one; and `labels` as the model wants them: it shifts them by one itself.
    """
    learned = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    if len(learned) == 0:
        return {"labels": labels}
    targets = labels[:, learned + 1]
    unused = torch.full_like(targets[:, :1], IGNORED)
    return {
        "logits_to_keep": torch.cat([learned, learned[-1:] + 1]),
        "labels": torch.cat([unused, targets], dim=1),
    }
