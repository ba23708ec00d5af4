"""Carrying out a width plan on a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradpruner.common.errors import IntegrityError
from gradpruner.models.dtypes import stored_dtype
from gradpruner.models.engine_widths import portability_of
from gradpruner.models.engines import layer_facts
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
    """Prunes a model folder into another one by a width plan, in the format it is stored in.

    The model is loaded: memory is that of its weights. A uniform result is a plain Hugging Face model; any
    other is loaded by this package only (`loading.load_model`), and plain transformers refuses it by the
    shapes of its tensors.

    Args:
        source: The model folder.
        target: Folder to make; replaced if it is ours.
        plan: What stays.
        device: Where the result is proved.
        name: What the card calls the source; None: its path.

    Returns:
        What was checked: that the pruned model computes what the source did with the removed parts set to
        zero (not where hidden dimensions go), and that the folder holds the parameters the plan says.

    Raises:
        PlanError: If the plan is for another model.
        ModelError: If heads and channels of the model cannot be told apart, or the proof fails.
        IntegrityError: If the folder does not hold what it should.
    """
    refuse_narrowed(source)
    dtype = stored_dtype(source)
    model = load_model(source, dtype=dtype, device=device)
    expected = WidthView(model).parameters(plan)
    verdicts = portability_of(plan, layer_facts(model.config))  # of the config before it is changed
    error = narrow_(model, plan)
    save_model(
        model,
        None,
        target,
        dtype=dtype,
        plan=plan,
        source=name or str(source),
        facts={"portability": [vars(verdict) for verdict in verdicts]},
        carried_from=source,
        like=source,
    )
    return check_narrowed(target, expected, error)


def check_narrowed(folder: Path, expected: int, error: float | None) -> VerifyReport:
    """Checks that a written folder loads and has the parameters it should.

    `error` is that of the proof, see `narrowing.narrow_`; None when there was none.

    Raises:
        IntegrityError: If it does not.
    """
    present = count_parameters(load_structure(folder))
    detail = f"{present:,} parameters, {expected:,} by the plan"
    checks: list[Any] = [Check("parameters", present == expected, detail)]
    if error is not None:
        checks.append(Check("logits", True, f"relative error {error:.1e} against zeroed parts"))
    report = VerifyReport(str(folder), "full" if error is not None else "structure", tuple(checks))
    if present != expected:
        raise IntegrityError(f"{folder} failed verification: {detail}.")
    return report
