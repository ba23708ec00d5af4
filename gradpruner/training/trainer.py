"""A `transformers.Trainer` that computes logits only for the tokens that are learned."""

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
    """A Trainer that gets the same loss with less work: logits of learned tokens only, and packed rows.

    If only answer tokens have a loss, most of the (tokens, vocabulary) logits are not needed, and they are
    the largest activation of a small-batch step. The base model runs on all positions, the head only on those
    that predict a label in any row of the batch. With packing, samples of a batch share rows (`batching`).

    Args:
        samples: Encoded samples with `input_ids` and `labels`.
        collator: Makes padded batches of them.
        batching: "packed", "grouped" or "padded"; see `FinetuneSection`.
        **kwargs: See `transformers.Trainer`.

    Attributes:
        batching: The layout used: "grouped" instead of "packed" if the model does not allow packing.
        packing_fault: Why the model does not allow packing; "" if it does or was not asked to.
    """

    def __init__(self, *, samples: Any, collator: Any, batching: str = "padded", **kwargs: Any) -> None:
        super().__init__(train_dataset=samples, data_collator=collator, **kwargs)
        self.remove_callback(PrinterCallback)  # it would print every loss on standard output
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
        """How the model is sharded over processes: "fsdp", "deepspeed", or "" if it is not."""
        return "deepspeed" if self.is_deepspeed_enabled else "fsdp" if self.is_fsdp_enabled else ""

    @property
    def padding_fraction(self) -> float:
        """Share of the token positions computed so far that were padding, in [0, 1]."""
        return int(self._padding) / max(1, self._places)

    @property
    def seconds(self) -> float:
        """Wall time of training so far, interrupted starts included up to their checkpoints."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def start_counting(self, earlier: Tally | None) -> None:
        """Starts the clock; `earlier` is the tally of the checkpoint that training resumes from."""
        if earlier is not None:
            self._places, self._padding = earlier.places, torch.tensor(earlier.padding)
            self._earlier_seconds = earlier.seconds
        self._started = time.perf_counter()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; closes the `ClosingCallback`s even if training fails."""
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
        """Returns token positions per second so far, over all processes."""
        return self._places * int(self.args.world_size) / max(self.seconds, 1e-9)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint, with the tally so far in its trainer_state.json."""
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
        """Returns the Trainer's loss, computing logits only at positions that predict a label."""
        inputs = dict(inputs)
        self._count(inputs)
        if self._windowed:
            inputs = {**inputs, **answer_window(inputs["labels"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _count(self, inputs: dict[str, Any]) -> None:
        """Counts positions and padding; padding on the device, because reading it would wait for that."""
        self._places += inputs["input_ids"].numel()
        if "padding" in inputs:
            padding = inputs.pop("padding")
            inputs["use_cache"] = False  # with a cache, models ignore that samples are packed
        elif "attention_mask" in inputs:
            padding = (inputs["attention_mask"] == 0).sum()
        else:
            return
        self._padding = self._padding.to(padding.device) + padding

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the Trainer's sampler, or a repeatable one that groups samples by length."""
        samples = self.train_dataset if train_dataset is None else train_dataset
        if self.batching != "grouped":
            return super()._get_train_sampler(samples)
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups([len(sample["input_ids"]) for sample in samples], group, self.args.seed)


def answer_window(labels: Tensor) -> dict[str, Tensor]:
    """Returns the positions whose logits a batch's labels (rows, tokens) need, and the labels for those.

    Returns:
        `logits_to_keep`, the positions right before those learned in any row and, last, the last learned
        position; and `labels` as the model expects them, which shifts them by one itself.
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
