"""How a model is asked and what is measured: keys of the recipe, and what a run adds to them.

Importing this imports no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gradpruner.training.options import Section

Metric = Literal["exact_match", "choice_likelihood", "rouge_l", "bert_score", "final_number"]
DEFAULT_ENCODER = "roberta-large"
"""The encoder that published BERTScores of English are made with."""


class AskingSection(Section):
    """What a recipe says of every evaluation."""

    batch_size: int = Field(default=32, ge=1)
    """Samples per forward pass."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest generated answer; null: the longest reference answer and two more."""
    metrics: list[Metric] | None = Field(default=None, min_length=1)
    """exact_match, rouge_l, bert_score and final_number look at the greedy answer; choice_likelihood needs
    choices; bert_score and rouge_l together give similarity, their mean. null: the named task's own, for
    your own data exact_match and choice_likelihood."""
    encoder: str = DEFAULT_ENCODER
    """Model of BERTScore: a folder or a hub id."""
    encoder_layer: int | None = Field(default=None, ge=1)
    """Its layer; null: the one that published figures use, for other encoders the last."""


class EvaluateOptions(AskingSection):
    """The options of `evaluate`."""

    max_length: int = Field(default=2048, ge=1)
    """Most tokens of prompt and answer together; the model's positions bound it too. A longer prompt loses
    its beginning, as in training."""
    score_ends: bool = True
    """Whether the end-of-text token counts in the likelihood of an option."""
    seed: int = 0
    """Seed of the bootstrap."""
