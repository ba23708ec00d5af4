"""Examples as a model is asked them: prompts cut to fit, answers with what ends them.

Prompts and answers are tokenised by the functions that training uses, so a model is asked exactly what it was
taught.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradpruner.data.encoding import answer_ids, encode, prompt_ids
from gradpruner.data.examples import Example
from gradpruner.errors import ConfigError, DataError
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

    def __len__(self) -> int:
        return len(self.examples)

    def prompt_tail(self, index: int) -> str:
        """The end of a prompt as text."""
        return str(self.tokenizer.decode(self.prompts[index][-_PROMPT_TAIL_TOKENS:]))

    def most_new_tokens(self) -> int:
        """Tokens of the longest right answer and two more, its end among them."""
        longest = max(len(self.target(i, e.answer)) for i, e in enumerate(self.examples))
        return longest + _SPARE_NEW_TOKENS

    def target(self, index: int, answer: str) -> list[int]:
        """The tokens training would teach after the prompt, end included."""
        example = self.examples[index]
        if not example.messages:
            eos = self.tokenizer.eos_token_id
            return answer_ids(self.tokenizer, answer) + ([] if eos is None else [eos])
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
        ends.update(self.target(i, self.examples[i].answer)[-1] for i in chats)
        return sorted(ends - {None})

    def text(self, ids: list[int]) -> str:
        """Generated tokens as text."""
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)
