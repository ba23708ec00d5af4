"""One row of the comparison, as a list of stages: pruned, measured, fine-tuned, and measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradpruner.data.examples import ExampleSet
from gradpruner.plans.reading import read_plan
from gradpruner.runs.directory import RunDirectory
from gradpruner.runs.evaluation_data import data_identity, metrics_of_task
from gradpruner.runs.plan_names import STAGES, label_of
from gradpruner.runs.work import Work, journal

# What a row says of its stages -> their names in the manifest.
PARTS = {
    "repair": "repair {}",
    "pruning": "prune {}",
    "recovery": "recover {}",
    "before": "evaluate {} before",
    "finetune": "finetune {}",
    "evaluation": "evaluate {}",
    "lm_eval": "evaluate {} by lm-eval",
}


@dataclass(frozen=True)
class Stage:
    """One arrow of a row.

    Attributes:
        step: Of `plan_names.STAGES`: how far a run has to go to do it.
        name: In the manifest.
        inputs: JSON values of everything its result depends on.
        work: Does it.
        outputs: What it writes, relative to the run directory.
        resumes: Whether it goes on from what an interrupted attempt left.
    """

    step: str
    name: str
    inputs: dict[str, Any]
    work: Callable[[], dict[str, Any]]
    outputs: tuple[str, ...] = ()
    resumes: bool = True

    @property
    def measures(self) -> bool:
        """Whether it only looks at the model; the other stages make it."""
        return self.step == "evaluate"


class Variant(Work):
    """One row: what its stages depend on, and their order. Arguments as for `work.Work`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fingerprint()

    def _fingerprint(self) -> None:
        """What the result of each stage depends on."""
        recipe = self.recipe
        self.prune_inputs: dict[str, Any] = {
            "model": self.job.model_sha256 if self.is_dense else self.job.origin_sha256,
            "plan": self.plan.to_dict() if self.plan else None,
            "loading": recipe.model.model_dump(exclude={"path"}),
        }
        samples = {
            "train": data_identity(self.job.train),
            "max_length": self.job.max_length,
            "seed": recipe.seed,
        }
        if self.repairs:
            self.prune_inputs["repair"] = [*self.job.how_repaired, samples]
        same = {"report_to", "save_steps", "fsdp", "deepspeed"}
        learned_from = samples | {"finetune": recipe.finetune.model_dump(exclude=same)} | self.job.spread
        if not self.is_dense and recipe.start != "base":
            learned_from["recover"] = recipe.recover.model_dump()
        if not self.is_dense and recipe.chooses_recovery and self.job.validation is not None:
            learned_from["validation"] = data_identity(self.job.validation)
        if not self.is_dense and recipe.distils:
            learned_from["distil"] = recipe.distil.model_dump() | {"model": self.job.model_sha256}
        if self.method and (self.shrinks or self.method.recover or self.method.callbacks):
            chosen = self.job.method_options(self.variant).model_dump(mode="json")
            trains: dict[str, Any] = {"method": self.variant, "options": chosen}
            trains |= {"budget": [self.job.num_remove, self.recipe.plan.unit]}
            self.prune_inputs |= {"trains": trains} | (learned_from if self.shrinks else {})
        if self.method and self.method.training:
            learned_from["training"] = self.method.training(self.context)
        self.tune_inputs = self.prune_inputs | learned_from

    def measure_inputs(self, examples: ExampleSet, metrics: tuple[str, ...]) -> dict[str, Any]:
        """What a measurement depends on beside the model."""
        kept = {"batch_size", "max_new_tokens", "encoder", "encoder_layer"}
        return {
            "eval": data_identity(examples),
            "evaluate": self.recipe.evaluate.model_dump(include=kept) | {"metrics": list(metrics)},
            "max_length": self.job.max_length,
            "seed": self.recipe.seed,
        }

    def stages(self) -> list[Stage]:
        """What is done for this row, in order."""
        name = self.name
        found: list[Stage] = []
        made: tuple[str, ...]
        recovers = self.method is not None and self.method.recover is not None
        if self.repairs:
            found.append(Stage("prune", f"repair {name}", self.prune_inputs, self.repair, (self.repaired,)))
        if self.plan is not None or self.shrinks:
            made = (self.pruned, self.scratch, self.own_plan)
            found.append(
                Stage("prune", f"prune {name}", self.prune_inputs, self.prune, made, resumes=self.shrinks)
            )
        if recovers:
            made = (self.recovered, self.scratch)
            found.append(Stage("prune", f"recover {name}", self.tune_inputs, self.recover, made))
        if self.trains:
            if self.recipe.evaluate.before_finetuning:
                inputs = self.tune_inputs if recovers else self.prune_inputs
                found.append(self._measuring("before", inputs, self.before, "eval", self.job.metrics))
            made = (self.tuned, self.checkpoints)
            found.append(Stage("finetune", f"finetune {name}", self.tune_inputs, self.tune, made))
        return found + self._measurements()

    def _measurements(self) -> list[Stage]:
        """The finished model on its task, on further ones, and by lm-eval."""
        found = [self._measuring("", self.tune_inputs, self.examples, "eval", self.job.metrics)]
        further = {task: metrics_of_task(task) for task in self.job.also}
        if self.recipe.data.validation is not None:
            further["validation"] = self.job.metrics
        for task, metrics in further.items():
            file = f"variants/{self.name}/examples_{task}.jsonl"
            found.append(self._measuring(f"on {task}", self.tune_inputs, file, task, metrics))
        options = self.recipe.evaluate
        if options.lm_eval:
            asked = [options.lm_eval, options.lm_eval_folder, options.lm_eval_limit, options.batch_size]
            name, inputs = PARTS["lm_eval"].format(self.name), self.tune_inputs | {"lm_eval": asked}
            found.append(Stage("evaluate", name, inputs, self.run_harness))
        return found

    def _measuring(
        self, what: str, model: dict[str, Any], file: str, rows: str, metrics: tuple[str, ...]
    ) -> Stage:
        """A model, given by what it depends on, measured on `Job.rows`; its answers go to `file`."""

        def work() -> dict[str, Any]:
            tuned = self.trains and what != "before"
            return self.measure(self.path(self.tuned) if tuned else self.source, file, rows, metrics)

        name = f"evaluate {self.name} {what}".rstrip()
        return Stage(
            "evaluate",
            name,
            model | self.measure_inputs(self.job.rows(rows), metrics),
            work,
            (file, journal(file)),
        )

    def up_to(self, depth: int) -> None:
        """Does the stages up to position `depth` of `STAGES`, except those that are current."""
        stages, directory = self.stages(), self.directory
        # With keep_models: none the folders are gone once measured; nothing needs them again then.
        cleared = self.recipe.keep_models == "none" and all(
            directory.is_current(stage.name, stage.inputs) for stage in stages if stage.measures
        )
        for number, stage in enumerate(stages):
            if STAGES.index(stage.step) > depth:
                continue
            if not (cleared and not stage.measures and directory.result(stage.name) is not None):
                if not stage.measures and not directory.is_current(stage.name, stage.inputs):
                    self._forget(stages[number + 1 :])
                directory.stage(
                    stage.name, stage.inputs, stage.work, stage.outputs, keep_partial=stage.resumes
                )
            if self.shrinks and stage.name == f"prune {self.name}":
                self.plan = read_plan((directory.result(stage.name) or {})["plan"])
        if self.recipe.keep_models == "none" and depth >= STAGES.index("evaluate"):
            directory.remove([self.repaired, self.pruned, self.recovered, self.checkpoints])
            if not (
                self.name == "dense" and self.recipe.tunes_first
            ):  # the pipeline removes it after all rows
                directory.remove([self.tuned])

    def _forget(self, later: list[Stage]) -> None:
        """What was said of a model that is made anew is said of nothing that is there."""
        done = [stage for stage in later if self.directory.result(stage.name) is not None]
        self.directory.forget(stage.name for stage in done)
        self.directory.remove([output for stage in done for output in stage.outputs])


def described(name: str, directory: RunDirectory) -> dict[str, Any]:
    """What the run record says of a row: all that the run directory holds of it, whenever it was done."""
    further = f"evaluate {name} on "
    found = {part: directory.result(stage.format(name)) for part, stage in PARTS.items()}
    also = {stage: directory.result(stage) for stage in directory.stages if stage.startswith(further)}
    return {
        "label": label_of(name, found["repair"] is not None),
        "plan": None,
        **found,
        "also": {stage.removeprefix(further): result for stage, result in also.items() if result is not None},
        "error": None,
    }
