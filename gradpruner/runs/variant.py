"""One row of the comparison, as a list of stages: pruned, measured, fine-tuned, and measured again."""

from __future__ import annotations

from typing import Any

from gradpruner.plans.reading import read_plan
from gradpruner.runs.directory import Stage
from gradpruner.runs.evaluation_data import data_identity, metrics_of_task
from gradpruner.runs.plan_names import STAGES
from gradpruner.runs.work import Work, journal

# What run.json says of a row -> the stage that found it, by its name in the manifest.
PARTS = {
    "repair": "repair {}",
    "pruning": "prune {}",
    "recovery": "recover {}",
    "before": "evaluate {} before",
    "finetune": "finetune {}",
    "evaluation": "evaluate {}",
    "lm_eval": "evaluate {} by lm-eval",
}


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
            "loading": self.job.loading,
        }
        samples = self.job.learned
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

    def stages(self) -> list[Stage]:
        """What is done for this row, in order."""
        name, pruned, tuned = self.name, self.prune_inputs, self.tune_inputs
        removes = self.plan is not None or self.shrinks
        recovers = self.method is not None and self.method.recover is not None
        options = self.recipe.evaluate
        before = self.trains and options.before_finetuning
        further = {task: metrics_of_task(task) for task in self.job.also}
        if self.recipe.data.validation is not None:
            further["validation"] = self.job.metrics
        asked = [options.lm_eval, options.lm_eval_folder, options.lm_eval_limit, options.batch_size]
        scored, by_harness = tuned | {"lm_eval": asked}, PARTS["lm_eval"].format(name)
        made = self.pruned, self.scratch, self.own_plan
        recovered, trained = (self.recovered, self.scratch), (self.tuned, self.checkpoints)
        table = [  # whether it is wanted, and its name, inputs, work, outputs, whether it resumes, and step
            (self.repairs, Stage(f"repair {name}", pruned, self.repair, [self.repaired], True, "prune")),
            (removes, Stage(f"prune {name}", pruned, self.prune, made, self.shrinks, "prune")),
            (recovers, Stage(f"recover {name}", tuned, self.recover, recovered, True, "prune")),
            (before, self._measuring("before", tuned if recovers else pruned)),
            (self.trains, Stage(f"finetune {name}", tuned, self.tune, trained, True, "finetune")),
            (True, self._measuring("", tuned)),
            *((True, self._measuring(f"on {task}", tuned, task, names)) for task, names in further.items()),
            (bool(options.lm_eval), Stage(by_harness, scored, self.run_harness, (), True, "evaluate")),
        ]
        return [stage for wanted, stage in table if wanted]

    def _measuring(
        self, what: str, model: dict[str, Any], rows: str = "eval", metrics: tuple[str, ...] = ()
    ) -> Stage:
        """A model, given by what it depends on, measured on `Job.rows`; `what` says when, or on what else."""
        metrics = metrics or self.job.metrics
        kept = {"batch_size", "max_new_tokens", "encoder", "encoder_layer"}
        inputs = {
            "eval": data_identity(self.job.rows(rows)),
            "evaluate": self.recipe.evaluate.model_dump(include=kept) | {"metrics": list(metrics)},
            "max_length": self.job.max_length,
            "seed": self.recipe.seed,
        }
        file = f"variants/{self.name}/examples{what and '_' + what.removeprefix('on ')}.jsonl"

        def work() -> dict[str, Any]:
            folder = self.source if what == "before" else self.outcome
            return self.measure(folder, file, rows, metrics)

        name = f"evaluate {self.name} {what}".rstrip()
        return Stage(name, model | inputs, work, (file, journal(file)), True, "evaluate")

    def up_to(self, depth: int) -> None:
        """Does the stages up to position `depth` of `STAGES`, except those that are current."""
        stages, directory = self.stages(), self.directory
        # With keep_models: none the folders are gone once measured; nothing needs them again then.
        cleared = self.recipe.keep_models == "none" and all(
            directory.is_current(stage) for stage in stages if stage.step == "evaluate"
        )
        for number, stage in enumerate(stages):
            makes = stage.step != "evaluate"  # or changes the model; the others only look at it
            if STAGES.index(stage.step) > depth:
                continue
            if not (cleared and makes and directory.result(stage.name) is not None):
                if makes and not directory.is_current(stage):
                    self._forget(stages[number + 1 :])
                directory.ensure(stage)
            if self.shrinks and stage.name == f"prune {self.name}":
                self.plan = read_plan((directory.result(stage.name) or {})["plan"])
        if self.recipe.keep_models == "none" and depth >= STAGES.index("evaluate"):
            directory.remove([self.repaired, self.pruned, self.recovered, self.checkpoints])
            if not (self.name == "dense" and self.recipe.tunes_first):  # which goes after all rows
                directory.remove([self.tuned])

    def _forget(self, later: list[Stage]) -> None:
        """Later results are of a model that is about to be replaced: they go."""
        done = [stage for stage in later if self.directory.result(stage.name) is not None]
        self.directory.forget(stage.name for stage in done)
        self.directory.remove([output for stage in done for output in stage.outputs])
