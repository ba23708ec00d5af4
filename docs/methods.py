"""Tables and drawing of docs/methods.md and docs/comparison.md; see render.py."""

from __future__ import annotations

import json
from typing import Any

from drawing import BENCHMARKS, as_svg, digest, plotting, script

from gradpruner.common.printing import readable_bytes

KINDS = {
    "score": "scores layers",
    "plan": "plans by itself",
    "shrink": "prunes while it trains",
    "callbacks": "changes fine-tuning only",
}


def methods() -> str:
    """The table of all methods."""
    from gradpruner.methods import METHODS

    head = ("method", "what it does", "how it decides", "options", "plain Hugging Face model")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in METHODS.names():
        method = METHODS.find(name)
        kind = next(words for kind, words in KINDS.items() if getattr(method, kind))
        kind += ", from recorded LoRA gradients" * method.needs_trace + ", then recovers" * bool(
            method.recover
        )
        fields = method.options.model_fields.items()
        options = ", ".join(f"{option} = {shown(field.default)}" for option, field in fields)
        plain = "yes" if method.uniform else "no: widths differ between layers"
        lines.append(f"| {name} | {method.description} | {kind} | {options} | {plain} |")
    return "\n".join(lines)


def shown(default: Any) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "yes", False: "no", None: "automatic"}[default]
    return ", ".join(map(str, default)) if isinstance(default, list | tuple) else f"{default}"


def comparison() -> str:
    """The table of every method on every task and mode."""
    module = script("comparison")
    return str(module.markdown(module.load_studies()))


def comparison_balance() -> str:
    """The table of wins and losses of every method."""
    module = script("comparison")
    return str(module.balance(module.load_studies()))


def comparison_costs() -> str:
    """The table of what every method costs before, and saves after."""
    module = script("comparison")
    return str(module.costs(module.load_studies()))


def methods_memory() -> str:
    """The table of memory that decisions need, each measured in its own process."""
    result = json.loads((BENCHMARKS / "results" / "methods_memory.json").read_text(encoding="utf-8"))
    shape = result["config"]
    intro = (
        f"{shape['model']}, {shape['parameters'] / 1e6:.0f} M parameters, {shape['weights']} weights, "
        f"{shape['steps']} steps of {shape['batch_size']} x {shape['tokens']} tokens; every row in a process of its own, "
        f"{shape['rounds']} round{'s' * (shape['rounds'] > 1)}."
    )
    lines = [intro, "", "| what | peak memory | of a plain LoRA training |", "|---|---|---|"]
    for row in result["rows"]:
        name = " ".join([row["what"], *(f"{k} = {v}" for k, v in row["options"].items())])
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | |")
            continue
        lines.append(f"| {name} | {readable_bytes(row['peak_bytes'])} | {row['peak_over_lora']:.3f}x |")
    goal = result["goal"]["evidence_peak_over_lora_at_most"]
    met = "met" if result["met"] else "**not met**"
    return "\n".join([*lines, "", f"Goal: evidence at most {goal}x the peak of lora: {met}."])


def draw_comparison() -> str:
    """Returns the drawing as SVG: the difference of every method to the dense model."""
    pyplot = plotting()
    pyplot.rcParams["font.size"] = 9
    module = script("comparison")
    studies = module.load_studies()
    names = [name for name in module.rows_of(studies[0]) if name != "dense"]
    labels = [module.rows_of(studies[0])[name]["label"] for name in names]
    colours = dict(zip(module.TASKS, ("#2563a8", "#b4552d", "#4d7c2e"), strict=True))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 0.3 * len(names) + 1.2), sharey=True, sharex=True)
    for axes, mode in zip(panels, module.MODES, strict=True):
        axes.axvline(0, color="#888", linewidth=0.8)
        for y, name in enumerate(names):
            means = []
            for place, task in enumerate(module.TASKS):
                for study in studies:
                    pairs = module.by_seed(study, name, "dense")
                    if study["task"] == task and study["mode"] == mode and pairs:
                        points = [100 * (a - b) / b for a, b in pairs]
                        means += points
                        level = [y + 0.22 * (place - 1)] * len(points)
                        axes.plot(points, level, "o", markersize=3, color=colours[task], alpha=0.75)
            if means:
                axes.plot(sum(means) / len(means), y, "|", markersize=13, color="black", markeredgewidth=1.6)
        axes.set_title({"full": "full fine-tuning", "lora": "LoRA"}[mode], fontsize=10)
        axes.set_xlabel("above or below dense, % of its value")
        axes.grid(axis="y", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), labels)
    panels[0].invert_yaxis()
    for task, colour in colours.items():
        panels[1].plot([], [], "o", markersize=4, color=colour, label=task)
    panels[1].plot([], [], "|", markersize=11, color="black", label="mean of all", markeredgewidth=1.6)
    figure.legend(loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return as_svg(figure, comparison_digest())


def comparison_digest() -> str:
    """The digest of the data the drawing shows."""
    module = script("comparison")
    return digest(
        [
            [study["task"], study["mode"], name, module.by_seed(study, name, "dense")]
            for study in module.load_studies()
            for name in module.rows_of(study)
        ]
    )


BLOCKS = {
    "methods": methods,
    "comparison": comparison,
    "comparison_balance": comparison_balance,
    "comparison_costs": comparison_costs,
    "methods_memory": methods_memory,
}
