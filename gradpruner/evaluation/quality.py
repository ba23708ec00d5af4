"""How well a model does its task: greedy answers, the likelihood of the options, and what they score.

Who answers is exchangeable: a loaded transformers model (`generation.LocalModel`) or a server that speaks the
OpenAI completions protocol (`endpoint.Endpoint`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from gradpruner.data.examples import Example
from gradpruner.errors import ConfigError, DataError, ResourceError
from gradpruner.evaluation.bertscore import DEFAULT_ENCODER, BertScorer
from gradpruner.evaluation.generation import Answer, LocalModel
from gradpruner.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    exact_match,
    normalise_answer,
    rouge_l,
    same_number,
)
from gradpruner.evaluation.outputs import Journal, Output, output_line, values_of
from gradpruner.evaluation.questions import Questions
from gradpruner.files import write_text
from gradpruner.models.sizes import PeakMemory
from gradpruner.progress import Progress
from gradpruner.registry import suggest
from gradpruner.world import World

METRICS = ("exact_match", "choice_likelihood", "rouge_l", "bert_score", "final_number")
"""What can be asked for."""

TASK_METRICS: Mapping[str, tuple[str, ...]] = {
    "accuracy": ("exact_match", "choice_likelihood"),
    "exact_match": ("exact_match",),
    "similarity": ("bert_score", "rouge_l", "exact_match", "choice_likelihood"),
    "final_number": ("final_number",),
}
"""What the metric of a task (`Task.metric`) asks for."""


class Answering(Protocol):
    """Whoever answers questions; see `generation.LocalModel` for the meaning of the methods."""

    batch_size: int

    def longest(self, max_length: int) -> int:
        """Most tokens of prompt and answer together."""
        ...

    def answers(
        self, questions: Questions, indices: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Greedy answers, batch by batch."""
        ...

    def option_scores(
        self, questions: Questions, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Log-likelihoods of options, batch by batch."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        metrics: Means with 95 % bootstrap intervals, fractions 0 to 1, the most telling first: "similarity"
            (the paper's half ROUGE-L, half BERTScore), "final_number", "exact_match", "choice_accuracy",
            "choice_accuracy_normalised" (likelihood per character), "bert_score", "rouge_l".
        seconds: Wall time of everything the model did.
        tokens_per_second: Tokens generated per second of generation, padding not counted; None when
            nothing was generated.
        peak_memory_bytes: Peak over the evaluation, see `sizes.PeakMemory`.
        outputs: One per example, in the order given.
        details: How the metrics were computed: implementation, encoder, layer, normalisation.
    """

    metrics: dict[str, Interval]
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int
    outputs: list[Output]
    details: dict[str, Any]

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
            "details": self.details,
        }

    def write_examples(self, path: str | Path) -> None:
        """Writes one JSON object per example and line; what was not measured is left out."""
        write_text(Path(path), "".join(map(output_line, self.outputs)))


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    metrics: Sequence[str] = TASK_METRICS["accuracy"],
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int = 2048,
    score_ends: bool = True,
    encoder: str = DEFAULT_ENCODER,
    encoder_layer: int | None = None,
    seed: int = 0,
    progress: str = "evaluate",
    journal: str | Path | None = None,
    world: World | None = None,
) -> Evaluation:
    """Measures a model on the examples of a task.

    "exact_match" decodes greedily up to the end-of-text token and compares the text with the
    answer; "rouge_l", "bert_score" and "final_number" look at the same text. "choice_likelihood"
    picks the option with the highest log-likelihood, end-of-text token included, so that an option
    which begins another one is scored as complete; it runs only if every example has at least two
    options. None depends on the batch size, beyond the rounding of the arithmetic.

    Args:
        model: A transformers causal language model, with or without PEFT adapters (it is put into
            eval mode and given back in the mode it came in), or an `endpoint.Endpoint`.
        tokenizer: Its tokenizer.
        examples: What to ask.
        metrics: Any of `METRICS`.
        batch_size: Prompts, or options, per forward pass; at least 1.
        max_new_tokens: Most tokens to generate; None for the longest answer plus 2.
        max_length: Most tokens of prompt and answer together; the model's positions bound it too. A
            longer prompt loses its beginning, as in training.
        score_ends: Whether the end-of-text token counts in the likelihood of an option.
        encoder: Model of BERTScore: a folder or a hub id.
        encoder_layer: Its layer; None for the library's choice.
        seed: Seed of the bootstrap.
        progress: What the progress bar says is being done.
        journal: File that keeps what is done; an interrupted evaluation of the same model and examples
            goes on from it.
        world: Processes that share the examples; every one must call this, and has the whole result.

    Raises:
        ConfigError: If an option is out of range or no metric can be computed.
        DataError: If there are no examples, or one has an empty prompt or an answer outside its
            options.
        NonFiniteError: If the model's likelihoods are NaN or infinite.
        ResourceError: If memory runs out.
    """
    use_choices = _check_request(examples, metrics, batch_size)
    scorer = bert_scorer(encoder, encoder_layer) if "bert_score" in metrics else None
    answering = model if hasattr(model, "option_scores") else LocalModel(model, tokenizer, batch_size)
    questions = Questions(tokenizer, examples, answering.longest(max_length), score_ends=score_ends)
    world = world or World()
    started = time.perf_counter()
    with (
        PeakMemory(getattr(model, "device", None)) as peak,
        Journal(journal, questions, world.rank) as outputs,
    ):
        try:
            speed = _ask(
                answering,
                questions,
                outputs,
                metrics,
                use_choices,
                max_new_tokens,
                progress,
                world.share(len(questions)),
            )
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"Memory ran out while evaluating with a batch size of {batch_size}.",
                hint="Choose a smaller evaluation batch size or maximum length.",
            ) from error
    whole = world.in_order([outputs[i] for i in world.share(len(questions))])
    graded = _grade(whole, metrics, scorer)
    details = _details(metrics, scorer, answering, use_choices, score_ends)
    return Evaluation(
        metrics=_intervals(graded, seed),
        seconds=time.perf_counter() - started,
        tokens_per_second=speed,
        peak_memory_bytes=peak.peak_bytes,
        outputs=graded,
        details=details,
    )


def bert_scorer(encoder: str, layer: int | None) -> Any:
    """Loads what computes BERTScore; see `bertscore.BertScorer`."""
    return BertScorer(encoder, layer, device="cuda" if torch.cuda.is_available() else "cpu")


def _ask(
    answering: Answering,
    questions: Questions,
    outputs: Journal,
    metrics: Sequence[str],
    use_choices: bool,
    max_new_tokens: int | None,
    progress: str,
    share: range,
) -> float | None:
    """Has every question of a share answered that has not been; returns tokens per second of generation."""
    examples = questions.examples
    generates = any(name != "choice_likelihood" for name in metrics)
    unanswered = [i for i in share if generates and outputs[i].generated is None]
    unscored = [i for i in share if use_choices and outputs[i].choice_scores is None]
    speed = None
    with Progress(len(share) * (generates + use_choices), progress) as bar:
        bar.advance(len(share) * (generates + use_choices) - len(unanswered) - len(unscored))
        if unanswered:
            num_tokens, began = 0, time.perf_counter()
            budget = max_new_tokens if max_new_tokens is not None else questions.most_new_tokens()
            matches = [bool(outputs[i].correct) for i in share if outputs[i].correct is not None]
            for batch, answers in answering.answers(questions, unanswered, budget):
                for i, answer in zip(batch, answers, strict=True):
                    text = questions.reading(i, answer.text)
                    correct = _is_right(text, examples[i], questions.reference(i))
                    outputs.note(i, generated=text, finished=answer.finished, correct=correct)
                    matches.append(correct)
                    num_tokens += answer.num_tokens
                outputs.flush()
                bar.advance(len(batch), exact_match=sum(matches) / len(matches))
            speed = num_tokens / (time.perf_counter() - began)
        if unscored:
            for batch, found in answering.option_scores(questions, unscored):
                for i, scores in zip(batch, found, strict=True):
                    outputs.note(i, **_chosen(examples[i], scores))
                outputs.flush()
                bar.advance(len(batch))
    return speed


def _is_right(text: str, example: Example, answer: str) -> bool:
    """Whether a text is the answer; case counts where options differ in nothing else (genotypes: Bb, BB)."""
    if len(set(map(normalise_answer, example.choices))) < len(example.choices):
        return " ".join(text.split()) == " ".join(answer.split())
    return exact_match(text, answer)


def _chosen(example: Example, scores: Sequence[float]) -> dict[str, Any]:
    """What the likelihoods of an example's options come to."""

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
    """Adds what the metrics say of the generated texts."""
    graded = list(outputs)
    texts = [(output.generated or "").strip() for output in outputs]
    answers = [output.answer.strip() for output in outputs]
    if "rouge_l" in metrics:
        overlaps = map(rouge_l, texts, answers)
        graded = [replace(o, rouge_l=found) for o, found in zip(graded, overlaps, strict=True)]
    if scorer is not None:
        found = scorer.f1(texts, answers)
        graded = [replace(o, bert_score=f1) for o, f1 in zip(graded, found, strict=True)]
    if "final_number" in metrics:
        graded = [
            replace(o, number_correct=same_number(t, a))
            for o, t, a in zip(graded, texts, answers, strict=True)
        ]
    if "exact_match" not in metrics:
        graded = [replace(o, correct=None) for o in graded]
    return graded


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
    if not use_choices and set(metrics) <= {"choice_likelihood"}:
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
    return {name: bootstrap_interval(values, seed=seed) for name, values in values_of(outputs).items()}
