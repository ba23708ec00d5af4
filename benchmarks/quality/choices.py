"""The ways to choose layers in the study, each applied to the model to prune and its training rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from work import Work

CHOICES = ("gate", "gate_pairwise", "igia", "shortgpt", "last", "random")
RECORD_STEPS, RECORD_BATCH = 40, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "gate_pairwise": {"pairwise": True},
    # Candidates are compared by loss on held-out rows, without training; the greedy search has its own cell.
    "auto": {
        "families": ["gate", "gate_pairwise", "gradpruner", "shortgpt", "last", "window"],
        "rounds": 0,
        "repair_rows": 384,
    },
}


def trace_of(work: Work, folder: Path) -> Any:
    """Returns the recorded gradients of a model, recorded once and kept in the scratch folder."""
    from gradpruner.gradients.trace import GradientTrace
    from gradpruner.training.recording import record_gradients

    kept = work.scratch / f"trace-{folder.name}-{work.task}-{work.seed}"
    if not (kept / "trace.json").exists():
        started = time.perf_counter()
        trace = record_gradients(
            work.load(folder),
            work.encoded["train"],
            steps=RECORD_STEPS,
            batch_size=RECORD_BATCH,
            collator=work.collator,
            folder=kept,
            seed=work.seed,
            device=work.device,
            precision="fp32",
        )
        print("recorded", folder.name, trace.num_steps, f"{time.perf_counter() - started:.0f} s", flush=True)
    return GradientTrace.load(kept)


def choose(work: Work, folder: Path, choice: str, gone: int) -> tuple[Any, dict[str, Any]]:
    """Returns the plan that a choice makes ("paper" merges, others drop), and a summary of its evidence."""
    from gradpruner.methods import METHODS, MethodContext
    from gradpruner.plans.selection import plan_pruning

    name = {"igia": "gradpruner", "paper": "gradpruner", "gate_pairwise": "gate"}.get(choice, choice)
    method = METHODS.find(name)
    num_layers = work.num_layers
    options = method.read_options(name, OPTIONS.get(choice, {}))
    context = MethodContext(
        num_layers=num_layers,
        seed=work.seed,
        trace=lambda: trace_of(work, folder),
        model=lambda: work.load(folder),
        samples=work.encoded["train"],
        collator=work.collator,
        num_keep=num_layers - gone,
        protected=(0,),
        options=options,
    )
    started = time.perf_counter()
    if method.plan is not None:
        plan = method.plan(context)
        found = {key: plan.evidence[key] for key in ("winner", "candidates", "failed")}
        return plan, {**found, "seconds": round(time.perf_counter() - started, 1)}
    assert method.score is not None
    scores = method.score(context)
    num_merge = 3 if choice == "paper" else 0
    plan = plan_pruning(scores, num_prune=gone, num_merge=num_merge, protect_first=1)
    return plan, {"scores": list(scores.values), "seconds": round(time.perf_counter() - started, 1)}
