"""Evaluates a model on a task: greedy answers, likelihoods of the options, and the metrics of both.

The model is either loaded here (`generation.LocalModel`) or behind a server that speaks the OpenAI
completions protocol (`endpoint.Endpoint`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradpruner.common.errors import ConfigError, DataError, ResourceError
from gradpruner.common.files import write_text
from gradpruner.common.memory import PeakMemory
from gradpruner.common.options import changed
from gradpruner.common.progress import Progress
from gradpruner.common.world import World
from gradpruner.data.examples import Example
from gradpruner.evaluation.bertscore import BertScorer
from gradpruner.evaluation.generation import LocalModel
from gradpruner.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    exact_match,
    normalise_answer,
    rouge_l,
    same_number,
)
from gradpruner.evaluation.options import EvaluateOptions
from gradpruner.evaluation.outputs import Journal, Output, output_line, values_of
from gradpruner.evaluation.questions import Questions
from gradpruner.models.kernels import with_fast_products

if TYPE_CHECKING:
    from gradpruner.evaluation.endpoint import Endpoint

TASK_METRICS: Mapping[str, tuple[str, ...]] = {
    "accuracy": ("exact_match", "choice_likelihood"),
    "exact_match": ("exact_match",),
    "similarity": ("bert_score", "rouge_l", "exact_match", "choice_likelihood"),
    "final_number": ("final_number",),
}
"""Metric of a task (`Task.metric`) -> the metrics to compute for it."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        metrics: Means with 95 % bootstrap intervals, fractions from 0 to 1, the most important metric first:
            "similarity" (the paper's mean of ROUGE-L and BERTScore), "final_number", "exact_match",
            "choice_accuracy", "choice_accuracy_normalised" (likelihood per character), "bert_score",
            "rouge_l".
        seconds: Wall time of the evaluation: generation, scoring and metrics.
        tokens_per_second: Tokens generated per second of generation, without padding; None if this call
            generated nothing.
        peak_memory_bytes: Peak over generation and scoring, see `common.memory.PeakMemory`.
        outputs: One per example, in the order of the examples.
        details: How the metrics were computed: implementation, encoder, layer, normalisation.
    """

    metrics: dict[str, Interval]
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int
    outputs: list[Output]
    details: dict[str, Any]

    def summary(self, per_example: str | None = None) -> dict[str, Any]:
        """Returns the evaluation in the form stored in run.json.

        Args:
            per_example: Path of the file from `write_examples`, relative to the run folder.
        """
        return {
            "metrics": {name: asdict(interval) for name, interval in self.metrics.items()},
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
            "per_example": per_example,
            "details": self.details,
        }

    def write_examples(self, path: str | Path) -> None:
        """Writes one line of JSON per example, without the fields that were not measured."""
        write_text(Path(path), "".join(map(output_line, self.outputs)))


@with_fast_products
def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example] | Questions,
    options: EvaluateOptions | None = None,
    *,
    progress: str = "evaluate",
    journal: str | Path | None = None,
    world: World | None = None,
    **changes: Any,
) -> Evaluation:
    """Evaluates a model on the examples of a task.

    "exact_match" decodes greedily up to the end-of-text token and compares the text with the answer;
    "rouge_l", "bert_score" and "final_number" score the same text. "choice_likelihood" picks the option with
    the highest log-likelihood and is computed only if every example has at least two options. The end-of-text
    token counts as part of an option; without it, an option that is a prefix of another would not be scored
    as complete. Apart from rounding, no metric depends on the batch size, unless the model has long-RoPE
    factors (Phi-3 and 4 of 128k) and some row is longer than its original window.

    Args:
        model: A transformers causal language model, with or without PEFT adapters, or an
            `endpoint.Endpoint`. A model runs in eval mode; its own mode is restored afterwards.
        tokenizer: The model's tokenizer.
        examples: The examples, or `Questions` if they are already tokenised with this tokenizer.
        options: How to evaluate, and which metrics to compute.
        progress: Label of the progress bar.
        journal: File in which finished answers are kept, so that an interrupted evaluation of the same model
            and examples can resume.
        world: Processes that share the examples. Each of them must call this function and gets the whole
            result.
        changes: Single options by name: `metrics=["rouge_l"]`.

    Raises:
        ConfigError: If an option is out of range or no metric can be computed.
        DataError: If there are no examples, a prompt is empty, or an answer is not among its options.
        NonFiniteError: If the model's likelihoods are NaN or infinite.
        ResourceError: If memory runs out.
    """
    options = changed(EvaluateOptions, options, changes)
    metrics = options.metrics or TASK_METRICS["accuracy"]
    rows = examples.examples if isinstance(examples, Questions) else examples
    use_choices = _check_request(rows, metrics)
    scorer = BertScorer(options.encoder, options.encoder_layer) if "bert_score" in metrics else None
    answering = model if hasattr(model, "option_scores") else LocalModel(model, tokenizer, options.batch_size)
    longest = answering.longest(options.max_length)
    questions = examples if isinstance(examples, Questions) else Questions(tokenizer, examples, longest)
    questions = questions.within(longest, options.score_ends)
    world = world or World()
    share = world.share(len(questions))
    started = time.perf_counter()
    with (
        PeakMemory(getattr(model, "device", None)) as peak,
        Journal(journal, questions, world.rank) as outputs,
        Progress(len(share), progress) as bar,
    ):
        asking = _Asking(answering, questions, outputs, share, bar, world, "exact_match" in metrics)
        budget = (options.max_new_tokens or questions.most_new_tokens()) if _generates(metrics) else 0
        speed = world.in_step(lambda: asking.ask(budget, use_choices))
        speeds = [one for one in world.gathered([speed]) if one is not None]
    own = world.in_step(lambda: _grade([outputs[i] for i in share], metrics, scorer))
    graded = world.in_order(own)
    details = _details(metrics, scorer, answering, use_choices, options.score_ends)
    return Evaluation(
        metrics={name: bootstrap_interval(v, seed=options.seed) for name, v in values_of(graded).items()},
        seconds=time.perf_counter() - started,
        tokens_per_second=sum(speeds) if speeds else None,
        peak_memory_bytes=peak.peak_bytes,
        outputs=graded,
        details=details,
    )


def _generates(metrics: Sequence[str]) -> bool:
    return any(name != "choice_likelihood" for name in metrics)


@dataclass
class _Asking:
    """Asks this process's share of the questions and records the answers.

    Attributes:
        shows_matches: Whether the progress bar shows the share of exact matches.
        passes: 2 if every row is both answered and scored, else 1.
        pending: Rows still to do, summed over the passes.
    """

    answering: LocalModel | Endpoint
    questions: Questions
    outputs: Journal
    share: range
    bar: Progress
    world: World
    shows_matches: bool = True
    passes: int = 0
    pending: int = 0

    def ask(self, budget: int, use_choices: bool) -> float | None:
        """Generates answers of at most `budget` tokens (none if 0) and scores the options if asked to.

        Returns:
            Tokens generated per second; None if nothing had to be generated.
        """
        unanswered = self._missing("generated") if budget else []
        unscored = self._missing("choice_scores") if use_choices else []
        self.passes, self.pending = (budget > 0) + use_choices, len(unanswered) + len(unscored)
        self.bar.skip(self._rows_done())
        try:
            speed = self._generate(unanswered, budget) if unanswered else None
            self._score_options(unscored)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"Memory ran out while evaluating with a batch size of {self.answering.batch_size}.",
                hint="Choose a smaller evaluation batch size or maximum length.",
            ) from error
        return speed

    def _missing(self, field: str) -> list[int]:
        return [i for i in self.share if getattr(self.outputs[i], field) is None]

    def _rows_done(self) -> int:
        """Rows done so far; a pass over a row counts as half a row if there are two."""
        return len(self.share) - math.ceil(self.pending / self.passes)

    def _generate(self, missing: list[int], budget: int) -> float:
        outputs, questions = self.outputs, self.questions
        num_tokens, began = 0, time.perf_counter()
        matches = [bool(outputs[i].correct) for i in self.share if outputs[i].correct is not None]
        for batch, answers in self.answering.answers(questions, missing, budget):
            for i, answer in zip(batch, answers, strict=True):
                text = questions.reading(i, answer.text)
                correct = _is_right(text, questions.examples[i], questions.reference(i))
                outputs.note(i, generated=text, finished=answer.finished, correct=correct)
                matches.append(correct)
                num_tokens += answer.num_tokens
            shown = {"exact_match": sum(matches) / len(matches)} if self.shows_matches else {}
            self._batch_done(batch, **shown)
        return num_tokens / (time.perf_counter() - began)

    def _score_options(self, missing: list[int]) -> None:
        for batch, found in self.answering.option_scores(self.questions, missing):
            for i, scores in zip(batch, found, strict=True):
                self.outputs.note(i, **_chosen(self.questions.examples[i], scores))
            self._batch_done(batch)

    def _batch_done(self, batch: Sequence[int], **shown: float) -> None:
        self.outputs.flush()
        self.pending -= len(batch)
        self.bar.update(self._rows_done(), **shown)
        self.world.stop_if_peer_failed()


def _is_right(text: str, example: Example, answer: str) -> bool:
    """Whether a text is the answer; case counts if options differ in case alone (genotypes: Bb, BB)."""
    if len(set(map(normalise_answer, example.choices))) < len(example.choices):
        return " ".join(text.split()) == " ".join(answer.split())
    return exact_match(text, answer)


def _chosen(example: Example, scores: Sequence[float]) -> dict[str, Any]:
    """The fields of an output that depend on the log-likelihoods of its options."""

    def best(values: Sequence[float]) -> str:
        return example.choices[max(range(len(values)), key=values.__getitem__)]

    chosen = best(scores)
    per_character = [s / len(c.strip()) for s, c in zip(scores, example.choices, strict=True)]
    return {
        "choices": example.choices,
        "choice_scores": tuple(scores),
        "chosen": chosen,
        "choice_correct": _is_right(chosen, example, example.answer),
        "normalised_correct": _is_right(best(per_character), example, example.answer),
    }


def _grade(outputs: Sequence[Output], metrics: Sequence[str], scorer: Any) -> list[Output]:
    """Adds the scores of the generated texts to the outputs."""
    texts = [(output.generated or "").strip() for output in outputs]
    answers = [output.answer.strip() for output in outputs]
    found: dict[str, Iterable[Any]] = {}
    if "rouge_l" in metrics:
        found["rouge_l"] = map(rouge_l, texts, answers)
    if scorer is not None:
        found["bert_score"] = scorer.f1(texts, answers)
    if "final_number" in metrics:
        found["number_correct"] = map(same_number, texts, answers)
    if "exact_match" not in metrics:
        found["correct"] = [None] * len(outputs)
    for name, values in found.items():
        outputs = [replace(one, **{name: value}) for one, value in zip(outputs, values, strict=True)]
    return list(outputs)


def _details(
    metrics: Sequence[str], scorer: Any, answering: Any, use_choices: bool, score_ends: bool
) -> dict[str, Any]:
    details: dict[str, Any] = {}
    if "exact_match" in metrics:
        details["exact_match"] = "greedy answer; case folded, white space collapsed, nothing else"
    if use_choices:
        shared = getattr(getattr(answering, "scorer", None), "shares_prompts", None)
        details["choice_likelihood"] = {"end_scored": score_ends, "normalised_by": "characters of the option"}
        details["choice_likelihood"] |= {} if shared is None else {"options_share_prompts": shared}
    if "rouge_l" in metrics:
        details["rouge_l"] = f"rouge-score {metadata.version('rouge-score')}, F1, stemmed"
    if "final_number" in metrics:
        details["final_number"] = "number behind ####, else the last one; equal as numbers"
    if scorer is not None:
        details["bert_score"] = scorer.describe()
    return details


def _check_request(examples: Sequence[Example], metrics: Sequence[str]) -> bool:
    """Raises an error if the request cannot be met; returns whether to score the options."""
    if not examples:
        raise DataError("There are no examples to evaluate on.")
    use_choices = "choice_likelihood" in metrics and all(len(e.choices) >= 2 for e in examples)
    if not use_choices and set(metrics) <= {"choice_likelihood"}:
        raise ConfigError(
            "'choice_likelihood' is the only metric, but some examples have fewer than two options.",
            hint="Add 'exact_match' to the metrics, or give every example its options.",
        )
    if use_choices:
        blank = [e.id for e in examples if not all(choice.strip() for choice in e.choices)]
        if blank:
            raise DataError(
                f"{len(blank)} examples have an option without text: {', '.join(blank[:3])}.",
                hint="Correct the options of these rows, or leave out 'choice_likelihood'.",
            )
        stray = [e.id for e in examples if not any(exact_match(choice, e.answer) for choice in e.choices)]
        if stray:
            raise DataError(
                f"The answer of {len(stray)} examples is not among their options: {', '.join(stray[:3])}.",
                hint="Correct the answer or the options of these rows, or leave out 'choice_likelihood'.",
            )
    return use_choices
