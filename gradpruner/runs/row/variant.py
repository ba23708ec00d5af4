"""One compared model of a run: its folders, how it is made, and what its stages depend on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from gradpruner.common.run_names import row_file
from gradpruner.gradients.trace import GradientTrace, trace_digest
from gradpruner.methods import METHODS, MethodContext
from gradpruner.plans.reading import Plan
from gradpruner.runs.folder.directory import RunDirectory
from gradpruner.runs.folder.plan_names import LABELS, own_plan, tuned_folder, variant_of
from gradpruner.runs.job.evaluation_data import data_identity
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.effects import keys_of


class Variant:
    """One compared model; `work` makes and measures it, and `stages` says in which order.

    Args:
        name: Its row in the run directory: "dense", "merged", "dropped" or a method of `METHODS`. With
            several plans of one kind, "merged@NAME".
        plan: What is pruned; None for the dense model, and for methods that plan while they train.
        trace: Opens the recorded gradients; called only if layers are merged.
    """

    def __init__(
        self,
        job: Job,
        directory: RunDirectory,
        name: str,
        plan: Plan | None,
        trace: Callable[[], GradientTrace],
    ) -> None:
        self.job, self.recipe, self.directory = job, job.recipe, directory
        self.name, self.plan, self.trace = name, plan, trace
        self.kind = variant_of(name)
        self.method = METHODS.find(self.kind) if self.kind not in LABELS else None
        self.pruned, self.recovered = row_file(name, "pruned"), row_file(name, "recovered")
        self.repaired, self.scratch = row_file(name, "repair"), row_file(name, "method")
        self.checkpoints = row_file(name, "checkpoints")
        self.own_plan, self.tuned = own_plan(name), tuned_folder(name)

    def path(self, relative: str) -> Path:
        """A path inside the run directory."""
        return self.directory.path / relative

    @property
    def starts_dense(self) -> bool:
        """Whether it starts from the model as given: dense, or a method that sets its own training."""
        return self.name == "dense" or (self.method is not None and self.method.training is not None)

    @property
    def trains(self) -> bool:
        """Whether it is trained: fine-tuned or, if a tuned model was pruned, recovered."""
        if self.starts_dense:
            return self.recipe.start != "given"
        return self.recipe.trains_pruned

    @property
    def repairs(self) -> bool:
        """Whether linears of the kept layers are refitted."""
        wanted = self.recipe.plan.repair != "none"
        return wanted and self.plan is not None and bool(self.plan.pruned)

    @property
    def shrinks(self) -> bool:
        """Whether the method prunes while it trains."""
        return self.method is not None and self.method.shrink is not None

    @property
    def recovers(self) -> bool:
        """Whether the method brings a recovery of its own."""
        return self.method is not None and self.method.recover is not None

    @property
    def compares(self) -> bool:
        """Whether validation rows decide if its training is kept."""
        return not self.starts_dense and self.recipe.chooses_recovery

    @property
    def context(self) -> MethodContext:
        """What its method may look at."""
        return self.job.context(self.kind, self.trace, self.path(self.scratch))

    @property
    def source(self) -> Path:
        """Folder of the model before fine-tuning."""
        if self.recovers:
            return self.path(self.recovered)
        if self.plan is not None:
            return self.path(self.pruned)
        return self.origin

    @property
    def origin(self) -> Path:
        """Folder of the model it was made from, before it was pruned."""
        return self.job.folder if self.starts_dense else self.job.origin

    @property
    def origin_name(self) -> str:
        """What its records call that model: as the recipe names it, or the folder of the tuned model."""
        return self.recipe.model.path if self.origin == self.job.folder else str(self.origin)

    @property
    def outcome(self) -> Path:
        """Folder of the finished model."""
        return self.path(self.tuned) if self.trains else self.source

    @cached_property
    def prune_inputs(self) -> dict[str, Any]:
        """What the pruned model depends on."""
        job = self.job
        found: dict[str, Any] = {
            "model": job.model_sha256 if self.starts_dense else job.origin_sha256,
            "plan": self.plan.to_dict() if self.plan else None,
            "loading": job.loading,
        }
        if self.repairs:
            found["repair"] = [*job.repair_inputs, job.learned]
        if self.plan is not None and self.plan.kind == "layers" and self.plan.needs_trace:
            digest = trace_digest(self.trace())
            if digest != self.plan.evidence.get("trace"):  # made elsewhere
                found["trace"] = digest
        if self.method and (self.shrinks or self.recovers or self.method.callbacks):
            chosen = job.method_options(self.kind).model_dump(mode="json")
            budget = [job.num_remove, self.recipe.plan.unit]
            found["trains"] = {"method": self.kind, "options": chosen, "budget": budget}
        return found | (self._training_inputs if self.shrinks else {})

    @cached_property
    def tune_inputs(self) -> dict[str, Any]:
        """What the finished model depends on."""
        own = self.method.training(self.context) if self.method and self.method.training else None
        return self.prune_inputs | self._training_inputs | ({} if own is None else {"training": own})

    @cached_property
    def _training_inputs(self) -> dict[str, Any]:
        """What training depends on, besides the model it starts from."""
        job, recipe = self.job, self.recipe
        tuning = recipe.finetune.model_dump(exclude=keys_of("finetune", "execution"))
        found = job.learned | {"finetune": tuning} | job.spread
        if not self.starts_dense and recipe.start != "base":
            # The rate it trains at counts, not the key: an unset key stands for a default that may change.
            rate = {"learning_rate": job.recover_rate} if recipe.recover.trains else {}
            found["recover"] = recipe.recover.model_dump() | rate
        if self.compares and job.validation is not None:
            found["validation"] = data_identity(job.validation)
        if not self.starts_dense and recipe.distils:
            found["distil"] = recipe.distil.model_dump() | {"model": job.model_sha256}
        return found
