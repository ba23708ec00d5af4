"""The plan of one variant: read from the recipe's file, made from scores, or decided by the method itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradpruner.common.provenance import sha256_file
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import METHODS, MethodContext
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import Plan, load_plan, read_plan
from gradpruner.runs.folder.directory import RunDirectory, Stage, inputs_hash
from gradpruner.runs.folder.plan_names import (
    LABELS,
    method_of,
    own_plan,
    plan_file,
    scores_file,
    takes_given_plan,
)
from gradpruner.runs.job.budget import plan_for
from gradpruner.runs.job.evaluation_data import data_identity
from gradpruner.runs.job.inputs import encoder_content
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.effects import keys_of
from gradpruner.runs.row.depth_search import refuse_uncertified, search_depth


class Planning:
    """Makes the plan of one variant, or finds it in the run directory.

    With `plan.max_loss`, the number of layers is searched for first (depth_search.py).

    Args:
        variant: An entry of the recipe's `variants`, not "dense".
        scored: Name and scores of its method; None if no scores are needed.
        context: Gives what such a method may look at.
    """

    def __init__(
        self,
        job: Job,
        directory: RunDirectory,
        variant: str,
        scored: tuple[str, LayerScores] | None,
        context: Callable[[], MethodContext],
    ) -> None:
        self.job, self.directory, self.variant = job, directory, variant
        self.context = context
        self.scores_name: str | None = scored[0] if scored else None
        self.scores: LayerScores | None = scored[1] if scored else None
        self.method = METHODS.find(method_of(variant))
        self.given: PruningPlan | None = job.given_plan if takes_given_plan(variant) else None
        limited = job.recipe.plan.max_loss is not None
        self.searches = limited and self.method.score is not None and self.given is None
        self.inputs = self._inputs()
        self.search_inputs = self.inputs | self._search_inputs() if self.searches else {}

    def _inputs(self) -> dict[str, Any]:
        """What the plan depends on."""
        name = method_of(self.variant)
        if not self.method.score:
            return self.job.decision_inputs(name)
        file = self.directory.path / scores_file(self.scores_name) if self.scores_name else None
        settings = self.job.recipe.plan.model_dump(exclude=keys_of("plan", "choice", "depth", "repair"))
        return {
            "scores": sha256_file(file) if file else None,
            "plan": settings | self.method.plan_options,
            "given": self.given.to_dict() if self.given else None,
            "variant": self.variant,
        }

    def _search_inputs(self) -> dict[str, Any]:
        """What the number of layers depends on, besides what the plan depends on."""
        options, validation = self.job.recipe.plan, self.job.validation
        assert validation is not None
        asked = self.job.recipe.evaluate
        encoder: dict[str, Any] = {"encoder": [asked.encoder, asked.encoder_layer]} if asked.encoder else {}
        encoder |= encoder_content(asked, self.job.metrics)
        return encoder | {
            "model": self.job.origin_sha256,
            "train": data_identity(self.job.train),
            "validation": data_identity(validation),
            "limit": [options.max_loss, options.confidence, *self.job.repair_inputs],
            "metrics": list(self.job.metrics),
            "answers": [self.job.recipe.evaluate.max_new_tokens, self.job.max_length],
            "loading": self.job.loading,
            "seed": self.job.recipe.seed,
        }

    def make(self, num_prune: int | None = None) -> Plan:
        """Makes the plan; `num_prune` replaces the recipe's budget."""
        if self.given:
            return self.given if self.variant == "merged" else self.given.without_merging()
        if self.method.plan:
            return self.method.plan(self.context())
        return self._plan_by_scores(num_prune)

    def _plan_by_scores(self, num_prune: int | None) -> PruningPlan:
        assert self.scores is not None
        merging = self.variant == "merged" or (self.method.merges and self.variant not in LABELS)
        return plan_for(self.job, self.scores, merging, self.method.plan_options, num_prune)

    def plan_in(self, row: str) -> Plan | None:
        """The plan this recipe makes, if the run directory already has it in `row`; else None."""
        if self.searches:
            search = self.directory.result(f"search {row}")
            if search and search["best"] and self.directory.is_done(f"search {row}", self.search_inputs):
                return self.make(search["best"])
            return None
        done = self.directory.is_done(f"plan {row}", self.inputs)
        recorded = stored_plan(self.directory, row)
        if self.method.plan:  # may compute for hours, so it is not called to compare
            return recorded if done else None
        plan = self.make()
        return plan if done or same_plan(recorded, plan) else None

    def make_in(self, row: str) -> Plan:
        """Searches and makes the plan of a row, unless done before; returns what plans/<row>.json says."""
        file, inputs = plan_file(row), self.inputs
        if self.searches:
            search = self.directory.ensure(Stage(f"search {row}", self.search_inputs, self._search))
            inputs = inputs | {"num_prune": refuse_uncertified(search)}

        def work() -> dict[str, Any]:
            plan = self.make(inputs.get("num_prune"))
            plan.save(self.directory.path / file)
            return self.job.savings_of(plan) | {"scores": self.scores_name}

        self.directory.ensure(Stage(f"plan {row}", inputs, work, [file]))
        return load_plan(self.directory.path / file)

    def _search(self) -> dict[str, Any]:
        """Tuned model, scores and validation rows -> how many layers may go"""
        return search_depth(self.job, self._plan_by_scores, self.directory.path / "trace")


def stored_plan(directory: RunDirectory, row: str) -> Plan | None:
    """The plan of a row as it was decided; None if there is none, or only a file that was edited since."""
    shrunk = (directory.result(f"prune {row}") or {}).get("plan")
    if shrunk is not None:
        return read_plan(shrunk)
    if directory.result(f"plan {row}") is not None and directory.has_files(f"plan {row}"):
        return load_plan(directory.path / plan_file(row))
    path = directory.path / own_plan(row)
    return load_plan(path) if path.is_file() else None


def same_plan(one: Plan | None, other: Plan | None) -> bool:
    """Whether both plans are there and say the same."""
    return (
        one is not None and other is not None and inputs_hash(one.to_dict()) == inputs_hash(other.to_dict())
    )
