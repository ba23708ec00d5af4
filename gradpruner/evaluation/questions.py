"""Tokenised examples for evaluation: prompts cut to fit, and answers with their end token.

Training and evaluation tokenise prompts and answers with the same functions, so a model is asked exactly what
it was trained on.
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
# A model may spell an answer with one token more than the tokenizer does.
_SPARE_NEW_TOKENS = 1


class Questions:
    """The examples of one evaluation, tokenised.

    Args:
        tokenizer: The model's tokenizer.
        examples: The examples to tokenise.
        max_length: Most tokens of prompt and answer together. A longer prompt loses its beginning, as in
            training.
        score_ends: Whether the end token counts as part of an option; without it, an option that is a prefix
            of another is not scored as complete.

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
        """Returns these questions with another length or `score_ends`; prompts are not tokenised again."""
        if (max_length, score_ends) == (self.max_length, self.score_ends):
            return self
        other = copy.copy(self)
        other.max_length, other.score_ends = max_length, score_ends
        return other

    def __len__(self) -> int:
        return len(self.examples)

    def prompt_tail(self, index: int) -> str:
        """Returns the end of a prompt as text."""
        return str(self.tokenizer.decode(self.prompts[index][-_PROMPT_TAIL_TOKENS:]))

    def most_new_tokens(self) -> int:
        """Returns the number of tokens of the longest right answer with its end token, plus one spare."""
        return max(map(len, self._right)) + _SPARE_NEW_TOKENS

    def target(self, index: int, answer: str) -> list[int]:
        """Returns the tokens that training would put after the prompt for this answer, end token included."""
        example = self.examples[index]
        if not example.messages:
            return closed(self.tokenizer, answer_ids(self.tokenizer, answer))
        # In a conversation the chat template decides what surrounds and ends the answer.
        turns = (*example.messages[:-1], replace(example.messages[-1], content=answer))
        encoded = encode(self.tokenizer, replace(example, answer=answer, messages=turns), sys.maxsize)
        return encoded.input_ids[len(self.prompts[index]) :]

    def option_set(self, index: int) -> OptionSet:
        """Returns the options of an example with its prompt, cut to leave room for the longest option."""
        example = self.examples[index]
        targets = [self.target(index, choice) for choice in example.choices]
        if not self.score_ends and not example.messages and self.tokenizer.eos_token_id is not None:
            targets = [target[:-1] for target in targets]
        return OptionSet(self.cut_prompt(index, max(map(len, targets))), targets)

    def cut_prompt(self, index: int, answer_tokens: int) -> list[int]:
        """Returns a prompt that fits beside an answer: cut at its beginning, after the start token.

        Raises:
            ConfigError: If the answer leaves no room for a prompt.
        """
        ids = self.prompts[index]
        start = int(ids[0] == self.tokenizer.bos_token_id)
        room = self.max_length - answer_tokens
        if room <= start:
            raise ConfigError(
                f"An answer of up to {answer_tokens} tokens leaves no room for a prompt within"
                f" {self.max_length} tokens.",
                hint="Raise max_length (data.max_length) or lower max_new_tokens (evaluate.max_new_tokens).",
            )
        excess = max(0, len(ids) - room)
        return ids[:start] + ids[start + excess :]

    def num_cut(self, answer_tokens: int) -> int:
        """Returns how many prompts are cut to fit beside an answer of this length."""
        return sum(len(ids) + answer_tokens > self.max_length for ids in self.prompts)

    def ends(self, own: Any) -> list[int]:
        """Returns the tokens that end an answer: the tokenizer's, the model's and the chat template's.

        Args:
            own: `eos_token_id` of the model's generation config: a token, a list or None.
        """
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        chats = (i for i, example in enumerate(self.examples) if example.messages)
        last = {self._right[i][-1] for i in chats}
        # A template without an end token ends an answer with an ordinary word, which must not end others.
        ends.update(last & self._special)
        return sorted(ends - {None})

    @property
    def template_ends(self) -> list[int]:
        """The tokens with which the chat template ends answers, besides the tokenizer's own end token."""
        return sorted(set(self.ends(None)) - {self.tokenizer.eos_token_id})

    def text(self, ids: list[int]) -> str:
        """Decodes generated tokens; special tokens are kept only if some right answer contains them."""
        kept = [token for token in ids if token not in self._special or token in self._answer_tokens]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def reading(self, index: int, text: str) -> str:
        """Strips the text that the chat template puts around every reply from a generated answer."""
        _, before, after = self._references[index]
        return text.strip().removeprefix(before).removesuffix(after).strip() if before or after else text

    def reference(self, index: int) -> str:
        """Returns the right answer as a model would write it token by token.

        This text may differ from the answer in the data: a model never writes what follows an end token, and
        the tokenizer or the chat template may change the text.
        """
        return self._references[index][0]

    @cached_property
    def _special(self) -> set[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def _right(self) -> list[list[int]]:
        """The tokens of each right answer, end token included."""
        return [self.target(i, example.answer) for i, example in enumerate(self.examples)]

    @cached_property
    def _written(self) -> list[list[int]]:
        """The tokens of each right answer before its first end token."""
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
        """Each right answer as a model would write it, and the template's text before and after it."""
        return [self._reference(i, ids) for i, ids in enumerate(self._written)]

    def _reference(self, index: int, ids: list[int]) -> tuple[str, str, str]:
        answer = self.examples[index].answer
        bare, text = answer.strip(), self.text(ids).strip()
        # Decoded unknown tokens would make different answers equal, so the answer itself is used.
        if self.tokenizer.unk_token_id in ids or not text or text == bare:
            return answer, "", ""
        place = text.rfind(bare) if bare else -1
        if place < 0:
            return text, "", ""
        return answer, text[:place].strip(), text[place + len(bare) :].strip()
