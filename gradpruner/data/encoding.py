"""Encodes examples as token ids, with a loss on the answer only.

A plain example becomes prompt ids (with the start token, if the tokenizer adds one) + answer ids + end
token. Prompt and answer are tokenised separately, so that evaluation sees the same prompt, token for
token, as training did. A conversation is rendered by the tokenizer's chat template and cut into the same
two kinds of pieces. Labels of prompt tokens are `IGNORED`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.chat import adds_space, conversation_ids, text_ids
from gradpruner.data.examples import Example, ExampleSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that carries no loss (torch's cross entropy default)."""

_EXAMPLES_NAMED = 3  # in an error about many examples


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        input_ids: Token ids.
        labels: As long as `input_ids`: the id of a learned token, `IGNORED` for the others.
        cut_prompt_tokens: Tokens cut from the left of the prompt to fit, >= 0.
        cut_answer_tokens: Tokens cut from the right of the sample to fit, >= 0.
    """

    input_ids: list[int]
    labels: list[int]
    cut_prompt_tokens: int = 0
    cut_answer_tokens: int = 0

    @property
    def num_supervised(self) -> int:
        """Number of tokens with a loss; the first token of a sequence is never predicted and has none."""
        return sum(label != IGNORED for label in self.labels[1:])


class EncodedDataset(Sequence[dict[str, list[int]]]):
    """Encoded examples as the dictionaries a Trainer takes; a slice is an `EncodedDataset` too."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.encoded = tuple(encoded)
        self.lengths = [len(one.input_ids) for one in self.encoded]
        self.supervised_tokens = sum(one.num_supervised for one in self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> dict[str, list[int]]: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedDataset: ...

    def __getitem__(self, index: int | slice) -> dict[str, list[int]] | EncodedDataset:
        if isinstance(index, slice):
            return EncodedDataset(self.encoded[index])
        one = self.encoded[index]
        return {"input_ids": one.input_ids, "labels": one.labels}

    def notes(self) -> tuple[str, ...]:
        """Returns notes for the user about what was cut; () if nothing was."""
        prompts = sum(one.cut_prompt_tokens > 0 for one in self.encoded)
        answers = sum(one.cut_answer_tokens > 0 for one in self.encoded)
        notes = []
        if prompts:
            notes.append(f"{prompts} of {len(self)} prompts were cut from the left to fit")
        if answers:
            notes.append(f"{answers} of {len(self)} answers were cut from the right to fit")
        return tuple(notes)


def check_encoded(samples: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError if samples are not encoded, by the first one; none at all are no fault here."""
    found = list(samples[0]) if len(samples) else ["input_ids", "labels"]
    if not {"input_ids", "labels"}.issubset(found):
        raise DataError(
            f"The samples hold {', '.join(map(str, found)) or 'nothing'}; input_ids and labels are needed.",
            hint="Encode them first: gradpruner.encode_all(tokenizer, examples, max_length).",
        )


def any_learned(samples: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether any token of encoded samples has a loss."""
    return any(label != IGNORED for sample in samples for label in sample["labels"][1:])


class Collator:
    """Pads a batch on the right.

    Args:
        tokenizer: Gives the padding token, or the end token if it has none. Without a tokenizer, token 0 is
            the padding. Any token will do: padding is neither attended to nor learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        pad = None
        if tokenizer is not None:
            pad = tokenizer.pad_token_id
            pad = tokenizer.eos_token_id if pad is None else pad
        self.pad_token_id = 0 if pad is None else int(pad)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, each (batch, longest), int64."""
        longest = max(len(feature["input_ids"]) for feature in features)

        def padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

        return {
            "input_ids": padded((one["input_ids"] for one in features), self.pad_token_id),
            "attention_mask": padded(([1] * len(one["input_ids"]) for one in features), 0),
            "labels": padded((one["labels"] for one in features), IGNORED),
        }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Returns the ids of everything before the (last) answer, exactly as in training, without cutting.

    Raises:
        DataError: If the example is a conversation and the tokenizer cannot render it.
    """
    if example.messages:
        return conversation_ids(tokenizer, example)[0]
    return _plain_prompt(tokenizer, example.prompt)


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of an answer or a choice, without start and end tokens.

    Some SentencePiece tokenizers (Llama 2, Mistral) put a space before any text. An answer with its own
    leading space would get two, so its space is removed for them.
    """
    twice = text.startswith(" ") and adds_space(tokenizer)
    if twice and text_ids(tokenizer, " a") != text_ids(tokenizer, "a"):
        text = text[1:]
    return text_ids(tokenizer, text)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Encoded:
    """Returns one example as ids and labels of at most `max_length` tokens.

    If the example is too long, the left of the prompt is cut, after the start token, so that the end of
    the prompt and the whole answer stay. Only if the answer alone is too long is the sample cut from the
    right; no supervised token may be left then (`encode_all` refuses that).

    Raises:
        ConfigError: If `max_length` is below 2.
        DataError: If the example is a conversation and the tokenizer cannot render it.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}.", hint="Give at least 2 tokens.")
    head, head_labels, answer = _labelled(tokenizer, example)
    last = not example.messages or example.messages[-1].learned
    ids, labels = head + answer, head_labels + (answer if last else [IGNORED] * len(answer))
    excess = len(ids) - max_length
    if excess <= 0:
        return Encoded(ids, labels)
    start = int(bool(head) and head[0] == tokenizer.bos_token_id)
    # One token must come before the answer, or its first token is never predicted.
    if len(answer) + max(1, start) > max_length:
        return Encoded(ids[:max_length], labels[:max_length], cut_answer_tokens=excess)
    keep = slice(start + excess, None)
    return Encoded(ids[:start] + ids[keep], labels[:start] + labels[keep], cut_prompt_tokens=excess)


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> EncodedDataset:
    """Encodes every example, cut as in `encode`, and refuses examples without a token to learn.

    Returns:
        A dataset for `record_gradients`, `fit_repair`, `finetune` and Trainers: its items are dictionaries
        of input_ids and labels.

    Raises:
        DataError: If samples have no supervised token (the message has their number and first ids), or a
            conversation cannot be rendered.
        ConfigError: If `max_length` is below 2.
    """
    encoded = [encode(tokenizer, example, max_length) for example in examples]
    empty = [
        (example.id, one) for example, one in zip(examples, encoded, strict=True) if one.num_supervised == 0
    ]
    if empty:
        cut = any(one.cut_answer_tokens or one.cut_prompt_tokens for _, one in empty)
        raise DataError(
            f"0 learned tokens in {len(empty)} of {len(encoded)} samples "
            f"(first: {', '.join(name for name, _ in empty[:_EXAMPLES_NAMED])}): "
            + (
                f"cut to {max_length} tokens, they keep nothing of their answers."
                if cut
                else "nothing in them counts as an answer."
            ),
            hint=f"Raise data.max_length (now {max_length}) or shorten the texts."
            if cut
            else "In conversations, replies of weight 0 are not learned.",
        )
    return EncodedDataset(encoded)


def usable(
    tokenizer: PreTrainedTokenizerBase, found: ExampleSet, max_length: int, *, skip_bad: bool
) -> ExampleSet:
    """Returns the set without examples that cannot be rendered or learned from; they count as dropped.

    Without `skip_bad`, returns `found` itself.

    Raises:
        DataError: If no example is left.
    """
    if not skip_bad:
        return found
    kept, faults = [], []
    for example in found.examples:
        try:
            encode_all(tokenizer, [example], max_length)
            kept.append(example)
        except DataError as error:
            faults.append(error)
    if not faults:
        return found
    if not kept:
        raise faults[0]
    note = f"{found.source}: dropped {len(faults)} rows that cannot be tokenised, first: {faults[0].args[0]}"
    dropped = found.num_dropped + len(faults)
    return replace(found, examples=tuple(kept), num_dropped=dropped, notes=(*found.notes, note))


def labelled_text(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[tuple[str, bool]]:
    """Returns the sample as pieces (text, learned?)."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        learned = label != IGNORED
        if not pieces or pieces[-1][1] != learned:
            pieces.append(([], learned))
        pieces[-1][0].append(token)
    return [
        (str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), learned) for ids, learned in pieces
    ]


def closed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Returns the ids with the end token appended, unless they end with it already."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [int(end)] else [*ids, int(end)]


def _plain_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer.encode(text, add_special_tokens=True, verbose=False))
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]  # the text begins with the start token, and the tokenizer has added another
    # Some tokenizers also add an end token, but the text goes on after the prompt.
    if len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        bare = text_ids(tokenizer, text)
        return ids[:-1] if ids[-1:] != bare[-1:] else ids
    return ids


def _labelled(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int], list[int]]:
    """Returns head ids, head labels (earlier assistant turns are learned) and the last answer."""
    if example.messages:
        head, learned, answer = conversation_ids(tokenizer, example)
        return head, [token if kept else IGNORED for token, kept in zip(head, learned, strict=True)], answer
    head = _plain_prompt(tokenizer, example.prompt)
    return head, [IGNORED] * len(head), closed(tokenizer, answer_ids(tokenizer, example.answer))
