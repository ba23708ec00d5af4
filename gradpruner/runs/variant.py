"""One row of the comparison: a variant is pruned, measured, fine-tuned and measured again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gradpruner.data.examples import ExampleSet
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.runs.evaluation_data import metrics_of_task
from gradpruner.runs.job import STAGES, data_identity, label_of
from gradpruner.runs.work import Work, journal


class Variant(Work):
    """One row: repair, prune, measure, fine-tune, measure; each its own stage. Arguments as for `work.Work`.

    Attributes:
        row: What the run record says of it, filled in stage by stage.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.row: dict[str, Any] = {
            "label": label_of(self.name),
            "plan": self.name if self.plan is not None else None,
            "repair": None,
            "pruning": None,
            "recovery": None,
            "before": None,
            "finetune": None,
            "evaluation": None,
            "also": {},
            "lm_eval": None,
            "error": None,
        }
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
            self.prune_inputs["repair"] = [recipe.plan.repair, recipe.plan.repair_rows, samples]
        learned_from = samples | {"finetune": recipe.finetune.model_dump(exclude={"report_to", "save_steps"})}
        if not self.is_dense and recipe.start != "base":
            learned_from["recover"] = recipe.recover.model_dump()
        if not self.is_dense and recipe.distils:
            learned_from["distil"] = recipe.distil.model_dump() | {"model": self.job.model_sha256}
        if self.method and (self.shrinks or self.method.recover or self.method.callbacks):
            chosen = self.job.method_options(self.name).model_dump(mode="json")
            trains: dict[str, Any] = {"method": self.name, "options": chosen}
            trains |= {"budget": [self.job.num_remove, self.recipe.plan.unit]}
            self.prune_inputs |= {"trains": trains} | (learned_from if self.shrinks else {})
        if self.method and self.method.training:
            learned_from["training"] = self.method.training(self.context)
        self.tune_inputs = self.prune_inputs | learned_from
        measure = self.measure_inputs(self.job.eval, self.job.metrics)
        recovers = self.method is not None and self.method.recover is not None
        self.before_inputs = (self.tune_inputs if recovers else self.prune_inputs) | measure
        self.after_inputs = self.tune_inputs | measure
        self.also_inputs = {
            name: self.tune_inputs | self.measure_inputs(found, metrics_of_task(name))
            for name, found in self.job.also.items()
        }
        options = self.recipe.evaluate
        self.lm_eval_inputs = self.tune_inputs | {
            "lm_eval": [options.lm_eval, options.lm_eval_folder, options.lm_eval_limit, options.batch_size]
        }

    def measure_inputs(self, examples: ExampleSet, metrics: tuple[str, ...]) -> dict[str, Any]:
        """What a measurement depends on beside the model."""
        kept = {"batch_size", "max_new_tokens", "encoder", "encoder_layer"}
        return {
            "eval": data_identity(examples),
            "evaluate": self.recipe.evaluate.model_dump(include=kept) | {"metrics": list(metrics)},
            "max_length": self.job.max_length,
            "seed": self.recipe.seed,
        }

    def up_to(self, depth: int) -> None:
        """Does the stages up to position `depth` of `STAGES`, except those that are current."""
        finetunes = depth >= STAGES.index("finetune") and self.trains
        evaluates = depth >= STAGES.index("evaluate")
        wants_before = self.recipe.evaluate.before_finetuning and evaluates and self.trains
        # With keep_models: none the folders are gone once measured; nothing needs them again then.
        cleared = self.recipe.keep_models == "none" and self._is_measured(wants_before)
        if self.repairs:
            self.row["repair"] = self._result("repair", cleared) or self.stage(
                "repair", self.prune_inputs, self.repair, [self.repaired]
            )
        if self.plan is not None or self.shrinks:
            self.row["pruning"] = self._result("prune", cleared) or self.stage(
                "prune", self.prune_inputs, self.prune, [self.pruned, self.scratch]
            )
        if self.shrinks:
            self.plan = WidthPlan.from_dict(self.row["pruning"]["plan"])
            self.row["plan"] = self.name
        if self.method and self.method.recover:
            self.row["recovery"] = self._result("recover", cleared) or self.stage(
                "recover", self.tune_inputs, self.recover, [self.recovered, self.scratch]
            )
        if wants_before:
            self.row["before"] = self.stage(
                "evaluate",
                self.before_inputs,
                lambda: self.measure(self.source, self.before, self.job.eval, self.job.metrics),
                [self.before, journal(self.before)],
                " before",
            )
        if finetunes:
            self.row["finetune"] = self._result("finetune", cleared) or self.stage(
                "finetune", self.tune_inputs, self.tune, [self.tuned, self.checkpoints]
            )
        if evaluates:
            self._evaluate()
            if self.recipe.keep_models == "none":
                self.directory.remove([self.repaired, self.pruned, self.recovered, self.checkpoints])
                if not (
                    self.name == "dense" and self.job.needs_tuned
                ):  # the pipeline removes it after all rows
                    self.directory.remove([self.tuned])
        self._describe_size()

    def _evaluate(self) -> None:
        """Measures the fine-tuned model on its task, on further ones, and by lm-eval."""
        tuned = self.path(self.tuned) if self.trains else self.source
        self.row["evaluation"] = self.stage(
            "evaluate",
            self.after_inputs,
            lambda: self.measure(tuned, self.examples, self.job.eval, self.job.metrics),
            [self.examples, journal(self.examples)],
        )
        for name, found in self.job.also.items():
            file = f"variants/{self.name}/examples_{name}.jsonl"
            self.row["also"][name] = self.stage(
                "evaluate",
                self.also_inputs[name],
                partial(self.measure, tuned, file, found, metrics_of_task(name)),
                [file, journal(file)],
                f" on {name}",
            )
        if self.recipe.evaluate.lm_eval:
            self.row["lm_eval"] = self.stage(
                "evaluate", self.lm_eval_inputs, self.run_harness, [], " by lm-eval"
            )

    def _is_measured(self, wants_before: bool) -> bool:
        asked = {"": self.after_inputs}
        asked |= {" before": self.before_inputs} if wants_before else {}
        asked |= {f" on {name}": inputs for name, inputs in self.also_inputs.items()}
        asked |= {" by lm-eval": self.lm_eval_inputs} if self.recipe.evaluate.lm_eval else {}
        return all(self.directory.is_current(f"evaluate {self.name}{s}", i) for s, i in asked.items())

    def _result(self, verb: str, cleared: bool) -> dict[str, Any] | None:
        """What a stage found whose folder is gone because nothing needs it any more."""
        done = self.directory.stages.get(f"{verb} {self.name}", {})
        return done.get("result") if cleared else None

    def stage(
        self,
        verb: str,
        inputs: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        outputs: list[str],
        suffix: str = "",
    ) -> dict[str, Any]:
        """One stage of this row in the run directory."""
        return self.directory.stage(
            f"{verb} {self.name}{suffix}", inputs, work, outputs, keep_partial=verb != "prune" or self.shrinks
        )

    def _describe_size(self) -> None:
        found = self.job.savings_of(self.plan or PruningPlan.from_keep(self.job.num_layers, self._all_layers))
        self.row["num_layers"] = found["layers"]["after"]
        self.row["num_parameters"] = found["parameters"]["after"]

    @property
    def _all_layers(self) -> range:
        return range(self.job.num_layers)
