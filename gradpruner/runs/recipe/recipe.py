"""The recipe: everything a run depends on, checked as a whole before anything is loaded.

Importing this module imports no torch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from gradpruner.common.errors import ConfigError
from gradpruner.common.options import Section
from gradpruner.common.printing import shown
from gradpruner.plans.options import BUDGETS
from gradpruner.runs.recipe.key_hints import meant_key
from gradpruner.runs.recipe.sections import (
    DataSection,
    EvaluateSection,
    ModelSection,
    PlanSection,
    RecoverSection,
    ScoreSection,
)
from gradpruner.runs.recipe.yaml_files import check_scalar, parse_yaml, read_yaml
from gradpruner.training.options import DistilSection, FinetuneSection, RecordSection

FAST_ROWS = ("last", "gate")
"""The pruned row of effort `fast`: the last layers go or, where answers are long, the gate's choice."""
EFFORT_ROWS = {"fast": ["dense", FAST_ROWS[0]], "best": ["dense", "either"]}
"""Effort -> the rows of a recipe that names none."""
_FAST = [["dense", row] for row in FAST_ROWS]
EFFORTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": {
        "start": "base",
        "plan": {"repair": "auto"},
        "finetune": {"accumulation": None},
    },
    "best": {
        "start": "tuned",
        "plan": {"repair": "auto"},
        "finetune": {"accumulation": None},
        "recover": {"epochs": 1.0},
        "distil": {"teacher": "tuned", "prompts": 0.0},
    },
}
"""Effort -> the values it sets where the recipe says nothing."""


def shrinking(model: str, method: str = "either", repair: str = "auto") -> dict[str, Any]:
    """Returns the dotted keys of a `gradpruner shrink` recipe: a tuned model, pruned and repaired."""
    return {
        "start": "given",
        "model.path": model,
        "plan.repair": repair,
        "variants": ["dense", method],
    }


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the given values and, section by section, the defaults for what is missing."""
    filled = dict(given)
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(filled.get(key), dict):
            filled[key] = _filled(filled[key], value)
        else:
            filled.setdefault(key, value)
    return filled


class Recipe(Section):
    """A complete run."""

    title: str = ""
    """Title of the report."""
    out: str = "runs/gradpruner"
    """Run directory."""
    seed: int = Field(default=0, ge=0)
    """Seed of data sampling, LoRA, data order, dropout and bootstrap."""
    effort: Literal["auto", "paper", "fast", "best"] | None = "auto"
    """Sets keys that the recipe leaves out. best: tune the dense model, prune and repair it, then recover
    with the dense model as the teacher. fast: remove the last layers before the final one from the base model
    (where answers are long: the gate's choice), repair it, then fine-tune, which costs less than tuning the
    dense model. paper (or null): as in the paper, with and without merging, no repair. auto: best, or fast if
    the recipe sets `start` or `variants` itself or keeps adapters apart (finetune.merge_adapter: false)."""
    find_rate: bool = False
    """Find the learning rate first: the dense model is tuned briefly at several rates, doubling and halving
    from finetune.learning_rate; the rate with the lowest loss on held-out training rows is used."""
    start: Literal["base", "tuned", "given"] = "base"
    """What is pruned. base: the model, which is fine-tuned after that. tuned: the dense model after its
    fine-tuning. given: the model, which is tuned on the task already. With tuned and given, the pruned model
    is trained as `recover` says, by default not at all."""
    model: ModelSection
    data: DataSection
    record: RecordSection = RecordSection()
    score: ScoreSection = ScoreSection()
    plan: PlanSection = PlanSection()
    finetune: FinetuneSection = FinetuneSection()
    recover: RecoverSection = RecoverSection()
    distil: DistilSection = DistilSection()
    evaluate: EvaluateSection = EvaluateSection()
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of methods: name -> option -> value (`gradpruner ls methods`)."""
    variants: list[str] = Field(default=["dense", "merged", "dropped"], min_length=1)
    """Rows of the comparison: dense; merged and dropped (GradPruner with and without merging); any other
    method by its name (`gradpruner ls methods`). If left out, the effort decides."""
    verify: Literal["auto", "full", "structure"] = "auto"
    """How each pruned model is verified before it is used. full: compare its outputs with those of the source
    model. structure: load nothing. auto: full if memory allows."""
    keep_models: Literal["all", "none"] = "all"
    """Which pruned and fine-tuned models stay on disk after evaluation; none is meant for sweeps. With start:
    tuned, the tuned dense model stays in any case: the others are made from it, also at the next start."""
    memory: Literal["refuse", "warn"] = "refuse"
    """What to do if weights, gradients and optimizer state alone exceed a device's memory: refuse to begin,
    or warn and go on."""

    @model_validator(mode="before")
    @classmethod
    def _fill_effort(cls, raw: Any) -> Any:
        """Fills in what the effort sets and the recipe leaves out."""
        if not isinstance(raw, dict):
            return raw
        effort = raw.get("effort", "auto")
        if effort == "auto":
            tuning = raw.get("finetune")
            plain = not isinstance(tuning, dict) or tuning.get("merge_adapter", True)
            effort = "best" if plain and not {"start", "variants"} & raw.keys() else "fast"
            raw = raw | {"effort": effort}
        return _filled(raw, EFFORTS.get(effort, {})) if isinstance(effort, str) else raw

    @model_validator(mode="after")
    def _choose_rows(self) -> Recipe:
        """Sets the rows of the effort if the recipe names none."""
        # Not by assignment, after which the recipe would seem to name them.
        if not self.names_rows:
            self.__dict__["variants"] = list(EFFORT_ROWS.get(str(self.effort), self.variants))
        if self.effort == "fast" and self.plan.file is not None and self.variants in _FAST:
            self.__dict__["variants"] = ["dense", "dropped"]  # a row that follows a given plan
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if len(set(self.variants)) != len(self.variants):
            raise ValueError("variants lists a row more than once")
        if self.find_rate and self.start == "given":
            raise ValueError("find_rate tunes the dense model, which is tuned already with start: given")
        if self.plan.max_loss is not None and self.start == "base":
            raise ValueError(
                "plan.max_loss needs start: tuned or given; an untuned model has no score to keep"
            )
        if self.tunes_first:
            needs = "start: tuned" if self.start == "tuned" else "distil.teacher: tuned"
            if "dense" not in self.variants:
                raise ValueError(f"{needs} needs dense among the variants: that model is tuned first")
            if self.finetune.mode != "full" and not self.finetune.merge_adapter:
                raise ValueError(
                    f"{needs} needs finetune.merge_adapter: true, so that the tuned model is a plain one"
                )
        return self

    def with_values(self, **sections: dict[str, Any]) -> Recipe:
        """Returns this recipe with values of sections changed: `recipe.with_values(plan={"name": None})`."""
        changed = {name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()}
        return self.model_copy(update=changed)

    @property
    def names_rows(self) -> bool:
        """Whether the recipe says which rows it has; if not, its effort decides."""
        return "variants" in self.model_fields_set

    @property
    def task_name(self) -> str:
        """Name of the task, or of the training file; for x/data/train.jsonl, "x"."""
        source = Path(str(self.data.train).partition("#")[0])
        names = [source.stem, *(folder.name for folder in source.resolve().parents)]
        telling = [name for name in names if name not in ("", "data", "train")]
        return self.data.task or next(iter(telling), source.stem)

    @property
    def distils(self) -> bool:
        """Whether pruned models learn from the tuned dense one."""
        return self.distil.teacher == "tuned"

    @property
    def trains_pruned(self) -> bool:
        """Whether pruned models are trained: fine-tuned or, if a tuned model was pruned, recovered."""
        return self.start == "base" or self.recover.trains

    @property
    def chooses_recovery(self) -> bool:
        """Whether validation rows decide if a pruned model's recovery is kept."""
        return self.start != "base" and self.recover.trains and self.recover.keep_better

    @property
    def tunes_first(self) -> bool:
        """Whether other variants need the fine-tuned dense model."""
        return self.start == "tuned" or (self.distils and self.start == "base")


S = TypeVar("S", bound=Section)
_ALL_KEYS = "\n`gradpruner schema` lists every key."


def key_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Returns every dotted key of a section, sections included."""
    out = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            out += [f"{prefix}{name}", *key_names(kind, f"{prefix}{name}.")]
        else:
            out.append(f"{prefix}{name}")
    return out


def load_recipe(
    path: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    values: dict[str, Any] | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Recipe:
    """Reads a recipe: the file, then `values` (dotted keys), then overrides in the form of `--set`, "a.b=c".

    `names` says how messages name the keys in `values`, such as "--num-prune".

    Raises:
        ConfigError: Lists all faults at once, with the file, the key and what is allowed.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        raw = read_yaml(Path(path))
        resolve_paths(raw, Path(path).parent)
    stored, given = copy.deepcopy(raw), {}
    last: dict[str, Any] = {}
    for key, value in (values or {}).items():
        last[key], given[key] = value, names.get(key, key)
    for item in overrides:
        key, found, text = item.partition("=")
        if not found or not key:
            raise ConfigError(f"--set {item} is not of the form section.key=value.")
        last[key.strip()] = _parse_value(item, key.strip(), text)
        given[key.strip()] = f"--set {key.strip()}"
    rivals = [f"plan.{name}" for name in (*BUDGETS, "file")]
    if any(last.get(key) is not None for key in rivals):  # the file's budget or plan is not meant any more
        last = dict.fromkeys(rivals) | last
    for key, value in last.items():
        assign(raw, key, value)
    # The run directory keeps the recipe, whose paths must also hold when it is read from elsewhere.
    resolve_paths(raw, Path())
    where = "recipe"
    if path is not None:
        where = str(path) if _is_faulty(stored) else f"What is given besides {path}"
    return check_section(Recipe, raw, where, _ALL_KEYS, given)


def _is_faulty(raw: dict[str, Any]) -> bool:
    try:
        Recipe.model_validate(raw)
    except ValidationError:
        return True
    return False


def check_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validates a recipe given as plain values; see `load_recipe`."""
    return check_section(Recipe, raw, where, _ALL_KEYS)


def check_section(
    kind: type[S],
    raw: dict[str, Any],
    where: str,
    hint: str | None = None,
    given: Mapping[str, str] = MappingProxyType({}),
) -> S:
    """Validates plain values as a section, or as a file of sections; `where` names them in messages.

    `given` holds keys that do not come from there, and how messages name each of them.

    Raises:
        ConfigError: Lists all faults at once.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        known = key_names(kind)
        faults = [_fault(entry, known, given) for entry in error.errors()]
        raise ConfigError(
            f"{where} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n"
            + "\n".join(f"  - {fault}" for fault in faults),
            hint=hint,
        ) from None


def _fault(entry: Any, known: list[str], given: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in entry["loc"])
    name = given.get(path, path)
    if entry["type"] == "extra_forbidden":
        meant = meant_key(path, known)
        if isinstance(entry["input"], dict) and entry["input"]:  # a section that other tools have
            inner = {key: meant_key(f"{path}.{key}", known) for key in entry["input"]}
            name = next((given[key] for key in given if key.startswith(f"{path}.")), name)
            return f"{name}: unknown section." + "".join(
                f" {path}.{key}: did you mean '{other}'?" for key, other in inner.items() if other
            )
        close = f" Did you mean '{meant}'?" if meant else ""
        return f"{name}: unknown key.{close}"
    if entry["type"] == "missing":
        needed = {
            "model": "give model.path (--model)",
            "data": "give data.train (--data), or data.task (--task)",
        }
        return f"{path}: missing{'; ' + needed[path] if path in needed else ''}."
    message = str(entry["msg"]).removeprefix("Value error, ")
    value = "" if isinstance(entry["input"], dict) else f" (given: {shown(entry['input'])})"
    return f"{name or 'recipe'}: {message}{value}"


def assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested values."""
    *sections, last = key.split(".")
    for section in sections:
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} cannot be set: '{section}' is a value, not a section.")
        raw = inner
    raw[last] = value


def _parse_value(item: str, key: str, text: str) -> Any:
    try:
        if key in _TEMPLATES and text != "null" and not text.startswith(("'", '"')):
            check_scalar(text)
            return text.replace("\\n", "\n")
        return parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {shown(item)[1:-1]}: the value is not valid YAML.") from None
    except ValueError as error:
        raise ConfigError(f"--set {shown(item)[1:-1]}: {error}.", hint="Give a plain value.") from None


# These values are taken as typed, since braces, colons and a leading space have a meaning in YAML; "\n" is a
# line break.
_TEMPLATES = ("data.prompt", "data.completion")
_PATHS = (
    ("model", "path"),
    ("data", "train"),
    ("data", "eval"),
    ("data", "validation"),
    ("data", "folder"),
    ("data", "chat_template"),
    ("plan", "file"),
    ("evaluate", "encoder"),
    ("evaluate", "lm_eval_folder"),
)


def resolve_paths(raw: dict[str, Any], base: Path) -> None:
    """Makes paths that begin with ./ or ../ absolute."""
    places = [(raw.get(section), key) for section, key in _PATHS]
    measured = raw.get("evaluate")
    also = measured.get("also") if isinstance(measured, dict) else None
    places += [(entry, "folder") for entry in also] if isinstance(also, list) else []
    for inner, key in places:
        value = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(value, str) and value.startswith(("./", "../")):
            inner[key] = str((base / value).resolve())


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of the recipe, for editors and scripts."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def recipe_yaml(recipe: Recipe) -> str:
    """Returns a recipe as YAML, with every key; without `variants` if the effort decides about them."""
    values = json.loads(recipe.model_dump_json(exclude=set() if recipe.names_rows else {"variants"}))
    text: str = yaml.safe_dump(values, sort_keys=False, width=100)
    return text
