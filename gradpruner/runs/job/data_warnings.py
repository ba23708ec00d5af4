"""Warnings about the data of a job, its training and its scores, given before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradpruner.common.errors import IntegrityError
from gradpruner.common.json_files import read_object
from gradpruner.data.chat import template_notes
from gradpruner.data.chat_templates import foreign_markers
from gradpruner.data.vocabulary import check_vocabulary, vocabulary_notes
from gradpruner.evaluation.metrics import majority_class
from gradpruner.runs.job.evaluation_data import unequal_labels, was_held_out
from gradpruner.training.finetuning import chosen_accumulation, planned_steps

if TYPE_CHECKING:
    from gradpruner.runs.job.inputs import Inputs

_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0}
_GREEDY |= {"min_length": 0, "min_new_tokens": 0}
"""Keys of a generation config that change answers, with the values by which scores are measured."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # no effect without do_sample

FEW_STEPS = 60
"""With fewer optimizer steps, a model rarely learns a task; see benchmarks/LOG.md."""


def warnings_of(inputs: Inputs) -> list[str]:
    """Returns all warnings: too few steps, rows in two sets, cut prompts, notes from reading and encoding.

    Raises:
        ModelError: If the tokenizer has tokens that the model does not have.
        DataError: If a prompt is empty.
    """
    found = [note for note in (too_few_steps(inputs), _long_answers(inputs), _uneven_spaces(inputs)) if note]
    found += _cut_prompts(inputs)
    asked = {"evaluation": inputs.eval} if inputs.measures else {}
    if inputs.validation is not None and inputs.recipe.data.validation is not None:
        asked["validation"] = inputs.validation  # those held out of the training rows have the same labels
    found += unequal_labels(inputs.train, asked)
    if inputs.validation_overlap:
        found.append(
            f"{inputs.validation_overlap} of {len(inputs.validation or ())} validation prompts also occur in "
            "the training data: what they decide is not checked on new rows."
        )
    found += [*_doubtful_measurements(inputs), *_other_decoding(inputs)] if inputs.measures else []
    found += _notes_of_rows(inputs)
    ends = {one.input_ids[-1] for one in inputs.samples.encoded if not one.cut_answer_tokens}
    found += [
        f"{n[0].upper()}{n[1:]}{'' if n.endswith('?') else '.'}"
        for n in vocabulary_notes(inputs.tokenizer, inputs.text, ends)
    ]
    found += [f"training data: {note}" for note in inputs.samples.notes()]
    held_out = {
        "validation": was_held_out(inputs.train, "validation"),
        "eval": inputs.measures and was_held_out(inputs.train, "evaluation"),
    }
    for key in (key for key, holds in held_out.items() if holds and inputs.recipe.start == "given"):
        rows = "Validation" if key == "validation" else "Evaluation"
        found.append(
            f"{rows} rows are held out of the training rows, and the model may have been tuned on those: "
            f"give rows that it has not seen as data.{key}."
        )
    return found


def not_tuned(inputs: Inputs, measured: Mapping[str, Any] | None) -> str:
    """Returns a warning if a model given as tuned is no better than the most frequent answer; or ""."""
    score = measured["metrics"].get("exact_match") if measured and inputs.recipe.start == "given" else None
    most_frequent = majority_class([example.answer for example in inputs.eval.examples]) if score else 0.0
    if score is None or score["value"] > most_frequent:
        return ""
    return (
        f"The model answers {score['value']:.1%} of {score['n']} rows right; always giving the most frequent "
        f"answer would get {most_frequent:.1%}: was it tuned on this task? A pruned model is rarely better. "
        "`gradpruner run` tunes a base model."
    )


def too_few_steps(inputs: Inputs) -> str:
    """Returns a warning if fine-tuning is too short to teach a task, with what to set; "" if it is not."""
    tuning, steps = inputs.recipe.finetune, inputs.finetune_steps
    if inputs.recipe.start == "given" or steps >= FEW_STEPS:
        return ""
    passes = chosen_accumulation(len(inputs.samples), tuning)

    def steps_with(accumulation: int) -> int:
        return planned_steps(len(inputs.samples), tuning.model_copy(update={"accumulation": accumulation}))

    enough = [n for n in range(1, passes) if steps_with(n) >= FEW_STEPS]
    if enough:
        advice = f"finetune.accumulation={enough[-1]} makes it {steps_with(enough[-1])}"
    else:
        epochs = math.ceil(tuning.epochs * FEW_STEPS / steps_with(1))
        first = "finetune.accumulation=1 --set " if passes > 1 else ""
        advice = f"{first}finetune.epochs={epochs} makes it {FEW_STEPS} or more"
    return (
        f"{steps} optimizer steps ({len(inputs.samples)} rows x {tuning.epochs:g} epochs, "
        f"{tuning.batch_size} x {passes} rows a step): models rarely learn a task in fewer than "
        f"{FEW_STEPS}. --set {advice}."
    )


def _long_answers(inputs: Inputs) -> str:
    """Returns a warning if many layers are removed from a model that writes sentences; or ""."""
    recipe, plan = inputs.recipe, inputs.recipe.plan
    few = plan.num_prune is not None and plan.num_prune <= inputs.num_layers / 10
    if not inputs.has_long_answers or few or plan.max_loss is not None:
        return ""
    advice = ""
    if recipe.start == "base" and "last" in recipe.variants:
        advice = " Without the last layers they lose most; the gate chooses better: 'variants=[dense, gate]'."
    elif recipe.effort == "fast" and recipe.variants == ["dense", "gate"]:
        advice = " Effort fast lets the gate choose the layers here; without the last ones they lose most."
    return (
        f"Answers have {inputs.answer_tokens:.0f} tokens on average. Models that write sentences lose far "
        "more by pruning than models that answer in a few tokens (docs/quality.md). Let plan.max_loss find "
        f"how many layers may go, and train the pruned model further (recover).{advice}"
    )


def leading_spaces(inputs: Inputs) -> list[int] | None:
    """Returns how many answers begin with a space, and the number of answers; None for conversations.

    In conversations, the chat template decides about spaces.
    """
    plain = [example.answer for example in inputs.train.examples if not example.messages]
    return [sum(answer[:1].isspace() for answer in plain), len(plain)] if plain else None


def _uneven_spaces(inputs: Inputs) -> str:
    spaces = leading_spaces(inputs)
    if spaces is None or spaces[0] in (0, spaces[1]):
        return ""
    return (
        f"{spaces[0]} of {spaces[1]} answers begin with a space and the others do not, so the same word is "
        "learned as two different tokens."
    )


def _doubtful_measurements(inputs: Inputs) -> list[str]:
    """Warnings about evaluation rows that make the figures less reliable."""
    found = []
    if inputs.overlap:
        found.append(
            f"{inputs.overlap} of {len(inputs.eval)} evaluation prompts also occur in the training data."
        )
    if len(inputs.eval) < 100:
        found.append(f"Only {len(inputs.eval)} evaluation examples: differences of several points are noise.")
    return found


def _other_decoding(inputs: Inputs) -> list[str]:
    """Warns of a generation config by which the model, once it is served, answers otherwise than measured."""
    path = inputs.folder / "generation_config.json"
    try:
        given = read_object(path, "generation config", dict[str, Any]) if path.is_file() else {}
    except IntegrityError:  # transformers does without it
        given = {}
    asked = {**_GREEDY, **(dict.fromkeys(_SAMPLING) if given.get("do_sample") else {})}
    other = [f"{key}: {json.dumps(given[key])}" for key in asked if given.get(key) not in (None, asked[key])]
    if not other:
        return []
    return [
        f"Scores are of greedy answers, but the model's generation_config.json says {', '.join(other)}, and "
        "whoever serves the model gets answers by that. To serve it as measured: temperature 0 in every "
        "request, and `vllm serve --generation-config vllm` (docs/serving.md)."
    ]


def _notes_of_rows(inputs: Inputs) -> list[str]:
    """What was left out or changed when each set was read and put into the chat template."""
    found = []
    sets = {
        "training": inputs.train,
        "evaluation": inputs.eval,
        "validation": inputs.validation,
        **inputs.also,
    }
    for name, examples in sets.items():
        if examples is None or (name == "validation" and inputs.recipe.data.validation is None):
            continue  # held out of the training rows, which have their own notes
        if name == "evaluation" and not inputs.measures:
            continue
        telling = ("not used", "dropped", "has these columns too")
        notes = [note for note in examples.notes if any(part in note for part in telling)]
        notes += template_notes(inputs.tokenizer, examples.examples)
        texts = {row.id: f"{row.prompt}{row.answer}" for row in examples.examples if not row.messages}
        notes += filter(None, [foreign_markers(inputs.tokenizer, texts)])
        found += [f"{name} data: {note}" for note in notes]
    return found


def _cut_prompts(inputs: Inputs) -> list[str]:
    """Warns of evaluation prompts that are too long; refuses too long answers and unknown tokens."""
    found = []
    vocabulary = int(inputs.text.vocab_size)
    check_vocabulary(inputs.tokenizer, vocabulary, (one.input_ids for one in inputs.samples.encoded))
    for name in ("eval", *inputs.also) if inputs.measures else ():
        questions, called = inputs.questions(name), "evaluation" if name == "eval" else name
        check_vocabulary(inputs.tokenizer, vocabulary, questions.prompts)
        budget = inputs.recipe.evaluate.max_new_tokens or questions.most_new_tokens()
        questions.cut_prompt(0, budget)  # refuses answers that leave no room
        cut = questions.num_cut(budget)
        if cut:
            found.append(
                f"{called} data: {cut} of {len(questions)} prompts are cut from the left to fit into "
                f"{inputs.max_length} tokens beside the answer."
            )
    return found
