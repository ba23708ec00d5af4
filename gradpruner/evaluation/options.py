"""How a model is evaluated: keys of the recipe, and the options a run adds to them.

Importing this module does not import torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gradpruner.common.options import Section

Metric = Literal["exact_match", "choice_likelihood", "rouge_l", "bert_score", "final_number"]
DEFAULT_ENCODER = "roberta-large"
"""The encoder behind published BERTScores of English text."""


class AskingSection(Section):
    """The `evaluate` section of a recipe: settings of every evaluation."""

    batch_size: int = Field(default=32, ge=1)
    """Samples per forward pass."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a generated answer; null: those of the longest reference answer plus two."""
    metrics: list[Metric] | None = Field(default=None, min_length=1)
    """exact_match, rouge_l, bert_score and final_number score the greedy answer; choice_likelihood needs
    choices; bert_score and rouge_l together also give similarity, their mean. null: the metrics of the named
    task; for your own data exact_match and choice_likelihood, or where answers are sentences rouge_l (if all
    have a number after "####": final_number)."""
    encoder: str = DEFAULT_ENCODER
    """Encoder for BERTScore: a folder or a hub id."""
    encoder_layer: int | None = Field(default=None, ge=1)
    """Layer of the encoder; null: the layer that published figures use, for other encoders the last."""


class EvaluateOptions(AskingSection):
    """The options of `evaluate`."""

    max_length: int = Field(default=2048, ge=1)
    """Most tokens of prompt and answer together, and never more than the model has positions. A longer prompt
    loses its beginning, as in training."""
    score_ends: bool = True
    """Whether the end-of-text token counts in the likelihood of an option."""
    seed: int = 0
    """Seed of the bootstrap."""
