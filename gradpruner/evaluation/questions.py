"""Examples as a model is asked them: prompts cut to fit, answers with what ends them.

Prompts and answers are tokenised by the functions that training uses, so a model is asked exactly what it was
taught.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.chat import special_ids
from gradpruner.data.encoding import answer_ids, closed, encode, prompt_ids
from gradpruner.data.examples import Example
from gradpruner.evaluation.likelihood import OptionSet

_PROMPT_TAIL_TOKENS = 64
# Beside the end: a model may spell an answer with a token more than the tokenizer would.
_SPARE_NEW_TOKENS = 1


class Questions:
    """The examples of one evaluation, tokenised.

    Args:
        tokenizer: Of the model that is asked.
        examples: What to ask.
        max_length: Most tokens of prompt and answer together. A longer prompt loses its beginning, as in
            training.
        score_ends: Whether the end of an option counts in its likelihood, so that an option which begins
            another one is scored as complete.

    Raises:
        DataError: If an example has an empty prompt.
    """

    def __init__(
        self, tokenizer: Any, examples: Sequence[Example], max_length: int, *, score_ends: bool = True
    ) -> None:
        self.tokenizer, self.examples = tokenizer, examples
        self.max_length, self.score_ends = max_length, score_ends
        self.prompts = [prompt_ids(tokenizer, example) for example in examples]
        empty = [e.id for e, ids in zip(examples, self.prompts, strict=True) if not ids]
        if empty:
            raise DataError(
                f"{len(empty)} examples have a prompt without any token: {', '.join(empty[:3])}.",
                hint="Give every example a prompt.",
            )

    def within(self, max_length: int, score_ends: bool) -> Questions:
        """The same questions for another length or way to score; nothing is tokenised again."""
        if (max_length, score_ends) == (self.max_length, self.score_ends):
            return self
        other = copy.copy(self)
        other.max_length, other.score_ends = max_length, score_ends
        return other

    def __len__(self) -> int:
        return len(self.examples)

    def prompt_tail(self, index: int) -> str:
        """The end of a prompt as text."""
        return str(self.tokenizer.decode(self.prompts[index][-_PROMPT_TAIL_TOKENS:]))

    def most_new_tokens(self) -> int:
        """Tokens of the longest right answer and two more, its end among them."""
        return max(map(len, self._right)) + _SPARE_NEW_TOKENS

    def target(self, index: int, answer: str) -> list[int]:
        """The tokens training would teach after the prompt, end included."""
        example = self.examples[index]
        if not example.messages:
            return closed(self.tokenizer, answer_ids(self.tokenizer, answer))
        # In a conversation the template says what stands around the answer and what ends it.
        turns = (*example.messages[:-1], replace(example.messages[-1], content=answer))
        told = encode(self.tokenizer, replace(example, answer=answer, messages=turns), sys.maxsize)
        return told.input_ids[len(self.prompts[index]) :]

    def option_set(self, index: int) -> OptionSet:
        """All options of an example behind one prompt."""
        example = self.examples[index]
        targets = [self.target(index, choice) for choice in example.choices]
        if not self.score_ends and not example.messages and self.tokenizer.eos_token_id is not None:
            targets = [target[:-1] for target in targets]
        return OptionSet(self.cut_prompt(index, max(map(len, targets))), targets)

    def cut_prompt(self, index: int, answer_tokens: int) -> list[int]:
        """A prompt cut on the left, behind the start token, to fit beside an answer.

        Raises:
            ConfigError: If the answer leaves no room.
        """
        ids = self.prompts[index]
        start = int(ids[0] == self.tokenizer.bos_token_id)
        room = self.max_length - answer_tokens
        if room <= start:
            raise ConfigError(
                f"An answer of up to {answer_tokens} tokens leaves no room for a prompt within"
                f" {self.max_length} tokens.",
                hint="Raise the maximum length or allow fewer new tokens.",
            )
        excess = max(0, len(ids) - room)
        return ids[:start] + ids[start + excess :]

    def num_cut(self, answer_tokens: int) -> int:
        """How many prompts lose their beginning beside an answer of this length."""
        return sum(len(ids) + answer_tokens > self.max_length for ids in self.prompts)

    def ends(self, own: Any) -> list[int]:
        """The tokens that end an answer: the tokenizer's, the model's and those of conversations.

        Args:
            own: `eos_token_id` of the model's generation config: a token, a list or None.
        """
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        chats = (i for i, example in enumerate(self.examples) if example.messages)
        last = {self._right[i][-1] for i in chats}
        # Without an end token a conversation may stop at a word, and a word ends nothing.
        ends.update(last & self._special)
        return sorted(ends - {None})

    def text(self, ids: list[int]) -> str:
        """Generated tokens as text; special tokens only where right answers hold them too."""
        kept = [token for token in ids if token not in self._special or token in self._answer_tokens]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def reading(self, index: int, text: str) -> str:
        """A generated answer without what the chat template writes around every reply."""
        _, before, behind = self._references[index]
        return text.strip().removeprefix(before).removesuffix(behind).strip() if before or behind else text

    def reference(self, index: int) -> str:
        """The right answer as it reads when a model has written it, token for token.

        An answer is learned through the tokenizer and, in a conversation, through its template: text behind
        an end token is never written, and what the tokenizer or the template changes reads otherwise.
        """
        return self._references[index][0]

    @cached_property
    def _special(self) -> set[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def _right(self) -> list[list[int]]:
        """The tokens of every right answer, end included."""
        return [self.target(i, example.answer) for i, example in enumerate(self.examples)]

    @cached_property
    def _written(self) -> list[list[int]]:
        """The tokens of every right answer, up to the first that ends it."""
        written = []
        ends = set(self.ends(None))
        for ids in self._right:
            length = next((k for k, token in enumerate(ids) if token in ends), len(ids))
            written.append(ids[:length])
        return written

    @cached_property
    def _answer_tokens(self) -> set[int]:
        return {token for ids in self._written for token in ids}

    @cached_property
    def _references(self) -> list[tuple[str, str, str]]:
        """Every right answer, with what stands before and behind it when it is written."""
        return [self._reference(i, ids) for i, ids in enumerate(self._written)]

    def _reference(self, index: int, ids: list[int]) -> tuple[str, str, str]:
        answer = self.examples[index].answer
        bare, text = answer.strip(), self.text(ids).strip()
        # Two different answers with unknown tokens would read the same.
        if self.tokenizer.unk_token_id in ids or not text or text == bare:
            return answer, "", ""
        place = text.rfind(bare) if bare else -1
        if place < 0:
            return text, "", ""
        return answer, text[:place].strip(), text[place + len(bare) :].strip()
