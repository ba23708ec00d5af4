"""How well a model does its task: greedy answers and the likelihood of the options.

Prompts and answers are tokenised by the functions that training uses, so a model is asked exactly
what it was taught. Padding is built here, whatever the tokenizer's own padding side.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from gradpruner.cost import PeakMemory
from gradpruner.data import Example
from gradpruner.encoding import answer_ids, encode, prompt_ids
from gradpruner.errors import ConfigError, DataError, ResourceError
from gradpruner.files import write_text
from gradpruner.likelihood import OptionRow, inference, score_rows, without_adapters
from gradpruner.metrics import Interval, bootstrap_interval, exact_match
from gradpruner.progress import Progress
from gradpruner.registry import suggest

METRICS = ("exact_match", "choice_likelihood")

_PROMPT_TAIL_TOKENS = 64
# Beside the end: a model may spell an answer with a token more than the tokenizer would.
_SPARE_NEW_TOKENS = 1


@dataclass(frozen=True)
class Output:
    """What the model did with one example; a field is None when its metric was not asked for.

    Attributes:
        id: The example's id.
        prompt_tail: The end of the prompt as the model saw it.
        answer: The right answer.
        generated: The greedy answer, up to the end-of-text token.
        finished: Whether the model ended the answer itself, within the token budget.
        correct: Whether `generated` matches `answer`, see `metrics.exact_match`.
        choices: The options, in the example's order.
        choice_scores: Log-likelihood in nats of each option and its end-of-text token, given the
            prompt.
        choice_scores_per_token: The same divided by the number of tokens.
        chosen: The option with the highest `choice_scores`; the first of equals.
        choice_correct: Whether `chosen` matches `answer`.
    """

    id: str
    prompt_tail: str
    answer: str
    generated: str | None = None
    finished: bool | None = None
    correct: bool | None = None
    choices: tuple[str, ...] | None = None
    choice_scores: tuple[float, ...] | None = None
    choice_scores_per_token: tuple[float, ...] | None = None
    chosen: str | None = None
    choice_correct: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        metrics: "exact_match" and, when every example has options, "choice_accuracy"; fractions 0
            to 1 with 95 % bootstrap intervals.
        seconds: Wall time of everything the model did.
        tokens_per_second: Tokens generated per second of generation, padding not counted; None when
            nothing was generated.
        peak_memory_bytes: Peak over the evaluation, see `cost.PeakMemory`.
        outputs: One per example, in the order given.
    """

    metrics: dict[str, Interval]
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int
    outputs: list[Output]

    def summary(self, per_example: str | None = None) -> dict[str, Any]:
        """Returns the evaluation as run.json keeps it.

        Args:
            per_example: Where `write_examples` wrote, relative to the run folder.
        """
        return {
            "metrics": {name: interval.as_dict() for name, interval in self.metrics.items()},
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
            "per_example": per_example,
        }

    def write_examples(self, path: str | Path) -> None:
        """Writes one JSON object per example and line; what was not measured is left out."""
        rows = (
            {name: value for name, value in asdict(output).items() if value is not None}
            for output in self.outputs
        )
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(Path(path), text)


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int = 2048,
    seed: int = 0,
    progress: str = "evaluate",
) -> Evaluation:
    """Measures a model on the examples of a task.

    "exact_match" decodes greedily up to the end-of-text token and compares the text with the
    answer. "choice_likelihood" picks the option with the highest log-likelihood, end-of-text token
    included, so that an option which begins another one is scored as complete; it runs only if
    every example has at least two options. Neither depends on the batch size, beyond the rounding
    of the arithmetic.

    Args:
        model: A transformers causal language model, with or without PEFT adapters. It is put into
            eval mode and given back in the mode it came in.
        tokenizer: Its tokenizer.
        examples: What to ask.
        metrics: Any of `METRICS`.
        batch_size: Prompts, or options, per forward pass; at least 1.
        max_new_tokens: Most tokens to generate; None for the longest answer plus 2.
        max_length: Most tokens of prompt and answer together; the model's positions bound it too. A
            longer prompt loses its beginning, as in training.
        seed: Seed of the bootstrap.
        progress: What the progress bar says is being done.

    Raises:
        ConfigError: If an option is out of range or no metric can be computed.
        DataError: If there are no examples, or one has an empty prompt or an answer outside its
            options.
        NonFiniteError: If the model's likelihoods are NaN or infinite.
        ResourceError: If memory runs out.
    """
    use_choices = _check_request(examples, metrics, batch_size)
    evaluator = Evaluator(model, tokenizer, examples, batch_size, max_length)
    use_generation = "exact_match" in metrics
    total = len(examples) * use_generation + use_choices * sum(len(e.choices) for e in examples)
    started = time.perf_counter()
    with PeakMemory(model.device) as peak, Progress(total, progress) as bar:
        try:
            if use_generation:
                evaluator.generate_answers(max_new_tokens, bar)
            if use_choices:
                evaluator.score_choices(bar)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"Memory ran out while evaluating with a batch size of {batch_size}.",
                hint="Choose a smaller evaluation batch size or maximum length.",
            ) from error
    return Evaluation(
        metrics=_intervals(evaluator.outputs, seed),
        seconds=time.perf_counter() - started,
        tokens_per_second=evaluator.tokens_per_second,
        peak_memory_bytes=peak.peak_bytes,
        outputs=evaluator.outputs,
    )


class Evaluator:
    """The state of one evaluation: the tokenised prompts and the outputs so far."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        batch_size: int,
        max_length: int,
    ) -> None:
        self.model = model
        self.base = without_adapters(model)
        self.tokenizer = tokenizer
        self.examples = examples
        self.batch_size = batch_size
        self.max_length = _length_limit(self.base.config, max_length)
        self.tokens_per_second: float | None = None
        self.prompts = [prompt_ids(tokenizer, example) for example in examples]
        empty = [e.id for e, ids in zip(examples, self.prompts, strict=True) if not ids]
        if empty:
            raise DataError(
                f"{len(empty)} examples have a prompt without any token: {', '.join(empty[:3])}.",
                hint="Give every example a prompt.",
            )
        self.outputs = [
            Output(e.id, tokenizer.decode(ids[-_PROMPT_TAIL_TOKENS:]), e.answer)
            for e, ids in zip(examples, self.prompts, strict=True)
        ]

    def generate_answers(self, max_new_tokens: int | None, bar: Progress) -> None:
        """Fills in the greedy answer of every example."""
        if max_new_tokens is None:
            longest = max(len(self._target(i, e.answer)) for i, e in enumerate(self.examples))
            max_new_tokens = longest + _SPARE_NEW_TOKENS
        ends = self._end_ids()
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=self._pad_id(),
        )
        # Longest first: if the memory does not suffice, that shows in the first batch and not in
        # the last.
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        num_tokens, num_correct, seconds = 0, 0, 0.0
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            began = time.perf_counter()
            prompts = [self._cut_prompt(i, max_new_tokens) for i in batch]
            answers = self._generate(prompts, config)
            seconds += time.perf_counter() - began
            for i, ids in zip(batch, answers, strict=True):
                length = next((k for k, token in enumerate(ids) if token in ends), len(ids))
                num_tokens += min(length + 1, len(ids))
                text = self.tokenizer.decode(
                    ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                correct = exact_match(text, self.examples[i].answer)
                num_correct += correct
                self.outputs[i] = replace(
                    self.outputs[i], generated=text, finished=length < len(ids), correct=correct
                )
            bar.advance(len(batch), exact_match=num_correct / (start + len(batch)))
        self.tokens_per_second = num_tokens / seconds

    def score_choices(self, bar: Progress) -> None:
        """Fills in the log-likelihood of every option of every example."""
        rows = list(self.option_rows())
        scored = score_rows(self.model, rows, self._pad_id(), self.batch_size, bar.advance)
        scores: list[list[float]] = [[] for _ in self.examples]
        lengths: list[list[int]] = [[] for _ in self.examples]
        for row, score in zip(rows, scored, strict=True):
            scores[row.example].append(score)
            lengths[row.example].append(len(row.ids) - row.prompt_length)
        for i, example in enumerate(self.examples):
            chosen = example.choices[max(range(len(scores[i])), key=scores[i].__getitem__)]
            self.outputs[i] = replace(
                self.outputs[i],
                choices=example.choices,
                choice_scores=tuple(scores[i]),
                choice_scores_per_token=tuple(
                    score / length for score, length in zip(scores[i], lengths[i], strict=True)
                ),
                chosen=chosen,
                choice_correct=exact_match(chosen, example.answer),
            )

    def option_rows(self) -> Iterator[OptionRow]:
        """Yields prompt plus option plus end for every option; all options see the same prompt."""
        for i, example in enumerate(self.examples):
            targets = [self._target(i, choice) for choice in example.choices]
            prompt = self._cut_prompt(i, max(map(len, targets)))
            for target in targets:
                yield OptionRow(i, len(prompt), prompt + target)

    def _generate(self, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        """Returns the new tokens of each prompt; rows that ended early are padded."""
        # Padded on the left: the new tokens follow the last prompt token without a gap.
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad_id(), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        with inference(self.model), _own_generation_config((self.model, self.base), config):
            output = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        new_tokens: list[list[int]] = output[:, width:].tolist()
        return new_tokens

    def _target(self, index: int, answer: str) -> list[int]:
        """Returns the tokens training would teach after the prompt, end included."""
        example = self.examples[index]
        if not example.messages:
            eos = self.tokenizer.eos_token_id
            return answer_ids(self.tokenizer, answer) + ([] if eos is None else [eos])
        # In a conversation the template says what stands around the answer and what ends it.
        turns = (*example.messages[:-1], replace(example.messages[-1], content=answer))
        told = encode(self.tokenizer, replace(example, answer=answer, messages=turns), sys.maxsize)
        return told.input_ids[len(self.prompts[index]) :]

    def _cut_prompt(self, index: int, answer_tokens: int) -> list[int]:
        """Returns a prompt cut on the left, behind the start token, to fit beside an answer."""
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

    def _pad_id(self) -> int:
        """Returns the token that fills rows up; any will do, for it is masked."""
        pad = self.tokenizer.pad_token_id
        return int((self.tokenizer.eos_token_id or 0) if pad is None else pad)

    def _end_ids(self) -> list[int]:
        """Returns the tokens that end an answer: the tokenizer's and the model's."""
        own = self.base.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        chats = (i for i, example in enumerate(self.examples) if example.messages)
        ends.update(self._target(i, self.examples[i].answer)[-1] for i in chats)
        return sorted(ends - {None})


def _check_request(examples: Sequence[Example], metrics: Sequence[str], batch_size: int) -> bool:
    """Refuses what cannot be evaluated; returns whether the options are to be scored."""
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                f"Unknown metric '{name}'.{suggest(name, METRICS)}",
                hint=f"Available: {', '.join(METRICS)}.",
            )
    if batch_size < 1:
        raise ConfigError(f"The evaluation batch size is {batch_size}; it must be at least 1.")
    if not examples:
        raise DataError("There are no examples to evaluate on.")
    use_choices = "choice_likelihood" in metrics and all(len(e.choices) >= 2 for e in examples)
    if not use_choices and "exact_match" not in metrics:
        raise ConfigError(
            "Only 'choice_likelihood' was asked for, and not every example has two options.",
            hint="Add 'exact_match', or give every example its options.",
        )
    if use_choices:
        stray = [e.id for e in examples if not any(exact_match(choice, e.answer) for choice in e.choices)]
        if stray:
            raise DataError(
                f"The answer of {len(stray)} examples is none of their options: {', '.join(stray[:3])}."
            )
    return use_choices


def _intervals(outputs: Sequence[Output], seed: int) -> dict[str, Interval]:
    """Returns the metrics for which the outputs have verdicts."""
    verdicts = {
        "exact_match": [output.correct for output in outputs],
        "choice_accuracy": [output.choice_correct for output in outputs],
    }
    return {
        name: bootstrap_interval([bool(value) for value in values], seed=seed)
        for name, values in verdicts.items()
        if None not in values
    }


def _length_limit(config: Any, max_length: int) -> int:
    """Returns `max_length`, or the number of positions the model has if that is fewer."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(max_length, positions) if isinstance(positions, int) else max_length


@contextmanager
def _own_generation_config(models: Sequence[Any], config: GenerationConfig) -> Iterator[None]:
    """Lets `config` alone decide how to generate.

    `generate` fills what a given config leaves open from the model's own generation_config. Many
    published models carry a temperature (then it warns), a repetition penalty or a length there.
    """
    owners = [model for model in models if "generation_config" in vars(model)]
    saved = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, saved, strict=True):
            owner.generation_config = own
