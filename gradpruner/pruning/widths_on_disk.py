"""Applies a width plan to a model folder."""

from __future__ import annotations

from pathlib import Path

from gradpruner.models.dtypes import stored_dtype
from gradpruner.models.engine_widths import portability_of
from gradpruner.models.engines import layer_facts
from gradpruner.models.folder import read_pruning
from gradpruner.models.loading import load_model, load_structure, refuse_narrowed
from gradpruner.models.narrowing import narrow_
from gradpruner.models.saving import save_model
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.pruning.verification import Check, VerifyReport


def prune_width_checkpoint(
    source: Path, target: Path, plan: WidthPlan, *, device: str = "cpu", name: str | None = None
) -> VerifyReport:
    """Prunes a model folder into another one by a width plan, in the source's dtype.

    The model is loaded, so memory is that of its weights. If the plan is uniform, the result is a plain
    Hugging Face model. Otherwise only this package loads it (`loading.load_model`): plain transformers
    refuses the shapes of its tensors.

    Args:
        source: The model folder.
        target: The folder to make; a model that this package wrote is replaced.
        plan: What stays.
        device: The device that the result is proved on.
        name: What the model card calls the source; None: its path.

    Returns:
        What was checked: that the pruned model computes the same as the source with the removed parts set to
        zero (not checked if hidden dimensions are removed), and that the folder holds as many parameters as
        the plan says.

    Raises:
        PlanError: If the plan is for another model.
        ModelError: If the model's heads and channels cannot be identified, or the proof fails.
        IntegrityError: If the folder does not hold the planned number of parameters.
    """
    refuse_narrowed(source)
    dtype = stored_dtype(source)
    model = load_model(source, dtype=dtype, device=device)
    expected = WidthView(model).parameters(plan)
    verdicts = portability_of(plan, layer_facts(model.config))  # before narrowing changes the config
    error = narrow_(model, plan)
    save_model(
        model,
        None,
        target,
        dtype=dtype,
        plan=plan,
        source=name or str(source),
        facts={
            "portability": [vars(verdict) for verdict in verdicts],
            "previous": read_pruning(source) or None,
        },
        carried_from=source,
        like=source,
    )
    return check_narrowed(target, expected, error)


def check_narrowed(folder: Path, expected: int, error: float | None) -> VerifyReport:
    """Checks that a written folder loads and has `expected` parameters.

    `error` is the relative error of the proof, see `narrowing.narrow_`; None if there was no proof.

    Raises:
        IntegrityError: If the number of parameters differs.
    """
    present = count_parameters(load_structure(folder))
    detail = f"{present:,} parameters, {expected:,} by the plan"
    checks = [Check("parameters", present == expected, detail)]
    if error is not None:
        checks.append(Check("logits", True, f"relative error {error:.1e} against zeroed parts"))
    report = VerifyReport(str(folder), "full" if error is not None else "structure", tuple(checks))
    report.raise_on_failure()
    return report
