"""run.json and study.json as types; `fields` says how missing and malformed values are read."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, AliasPath, BeforeValidator, Field

from gradpruner.reports.fields import (
    Count,
    Each,
    Fields,
    JsonPart,
    Known,
    Measured,
    Metrics,
    Named,
    Number,
    Text,
    Values,
    count,
)

PENDING = ("not run yet", "not finished")
"""Values of `error` that mean a row has not run yet, so that an unfinished study still gives a report."""


def _at(*path: str, default: Any = None) -> Any:
    """Returns a field whose value is nested deeper in the JSON."""
    return Field(default=default, validation_alias=AliasPath(*path))


class Evaluated(JsonPart):
    """An evaluation: its metrics, time and memory."""

    metrics: Metrics = {}
    seconds: Number = None
    tokens_per_second: Number = None
    peak_memory_bytes: Number = None
    per_example: Text = None


class Harnessed(JsonPart):
    """The scores of one task of lm-evaluation-harness."""

    metrics: Annotated[dict[str, Measured], Named] = {}
    n: Count = None


class Kept(JsonPart):
    """Which model was kept after recovery, with the losses on validation rows, in nats per token."""

    model: Any = None
    before: Number = None
    after: Number = None
    rows: Number = None


class Trained(JsonPart):
    """A training (fine-tuning, recovery or recording): its losses, time and memory."""

    steps: Number = None
    losses: Values = []
    seconds: Number = None
    peak_memory_bytes: Number = None
    trainable_parameters: Number = None
    tokens: Number = None
    resumed_from: Number = None
    measured_from: Number = None
    output: Any = None
    kept: Kept | None = None


class Check(JsonPart):
    """One check of a pruned model."""

    name: Any = None
    passed: Any = None
    detail: Any = None


class Verified(JsonPart):
    """The checks of a pruned model before it was used."""

    level: Any = None
    passed: Any = None
    checks: Annotated[list[Check], Each] = []


class Cut(JsonPart):
    """A repaired cut."""

    gone: Values = []
    linear: Any = None
    layer: Number = None
    ridge: Number = None
    error_before: Number = None
    error_after: Number = None


class Cost(JsonPart):
    """The whole cost of a row: seconds by part and in total, and tokens of training."""

    seconds: Annotated[dict[str, Number], Named] = {}
    method_seconds: Number = None
    method_peak_memory_bytes: Number = None
    tokens: Number = None
    resumed: Values = []


class VariantRecord(JsonPart):
    """A row of a run."""

    label: Any = None
    plan: Any = None
    error: Any = None
    num_layers: Count = None
    num_parameters: Count = None
    before: Evaluated = Evaluated()
    evaluation: Evaluated = Evaluated()
    also: Annotated[dict[str, Evaluated], Named] = {}
    paired: Annotated[dict[str, Metrics], Named] = {}
    finetune: Trained = Trained()
    recovery: Trained = Trained()
    verified: Verified = _at("pruning", "verified", default=Verified())
    repair_kind: Any = _at("repair", "kind")
    cuts: Annotated[list[Cut], Each] = _at("repair", "cuts", default=[])
    cost: Cost = Cost()
    lm_eval: Annotated[dict[str, Harnessed], Named] = _at("lm_eval", "tasks", default={})


class Action(JsonPart):
    """What a plan does with one layer: keep, drop or merge (`into` is the layer it is merged into)."""

    layer: Annotated[Any, BeforeValidator(count)] = None
    action: Any = None
    into: Count = None


def _in_layer_order(actions: list[Action]) -> list[Action]:
    return sorted((action for action in actions if action.layer is not None), key=lambda a: a.layer)


class Change(JsonPart):
    """A quantity before and after pruning."""

    before: Number = None
    after: Number = None


class Engine(JsonPart):
    """Whether an engine can serve the model that a plan leaves."""

    engine: Any = None
    status: Any = None
    reason: Any = None
    also_unpruned: Any = None


class Depth(JsonPart):
    """A number of removed layers and its loss on validation rows."""

    num_prune: Known = None
    parameters: Number = None
    loss: Known = None
    upper: Known = None
    rows: Known = None
    verdict: Any = None


def _complete(curve: list[Depth]) -> list[Depth]:
    return [depth for depth in curve if None not in (depth.num_prune, depth.loss, depth.upper, depth.rows)]


class Search(JsonPart):
    """The search for how many layers can be removed."""

    best: Count = None
    limit: Number = None
    rows: Count = None
    curve: Annotated[list[Depth], Each, AfterValidator(_complete)] = []


CHOICES = {"gradpruner": "IGIA", "gate": "the gate"}
"""Methods that `either` compares, in words."""


class Comparison(JsonPart):
    """Which of two choices of layers was taken, and the losses of both models on `held_out` of some `rows`.

    `num_prune` layers were compared; `same` says whether the plan removes just the layers of that choice.
    """

    chosen: Any = None
    losses: Fields = {}
    held_out: Count = None
    rows: Any = None
    skipped: Any = None
    num_prune: Count = None
    same: Any = None


class PlanRecord(JsonPart):
    """A plan. A plan of whole layers has one action per layer, in layer order; a width plan has none."""

    actions: Annotated[list[Action], Each, AfterValidator(_in_layer_order)] = []
    savings: Annotated[dict[str, Change], Named] = {}
    portability: Annotated[list[Engine], Each] = []
    search: Search = Search()
    comparison: Comparison = Comparison()
    scores: Any = None
    shape: Fields = {}
    widths: Annotated[list[Fields], Each] = []
    hidden: Number = None

    @cached_property
    def targets(self) -> dict[int, list[int]]:
        """Target layer -> the layers merged into it, in layer order."""
        found: dict[int, list[int]] = {}
        for action in self.actions:
            if action.action == "merge" and action.into is not None:
                found.setdefault(action.into, []).append(action.layer)
        return found

    @cached_property
    def roles(self) -> dict[int, str]:
        """Layer -> 'keep', 'drop', 'merge' or 'receive' (kept, and the target of a merge)."""
        kept = {
            action.layer: "receive" if action.layer in self.targets else "keep" for action in self.actions
        }
        gone = {a.layer: str(a.action) for a in self.actions if a.action in ("drop", "merge")}
        return kept | gone

    @property
    def kept(self) -> frozenset[int]:
        """The layers that stay."""
        return frozenset(layer for layer, role in self.roles.items() if role not in ("drop", "merge"))


class Scores(JsonPart):
    """The layer scores of a method."""

    norm: Any = None
    values: Values = []
    low: Values = []
    high: Values = []
    stability: Values = []


class Trace(Trained):
    """The recording of gradients."""

    num_steps: Number = None
    effective_steps: Number = None
    adapter: Any = None
    rank: Any = None
    clip: Any = None
    bytes_on_disk: Number = None


class Rows(JsonPart):
    """A set of rows and its source."""

    source: Any = None
    format: Any = None
    rows: Number = None
    dropped_rows: Number = None
    notes: Values = []
    supervised_tokens: Number = None
    sha256: Any = None


class StageRecord(JsonPart):
    """One stage, in run.json, or in manifest.json (where its name is its key)."""

    name: Any = None
    state: Any = None
    seconds: Number = None
    peak_memory_bytes: Number = None
    resumed: Any = None
    result: Fields = {}
    error: Any = None


class Provenance(JsonPart):
    """The code, machine and packages that produced the record."""

    commit: Any = None
    dirty: Any = None
    python: Any = None
    seed: Any = None
    packages: Fields = {}
    machine: Fields = {}


class ModelRecord(JsonPart):
    """The dense model."""

    path: Any = None
    model_type: Any = None
    num_layers: Count = None
    num_parameters: Count = None
    decoder_parameters: Any = None
    dtype: Any = None
    sha256: Any = None


class Seed(JsonPart):
    """One seed of a study's row."""

    seed: Count = None
    run: Any = None
    error: Any = None


class PointRecord(JsonPart):
    """One setting of a study."""

    value: Any = None
    label: Any = None
    rows: Values = []


class Sweep(JsonPart):
    """What an ablation varies."""

    key: Any = None
    label: Any = None
    log: Any = None


class Budget(JsonPart):
    """How much every method of a comparison removes."""

    unit: Any = None
    removed: Number = None
    share: Number = None
    layers: Number = None


class Record(JsonPart):
    """run.json or study.json; fields that belong to the other one are empty."""

    schema_version: Any = None
    gradpruner_version: Any = None
    created: Any = None
    finished: Any = None
    command: Any = None
    title: Any = None
    provenance: Provenance = Provenance()
    recipe: Fields = {}
    model: ModelRecord = ModelRecord()
    majority: Number = _at("reference", "majority_class")
    warnings: Annotated[list[Text], Each] = []
    budget: Budget = Budget()
    # Only in run.json.
    train: Rows = _at("data", "train", default=Rows())
    eval: Rows = _at("data", "eval", default=Rows())
    overlap_rows: Count = _at("data", "overlap_rows")
    trace: Trace = Trace()
    scores: Annotated[dict[str, Scores], Named] = {}
    plans: Annotated[dict[str, PlanRecord], Named] = {}
    rows: Fields = {}
    variants: Annotated[dict[str, VariantRecord], Named] = {}
    stages: Annotated[list[StageRecord], Each] = []
    # Only in study.json.
    points: Annotated[list[PointRecord], Each] = []
    figure: Any = None
    what: Any = None
    seeds: Values = []
    metrics: Values = []
    mode: Any = None
    task: Any = None
    sweep: Sweep | None = None
    plot: Fields = {}
    planned: Number = _at("runs", "planned")
    done: Number = _at("runs", "finished")
