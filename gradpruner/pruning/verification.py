"""Verifies a pruned checkpoint: that it matches its plan, and that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch

from gradpruner.common.errors import ConfigError, GradPrunerError, IntegrityError, ModelError, PlanError
from gradpruner.common.printing import readable_bytes
from gradpruner.common.registry import check_known
from gradpruner.gradients.trace import GradientTrace
from gradpruner.models.config_patch import text_config
from gradpruner.models.folder import PRUNING_FILE, locate_model, read_pruning, recorded_plan
from gradpruner.models.loading import load_config, load_structure
from gradpruner.models.proof import relative_error, tolerance
from gradpruner.models.shards import Shards, open_shards
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.repair import Repair
from gradpruner.pruning.behaviour import Outputs, check_copies, run_on_demand, run_whole
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.on_demand import Reader, Unmatched, on_demand
from gradpruner.pruning.writer import read_tensor, sha256_tensor

LEVELS = ("auto", "full", "structure")
_MEMORY_SHARE = 0.7  # of the free memory; the rest is for activations and other processes


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked, in a word or two.
        passed: Whether the check passed; None if it was not done.
        detail: What was found, or why the check was not done.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of verifying a checkpoint.

    Attributes:
        level: "full" or "structure".
        checks: The checks in order, up to the first that failed.
    """

    folder: str
    level: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {"level": self.level, "passed": self.passed, "checks": [asdict(c) for c in self.checks]}

    def raise_on_failure(self) -> None:
        """Raises IntegrityError with the first check that failed."""
        for check in self.checks:
            if check.passed is False:
                raise IntegrityError(f"{self.folder} failed verification: {check.name}: {check.detail}")


class _Failed(Exception):
    pass


def verify_checkpoint(
    folder: str | Path,
    source: str | Path | None = None,
    plan: PruningPlan | None = None,
    trace: GradientTrace | None = None,
    *,
    level: str = "auto",
    repair: Repair | None = None,
) -> VerifyReport:
    """Checks a pruned checkpoint against its plan and its source.

    Merging is repeated in memory and compared to the bit (if its rule needs a trace, only with a trace).
    Repaired linears must be those of the repair or, without it, have the hashes recorded in `pruning.json`.
    All other tensors must hold the same bytes as in the source. The outputs of the checkpoint are compared
    with those of the source, in which pruned layers return their input and merged and repaired linears are
    replaced by the checkpoint's.

    Both models run on the CPU, one after the other. Each weight is read from its file when it is used
    (`on_demand`), so memory is at most 256 MiB for cached products, plus the largest weight that is no
    linear; 16-bit weights are computed in float32. Models whose weights are stored in a different form than
    they use are loaded whole, in the dtype they are stored in, and the report says so.

    Args:
        folder: The pruned checkpoint.
        source: The model it was made from; None: the one its `pruning.json` names.
        plan: The plan it was pruned by; None: the one in its `pruning.json`.
        trace: The recorded gradients, to repeat merging.
        level: "full", "structure" (runs no model), or "auto": full, unless the models must be loaded whole
            and the source takes more than 70 % of the free memory.
        repair: The repair fitted for the plan; None: its hashes in `pruning.json`.

    Returns:
        All checks and what they found; look at `passed`, or call `raise_on_failure`.

    Raises:
        ConfigError: If level is unknown, or if source or plan is neither given nor in `pruning.json`.
        ModelError: If a model type without a row in the table of families cannot be verified in full.
    """
    check_known("level", level, LEVELS)
    target = Path(folder)
    facts = read_pruning(target)
    plan = plan or recorded_plan(target, facts, "Pass --plan and --source.")
    if source is None and not isinstance(facts.get("source"), str):
        raise ConfigError(f"{target} does not say which model it was made from.", hint="Pass --source.")
    try:
        origin = locate_model(source if source is not None else facts["source"])
    except GradPrunerError as error:
        if source is not None:
            raise
        raise ConfigError(
            f"The model it was made from is not found: {error.message}", hint="Name it with --source."
        ) from error
    try:
        blueprint = Blueprint(origin, plan, trace if plan.merged else None, without_trace=True, repair=repair)
    except PlanError as error:
        error.hint = f"If {target} was not made from {origin}, name the model it was made from with --source."
        raise
    return verify_written(target, blueprint, level, facts)


def verify_written(
    target: Path, blueprint: Blueprint, level: str, facts: Mapping[str, Any] = MappingProxyType({})
) -> VerifyReport:
    """Checks a folder against its blueprint, see `verify_checkpoint`.

    `facts` is the content of its `pruning.json`; empty if that is not written yet.
    """
    full = compares_fully(level, blueprint)
    repaired = blueprint.repair_facts() or _recorded_repair(facts, target)
    checks = _Checks(target, blueprint, tuned=_is_trained(facts), repaired=repaired)
    checks.may_skip = level == "auto" and blueprint.view.family.proven
    results: list[Check] = []
    for name, work in checks.steps(full):
        try:
            detail = work()
        except (_Failed, GradPrunerError) as failure:
            results.append(Check(name, False, str(failure)))
            break
        results.append(Check(name, None if detail.startswith("not") else True, detail))
        if checks.skipped:
            break
    return VerifyReport(str(target), "full" if full and not checks.skipped else "structure", tuple(results))


def _is_trained(facts: Mapping[str, Any]) -> bool:
    """Whether a model's weights changed after pruning; not if validation rows spoke against its training."""
    tuning = facts.get("finetune")
    kept = tuning.get("kept") if isinstance(tuning, dict) else None
    return "finetune" in facts and not (isinstance(kept, dict) and kept.get("model") == "pruned")


def _recorded_repair(facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the repair recorded in `pruning.json`; empty if there was none."""
    raw = facts.get("repair")
    try:
        if raw is None:
            return {}
        cuts = [(int(cut["layer"]), str(cut["linear"])) for cut in raw["cuts"] if cut["ridge"] is not None]
        tensors = {str(name): str(digest) for name, digest in raw["tensors"].items()}
        return {"cuts": [{"layer": i, "linear": n, "ridge": 0.0} for i, n in cuts], "tensors": tensors}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{folder / PRUNING_FILE} does not say what was repaired: {type(error).__name__} {error}.",
            hint="Download or copy the folder again.",
        ) from error


def compares_fully(level: str, blueprint: Blueprint) -> bool:
    """Returns whether the outputs of both models are compared at this level, on this machine.

    Raises:
        ModelError: If they are not, although the model type has no row in the table of families.
    """
    full = level != "structure" and not blueprint.quantised
    full = full and (level == "full" or _fits(blueprint) or _runs_on_demand(blueprint))
    if not full and not blueprint.view.family.proven:
        raise ModelError(
            f"Model type '{blueprint.view.config.model_type}' has no row in the table of families, so the "
            "outputs of the pruned model must be compared with the source's before it can be trusted; that "
            "was not asked for, or does not fit into memory.",
            hint="Verify in full on a machine with more memory, or add a row to "
            "gradpruner/models/families.py.",
        )
    return full


def _fits(blueprint: Blueprint) -> bool:
    """Returns whether the source can be loaded whole."""
    return bool(blueprint.shards.total_bytes <= _MEMORY_SHARE * psutil.virtual_memory().available)


def _runs_on_demand(blueprint: Blueprint) -> bool:
    """Returns whether the files hold the weights in the form that the model uses."""
    try:
        on_demand(blueprint.config, blueprint.shards.tensors, blueprint.prefix, Reader(torch.float32))
    except Unmatched:
        return False
    return True


class _Checks:
    """The checks, in order; later checks use what earlier ones loaded."""

    def __init__(
        self,
        folder: Path,
        blueprint: Blueprint,
        *,
        tuned: bool,
        repaired: dict[str, Any],
    ) -> None:
        self.folder, self.blueprint, self.tuned = folder, blueprint, tuned
        self.hashes: dict[str, str] = repaired.get("tensors", {})
        cuts = repaired.get("cuts", ())
        self.linears = {cut["layer"]: cut["linear"] for cut in cuts if cut["ridge"] is not None}
        self.plan = blueprint.plan
        self.shards: Shards
        self.outputs: Outputs
        self.may_skip = self.skipped = False
        self.how = ""

    def steps(self, full: bool) -> list[tuple[str, Callable[[], str]]]:
        """Returns name and function of every check."""
        steps = [
            ("files", self.files),
            ("tensors", self.tensors),
            ("config", self.config),
            ("loading", self.structure),
            *([("repaired tensors", self.repaired)] if self.hashes else []),
        ]
        if not full:
            reason = "not done: quantised" if self.blueprint.quantised else "not done: structure only"
            return [*steps, ("computing", lambda: reason)]
        return [
            *steps,
            ("merged tensors", self.merged),
            ("source", self.run_both),
            ("weights", self.weights),
            ("logits", lambda: self.compare("logits", "without cache")),
            ("cached logits", lambda: self.compare("cached", "with cache")),
            ("generation", self.generation),
        ]

    def files(self) -> str:
        """Checks headers, sizes and the index."""
        self.shards = open_shards(self.folder)
        size = readable_bytes(self.shards.total_bytes)
        return f"{len(self.shards.tensors)} tensors, {len(self.shards.headers)} file(s), {size}"

    def tensors(self) -> str:
        """Checks names, shapes and dtypes against plan and source."""
        found = {name: (ref.dtype, ref.shape) for name, ref in self.shards.tensors.items()}
        wanted = {piece.name: (piece.dtype, piece.shape) for piece in self.blueprint.pieces()}
        wrong = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        if wrong:
            name = wrong[0]
            raise _Failed(
                f"{len(wrong)} tensors are not what plan and source say; the first is '{name}': "
                f"{found.get(name, 'missing')} instead of {wanted.get(name, 'nothing')}"
            )
        return f"names, shapes and dtypes of {len(found)} tensors as planned"

    def config(self) -> str:
        """Checks the depth, and that transformers saves the config as it read it."""
        config = load_config(self.folder, native=True, shards=self.shards)
        depth = text_config(config).num_hidden_layers
        if depth != len(self.plan.keep):
            raise _Failed(f"{depth} layers in config.json, {len(self.plan.keep)} in the plan")
        again = type(config).from_dict(config.to_dict())
        if again.to_dict() != config.to_dict():
            raise _Failed("config.json changes when it is saved and read again")
        return f"{depth} layers; saved and read again without a change"

    def structure(self) -> str:
        """Checks with transformers that no tensors are missing, unexpected or mismatched."""
        if self.blueprint.quantised:
            return "not done: a quantised model is only built on the hardware it is made for"
        load_structure(self.folder)
        return "plain from_pretrained: nothing missing, unexpected or mismatched"

    def run_both(self) -> str:
        """Runs source and checkpoint, while a thread compares the copied tensors."""
        if self.tuned:
            return self._run_both() or "not compared: this model was fine-tuned after pruning"
        with ThreadPoolExecutor(1) as thread:
            comparing = thread.submit(check_copies, self.shards, self.blueprint, self.linears.items())
            not_run = self._run_both()
            comparing.result()
        targets = self.plan.merged.keys() & set(self.plan.keep)
        merged = f"{len(self.plan.pruned)} layers passed through, {len(targets)} with merged weights"
        return not_run or merged + (f", {len(self.linears)} repaired" if self.linears else "")

    def _run_both(self) -> str:
        """Runs both models; returns why they were not run, or ""."""
        cuts = self.linears.items()
        try:
            self.outputs = run_on_demand(self.shards, self.blueprint, cuts, with_source=not self.tuned)
            how = "weights read as they are used"
        except GradPrunerError:
            raise
        except Exception as error:  # a model may use its weights in ways that only tensors in memory allow
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]
            if self.may_skip and not _fits(self.blueprint):
                self.skipped = True
                return f"not done: the models must be loaded whole, for which memory is too small ({reason})"
            self.outputs = run_whole(self.shards, self.blueprint, cuts, with_source=not self.tuned)
            how = f"loaded whole ({reason})"
        self.how = f"{how}, in {str(self.outputs.dtype).removeprefix('torch.')}"
        return ""

    def repaired(self) -> str:
        """Checks refitted weights against the repair, or against the hashes recorded when it was applied."""
        if self.tuned:
            return "not compared: this model was fine-tuned after the repair"
        here = self.shards.tensors
        named = {self.blueprint.repaired_name(layer, name) for layer, name in self.linears.items()}
        if named != set(self.hashes):
            raise _Failed(f"the repair records the tensors {sorted(self.hashes)}, but refits {sorted(named)}")
        for name, digest in self.hashes.items():
            if sha256_tensor(read_tensor(here[name])) != digest:
                raise _Failed(f"'{name}' does not have the hash of the repair")
        return f"{len(self.hashes)} tensors have the hashes of the repair"

    def merged(self) -> str:
        """Merges again in memory, and compares the result with the written tensors, to the bit."""
        if not self.plan.merged:
            return "not done: no layer was merged"
        if self.tuned:
            return "not compared: this model was fine-tuned after merging"
        if self.plan.needs_trace and self.blueprint.trace is None:
            return "not done: no trace given"
        here = self.shards.tensors
        targets = self.blueprint.merged_names()
        count = 0
        for piece in self.blueprint.pieces():
            if piece.name not in targets or piece.name in self.hashes:
                continue
            assert piece.make is not None
            if sha256_tensor(read_tensor(here[piece.name])) != sha256_tensor(piece.make()):
                raise _Failed(f"'{piece.name}' does not equal the merged weight")
            count += 1
        return f"{count} tensors merged again in memory: equal to the bit"

    def weights(self) -> str:
        """Checks tied embeddings, and that the outputs are finite."""
        if self.outputs.tied is False:
            raise _Failed("the embeddings are tied in the config but not in the loaded model")
        if not all(bool(torch.isfinite(t).all()) for t in self.outputs.pruned.values()):
            raise _Failed("the checkpoint computes NaN or Inf")
        return self.how + (", embeddings tied" if self.outputs.tied else "")

    def compare(self, what: str, how: str) -> str:
        """Compares one kind of logits of both models."""
        if not self.outputs.source:
            return "not compared: no reference"
        error = relative_error(self.outputs.pruned[what], self.outputs.source[what])
        allowed = tolerance(self.outputs.dtype)
        if not error <= allowed:
            raise _Failed(
                f"relative error {error:.1e} against the source with the pruned layers passed through; at "
                f"most {allowed:.0e} is allowed"
            )
        return f"relative error {error:.1e} ({how})"

    def generation(self) -> str:
        """Compares the greedy tokens of both models."""
        tokens = self.outputs.pruned["tokens"].tolist()
        if self.outputs.source and tokens != self.outputs.source["tokens"].tolist():
            raise _Failed(
                f"greedy tokens differ: {tokens} instead of {self.outputs.source['tokens'].tolist()}"
            )
        return f"{len(tokens)} greedy tokens" + (" as the reference" if self.outputs.source else "")
