"""Greedy answers of a loaded transformers model, in batches of similar length and with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from gradpruner.evaluation.likelihood import OptionScorer, inference, without_adapters
from gradpruner.evaluation.questions import Questions


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: The text before the end-of-text token.
        finished: Whether the model ended the answer within the token budget.
        num_tokens: Tokens generated, including the end token and without padding.
    """

    text: str
    finished: bool
    num_tokens: int


class LocalModel:
    """A loaded model that answers questions and scores options; `endpoint.Endpoint` has the same methods.

    Args:
        model: A transformers causal language model, with or without PEFT adapters.
        tokenizer: The model's tokenizer.
        batch_size: Prompts, or options, per forward pass; at least 1.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.base = model, without_adapters(model)
        self.batch_size = batch_size
        pad = tokenizer.pad_token_id
        # Any token works as padding, because padding is masked.
        self.pad_id = int((tokenizer.eos_token_id or 0) if pad is None else pad)
        self.scorer = OptionScorer(model, self.pad_id, batch_size)

    def longest(self, max_length: int) -> int:
        """Returns `max_length`, or the model's number of positions if that is smaller."""
        config = self.base.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        return min(max_length, positions) if isinstance(positions, int) else max_length

    def answers(
        self, questions: Questions, indices: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yields example indices with their greedy answers, batch by batch, longest prompts first."""
        ends = questions.ends(self.base.generation_config.eos_token_id)
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=self.pad_id,
        )
        # Longest first, so that running out of memory happens in the first batch.
        order = sorted(indices, key=lambda i: -len(questions.prompts[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            written = self._generate([questions.cut_prompt(i, max_new_tokens) for i in batch], config)
            found = []
            for ids in written:
                length = next((k for k, token in enumerate(ids) if token in ends), len(ids))
                text = questions.text(ids[:length])
                found.append(Answer(text, length < len(ids), min(length + 1, len(ids))))
            yield batch, found

    def option_scores(
        self, questions: Questions, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Yields example indices with the log-likelihoods of their options, batch by batch."""
        sets = [questions.option_set(i) for i in indices]
        for batch, scores in self.scorer.score(sets):
            yield [indices[k] for k in batch], scores

    def _generate(self, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        """Returns the new tokens of each prompt; answers that ended early are padded."""
        # Padding goes on the left, so that new tokens directly follow the last prompt token.
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        with inference(self.model), only_generation_config((self.model, self.base), config):
            output = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        new_tokens: list[list[int]] = output[:, width:].tolist()
        return new_tokens


@contextmanager
def only_generation_config(models: Sequence[Any], config: GenerationConfig) -> Iterator[None]:
    """Makes `config` the only generation config inside the block.

    `generate` takes values that `config` leaves open from the model's own generation_config, where many
    published models have a repetition penalty, a length, or a temperature (of which `generate` warns).
    """
    owners = [model for model in models if "generation_config" in vars(model)]
    saved = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, original in zip(owners, saved, strict=True):
            owner.generation_config = original
