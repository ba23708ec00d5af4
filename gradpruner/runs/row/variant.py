"""The stages of one row of the comparison: repair, prune, evaluate, fine-tune, evaluate again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradpruner.common.run_names import row_file
from gradpruner.plans.reading import read_plan
from gradpruner.runs.folder.directory import Stage
from gradpruner.runs.folder.plan_names import STAGES
from gradpruner.runs.job.evaluation_data import data_identity, metrics_of_task
from gradpruner.runs.recipe.effects import keys_of
from gradpruner.runs.row.work import Work, journal

# Key of a row in run.json -> name of the stage whose result it is.
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
    """One row: what its stages depend on, and their order. The arguments are those of `work.Work`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._collect_inputs()

    def _collect_inputs(self) -> None:
        """Sets what pruning and fine-tuning depend on."""
        recipe = self.recipe
        self.prune_inputs: dict[str, Any] = {
            "model": self.job.model_sha256 if self.is_dense else self.job.origin_sha256,
            "plan": self.plan.to_dict() if self.plan else None,
            "loading": self.job.loading,
        }
        samples = self.job.learned
        if self.repairs:
            self.prune_inputs["repair"] = [*self.job.how_repaired, samples]
        tuning = recipe.finetune.model_dump(exclude=keys_of("finetune", "execution"))
        learned_from = samples | {"finetune": tuning} | self.job.spread
        if not self.is_dense and recipe.start != "base":
            # The rate it trains at counts, not the key: an unset key stands for a default that may change.
            rate = {"learning_rate": self.job.recover_rate} if recipe.recover.trains else {}
            learned_from["recover"] = recipe.recover.model_dump() | rate
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

    def stages(self) -> Iterator[Stage]:
        """The stages of this row, in order."""
        name, pruned, tuned = self.name, self.prune_inputs, self.tune_inputs
        recovers = self.method is not None and self.method.recover is not None
        options = self.recipe.evaluate
        if self.repairs:
            yield Stage(f"repair {name}", pruned, self.repair, [self.repaired], resumes=True, step="prune")
        if self.plan is not None or self.shrinks:
            outputs = [self.pruned, self.scratch, self.own_plan]
            yield Stage(f"prune {name}", pruned, self.prune, outputs, resumes=self.shrinks, step="prune")
        if recovers:
            outputs = [self.recovered, self.scratch]
            yield Stage(f"recover {name}", tuned, self.recover, outputs, resumes=True, step="prune")
        if self.trains:
            if options.before_finetuning:
                yield self._evaluation("before", tuned if recovers else pruned)
            outputs = [self.tuned, self.checkpoints]
            yield Stage(f"finetune {name}", tuned, self.tune, outputs, resumes=True, step="finetune")
        yield self._evaluation("", tuned)
        for task in self.job.also:
            yield self._evaluation(f"on {task}", tuned, task, metrics_of_task(task))
        if self.recipe.data.validation is not None:
            yield self._evaluation("on validation", tuned, "validation")
        if options.lm_eval:
            asked = [options.lm_eval, options.lm_eval_folder, options.lm_eval_limit, options.batch_size]
            by_harness, inputs = PARTS["lm_eval"].format(name), tuned | {"lm_eval": asked}
            yield Stage(by_harness, inputs, self.run_harness, resumes=True, step="evaluate")

    def _evaluation(
        self, what: str, model: dict[str, Any], rows: str = "eval", metrics: tuple[str, ...] = ()
    ) -> Stage:
        """The stage that evaluates this row's model.

        Args:
            what: "before" fine-tuning, "on TASK" for further rows, "" for the finished model on the recipe's.
            model: What the model depends on.
            rows: See `Job.rows`.
            metrics: () takes the job's.
        """
        metrics = metrics or self.job.metrics
        settings = {"batch_size", "max_new_tokens", "encoder", "encoder_layer"}
        inputs = {
            "eval": data_identity(self.job.rows(rows)),
            "evaluate": self.recipe.evaluate.model_dump(include=settings) | {"metrics": list(metrics)},
            "max_length": self.job.max_length,
            "seed": self.recipe.seed,
        }
        file = row_file(self.name, f"examples{what and '_' + what.removeprefix('on ')}.jsonl")

        def work() -> dict[str, Any]:
            folder = self.source if what == "before" else self.outcome
            return self.measure(folder, file, rows, metrics)

        name = f"evaluate {self.name} {what}".rstrip()
        return Stage(name, model | inputs, work, [file, journal(file)], resumes=True, step="evaluate")

    def up_to(self, depth: int) -> None:
        """Does the stages up to position `depth` of `STAGES`, except those that are done already."""
        stages, directory = list(self.stages()), self.directory
        # With keep_models: none the models are deleted after their evaluation, and not made again.
        cleared = self.recipe.keep_models == "none" and all(
            directory.is_current(stage) for stage in stages if stage.step == "evaluate"
        )
        for number, stage in enumerate(stages):
            makes = stage.step != "evaluate"  # the stage makes or changes a model
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
            if not (self.name == "dense" and self.recipe.tunes_first):  # other rows still need that model
                directory.remove([self.tuned])

    def _forget(self, later: list[Stage]) -> None:
        """Deletes the results of later stages, whose model is about to be replaced."""
        done = [stage for stage in later if self.directory.result(stage.name) is not None]
        self.directory.forget(stage.name for stage in done)
        self.directory.remove([output for stage in done for output in stage.outputs])
