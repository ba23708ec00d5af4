"""Checks that a tokenizer belongs to a model: token ids, end token, special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradpruner.common.errors import ModelError

_FEWEST = 0.9  # smallest share of an embedding's rows; embeddings are padded, but by far less than a tenth


def check_vocabulary(tokenizer: Any, vocabulary: int, ids: Iterable[Sequence[int]]) -> None:
    """Raises ModelError if a token of samples or prompts, or the padding token, is not in the embedding.

    `vocabulary` is the number of rows of the embedding.
    """
    hint = (
        "Use the tokenizer the model was trained with, or add rows to the embedding with "
        "model.resize_token_embeddings(len(tokenizer)) and save the model again."
    )
    beyond = sorted({token for row in ids for token in row if token >= vocabulary})
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise ModelError(
            f"The data contain {len(beyond)} token ids that are not in the model's embedding of {vocabulary} "
            f"rows (first: {beyond[0]}, {token!r}).",
            hint=hint,
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocabulary:
        raise ModelError(
            f"The padding token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, which is not in the "
            f"model's embedding of {vocabulary} rows.",
            hint=hint + " Or make the end token the padding token in tokenizer_config.json.",
        )


def vocabulary_notes(tokenizer: Any, config: Any, ends: Iterable[int]) -> tuple[str, ...]:
    """Returns warnings of what does not match between a tokenizer and a decoder's config.

    `ends` are the last tokens of the answers as they are learned.
    """
    notes = []
    size, vocabulary = len(tokenizer), int(config.vocab_size)
    if size > vocabulary:
        notes.append(f"the tokenizer has {size} tokens, the model's embedding only {vocabulary} rows")
    elif size < _FEWEST * vocabulary:
        notes.append(
            f"the tokenizer has {size} tokens and the model's embedding {vocabulary} rows: is it this "
            "model's tokenizer?"
        )
    end = tokenizer.eos_token_id
    if end is None:
        notes.append(
            "the tokenizer has no end token: a model cannot learn where an answer ends; set eos_token in "
            "tokenizer_config.json"
        )
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    learned = {token for token in ends if end is not None}
    if own != [None] and not learned <= set(own):
        named = ", ".join(
            repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(learned - set(own))
        )
        notes.append(
            f"answers are learned to end with {named}, but eos_token_id in the model's config is "
            f"{config.eos_token_id}: other software would not stop there; is it this model's tokenizer?"
        )
    start, own_start = tokenizer.bos_token_id, config.bos_token_id
    if None not in (start, own_start) and start != own_start:
        notes.append(
            f"the start token has id {start} in the tokenizer and {own_start} in the model's config: is it "
            "this model's tokenizer?"
        )
    return tuple(notes)
