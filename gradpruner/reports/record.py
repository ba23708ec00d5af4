"""run.json and study.json as types. What is missing, or is not what it should be, reads as empty.

An interrupted run still has a report, and a record may come from somebody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, AliasPath, BaseModel, BeforeValidator, Field, model_validator

from gradpruner.printing import number

FEW_EXAMPLES = 100
"""Below this many evaluated examples a result is marked: its interval is about 20 points wide."""
T = TypeVar("T")


def count(value: Any) -> int | None:
    """Returns a whole number, or None."""
    finite = number(value)
    return None if finite is None else round(finite)


def _mapping(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


Number = Annotated[float | None, BeforeValidator(number)]
Count = Annotated[int | None, BeforeValidator(count)]
Each = BeforeValidator(lambda value: list(value) if isinstance(value, list | tuple) else [])
Named = BeforeValidator(_mapping)
Fields = Annotated[dict[str, Any], Named]
Values = Annotated[list[Any], Each]


class Part(BaseModel):
    """A JSON object; anything else reads as an empty one."""

    @model_validator(mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        return _mapping(value) if not isinstance(value, Part) else value


class Measured(Part):
    """One metric of one model, or the difference of two: fractions, with a 95 % interval and the examples.

    Those without a value are left out by whoever reads them, so that it is a number everywhere else.
    """

    value: Annotated[Any, BeforeValidator(number)] = Field(
        default=None, validation_alias=AliasChoices("value", "mean")
    )
    low: Number = None
    high: Number = None
    n: Count = None
    stderr: Number = None
    per_seed: Values = []
    before: Number = None
    paired: Fields = {}
    paired_gradpruner: Fields = {}

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return self.low is not None and self.high is not None

    @property
    def is_small(self) -> bool:
        """Whether too few examples were evaluated to rely on the value."""
        return self.n is not None and self.n < FEW_EXAMPLES

    def turned(self) -> Measured:
        """The same difference, seen from the other side."""
        ends = [None if end is None else -end for end in (self.high, self.low)]
        value = None if self.value is None else -self.value
        return Measured(value=value, low=ends[0], high=ends[1], n=self.n)


Metrics = Annotated[dict[str, Measured], Named]


class Evaluated(Part):
    """What measuring a model gave and took."""

    metrics: Metrics = {}
    seconds: Number = None
    tokens_per_second: Number = None
    peak_memory_bytes: Number = None
    per_example: Any = None
    n: Count = None


class Kept(Part):
    """Which model a recovery ended with, by losses on validation rows in nats per token."""

    model: Any = None
    before: Number = None
    after: Number = None
    rows: Number = None


class Trained(Part):
    """What fine-tuning, or recording, gave and took."""

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


class Check(Part):
    """One check of a pruned model."""

    name: Any = None
    passed: Any = None
    detail: Any = None


class Verified(Part):
    """What was checked of a pruned model before it was used."""

    level: Any = None
    passed: Any = None
    checks: Annotated[list[Check], Each] = []


class Cut(Part):
    """A repaired cut."""

    gone: Values = []
    linear: Any = None
    layer: Number = None
    ridge: Number = None
    error_before: Number = None
    error_after: Number = None


class VariantRecord(Part):
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
    verified: Verified = Field(default=Verified(), validation_alias=AliasPath("pruning", "verified"))
    repair_kind: Any = Field(default=None, validation_alias=AliasPath("repair", "kind"))
    cuts: Annotated[list[Cut], Each] = Field(default=[], validation_alias=AliasPath("repair", "cuts"))
    cost: Annotated[dict[str, Number], Named] = Field(
        default={}, validation_alias=AliasPath("cost", "seconds")
    )
    cost_tokens: Number = Field(default=None, validation_alias=AliasPath("cost", "tokens"))
    cost_resumed: Values = Field(default=[], validation_alias=AliasPath("cost", "resumed"))
    lm_eval: Annotated[dict[str, Evaluated], Named] = Field(
        default={}, validation_alias=AliasPath("lm_eval", "tasks")
    )


class Action(Part):
    """What a plan does with one layer: keep, drop or merge (then `into` names the target)."""

    layer: Count = None
    action: Any = None
    into: Count = None


class Change(Part):
    """One quantity before and after pruning."""

    before: Number = None
    after: Number = None


class Engine(Part):
    """How an engine serves what a plan leaves."""

    engine: Any = None
    status: Any = None
    reason: Any = None
    also_unpruned: Any = None


class Depth(Part):
    """One number of layers, measured on validation rows."""

    num_prune: Count = None
    parameters: Number = None
    loss: Number = None
    upper: Number = None
    rows: Count = None
    verdict: Any = None


class Search(Part):
    """How many layers may go."""

    best: Count = None
    limit: Number = None
    rows: Count = None
    curve: Annotated[list[Depth], Each] = []


class PlanRecord(Part):
    """A plan; one of widths has no actions."""

    actions: Annotated[list[Action], Each] = []
    num_kept: Count = None
    savings: Annotated[dict[str, Change], Named] = {}
    portability: Annotated[list[Engine], Each] = []
    search: Search = Search()
    shape: Fields = {}
    widths: Annotated[
        list[Fields], BeforeValidator(lambda v: [_mapping(e) for e in v] if isinstance(v, list) else [])
    ] = []
    hidden: Number = None


class Scores(Part):
    """A method's layer scores."""

    norm: Any = None
    values: Values = []
    low: Values = []
    high: Values = []
    stability: Values = []


class Trace(Trained):
    """How recording went."""

    num_steps: Number = None
    effective_steps: Number = None
    adapter: Any = None
    rank: Any = None
    clip: Any = None
    bytes_on_disk: Number = None


class Rows(Part):
    """Where rows came from."""

    source: Any = None
    format: Any = None
    rows: Number = None
    dropped_rows: Number = None
    supervised_tokens: Number = None
    sha256: Any = None


class StageRecord(Part):
    """One stage of a run."""

    name: Any = None
    state: Any = None
    seconds: Number = None
    peak_memory_bytes: Number = None
    resumed: Any = None


class Provenance(Part):
    """Where figures come from."""

    commit: Any = None
    dirty: Any = None
    python: Any = None
    seed: Any = None
    packages: Fields = {}
    machine: Fields = {}


class ModelRecord(Part):
    """The dense model."""

    path: Any = None
    model_type: Any = None
    num_layers: Count = None
    num_parameters: Count = None
    decoder_parameters: Any = None
    dtype: Any = None
    sha256: Any = None


class Seed(Part):
    """A row of a study at one seed."""

    seed: Count = None
    run: Any = None
    error: Any = None


class StudyRow(Part):
    """A row of a study, over its seeds."""

    name: Any = None
    label: Any = None
    description: Any = None
    error: Any = None
    num_parameters: Count = None
    removed_share: Number = None
    num_layers: Count = None
    uniform: Any = None
    metrics: Metrics = {}
    validation: Metrics = {}
    costs: Fields = {}
    per_seed: Annotated[list[Seed], Each] = []
    plans: Annotated[list[PlanRecord], Each] = []


class PointRecord(Part):
    """One setting of a study."""

    value: Any = None
    label: Any = None
    rows: Annotated[list[StudyRow], Each] = []


class Sweep(Part):
    """What an ablation varies."""

    key: Any = None
    label: Any = None
    log: Any = None


class Budget(Part):
    """How much is to go."""

    unit: Any = None
    removed: Number = None
    share: Number = None
    layers: Number = None


class Record(Part):
    """run.json or study.json; what belongs to the other is empty."""

    schema_version: Any = None
    gradpruner_version: Any = None
    created: Any = None
    finished: Any = None
    command: Any = None
    title: Any = None
    provenance: Provenance = Provenance()
    recipe: Fields = {}
    model: ModelRecord = ModelRecord()
    majority: Number = Field(default=None, validation_alias=AliasPath("reference", "majority_class"))
    warnings: Values = []
    budget: Budget = Budget()
    # Of a run.
    train: Rows = Field(default=Rows(), validation_alias=AliasPath("data", "train"))
    eval: Rows = Field(default=Rows(), validation_alias=AliasPath("data", "eval"))
    overlap_rows: Count = Field(default=None, validation_alias=AliasPath("data", "overlap_rows"))
    trace: Trace = Trace()
    scores: Annotated[dict[str, Scores], Named] = {}
    plans: Annotated[dict[str, PlanRecord], Named] = {}
    rows: Fields = {}
    variants: Annotated[dict[str, VariantRecord], Named] = {}
    stages: Annotated[list[StageRecord], Each] = []
    # Of a study.
    points: Annotated[list[PointRecord], Each] = []
    figure: Any = None
    what: Any = None
    seeds: Values = []
    metrics: Values = []
    mode: Any = None
    task: Any = None
    sweep: Sweep | None = None
    plot: Fields = {}
    planned: Number = Field(default=None, validation_alias=AliasPath("runs", "planned"))
    done: Number = Field(default=None, validation_alias=AliasPath("runs", "finished"))
